"""Settings of a run that do nothing beside its other settings: each is told, so that nobody waits for what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

from shards.dataset.shard_set import ShardSet

if TYPE_CHECKING:
    from fastssl.pretraining.run_config import RunConfig


@dataclass(frozen=True)
class _Idle:
    """Settings of a section that do nothing where `where` holds, and why."""

    section: str
    names: tuple[str, ...]
    where: Callable[[RunConfig], bool]
    why: str


_KNN = ("shards", "test_shards", "split", "test_split", "k", "linear", "max_samples")
_SERVICES = ("tensorboard", "wandb", "mlflow", "trackio")
_JITTER = ("brightness", "contrast", "saturation", "hue")
IDLE = (
    _Idle("data", ("cache_gb",), lambda cfg: cfg.data.cache == "none", "data.cache is none"),
    _Idle("data", ("block_shards",), lambda cfg: cfg.data.order == "global", "data.order is global"),
    _Idle("data", ("mask_ignore",), lambda cfg: not cfg.data.masks, "data.masks is off"),
    _Idle("data", ("decode",), lambda cfg: cfg.data.augment_on == "cpu", "data.augment_on is cpu"),
    _Idle("knn", _KNN, lambda cfg: not cfg.knn.every, "knn.every is 0, so that nothing is evaluated"),
    _Idle(
        "log",
        ("name",),
        lambda cfg: not any(getattr(cfg.log, name) for name in _SERVICES),
        "no service is chosen, such as log.wandb",
    ),
    _Idle("optim", ("betas",), lambda cfg: cfg.optim.name != "adamw", "optim.name is not adamw"),
    _Idle("optim", ("momentum",), lambda cfg: cfg.optim.name == "adamw", "optim.name is adamw"),
    _Idle("optim", ("trust_coefficient",), lambda cfg: cfg.optim.name != "lars", "optim.name is not lars"),
    _Idle("train", ("max_skipped",), lambda cfg: cfg.train.nonfinite == "stop", "train.nonfinite is stop"),
    _Idle(
        "recipe",
        ("local_size", "local_crop_scale"),
        lambda cfg: not cfg.recipe.local_views,
        "recipe.local_views is 0",
    ),
    _Idle("recipe", _JITTER, lambda cfg: not any(cfg.recipe.values("jitter_p")), "recipe.jitter_p is 0"),
    _Idle("recipe", ("blur_sigma",), lambda cfg: not any(cfg.recipe.values("blur_p")), "recipe.blur_p is 0"),
    _Idle("recipe", ("noise_std",), lambda cfg: not cfg.recipe.noise_p, "recipe.noise_p is 0"),
    _Idle(
        "recipe",
        ("erase_scale", "erase_ratio", "erase_value"),
        lambda cfg: not cfg.recipe.erase_p,
        "recipe.erase_p is 0",
    ),
)


def tell_idle(cfg: RunConfig, shards: ShardSet | None = None) -> list[str]:
    """Return a line about each group of settings that were changed from their defaults and do nothing.

    Args:
        cfg: the run's settings.
        shards: what it trains on; None, where that is not known, tells nothing of the cache of remote shards.
    """
    told = []
    for idle in IDLE:
        values = getattr(cfg, idle.section)
        usual = {field.name: field.default for field in fields(values)}
        changed = [name for name in idle.names if getattr(values, name) != usual[name]]
        if changed and idle.where(cfg):
            told.append(f"{_names(idle.section, changed)} no effect: {idle.why}")
    changed = [name for name in ("cache_dir", "cache_bytes") if getattr(cfg.data, name)]
    if changed and shards is not None and shards.near is None:
        told.append(
            f"{_names('data', changed)} no effect: '{shards.folder}' is no URL, and its shards are read where they lie (to read them "
            "from this machine's own disk, copy them there; data.cache ram keeps them in memory)"
        )
    return told


def _names(section: str, names: list[str]) -> str:
    return f"{' and '.join(f'{section}.{name}' for name in names)} {'have' if len(names) > 1 else 'has'}"
