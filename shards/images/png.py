"""What a PNG itself says where decoders are silent: checksums and bits."""

from __future__ import annotations

import struct
import zlib

from shards.images.pixels import BadImage


def png_depth(data: bytes) -> int:
    """Bits of each sample of a PNG."""
    return data[24]  # signature 8, chunk head 8, width 4, height 4


def png_colour(data: bytes) -> int:
    """The colour type of a PNG: 0 gray, 2 RGB, 3 palette, 4 gray with alpha, 6 RGB with alpha."""
    return data[25]


def check_png(data: bytes) -> None:
    """Raise BadImage unless every chunk is whole; Pillow checks neither pixel chunks' sums nor the end.

    libpng does check them: one such file ends a DALI pipeline.
    """
    at = 8
    while True:
        if at + 12 > len(data):
            raise BadImage("damaged PNG: the end is missing")
        (length,) = struct.unpack_from(">I", data, at)
        end = at + 8 + length
        if end + 4 > len(data):
            raise BadImage("damaged PNG: the end is missing")
        if zlib.crc32(memoryview(data)[at + 4 : end]) != struct.unpack_from(">I", data, end)[0]:
            raise BadImage("damaged PNG: a checksum does not match")
        if data[at + 4 : at + 8] == b"IEND":
            return
        at = end + 4
