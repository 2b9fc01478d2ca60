"""The command line: what it answers, how fast it can, and one clear sentence for every mistake."""

import importlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastssl import __version__
from fastssl.cli import COMMANDS, main
from fastssl.core import distributed
from shards.format.layout import Manifest, shard_name
from tests.fastssl.runs import NUM_IMAGES
from tests.needs import HANGS_S

ROOT = Path(__file__).parents[3]


def run_process(*argv: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "fastssl", *argv],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )


# ---------------------------------------------------------------- help


def test_help_imports_nothing_slow() -> None:
    """What keeps it under 0.3 s."""
    code = (
        "import sys; from fastssl.cli import main; assert main(['--help']) == 0; "
        "slow = {'torch', 'numpy', 'tyro', 'rich', 'pyarrow', 'PIL', 'yaml', 'numba', 'timm'}; "
        "sys.exit(', '.join(slow & set(sys.modules)) or 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S
    )
    assert (done.returncode, done.stderr) == (0, "")
    for name, (_, text) in COMMANDS.items():
        assert f"  {name} " in done.stdout
        assert text in done.stdout


@pytest.mark.parametrize("word", ["-h", "--help", "help"])
def test_all_words_for_help(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    out, err = capsys.readouterr()
    assert "usage: fastssl COMMAND" in out
    assert err == ""


@pytest.mark.parametrize("word", ["-V", "--version"])
def test_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([word]) == 0
    assert capsys.readouterr().out == f"fastssl {__version__}\n"


@pytest.mark.parametrize("argv", [[name] for name in COMMANDS] + [["eval", "knn"]], ids=" ".join)
def test_every_command_explains_itself(argv: list, capsys: pytest.CaptureFixture[str]) -> None:
    importlib.import_module(COMMANDS[argv[0]][0])
    try:
        code = main([*argv, "--help"])
    except SystemExit as stop:  # tyro's way
        code = stop.code
    out, err = capsys.readouterr()
    assert (code or 0, err) == (0, "")
    assert f"usage: fastssl {argv[0]}" in out


def test_settings_lists_every_key_with_the_file_s_value(config, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", str(config()), "--settings"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for text in (
        "--train.save-every-steps",
        "--recipe.blur-sigma",
        "resnet10_w32",
        "--recipe NAME",
        "moco_v3_resnet",
    ):
        assert text in out


# ---------------------------------------------------------------- commands and their words


def test_without_a_command_it_shows_them_all_and_fails(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    out, err = capsys.readouterr()
    assert "usage: fastssl COMMAND" in out
    assert err == "fastssl: give a command, such as `fastssl demo`.\n"


def test_unknown_commands(told) -> None:
    assert told("pretrian") == "There is no command 'pretrian'. Did you mean 'pretrain'?"
    assert told("xyz") == f"There is no command 'xyz'. Known: {', '.join(sorted(COMMANDS))}."


def test_a_mistake_in_a_real_process(tmp_path: Path) -> None:
    done = run_process("pretrain", "nowhere.yaml", "--resume")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "fastssl: There is no configuration file 'nowhere.yaml'.\n"


def test_a_warning_is_one_line_without_its_place_in_the_source() -> None:
    code = (
        "import sys, types, warnings; from fastssl import cli; cli.COMMANDS['warn'] = ('warner', ''); "
        "sys.modules['warner'] = types.SimpleNamespace(run=lambda argv: warnings.warn('Mind this.')); "
        "sys.argv = ['fastssl', 'warn']; cli.main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.stderr == "fastssl: note: Mind this.\n"


def test_pretrain_without_a_configuration_takes_laptop(
    shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], told
) -> None:
    small = ["--recipe.size", "16", "--method.hidden-dim", "64", "--method.dim", "32", "--train.batch", "20"]
    small += ["--train.epochs", "1", "--train.device", "cpu", "--optim.warmup-epochs", "0"]
    small += ["--train.precision", "fp32"]
    argv = [
        "--data.shards",
        str(shards),
        "--train.out",
        str(tmp_path / "run"),
        "--recipe",
        "satellite",
        *small,
    ]
    assert main(["pretrain", *argv]) == 0
    assert capsys.readouterr().out.startswith("Configuration: laptop. `fastssl configs` lists the others.\n")
    found = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (found["model"]["backbone"], found["recipe"]["quarter_turns"]) == ("resnet10_w32", True)
    assert main(["pretrain", "--resume", *argv]) == 0
    assert "already complete" in capsys.readouterr().out
    assert "recipe.hue = 0.05 and this run has 0.1" in told(
        "pretrain", "laptop", "--resume", *[t for t in argv if t not in ("--recipe", "satellite")]
    )


def test_a_name_that_no_configuration_has(told, tmp_path: Path) -> None:
    for command in (["pretrain"], ["launch", "slurm"]):
        assert told(*command, "lapto").startswith(
            "There is no configuration called 'lapto'. Did you mean 'laptop'?"
        )
    assert told("bench", "lapto") == (
        "There is no benchmark 'fastssl bench lapto', and 'lapto' is no configuration. Did you mean 'laptop'?"
    )
    assert told("pretrain", tmp_path / "laptop.yaml").endswith("has this name: give 'laptop'.")
    assert told("preview", "x", "--config", "lapto").startswith("There is no configuration called 'lapto'.")


def test_ctrl_c_and_a_closed_pipe_have_their_exit_codes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fastssl.commands import pretrain_command

    def raise_(error: BaseException):
        raise error

    monkeypatch.setattr(pretrain_command, "run", lambda argv: raise_(KeyboardInterrupt()))
    assert main(["pretrain"]) == 130
    assert capsys.readouterr().err == "fastssl: interrupted.\n"
    monkeypatch.setattr(sys, "stderr", open(os.devnull, "w"))  # noqa: SIM115 (main closes it)
    monkeypatch.setattr(pretrain_command, "run", lambda argv: raise_(BrokenPipeError()))
    assert main(["pretrain"]) == 141


# ---------------------------------------------------------------- folders and shards


def test_folders_without_images(told, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert "is empty" in told("shard", tmp_path / "empty", tmp_path / "out")
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("no image")
    sentence = told("shard", tmp_path / "texts", tmp_path / "out")
    assert "no images" in sentence
    assert ".txt" in sentence
    assert "none" in told("shard", tmp_path / "none", tmp_path / "out")


def test_no_shards_to_train_on(told, config, tmp_path: Path) -> None:
    assert "give --data.shards SHARDS, the folder that `fastssl shard` made" in told(
        "pretrain", config(data="")
    )
    assert str(tmp_path / "none") in told("pretrain", config(data=tmp_path / "none"))
    assert not (tmp_path / "run").exists()


def test_pretraining_refuses_masks(told, config, shards: Path) -> None:
    assert "pretraining uses no masks" in told("pretrain", config(data=shards), "--data.masks", "True")


@pytest.mark.parametrize("kept_bytes", [None, 100])
def test_a_shard_that_is_gone_or_cut(
    kept_bytes: int | None, told, config, shards: Path, tmp_path: Path
) -> None:
    broken = shutil.copytree(shards, tmp_path / "broken")
    victim = broken / shard_name(1)
    size = victim.stat().st_size
    if kept_bytes is None:
        victim.unlink()
        expected = f"'{victim}' is missing; run the same `fastssl shard` command again"
    else:
        victim.write_bytes(victim.read_bytes()[:kept_bytes])
        expected = (
            f"'{victim}' has 100 bytes and should have {size:,}; run the same `fastssl shard` command again"
        )
    assert expected in told("pretrain", config(data=broken))


def test_a_shard_whose_bytes_changed_since(told, config, shards: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(shards, tmp_path / "broken")
    for shard in range(len(Manifest.load(broken).shards)):
        path = broken / shard_name(shard)
        path.write_bytes(path.read_bytes().replace(b"IDAT", b"NOPE"))
    sentence = told("pretrain", config({"knn": {"every": 0}}, data=broken))
    assert "does not decode" in sentence
    assert "delete '" in sentence
    assert "shard-00000" in sentence
    assert sentence.endswith("run the same `fastssl shard` command again, which makes it again.")
    assert told("preview", broken, "--out", tmp_path / "views.png") != ""


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (
            {"train": {"batch": 61}},
            f"has {NUM_IMAGES} samples, fewer than one batch of 61: lower the batch size (--train.batch) to at most 60",
        ),
        ({"train": {"epoch": 1}}, "unknown key 'train.epoch'. Did you mean 'train.epochs'?"),
        ({"recipe": {"preset": "moco_v33"}}, "There is no recipe called 'moco_v33'. Did you mean 'moco_v3'?"),
        ({"method": {"name": "moco"}}, "There is no method 'moco'. Did you mean 'moco_v3'?"),
        ({"model": {"backbone": "resnet5O"}}, "There is no backbone 'resnet5O'. Did you mean 'resnet50'?"),
        ({"model": {"backbone": "vgg11"}}, "model.stem_stride is for ResNets"),
        (
            {"recipe": {"num_views": 3, "blur_p": 0.5, "solarize_p": 0.0}},
            "compares 2 views of each image but the recipe makes 3",
        ),
        (
            {"recipe": {"preset": "dino"}},
            "compares 2 global views but the recipe makes 8 local ones, too: set --recipe.local-views 0",
        ),
    ],
)
def test_settings_that_cannot_be(changes: dict, expected: str, told, config) -> None:
    assert expected in told("pretrain", config(changes))


def test_a_batch_that_does_not_divide_among_ranks(told, config, monkeypatch: pytest.MonkeyPatch) -> None:
    four = distributed.Dist(rank=0, world=4, local_rank=0, device=torch.device("cpu"))
    monkeypatch.setattr(distributed, "setup", lambda device, **options: four)
    sentence = told("pretrain", config({"train": {"batch": 10}}))
    assert (
        sentence == "The global batch size 10 does not divide among 4 ranks; use a multiple, such as 8 or 12."
    )


@pytest.mark.parametrize("flags", [["--train.epoch", "3"], ["--train.epochs", "three"]])
def test_mistakes_in_flags_end_with_2(flags: list, config, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(["pretrain", str(config()), *flags])
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert flags[0] in err
    assert "Traceback" not in err


# ---------------------------------------------------------------- eval and outputs


def test_a_second_folder_where_one_is_read(told) -> None:
    several = "One folder of shards is read here; `fastssl pretrain --data.shards`, `fastssl preview` and `fastssl eval knn --shards`"
    for command in (("inspect",), ("doctor",), ("bench", "loader"), ("split",)):
        name = "fastssl " + " ".join(command)
        assert told(*command, "a", "b") == (
            f"'b' is one word too many for `{name}`. {several} take several. `{name} --help` explains the options."
        )
    assert told("pretrain", "laptop", "--knn.shards", "a", "b").startswith(
        f"'b' is one word too many for `fastssl pretrain`, after --knn.shards. {several}"
    )
    assert told("bench", "shard", "photos", "--images", "10", "20") == (
        "'20' is one word too many for `fastssl bench shard`, after --images. `fastssl bench shard --help` explains the options."
    )


def test_eval_needs_labels(told, finished: Path, unlabelled_shards: Path) -> None:
    sentence = told("eval", "knn", finished, "--shards", unlabelled_shards, "--device", "cpu")
    assert sentence.endswith("kNN needs at least 2: convert a folder whose sub-folders are classes.")


def test_eval_needs_a_checkpoint(told, shards: Path, tmp_path: Path) -> None:
    (tmp_path / "photo.pt").write_bytes(b"\x89PNG")
    assert "photo.pt' is no checkpoint: give a .pt file" in told(
        "eval", "knn", tmp_path / "photo.pt", "--shards", shards
    )
    assert f"There is no checkpoint at '{tmp_path / 'none'}'" in told(
        "eval", "knn", tmp_path / "none", "--shards", shards
    )


def test_outputs_are_checked_before_the_work(told, tmp_path: Path) -> None:
    out = tmp_path / "none" / "out"
    # Neither shards nor checkpoint exist either: the output is looked at first.
    for flag, argv in (
        ("--out", ("preview", "no-shards")),
        ("--out", ("report", "no-run")),
        ("--json", ("eval", "knn", "no-run", "--shards", "no-shards")),
        ("--json", ("bench", "loader", "no-shards")),
        ("--json", ("bench", "step", "no-file.yaml")),
    ):
        assert (
            told(*argv, flag, out) == f"There is no folder '{out.parent}' for {flag} '{out}': make it first."
        )
    assert told("preview", "no-shards", "--out", tmp_path) == f"--out '{tmp_path}' is a folder: name a file."


def test_a_report_is_valid_json(finished: Path, shards: Path, tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    assert (
        main(
            [
                "eval",
                "knn",
                str(finished),
                "--shards",
                str(shards),
                "--json",
                str(path),
                "--baselines",
                "False",
            ]
        )
        == 0
    )
    [row] = json.loads(path.read_text())["rows"]
    assert set(row["accuracy"]) == {"10", "20", "59"}
