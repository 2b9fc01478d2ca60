"""The `fastssl` command. It imports a sub-command's module only when that is run, so that help is fast."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module

from fastssl import __version__
from shards.terminal import note, shown_lines, wrapped

# name: (module with run(argv), one line of help)
COMMANDS = {
    "demo": (
        "fastssl.demo.demo_command",
        "See it work in 5 minutes on a CPU: draw images, pretrain, evaluate",
    ),
    "shard": (
        "shards.commands.shard_command",
        "Convert folders, lists, tars or rasters to WebDataset shards",
    ),
    "label": (
        "shards.commands.label_command",
        "Label finished shards from a table, without changing them",
    ),
    "split": (
        "shards.commands.split_command",
        "Divide shards into train, val, test and label fractions",
    ),
    "verify": (
        "shards.commands.verify_command",
        "Check every byte of shards and name damaged samples",
    ),
    "inspect": (
        "shards.commands.inspect_command",
        "Show what shards contain: tables, pictures and histograms",
    ),
    "preview": (
        "fastssl.commands.preview_command",
        "Draw originals beside their augmented views, as a PNG",
    ),
    "configs": ("fastssl.commands.configs_command", "List the packaged configurations, or copy one"),
    "pretrain": ("fastssl.commands.pretrain_command", "Pretrain a backbone on shards, without labels"),
    "launch": (
        "fastssl.commands.launch_command",
        "Start a run on a cluster that requeues itself: launch slurm",
    ),
    "eval": ("fastssl.commands.eval_command", "Evaluate a checkpoint: eval knn"),
    "doctor": (
        "fastssl.doctor.doctor_command",
        "Check driver, GPUs, compiler, limits, disk and a data set",
    ),
    "replay": (
        "fastssl.pretraining.replay",
        "Repeat a step that was not finite, and find where it failed",
    ),
    "report": (
        "fastssl.commands.report_command",
        "Draw the curves of runs as a PNG: loss, accuracy, collapse, speed",
    ),
    "bench": (
        "fastssl.bench.bench_command",
        "Find what limits a run: bench CONFIG; compare loaders: bench loader",
    ),
}


def usage() -> str:
    """Return the text of `fastssl --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            f"fastssl {__version__}: pretrain a vision backbone on your own unlabelled images.",
            "",
            "usage: fastssl COMMAND [options]     (fastssl COMMAND --help explains one)",
            "",
            *lines,
            "",
            "A first run:",
            "  fastssl shard photos/ photo-shards/",
            "  fastssl preview photo-shards/ --config laptop --out views.png",
            "  fastssl pretrain --data.shards photo-shards/",
        ]
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 2 an error that the user can fix, 130 interrupted."""
    if argv is None:
        argv = sys.argv[1:]
        # Of a warning a user needs the sentence, not the place in the source.
        warnings.formatwarning = lambda message, *place: f"{note(message)}\n"
    if not argv:
        print(usage())
        print("fastssl: give a command, such as `fastssl demo`.", file=sys.stderr)
        return 2
    if argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] in ("-V", "--version"):
        print(f"fastssl {__version__}")
        return 0

    from shards.errors import UserError, nearest

    try:
        if argv[0] not in COMMANDS:
            raise UserError(f"There is no command '{argv[0]}'.{nearest(argv[0], COMMANDS)}")
        return import_module(COMMANDS[argv[0]][0]).run(argv[1:]) or 0
    except UserError as error:
        print(wrapped(f"fastssl: {shown_lines(error)}", sys.stderr), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("fastssl: interrupted.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `fastssl ... | head`
        sys.stderr.close()
        return 141


if __name__ == "__main__":
    sys.exit(main())
