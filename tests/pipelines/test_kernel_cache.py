"""Kernels start where neither their folder nor the home folder can be written, as in a container that is read-only."""

import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numba
import pytest

from pipelines import kernel_cache
from tests.needs import HANGS_S

ROOT = Path(__file__).parents[2]
# Permissions do not stop root, so the folder beside the source is refused by hand; HOME and NUMBA_CACHE_DIR lie below a file.
READ_ONLY = """
import sys, warnings
from numba.core import caching
caching.InTreeCacheLocator.from_function = classmethod(lambda *_: None)
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    from pipelines.cpu_kernels.colour import solarize
    from pipelines.cpu_kernels import float_views
    from pipelines.augment import draws
import numpy
view = numpy.array([10, 200], numpy.uint8)
solarize(view)
assert view.tolist() == [10, 55]
stats = solarize.stats
from pipelines.kernel_cache import found_place
print(len(told), *found_place(), sum(stats.cache_hits.values()), sum(stats.cache_misses.values()))
for warning in told:
    print(warning.message)
"""


def start(tmp_path: Path, temporary: Path) -> list[str]:
    """What a new process without a place for its cache prints; it compiles one kernel."""
    file = tmp_path / "file"
    file.touch()
    environment = {**os.environ, "HOME": str(file), "TMPDIR": str(temporary), "PYTHONPATH": str(ROOT)}
    environment |= {"XDG_CACHE_HOME": str(file / "cache"), "NUMBA_CACHE_DIR": str(file / "numba")}
    done = subprocess.run(
        [sys.executable, "-c", READ_ONLY],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HANGS_S,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_the_cache_moves_to_a_temporary_folder_with_one_warning(tmp_path: Path) -> None:
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    first, told = start(tmp_path, temporary)
    [folder] = temporary.iterdir()
    assert first == f"1 {folder} False 0 1"
    assert f"compiled kernels are kept in '{folder}'" in told
    assert folder.stat().st_mode & 0o777 == 0o700
    # The next process finds what this one compiled.
    assert start(tmp_path, temporary)[0] == f"1 {folder} False 1 0"


def test_without_any_folder_kernels_are_compiled_but_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(kernel_cache.tempfile, "gettempdir", nowhere)
    stand_in = SimpleNamespace(njit=lambda **options: refused if options["cache"] else numba.njit(**options))
    monkeypatch.setattr(kernel_cache, "numba", stand_in)
    kernel_cache.fall_back.cache_clear()
    try:
        with pytest.warns(UserWarning, match="each start compiles the kernels again") as told:
            kernels = [
                kernel_cache.njit(nogil=True, cache=True)(f) for f in (lambda x: x + 1, lambda x: x + 2)
            ]
        assert len(told) == 1
        assert [kernel(1) for kernel in kernels] == [2, 3]
        assert kernel_cache.found_place() == ("", False)
    finally:
        kernel_cache.fall_back.cache_clear()


def refused(function):
    raise RuntimeError(f"cannot cache function {function.__name__!r}: no locator available for file 'x.py'")


def test_other_faults_of_numba_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(**options):
        raise RuntimeError("something else")

    monkeypatch.setattr(kernel_cache, "numba", SimpleNamespace(njit=broken))
    with pytest.raises(RuntimeError, match="something else"):
        kernel_cache.njit(cache=True)(refused)


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file", "of another user"])
def test_a_folder_that_others_may_write_is_not_used(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache.tempfile, "tempdir", str(tmp_path))
    own = kernel_cache.temporary_folder()
    assert own.parent == tmp_path
    assert own == kernel_cache.temporary_folder()
    if kind == "open to others":
        own.chmod(0o777)
    elif kind == "of another user":
        there = os.getuid()
        monkeypatch.setattr(kernel_cache.os, "getuid", lambda: there + 1)
        own.rename(own.with_name(f"fastssl-kernels-{there + 1}"))
    else:
        own.rmdir()
        if kind == "a link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            own.symlink_to(tmp_path / "elsewhere")
        else:
            own.touch()
    other = kernel_cache.temporary_folder()
    assert other not in (own, own.with_name(f"fastssl-kernels-{os.getuid()}"))
    assert other.stat().st_mode & 0o777 == 0o700


def test_a_change_of_a_kernel_reaches_the_cached_ones_that_call_it(tmp_path: Path) -> None:
    """Numba alone would go on with the old code: a silent wrong result after an update of one file."""
    for package in ("pipelines", "shards"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    code = (
        "import numpy as np; from pipelines.cpu_kernels.float_views import levels as kernel\n"
        "out = np.empty((1, 1, 1), np.float32)\n"
        "kernel(np.full((1, 1, 1), 2, np.uint8), np.ones(1, np.float32), np.zeros(1, np.float32), out)\n"
        "print(float(out[0, 0, 0]), sum(kernel.stats.cache_hits.values()))"
    )

    def run() -> str:
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "NUMBA_CACHE_DIR": str(tmp_path / "cache")}
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            capture_output=True,
            text=True,
            timeout=HANGS_S,
            cwd=tmp_path,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    assert [run(), run()] == ["1.0 0", "1.0 1"]
    changed = tmp_path / "pipelines" / "cpu_kernels" / "colour.py"
    changed.write_text(changed.read_text() + "\n# changed\n")
    assert [run(), run()] == ["1.0 0", "1.0 1"]


def test_every_kernel_is_compiled_here() -> None:
    """A kernel with numba's own decorator would fail in such a container."""
    direct = [
        str(path.relative_to(ROOT))
        for package in ("shards", "pipelines", "fastssl")
        for path in (ROOT / package).rglob("*.py")
        if re.search(r"^\s*(from|import) numba\b", path.read_text(), re.MULTILINE)
    ]
    assert direct == ["pipelines/kernel_cache.py"]


def test_usually_nothing_is_said() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        folder, lasts = kernel_cache.found_place()
    assert folder
    assert lasts
