"""Proof that one image decodes, and its normal form: what training may meet is decided here, once."""

import contextlib
import io
import re
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

from PIL import Image, ImageFile, UnidentifiedImageError

# No format that runs an interpreter (EPS) or hides several images; the content decides, not the file's name.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 178_956_970  # where Pillow, too, suspects a decompression bomb
JPEG_QUALITY = 95
_EXT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_SUFFIXES = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",)}
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE = 258  # a TIFF tag


class BadImage(Exception):
    """The image cannot be used; `reason` says why, in the same words on every machine."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Stored:
    """An image as the shard stores it: 8-bit grey or RGB, upright, one frame.

    data: encoded bytes; ext: jpg, png or webp; width, height: pixels; channels: 1 or 3; how: "kept", or
    "re-encoded: " and the reasons.
    """

    data: bytes
    ext: str
    width: int
    height: int
    channels: int
    how: str


def prove(data: bytes, name: str, max_pixels: int = MAX_PIXELS) -> Stored:
    """Decodes the whole image and returns what to store; clean images are kept byte for byte.

    Raises BadImage for what cannot be decoded completely, has more than 8 bits a channel, more than one
    frame, or more than `max_pixels` pixels. JPEGs are re-encoded as JPEG, all others as PNG.
    """
    if not data:
        raise BadImage("empty file (0 bytes)")
    with _strict_pillow():
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            kind = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG with more behind it
            _refuse(image, kind, data, max_pixels)
            image.load()
            if kind == "PNG":
                _check_png(data)
            # After load(), which has already turned a TIFF.
            orientation = _orientation(image)
            reasons = _reasons(image, kind, data, orientation)
            if reasons:
                image = _upright_8_bit(image, orientation)
                kept, how = _encode(image, kind), "re-encoded: " + ", ".join(reasons)
                kind = "JPEG" if kind == "JPEG" else "PNG"
            else:
                kept, how = data, _kept(kind, name)
        except UnidentifiedImageError:
            raise BadImage("not readable as JPEG, PNG, WebP, BMP, TIFF or GIF") from None
        except (BadImage, MemoryError):
            raise
        except Exception as fault:  # on damaged input Pillow raises almost anything
            raise BadImage(_words(fault)) from fault
    return Stored(kept, _EXT[kind], image.width, image.height, len(image.getbands()), how)


def _refuse(image: Image.Image, kind: str, data: bytes, max_pixels: int) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise BadImage(f"no pixels ({width} x {height})")
    if width * height > max_pixels:
        raise BadImage(f"{width} x {height} pixels, more than the limit of {max_pixels}")
    if kind != "JPEG" and getattr(image, "is_animated", False):
        raise BadImage(
            f"animated or several pages ({getattr(image, 'n_frames', 2)} frames); only one is supported"
        )
    # Pillow would cut 16-bit colour down to 8 without a word, so its mode alone does not tell.
    deep = image.mode.startswith(("I", "F"))
    if kind == "PNG":
        deep = deep or _png_depth(data) > 8
    elif kind == "TIFF":
        deep = deep or max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (1,))) > 8
    if deep:
        raise BadImage("more than 8 bits a channel; only 8-bit images are supported for now")


def _reasons(image: Image.Image, kind: str, data: bytes, orientation: int) -> list[str]:
    reasons = []
    if kind not in _EXT:
        reasons.append(f"{kind} to PNG")
    if orientation in _TURNS:
        reasons.append("EXIF rotation")
    elif orientation < 0:
        reasons.append("unreadable EXIF")
    if _has_alpha(image):
        reasons.append("alpha on white")
    elif image.mode == "P":
        reasons.append("palette to RGB")
    elif image.mode == "1":
        reasons.append("1-bit to grey")
    elif image.mode not in ("L", "RGB"):
        reasons.append(f"{image.mode} to RGB")
    elif kind == "PNG" and _png_depth(data) < 8:
        reasons.append(f"{_png_depth(data)}-bit to 8-bit")
    if kind == "JPEG" and not _clean_header(data):
        reasons.append("mended JPEG header")
    return reasons


def _upright_8_bit(image: Image.Image, orientation: int) -> Image.Image:
    if _has_alpha(image):
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("L" if grey else "RGB")
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def _encode(image: Image.Image, kind: str) -> bytes:
    # Comments, profiles and transparency would otherwise travel along.
    image.info.clear()
    out = io.BytesIO()
    if kind == "JPEG":
        image.save(out, "JPEG", quality=JPEG_QUALITY)
    else:
        image.save(out, "PNG")
    return out.getvalue()


def _kept(kind: str, name: str) -> str:
    suffix = PurePosixPath(name).suffix.lower()
    return "kept" if suffix in _SUFFIXES[kind] else f"kept: {kind} named {suffix or 'without extension'}"


def _has_alpha(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8; 0 when there is none, -1 when the EXIF block cannot be read."""
    try:
        return int(image.getexif().get(_ORIENTATION, 0))
    except Exception:  # Pillow raises almost anything on a damaged block
        return -1


def _png_depth(data: bytes) -> int:
    return data[24]  # signature 8, chunk head 8, width 4, height 4


def _check_png(data: bytes) -> None:
    """Raises BadImage unless every chunk is whole; Pillow checks neither pixel chunks' sums nor the end.

    libpng does check them: one such file ends a DALI pipeline.
    """
    at = 8
    while True:
        if at + 12 > len(data):
            raise BadImage("damaged PNG: the end is missing")
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            raise BadImage("damaged PNG: the end is missing")
        if zlib.crc32(memoryview(data)[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise BadImage("damaged PNG: a checksum does not match")
        if data[at + 4 : at + 8] == b"IEND":
            return
        at = end + 4


def _clean_header(data: bytes) -> bool:
    """Whether the JPEG's segments follow one another without gaps up to the first scan.

    libjpeg skips stray bytes between segments, DALI's parser refuses them.
    """
    at = 2
    while at + 4 <= len(data) and data[at] == 0xFF:
        marker = data[at + 1]
        if marker == 0xFF:  # padding
            at += 1
            continue
        if marker == 0xDA:
            return True
        if marker == 0x00 or 0xD0 <= marker <= 0xD9:
            return False
        at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return False


def _words(fault: Exception) -> str:
    # Addresses of objects differ between runs, and quarantine.jsonl must not.
    text = re.sub(r"<[^>]* at 0x[0-9a-f]+>", "file", str(fault)).strip()
    return f"damaged: {text or type(fault).__name__}"


@contextlib.contextmanager
def _strict_pillow() -> Iterator[None]:
    """Pillow's global switches as they must be here, whatever another library has set; limits are ours."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before
