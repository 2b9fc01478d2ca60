"""Which members of a WebDataset tar belong together: an image with its mask, class, JSON and text, by their names."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from shards.format.tar_reader import TarMember

MASKS = {"mask", "seg", "segmentation"}
TEXTS = ("txt", "caption")
SIDES = ("cls", "json", *TEXTS)


@dataclass
class TarSample:
    """The members of one key, by their extensions: all that follows the first dot of a name, in lower case."""

    key: str
    files: dict[str, TarMember] = field(default_factory=dict)


@dataclass(frozen=True)
class TarImage:
    """An image with what is said of it. `numbered`: a number stands between its key and its ending, as in `tile_22.1.jpg`."""

    file: TarMember
    mask: TarMember | None
    cls: TarMember | None
    json: TarMember | None
    text: TarMember | None
    numbered: bool

    @property
    def sides(self) -> list[TarMember]:
        """What is said of it, the mask aside."""
        return [one for one in (self.cls, self.json, self.text) if one]


def images_of(sample: TarSample, image_endings: Collection[str]) -> tuple[list[TarImage], list[TarMember]]:
    """Return the images of a sample, each with what belongs to it, and the members that belong to none of them.

    `22.1.jpg` takes `22.1.mask.png`, `22.1.cls` and so on, where they are there; else `22.mask.png` and `22.cls`, which all images of
    the key share. .npy counts as an image only where there are no others, since it may as well be a feature.
    """
    if not any("." in ext for ext in sample.files):
        return _plain_images(sample, image_endings)
    parts = {ext: tuple(ext.split(".")) for ext in sample.files}
    images = {ext: file for ext, file in sample.files.items() if parts[ext][-1] in image_endings}
    masks = {ext: file for ext, file in images.items() if not MASKS.isdisjoint(parts[ext][:-1])}
    images = {ext: file for ext, file in images.items() if ext not in masks}
    pictures = {ext: file for ext, file in images.items() if parts[ext][-1] != "npy"} or images
    by_stem = {
        tuple(part for part in parts[ext][:-1] if part not in MASKS): masks[ext] for ext in reversed(masks)
    }
    sides = {parts[ext]: file for ext, file in sample.files.items() if parts[ext][-1] in SIDES}

    found, used = [], set()
    for ext, file in pictures.items():
        stem = parts[ext][:-1]
        mask = by_stem.get(stem) or by_stem.get(())
        if mask is None and len(pictures) == 1:
            mask = next(iter(masks.values()), None)

        def side(*endings: str, stem: tuple[str, ...] = stem) -> TarMember | None:
            places = [(*above, ending) for above in (stem, ()) for ending in endings]
            return next((sides[place] for place in places if place in sides), None)

        numbered = any(part.isdecimal() for part in " ".join(stem).split())
        found.append(TarImage(file, mask, side("cls"), side("json"), side(*TEXTS), numbered))
        used |= {one.name for one in (file, mask, *found[-1].sides) if one}
    return found, [file for file in sample.files.values() if file.name not in used]


def _plain_images(
    sample: TarSample, image_endings: Collection[str]
) -> tuple[list[TarImage], list[TarMember]]:
    """As `images_of`, of a sample without a second dot in any name, as most are: `0.jpg`, `0.cls`, `0.json`."""
    files = sample.files
    images = [ext for ext in files if ext in image_endings]
    pictures = [ext for ext in images if ext != "npy"] or images
    if not pictures:
        return [], list(files.values())
    text = next((files[ext] for ext in TEXTS if ext in files), None)
    cls, json = files.get("cls"), files.get("json")
    found = [TarImage(files[ext], None, cls, json, text, numbered=False) for ext in pictures]
    used = {*pictures, "cls", "json"}
    return found, [file for ext, file in files.items() if ext not in used and file is not text]


def are_one(images: list[TarImage]) -> bool:
    """Whether several images of one key are views of one thing, which a split must not tear apart.

    Not so where numbers tell them apart and nothing is said of two of them together: `tile_22.1.jpg`, `tile_22.2.jpg`.
    """
    if not any(image.numbered for image in images):
        return True
    told = [one.offset for image in images for one in (*image.sides, *([image.mask] if image.mask else []))]
    return len(set(told)) < len(told)


class Gathering:
    """Members as they come, gathered by their keys, neighbours or not; about `limit` samples are held at a time.

    Members of a key whose sample was given away already make a sample of their own.
    """

    def __init__(self, limit: int):
        self._limit = limit
        self._held: list[TarSample] = []
        self._by_key: dict[str, list[TarSample]] = {}
        self._open = TarSample("")

    def add(self, key: str, ext: str, member: TarMember) -> list[TarSample]:
        """Take a member. Return what was held where that has become too much, in the order of the tar."""
        taken = []
        if key != self._open.key or ext in self._open.files:
            self._close()
            if len(self._held) >= self._limit:
                taken = self._take()
            self._open = TarSample(key)
        self._open.files[ext] = member
        return taken

    def rest(self, cut_key: str | None = None) -> list[TarSample]:
        """Return all that is held. `cut_key`: the archive breaks off within that key, whose last members are left out."""
        if self._open.key == cut_key:
            self._open = TarSample("")
        self._close()
        return self._take()

    def _take(self) -> list[TarSample]:
        held, self._held, self._by_key = self._held, [], {}
        return held

    def _close(self) -> None:
        new, self._open = self._open, TarSample("")
        if not new.files:
            return
        known = self._by_key.setdefault(new.key, [])
        for sample in known:
            # A name that comes twice is another sample.
            if sample.files.keys().isdisjoint(new.files):
                sample.files |= new.files
                return
        known.append(new)
        self._held.append(new)
