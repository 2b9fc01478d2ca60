"""What is stored of an image, and what is refused: the choices a user can change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from shards.errors import UserError

MAX_PIXELS = 178_956_970  # where Pillow, too, suspects a decompression bomb


@dataclass(frozen=True)
class Policy:
    """What is stored, and what is refused. The defaults change no pixel that is not in the way of some decoder."""

    store: Literal["keep", "jpeg", "png", "webp", "npy"] = "keep"
    """keep leaves clean files as they are, byte for byte; the others re-encode all images (png and npy without loss)."""
    short_side: int = 0
    """Scale larger images down until the shorter side has so many pixels (antialiased; masks: nearest); 0 keeps sizes."""
    quality: int = 95
    """Of JPEG and WebP, where something is re-encoded: 1 to 100."""
    alpha: Literal["white", "black", "drop", "keep", "refuse"] = "white"
    """Transparency: laid on white or black, dropped, kept as a further channel (npy), or the image refused."""
    animated: Literal["refuse", "first"] = "refuse"
    """Images of several frames or pages: refused, or their first one taken."""
    deep: Literal["keep", "8bit", "refuse"] = "keep"
    """More than 8 bits a channel: kept without loss (npy), scaled from 0..65535 to 0..255, or refused."""
    cmyk: Literal["rgb", "refuse"] = "rgb"
    """CMYK images: turned to RGB, or refused."""
    damaged: Literal["refuse", "mend"] = "refuse"
    """JPEGs with damaged data that still give a picture: refused, or what was decoded is re-encoded."""
    max_pixels: int = MAX_PIXELS
    """Images with more pixels are refused before they are decoded: decompression bombs."""
    min_side: int = 1
    """Images with a shorter side below this are refused."""

    def __post_init__(self) -> None:
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}, but it must be between 1 and 100.")
        for name, least in (("short_side", 0), ("max_pixels", 1), ("min_side", 1)):
            if getattr(self, name) < least:
                raise UserError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)}, but it must be at least {least}."
                )

    def describe(self) -> list[str]:
        """What will be done, a sentence each, for the start of a run."""
        said = {
            "keep": "Clean JPEG, PNG and WebP files are stored unchanged; others are re-encoded (JPEG as JPEG, the rest as PNG).",
            "jpeg": f"All images are stored as JPEG, quality {self.quality}.",
            "png": "All images are stored as PNG.",
            "webp": f"All images are stored as WebP, quality {self.quality}.",
            "npy": "All images are stored as NumPy arrays (height, width, channels), uncompressed.",
        }
        lines = [said[self.store]]
        if self.short_side:
            lines.append(
                f"Images whose shorter side has more than {self.short_side} pixels are scaled down to it."
            )
        if self.deep == "keep" and self.store != "npy":
            lines.append(
                "Images of more than 8 bits, or not of 1 or 3 channels, are stored as NumPy arrays: nothing is lost."
            )
        if self.damaged == "mend":
            lines.append("Damaged JPEGs are mended: parts of such pictures are grey or shifted.")
        return lines
