"""The peak of memory, alone and in the log of a run, where the teacher's momentum stands too."""

from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from fastssl.core.peak_memory import peak_bytes, peak_memory
from tests.fastssl.runs import TOTAL, rows

# Linux counts pages for each core, and adds them up now and then.
SLACK = 2**22


def test_the_peak_grows_by_what_is_taken_and_stays_when_it_is_given_back() -> None:
    # Up to the peak of earlier tests first.
    held = np.ones(max(1, peak_bytes() - psutil.Process().memory_info().rss), np.uint8)
    before, size = peak_bytes(), 200 * 2**20
    taken = np.ones(size, np.uint8)
    after = peak_bytes()
    assert 0.7 * size < after - before < 1.5 * size
    del taken, held
    assert peak_bytes() > after - SLACK


def test_on_a_cpu_there_is_no_peak_of_a_gpu() -> None:
    assert list(peak_memory(torch.device("cpu"))) == ["peak_memory_bytes"]


@pytest.mark.gpu
def test_on_a_gpu_its_tensors_are_counted() -> None:
    device = torch.device("cuda")
    torch.cuda.reset_peak_memory_stats(device)
    tensor = torch.empty(10**8, dtype=torch.uint8, device=device)
    del tensor
    assert peak_memory(device)["peak_gpu_memory_bytes"] >= 10**8


def test_the_log_of_a_run_holds_the_peak_and_the_momentum_of_each_row(finished: Path) -> None:
    steps = [row for row in rows(finished) if "loss" in row]
    for row in steps:
        # Along half a cosine from 0.99 to 1, as in the paper.
        momentum = 1 - (1 - 0.99) * (np.cos(np.pi * row["step"] / TOTAL) + 1) / 2
        assert row["teacher_momentum"] == pytest.approx(momentum, rel=1e-5)
        # Torch alone takes more than 100 MB.
        assert 1e8 < row["peak_memory_bytes"] < psutil.virtual_memory().total
    peaks = [row["peak_memory_bytes"] for row in steps]
    assert min(np.diff(peaks)) > -SLACK
