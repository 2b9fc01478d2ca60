"""JPEG beyond its pixels: a header that every decoder follows, and damage that libjpeg only warns about."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy.typing as npt
import simplejpeg
from PIL import Image

from shards.images.pixels import BadImage, damage

_BRANDS = (
    ((b"avif", b"avis"), "an AVIF image"),
    ((b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"), "an HEIC image"),
    ((b"crx ",), "a raw image (CR3)"),
)
_BEGINS = (
    (b"\0\0\0\x0cjP  ", "a JPEG 2000 image"),
    (b"\xff\x4f\xff\x51", "a JPEG 2000 image"),
    (b"\0\0\0\x0cJXL ", "a JPEG XL image"),
    (b"\xff\x0a", "a JPEG XL image"),
    (b"8BPS", "a Photoshop file"),
    (b"%PDF", "a PDF file"),
    (b"%!PS", "a PostScript file"),
    (b"\x76\x2f\x31\x01", "an OpenEXR image"),
    (b"\0\0\x01\0", "an icon (ICO)"),
    (b"PK\x03\x04", "a zip archive"),
    (b"\x1f\x8b", "a gzip file"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself"),
)
_TEXTS = (
    (b"<!doctype html", "a web page (HTML)"),
    (b"<html", "a web page (HTML)"),
    (b"<svg", "an SVG drawing"),
    (b"<?xml", "an XML file"),
)
JPEG_MAGIC = b"\xff\xd8"
# Chroma samplings (h x v of each component) that TurboJPEG and nvJPEG both name: 4:4:4, 4:2:2, 4:2:0, 4:4:0, 4:1:1.
_COMMON_CHROMA = {b"\x11\x11\x11", b"\x21\x11\x11", b"\x22\x11\x11", b"\x12\x11\x11", b"\x41\x11\x11"}
_CODINGS = {
    0xC0: "baseline", 0xC1: "sequential", 0xC2: "progressive", 0xC3: "lossless", 0xC9: "arithmetic", 0xCA: "arithmetic",
}  # fmt: skip

# Segments without a say in what the pixels are, or that the decoder itself heeds: frames (baseline, sequential, progressive), tables,
# restarts, comments, JFIF, Adobe's colours.
_SIMPLE = {0xC0, 0xC1, 0xC2, 0xC4, 0xDB, 0xDD, 0xFE, 0xE0, 0xEE}
_SCAN = b"\xff\xda"  # the marker that ends the header
_ICC, _EXIF = b"ICC_PROFILE\0", b"Exif\0\0"
ORIENTATION = 0x0112  # the EXIF tag


@dataclass(frozen=True, slots=True)
class JpegHeader:
    """coding: baseline, sequential, progressive, lossless, arithmetic or other; bits: a sample; common_chroma: every decoder knows it.

    mended: the file without the stray bytes between its segments; the file itself where there are none. simple: there is nothing in it
    that only Pillow could tell, but for its EXIF block: no XMP (which may ask for a rotation), no second image, no stray bytes; of one
    or three components. exif: the EXIF block, empty where there is none.
    """

    coding: str
    bits: int
    width: int
    height: int
    components: int
    common_chroma: bool
    mended: bytes
    simple: bool
    exif: bytes


def jpeg_header(data: bytes) -> JpegHeader | None:
    """The header of a JPEG; None where it ends before the first scan.

    libjpeg skips stray bytes between segments, DALI's parser refuses them.
    """
    at, segments, frame, stray, simple, exif = 2, [], None, False, True, b""
    while at + 4 <= len(data):
        start = data.find(b"\xff", at)
        if start < 0:
            return None
        stray = stray or start > at
        marker = data[start + 1] if start + 1 < len(data) else 0
        if marker == 0xFF:  # padding, which is allowed
            segments.append((start, start + 1))
            at, simple = start + 1, False
            continue
        if marker in (0x00, 0x01) or 0xD0 <= marker <= 0xD9:  # none of these belongs here
            at, stray = start + 2, True
            continue
        if marker == 0xDA:
            break
        end = start + 2 + int.from_bytes(data[start + 2 : start + 4], "big")
        segments.append((start, end))
        if 0xC0 <= marker <= 0xCF and marker not in (0xC4, 0xC8, 0xCC):
            frame = data[start:end]
        if marker == 0xE1 and not exif and data.startswith(_EXIF, start + 4):
            exif = data[start + 4 : end]
        else:
            simple = simple and (marker in _SIMPLE or (marker == 0xE2 and data.startswith(_ICC, start + 4)))
        at = end
    else:
        return None
    if frame is None or len(frame) < 10 or len(frame) < 10 + 3 * frame[9]:
        return None
    num_components = frame[9]
    # Four components are CMYK, which is never stored.
    common = num_components != 3 or frame[11::3] in _COMMON_CHROMA
    return JpegHeader(
        coding=_CODINGS.get(frame[1], "other"),
        bits=frame[4],
        height=int.from_bytes(frame[5:7], "big"),
        width=int.from_bytes(frame[7:9], "big"),
        components=num_components,
        common_chroma=common,
        simple=simple and not stray and frame[4] == 8 and num_components in (1, 3) and common,
        exif=exif,
        mended=b"".join([data[:2], *(data[a:b] for a, b in segments), data[start:]]) if stray else data,
    )


def unreadable(data: bytes) -> BadImage:
    """Why a file that Pillow does not know cannot be used."""
    header = jpeg_header(data) if data.startswith(JPEG_MAGIC) else None
    if header and header.bits != 8:
        return BadImage(f"a JPEG of {header.bits} bits; only 8 are supported")
    if header and not (header.width and header.height):
        return BadImage(f"no pixels ({header.width} x {header.height})")
    known = other_format(data)
    if known:
        way_out = "; turn it into JPEG or PNG first" if "image" in known else ""
        return BadImage(f"{known}, which is not read{way_out}")
    return BadImage("not readable as JPEG, PNG, WebP, BMP, TIFF, GIF or NumPy array")


def other_format(data: bytes) -> str:
    """What a file is that is none of the formats read, by its first bytes, with its article; "" where that is not known."""
    if data[4:8] == b"ftyp":
        # ISO 14496-12: the major brand, a version, then further brands.
        end = min(int.from_bytes(data[:4], "big"), 64)
        brands = {data[8:12], *(data[at : at + 4] for at in range(16, end, 4))}
        for names, known in _BRANDS:
            if not brands.isdisjoint(names):
                return known
        return "a film or another file of the MP4 family"
    text = data[:256].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for begin, known in _TEXTS:
        if text.startswith(begin):
            return known
    return next((known for begin, known in _BEGINS if data.startswith(begin)), "")


def decode_jpeg(image: Image.Image, data: bytes, *, mend: bool) -> tuple[npt.NDArray | None, list[str]]:
    """The pixels (H, W, C) of a gray or RGB JPEG, None where Pillow's `image` holds them; and what stands in the way of some decoder.

    libjpeg calls much damage a mere warning, and Pillow does not pass these on; this decoder, of the same libjpeg-turbo, does. It does
    not know every sampling of chroma, and gives CMYK as CMYK; so Pillow decodes these. Raise BadImage for damage, unless `mend`.
    """
    header = jpeg_header(data)
    if header is None:
        raise BadImage("damaged: the JPEG's header is not whole")
    faults = _faults(header, data)
    pixels = None
    if header.common_chroma:
        colours = {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}[image.mode]
        try:
            pixels = simplejpeg.decode_jpeg(header.mended, colours, strict=True)
        except ValueError as error:
            if not mend:
                raise damage(error) from error
            faults.append("damaged JPEG data")
    if pixels is None or image.mode == "CMYK":
        image.load()
        pixels = None
    return pixels, faults


@lru_cache(maxsize=256)
def _simple_header(head: bytes) -> JpegHeader | None:
    """The header of a simple JPEG whose first scan follows these bytes; None for others.

    Files of one program often have the same, and reading it takes longer than hashing the file.
    """
    header = jpeg_header(head + _SCAN + b"\0\0")
    return header if header and header.simple and _is_upright(header.exif) else None


def _is_upright(block: bytes) -> bool:
    """Whether an EXIF block can be read and asks for no rotation."""
    if not block:
        return True
    exif = Image.Exif()
    try:
        exif.load(block)
        return exif.get(ORIENTATION, 0) in (0, 1)
    except Exception:  # Pillow raises almost anything on a damaged block
        return False


def simple_header(data: bytes, max_pixels: int) -> JpegHeader | None:
    """The header of a clean JPEG that needs no second look; None where there is any doubt, which `decode_jpeg` then decides.

    Pillow reads a JPEG's header in Python, which takes a tenth of the time of decoding a small image.
    """
    scan = data.find(_SCAN)
    if scan < 0:
        return None
    header = _simple_header(data[:scan])
    if header is None:  # perhaps the marker's two bytes were part of a segment, and the header was not whole
        header = jpeg_header(data)
        if header is None or not header.simple or not _is_upright(header.exif):
            return None
    return header if 0 < header.width * header.height <= max_pixels else None


def simple_jpeg(data: bytes, header: JpegHeader) -> npt.NDArray | None:
    """The pixels (H, W, C) of a JPEG with a `simple_header`; None where it is damaged."""
    pixels = _strictly(data, header)
    return pixels if pixels is not None and pixels.shape[:2] == (header.height, header.width) else None


def eighth(data: bytes, header: JpegHeader) -> npt.NDArray | None:
    """The pixels (ceil(H / 8), ceil(W / 8), C) of a gray or three-colour JPEG, decoded at an eighth of its size; None where damaged.

    All coefficients are read from the entropy code, where any damage shows, but only those of the lowest frequencies are transformed,
    which cannot fail: this proves as much as decoding all pixels, in 0.55 to 0.65 of the time.
    """
    pixels = _strictly(data, header, min_height=1, min_width=1, min_factor=8)
    size = (-(-header.height // 8), -(-header.width // 8))
    return pixels if pixels is not None and pixels.shape[:2] == size else None


def small_pixels(data: bytes) -> npt.NDArray | None:
    """As `eighth`, of any file; None where it is no JPEG of one or three components, is damaged, or has a rare sampling of chroma."""
    header = jpeg_header(data) if data.startswith(JPEG_MAGIC) else None
    if header is None or header.components not in (1, 3) or not header.common_chroma:
        return None
    return eighth(header.mended, header)


def _strictly(data: bytes, header: JpegHeader, **scale: int) -> npt.NDArray | None:
    try:
        return simplejpeg.decode_jpeg(data, "GRAY" if header.components == 1 else "RGB", strict=True, **scale)
    except ValueError:
        return None


def _faults(header: JpegHeader, data: bytes) -> list[str]:
    faults = []
    if header.coding not in ("baseline", "sequential", "progressive"):
        faults.append(f"{header.coding} JPEG")
    if not header.common_chroma:
        faults.append("rare chroma sampling")
    if header.mended is not data:
        faults.append("mended JPEG header")
    return faults
