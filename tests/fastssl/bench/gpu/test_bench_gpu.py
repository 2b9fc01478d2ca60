"""`fastssl bench gpu`: its table of stages, what it asks for beforehand; all of it once at tiny size."""

import json
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from fastssl.bench.gpu import goals, gpu_command, images, preflight, processes, stages
from fastssl.bench.gpu.processes import Ended, Processes
from fastssl.bench.gpu.stages import CARDS, STAGES, SWITCHES, TURNS, CheckSetup, Sizes
from fastssl.bench.ladder.ladder_rows import ENDINGS, GROUPS
from fastssl.bench.ladder.verdict import END_TO_END, FULL, MOCO_V3
from fastssl.pretraining import run_config
from shards.errors import UserError

ROOT = Path(__file__).parents[4]


def plan(on_gpu: bool = True, out: Path = Path("o"), **sizes) -> CheckSetup:
    return CheckSetup(ROOT, Path("w"), Path("s"), out, "2026-11-24-h100", on_gpu, Sizes(**sizes))


# ------------------------------------------------------------------------------------------------------- stages


@pytest.mark.parametrize("short", [True, False])
@pytest.mark.parametrize("on_gpu", [True, False])
@pytest.mark.parametrize("name", STAGES)
def test_every_job_has_settings_that_exist_and_a_file_of_its_own(name, on_gpu, short):
    made = plan(on_gpu, short=short)
    jobs = made.stage(name).jobs
    assert jobs or (name in ("memory", "warm") and not on_gpu)
    outs = [job.out for job in jobs if job.out]
    assert len(set(outs)) == len(outs)
    assert len({job.name for job in jobs}) == len(jobs)
    for job in jobs:
        if job.argv[0] == "bench" and job.argv[1].endswith(".yaml"):
            flags = list(job.argv[2:])
            for ours in ("--json", "--steps", "--repeats", "--rows"):
                at = flags.index(ours)
                if ours == "--rows":
                    assert set(flags[at + 1].split(",")) <= set(GROUPS)
                del flags[at : at + 2]
            cfg = run_config.load(job.argv[1], flags).config
            assert cfg.train.batch < 4096
            if name == "memory":
                assert cfg.train.batch == 2 * int(cfg.train.micro_batch)


def test_options_of_the_other_benchmarks_exist():
    """Of those without a configuration: their parsers take them."""
    import tyro

    from fastssl.bench.loaders.augmenters import AUGMENTERS
    from fastssl.bench.loaders.bench_augment import BenchAugment
    from fastssl.bench.loaders.bench_loader import BenchLoader, choose
    from fastssl.bench.loaders.peers import PEERS
    from pipelines.engines.engine_table import engine_names

    kinds = {"augment": BenchAugment, "loader": BenchLoader}
    for short in (True, False):
        for name in ("augment", "loader", "loader_peers"):
            [job] = plan(short=short).stage(name).jobs
            made = tyro.cli(kinds[job.argv[1]], args=list(job.argv[2:]))
            assert made.json == str(job.out)
            assert made.batch == 256
            if isinstance(made, BenchLoader):
                assert "fused" in choose(made.engines, {name: name for name in engine_names()}, "engine")
                choose(made.peers, PEERS, "peer")
            else:
                assert {"triton", "kornia-modules"} <= {
                    each.name for each in choose(made.engines, AUGMENTERS, "engine")
                }


def test_the_short_form_measures_what_the_goals_ask_for_first():
    order = [name for turn in TURNS for name in turn]
    assert set(order) == set(STAGES) == set(stages.MEANINGS)
    assert TURNS[:6] == (
        ("facts",),
        ("tests", "images", "warm"),
        ("vit_small",),
        ("resnet50",),
        ("vit_base",),
        ("augment",),
    )
    assert order[-3:] == list(stages.LATER)
    short = plan(short=True)
    for model in stages.MODELS:
        [first], [more] = short.stage(model).jobs, short.stage(f"{model}_more").jobs
        assert first.argv[first.argv.index("--rows") + 1] == "full,kernels,end,plain"
        assert more.argv[more.argv.index("--rows") + 1] == "end_gpu,end_decode,parts"
        # Both forms together have every row of the ladder.
        rows = stages.ASKED, stages.EXPLAINING, stages.REST
        assert set(",".join(rows).split(",")) == set(GROUPS)
    cards = {job.name.removeprefix("memory-") for job in short.stage("memory").jobs}
    assert cards == set(stages.JUDGED_CARDS) < set(CARDS)
    assert short.stage("vit_small").limit_s == 110
    assert plan().stage("vit_small").limit_s == 570


def test_each_file_of_gpu_tests_is_a_process_of_its_own():
    lanes = plan().stage("tests").lanes
    files = [lane[0].argv[-1] for lane in lanes]
    assert all(len(lane) == 1 for lane in lanes)
    assert {"tests/pipelines/loading/test_gpu_views.py", "tests/fastssl/pretraining/test_gpu_step.py"} <= set(
        files
    )
    assert all((ROOT / name).exists() for name in files)
    assert "tests/fastssl/bench/gpu/test_bench_gpu.py" not in files


def test_every_switch_of_the_page_is_measured_and_the_other_way_round():
    page = (ROOT / "docs" / "speed.md").read_text()
    measured = {word for flags in SWITCHES.values() for word in flags if word.startswith("--")}
    for flag in measured - {"--optim.name", "--optim.lr", "--optim.weight_decay"}:
        assert f"`{flag.removeprefix('--')}" in page
    # The table of switches names them itself, once there is a measurement of it.
    for name in ENDINGS.keys() - {"end"}:
        assert f"`{name}`" in page


def test_each_goal_s_file_is_one_that_its_stage_leaves():
    for goal in goals.GOALS:
        jobs = plan(short=True).stage(goal.stage).jobs
        made = {job.out.stem.removeprefix("2026-11-24-h100-") for job in jobs if job.out}
        assert goal.file in made | ({goal.stage} if goal.stage in ("memory", "tests") else set())
        if goal.stage == "memory":
            assert {f"memory-{card}" for card in stages.JUDGED_CARDS} <= made


# ---------------------------------------------------------------------------------------------------- preflight

STRUCK = ["simplejpeg", "tyro", "docstring_parser", "typeguard", "torch", "rich", "numba"]


def test_all_missing_packages_are_named_at_once_before_anything_runs(tmp_path):
    code = (
        f"import sys\nfor name in {STRUCK}: sys.modules[name] = None\n"
        f"from fastssl.cli import main\nsys.exit(main(['bench', 'gpu', '--first', '--out', {str(tmp_path / 'out')!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    names = "torch numba simplejpeg tyro docstring-parser typeguard rich"
    assert f"not installed: {names.replace(' ', ', ')}. Install them: " in done.stderr
    assert f"-m pip install {names}. For a machine without a network" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_packages_that_only_a_part_needs_are_told(monkeypatch):
    monkeypatch.setattr(preflight, "is_there", lambda module: module != "nvidia.nvimgcodec")
    assert preflight.check_packages() == [
        "nvidia-nvimgcodec-cu12 is not installed: without decoding on the GPU (pip install nvidia-nvimgcodec-cu12 "
        "nvidia-nvjpeg-cu12)"
    ]


def test_every_dependency_of_the_project_is_known_to_the_preflight():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    named = {line.split(">")[0].split(";")[0] for line in project["dependencies"]}
    known = {*preflight.NEEDED.values(), *(package.split()[0] for package, _ in preflight.WANTED.values())}
    assert named - known == {"matplotlib"}  # draws curves and previews, which no measurement does


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--only", "augmnt"], "no stage called 'augmnt'. Did you mean 'augment'"),
        (["--seconds", "20"], "--seconds is 20, but it must be greater than 20"),
        (["--scale", "2"], "--scale is 2"),
        (["--images", "0"], "--images is 0"),
        (["--shards", "no/such"], "no folder 'no/such' for --shards"),
        (["--gpu", "H100"], "give it with --only verdict"),
    ],
)
def test_mistakes_are_named(argv, words):
    with pytest.raises(UserError, match=words):
        gpu_command.run(argv)


def test_stages_bring_what_they_need(tmp_path):
    def chosen(*argv: str) -> set[str]:
        return gpu_command.choose_stages(gpu_command.parser().parse_args(argv))

    assert chosen("--only", "augment") == {"augment", "images"}
    assert chosen("--only", "augment", "--shards", str(tmp_path)) == {"augment"}
    assert chosen("--only", "tests") == {"tests"}
    assert chosen() == set(STAGES)
    assert chosen("--first") == set(STAGES) - set(stages.LATER)


def test_photographs_are_made_once_and_all_differ(tmp_path):
    photos, shards = tmp_path / "photographs", tmp_path / "shards"
    argv = [str(photos), str(shards), "30"]
    assert images.main(argv) == 0
    files = sorted(photos.iterdir())
    assert len(files) == len({file.read_bytes() for file in files}) == 30
    before = {
        file: file.stat().st_mtime_ns for folder in (photos, shards) for file in folder.rglob("*.[jtp]*")
    }
    assert images.main(argv) == 0
    after = {
        file: file.stat().st_mtime_ns for folder in (photos, shards) for file in folder.rglob("*.[jtp]*")
    }
    assert before == after
    assert sorted(tmp_path.iterdir()) == [photos, shards]


# ------------------------------------------------------------------------------------------------ the whole of it


@pytest.mark.slow
def test_the_first_minutes_at_tiny_size_from_start_to_verdict(tmp_path, capsys):
    out, work = tmp_path / "out", tmp_path / "work"
    argv = ["--first", "--tiny", "--out", str(out), "--work", str(work), "--seconds", "1200"]
    assert gpu_command.run(argv) == 0
    shown = capsys.readouterr().out
    with tarfile.open(out / "results.tgz") as tar:
        names = set(tar.getnames())
        tar.extractall(tmp_path / "opened", filter="data")
    stamp = next(name for name in names if name.endswith("-facts.json")).removesuffix("-facts.json")

    def read(name: str):
        return json.loads((tmp_path / "opened" / f"{stamp}-{name}.json").read_text())

    facts = read("facts")
    assert facts["gpu"] == ""
    assert facts["versions"]["torch"]
    assert facts["rates"]["measured"]["tflops"] > 0
    assert facts["first_views_s"]["fused"] > 0
    for model in stages.MODELS:
        report = read(f"ladder-{model}")
        rows = {row["name"]: row for row in report["rows"]}
        for name in (FULL, "loader", END_TO_END, MOCO_V3, "student forward + backward", "EMA + optimiser"):
            assert rows[name]["images_per_s"] > 0, (model, name)
        assert rows[END_TO_END]["contention"] > 0
        assert not any(row["failure"] for row in rows.values())
        assert " gpu needs " in rows["end to end, decoded on the GPU"]["error"]
    assert {row["name"]: row["images_per_s"] > 0 for row in read("augment")} == {"torch": True, "fused": True}
    assert "fused" in {row["name"] for row in read("loader")}
    tests = read("tests")
    assert (tests["passed"], tests["failed"]) == (0, [])
    assert tests["skipped"] > 50
    assert tests["reasons"] == ["no CUDA device can allocate memory here"]
    verdict = {row["goal"]: row for row in read("verdict")}
    assert list(verdict) == [goal.text for goal in goals.GOALS]
    assert all(row["met"] is None for row in verdict.values())
    assert verdict["tests that want a GPU: failed"]["why"].startswith(f"no test ran, {tests['skipped']} were")
    assert verdict["ViT-S/16 end to end"]["why"] == "measured with backbone resnet10_w32, not moco_vit_small"
    jobs = {row["name"]: row for row in read("jobs")}
    assert {"facts", "images", "augment", "ladder-vit_base-more", "loader"} <= set(jobs)
    assert {row["code"] for row in jobs.values()} == {0}
    assert {f"logs/{name}.log" for name in jobs} <= names
    # On the screen, too: rows, and the verdict as the last thing.
    assert f"0 met, 0 missed, {len(goals.GOALS)} not known" in shown
    assert "moco-v3's own kind of step" in shown
    assert shown.rstrip().endswith("results.tgz")
    assert sorted(path.name for path in out.iterdir() if not path.name.startswith(stamp)) == ["results.tgz"]


def test_a_stage_that_fails_is_told_and_the_verdict_comes_all_the_same(tmp_path, monkeypatch, capsys):
    work = tmp_path / "work"

    def run(self, lanes, limit_s, told):
        ended = []
        for each in [job for lane in lanes for job in lane]:
            facts = each.name == "facts"
            if each.out is not None:
                each.out.write_text(json.dumps({"gpu": "NVIDIA H100 80GB HBM3"}) if facts else "no json")
            ended.append(Ended(each, 0 if facts else 1, 1.0))
            told(ended[-1])
        return ended

    monkeypatch.setattr(Processes, "run", run)
    argv = ["--only", "switches_vit_small", "tests", "--out", str(tmp_path), "--work", str(work)]
    assert gpu_command.run(argv) == 1
    shown = capsys.readouterr().out
    assert "failed: the results of switches_vit_small (JSONDecodeError" in shown
    assert "failed: the results of tests (ParseError" in shown
    assert "0 met, 0 missed" in shown
    assert list(tmp_path.glob("*-nvidia-h100-80gb-hbm3-verdict.json"))
    assert (tmp_path / "results.tgz").exists()
    gpu = ["--gpu", "NVIDIA H100 80GB HBM3"]
    assert gpu_command.run(["--only", "verdict", *gpu, "--out", str(tmp_path)]) == 0


def test_a_warm_up_that_fails_is_told_and_is_no_failure(tmp_path, monkeypatch, capsys):
    def run(self, lanes, limit_s, told):
        ended = []
        for each in [job for lane in lanes for job in lane]:
            if each.name == "facts":
                each.out.write_text(json.dumps({"gpu": "NVIDIA H100 80GB HBM3"}))
            ended.append(Ended(each, processes.TOO_LONG if each.name == "warm-vit_base" else 0, 180.0))
            told(ended[-1])
        return ended

    monkeypatch.setattr(Processes, "run", run)
    assert gpu_command.run(["--only", "warm", "--out", str(tmp_path), "--work", str(tmp_path / "work")]) == 0
    assert "warm-vit_base: 180 s, took too long" in capsys.readouterr().out


def test_nothing_is_measured_where_the_machine_cannot_be_known(tmp_path, monkeypatch):
    ran = []

    def run(self, lanes, limit_s, told):
        ran.extend(job.name for lane in lanes for job in lane)
        return []

    monkeypatch.setattr(Processes, "run", run)
    with pytest.raises(
        UserError, match="The facts of this machine could not be read, so nothing is measured: see the log in"
    ):
        gpu_command.run(["--first", "--out", str(tmp_path), "--work", str(tmp_path / "work")])
    assert ran == ["facts"]
