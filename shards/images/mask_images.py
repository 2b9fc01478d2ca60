"""Masks of class indices: found beside the images, proven, and stored as PNG."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from shards.errors import UserError
from shards.images.pillow import TURNS, encode, orientation, strict_pillow
from shards.images.pixels import BadImage, damage, turned
from shards.images.png import check_png, png_colour, png_depth
from shards.images.policy import Policy
from shards.images.proof import Stored, check_size
from shards.images.tiff import tiff_header
from shards.storage.place import Place

SUFFIXES = (".png", ".tif", ".tiff", ".bmp", ".gif")
# What losses ignore by convention: of a mask's pixels that have no class.
NO_INDEX = 255
_LARGEST_INDEX = 65535
_SHOWN = 3


class MaskFolder:
    """A folder of masks with the images' relative names; endings may differ, and `suffix` may follow the name (`_mask`)."""

    def __init__(self, place: Place, suffix: str = ""):
        place.check_folder("--masks")
        self.place = place
        self._suffix = suffix
        self._found = 0
        self._without: list[str] = []
        self._num_without = 0
        # Names of a folder, the latest asked for, whose endings are not in small letters: few, as a rule.
        self._listed: str | None = None
        self._odd: set[str] = set()
        # Where the masks lie below the folder of the images, as `sub/`; "" where the two are one, None where they are apart.
        self._below: str | None = None

    def settings(self) -> dict[str, Any]:
        """What decides which mask an image gets."""
        return {"folder": self.place.name, "suffix": self._suffix}

    def lies_in(self, images: Place) -> bool:
        """Whether the masks lie in the folder of the images, or below it. From then on no image is its own mask."""
        if self.place.local is None or images.local is None:
            outer, inner = images.url.rstrip("/"), self.place.url.rstrip("/")
            self._below = (
                f"{inner}/".removeprefix(f"{outer}/") if f"{inner}/".startswith(f"{outer}/") else None
            )
        else:
            outer, inner = images.local.resolve(), self.place.local.resolve()
            inside = outer == inner or outer in inner.parents
            self._below = "".join(f"{part}/" for part in inner.relative_to(outer).parts) if inside else None
        return self._below is not None

    def among(self, names: Sequence[str]) -> set[str]:
        """Those of `names`, of all files in the folder of the images, that are masks."""
        if self._below:
            return {name for name in names if name.startswith(self._below)}
        by_stem: dict[str, list[str]] = {}
        for name in names:
            stem, ending = os.path.splitext(name)
            if ending.lower() in SUFFIXES:
                by_stem.setdefault(stem, []).append(name)
        masks: set[str] = set()
        # Files that cannot be masks first: of a.jpg and a.png the second is the mask.
        for name in sorted(names, key=lambda name: os.path.splitext(name)[1].lower() in SUFFIXES):
            others = by_stem.get(os.path.splitext(name)[0] + self._suffix, ())
            if name not in masks:
                masks |= {other for other in others if other != name}
        return masks

    def find(self, name: str) -> str | None:
        """The mask of an image, as a name in the mask folder; None where there is none."""
        stem = os.path.splitext(name)[0] + self._suffix
        for ending in (*SUFFIXES, *self._other_endings(stem)):
            if self._below == "" and stem + ending == name:
                continue
            if self.place.exists(stem + ending):
                self._found += 1
                return stem + ending
        self._num_without += 1
        if len(self._without) < _SHOWN:
            self._without.append(name)
        return None

    def _other_endings(self, stem: str) -> list[str]:
        """The endings in other cases of letters, such as .TIF: of a folder on this machine those that are there."""
        if self.place.local is None:
            return [ending.upper() for ending in SUFFIXES]
        folder, _, own = stem.rpartition("/")
        if folder != self._listed:
            endings = ((name, *os.path.splitext(name)) for name in self.place.names(folder))
            self._odd = {name for name, _, end in endings if end != end.lower() and end.lower() in SUFFIXES}
            self._listed = folder
        return sorted(name[len(own) :] for name in self._odd if os.path.splitext(name)[0] == own)

    def read(self, mask_name: str) -> bytes:
        """A mask's file; BadImage where it cannot be read."""
        return read_mask(self.place, mask_name)

    def check(self) -> None:
        """After the listing: raises UserError where no image has a mask."""
        if not self._found:
            there = next((name for name, _ in self.place.walk()), None)
            raise UserError(
                f"'{self.place.url}' holds no mask of any image (such as '{self._without[0]}'): masks have the images' names, "
                f"{f'then {self._suffix!r}, ' if self._suffix else ''}then one of {', '.join(SUFFIXES)}. "
                + (
                    f"It holds '{there}'; --mask-suffix is what follows an image's name."
                    if there
                    else "It is empty."
                )
            )

    def warnings(self) -> list[str]:
        """How many images have no mask."""
        if not self._num_without:
            return []
        return [
            f"{self._num_without:,} images have no mask, such as {', '.join(self._without)}; they are converted without one."
        ]


def read_mask(place: Place, name: str) -> bytes:
    """A mask's file; BadImage where it cannot be read."""
    try:
        return place.read(name)
    except OSError as error:
        raise BadImage(f"its mask '{name}' cannot be read: {error.strerror or error}") from error


def is_index(value: float) -> bool:
    """Whether a number can be a class index."""
    return 0 <= value <= _LARGEST_INDEX and float(value).is_integer()


def indices_of(mask: npt.NDArray, nodata: float | None) -> npt.NDArray:
    """A mask (H, W) whose NaN, and whose declared nodata value where that is no class index, are NO_INDEX."""
    unknown = np.isnan(mask) if mask.dtype.kind == "f" else np.zeros(mask.shape, np.bool_)
    if nodata is not None and not np.isnan(nodata) and not is_index(nodata):
        unknown |= mask == (mask.dtype.type(nodata) if mask.dtype.kind == "f" else nodata)
    if not unknown.any():
        return mask
    # Bytes with a sign hold no 255.
    return np.where(unknown, NO_INDEX, mask.astype(np.int16) if mask.dtype == np.int8 else mask)


def prove_mask(
    mask: bytes | npt.NDArray, name: str, stored: Stored, policy: Policy, laid: str = "auto"
) -> bytes:
    """A mask of class indices for an image, as a gray PNG of 8 or 16 bits and of the stored image's size.

    Palette images give their indices, and files in which larger values are darker the values as they stand there. A mask of the
    file's size is turned as the image was, unless it has an EXIF orientation of its own; scaling takes the nearest pixel. Where EXIF
    turns the image and its size stays, `laid` decides: "file" (turned with it), "shown" (upright already), "auto" (refused).

    Raise BadImage for colour masks, other sizes and what does not decode.
    """
    own_turn = 0
    if isinstance(mask, bytes):
        with strict_pillow():
            try:
                image = Image.open(io.BytesIO(mask), formats=("PNG", "TIFF", "BMP", "GIF"))
                check_size(*image.size, policy)
                tiff = tiff_header(mask) if image.format == "TIFF" else None
                if image.format == "PNG":
                    check_png(mask)
                image.load()
                own_turn = tiff.orientation if tiff else orientation(image)
            except BadImage as error:
                raise BadImage(f"its mask '{name}': {error.reason}") from None
            except Exception as error:
                raise BadImage(f"its mask '{name}' is {damage(error).reason}") from error
            if image.mode not in ("1", "L", "P", "I", "I;16", "I;16B", "F"):
                raise BadImage(
                    f"its mask '{name}' has colours ({image.mode}); one grey channel of class indices is wanted"
                )
            pixels = np.asarray(image)
            if tiff and tiff.white_is_zero and image.mode in ("1", "L"):
                # Pillow has turned them over, to show them.
                pixels = 255 - pixels if image.mode == "L" else ~pixels
            if image.mode == "L":
                pixels = pixels // _gray_step(mask, image.format, tiff.bits if tiff else 8)
            mask = indices_of(pixels, tiff.nodata) if tiff else turned(pixels[:, :, None], own_turn)[:, :, 0]
    if mask.ndim == 3 and mask.shape[2] == 1:
        mask = mask[:, :, 0]
    if (
        mask.dtype.kind not in "buif"
        or mask.ndim != 2
        or mask.min() < 0
        or mask.max() > _LARGEST_INDEX
        or (mask != np.floor(mask)).any()
    ):
        raise BadImage(f"its mask '{name}' does not hold class indices of 0 to 65535")
    mask = mask.astype(np.uint8 if mask.max() < 256 else np.uint16)
    size = (mask.shape[1], mask.shape[0])
    upright = stored.file_size if stored.turn not in (5, 6, 7, 8) else stored.file_size[::-1]
    if size == upright == stored.file_size and stored.turn in TURNS and own_turn not in TURNS:
        if laid == "auto":
            raise BadImage(
                f"its mask '{name}' may lie as the file does or as the photo is shown: EXIF turns that (orientation {stored.turn}), "
                "and both have one size; --mask-orientation file or shown says which"
            )
        mask = turned(mask[:, :, None], stored.turn if laid == "file" else 0)[:, :, 0]
    elif size == stored.file_size and own_turn not in TURNS:
        mask = turned(mask[:, :, None], stored.turn)[:, :, 0]
    elif size != upright:
        raise BadImage(
            f"its mask '{name}' has {size[0]} x {size[1]} pixels, the image {stored.file_size[0]} x {stored.file_size[1]}"
        )
    if (mask.shape[1], mask.shape[0]) != (stored.width, stored.height):
        # The centre of each new pixel, as Pillow's nearest filter takes it; that one does not know 16 bits.
        rows = ((np.arange(stored.height) + 0.5) * mask.shape[0] / stored.height).astype(np.int64)
        columns = ((np.arange(stored.width) + 0.5) * mask.shape[1] / stored.width).astype(np.int64)
        mask = mask[rows[:, None], columns]
    return encode(Image.fromarray(np.ascontiguousarray(mask)), "PNG", 0)


def _gray_step(data: bytes, kind: str | None, tiff_bits: int) -> int:
    """What Pillow multiplies the values of 2- and 4-bit gray files with, to fill 0 to 255."""
    bits = png_depth(data) if kind == "PNG" and png_colour(data) == 0 else tiff_bits
    return 255 // ((1 << bits) - 1) if bits < 8 else 1
