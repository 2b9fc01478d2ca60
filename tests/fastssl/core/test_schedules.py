"""Golden values of the learning rate and of the teacher's momentum."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastssl.core.schedules import Clock, cosine_between, cosine_momentum, due, lr_at
from shards.errors import UserError

# MoCo v3's ResNet-50 run of 100 epochs: base rate 0.6 per 256 images, batch 4096, so a peak of 9.6; 312 steps
# an epoch.
R50 = {"base_lr": 9.6, "steps_per_epoch": 312, "epochs": 100, "warmup_epochs": 10}


@pytest.mark.parametrize(
    ("epoch", "lr"),
    [
        (0, 0.0),
        (5, 4.8),
        (10, 9.6),
        (32.5, 9.6 * (1 + math.sqrt(0.5)) / 2),  # a quarter of the cosine
        (55, 4.8),
        (77.5, 9.6 * (1 - math.sqrt(0.5)) / 2),
        (100, 0.0),
        (120, 0.0),
    ],
)
def test_golden_rates(epoch: float, lr: float) -> None:
    assert lr_at(round(epoch * 312), **R50) == pytest.approx(lr, rel=1e-12)


def test_the_ends_are_exactly_zero() -> None:
    assert lr_at(0, **R50) == 0.0
    assert lr_at(31200, **R50) == 0.0


def test_the_rate_follows_the_fractional_epoch() -> None:
    assert lr_at(1, **R50) == pytest.approx(9.6 / 3120)
    assert lr_at(3121, **R50) < lr_at(3120, **R50) == 9.6


def test_the_cosine_starts_after_the_warm_up() -> None:
    # A cosine over all epochs that merely begins late never reaches 0 (a fault seen elsewhere).
    assert lr_at(31199, **R50) < 1e-7


def test_without_warm_up_the_first_rate_is_the_peak() -> None:
    assert lr_at(0, base_lr=0.3, steps_per_epoch=10, epochs=5, warmup_epochs=0) == 0.3


def test_a_run_may_be_all_warm_up() -> None:
    rates = [lr_at(step, base_lr=1.0, steps_per_epoch=2, epochs=2, warmup_epochs=2) for step in range(5)]
    assert rates == [0.0, 0.25, 0.5, 0.75, 0.0]


@pytest.mark.parametrize("warmup", [-1, 11])
def test_a_warm_up_outside_the_run_is_refused(warmup: float) -> None:
    with pytest.raises(UserError, match=rf"{warmup} but the run has 10 epochs"):
        lr_at(0, base_lr=1.0, steps_per_epoch=2, epochs=10, warmup_epochs=warmup)


@given(
    steps_per_epoch=st.integers(1, 50),
    epochs=st.floats(0.5, 50),
    share=st.floats(0, 1),
    base=st.floats(1e-6, 100),
)
def test_the_rate_rises_then_falls_within_bounds(
    steps_per_epoch: int, epochs: float, share: float, base: float
) -> None:
    settings = {
        "base_lr": base,
        "steps_per_epoch": steps_per_epoch,
        "epochs": epochs,
        "warmup_epochs": epochs * share,
    }
    steps = range(math.ceil(steps_per_epoch * epochs) + 1)
    rates = [lr_at(step, **settings) for step in steps]
    assert all(0 <= rate <= base * (1 + 1e-12) for rate in rates)
    peak = math.ceil(steps_per_epoch * epochs * share)
    rising, falling = rates[:peak], rates[peak + 1 :]
    assert rising == sorted(rising)
    assert falling == sorted(falling, reverse=True)


@pytest.mark.parametrize(
    ("progress", "momentum"),
    [(0, 0.99), (0.25, 0.991464466), (0.5, 0.995), (0.75, 0.998535534), (1, 1.0)],
)
def test_golden_momenta(progress: float, momentum: float) -> None:
    assert cosine_momentum(progress, 0.99) == pytest.approx(momentum, abs=1e-9)


def test_the_last_momentum_is_exactly_one() -> None:
    assert cosine_momentum(1.0, 0.996) == 1.0


def test_progress_is_the_share_of_steps_done() -> None:
    clocks = [Clock(step, total=40, steps_per_epoch=10) for step in (0, 10, 39, 40, 99)]
    assert [clock.before for clock in clocks] == [0, 0.25, 39 / 40, 1, 1]
    assert [clock.after for clock in clocks] == [1 / 40, 11 / 40, 1, 1, 1]
    assert clocks[1].epoch == 1


def test_a_cosine_between_two_values_and_a_rate_that_ends_above_0() -> None:
    assert [cosine_between(0.04, 0.4, progress) for progress in (0, 0.5, 1)] == pytest.approx(
        [0.04, 0.22, 0.4]
    )
    options = {"base_lr": 1.0, "steps_per_epoch": 1, "epochs": 3, "warmup_epochs": 1, "final_lr": 0.5}
    assert [lr_at(step, **options) for step in range(5)] == pytest.approx([0, 1, 0.75, 0.5, 0.5])


def test_due_every_so_many_steps_and_never_for_0() -> None:
    assert [step for step in range(1, 13) if due(step, 4)] == [4, 8, 12]
    assert all(due(step, 1) for step in range(1, 5))
    assert not any(due(step, 0) for step in range(5))
