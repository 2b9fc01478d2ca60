"""Repair a damaged shard folder from its plan and its source; a shard is replaced only if its SHA-256 is the recorded one."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

import pyarrow as pa

from shards.checking.damage import Damage, grouped, walk
from shards.checking.scratch import Scratch, copy_file, same_file
from shards.checking.shard_checker import read_rows
from shards.checking.verify import Promise, VerifyResult
from shards.conversion.append import Base
from shards.conversion.convert import SMALL, number
from shards.conversion.listing import SCRATCH, Survey
from shards.conversion.merge import dropped_by_shard, merge, write_dropped
from shards.conversion.shard_maker import Maker, read_marks
from shards.conversion.shard_maker import read_rows as read_made
from shards.conversion.shard_plan import Plan, read_plan, settings_for, write_plan
from shards.conversion.workers import Count, run_here, run_in_processes
from shards.cpus import available_cpus
from shards.errors import UserError
from shards.format import layout
from shards.format.checksums import index_of, sha256_of, write_sums
from shards.format.label_table import WAY_OUT as LABEL_AGAIN
from shards.format.layout import Appended, Manifest, ShardFile
from shards.format.tar_writer import write_index
from shards.images.policy import Policy
from shards.sources.source import Source
from shards.sources.source_kinds import check_apart, open_source
from shards.splits.split_table import WAY_OUT
from shards.storage.local import LocalPlace
from shards.storage.opening import Where, open_place
from shards.storage.place import Place

_SHOWN = 3
_OF_ALL = {layout.TABLE, layout.MANIFEST, layout.QUARANTINE}
_GIVEN = {layout.SPLITS: WAY_OUT, layout.LABELS: LABEL_AGAIN}


@dataclass(frozen=True)
class Repair:
    """What a repair did: names of the files that are whole again, and what could not be mended and why."""

    mended: list[str] = field(default_factory=list)
    failed: list[Damage] = field(default_factory=list)


def repair(
    folder: Where,
    verdict: VerifyResult,
    source: Source | str | os.PathLike | None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int, int], None] = lambda *_: None,
) -> Repair:
    """Repair what `verify` found in a folder, and remove what killed runs left in it.

    Shards are made again from the plan and the source, and replaced where their SHA-256 is the manifest's; else the old one stays.
    Indexes come from their tars. Table, quarantine and manifest are merged again from all shards, which takes as long as a conversion
    but no more room than a few shards.

    Args:
        source: None mends only what needs no source: indexes, and the checksums.
        progress: called with (images made, images to make, 0).

    Raises:
        UserError: the source has gone away or is of another kind; another process works on the folder.
    """
    place = open_place(folder)
    check_repairable(place)
    if isinstance(source, str | os.PathLike):
        source = open_source(os.fspath(source))
    if source is not None:
        check_apart(source, place)
    with place.lock(layout.LOCK):
        return _Work(place, verdict, source, workers, progress).run()


def check_repairable(place: Place) -> None:
    """Raise UserError where nothing can be mended, because nothing can be written."""
    place.check_writable(
        "repair the folder where it lies on a disk or in a store, or download it, repair the copy and upload the files that are named "
        "as mended"
    )


class _Work:
    def __init__(
        self,
        place: Place,
        verdict: VerifyResult,
        source: Source | None,
        workers: int | None,
        progress: Callable[[int, int, int], None],
    ):
        self.place = place
        self.source = source
        self.workers = workers
        self.progress = progress
        self.promise = Promise.read(place)
        self.damaged = {finding.file for finding in verdict.findings if not finding.harmless}
        self.result = Repair()

    def run(self) -> Repair:
        self._tidy()
        tars = {file.name: file for file in self.promise.files if file.name in self.damaged}
        for file in self.promise.files:
            if index_of(file.name) in self.damaged and file.name not in tars:
                self._mend_index(file)
        merged = self.damaged & (_OF_ALL | self.promise.dropped)
        needing = [*tars, *sorted(merged | self.damaged.intersection(self.promise.plans))]
        if needing and self.source is None:
            what = "is made again from the images: give --source and the options that `fastssl shard` had"
            self.result.failed.extend(Damage(name, "failed", what) for name in needing)
        elif needing and self.source is not None:
            self._remake(self.source, tars, merged)
        self._mend_sums()
        handled = {*self.result.mended, *(finding.file for finding in self.result.failed)}
        for name in sorted(self.damaged - handled):
            what = "cannot be mended; move it out of the folder"
            if name in _GIVEN:
                what = f"is not made from the images. {_GIVEN[name].rstrip('.')}"
            self.result.failed.append(Damage(name, "failed", what))
        return self.result

    def _tidy(self) -> None:
        place = self.place
        place.remove_unfinished("")
        for name in place.names():
            if name.startswith(SCRATCH):
                place.remove_tree(name)
        if self.promise.manifest and layout.TABLE not in self.damaged and not self.promise.appending:
            place.remove_tree(layout.ROWS)

    def _mend_index(self, file: ShardFile) -> None:
        name = index_of(file.name)
        with self.place.open(file.name) as tar:
            samples = grouped(walk(tar))
        digest = write_index(self.place, name, samples)
        if file.index_sha256 in ("", digest):
            self.result.mended.append(name)
        else:
            what = "was written again from its tar, but its SHA-256 is not the manifest's"
            self.result.failed.append(Damage(name, "failed", what))

    def _remake(self, source: Source, tars: dict[str, ShardFile], merged: set[str]) -> None:
        place = self.place
        # Beside the shards, where there is room for one of them; `SCRATCH` is what a killed run's litter is known by.
        with tempfile.TemporaryDirectory(prefix=f"{SCRATCH}repair-", dir=place.local) as folder:
            scratch = Scratch(folder, place)
            plans = [self._plan(source, scratch, number) for number in range(len(self.promise.plans))]
            fitting = [plan for plan in plans if plan and self._fits(source, plan, tars, len(plans) > 1)]
            if len(fitting) < len(plans):
                sources = ", ".join(repr(plan.settings.source) for plan in plans if plan)
                what = f"is made of all that the folder holds, at once: {sources}; restore it from a copy"
                dropped = {layout.dropped_name(plan.number) for plan in plans if plan}
                lost = sorted(merged - dropped)
                self.result.failed.extend(Damage(name, "failed", what) for name in lost if sources)
                merged &= dropped
            for plan in fitting:
                self._remake_plan(source, scratch, plan, tars, merged)
            if merged & _OF_ALL:
                self._merge(scratch, fitting, merged & _OF_ALL)

    def _remake_plan(
        self, source: Source, scratch: LocalPlace, plan: Plan, tars: dict[str, ShardFile], merged: set[str]
    ) -> None:
        """Make the shards of one plan that are needed."""
        place = self.place
        wanted = {number(file): file for file in self.promise.files}
        hurt = {number(file): file for file in tars.values() if number(file) in plan.shards}
        name = layout.dropped_name(plan.number)
        todo = plan.shards if merged & {*_OF_ALL, name} else sorted(hurt)
        if name in merged:
            base = self._base(scratch, plan) if plan.number else None
            if plan.number and not base:
                what = (
                    "is made of table and manifest, and one of them is damaged, too: restore it from a copy"
                )
                self.result.failed.append(Damage(name, "failed", what))
                self.result.failed.extend(
                    Damage(file.name, "failed", f"'{name}' {what}") for file in hurt.values()
                )
                return
            self._make(source, scratch, plan, {}, todo, {}, {})
            write_dropped(scratch, plan, base)
            self._take(scratch, name)
        else:
            copy_file(place, name, scratch)
        dropped = dropped_by_shard(scratch, plan)
        self._make(source, scratch, plan, dropped, todo, wanted, hurt)
        failed = {finding.file for finding in self.result.failed}
        for tar in (file.name for file in hurt.values()):
            if tar not in failed:
                self.result.mended.append(tar)
                if index_of(tar) in self.damaged:
                    self.result.mended.append(index_of(tar))
            elif index_of(tar) in self.damaged:
                what = "is made from its tar, which cannot be made"
                self.result.failed.append(Damage(index_of(tar), "failed", what))

    def _base(self, scratch: LocalPlace, plan: Plan) -> Base | None:
        """The set that a plan was appended to; None where table or manifest are damaged."""
        manifest = self.promise.manifest
        if manifest is None or self.damaged & {layout.TABLE, layout.MANIFEST}:
            return None
        copy_file(self.place, layout.TABLE, scratch)
        before = manifest.appended[plan.number - 1].num_samples_before
        return Base(scratch, replace(manifest, num_samples=before), [], [])

    def _fits(self, source: Source, plan: Plan, tars: dict[str, ShardFile], several: bool) -> bool:
        """Whether a plan was made of this source; of several plans those of others are passed over, and their shards told."""
        if not several:
            _check_kind(source, plan)
            return True
        was, now = plan.settings, json.loads(json.dumps(source.settings()))
        if (was.kind, was.source, was.source_settings) == (source.kind, source.name, now):
            return True
        what = f"is made of '{was.source}' ({was.kind}): give that as --source, with the options that it had"
        of_plan = [tar for tar, file in tars.items() if number(file) in plan.shards]
        of_plan += self.damaged & {layout.dropped_name(plan.number)}
        self.result.failed.extend(Damage(name, "failed", what) for name in of_plan)
        return False

    def _plan(self, source: Source, scratch: Place, plan_number: int) -> Plan | None:
        """A plan, made again where it is damaged; None where that cannot be."""
        place, manifest, name = self.place, self.promise.manifest, layout.plan_name(plan_number)
        if name not in self.damaged:
            return read_plan(place, plan_number)
        if manifest is None or layout.MANIFEST in self.damaged:
            what = "plan and manifest are both damaged: convert to a new folder"
            self.result.failed.append(Damage(name, "failed", what))
            return None
        of: Manifest | Appended = manifest
        policy, after, classes = Policy(**manifest.store), {}, []
        if plan_number:
            of = manifest.appended[plan_number - 1]
            after, classes = {"options_sha256": of.before, "first_shard": of.first_shard}, manifest.classes
        with Survey(source, of.seed, scratch.local) as survey:
            settings = settings_for(
                source, survey.listing, of.seed, of.samples_per_shard, policy, of.dedupe, after
            )
            settings = replace(settings, source=of.source)
            if settings.sha256() != manifest.identities[plan_number]:
                what = (
                    f"cannot be made again: names, sizes or labels of '{source.name}' have changed since the conversion, or other "
                    "options were given"
                )
                self.result.failed.append(Damage(name, "failed", what))
                return None
            plan = write_plan(scratch, survey, settings, plan_number, classes)
        self._take(scratch, name)
        return replace(plan, place=place)

    def _make(
        self,
        source: Source,
        scratch: LocalPlace,
        plan: Plan,
        dropped: dict[int, frozenset[int]],
        todo: range | list[int],
        wanted: dict[int, ShardFile],
        hurt: dict[int, ShardFile],
    ) -> None:
        """Make shards in `scratch`; see `_Remaker` for `wanted` and `hurt`. Add to what has failed."""
        maker = Maker(source, scratch, plan, Policy(**plan.settings.store), dropped)
        table_whole = layout.TABLE not in self.damaged
        starts = dict(zip(map(number, self.promise.files), self.promise.starts(), strict=True))
        remaker = _Remaker(maker, self.place, wanted, hurt, starts if table_whole else {})
        total = sum(map(plan.num_rows, todo))

        def show(done: int, _: int) -> None:
            self.progress(done, total, 0)

        workers = self.workers
        if workers is None:
            workers = 0 if total < SMALL else available_cpus()
        if workers and todo:
            run_in_processes(remaker, todo, workers, show)
        else:
            run_here(remaker, todo, show)
        for path in sorted(scratch.local.glob("failed-*.json")):
            self.result.failed.append(Damage(**json.loads(path.read_text())))
            path.unlink()

    def _merge(self, scratch: Place, plans: list[Plan], wanted: set[str]) -> None:
        if self.result.failed:
            for name in sorted(wanted):
                what = "needs every shard, and some cannot be made again"
                self.result.failed.append(Damage(name, "failed", what))
            return
        made = merge(scratch, plans[0])
        for plan in plans[1:]:
            made = merge(scratch, plan, Base(scratch, made, plans[: plan.number], []))
        made.save(scratch)
        for name in sorted(wanted):
            self._take(scratch, name)

    def _take(self, scratch: Place, name: str) -> None:
        """Put a file that was made again in place, unless it is not as it was."""
        wanted = self.promise.sum_of(name)
        # Another version of pyarrow writes the same rows as other bytes: the checksums are then written anew.
        same = wanted is None or sha256_of(scratch, name) == wanted
        if not same and name in (layout.MANIFEST, layout.QUARANTINE):
            what = "was made again, but differs from its SHA-256: the images that are refused have changed"
            self.result.failed.append(Damage(name, "failed", what))
            return
        copy_file(scratch, name, self.place)
        self.result.mended.append(name)
        if not same:
            self.damaged.add(layout.SUMS)

    def _mend_sums(self) -> None:
        if layout.SUMS not in self.damaged:
            return
        if self.result.failed:
            what = "is written when all other files are whole"
            self.result.failed.append(Damage(layout.SUMS, "failed", what))
            return
        write_sums(self.place, Manifest.load(self.place))
        self.result.mended.append(layout.SUMS)


@dataclass(frozen=True)
class _Remaker:
    """Makes one shard in the maker's folder, compares it with the promise, and keeps its rows only; picklable.

    wanted: what each shard must be (nothing is compared where it is empty); hurt: those to put into `place`; starts: the first sample
    id of each, for the names of images that have changed.
    """

    maker: Maker
    place: Place
    wanted: dict[int, ShardFile]
    hurt: dict[int, ShardFile]
    starts: dict[int, int]

    def __call__(self, shard: int, count: Count) -> None:
        self.maker(shard, count)
        scratch = self.maker.dest
        tar, index = layout.shard_name(shard), layout.index_name(shard)
        marks = read_marks(scratch, shard)
        assert marks is not None
        promised = self.wanted.get(shard)
        if self.wanted and (marks.shard and marks.shard.sha256) != (promised and promised.sha256):
            what = f"cannot be made again: {self._culprits(shard, promised, marks.quarantined)}"
            text = json.dumps(asdict(Damage(tar, "failed", what)))
            scratch.write(f"failed-{shard:09d}.json", text.encode())
        elif shard in self.hurt:
            copy_file(scratch, tar, self.place)
            if not same_file(scratch, self.place, index):
                copy_file(scratch, index, self.place)
        scratch.remove(tar)
        scratch.remove(index)

    def _culprits(self, shard: int, promised: ShardFile | None, quarantined: list[dict]) -> str:
        """Which images are no longer what they were."""
        now = {bad["source"]: bad["reason"] for bad in quarantined}
        made = {row["source"]: row for row in _rows(read_made(self.maker.dest, shard))}
        then: dict[str, dict] = {}
        if promised and shard in self.starts:
            start = self.starts[shard]
            then = {row["source"]: row for row in read_rows(self.place, start, start + promised.num_samples)}
        if then and all(name in now for name in then):
            name = next(iter(then))
            return f"not one of its {len(then):,} images can be used in this --source, such as '{name}' ({now[name]})"
        changed = [f"'{name}' is refused now ({now[name]})" for name in then if name in now]
        changed += [
            f"'{name}' has changed since the conversion"
            for name, row in then.items()
            if name in made and row["tar_crc32"] != made[name]["tar_crc32"]
        ]
        if then:
            changed += [f"'{name}' was refused then, and is not now" for name in made if name not in then]
        if not changed:
            return "its images have changed since the conversion"
        more = f", and {len(changed) - _SHOWN:,} more" if len(changed) > _SHOWN else ""
        return "; ".join(changed[:_SHOWN]) + more


def _rows(table: pa.Table) -> list[dict]:
    return table.select(["source", "tar_crc32"]).to_pylist()


def _check_kind(source: Source, plan: Plan) -> None:
    """Raise UserError where a source is not what the plan was made of, by its kind and options."""
    then = {"kind": plan.settings.kind} | plan.settings.source_settings
    now = {"kind": source.kind} | json.loads(json.dumps(source.settings()))
    for name in {**then, **now}:
        if then.get(name) != now.get(name):
            raise UserError(
                f"'{plan.place.url}' was made with {name} {then.get(name)!r}, now it is {now.get(name)!r}; give --source the "
                "options that `fastssl shard` had."
            )
