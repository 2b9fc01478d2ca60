"""What all tests share: one compute thread a process, a GPU mark that asks the GPU itself, a store of the S3 protocol."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

# Two cores and many small tensors: a team of threads costs more than it gives, and on a busy machine its threads spin for each other,
# in PyTorch's barriers and in oneDNN's. Processes that tests start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from tests.s3 import FaultProxy, s3_server

torch.set_num_threads(1)
# The machine of a GPU check may lack it.
with contextlib.suppress(ImportError):
    from hypothesis import HealthCheck, settings

    # Nothing is decided by time, nor by the day's luck.
    settings.register_profile(
        "here", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
    )
    settings.load_profile("here")


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


@pytest.fixture(scope="session")
def s3_address() -> Iterator[str]:
    """One server for all tests, in this process."""
    with s3_server() as address:
        yield address


@pytest.fixture
def proxy(s3_address: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """What `s3://bucket/...` goes through in this test, here and in processes begun from here."""
    import fsspec

    proxy = FaultProxy(s3_address)
    for name in ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_CONFIG_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    monkeypatch.setattr("shards.storage.remote.FIRST_PAUSE_S", 0.001)
    fsspec.filesystem("s3").clear_instance_cache()
    yield proxy
    proxy.close()


@pytest.fixture
def bucket(proxy: FaultProxy, tmp_path: Path) -> str:
    """A URL in the store that no other test uses."""
    return f"s3://bucket/{tmp_path.name}"
