"""What `from shards import ...` gives: all that is promised, nothing before it is asked for, and functions that take plain paths."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import shards
from shards import (
    Policy,
    ShardSet,
    SourceOptions,
    SplitRule,
    UserError,
    convert,
    inspect,
    open_source,
    open_split,
    repair,
    split,
    verify,
)
from tests.needs import HANGS_S
from tests.pictures import photo

ROOT = Path(__file__).parents[2]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(8):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo(30 + i, 20, seed=i).save(path)
    return tmp_path / "photos"


def test_all_names_are_there_and_documented():
    for name in shards.__all__:
        found = getattr(shards, name)
        assert name in dir(shards)
        assert found.__doc__, name
    assert sorted(shards.__all__) == sorted(shards._HOME_OF)
    with pytest.raises(AttributeError, match="module 'shards' has no attribute 'conver'"):
        _ = shards.conver


def test_nothing_is_imported_before_it_is_asked_for():
    code = "import sys, shards; dir(shards); sys.exit(', '.join({'numpy', 'pyarrow', 'PIL', 'tyro', 'torch'} & set(sys.modules)) or 0)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S
    )
    assert (done.returncode, done.stderr) == (0, "")
    code = (
        "import sys; from shards import ShardSet, convert, split, inspect; sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=HANGS_S).returncode == 0


def test_from_photos_to_a_split_with_paths_alone(photos: Path, tmp_path: Path):
    folder = tmp_path / "out"
    manifest = convert(photos, str(folder), policy=Policy(store="png"), workers=0)
    assert manifest is not None
    assert not verify(folder, level="decode", workers=0).damaged
    assert not verify(str(folder), level="fast").damaged
    with pytest.raises(UserError, match=r"There is no level 'decod'\. Did you mean"):
        verify(folder, level="decod")
    overview = inspect(str(folder))
    assert repr(overview) == "<Overview: 8 samples (8 png of 3 x uint8) in 1 shards, 2 classes>"
    division = split(folder, SplitRule(val=0.25))
    assert division.names == ("train", "val", "test")
    part = open_split(folder, "val")
    assert (len(part), part.num_samples) == (2, 8)
    (folder / "shard-000000.idx").unlink()
    tar = folder / "shard-000000.tar"
    right = tar.read_bytes()
    tar.write_bytes(right[:-2000])
    done = repair(str(folder), verify(folder, workers=0), str(photos), workers=0)
    assert (done.failed, tar.read_bytes()) == ([], right)
    with pytest.raises(UserError, match=r"DEST '.*' lies inside SOURCE"):
        convert(open_source(str(photos), SourceOptions()), photos / "out")


def test_a_shard_set_is_a_sequence_of_samples(photos: Path, tmp_path: Path):
    masks = tmp_path / "masks" / "a"
    masks.mkdir(parents=True)
    for i in (0, 2):
        photo(30 + i, 20, seed=i).convert("L").save(masks / f"{i}.png")
    convert(
        open_source(str(photos), SourceOptions(masks=str(tmp_path / "masks"))), tmp_path / "out", workers=0
    )
    opened = ShardSet.open(str(tmp_path / "out"))
    assert repr(opened) == f"<ShardSet '{tmp_path / 'out'}': 8 samples, 2 classes, 2 masks, 1 shards>"
    samples = list(opened)
    assert [sample.sample_id for sample in samples] == list(range(8))
    assert opened[-1] == samples[7] == opened[np.int64(7)]
    for sample in samples:
        number = int(Path(opened.name(sample.sample_id)).stem)
        assert bytes(sample.data) == (photos / opened.name(sample.sample_id)).read_bytes()
        assert np.array_equal(sample.pixels(), np.asarray(photo(30 + number, 20, seed=number)))
        assert opened.classes[sample.label] == "ab"[number % 2]
        if number in (0, 2):
            wanted = np.asarray(photo(30 + number, 20, seed=number).convert("L"))
            assert np.array_equal(sample.mask_pixels(), wanted)
        else:
            assert sample.mask is None
            assert sample.mask_pixels() is None
    for position in (8, -9):
        with pytest.raises(IndexError, match="outside the 8 samples"):
            opened[position]
    split(tmp_path / "out", SplitRule(val=0.25))
    part = open_split(tmp_path / "out", "val")
    assert (
        repr(part)
        == f"<ShardSet '{tmp_path / 'out'}': split 'val', 2 of 8 samples, 2 classes, 2 masks, 1 shards>"
    )
    assert [sample.sample_id for sample in part] == part.ids.tolist()


@pytest.mark.parametrize(("dtype", "channels"), [("uint16", 5), ("float32", 1)])
def test_pixels_of_arrays(tmp_path: Path, dtype: str, channels: int):
    pixels = (np.random.default_rng(0).random((7, 9, channels)) * 200).astype(dtype)
    (tmp_path / "in").mkdir()
    np.save(tmp_path / "in" / "a.npy", pixels)
    convert(tmp_path / "in", tmp_path / "out", workers=0)
    found = ShardSet.open(tmp_path / "out")[0].pixels()
    assert found.dtype == pixels.dtype
    assert np.array_equal(found, pixels)
