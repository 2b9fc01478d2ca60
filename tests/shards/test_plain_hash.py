"""Hashes of pixels in a set of JPEGs: of chroma as it is stored, since smoothing it costs time and tells nothing more."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import simplejpeg
from PIL import Image

from shards import layout
from shards.convert import convert
from shards.image import prove
from shards.jpeg import plain_pixels
from shards.pixels import BadImage, pixels_hash
from shards.policy import Policy
from tests.pictures import encoded, exif, photo
from tests.shards.nasty import cases

JPEG = encoded(photo(90, 70), "JPEG", quality=90)


def test_chroma_is_repeated():
    plain, smooth = plain_pixels(JPEG), simplejpeg.decode_jpeg(JPEG)
    assert plain is not None
    assert plain.shape == smooth.shape == (70, 90, 3)
    assert (plain != smooth).any()
    # Without its luma a pixel has the colour of its block of 2 x 2: differences between channels are equal up to the clamp to 0..255.
    inside = ((plain > 0) & (plain < 255)).all(axis=2).reshape(35, 2, 45, 2).all(axis=(1, 3))
    red, blue = (plain[:, :, c].astype(int) - plain[:, :, 1] for c in (0, 2))
    for channel in (red, blue):
        blocks = channel.reshape(35, 2, 45, 2)
        assert (np.ptp(blocks, axis=(1, 3))[inside] == 0).all()
    assert inside.mean() > 0.5


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_without_coarse_chroma_nothing_differs(mode: str):
    data = encoded(photo(90, 70).convert(mode), "JPEG", subsampling=0)
    plain = plain_pixels(data)
    assert plain is not None
    assert (plain == simplejpeg.decode_jpeg(data, "GRAY" if mode == "L" else "RGB")).all()


def test_equal_images_of_other_bytes_are_found_among_jpegs(tmp_path: Path):
    source = tmp_path / "in"
    source.mkdir()
    twins = {
        "a.jpg": JPEG,
        "progressive.jpg": encoded(photo(90, 70), "JPEG", quality=90, progressive=True),
        "exif.JPG": encoded(photo(90, 70), "JPEG", quality=90, exif=exif(1)),
        "comment.jpeg": JPEG[:2] + b"\xff\xfe\0\x06abcd" + JPEG[2:],
    }
    for name, data in twins.items():
        (source / name).write_bytes(data)
    (source / "other.jpg").write_bytes(encoded(photo(90, 70, seed=1), "JPEG"))
    manifest = convert(source, tmp_path / "out")
    assert manifest is not None
    assert manifest.num_duplicates == 3
    rows = {row["source"]: row for row in pq.read_table(tmp_path / "out" / layout.TABLE).to_pylist()}
    assert len({rows[name]["pixels_hash"] for name in twins}) == 1
    assert {rows[name]["stored"] for name in twins} == {"kept"}
    plain = plain_pixels(JPEG)
    assert plain is not None
    assert rows["a.jpg"]["pixels_hash"] == pixels_hash(plain)


def test_beside_other_formats_jpegs_are_decoded_as_everyone_does(tmp_path: Path):
    source = tmp_path / "in"
    source.mkdir()
    (source / "a.jpg").write_bytes(JPEG)
    (source / "b.png").write_bytes(encoded(Image.fromarray(simplejpeg.decode_jpeg(JPEG)), "PNG"))
    manifest = convert(source, tmp_path / "out")
    assert manifest is not None
    assert manifest.num_duplicates == 1


def test_turned_images_are_hashed_turned():
    wide = encoded(photo(96, 64), "JPEG", quality=95, exif=exif(6))
    stored = prove(wide, "x.jpg", plain=True)
    plain = plain_pixels(wide)
    assert plain is not None
    assert stored.turn == 6
    assert stored.pixels_hash == pixels_hash(np.ascontiguousarray(np.rot90(plain, -1)))
    assert stored.data == prove(wide, "x.jpg").data


def test_nasty_images_are_stored_or_refused_all_the_same():
    told = 0
    for case in cases().values():
        if not case.data.startswith(b"\xff\xd8"):
            continue
        found = []
        for plain in (False, True):
            try:
                stored = prove(case.data, "x.jpg", Policy(), plain=plain)
                found.append((stored.data, stored.ext, stored.width, stored.height, stored.how, stored.turn))
            except BadImage as fault:
                found.append(fault.reason)
        assert found[0] == found[1]
        told += 1
    assert told > 15
