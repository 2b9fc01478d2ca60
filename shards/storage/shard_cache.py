"""Remote shards kept on a local disk: checked, limited in size, shared by all processes of this machine."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from shards.errors import UserError
from shards.storage.atomic_files import lock_file
from shards.storage.cache_settings import held_files
from shards.storage.remote import RemotePlace

DOWNLOADS = 4  # at once, of shards that are wanted soon
POLL_S = 0.05
FAILED_S = 30.0  # for so long a shard that could not be had is not asked for again
# The time of change that a checked file is given: one that has another was written to since. The time of access says when it was used.
STAMP_NS = 981_173_106 * 10**9


@dataclass(frozen=True)
class CachedFile:
    """A file as it must be: `key` tells its content from that of others of its name; `sha256` is empty where it is not known."""

    name: str
    bytes: int
    key: str
    sha256: str = ""


class ShardCache:
    """Files of one place on a local disk. Safe to use from threads and from many processes at once.

    A file has its content's hash in its name, so the same shards at two addresses lie here once, and shards made anew do not meet old
    ones. It is written to a `.part`, which its writer holds locked, and gets its name when its size and SHA-256 are those of the
    manifest: so whoever finds a `.part` unlocked knows that its writer is dead. Files used longest ago make room for new ones; an open
    file or a map of it stays valid when it is removed.
    """

    def __init__(self, place: RemotePlace, folder: Path, limit_bytes: int):
        self.place, self.folder, self.limit_bytes = place, folder, limit_bytes
        self._failed: dict[str, tuple[float, Exception]] = {}
        self._queue: deque[CachedFile] = deque()
        self._num_threads = 0
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._exclusive().close()
        except OSError as error:
            raise UserError(
                f"The cache '{folder}' cannot be written ({error.strerror}); choose another with --data.cache-dir."
            ) from error

    def open(self, file: CachedFile) -> IO[bytes]:
        """The file, open to read and whole; download it where it is not here, or waits for the process that does.

        Raise FileNotFoundError where the store does not have it any more, UserError where it cannot be had or is another.
        """
        after_s, error = self._failed.get(file.name, (0.0, None))
        if error is not None and time.monotonic() < after_s:
            raise error
        try:
            found = self._fetch(file, wait=True)
        except (OSError, UserError) as error:
            self._failed[file.name] = (time.monotonic() + FAILED_S, error)
            raise
        assert found is not None
        return found

    def prefetch(self, files: Sequence[CachedFile]) -> None:
        """Begin to download those that are not here, in this order, as many as the limit allows at once.

        Returns at once, and forgets what was asked for before. All files are marked as used, so that none makes room for another.
        """
        wanted, total = deque[CachedFile](), 0
        for file in files:
            total += file.bytes
            if total > self.limit_bytes:
                break
            if not self.touch(file):
                wanted.append(file)
        with self._lock:
            self._queue = wanted
            new = min(DOWNLOADS, len(wanted)) - self._num_threads
            self._num_threads += max(0, new)
        for _ in range(new):
            threading.Thread(target=self._work, name="download", daemon=True).start()

    def touch(self, file: CachedFile) -> bool:
        """Mark a file as used now; False where it is not here."""
        path = self._path(file)
        try:
            changed_ns = path.stat().st_mtime_ns
            os.utime(path, ns=(time.time_ns(), changed_ns))
        except FileNotFoundError:
            return False
        return True

    def holds(self, file: CachedFile) -> bool:
        """Whether a file is here."""
        return self._path(file).exists()

    def check(self, file: CachedFile) -> bool | None:
        """Read all of a file that is here and compares its SHA-256; None where it is not here. A wrong one is removed."""
        path = self._path(file)
        try:
            with open(path, "rb") as found:
                right = not file.sha256 or hashlib.file_digest(found, "sha256").hexdigest() == file.sha256
                right = right and os.fstat(found.fileno()).st_size == file.bytes
        except FileNotFoundError:
            return None
        if right:
            with contextlib.suppress(FileNotFoundError):
                os.utime(path, ns=(time.time_ns(), STAMP_NS))
        else:
            path.unlink(missing_ok=True)
        return right

    def _path(self, file: CachedFile, suffix: str = "") -> Path:
        stem, _, extension = file.name.rpartition(".")
        return self.folder / f"{stem}-{file.key[:40]}.{extension}{suffix}"

    def _work(self) -> None:
        while True:
            with self._lock:
                if not self._queue:
                    self._num_threads -= 1
                    return
                file = self._queue.popleft()
            # Whoever reads it meets the error again and tells of it.
            with contextlib.suppress(OSError, UserError):
                if found := self._fetch(file, wait=False):
                    found.close()

    def _fetch(self, file: CachedFile, *, wait: bool) -> IO[bytes] | None:
        """The file, open; None where another is at it and we do not `wait`."""
        while True:
            if found := self._open_here(file):
                return found
            path = self._path(file, ".part")
            part = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
            try:
                try:
                    fcntl.flock(part, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                except BlockingIOError:
                    part.close()
                    return None
                # Whoever held it before has given it its name by now, or removed it.
                if not _is_same(part, path):
                    part.close()
                    continue
                if found := self._open_here(file):
                    path.unlink()
                    part.close()
                    return found
                self._download(file, part)
                os.utime(path, ns=(time.time_ns(), STAMP_NS))
                os.replace(path, self._path(file))
            except BaseException:
                if not part.closed:
                    if _is_same(part, path):
                        path.unlink(missing_ok=True)
                    part.close()
                raise
            # The lock on it must go, not the file: what is open stays readable when others make room.
            fcntl.flock(part, fcntl.LOCK_UN)
            part.seek(0)
            return part

    def _open_here(self, file: CachedFile) -> IO[bytes] | None:
        path = self._path(file)
        try:
            status = path.stat()
            if status.st_size != file.bytes:
                path.unlink(missing_ok=True)
                return None
            if status.st_mtime_ns != STAMP_NS and not self.check(file):
                return None
            found = open(path, "rb")  # noqa: SIM115 (returned open)
        except FileNotFoundError:
            return None
        self.touch(file)
        return found

    def _download(self, file: CachedFile, part: IO[bytes]) -> None:
        self._make_room(file, part)
        for attempt in (1, 2):
            digest = hashlib.sha256()
            part.seek(0)
            try:
                for piece in self.place.pieces(file.name, file.bytes):
                    part.write(piece)
                    digest.update(piece)
                part.flush()
                os.fsync(part.fileno())
            except OSError as error:
                if isinstance(error, FileNotFoundError):
                    raise
                raise UserError(
                    f"The cache '{self.folder}' cannot hold '{file.name}' ({error.strerror or error}); choose another with "
                    "--data.cache-dir, or set a limit with --data.cache-bytes."
                ) from error
            if not file.sha256 or digest.hexdigest() == file.sha256:
                return
            if attempt == 2:
                raise UserError(
                    f"'{self.place / file.name}' has SHA-256 {digest.hexdigest()[:16]}..., its manifest says "
                    f"{file.sha256[:16]}...: it was changed or damaged after the conversion; put it there again."
                )

    def _make_room(self, file: CachedFile, part: IO[bytes]) -> None:
        """Remove files used longest ago until this one fits, and takes its place by giving the part its full length."""
        if file.bytes > self.limit_bytes:
            raise UserError(
                f"'{file.name}' has {file.bytes:,} bytes and the cache '{self.folder}' may hold {self.limit_bytes:,}: raise "
                "--data.cache-bytes."
            )
        while True:
            with self._exclusive():
                # In this order, since a part that becomes whole meanwhile is then counted twice, and not overlooked.
                coming = self._coming(part)
                files = sorted(held_files(self.folder))
                total = sum(size for _, _, size in files) + coming
                for _, path, size in files:
                    if total + file.bytes <= self.limit_bytes:
                        break
                    path.unlink(missing_ok=True)
                    total -= size
                if total + file.bytes <= self.limit_bytes:
                    part.truncate(file.bytes)
                    return
            time.sleep(POLL_S)  # what is left is being downloaded; it can make room when it is whole

    def _coming(self, own: IO[bytes]) -> int:
        """The bytes of the parts that living processes write, but for our own; those of dead ones are removed."""
        total = 0
        for path in self.folder.glob("*.part"):
            try:
                with open(path, "rb") as part:
                    if _is_same(own, path):
                        continue
                    try:
                        fcntl.flock(part, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        total += os.fstat(part.fileno()).st_size
                    else:
                        if _is_same(part, path):
                            path.unlink(missing_ok=True)
            except FileNotFoundError:
                continue
        return total

    def _exclusive(self) -> IO[str]:
        """An open file that keeps all others from making room until it is closed."""
        while True:
            with contextlib.suppress(BlockingIOError):
                return lock_file(self.folder / ".lock")
            time.sleep(POLL_S / 10)


def _is_same(file: IO[bytes], path: Path) -> bool:
    """Whether the name still means the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False
