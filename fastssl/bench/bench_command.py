"""`fastssl bench`: choose the benchmark, and only then import what it needs."""

from __future__ import annotations

from importlib import import_module

LADDER = "fastssl.bench.ladder.ladder"
SUBCOMMANDS = {
    "loader": "fastssl.bench.loaders.bench_loader",
    "augment": "fastssl.bench.loaders.bench_augment",
    "parts": "fastssl.bench.loaders.bench_parts",
    "fidelity": "fastssl.bench.loaders.bench_fidelity",
    "step": LADDER,
    "shard": "fastssl.bench.conversion.bench_shard",
    "plan": "fastssl.bench.conversion.bench_plan",
    "start": "fastssl.bench.loaders.bench_start",
    "gpu": "fastssl.bench.gpu.gpu_command",
}
USAGE = """usage: fastssl bench CONFIG [options]
           what limits a run, part by part, and the setting to try
       fastssl bench loader SHARDS [options]
           images per second from shards to views, beside other loaders
       fastssl bench augment [SHARDS] [options]
           time from decoded images to views, beside other libraries
       fastssl bench parts SHARDS [options]
           where an image's time goes on the CPU, kernel by kernel
       fastssl bench fidelity SHARDS [options]
           difference of each engine's views to the reference, in gray levels
       fastssl bench shard FOLDER [options]
           images per second from JPEG files to shards, beside other writers
       fastssl bench plan [options]
           time and memory of planning for 10 million images
       fastssl bench start SHARDS [options]
           time and memory to the first batch of a million samples
       fastssl bench gpu [--first] [options]
           all GPU tests and measurements, within a time limit

`fastssl bench CONFIG --help`, `fastssl bench loader --help` and so on list the
options."""


def run(argv: list[str]) -> int:
    """Run the benchmark that `argv` begins with: a sub-command, or a configuration for the ladder."""
    if not argv or argv[0] in ("-h", "--help"):
        print(USAGE)
        return 0
    from fastssl.pretraining.packaged_configs import is_config, packaged
    from shards.errors import UserError, nearest

    name, rest = argv[0], argv[1:]
    if name in SUBCOMMANDS:
        return import_module(SUBCOMMANDS[name]).run(rest) or 0
    if is_config(name):
        # `bench CONFIG --help` explains the ladder, not the settings.
        wants_help = any(token in ("-h", "--help") for token in rest)
        return import_module(LADDER).run(["--help"] if wants_help else argv) or 0
    raise UserError(
        f"There is no benchmark 'fastssl bench {name}', and '{name}' is no configuration."
        f"{nearest(name, [*SUBCOMMANDS, *packaged(), 'CONFIG.yaml'])}"
    )
