"""Proof that one image decodes, and its normal form: what training may meet is decided here, once."""

from __future__ import annotations

import io
import posixpath
import re
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import numpy.typing as npt
from PIL import Image, UnidentifiedImageError

from shards.images.alpha import (
    ALPHA_WORDS,
    as_declared,
    deep_alpha,
    first_frame,
    has_alpha,
    refuse_alpha,
    upright_8_bit,
)
from shards.images.color_profile import in_srgb, jpeg_profile
from shards.images.jpeg import (
    JPEG_MAGIC,
    JpegHeader,
    decode_jpeg,
    eighth,
    simple_header,
    simple_jpeg,
    small_pixels,
    unreadable,
)
from shards.images.pillow import TURNS, as_damage, encode, orientation, strict_pillow
from shards.images.pixels import (
    NPY_MAGIC,
    BadImage,
    Pixels,
    declared,
    pixels_hash,
    read_deep,
    read_npy,
    resized_known,
    sampled,
    to_8_bit,
    turned,
    write_npy,
)
from shards.images.png import check_png, png_colour, png_depth
from shards.images.pnm import deep_pnm
from shards.images.policy import Policy
from shards.images.tiff import TIFF_MAGIC, TiffHeader, tiff_header

# No format that runs an interpreter (EPS) or hides several images; the content decides, not the file's name.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
_EXT = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
_STORE = {"jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}
_SUFFIXES = {"JPEG": (".jpg", ".jpeg", ".jpe", ".jfif"), "PNG": (".png",), "WEBP": (".webp",)}
_DEFAULT = Policy()

Depth = Literal["pixels", "small", "both"]


@dataclass(frozen=True, slots=True)
class Stored:
    """An image as the shard stores it: upright, one frame.

    data: encoded bytes; ext: jpg, png, webp (8 bit, 1 or 3 channels) or npy ((H, W, C) uint8, uint16 or float32); width, height:
    pixels; how: "kept", or "re-encoded: " and the reasons; pixels_hash: of the pixels before a lossy encoder saw them; sample:
    (k, channels) pixels for statistics; file_size: (width, height) before turning and scaling; turn: EXIF orientation that was baked
    in, 0 for none; small_hash: of the JPEG decoded at an eighth of its size; sample_known: bool (k, channels), which values of the
    sample are data, None for all. What `prove` was not asked for is None.
    """

    data: bytes
    ext: str
    width: int
    height: int
    channels: int
    dtype: str
    how: str
    pixels_hash: str | None
    sample: npt.NDArray | None
    file_size: tuple[int, int]
    turn: int = 0
    small_hash: str | None = None
    sample_known: npt.NDArray[np.bool_] | None = None


def prove(
    data: bytes | npt.NDArray | Pixels, name: str, policy: Policy = _DEFAULT, depth: Depth = "pixels"
) -> Stored:
    """Decode the image as far as anything can be wrong with it, and return what to store; what `policy` keeps is kept byte for byte.

    Args:
        data: of a file; of pixels, see `prove_pixels`.
        depth: "pixels": `pixels_hash` and `sample` are given. "small": so is `small_hash`, for a JPEG, and where the file is kept
            these two may be missing, since there was no need for all its pixels. "both": all three.

    Raises:
        BadImage: for what cannot be decoded completely, or what the policy refuses.
    """
    if not isinstance(data, bytes):
        return prove_pixels(data, policy)
    if not data:
        raise BadImage("empty file (0 bytes)")
    if data.startswith(NPY_MAGIC):
        stored = prove_pixels(read_npy(data), policy)
        return replace(stored, how="kept") if stored.data == data else stored
    if data.startswith(JPEG_MAGIC):
        header = simple_header(data, policy.max_pixels)
        if header and min(header.width, header.height) >= policy.min_side:
            stored = _prove_simple(data, header, name, policy, depth)
            if stored:
                return stored
    with strict_pillow(), as_damage():
        try:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        except UnidentifiedImageError:
            if data.startswith(TIFF_MAGIC):
                return _prove_tiff(data, policy)
            raise unreadable(data) from None
        stored = _prove_opened(image, data, name, policy)
        return stored if depth == "pixels" else replace(stored, small_hash=_small_hash(data, stored))


def _prove_simple(data: bytes, header: JpegHeader, name: str, policy: Policy, depth: Depth) -> Stored | None:
    """The short way of a clean JPEG; None where it is damaged."""
    size = (header.width, header.height)
    kept = _keeps(policy, "JPEG", size)
    small = eighth(data, header) if depth != "pixels" else None
    small_hash = None if small is None else pixels_hash(small, size)
    if kept and depth == "small":
        if small_hash is None:
            return None
        how = _kept("JPEG", name)
        return Stored(data, "jpg", *size, header.components, "uint8", how, None, None, size, 0, small_hash)
    pixels = simple_jpeg(data, header)
    if pixels is None:
        return None
    if kept:
        stored = _stored(data, "jpg", pixels, _kept("JPEG", name), size, 0)
    else:
        with as_damage():
            image, words = in_srgb(_as_image(pixels), jpeg_profile(data))
            stored = _changed(image, "JPEG", words, policy, size, 0)
    return replace(stored, small_hash=small_hash) if small_hash else stored


def _small_hash(data: bytes, stored: Stored) -> str | None:
    small = small_pixels(data)
    return None if small is None else pixels_hash(turned(small, stored.turn), (stored.width, stored.height))


def _prove_opened(image: Image.Image, data: bytes, name: str, policy: Policy) -> Stored:
    kind = "JPEG" if image.format == "MPO" else str(image.format)  # MPO: a JPEG with more behind it
    check_size(*image.size, policy)
    tiff = tiff_header(data) if kind == "TIFF" else None
    reasons = first_frame(image, kind, tiff, policy)
    if kind == "PPM":
        deep = np.asarray(image)[:, :, None] if image.mode == "F" else deep_pnm(data)
        if deep is not None:
            return _finish(deep, policy, reasons, image.size, 0)
    if (tiff and not tiff.plain) or (kind == "PNG" and png_depth(data) > 8):
        return _prove_deep(data, image, tiff, reasons, policy)
    file_size = image.size
    pixels = None
    if kind == "JPEG":
        pixels, faults = decode_jpeg(image, data, mend=policy.damaged == "mend")
    else:
        faults = []
        image.load()
    if kind == "PNG":
        check_png(data)
    turn = orientation(image)
    reasons += _reasons(image, kind, data, turn) + faults
    if tiff and tiff.orientation in TURNS:  # Pillow has turned it, and forgotten that it did
        file_size, done = tiff.size, tiff.orientation
        reasons.append("EXIF rotation")
    else:
        done = turn if turn in TURNS else 0
    if image.mode == "CMYK" and policy.cmyk == "refuse":
        raise BadImage("CMYK, which the policy refuses")
    profile = image.info.get("icc_profile")
    if has_alpha(image) and policy.alpha == "keep":
        image, words = in_srgb(image, profile)
        reasons += words
        image = image.convert("LA" if image.mode in ("1", "L", "LA", "La") else "RGBA")
        return _finish(turned(np.asarray(image), turn), policy, [*reasons, "alpha kept"], file_size, done)
    if has_alpha(image):
        refuse_alpha(policy)
        reasons.append(ALPHA_WORDS[policy.alpha])
    if not reasons and _keeps(policy, kind, file_size):
        pixels = np.asarray(image) if pixels is None else pixels
        return _stored(data, _EXT[kind], pixels, _kept(kind, name), file_size, 0)
    if pixels is not None:  # decoded, but not by Pillow
        image = _as_image(pixels)
    image, words = in_srgb(image, profile)
    reasons += words
    stored = _changed(upright_8_bit(image, turn, policy.alpha), kind, reasons, policy, file_size, done)
    return _without_nodata(stored, tiff) if tiff and image.mode in ("L", "RGB") else stored


def _without_nodata(stored: Stored, tiff: TiffHeader) -> Stored:
    """Leave what an 8-bit TIFF declares to be no data out of the sample that is counted."""
    if tiff.nodata is None or stored.sample is None:
        return stored
    known = stored.sample != (255 - tiff.nodata if tiff.white_is_zero else tiff.nodata)
    return stored if known.all() else replace(stored, sample_known=known)


def _keeps(policy: Policy, kind: str, file_size: tuple[int, int]) -> bool:
    """Whether a clean file of that kind stays as it is."""
    small = policy.short_side and min(file_size) > policy.short_side
    return kind in _EXT and not small and policy.store in ("keep", kind.lower())


def _changed(
    image: Image.Image, kind: str, reasons: list[str], policy: Policy, file_size: tuple[int, int], done: int
) -> Stored:
    """What to store of an upright 8-bit image whose file is not kept."""
    if policy.short_side and min(file_size) > policy.short_side:
        reasons.append("scaled down")
        image = image.resize(_scaled(image.size, policy.short_side), Image.Resampling.LANCZOS)
    if policy.store == "npy":
        return _finish(_with_channels(np.asarray(image)), policy, reasons, file_size, done)
    wanted = _STORE.get(policy.store, "JPEG" if kind == "JPEG" else "PNG")
    if wanted != kind and kind in _EXT:
        reasons.append(f"{kind} to {wanted}")
    elif not reasons:
        reasons.append(f"as {wanted}")
    return _encoded(image, wanted, "re-encoded: " + ", ".join(reasons), policy, file_size, done)


def _as_image(pixels: npt.NDArray) -> Image.Image:
    return Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)


def prove_pixels(pixels: npt.NDArray | Pixels, policy: Policy = _DEFAULT) -> Stored:
    """What to store of pixels (H, W, C), uint8, uint16 or float32: 8 bit of 1 or 3 channels as an image file, all else as npy.

    Raise BadImage as `prove` does.
    """
    data = pixels if isinstance(pixels, Pixels) else Pixels(pixels)
    height, width, _ = data.values.shape
    data, reasons = as_declared(data, policy)
    return _finish(data, policy, reasons, (width, height), 0)


def _prove_tiff(data: bytes, policy: Policy) -> Stored:
    """A TIFF that Pillow cannot open: of more bands or other numbers than it knows."""
    tiff = tiff_header(data)
    check_size(*tiff.size, policy)
    return _prove_deep(data, None, tiff, first_frame(None, "TIFF", tiff, policy), policy)


def _prove_deep(
    data: bytes, image: Image.Image | None, tiff: TiffHeader | None, reasons: list[str], policy: Policy
) -> Stored:
    alpha = tiff.alpha if tiff else png_colour(data) in (4, 6)
    turn = tiff.orientation if tiff else orientation(image) if image else 0
    if alpha:
        refuse_alpha(policy)
    if not tiff:
        check_png(data)
    # Pillow would turn a TIFF while it reads it.
    pixels = read_deep(data, None if tiff and turn in TURNS else image, policy.max_pixels)
    file_size = (pixels.shape[1], pixels.shape[0])
    if turn in TURNS:
        reasons = [*reasons, "EXIF rotation"]
        pixels = turned(pixels, turn)
    else:
        turn = 0
    made = declared(pixels, tiff.nodata, tiff.white_is_zero) if tiff else Pixels(pixels)
    if alpha:
        made, words = deep_alpha(made, policy)
        reasons = [*reasons, *words]
    return _finish(made, policy, reasons, file_size, turn)


def _finish(
    pixels: npt.NDArray | Pixels, policy: Policy, reasons: list[str], file_size: tuple[int, int], turn: int
) -> Stored:
    """What to store of upright pixels (H, W, C)."""
    data = pixels if isinstance(pixels, Pixels) else Pixels(pixels)
    height, width, channels = data.values.shape
    check_size(width, height, policy)
    reasons = list(reasons)
    if data.values.dtype != np.uint8:
        if policy.deep == "refuse":
            raise BadImage(f"{data.values.dtype}, more than 8 bits a channel, which the policy refuses")
        if policy.deep == "8bit":
            data = Pixels(to_8_bit(data.values, data.known), data.known, (0,) * channels)
            reasons.append("scaled to 8 bits")
    if policy.short_side and min(width, height) > policy.short_side:
        reasons.append("scaled down")
        data = resized_known(data, *_scaled((width, height), policy.short_side))
    values, sample_known = data.values, None
    if data.known is not None and not data.known.all():
        sample_known = sampled(data.known)
    if values.dtype != np.uint8 or channels not in (1, 3) or policy.store == "npy":
        how = "re-encoded: " + ", ".join([*reasons, "as array"])
        stored = _stored(write_npy(values), "npy", values, how, file_size, turn)
    else:
        how = "re-encoded: " + ", ".join([*reasons, f"as {_STORE.get(policy.store, 'PNG')}"])
        stored = _encoded(_as_image(values), _STORE.get(policy.store, "PNG"), how, policy, file_size, turn)
        if sample_known is not None and stored.channels > channels:
            sample_known = np.repeat(sample_known, stored.channels, axis=1)
    return stored if sample_known is None else replace(stored, sample_known=sample_known)


def _encoded(
    image: Image.Image, kind: str, how: str, policy: Policy, file_size: tuple[int, int], turn: int
) -> Stored:
    if kind == "WEBP":
        image = image.convert("RGB")  # it knows no gray
    pixels = np.asarray(image)
    return _stored(encode(image, kind, policy.quality), _EXT[kind], pixels, how, file_size, turn)


def _reasons(image: Image.Image, kind: str, data: bytes, turn: int) -> list[str]:
    reasons = []
    if kind not in _EXT:
        reasons.append(f"{kind} to PNG")
    if turn in TURNS:
        reasons.append("EXIF rotation")
    elif turn < 0:
        reasons.append("unreadable EXIF")
    if has_alpha(image):
        pass  # what becomes of it is the policy's
    elif image.mode == "P":
        reasons.append("palette to RGB")
    elif image.mode == "1":
        reasons.append("1-bit to grey")  # the spelling is part of the format: this stands in sample tables
    elif image.mode not in ("L", "RGB"):
        reasons.append(f"{image.mode} to RGB")
    elif kind == "PNG" and png_depth(data) < 8:
        reasons.append(f"{png_depth(data)}-bit to 8-bit")
    return reasons


def _stored(
    data: bytes, ext: str, pixels: npt.NDArray, how: str, file_size: tuple[int, int], turn: int
) -> Stored:
    pixels = _with_channels(pixels)
    height, width, channels = pixels.shape
    # numpy takes longer to find a name than to hash a small image.
    dtype = "uint8" if pixels.dtype == np.uint8 else pixels.dtype.name
    return Stored(
        data,
        ext,
        width,
        height,
        channels,
        dtype,
        how,
        pixels_hash(pixels),
        sampled(pixels),
        file_size,
        turn,
    )


def _with_channels(pixels: npt.NDArray) -> npt.NDArray:
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def check_size(width: int, height: int, policy: Policy) -> None:
    """Raise BadImage for sizes that the policy refuses."""
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


def _kept(kind: str, name: str) -> str:
    if name.endswith(_SUFFIXES[kind]):
        return "kept"
    # Behind the @ stands where a tar holds a name again, or the row of a table, whose name says nothing of its images.
    suffix = posixpath.splitext(re.sub(r"@\d+$", "", name))[1].lower()
    return (
        "kept"
        if suffix in (*_SUFFIXES[kind], ".parquet")
        else f"kept: {kind} named {suffix or 'without extension'}"
    )
