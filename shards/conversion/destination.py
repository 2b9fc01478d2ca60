"""The folder that a conversion writes to: made where it is new, refused where it is somebody else's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from shards.conversion.listing import SCRATCH
from shards.errors import UserError
from shards.format import layout
from shards.storage.atomic_files import is_unfinished, missing_folders, remove_empty
from shards.storage.place import Place


@contextlib.contextmanager
def shard_folder(dest: Place) -> Iterator[None]:
    """Make the folder of the shards; where the conversion ends before anything is written there, leave it as it was.

    Raise UserError for a file, a folder that cannot be written, and one that holds files that are no shards.
    """
    if dest.local is None:
        # A store has no folders, and its lock is taken over by the next conversion.
        _make_folder(dest)
        yield
        return
    new = missing_folders(dest.local)
    before = set(dest.names()) if dest.local.is_dir() else set()
    _make_folder(dest)
    try:
        yield
    except BaseException:
        locks = set(dest.names()) - before
        if all(name.startswith(layout.LOCK) for name in locks):
            # Those that parts share are kept while one of them is at work.
            with contextlib.suppress(UserError), dest.lock(layout.LOCK):
                for name in {*locks, layout.LOCK} - before:
                    dest.remove(name)
            remove_empty(new)
        raise


def _make_folder(dest: Place) -> None:
    try:
        dest.make()
        names = dest.names()
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"'{dest.url}' is a file; DEST is the folder for the shards.") from None
    except OSError as error:
        raise UserError(
            f"'{dest.url}' cannot be written ({error.strerror or error}); choose another DEST."
        ) from error
    # With a plan the folder is ours, and what a user laid beside the shards does no harm.
    foreign = [
        name for name in names if not name.startswith((layout.LOCK, SCRATCH)) and not is_unfinished(name)
    ]
    if layout.PLAN not in names and foreign:
        raise UserError(
            f"'{dest.url}' already holds other files, such as '{foreign[0]}'; give a new or an empty folder."
        )
