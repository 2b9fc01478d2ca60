"""PGM and PPM files of more than 8 bits, of which Pillow keeps 8 or stretches the values.

Format: netpbm.sourceforge.net/doc/ppm.html.
"""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from shards.images.pixels import BadImage

_GAP = rb"(?:\s|#[^\r\n]*[\r\n])+"
_HEADER = re.compile(rb"P([2356])" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)" + _GAP + rb"(\d+)\s")


def deep_pnm(data: bytes) -> npt.NDArray[np.uint16] | None:
    """Return the values of a PGM or PPM as they stand in the file, (H, W, 1 or 3); None where 8 bits hold them all.

    Raise BadImage where the file is cut short or holds a larger value than it says.
    """
    header = _HEADER.match(data)
    if not header:
        return None
    kind, width, height, largest = (int(part) for part in header.groups())
    if not 255 < largest <= 65535:
        return None
    channels = 3 if kind in (3, 6) else 1
    wanted = width * height * channels
    if kind in (5, 6):
        values = np.frombuffer(data, ">u2", min(wanted, (len(data) - header.end()) // 2), header.end())
    else:
        words = re.sub(rb"#[^\r\n]*", b"", data[header.end() :]).split(None, wanted)[:wanted]
        if not all(word.isdigit() for word in words):
            raise BadImage("damaged: a PNM whose values are no numbers")
        values = np.array(words, np.int64)
    if len(values) < wanted:
        raise BadImage(f"damaged: the PNM holds {len(values)} of {wanted} values")
    if wanted and int(values.max()) > largest:
        raise BadImage(f"damaged: the PNM holds {values.max()}, more than the {largest} that it tells of")
    return values.astype(np.uint16).reshape(height, width, channels)
