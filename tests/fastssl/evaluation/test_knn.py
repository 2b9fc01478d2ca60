"""kNN against a reference that is slow and obvious."""

import math

import pytest
import torch
from torch import Tensor

from fastssl.evaluation import knn
from fastssl.evaluation.knn import KNNConfig, classify
from shards.errors import UserError


def _slow(
    bank: list, bank_labels: list, queries: list, leave_one_out: bool, k: int, num_classes: int
) -> list[int]:
    """Predictions by plain loops over Python numbers, temperature 0.07."""
    predictions = []
    for q, query in enumerate(queries):
        similar = []
        for n, sample in enumerate(bank):
            if leave_one_out and n == q:
                continue
            dot = sum(a * b for a, b in zip(query, sample, strict=True))
            lengths = math.sqrt(sum(a * a for a in query)) * math.sqrt(sum(b * b for b in sample))
            similar.append((dot / lengths, bank_labels[n]))
        similar.sort(key=lambda pair: -pair[0])
        votes = [0.0] * num_classes
        for similarity, label in similar[:k]:
            votes[label] += math.exp(similarity / 0.07)
        predictions.append(votes.index(max(votes)))
    return predictions


def _clouds(num: int, seed: int, num_classes: int = 4, dim: int = 5) -> tuple[Tensor, Tensor]:
    """Classes that overlap, so that votes are close; features of any length."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(num_classes, (num,), generator=generator)
    centres = torch.randn(num_classes, dim, generator=torch.Generator().manual_seed(0))
    lengths = 0.5 + 3 * torch.rand(num, 1, generator=generator)
    return (centres[labels] + 0.8 * torch.randn(num, dim, generator=generator)) * lengths, labels


@pytest.mark.parametrize("chunk", [1024, 7])
@pytest.mark.parametrize("leave_one_out", [True, False])
def test_equal_to_the_slow_reference(
    leave_one_out: bool, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(knn, "CHUNK", chunk)
    bank, labels = _clouds(50, seed=1)
    queries, truth = (bank, labels) if leave_one_out else _clouds(31, seed=2)
    given = (None, None) if leave_one_out else (queries, truth)
    result = classify(bank, labels, *given, num_classes=4, ks=(1, 5, 20))
    assert list(result.accuracy) == [1, 5, 20]
    for k in (1, 5, 20):
        predicted = _slow(bank.tolist(), labels.tolist(), queries.tolist(), leave_one_out, k, 4)
        right = [p == t for p, t in zip(predicted, truth.tolist(), strict=True)]
        assert result.accuracy[k] == pytest.approx(sum(right) / len(right), abs=1e-7)
        for c in range(4):
            of_class = [r for r, t in zip(right, truth.tolist(), strict=True) if t == c]
            assert result.per_class[k][c].item() == pytest.approx(sum(of_class) / len(of_class))
    assert 0.3 < result.accuracy[5] < 1  # neither trivial nor hopeless


def test_chunks_are_bounded_and_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, labels = _clouds(50, seed=1)
    whole = classify(bank, labels, num_classes=4, ks=(1, 5, 20))
    for bound, rows in ((50 * 7 + 49, 7), (50, 1), (3, 1)):
        monkeypatch.setattr(knn, "MAX_SIMILARITIES", bound)
        seen = []
        normalize = knn.F.normalize
        with monkeypatch.context() as patch:
            patch.setattr(knn.F, "normalize", lambda x, dim: (seen.append(len(x)), normalize(x, dim=dim))[1])  # noqa: B023
            chunked = classify(bank, labels, num_classes=4, ks=(1, 5, 20))
        assert seen[0] == 50  # the bank
        assert max(seen[1:]) == rows
        assert sum(seen[1:]) == 50
        assert chunked.accuracy == whole.accuracy
        assert all(torch.equal(chunked.per_class[k], whole.per_class[k]) for k in (1, 5, 20))


def test_golden_votes() -> None:
    """At angles 0, 10 and 12 degrees from the query: exp(1/0.07) against exp(cos 10/0.07) + exp(cos 12/0.07).

    Relative to the largest: 1 against exp((0.984808 - 1)/0.07) + exp((0.978148 - 1)/0.07) = 0.8049 + 0.7318.
    """
    angles = torch.deg2rad(torch.tensor([0.0, 10.0, 12.0]))
    bank = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels, query = torch.tensor([0, 1, 1]), torch.tensor([[2.0, 0.0]])
    assert math.exp((math.cos(math.radians(10)) - 1) / 0.07) == pytest.approx(0.8049, abs=1e-4)
    for k, winner in ((1, 0), (2, 0), (3, 1)):
        result = classify(bank, labels, query, torch.tensor([winner]), num_classes=2, ks=(k,))
        assert result.accuracy == {k: 1.0}
    # A cooler vote listens to the nearest only.
    cool = classify(bank, labels, query, torch.tensor([0]), num_classes=2, ks=(3,), temperature=0.01)
    assert cool.accuracy == {3: 1.0}


def test_one_s_own_vote_does_not_count() -> None:
    """Two pairs of twins with different labels: every nearest other sample is wrong."""
    bank = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]])
    labels = torch.tensor([0, 1, 0, 1])
    assert classify(bank, labels, num_classes=2, ks=(1,)).accuracy == {1: 0.0}
    assert classify(bank, torch.tensor([0, 0, 1, 1]), num_classes=2, ks=(1,)).accuracy == {1: 1.0}
    # As queries the same samples find themselves or their twin.
    assert classify(bank, labels, bank, labels, num_classes=2, ks=(2,)).accuracy == {2: 0.5}


def test_k_is_clamped_and_reported_once() -> None:
    bank, labels = _clouds(6, seed=3, num_classes=2)
    assert list(classify(bank, labels, num_classes=2, ks=(200, 3, 10)).accuracy) == [3, 5]
    assert list(classify(bank, labels, bank, labels, num_classes=2, ks=(200, 100)).accuracy) == [6]


def test_equal_votes_go_to_the_lower_class() -> None:
    bank = torch.tensor([[1.0, 1.0], [1.0, 1.0]])
    for labels in ([2, 1], [1, 2]):
        result = classify(
            bank, torch.tensor(labels), torch.ones(1, 2), torch.tensor([1]), num_classes=3, ks=(2,)
        )
        assert result.accuracy == {2: 1.0}


def test_a_class_without_a_query_has_no_accuracy() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    queries, truth = torch.tensor([[1.0, 0.1], [0.9, 0.0]]), torch.tensor([0, 2])
    [per_class] = classify(
        bank, torch.tensor([0, 1]), queries, truth, num_classes=3, ks=(1,)
    ).per_class.values()
    assert per_class[0] == 1.0
    assert math.isnan(per_class[1])
    assert per_class[2] == 0.0


def test_small_temperatures_overflow_nothing() -> None:
    bank, labels = _clouds(40, seed=4)
    nearest = classify(bank, labels, num_classes=4, ks=(1,)).accuracy[1]
    assert classify(bank, labels, num_classes=4, ks=(20,), temperature=1e-4).accuracy[20] == nearest


def test_half_precision_features_are_compared_in_single() -> None:
    bank, labels = _clouds(50, seed=5)
    half = bank.to(torch.bfloat16)
    expected = classify(half.float(), labels, num_classes=4, ks=(5,)).accuracy
    assert classify(half, labels, num_classes=4, ks=(5,)).accuracy == expected


@pytest.mark.parametrize("ks", [(), (0,), (10, -1)])
def test_impossible_numbers_of_neighbours(ks: tuple) -> None:
    with pytest.raises(UserError, match="neighbours of at least 1, but ks is"):
        classify(*_clouds(6, seed=3), num_classes=4, ks=ks)


def test_too_few_samples() -> None:
    one, label = torch.ones(1, 2), torch.tensor([0])
    with pytest.raises(UserError, match="at least one neighbour, but the labelled shards hold 1 samples"):
        classify(one, label, num_classes=1)
    with pytest.raises(UserError, match="hold 0 samples"):
        classify(one[:0], label[:0], one, label, num_classes=1)
    assert classify(one, label, one, label, num_classes=1).accuracy == {1: 1.0}


@pytest.mark.parametrize(("name", "value", "least"), [("every", -1, 0), ("k", 0, 1), ("max_samples", -1, 0)])
def test_impossible_settings_are_refused(name: str, value: int, least: int) -> None:
    with pytest.raises(UserError, match=f"knn.{name} is {value}, but it must be at least {least}"):
        KNNConfig(**{name: value})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_features_that_are_not_finite_have_no_votes(value: float) -> None:
    """Their similarities are NaN, whose vote is for class 0: the share of the largest class, as if something had been measured."""
    bank, labels = _clouds(20, seed=6)
    spoiled = bank.clone()
    spoiled[3] = value
    for features in ((spoiled, labels, None, None), (bank, labels, spoiled, labels)):
        with pytest.raises(UserError, match="features of 1 of 20 images are not finite, so kNN measures"):
            classify(*features, num_classes=4)


@pytest.mark.parametrize("chunk", [1024, 7])
def test_neighbours_of_the_same_group_do_not_vote(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if each group were classified by a bank of all others, also where a group leaves fewer voters than k."""
    monkeypatch.setattr(knn, "CHUNK", chunk)
    bank, labels = _clouds(50, seed=1)
    groups = torch.arange(50) % 9
    groups[:20] = 0
    for k in (1, 5, 20):
        right = 0
        for group in range(9):
            inside = groups == group
            voters = (bank[~inside].tolist(), labels[~inside].tolist())
            predicted = _slow(*voters, bank[inside].tolist(), False, k, 4)
            right += sum(p == t for p, t in zip(predicted, labels[inside].tolist(), strict=True))
        assert classify(bank, labels, num_classes=4, groups=groups, ks=(k,)).accuracy == {
            k: pytest.approx(right / 50)
        }
    most = int((groups != 0).sum())
    assert list(classify(bank, labels, num_classes=4, groups=groups, ks=(100,)).accuracy) == [most]


def test_one_group_alone_is_refused() -> None:
    with pytest.raises(UserError, match="All 6 labelled samples are of one group"):
        classify(*_clouds(6, seed=3), num_classes=4, groups=torch.zeros(6, dtype=torch.int64))
