"""A finished shard folder, sharded anew: nothing that was known of a sample is lost."""

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format import layout
from shards.sources.file_list import ListSource
from shards.sources.shard_folder import ShardFolderSource, read_only
from shards.sources.source_kinds import open_source
from shards.storage.opening import open_place
from tests import needs
from tests.pictures import encoded, fingerprints, picture
from tests.shards.sources.test_file_list import samples_json


@pytest.fixture
def first(tmp_path: Path) -> Path:
    """10 samples in shards of 4: labels, groups, masks of some, two further columns; one duplicate; one quarantined."""
    folder = tmp_path / "set"
    folder.mkdir()
    for i in range(10):
        (folder / f"{i}.jpg").write_bytes(encoded(picture(i % 9), "JPEG"))
        mask = Image.fromarray(np.full((16, 24), i, np.uint8))
        (folder / f"m{i}.png").write_bytes(encoded(mask, "PNG"))
    (folder / "10.jpg").write_text("text")
    table = {
        "path": [f"{i}.jpg" for i in range(11)],
        "label": [None if i == 3 else f"c{i % 4}" for i in range(11)],
        "mask": [f"m{i}.png" if i % 2 else None for i in range(11)],
        "group": [f"g{i // 3}" for i in range(11)],
        "cloud": [i / 8 for i in range(11)],
        "tags": [["a", str(i)] for i in range(11)],
    }
    pq.write_table(pa.table(table), folder / "list.parquet")
    convert(ListSource(str(folder / "list.parquet")), tmp_path / "first", samples_per_shard=4)
    return tmp_path / "first"


def rows(out: Path) -> dict[str, dict]:
    return {row["source"]: row for row in pq.read_table(out / layout.TABLE).to_pylist()}


SAME = (
    "ext",
    "width",
    "height",
    "label",
    "group",
    "source",
    "sha256",
    "pixels_hash",
    "stored",
    "cloud",
    "tags",
    "mask_size",
)


def test_all_that_is_known_comes_along(first: Path, tmp_path: Path):
    source = open_source(str(first))
    assert source.kind == "shards"
    manifest = convert(source, tmp_path / "out", samples_per_shard=3, seed=7)
    assert manifest is not None
    assert (manifest.num_samples, manifest.num_masks, manifest.num_duplicates) == (10, 5, 1)
    assert manifest.classes == ["c0", "c1", "c2", "c3"]
    before, after = rows(first), rows(tmp_path / "out")
    assert {name: [row[k] for k in SAME] for name, row in before.items()} == {
        name: [row[k] for k in SAME] for name, row in after.items()
    }
    assert samples_json(first) == samples_json(tmp_path / "out")
    old, new = ShardSet.open(first), ShardSet.open(tmp_path / "out")
    for name, row in before.items():
        assert bytes(old.read(row["sample_id"])) == bytes(new.read(after[name]["sample_id"]))
        one, other = old.read_mask(row["sample_id"]), new.read_mask(after[name]["sample_id"])
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert bytes(one) == bytes(other)
            assert np.asarray(Image.open(io.BytesIO(one)))[0, 0] == int(name[0])


def test_facts_that_no_column_holds_come_along(tmp_path: Path):
    rasterio = needs.module("rasterio")
    from shards.sources.raster_tiles import RasterSource
    from shards.sources.source_options import RasterOptions

    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", width=8, height=8, count=2, dtype="uint8",
        transform=rasterio.Affine(1, 0, 5, 0, -1, 5), crs="EPSG:4326",
    ) as file:  # fmt: skip
        file.write(np.arange(128, dtype=np.uint8).reshape(2, 8, 8))
    convert(RasterSource(str(tmp_path / "a.tif"), RasterOptions(tile=4)), tmp_path / "first")
    convert(ShardFolderSource(str(tmp_path / "first")), tmp_path / "again", samples_per_shard=2)
    about = samples_json(tmp_path / "again")
    assert about == samples_json(tmp_path / "first")
    assert about["a.tif@4,0"]["nodata_share"] == 0
    assert {row["ext"] for row in rows(tmp_path / "again").values()} == {"npy"}


def test_some_samples_only(first: Path, tmp_path: Path):
    names = pq.read_table(first / layout.TABLE)["source"].to_pylist()
    (tmp_path / "ids.txt").write_text("7\n\n2\n7\n")
    ids = read_only(str(first), str(tmp_path / "ids.txt"))
    convert(ShardFolderSource(str(first), ids), tmp_path / "out")
    assert set(rows(tmp_path / "out")) == {names[2], names[7]}
    pq.write_table(pa.table({"sample_id": [1, 4], "x": [0, 0]}), tmp_path / "ids.parquet")
    assert read_only(str(first), str(tmp_path / "ids.parquet")).tolist() == [1, 4]
    with pytest.raises(UserError, match=r"names the sample 10, but '.*first' has the samples 0 to 9"):
        ShardFolderSource(str(first), np.array([3, 10]))
    with pytest.raises(UserError, match="--only names no samples"):
        ShardFolderSource(str(first), np.array([], np.int64))
    (tmp_path / "ids.txt").write_text("7\nx2\n")
    with pytest.raises(UserError, match=r"ids\.txt', line 2: 'x2' is no sample id"):
        read_only(str(first), str(tmp_path / "ids.txt"))
    with pytest.raises(UserError, match=r"There is no file 'a/b\.txt'"):
        read_only(str(first), "a/b.txt")


def test_a_split_only(first: Path, tmp_path: Path):
    from shards.splits.split_rules import SplitRule
    from shards.splits.split_table import open_split, split

    split(open_place(first), SplitRule(val=0.3))
    ids = read_only(str(first), "val")
    assert ids.tolist() == open_split(first, "val").ids.tolist()
    assert 0 < len(ids) < 10
    convert(ShardFolderSource(str(first), ids), tmp_path / "out")
    names = pq.read_table(first / layout.TABLE)["source"].to_pylist()
    assert set(rows(tmp_path / "out")) == {names[i] for i in ids}


def test_a_folder_that_is_not_whole(first: Path, tmp_path: Path):
    tar = first / layout.shard_name(1)
    data = tar.read_bytes()
    tar.write_bytes(data[:-1])
    with pytest.raises(UserError, match=rf"has {len(data) - 1:,} bytes and should have {len(data):,}"):
        ShardFolderSource(str(first))
    tar.unlink()
    with pytest.raises(UserError, match="is missing; run the `fastssl shard` command that made it"):
        ShardFolderSource(str(first))
    (first / layout.MANIFEST).unlink()
    with pytest.raises(UserError, match="is unfinished"):
        open_source(str(first))


def test_a_manifest_of_something_else_makes_no_shard_folder(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "manifest.json").write_text("{}")
    assert open_source(str(tmp_path / "photos")).kind == "folder"


def test_moves_and_interruptions_do_not_change_a_byte(first: Path, tmp_path: Path):
    convert(ShardFolderSource(str(first)), tmp_path / "out", samples_per_shard=3)
    wanted = fingerprints(tmp_path / "out")
    (tmp_path / "moved").mkdir()
    moved = first.rename(tmp_path / "moved" / "first")
    (tmp_path / "out" / layout.shard_name(1)).unlink()
    for out in ("out", "again"):
        convert(ShardFolderSource(str(moved)), tmp_path / out, samples_per_shard=3)
        assert fingerprints(tmp_path / out) == wanted
    source = ShardFolderSource(str(moved))
    row = next(source.entries()).to_pylist()[0]
    moved.rename(tmp_path / "gone")
    with pytest.raises(UserError, match="is no longer there"):
        source.read(row)
