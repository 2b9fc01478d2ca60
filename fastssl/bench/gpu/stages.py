"""The stages of `bench gpu`: their jobs, limits and order, the most informative first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from fastssl.bench.installed import is_there

# Configuration, and images per step that fit in 80 GB.
MODELS = {
    "vit_small": ("configs/moco_v3_vit_small.yaml", 512),
    "resnet50": ("configs/moco_v3_resnet50.yaml", 256),
    "vit_base": ("configs/moco_v3_vit_base.yaml", 256),
}
# Rows of the ladder that the goals need, and rows that explain them.
ASKED, EXPLAINING = "full,kernels,end,plain", "end_gpu,end_decode,parts"
REST = "end_one_stream,augment,data,ema,compile,lightly"
# The settings of each switch, on top of a base of bf16, eager, and the defaults.
BASE = ["--train.compile", "False", "--train.precision", "bf16"]
ADAMW = ["--optim.name", "adamw", "--optim.lr", "1e-4", "--optim.weight_decay", "0.1"]
SWITCHES = {
    "base": [],
    "fp16": ["--train.precision", "fp16"],
    "fp32": ["--train.precision", "fp32"],
    "compile": ["--train.compile", "True"],
    "channels_first": ["--train.channels_last", "False"],
    "checkpointing_blocks": ["--train.checkpointing", "blocks"],
    "checkpointing_selective": ["--train.checkpointing", "selective"],
    "ema_loop": ["--method.ema", "loop"],
    "adamw_fused": [*ADAMW, "--optim.implementation", "fused"],
    "adamw_foreach": [*ADAMW, "--optim.implementation", "foreach"],
    "adamw_loop": [*ADAMW, "--optim.implementation", "loop"],
    "attention_explicit": ["--model.attention", "explicit"],
    "residual_autocast": ["--model.residual", "autocast"],
}
VIT_SWITCHES = ("attention_explicit", "residual_autocast")
ON_CPU = (
    "base",
    "compile",
    "channels_first",
    "ema_loop",
    "adamw_foreach",
    "adamw_loop",
    "attention_explicit",
)
# Cards by their memory: configuration, images of a chunk, further settings (the table of docs/training.md). The batch is cut to two
# chunks, which decide the peak.
SELECTIVE = ("--train.checkpointing", "selective")
CARDS = {
    "card_8gb_resnet50": ("moco_v3_resnet50", 64, SELECTIVE),
    "card_8gb_vit_small": ("moco_v3_vit_small", 64, ()),
    "card_8gb_vit_base": ("moco_v3_vit_base", 32, SELECTIVE),
    "card_2x8gb_resnet50": ("card_2x8gb_resnet50", 64, ()),
    "card_16gb_resnet50": ("moco_v3_resnet50", 128, ()),
    "card_16gb_vit_small": ("moco_v3_vit_small", 128, ()),
    "card_16gb_vit_base": ("moco_v3_vit_base", 64, ()),
    "card_24gb_resnet50": ("moco_v3_resnet50", 192, ()),
    "card_24gb_vit_small": ("moco_v3_vit_small", 256, ()),
    "card_24gb_vit_base": ("moco_v3_vit_base", 128, ()),
    "card_80gb_resnet50": ("moco_v3_resnet50", 512, ()),
    "card_80gb_vit_small": ("moco_v3_vit_small", 512, ()),
    "card_80gb_vit_base": ("moco_v3_vit_base", 256, ()),
}
JUDGED_CARDS = ("card_8gb_resnet50", "card_2x8gb_resnet50", "card_16gb_vit_base")


@dataclass(frozen=True)
class Sizes:
    """The amount of measurement."""

    images: int = 2000
    """Number of generated photographs."""
    scale: float = 1.0
    """Share of each batch size."""
    steps: int = 20
    """Steps of one measurement of the ladder."""
    repeats: int = 3
    """Measurements of each row."""
    seconds: float = 2.0
    """Shortest length of a measurement of views or loaders, in seconds."""
    short: bool = False
    """Measure only what the goals need and what explains it: fewer rows, engines and cards, and short limits."""
    extra: tuple[str, ...] = ()
    """Further settings for every job with a configuration."""


# For a test of the command itself: the smallest model and views.
TINY = (
    *(
        "--model.backbone",
        "resnet10_w32",
        "--recipe.size",
        "16",
        "--method.hidden_dim",
        "8",
        "--method.dim",
        "4",
    ),
    *("--train.compile", "False", "--train.precision", "fp32"),
)


@dataclass(frozen=True)
class CheckJob:
    """One process of a stage."""

    name: str
    """Name of the job and its log."""
    argv: tuple[str, ...]
    """Arguments of the module."""
    out: Path | None = None
    """The JSON file that the job writes; for pytest the XML file."""
    module: str = "fastssl"

    @property
    def words(self) -> str:
        """The command line, for people."""
        return f"{self.module} {' '.join(self.argv)}"


@dataclass(frozen=True)
class Stage:
    """Jobs that belong together."""

    name: str
    lanes: tuple[tuple[CheckJob, ...], ...]
    """Lanes run side by side, the jobs of a lane one after the other."""
    limit_s: float

    @property
    def jobs(self) -> list[CheckJob]:
        """The jobs of all lanes."""
        return [job for lane in self.lanes for job in lane]


@dataclass(frozen=True)
class CheckSetup:
    """Folders, device and sizes, which all stages share."""

    root: Path
    """The source tree: configurations and tests."""
    work: Path
    """Folder for photographs, shards and compiled kernels, which later calls use again."""
    shards: Path
    """Folder of the shards to measure with, given by the user or made from photographs in `work`."""
    out: Path
    """Folder for results."""
    stamp: str
    """Beginning of the names of results: the date and the device."""
    on_gpu: bool
    sizes: Sizes

    def path(self, name: str) -> Path:
        """Return the file of a result."""
        return self.out / f"{self.stamp}-{name}.json"

    def batch(self, images: int) -> str:
        """Return a batch size, scaled."""
        return str(max(4, int(images * self.sizes.scale)))

    def stage(self, name: str) -> Stage:
        """Return the stage of that name, with its jobs."""
        limits = SHORT_S if self.sizes.short else LIMIT_S
        return Stage(name, STAGES[name](self), limits.get(name, limits["other"]))

    def bench(self, name: str, path: str, *flags: str) -> CheckJob:
        """Return the job that measures a ladder."""
        out = self.path(name)
        # Jobs run in the source tree; their commands are kept with the results, where this machine's folders mean nothing.
        argv = ("bench", path, *flags, *self.sizes.extra, "--json", str(out))
        return CheckJob(name, argv, out)


Lanes = tuple[tuple[CheckJob, ...], ...]


def _facts(plan: CheckSetup) -> Lanes:
    out = plan.work / "facts.json"
    return ((CheckJob("facts", (str(out),), out, "fastssl.bench.gpu.gpu_facts"),),)


def _tests(plan: CheckSetup) -> Lanes:
    """Return a job per test file, so that a CUDA error or a hang affects no other file."""
    limit = ("--timeout", "90") if is_there("pytest_timeout") else ()
    lanes = []
    for file in gpu_tests(plan.root):
        name = f"tests-{'-'.join(Path(file).with_suffix('').parts[1:])}"
        out = plan.path(name).with_suffix(".xml")
        # With other versions of packages, warnings are no failures.
        argv = ("-m", "gpu", "-W", "default", "-p", "no:cacheprovider", "-v", "--durations", "5", *limit)
        lanes.append((CheckJob(name, (*argv, f"--junit-xml={out}", file), out, "pytest"),))
    return tuple(lanes)


def _images(plan: CheckSetup) -> Lanes:
    photos, count = plan.work / f"photographs-{plan.sizes.images}", str(plan.sizes.images)
    argv = (str(photos), str(plan.shards), count)
    return ((CheckJob("images", argv, module="fastssl.bench.gpu.images"),),)


def _warm(plan: CheckSetup) -> Lanes:
    """Compile each model into the caches that its measurement reads; one at a time, as memory holds one and the tests."""
    if not plan.on_gpu:
        return ()
    flags = ("--rows", "full", "--steps", "1", "--repeats", "1")
    models = MODELS.items()
    jobs = (
        plan.bench(f"warm-{name}", path, "--train.batch", plan.batch(batch), *flags)
        for name, (path, batch) in models
    )
    return (tuple(jobs),)


def _model(name: str, rows: str, end: str, plan: CheckSetup) -> Lanes:
    path, batch = MODELS[name]
    sizes = plan.sizes
    if end and not sizes.short:
        rows = f"{rows},{REST}"
    flags = ("--data.shards", str(plan.shards), "--train.batch", plan.batch(batch), "--rows", rows)
    measured = ("--steps", str(sizes.steps), "--repeats", str(sizes.repeats))
    return ((plan.bench(f"ladder-{name}{end}", path, *flags, *measured),),)


def _views(command: str, name: str, plan: CheckSetup, *flags: str) -> Lanes:
    sizes, out = plan.sizes, plan.path(name)
    argv = ("bench", command, str(plan.shards), *flags, "--batch", plan.batch(256))
    measured = ("--seconds", f"{sizes.seconds:g}", "--repeats", str(sizes.repeats))
    size = ("--size", "16") if sizes.extra[: len(TINY)] == TINY else ()
    return ((CheckJob(name, (*argv, *measured, *size, "--json", str(out)), out),),)


def _augment(plan: CheckSetup) -> Lanes:
    here = "triton,torch,kornia,kornia-modules" if plan.on_gpu else "torch,fused"
    return _views("augment", "augment", plan, "--engines", here if plan.sizes.short else "all")


def _loader(plan: CheckSetup) -> Lanes:
    engines = "fused" if plan.sizes.short else "fused,dali,kornia"
    return _views("loader", "loader", plan, "--engines", engines, "--peers", "none")


def _loader_peers(plan: CheckSetup) -> Lanes:
    return _views("loader", "loader_peers", plan, "--engines", "fused", "--peers", "all")


def _memory(plan: CheckSetup) -> Lanes:
    """Return the jobs that measure peaks of device memory; none on a CPU."""
    if not plan.on_gpu:
        return ()
    few = ("--train.compile", "False", "--rows", "full", "--steps", "4", "--repeats", "1")
    jobs = []
    for name, (config, chunk, more) in CARDS.items():
        if name in JUDGED_CARDS or not plan.sizes.short:
            sizes = ("--train.batch", str(2 * chunk), "--train.micro_batch", str(chunk))
            jobs.append(plan.bench(f"memory-{name}", f"configs/{config}.yaml", *sizes, *more, *few))
    return (tuple(jobs),)


def _switches(model: str, plan: CheckSetup) -> Lanes:
    path, batch = MODELS[model]
    size = ("--train.batch", plan.batch(batch // 2))
    few = ("--rows", "full", "--steps", str(min(10, plan.sizes.steps)), "--repeats", "1")
    jobs = (
        plan.bench(f"switch-{model}-{name}", path, *size, *BASE, *SWITCHES[name], *few)
        for name in (SWITCHES if plan.on_gpu else ON_CPU)
        if _concerns(name, model)
    )
    return (tuple(jobs),)


def _concerns(switch: str, model: str) -> bool:
    """Return whether a switch has an effect on a model's step."""
    return not (
        (switch == "channels_first" and "vit" in model) or (switch in VIT_SWITCHES and "vit" not in model)
    )


def gpu_tests(root: Path) -> list[str]:
    """Return the files with tests that need a GPU: to collect the others would need more packages."""
    marked = (
        path for path in (root / "tests").rglob("test_*.py") if "pytest.mark." + "gpu" in path.read_text()
    )
    return sorted(str(path.relative_to(root)) for path in marked)


STAGES: dict[str, Callable[[CheckSetup], Lanes]] = {
    "facts": _facts,
    "tests": _tests,
    "images": _images,
    "warm": _warm,
    **{name: partial(_model, name, ASKED, "") for name in MODELS},
    "augment": _augment,
    **{f"{name}_more": partial(_model, name, EXPLAINING, "-more") for name in MODELS},
    "memory": _memory,
    "loader": _loader,
    **{f"switches_{name}": partial(_switches, name) for name in ("resnet50", "vit_small")},
    "loader_peers": _loader_peers,
}
MEANINGS = {
    "facts": "versions, copies, products, first imports and compiles",
    "tests": "the tests that need a GPU, one process per file",
    "images": "generate photographs and their shards, once",
    "warm": "compile each model once, for its measurements",
    **dict.fromkeys(MODELS, "a model's step, end to end, and MoCo v3's own step"),
    "augment": "views from decoded images, beside other libraries",
    **{f"{name}_more": "views and decoding on the GPU, and the step's parts" for name in MODELS},
    "memory": "peaks of the configurations for small cards",
    "loader": "from JPEGs to views",
    "switches_resnet50": "each speed switch by itself",
    "switches_vit_small": "each speed switch by itself",
    "loader_peers": "from JPEGs to views, beside other loaders",
}
# The order; stages in one tuple run side by side.
TURNS: tuple[tuple[str, ...], ...] = (
    ("facts",),
    ("tests", "images", "warm"),
    *((name,) for name in STAGES if name not in ("facts", "tests", "images", "warm")),
)
# Stages that --first leaves out.
LATER = ("switches_resnet50", "switches_vit_small", "loader_peers")
WITH_SHARDS = frozenset({*MODELS, *(f"{name}_more" for name in MODELS), "augment", "loader", "loader_peers"})
# Limits in seconds of the short forms, and of the full ones: less than ten minutes, the limit of some machines.
SHORT_S = {
    "facts": 90.0,
    **dict.fromkeys(("tests", "images", "warm"), 180.0),
    **dict.fromkeys(MODELS, 110.0),
    **{f"{name}_more": 90.0 for name in MODELS},
    "memory": 90.0,
    "other": 60.0,
}
LIMIT_S = {"facts": 90.0, "other": 570.0}


def turns(chosen: set[str]) -> list[tuple[str, ...]]:
    """Return the chosen stages in their order; stages in one tuple run side by side."""
    kept = (tuple(name for name in turn if name in chosen) for turn in TURNS)
    return [turn for turn in kept if turn]
