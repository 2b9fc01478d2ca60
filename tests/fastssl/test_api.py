"""`from fastssl import pretrain, load_config, evaluate_knn`: what people call from Python."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastssl
from fastssl import evaluate_knn, load_config, pretrain
from fastssl.pretraining.run_config import load
from shards.errors import UserError
from tests.fastssl.runs import TOTAL, assert_same_end, resolve, tiny, write_yaml
from tests.needs import HANGS_S

ROOT = Path(__file__).parents[2]


def test_the_package_imports_nothing_heavy_before_a_name_is_used() -> None:
    code = (
        "import sys, fastssl; dir(fastssl); slow = {'torch', 'numpy', 'yaml', 'tyro'} & set(sys.modules); "
        "assert not slow, slow; fastssl.load_config; assert 'yaml' in sys.modules; assert 'timm' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_every_public_name_is_there_and_explained() -> None:
    for name in fastssl.__all__:
        assert name in dir(fastssl)
        assert getattr(fastssl, name).__doc__
    with pytest.raises(AttributeError, match="no attribute 'pretrian'"):
        fastssl.pretrian  # noqa: B018


@pytest.mark.parametrize("name", ["shards", "pipelines"])
def test_a_package_that_hides_one_of_ours_is_named(name: str, tmp_path: Path) -> None:
    """A folder with the user's own package of that name, from which he runs; with a plain install it comes first."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").touch()
    done = subprocess.run(
        [sys.executable, "-c", "import fastssl"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    assert done.returncode == 1
    hidden = tmp_path / name / "__init__.py"
    assert done.stderr.splitlines()[-1].startswith(
        f"ImportError: '{hidden}' hides fastssl's own package '{name}', which lies in '{ROOT}': rename it, or"
    )


def test_what_a_script_needs_comes_from_one_package() -> None:
    from pipelines import open_loader
    from shards import ShardSet, convert

    assert (fastssl.open_loader, fastssl.ShardSet, fastssl.convert) == (open_loader, ShardSet, convert)


def test_settings_by_full_name_by_section_and_as_flags_are_the_same(tmp_path: Path) -> None:
    path = write_yaml(tmp_path / "a.yaml", tiny("shards", tmp_path / "run"))
    flags = ["--train.batch", "12", "--recipe.preset", "satellite", "--recipe.blur-sigma", "0.1", "1.0"]
    expected = load(path, flags)
    assert expected.config.train.batch == 12
    by_name = {
        "train.batch": 12,
        "recipe.preset": "satellite",
        "recipe.blur_sigma": (0.1, 1.0),
        "train.exact_heads": False,
    }
    by_section = {
        "train": {"batch": 12, "exact_heads": False},
        "recipe": {"preset": "satellite", "blur_sigma": [0.1, 1.0]},
    }
    assert load_config(path, by_name) == load_config(path, by_section) == load_config(path, flags) == expected
    assert load_config(str(path), {"method.name": "moco_v3"}) == load(path)
    assert load_config() == load(None)


def test_a_configuration_is_overridden_again(tmp_path: Path) -> None:
    first = load_config(overrides={"recipe.preset": "satellite", "train.batch": 12})
    again = load_config(first, {"train.epochs": 3, "train.micro_batch": "auto"})
    assert (again.config.train.batch, again.config.train.epochs, again.config.train.micro_batch) == (
        12,
        3,
        "auto",
    )
    assert again.config.recipe == first.config.recipe
    assert load_config(first) == first
    for name in ("recipe", "recipe.preset"):
        with pytest.raises(UserError, match=rf"The setting {name} decides which other settings there are"):
            load_config(first, {name: "moco_v3"})
    with pytest.raises(UserError, match=r"no setting '--train.epoch'. Did you mean 'train.epochs'"):
        load_config(first, {"train.epoch": 3})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"train.epoch": 3}, "no setting '--train.epoch'. Did you mean 'train.epochs'"),
        ({"train": {"epochs": "three"}}, "three"),
        ({"train.epochs": 0}, "train.epochs is 0"),
        ({"recipe.preset": "satelite"}, "Did you mean 'satellite'"),
    ],
)
def test_mistakes_are_errors_and_neither_exits_nor_prints(overrides, words, capsys) -> None:
    with pytest.raises(UserError) as error:
        load_config(overrides=overrides)
    assert words in str(error.value)
    assert "  " not in str(error.value)
    assert capsys.readouterr() == ("", "")


def test_pretraining_and_evaluating_from_python(finished: Path, shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    path = write_yaml(tmp_path / "a.yaml", tiny("elsewhere", tmp_path / "nowhere"))
    settings = {"data.shards": str(shards), "train.out": out}
    summary = pretrain(path, settings)
    assert (summary.steps, summary.interrupted) == (TOTAL, 0)
    assert_same_end(out, finished)
    with pytest.raises(UserError, match="already holds a run"):
        pretrain(resolve(shards, out))
    assert pretrain(resolve(shards, out), resume=True).checkpoint == summary.checkpoint
    report = evaluate_knn(summary.checkpoint, shards, ks=(5,), baselines=False, device="cpu")
    assert report["step"] == TOTAL
    assert 0 <= report["rows"][0]["accuracy"][5] <= 1


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, "5000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_compute_threads_do_not_spin_for_long(given: dict[str, str], expected: str) -> None:
    """Set before PyTorch is loaded, and only where the user has not chosen."""
    environ = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    program = "import os, sys, fastssl; print(os.environ.get('GOMP_SPINCOUNT'), 'torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], env=environ | given, capture_output=True, text=True
    )
    assert done.stdout.split() == [expected, "False"], done.stderr
