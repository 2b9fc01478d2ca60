"""Small images made for tests, and fingerprints of what was written."""

import hashlib
import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from shards.conversion.convert import convert


def picture(seed: int, size: tuple[int, int] = (24, 16), mode: str = "RGB") -> Image.Image:
    """A smooth random picture, so that JPEG keeps it well; `size` is (width, height)."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return coarse.resize(size, Image.Resampling.BICUBIC).convert(mode)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """An RGB picture: coloured gradients, overlapping shapes, fine texture."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
    image = coarse.resize((width, height), Image.Resampling.BICUBIC)
    pen = ImageDraw.Draw(image)
    for _ in range(25):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        w, h = rng.uniform(1, 1 + width / 3), rng.uniform(1, 1 + height / 3)
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        (pen.ellipse if rng.random() < 0.5 else pen.rectangle)((x, y, x + w, y + h), fill=colour)
    grain = rng.normal(0, 12, (height, width, 1)) * rng.random((height, width, 1))
    pixels = np.asarray(image.filter(ImageFilter.GaussianBlur(0.6)), dtype=np.float64) + grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def photo_shards(
    root: Path, count: int, width: int, height: int, ending: str = "jpg", **options: Any
) -> Path:
    """Shards of photographs of different widths, made in `root`; `options`: of `convert`. Return their folder."""
    (root / "source").mkdir()
    for i in range(count):
        photo(width + i, height, seed=i).save(root / "source" / f"{i}.{ending}")
    convert(root / "source", root / "shards", workers=0, **options)
    return root / "shards"


def colours(side: int, seed: int = 0) -> Image.Image:
    """Random colours: every pixel another, greys, blacks, whites and pure colours among them."""
    rng = np.random.default_rng(seed)
    pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
    pixels[::7] = pixels[::7, :, :1]
    pixels[1] = 0
    pixels[2] = 255
    pixels[3] = np.where(pixels[3] > 127, 255, 0)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    """The image as the bytes of a file."""
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def exif(orientation: int) -> Image.Exif:
    """An EXIF block that holds an orientation, 1 to 8."""
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    """A PNG written out from its specification, for what Pillow does not write."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def fingerprints(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by name."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
