"""`fastssl bench loader`: images per second from encoded bytes to views, ours and others' on the same images."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastssl.bench.guard import Guard, exit_code
from fastssl.bench.loaders.work import MeasuredLoader, Work
from fastssl.bench.report import (
    PeakMemory,
    Row,
    Stopwatch,
    brief,
    busy,
    figure,
    machine,
    turns_told,
    write_measured,
)
from fastssl.bench.screen import Stoppable, make_table, say_row, say_written, show
from fastssl.bench.turns import take_turns
from shards.command_line import File, Name, Names, Shards, parse
from shards.errors import UserError, check_least, nearest
from shards.storage.atomic_files import check_output
from shards.units import plural

if TYPE_CHECKING:
    from torch import Tensor

FIDELITY_IMAGES = 16
# Twice, each at least one round: the first includes compiling and starting workers.
WARM_UP_S = 1.0


@dataclass(frozen=True)
class BenchLoader:
    """Measure images/s from JPEG to views: reading, decoding, each of our engines, and other loaders on the same images.

    A source image counts once, however many views are made of it. All images are read once before, so that the page cache is warm.
    """

    shards: Annotated[Shards, tyro.conf.Positional]
    """Folder of shards."""
    recipe: Name = "moco_v3"
    """Name of a preset."""
    size: int = 224
    """Side of the views in pixels."""
    batch: int = 64
    """Images a batch."""
    threads: int = 0
    """Threads of our engines, DALI and Kornia, and worker processes of the others; 0: one per core."""
    repeats: int = 3
    """Times each loader is measured."""
    seconds: float = 4.0
    """Shortest length of a measurement, in seconds."""
    images: int = 2048
    """Number of images, used again and again; fewer if the shards hold fewer."""
    engines: Names = "all"
    """Our engines to measure: all, none, or names with commas: fused, dali, kornia, reference."""
    peers: Names = "all"
    """Other loaders to measure: all, none, or names with commas: moco-v3, torchvision-v2, lightly, webdataset, dali-graph,
    dali-decode, kornia-modules, ffcv."""
    scaling: bool = False
    """Also measure our engines on the CPU in 1, 2, 4 ... threads: rows such as fused (1)."""
    json: File = ""
    """JSON file for the results, a list with a row for each loader; rewritten after each measurement."""


def run(argv: list[str]) -> int:
    """Run the sub-command."""
    args = parse(BenchLoader, "fastssl bench loader", argv)
    if args.json:
        check_output(args.json, "--json")
    check(args)
    from rich.console import Console

    from fastssl.bench.loaders.peers import MOCO_V3, PEERS
    from pipelines.augment.recipe import get_recipe
    from pipelines.engines.engine_table import engine_names
    from pipelines.loading.loader import default_threads
    from shards.dataset.order import epoch_order
    from shards.dataset.shard_set import ShardSet

    peers = choose(args.peers, PEERS, "peer")
    engines = choose(args.engines, {name: name for name in engine_names()}, "engine")
    recipe = dataclasses.replace(get_recipe(args.recipe), size=args.size)
    shards = ShardSet.open(args.shards)
    sample_ids = epoch_order(shards.num_samples, 0, 0)[: args.images]
    if len(sample_ids) < args.batch:
        raise UserError(
            f"{len(sample_ids)} images of '{args.shards}' are in use, fewer than one batch of {args.batch}: lower --batch to at "
            f"most {len(sample_ids)}, or use more images."
        )
    work = Work(shards, recipe, sample_ids, args.batch, args.threads or default_threads())
    for sample_id in sample_ids:
        bytes(shards.read(int(sample_id)))
    ours = [
        MeasuredLoader("read", "", read_batches, "encoded bytes copied from the shards, no more"),
        MeasuredLoader("decode", "", decode_batches, "our decoder in threads, no views"),
    ]
    device = GPU if has_gpu() else "cpu"
    guard = Guard(device, f"batches of {args.batch} do not fit in the memory: lower --batch, or --threads")
    with_engines, failed = engine_loaders(engines, work, guard)
    for loader in with_engines:
        if args.scaling and loader.name in engines:
            ours += [loader.in_threads(1 << power) for power in range((work.threads - 1).bit_length())]
        ours.append(loader)
    where = machine(device)
    console = Console(highlight=False)
    loaders = [*ours, *peers]
    rows = [
        failed.get(loader.name) or Row(loader.name, loader.fidelity, note=loader.note) for loader in loaders
    ]
    base = next((row for row in rows if row.name == MOCO_V3), None)
    settings = dataclasses.asdict(args) | {
        "recipe": dataclasses.asdict(recipe) | {"preset": args.recipe},
        "threads": work.threads,
        "images": len(sample_ids),
        "page_cache": "warm",
    }

    def save(*, complete: bool) -> None:
        if args.json:
            write_measured(args.json, where, settings, rows, complete=complete)

    with Stoppable(console) as measuring, console.status("") as status:

        def turn(number: int, loader: MeasuredLoader, row: Row) -> None:
            status.update(f"measuring {loader.name}, {number} of {args.repeats}")
            measure(loader, work, args.seconds, row, guard, is_peer=loader in peers)
            for each in rows:
                if each.fidelity:
                    each.compare(base)
            save(complete=False)

        for row in failed.values():
            say_row(console, row)
        take_turns(range(1, args.repeats + 1), loaders, rows, turn, console)
    save(complete=not measuring.stopped)
    _show(console, rows, work, where, args)
    say_written(console, args.json)
    return exit_code(rows, stopped=measuring.stopped)


def check(args: BenchLoader) -> None:
    """Raise UserError for a number out of range."""
    check_least(args, size=1, batch=1, threads=0, repeats=1, images=1)
    if args.seconds <= 0:
        raise UserError(f"--seconds is {args.seconds:g}, but it must be greater than 0.")


def choose(names: str, known: dict[str, Any], kind: str) -> list[Any]:
    """Return what `names` selects of `known`: all, none, or names with commas; raise UserError for an unknown one.

    `kind`: what the names are called in the message, such as engine.
    """
    if names in ("all", "none"):
        return list(known.values()) if names == "all" else []
    chosen = dict.fromkeys(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in known:
            raise UserError(f"There is no {kind} called '{name}'.{nearest(name, [*known, 'all', 'none'])}")
    return [known[name] for name in chosen]


def measure(
    loader: MeasuredLoader, work: Work, seconds: float, row: Row, guard: Guard, *, is_peer: bool
) -> None:
    """Warm a loader up and add its rate over at least `seconds` to `row`.

    A loader that cannot run here or fails leaves the reason in the row.
    """
    in_a_round = work.threads if loader.workers else 1

    def spend(batches: Generator[int], least_s: float) -> tuple[float, float]:
        watch, images = Stopwatch(), 0
        while True:
            images += sum(next(batches) for _ in range(in_a_round))
            if watch.wall_s() >= least_s:
                return images / watch.wall_s(), watch.cores()

    def turn() -> None:
        if is_peer:
            work.refuse_local_views_and_erasing(loader.name)
        with PeakMemory() as memory, contextlib.closing(loader.open(work)) as batches:
            for _ in range(2):
                spend(batches, min(WARM_UP_S, seconds))
            measured = spend(batches, seconds)
        # All figures at once, so that Ctrl-C leaves no half of them.
        row.more["peak_memory_bytes"] = max(memory.most_bytes, row.more.get("peak_memory_bytes", 0))
        row.add(*measured)

    guard.run([row], turn)


# ----------------------------------------------------------------------------------------------------------- ours


def read_batches(work: Work) -> Generator[int]:
    """Yield the size of each batch whose encoded images were copied from the shards."""
    return call_in_threads(work, lambda sample_id: bytes(work.shards.read(sample_id)))


def decode_batches(work: Work) -> Generator[int]:
    """Yield the size of each batch that our decoder has decoded in threads."""
    from pipelines.kernels.decode import decode_rgb

    return call_in_threads(work, lambda sample_id: decode_rgb(work.shards.read(sample_id)))


def call_in_threads(work: Work, function: Callable[[int], Any]) -> Generator[int]:
    """Call `function` for every sample in threads, two batches ahead, as the loader makes its views."""
    size = max(1, work.batch // (work.threads * 4))
    waiting: deque = deque()
    pool = ThreadPoolExecutor(work.threads)

    def part(ids: list[int]) -> None:
        for sample_id in ids:
            function(sample_id)

    try:
        for _, ids in work.batches():
            parts = [ids[i : i + size].tolist() for i in range(0, len(ids), size)]
            waiting.append([pool.submit(part, p) for p in parts])
            if len(waiting) > 2:
                for future in waiting.popleft():
                    future.result()
                yield work.batch
    finally:
        pool.shutdown(cancel_futures=True)


GPU = "cuda:0"
_NOTES = {
    "fused": "the engine of `fastssl pretrain`",
    "dali": "the DALI graph of --data.engine dali",
    "kornia": "Kornia's functions of --data.engine kornia",
    "reference": "our oracle: PIL and torchvision, one image at a time, in threads",
}


def has_gpu() -> bool:
    """Return whether PyTorch has a CUDA device."""
    import torch

    return torch.cuda.is_available()


@dataclass(frozen=True)
class EngineSetup:
    """An engine, and the device that each stage runs on."""

    engine: str
    device: str = "cpu"
    augment_on: str = "cpu"
    decode: str = "cpu"

    def batches(self, work: Work) -> Generator[Sequence[Tensor]]:
        """Yield the views of each batch without end, as the loader gives them; raise UserError where they cannot be made."""
        import torch

        from pipelines.augment.draws import draw
        from pipelines.loading.loader_options import LoaderOptions
        from pipelines.loading.slots import open_slots
        from pipelines.streaming.batch import BatchRequest
        from pipelines.streaming.batch_stream import stream

        shards, recipe = work.shards, work.recipe
        requests = (
            BatchRequest(ids, draw(recipe, 0, epoch, ids, shards.widths[ids], shards.heights[ids]), epoch)
            for epoch, ids in work.batches()
        )
        chosen: dict[str, Any] = dataclasses.asdict(self)
        options = LoaderOptions(**chosen, threads=work.threads, reuse_memory=True)
        samples, slots = open_slots(shards, recipe, work.batch, options)
        made = stream(samples, slots(), requests, work.threads)
        with contextlib.closing(made):  # pyright: ignore[reportArgumentType]
            for batch in made:
                if self.device != "cpu":
                    torch.cuda.synchronize(self.device)
                yield batch.views

    def counts(self, work: Work) -> Generator[int]:
        """Yield the number of images of each batch, for a `MeasuredLoader`."""
        with contextlib.closing(self.batches(work)) as made:
            for views in made:
                yield len(views[0])


def engine_loaders(
    engines: list[str], work: Work, guard: Guard
) -> tuple[list[MeasuredLoader], dict[str, Row]]:
    """Return our engines, with fidelities measured on some of the images: on the CPU and, where there is one, on the GPU.

    Also return, by name, a row with the reason for each engine whose views could not be compared.
    """
    loaders, failed = [], {}
    for name in engines:
        setups = {name: (EngineSetup(name), _NOTES[name])}
        if has_gpu():
            setups[f"{name} to GPU"] = EngineSetup(name, GPU), "the same, and copied to the GPU"
            if name != "reference":
                setups[f"{name} on GPU"] = EngineSetup(name, GPU, "gpu"), "views made on the GPU"
            if name == "fused":
                setups["fused all on GPU"] = (
                    EngineSetup(name, GPU, "gpu", "gpu"),
                    "decoded on the GPU as well: --data.decode gpu",
                )
        for row, (setup, note) in setups.items():
            told = Row(row, note=note)
            found = guard.run([told], lambda setup=setup: measured_fidelity(setup, work))
            if found is None:
                failed[row] = told
            fidelity, levels = found or ("", "")
            loaders.append(
                MeasuredLoader(row, fidelity, setup.counts, f"{note}; {levels}" if levels else note)
            )
    return loaders, failed


def measured_fidelity(setup: EngineSetup, work: Work) -> tuple[str, str]:
    """Return the fidelity class of an engine's views of some of the images, and the figure in words; empty if it cannot make them."""
    from pipelines.previews.engine_fidelity import classify

    plain = dataclasses.replace(work.recipe, mean=(0.0,) * 3, std=(1.0,) * 3)
    ids = work.sample_ids[:FIDELITY_IMAGES]
    few = dataclasses.replace(work, recipe=plain, sample_ids=ids, batch=len(ids))
    made = []
    try:
        for each in (EngineSetup("reference"), setup):
            with contextlib.closing(each.batches(few)) as batches:
                made.append([view.cpu().clone() for view in next(batches)])
    except UserError:
        # Measuring its speed will give the reason.
        return "", ""
    pairs = list(zip(*made, strict=True))
    levels = 255 * sum(float((a - b).abs().mean()) for a, b in pairs) / len(pairs)
    return classify(levels), f"on average {levels:.2f} gray levels from the reference"


# ---------------------------------------------------------------------------------------------------------- report


def _show(console, rows: list[Row], work: Work, where: dict[str, Any], args: BenchLoader) -> None:
    from fastssl.bench.loaders.peers import MOCO_V3

    recipe, ids = work.recipe, work.sample_ids.tolist()
    width, height = (
        statistics.median_low(side[ids].tolist()) for side in (work.shards.widths, work.shards.heights)
    )
    title = f"{len(ids):,} images of {width} x {height}, {recipe.num_views} views of {recipe.size} px, recipe {args.recipe}"
    figures = ("images\nper s", "spread", f"vs\n{MOCO_V3}", "cores", "core\nms", "GB")
    table = make_table(title, "loader", figures, "fidelity")
    for row in rows:
        if row.images_per_s is None:
            table.add_row(row.name, *[""] * len(figures), row.why_not)
            continue
        table.add_row(
            row.name,
            brief(row.images_per_s),
            row.spread(),
            *map(figure, (row.ratio, row.cpu_cores, row.core_ms, row.more["peak_memory_bytes"] / 1e9)),
            row.fidelity or "[dim]part only[/]",
        )
    show(
        console,
        table,
        rows,
        f"{where['cpu']}, {where['cores']} cores{busy(where)}; {plural(work.threads, 'thread')} or worker processes, "
        f"batches of {work.batch}; median and spread of {turns_told(rows)} of {args.seconds:g} s after "
        "warm-up, page cache warm. cores, core ms: CPU time per second, per image. GB: peak memory of all processes "
        "together. The fidelity of our engines is measured: exact is within half a gray level of PIL on average, close within two.",
    )
