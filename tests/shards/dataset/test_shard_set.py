import dataclasses
import pickle
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format import layout
from shards.format.layout import Manifest, ShardFile


@pytest.fixture
def folder(make_folder, tmp_path: Path) -> Path:
    source = make_folder(14)
    (source / "top.jpg").write_bytes((source / "ant" / "0000.jpg").read_bytes())
    convert(source, tmp_path / "out", samples_per_shard=4)
    return tmp_path / "out"


def test_columns_are_those_of_the_table(folder: Path):
    opened = ShardSet.open(folder)
    table = pq.read_table(folder / layout.TABLE)
    assert len(opened) == opened.num_samples == 15
    assert opened.labels.dtype == np.int64
    assert opened.labels.tolist() == [-1 if label is None else label for label in table["label"].to_pylist()]
    assert -1 in opened.labels
    assert opened.widths.tolist() == table["width"].to_pylist()
    assert opened.heights.tolist() == table["height"].to_pylist()
    assert opened.classes == ["ant", "bee", "cat"]
    assert [opened.name(i) for i in range(15)] == table["source"].to_pylist()


def test_bytes_are_read_without_a_copy_and_cannot_be_changed(folder: Path, tmp_path: Path):
    opened = ShardSet.open(folder)
    for i in range(15):
        data = opened.read(i)
        assert isinstance(data, memoryview)
        assert data.readonly
        assert data == (tmp_path / "photos" / opened.name(i)).read_bytes()
    # Two reads show the same memory.
    first, second = (np.frombuffer(opened.read(3), np.uint8) for _ in range(2))
    assert first.ctypes.data == second.ctypes.data


def test_shards_are_mapped_when_first_read(folder: Path):
    opened = ShardSet.open(folder)
    assert opened._maps == {}
    opened.read(0)
    assert list(opened._maps) == [0]


@pytest.mark.parametrize("sample_id", [-1, 15])
def test_ids_outside_are_refused(folder: Path, sample_id: int):
    opened = ShardSet.open(folder)
    with pytest.raises(IndexError, match=rf"sample {sample_id} is outside 0\.\.14"):
        opened.read(sample_id)
    with pytest.raises(IndexError):
        opened.name(sample_id)


def test_pickling_reopens(folder: Path):
    opened = ShardSet.open(folder)
    opened.read(0)
    text = pickle.dumps(opened)
    assert len(text) < 1000
    again = pickle.loads(text)
    assert [bytes(again.read(i)) for i in range(15)] == [bytes(opened.read(i)) for i in range(15)]


def test_threads_may_read_at_once(folder: Path):
    opened = ShardSet.open(folder)
    wanted = [bytes(ShardSet.open(folder).read(i)) for i in range(15)]
    results: dict[int, list[bytes]] = {}
    gate = threading.Barrier(8)

    def read(worker: int):
        gate.wait()
        results[worker] = [bytes(opened.read(i)) for i in range(15)]

    threads = [threading.Thread(target=read, args=(worker,)) for worker in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(results.values()) == [wanted] * 8


def test_a_missing_shard(folder: Path):
    (folder / layout.shard_name(2)).unlink()
    with pytest.raises(UserError, match=r"shard-000002\.tar' is missing; run the same `fastssl shard`"):
        ShardSet.open(folder)


def test_a_shard_cut_short_names_both_sizes(folder: Path):
    tar = folder / layout.shard_name(1)
    size = tar.stat().st_size
    tar.write_bytes(tar.read_bytes()[:-512])
    with pytest.raises(
        UserError, match=rf"shard-000001\.tar' has {size - 512:,} bytes and should have {size:,}"
    ):
        ShardSet.open(folder)


def test_a_missing_table_and_one_of_another_conversion(folder: Path):
    table = folder / layout.TABLE
    pq.write_table(pq.read_table(table).slice(1), table)
    with pytest.raises(UserError, match=r"has 14 samples, the manifest 15"):
        ShardSet.open(folder)
    table.unlink()
    with pytest.raises(UserError, match=r"samples\.parquet' is missing"):
        ShardSet.open(folder)


def test_folders_that_are_no_shard_folders(folder: Path, tmp_path: Path):
    (folder / layout.MANIFEST).unlink()
    with pytest.raises(UserError, match="is unfinished; run the same"):
        ShardSet.open(folder)
    with pytest.raises(UserError, match=r"holds no manifest\.json"):
        ShardSet.open(tmp_path)
    with pytest.raises(UserError, match="There is no folder"):
        ShardSet.open(tmp_path / "nowhere")


def test_a_manifest_survives_saving_and_loading(tmp_path: Path):
    manifest = Manifest(
        source="é",
        kind="folder",
        seed=3,
        num_samples=2,
        num_quarantined=1,
        num_duplicates=0,
        dedupe="mark",
        samples_per_shard=128,
        classes=["a", "b"],
        channels=[3],
        dtypes=["uint8"],
        num_masks=0,
        store={"store": "keep"},
        statistics={},
        max_width=5,
        max_height=6,
        bytes=10240,
        shards=[ShardFile("shard-000000.tar", 2, 10240, "00")],
        options_sha256="11",
    )
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path) == manifest
    dataclasses.replace(manifest, format_version=3).save(tmp_path)
    with pytest.raises(UserError, match="format version 3, this fastssl reads 2"):
        Manifest.load(tmp_path)
    (tmp_path / layout.MANIFEST).write_text("{")
    with pytest.raises(UserError, match=r"manifest\.json' is damaged"):
        Manifest.load(tmp_path)


def test_names():
    assert layout.shard_name(12) == "shard-000012.tar"
    assert layout.index_name(12) == "shard-000012.idx"
    assert layout.sample_key(123) == "000000123"
