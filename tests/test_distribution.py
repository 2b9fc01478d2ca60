"""What `pip install .` installs: a wheel is built from a copy of the tree, and used from its own files."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.needs import HANGS_S

ROOT = Path(__file__).parents[1]
TREE = ("pyproject.toml", "README.md", "LICENSE", "configs", "fastssl", "pipelines", "shards")


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder into which the wheel is unpacked, as pip does."""
    folder = tmp_path_factory.mktemp("distribution")
    tree = folder / "tree"
    tree.mkdir()
    for name in TREE:
        if (ROOT / name).is_dir():
            # With its links, as a clone has them.
            skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(ROOT / name, tree / name, symlinks=True, ignore=skip)
        else:
            shutil.copy(ROOT / name, tree / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--quiet",
        "--no-deps",
        "--no-index",
        "--no-build-isolation",
    ]
    done = subprocess.run(
        [*command, "--wheel-dir", str(folder)], cwd=tree, capture_output=True, text=True, timeout=HANGS_S
    )
    assert done.returncode == 0, done.stderr
    [wheel] = folder.glob("fastssl_pretrain-*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def test_it_holds_every_module_and_every_configuration_and_no_other_package(installed: Path) -> None:
    def files(root: Path, pattern: str) -> set[str]:
        packages = ("fastssl", "pipelines", "shards")
        return {str(path.relative_to(root)) for p in packages for path in (root / p).rglob(pattern)}

    assert files(installed, "*.py") == files(ROOT, "*.py")
    names = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert len(names) > 10
    for name in names:
        assert (installed / "fastssl" / "configs" / name).read_bytes() == (
            ROOT / "configs" / name
        ).read_bytes()
    folders = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert folders == {"fastssl", "pipelines", "shards"}


@pytest.mark.parametrize("where", ["installation", "clone"])
def test_configurations_are_found_from_any_folder(where: str, installed: Path, tmp_path: Path) -> None:
    source = installed if where == "installation" else ROOT
    code = (
        "import fastssl; from fastssl.cli import main; print(fastssl.__file__); main(['configs']); main(['configs', 'laptop']); "
        "from fastssl.pretraining.packaged_configs import packaged; print(*packaged())"
    )
    environment = {**os.environ, "PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert Path(lines[0]) == source / "fastssl" / "__init__.py"
    assert lines[-1].split() == sorted(path.stem for path in (ROOT / "configs").glob("*.yaml"))
    assert (tmp_path / "laptop.yaml").read_bytes() == (ROOT / "configs" / "laptop.yaml").read_bytes()
