"""The queue of earlier keys: order, what is not yet there, what is saved, and its place in the loss."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastssl.core.checkpoint import load_weights
from fastssl.methods.moco_v3 import MoCoV3Config as Config
from fastssl.methods.queue import KeyQueue
from tests.fastssl.pretraining.test_step import make_step
from tests.fastssl.tiny import Plain, make_method, make_views

WITH_QUEUE = Config(dim=5, hidden_dim=7, queue=12)


def keys_of(step: int, num: int = 4) -> Tensor:
    return torch.randn(2, num, 3, generator=torch.Generator().manual_seed(step))


def test_keys_leave_in_the_order_they_came() -> None:
    queue = KeyQueue(2, 12, 3)
    assert queue.filled().shape == (2, 0, 3)
    for step in range(8):
        queue.push(keys_of(step))
        there = queue.filled()
        newest = [F.normalize(keys_of(s), dim=2) for s in range(max(0, step - 2), step + 1)]
        expected = torch.cat(newest, dim=1)
        assert there.shape == expected.shape
        for view in range(2):  # as sets: the slots turn
            distances = torch.cdist(there[view], expected[view])
            assert distances.min(dim=1).values.max() < 1e-6
            assert distances.min(dim=0).values.max() < 1e-6


def test_views_keep_apart() -> None:
    queue = KeyQueue(2, 4, 3)
    keys = keys_of(0)
    queue.push(keys)
    torch.testing.assert_close(queue.filled(), F.normalize(keys, dim=2))


def test_the_count_is_in_the_state_dict_and_stays_on_the_host() -> None:
    queue = KeyQueue(2, 12, 3)
    for step in range(5):
        queue.push(keys_of(step))
    state = queue.state_dict()
    assert int(state["_extra_state"]) == 20
    other = KeyQueue(2, 12, 3)
    other.load_state_dict(state)
    for q in (queue, other):
        q.push(keys_of(9))
    assert torch.equal(queue.keys, other.keys)
    assert other.count == 24


def test_earlier_keys_are_negatives_of_their_own_direction() -> None:
    method = make_method(Plain(), WITH_QUEUE)
    first, second = make_views(4, seed=1), make_views(4, seed=2)
    bare = copy.deepcopy(method)
    bare.queue = None
    assert torch.equal(method(first).loss, bare(first).loss)  # empty: nothing is added
    earlier = copy.deepcopy(method).keys(first)
    step = make_step(method)
    step.gradients(first)
    method.remember(step.remembered)
    keys = copy.deepcopy(method).keys(second)
    queries = [method.predictor(method.projector(f)) for f in copy.deepcopy(method).student_features(second)]
    output = copy.deepcopy(method)(second)
    ces = []
    for query, key, old in ((queries[0], keys[1], earlier[1]), (queries[1], keys[0], earlier[0])):
        logits = F.normalize(query, dim=1) @ F.normalize(torch.cat([key, old]), dim=1).T / 0.2
        ces.append(F.cross_entropy(logits, torch.arange(4)))
    assert output.loss.item() == pytest.approx(2 * 0.2 * (ces[0] + ces[1]).item(), rel=1e-5)
    assert output.metrics["ce_norm"].item() == pytest.approx(
        output.metrics["ce"].item() / torch.tensor(8.0).log().item(), rel=1e-5
    )


def test_a_queue_resumes_with_the_same_bits() -> None:
    whole = make_method(Plain(), WITH_QUEUE)
    step = make_step(whole)
    states = []
    for number in range(4):
        step.gradients(make_views(4, seed=number))
        step.update(0.9)
        states.append(copy.deepcopy(whole.state_dict()))
    resumed = make_method(Plain(), WITH_QUEUE, seed=7)
    load_weights(resumed, states[1], "here")
    again = make_step(resumed)
    for number in (2, 3):
        again.gradients(make_views(4, seed=number))
        again.update(0.9)
    for name, value in states[3].items():
        assert torch.equal(resumed.state_dict()[name], value), name
