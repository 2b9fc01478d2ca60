"""A finished shard folder, and images to append to it."""

import shutil
from pathlib import Path

from shards.conversion.convert import convert
from tests.pictures import encoded, picture


def images(root: Path, seeds: range, *classes: str) -> Path:
    for i in seeds:
        path = root / (classes[i % len(classes)] if classes else ".") / f"{i:03d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(i, (24, 16)), "JPEG"))
    return root


def begin(root: Path) -> Path:
    """first/: 14 images of bee and ant; second/: 10 of cow and ant, one of them inside first, and one that is broken.

    shards/ holds the first, 5 in a shard.
    """
    images(root / "first", range(14), "bee", "ant")
    images(root / "second", range(20, 29), "cow", "ant")
    shutil.copy(root / "first" / "bee" / "004.jpg", root / "second" / "cow" / "again.jpg")
    (root / "second" / "cow" / "broken.jpg").write_bytes(b"text")
    (root / "first" / "ant" / "broken.jpg").write_bytes(b"text")
    convert(root / "first", root / "shards", samples_per_shard=5)
    return root
