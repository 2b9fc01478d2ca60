"""`fastssl demo`: the whole path on a small synthetic data set, from images to the accuracy of what was learned."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shards.command_line import Folder, parse
from shards.terminal import print_wrapped


@dataclass(frozen=True)
class Demo:
    """See fastssl work in about five minutes on a laptop without a GPU.

    Draw aerial tiles (synthetic, no photographs) of fields, roofs, roads, water and solar arrays; convert them to shards; draw their
    augmented views; pretrain a small ResNet with MoCo v3, without labels; and evaluate by kNN how well it tells the classes apart.
    """

    out: Folder = "demo"
    """Folder for all files of the demo."""
    tiles: int = 500
    """Tiles of each class to pretrain on; a fifth of this number is drawn to test on."""
    epochs: int | None = None
    """Epochs of pretraining. By default the largest of 30, 15 and 8 that this machine does in about three minutes."""
    size: int = 64
    """Side of the tiles, in pixels."""
    seed: int = 0
    """Seed of the drawings, the order, the augmentation and the weights."""
    again: bool = False
    """Delete an earlier pretraining run in this folder; otherwise it is continued."""


BATCH = 128
# The lengths of the demo's pretraining, in epochs, each with figures in docs/results/demo.md.
EPOCHS = (30, 15, 8)
# What the pretraining may take on a CPU, so that the whole demo stays below five minutes.
PRETRAIN_S = 180.0
# A step waits for data and shares the cores with the loader.
LOADER_SHARE = 1.1


class Steps:
    """Prints the numbered steps and records their times."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, title: str, command: str = "") -> Iterator[None]:
        """Print a step's title and the command that does the same on your own data, and record its time."""
        from rich.console import Console

        console = Console(highlight=False)
        console.print(f"\n[bold]{len(self.seconds) + 1}/{self.total}  {title}[/bold]")
        if command:
            console.print(f"     [dim]{command}[/dim]", soft_wrap=True)
        began = time.perf_counter()
        yield
        self.seconds[title] = time.perf_counter() - began


def _command(*words: str | int | Path) -> str:
    return shlex.join(["fastssl", *map(str, words)])


def run(argv: list[str]) -> int:
    """Run the demo and return the exit code: 130 or 143 where a signal stopped it."""
    args = parse(Demo, "fastssl demo", argv)
    from shards.errors import UserError

    if args.tiles < 20:
        raise UserError(
            f"--tiles is {args.tiles}: use at least 20 of each class, or there is no whole batch."
        )
    out = Path(args.out)
    steps = Steps(5)
    if args.again:
        shutil.rmtree(out / "run", ignore_errors=True)
    with steps.step(f"Draw {5 * args.tiles + 5 * (args.tiles // 5):,} synthetic aerial tiles"):
        _draw(out, args)
    with steps.step(
        "Convert them to shards", _command("shard", out / "train" / "images", out / "train-shards")
    ):
        images_per_s = _convert(out)
    with steps.step(
        "Look at the views",
        _command(
            "preview",
            out / "train-shards",
            "--recipe",
            "satellite",
            "--size",
            args.size,
            "--out",
            out / "views.png",
        ),
    ):
        _preview(out, args)
    with steps.step("Pretrain without labels", _command("pretrain", out / "run" / "config.yaml")):
        from fastssl.pretraining.run import pretrain

        summary = pretrain(configuration(out, _with_epochs(out, args)), resume=True)
    if summary.interrupted:
        print(f"Stopped after step {summary.steps}. The same command continues.", file=sys.stderr)
        return 128 + summary.interrupted
    with steps.step(
        "Evaluate what it learned",
        _command(
            "eval", "knn", out / "run", "--shards", out / "train-shards", "--test-shards", out / "test-shards"
        ),
    ):
        report = _evaluate(out, summary.checkpoint)
    _summarise(out, steps, report, images_per_s, summary)
    return 0


def configuration(out: Path, args: Demo):
    """Return the configuration of the demo's run."""
    from fastssl.core.optimizers import OptimConfig
    from fastssl.evaluation.knn import KNNConfig
    from fastssl.methods.moco_v3 import MoCoV3Config
    from fastssl.models.model_config import ModelConfig
    from fastssl.pretraining.run_config import Resolved, RunConfig
    from fastssl.pretraining.train_config import TrainConfig
    from pipelines.augment.recipe import get_recipe
    from pipelines.loading.data_config import DataConfig

    epochs = args.epochs or EPOCHS[0]
    config = RunConfig(
        data=DataConfig(shards=str(out / "train-shards")),
        # In views of 64 pixels a wide blur would hide the grid of solar panels.
        recipe=dataclasses.replace(get_recipe("satellite"), size=args.size, blur_sigma=(0.1, 1.0)),
        model=ModelConfig(backbone="resnet10_w32"),
        # The run has few steps: with the published 0.99 the teacher would lag 100 of them behind.
        method=MoCoV3Config(hidden_dim=1024, momentum=0.96),
        optim=OptimConfig(name="adamw", lr=3e-3, weight_decay=0.05, warmup_epochs=min(2, epochs)),
        train=TrainConfig(
            out=str(out / "run"),
            epochs=epochs,
            batch=min(BATCH, 5 * args.tiles),
            seed=args.seed,
            save_every=max(1, epochs // 8),
        ),
        knn=KNNConfig(
            every=max(1, epochs // 8),
            shards=str(out / "train-shards"),
            test_shards=str(out / "test-shards"),
        ),
    )
    return Resolved(config, "moco_v3")


def _draw(out: Path, args: Demo) -> None:
    from rich.progress import Progress

    from fastssl.demo.aerial import write_folder

    with Progress(transient=True) as bar:
        task = bar.add_task("drawing")
        # Another seed for the test tiles, so that none of them is a training tile.
        for name, count, seed in (("train", args.tiles, args.seed), ("test", args.tiles // 5, args.seed + 1)):
            write_folder(
                out / name,
                count,
                seed,
                args.size,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )


def _convert(out: Path) -> float:
    from rich.progress import Progress

    from shards.conversion.convert import OnProgress, convert

    done, began = 0, time.perf_counter()
    with Progress(transient=True) as bar:
        task = bar.add_task("converting")
        for name in ("train", "test"):
            manifest = convert(
                out / name / "images",
                out / f"{name}-shards",
                report=OnProgress(lambda done, total, bad: bar.update(task, completed=done, total=total)),
            )
            assert manifest is not None, "all parts were asked for"
            done += manifest.num_samples
    return done / (time.perf_counter() - began)


def _preview(out: Path, args: Demo) -> None:
    from pipelines.previews.preview_sheets import SheetOptions, contact_sheet
    from shards.dataset.shard_set import ShardSet

    recipe = configuration(out, args).config.recipe
    options = SheetOptions(seed=args.seed, recipe_name="of the demo")
    contact_sheet(ShardSet.open(out / "train-shards"), recipe, out / "views.png", options)


def _with_epochs(out: Path, args: Demo) -> Demo:
    """Return the settings with the epochs of an earlier run here, or with what this machine does in `PRETRAIN_S`."""
    import yaml

    if args.epochs is not None:
        return args
    if (config := out / "run" / "config.yaml").exists():
        return dataclasses.replace(args, epochs=yaml.safe_load(config.read_text())["train"]["epochs"])
    import torch

    from fastssl.pretraining.estimate import estimate_run

    found = estimate_run(configuration(out, args))
    if found is None:
        return dataclasses.replace(args, epochs=EPOCHS[0])
    step_s = min(found.step_s, found.one_thread_s)
    if found.crowded:
        print(
            f"     one compute thread, since others use this machine: a step takes {found.step_s:.2g} s with several"
        )
        torch.set_num_threads(1)
    epochs = choose_epochs(step_s * max(1, 5 * args.tiles // BATCH) * LOADER_SHARE)
    if epochs != EPOCHS[0]:
        print(f"     {epochs} epochs in place of {EPOCHS[0]}: a step takes {step_s:.2g} s here")
    return dataclasses.replace(args, epochs=epochs)


def choose_epochs(epoch_s: float) -> int:
    """Return the largest of `EPOCHS` that fits in `PRETRAIN_S`, or the smallest where none does."""
    return next((epochs for epochs in EPOCHS if epochs * epoch_s <= PRETRAIN_S), EPOCHS[-1])


def _evaluate(out: Path, checkpoint: Path) -> dict[str, Any]:
    from fastssl.commands.evaluate_checkpoint import evaluate_knn
    from shards.storage.atomic_files import atomic_write

    report = evaluate_knn(checkpoint, out / "train-shards", out / "test-shards")
    atomic_write(out / "knn.json", (json.dumps(report, indent=1) + "\n").encode())
    return report


def _summarise(out: Path, steps: Steps, report: dict[str, Any], convert_rate: float, summary) -> None:
    from rich.console import Console
    from rich.table import Table

    from fastssl.commands.eval_command import print_knn

    console = Console(highlight=False)
    console.print()
    print_knn(report, console)
    table = Table(title="The demo in numbers", title_justify="left", show_header=False)
    for title, seconds in steps.seconds.items():
        table.add_row(title, f"{seconds:.1f} s")
    table.add_row("Conversion", f"{convert_rate:,.0f} images/s")
    if summary.images_per_s > 1:
        table.add_row("Pretraining", f"{summary.images_per_s:,.0f} images/s")
    k = 20 if 20 in report["rows"][0]["accuracy"] else next(iter(report["rows"][0]["accuracy"]))
    for row in report["rows"]:
        table.add_row(f"kNN (k = {k}), {row['features']}", f"{row['accuracy'][k]:.1%}")
    console.print(table)
    run = out / "run"
    console.print(
        f"Views: {out / 'views.png'}   weights: {report['checkpoint']}   log: {run / 'metrics.jsonl'}",
        soft_wrap=True,
    )
    print_wrapped(
        console, "Your own images: fastssl shard FOLDER SHARDS, then a configuration from configs/."
    )
