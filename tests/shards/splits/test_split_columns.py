"""Columns that `fastssl split` is told of by the names that they had in the list."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fastssl.cli import main
from shards.format import layout
from shards.splits.split_table import open_split
from tests.pictures import encoded, picture


@pytest.fixture
def listed(tmp_path: Path) -> Path:
    """Shards of 40 images of 8 scenes and 4 species, from a list with columns of these names."""
    lines = ["image,scene,species"]
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(encoded(picture(i), "PNG"))
        lines.append(f"{i}.png,s{i // 5},{'abcd'[i % 4]}")
    (tmp_path / "list.csv").write_text("\n".join(lines))
    flags = [
        "--path-column",
        "image",
        "--label-column",
        "species",
        "--group-column",
        "scene",
        "--workers",
        "0",
    ]
    assert main(["shard", str(tmp_path / "list.csv"), str(tmp_path / "out"), *flags]) == 0
    return tmp_path / "out"


def test_the_columns_of_groups_and_labels_are_known_by_their_own_names(
    listed: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["split", str(listed), "--val", "0.25", "--group-by", "scene", "--stratify", "species"]) == 0
    assert "such column" not in capsys.readouterr().out
    table = pq.read_table(listed / layout.TABLE)
    groups, labels = table["group"].to_pylist(), table["label"].to_pylist()
    train, val = (set(open_split(listed, name).ids.tolist()) for name in ("train", "val"))
    assert len(val) == 10
    assert not {groups[i] for i in train} & {groups[i] for i in val}
    assert (
        main(
            [
                "split",
                str(listed),
                "--val",
                "0.2",
                "--group-by",
                "none",
                "--stratify",
                "species",
                "--name",
                "b",
            ]
        )
        == 0
    )
    val = open_split(listed, "b/val").ids.tolist()
    assert sorted(labels[i] for i in val) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert main(["split", str(listed), "--val", "0.2", "--group-by", "strip"]) == 2
