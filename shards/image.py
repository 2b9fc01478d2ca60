"""Proof that one image decodes, and its normal form: what training may meet is decided here, once."""

from __future__ import annotations

import contextlib
import io
import struct
import warnings
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
import numpy.typing as npt
import simplejpeg
from PIL import Image, ImageFile, UnidentifiedImageError

from shards.pixels import (
    NPY_MAGIC,
    BadImage,
    damage,
    pixels_hash,
    read_deep,
    read_npy,
    resized,
    sampled,
    to_8_bit,
    turned,
    write_npy,
)
from shards.policy import Policy

# No format that runs an interpreter (EPS) or hides several images; the content decides, not the file's name.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")
_EXT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_STORE = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
_SUFFIXES = {"JPEG": (".jpg", ".jpeg"), "PNG": (".png",), "WEBP": (".webp",)}
_TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
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
_DEFAULT = Policy()


@dataclass(frozen=True, slots=True)
class Stored:
    """An image as the shard stores it: upright, one frame.

    data: encoded bytes; ext: jpg, png, webp (8 bit, 1 or 3 channels) or npy ((H, W, C) uint8, uint16 or float32); width, height:
    pixels; how: "kept", or "re-encoded: " and the reasons; pixels_hash: of the pixels before a lossy encoder saw them; sample:
    (k, channels) pixels for statistics; file_size: (width, height) before turning and scaling; turn: EXIF orientation that was baked
    in, 0 for none.
    """

    data: bytes
    ext: str
    width: int
    height: int
    channels: int
    dtype: str
    how: str
    pixels_hash: str
    sample: npt.NDArray
    file_size: tuple[int, int]
    turn: int = 0


def prove(data: bytes, name: str, policy: Policy = _DEFAULT) -> Stored:
    """Decodes the whole image and returns what to store; what `policy` keeps is kept byte for byte.

    Raises BadImage for what cannot be decoded completely, or what the policy refuses.
    """
    if not data:
        raise BadImage("empty file (0 bytes)")
    if data.startswith(NPY_MAGIC):
        return prove_pixels(read_npy(data), name, policy)
    with strict_pillow():
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            if data.startswith(_TIFF_MAGIC):
                return _prove_deep(data, None, name, policy)
            raise BadImage("not readable as JPEG, PNG, WebP, BMP, TIFF, GIF or NumPy array") from None
        except Exception as fault:  # on damaged input Pillow raises almost anything
            raise damage(fault) from fault
        try:
            return _prove_opened(image, data, name, policy)
        except (BadImage, MemoryError):
            raise
        except Exception as fault:
            raise damage(fault) from fault


def _prove_opened(image: Image.Image, data: bytes, name: str, policy: Policy) -> Stored:
    kind = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG with more behind it
    check_size(*image.size, policy)
    reasons = []
    if kind != "JPEG" and getattr(image, "is_animated", False):
        if policy.animated == "refuse":
            frames = getattr(image, "n_frames", 2)
            raise BadImage(f"animated or several pages ({frames} frames); only one is supported")
        reasons.append("first frame")
    if _is_deep(image, kind, data):
        return _prove_deep(data, image, name, policy)
    file_size = image.size
    pixels = _decoded_jpeg(image, data, policy) if kind == "JPEG" else None
    if pixels is None:
        image.load()
    if kind == "PNG":
        _check_png(data)
    # After load(), which has already turned a TIFF.
    turn = _orientation(image)
    reasons += _reasons(image, kind, data, turn)
    if (
        kind == "JPEG"
        and pixels is None
        and image.mode in ("L", "RGB")
        and "mended JPEG header" not in reasons
    ):
        reasons.append("damaged JPEG data")
    if image.mode == "CMYK" and policy.cmyk == "refuse":
        raise BadImage("CMYK, which the policy refuses")
    if _has_alpha(image) and policy.alpha == "keep":
        image.load()
        pixels = turned(np.asarray(image.convert("RGBA")), turn)
        return _finish_pixels(pixels, policy, [*reasons, "alpha kept"], file_size, turn)
    if _has_alpha(image) and policy.alpha == "refuse":
        raise BadImage("has an alpha channel, which the policy refuses")
    reasons = [reason.replace("alpha on white", _ALPHA_WORDS[policy.alpha]) for reason in reasons]
    small = bool(policy.short_side) and min(file_size) > policy.short_side
    wanted = _STORE.get(policy.store, "JPEG" if kind == "JPEG" else "PNG")
    if not (reasons or small or policy.store == "npy" or (policy.store != "keep" and wanted != kind)):
        pixels = np.asarray(image) if pixels is None else pixels
        return _stored(data, _EXT[kind], pixels, _kept(kind, name), file_size, 0)
    if pixels is not None:  # decoded, but not by Pillow
        image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    image = _upright_8_bit(image, turn, policy.alpha)
    if small:
        reasons.append("scaled down")
        image = image.resize(_scaled(image.size, policy.short_side), Image.Resampling.LANCZOS)
    pixels = _with_channels(np.asarray(image))
    if policy.store == "npy":
        return _finish_pixels(pixels, policy, reasons, file_size, turn)
    if wanted != kind and kind in _EXT:
        reasons.append(f"{kind} to {wanted}")
    elif not reasons:
        reasons.append(f"as {wanted}")
    encoded = encode(image, wanted, policy.quality)
    return _stored(encoded, _EXT[wanted], pixels, "re-encoded: " + ", ".join(reasons), file_size, turn)


def prove_pixels(pixels: npt.NDArray, name: str, policy: Policy = _DEFAULT) -> Stored:
    """What to store of pixels (H, W, C), uint8, uint16 or float32: 8 bit of 1 or 3 channels as an image file, all else as npy.

    Raises BadImage as `prove` does.
    """
    height, width, channels = pixels.shape
    check_size(width, height, policy)
    reasons = []
    if pixels.dtype != np.uint8:
        if policy.deep == "refuse":
            raise BadImage(f"{pixels.dtype}, more than 8 bits a channel, which the policy refuses")
        if policy.deep == "8bit":
            pixels = to_8_bit(pixels)
            reasons.append("scaled to 8 bits")
    file_size = (width, height)
    if policy.short_side and min(file_size) > policy.short_side:
        reasons.append("scaled down")
        pixels = resized(pixels, *_scaled(file_size, policy.short_side))
    if pixels.dtype != np.uint8 or channels not in (1, 3) or policy.store == "npy":
        return _stored(write_npy(pixels), "npy", pixels, _how("array", reasons), file_size, 0)
    wanted = _STORE.get(policy.store, "PNG")
    encoded = encode(Image.fromarray(pixels.squeeze(2) if channels == 1 else pixels), wanted, policy.quality)
    return _stored(encoded, _EXT[wanted], pixels, _how(wanted, reasons), file_size, 0)


def _prove_deep(data: bytes, image: Image.Image | None, name: str, policy: Policy) -> Stored:
    if policy.deep == "refuse":
        raise BadImage("more than 8 bits or 4 channels, which the policy refuses")
    if image is not None:
        image.load()
        if image.format == "PNG":
            _check_png(data)
    return prove_pixels(read_deep(data, image), name, policy)


def _finish_pixels(
    pixels: npt.NDArray, policy: Policy, reasons: list[str], file_size: tuple[int, int], turn: int
) -> Stored:
    if policy.short_side and min(pixels.shape[:2]) > policy.short_side:
        reasons = [*reasons, "scaled down"]
        pixels = resized(pixels, *_scaled((pixels.shape[1], pixels.shape[0]), policy.short_side))
    return _stored(write_npy(pixels), "npy", pixels, _how("array", reasons), file_size, turn)


def _how(wanted: str, reasons: list[str]) -> str:
    return "re-encoded: " + ", ".join([*reasons, f"as {wanted}"])


def _stored(
    data: bytes, ext: str, pixels: npt.NDArray, how: str, file_size: tuple[int, int], turn: int
) -> Stored:
    pixels = _with_channels(pixels)
    height, width, channels = pixels.shape
    return Stored(
        data,
        ext,
        width,
        height,
        channels,
        pixels.dtype.name,
        how,
        pixels_hash(pixels),
        sampled(pixels),
        file_size,
        turn,
    )


def _with_channels(pixels: npt.NDArray) -> npt.NDArray:
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def check_size(width: int, height: int, policy: Policy) -> None:
    """Raises BadImage for sizes that the policy refuses."""
    if width < 1 or height < 1:
        raise BadImage(f"no pixels ({width} x {height})")
    if width * height > policy.max_pixels:
        raise BadImage(f"{width} x {height} pixels, more than the limit of {policy.max_pixels}")
    if min(width, height) < policy.min_side:
        raise BadImage(f"{width} x {height} pixels, a side below the limit of {policy.min_side}")


def _scaled(size: tuple[int, int], short_side: int) -> tuple[int, int]:
    width, height = size
    scale = short_side / min(size)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _is_deep(image: Image.Image, kind: str, data: bytes) -> bool:
    # Pillow would cut 16-bit colour down to 8 without a word, so its mode alone does not tell.
    if image.mode.startswith(("I", "F")):
        return True
    if kind == "PNG":
        return _png_depth(data) > 8
    return kind == "TIFF" and max(getattr(image, "tag_v2", {}).get(_BITS_PER_SAMPLE, (1,))) > 8


def _decoded_jpeg(image: Image.Image, data: bytes, policy: Policy) -> npt.NDArray | None:
    """The pixels (H, W, C) of a grey or RGB JPEG; None where Pillow must decode it.

    libjpeg calls much damage a mere warning, and Pillow does not pass these on; this decoder, of the same libjpeg-turbo, does.
    """
    if image.mode not in ("L", "RGB"):
        return None
    try:
        return simplejpeg.decode_jpeg(data, "GRAY" if image.mode == "L" else "RGB", strict=True)
    except ValueError as fault:
        if not _clean_header(data):
            return None
        if policy.damaged == "refuse":
            raise damage(fault) from fault
        return None


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


_ALPHA_WORDS = {"white": "alpha on white", "black": "alpha on black", "drop": "alpha dropped"}


def _upright_8_bit(image: Image.Image, orientation: int, alpha: str) -> Image.Image:
    if _has_alpha(image):
        grey = image.mode in ("1", "L", "LA", "La")
        image = image.convert("LA" if image.mode == "La" else "RGBA").convert("RGBA")
        if alpha != "drop":
            image = Image.alpha_composite(Image.new("RGBA", image.size, alpha), image)
        image = image.convert("RGB")
        image = image.getchannel(0) if grey else image
    elif image.mode == "1":
        image = image.convert("L")
    elif image.mode not in ("L", "RGB"):
        image = image.convert("RGB")
    return image.transpose(_TURNS[orientation]) if orientation in _TURNS else image


def encode(image: Image.Image, kind: str, quality: int) -> bytes:
    """The image as a JPEG, PNG or WebP file, without comments, profiles and the like."""
    image.info.clear()
    out = io.BytesIO()
    image.save(out, kind, **({} if kind == "PNG" else {"quality": quality}))
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


@contextlib.contextmanager
def strict_pillow() -> Iterator[None]:
    """Pillow's global switches as they must be here, whatever another library has set; limits are ours."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS
    ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = False, None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES, Image.MAX_IMAGE_PIXELS = before
