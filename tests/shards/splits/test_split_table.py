"""`fastssl split` on real shards: what lies in the file, who stays together, what is refused."""

import pickle
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fastssl.cli import main
from shards.checking.verify import verify
from shards.commands.split_command import run
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format import layout
from shards.format.sealed_parquet import check_seal
from shards.splits.split_rules import SplitRule
from shards.splits.split_table import open_split, split
from shards.storage.opening import open_place
from tests.pictures import encoded, picture


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 tiles of 15 scenes in classes ant, bee, cat; scene 14's last tile has the pixels of scene 0's first."""
    root = tmp_path_factory.mktemp("tiles")
    for i in range(60):
        path = root / "tiles" / ("ant", "bee", "cat")[i % 3] / f"scene{i // 4:02d}_t{i % 4}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(picture(0 if i == 59 else i, (12, 10)), "PNG"))
    convert(root / "tiles", root / "shards", workers=0, samples_per_shard=16)
    return root / "shards"


@pytest.fixture
def folder(made: Path) -> Path:
    (made / layout.SPLITS).unlink(missing_ok=True)
    return made


def parts(folder: Path, *names: str) -> list[set[int]]:
    return [set(open_split(folder, name).ids.tolist()) for name in names]


def scenes(folder: Path, ids: set[int]) -> set[str]:
    shards = ShardSet.open(folder)
    return {shards.name(i).partition("/")[2].partition("_")[0] for i in ids}


def test_a_table_and_a_file(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([str(folder), "--val", "0.1", "--test", "0.2", "--labelled", "10%,0.5"])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].endswith(layout.SPLITS)
    assert "train val test labelled-0.1 labelled-0.5" in lines
    assert "images 42 6 12 4 21" in lines
    assert f"next: fastssl pretrain --data.shards {folder} --data.split train" in lines
    train, val, test, few, half = parts(folder, "train", "val", "test", "labelled-0.1", "labelled-0.5")
    assert sorted([*train, *val, *test]) == list(range(60))
    assert few < half < train
    table = pq.read_table(folder / layout.SPLITS)
    assert table.column_names == ["sample_id", "default", "default_labelled"]
    assert table["sample_id"].to_pylist() == list(range(60))
    assert {i for i, side in enumerate(table["default"].to_pylist()) if side == "val"} == val
    assert [f.name for f in folder.iterdir() if f.name.endswith(".fastssl-tmp")] == []


def test_equal_pixels_stay_together_even_across_scenes(folder: Path) -> None:
    shards = ShardSet.open(folder)
    by_name = {shards.name(i).partition("/")[2]: i for i in range(60)}
    twins = {by_name["scene00_t0.png"], by_name["scene14_t3.png"]}
    for seed in range(12):
        split(open_place(folder), SplitRule(val=0.4, seed=seed), "twins", overwrite=True)
        [val] = parts(folder, "twins/val")
        assert len(val & twins) in (0, 2)
        split(open_place(folder), SplitRule(val=0.3, seed=seed, group_by=r"(scene\d+)"), "s", overwrite=True)
        train, val = parts(folder, "s/train", "s/val")
        assert not scenes(folder, train) & scenes(folder, val)
        assert ("scene00" in scenes(folder, val)) == ("scene14" in scenes(folder, val))
        assert abs(len(val) - 18) <= 2


def test_the_column_group_counts_unless_told_otherwise(folder: Path, tmp_path: Path) -> None:
    table = pq.read_table(folder / layout.TABLE)
    grouped = tmp_path / "grouped"
    grouped.mkdir()
    for path in folder.iterdir():
        if path.is_file():
            (grouped / path.name).write_bytes(path.read_bytes())
    strips = pa.array([None if i % 10 == 0 else f"strip{i % 7}" for i in range(60)])
    at = table.schema.get_field_index("group")
    table = table.set_column(at, "group", strips).append_column(
        "patient", pa.array([i // 20 for i in range(60)])
    )
    pq.write_table(table, grouped / layout.TABLE)
    division = split(open_place(grouped), SplitRule(val=0.2))
    assert division.notes == ["Groups are those of the column 'group' (--group-by none turns that off)."]
    [train, val] = parts(grouped, "train", "val")
    assert not {strips[i].as_py() for i in train} & {strips[i].as_py() for i in val} - {None}
    assert len(np.unique(split(open_place(grouped), SplitRule(val=0.2, group_by="none"), "b").groups)) == 59
    [train, val] = split(open_place(grouped), SplitRule(val=0.3, group_by="patient"), "c") and parts(
        grouped, "c/train", "c/val"
    )
    assert len({i // 20 for i in train} & {i // 20 for i in val}) == 0
    run([str(grouped), "--val", "0.2", "--group-by", "none", "--stratify", "label", "--name", "d"])
    labels = ShardSet.open(grouped).labels
    assert np.bincount(labels[list(parts(grouped, "d/val")[0])]).tolist() == [4, 4, 4]


def test_the_same_split_again_writes_the_same_bytes_and_another_is_refused(folder: Path) -> None:
    place = open_place(folder)
    split(place, SplitRule(val=0.1, labelled=(0.5,)))
    before = (folder / layout.SPLITS).read_bytes()
    split(place, SplitRule(val=0.1, labelled=(0.5,)))
    assert (folder / layout.SPLITS).read_bytes() == before
    with pytest.raises(UserError, match=r"'default' already, made differently \(seed was 0, now 1\)"):
        split(place, SplitRule(val=0.1, labelled=(0.5,), seed=1))
    assert (folder / layout.SPLITS).read_bytes() == before
    split(place, SplitRule(test=0.3), "other")
    split(place, SplitRule(val=0.1, seed=1), overwrite=True)
    assert pq.read_schema(folder / layout.SPLITS).names == ["sample_id", "default", "other"]


def test_lists(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sources = pq.read_table(folder / layout.TABLE)["source"].to_pylist()
    whole, short = sources[:30], [name.rpartition("/")[2] for name in sources[30:50]]
    (tmp_path / "train.txt").write_text("".join(f"./{name}\n\n" for name in whole))
    (tmp_path / "v.txt").write_text("\r\n".join(short))
    lists = [str(tmp_path / "train.txt"), f"val={tmp_path / 'v.txt'}"]
    run([str(folder), "--by-list", *lists, "--labelled", "0.2"])
    assert "10 images stand in none of the lists" in capsys.readouterr().out
    train, val, few = parts(folder, "train", "val", "labelled-0.2")
    assert (train, val) == (set(range(30)), set(range(30, 50)))
    assert few < train

    (tmp_path / "bad.txt").write_text(f"{whole[0]}\nant/scene0_t0.png\nant/no.png\n")
    with pytest.raises(
        UserError, match=r"2 of 3 names .* 'ant/scene0_t0.png', 'ant/no.png'\. The nearest .* 'ant/scene"
    ):
        run([str(folder), "--by-list", str(tmp_path / "bad.txt"), "--name", "b"])
    (tmp_path / "bad.txt").write_text(whole[0])
    with pytest.raises(UserError, match="is listed twice, for 'train' and for 'bad'"):
        run([str(folder), "--by-list", lists[0], str(tmp_path / "bad.txt"), "--name", "b"])
    (tmp_path / "twice.txt").write_text(f"{whole[0]}\n{whole[0].rpartition('/')[2]}\n")
    with pytest.raises(UserError, match="listed twice, by its whole name and by its last part"):
        run([str(folder), "--by-list", str(tmp_path / "twice.txt"), "--name", "b"])
    with pytest.raises(UserError, match="cannot be read"):
        run([str(folder), "--by-list", str(tmp_path / "none.txt"), "--name", "b"])
    with pytest.raises(UserError, match="takes its samples from train, and the lists are named v"):
        run([str(folder), "--by-list", str(tmp_path / "v.txt"), "--labelled", "0.1", "--name", "b"])


def test_lists_that_tear_twins_are_told_of(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "train.txt").write_text("scene00_t0.png\n")
    (tmp_path / "val.txt").write_text("scene14_t3.png\n")
    run([str(folder), "--by-list", str(tmp_path / "train.txt"), str(tmp_path / "val.txt")])
    [line] = [
        line for line in capsys.readouterr().out.splitlines() if "The lists put images of 1 group" in line
    ]
    assert line.endswith(".")
    assert len(line) > 80


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--val", "0.6", "--test", "0.5"], "sum to 1.1"),
        (["--val", "1"], "--val is 1"),
        ([], "Nothing to split"),
        (["--val", "0.1", "--group-by", "scene"], "no such column"),
        (["--val", "0.1", "--stratify", "lable"], "Did you mean 'label'"),
        (["--val", "0.1", "--group-by", r"scene\d+"], "has no group"),
        (["--val", "0.1", "--group-by", "(["], "no regular expression"),
        (["--val", "0.1", "--group-by", r"_t([12])"], r"does not match 30 of the names, such as .*_t"),
        (["--val", "0.1", "--group-by", "()"], "val would be empty: 60 images in 1 groups"),
        (["--val", "0.001"], "val would be empty"),
        (["--labelled", "0.1,x"], "'x' is no number"),
        (["--labelled", "0.1,10%"], "each fraction once"),
        (["--labelled", "2"], "--labelled has 2"),
        (["--val", "0.1", "--name", "a b"], "cannot name a split"),
        (["--val", "0.1", "--name", "a_labelled"], "cannot name a split"),
        (["--val", "0.1", "--stratify", "label", "--method", "stable"], "needs --method exact"),
        (["--val", "0.1", "--by-list", "x"], "leave out --val"),
    ],
)
def test_mistakes_are_told(folder: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        run([str(folder), *flags])
    assert not (folder / layout.SPLITS).exists()


def test_names_without_the_group_may_stand_alone(folder: Path) -> None:
    division = split(open_place(folder), SplitRule(val=0.2, group_by=r"(scene\d+)_t[12]|$"))
    # 15 scenes of their two middle tiles, 30 tiles alone, two of which have the same pixels.
    assert len(np.unique(division.groups)) == 15 + 29


def test_classes_without_labels_in_train_are_named(folder: Path, tmp_path: Path) -> None:
    sources = [s for s in pq.read_table(folder / layout.TABLE)["source"].to_pylist() if s.startswith("ant/")]
    (tmp_path / "train.txt").write_text("\n".join(sources))
    division = split(open_place(folder), SplitRule(lists=(str(tmp_path / "train.txt"),), labelled=(0.01,)))
    assert (
        "2 of 3 classes have no labelled image in train, so no label fraction has one: bee, cat."
        in division.notes
    )
    assert (
        "labelled-0.01 has 1 of 20 labelled images, 5.00%: at least one of each class." not in division.notes
    )


def test_subsets_that_are_not_there(folder: Path) -> None:
    with pytest.raises(UserError, match=r"has no splits: `fastssl split .* --val 0.1` makes some"):
        open_split(folder, "train")
    split(open_place(folder), SplitRule(val=0.1, labelled=(0.1,)))
    for wrong, words in (("vall", "Did you mean 'val'"), ("labelled-0.2", "Did you mean 'labelled-0.1'")):
        with pytest.raises(UserError, match=words):
            open_split(folder, wrong)
    assert open_split(folder, "default/val").ids.tolist() == open_split(folder, "val").ids.tolist()
    (folder / layout.SPLITS).write_bytes(b"PAR1 nonsense PAR1")
    with pytest.raises(UserError, match="is damaged"):
        open_split(folder, "val")


def test_a_file_of_another_conversion_is_refused(folder: Path, make_folder, tmp_path: Path) -> None:
    split(open_place(folder), SplitRule(val=0.1))
    convert(make_folder(12), tmp_path / "out", workers=0)
    (tmp_path / "out" / layout.SPLITS).write_bytes((folder / layout.SPLITS).read_bytes())
    with pytest.raises(UserError, match="divides 60 samples of another conversion"):
        open_split(tmp_path / "out", "val")
    with pytest.raises(UserError, match="divides 60 samples of another conversion"):
        split(open_place(tmp_path / "out"), SplitRule(val=0.1))


def test_a_subset_keeps_the_ids_of_the_folder(folder: Path) -> None:
    split(open_place(folder), SplitRule(val=0.1))
    whole, val = ShardSet.open(folder), open_split(folder, "val")
    assert (len(whole), len(val), val.num_samples) == (60, 6, 60)
    assert whole.ids.tolist() == list(range(60))
    for i in val.ids.tolist():
        assert bytes(val.read(i)) == bytes(whole.read(i))
    again = pickle.loads(pickle.dumps(val))
    assert (again.ids.tolist(), again.split) == (val.ids.tolist(), "val")


def test_every_byte_of_the_file_counts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run([str(folder), "--val", "0.1", "--labelled", "0.5"])
    data = (folder / layout.SPLITS).read_bytes()
    check_seal(data)
    for at in range(len(data)):
        with pytest.raises(UserError, match="damaged"):
            check_seal(data[:at] + bytes([data[at] ^ 1 << at % 8]) + data[at + 1 :])
    for other in (b"", data[:-1], data + b"PAR1"):
        with pytest.raises(UserError, match="damaged"):
            check_seal(other)
    flags = ["verify", str(folder), "--workers", "0"]
    assert main(flags) == 0
    (folder / layout.SPLITS).write_bytes(data.replace(b"train", b"trial"))
    with pytest.raises(
        UserError, match=r"splits.parquet' is damaged.*Delete it and run `fastssl split` again"
    ):
        open_split(folder, "train")
    capsys.readouterr()
    assert main(flags) == 1
    told = " ".join(capsys.readouterr().out.split())
    assert "splits.parquet is damaged: it differs from the SHA-256 that it holds. Delete it and run" in told
    assert "DAMAGED: 1 file of" in told
    assert main([*flags, "--repair", "--source", str(folder.parent / "tiles")]) == 1
    assert (
        "splits.parquet: is not made from the images. Delete it and run `fastssl split` again"
        in capsys.readouterr().out
    )
    (folder / layout.SPLITS).unlink()
    run([str(folder), "--val", "0.1", "--labelled", "0.5"])
    assert (folder / layout.SPLITS).read_bytes() == data
    assert main(flags) == 0


def test_a_file_without_a_checksum_is_not_trusted(folder: Path) -> None:
    run([str(folder), "--val", "0.1"])
    pq.write_table(pq.read_table(folder / layout.SPLITS), folder / layout.SPLITS)
    with pytest.raises(
        UserError, match=r"holds no SHA-256 of its own: an older fastssl made it, or it is damaged\. Delete"
    ):
        open_split(folder, "train")
    found = verify(open_place(folder), workers=0).findings
    assert [(finding.file, finding.kind) for finding in found] == [(layout.SPLITS, "table")]
