"""Batches decoded by nvImageCodec on a CPU: the same views, the same stand-ins, and the self-test before the start."""

import dataclasses

import numpy as np
import pytest
import torch

from pipelines.augment.recipe import Recipe
from pipelines.engines.engine_table import make_engine
from pipelines.loading import gpu_decode
from pipelines.loading.gpu_decode import BatchDecoder, check_decoder, gpu_decoder
from pipelines.loading.loader import Loader, open_loader
from pipelines.loading.loader_options import LoaderOptions
from pipelines.loading.slots import gpu_slots
from pipelines.streaming.bad_samples import BadSamples
from pipelines.streaming.cache import Samples
from shards.conversion.convert import convert
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.images.pixels import write_npy
from tests import needs
from tests.pictures import photo
from tests.pipelines.augment.test_channels import bands

needs.module("nvidia.nvimgcodec")
CPU = torch.device("cpu")
SMALL = Recipe(size=16)


@pytest.fixture(scope="module")
def jpegs(tmp_path_factory) -> ShardSet:
    """23 JPEGs and a PNG of different sizes; two are grey, one progressive."""
    root = tmp_path_factory.mktemp("jpegs")
    (root / "source").mkdir()
    for i in range(23):
        picture = photo(40 + i, 33 + i % 5, seed=i)
        if i in (4, 5):
            picture = picture.convert("L")
        picture.save(root / "source" / f"{i:02d}.jpg", quality=90, progressive=i == 6)
    photo(30, 20, seed=99).save(root / "source" / "99.png")
    convert(root / "source", root / "shards", workers=0, samples_per_shard=8)
    return ShardSet.open(root / "shards")


def samples_of(shards: ShardSet) -> Samples:
    return Samples(shards, make_engine("fused", SMALL).decode, 3)


def loader(shards: ShardSet, *, decode_threads: int, store: bool = False, batch: int = 8) -> Loader:
    """The GPU's path on CPU tensors."""
    samples = samples_of(shards)
    bad = BadSamples(shards, SMALL, 0, 0.5, lambda line: None)
    options = LoaderOptions(
        threads=decode_threads or 2,
        decode="gpu" if decode_threads else "cpu",
        cache="gpu" if store else "none",
    )
    slots = gpu_slots(samples, SMALL, options)
    return Loader(samples, slots, SMALL, bad, batch=batch, seed=0, options=options)


def views(made: Loader, epochs: int = 2) -> list[torch.Tensor]:
    return [view.clone() for epoch in range(epochs) for batch in made.epoch(epoch) for view in batch.views]


def test_pixels_are_those_of_the_cpu_decoder(jpegs):
    samples = samples_of(jpegs)
    decoder = BatchDecoder(CPU, 1)
    made = decoder([np.frombuffer(samples.encoded(i), np.uint8) for i in range(24)])
    for i, pixels in enumerate(made):
        assert pixels is not None
        np.testing.assert_array_equal(pixels.numpy(), samples.pixels(i))
    assert decoder([]) == []


def test_what_is_damaged_is_none_and_the_rest_is_there(jpegs, capfd):
    good = np.frombuffer(jpegs.read(0), np.uint8)
    made = BatchDecoder(CPU, 1)([np.zeros(100, np.uint8), good])
    assert made[0] is None
    assert made[1] is not None


@pytest.mark.parametrize("store", [False, True])
def test_views_are_the_same_whoever_decodes(jpegs, store):
    plain = views(loader(jpegs, decode_threads=0, store=store))
    ours = views(loader(jpegs, decode_threads=1, store=store))
    assert len(plain) == len(ours) == 12
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


@pytest.mark.parametrize("store", [False, True])
def test_bad_samples_get_the_same_stand_ins(jpegs, store, monkeypatch, capfd):
    read = ShardSet.read
    monkeypatch.setattr(
        ShardSet, "read", lambda self, i: memoryview(b"junk" * 8) if i in (2, 3, 9) else read(self, i)
    )
    monkeypatch.setattr(gpu_decode, "check_decoder", lambda *_: "")
    [expected] = loader(jpegs, decode_threads=0, store=store, batch=24).epoch(0)
    kept = [view.clone() for view in expected.views]
    ours = loader(jpegs, decode_threads=1, store=store, batch=24)
    [batch] = ours.epoch(0)
    assert batch.sample_ids.tolist() == expected.sample_ids.tolist()
    assert not {2, 3, 9} & set(batch.sample_ids.tolist())
    assert all(torch.equal(a, b) for a, b in zip(kept, batch.views, strict=True))
    assert ours.bad.samples == 3


def test_the_cpu_decodes_what_the_device_refuses(jpegs, monkeypatch):
    plain = views(loader(jpegs, decode_threads=0))
    monkeypatch.setattr(gpu_decode, "check_decoder", lambda *_: "")
    decode = BatchDecoder.__call__

    def refuses_some(self, encoded, stream=0):
        made = decode(self, encoded, stream)
        # One is refused, one comes in another size than the table says: the CPU has the last word on both.
        return [None, torch.zeros(5, 5, 3, dtype=torch.uint8), *made[2:]]

    monkeypatch.setattr(BatchDecoder, "__call__", refuses_some)
    ours = views(loader(jpegs, decode_threads=1))
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_the_self_test_passes_and_says_what_it_found(jpegs):
    samples = samples_of(jpegs)
    gpu_decoder(samples, CPU, 1)
    assert (
        samples.note == "decoding on the GPU: 8 images tested, at most 0.00 levels from the CPU's on average"
    )


def test_the_self_test_refuses_a_decoder_that_is_off(jpegs):
    samples, decoder = samples_of(jpegs), BatchDecoder(CPU, 1)

    def off(encoded):
        return [None if pixels is None else (pixels // 4) * 4 for pixels in decoder(encoded)]

    def turned(encoded):
        return [None if pixels is None else pixels.transpose(0, 1) for pixels in decoder(encoded)]

    def lazy(encoded):
        return [None] * len(encoded)

    for wrong, words in ((off, r"1\.\d levels of 255 apart"), (turned, "of different sizes")):
        wrong.version = "0.0"
        with pytest.raises(
            UserError, match=rf"nvImageCodec 0\.0 and libjpeg-turbo decode '.*' .* images {words}"
        ):
            check_decoder(wrong, samples)
    assert check_decoder(lazy, samples).endswith("; 8 of them are left to the CPU")


def test_settings_that_do_not_go_together_are_refused(jpegs, monkeypatch):
    with pytest.raises(UserError, match=r"data.decode gpu needs the views to be made on the GPU"):
        open_loader(jpegs, SMALL, batch=8, seed=0, decode="gpu")
    samples = samples_of(jpegs)
    monkeypatch.setattr(jpegs, "manifest", dataclasses.replace(jpegs.manifest, dtypes=["uint16"]))
    with pytest.raises(
        UserError, match=r"data.decode gpu decodes 8-bit JPEG.* holds arrays of 1, 3 channels, uint16: set"
    ):
        gpu_decoder(samples, CPU, 1)


@pytest.mark.parametrize("store", [False, True])
def test_arrays_are_left_to_the_cpu(tmp_path, store, monkeypatch):
    """16-bit images among JPEGs: the device never sees them, and the views are those of a CPU that decodes everything."""
    (tmp_path / "source").mkdir()
    for i in range(16):
        path = tmp_path / "source" / f"{i:02d}"
        if i % 3:
            photo(40 + i, 33, seed=i).save(path.with_suffix(".jpg"), quality=90)
        else:
            path.with_suffix(".npy").write_bytes(write_npy(bands(3, "uint16", 41, 30 + i, seed=i)))
    convert(tmp_path / "source", tmp_path / "shards", workers=0)
    shards = ShardSet.open(tmp_path / "shards")
    seen, decode = [], BatchDecoder.__call__

    def watched(self, encoded, stream=0):
        seen.extend(bytes(data[:2]) for data in encoded)
        return decode(self, encoded, stream)

    monkeypatch.setattr(BatchDecoder, "__call__", watched)
    plain = views(loader(shards, decode_threads=0, store=store))
    assert not seen
    made = loader(shards, decode_threads=1, store=store)
    assert made.note.endswith(
        "8 images tested, at most 0.00 levels from the CPU's on average; 3 of them are left to the CPU"
    )
    ours = views(made)
    assert set(seen) == {b"\xff\xd8"}
    assert len(plain) == len(ours) == 8
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))
