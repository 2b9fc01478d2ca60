"""A place in a store that fsspec reaches (S3, Google Cloud Storage, HTTP, ...), with retries of what networks drop."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import posixpath
import random
import tempfile
import time
from collections.abc import Callable, Iterator
from http import HTTPStatus
from typing import IO, Any, TypeVar

from shards.errors import UserError
from shards.storage.atomic_files import RangeFile
from shards.storage.lease import hold
from shards.storage.place import Place, whole
from shards.units import plural

T = TypeVar("T")
TRIES = 8
FIRST_PAUSE_S = 0.2  # doubled after each failed try, up to LONGEST_PAUSE_S: some 23 s in all
LONGEST_PAUSE_S = 10.0
SILENCE_S = 30.0  # a connection that gives no byte for so long counts as dropped
READ_AHEAD_BYTES = 1 << 20
PIECE_BYTES = 16 << 20  # of a download: what a dropped connection costs
_HTTP = ("http", "https")
_GOOGLE = ("gs", "gcs")
# What to install for a protocol; for others fsspec's own error says it.
_PACKAGES = {
    "s3": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp requests",
    "https": "aiohttp requests",
}
_HOPELESS = (TypeError, ValueError, NotImplementedError, IsADirectoryError, NotADirectoryError)


class Unreachable(UserError):
    """A store did not answer rightly, try after try. `reason`: a few words, the same on every machine."""

    reason = "the server does not answer"


class Refused(UserError):
    """A store answers that a file may not be used, or its address cannot be. `reason`: a few words, the same on every machine."""

    def __init__(self, text: str, reason: str):
        super().__init__(text)
        self.reason = reason


class RemotePlace(Place):
    """A folder in a store. Failed requests and short reads are tried again, with growing pauses between.

    tries: how often in all, None for `TRIES`.
    """

    def __init__(self, url: str, tries: int | None = None):
        self.url = url
        self.tries = tries
        self.protocol = url.partition("://")[0]
        self._open_store()

    def _open_store(self) -> None:
        import fsspec

        if self.protocol in _GOOGLE:
            # Read when gcsfs is imported. Otherwise each call asks for the kind of the bucket, and warns where it may not.
            os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
        try:
            self._store, self._root = fsspec.core.url_to_fs(self.url, **_options(self.protocol))
        except ImportError as error:
            package = _PACKAGES.get(self.protocol)
            way_out = f": pip install {package}" if package else ""
            raise UserError(
                f"'{self.url}' needs a package for {self.protocol}:// ({error}){way_out}."
            ) from error
        except ValueError as error:
            raise UserError(f"'{self.url}' is of no known protocol ({error}).") from error
        # s3fs tries five times by itself, gcsfs six; ours would multiply them.
        if hasattr(self._store, "retries"):
            self._store.retries = 1
        once = getattr(getattr(type(self._store), "_request", None), "__wrapped__", None)
        if self.protocol in _GOOGLE and once:
            self._store._request = once.__get__(self._store)
        self._root = self._root.rstrip("/")

    def __reduce__(self):
        return RemotePlace, (self.url, self.tries)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}".rstrip("/") if name else self._root

    def _try(self, work: Callable[[], T], what: str) -> T:
        """The result of `work`; FileNotFoundError where there is no such thing, UserError for all else that stays wrong."""
        pause_s = FIRST_PAUSE_S
        tries = self.tries or TRIES
        for attempt in range(1, tries + 1):
            try:
                return work()
            except Exception as raised:  # each store raises its own
                error = _meant(raised, self.protocol)
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), what) from error
            if isinstance(error, UserError):
                raise error
            if isinstance(error, PermissionError) or _status(error) in (401, 403):
                status = _status(error) or 403
                raise Refused(
                    f"'{what}' may not be used ({_say(error)}); check the credentials.",
                    f"the server answers {status} ({HTTPStatus(status).phrase})",
                ) from error
            if type(error).__name__ in ("NoCredentialsError", "NoAuthTokenError"):
                raise UserError(f"'{what}' needs credentials ({_say(error)}).") from error
            # that: half an answer
            if isinstance(error, _HOPELESS) and not isinstance(error, json.JSONDecodeError):
                raise Refused(
                    f"'{what}' cannot be used ({_say(error)}).", "its address cannot be used"
                ) from error
            if attempt == tries:
                raise Unreachable(
                    f"'{what}' failed {plural(tries, 'time')}, last: {_say(error)}. Run the same command again when the store "
                    "answers."
                ) from error
            self._store.invalidate_cache()
            # Not all at the same moment, where many were refused together.
            time.sleep(pause_s * random.uniform(0.75, 1.0))
            pause_s = min(2 * pause_s, LONGEST_PAUSE_S)
        raise AssertionError

    def is_there(self) -> bool:
        try:
            self._try(lambda: self._store.ls(self._root, detail=False), self.url)
        except FileNotFoundError:
            return self.protocol in _HTTP  # a server that answers may show no listing
        return True

    def check_folder(self, what: str) -> None:
        try:
            self._try(lambda: self._store.ls(self._root, detail=False), self.url)
        except FileNotFoundError:
            raise UserError(f"There is nothing at '{self.url}'; check the URL of {what}.") from None

    def size(self, name: str) -> int | None:
        try:
            about = self._try(lambda: self._store.info(self._at(name)), self / name)
        except FileNotFoundError:
            return None
        return int(about["size"] or 0) if about["type"] == "file" else None

    def _size(self, name: str) -> int | None:
        """A file's bytes, tried once; None where the store does not say, as some web servers."""
        return self._store.info(self._at(name))["size"]

    def sizes(self) -> dict[str, int] | None:
        if self.protocol in _HTTP:
            return None
        entries = self._try(lambda: self._store.ls(self._root, detail=True), self.url)
        return {posixpath.basename(e["name"]): int(e["size"] or 0) for e in entries if e["type"] == "file"}

    def names(self, folder: str = "") -> list[str]:
        try:
            entries = self._try(lambda: self._store.ls(self._at(folder), detail=True), self / folder)
        except FileNotFoundError:
            return []
        # Some stores list the folder itself as an empty file.
        files = (posixpath.basename(entry["name"]) for entry in entries if entry["type"] == "file")
        return sorted(name for name in files if name)

    def walk(self) -> Iterator[tuple[str, int]]:
        waiting = [""]
        while waiting:
            folder = waiting.pop()
            entries = self._try(
                lambda folder=folder: self._store.ls(self._at(folder), detail=True), self / folder
            )
            for entry in entries:
                own = posixpath.basename(entry["name"].rstrip("/"))
                name = f"{folder}/{own}" if folder else own
                if (
                    not own
                    or own.startswith(".")
                    or own == "__MACOSX"
                    or entry["name"].rstrip("/") == self._at(folder)
                ):
                    continue
                if entry["type"] == "directory":
                    waiting.append(name)
                else:
                    yield name, int(entry["size"] or 0)

    def read(self, name: str, listed_bytes: int = 0) -> bytes:
        def work() -> bytes:
            data = self._store.cat_file(self._at(name))
            if len(data) == listed_bytes:
                return data
            size = self._size(name)
            return data if size is None else whole(data, self / name, 0, size)

        return self._try(work, self / name)

    def read_range(self, name: str, offset: int, size: int) -> bytes:
        def work() -> bytes:
            data = self._store.cat_file(self._at(name), start=offset, end=offset + size)
            if len(data) > size:  # a web server that gives the whole file whatever part is asked for
                data = data[offset : offset + size]
            return whole(data, self / name, offset, size)

        return self._try(work, self / name)

    def pieces(self, name: str, size: int) -> Iterator[bytes]:
        """A file of a known size, piece by piece; UserError where it has another."""
        found = self._try(lambda: self._size(name), self / name)
        if found not in (None, size):
            raise UserError(
                f"'{self / name}' has {found:,} bytes and should have {size:,}: it was cut or changed after the conversion; put it "
                "there again."
            )
        if size > PIECE_BYTES and self.protocol in _HTTP and not self._gives_ranges(name):
            yield self.read(name, size)
            return
        for offset in range(0, size, PIECE_BYTES):
            yield self.read_range(name, offset, min(PIECE_BYTES, size - offset))

    def _gives_ranges(self, name: str) -> bool:
        return self._try(lambda: len(self._store.cat_file(self._at(name), start=0, end=1)), self / name) == 1

    def open(self, name: str) -> IO[bytes]:
        size = self._try(lambda: self._size(name), self / name)
        if size is None or size <= READ_AHEAD_BYTES:
            return io.BytesIO(self.read(name, size or 0))
        ranges = RangeFile(size, lambda offset, wanted: self.read_range(name, offset, wanted))
        return io.BufferedReader(ranges, READ_AHEAD_BYTES)

    def write(self, name: str, content: bytes | Callable[[Any], T]) -> T | None:
        # Made on this machine first: a store shows a file only when all of it has arrived, and a try that failed can be repeated.
        with tempfile.NamedTemporaryFile(prefix="fastssl-") as file:
            result = None
            if callable(content):
                result = content(file)
            else:
                file.write(content)
            file.flush()
            size = os.stat(file.name).st_size

            def work() -> None:
                self._store.put_file(file.name, self._at(name))
                if (found := self._size(name)) != size:
                    raise OSError(f"{found} bytes of {size} arrived")

            self._try(work, self / name)
        return result

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file only where there is none; False where there is one.

        Exact on S3 and whatever else knows conditional writes; elsewhere two writers of the same moment may both get True.
        """

        def work() -> bool:
            try:
                self._store.pipe_file(self._at(name), content, mode="create")
            except FileExistsError:
                return False
            except (NotImplementedError, TypeError):
                if self._store.exists(self._at(name)):
                    return False
                self._store.pipe_file(self._at(name), content)
            return True

        return self._try(work, self / name)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._try(lambda: self._store.rm_file(self._at(name)), self / name)

    def remove_tree(self, folder: str) -> None:
        for name in self.names(folder):
            self.remove(f"{folder}/{name}")

    def make(self) -> None:
        self.check_writable("give a DEST that can be written, such as s3://")
        with contextlib.suppress(NotImplementedError):
            self._try(lambda: self._store.makedirs(self._root, exist_ok=True), self.url)

    def check_writable(self, way_out: str) -> None:
        if self.protocol in _HTTP:
            raise UserError(f"'{self.url}' lies on a web server and can only be read; {way_out}.")

    def lock(self, name: str, *, shared: bool = False) -> contextlib.AbstractContextManager[None]:
        """As `Place.lock`, by a small file that its holder keeps touching: `shards.storage.lease`."""
        return hold(self, name, shared=shared)


def _options(protocol: str) -> dict[str, Any]:
    """What every store of a protocol is opened with."""
    # Listings would otherwise be remembered, and files that other processes wrote not be seen.
    options: dict[str, Any] = {"use_listings_cache": False}
    if protocol in ("s3", "s3a"):
        # botocore repeats what failed too: once is enough, `_try` repeats the whole.
        options["config_kwargs"] = {
            "retries": {"total_max_attempts": 1, "mode": "standard"},
            "read_timeout": SILENCE_S,
        }
    if protocol in (*_HTTP, *_GOOGLE):
        with contextlib.suppress(ImportError):  # fsspec then says what is missing
            import aiohttp

            # By default a request ends after five minutes, at work or not.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=SILENCE_S, sock_read=SILENCE_S)
            options["client_kwargs" if protocol in _HTTP else "session_kwargs"] = {"timeout": timeout}
    return options


def _meant(error: Exception, protocol: str) -> Exception:
    """What really happened: fsspec's HTTP store says "not found" of a server that failed or did not answer."""
    cause = error.__cause__
    if protocol in _HTTP and isinstance(error, FileNotFoundError) and isinstance(cause, Exception):
        return error if getattr(cause, "status", 0) in (404, 410) else cause
    return FileNotFoundError() if _status(error) == 410 else error


def _status(error: Exception) -> int:
    """The HTTP status that an error tells of, 0 where none."""
    if str(error).startswith("Forbidden: "):  # gcsfs
        return 403
    code = getattr(error, "status", 0) or getattr(error, "code", 0)
    return code if isinstance(code, int) else 0


def _say(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
