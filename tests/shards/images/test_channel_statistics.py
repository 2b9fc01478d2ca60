import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.images.channel_statistics import PERCENTILES, Statistics
from shards.images.pixels import sampled


def counted(*samples: np.ndarray) -> Statistics:
    statistics = Statistics()
    for sample in samples:
        statistics.add(sample)
    return statistics


@given(st.permutations(range(6)), st.integers(0, 6))
def test_shards_add_up_to_the_same_in_any_order(order: list[int], cut: int):
    rng = np.random.default_rng(0)
    samples = [rng.integers(0, 256, (20, 1 + 2 * (n % 2)), dtype=np.uint8) for n in range(5)]
    samples.append(rng.normal(0, 9, (30, 2)).astype(np.float32))
    parts = [counted(*(samples[n] for n in part)) for part in (order[:cut], order[cut:])]
    merged = Statistics()
    for part in parts:
        merged.merge(Statistics.from_json(json.loads(json.dumps(part.to_json()))))
    assert merged.summary() == counted(*samples).summary()
    assert sorted(merged.summary()) == ["float32/2", "uint8/1", "uint8/3"]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
def test_percentiles_are_shares_of_the_range(dtype: str):
    top = np.iinfo(dtype).max
    values = np.random.default_rng(1).integers(0, top, (501, 2)).astype(dtype)
    summary = counted(values).summary()[f"{dtype}/2"]
    for percent in PERCENTILES:
        wanted = np.percentile(values / top, percent, axis=0, method="inverted_cdf")
        assert summary[f"p{percent}"] == pytest.approx(wanted.tolist(), abs=1e-6)
    assert counted(np.full((3, 1), top, dtype)).summary()[f"{dtype}/1"]["mean"] == [1.0]


def test_floats_that_are_no_numbers_count_nowhere():
    values = np.array([[1.0], [np.inf], [-np.inf], [np.nan], [-1.0], [0.0], [-0.0]], np.float32)
    summary = counted(values).summary()["float32/1"]
    assert summary["pixels"] == 4
    assert summary["mean"] == [0.0]
    assert summary["p1"][0] == pytest.approx(-1, rel=0.005)
    assert summary["p99"][0] == pytest.approx(1, rel=0.005)


@pytest.mark.parametrize(("side", "rows"), [(1, 1), (32, 32), (33, 16), (500, 31), (4096, 32)])
def test_a_sample_is_a_grid_of_at_most_32_x_32(side: int, rows: int):
    pixels = np.arange(side, dtype=np.uint16)[:, None, None].repeat(2, axis=1)
    sample = sampled(pixels)
    assert sample.shape == (rows * 2, 1)
    # As far from the first row as from the last, up to one step.
    step = -(-side // 32)
    assert abs(int(sample[0, 0]) - (side - 1 - int(sample[-1, 0]))) <= step
