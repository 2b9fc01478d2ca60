"""Compile kernels with Numba, and keep them in a temporary folder where none of Numba's usual places can be written."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import stat
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba as _numba

# Untyped: its stubs know neither options in a mapping nor its configuration.
numba: Any = _numba


_SOURCES = ("pipelines/cpu_kernels/*.py", "pipelines/augment/*.py", "shards/counter_hash.py")


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """Return a decorator that compiles a function as `numba.njit` does with these options.

    A cached kernel holds the code of all that it calls, and Numba looks only at the kernel's own file for changes: here a change of
    any file in `_SOURCES` makes all of them be compiled again.

    With cache=True Numba raises where it finds no place for its files, as in a container whose packages and home are read-only. The
    cache is then kept in a temporary folder, with one warning, or not at all where there is no such folder either.
    """

    def compile_function(function: Callable[..., Any]) -> Any:
        try:
            return _stamped(numba.njit(**options)(function))
        except RuntimeError as error:
            if "no locator available" not in str(error):
                raise
        return _stamped(numba.njit(**{**options, "cache": fall_back()})(function))

    return compile_function


def _stamped(kernel: Any) -> Any:
    """Let a kernel's cache be valid only as long as no file with kernels has changed."""
    # Numba has no public way to say so. Without these attributes, in another version, it looks at the kernel's own file.
    file: Any = getattr(getattr(kernel, "_cache", None), "_cache_file", None)
    if hasattr(file, "_source_stamp"):
        file._source_stamp = (file._source_stamp, _sources())
    return kernel


@functools.cache
def _sources() -> bytes:
    """Return a digest of all files that may hold kernels."""
    root = Path(__file__).parents[1]
    files = sorted(path for pattern in _SOURCES for path in root.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).digest()


@functools.cache
def fall_back() -> bool:
    """Let Numba keep compiled kernels in a temporary folder and warn. Return False where no temporary folder can be written."""
    found = "Neither the folder of the program nor the home folder can be written"
    way_out = "To keep them, set NUMBA_CACHE_DIR to a folder that can be written and lasts."
    try:
        folder = temporary_folder()
    except OSError:
        warnings.warn(f"{found}, so each start compiles the kernels again. {way_out}", stacklevel=4)
        return False
    numba.config.CACHE_DIR = str(folder)
    warnings.warn(f"{found}: compiled kernels are kept in '{folder}'. {way_out}", stacklevel=4)
    return True


def found_place() -> tuple[str, bool]:
    """Return the folder where compiled kernels are kept ("": none), and whether it lasts, as the temporary one may not."""
    probe = njit(cache=True)(lambda: None)
    if fall_back.cache_info().currsize:
        return (numba.config.CACHE_DIR if fall_back() else ""), False
    return probe.stats.cache_path, True


def temporary_folder() -> Path:
    """Return a folder for compiled kernels that only this user can write: code that others could write would be run.

    It is the same for all processes of the user, or a new one where another user has taken its name. OSError: there is none.
    """
    folder = Path(tempfile.gettempdir(), f"fastssl-kernels-{os.getuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    about = folder.lstat()
    if stat.S_ISDIR(about.st_mode) and about.st_uid == os.getuid() and about.st_mode & 0o777 == 0o700:
        return folder
    return Path(tempfile.mkdtemp(prefix="fastssl-kernels-"))
