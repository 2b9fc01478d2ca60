"""A source to a folder of shards: plan, make each shard, merge.

A shard is a function of (plan, shard number). So the work may be killed at any moment and started again, and may be done by any number
of processes on any number of machines: the files are the same, byte for byte.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from shards.conversion.append import SHOWN, Base
from shards.conversion.destination import shard_folder
from shards.conversion.listing import SCRATCH, Survey
from shards.conversion.merge import dropped_by_shard, merge, write_dropped
from shards.conversion.ray_workers import Cluster, connect
from shards.conversion.shard_maker import Maker, read_marks, rows_path
from shards.conversion.shard_plan import Plan, check_same, read_plan, settings_for, write_plan
from shards.conversion.workers import run_here, run_in_processes, warm_up
from shards.cpus import available_cpus
from shards.errors import UserError, nearest
from shards.format import layout
from shards.format.checksums import write_sums
from shards.format.columns import read_columns
from shards.format.layout import Manifest, ShardFile
from shards.format.sample_table import rows_of, table_batches
from shards.images.policy import Policy
from shards.sources.source import Source
from shards.sources.source_kinds import check_apart, open_source
from shards.storage.opening import Where, open_place
from shards.storage.place import Place

DEDUPE = ("mark", "drop", "keep")
SMALL = 256  # images below which starting processes takes longer than converting


class ProgressReport:
    """What a conversion tells while it runs; this one says nothing."""

    def listed(self, num_images: int) -> None:
        """So many images have been found so far."""

    def planned(self, plan: Plan, source: Source, todo: int) -> None:
        """The plan stands; `todo` shards of it are to be made."""

    def progress(self, done: int, total: int, quarantined: int) -> None:
        """Counts of images, about 10 times a second."""

    def say(self, text: str) -> None:
        """One sentence about what comes next."""


class OnProgress(ProgressReport):
    """Passes the counts on to a function of (done, total, quarantined), and says nothing else."""

    def __init__(self, function: Callable[[int, int, int], None]):
        self._function = function

    def progress(self, done: int, total: int, quarantined: int) -> None:
        """See `ProgressReport.progress`."""
        self._function(done, total, quarantined)


@dataclass(frozen=True)
class Part:
    """Part `index` of `count`: the shards whose number leaves `index` when divided by `count`."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Part:
        """From `0/8`; UserError unless 0 <= index < count."""
        index, slash, count = text.partition("/")
        if not (slash and index.isdigit() and count.isdigit() and int(index) < int(count)):
            raise UserError(f"The part is '{text}', but it must be I/N with 0 <= I < N, such as 0/8.")
        return cls(int(index), int(count))


def convert(
    source: Source | str | os.PathLike,
    dest: Where,
    *,
    seed: int = 0,
    workers: int | None = None,
    samples_per_shard: int | None = None,
    policy: Policy | None = None,
    dedupe: str = "mark",
    part: Part | None = None,
    append: bool = False,
    ray_address: str | None = None,
    report: ProgressReport | None = None,
) -> Manifest | None:
    """Convert `source` (a path or URL, or what `open_source` gives) to shards in `dest`; return the manifest, or None after a `part`.

    The same call again finishes what was interrupted, mends missing or cut shards, and otherwise changes nothing.

    Args:
        workers: processes, 0 for this one, None for one a CPU (this one below 256 images).
        samples_per_shard: None for 64 shards of 128 to 4096.
        policy: what is stored, and what is refused.
        dedupe: images with the same pixels as an earlier one are marked in the table, dropped, or kept unmarked.
        append: add the images to finished shards, in new shards behind them; the policy must be that of the folder, and dedupe too, or
            "drop". No file that holds images is touched: samples keep their ids, classes their numbers. The same call again finishes
            an append that was interrupted; until then the folder is what it was.
        part: makes some of the shards only; when all parts are done, the same call without `part` merges them.
        ray_address: of a Ray cluster, whose nodes make the shards, at most `workers` at a time; see `ray_workers.connect`.

    Raises:
        UserError: whatever the user can mend.
    """
    place = open_place(dest)
    if isinstance(source, str | os.PathLike):
        source = open_source(os.fspath(source))
    check_apart(source, place)
    if workers is not None and workers < 0:
        raise UserError(f"The number of workers must be 0 or more, got {workers}.")
    if workers == 0 and ray_address is not None:
        raise UserError("--workers 0 means this process alone, which does not go with --engine ray.")
    if samples_per_shard is not None and samples_per_shard < 1:
        raise UserError(f"The samples per shard must be 1 or more, got {samples_per_shard}.")
    if dedupe not in DEDUPE:
        raise UserError(f"There is no --dedupe '{dedupe}'.{nearest(dedupe, DEDUPE)}")
    report, policy = report or ProgressReport(), policy or Policy()
    connected = connect(ray_address) if ray_address is not None else contextlib.nullcontext()
    with connected as cluster:
        if append:
            Manifest.load(place)  # of a mistyped DEST no folder is made
        own_lock = (
            place.lock(f"{layout.LOCK}-{part.index}-of-{part.count}") if part else contextlib.nullcontext()
        )
        with shard_folder(place), place.lock(layout.LOCK, shared=part is not None), own_lock:
            if part is None:
                place.remove_unfinished("")
                for name in place.names():
                    if name.startswith(SCRATCH):
                        place.remove_tree(name)
            base = Base.read(place) if append else None
            plan_number = base.number if base else 0
            planned = place.exists(layout.plan_name(plan_number))
            if base:
                base.check(source, policy, dedupe)

            def listed(num_images: int) -> None:
                report.listed(num_images)
                if num_images >= SMALL and workers != 0 and not cluster:
                    warm_up()

            # Of an append that has many parts, the plan may go while this one lists: another part may have given it up.
            shared = base is not None and part is not None
            with (
                Survey(source, seed, place.local, listed, keep=shared or not planned) as survey,
                _planning(place) if shared else contextlib.nullcontext(),
            ):
                if shared:
                    # Another part may have planned since, and have made shards: to clear now would remove them.
                    planned = place.exists(layout.plan_name(plan_number))
                listing = survey.listing
                done = base.inside(source, listing) if base and not planned else None
                size, after = samples_per_shard, {}
                if done:
                    # Appended, or converted, already: what is missing of its shards is made again.
                    base, plan_number, planned = None, done.number, True
                    size, after = size or done.settings.samples_per_shard, done.settings.after
                elif base:
                    size, after = base.samples_per_shard(size, listing.num_images), base.after
                settings = settings_for(source, listing, seed, size, policy, dedupe, after)
                if planned:
                    plan = read_plan(place, plan_number)
                    check_same(plan, settings)
                    if base:
                        base.check_classes(plan)
                else:
                    if base:
                        base.clear()
                    plan = write_plan(place, survey, settings, plan_number, base.classes if base else ())
                    if base:
                        base.try_first(source, plan, policy)
            run = _Run(source, place, plan, policy, workers, cluster, report, base)
            return run.part(part) if part else run.whole()


class _Run:
    """One call of `convert`, its plan made."""

    def __init__(
        self,
        source: Source,
        dest: Place,
        plan: Plan,
        policy: Policy,
        workers: int | None,
        cluster: Cluster | None,
        report: ProgressReport,
        base: Base | None = None,
    ):
        self.base = base
        self.source = source
        self.dest = dest
        self.plan = plan
        self.policy = policy
        self.workers = workers
        self.cluster = cluster
        self.report = report
        self._quarantined = 0  # images, in shards that were finished before

    def part(self, part: Part) -> None:
        """Make the unfinished shards of a part; merge nothing."""
        if not self.base and self.dest.exists(layout.MANIFEST):
            self.report.planned(self.plan, self.source, 0)
            return
        own = self.plan.shards[part.index :: part.count]
        self._remove_unfinished(own)
        self._make(self._unfinished(own, None), {}, own)

    def whole(self) -> Manifest:
        """Make what is missing, merge, and return the manifest."""
        dest, plan = self.dest, self.plan
        finished = Manifest.load(dest) if dest.exists(layout.MANIFEST) and not self.base else None
        if not (dest.exists(layout.TABLE) and dest.exists(layout.QUARANTINE)):
            if finished and finished.appended:
                Base.read(dest)  # says what to do: these files are made of all that was appended
            dest.remove(layout.MANIFEST)
            finished = None
        dest.remove_unfinished(layout.ROWS)
        dropped = dropped_by_shard(dest, plan)
        every = plan.shards
        if finished:
            own = (file for file in finished.shards if number(file) in plan.shards)
            todo = [number(file) for file in own if not is_whole(dest, file)]
            self._make(todo, dropped, every)
            self._check_mended(finished, todo)
            manifest = finished
        else:
            decided = dest.exists(layout.dropped_name(plan.number))
            counts = {s: len(d) for s, d in dropped.items()} if decided else None
            self._make(self._unfinished(every, counts), dropped, every)
            if plan.settings.dedupe == "drop" and counts is None:
                write_dropped(dest, plan, self.base)
                dropped = dropped_by_shard(dest, plan)
                if dropped:
                    self.report.say(
                        f"{sum(map(len, dropped.values())):,} duplicates: making {len(dropped):,} shards without them"
                    )
                self._make(sorted(dropped), dropped, every)
            manifest = merge(dest, plan, self.base)
            write_sums(dest, manifest)
            manifest.save(dest)
            if self.base:
                self._tell_duplicates(self.base, manifest)
        # The marks of an append that waits to be finished lie there, too.
        if not layout.is_appending(dest, manifest):
            dest.remove_tree(layout.ROWS)
        return manifest

    def _tell_duplicates(self, base: Base, manifest: Manifest) -> None:
        """Name the first appended images whose pixels the folder has already."""
        num = manifest.num_duplicates - base.manifest.num_duplicates
        if not num:
            return
        if self.plan.settings.dedupe == "drop":
            with self.dest.open(layout.dropped_name(self.plan.number)) as file:
                table = read_columns(file, ["source", "same_as"])
            pairs = list(zip(*table.slice(0, SHOWN).to_pydict().values(), strict=True))
        else:
            columns, first = ["sample_id", "source", "duplicate_of"], base.manifest.num_samples
            batches = table_batches(self.dest, manifest, columns)
            rows = (batch.slice(max(0, first - batch["sample_id"][0].as_py())) for batch in batches)
            again = (row for batch in rows for row in batch.to_pylist() if row["duplicate_of"] is not None)
            found = list(itertools.islice(again, SHOWN))
            names = rows_of(self.dest, manifest, {row["duplicate_of"] for row in found}, ["source"])
            pairs = [(row["source"], names[row["duplicate_of"]]["source"]) for row in found]
        shown = ", ".join(f"'{one}' = '{other}'" for one, other in pairs) + (
            " ..." if num > len(pairs) else ""
        )
        what = "left out" if self.plan.settings.dedupe == "drop" else "marked in the table"
        self.report.say(f"{num:,} of the new images have the pixels of earlier ones, {what}: {shown}")

    def _unfinished(self, shards: range, num_dropped: dict[int, int] | None) -> list[int]:
        """Those that do not lie there whole, or, where drops are decided, not without those of their own.

        Counts the images that the others have refused.
        """
        todo = []
        # asked at once: a remote store takes its time for each question
        marked = set(self.dest.names(layout.ROWS))
        for shard in shards:
            marks = read_marks(self.dest, shard) if layout.rows_name(shard) in marked else None
            right = marks and (num_dropped is None or marks.num_dropped == num_dropped.get(shard, 0))
            if marks and right and (marks.shard is None or is_whole(self.dest, marks.shard)):
                self._quarantined += len(marks.quarantined)
            else:
                todo.append(shard)
        return todo

    def _make(self, todo: list[int], dropped: dict[int, frozenset[int]], among: range) -> None:
        """Make shards; progress counts the images of all shards `among` which they are."""
        plan, report = self.plan, self.report
        report.planned(plan, self.source, len(todo))
        if not todo:
            return
        todo_images, total = (sum(map(plan.num_rows, shards)) for shards in (todo, among))

        def show(done: int, quarantined: int) -> None:
            report.progress(total - todo_images + done, total, self._quarantined + quarantined)

        maker = Maker(
            self.source, self.dest, plan, self.policy, {s: dropped[s] for s in todo if s in dropped}
        )
        workers = self.workers
        if self.cluster:
            self.cluster.run(maker, todo, workers, show)
            self._remove_unfinished(todo)  # of nodes that died
            return
        if workers is None:
            workers = 0 if todo_images < SMALL else available_cpus()
        if workers:
            run_in_processes(maker, todo, workers, show)
        else:
            run_here(maker, todo, show)

    def _remove_unfinished(self, shards: Sequence[int]) -> None:
        names = {name(shard) for shard in shards for name in (layout.shard_name, layout.index_name)}
        self.dest.remove_unfinished("", names)
        self.dest.remove_unfinished(layout.ROWS, {layout.rows_name(shard) for shard in shards})

    def _check_mended(self, manifest: Manifest, mended: list[int]) -> None:
        listed = {number(file): file for file in manifest.shards}
        for shard in mended:
            marks = read_marks(self.dest, shard)
            if marks is None or marks.shard is None or marks.shard.sha256 != listed[shard].sha256:
                self.dest.remove(layout.shard_name(shard))
                self.dest.remove(rows_path(shard))
                raise UserError(
                    f"'{layout.shard_name(shard)}' was missing or damaged and cannot be made again: its images have changed since. "
                    "Give a new DEST."
                )


def is_whole(dest: Place, file: ShardFile) -> bool:
    """Whether a shard's tar has its size and its index is there; no byte of it is read."""
    return dest.size(file.name) == file.bytes and dest.exists(layout.index_name(number(file)))


def number(file: ShardFile) -> int:
    """The shard's number, from its file name."""
    return layout.shard_number(file.name)


@contextlib.contextmanager
def _planning(place: Place) -> Iterator[None]:
    """Wait until no other part plans, and let none plan meanwhile; UserError after an hour."""
    with contextlib.ExitStack() as held:
        deadline_s = time.monotonic() + 3600
        while True:
            try:
                held.enter_context(place.lock(f"{layout.LOCK}-plan"))
                break
            except UserError:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.2)
        yield
