"""Samples dealt among groups of BatchNorm: against the formula on rows in the order in which cards are dealt."""

import copy

import pytest
import torch
from torch import nn

from fastssl.models.grouped_batch_norm import GroupedBatchNorm, deal_groups, group_batch_norm, views_in_pass
from shards.errors import UserError
from tests.fastssl.models.test_grouped_batch_norm import (
    ROWS,
    SHAPES,
    _fresh_compiler,  # noqa: F401 (a fixture)
    by_formula,
    compiles,
    draw,
    make_norm,
)


def cards(count: int, among: int, rows: int, views: int = 1) -> list[int]:
    """The places of rows when the samples of each block are dealt to groups: group 0 first, in each the samples in order."""
    order = []
    for block in range(0, count, among * rows * views):
        for group in range(among):
            for sample in range(rows):
                first = block + (sample * among + group) * views
                order += range(first, first + views)
    return order


@compiles
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("kind", SHAPES)
def test_dealt_samples_are_normalised_with_those_of_their_group(
    kind: str, views: int, compiled: bool
) -> None:
    plain = make_norm(kind)
    norm = copy.deepcopy(plain)
    group_batch_norm(norm, ROWS)
    assert deal_groups(norm, 3) == 1
    run = torch.compile(norm, backend="eager", fullgraph=True) if compiled else norm
    inputs = draw(2 * 3 * ROWS * views, *SHAPES[kind])
    if inputs.ndim == 4:
        inputs = inputs.to(memory_format=torch.channels_last)
    order = torch.tensor(cards(len(inputs), 3, ROWS, views))
    dealt, mean, var = by_formula(plain, inputs[order], ROWS * views)
    expected = torch.empty_like(dealt)
    expected[order] = dealt
    with views_in_pass(norm, views):
        output = run(inputs)
    torch.testing.assert_close(output, expected, rtol=1e-10, atol=1e-10)
    if inputs.ndim == 4:
        assert output.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(norm.get_buffer("group_statistics"), torch.stack([mean, var]))


def test_parts_that_are_left_out_deal_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2)))
    group_batch_norm(model, 2)
    assert deal_groups(model, 4, but=[model[1]]) == 1
    assert [layer.dealt for layer in model.modules() if isinstance(layer, GroupedBatchNorm)] == [4, 1, 1]
    with pytest.raises(
        UserError, match=r"received 4 rows, but its groups have 2 and are dealt by 4: .* multiple of 8"
    ):
        model(torch.rand(4, 2))
