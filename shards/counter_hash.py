"""Counter-based randomness: a hash of (seed, epoch, sample, ...) in place of a generator with state.

`mix64`, `fold` and `uniform` use ufuncs only, so each also compiles with `numba.njit` for uint64 scalars, and
numpy scalars wrap around silently (the operators `+` and `*` would warn on scalars, the ufuncs do not).
"""

import numpy as np
import numpy.typing as npt

# splitmix64: Steele, Lea, Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014; Stafford's
# variant 13.
GAMMA = np.uint64(0x9E3779B97F4A7C15)
FIRST = np.uint64(0xBF58476D1CE4E5B9)
SECOND = np.uint64(0x94D049BB133111EB)
# Added to each part, so that the part 0 does not hash as a bare `mix64(0)`; any odd constant unlike GAMMA
# will do.
PART = np.uint64(0xD1B54A32D192ED03)
_11, _27, _30, _31 = (np.uint64(shift) for shift in (11, 27, 30, 31))
_WORD = 2**64 - 1

UInt64 = npt.NDArray[np.uint64]


def mix64(x):
    """The splitmix64 output for state `x`, a bijection of 64-bit words; uint64 of any shape in and out.

    `mix64(seed + k * GAMMA)` is output k, from 0, of the published generator.
    """
    x = np.add(x, GAMMA)
    x = np.multiply(x ^ (x >> _30), FIRST)
    x = np.multiply(x ^ (x >> _27), SECOND)
    return x ^ (x >> _31)


def fold(h, part):
    """The hash `h` with one more part taken in: `mix64(h ^ mix64(part + PART))`; uint64, broadcasts."""
    return mix64(h ^ mix64(np.add(part, PART)))


def uniform(key):
    """A float64 in [0, 1) from the top 53 bits of each uint64 key: a multiple of 2^-53."""
    return np.multiply(key >> _11, 2.0**-53)


def hash_key(*parts: int | npt.NDArray[np.integer]):
    """The hash of the parts in order, starting from 0: uint64, of the parts' broadcast shape.

    Integers are taken modulo 2^64, so negative ones are allowed. Put the scalars first: they are then folded
    once.
    """
    h = np.uint64(0)
    for part in parts:
        h = fold(h, _word(part))
    return h


def _word(part: int | npt.NDArray[np.integer]) -> np.uint64 | UInt64:
    if isinstance(part, np.ndarray):
        assert part.dtype.kind in "iu", f"hash parts are integers, not {part.dtype}"
        return part.astype(np.uint64, copy=False)
    return np.uint64(int(part) & _WORD)
