"""Pixels beyond what JPEG, PNG and WebP hold for every decoder: arrays of any channels, 8 or 16 bit or float."""

from __future__ import annotations

import io
import re
import warnings
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image
from xxhash import xxh3_128

NPY_MAGIC = b"\x93NUMPY"
DTYPES = ("uint8", "uint16", "float32")
SAMPLE_SIDE = 32  # an image gives at most so many rows and columns to the statistics
_ADDRESS = re.compile(r"<[^>]* at 0x[0-9a-f]+>")


@dataclass(frozen=True, slots=True)
class Pixels:
    """Pixels that a source has read itself. values: (H, W, C) uint8, uint16 or float32.

    known: bool (H, W, C), where there is data; None for everywhere. fill: what stands in each channel where there is none, or None.
    alpha: whether the last channel is declared as transparency; cmyk: whether the file is; frames: of the file, these being the first.
    """

    values: npt.NDArray
    known: npt.NDArray[np.bool_] | None = None
    fill: tuple[float | None, ...] = ()
    alpha: bool = False
    cmyk: bool = False
    frames: int = 1

    def without_last(self) -> Pixels:
        """All but the last channel."""
        known = None if self.known is None else self.known[:, :, :-1]
        return Pixels(np.ascontiguousarray(self.values[:, :, :-1]), known, self.fill[:-1])


class BadImage(Exception):
    """The image cannot be used; `reason` says why, in the same words on every machine."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def damage(error: Exception) -> BadImage:
    """What a decoder said of a damaged file, without addresses of objects, which differ between runs."""
    text = _ADDRESS.sub("file", str(error)).strip()
    return BadImage(f"damaged: {text or type(error).__name__}")


def pixels_hash(pixels: npt.NDArray, whole_size: tuple[int, int] | None = None) -> str:
    """XXH3, 128 bit, 32 hexadecimal digits, of shape, dtype and values of (H, W, C) pixels.

    `whole_size`: (width, height) of the image that these are a smaller copy of; taken in too.
    """
    digest = xxh3_128(f"{whole_size or ''}{pixels.shape}{pixels.dtype.str}".encode())
    digest.update(np.ascontiguousarray(pixels).data.cast("B"))
    return digest.hexdigest()


def sampled(pixels: npt.NDArray) -> npt.NDArray:
    """A regular grid of at most SAMPLE_SIDE x SAMPLE_SIDE pixels of (H, W, C): (k, C), in rows."""
    height, width, channels = pixels.shape
    rows, columns = -(-height // SAMPLE_SIDE), -(-width // SAMPLE_SIDE)
    if not pixels.flags.c_contiguous:
        return pixels[rows // 2 :: rows, columns // 2 :: columns].reshape(-1, channels)
    # A pixel as one item: numpy then copies whole pixels, not channel after channel (a third of the time).
    whole = pixels.view(np.dtype((np.void, channels * pixels.itemsize)))[:, :, 0]
    taken = np.ascontiguousarray(whole[rows // 2 :: rows, columns // 2 :: columns])
    return taken.view(pixels.dtype).reshape(-1, channels)


def read_npy(data: bytes | memoryview) -> npt.NDArray:
    """The array of a .npy file as (H, W, C), not copied; BadImage for pickles, other shapes and other types of number."""
    file = io.BytesIO(data)
    try:
        version = np.lib.format.read_magic(file)
        read = (
            np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        )
        shape, by_columns, dtype = read(file)
    except Exception as error:  # numpy raises several kinds
        raise damage(error) from error
    if dtype.hasobject:
        raise BadImage("an array of Python objects (pickled); numbers are wanted")
    # Before anything is allocated: a header may claim any shape.
    wanted, found = int(np.prod(shape, dtype=object)) * dtype.itemsize, len(data) - file.tell()
    if wanted != found:
        raise BadImage(f"damaged: the array's header tells of {wanted} bytes, the file holds {found}")
    pixels = np.frombuffer(data, dtype, offset=file.tell()).reshape(shape, order="F" if by_columns else "C")
    return checked(pixels[:, :, None] if pixels.ndim == 2 else pixels)


def write_npy(pixels: npt.NDArray) -> bytes:
    """The bytes of a .npy file (version 1.0, C order): the same pixels give the same bytes."""
    out = io.BytesIO()
    np.lib.format.write_array(out, np.ascontiguousarray(pixels), version=(1, 0), allow_pickle=False)
    return out.getvalue()


def checked(pixels: npt.NDArray) -> npt.NDArray:
    """The pixels, (H, W, C), in one of DTYPES of this machine's byte order; BadImage where that would lose something.

    Other numbers are taken as float32 where it holds each of them exactly: the type of the result does not hang on the values. bool is
    taken as 0 and 255.
    """
    if pixels.ndim != 3 or 0 in pixels.shape:
        wanted = "(height, width) or (height, width, channels) is wanted"
        raise BadImage(f"an array of shape {pixels.shape}; {wanted}")
    dtype = pixels.dtype.newbyteorder("=")
    if dtype.name in DTYPES:
        return pixels.astype(dtype, copy=False)
    if dtype.kind == "b":
        return pixels.astype(np.uint8) * np.uint8(255)
    if dtype.kind in "iuf":
        with np.errstate(all="ignore"):
            taken = pixels.astype(np.float32)
            if np.array_equal(taken.astype(dtype), pixels, equal_nan=dtype.kind == "f"):
                return taken
    raise BadImage(f"numbers of type {dtype}, which uint8, uint16 and float32 cannot hold without loss")


def declared(values: npt.NDArray, nodata: float | None, white_is_zero: bool = False) -> Pixels:
    """Pixels (H, W, C) of a file that declares `nodata` to be none; where larger values are darker (`white_is_zero`), turned over."""
    known = None
    if nodata is not None:
        known = (
            ~np.isnan(values)
            if np.isnan(nodata)
            else values != np.asarray(nodata).astype(np.result_type(values, np.float32))
        )
    fill = nodata
    if white_is_zero and values.dtype.kind == "u":
        largest = np.iinfo(values.dtype).max
        values = largest - values
        fill = None if nodata is None else largest - nodata
    return Pixels(values, known, (fill,) * values.shape[2] if nodata is not None else ())


def to_8_bit(pixels: npt.NDArray, known: npt.NDArray[np.bool_] | None = None) -> npt.NDArray[np.uint8]:
    """uint16 from 0..65535, or float32 from 0..1, scaled to 0..255 and rounded; BadImage for floats beyond 0..1.

    `known`: where there is data, (H, W, C); elsewhere 0 is given.
    """
    if known is not None:
        pixels = np.where(known, pixels, pixels.dtype.type(0))
    if pixels.dtype == np.uint16:
        return ((pixels.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8)
    if pixels.dtype == np.float32:
        low, high = float(pixels.min()), float(pixels.max())  # NaN, if there is one
        if not (low >= 0 and high <= 1):
            raise BadImage(
                f"floating point values from {low:g} to {high:g}; only 0 to 1 can be scaled to 8 bits"
            )
        return np.rint(pixels * 255).astype(np.uint8)
    return pixels


def read_deep(data: bytes, image: Image.Image | None, max_pixels: int) -> npt.NDArray:
    """All channels and bits of a TIFF or PNG that Pillow would cut down, (H, W, C), as the file lays them.

    `image`: opened by Pillow, if it could. Raise BadImage where rasterio is needed and missing.
    """
    if image is not None and image.mode.startswith(("I;16", "F")):  # one channel, which Pillow reads whole
        image.load()
        return checked(np.asarray(image)[:, :, None])
    try:
        from rasterio.io import MemoryFile
    except ImportError:
        raise BadImage(
            "more than 8 bits or 4 channels: reading it needs rasterio, pip install rasterio"
        ) from None
    # One driver, for what the content is: GDAL knows formats that open other files or addresses.
    driver = "PNG" if image is not None and image.format == "PNG" else "GTiff"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such as: it has no georeference
        try:
            with MemoryFile(data) as memory, memory.open(driver=driver) as raster:
                if raster.width * raster.height > max_pixels:
                    raise BadImage(
                        f"{raster.width} x {raster.height} pixels, more than the limit of {max_pixels}"
                    )
                pixels = raster.read()
        except BadImage:
            raise
        except Exception as error:  # rasterio raises several kinds
            raise damage(error) from error
    return checked(np.moveaxis(pixels, 0, 2))


def resized(pixels: npt.NDArray, width: int, height: int) -> npt.NDArray:
    """(H, W, C) scaled with Pillow's antialiased Lanczos filter, channel by channel, in 32-bit floats; the dtype stays."""
    return _typed(
        np.stack([_lanczos(plane, width, height) for plane in np.moveaxis(pixels, 2, 0)], axis=2),
        pixels.dtype,
    )


def resized_known(data: Pixels, width: int, height: int) -> Pixels:
    """As `resized`, but what holds no data has no part in any value: the weights of the other pixels are brought to a sum of one.

    Where less than half of the weight is known there is no data: the fill, or what `resized` gives where there is no such value.
    """
    if data.known is None:
        return Pixels(resized(data.values, width, height), None, data.fill, data.alpha)
    planes, knowns = [], []
    for channel in range(data.values.shape[2]):
        plane, known = data.values[:, :, channel], data.known[:, :, channel]
        weight = _lanczos(known, width, height)
        inside = weight >= 0.5
        fill = data.fill[channel] if data.fill else None
        if fill is None and np.isnan(plane).any():
            fill = np.nan
        if fill is None:
            planes.append(_lanczos(plane, width, height))
        else:
            sums = _lanczos(np.where(known, plane, plane.dtype.type(0)), width, height)
            planes.append(np.where(inside, sums / np.where(inside, weight, 1), np.float32(fill)))
        knowns.append(inside)
    values = _typed(np.stack(planes, axis=2), data.values.dtype)
    return Pixels(values, np.stack(knowns, axis=2), data.fill, data.alpha)


def _lanczos(plane: npt.NDArray, width: int, height: int) -> npt.NDArray[np.float32]:
    image = Image.fromarray(plane.astype(np.float32))
    return np.asarray(image.resize((width, height), Image.Resampling.LANCZOS))


def _typed(stacked: npt.NDArray, dtype: np.dtype) -> npt.NDArray:
    if dtype == np.float32:
        return stacked
    return np.clip(np.rint(stacked), 0, np.iinfo(dtype).max).astype(dtype)


def turned(pixels: npt.NDArray, orientation: int) -> npt.NDArray:
    """The pixels (H, W, C) as Pillow's transpose for this EXIF orientation lays them."""
    turns = {
        2: lambda p: p[:, ::-1],
        3: lambda p: p[::-1, ::-1],
        4: lambda p: p[::-1],
        5: lambda p: p.swapaxes(0, 1),
        6: lambda p: np.rot90(p, -1),
        7: lambda p: p[::-1, ::-1].swapaxes(0, 1),
        8: lambda p: np.rot90(p, 1),
    }
    return np.ascontiguousarray(turns[orientation](pixels)) if orientation in turns else pixels
