"""What is stored of an image, and what is refused: the choices a user can change."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_type_hints

from shards.errors import UserError, nearest

MAX_PIXELS = 178_956_970  # where Pillow, too, suspects a decompression bomb


@dataclass(frozen=True)
class Policy:
    """What is stored, and what is refused. The defaults change only images that some decoders cannot read as they are."""

    store: Literal["keep", "jpeg", "png", "webp", "npy"] = "keep"
    """keep leaves clean files as they are, byte for byte; the others re-encode files of another format (png, npy: without loss)."""
    short_side: int = 0
    """Scale larger images down until the shorter side has this many pixels (antialiased; masks: nearest); 0: keep sizes."""
    quality: int = 95
    """Of JPEG and WebP, where something is re-encoded: 1 to 100."""
    alpha: Literal["white", "black", "drop", "keep", "refuse"] = "white"
    """Transparency: laid on white or black, dropped, kept as a further channel (npy), or the image refused. White and black
    keep it, too, at more than 8 bits."""
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
        for name, kind in get_type_hints(type(self)).items():
            value, known = getattr(self, name), get_args(kind)
            if known and value not in known:
                hint = nearest(str(value), known) or f" Known: {', '.join(known)}."
                raise UserError(f"There is no --{name} '{value}'.{hint}")
        if not 1 <= self.quality <= 100:
            raise UserError(f"--quality is {self.quality}, but it must be between 1 and 100.")
        for name, least in (("short_side", 0), ("max_pixels", 1), ("min_side", 1)):
            if getattr(self, name) < least:
                flag = f"--{name.replace('_', '-')}"
                raise UserError(f"{flag} is {getattr(self, name)}, but it must be at least {least}.")
        if self.min_side**2 > self.max_pixels:
            raise UserError(
                f"--min-side is {self.min_side}, but --max-pixels {self.max_pixels} allows no such image; change one of them."
            )

    def describe(self) -> list[str]:
        """What will be done other than by default, a sentence each, for the start of a run; the summary counts what was done."""
        lines = []
        if (self.store, self.quality) != ("keep", 95):
            lines.append(self._about_store())
        if self.short_side:
            lines.append(
                f"Images whose shorter side has more than {self.short_side} pixels are scaled down to it."
            )
        lines += [_ALPHA[self.alpha]] if self.alpha != "white" else []
        lines += [_DEEP[self.deep]] if self.deep != "keep" else []
        if self.animated == "first":
            lines.append("Of animations and several pages the first is taken.")
        if self.cmyk == "refuse":
            lines.append("CMYK images are refused.")
        if self.damaged == "mend":
            lines.append("Damaged JPEGs are mended: parts of such pictures are gray or shifted.")
        return lines

    def _about_store(self) -> str:
        lossy = f"quality {self.quality}"
        return {
            "keep": "Clean JPEG, PNG and WebP files are stored unchanged; others are re-encoded "
            f"(JPEG as JPEG, {lossy}; the rest as PNG).",
            "jpeg": f"All images are stored as JPEG, {lossy}; clean JPEG files unchanged.",
            "png": "All images are stored as PNG, without loss; clean PNG files unchanged; --quality does nothing.",
            "webp": f"All images are stored as WebP, {lossy}, in colour; clean WebP files unchanged.",
            "npy": "All images are stored as NumPy arrays (height, width, channels), uncompressed; --quality does nothing.",
        }[self.store]


_ALPHA = {
    "white": "Transparent images are laid on white.",
    "black": "Transparent images are laid on black.",
    "drop": "Alpha channels are dropped.",
    "keep": "Alpha channels are kept, in NumPy arrays.",
    "refuse": "Images with an alpha channel are refused.",
}
_DEEP = {
    "keep": "Images of more than 8 bits are stored as NumPy arrays: nothing is lost.",
    "8bit": "Images of more than 8 bits are scaled to 8: 0..65535, or floats 0..1, to 0..255.",
    "refuse": "Images of more than 8 bits are refused.",
}
