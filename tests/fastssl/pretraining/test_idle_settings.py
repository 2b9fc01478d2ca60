"""A setting that does nothing beside the others is told; no packaged configuration has one."""

import dataclasses
from pathlib import Path

import pytest

from fastssl.methods import METHODS
from fastssl.pretraining.idle_settings import IDLE, tell_idle
from fastssl.pretraining.packaged_configs import packaged
from fastssl.pretraining.run import train
from fastssl.pretraining.run_config import load, load_config
from pipelines.augment.recipe import RECIPES
from shards.dataset.shard_set import ShardSet
from tests.fastssl.runs import resolve


@pytest.mark.parametrize("name", sorted(packaged()))
def test_packaged_configurations_have_no_idle_settings(name: str) -> None:
    assert tell_idle(load(name).config) == []


def test_presets_and_methods_have_no_idle_settings() -> None:
    usual = load(None).config
    for recipe in RECIPES.values():
        assert tell_idle(dataclasses.replace(usual, recipe=recipe)) == []
    for method in METHODS:
        for backbone in ("resnet50", "vit_small_patch16_224"):
            found = load_config(overrides={"method.name": method, "model.backbone": backbone}).config
            assert tell_idle(found) == []


CHANGED = {
    "data": {"cache_gb": 2.0, "block_shards": 3, "mask_ignore": 7, "decode": "gpu"},
    "knn": {
        "shards": "a",
        "test_shards": "b",
        "split": "c",
        "test_split": "d",
        "k": 3,
        "linear": False,
        "max_samples": 5,
    },
    "log": {"name": "seven"},
    "optim": {"betas": (0.8, 0.9), "momentum": 0.8, "trust_coefficient": 0.1},
    "train": {"max_skipped": 3},
    "recipe": {
        "local_size": 50,
        "local_crop_scale": (0.1, 0.2),
        "brightness": 0.1,
        "contrast": 0.1,
        "saturation": 0.1,
        "hue": 0.3,
        "blur_sigma": (0.2, 0.3),
        "noise_std": (0.1, 0.2),
        "erase_scale": (0.1, 0.2),
        "erase_ratio": (0.5, 2.0),
        "erase_value": "random",
    },
}
# What makes each of them idle, or not.
STATES = (
    {
        "data": {"order": "global"},
        "optim": {"name": "adamw"},
        "recipe": {"jitter_p": 0.0, "blur_p": (0.0,), "noise_p": 0.0},
    },
    {
        "data": {"cache": "ram", "order": "blocks", "masks": True, "augment_on": "gpu"},
        "knn": {"every": 1},
        "log": {"tensorboard": True},
        "optim": {"name": "lars"},
        "train": {"nonfinite": "skip"},
        "recipe": {
            "local_views": 2,
            "noise_p": 0.5,
            "erase_p": 0.5,
            "jitter_p": 0.8,
            "blur_p": (0.5,),
            "solarize_p": (0.0,),
        },
    },
)


@pytest.mark.parametrize("idle", IDLE, ids=lambda idle: f"{idle.section}.{idle.names[0]}")
def test_a_changed_setting_is_told_where_it_does_nothing_and_only_there(idle) -> None:
    for name in idle.names:
        told = []
        for state in STATES:
            sections = {}
            for section, values in state.items():
                own = getattr(load(None).config, section)
                sections[section] = dataclasses.replace(own, **values)
            config = dataclasses.replace(load(None).config, **sections)
            section = dataclasses.replace(
                getattr(config, idle.section), **{name: CHANGED[idle.section][name]}
            )
            lines = tell_idle(dataclasses.replace(config, **{idle.section: section}))
            told.append([line for line in lines if line.startswith(f"{idle.section}.{name} has no effect: ")])
        counts = [len(lines) for lines in told]
        # AdamW has betas, LARS has not.
        assert counts == ([0, 1] if name == "betas" else [1, 0]), name


def test_a_folder_for_remote_shards_is_told_to_do_nothing_for_local_ones(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """People who wanted shards on the machine's own disk read them over the network."""
    cached = {"data": {"cache_dir": str(tmp_path / "cache")}, "train": {"epochs": 1}, "knn": {"every": 0}}
    train(resolve(shards, tmp_path / "run", cached))
    lines = capsys.readouterr().out.splitlines()
    assert any(
        line.startswith(f"data.cache_dir has no effect: '{shards}' is no URL, and its shards are read where")
        for line in lines
    )
    assert any(line.startswith("knn.k has no effect: knn.every is 0") for line in lines)
    # 60 images in batches of 8.
    assert "4 of 60 images (6.7%), others in each epoch, are left out: they do not fill a batch of 8" in lines
    assert tell_idle(load_config(overrides=["--data.cache-dir", "x"]).config, ShardSet.open(shards))
