"""What a TIFF itself says where decoders are silent: bits, bands, pages."""

from __future__ import annotations

import io
from dataclasses import dataclass

from PIL import TiffImagePlugin

from shards.images.pixels import BadImage

TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")  # the last two: BigTIFF
# TIFF 6.0, section 8
_WIDTH, _HEIGHT, _BITS, _PHOTOMETRIC, _ORIENTATION, _SAMPLES = (256, 257, 258, 262, 274, 277)
_SUBFILE, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 254, 338, 339
_GDAL_NODATA = 42113  # gdal.org/en/stable/drivers/raster/gtiff.html: a number as text
_COLOURS = {2: 3, 5: 4, 6: 3, 8: 3}  # samples that a photometric interpretation needs; 1 for the others
_NO_PAGE = 1 | 4  # NewSubfileType: a smaller copy (an overview), a transparency mask
_MAX_PAGES = 10_000


@dataclass(frozen=True, slots=True)
class TiffHeader:
    """size: (width, height) as the file lays it; bits: of the widest sample; plain: unsigned colours that Pillow reads whole, with at
    most an alpha channel; alpha: has one; pages: images that are not overviews or masks of another; white_is_zero: larger values are
    darker; nodata: the value that GDAL declares to be none, or None."""

    size: tuple[int, int]
    bits: int
    plain: bool
    alpha: bool
    orientation: int
    pages: int
    white_is_zero: bool
    nodata: float | None


def tiff_header(data: bytes) -> TiffHeader:
    """The tags of a TIFF's first page."""
    file = io.BytesIO(data)
    big = data[2:3] == b"+" or data[3:4] == b"+"
    tags = TiffImagePlugin.ImageFileDirectory_v2(data[: 16 if big else 8])
    first, pages, seen = None, 0, set()
    while tags.next and tags.next not in seen and len(seen) < _MAX_PAGES:
        seen.add(tags.next)
        file.seek(tags.next)
        tags.load(file)
        first = first or dict(tags)
        pages += not tags.get(_SUBFILE, 0) & _NO_PAGE
    if not first:
        raise BadImage("damaged: a TIFF without a directory")
    bits = max(_numbers(first, _BITS, 1))
    samples, extra = first.get(_SAMPLES, 1), _numbers(first, _EXTRA_SAMPLES, 0)
    num_extra = samples - _COLOURS.get(first.get(_PHOTOMETRIC, 1), 1)
    alpha = num_extra == 1 and extra[0] in (1, 2)
    unsigned = set(_numbers(first, _SAMPLE_FORMAT, 1)) <= {1, 4}
    size = first.get(_WIDTH, 0), first.get(_HEIGHT, 0)
    plain = bits <= 8 and unsigned and (num_extra <= 0 or alpha)
    turn, white_is_zero = first.get(_ORIENTATION, 1), first.get(_PHOTOMETRIC, 1) == 0
    return TiffHeader(size, bits, plain, alpha, turn, max(1, pages), white_is_zero, _nodata(first))


def _nodata(tags: dict) -> float | None:
    try:
        return float(str(tags[_GDAL_NODATA]).strip(" \0"))
    except (KeyError, ValueError):
        return None


def _numbers(tags: dict, tag: int, default: int) -> tuple[int, ...]:
    found = tags.get(tag, default)
    return found if isinstance(found, tuple) else (found,)
