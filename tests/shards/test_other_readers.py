"""Other people's readers read our shards: webdataset, DALI, tarfile."""

import json
import tarfile
from pathlib import Path

import pytest

from shards import layout
from shards.convert import convert
from shards.read import ShardSet


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
    fn = pytest.importorskip("nvidia.dali.fn")
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
