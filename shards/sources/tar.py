"""WebDataset tars, to be sharded anew: their images with labels, masks, captions and JSON, read in place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import IO, Any

import pyarrow as pa
from xxhash import xxh3_64_intdigest

from shards.errors import UserError
from shards.format.tar_reader import Archive, Cut, TarMember, split_name
from shards.images.pixels import BadImage
from shards.sources import source
from shards.sources.file_set import IMAGE_SUFFIXES, FileSet, holds_only, names_file, names_files
from shards.sources.source import Picture, Source, SourceKind, entry_batch, read_file
from shards.sources.source_options import SourceOptions, TarOptions
from shards.sources.tar_labels import LabelRule, describe
from shards.units import plural

_IMAGES = {suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES}
_MASKS = {"mask", "seg", "segmentation"}
_TEXTS = ("txt", "caption")
_MAX_LABEL_BYTES = 1 << 10
_MAX_JSON_BYTES = 1 << 20
_OWN = ("height", "width", "label", "source")  # what our JSON says itself
_SHOWN = 3
_MAX_INSIDE = 3  # tars, each in the other


@dataclass
class _Sample:
    key: str
    files: dict[str, TarMember] = field(default_factory=dict)

    def images(self) -> list[TarMember]:
        """Those that are no masks; .npy counts only where there are no others, since it may as well be a feature."""
        found = {ext: file for ext, file in self.files.items() if _is_image(ext) and not _is_mask(ext)}
        pictures = [file for ext, file in found.items() if not ext.endswith("npy")]
        return pictures or list(found.values())

    def mask(self) -> TarMember | None:
        return next((file for ext, file in self.files.items() if _is_mask(ext)), None)


def _is_image(ext: str) -> bool:
    return ext.rpartition(".")[2] in _IMAGES


def _is_mask(ext: str) -> bool:
    return _is_image(ext) and not _MASKS.isdisjoint(ext.split(".")[:-1])


class TarSource(Source):
    """The images in one tar, in those of a folder, or in those that a pattern with `*` or `{000..012}` names.

    Files that follow each other under one key are a sample. Each of its images becomes a sample of ours, called `TAR/MEMBER`, with the
    class that `tar_labels` finds, the mask of `.mask.png` (or `.seg.png`), and, in its JSON, all of `.json`
    and the text of `.txt`. Tars within tars are read in place, too. Of a damaged tar all that is whole is taken; where it breaks off
    stands in the quarantine.
    """

    kind = "tars"

    def __init__(self, where: str, options: TarOptions | None = None):
        self._label_from = (options or TarOptions()).label_from
        self._rule = LabelRule.of(options or TarOptions())
        self.files = FileSet(where, ".tar")
        self.place, self.name = self.files.place, self.files.name
        self.searched = self.place if self.files.searches else None
        self._clear()

    def _clear(self) -> None:
        self._num_tars = self._num_inside = 0
        self._origins: Counter[str] = Counter()
        self._others: Counter[str] = Counter()
        self._cut: list[str] = []
        self._again: list[str] = []
        self._num_bad_json = 0

    def settings(self) -> dict[str, Any]:
        """Which tars, and where classes come from, if that was told."""
        told = {} if self._label_from == "auto" else {"label_from": self._label_from}
        return {"tars": self.files.pattern} | told

    def entries(self) -> Iterator[pa.RecordBatch]:
        """See `Source.entries`. Reads the headers of all tars, and their small `.cls` and `.json`."""
        self._clear()
        rows: list[dict[str, Any]] = []
        num_images = 0
        for tar, size in self.files.sizes():
            self._num_tars += 1
            for row in self._tar(tar, size):
                num_images += len(row["window"]) > 1
                rows.append(row)
                if len(rows) == source.BATCH_ROWS:
                    yield _batch(rows)
                    rows = []
        if rows:
            yield _batch(rows)
        if not num_images:
            reason = f": {self._cut[0]}" if self._cut else ""
            seen = ", ".join(f"{count} {ext}" for ext, count in self._others.most_common(5))
            raise UserError(
                f"'{self.place / self.files.pattern}' holds no images{reason or (f', only {seen}' if seen else '')}. Images are files "
                f"named {', '.join(IMAGE_SUFFIXES)}."
            )

    def _tar(self, tar: str, size: int) -> Iterator[dict[str, Any]]:
        try:
            with self.place.open(tar) as file:
                yield from self._archive(Archive([tar], file, 0, size))
        except OSError as error:
            raise UserError(f"'{self.place / tar}' cannot be read ({error.strerror or error}).") from error

    def _archive(self, tar: Archive) -> Iterator[dict[str, Any]]:
        sample = _Sample("")
        try:
            for member in tar.members():
                split = split_name(member.name)
                if split is None:
                    continue
                key, ext = split
                if key != sample.key or ext in sample.files:
                    yield from self._sample(tar, sample)
                    sample = _Sample(key)
                if ext.rpartition(".")[2] == "tar" and len(tar.names) <= _MAX_INSIDE:
                    self._num_inside += 1
                    names = [*tar.names, member.name]
                    yield from self._archive(Archive(names, tar.file, member.offset, member.size))
                else:
                    sample.files[ext] = member
        except Cut as cut:
            split = split_name(cut.name)
            if not (split and split[0] == sample.key):
                yield from self._sample(tar, sample)
            where = f"'{tar.name}' is {cut.reason}"
            if cut.offset:
                within = f", in '{cut.name}'" if cut.name else ""
                where += f" from byte {cut.offset:,} on{within}"
            self._cut.append(where)
            at = tar.start + cut.offset
            yield {
                "source": f"{tar.name}@{cut.offset}",
                "path": tar.names[0],
                "window": [at],
                "bytes": tar.size - cut.offset,
            }
        else:
            yield from self._sample(tar, sample)

    def _sample(self, tar: Archive, sample: _Sample) -> Iterator[dict[str, Any]]:
        images, mask = sample.images(), sample.mask()
        used = {*(image.name for image in images), *([mask.name] if mask else [])}
        for ext, member in sample.files.items():
            if member.name not in used and ext not in ("cls", "json", *_TEXTS):
                self._others[f".{ext}"] += 1
        if not images:
            return
        notes = [
            sample.files.get("json"),
            next((sample.files[ext] for ext in _TEXTS if ext in sample.files), None),
        ]
        spans = [number for note in notes for number in ((note.offset, note.size) if note else (0, 0))]
        said = None
        if self._rule.asks_sample:
            said = self._said(tar.file, sample.files.get("cls"), notes[0])
        if tar.plain is None:
            tar.plain = not any(notes) and "cls" not in sample.files
        for image in images:
            name = f"{tar.name}/{image.name}"
            origin, label = self._rule.label(said, image.name, tar.names, plain=tar.plain)
            if label is not None:
                self._origins[origin] += 1
            # A tar may hold a name twice.
            digest = xxh3_64_intdigest(image.name.encode())
            if digest in tar.seen:
                name += f"@{image.offset}"
                self._again.append(name)
            tar.seen.add(digest)
            row = {
                "source": name,
                "path": tar.names[0],
                "window": [image.offset, image.size, *spans],
                "bytes": image.size,
                "label": label,
            }
            if mask:
                row |= {"mask": f"{tar.name}/{mask.name}", "mask_window": [mask.offset, mask.size]}
            if len(images) > 1:
                row["group"] = f"{tar.name}/{sample.key}"
            yield row

    def _said(self, file: IO[bytes], cls: TarMember | None, note: TarMember | None) -> str | None:
        """The class: its name in the JSON before its number, since numbers mean other classes in other data sets."""
        facts = _facts(_content(file, note)) if note and note.size <= _MAX_JSON_BYTES else None
        self._num_bad_json += facts == {}
        named = (facts or {}).get("label")
        if isinstance(named, str) and named:
            return named
        text = (
            _content(file, cls).decode(errors="replace").strip()
            if cls and cls.size <= _MAX_LABEL_BYTES
            else ""
        )
        if text:
            return text
        return str(named) if isinstance(named, int) else None

    def describe(self) -> list[str]:
        """How many tars, and where the classes come from."""
        inside = f" and {plural(self._num_inside, 'tar')} within" if self._num_inside else ""
        read = f"Read from {plural(self._num_tars, 'tar')}{inside}, in place."
        return [read] if self._rule.kind == "none" else [read, describe(self._origins)]

    def warnings(self) -> list[str]:
        """Tars that break off, names that come twice, members that are not kept."""
        found = []
        if self._cut:
            found.append(
                f"what comes before is whole and taken, but {'; '.join(self._cut[:_SHOWN])}{_more(self._cut)}."
            )
        if self._again:
            found.append(
                f"{len(self._again):,} names come twice, and all are kept: {', '.join(self._again[:_SHOWN])}{_more(self._again)}."
            )
        if self._num_bad_json:
            found.append(f"{self._num_bad_json:,} .json members hold no facts, or no JSON object: left out.")
        if self._others:
            kinds = ", ".join(f"{count:,} {ext}" for ext, count in self._others.most_common(5))
            found.append(f"members of other kinds are left out: {kinds}.")
        return found

    def read(self, row: dict[str, Any]) -> Picture:
        """One image with its mask; BadImage for the place where a tar breaks off."""
        window, tar = row["window"], row["path"]
        if len(window) == 1:
            raise BadImage(
                f"the archive is cut short or damaged (from byte {window[0]} on); what comes before is taken"
            )
        offset, size, note_offset, note_size, text_offset, text_size = window
        data = read_file(self.place, tar, size, offset)
        facts = {}
        if note_size:
            facts = _facts(read_file(self.place, tar, note_size, note_offset))
            before = facts.get("source")
            facts = {key: value for key, value in facts.items() if key not in _OWN}
            if before is not None:
                facts["original_source"] = before
        if text_size:
            facts["txt"] = read_file(self.place, tar, text_size, text_offset).decode(errors="replace")
        mask = row["mask_window"] and read_file(self.place, tar, row["mask_window"][1], row["mask_window"][0])
        return Picture(data, mask, facts)


def _batch(rows: list[dict[str, Any]]) -> pa.RecordBatch:
    names = ("source", "path", "window", "bytes", "label", "mask", "mask_window", "group")
    return entry_batch({name: [row.get(name) for row in rows] for name in names})


def _content(file: IO[bytes], member: TarMember) -> bytes:
    file.seek(member.offset)
    return file.read(member.size)


def _facts(data: bytes) -> dict[str, Any]:
    try:
        facts = json.loads(data)
    except (ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}


def _more(names: list[str]) -> str:
    return f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""


def _matches(where: str, options: SourceOptions) -> bool:
    if names_file(where, ".tar") or names_files(where):
        return not names_file(where, IMAGE_SUFFIXES)
    return holds_only(where, ".tar")


INSIDE = "goes with a folder of images or rasters; '{where}' has its masks inside"
KIND = SourceKind(
    "tars",
    "a .tar, a pattern of tars or a folder of nothing but tars",
    _matches,
    lambda where, options: TarSource(where, options.tar),
    ("tar",),
    INSIDE,
)
