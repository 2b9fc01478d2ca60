"""What a GPU is told to do in which order where views are made chunk by chunk; as in `test_gpu_streams`."""

import pytest
import torch

from pipelines.loading.chunk_slot import ChunkBuffer, ChunkSlot
from pipelines.loading.gpu_decode import DeviceDecoding
from pipelines.loading.gpu_slot import GpuStore
from tests.pipelines.loading.test_chunk_views import (
    CPU,
    PARTS,
    RECIPE,
    fill,
    job,
    samples_of,
    some_decoder,
    whole,
)
from tests.streams import FakeStream, Log, Operations, pretend_streams


@pytest.fixture
def log(monkeypatch) -> Log:
    return pretend_streams(monkeypatch)


def test_a_chunk_is_made_on_the_stream_that_asks_and_after_all_before_it(shard_set, log):
    slot = ChunkSlot(ChunkBuffer(CPU, True), samples_of(shard_set), RECIPE, CPU, FakeStream(log, "side"))  # type: ignore[arg-type]
    work = job(shard_set, *range(10))
    with Operations(log):
        fill(slot, work)
        assert log.lines[0] == ("host waits for nothing", "compute")
        # Nothing goes to the device yet.
        assert [kind for kind, where in log.lines if where != "compute"] == ["record"]
        views = slot.views()
        before = "side"
        for number, part in enumerate(PARTS):
            name = ("copies", "copies", "another")[number]
            log.lines.clear()
            with torch.cuda.stream(FakeStream(log, name)):  # type: ignore[arg-type]
                made = views.rows(part)
            assert {where for _, where in log.lines} == {name}
            kinds = log.kinds()
            # After the images are there and their last chunk was made, and before the buffer is written to.
            assert kinds[0] == f"wait for {before}"
            assert kinds.index("in use by") < kinds.index("aten.copy_")
            buffer_free = [i for i, kind in enumerate(kinds) if kind.startswith("wait for")]
            assert len(buffer_free) == 2
            assert buffer_free[1] < kinds.index("aten.copy_")
            # What frees buffer and images follows the last kernel.
            assert kinds[-1] == "record"
            assert kinds.count("record") == 2
            last = max(i for i, kind in enumerate(kinds) if kind.startswith("aten."))
            assert kinds.index("record") > last
            before = name
            assert all(torch.equal(a, b[part]) for a, b in zip(made, whole(shard_set, work), strict=True))
    log.lines.clear()
    slot.done()
    slot.begin(work)
    # The host writes to the images' memory only after the last chunk was made.
    assert log.lines == [("host waits for another", "compute")]


def test_a_buffer_is_shared_by_batches_in_turn(shard_set, log):
    buffer, side = ChunkBuffer(CPU, True), FakeStream(log, "side")
    slots = [ChunkSlot(buffer, samples_of(shard_set), RECIPE, CPU, side) for _ in range(2)]  # type: ignore[arg-type]
    for slot in slots:
        fill(slot, job(shard_set, *range(10)))
    with torch.cuda.stream(FakeStream(log, "one")):  # type: ignore[arg-type]
        slots[0].views().rows(PARTS[0])
    log.lines.clear()
    with torch.cuda.stream(FakeStream(log, "two")):  # type: ignore[arg-type]
        slots[1].views().rows(PARTS[0])
    assert ("wait for one", "two") in log.lines


@pytest.mark.parametrize("decodes", [False, True])
def test_images_of_a_cache_are_there_before_a_chunk_is_made_and_are_not_written_to_again(
    shard_set, log, decodes
):
    samples = samples_of(shard_set)
    store, buffer, side = GpuStore(samples, CPU), ChunkBuffer(CPU, True), FakeStream(log, "side")
    how = {"decoding": DeviceDecoding(some_decoder(set()), FakeStream(log, "decoding"))} if decodes else {}  # type: ignore[arg-type]
    one, two = (ChunkSlot(buffer, samples, RECIPE, CPU, side, store, **how) for _ in range(2))  # type: ignore[arg-type]
    work = job(shard_set, *range(10))
    # Both are filled before either is launched, as the stream of batches does it.
    for slot in (one, two):
        slot.begin(work)
        for i in range(10):
            slot.fill(i, i, work.draws[:, i])
        assert slot.complete() == []
    for slot, copies in ((one, 1 if decodes else 10), (two, 0)):
        log.lines.clear()
        with Operations(log):
            slot.launch()
        assert {where for _, where in log.lines} == {"side"}
        assert log.kinds().count("aten._foreach_copy_" if decodes else "aten.copy_") == copies
        assert log.kinds()[-1] == "record"
    log.lines.clear()
    with torch.cuda.stream(FakeStream(log, "copies")):  # type: ignore[arg-type]
        made = two.views().rows(PARTS[1])
    assert log.lines[0] == ("wait for side", "copies")
    assert all(torch.equal(a, b[PARTS[1]]) for a, b in zip(made, whole(shard_set, work), strict=True))


def test_a_chunk_of_images_that_the_device_decoded_waits_for_the_decoder(shard_set, log):
    decoding = DeviceDecoding(some_decoder({2, 3}), FakeStream(log, "decoding"))  # type: ignore[arg-type]
    slot = ChunkSlot(
        ChunkBuffer(CPU, True),
        samples_of(shard_set),
        RECIPE,
        CPU,
        FakeStream(log, "side"),  # type: ignore[arg-type]
        decoding=decoding,
    )
    work = job(shard_set, *range(10))
    with Operations(log):
        fill(slot, work)
    assert ("wait for decoding", "side") in log.lines
    log.lines.clear()
    with Operations(log):
        made = slot.views().rows(slice(0, 6))
    # Those that the device left are copied at once, the others in one launch.
    assert log.kinds()[0] == "wait for side"
    assert log.kinds().count("aten._foreach_copy_") == 1
    expected = whole(shard_set, work)
    assert all(torch.equal(a, b[:6]) for a, b in zip(made, expected, strict=True))
