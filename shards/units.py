"""Numbers of bytes, seconds and things as people write them."""

import re

from shards.errors import UserError

_UNITS = {"": 1, "b": 1} | {
    prefix + ("ib" if base == 1024 else "b"): base**power
    for base in (1000, 1024)
    for power, prefix in enumerate("kmgt", 1)
}


def human_size(num_bytes: float) -> str:
    """Bytes with a unit that suits them: 1,234 B, 12.3 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:,.0f} {unit}" if unit == "B" else f"{num_bytes:,.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.1f} TB"


def human_time(seconds: float) -> str:
    """Return a time with the units that suit it: 45 s, 3 min, 2 h 5 min, 10 days."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    if minutes < 60:
        return f"{minutes} min"
    if minutes < 48 * 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{seconds / 86400:,.0f} days"


def plural(count: int, noun: str, nouns: str = "") -> str:
    """1 image, 2,000 images; `nouns` where that is not the noun with an s."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def parse_bytes(text: str) -> int:
    """A number of bytes from `200GB`, `1.5 TB`, `512MiB` or `1000000`; UserError where it is none, or not above 0."""
    found = re.fullmatch(r"([0-9.]+)\s*([a-z]*)", text.strip().lower())
    try:
        assert found
        size = int(float(found[1]) * _UNITS[found[2]])
        assert size > 0
    except (AssertionError, ValueError, KeyError):
        raise UserError(f"'{text}' is no number of bytes; write it as 200GB, 1.5TB or 512MiB.") from None
    return size
