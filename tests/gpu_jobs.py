"""What `gpu_check` runs: its parts, the processes of each, and the settings that they are given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent

# Configuration and images per step that an 80 GB card holds.
MODELS = {
    "resnet50": ("configs/moco_v3_resnet50.yaml", 256),
    "vit_small": ("configs/moco_v3_vit_small.yaml", 512),
    "vit_base": ("configs/moco_v3_vit_base.yaml", 256),
}
# What each switch is set to, from a base of bf16, eager, and the defaults.
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
    "side_stream_off": ["--data.side_stream", "False"],
}
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
# chunks, which is what decides the peak.
SELECTIVE = ("--train.checkpointing", "selective")
CARDS = {
    "card_8gb_resnet50": ("moco_v3_resnet50", 64, SELECTIVE),
    "card_8gb_vit_small": ("moco_v3_vit_small", 64, ()),
    "card_8gb_vit_base": ("moco_v3_vit_base", 32, SELECTIVE),
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
# Further ladders of a model, of its end to end only.
VARIANTS = {
    "side_stream_off": SWITCHES["side_stream_off"],
    "augment_on_gpu": ["--data.augment_on", "gpu"],
    "decode_on_gpu": ["--data.augment_on", "gpu", "--data.decode", "gpu"],
}
WITH_SHARDS = ("augment", "loader", "loader_peers", *MODELS)
PARTS = (
    "tests",
    "augment",
    "loader",
    *MODELS,
    "memory",
    *(f"switches_{name}" for name in ("resnet50", "vit_small")),
    "loader_peers",
)


@dataclass(frozen=True)
class Job:
    """One process."""

    argv: tuple[str, ...]
    """Arguments of `fastssl`, or of pytest where `module` says so."""
    out: Path | None = None
    """The JSON file that it writes; of pytest the XML file."""
    module: str = "fastssl"


@dataclass(frozen=True)
class Plan:
    """What all jobs share."""

    shards: Path
    out: Path
    stamp: str
    """Begins the names of files: the date and the device."""
    on_gpu: bool
    scale: float = 1.0
    """Share of each batch size."""
    extra: tuple[str, ...] = ()
    """Further settings for every job with a configuration, such as tiny sizes for a trial."""

    def jobs(self, part: str) -> list[Job]:
        """The jobs of a part."""
        if part == "tests":
            out = self.path("tests").with_suffix(".xml")
            # What other versions warn of is no failure there.
            argv = (
                "-m",
                "gpu",
                "-W",
                "default",
                "-p",
                "no:cacheprovider",
                f"--junit-xml={out}",
                *gpu_tests(),
            )
            return [Job(argv, out, module="pytest")]
        if part == "augment":
            out = self.path(part)
            flags = ("--batch", self.batch(256), "--json", str(out))
            return [Job(("bench", "augment", str(self.shards), *flags), out)]
        if part in ("loader", "loader_peers"):
            out = self.path(part)
            which = ("fused,dali,kornia", "none") if part == "loader" else ("fused", "all")
            flags = ("--engines", which[0], "--peers", which[1], "--batch", self.batch(256), "--seconds", "3")
            return [Job(("bench", "loader", str(self.shards), *flags, "--json", str(out)), out)]
        if part == "memory":
            return [self._card(name) for name in CARDS] if self.on_gpu else []
        if part.startswith("switches_"):
            model = part.removeprefix("switches_")
            names = SWITCHES if self.on_gpu else ON_CPU
            return [self._switch(model, name) for name in names if _concerns(name, model)]
        path, batch = MODELS[part]
        flags = ["--data.shards", str(self.shards), "--train.batch", self.batch(batch)]
        jobs = [self._bench(f"ladder-{part}", path, flags)]
        if self.on_gpu:
            for name, changes in VARIANTS.items():
                more = [*flags, *changes, "--quick", "--steps", "20"]
                jobs.append(self._bench(f"ladder-{part}-{name}", path, more))
        return jobs

    def path(self, name: str) -> Path:
        """The file of a result."""
        return self.out / f"{self.stamp}-{name}.json"

    def batch(self, images: int) -> str:
        """A batch size, scaled."""
        return str(max(4, int(images * self.scale)))

    def _bench(self, name: str, path: str, flags: list[str]) -> Job:
        out = self.path(name)
        return Job(("bench", path, *flags, *self.extra, "--json", str(out)), out)

    def _switch(self, model: str, name: str) -> Job:
        path, batch = MODELS[model]
        flags = ["--train.batch", self.batch(batch // 2), *BASE, *SWITCHES[name], "--quick", "--steps", "10"]
        return self._bench(f"switch-{model}-{name}", path, flags)

    def _card(self, name: str) -> Job:
        config, chunk, more = CARDS[name]
        batch = ("--train.batch", str(2 * chunk), "--train.micro_batch", str(chunk))
        flags = [*batch, *more, "--train.compile", "False", "--quick"]
        return self._bench(f"memory-{name}", f"configs/{config}.yaml", flags)


def _concerns(switch: str, model: str) -> bool:
    """Whether a switch has an effect on a model's step; the side stream is measured with the ladder, which has a loader."""
    if switch == "side_stream_off":
        return False
    return not (
        (switch == "channels_first" and "vit" in model)
        or (switch == "attention_explicit" and "vit" not in model)
    )


def gpu_tests() -> list[str]:
    """The files with tests that want a GPU: to collect all would ask for packages that only the others need."""
    marked = (path for path in TESTS.rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    return sorted(str(path.relative_to(TESTS.parent)) for path in marked if path.name != "test_gpu_check.py")
