"""`fastssl pretrain CONFIG`: the command around `fastssl.pretrain`."""

from __future__ import annotations

import os
import sys
import warnings

USAGE = """usage: fastssl pretrain CONFIG [--resume] [--section.key value ...]

Pretrain a backbone on shards, without labels. CONFIG is a YAML file (see configs/); flags override its settings.
  --resume     continue the run in train.out from its newest checkpoint (from the start where there is none)
  --settings   list all settings with their values and meaning

  fastssl pretrain configs/moco_v3_vit_small.yaml --data.shards photo-shards/ --train.batch 256
  torchrun --nproc-per-node 8 -m fastssl pretrain configs/moco_v3_vit_small.yaml --data.shards photo-shards/"""


def run(argv: list[str]) -> int:
    """Run the command and return the exit code: 128 + the signal where one stopped the run."""
    if argv and argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    from shards.errors import UserError

    if not argv or argv[0].startswith("-"):
        given = " ".join(["fastssl pretrain CONFIG", *argv])
        raise UserError(f"Give the configuration file first, as in `{given}`.")
    path, rest = argv[0], [token for token in argv[1:] if token != "--resume"]
    resume = "--resume" in argv
    rest = ["--help" if token in ("--settings", "-h") else token for token in rest]

    from fastssl.pretraining import run_config

    resolved = run_config.load(path, rest)
    from fastssl.pretraining.run import pretrain

    warnings.showwarning = _show_warning
    summary = pretrain(resolved, resume=resume)
    if not is_main_process():
        return 128 + summary.interrupted if summary.interrupted else 0
    if summary.interrupted:
        print(
            f"Stopped after step {summary.steps}, saved as {summary.checkpoint}. To continue, add --resume to the same command."
        )
        return 128 + summary.interrupted
    if summary.images_per_s == 0:
        print(f"This run is already complete ({summary.steps} steps). Weights: {summary.checkpoint}")
        return 0
    print(
        f"Done: {summary.steps} steps, {summary.seconds:,.0f} s, {summary.images_per_s:,.0f} images/s. Weights: {summary.checkpoint}"
    )
    print(f"Evaluate them: fastssl eval knn {resolved.config.train.out} --shards LABELLED_SHARDS")
    return 0


def is_main_process() -> bool:
    """Return whether this process of the run may print; from torchrun's environment, so that it holds without a process group, too."""
    return os.environ.get("RANK", "0") == "0"


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    """Print a warning as one line, from one process, without the place in the source."""
    if is_main_process():
        print(f"fastssl: note: {message}", file=sys.stderr)
