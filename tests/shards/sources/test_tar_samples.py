"""Names in tars: which mask, class and text belong to which image, and what is hidden."""

from pathlib import Path

import pytest

from shards.format.tar_reader import split_name
from shards.sources.tar import TarSource
from tests.pictures import encoded, picture
from tests.shards.sources.test_tar import jpeg, mask, write


def rows_of(path: Path) -> dict[str, dict]:
    return {row["source"][6:]: row for batch in TarSource(str(path)).entries() for row in batch.to_pylist()}


def test_images_whose_names_differ_after_the_first_dot_get_their_own_masks(tmp_path: Path):
    files = [
        (f"tiles/tile_22.{i}.{ext}", data)
        for i in (1, 2, 3)
        for ext, data in (("jpg", jpeg(i)), ("mask.png", mask(i)))
    ]
    path = write(tmp_path / "a.tar", [*files, ("tiles/tile_22.4.jpg", jpeg(4))])
    source = TarSource(str(path))
    rows = {row["source"]: row for batch in source.entries() for row in batch.to_pylist()}
    assert {name: row["mask"] for name, row in rows.items()} == {
        **{f"a.tar/tiles/tile_22.{i}.jpg": f"a.tar/tiles/tile_22.{i}.mask.png" for i in (1, 2, 3)},
        "a.tar/tiles/tile_22.4.jpg": None,
    }
    for i in (1, 2, 3):
        assert source.read(rows[f"a.tar/tiles/tile_22.{i}.jpg"]).mask == mask(i)
    assert {row["label"] for row in rows.values()} == {"tiles"}
    assert {row["group"] for row in rows.values()} == {None}


def test_a_date_in_a_name_makes_no_group(tmp_path: Path):
    names = [f"IMG 12.03.2021 10.{minute}.jpg" for minute in range(15, 20)]
    rows = rows_of(write(tmp_path / "a.tar", [(name, jpeg(i)) for i, name in enumerate(names)]))
    assert {name: row["group"] for name, row in rows.items()} == dict.fromkeys(names)


def test_numbered_images_get_their_own_classes_and_texts(tmp_path: Path):
    files = [
        (f"t.{i}.{ext}", data)
        for i in (1, 2)
        for ext, data in (("jpg", jpeg(i)), ("cls", b"%d" % i), ("txt", b"x%d" % i))
    ]
    source = TarSource(str(write(tmp_path / "a.tar", files)))
    rows = [row for batch in source.entries() for row in batch.to_pylist()]
    assert [row["label"] for row in rows] == ["1", "2"]
    assert [source.read(row).facts for row in rows] == [{"txt": "x1"}, {"txt": "x2"}]
    assert source.left_out() == ""


def test_views_of_one_sample_share_what_is_said_of_it(tmp_path: Path):
    files = [
        ("0.rgb.png", encoded(picture(1), "PNG")),
        ("0.nir.png", encoded(picture(2), "PNG")),
        ("0.mask.png", mask(3)),
        ("0.cls", b"5"),
        ("1.1.jpg", jpeg(4)),
        ("1.2.jpg", jpeg(5)),
        ("1.cls", b"6"),
        ("2.v1.jpg", jpeg(6)),
        ("2.seg.png", mask(6)),
        ("2.v1.seg.png", mask(5)),
    ]
    rows = rows_of(write(tmp_path / "a.tar", files))
    assert {name: (row["label"], row["mask"], row["group"]) for name, row in rows.items()} == {
        "0.rgb.png": ("5", "a.tar/0.mask.png", "a.tar/0"),
        "0.nir.png": ("5", "a.tar/0.mask.png", "a.tar/0"),
        "1.1.jpg": ("6", None, "a.tar/1"),
        "1.2.jpg": ("6", None, "a.tar/1"),
        "2.v1.jpg": (None, "a.tar/2.v1.seg.png", None),
    }


@pytest.mark.parametrize(
    "hidden",
    ["data/a/.ipynb_checkpoints/0.jpg", "./.git/x.jpg", "a/.0.jpg", "__MACOSX/a/0.jpg", "a/__MACOSX/0.jpg"],
)
def test_hidden_folders_are_no_classes(tmp_path: Path, hidden: str):
    path = write(
        tmp_path / "a.tar", [("../data/a/0.jpg", jpeg(0)), (hidden, jpeg(1)), ("./data/b.c/1.jpg", jpeg(2))]
    )
    assert {name: row["label"] for name, row in rows_of(path).items()} == {
        "../data/a/0.jpg": "a",
        "./data/b.c/1.jpg": "b.c",
    }
    assert split_name(hidden) is None
