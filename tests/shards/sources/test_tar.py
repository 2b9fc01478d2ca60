"""WebDataset tars of every format, whole and broken, to be sharded anew."""

import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format import layout
from shards.format.tar_reader import Cut, TarMember, members, split_name
from shards.sources.file_set import expand_braces
from shards.sources.source_kinds import check_apart, open_source
from shards.sources.source_options import ListOptions, SourceOptions
from shards.sources.tar import TarSource
from shards.storage.opening import open_place
from tests.pictures import encoded, fingerprints, picture
from tests.shards.sources.test_file_list import samples_json

ROOT = Path(__file__).parents[3]
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
NASTY = [
    "../../etc/passwd.jpg",
    "/etc/shadow.jpg",
    "a b/ü 雪.jpg",
    "x" * 90 + "/" + "y" * 90 + ".jpg",
    "new\nline.JPG",
    "v1.jpg",
]


def jpeg(seed: int) -> bytes:
    return encoded(picture(seed), "JPEG")


def mask(seed: int) -> bytes:
    return encoded(Image.fromarray(np.full((16, 24), seed % 7, np.uint8)), "PNG")


def write(path: Path, files: Sequence[tuple[str, bytes]], format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=format) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def found(path: Path) -> list[TarMember]:
    with open(path, "rb") as file:
        return list(members(file, path.stat().st_size))


def listed(where: Path | str) -> dict[str, dict]:
    return {row["source"]: row for batch in TarSource(str(where)).entries() for row in batch.to_pylist()}


@pytest.mark.parametrize("format", FORMATS)
def test_members_are_those_of_tarfile(tmp_path: Path, format: str):
    path = write(tmp_path / "a.tar", [(name, jpeg(i)) for i, name in enumerate(NASTY)], FORMATS[format])
    with tarfile.open(path, "a", format=FORMATS[format]) as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo("other.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    with tarfile.open(path) as tar:
        wanted = [(m.name, m.offset_data, m.size) for m in tar if m.isreg()]
    assert [(m.name, m.offset, m.size) for m in found(path) if not m.special] == wanted
    assert [m.special for m in found(path) if m.special] == [
        *("symbolic links", "hard links to files that are not in the tar", "pipes"),
    ]
    assert [name for name, *_ in wanted] == NASTY


@pytest.mark.parametrize("format", FORMATS)
def test_names_are_names_only(tmp_path: Path, format: str):
    path = write(
        tmp_path / "in" / "a.tar", [(name, jpeg(i)) for i, name in enumerate(NASTY)], FORMATS[format]
    )
    manifest = convert(TarSource(str(path)), tmp_path / "out" / "shards")
    assert manifest is not None
    assert (manifest.kind, manifest.source, manifest.num_samples) == ("tars", "a.tar", len(NASTY))
    opened = ShardSet.open(tmp_path / "out" / "shards")
    by_name = {opened.name(i): bytes(opened.read(i)) for i in range(len(NASTY))}
    assert by_name == {f"a.tar/{name}": jpeg(i) for i, name in enumerate(NASTY)}
    assert sorted(os.listdir(tmp_path)) == ["in", "out"]
    assert os.listdir(tmp_path / "in") == ["a.tar"]
    assert os.listdir(tmp_path / "out") == ["shards"]


def test_a_name_that_is_no_utf8(tmp_path: Path):
    path = write(tmp_path / "a.tar", [("x.jpg", jpeg(0))], tarfile.USTAR_FORMAT)
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT, encoding="latin-1") as tar:
        tar.addfile(tarfile.TarInfo("café.jpg"))
    assert [member.name for member in found(path)] == ["caf\\xe9.jpg"]


def test_labels_masks_texts_and_json_arrive(tmp_path: Path):
    files = [
        ("s/0.cls", b"10\n"),
        ("s/0.jpg", jpeg(0)),
        ("s/0.json", json.dumps({"caption": "ü", "score": 0.5, "source": "http://x", "width": 9}).encode()),
        ("s/0.mask.png", mask(0)),
        ("s/1.jpg", jpeg(1)),
        ("s/1.cls", b"2"),
        ("s/1.txt", b"a text"),
        ("s/1.seg.png", mask(1)),
        ("s/2.json", b'{"label": "dog"}'),
        ("s/2.cls", b"7"),
        ("s/2.png", encoded(picture(2), "PNG")),
        ("s/3.jpg", jpeg(3)),
        ("s/3.json", b"[broken"),
        ("s/3.npy", b"a feature"),
        ("s/4.rgb.png", encoded(picture(4), "PNG")),
        ("s/4.nir.png", encoded(picture(5, mode="L"), "PNG")),
        ("s/5.wav", b"sound"),
        ("s/.hidden.jpg", b"x"),
        ("__meta__", b"x"),
        ("readme", b"x"),
    ]
    source = TarSource(str(write(tmp_path / "a.tar", files)))
    manifest = convert(source, tmp_path / "out")
    assert manifest is not None
    assert (manifest.num_samples, manifest.num_masks, manifest.classes) == (6, 2, ["10", "2", "dog"])
    rows = {row["source"]: row for row in pq.read_table(tmp_path / "out" / layout.TABLE).to_pylist()}
    classes = {name: row["label"] for name, row in rows.items()}
    labels = {name: None if label is None else manifest.classes[label] for name, label in classes.items()}
    assert labels == {
        "a.tar/s/0.jpg": "10",
        "a.tar/s/1.jpg": "2",
        "a.tar/s/2.png": "dog",
        "a.tar/s/3.jpg": None,
        "a.tar/s/4.rgb.png": None,
        "a.tar/s/4.nir.png": None,
    }
    assert rows["a.tar/s/4.nir.png"]["group"] == rows["a.tar/s/4.rgb.png"]["group"] == "a.tar/s/4"
    assert rows["a.tar/s/0.jpg"]["group"] is None
    about = samples_json(tmp_path / "out")
    assert about["a.tar/s/0.jpg"] == {
        **{"caption": "ü", "score": 0.5, "original_source": "http://x"},
        **{"width": 24, "height": 16, "label": "10", "source": "a.tar/s/0.jpg"},
    }
    assert about["a.tar/s/1.jpg"]["txt"] == "a text"
    opened = ShardSet.open(tmp_path / "out")
    for i in range(2):
        row = rows[f"a.tar/s/{i}.jpg"]
        stored = opened.read_mask(row["sample_id"])
        assert stored is not None
        assert (np.asarray(Image.open(io.BytesIO(stored))) == i).all()
        assert bytes(opened.read(row["sample_id"])) == jpeg(i)
    assert source.warnings() == [
        "1 .json members hold no facts, or no JSON object: left out.",
        "members of other kinds are left out: 1 without extension (such as 'readme'), 1 .npy, 1 .wav.",
    ]


def test_a_name_that_comes_twice_is_kept_twice(tmp_path: Path):
    files = [("a.jpg", jpeg(0)), ("b.jpg", jpeg(1)), ("a.jpg", jpeg(2)), ("a.jpg", jpeg(3))]
    path = write(tmp_path / "x.tar", files, tarfile.USTAR_FORMAT)
    offsets = [member.offset for member in found(path)]
    source = TarSource(str(path))
    rows = {row["source"]: row for batch in source.entries() for row in batch.to_pylist()}
    assert list(rows) == ["x.tar/a.jpg", "x.tar/b.jpg", *(f"x.tar/a.jpg@{offset}" for offset in offsets[2:])]
    assert [source.read(row).data for row in rows.values()] == [jpeg(i) for i in range(4)]
    assert source.warnings()[0].startswith("2 names come twice, and all are kept: x.tar/a.jpg@")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    files = [(f"{i}.{ext}", data) for i in range(4) for ext, data in (("jpg", jpeg(i)), ("cls", b"1"))]
    return write(tmp_path_factory.mktemp("whole") / "a.tar", files, tarfile.GNU_FORMAT)


def test_cut_anywhere_all_whole_files_are_found_and_the_rest_is_told(whole: Path, tmp_path: Path):
    data, every = whole.read_bytes(), found(whole)
    ends = [member.offset + member.size for member in every]
    end_mark = -(-ends[-1] // 512) * 512
    cut = tmp_path / "a.tar"
    for size in [*range(0, end_mark + 513, 256), *(end + d for end in ends for d in (-1, 0, 1))]:
        cut.write_bytes(data[:size])
        taken: list[TarMember] = []
        with open(cut, "rb") as file:
            if size >= end_mark + 512:
                taken = list(members(file, size))
            else:
                with pytest.raises(Cut) as told:
                    taken.extend(members(file, size))
                assert told.value.offset <= size
        if size > 512:
            assert (
                taken == [member for member, end in zip(every, ends, strict=True) if end <= size] or not taken
            )


def test_what_is_whole_of_a_broken_tar_is_converted(whole: Path, tmp_path: Path):
    (tmp_path / "tars").mkdir()
    data, every = whole.read_bytes(), found(whole)
    (tmp_path / "tars" / "good.tar").write_bytes(data)
    (tmp_path / "tars" / "cut.tar").write_bytes(data[: every[4].offset + 10])  # in 2.jpg
    (tmp_path / "tars" / "half.tar").write_bytes(
        data[: every[5].offset]
    )  # at 2.cls: 2.jpg is no whole sample
    (tmp_path / "tars" / "end.tar").write_bytes(data[: every[6].offset - 512])  # between two samples
    (tmp_path / "tars" / "flip.tar").write_bytes(
        data[: every[2].offset - 500] + b"?" + data[every[2].offset - 499 :]
    )
    (tmp_path / "tars" / "text.tar").write_text("no tar" * 200)
    (tmp_path / "tars" / "zip.tar").write_bytes(b"\x1f\x8b" + bytes(600))
    (tmp_path / "tars" / "empty.tar").write_bytes(b"")
    source = TarSource(str(tmp_path / "tars"))
    manifest = convert(source, tmp_path / "out")
    assert manifest is not None
    names = pq.read_table(tmp_path / "out" / layout.TABLE)["source"].to_pylist()
    counts = {
        tar: sum(name.startswith(tar) for name in names) for tar in ("good", "cut", "half", "end", "flip")
    }
    assert counts == {"good": 4, "cut": 2, "half": 2, "end": 3, "flip": 1}
    assert manifest.num_quarantined == 7
    quarantine = (tmp_path / "out" / layout.QUARANTINE).read_text()
    assert f'"cut.tar@{every[4].offset - 512}"' in quarantine
    assert f"the archive is cut short or damaged (from byte {every[4].offset - 512} on)" in quarantine
    [warning] = source.warnings()
    assert warning.startswith("what comes before is whole and taken, but ")
    assert warning.endswith(" and 4 more.")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"text" * 300, "no tar archive"),
        (b"\x1f\x8b" + bytes(600), "is compressed: unpack it"),
        (bytes(10240), "holds no images. Images are files named"),
    ],
)
def test_nothing_to_convert_says_why(tmp_path: Path, data: bytes, words: str):
    (tmp_path / "a.tar").write_bytes(data)
    with pytest.raises(UserError, match=words):
        listed(tmp_path / "a.tar")


def test_a_negative_size_does_not_go_in_circles(tmp_path: Path):
    info = tarfile.TarInfo("a.jpg")
    info.size = -512
    (tmp_path / "a.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    with pytest.raises(Cut, match="damaged"):
        found(tmp_path / "a.tar")


def test_which_tars_are_meant(tmp_path: Path):
    for name in ("t-008.tar", "t-009.tar", "t-010.tar", "other.tar", "deep/t-011.tar"):
        write(tmp_path / "tars" / name, [("a.jpg", jpeg(0))])
    tars = str(tmp_path / "tars")
    assert set(listed(f"{tars}/t-*.tar")) == {f"t-0{i}.tar/a.jpg" for i in ("08", "09", "10")}
    assert set(listed(tars + "/t-{009..010}.tar")) == {"t-009.tar/a.jpg", "t-010.tar/a.jpg"}
    assert set(listed(f"{tmp_path}/*/deep/*.tar")) == {"tars/deep/t-011.tar/a.jpg"}
    assert set(listed(f"{tars}/other.tar")) == {"other.tar/a.jpg"}
    with pytest.raises(UserError, match=r"There is no file '.*t-011\.tar'"):
        listed(tars + "/t-{009..011}.tar")
    with pytest.raises(UserError, match=r"holds no file 'x\*\.tar'"):
        listed(f"{tars}/x*.tar")


def test_braces_and_names():
    assert expand_braces("a-{08..11}.tar") == [f"a-{i}.tar" for i in ("08", "09", "10", "11")]
    assert expand_braces("{0..1}/{1..2}") == ["0/1", "0/2", "1/1", "1/2"]
    assert expand_braces("a{b}.tar") == ["a{b}.tar"]
    assert split_name("a.b/c.v1.JPG") == ("a.b/c", "v1.jpg")
    assert [split_name(name) for name in ("a/.x.jpg", "readme", "__key__", "__MACOSX/a.jpg")] == [None] * 4


def test_a_folder_means_tars_where_it_holds_nothing_else(tmp_path: Path):
    write(tmp_path / "tars" / "a.tar", [("a.jpg", jpeg(0))])
    (tmp_path / "tars" / "readme.md").write_text("x")
    tars = str(tmp_path / "tars")
    assert open_source(tars).kind == "tars"
    for words, options in {
        "--masks goes with a folder of images": {"masks": tars},
        "--label-column x goes with a list": {"list": ListOptions(label_column="x")},
        "--only x goes with a finished shard folder": {"only": "x"},
    }.items():
        with pytest.raises(UserError, match=words):
            open_source(tars, SourceOptions(**options))
    with pytest.raises(UserError, match="lies inside SOURCE"):
        check_apart(open_source(tars), open_place(tmp_path / "tars" / "out"))
    named = open_source(f"{tars}/*.tar")
    assert named.kind == "tars"
    check_apart(named, open_place(tmp_path / "tars" / "out"))
    (tmp_path / "tars" / "b.jpg").write_bytes(jpeg(0))
    assert open_source(tars).kind == "folder"


KILLED = """
import sys, time
from shards.conversion import convert
from shards.conversion import shard_maker as make
from shards.sources.tar import TarSource
prove = make.prove
make.prove = lambda *args, **options: (time.sleep(0.02), prove(*args, **options))[1]
convert.convert(TarSource(sys.argv[1]), sys.argv[2], samples_per_shard=3, workers=0)
"""


def test_killed_moved_and_gone_on_with_the_bytes_are_the_same(tmp_path: Path):
    for k, format in enumerate(FORMATS.values()):
        files = [
            (f"{k}/{i}.{ext}", data)
            for i in range(8)
            for ext, data in (("jpg", jpeg(8 * k + i)), ("cls", b"%d" % i))
        ]
        write(tmp_path / "tars" / f"{k}.tar", files, format)
    cut = tmp_path / "tars" / "2.tar"
    cut.write_bytes(cut.read_bytes()[:9000])
    convert(TarSource(str(tmp_path / "tars")), tmp_path / "wanted", samples_per_shard=3, workers=0)
    wanted = fingerprints(tmp_path / "wanted")
    (tmp_path / "program.py").write_text(KILLED)
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "program.py"), str(tmp_path / "tars"), str(out)],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    while len(list((out / layout.ROWS).glob("*.parquet"))) < 2:
        assert process.poll() is None, "the converter ended before it could be killed"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (out / layout.MANIFEST).exists()
    (tmp_path / "moved").mkdir()
    moved = (tmp_path / "tars").rename(tmp_path / "moved" / "tars")
    convert(TarSource(str(moved)), out, samples_per_shard=3)
    assert fingerprints(out) == wanted
