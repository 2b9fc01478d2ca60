"""What a GPU is told to do in which order: with streams that only write it down, and CPU tensors in the place of the device's."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.augment.draws import draw
from pipelines.augment.recipe import Recipe
from pipelines.engines.engine_table import make_engine
from pipelines.kernels.view_params import PLAIN, Form
from pipelines.loading import gpu_slot
from pipelines.loading.gpu_decode import DeviceDecoding
from pipelines.loading.gpu_slot import GpuSlot, GpuStore
from pipelines.loading.loader_options import LoaderOptions
from pipelines.loading.slots import gpu_slots
from pipelines.streaming import batch_stream as stream
from pipelines.streaming.batch import BatchRequest
from pipelines.streaming.cache import Samples
from shards.dataset.shard_set import ShardSet
from tests.streams import FakeStream, Log, Operations, pretend_streams

CPU, RECIPE = torch.device("cpu"), Recipe(size=12)


@pytest.fixture
def log(monkeypatch) -> Log:
    return pretend_streams(monkeypatch)


def job(shards: ShardSet, *ids: int) -> BatchRequest:
    chosen = np.array(ids)
    return BatchRequest(chosen, draw(RECIPE, 0, 0, chosen, shards.widths[chosen], shards.heights[chosen]))


def samples_of(shards: ShardSet) -> Samples:
    return Samples(shards, make_engine("fused", RECIPE).decode, 3)


def fill(slot: GpuSlot, work: BatchRequest) -> None:
    slot.begin(work)
    for i, sample_id in enumerate(work.ids):
        slot.fill(i, int(sample_id), work.draws[:, i])


@pytest.mark.parametrize("cached", [False, True])
def test_copies_and_kernels_are_on_the_side_stream_and_the_step_waits_for_all_of_them(shard_set, log, cached):
    samples, side = samples_of(shard_set), FakeStream(log, "side")
    store = GpuStore(samples, CPU) if cached else None
    slot = GpuSlot(samples, RECIPE, CPU, side, store)  # type: ignore[arg-type]
    for turn in range(2):
        log.lines.clear()
        work = job(shard_set, 3, 1, 8)
        fill(slot, work)
        # Before the host writes to memory that copies may still read.
        assert log.lines[0][0] == f"host waits for {'side' if turn else 'nothing'}"
        log.lines.clear()
        with Operations(log):
            slot.launch()
        assert {where for _, where in log.lines} == {"side"}
        assert log.kinds().count("record") == 1
        assert log.kinds()[-1] == "record"
        copies = log.kinds().count("aten.copy_")
        assert copies >= (3 if cached and not turn else 0 if cached else 1)
        log.lines.clear()
        views = slot.views()
        assert log.lines == [("wait for side", "compute"), *[("in use by", "compute")] * 2]
        plain = GpuSlot(samples, RECIPE, CPU)
        fill(plain, work)
        plain.launch()
        assert all(torch.equal(a, b) for a, b in zip(views, plain.views(), strict=True))


def test_the_device_decodes_on_a_stream_of_its_own_and_hands_over_in_one_call(shard_set, log):
    samples, seen = samples_of(shard_set), []

    def decoder(encoded, handle):
        seen.append((log.current, handle))
        made = [make_engine("fused", RECIPE).decode(memoryview(data)) for data in encoded]
        return [torch.from_numpy(pixels) for pixels in made]

    decoding = DeviceDecoding(decoder, FakeStream(log, "decoding"))  # type: ignore[arg-type]
    slot = GpuSlot(samples, RECIPE, CPU, FakeStream(log, "side"), decoding=decoding)  # type: ignore[arg-type]
    fill(slot, job(shard_set, 0, 5, 2))
    log.lines.clear()
    assert slot.complete() == []
    assert seen == [("decoding", FakeStream.cuda_stream)]
    assert log.lines == [("record", "decoding")]
    log.lines.clear()
    with Operations(log):
        slot.launch()
    done = log.kinds()
    assert {where for _, where in log.lines} == {"side"}
    assert done.count("aten._foreach_copy_") == 1
    assert done.index("wait for decoding") < done.index("aten._foreach_copy_")
    plain = GpuSlot(samples, RECIPE, CPU)
    fill(plain, job(shard_set, 0, 5, 2))
    plain.launch()
    assert all(torch.equal(a, b) for a, b in zip(slot.views(), plain.views(), strict=True))


def test_memory_of_the_slots_and_of_the_cache_is_taken_on_the_side_stream(shard_set, log, monkeypatch):
    """PyTorch gives freed memory to the stream that took it: on another one, a kernel might still read it."""
    side = FakeStream(log, "side")
    monkeypatch.setattr("pipelines.loading.slots.work_stream", lambda device, own: side)
    made = []
    for name in ("GpuStore", "GpuSlot"):
        maker = getattr(gpu_slot, name)

        def noted(*args, maker=maker, **more):
            made.append((maker.__name__, log.current))
            return maker(*args, **more)

        monkeypatch.setattr(gpu_slot, name, noted)
    slots = gpu_slots(samples_of(shard_set), RECIPE, LoaderOptions(cache="gpu"))()
    assert made == [("GpuStore", "side"), *[("GpuSlot", "side")] * stream.SLOTS]
    assert len(slots) == stream.SLOTS


def test_the_form_of_the_views_is_that_asked_for(shard_set):
    form = Form(torch.bfloat16, channels_last=True)
    samples = samples_of(shard_set)
    made = []
    for each in (PLAIN, form):
        slot = gpu_slots(samples, RECIPE, LoaderOptions(form=each))()[0]
        fill(slot, job(shard_set, 4, 7))  # type: ignore[arg-type]
        slot.launch()
        made.append(slot.views())
    for plain, ours in zip(*made, strict=True):
        assert ours.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(ours, plain.bfloat16())


def test_a_device_without_a_number_is_the_current_one(monkeypatch):
    """Threads of the loader and nvImageCodec would take number 0 for it."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert stream.exact_device("cuda") == torch.device("cuda", 3)
    assert stream.exact_device("cuda:1") == torch.device("cuda", 1)
    assert stream.exact_device(CPU) == CPU


def test_triton_launches_on_the_device_of_the_views(monkeypatch, tmp_path: Path):
    """Whatever device is current: a process may work on another one than the first."""
    from pipelines.kernels import batched_kernels, kernel_choice

    inside = []

    class FakeDevice(contextlib.nullcontext):
        def __init__(self, device):
            super().__init__()
            inside.append(device)

    monkeypatch.setattr(torch.cuda, "device", FakeDevice)
    second = torch.device("cuda", 1)
    with batched_kernels.on_device(second):
        pass
    with batched_kernels.on_device(CPU):
        pass
    assert inside == [second]
    monkeypatch.setattr(kernel_choice, "difference", lambda *_: inside.append("tested") or 0.0)
    kernel_choice.choose_kernels.cache_clear()
    kernel_choice.choose_kernels(second)
    kernel_choice.choose_kernels.cache_clear()
    assert inside == [second, second, "tested"]
