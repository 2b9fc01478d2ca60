"""Every file of configs/: its header says what people need, its settings load and train, and the published ones are as published."""

import re
import shlex
from pathlib import Path

import pytest
import torch

from fastssl.cli import COMMANDS
from fastssl.core.optimizers import build_optimizer, set_lr
from fastssl.models.backbones import build_backbone
from fastssl.pretraining import run_config
from fastssl.pretraining.build import build_method
from fastssl.pretraining.step import DDPWrapper, Step, StepOptions, chunks
from fastssl.pretraining.train_config import TrainConfig
from pipelines.loading.slots import view_shapes

FOLDER = Path(__file__).parents[3] / "configs"
CONFIGS = {path.stem: path for path in sorted(FOLDER.glob("*.yaml"))}
FIELDS = ("Hardware", "Time", "Memory", "Expected")

# arXiv 2104.02057 and the commands published with its code: epochs, batch, lr per 256 images, weight decay, warm-up epochs,
# teacher's first momentum, temperature, least crop.
PUBLISHED = {
    "moco_v3_resnet50": ("resnet50", "lars", 100, 4096, 0.6, 1e-6, 10, 0.99, 1.0, 0.2),
    "moco_v3_resnet50_300": ("resnet50", "lars", 300, 4096, 0.3, 1e-6, 10, 0.99, 1.0, 0.2),
    "moco_v3_resnet50_1000": ("resnet50", "lars", 1000, 4096, 0.3, 1.5e-6, 10, 0.996, 1.0, 0.2),
    "moco_v3_vit_small_1024": ("moco_vit_small", "adamw", 300, 1024, 1.5e-4, 0.1, 40, 0.99, 0.2, 0.08),
    "moco_v3_vit_small": ("moco_vit_small", "adamw", 300, 4096, 1.5e-4, 0.1, 40, 0.99, 0.2, 0.08),
    "moco_v3_vit_base": ("moco_vit_base", "adamw", 300, 4096, 1.5e-4, 0.1, 40, 0.99, 0.2, 0.08),
    "moco_v3_vit_large": ("moco_vit_large", "adamw", 300, 4096, 1.5e-4, 0.1, 40, 0.99, 0.2, 0.08),
}
# Weights of backbones without a classifier, in millions: He et al. 2016 and Dosovitskiy et al. 2021, less their heads.
MILLIONS = {"resnet50": 23.5, "moco_vit_small": 21.7, "moco_vit_base": 85.8, "moco_vit_large": 303.3}


def header(path: Path) -> tuple[list[list[str]], dict[str, str]]:
    """The commands at the top of a configuration, as arguments, and its fields by name."""
    lines = []
    for line in path.read_text().splitlines():
        if not line.startswith("#"):
            break
        lines.append(line[1:].rstrip())
    shown = "\n".join(
        line.strip() for line in lines if line.startswith("   ") and not line.startswith("    " * 3)
    )
    commands = [shlex.split(line) for line in shown.replace("\\\n", " ").splitlines()]
    fields: dict[str, str] = {}
    name = ""
    for line in lines:
        if match := re.fullmatch(r" ([A-Z][a-z]+):\s+(.+)", line):
            name = match[1]
            fields[name] = match[2]
        elif name and line.startswith(" " * 11):
            fields[name] += " " + line.strip()
    return commands, fields


def test_the_header_reader_sees_commands_and_fields(tmp_path):
    command = "#   torchrun a \\\n#     -m b\n#   fastssl x\n"
    fields = "# Hardware:  one\n#            GPU\n# Time:      2 h\n"
    text = f"# What it is: this.\n#\n{command}#\n{fields}data:\n"
    (tmp_path / "c.yaml").write_text(text)
    commands, fields = header(tmp_path / "c.yaml")
    assert commands == [["torchrun", "a", "-m", "b"], ["fastssl", "x"]]
    assert fields == {"Hardware": "one GPU", "Time": "2 h"}


@pytest.mark.parametrize("name", CONFIGS)
def test_header_says_how_where_and_what_comes_out(name):
    commands, fields = header(CONFIGS[name])
    assert tuple(fields) == FIELDS
    assert run_config.load(CONFIGS[name]).config.train.out == f"runs/{name}"
    for tokens in commands:
        assert tokens[0] in ("fastssl", "torchrun")
        tokens = tokens[tokens.index("fastssl") + 1 :]
        assert tokens[0] in COMMANDS
        if tokens[0] == "pretrain":  # this very file, with flags that exist
            assert tokens[1] == name
            run_config.load(CONFIGS[name], tokens[2:])
    assert sum("pretrain" in tokens for tokens in commands) == 1
    assert re.search(r"GPU|V100|CPU|TPU", fields["Hardware"])
    assert re.match(r"not measured|about ", fields["Time"])
    assert re.match(r"not measured|peak \d+(\.\d+)? GiB", fields["Memory"])
    assert re.search(r"not run|published\)\. Not run by this project|docs/results/", fields["Expected"])


# Settings of methods that make them small; each method has some of them.
SMALL = {"hidden_dim": "16", "dim": "8", "bottleneck_dim": "8", "out_dim": "32"}


@pytest.mark.parametrize("name", CONFIGS)
def test_trains_at_tiny_size(name):
    full = run_config.load(CONFIGS[name]).config
    small = {key: value for key, value in SMALL.items() if hasattr(full.method, key)}
    if getattr(full.method, "queue", 0):
        small["queue"] = "16"
    sizes = {"recipe.size": "32", "recipe.local_size": "16", "train.batch": "8"}
    sizes["train.micro_batch"] = "4" if full.train.micro_batch else "0"
    sizes["model.backbone"] = "test_vit" if "vit" in full.model.backbone else "resnet10_w32"
    where = {"train.device": "cpu", "train.precision": "fp32"}
    flags = {**{f"method.{key}": value for key, value in small.items()}, **sizes, **where}
    resolved = run_config.load(CONFIGS[name], [word for k, v in flags.items() for word in (f"--{k}", v)])
    cfg = resolved.config
    method, _ = build_method(resolved, torch.device("cpu"))
    optimizer = build_optimizer(method.param_groups(), cfg.optim)
    set_lr(optimizer, 0.01)
    options = StepOptions(int(cfg.train.micro_batch), cfg.train.exact_heads, cfg.train.clip_grad)
    step = Step(method, DDPWrapper(method), optimizer, torch.device("cpu"), options=options)
    # The student's backbone, and the teacher's where there is one.
    trained = [
        [p for p in backbone.parameters() if p.requires_grad or number]
        for number, backbone in enumerate(method.backbones())
    ]
    before = [[p.detach().clone() for p in parameters] for parameters in trained]
    assert len(before) == (2 if method.plan.teacher else 1)
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        views = [torch.randn(8, *shape, generator=generator) for shape in view_shapes(cfg.recipe)]
        metrics = step.gradients(views)
        assert not step.update(0.5)
    assert all(bool(value.isfinite()) for value in metrics.values())
    for old, new in zip(before, trained, strict=True):
        assert sum(not torch.equal(a, b) for a, b in zip(old, new, strict=True)) > len(old) / 2


def num_sizes(train: TrainConfig, world: int) -> int:
    """The number of different sizes that the chunks of a process have: the compiler makes its code for each."""
    parts = chunks(train.batch // world, int(train.micro_batch))
    return len({part.stop - part.start for part in parts})


@pytest.mark.parametrize("name", CONFIGS)
def test_chunks_divide_the_batch_so_that_one_size_is_compiled(name):
    assert num_sizes(run_config.load(CONFIGS[name]).config.train, 2 if "2x8gb" in name else 1) == 1


def test_the_table_of_cards_holds_settings_that_load_and_divide_the_batch():
    text = (FOLDER.parent / "docs" / "training.md").read_text()
    rows = re.findall(
        r"^\| (\d+) GB \| (.+?) \| (.+?) \| (.+?) \| (.+?) \| [\d.]+ GB \|$", text, re.MULTILINE
    )
    assert [int(memory) for memory, *_ in rows] == [8, 16, 24, 80]
    for memory, batches, *cells in rows:
        batch, _, exception = batches.partition(" (ResNet-50: ")
        for name, cell in zip(("resnet50", "vit_small", "vit_base"), cells, strict=True):
            micro_batch, kind, peak = re.fullmatch(r"(\d+)(?:, (\w+))?: (\d+) GB", cell).groups()
            assert int(peak) < int(memory)
            flags = ["--train.batch", exception.rstrip(")") if exception and name == "resnet50" else batch]
            flags += ["--train.micro-batch", micro_batch, "--train.checkpointing", kind or "none"]
            assert num_sizes(run_config.load(CONFIGS[f"moco_v3_{name}"], flags).config.train, 1) == 1


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_runs_are_as_published(name):
    cfg = run_config.load(CONFIGS[name]).config
    backbone, optimizer, epochs, batch, lr, weight_decay, warmup, momentum, temperature, crop = PUBLISHED[
        name
    ]
    assert (cfg.model.backbone, cfg.optim.name) == (backbone, optimizer)
    assert (cfg.train.epochs, cfg.train.batch, cfg.optim.warmup_epochs) == (epochs, batch, warmup)
    assert (cfg.optim.lr, cfg.optim.weight_decay, cfg.optim.momentum) == (lr, weight_decay, 0.9)
    assert (cfg.optim.betas, cfg.optim.trust_coefficient) == ((0.9, 0.999), 1e-3)
    assert (cfg.method.momentum, cfg.method.momentum_cosine, cfg.method.temperature) == (
        momentum,
        True,
        temperature,
    )
    assert (cfg.method.dim, cfg.method.hidden_dim, cfg.method.queue, cfg.method.head) == (
        256,
        4096,
        0,
        "auto",
    )
    recipe = cfg.recipe
    assert (recipe.size, recipe.crop_scale, recipe.crop_ratio) == (224, (crop, 1.0), (3 / 4, 4 / 3))
    assert (recipe.brightness, recipe.contrast, recipe.saturation, recipe.hue) == (0.4, 0.4, 0.2, 0.1)
    assert (recipe.jitter_p, recipe.gray_p, recipe.blur_p, recipe.solarize_p) == (
        0.8,
        0.2,
        (1.0, 0.1),
        (0.0, 0.2),
    )
    assert cfg.train.clip_grad == cfg.model.drop_path == 0
    assert cfg.model.stop_grad_conv1


@pytest.mark.parametrize("backbone", MILLIONS)
def test_published_backbones_have_the_published_size(backbone):
    cfg = next(run_config.load(CONFIGS[name]).config for name in PUBLISHED if PUBLISHED[name][0] == backbone)
    with torch.device("meta"):
        model = build_backbone(cfg.model, cfg.recipe.size)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(MILLIONS[backbone], abs=0.1)
