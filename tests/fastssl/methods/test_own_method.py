"""A method of one's own, in a module beside the run: trained, resumed and evaluated by its name; and what is refused."""

import importlib
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastssl import evaluate_knn
from fastssl.cli import main
from fastssl.core import checkpoint
from fastssl.methods import get_method
from fastssl.pretraining.build import build_method
from fastssl.pretraining.run_config import Resolved, from_tree, load
from shards.errors import UserError
from tests.fastssl.pretraining.test_resume import resume_after_crashes
from tests.fastssl.pretraining.test_step import make_step
from tests.fastssl.runs import STEPS, TOTAL, assert_same_end, newest, tiny, write_yaml
from tests.fastssl.tiny import Plain, make_views

ROOT = Path(__file__).parents[3]

# SimSiam (arXiv 2011.10566), as a user would write it: the fields of the contract that it needs, and no others.
SIMSIAM = '''
"""SimSiam."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from fastssl.core.optimizers import OptimConfig
from fastssl.methods import Method, MethodDefaults, ParamGroup, StepOutput, ViewPlan


@dataclass(frozen=True)
class Settings:
    """Settings of SimSiam."""

    dim: int = 2048
    """Dimension of the projections."""


class SimSiam(Method):
    """Each view's prediction must point where the other view's projection does, which gets no gradient."""

    Config = Settings
    targets_from = "student"

    def __init__(self, backbone, cfg):
        super().__init__(backbone, cfg)
        width = backbone.num_features
        self.projector = nn.Sequential(nn.Linear(width, cfg.dim, bias=False), nn.BatchNorm1d(cfg.dim))
        self.predictor = nn.Sequential(nn.Linear(cfg.dim, 8), nn.ReLU(), nn.Linear(8, cfg.dim))
        self.register_buffer("applied_steps", torch.zeros((), dtype=torch.int64))

    @classmethod
    def defaults(cls, family):
        return MethodDefaults("moco_v2", OptimConfig(name="sgd", lr=0.5, weight_decay=1e-4, warmup_epochs=0))

    def plan_views(self, num_global, num_local):
        return ViewPlan(student=(0, 1), teacher=())

    def heads(self):
        return [self.projector, self.predictor]

    @torch.no_grad()
    def targets(self, teacher, student=None):
        return [self.projector(feature).float() for feature in student]

    def loss(self, features, targets, first=0):
        rows = slice(first, first + len(features[0]))
        predicted = [self.predictor(self.projector(feature)).float() for feature in features]
        pairs = zip(predicted, reversed(targets))
        loss = -sum(F.cosine_similarity(p, z[rows]).mean() for p, z in pairs) / 2
        return StepOutput(loss, {"loss": loss.detach()}, features[0].detach())

    def remember(self, targets, applied=None):
        # A memory of earlier steps, which a checkpoint has to hold.
        self.applied_steps += 1 if applied is None else applied

    def param_groups(self):
        # The predictor's learning rate stays where it begins, whatever the run's schedule does.
        rest = [p for name, p in self.named_parameters() if not name.startswith("predictor")]
        rate = lambda clock: 2 / (1 + math.cos(math.pi * clock.before))
        return [ParamGroup(rest), ParamGroup(list(self.predictor.parameters()), rate=rate)]
'''


def forget(name: str) -> None:
    for module in [module for module in sys.modules if module.split(".")[0] == name]:
        del sys.modules[module]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The working folder of a user, of which Python knows nothing yet."""
    known = set(sys.modules)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    monkeypatch.chdir(tmp_path)
    importlib.invalidate_caches()
    yield tmp_path
    for name in set(sys.modules) - known:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


NAME = "simsiam_of_mine:SimSiam"


@pytest.fixture
def simsiam(here: Path) -> Path:
    """The folder, with the module in it."""
    (here / "simsiam_of_mine.py").write_text(SIMSIAM)
    return here


def configuration(shards: Path, folder: Path, out: str) -> Path:
    """A tiny configuration that leaves the method to a flag; it trains in chunks."""
    tree = tiny(shards, folder / out, {"train": {"micro_batch": 4}})
    del tree["method"], tree["optim"], tree["recipe"]["preset"]
    return write_yaml(folder / f"{out}.yaml", tree)


def test_it_trains_resumes_and_is_evaluated(
    simsiam: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--method", NAME, "--method.dim", "16"]
    assert main(["pretrain", str(configuration(shards, simsiam, "whole")), *flags]) == 0
    assert f"{NAME} resnet10_w32 on 60 images" in capsys.readouterr().out
    state = newest(simsiam / "whole")
    assert state["step"] == TOTAL
    assert int(state["method"]["applied_steps"]) == TOTAL
    assert state["config"]["method"] == {"name": NAME, "dim": 16}
    # Its own defaults, recipe included.
    cfg = from_tree(state["config"]).config
    assert (cfg.optim.name, cfg.optim.lr, cfg.recipe.saturation, cfg.recipe.size) == ("sgd", 0.5, 0.4, 16)
    # The groups' own schedules: at the last step the predictor's rate is still the first one.
    rest, predictor = (group["lr"] for group in state["optimizer"]["param_groups"])
    assert predictor == pytest.approx(0.5 * 8 / 256)
    assert rest < 0.1 * predictor
    fresh, _ = build_method(from_tree(state["config"]), torch.device("cpu"))
    still = [name for name, p in fresh.named_parameters() if torch.equal(p, state["method"][name])]
    assert still == []

    resume_after_crashes(load(configuration(shards, simsiam, "cut"), flags), (4, STEPS + 3))
    assert_same_end(simsiam / "cut", simsiam / "whole")

    assert main(["eval", "knn", "whole", "--shards", str(shards), "--device", "cpu"]) == 0
    assert f"resnet10_w32, pretrained {TOTAL} steps" in capsys.readouterr().out


def test_it_is_named_in_files_and_shown_by_help(simsiam: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("short.yaml").write_text(f"method: {NAME}\n")
    Path("long.yaml").write_text(f"method: {{name: '{NAME}', dim: 16}}\n")
    short = load("short.yaml")
    assert short.config.method == get_method(NAME).Config(dim=2048)
    assert load("long.yaml").config.method == get_method(NAME).Config(dim=16)
    assert load("long.yaml", ["--method.dim", "3"]).config.method.dim == 3
    assert from_tree(short.tree()) == short
    Path("wrong.yaml").write_text(f"method: {{name: '{NAME}', dimm: 16}}\n")
    with pytest.raises(UserError, match=r"has an unknown key 'method\.dimm'\. Did you mean 'method\.dim'\?"):
        load("wrong.yaml")
    with pytest.raises(SystemExit):
        main(["pretrain", "short.yaml", "--settings"])
    assert "Dimension of the projections." in capsys.readouterr().out


def test_over_a_packaged_configuration_its_defaults_hold(simsiam: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: Resolved = load("laptop", ["--method", NAME])
    assert (found.config.optim.name, found.config.recipe.size) == ("sgd", 64)


def test_a_module_in_a_package_will_do(simsiam: Path) -> None:
    (simsiam / "ours").mkdir()
    (simsiam / "simsiam_of_mine.py").rename(simsiam / "ours" / "methods_of_mine.py")
    assert get_method("ours.methods_of_mine:SimSiam").__name__ == "SimSiam"


def test_a_checkpoint_is_evaluated_without_its_module_and_continued_only_with_it(
    simsiam: Path, shards: Path, told
) -> None:
    one_epoch = ["--train.epochs", "1", "--method", NAME, "--method.dim", "16"]
    assert main(["pretrain", str(configuration(shards, simsiam, "run")), *one_epoch]) == 0
    assert checkpoint.list_checkpoints(simsiam / "run")
    with_module = evaluate_knn("run", shards, device="cpu")
    (simsiam / "simsiam_of_mine.py").unlink()
    forget("simsiam_of_mine")
    importlib.invalidate_caches()
    assert evaluate_knn("run", shards, device="cpu") == with_module
    assert [row["features"] for row in with_module["rows"]] == [
        f"resnet10_w32, pretrained {STEPS} steps",
        "resnet10_w32, untrained",
        "raw pixels",
    ]
    said = told("pretrain", "run/config.yaml", "--resume")
    assert said.startswith(
        "The method's module 'simsiam_of_mine' cannot be imported (ModuleNotFoundError: "
        "No module named 'simsiam_of_mine'): it must lie in the current folder or be installed."
    )


# ---------------------------------------------------------------- mistakes

HEADER = "from dataclasses import dataclass\nfrom fastssl.methods import Method\n"
CONFIG = "@dataclass(frozen=True)\nclass Settings:\n    pass\n"


@pytest.mark.parametrize(
    ("text", "name", "words"),
    [
        (
            None,
            "Mine",
            "The method's module 'wrong_module' cannot be imported (ModuleNotFoundError: No module named 'wrong_module'): it must lie "
            "in the current folder or be installed.",
        ),
        (
            "import no_such_package_at_all\n",
            "Mine",
            "The method's module 'wrong_module' cannot be imported (ModuleNotFoundError: No module named 'no_such_package_at_all'): "
            "it must lie in the current folder or be installed.",
        ),
        (
            "raise ValueError('not today')\n",
            "Mine",
            "The method's module 'wrong_module' cannot be imported (ValueError: not today): it must lie in the current folder or be "
            "installed.",
        ),
        (
            HEADER + "class Mine:\n    pass\n",
            "Mine",
            "There is no method 'Mine' in the module 'wrong_module'. The module holds no subclass of fastssl.methods.Method.",
        ),
        (
            HEADER + "class Mine(Method):\n    pass\ndef helper(): pass\n",
            "helper",
            "There is no method 'helper' in the module 'wrong_module'. Known: Mine.",
        ),
        (
            HEADER + "class Mine(Method):\n    pass\n",
            "Mina",
            "There is no method 'Mina' in the module 'wrong_module'. Did you mean 'Mine'?",
        ),
        (
            HEADER + "class Mine(Method):\n    pass\n",
            "Method",
            "There is no method 'Method' in the module 'wrong_module'. Known: Mine.",
        ),
        (
            HEADER + "class Mine(Method):\n    pass\n",
            "Mine",
            "The method 'wrong_module:Mine' needs a class attribute Config, a frozen dataclass of its settings.",
        ),
        (
            HEADER + CONFIG.replace("(frozen=True)", "") + "class Mine(Method):\n    Config = Settings\n",
            "Mine",
            "The method 'wrong_module:Mine' needs a class attribute Config, a frozen dataclass of its settings.",
        ),
    ],
    ids=[
        "absent",
        "lacks a package",
        "raises",
        "no methods",
        "function",
        "misspelt",
        "base",
        "no Config",
        "not frozen",
    ],
)
def test_a_wrong_name_says_what_is_wrong(text: str | None, name: str, words: str, here: Path, told) -> None:
    if text is not None:
        (here / "wrong_module.py").write_text(text)
    assert told("pretrain", "--method", f"wrong_module:{name}") == words


def test_the_method_of_the_page_on_methods_is_whole() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "methods.md").read_text(), re.DOTALL)
    found: dict[str, Any] = {}
    exec(code, found)
    torch.manual_seed(0)
    method = found["SimSiam"](Plain(), found["Settings"](dim=8))
    method.plan = method.plan_views(2, 0)
    step, views = make_step(method, micro_batch=4), make_views(8)
    losses = []
    for _ in range(20):
        step.gradients(views)
        step.update(1.0)
        losses.append(step.loss.item())
    assert losses[-1] < losses[0] - 0.1
