"""Page-locked memory, with a driver that is only pretended."""

import gc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from pipelines.augment.draws import DRAW
from pipelines.augment.recipe import Recipe
from pipelines.engines.batch_engine import BatchEngine, BatchSlot
from pipelines.streaming import pinned
from pipelines.streaming.batch import BatchRequest
from pipelines.streaming.host_slot import HostMemory
from pipelines.streaming.pinned import PAGE, pinned_empty


class Driver:
    """What the runtime was asked to lock and unlock; refuses more than `limit` bytes at a time."""

    def __init__(self, limit: int = 1 << 40):
        self.locked: dict[int, int] = {}
        self.unlocked: list[int] = []
        self.limit = limit
        self.waits = 0

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        if size > self.limit:
            return 2
        assert flags == 1
        ends = [(a, a + n) for a, n in self.locked.items()]
        assert all(address + size <= a or b <= address for a, b in ends), "locked twice"
        self.locked[address] = size
        return 0

    def cudaHostUnregister(self, address: int) -> int:
        assert self.waits > len(self.unlocked), "nobody waited for copies under way"
        del self.locked[address]
        self.unlocked.append(address)
        return 0


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    made = Driver()

    def wait() -> None:
        made.waits += 1

    monkeypatch.setattr(torch.cuda, "cudart", lambda: made)
    monkeypatch.setattr(torch.cuda, "synchronize", wait)
    return made


@pytest.mark.parametrize(
    ("shape", "dtype"), [((3, 5, 7), torch.float32), ((PAGE,), torch.uint8), ((2, PAGE + 1), torch.int32)]
)
def test_as_many_pages_are_locked_as_the_bytes_take(driver, shape, dtype):
    tensor = pinned_empty(shape, dtype)
    assert (tuple(tensor.shape), tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
    [(address, size)] = driver.locked.items()
    assert address == tensor.data_ptr()
    assert address % PAGE == 0
    assert 0 <= size - tensor.nbytes < PAGE
    assert size % PAGE == 0
    tensor.fill_(3)
    assert tensor.double().mean() == 3


def test_no_rounding_to_powers_of_two(driver):
    """As the views of a batch of 4,096 x 224 px, at a thousandth of it."""
    count = 4096 * 3 * 224 * 224 * 4 // 1000
    tensor = pinned_empty((count,), torch.uint8)
    assert sum(driver.locked.values()) - count < PAGE
    assert 1 << (count - 1).bit_length() > 1.5 * count
    del tensor


def test_pages_are_unlocked_with_the_last_tensor_over_them(driver):
    tensor = pinned_empty((4, 1000), torch.float32)
    [address] = driver.locked
    row, numbers = tensor[2], tensor.numpy()
    del tensor
    gc.collect()
    assert not driver.unlocked
    numbers[2] = 7
    assert row.sum() == 7000
    del row
    gc.collect()
    assert not driver.unlocked
    del numbers
    gc.collect()
    assert driver.unlocked == [address]
    assert not driver.locked


def test_two_tensors_share_no_page(driver):
    tensors = [pinned_empty((n,), torch.uint8) for n in (1, 10, 5000, 3, PAGE)]
    assert len(driver.locked) == 5  # the driver refuses what overlaps
    del tensors


def test_nothing_is_locked_for_nothing(driver):
    assert pinned_empty((0, 3), torch.float32).shape == (0, 3)
    assert not driver.locked


def test_where_the_driver_refuses_pytorch_locks_and_it_is_said(driver, monkeypatch):
    driver.limit = 2 * PAGE
    pinned_empty((PAGE,), torch.uint8)
    made = []
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda *a, pin_memory=False, **more: (made.append(pin_memory), empty(*a, **more))[1]
    )
    cleared = []
    monkeypatch.setattr(torch, "zeros", lambda *a, **more: cleared.append(more))
    with pytest.warns(UserWarning, match=r"cudaHostRegister refuses 12,288 bytes \(error 2\)"):
        tensor = pinned_empty((3 * PAGE,), torch.uint8)
    assert tensor.shape == (3 * PAGE,)
    assert made == [True]
    assert cleared == [{"device": "cuda"}]


def test_a_broken_device_does_not_raise_where_memory_is_freed(driver, monkeypatch):
    def broken() -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    tensor = pinned_empty((10,), torch.uint8)
    monkeypatch.setattr(torch.cuda, "synchronize", broken)
    del tensor
    gc.collect()
    assert not driver.unlocked


def test_the_memory_of_batches_on_their_way_to_a_gpu_is_locked_so(driver, monkeypatch):
    """Three batches of float32 views are what they are, not the next power of two."""

    class Event:
        def synchronize(self) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    memory = HostMemory([(3, 5, 5), (3, 5, 5)], 100, torch.device("cuda", 0))
    assert sorted(driver.locked.values()) == [-(-100 * 75 * 4 // PAGE) * PAGE] * 2
    memory.begin(3)
    memory.at(2)[1][:] = 4
    memory.launch()
    assert memory.take()[1][2].mean() == 4
    assert pinned.PORTABLE == 1


def test_views_of_a_batch_engine_that_wait_on_the_host_are_locked_once(driver, monkeypatch):
    class Engine(BatchEngine):
        made = 0

        def render(self, items, draws):
            self.made += 1
            return [torch.full((3, 3, 4, 4), float(self.made)), torch.zeros(3, 3, 2, 2)]

    class Event:
        def synchronize(self) -> None:
            pass

        def record(self, stream) -> None:
            pass

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    with ThreadPoolExecutor(1) as worker:
        slot = BatchSlot(None, Engine(Recipe()), worker, torch.device("cuda", 0), None, True)  # type: ignore[arg-type]
        for number in (1, 2):
            slot.begin(BatchRequest(np.arange(3), np.zeros((2, 3), DRAW)))
            slot.complete()
            views = slot.views()
            assert [int(view.max()) for view in views] == [number, 0]
            assert [view.data_ptr() for view in views] == list(driver.locked)
            slot.done()


@pytest.mark.gpu
def test_a_driver_takes_it_for_page_locked():
    tensor = pinned_empty((1000, 1000), torch.float32)
    assert tensor.is_pinned()
    tensor.fill_(2)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        there = tensor.to("cuda", non_blocking=True)
    stream.synchronize()
    assert torch.equal(there.cpu(), tensor)
    before = torch.cuda.host_memory_stats()["allocated_bytes.current"]
    more = [pinned_empty((3 * 2**20 + 5,), torch.uint8) for _ in range(3)]
    assert torch.cuda.host_memory_stats()["allocated_bytes.current"] == before
    assert all(each.is_pinned() for each in more)
    del tensor, more, there
    gc.collect()
    torch.zeros(1, device="cuda").item()
