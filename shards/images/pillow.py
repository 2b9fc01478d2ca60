"""Pillow, configured: its global switches, EXIF rotations, encoders, and its many kinds of error."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

from PIL import Image, ImageFile

from shards.images.jpeg import ORIENTATION
from shards.images.pixels import BadImage, damage

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LARGEST = {"JPEG": 65_500, "WEBP": 16_383}  # sides, of libjpeg and of the format


def encode(image: Image.Image, kind: str, quality: int) -> bytes:
    """The image as a JPEG, PNG or WebP file, without comments, profiles and the like."""
    if max(image.size) > _LARGEST.get(kind, max(image.size)):
        raise BadImage(
            f"{image.width} x {image.height} pixels, but {kind} holds sides up to {_LARGEST[kind]}"
        )
    image.info.clear()
    out = io.BytesIO()
    image.save(out, kind, **({} if kind == "PNG" else {"quality": quality}))
    return out.getvalue()


def orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8; 0 when there is none, -1 when the EXIF block cannot be read."""
    try:
        return int(image.getexif().get(ORIENTATION, 0))
    except Exception:  # Pillow raises almost anything on a damaged block
        return -1


@contextlib.contextmanager
def as_damage() -> Iterator[None]:
    """Turn whatever a decoder or encoder raises, on damaged input almost anything, into BadImage."""
    try:
        yield
    except (BadImage, MemoryError):
        raise
    except Exception as error:
        raise damage(error) from error


@contextlib.contextmanager
def strict_pillow() -> Iterator[None]:
    """Pillow's global switches as they must be here, whatever another library has set; limits are ours."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    quiet = logging.getLogger("PIL.TiffImagePlugin")  # it prints what is then read by another library
    disabled, quiet.disabled = quiet.disabled, True
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before
        quiet.disabled = disabled
