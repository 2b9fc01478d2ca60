"""WebDataset tars, to be sharded anew: their images with labels, masks, captions and JSON, read in place."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from typing import IO, Any

import pyarrow as pa
from xxhash import xxh3_64_intdigest

from shards.errors import UserError
from shards.format.tar_reader import Archive, Cut, TarMember, is_hidden, split_name
from shards.format.tar_samples import SIDES, Gathering, TarImage, TarSample, are_one, images_of
from shards.images.pixels import BadImage
from shards.sources import source
from shards.sources.file_set import (
    IMAGE_SUFFIXES,
    FileSet,
    MaskFolders,
    holds_only,
    names_file,
    names_files,
    told_kinds,
)
from shards.sources.source import Picture, Source, SourceKind, entry_batch, read_file
from shards.sources.source_options import SourceOptions, TarOptions
from shards.sources.table_reader import UNKNOWN
from shards.sources.tar_labels import LabelRule, describe
from shards.units import human_size, plural

_IMAGES = {suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES}
_MAX_LABEL_BYTES = 1 << 10
_MAX_JSON_BYTES = 1 << 24
_OWN = ("height", "width", "label", "source")  # what our JSON says itself
_SHOWN = 3
_HELD = source.BATCH_ROWS  # samples of a tar, among which members of one key need not be neighbours
_MAX_INSIDE = 3  # tars, each in the other


class TarSource(Source):
    """The images in one tar, in those of a folder, or in those that a pattern with `*` or `{000..012}` names.

    Files of one key are a sample. Each of its images becomes a sample of ours, called `TAR/MEMBER`, with the class that `tar_labels`
    finds, the mask of `.mask.png` (or `.seg.png`), and, in its JSON, all of `.json` and the text of `.txt`. Tars within tars are read
    in place, too. Of a damaged tar all that is whole is taken; where it breaks off stands in the quarantine.
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
        self._examples: dict[str, str] = {}
        self._folders = MaskFolders()
        self._num_bad_json = self._num_other_labels = 0

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
            seen = told_kinds(self._others)
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
        gathering = Gathering(_HELD)
        try:
            for member in tar.members():
                split = split_name(member.name)
                if split is None:
                    if not is_hidden(member.name):
                        self._note(member.special or "without extension", member.name)
                    continue
                key, ext = split
                if member.special:
                    self._note(member.special, member.name)
                elif ext.rpartition(".")[2] == "tar" and len(tar.names) <= _MAX_INSIDE:
                    self._num_inside += 1
                    names = [*tar.names, member.name]
                    yield from self._archive(Archive(names, tar.file, member.offset, member.size))
                else:
                    yield from self._samples(tar, gathering.add(key, ext, member))
        except Cut as cut:
            split = split_name(cut.name)
            yield from self._samples(tar, gathering.rest(split[0] if split else None))
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
            yield from self._samples(tar, gathering.rest())

    def _note(self, kind: str, name: str) -> None:
        """Count a member that is left out, and keep the first name of its kind."""
        self._others[kind] += 1
        self._examples.setdefault(kind, name)

    def _samples(self, tar: Archive, samples: list[TarSample]) -> Iterator[dict[str, Any]]:
        found = [(sample, *images_of(sample, _IMAGES)) for sample in samples]
        if tar.plain is None and any(images for _, images, _ in found):
            tar.plain = not any(image.sides for _, images, _ in found for image in images)
        for sample, images, left in found:
            for member in left:
                ending = member.name.rpartition(".")[2].lower()
                alone = ending in (*SIDES, *_IMAGES) and ending != "npy"
                self._note(f".{ending}" + alone * " of no image", member.name)
            group = f"{tar.name}/{sample.key}" if len(images) > 1 and are_one(images) else None
            yield from (self._image(tar, image, group) for image in images)

    def _image(self, tar: Archive, image: TarImage, group: str | None) -> dict[str, Any]:
        said, keep_label = None, False
        if self._rule.asks_sample:
            said, keep_label = self._said(tar.file, image.cls, image.json)
        file, mask = image.file, image.mask
        self._folders.see(file.name)
        name = f"{tar.name}/{file.name}"
        origin, label = self._rule.label(said, file.name, tar.names, plain=bool(tar.plain))
        if label is not None:
            self._origins[origin] += 1
        # A tar may hold a name twice.
        digest = xxh3_64_intdigest(file.name.encode())
        if digest in tar.seen:
            name += f"@{file.offset}"
            self._again.append(name)
        tar.seen.add(digest)
        notes = (image.json, image.text)
        spans = [number for note in notes for number in ((note.offset, note.size) if note else (0, 0))]
        row = {
            "source": name,
            "path": tar.names[0],
            "window": [file.offset, file.size, *spans, *([1] if keep_label else [])],
            "bytes": file.size,
            "label": label,
            "group": group,
        }
        if mask:
            row |= {"mask": f"{tar.name}/{mask.name}", "mask_window": [mask.offset, mask.size]}
        return row

    def _said(
        self, file: IO[bytes], cls: TarMember | None, note: TarMember | None
    ) -> tuple[str | None, bool]:
        """The class, and whether the `label` of the JSON is something else, which must be kept.

        The class is its name in the JSON before its number, since numbers mean other classes in other data sets.
        """
        for member, most in ((cls, _MAX_LABEL_BYTES), (note, _MAX_JSON_BYTES)):
            if member and member.size > most:
                self._note(f"class in a member of more than {human_size(most)}", member.name)
        facts = _facts(_content(file, note)) if note and note.size <= _MAX_JSON_BYTES else None
        self._num_bad_json += facts == {}
        named = (facts or {}).get("label")
        if isinstance(named, str):
            named = named.strip()
        if isinstance(named, str) and named not in UNKNOWN:
            return named, False
        text = (
            _content(file, cls).decode(errors="replace").strip()
            if cls and cls.size <= _MAX_LABEL_BYTES
            else ""
        )
        text = "" if text in UNKNOWN else text
        if named is None or isinstance(named, str):
            return text or None, False
        number = None
        if isinstance(named, int) or (isinstance(named, float) and named.is_integer()):
            number = str(named if isinstance(named, bool) else int(named))
        keeps = number is None or bool(text and text != number)
        self._num_other_labels += keeps
        return text or number, keeps

    def describe(self) -> list[str]:
        """How many tars, and where the classes come from."""
        inside = f" and {plural(self._num_inside, 'tar')} within" if self._num_inside else ""
        read = f"Read from {plural(self._num_tars, 'tar')}{inside}, in place."
        return [read] if self._rule.kind == "none" else [read, describe(self._origins)]

    def left_out(self) -> str:
        """See `Source.left_out`."""
        return told_kinds(self._others + self.files.others)

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
        if self._num_other_labels:
            found.append(
                f"{plural(self._num_other_labels, 'sample')} whose .json has a `label` that is not their class, such as a list: kept "
                "in the JSON as `original_label`."
            )
        if self._others:
            kinds = told_kinds(self._others, self._examples)
            found.append(f"members of other kinds are left out: {kinds}.")
        found += self._folders.warnings("")
        if self.files.others:
            found.append(f"files beside the tars are left out: {told_kinds(self.files.others)}.")
        return found

    def read(self, row: dict[str, Any]) -> Picture:
        """One image with its mask; BadImage for the place where a tar breaks off."""
        window, tar = row["window"], row["path"]
        if len(window) == 1:
            raise BadImage(
                f"the archive is cut short or damaged (from byte {window[0]} on); what comes before is taken"
            )
        offset, size, note_offset, note_size, text_offset, text_size, *keep_label = window
        data = read_file(self.place, tar, size, offset)
        facts = {}
        if note_size:
            facts = _facts(read_file(self.place, tar, note_size, note_offset))
            own = {key: facts[key] for key in ("label", "source") if facts.get(key) is not None}
            if not keep_label and self._rule.asks_sample:
                own.pop("label", None)
            facts = {key: value for key, value in facts.items() if key not in _OWN}
            facts |= {f"original_{key}": value for key, value in own.items()}
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
