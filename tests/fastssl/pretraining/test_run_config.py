"""Configuration: YAML is flags, flags win, and what is misspelt is told with the nearest name."""

import dataclasses
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastssl.methods.moco_v3 import MoCoV3Config as Config
from fastssl.pretraining.run_config import Resolved, from_tree, load
from pipelines.augment.recipe import RECIPES
from shards.errors import UserError

CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def read(tmp_path: Path, text: str, *flags: str) -> Resolved:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return load(path, list(flags))


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "section", "key", "value"),
    [
        ("optim: {lr: 3e-4}", "optim", "lr", 3e-4),  # YAML 1.1 alone would call this a string
        ("optim: {lr: 1}", "optim", "lr", 1.0),
        ("train: {compile: true}", "train", "compile", True),
        ("train: {compile: True}", "train", "compile", True),
        ("train: {channels_last: false}", "train", "channels_last", False),
        ("train: {out: no}", "train", "out", "no"),
        ("train: {out: 'no'}", "train", "out", "no"),
        ("train: {out: true}", "train", "out", "true"),
        ("train: {out: 'null'}", "train", "out", "null"),
        ("train: {out: ~/runs/a}", "train", "out", str(Path.home() / "runs/a")),
        ("train: {out: 2024-01-02}", "train", "out", "2024-01-02"),
        ("train: {out: 'a: b # c é'}", "train", "out", "a: b # c é"),
        ("log: {name: ''}", "log", "name", ""),
        ("train: {out: -1}", "train", "out", "-1"),
        ("recipe: {crop_scale: [0.3, 1]}", "recipe", "crop_scale", (0.3, 1.0)),
        ("recipe: {blur_p: [0.5]}", "recipe", "blur_p", (0.5,)),
        ("recipe: {blur_p: 0.5}", "recipe", "blur_p", (0.5,)),
        (
            "recipe:\n  value_high: [1, 1, 1]\n  value_low:\n  - -1\n  - -2.5e-3\n  - 0",
            "recipe",
            "value_low",
            (-1.0, -2.5e-3, 0.0),
        ),
        ("train: {device: cpu}\noptim:\n", "train", "device", "cpu"),  # a section with nothing in it
        ("", "train", "device", "auto"),
    ],
)
def test_a_value_means_what_it_says(text: str, section: str, key: str, value, tmp_path: Path) -> None:
    found = getattr(getattr(read(tmp_path, text).config, section), key)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("flags", "section", "key", "value"),
    [
        (["--optim.lr", "3e-4"], "optim", "lr", 3e-4),
        (["--optim.lr=3e-4"], "optim", "lr", 3e-4),
        (["--train.compile", "true"], "train", "compile", True),
        (["--train.compile=False"], "train", "compile", False),
        (["--train.channels-last=false"], "train", "channels_last", False),
        (["--train.out", "true"], "train", "out", "true"),
        (["--train.save-every", "3"], "train", "save_every", 3),
        (["--train.save_every", "3"], "train", "save_every", 3),
        (
            ["--recipe.value-high", "1", "1", "1", "--recipe.value-low", "-1", "-2.5e-3", "0"],
            "recipe",
            "value_low",
            (-1.0, -2.5e-3, 0.0),
        ),
        (["--train.out=~/runs/a"], "train", "out", str(Path.home() / "runs/a")),
        (["--train.seed", "1", "--train.seed", "2"], "train", "seed", 2),
    ],
)
def test_a_flag_means_the_same(flags: list, section: str, key: str, value, tmp_path: Path) -> None:
    assert getattr(getattr(read(tmp_path, "", *flags).config, section), key) == value


def test_flags_win_over_the_file_and_the_file_over_the_preset(tmp_path: Path) -> None:
    text = "recipe: {preset: satellite, size: 32, hue: 0.2}\ntrain: {epochs: 5, seed: 3}"
    cfg = read(tmp_path, text, "--recipe.hue", "0.3", "--train.epochs", "7").config
    assert (cfg.recipe.size, cfg.recipe.hue, cfg.recipe.quarter_turns) == (32, 0.3, True)
    assert (cfg.train.epochs, cfg.train.seed, cfg.train.batch) == (7, 3, 256)


@pytest.mark.parametrize(
    "flags",
    [
        ["--recipe", "satellite"],
        ["--recipe=satellite"],
        ["--recipe.preset", "satellite"],
        ["--recipe.preset=satellite"],
        ["--recipe", "moco_v2", "--recipe.preset", "satellite"],
    ],
)
def test_a_preset_on_the_command_line_replaces_the_file_s(flags: list, tmp_path: Path) -> None:
    found = read(tmp_path, "recipe: {preset: moco_v3_resnet, size: 32}", *flags).config.recipe
    assert found.quarter_turns
    assert (found.hue, found.size) == (0.05, 32)
    assert load(None, flags).config.recipe == RECIPES["satellite"]


def test_the_method_is_chosen_by_name_in_both_places(tmp_path: Path) -> None:
    text = "method: {name: moco_v3, hidden_dim: 64}"
    for found in (read(tmp_path, text), read(tmp_path, text, "--method.name", "moco_v3")):
        assert found.method_name == "moco_v3"
        assert found.config.method == Config(hidden_dim=64)


def test_all_defaults_without_a_file() -> None:
    assert load(None) == load(None, [])
    assert load(None).config.recipe == RECIPES["moco_v3"]


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_the_published_configurations_load(path: Path, tmp_path: Path) -> None:
    found = load(path)
    assert from_tree(found.tree()) == found
    assert read(tmp_path, found.to_yaml()) == found


# ---------------------------------------------------------------- there and back

WORDS = st.text(
    st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\u2028\u2029\x85\ufeff$"),
    min_size=1,
    max_size=12,
    # A word that begins with a dash is a flag, one with a tilde a home folder, and a folder has a name.
).filter(lambda s: s[0] not in "-~" and s.strip() != "")


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    out=WORDS
    | st.sampled_from(["no", "true", "null", "1e3", "0x10", "a,b", "[1]", "{a: 1}", "#", "%", "'", '"']),
    lr=st.floats(min_value=1e-30, max_value=1e6),
    mean=st.tuples(*[st.floats(0, 1)] * 3),
    blur=st.sampled_from([(0.0,), (1.0, 0.1), (1e-7, 1.0)]),
    compiled=st.booleans(),
)
def test_there_and_back(out, lr, mean, blur, compiled, tmp_path: Path) -> None:
    tree = load(None).tree()
    tree["train"].update(out=out, compile=compiled)
    tree["optim"]["lr"] = lr
    tree["recipe"].update(mean=list(mean), blur_p=list(blur))
    found = from_tree(tree)
    cfg = found.config
    assert (cfg.train.out, cfg.train.compile, cfg.optim.lr) == (out, compiled, lr)
    assert (cfg.recipe.mean, cfg.recipe.blur_p) == (mean, blur)
    assert found.tree() == tree
    assert from_tree(found.tree()) == found
    assert read(tmp_path, found.to_yaml()) == found


@pytest.mark.parametrize(("old", "new"), [("true", "blocks"), ("false", "none")])
def test_settings_that_were_renamed_are_read_by_their_former_names(
    old: str, new: str, tmp_path: Path
) -> None:
    path = tmp_path / "old.yaml"
    path.write_text(f"model:\n  grad_checkpointing: {old}\n")
    assert load(path).config.train.checkpointing == new
    tree = load(None).tree()
    del tree["train"]["checkpointing"]
    tree["model"]["grad_checkpointing"] = old == "true"  # as checkpoints hold it
    assert from_tree(tree).config.train.checkpointing == new
    with pytest.raises(
        UserError, match=r"no setting '--model.grad_checkpointing'. Did you mean 'train.checkpointing'"
    ):
        load(path, ["--model.grad_checkpointing", "True"])


@pytest.mark.parametrize(("written", "meant"), [("auto", "auto"), ("64", 64), ("0", 0)])
def test_a_micro_batch_is_a_number_or_auto(written: str, meant: int | str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"train:\n  micro_batch: {written}\n")
    for resolved in (load(path), load(None, ["--train.micro-batch", written]), from_tree(load(path).tree())):
        assert resolved.config.train.micro_batch == meant


@pytest.mark.parametrize("preset", RECIPES)
def test_every_preset_can_be_changed_in_the_file_and_by_flags(preset: str, tmp_path: Path) -> None:
    text = f"recipe: {{preset: {preset}, crop_scale: [0.3, 0.9], erase_p: 0.5, erase_value: 0.25}}"
    resolved = read(tmp_path, text, "--recipe.crop-scale", "0.2", "1", "--recipe.erase-ratio", "0.5", "2")
    expected = dataclasses.replace(
        RECIPES[preset], crop_scale=(0.2, 1.0), erase_p=0.5, erase_value=0.25, erase_ratio=(0.5, 2.0)
    )
    assert resolved.config.recipe == expected
    assert from_tree(resolved.tree()).config.recipe == expected


def test_a_tree_is_plain_and_left_as_it_is() -> None:
    found = load(None)
    tree = found.tree()
    assert yaml.safe_load(yaml.safe_dump(tree)) == tree
    assert tree["method"]["name"] == "moco_v3"
    from_tree(tree)
    assert tree == found.tree()


def test_a_section_may_be_written_in_parts_of_two_spellings(tmp_path: Path) -> None:
    config = read(
        tmp_path, "train: {batch: 16}\ntrain.epochs: 3\nrecipe: satellite\nrecipe.size: 96\n"
    ).config
    assert (config.train.batch, config.train.epochs, config.recipe.size) == (16, 3, 96)
    assert dataclasses.replace(config.recipe, size=RECIPES["satellite"].size) == RECIPES["satellite"]


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "train: {epoch: 3}",
            "run.yaml', line 1 has an unknown key 'train.epoch'. Did you mean 'train.epochs'?",
        ),
        ("train: {temperature: 3}", "unknown key 'train.temperature'. Did you mean 'method.temperature'?"),
        ("epochs: 3", "unknown key 'epochs'. Did you mean 'train.epochs'?"),
        ("model: {backbone: {name: x}}", "unknown key 'model.backbone.name'. Did you mean 'model.backbone'?"),
        ("recipe: {prest: satellite}", "unknown key 'recipe.prest'. Did you mean 'recipe.preset'?"),
        ("recipe: {preset: satelite}", "There is no recipe called 'satelite'. Did you mean 'satellite'?"),
        ("recipe: satelite", "There is no recipe called 'satelite'. Did you mean 'satellite'?"),
        ("recipe: [satellite]", "There is no recipe called '['satellite']'."),
        ("method: {name: moco_v2}", "There is no method 'moco_v2'. Did you mean 'moco_v3'?"),
        ("train:\n  epochs: [", "run.yaml', line 2 is not valid YAML: expected the node content"),
        ("train: {batch: 1, batch: 2}", "run.yaml', line 1: 'train.batch' stands there again, after line 1:"),
        (
            "train:\n  batch: 1\n  batch: 1\n",
            "run.yaml', line 3: 'train.batch' stands there again, after line 2:",
        ),
        ("train.batch: 8\ntrain:\n  batch: 16\n", "line 3: 'train.batch' stands there again, after line 1:"),
        ("train: {batch: 16}\n\ntrain.batch: 8", "line 3: 'train.batch' stands there again, after line 1:"),
        (
            "train: {batch: 16}\ntrain: {epochs: 8}",
            "line 2: 'train' stands there again, after line 1: put both into one.",
        ),
        ("recipe: satellite\nrecipe: moco_v3", "line 2: 'recipe' stands there again, after line 1:"),
        (
            "recipe: satellite\nrecipe.preset: moco_v3",
            "line 2: 'recipe.preset' stands there again, after line 1",
        ),
        ("train:\ntrain: {batch: 16}", "line 2: 'train' stands there again, after line 1"),
        (
            "train: {batch: 16}\nrecipe: {preset: moco_v3}\ntrain:",
            "line 3: 'train' stands there again, after line 1",
        ),
        ("recipe: moco_v3\nrecipe: {size: 96}", "line 2: 'recipe' stands there again, after line 1"),
        ("train:\n  <<: {batch: 8}", "run.yaml', line 2: '<<' would take in the settings of another section"),
        ("a: &x {batch: 8}\ntrain: *x", "run.yaml', line 1 has an unknown key 'a.batch'."),
        (
            "data:\n  shards: $DATA/shards",
            "run.yaml', line 2: data.shards is '$DATA/shards', but a file has no shell that fills in $DATA:",
        ),
        (
            "train:\n  out: ${HOME}/x",
            "line 2: train.out is '${HOME}/x', but a file has no shell that fills in",
        ),
        ("data:\n  cache_dir: ~\n", "line 2: data.cache_dir is ~, which is YAML's word for nothing: leave"),
        ("train:\n  epochs: null", "line 2: train.epochs is null, which is YAML's word for nothing"),
        (
            "recipe:\n  size: [32, 64]",
            "run.yaml', line 2: recipe.size is one value, but a list of 2 stands there: [32, 64].",
        ),
        ("data:\n  shards: [{a: b}]", "line 2: data.shards is a list, whose values must be words or numbers"),
        (
            f"train:\n  epochs: 3\n  seed: {10**22}",
            f"run.yaml', line 3: train.seed is {10**22}, but it must be less than 2^63",
        ),
        (
            "recipe:\n  mean: [123.7, 116.3, 103.5]",
            "line 2: recipe.mean is (123.7, 116.3, 103.5), but it must be between 0 and 1 in every channel",
        ),
        (
            "recipe:\n  std: [58.4, 57.1, 57.4]",
            "line 2: recipe.std is (58.4, 57.1, 57.4), but it must be above 0 and at most 1",
        ),
        ("optim:\n  lr: inf", "line 2: optim.lr is inf, but it must be a finite number."),
        ("method:\n  temperature: nan", "line 2: method.temperature is nan, but it must be a finite number."),
        ("train:\n  clip_grad: nan", "line 2: train.clip_grad is nan, but it must be"),
        ("train: {out: ''}", "line 1: train.out is empty, such as from a variable that is not set"),
        ("just words", "run.yaml' must hold sections such as 'train:'"),
        ("- train", "run.yaml' must hold sections such as 'train:'"),
    ],
)
def test_a_mistake_in_the_file_is_named(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, text)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--train.epoch", "3"], "There is no setting '--train.epoch'. Did you mean 'train.epochs'?"),
        (
            ["--train.sav-every=3"],
            "There is no setting '--train.sav-every'. Did you mean 'train.save_every'?",
        ),
        (["--optim.lr", "inf"], "optim.lr is inf, but it must be a finite number."),
        (["--train.clip-grad", "nan"], "train.clip_grad is nan, but it must be"),
        (["--method.temperature", "nan"], "method.temperature is nan, but it must be a finite number."),
        (["--optim.betas", "0.9", "nan"], "optim.betas is (0.9, nan) but must be"),
        (["--train.seed", "1" * 23], "but it must be less than 2^63"),
        (["--lr", "3"], "There is no setting '--lr'. Did you mean 'optim.lr'?"),
        (["--recipe.preset", "moco3"], "There is no recipe called 'moco3'. Did you mean 'moco_v3'?"),
        (["--recipe", "moco3"], "There is no recipe called 'moco3'. Did you mean 'moco_v3'?"),
        (["--recipe"], "--recipe needs a value."),
        (["--method.name=mocov3"], "There is no method 'mocov3'. Did you mean 'moco_v3'?"),
        (["--recipe.preset"], "--recipe.preset needs a value."),
        (["stray"], "'stray' is one word too many for `fastssl pretrain`."),
    ],
)
def test_a_mistake_in_a_flag_is_named(flags: list, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read(tmp_path, "recipe: {preset: moco_v3}", *flags)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "flags", "words"),
    [
        ("", ["--train.epochs", "many"], ("--train.epochs", "many")),
        ("", ["--train.epochs", "1.5"], ("--train.epochs", "1.5")),
        ("train: {compile: yes}", [], ("--train.compile", "yes", "True", "False")),
        ("train: {device: gpu}", [], ("--train.device", "gpu", "cuda")),
        ("recipe: {crop_scale: [0.1]}", [], ("--recipe.crop-scale",)),
    ],
)
def test_a_wrong_value_ends_with_exit_code_2_and_its_name(
    text: str, flags: list, words: tuple, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        read(tmp_path, text, *flags)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    told = " ".join(err.replace("│", " ").split())
    assert all(word in told for word in words), told


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        ("recipe: {crop_scale: [0.9, 0.1]}", [], r"recipe\.crop_scale is \(0\.9, 0\.1\), .*least <= most"),
        ("train: {epochs: 0}", [], r"train\.epochs is 0, but it must be at least 1"),
        ("", ["--optim.lr", "-1"], r"optim\.lr is -1 .*greater than 0"),
        ("", ["--optim.lr", "nan"], r"optim\.lr is nan .*greater than 0"),
        ("", ["--optim.betas", "0.9", "1.0"], r"optim\.betas is \(0\.9, 1\.0\) .*less than 1"),
        ("", ["--data.threads", "-1"], r"data\.threads is -1"),
    ],
)
def test_a_value_out_of_range_is_told_in_one_sentence(
    text: str, flags: list, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, text, *flags)


def test_a_missing_file_names_a_near_one(tmp_path: Path) -> None:
    (tmp_path / "satellite.yaml").touch()
    with pytest.raises(
        UserError, match=r"no configuration file '.*satelite\.yaml'\. '.*' holds satellite\.yaml\.$"
    ):
        load(tmp_path / "satelite.yaml")
    with pytest.raises(UserError, match=r"no configuration file 'nowhere/x.yaml'\.$"):
        load("nowhere/x.yaml")


def test_a_file_that_cannot_be_read_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be read as a configuration file"):
        load(tmp_path)
    (tmp_path / "image.yaml").write_bytes(b"\x89PNG\xff\xfe")
    with pytest.raises(UserError, match="cannot be read as a configuration file"):
        load(tmp_path / "image.yaml")


def test_colours_of_the_views_come_from_the_command_line_and_back():
    flags = ["--recipe.jitter-p", "0.8", "0", "--recipe.hue", "0.2"]
    loaded = load(None, flags)
    recipe = loaded.config.recipe
    assert (recipe.jitter_p, recipe.hue, recipe.gray_p) == ((0.8, 0.0), 0.2, 0.2)
    assert from_tree(loaded.tree()).config == loaded.config
