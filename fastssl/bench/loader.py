"""`fastssl bench loader`: images per second from encoded bytes to views, ours and others' on the same images."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from fastssl.bench.report import (
    PeakMemory,
    Row,
    Stopwatch,
    brief,
    busy,
    machine,
    reason,
    tell_failures,
    today,
    versions,
    write_rows,
)
from fastssl.bench.work import Source, Work
from shards.errors import UserError, nearest
from shards.files import check_output

FIDELITY_IMAGES = 16
WARM_UP_S = 1.0  # twice, each at least one round: the first includes compiling and starting workers


@dataclass(frozen=True)
class BenchLoader:
    """Measure how fast images become views: reading, decoding, each of our engines, and other loaders on the same images.

    A source image counts once, however many views are made of it. All images in use are read once beforehand: a warm page cache.
    """

    shards: Annotated[str, tyro.conf.Positional]
    """Folder of shards."""
    recipe: str = "moco_v3"
    """Name of a preset."""
    size: int = 224
    """Side of the views in pixels."""
    batch: int = 64
    """Images a batch."""
    threads: int = 0
    """Threads of ours, DALI and Kornia, and worker processes of the others; 0: one per core."""
    repeats: int = 3
    """Times each loader is measured."""
    seconds: float = 4.0
    """Least length of one measurement."""
    images: int = 2048
    """Images used, over and over; fewer where the shards hold fewer."""
    engines: str = "all"
    """Our engines to measure: all, none, or names with commas: fused, dali, kornia, reference."""
    peers: str = "all"
    """Others to measure: all, none, or names with commas: moco-v3, torchvision-v2, lightly, webdataset, dali-graph, dali-decode,
    kornia-modules, ffcv."""
    json: str = ""
    """File for the results: a list with a row for each loader."""


def run(argv: list[str]) -> int:
    """Run the sub-command."""
    args = tyro.cli(BenchLoader, prog="fastssl bench loader", args=argv)
    if args.json:
        check_output(args.json, "--json")
    check(args)
    from rich.console import Console

    from fastssl.bench.peers import MOCO_V3, PEERS
    from pipelines.engines import engine_names
    from pipelines.loader import default_threads
    from pipelines.recipe import get_recipe
    from shards.order import epoch_order
    from shards.read import ShardSet

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
        Source("read", "", _read, "encoded bytes copied from the shards, no more"),
        Source("decode", "", _decode, "our decoder in threads, no views"),
        *engine_sources(engines, work),
    ]
    where = machine(GPU) if has_gpu() else machine()
    console = Console(highlight=False)
    sources = [*ours, *peers]
    rows = [Row(source.name, source.fidelity, note=source.note) for source in sources]
    with console.status("") as status:
        # In turns, so that other work on the machine falls on all of them alike.
        for repeat in range(args.repeats):
            for source, row in zip(sources, rows, strict=True):
                status.update(f"measuring {source.name}, {repeat + 1} of {args.repeats}")
                if not row.error:
                    measure(source, work, args.seconds, row, is_peer=source in peers)
    base = next((row for row in rows if row.name == MOCO_V3), None)
    for row in rows:
        if row.fidelity:
            row.compare(base)
    _show(console, rows, work, where, args)
    if args.json:
        settings = dataclasses.asdict(args) | {
            "recipe": dataclasses.asdict(recipe) | {"preset": args.recipe},
            "threads": work.threads,
            "images": len(sample_ids),
            "page_cache": "warm",
        }
        shared = {"date": today(), "versions": versions(), "machine": where, "settings": settings}
        write_rows(args.json, [row.as_json() | shared for row in rows])
        console.print(f"[dim]Written to {args.json}[/]")
    return 0


def check(args: BenchLoader) -> None:
    """UserError for a number out of range."""
    for name, least in (("size", 1), ("batch", 1), ("threads", 0), ("repeats", 1), ("images", 1)):
        if getattr(args, name) < least:
            raise UserError(f"--{name} is {getattr(args, name)}, but it must be at least {least}.")
    if args.seconds <= 0:
        raise UserError(f"--seconds is {args.seconds:g}, but it must be above 0.")


def choose(names: str, known: dict[str, Any], kind: str) -> list[Any]:
    """What `names` means: all, none, or names with commas. UserError for an unknown name; `kind`: engine or peer."""
    if names in ("all", "none"):
        return list(known.values()) if names == "all" else []
    chosen = dict.fromkeys(name.strip() for name in names.split(","))
    for name in chosen:
        if name not in known:
            raise UserError(f"There is no {kind} called '{name}'.{nearest(name, [*known, 'all', 'none'])}")
    return [known[name] for name in chosen]


def measure(source: Source, work: Work, seconds: float, row: Row, *, is_peer: bool) -> None:
    """Add to `row` one rate of a loader, taken over at least `seconds` after it has warmed up.

    A peer that cannot run leaves its reason in the row; a fault of ours is raised.
    """
    in_a_round = work.threads if source.workers else 1

    def spend(least_s: float) -> tuple[float, float]:
        watch, images = Stopwatch(), 0
        while True:
            images += sum(next(batches) for _ in range(in_a_round))
            if watch.wall_s() >= least_s:
                return images / watch.wall_s(), watch.cores()

    try:
        if is_peer:
            work.refuse_local_views_and_erasing(source.name)
        with PeakMemory() as memory, contextlib.closing(source.open(work)) as batches:
            for _ in range(2):
                spend(min(WARM_UP_S, seconds))
            row.add(*spend(seconds))
        row.more["peak_memory_bytes"] = max(memory.most_bytes, row.more.get("peak_memory_bytes", 0))
    except Exception as fault:  # others' code fails in its own ways, and a loss must stay in the table
        if not is_peer:
            raise
        row.fail(reason(fault))


# ----------------------------------------------------------------------------------------------------------- ours


def _read(work: Work) -> Generator[int]:
    return _in_threads(work, lambda sample_id: bytes(work.shards.read(sample_id)))


def _decode(work: Work) -> Generator[int]:
    from pipelines.decode import decode_rgb

    return _in_threads(work, lambda sample_id: decode_rgb(work.shards.read(sample_id)))


def _in_threads(work: Work, function: Callable[[int], Any]) -> Generator[int]:
    """Call `function` for every sample, two batches ahead, as the loader does with its views."""
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
    "fused": "what `fastssl pretrain` uses",
    "dali": "the DALI graph of --data.engine dali",
    "kornia": "Kornia's functions of --data.engine kornia",
    "reference": "our oracle: PIL and torchvision, one image at a time, in threads",
}


def has_gpu() -> bool:
    """Whether PyTorch has a CUDA device."""
    import torch

    return torch.cuda.is_available()


def engine_sources(engines: list[str], work: Work) -> list[Source]:
    """Our engines, each with the fidelity that is measured on some of the images; where there is a GPU, also with the copy to it."""
    sources = []
    for name in engines:
        fidelity, levels = measured_fidelity(name, work)
        note = f"{_NOTES[name]}; {levels}" if levels else _NOTES[name]
        sources.append(Source(name, fidelity, _engine(name), note))
        if has_gpu():
            sources.append(
                Source(f"{name} to GPU", fidelity, _engine(name, GPU), "the same, and copied to the GPU")
            )
            if name != "reference":
                sources.append(
                    Source(f"{name} on GPU", fidelity, _engine(name, GPU, "gpu"), "views made on the GPU")
                )
    return sources


def measured_fidelity(name: str, work: Work) -> tuple[str, str]:
    """The class of an engine's whole recipe on some of the images, and the figure in words; empty where it cannot make them."""
    from pipelines.fidelity import WHOLE, classify, measure

    data = [bytes(work.shards.read(int(i))) for i in work.sample_ids[:FIDELITY_IMAGES]]
    try:
        made = measure(name, work.recipe, data, [WHOLE])[WHOLE]
    except UserError:  # measuring its speed will say why
        return "", ""
    return classify(made.mean), f"on average {made.mean:.2f} grey levels from the reference"


def _engine(name: str, device: str = "cpu", augment_on: str = "cpu") -> Callable[[Work], Generator[int]]:
    def batches(work: Work) -> Generator[int]:
        import torch

        from pipelines.draws import draw
        from pipelines.loader import open_slots
        from pipelines.stream import Job, stream

        shards, recipe = work.shards, work.recipe
        jobs = (
            Job(ids, draw(recipe, 0, epoch, ids, shards.widths[ids], shards.heights[ids]), epoch)
            for epoch, ids in work.batches()
        )
        samples, slots = open_slots(
            shards,
            recipe,
            name,
            batch=work.batch,
            threads=work.threads,
            device=torch.device(device),
            augment_on=augment_on,
        )
        made = stream(samples, slots(), jobs, work.threads)
        with contextlib.closing(made):  # pyright: ignore[reportArgumentType]
            for batch in made:
                if device != "cpu":
                    torch.cuda.synchronize(device)
                yield len(batch.sample_ids)

    return batches


# ---------------------------------------------------------------------------------------------------------- report


def _show(console, rows: list[Row], work: Work, where: dict[str, Any], args: BenchLoader) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from fastssl.bench.peers import MOCO_V3

    recipe, ids = work.recipe, work.sample_ids.tolist()
    width, height = (
        statistics.median_low(side[ids].tolist()) for side in (work.shards.widths, work.shards.heights)
    )
    title = f"{len(ids):,} images of {width} x {height}, {recipe.num_views} views of {recipe.size} px, recipe {args.recipe}"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("loader", no_wrap=True)
    for name in ("images\nper s", "spread", f"vs\n{MOCO_V3}", "cores", "core\nms", "GB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("fidelity", no_wrap=True)
    notes = []
    for row in rows:
        notes.append(row.note)
        name = f"{row.name} [dim]{len(notes)}[/]"
        if row.images_per_s is None:
            table.add_row(name, "failed", "", "", "", "", "", row.fidelity)
            continue
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        table.add_row(
            name,
            brief(row.images_per_s),
            row.spread(),
            ratio,
            f"{row.cpu_cores:.2f}",
            f"{row.core_ms:.2f}",
            f"{row.more['peak_memory_bytes'] / 1e9:.1f}",
            row.fidelity or "[dim]part only[/]",
        )
    console.print(table)
    tell_failures(console, rows)
    console.print(
        f"{where['cpu']}, {where['cores']} cores{busy(where)}; {work.threads} threads or worker processes, "
        f"batches of {work.batch}; median and spread of {args.repeats} turns of {args.seconds:g} s after "
        "warm-up, page cache warm. cores, core ms: CPU time per second, per image. GB: peak memory of all processes "
        "together. Fidelity of our engines is measured: exact is within half a grey level of PIL on average, close within two.",
        style="dim",
        markup=False,
    )
    for number, note in enumerate(notes, 1):
        console.print(f"{number} {note}.", style="dim", markup=False)
