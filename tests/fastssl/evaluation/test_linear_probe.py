"""Ridge regression against NumPy's solver, and its left-out scores against leaving out."""

import numpy as np
import pytest
import torch

from fastssl.evaluation.linear_probe import fit_ridge, probe_accuracy
from shards.errors import UserError

NUM, DIM, CLASSES = 30, 5, 3


def blobs(num: int = NUM, seed: int = 0, spread: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features around one centre a class, on very different scales."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(num) % CLASSES
    centres = 3 * torch.eye(CLASSES, DIM)
    features = centres[labels] + spread * torch.randn(num, DIM, generator=generator)
    return features * torch.tensor([1.0, 1e3, 1e-3, 1.0, 7.0]) + 5, labels


def by_numpy(features: np.ndarray, labels: np.ndarray, strength: float, mean, scale) -> tuple:
    x = (features - mean) / scale
    y = np.eye(CLASSES)[labels]
    base, centre = y.mean(0), x.mean(0)
    x = x - centre
    weight = np.linalg.solve(x.T @ x + strength * np.eye(DIM), x.T @ (y - base))
    return weight, base - centre @ weight


@pytest.mark.parametrize("strength", [1e-3, 0.5])
def test_the_weights_are_the_normal_equations(strength: float) -> None:
    features, labels = blobs()
    found = fit_ridge(features, labels, CLASSES, (strength,))
    x = features.double().numpy()
    weight, bias = by_numpy(x, labels.numpy(), strength * NUM, x.mean(0), x.std(0))
    np.testing.assert_allclose(found.weight.numpy(), weight, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(found.bias.numpy(), bias, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(
        found.scores(features).numpy(), (x - x.mean(0)) / x.std(0) @ weight + bias, rtol=1e-9, atol=1e-12
    )


def test_left_out_scores_are_those_of_classifiers_without_the_sample() -> None:
    features, labels = blobs()
    strength = 0.1
    found = fit_ridge(features, labels, CLASSES, (strength,)).left_out.numpy()
    x = features.double().numpy()
    mean, scale = x.mean(0), x.std(0)
    for i in range(NUM):
        rest = np.arange(NUM) != i
        weight, bias = by_numpy(x[rest], labels.numpy()[rest], strength * NUM, mean, scale)
        np.testing.assert_allclose(found[i], (x[i] - mean) / scale @ weight + bias, rtol=1e-9, atol=1e-10)


def test_the_strength_is_the_one_with_the_best_left_out_accuracy() -> None:
    features, labels = blobs(spread=2.5)
    rights = {}
    for strength in (1e-4, 0.1, 10.0):
        left_out = fit_ridge(features, labels, CLASSES, (strength,)).left_out
        rights[strength] = int((left_out.argmax(1) == labels).sum())
    best = max(rights.values())
    found = fit_ridge(features, labels, CLASSES, (1e-4, 0.1, 10.0)).strength
    assert found == max(s for s, right in rights.items() if right == best)


def test_accuracy_on_a_set_of_its_own_and_on_noise() -> None:
    bank, queries = blobs(120), blobs(90, seed=1)
    assert probe_accuracy(*bank, *queries, num_classes=CLASSES) > 0.9
    assert probe_accuracy(*bank, None, None, num_classes=CLASSES) > 0.9
    noise = torch.randn(300, DIM, generator=torch.Generator().manual_seed(2)), torch.arange(300) % CLASSES
    assert probe_accuracy(*noise, None, None, num_classes=CLASSES) < 0.45


def test_constant_features_and_more_dimensions_than_samples() -> None:
    features, labels = blobs(6)
    wide = torch.cat([features, torch.ones(6, 20), features.repeat(1, 4)], dim=1)
    found = fit_ridge(wide, labels, CLASSES)
    assert found.scores(wide).isfinite().all()
    assert found.weight[DIM : DIM + 20].abs().max() < 1e-12
    assert probe_accuracy(torch.ones(4, 3), torch.tensor([0, 0, 0, 1]), None, None, num_classes=2) == 0.75


def test_features_that_are_not_finite_are_refused() -> None:
    bank, spoiled = blobs(20), blobs(20)
    spoiled[0][3, 0] = float("nan")
    for features in ((*spoiled, None, None), (*bank, *spoiled)):
        with pytest.raises(UserError, match="features of 1 of 20 images are not finite, so the linear probe"):
            probe_accuracy(*features, num_classes=CLASSES)


def test_groups_are_left_out_together() -> None:
    """Each sample's score is that of a classifier fitted to the other groups only."""
    features, labels = blobs()
    groups = torch.arange(NUM) % 7
    groups[:8] = 7
    strength = 0.1
    found = fit_ridge(features, labels, CLASSES, (strength,), groups).left_out.numpy()
    x = features.double().numpy()
    mean, scale = x.mean(0), x.std(0)
    for i in range(NUM):
        rest = (groups != groups[i]).numpy()
        weight, bias = by_numpy(x[rest], labels.numpy()[rest], strength * NUM, mean, scale)
        np.testing.assert_allclose(found[i], (x[i] - mean) / scale @ weight + bias, rtol=1e-9, atol=1e-10)
    alone = fit_ridge(features, labels, CLASSES, (strength,), torch.arange(NUM)).left_out
    np.testing.assert_array_equal(alone, fit_ridge(features, labels, CLASSES, (strength,)).left_out)
