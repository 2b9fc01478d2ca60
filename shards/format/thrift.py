"""Apache Thrift's compact protocol, read and written: the form of Parquet's footer and page headers.

Specification: thrift/doc/specs/thrift-compact-protocol.md. A struct is a dict from field id to (type, value); a list is (type of its
elements, values). Nothing of the fields' meaning is known here.
"""

from __future__ import annotations

import struct
from typing import Any

TRUE, FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT, UUID = range(1, 14)
Struct = dict[int, tuple[int, Any]]
_MAX_DEPTH = 32


class Malformed(ValueError):
    """Bytes that are no such struct."""


def read_struct(data: bytes, at: int = 0) -> tuple[Struct, int]:
    """The struct that begins at byte `at`, and the first byte behind it; Malformed where it is none or goes on behind the data."""
    try:
        return _Reader(data, at).struct(0)
    except (IndexError, struct.error) as error:
        raise Malformed("cut short") from error


class _Reader:
    def __init__(self, data: bytes, at: int):
        self._data, self._at = data, at

    def struct(self, depth: int) -> tuple[Struct, int]:
        if depth > _MAX_DEPTH:
            raise Malformed("too deep")
        fields: Struct = {}
        number = 0
        while (head := self._byte()) != 0:
            kind = head & 15
            number = number + (head >> 4) if head >> 4 else self._zigzag()
            fields[number] = (
                (TRUE, kind == TRUE) if kind in (TRUE, FALSE) else (kind, self._value(kind, depth))
            )
        return fields, self._at

    def _value(self, kind: int, depth: int) -> Any:
        if kind in (TRUE, FALSE):  # within lists, a byte each
            return self._byte() == TRUE
        if kind == BYTE:
            return self._byte()
        if kind in (I16, I32, I64):
            return self._zigzag()
        if kind == DOUBLE:
            return struct.unpack("<d", self._take(8))[0]
        if kind == BINARY:
            return self._take(self._varint())
        if kind in (LIST, SET):
            head = self._byte()
            size = head >> 4 if head >> 4 != 15 else self._varint()
            if size > len(self._data) - self._at:
                raise Malformed("cut short")
            return head & 15, [self._value(head & 15, depth + 1) for _ in range(size)]
        if kind == STRUCT:
            return self.struct(depth + 1)[0]
        raise Malformed(f"of unknown type {kind}")

    def _byte(self) -> int:
        self._at += 1
        return self._data[self._at - 1]

    def _take(self, size: int) -> bytes:
        if size > len(self._data) - self._at:
            raise Malformed("cut short")
        self._at += size
        return self._data[self._at - size : self._at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _zigzag(self) -> int:
        value = self._varint()
        return value >> 1 ^ -(value & 1)


def write_struct(fields: Struct) -> bytes:
    """The bytes of a struct."""
    out = bytearray()
    before = 0
    for number, (kind, value) in sorted(fields.items()):
        head = (TRUE if value else FALSE) if kind == TRUE else kind
        if 0 < number - before <= 15:
            out.append(number - before << 4 | head)
        else:
            out.append(head)
            out += _zigzag(number)
        if kind != TRUE:
            out += _value(kind, value)
        before = number
    return bytes(out) + b"\0"


def _value(kind: int, value: Any) -> bytes:
    if kind in (TRUE, FALSE):
        return bytes([TRUE if value else FALSE])
    if kind == BYTE:
        return bytes([value])
    if kind in (I16, I32, I64):
        return _zigzag(value)
    if kind == DOUBLE:
        return struct.pack("<d", value)
    if kind == BINARY:
        return _varint(len(value)) + value
    if kind in (LIST, SET):
        of, values = value
        head = (
            bytes([len(values) << 4 | of]) if len(values) < 15 else bytes([0xF0 | of]) + _varint(len(values))
        )
        return head + b"".join(_value(of, one) for one in values)
    assert kind == STRUCT, kind
    return write_struct(value)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def _zigzag(value: int) -> bytes:
    return _varint(value << 1 if value >= 0 else (-value << 1) - 1)
