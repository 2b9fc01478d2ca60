"""What people try first and get wrong, as they type it: each is told what to type instead."""

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastssl.cli import main
from shards.conversion.convert import convert
from shards.format import layout
from shards.format.layout import Manifest
from tests.pictures import encoded, picture


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, make_folder):
    """Runs `fastssl` in a folder with `photos`; gives the exit code and all that it said, in one line."""
    folder = make_folder(9)
    monkeypatch.chdir(folder.parent)

    def run(*words: str) -> tuple[int, str]:
        capsys.readouterr()
        code = main([*words, "--workers", "0"] if words[0] in ("shard", "verify") else list(words))
        out, err = capsys.readouterr()
        return code, " ".join((out + err).split())

    return run


def test_a_pattern_of_images(told):
    code, text = told("shard", "photos/ant/*.jpg", "out")
    assert code == 2
    assert "'photos/ant/*.jpg': a pattern names tars or Parquet files; of images give the folder" in text
    names = sorted(map(str, Path("photos/ant").iterdir()))
    code, text = told("shard", *names, "out")
    assert code == 2
    assert "There are 4 paths, not SOURCE and DEST only. Put a pattern in quotes" in text
    assert "give the folder, 'photos/ant'." in text


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("data/deep/train-0.parquet", "are named by a pattern: 'repo/*/*/*.parquet'."),
        ("data/x.tar", "are named by a pattern: 'repo/*/*.tar'."),
        ("x.zip", "Unpack archives, or give them as plain .tar."),
        ("x.heic", "Turn these into JPEG or PNG first."),
        ("data.arrow", "Save a Hugging Face data set with its `to_parquet`."),
    ],
)
def test_a_folder_without_images_of_which_we_know_better(told, name: str, words: str):
    path = Path("repo") / name
    path.parent.mkdir(parents=True)
    path.write_bytes(b"x")
    Path("repo/README.md").write_text("x")
    code, text = told("shard", "repo", "out")
    assert code == 2
    assert text.startswith("fastssl: 'repo' holds no images, only 2 other files")
    assert text.endswith(words)


def test_files_that_are_no_images_by_their_names_are_told_of(told):
    for i in range(3):
        (Path("photos") / f"{i}.heic").write_bytes(b"x")
    code, text = told("shard", "photos", "out")
    assert code == 0
    assert (
        "Warning: images of kinds that are not read are left out: 3 .heic; turn these into JPEG or PNG first."
        in text
    )
    assert "left out 3 .heic" in text


def test_a_list_without_a_line_of_names(told):
    Path("list.csv").write_text("photos/ant/0000.jpg,ant\nphotos/bee/0001.jpg,bee\n")
    code, text = told("shard", "list.csv", "out")
    assert code == 2
    assert (
        "The first line of 'list.csv' seems to be an image already (photos/ant/0000.jpg, ant): put a line"
        in text
    )


def test_masks_whose_names_end_otherwise(told):
    for path in list(Path("photos").rglob("*.*")):
        mask = Path("masks") / path.parent.name / f"{path.stem}_m.png"
        mask.parent.mkdir(parents=True, exist_ok=True)
        mask.write_bytes(encoded(picture(1, (20, 16), "L"), "PNG"))
    code, text = told("shard", "photos", "out", "--masks", "masks")
    assert code == 2
    assert "It holds '" in text
    assert "_m.png'; --mask-suffix is what follows an image's name." in text


def test_the_merge_of_parts_ends_with_the_summary(told):
    for part in ("0/2", "1/2"):
        assert told("shard", "photos", "out", "--part", part)[0] == 0
    code, text = told("shard", "photos", "out")
    assert code == 0
    assert "Nothing to do" not in text
    assert "classes 3" in text
    assert "images/s" not in text
    assert told("shard", "photos", "out")[1].count("Nothing to do.") == 1


def test_damage_is_told_with_the_command_that_mends_it(told):
    assert told("shard", "photos", "out")[0] == 0
    tar = Path("out") / layout.shard_name(0)
    whole = tar.read_bytes()
    tar.write_bytes(whole[:-2000])
    code, text = told("verify", "out")
    assert code == 1
    assert "fastssl verify out --repair --source SOURCE, with the options" in text
    Path("other").mkdir()
    shutil.copy("photos/ant/0000.jpg", "other/x.jpg")
    code, text = told("verify", "out", "--repair", "--source", "other")
    assert code == 1
    assert "not one of its 9 images can be used in this --source, such as '" in text
    assert told("verify", "out", "--repair", "--source", "photos")[0] == 0
    assert tar.read_bytes() == whole


def test_ids_in_a_file_that_is_not_there(told):
    told("shard", "photos", "out")
    for name in ("ids.txt", "ids.csv", "ids.parquet"):
        assert f"There is no file '{name}'" in told("shard", "out", "some", "--only", name)[1]


def test_a_part_of_a_folder_keeps_its_classes(told, tmp_path: Path):
    """A label is an index into the classes: in train and val shards it must mean the same."""
    told("shard", "photos", "out")
    rows = pq.read_table("out/samples.parquet").to_pylist()
    Path("ids.txt").write_text(
        "\n".join(str(row["sample_id"]) for row in rows if row["source"].startswith("cat/"))
    )
    assert told("shard", "out", "cats", "--only", "ids.txt")[0] == 0
    assert Manifest.load("cats").classes == ["ant", "bee", "cat"]
    assert set(pq.read_table("cats/samples.parquet")["label"].to_pylist()) == {2}
    about = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["x", "y", "z"]}}}}
    table = pa.table({"image": [encoded(picture(1), "JPEG")], "label": [1]})
    pq.write_table(
        table.replace_schema_metadata({"huggingface": str(about).replace("'", '"')}), "one.parquet"
    )
    manifest = convert("one.parquet", tmp_path / "one", workers=0)
    assert manifest is not None
    assert manifest.classes == ["x", "y", "z"]
