"""Equal pixels among JPEGs, of which small copies only are decoded unless these are equal and the files are not."""

import hashlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image

from shards.conversion import duplicates, shard_maker
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.format import layout
from shards.images import jpeg
from shards.images.pixels import pixels_hash
from tests.pictures import encoded, exif, fingerprints, photo

JPEG = encoded(photo(96, 64), "JPEG", quality=90)
TWINS = {
    "a.jpg": JPEG,
    "copy.jpg": JPEG,
    "progressive.jpg": encoded(photo(96, 64), "JPEG", quality=90, progressive=True),
    "exif.JPG": encoded(photo(96, 64), "JPEG", quality=90, exif=exif(1)),
    "comment.jpeg": JPEG[:2] + b"\xff\xfe\0\x06abcd" + JPEG[2:],
}


def near_twin() -> bytes:
    """A JPEG that differs from grey by high frequencies only: at an eighth of its size it is grey."""
    pixels = np.full((64, 96), 128, np.uint8)
    pixels[::2] += 40
    pixels[1::2] -= 40
    return encoded(Image.fromarray(pixels), "JPEG", quality=100)


def folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir()
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def rows_of(shards: Path) -> dict[str, dict]:
    return {row["source"]: row for row in pq.read_table(shards / layout.TABLE).to_pylist()}


def test_equal_images_of_other_bytes_are_found(tmp_path: Path):
    grey = encoded(Image.new("L", (96, 64), 128), "JPEG", quality=100)
    others = {"other.jpg": encoded(photo(96, 64, seed=1), "JPEG"), "grey.jpg": grey, "lines.jpg": near_twin()}
    header = jpeg.jpeg_header(grey)
    assert header is not None
    small = [jpeg.eighth(data, header) for data in (grey, near_twin())]
    assert np.array_equal(*small)
    assert not np.array_equal(*(simplejpeg.decode_jpeg(data, "GRAY") for data in (grey, near_twin())))

    manifest = convert(folder(tmp_path / "in", TWINS | others), tmp_path / "out", samples_per_shard=3)
    assert manifest is not None
    assert manifest.num_duplicates == len(TWINS) - 1
    rows = rows_of(tmp_path / "out")
    assert Counter(row["pixels_hash"] for row in rows.values()).most_common(2)[0][1] == len(TWINS)
    assert len({rows[name]["pixels_hash"] for name in TWINS}) == 1
    assert {row["stored"] for row in rows.values()} == {"kept"}
    # Where files differ and small copies do not, the hash is that of all pixels.
    for name in ("grey.jpg", "lines.jpg"):
        decoded = simplejpeg.decode_jpeg(others[name], "GRAY")
        assert rows[name]["pixels_hash"] == pixels_hash(decoded)


def test_dropped_duplicates_of_jpegs_are_those_that_were_marked(tmp_path: Path):
    source = folder(tmp_path / "in", TWINS | {"other.jpg": encoded(photo(96, 64, seed=1), "JPEG")})
    convert(source, tmp_path / "mark", samples_per_shard=2)
    marked = {row["source"] for row in rows_of(tmp_path / "mark").values() if row["duplicate_of"] is not None}
    assert len(marked) == len(TWINS) - 1
    manifest = convert(source, tmp_path / "drop", samples_per_shard=2, dedupe="drop")
    assert manifest is not None
    assert manifest.num_duplicates == len(marked)
    assert set(rows_of(tmp_path / "drop")) == set(TWINS) - marked | {"other.jpg"}


def test_beside_other_formats_jpegs_are_decoded_whole(tmp_path: Path):
    pixels = simplejpeg.decode_jpeg(JPEG)
    files = {"a.jpg": JPEG, "b.png": encoded(Image.fromarray(pixels), "PNG")}
    manifest = convert(folder(tmp_path / "in", files), tmp_path / "out")
    assert manifest is not None
    assert manifest.num_duplicates == 1
    assert {row["pixels_hash"] for row in rows_of(tmp_path / "out").values()} == {pixels_hash(pixels)}


def test_a_turned_image_is_found_by_its_turned_copy(tmp_path: Path):
    """Sides of whole blocks: then the turned small copy is the small copy of the turned image."""
    flat = Image.fromarray(
        np.kron(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10, np.ones((8, 8), np.uint8))
    )
    turned = flat.transpose(Image.Transpose.ROTATE_270)
    files = {
        "exif.jpg": encoded(flat, "JPEG", quality=100, exif=exif(6)),
        "turned.jpg": encoded(turned, "JPEG", quality=100),
    }
    assert (simplejpeg.decode_jpeg(files["turned.jpg"], "GRAY")[:, :, 0] == np.asarray(turned)).all()
    manifest = convert(folder(tmp_path / "in", files), tmp_path / "out")
    assert manifest is not None
    assert manifest.num_duplicates == 1


def test_which_images_are_decoded_whole_changes_nothing_but_the_statistics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    source = folder(
        tmp_path / "in", TWINS | {f"{i}.jpg": encoded(photo(96, 64, seed=i), "JPEG") for i in range(1, 9)}
    )
    convert(source, tmp_path / "all", samples_per_shard=4)
    monkeypatch.setattr(shard_maker, "STATISTICS_IMAGES", 3)
    decoded = []
    whole = duplicates.simple_jpeg
    monkeypatch.setattr(duplicates, "simple_jpeg", lambda *args: (decoded.append(1), whole(*args))[1])
    convert(source, tmp_path / "some", samples_per_shard=4)
    assert (
        2 <= len(decoded) <= 3
    )  # of four files, without those decoded for the statistics; one of them is there twice
    found, wanted = fingerprints(tmp_path / "some"), fingerprints(tmp_path / "all")
    assert [name for name in wanted if found[name] != wanted[name]] == [layout.SUMS, layout.MANIFEST]
    pixels = {
        name: ShardSet.open(tmp_path / name).manifest.statistics["uint8/3"]["pixels"]
        for name in ("all", "some")
    }
    num = len(TWINS) + 8
    assert pixels["some"] / pixels["all"] == -(-num // (num // 3)) / num


def test_hashes_of_many_samples_are_those_of_a_slow_search(tmp_path: Path):
    """Files of few kinds, in random order over several shards, against a dictionary."""
    rng = np.random.default_rng(0)
    kinds = [*TWINS.values(), near_twin(), *(encoded(photo(96, 64, seed=i), "JPEG") for i in range(1, 4))]
    files = {f"{i:02d}.jpg": kinds[int(rng.integers(len(kinds)))] for i in range(40)}
    convert(folder(tmp_path / "in", files), tmp_path / "out", samples_per_shard=7)
    rows = pq.read_table(tmp_path / "out" / layout.TABLE).to_pylist()
    first: dict[str, int] = {}
    for row in rows:
        colours = "GRAY" if row["channels"] == 1 else "RGB"
        pixels = simplejpeg.decode_jpeg(files[row["source"]], colours)
        key = hashlib.sha256(pixels.tobytes()).hexdigest()
        assert row["duplicate_of"] == first.get(key)
        first.setdefault(key, row["sample_id"])
