"""`fastssl bench augment` on a CPU: that each way makes views of the recipe's form, and what the report says of it."""

import contextlib
import copy
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastssl.bench import bench_command
from fastssl.bench.loaders import augment_turns
from fastssl.bench.loaders.augmenters import AUGMENTERS, Augmenter, Decoded, measured_levels
from pipelines.augment.recipe import get_recipe
from pipelines.previews.pictures import SIZES, photographs
from shards.conversion.convert import convert
from shards.errors import UserError
from tests import needs

CPU = torch.device("cpu")
TINY = [
    "--device",
    "cpu",
    "--size",
    "16",
    "--batch",
    "3",
    "--threads",
    "1",
    "--repeats",
    "2",
    "--seconds",
    "0.01",
]


def decoded(recipe: str = "moco_v3", batch: int = 3, **changes) -> Decoded:
    made = dataclasses.replace(get_recipe(recipe), size=16, **changes)
    images = [np.ascontiguousarray(image[:60, :70]) for image in photographs(4)]
    return Decoded(images, made, batch, CPU, 2)


def rows(tmp_path: Path, *flags: str) -> dict[str, dict]:
    path = tmp_path / "augment.json"
    assert bench_command.run(["augment", *flags, *TINY, "--json", str(path)]) == 0
    return {row["name"]: row for row in json.loads(path.read_text())}


@pytest.mark.parametrize("name", [name for name in AUGMENTERS if name != "triton"])
def test_each_makes_normalised_views_of_every_batch(name):
    if name.startswith(("kornia", "dali")):
        needs.module("kornia" if name.startswith("kornia") else "nvidia.dali")
    work = decoded()
    mean, std = torch.tensor(work.recipe.mean)[:, None, None], torch.tensor(work.recipe.std)[:, None, None]
    with AUGMENTERS[name].open(work) as step:
        kept = []
        for _ in range(2):
            views = step()
            assert [(view.shape, view.dtype) for view in views] == [((3, 3, 16, 16), torch.float32)] * 2
            kept.append([(view * std + mean).clone() for view in views])
        del views
    for batch in kept:
        for pixels in batch:
            assert pixels.min() >= -1e-4
            assert pixels.max() <= 1 + 1e-4
            assert all(pixels.std(dim=(1, 2, 3)) > 0.0005)
    assert not torch.equal(kept[0][0], kept[1][0])
    assert not torch.equal(kept[0][0], kept[0][1])


def test_ours_make_the_views_of_the_reference():
    exact, close = (
        measured_levels(AUGMENTERS["torch"], decoded()),
        measured_levels(AUGMENTERS["fused"], decoded()),
    )
    assert exact < 0.5
    assert close < 0.5
    needs.module("kornia")
    assert 0.5 < measured_levels(AUGMENTERS["kornia"], decoded()) < 4
    # Local views have a side of their own, and erasing is the last operation.
    assert (
        measured_levels(AUGMENTERS["torch"], decoded("dino", local_views=2, local_size=8, erase_p=1.0)) < 0.5
    )

    def upside_down(work):
        opened = AUGMENTERS["fused"].open(work)

        class Wrong:
            def __enter__(self):
                step = opened.__enter__()
                return lambda: [view.flip(2) for view in step()]

            def __exit__(self, *fault):
                return opened.__exit__(*fault)

        return Wrong()

    assert measured_levels(Augmenter("wrong", "", upside_down, "", peer=False), decoded()) > 5


def test_report_has_a_row_for_each_and_what_kept_one_out(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    found = rows(tmp_path, "--engines", "triton,torch,fused,dali-graph,torchvision-v2")
    assert list(found) == ["triton", "torch", "fused", "dali-graph", "torchvision-v2"]
    assert found["triton"]["error"] == "NotImplementedError: triton does not run on a cpu device"
    assert found["dali-graph"]["error"].startswith("not installed: ")
    best = max(found["torch"]["images_per_s"], found["fused"]["images_per_s"])
    for name in ("torch", "fused", "torchvision-v2"):
        row = found[name]
        low, high = row["spread"]
        assert 0 < low <= row["images_per_s"] <= high
        assert row["ours_over_this"] == pytest.approx(best / row["images_per_s"])
        assert 0 < row["ms_p50"] <= row["ms_p95"]
        assert row["gb_per_s"] == pytest.approx(row["least_bytes"] / row["ms_p50"] / 1e6)
        assert row["peak_memory_bytes"] >= 0
        assert row["settings"]["device"] == "cpu"
        assert row["versions"]["torch"]
    assert found["torch"]["fidelity"] == "exact"
    assert found["torch"]["mean_levels"] < 0.5
    assert found["torchvision-v2"]["fidelity"] == "approximate"
    shown = capsys.readouterr().out
    assert "3 decoded images of 500 x 375" in shown
    assert "dali-graph is not installed" in shown


def test_a_way_that_fails_keeps_none_of_the_others_from_being_written(tmp_path, monkeypatch, capsys):
    @contextlib.contextmanager
    def fails_later(work):
        steps = itertools.count()

        def step():
            if next(steps) > augment_turns.WARM_UP + 1:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return [torch.zeros(3, 3, 16, 16)] * 2

        yield step

    monkeypatch.setattr(augment_turns, "measured_levels", lambda each, work: 0.0)
    broken = Augmenter("torch", "", fails_later, "", peer=False)
    monkeypatch.setitem(AUGMENTERS, "torch", broken)
    path = tmp_path / "augment.json"
    argv = ["augment", "--engines", "torch,fused", *TINY, "--json", str(path)]
    assert bench_command.run(argv) == 1
    failed, fused = json.loads(path.read_text())
    assert failed["failure"]
    assert failed["images_per_s"] is None
    assert failed["error"].startswith(
        "a batch of 3 does not fit in the memory of the device: lower --batch ("
    )
    assert not fused["failure"]
    assert fused["images_per_s"] > 0
    assert fused["ours_over_this"] == 1
    assert f"torch failed: {failed['error']}" in capsys.readouterr().out.splitlines()


def test_rows_are_written_as_they_come(tmp_path, monkeypatch):
    kept = []
    monkeypatch.setattr(
        "fastssl.bench.loaders.bench_augment.write_measured",
        lambda *args, complete: kept.append((copy.deepcopy(args[-1]), complete)),
    )
    assert (
        bench_command.run(["augment", "--engines", "torch,fused", *TINY, "--json", str(tmp_path / "x.json")])
        == 0
    )
    assert [[len(row.rates) for row in rows] for rows, _ in kept] == [[1, 0], [1, 1], [2, 1], [2, 2], [2, 2]]
    assert [complete for _, complete in kept] == [False] * 4 + [True]


def test_images_come_from_shards(tmp_path, capsys):
    (tmp_path / "pictures").mkdir()
    from tests.pictures import photo

    for i in range(5):
        photo(40, 32 + i, seed=i).save(tmp_path / "pictures" / f"{i}.png")
    convert(tmp_path / "pictures", tmp_path / "shards", workers=0)
    found = rows(tmp_path, str(tmp_path / "shards"), "--engines", "fused")
    assert found["fused"]["settings"]["images"] == 5
    assert "images of 40 x 34" in capsys.readouterr().out
    with pytest.raises(UserError, match="has 5 images, fewer than one batch of 8"):
        bench_command.run(["augment", str(tmp_path / "shards"), *TINY, "--batch", "8"])


def test_shards_of_other_images_are_refused(tmp_path):
    (tmp_path / "deep").mkdir()
    for i in range(3):
        np.save(tmp_path / "deep" / f"{i}.npy", np.full((9, 8, 4), 1000 * i, dtype=np.uint16))
    convert(tmp_path / "deep", tmp_path / "shards", workers=0)
    with pytest.raises(UserError, match="has uint16 images of 4 channels: give other shards"):
        bench_command.run(["augment", str(tmp_path / "shards"), *TINY])


def test_least_bytes_are_boxes_and_views():
    work = decoded(crop_scale=(1.0, 1.0), crop_ratio=(70 / 60, 70 / 60))
    assert augment_turns.least_bytes(work) == 3 * 2 * (3 * 60 * 70 + 3 * 4 * 16 * 16)


def test_photographs_have_imagenet_s_sizes_and_all_kinds_of_colours():
    made = photographs(9, seed=3)
    assert [image.shape for image in made] == [(h, w, 3) for w, h in (*SIZES, SIZES[0])]
    assert all(20 < image.std() < 110 for image in made)
    assert not np.array_equal(made[0], made[8])


def test_device_time_is_not_told_where_the_host_could_not_launch_ahead(monkeypatch):
    slept = []
    monkeypatch.setattr(torch.cuda, "_sleep", slept.append, raising=False)
    ready = SimpleNamespace(query=lambda: True)
    timer = SimpleNamespace(wait=lambda: None, mark=lambda: ready, between_ms=lambda a, b: 10.0)
    assert augment_turns.device_ms(lambda: [], timer) is None
    assert len(slept) == 2
    ready.query = lambda: False
    assert augment_turns.device_ms(lambda: [], timer) == 10.0 / augment_turns.QUEUED


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--engines", "kornia-module"], "no engine called 'kornia-module'. Did you mean 'kornia-modules'"),
        (["--batch", "0"], "--batch is 0"),
        (["--images", "2", "--batch", "3"], "--images is 2, fewer than one batch of 3"),
        (["--seconds", "0"], "--seconds is 0"),
        (["--recipe", "moco"], "no recipe called 'moco'"),
        (["--json", "no/such/x.json"], "no folder 'no/such'"),
        pytest.param(
            ["--device", "cuda"],
            "finds no CUDA device",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="has a CUDA device"),
        ),
    ],
)
def test_mistakes_are_named(flags, words):
    with pytest.raises(UserError, match=words):
        bench_command.run(["augment", *TINY[2:], *flags])
