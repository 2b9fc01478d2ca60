"""Writers from JPEG files to shards, or to nothing, that `fastssl bench shard` measures; each runs in `workers` processes.

The work on an image is one of DEEDS, the same functions for all but our own converter. webdataset and litdata are used as their
documentation shows, webdataset with one ShardWriter per process.
"""

from __future__ import annotations

import contextlib
import io
import multiprocessing
import os
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

from shards.errors import UserError

SHORT_SIDE, QUALITY = 256, 95
# Images that a process takes at a time.
_CHUNK = 32


@dataclass(frozen=True)
class Task:
    """The files that each row converts, below `folder`, and the processes that do it."""

    folder: Path
    files: list[str]
    workers: int
    pool: Pool
    """`workers` processes that have imported what they need, so that their start does not count; that of ours and litdata's does.

    Ours are copies of a process that has imported as well, in the turn to warm up.
    """

    def paths(self) -> list[str]:
        """Return the paths of the files."""
        return [str(self.folder / file) for file in self.files]


@dataclass(frozen=True)
class Turn:
    """One measurement: seconds from the call to the last file, and CPU seconds of all processes."""

    wall_s: float
    cpu_s: float


# --------------------------------------------------------------------------------------------- what is done with an image


def read(path: str) -> bytes:
    """Return the file's bytes."""
    return Path(path).read_bytes()


def proof(path: str) -> bytes:
    """Return the file's bytes after decoding it with the library with which our converter proves JPEGs."""
    import simplejpeg

    data = read(path)
    simplejpeg.decode_jpeg(data, strict=True)
    return data


def smaller(path: str) -> bytes:
    """Return the image scaled to a short side of SHORT_SIDE (Lanczos) and encoded again, by the libraries of our converter."""
    import simplejpeg
    from PIL import Image

    image = Image.fromarray(simplejpeg.decode_jpeg(read(path), strict=True))
    scale = SHORT_SIDE / min(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    out = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=QUALITY)
    return out.getvalue()


DEEDS: dict[str, Callable[[str], bytes]] = {"read": read, "proof": proof, "smaller": smaller}


# ----------------------------------------------------------------------------------------------------------- the writers


def _only_here(paths: list[str], deed: str) -> int:
    """Do the work on some images in this process and return the number of bytes made."""
    return sum(len(DEEDS[deed](path)) for path in paths)


def only(task: Task, out: Path, deed: str) -> None:
    """Do the work on every image and write nothing; no bytes travel between processes."""
    paths = task.paths()
    parts = [(paths[i : i + _CHUNK], deed) for i in range(0, len(paths), _CHUNK)]
    task.pool.starmap(_only_here, parts, chunksize=1)


def ours(task: Task, out: Path, deed: str) -> None:
    """Convert as `fastssl shard` does: listing, plan, proof, shards, checksums, statistics, duplicates, manifest."""
    from shards.conversion.convert import convert
    from shards.images.policy import Policy

    policy = Policy(short_side=SHORT_SIDE, quality=QUALITY) if deed == "smaller" else Policy()
    manifest = convert(task.folder, out / "shards", workers=task.workers, policy=policy)
    assert manifest is not None, "all of it was asked for"
    if manifest.num_samples != len(task.files):
        raise UserError(
            f"{len(task.files) - manifest.num_samples} of the images are refused, so they cannot be compared: take clean ones."
        )


def webdataset(task: Task, out: Path, deed: str) -> None:
    """Write with webdataset's ShardWriter, one in each process, each with an equal part of the files."""
    paths = task.paths()
    parts = [(paths[k :: task.workers], str(out / f"part{k}-%06d.tar"), deed) for k in range(task.workers)]
    task.pool.starmap(_write_tars, parts, chunksize=1)


def _write_tars(paths: list[str], pattern: str, deed: str) -> None:
    from webdataset import ShardWriter  # pyright: ignore[reportAttributeAccessIssue] (made at run time)

    with ShardWriter(pattern, maxcount=4096, verbose=0) as writer:
        for number, path in enumerate(paths):
            writer.write({"__key__": f"{number:09d}", "jpg": DEEDS[deed](path)})


def litdata(task: Task, out: Path, deed: str) -> Turn:
    """Write with litdata's `optimize`, in a process of its own, as it changes global settings; importing it does not count."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    args = (theirs, task.paths(), str(out / "litdata"), task.workers, deed)
    process = context.Process(target=_optimize, args=args)
    process.start()
    theirs.close()
    try:
        answer = ours.recv()
    except EOFError:
        answer = RuntimeError(f"its process ended with code {process.exitcode}")
    process.join()
    if isinstance(answer, Exception):
        raise answer
    return Turn(*answer)


def _optimize(pipe: Any, paths: list[str], out: str, workers: int, deed: str) -> None:
    try:
        from litdata import optimize

        from fastssl.bench.report import Stopwatch

        with (
            open(os.devnull, "w") as quiet,
            contextlib.redirect_stdout(quiet),
            contextlib.redirect_stderr(quiet),
        ):
            watch = Stopwatch()
            # Forked workers start at once; the default would import torch again in each of them.
            optimize(
                Record(deed),
                paths,
                out,
                num_workers=workers,
                chunk_bytes="64MB",
                start_method="fork",
                verbose=False,
            )
            wall_s = watch.wall_s()
            pipe.send((wall_s, watch.cores() * watch.wall_s()))
    except Exception as error:
        pipe.send(RuntimeError(f"{type(error).__name__}: {error}"))


@dataclass(frozen=True)
class Record:
    """Make the record that litdata stores of an image; a class, so that it can be sent to workers."""

    deed: str

    def __call__(self, path: str) -> dict[str, Any]:
        return {"image": DEEDS[self.deed](path)}
