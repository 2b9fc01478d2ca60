"""The shape of the code: who may import whom, how long a file may be, and that every setting is explained."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("shards", "pipelines", "fastssl")
FILES = sorted(path for package in (*PACKAGES, "tests", "docs") for path in (ROOT / package).rglob("*.py"))
MAX_LINES = 400

# folder or file: what it must not import
FORBIDDEN = {
    "shards": ("pipelines", "fastssl", "torch", "torchvision", "timm"),
    "pipelines": ("fastssl",),
    "fastssl/methods": (
        "fastssl.pretraining.loop",
        "fastssl.pretraining.run_config",
        "fastssl.commands.pretrain_command",
        "fastssl.cli",
    ),
}
# Folder of fastssl: the others that it may import. Nobody is below `core`, which knows no other.
FASTSSL_FOLDERS = {
    "core": set(),
    "models": {"core"},
    "methods": {"core", "models"},
    "evaluation": {"core", "models"},
    "pretraining": {"core", "models", "methods", "evaluation"},
    "commands": {"core", "models", "methods", "evaluation", "pretraining"},
    "demo": {"core", "models", "methods", "evaluation", "pretraining", "commands"},
    "bench": {"core", "models", "methods", "evaluation", "pretraining"},
    "doctor": set(),
}
SETTINGS = {
    "fastssl/models/model_config.py": ("ModelConfig",),
    "fastssl/pretraining/replay.py": ("Replay",),
    "fastssl/core/loggers.py": ("LogConfig",),
    "fastssl/core/optimizers.py": ("OptimConfig",),
    "fastssl/pretraining/train_config.py": ("TrainConfig",),
    "fastssl/evaluation/knn.py": ("KNNConfig",),
    "fastssl/commands/eval_command.py": ("EvalKNN",),
    "fastssl/commands/preview_command.py": ("Preview",),
    "shards/sources/source_options.py": ("ListOptions", "RasterOptions"),
    "pipelines/loading/data_config.py": ("DataConfig",),
    "shards/commands/split_command.py": ("Split",),
    "shards/commands/verify_command.py": ("Verify",),
    "shards/commands/inspect_command.py": ("Inspect",),
    "fastssl/bench/shard.py": ("BenchShard",),
    "fastssl/bench/plan.py": ("BenchPlan",),
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


@pytest.mark.parametrize("folder", FASTSSL_FOLDERS)
def test_folders_of_fastssl_import_what_lies_below_them(folder: str) -> None:
    """Imports inside functions and for type checkers count as well."""
    allowed = {folder, *FASTSSL_FOLDERS[folder]}
    wrong = {
        f"{path.relative_to(ROOT)} imports {name}"
        for path in (ROOT / "fastssl" / folder).rglob("*.py")
        for name in imported(path)
        if name.startswith("fastssl.") and name.split(".")[1] not in {*allowed, "__version__"}
    }
    assert not wrong


def test_the_folders_of_fastssl_have_an_order() -> None:
    found = {path.parent.name for path in (ROOT / "fastssl").glob("*/__init__.py")}
    assert found == set(FASTSSL_FOLDERS)
    assert list(
        graphlib.TopologicalSorter(FASTSSL_FOLDERS).static_order()
    )  # raises CycleError where two allow each other


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
        str(path.relative_to(ROOT)): ("Config",)
        for path in files
        if any(isinstance(n, ast.ClassDef) and n.name == "Config" for n in ast.parse(path.read_text()).body)
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
