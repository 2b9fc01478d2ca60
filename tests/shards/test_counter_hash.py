import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from shards.counter_hash import GAMMA, PART, fold, hash_key, mix64, uniform

WORD = 2**64
words = st.integers(0, WORD - 1)

# Published: splitmix64 with seed 1234567.
PUBLISHED = [
    6457827717110365317,
    3203168211198807973,
    9817491932198370423,
    4593380528125082431,
    16408922859458223821,
]


def mix64_slow(x: int) -> int:
    """The paper's formula in unbounded integers."""
    x = (x + 0x9E3779B97F4A7C15) % WORD
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % WORD
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % WORD
    return x ^ (x >> 31)


def test_mix64_gives_the_published_sequence():
    states = np.array([1234567 + k * int(GAMMA) for k in range(5)], dtype=object) % WORD
    assert mix64(states.astype(np.uint64)).tolist() == PUBLISHED


@settings(deadline=None)  # the first example compiles
@given(words)
def test_mix64_equals_the_formula_for_scalars_arrays_and_numba(x: int):
    assert int(mix64(np.uint64(x))) == mix64_slow(x)
    assert mix64(np.array([[x]], np.uint64)).tolist() == [[mix64_slow(x)]]
    assert int(_compiled_mix64(np.uint64(x))) == mix64_slow(x)


@settings(deadline=None)
@given(words, words)
def test_fold_equals_its_formula(h: int, part: int):
    expected = mix64_slow(h ^ mix64_slow((part + int(PART)) % WORD))
    assert int(fold(np.uint64(h), np.uint64(part))) == expected
    assert int(_compiled_fold(np.uint64(h), np.uint64(part))) == expected


def test_hash_key_folds_the_parts_in_order():
    expected = 0
    for part in (7, 3, 11):
        expected = mix64_slow(expected ^ mix64_slow((part + int(PART)) % WORD))
    assert int(hash_key(7, 3, 11)) == expected
    assert hash_key(7, 3, 11) != hash_key(3, 7, 11)
    assert hash_key(0) != hash_key(0, 0)


def test_hash_key_golden_values():
    assert int(hash_key(-1)) == int(hash_key(WORD - 1)) == 10585070088600740897
    assert hash_key(1, 2, np.arange(3)).tolist() == [
        1838484987961509420,
        12070915789311595101,
        5750938063276112457,
    ]


@given(hnp.arrays(np.int64, st.integers(1, 20)), st.integers(-(2**63), 2**63 - 1))
def test_hash_key_broadcasts_as_one_call_for_each_element(ids: np.ndarray, seed: int):
    keys = hash_key(seed, ids[:, None], np.arange(3))
    assert keys.shape == (len(ids), 3)
    assert keys.dtype == np.uint64
    assert keys[-1, 2] == hash_key(seed, int(ids[-1]), 2)


def test_hash_key_takes_no_floats():
    with pytest.raises(AssertionError, match="float64"):
        hash_key(np.zeros(2))  # pyright: ignore[reportArgumentType]


def test_uniform_is_the_top_53_bits():
    keys = np.array([0, 2**11 - 1, 2**11, 2**63, WORD - 1], np.uint64)
    assert uniform(keys).tolist() == [0.0, 0.0, 2.0**-53, 0.5, 1 - 2.0**-53]
    assert uniform(keys).dtype == np.float64
    assert numba.njit(uniform)(np.uint64(2**63)) == 0.5


def test_uniform_of_hashes_is_uniform():
    # Chi-square over 64 cells, 63 degrees of freedom: mean 63, standard deviation 11.2; five of these
    # allowed.
    cells = np.bincount((uniform(hash_key(5, np.arange(64_000))) * 64).astype(int), minlength=64)
    assert np.sum((cells - 1000.0) ** 2 / 1000) < 63 + 5 * 11.2


_compiled_mix64 = numba.njit(mix64)
_compiled_fold = numba.njit(lambda h, part: _compiled_mix64(h ^ _compiled_mix64(np.add(part, PART))))
