"""Parquet files that hold their own SHA-256, so that file and checksum can never be of two different moments."""

from __future__ import annotations

import hashlib
import io

import pyarrow as pa
import pyarrow.parquet as pq

from shards.errors import UserError

_KEY = "sha256"
_BLANK = "0" * 64  # stands for the digest while the digest is computed


def sealed(table: pa.Table) -> bytes:
    """A Parquet file of `table` whose key `sha256` is the SHA-256 of the file with zeros in the digest's place."""
    out = io.BytesIO()
    with pq.ParquetWriter(out, table.schema, compression="zstd") as writer:
        writer.write_table(table)
        writer.add_key_value_metadata({_KEY: _BLANK})
    data = out.getvalue()
    at = data.rfind(_BLANK.encode())
    return _filled(data, at, hashlib.sha256(data).hexdigest())


def check_seal(data: bytes) -> None:
    """Raise UserError, in a clause, unless every byte of a file is as `sealed` made it."""
    try:
        with pq.ParquetFile(io.BytesIO(data)) as parquet:
            digest = parquet.metadata.metadata.get(_KEY.encode(), b"").decode("ascii")
    except (pa.ArrowException, OSError, UnicodeDecodeError, AttributeError) as error:
        raise UserError(f"is damaged ({error})") from error
    at = data.rfind(digest.encode())
    if len(digest) != len(_BLANK) or at < 0:
        raise UserError("holds no SHA-256 of its own: an older fastssl made it, or it is damaged")
    if hashlib.sha256(_filled(data, at, _BLANK)).hexdigest() != digest:
        raise UserError("is damaged: it differs from the SHA-256 that it holds")


def _filled(data: bytes, at: int, digest: str) -> bytes:
    return data[:at] + digest.encode() + data[at + len(digest) :]
