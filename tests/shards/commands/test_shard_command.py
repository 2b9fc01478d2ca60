import io
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import rich.console

from fastssl.cli import main
from shards.commands import progress
from shards.commands.shard_command import run
from shards.errors import UserError
from shards.format import layout
from tests import needs
from tests.needs import HANGS_S
from tests.pictures import encoded, picture
from tests.shards.growing import images

ROOT = Path(__file__).parents[3]


def test_a_conversion_and_its_summary(make_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source = make_folder(12)
    (source / "ant" / "zero.jpg").write_bytes(b"")
    (source / "ant" / "cut.jpg").write_bytes(encoded(picture(0, (96, 64)), "JPEG")[:-50])
    (source / "ant" / "cmyk.jpg").write_bytes(encoded(picture(0, mode="CMYK"), "JPEG"))
    run([str(source), str(tmp_path / "out"), "--samples-per-shard", "5"])
    text = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert lines[0] == f"Found 15 images in 3 classes in {source}"
    for line in (
        "images 13",
        "classes 3",
        "shards 3",
        "re-encoded 1: CMYK to RGB",
        "quarantined 2",
        "1: empty file",
        "1: damaged: Premature end of JPEG file",
    ):
        assert line in lines
    assert "Warning" not in text
    assert "\x1b" not in text
    # What did not occur is not told: nothing of alpha channels, more bits, or other numbers of channels.
    assert [line for line in lines[1:] if line.endswith(".")] == []
    assert f"Quarantined images are listed in {tmp_path / 'out' / layout.QUARANTINE}" in lines

    run([str(source), str(tmp_path / "out"), "--samples-per-shard", "5"])
    assert "is complete: 13 images in 3 shards. Nothing to do." in capsys.readouterr().out


def test_what_became_of_duplicates_is_said_of_appended_ones_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def said(*words: str) -> list[str]:
        run(list(words)) if words[0] != "inspect" else main(list(words))
        lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
        return [line for line in lines if line.startswith("duplicates")]

    old, new = images(tmp_path / "old", range(4), "ant"), images(tmp_path / "new", range(8), "bee")
    for first, words, shown in (
        ("mark", "2, left out", "2 with the pixels of an earlier image, left out"),
        ("keep", "2, left out", "not looked for (--dedupe keep); of appended images 2, left out"),
    ):  # fmt: skip
        out = str(tmp_path / first)
        assert said(str(old), out, "--dedupe", first) == []
        one = images(tmp_path / "one", range(2, 8), "cow")
        assert said(str(one), out, "--append", "--dedupe", "drop") == [f"duplicates {words}"]
        assert said("inspect", out) == [f"duplicates {shown}"]
    images(old, range(2), "cow")
    out = str(tmp_path / "both")
    assert said(str(old), out) == ["duplicates 2, marked in the table"]
    both = "2 marked and 4 left out"
    assert said(str(new), out, "--append", "--dedupe", "drop") == [f"duplicates 6, {both}"]
    assert said("inspect", out) == [f"duplicates 6 with the pixels of an earlier image, {both}"]


def test_the_next_commands_can_be_pasted(make_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """Paths with spaces are quoted; a path longer than the terminal stays in one line, in the summary too."""
    folder = tmp_path / ("a rather long name of a folder " * 3).strip() / "my shards"
    for again in (False, True):
        run([str(make_folder(12)) if not again else str(tmp_path / "photos"), str(folder)])
        lines = capsys.readouterr().out.splitlines()
        assert shlex.split(lines[-2]) == ["next:", "fastssl", "inspect", str(folder), "--out", "overview.png"]
        assert shlex.split(lines[-1]) == ["fastssl", "pretrain", "--data.shards", str(folder)]
    assert main(["inspect", str(folder), "--out", str(tmp_path / "overview.png")]) == 0


def test_only_chosen_policies_are_told(make_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run([str(make_folder(2)), str(tmp_path / "out"), "--alpha", "black", "--short-side", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "Images whose shorter side has more than 32 pixels are scaled down to it.",
        "Transparent images are laid on black.",
    ]
    assert lines[3].startswith("1 shard will take about")


def test_tiles_are_called_tiles(make_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    needs.module("rasterio")
    scenes = make_folder(2)
    argv = [str(scenes), str(tmp_path / "out"), "--tile", "8"]
    run(argv)
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    num_tiles = layout.Manifest.load(tmp_path / "out").num_samples
    assert lines[0].startswith(f"Found {num_tiles:,} tiles")
    assert f"tiles {num_tiles:,}" in lines
    assert not [line for line in lines if line.startswith("images ")]
    run(argv)
    assert f"is complete: {num_tiles:,} tiles in 1 shard. Nothing to do." in capsys.readouterr().out


def test_a_terminal_sees_a_progress_bar(make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    out = io.StringIO()
    terminal = rich.console.Console(file=out, force_terminal=True, width=120)
    monkeypatch.setattr(rich.console, "Console", lambda **_: terminal)
    run([str(make_folder(12)), str(tmp_path / "out")])
    assert "12/12" in out.getvalue()


def test_without_a_terminal_a_line_now_and_then(
    make_folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(progress, "PLAIN_INTERVAL_S", 0.0)
    run([str(make_folder(12)), str(tmp_path / "out")])
    assert "12 of 12 images, 0 quarantined" in capsys.readouterr().out


def test_folders_named_as_splits_are_warned_about(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    for split in ("train", "val"):
        (tmp_path / "photos" / split).mkdir(parents=True)
        (tmp_path / "photos" / split / "a.png").write_bytes(encoded(picture(0), "PNG"))
    run([str(tmp_path / "photos"), str(tmp_path / "out")])
    assert "Warning: the folders train, val look like splits" in capsys.readouterr().out


def test_every_kind_of_source(make_folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    needs.module("rasterio")
    photos = make_folder(6)
    out = [str(tmp_path / f"out{i}") for i in range(5)]
    (tmp_path / "list.csv").write_text("file;kind;camera\nant/0000.jpg;a;7\nbee/0001.jpg;b;8\n")
    run([str(tmp_path / "list.csv"), out[0], "--root", str(photos), "--label-column", "kind"])
    text = capsys.readouterr().out
    assert "Found 2 images in 2 classes" in text
    assert "Columns: path 'file', label 'kind'; kept as well: camera." in text
    run([str(photos), out[1], "--tile", "8", "--stride", "6", "--edge", "shift", "--bands", "3,1"])
    assert "6 of 2 x uint8. " in capsys.readouterr().out
    run([f"{out[0]}/shard-*.tar", out[2]])
    assert "Read from 1 tar, in place." in capsys.readouterr().out
    (tmp_path / "ids.txt").write_text("1\n")
    run([out[2], out[3], "--only", str(tmp_path / "ids.txt")])
    assert "Finished shards: 1 of their 2 samples" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"is one file: SOURCE is a folder, a list .* needs --tile N"):
        run([str(photos / "ant" / "0000.jpg"), out[4]])


def test_mistakes_are_user_errors(make_folder, tmp_path: Path):
    with pytest.raises(UserError, match="There is no folder"):
        run([str(tmp_path / "nowhere"), str(tmp_path / "out")])
    source = make_folder(3)
    with pytest.raises(UserError, match="lies inside SOURCE"):
        run([str(source), str(source / "out")])


@pytest.mark.parametrize("argv", [["only-one"], ["a", "b", "--sed", "1"], ["a", "b", "--workers", "many"]])
def test_wrong_arguments_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        run(argv)
    assert stop.value.code == 2


def test_help_names_both_folders(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as stop:
        run(["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "usage: fastssl shard [-h] [OPTIONS] SOURCE DEST" in text
    for word in ("SOURCE", "DEST", "--seed", "--workers", "--samples-per-shard", "quarantine.jsonl"):
        assert word in text


def test_ctrl_c_says_how_to_go_on(make_folder, tmp_path: Path):
    source, dest = make_folder(300), tmp_path / "out"
    script = tmp_path / "program.py"
    # The image proofs wait, so that the interrupt surely comes in between.
    script.write_text(
        f"""import sys, time
sys.path.insert(0, {str(ROOT)!r})
from shards.conversion import shard_maker as make
from shards.commands.shard_command import run
prove = make.prove
make.prove = lambda *args, **options: (time.sleep(0.02), prove(*args, **options))[1]
run([{str(source)!r}, {str(dest)!r}, "--workers", "0", "--samples-per-shard", "5"])
"""
    )
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    while len(list((dest / layout.ROWS).glob("*.parquet"))) < 2:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=HANGS_S)
    assert process.returncode == 130
    assert b"Stopped. What is finished is kept; the same command goes on from there." in out
    assert err == b""
    assert not list(dest.glob("*.fastssl-tmp"))


def test_the_command_imports_nothing_heavy():
    check = "import sys, shards.commands.shard_command; print([m for m in ('torch', 'pyarrow', 'PIL') if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", check], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
