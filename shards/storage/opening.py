"""From a path or a URL to the place that it names."""

from __future__ import annotations

import os

from shards.storage.local import LocalPlace
from shards.storage.place import Place

Where = str | os.PathLike | Place  # what a function that works on a folder of shards accepts


def open_place(where: Where) -> Place:
    """The place of a path, or of a URL such as `s3://bucket/shards`; a Place is returned as it is.

    Raise UserError where the package for a URL's protocol is missing (extra `remote`) or the protocol is unknown.
    """
    if isinstance(where, Place):
        return where
    text = os.fspath(where)
    if "://" not in text or text.startswith("file://"):
        # A shell expands it, Python does not.
        return LocalPlace(os.path.expanduser(text))
    from shards.storage.remote import RemotePlace

    return RemotePlace(text)
