"""Nothing of a source vanishes: it is taken, or named and counted."""

import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.cli import main
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.images.pixels import BadImage, read_npy
from shards.images.proof import prove
from shards.sources import tar as tar_source
from shards.sources.image_folder import FolderSource
from shards.sources.tar import TarSource
from shards.sources.tar_labels import LabelRule
from shards.storage.opening import open_place
from tests.pictures import encoded, picture
from tests.shards.sources.test_file_list import samples_json
from tests.shards.sources.test_tar import FORMATS, jpeg, write


def rows_of(source: TarSource | FolderSource) -> dict[str, dict]:
    return {row["source"]: row for batch in source.entries() for row in batch.to_pylist()}


def add_link(path: Path, name: str, target: str, kind: bytes, format: int) -> None:
    with tarfile.open(path, "a", format=format) as tar:
        info = tarfile.TarInfo(name)
        info.type, info.linkname = kind, target
        tar.addfile(info)


@pytest.mark.parametrize("format", FORMATS.values(), ids=FORMATS)
def test_a_hard_link_is_the_image_that_it_names(tmp_path: Path, format: int):
    path = write(tmp_path / "x.tar", [("./a/1.jpg", jpeg(1)), ("a/2.jpg", jpeg(2))], format)
    add_link(path, "b/1.jpg", "a/1.jpg", tarfile.LNKTYPE, format)
    add_link(path, "c/1.jpg", "./b/1.jpg", tarfile.LNKTYPE, format)
    with tarfile.open(path, "a", format=format) as tar:
        info = tarfile.TarInfo("d/3.jpg")
        info.size = len(jpeg(3))
        tar.addfile(info, io.BytesIO(jpeg(3)))
    add_link(path, "e/3.jpg", "d/3.jpg", tarfile.LNKTYPE, format)
    source = TarSource(str(path))
    rows = rows_of(source)
    content = {name: source.read(row).data for name, row in rows.items()}
    assert content == {
        "x.tar/./a/1.jpg": jpeg(1),
        "x.tar/a/2.jpg": jpeg(2),
        "x.tar/b/1.jpg": jpeg(1),
        "x.tar/c/1.jpg": jpeg(1),
        "x.tar/d/3.jpg": jpeg(3),
        "x.tar/e/3.jpg": jpeg(3),
    }
    assert [row["label"] for row in rows.values()] == ["a", "a", "b", "c", "d", "e"]
    assert source.warnings() == []


def test_special_members_are_named_and_counted(tmp_path: Path):
    path = write(tmp_path / "x.tar", [("a/1.jpg", jpeg(1))])
    for i, (kind, target) in enumerate(
        [
            (tarfile.SYMTYPE, "1.jpg"),
            (tarfile.SYMTYPE, "1.jpg"),
            (tarfile.LNKTYPE, "gone.jpg"),
            (tarfile.FIFOTYPE, ""),
        ]
    ):
        add_link(path, f"a/{2 + i}.jpg", target, kind, tarfile.PAX_FORMAT)
    source = TarSource(str(path))
    assert list(rows_of(source)) == ["x.tar/a/1.jpg"]
    [warning] = source.warnings()
    assert warning == (
        "members of other kinds are left out: 2 symbolic links (such as 'a/2.jpg'), 1 hard links to files that are not in the tar "
        "(such as 'a/4.jpg'), 1 pipes."
    )
    assert source.left_out().startswith("2 symbolic links, 1 hard links")


def six(*kinds: str) -> list[tuple[str, bytes]]:
    made: dict[str, Callable[[int], bytes]] = {
        "jpg": jpeg,
        "cls": lambda i: b"%d" % (i % 3),
        "json": lambda i: json.dumps({"number": i}).encode(),
        "mask.png": lambda i: encoded(Image.fromarray(np.full((16, 24), i, np.uint8)), "PNG"),
    }
    return [(f"s/{i}.{kind}", made[kind](i)) for kind in kinds for i in range(6)]


@pytest.mark.parametrize("kinds", [("jpg", "cls", "mask.png", "json"), ("json", "mask.png", "cls", "jpg")])
def test_members_of_one_sample_need_not_be_neighbours(tmp_path: Path, kinds: tuple[str, ...]):
    source = TarSource(str(write(tmp_path / "x.tar", six(*kinds))))
    manifest = convert(source, tmp_path / "out", workers=0)
    assert manifest is not None
    opened, about = ShardSet.open(tmp_path / "out"), samples_json(tmp_path / "out")
    assert len(about) == 6
    for sample in range(6):
        i = int(opened.name(sample)[len("x.tar/s/")])
        name = f"x.tar/s/{i}.jpg"
        assert about[name]["label"] == str(i % 3)
        assert about[name]["number"] == i
        stored = opened.read_mask(sample)
        assert stored is not None
        assert (np.asarray(Image.open(io.BytesIO(stored))) == i).all()
    assert source.warnings() == []


def test_members_too_far_from_their_image_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tar_source, "_HELD", 4)
    source = TarSource(str(write(tmp_path / "x.tar", six("jpg", "cls"))))
    rows = rows_of(source)
    assert len(rows) == 6
    lost = sum(row["label"] not in ("0", "1", "2") for row in rows.values())
    assert source.warnings()[-1] == (
        f"members of other kinds are left out: {lost} .cls of no image (such as 's/0.cls')."
    )


def test_what_belongs_to_no_image_is_counted(tmp_path: Path):
    files = [
        ("a.jpg", jpeg(0)),
        ("a.cls", b"1"),
        ("b.cls", b"2"),
        ("b.mask.png", b"x"),
        ("c.json", b"{}"),
        ("noise", b"x"),
    ]
    source = TarSource(str(write(tmp_path / "x.tar", files)))
    assert len(rows_of(source)) == 1
    assert set(source.left_out().split(", ")) == {
        "1 .cls of no image",
        "1 .png of no image",
        "1 .json of no image",
        "1 without extension",
    }


@pytest.mark.parametrize(
    ("label", "cls", "wanted_class", "kept"),
    [
        ([0, 3], None, None, [0, 3]),
        ({"a": 1}, b"4", "4", {"a": 1}),
        (0.5, None, None, 0.5),
        (3.0, None, "3", None),
        (3, None, "3", None),
        (3, b"3", "3", None),
        (3, b"4", "4", 3),
        ("dog", b"4", "dog", None),
        (None, b"4", "4", None),
    ],
)
def test_a_label_that_is_no_class_is_kept(
    tmp_path: Path, label: object, cls: bytes | None, wanted_class: str | None, kept: object
):
    files = [("a.jpg", jpeg(0)), ("a.json", json.dumps({"label": label, "other": 1}).encode())]
    source = TarSource(str(write(tmp_path / "x.tar", files + ([("a.cls", cls)] if cls else []))))
    convert(source, tmp_path / "out", workers=0)
    [about] = samples_json(tmp_path / "out").values()
    assert about["other"] == 1
    assert about.get("label") == wanted_class
    assert about.get("original_label") == kept
    assert any("has a `label` that is not their class" in text for text in source.warnings()) == (
        kept is not None
    )


def test_the_label_of_the_json_stays_where_the_folder_is_the_class(tmp_path: Path):
    path = write(tmp_path / "x.tar", [("ant/a.jpg", jpeg(0)), ("ant/a.json", b'{"label": "dog"}')])
    assert main(["shard", str(path), str(tmp_path / "out"), "--workers", "0", "--label-from", "folder"]) == 0
    [about] = samples_json(tmp_path / "out").values()
    assert (about["label"], about["original_label"]) == ("ant", "dog")
    assert LabelRule("folder", 0).asks_sample is False


def test_images_of_every_kind_that_is_read_are_found_in_folders(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    photos = tmp_path / "photos"
    photos.mkdir()
    for number, (suffix, kind, mode) in enumerate(
        [
            ("jfif", "JPEG", "RGB"),
            ("jpe", "JPEG", "RGB"),
            ("ppm", "PPM", "RGB"),
            ("PGM", "PPM", "L"),
            ("pbm", "PPM", "1"),
            ("gif", "GIF", "RGB"),
        ]
    ):
        (photos / f"{number}.{suffix}").write_bytes(encoded(picture(number, mode=mode), kind))
    for suffix in ("heic", "avif", "md", "json", "xml", "csv", "log", "xyz"):
        (photos / f"x.{suffix}").write_bytes(b"x")
    assert main(["shard", str(photos), str(tmp_path / "out"), "--workers", "0"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert set(samples_json(tmp_path / "out")) == {"0.jfif", "1.jpe", "2.ppm", "3.PGM", "4.pbm", "5.gif"}
    unread = (
        "images of kinds that are not read are left out: 1 .heic, 1 .avif; turn these into JPEG or PNG first."
    )
    assert unread in text or unread.replace("1 .heic, 1 .avif", "1 .avif, 1 .heic") in text
    end = text[text.index("left out") :]
    assert all(f"1 .{suffix}" in end for suffix in ("heic", "avif", "md", "json", "xml", "csv", "log", "xyz"))
    assert "named .jfif" not in text


def test_files_beside_tars_are_counted(tmp_path: Path):
    write(tmp_path / "tars" / "A.TAR", [("a.jpg", jpeg(0))])
    write(tmp_path / "tars" / "b.tar", [("b.jpg", jpeg(1))])
    for name in ("c.tar.gz", "d.tgz", "notes.txt", ".hidden"):
        (tmp_path / "tars" / name).write_bytes(b"x")
    source = TarSource(str(tmp_path / "tars"))
    assert set(rows_of(source)) == {"A.TAR/a.jpg", "b.tar/b.jpg"}
    assert source.warnings() == ["files beside the tars are left out: 1 .gz, 1 .tgz, 1 .txt."]


DEEP = np.array([[[0, 256, 4095]], [[1, 2, 300]]], np.uint16)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"P6\n1 2\n# a comment\n4095\n" + DEEP.astype(">u2").tobytes(), DEEP),
        (b"P3 1 2 4095\n0 256 4095 # here, too\n1 2 300\n", DEEP),
        (b"P5 2 1 65535\n\x01\x02\xff\xff", np.array([[[258], [65535]]], np.uint16)),
        (b"P2\n2 1\n1000\n7 1000", np.array([[[7], [1000]]], np.uint16)),
    ],
)
def test_a_pnm_of_more_than_8_bits_keeps_its_values(data: bytes, expected: np.ndarray):
    stored = prove(data, "a.ppm")
    assert (stored.ext, stored.dtype) == ("npy", "uint16")
    assert np.array_equal(read_npy(stored.data), expected)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"P6 1 2 4095\n" + bytes(11), "holds 5 of 6 values"),
        (b"P2 2 1 1000\n7 1001", "holds 1001, more than the 1000"),
        (b"P2 2 1 1000\n7 x", "no numbers"),
        (b"P5 4 4 255\n" + bytes(15), "damaged"),
    ],
)
def test_a_damaged_pnm_is_refused(data: bytes, words: str):
    with pytest.raises(BadImage, match=words):
        prove(data, "a.pgm")


def test_a_folder_says_what_it_leaves_out(tmp_path: Path):
    for name in ("a.jpg", "b.jp2", "c.txt", "d"):
        (tmp_path / name).write_bytes(b"x")
    source = FolderSource(open_place(tmp_path))
    assert list(rows_of(source)) == ["a.jpg"]
    assert sorted(source.left_out().split(", ")) == ["1 .jp2", "1 .txt", "1 without extension"]


def test_a_class_that_is_too_long_to_be_one_is_counted(tmp_path: Path):
    files = [("a.jpg", jpeg(0)), ("a.cls", b"7" * 2000), ("b.jpg", jpeg(1)), ("b.cls", b"7")]
    source = TarSource(str(write(tmp_path / "x.tar", files)))
    assert [row["label"] for row in rows_of(source).values()] == [None, "7"]
    assert source.left_out() == "1 class in a member of more than 1.0 kB"
    assert source.warnings()[-1].endswith("(such as 'a.cls').")
