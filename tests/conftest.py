"""What all tests share: one compute thread a process, and a GPU mark that asks the GPU itself."""

import pytest
import torch

# Two cores and many small tensors: a team of threads costs more than it gives, and runs in parallel would fight.
torch.set_num_threads(1)


def _gpu_works() -> bool:
    """Whether a CUDA device can really allocate: `is_available` alone is true on busy and broken machines too."""
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError):
        return False
    return True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marked = [item for item in items if item.get_closest_marker("gpu")]
    if marked and not _gpu_works():
        for item in marked:
            item.add_marker(pytest.mark.skip(reason="no CUDA device can allocate memory here"))
