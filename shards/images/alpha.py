"""What becomes of what a file declares: transparency, several frames, CMYK."""

from __future__ import annotations

import numpy as np
from PIL import Image

from shards.images.pillow import TURNS
from shards.images.pixels import BadImage, Pixels, to_8_bit
from shards.images.policy import Policy
from shards.images.tiff import TiffHeader

ALPHA_WORDS = {"white": "alpha on white", "black": "alpha on black", "drop": "alpha dropped"}


def has_alpha(image: Image.Image) -> bool:
    """Whether some of an image may be transparent."""
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def refuse_alpha(policy: Policy) -> None:
    """Raise BadImage where the policy refuses transparency."""
    if policy.alpha == "refuse":
        raise BadImage("has an alpha channel, which the policy refuses")


def upright_8_bit(image: Image.Image, turn: int, alpha: str) -> Image.Image:
    """The image as gray or RGB, turned by its EXIF orientation; `alpha`: white, black or drop."""
    if has_alpha(image):
        gray = image.mode in ("1", "L", "LA", "La")
        image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        if alpha != "drop":
            image = Image.alpha_composite(Image.new("RGBA", image.size, alpha), image)
        image = image.convert("RGB")
        image = image.getchannel(0) if gray else image
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image.transpose(TURNS[turn]) if turn in TURNS else image


def deep_alpha(data: Pixels, policy: Policy) -> tuple[Pixels, list[str]]:
    """What the policy makes of pixels whose last channel is declared as alpha, and the words for it.

    More than 8 bits have nothing to be laid on, unless they are scaled to 8. Raise BadImage where alpha is refused.
    """
    refuse_alpha(policy)
    if policy.alpha == "drop":
        return data.without_last(), [ALPHA_WORDS["drop"]]
    deep = data.values.dtype != np.uint8
    if policy.alpha == "keep" or (deep and policy.deep != "8bit") or data.values.shape[2] not in (2, 4):
        return data, []
    values = to_8_bit(data.values, data.known)
    flat = np.asarray(
        upright_8_bit(Image.fromarray(values, "LA" if values.shape[2] == 2 else "RGBA"), 0, policy.alpha)
    )
    without = data.without_last()
    return (
        Pixels(flat[:, :, None] if flat.ndim == 2 else flat, without.known),
        [ALPHA_WORDS[policy.alpha], *(["scaled to 8 bits"] if deep else [])],
    )


def as_declared(data: Pixels, policy: Policy) -> tuple[Pixels, list[str]]:
    """What the policy makes of what the file of a raster's pixels declares, and the words for it. Raise BadImage for what it refuses.

    Of alpha `white` keeps a channel here: GDAL declares the fourth band of any 8-bit file so.
    """
    words = _of_several(data.frames, policy)
    if data.cmyk:
        if policy.cmyk == "refuse":
            raise BadImage("CMYK, which the policy refuses")
        # GDAL has made it RGB, with an alpha that says nothing.
        return data.without_last(), [*words, "CMYK to RGB"]
    if data.alpha and policy.alpha != "white":
        data, more = deep_alpha(data, policy)
        words += more
    return data, words


def first_frame(image: Image.Image | None, kind: str, tiff: TiffHeader | None, policy: Policy) -> list[str]:
    """The words for an image of several frames, none for one frame. Raise BadImage where the policy refuses several."""
    if tiff:
        frames = tiff.pages
    elif kind != "JPEG" and getattr(image, "is_animated", False):
        frames = getattr(image, "n_frames", 2)
    else:
        return []
    return _of_several(frames, policy)


def _of_several(frames: int, policy: Policy) -> list[str]:
    if frames > 1 and policy.animated == "refuse":
        raise BadImage(f"animated or several pages ({frames} frames); only one is supported")
    return ["first frame"] if frames > 1 else []
