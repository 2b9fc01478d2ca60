"""A lack of GPU memory, in whichever library's words, with errors that are only raised for the test."""

from pathlib import Path

import pytest
import torch

from fastssl.bench.guard import Guard
from fastssl.bench.ladder import ladder, step_peers, step_rungs
from fastssl.bench.report import Row
from fastssl.bench.step_timer import StepTimer
from fastssl.commands import pretrain_command as command
from fastssl.core.out_of_memory import bracketed_cause, is_out_of_memory
from fastssl.pretraining import run as pretraining_run
from fastssl.pretraining.run_config import load
from shards.errors import UserError

LACKS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA driver error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED. This error may appear if ..."),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("FIND was unable to find an engine to execute this computation"),
    RuntimeError("NCCL error: unhandled cuda error\nLast error:\nCuda failure 2 'out of memory'"),
]
OTHERS = [
    RuntimeError("CUDA error: device-side assert triggered"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm(...)`"),
    RuntimeError("cuDNN error: CUDNN_STATUS_BAD_PARAM"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied (8x5 and 4x2)"),
    RuntimeError("out of resource: shared memory, Required: 131072, Hardware limit: 101376"),
    RuntimeError(),
    UserError("CUDA error: out of memory"),
    MemoryError(),
]


@pytest.mark.parametrize("error", LACKS, ids=str)
def test_every_library_s_lack_of_memory_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)


@pytest.mark.parametrize("error", OTHERS, ids=repr)
def test_other_failures_are_others(error: Exception) -> None:
    assert not is_out_of_memory(error)


def test_words_that_may_mean_something_else_are_shown() -> None:
    assert bracketed_cause(LACKS[0]) == ""
    assert bracketed_cause(RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR\nYou can try")) == (
        " (cuDNN error: CUDNN_STATUS_INTERNAL_ERROR)"
    )
    assert bracketed_cause(RuntimeError()) == ""


def raising(error: Exception):
    def run(*_args, **_options):
        raise error

    return run


@pytest.mark.parametrize("error", [LACKS[0], LACKS[3], LACKS[6]], ids=str)
def test_pretrain_says_what_to_do(error: Exception, config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining_run, "train", raising(error))
    with pytest.raises(UserError) as told:
        command.run([str(config())])
    text = str(told.value)
    assert text.startswith(
        f"A batch of 8 over all processes does not fit in the GPU's memory{bracketed_cause(error)}: set "
    )
    assert "--train.micro-batch auto" in text


@pytest.mark.parametrize("error", [OTHERS[0], OTHERS[4]], ids=str)
def test_pretrain_lets_other_failures_through(
    error: Exception, config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretraining_run, "train", raising(error))
    with pytest.raises(RuntimeError) as raised:
        command.run([str(config())])
    assert raised.value is error


def test_bench_says_what_to_do_and_lets_other_failures_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resolved = load(None, ["--train.device", "cpu", "--train.batch", "6"])
    monkeypatch.setattr(step_rungs, "build", raising(LACKS[7]))
    with pytest.raises(
        UserError,
        match=r"resnet50 does not fit in the memory of .* \(cuDNN error: .*\): lower --train.batch",
    ):
        ladder.report(resolved, ladder.Options(1, 1))
    monkeypatch.setattr(step_rungs, "build", raising(OTHERS[2]))
    with pytest.raises(RuntimeError, match="CUDNN_STATUS_BAD_PARAM"):
        ladder.report(resolved, ladder.Options(1, 1))


def test_a_peer_s_step_that_fails_is_a_row_that_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    from rich.console import Console

    timer = StepTimer(torch.device("cpu"), 6, 1, 1, Console(quiet=True))
    guard = Guard(timer.device, "a batch of 6 does not fit in the memory of the device")
    resolved = load(None, ["--train.device", "cpu", "--train.batch", "6"])
    monkeypatch.setattr(step_peers, "moco_v3_step", raising(LACKS[4]))
    monkeypatch.setattr(step_peers, "todays_step", raising(OTHERS[4]))
    monkeypatch.setattr(step_peers, "lightly_step", raising(ImportError("no lightly")))
    rows = []
    for name, measure in step_peers.peer_rows(resolved, timer, ("plain", "lightly")).items():
        rows.append(Row(name))
        assert guard.run(rows[-1:], measure) is None
    memory, other, absent = (row.error for row in rows)
    assert memory.startswith("a batch of 6 does not fit in the memory of the device (")
    assert "CUDA error: CUBLAS_STATUS" in memory
    assert "shapes cannot be multiplied" in other
    assert absent == "not installed: no lightly"
    assert [row.failure for row in rows] == [True, True, False]
