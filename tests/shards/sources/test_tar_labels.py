"""Where the classes of images in tars come from; tars within tars."""

from pathlib import Path

import pytest

from fastssl.cli import main
from shards.conversion.convert import convert
from shards.errors import UserError
from shards.sources.source_kinds import open_source
from shards.sources.source_options import SourceOptions, TarOptions
from shards.sources.tar import TarSource
from tests.shards.sources.test_tar import FORMATS, jpeg, write

PLAIN = [
    ("./train/n01440764/x.JPEG", jpeg(0)),
    ("./train/n01443537/x.JPEG", jpeg(1)),
    ("./train/readme.txt", b"about"),
    ("./top.jpg", jpeg(2)),
]


def labels(where: Path, label_from: str = "auto") -> list[str | None]:
    source = TarSource(str(where), TarOptions(label_from))
    return [row["label"] for batch in source.entries() for row in batch.to_pylist()]


def test_in_an_archive_of_images_the_folders_are_classes(tmp_path: Path):
    path = write(tmp_path / "images.tar", PLAIN)
    assert labels(path) == labels(path, "folder") == ["n01440764", "n01443537", None]
    assert labels(path, "folder:1") == ["train", "train", None]
    assert labels(path, "folder:2") == ["n01440764", "n01443537", None]
    assert labels(path, "tar") == ["images"] * 3
    assert labels(path, "none") == labels(path, "sample") == [None] * 3
    dest = tmp_path / "out"
    manifest = convert(TarSource(str(path)), dest)
    assert manifest is not None
    assert manifest.classes == ["n01440764", "n01443537"]


def test_in_webdataset_tars_the_folders_are_no_classes_unless_told(tmp_path: Path):
    files = [
        ("a/0.jpg", jpeg(0)),
        ("a/0.cls", b"7"),
        ("b/1.jpg", jpeg(1)),
        ("b/2.jpg", jpeg(2)),
        ("b/2.cls", b"9"),
    ]
    path = write(tmp_path / "train-000.tar", files)
    assert labels(path) == labels(path, "sample") == ["7", None, "9"]
    assert labels(path, "folder") == ["a", "b", "b"]
    assert labels(path, "none") == [None] * 3


def test_a_tar_a_class(tmp_path: Path):
    for i, name in enumerate(("n01", "n02")):
        write(
            tmp_path / "tars" / f"{name}.tar",
            [(f"{name}_{i}.JPEG", jpeg(i)), (f"{name}_9.JPEG", jpeg(i + 5))],
        )
    assert labels(tmp_path / "tars") == [None] * 4
    assert labels(tmp_path / "tars", "tar") == ["n01", "n01", "n02", "n02"]
    source = TarSource(str(tmp_path / "tars"))
    list(source.entries())
    assert source.describe()[1] == (
        "No image has a class: --label-from folder, or tar, takes the names of the folders, or of the tars."
    )


@pytest.mark.parametrize("format", FORMATS)
def test_tars_in_a_tar_as_imagenet_has_them(tmp_path: Path, format: str):
    inner = [
        write(
            tmp_path / f"n0{k}.tar",
            [(f"n0{k}_{i}.JPEG", jpeg(10 * k + i)) for i in range(3)],
            FORMATS[format],
        )
        for k in range(3)
    ]
    content = [path.read_bytes() for path in inner]
    content[1] = content[1][: 512 + len(jpeg(10)) + 100]  # within the padding of its first image: cut short
    files = [(path.name, data) for path, data in zip(inner, content, strict=True)]
    path = write(tmp_path / "train.tar", [*files, ("last/x.jpg", jpeg(99))], FORMATS[format])
    source = TarSource(str(path))
    rows = {row["source"]: row for batch in source.entries() for row in batch.to_pylist()}
    good = {name: row for name, row in rows.items() if "@" not in name}
    assert {name: row["label"] for name, row in good.items()} == {
        **{f"train.tar/n0{k}.tar/n0{k}_{i}.JPEG": f"n0{k}" for k in (0, 2) for i in range(3)},
        "train.tar/last/x.jpg": "last",
    } | {name: "n01" for name in good if "n01.tar" in name}
    assert len(good) < 10
    for name, row in good.items():
        number = 99 if "last" in name else 10 * int(name[-8]) + int(name[-6])
        assert source.read(row).data == jpeg(number)
    [cut] = set(rows) - set(good)
    assert cut.startswith("train.tar/n01.tar@")
    assert source.describe() == [
        "Read from 1 tar and 3 tars within, in place.",
        "Classes: the folders in the tars and the names of the tars; --label-from changes that.",
    ]
    manifest = convert(source, tmp_path / "out", workers=0)
    assert manifest is not None
    assert (manifest.num_samples, manifest.num_quarantined) == (len(good), 1)


def test_label_from_is_checked_and_kept(tmp_path: Path):
    with pytest.raises(UserError, match=r"There is no --label-from 'folders'\. Did you mean 'folder'"):
        TarOptions("folders")
    with pytest.raises(UserError, match=r"--label-from tar goes with tars, and '.*' is none"):
        open_source(str(tmp_path), SourceOptions(tar=TarOptions("tar")))
    path = write(tmp_path / "a.tar", PLAIN)
    flags = ["shard", str(path), str(tmp_path / "out"), "--workers", "0"]
    assert main([*flags, "--label-from", "folder:1"]) == 0
    assert main(flags) == 2  # begun with other classes
    tar = tmp_path / "out" / "shard-000000.tar"
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-2000])
    repair = ["verify", str(tmp_path / "out"), "--repair", "--source", str(path)]
    assert main(repair) == 2
    assert main([*repair, "--label-from", "folder:1"]) == 0
    assert tar.read_bytes() == whole
