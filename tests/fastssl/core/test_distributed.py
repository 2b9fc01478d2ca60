"""World 1 without a process group, and two gloo processes."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from fastssl.core.distributed import (
    Dist,
    average_over_ranks,
    barrier,
    choose_device,
    cleanup,
    gather_keys,
    mean_over_ranks,
    rank,
    setup,
)
from shards.errors import UserError
from tests.gloo import RankError, run_ranks

TORCHRUN_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")


@pytest.fixture(autouse=True)
def _no_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in TORCHRUN_NAMES:
        monkeypatch.delenv(name, raising=False)


def test_a_single_process_needs_no_process_group() -> None:
    here = setup("cpu")
    assert here == Dist(rank=0, world=1, local_rank=0, device=torch.device("cpu"))
    assert here.is_main
    assert rank() == 0
    keys = torch.randn(3, 2, requires_grad=True)
    gathered = gather_keys(keys)
    assert torch.equal(gathered, keys)
    assert not gathered.requires_grad
    value = torch.tensor(3.0)
    assert mean_over_ranks({"loss": value}) == {"loss": value}
    average_over_ranks([value])
    assert value == 3
    barrier()
    cleanup()
    assert not dist.is_initialized()


def test_torchrun_with_one_process_needs_no_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(TORCHRUN_NAMES, ("0", "1", "0"), strict=True):
        monkeypatch.setenv(name, value)
    assert setup("cpu").world == 1
    assert not dist.is_initialized()


def test_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="sets WORLD_SIZE but not RANK, LOCAL_RANK"):
        setup("cpu")


def test_unknown_and_missing_devices_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'tpu'"):
        choose_device("tpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="no CUDA device"):
        setup("cuda")


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in zip(TORCHRUN_NAMES, ("2", "3", "2"), strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="process 3 of this machine, which has 2 GPUs"):
        setup()


def _collectives(here: Dist) -> dict:
    rows = torch.arange(6.0).reshape(3, 2) + 100 * here.rank
    means = mean_over_ranks({"a": torch.tensor(float(here.rank)), "b": torch.tensor(4.0 - 2 * here.rank)})
    tensors = [torch.full((2, 1), 2.0 * here.rank), torch.tensor(4.0 - 2 * here.rank)]
    average_over_ranks(tensors)
    barrier()
    return {
        "averages": [tensor.tolist() for tensor in tensors],
        "dist": (here.rank, here.world, here.is_main, rank()),
        "gathered": gather_keys(rows.requires_grad_()),
        "transposed": gather_keys(rows.T),
        "means": {name: value.item() for name, value in means.items()},
    }


def test_two_processes_gather_in_rank_order_and_average() -> None:
    first, second = run_ranks(_collectives)
    assert first["dist"] == (0, 2, True, 0)
    assert second["dist"] == (1, 2, False, 1)
    expected = torch.cat([torch.arange(6.0).reshape(3, 2), torch.arange(6.0).reshape(3, 2) + 100])
    for result in (first, second):
        assert torch.equal(result["gathered"], expected)
        assert not result["gathered"].requires_grad
        assert torch.equal(result["transposed"], torch.cat([expected[:3].T, expected[3:].T]))
        assert result["means"] == {"a": 0.5, "b": 3.0}
        assert result["averages"] == [[[1.0], [1.0]], 3.0]


def _fail_on_rank_1(here: Dist) -> None:
    if here.rank == 1:
        raise RuntimeError("rank one has had enough")
    barrier()


def test_the_harness_reports_the_failing_rank_s_traceback() -> None:
    with pytest.raises(RankError, match=r"rank 1: Traceback[^~]*_fail_on_rank_1[^~]*rank one has had enough"):
        run_ranks(_fail_on_rank_1)


def _die_or_sleep(here: Dist, how: str) -> None:
    if how == "die":
        os._exit(3)
    time.sleep(60)


def test_the_harness_reports_ranks_that_die_or_stay_silent() -> None:
    with pytest.raises(RankError, match="rank 0: died without a traceback"):
        run_ranks(_die_or_sleep, "die", world=1)
    with pytest.raises(RankError, match=r"no answer from ranks \[0\] within 0.5 s"):
        run_ranks(_die_or_sleep, "sleep", world=1, timeout_s=0.5)
