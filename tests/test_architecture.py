"""The shape of the code: who may import whom, how long a file may be, and that every setting is explained."""

import ast
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shards", "pipelines", "fastssl")
FILES = sorted(path for package in (*PACKAGES, "tests", "docs") for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 400
MAX_FILES = 15  # in a folder

# folder or file: what it must not import
FORBIDDEN = {
    "shards": ("pipelines", "fastssl", "torch", "torchvision", "timm"),
    "pipelines": ("fastssl",),
    "fastssl/methods": (
        "fastssl.training",
        "fastssl.pretraining",
        "fastssl.commands",
        "fastssl.cli",
    ),
    # Whatever is trained: it knows no kind of training, no method and no pretraining configuration.
    "fastssl/training": (
        "fastssl.pretraining",
        "fastssl.methods",
        "fastssl.evaluation",
        "fastssl.commands",
        "fastssl.cli",
    ),
}
# sub-package: those it may import from, beside the files that lie directly in its package; a folder not named here may import none
LAYERS = {
    "shards": {
        "storage": (),
        "images": ("storage",),
        "format": ("storage", "images"),
        "dataset": ("storage", "images", "format"),
        "splits": ("storage", "format", "dataset"),
        "sources": ("storage", "images", "format", "splits"),
        "conversion": ("storage", "images", "format", "dataset", "sources"),
        "checking": ("storage", "images", "format", "splits", "sources", "conversion"),
        "overview": ("storage", "images", "format", "dataset", "checking"),
        "commands": (
            "storage",
            "images",
            "format",
            "splits",
            "sources",
            "conversion",
            "checking",
            "overview",
        ),
    },
    "pipelines": {
        "augment": (),
        "cpu_kernels": ("augment",),
        "kernels": ("augment", "cpu_kernels"),
        "streaming": ("augment",),
        "engines": ("augment", "cpu_kernels", "kernels", "streaming"),
        "loading": ("augment", "cpu_kernels", "kernels", "streaming", "engines"),
        "previews": ("augment", "kernels", "streaming", "engines", "loading"),
    },
    "fastssl": {
        "core": (),
        "training": ("core",),
        "models": ("core",),
        "methods": ("core", "models"),
        "evaluation": ("core", "models"),
        "pretraining": ("core", "training", "models", "methods", "evaluation"),
        "commands": ("core", "models", "methods", "evaluation", "pretraining"),
        "demo": ("core", "models", "methods", "evaluation", "pretraining", "commands"),
        "bench": ("core", "models", "methods", "evaluation", "pretraining"),
        "doctor": (),
    },
}
SETTINGS = {
    "fastssl/models/model_config.py": ("ModelConfig",),
    "fastssl/pretraining/replay.py": ("Replay",),
    "fastssl/core/loggers.py": ("LogConfig",),
    "fastssl/core/optimizers.py": ("OptimConfig",),
    "fastssl/training/loop_config.py": ("LoopConfig",),
    "fastssl/pretraining/train_config.py": ("TrainConfig",),
    "fastssl/evaluation/knn.py": ("KNNConfig",),
    "fastssl/commands/eval_command.py": ("EvalKNN",),
    "fastssl/commands/preview_command.py": ("Preview",),
    "shards/sources/source_options.py": ("ListOptions", "RasterOptions"),
    "pipelines/loading/data_config.py": ("ShardsConfig",),
    "pipelines/loading/loader_options.py": ("ViewSettings", "LoaderOptions"),
    "shards/commands/split_command.py": ("Split",),
    "shards/commands/verify_command.py": ("Verify",),
    "shards/commands/label_command.py": ("Label",),
    "shards/commands/inspect_command.py": ("Inspect",),
    "fastssl/bench/conversion/bench_shard.py": ("BenchShard",),
    "fastssl/bench/conversion/bench_plan.py": ("BenchPlan",),
    "pipelines/augment/recipe.py": ("Recipe",),
}


def imported(path: Path) -> Iterator[str]:
    """Every module that a file imports, anywhere in it; `from a import b` may mean a module a.b."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level:  # relative to the package
                base = path.relative_to(ROOT).parent.parts
                module = ".".join([*base[: len(base) - node.level + 1], *([module] if module else [])])
            yield module
            yield from (f"{module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("where", FORBIDDEN)
def test_imports_point_one_way(where: str) -> None:
    files = sorted((ROOT / where).rglob("*.py"))
    assert files
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in files
        for name in imported(path)
        for banned in FORBIDDEN[where]
        if name == banned or name.startswith(f"{banned}.")
    }
    assert not wrong


def import_graph(package: str) -> dict[str, set[str]]:
    """Which files of a package each of its files imports, in functions and for type checkers too; both as dotted names."""
    files = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for path in (ROOT / package).rglob("*.py")
    }
    graph = {
        name: {other for other in imported(path) if other in files} - {name} for name, path in files.items()
    }
    return {name: others for name, others in graph.items() if not name.endswith("__init__")}


def circles(graph: dict[str, set[str]]) -> set[frozenset[str]]:
    """The groups of nodes that reach one another."""

    def reached(start: str) -> set[str]:
        found, waiting = set(), [start]
        while waiting:
            new = graph.get(waiting.pop(), set()) - found
            found |= new
            waiting += new
        return found

    after = {node: reached(node) for node in graph}
    return {
        frozenset(other for other in after[node] if node in after.get(other, ()))
        for node in graph
        if node in after[node]
    }


def folder_graph(graph: dict[str, set[str]]) -> dict[str, set[str]]:
    """The same between folders."""
    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        folder = name.rpartition(".")[0]
        found.setdefault(folder, set()).update({other.rpartition(".")[0] for other in others} - {folder})
    return found


@pytest.mark.parametrize("package", LAYERS)
def test_no_imports_go_in_a_circle(package: str) -> None:
    graph = import_graph(package)
    assert len(graph) > 5
    assert circles(graph) == set()
    assert circles(folder_graph(graph)) == set()


def test_circles_are_found() -> None:
    graph = {"p.a.x": {"p.b.y"}, "p.b.y": set(), "p.b.z": {"p.a.x"}, "p.c": {"p.b.z"}}
    assert circles(graph) == set()
    assert circles(folder_graph(graph)) == {frozenset({"p.a", "p.b"})}
    assert circles(graph | {"p.b.y": {"p.b.z"}}) == {frozenset({"p.a.x", "p.b.y", "p.b.z"})}


@pytest.mark.parametrize("package", LAYERS)
def test_sub_packages_import_in_one_direction(package: str) -> None:
    folders = {path.parent.name for path in (ROOT / package).glob("*/*.py")}
    assert folders == set(LAYERS[package])
    wrong = {
        f"{name} imports {other}"
        for name, others in import_graph(package).items()
        if name.count(".") > 1
        for other in others
        if other.count(".") > 1
        if (own := name.split(".")[1]) != (used := other.split(".")[1]) and used not in LAYERS[package][own]
    }
    assert not wrong


@pytest.mark.parametrize("package", LAYERS)
def test_no_folder_is_crowded(package: str) -> None:
    count = Counter(path.parent for path in (ROOT / package).rglob("*.py") if path.name != "__init__.py")
    assert {str(folder.relative_to(ROOT)): n for folder, n in count.items() if n > MAX_FILES} == {}


@pytest.mark.parametrize("package", LAYERS)
def test_tests_mirror_the_tree(package: str) -> None:
    folders = {
        path.parent.relative_to(ROOT / "tests") for path in (ROOT / "tests" / package).rglob("test_*.py")
    }
    assert {folder for folder in folders if not (ROOT / folder).is_dir()} == set()


def test_the_import_reader_sees_all_forms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    file = tmp_path / "a" / "b" / "c.py"
    file.write_text(
        "import torch.nn\ndef f():\n    from x import y\n    from . import z\n    from ..d import e\n"
    )
    assert set(imported(file)) == {"torch.nn", "x", "x.y", "a.b", "a.b.z", "a.d", "a.d.e"}


def test_no_file_is_too_long_to_read_in_one_sitting() -> None:
    lines = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in FILES}
    assert {name: count for name, count in lines.items() if count > MAX_LINES} == {}


def _method_configs() -> dict[str, tuple[str, ...]]:
    files = (ROOT / "fastssl" / "methods").glob("*.py")
    return {
        str(path.relative_to(ROOT)): names
        for path in files
        if (
            names := tuple(
                node.name
                for node in ast.parse(path.read_text()).body
                if isinstance(node, ast.ClassDef) and node.name.endswith("Config")
            )
        )
    }


def _settings() -> list[tuple[str, str]]:
    every = {**SETTINGS, **_method_configs()}
    return [(file, name) for file, names in every.items() for name in names]


@pytest.mark.parametrize(("file", "name"), _settings())
def test_every_setting_is_explained(file: str, name: str) -> None:
    """A docstring below each field, which `--settings` shows."""
    body = ast.parse((ROOT / file).read_text()).body
    [section] = [node for node in body if isinstance(node, ast.ClassDef) and node.name == name]
    assert ast.get_docstring(section)
    fields = [
        (node, after)
        for node, after in zip(section.body, [*section.body[1:], None], strict=True)
        if isinstance(node, ast.AnnAssign)
    ]
    assert fields
    silent = [
        ast.unparse(node.target)
        for node, after in fields
        if not (
            isinstance(after, ast.Expr)
            and isinstance(after.value, ast.Constant)
            and isinstance(after.value.value, str)
        )
    ]
    assert not silent


def test_there_is_a_method_to_check() -> None:
    assert "fastssl/methods/moco_v3.py" in _method_configs()


@pytest.mark.parametrize("package", PACKAGES)
def test_every_module_says_what_it_is_for(package: str) -> None:
    silent = [
        str(p) for p in (ROOT / package).rglob("*.py") if not ast.get_docstring(ast.parse(p.read_text()))
    ]
    assert not silent
