"""Append images to a finished shard folder: what must go together, and which of them are inside already."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from shards.conversion.duplicates import hash_stored
from shards.conversion.listing import Listing
from shards.conversion.shard_maker import SMALL_HASH, read_rows
from shards.conversion.shard_plan import Plan, default_samples_per_shard, read_plan
from shards.cpus import available_cpus
from shards.errors import UserError
from shards.format import layout
from shards.format.columns import hash_values
from shards.format.label_table import read_labels
from shards.format.layout import Appended, Manifest
from shards.format.sample_table import rows_of, table_batches
from shards.images.policy import Policy
from shards.images.proof import BadImage, prove
from shards.sources.source import Source
from shards.storage.place import Place

Ids = npt.NDArray[np.int64]
SHOWN = 3
NUM_TRIED = 8


@dataclass(frozen=True)
class Base:
    """The finished set that images are appended to: its manifest, the plans of its images, its classes with those given later."""

    place: Place
    manifest: Manifest
    plans: list[Plan]
    classes: list[str]

    @classmethod
    def read(cls, place: Place) -> Base:
        """Raise UserError where the folder is unfinished or its table is missing."""
        manifest = Manifest.load(place)
        for name in (layout.TABLE, layout.QUARANTINE):
            if not place.exists(name):
                raise UserError(
                    f"'{place / name}' is missing: `fastssl verify {place.url} --repair` mends it, then append."
                )
        plans = [read_plan(place, number) for number in range(len(manifest.identities))]
        return cls(place, manifest, plans, read_labels(place, manifest).classes)

    @property
    def number(self) -> int:
        """The number of the plan that comes next."""
        return len(self.plans)

    @property
    def after(self) -> dict[str, Any]:
        """What the plan that comes next notes of its place: `Settings.after`."""
        return {"options_sha256": self.manifest.options_sha256, "first_shard": self.plans[-1].shards.stop}

    def inside(self, source: Source, listing: Listing) -> Plan | None:
        """The plan that took in exactly these images already, by their names, sizes and labels, and the pixels of a few."""
        for plan in self.plans:
            was = plan.settings
            same = (was.kind, was.source, was.listing) == (source.kind, source.name, listing.digest)
            if same and self._holds(source, plan):
                return plan
        return None

    def _holds(self, source: Source, plan: Plan) -> bool:
        """Whether a few samples of a plan, spread over all of them, are what the source has under their names now.

        Raw files of one shape have one size, so two folders of the same name may have the same listing.
        """
        ends = [*(part.num_samples_before for part in self.manifest.appended), self.manifest.num_samples]
        first = ends[plan.number - 1] if plan.number else 0
        ids = set(np.linspace(first, ends[plan.number] - 1, NUM_TRIED).astype(int).tolist())
        size, policy = plan.settings.samples_per_shard, Policy(**plan.settings.store)
        for was in rows_of(
            self.place, self.manifest, ids, ["key", "shard", "sha256", "pixels_hash"]
        ).values():
            [row] = plan.rows(was["shard"]).slice(int(was["key"]) % size, 1).to_pylist()
            try:
                now = prove(source.read(row).image, row["source"], policy, "both")
            except BadImage:
                return False
            # Another version of an encoder writes the same pixels as other bytes.
            if hashlib.sha256(now.data).hexdigest() != was["sha256"] and was["pixels_hash"] not in (
                now.pixels_hash,
                now.small_hash,
            ):
                return False
        return True

    def samples_per_shard(self, wanted: int | None, num_images: int) -> int:
        """The images in a new shard: not fewer than in the last ones, so that each has a key of its own."""
        least = self.plans[-1].settings.samples_per_shard
        if wanted is not None and wanted < least:
            raise UserError(
                f"--samples-per-shard is {wanted}, but '{self.place.url}' has {least} in a shard: appended ones may not be "
                "smaller."
            )
        return wanted or max(least, default_samples_per_shard(num_images))

    def check(self, source: Source, policy: Policy, dedupe: str) -> None:
        """Raise UserError, with both values, where images would be stored in another way, or a column has another type."""
        was, now = self.manifest.store, dataclasses.asdict(policy)
        for name in {**was, **now}:
            if was.get(name) != now.get(name):
                self._refuse(name.replace("_", " "), was.get(name), now.get(name))
        # What is inside already may be left out, however its own duplicates were treated.
        if dedupe not in (self.manifest.dedupe, "drop"):
            self._refuse("--dedupe", self.manifest.dedupe, dedupe)
        known = {column.name: column.type for column in self.schema()}
        for column in source.extra_schema:
            if known.get(column.name, column.type) != column.type:
                self._refuse(f"a column '{column.name}' of", str(known[column.name]), str(column.type))

    def check_classes(self, plan: Plan) -> None:
        """Raise UserError where classes were given since the plan was made, whose numbers are those of its own."""
        for number, (given, planned) in enumerate(itertools.zip_longest(self.classes, plan.classes)):
            if given not in (planned, None):
                raise UserError(
                    f"The labels of '{self.place.url}' give the number {number} to the class '{given}', the append that was begun "
                    f"to '{planned}': delete '{layout.plan_name(plan.number)}' to give it up, and append again."
                )

    def _refuse(self, what: str, was: Any, now: Any) -> None:
        raise UserError(
            f"'{self.place.url}' was made with {what} {was!r}, and what is appended has {now!r}: give the same, or a new DEST."
        )

    def schema(self) -> pa.Schema:
        """The columns of the sample table."""
        with self.place.open(layout.TABLE) as file:
            return pq.read_schema(file)

    def rows(self, columns: list[str] | None = None) -> Iterator[pa.RecordBatch]:
        """The rows of the sample table, in batches."""
        return table_batches(self.place, self.manifest, columns)

    def clear(self) -> None:
        """Remove what an append that was given up has left: its shards and their rows."""
        first = self.plans[-1].shards.stop
        self.place.remove_tree(layout.ROWS)
        self.place.remove(layout.dropped_name(self.number))
        for name in self.place.names():
            shard = layout.shard_of(name)
            if shard is not None and shard >= first:
                self.place.remove(name)

    def give_up(self, plan: Plan) -> None:
        """Remove an append that cannot be finished: the folder is as before."""
        self.clear()
        self.place.remove(layout.plan_name(plan.number))

    def check_kinds(self, channels: set[int], dtypes: set[str]) -> None:
        """Raise UserError, with both values, where a batch could not hold old and new images."""
        was = set(self.manifest.channels)
        if not (channels <= was or channels | was <= {1, 3}):
            self._refuse("channels", sorted(was), sorted(channels))
        if not dtypes <= set(self.manifest.dtypes):
            self._refuse("elements of", sorted(self.manifest.dtypes), sorted(dtypes))

    def check_names(self, names: Iterable[pa.Array], source: str) -> None:
        """Raise UserError where new images have a name that a sample has already: labels, lists and repairs go by names.

        Memory: 8 bytes a sample.
        """
        known = np.sort(np.concatenate([hash_values(batch["source"]) for batch in self.rows(["source"])]))
        for new in names:
            hashes = hash_values(new)
            at = np.minimum(np.searchsorted(known, hashes), len(known) - 1)
            likely = new.filter(pa.array(known[at] == hashes))
            for batch in self.rows(["sample_id", "source"]) if len(likely) else ():
                twice = batch.filter(pc.is_in(batch["source"], likely))  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
                if twice.num_rows:
                    sample, name = (column[0].as_py() for column in twice.columns)
                    began = [part.num_samples_before for part in self.manifest.appended]
                    old = self.plans[bisect.bisect_right(began, sample)].settings.source
                    raise UserError(
                        f"'{name}' of '{source}' has the name of sample {sample} of '{self.place.url}', from '{old}', and a name may "
                        "mean one image only. If it is inside already, add --dedupe drop, which leaves it out. If it is another "
                        "image, rename it; or give a list (.csv) of path and label that lies in a folder further up, so that paths "
                        "differ."
                    )

    def try_first(self, source: Source, plan: Plan, policy: Policy) -> None:
        """Give an append up before its work where names are taken, or already the first image does not go with the others.

        Raise UserError then.
        """
        try:
            if plan.settings.dedupe != "drop":  # those that are inside already would be left out
                self.check_names(
                    (plan.rows(shard)["source"].combine_chunks() for shard in plan.shards), source.name
                )
            self._try_first(source, plan, policy)
        except UserError:
            self.give_up(plan)
            raise

    def _try_first(self, source: Source, plan: Plan, policy: Policy) -> None:
        for row in plan.rows(plan.first_shard).slice(0, NUM_TRIED).to_pylist():
            try:
                stored = prove(source.read(row).image, row["source"], policy)
            except BadImage:
                continue
            self.check_kinds({stored.channels}, {stored.dtype})
            return

    def entry(self, plan: Plan) -> Appended:
        """What the manifest says of the images that a plan appended."""
        settings = plan.settings
        return Appended(
            settings.source,
            settings.kind,
            settings.seed,
            settings.samples_per_shard,
            plan.first_shard,
            self.manifest.options_sha256,
            self.manifest.num_samples,
            settings.dedupe,
        )


class AppendedHashes:
    """Hashes of the pixels of appended samples, equal to each other's and to earlier samples' where the pixels are.

    `first_equals`: for each new sample, in shard order, the id of the first sample of the folder with the same pixels, or -1 where it
    is itself the first; (M,). An earlier sample whose hash is that of its small copy is decoded where the small copy of a new one
    is the same and the file is not. One case is missed: an earlier JPEG with an equal in a new file of another format.
    """

    def __init__(self, base: Base, made: list[int]):
        start = base.manifest.num_samples
        columns = ["pixels_hash", SMALL_HASH, "sha256"]
        rows = pa.concat_tables([read_rows(base.place, shard, columns) for shard in made])
        whole, small, files = (rows[name].to_pylist() for name in columns)
        # By the hash of all pixels, which each appended image has.
        earlier = self._earlier(base, whole, small, files)
        self._texts = [earlier[text][1] if text in earlier else text for text in whole]
        self.first_equals = np.full(len(whole), -1, np.int64)
        first: dict[str, int] = {text: sample for text, (sample, _) in earlier.items()}
        for i, text in enumerate(whole):
            found = first.setdefault(text, start + i)
            if found != start + i:
                self.first_equals[i] = found
        self._start = start

    def of(self, start: int, rows: pa.Table) -> pa.Array:
        """The hashes of the rows of a shard, of which the first is sample `start`."""
        at = start - self._start
        return pa.array(self._texts[at : at + rows.num_rows], pa.string())

    @staticmethod
    def _earlier(
        base: Base, whole: list[str], small: list[str | None], files: list[str]
    ) -> dict[str, tuple[int, str]]:
        """For the hashes of all pixels that earlier samples have too: the first such sample, and the hash that the table has of it."""
        wanted = pa.array(sorted({*whole, *filter(None, small)}))
        ids, start = np.full(len(wanted), -1, np.int64), 0
        for batch in base.rows(["pixels_hash"]):
            at = pc.index_in(batch["pixels_hash"], wanted)  # pyright: ignore[reportAttributeAccessIssue] (made at run time)
            here, which = np.flatnonzero(np.asarray(at.is_valid()))[::-1], at.drop_null().to_numpy()[::-1]
            new = ids[which] < 0
            ids[which[new]] = start + here[new]  # of several the first stays
            start += batch.num_rows
        inside = {text: int(i) for text, i in zip(wanted.to_pylist(), ids, strict=True) if i >= 0}
        found = {text: (inside[text], text) for text in whole if text in inside}
        doubtful = {
            i: inside[text]
            for i, text in enumerate(small)
            if text in inside and whole[i] not in found and text is not None
        }
        columns = ["shard", "offset", "size", "sha256", "ext", "stored"]
        known = rows_of(base.place, base.manifest, set(doubtful.values()), columns)

        def same(i: int) -> bool:
            row = known[doubtful[i]]
            if row["sha256"] == files[i]:
                return True
            # The pixels that a re-encoded image had before are not there any more; the same ones gave the same file.
            kept = row["ext"] == "jpg" and row["stored"].startswith("kept")
            return kept and hash_stored(base.place, row["shard"], row["offset"], row["size"]) == whole[i]

        with ThreadPoolExecutor(available_cpus()) as threads:
            answers = list(threads.map(same, doubtful))
        for i, answer in zip(doubtful, answers, strict=True):
            if answer:
                found[whole[i]] = (doubtful[i], str(small[i]))
        return found
