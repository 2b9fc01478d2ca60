"""Other people's readers read our shards: webdataset, DALI, tarfile, sha256sum; and our table: pandas, DuckDB, datasets."""

import hashlib
import json
import shutil
import subprocess
import tarfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.format import layout
from shards.images.policy import Policy
from tests import needs


@pytest.fixture
def folder(make_folder, tmp_path: Path) -> Path:
    convert(make_folder(11), tmp_path / "out", samples_per_shard=4)
    return tmp_path / "out"


# webdataset leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_webdataset_reads_the_same_samples(folder: Path):
    import webdataset

    opened = ShardSet.open(folder)
    urls = [str(folder / file.name) for file in opened.manifest.shards]
    samples = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [sample["__key__"] for sample in samples] == [layout.sample_key(i) for i in range(11)]
    for i, sample in enumerate(samples):
        assert sample["png" if "png" in sample else "jpg"] == opened.read(i)
        assert int(sample["cls"]) == opened.labels[i]
        assert json.loads(sample["json"]) == {
            "source": opened.name(i),
            "width": opened.widths[i],
            "height": opened.heights[i],
            "label": opened.classes[opened.labels[i]],
        }


def test_dali_reads_the_same_bytes_by_our_index(folder: Path):
    fn = needs.module("nvidia.dali.fn")
    from nvidia.dali import pipeline_def, types

    opened = ShardSet.open(folder)
    numbers = range(len(opened.manifest.shards))

    @pipeline_def(batch_size=11, num_threads=1, device_id=None)
    def pipeline():
        images, labels = fn.readers.webdataset(
            paths=[str(folder / layout.shard_name(i)) for i in numbers],
            index_paths=[str(folder / layout.index_name(i)) for i in numbers],
            ext=["jpg;png;webp", "cls"],
            missing_component_behavior="error",
            dtypes=[types.UINT8, types.UINT8],
        )
        return images, labels

    pipe = pipeline()
    pipe.build()
    images, labels = pipe.run()
    for i in range(11):
        assert images.at(i).tobytes() == opened.read(i)
        assert int(labels.at(i).tobytes()) == opened.labels[i]


def test_index_and_table_agree_with_tarfile(folder: Path):
    opened = ShardSet.open(folder)
    sample_id = 0
    for number, file in enumerate(opened.manifest.shards):
        with tarfile.open(folder / file.name) as tar:
            members = {info.name: (info.offset_data, info.size) for info in tar}
            assert all(info.isreg() and info.mtime == 0 and info.uid == 0 for info in tar)
        head, *lines = (folder / layout.index_name(number)).read_text().splitlines()
        assert head == f"v1.2 {file.num_samples}"
        assert len(lines) == file.num_samples
        indexed = {}
        for line in lines:
            words = line.split(" ")
            for ext, offset, size, name in zip(*[iter(words)] * 4, strict=True):
                assert name.endswith(f".{ext}")
                indexed[name] = (int(offset), int(size))
            image = (int(opened._offset[sample_id]), int(opened.sizes[sample_id]))
            assert (int(words[1]), int(words[2])) == image
            sample_id += 1
        assert indexed == members
    assert sample_id == 11


def test_sha256sum_checks_every_file(folder: Path):
    if not shutil.which("sha256sum"):
        pytest.skip("no sha256sum")
    command = ["sha256sum", "--check", "--strict", layout.SUMS]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checked = {line.removesuffix(": OK") for line in done.stdout.splitlines()}
    assert checked == {path.name for path in folder.iterdir()} - {layout.SUMS, layout.LOCK}


@pytest.fixture
def rows(folder: Path) -> list[dict]:
    return pq.read_table(folder / layout.TABLE).to_pylist()


def image_of(folder: Path, row) -> bytes:
    """The stored image, by what the table says alone."""
    with open(folder / layout.shard_name(int(row["shard"])), "rb") as tar:
        tar.seek(int(row["offset"]))
        return tar.read(int(row["size"]))


def test_pandas_opens_the_table(folder: Path, rows: list[dict]):
    pandas = needs.module("pandas")
    frame = pandas.read_parquet(folder / layout.TABLE)
    assert list(frame.columns) == layout.SCHEMA.names
    assert frame["source"].tolist() == [row["source"] for row in rows]
    for _, row in frame.iterrows():
        assert hashlib.sha256(image_of(folder, row)).hexdigest() == row["sha256"]


def test_duckdb_opens_the_table(folder: Path, rows: list[dict]):
    duckdb = needs.module("duckdb")
    with duckdb.connect() as connection:
        found = connection.execute(
            "SELECT ext, count(*), sum(size) FROM read_parquet($1) GROUP BY ext ORDER BY ext",
            [str(folder / layout.TABLE)],
        ).fetchall()
    wanted = {ext: [row["size"] for row in rows if row["ext"] == ext] for ext in ("jpg", "png")}
    assert found == [(ext, len(sizes), sum(sizes)) for ext, sizes in sorted(wanted.items())]


def test_hugging_face_datasets_opens_the_table(folder: Path, rows: list[dict], tmp_path: Path):
    datasets = needs.module("datasets")
    loaded = datasets.Dataset.from_parquet(str(folder / layout.TABLE), cache_dir=str(tmp_path / "cache"))
    assert loaded.to_list() == rows


# It leaves closing its files to the garbage collector.
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
def test_hugging_face_datasets_opens_shards_of_one_format(make_folder, tmp_path: Path):
    datasets = needs.module("datasets")
    folder = tmp_path / "jpegs"
    convert(make_folder(11), folder, samples_per_shard=4, policy=Policy(store="jpeg"))
    rows = pq.read_table(folder / layout.TABLE).to_pylist()
    files = [str(folder / layout.shard_name(i)) for i in range(3)]
    streamed = datasets.load_dataset(
        "webdataset",
        data_files={"train": files},
        split="train",
        streaming=True,
        cache_dir=str(tmp_path / "cache"),
    )
    samples = list(streamed.decode(False))
    assert [sample["__key__"] for sample in samples] == [row["key"] for row in rows]
    for sample, row in zip(samples, rows, strict=True):
        assert sample["json"]["source"] == row["source"]
        assert sample["cls"] == row["label"]
        assert sample[row["ext"]]["bytes"] == image_of(folder, row)
