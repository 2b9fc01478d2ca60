"""`fastssl pretrain [CONFIG]`: the command around `fastssl.pretrain`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import warnings
from pathlib import Path

from shards.terminal import note, wrapped
from shards.units import plural

USAGE = """usage: fastssl pretrain [CONFIG] [--recipe NAME] [--method NAME]
                        [--gpus all] [--resume [CHECKPOINT]]
                        [--section.key value ...]

Pretrain a backbone on shards, without labels. CONFIG is a YAML file, or a name
from `fastssl configs`; without one: laptop. Flags override its settings.
  --recipe NAME         preset of the augmentation, as for `fastssl preview`
  --method NAME         the method, with its own recipe and optimizer, or a
                        class of your own, such as my_module:MyMethod
  --gpus all            one process on each GPU of this machine; 2: on the first
                        two; 0,3: on these
  --processes N         N processes on this machine, for CPUs
  --resume              continue the run in train.out from its newest checkpoint
                        (from the start where there is none)
  --resume CHECKPOINT   continue from another run's checkpoint or folder, in a
                        new train.out; the other folder stays as it is
  --settings            list all settings with their values and meaning

  fastssl pretrain --data.shards tile-shards/ --recipe satellite
  fastssl pretrain moco_v3_vit_small --data.shards shards/ --train.batch 256
  fastssl pretrain moco_v3_vit_small --data.shards shards/ --gpus all"""


def run(argv: list[str]) -> int:
    """Run the command and return the exit code: 128 + the signal where one stopped the run."""
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    from fastssl.core.unfailing_output import unfailing_output

    with unfailing_output(ends_process=True):
        return _run(argv)


def _run(argv: list[str]) -> int:
    warnings.showwarning = _show_warning
    from fastssl.commands import local_ranks

    environments, argv = local_ranks.take_processes(argv)
    if environments and not {"--settings", "--help", "-h"} & set(argv):
        return local_ranks.run(argv, environments)
    resume, rest = take_resume(argv)
    rest = ["--help" if token in ("--settings", "-h") else token for token in rest]

    from fastssl.pretraining.packaged_configs import DEFAULT_CONFIG

    given = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if is_main_process() and "--help" not in rest and sys.stderr.isatty():
        # Importing PyTorch takes seconds, in which people would look at an empty terminal.
        print(f"fastssl: starting {given or DEFAULT_CONFIG}", file=sys.stderr, flush=True)
    from fastssl.core.signals import StopRequest
    from fastssl.pretraining import run_config

    resolved = run_config.load(given or DEFAULT_CONFIG, rest)
    if not given and is_main_process():
        print(f"Configuration: {DEFAULT_CONFIG}. `fastssl configs` lists the others.", flush=True)
    from fastssl.pretraining.run import pretrain

    # The process is the command's: a second Ctrl-C ends it at once.
    StopRequest.exits = True
    try:
        summary = pretrain(resolved, resume=resume)
    finally:
        StopRequest.exits = False
    if not is_main_process():
        return 128 + summary.interrupted if summary.interrupted else 0
    if summary.interrupted:
        stopped = f"Stopped after step {summary.steps}, saved as {summary.checkpoint}."
        print(wrapped(f"{stopped} To continue, add --resume to the same command.", sys.stdout))
        return 128 + summary.interrupted
    if summary.images_per_s == 0:
        done = f"This run is already complete ({plural(summary.steps, 'step')})."
        print(wrapped(f"{done} Weights: {summary.checkpoint}", sys.stdout))
        return 0
    done = f"Done: {plural(summary.steps, 'step')}, {summary.seconds:,.0f} s, {summary.images_per_s:,.0f} images/s."
    print(wrapped(f"{done} Weights: {summary.checkpoint}", sys.stdout))
    print(f"next: fastssl eval knn {shlex.quote(str(resolved.config.train.out))} --shards SHARDS")
    return 0


def take_resume(argv: list[str]) -> tuple[bool | Path, list[str]]:
    """Take `--resume [CHECKPOINT]` out of the arguments: return what `fastssl.pretrain` takes as `resume`, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # More than once: `fastssl launch` adds one without a checkpoint.
    parser.add_argument("--resume", nargs="?", const="", action="append", default=[])
    given, rest = parser.parse_known_args(argv)
    paths = [path for path in given.resume if path]
    return (Path(paths[-1]) if paths else bool(given.resume)), rest


def is_main_process() -> bool:
    """Return whether this process of the run may print; from torchrun's environment, so that it holds without a process group, too."""
    return os.environ.get("RANK", "0") == "0"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Print a warning as one line, from one process, without the place in the source."""
    if is_main_process():
        print(note(message), file=sys.stderr)
