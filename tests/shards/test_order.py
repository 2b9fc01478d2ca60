import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.errors import UserError
from shards.hashing import hash_key
from shards.order import EPOCH_TAG, PLAN_TAG, epoch_order, rank_positions, steps_per_epoch

seeds = st.integers(0, 2**63 - 1)


def test_epoch_order_golden_values():
    assert epoch_order(10, seed=0, epoch=0).tolist() == [4, 0, 1, 8, 9, 7, 3, 6, 2, 5]


def test_epoch_order_equals_the_slow_formula():
    slow = sorted(range(50), key=lambda i: int(hash_key(7, 3, EPOCH_TAG, i)))
    assert epoch_order(50, seed=7, epoch=3).tolist() == slow


@given(st.integers(0, 300), seeds, st.integers(0, 1000))
def test_epoch_order_is_a_permutation(num_samples: int, seed: int, epoch: int):
    order = epoch_order(num_samples, seed, epoch)
    assert order.dtype == np.int64
    assert np.array_equal(np.sort(order), np.arange(num_samples))


@given(seeds, st.integers(0, 1000))
def test_another_seed_epoch_or_tag_is_another_order(seed: int, epoch: int):
    order = epoch_order(100, seed, epoch)
    assert not np.array_equal(order, epoch_order(100, seed + 1, epoch))
    assert not np.array_equal(order, epoch_order(100, seed, epoch + 1))
    assert not np.array_equal(order, epoch_order(100, seed, epoch, PLAN_TAG))


@given(st.data())
def test_every_world_size_reads_the_same_global_batches(data: st.DataObject):
    world = data.draw(st.integers(1, 8))
    batch = world * data.draw(st.integers(1, 6))
    num_samples = data.draw(st.integers(batch, 200))
    order = epoch_order(num_samples, seed=1, epoch=2)
    for step in range(steps_per_epoch(num_samples, batch)):
        parts = [order[rank_positions(step, batch, rank, world)] for rank in range(world)]
        assert {len(part) for part in parts} == {batch // world}
        assert np.array_equal(np.concatenate(parts), order[step * batch : (step + 1) * batch])


def test_steps_drop_the_last_part_of_a_batch():
    assert [steps_per_epoch(n, 8) for n in (0, 7, 8, 15, 16)] == [0, 0, 1, 1, 2]


def test_a_batch_that_does_not_divide_names_both_numbers_and_the_next_multiples():
    with pytest.raises(UserError, match=r"100 does not divide among 8 ranks.*96 or 104"):
        rank_positions(0, 100, 0, 8)
    with pytest.raises(UserError, match=r"3 does not divide among 8 ranks.*such as 8"):
        rank_positions(0, 3, 0, 8)


def test_impossible_numbers_are_refused():
    with pytest.raises(UserError, match=r"-1"):
        epoch_order(-1, 0, 0)
    with pytest.raises(UserError, match=r"at least 1, got 0"):
        steps_per_epoch(10, 0)
    with pytest.raises(UserError, match=r"0\.\.1 for 2 ranks, got 2"):
        rank_positions(0, 4, 2, 2)
