"""Colors to sRGB, for images that lose their ICC profile because they are re-encoded."""

from __future__ import annotations

import io
from functools import lru_cache
from typing import Any

import numpy as np
from PIL import Image, ImageCms

_SAME = 2  # levels of 255: a profile that changes no color by more is sRGB, whatever it is called
_PROBED = 5  # values of each channel that are looked at
_IN = {"RGB": "RGB", "RGBA": "RGBA", "CMYK": "CMYK"}
_WORDS = "colors to sRGB"


def in_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, list[str]]:
    """Return an image of 8 bits with its colors in sRGB, and the words for that; none where it is as it was.

    That is where it has no profile, one that is sRGB's, damaged, or not one of colors. Relative colorimetric: what both know stays,
    what sRGB cannot show becomes its nearest color (ICC.1:2022, 6.2.2). Alpha stays.
    """
    if not profile:
        return image, []
    colored = image
    if image.mode in ("P", "PA"):
        colored = image.convert("RGBA" if image.mode == "PA" or "transparency" in image.info else "RGB")
    transform = _transform(profile, colored.mode) if colored.mode in _IN else None
    if transform is None:
        return image, []
    converted = ImageCms.applyTransform(colored, transform)
    assert converted is not None, "it is not in place"
    return converted, [_WORDS]


@lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Any:
    try:
        known = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        transform = ImageCms.buildTransform(
            known,
            ImageCms.createProfile("sRGB"),
            _IN[mode],
            "RGBA" if mode == "RGBA" else "RGB",
            ImageCms.Intent.RELATIVE_COLORIMETRIC,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return None
    if mode == "CMYK":
        return transform
    steps = np.linspace(0, 255, _PROBED).astype(np.uint8)
    probe = np.stack(np.meshgrid(steps, steps, steps), axis=3).reshape(1, -1, 3)
    given = Image.fromarray(probe).convert(mode)
    found = ImageCms.applyTransform(given, transform)
    assert found is not None, "it is not in place"
    change = np.abs(np.asarray(found.convert("RGB"), np.int64) - probe)
    return transform if change.max() > _SAME else None


def jpeg_profile(data: bytes) -> bytes | None:
    """The ICC profile of a JPEG; None where it has none."""
    if b"ICC_PROFILE\0" not in data[: data.find(b"\xff\xda") + 1 or None]:
        return None
    with Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
        return image.info.get("icc_profile")
