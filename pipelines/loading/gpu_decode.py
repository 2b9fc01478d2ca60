"""Decoding whole batches with nvImageCodec: on a GPU its decoding engines and kernels, on a CPU its libjpeg-turbo (for the tests)."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np
import torch

from pipelines.kernels.decode import is_array
from pipelines.streaming.cache import Samples, Unreadable
from shards.errors import UserError

TESTED_IMAGES = 8
# nvJPEG computes the inverse DCT in floating point; with interpolated chroma it stays within a few levels of libjpeg-turbo. Without
# that (the default of most bindings) photographs are 1 to 3 levels off on average, and edges tens.
ALLOWED_MEAN_LEVELS = 0.75


class BatchDecoder:
    """nvImageCodec's decoder of one device, for 8-bit RGB."""

    def __init__(self, device: torch.device, threads: int):
        """Start the decoder. `threads`: host threads for what the GPU leaves. UserError where the package is missing or fails."""
        try:
            codec: Any = import_module("nvidia.nvimgcodec")
        except ImportError as error:
            raise UserError(
                f"data.decode gpu needs the package nvidia-nvimgcodec-cu12, which came with DALI ({error}): install it, or set "
                "--data.decode cpu."
            ) from error
        on_gpu = device.type == "cuda"
        backends = None if on_gpu else [codec.Backend(codec.CPU_ONLY)]
        index = (device.index or 0) if on_gpu else codec.NVIMGCODEC_DEVICE_CPU_ONLY
        self.version: str = codec.__version__
        try:
            # Chroma interpolated between its samples, as libjpeg-turbo does it.
            self._decoder = codec.Decoder(index, threads, backends, ":fancy_upsampling=1")
        except Exception as error:
            raise UserError(
                f"data.decode gpu: nvImageCodec {self.version} does not start ({error}): set --data.decode cpu."
            ) from error
        # Shards hold upright images: a turn left in the header of a stored file has been dealt with by the converter.
        self._params = codec.DecodeParams(
            apply_exif_orientation=False, color_spec=codec.ColorSpec.SRGB, allow_any_depth=False
        )
        self._device = device
        self._turn = threading.Lock()  # two batches may be under way

    def __call__(self, encoded: Sequence[np.ndarray], stream: int = 0) -> list[torch.Tensor | None]:
        """Decode files given as uint8 (bytes,): uint8 (H, W, 3) each, on the device; None for what is damaged or of an unknown format.

        `stream`: handle of the CUDA stream on which the pixels are ready.
        """
        if not encoded:
            return []
        with self._turn:
            made: list[Any] = self._decoder.decode(list(encoded), params=self._params, cuda_stream=stream)
        return [None if image is None else self._tensor(image) for image in made]

    def _tensor(self, image: Any) -> torch.Tensor | None:
        # DLPack asks for a CUDA device even where the pixels are the host's.
        on_gpu = self._device.type == "cuda"
        pixels = torch.from_dlpack(image) if on_gpu else torch.from_numpy(np.array(image))
        if pixels.ndim != 3 or pixels.dtype != torch.uint8:
            return None
        if pixels.shape[2] == 1:  # gray stays gray without a colour specification
            pixels = pixels.expand(-1, -1, 3)
        return pixels if pixels.shape[2] == 3 else None


@dataclass(frozen=True)
class DeviceDecoding:
    """A decoder and its own stream: on the stream of the views, one batch's views would wait for the next batch's decoding."""

    decoder: BatchDecoder
    stream: torch.cuda.Stream | None = None


def check_decoder(decoder: BatchDecoder, samples: Samples) -> str:
    """Decode images from all over the data set on the device and on the CPU, and compare; a line to print.

    Raises:
        UserError: they differ by more than rounding. What the device cannot decode is no error: the CPU decodes it.
    """
    count = samples.shards.num_samples
    ids = np.unique(np.linspace(0, count - 1, TESTED_IMAGES).astype(np.int64))
    encoded, expected, arrays = [], [], 0
    for i in ids:
        try:
            data = samples.encoded(int(i))
            if is_array(data):
                arrays += 1
                continue
            expected.append((int(i), samples.pixels(int(i))))
        except Unreadable:
            continue  # bad on both: the run finds a stand-in for it
        encoded.append(np.frombuffer(data, np.uint8))
    made = decoder(encoded)
    if made and made[0] is not None and made[0].device.type == "cuda":
        torch.cuda.synchronize(made[0].device)
    worst, refused = 0.0, arrays
    for pixels, (sample_id, wanted) in zip(made, expected, strict=True):
        if pixels is None:
            refused += 1
            continue
        found = pixels.cpu().numpy()
        same_shape = found.shape == wanted.shape
        levels = float(np.abs(found.astype(np.int16) - wanted).mean()) if same_shape else float("inf")
        if levels > ALLOWED_MEAN_LEVELS:
            what = f"{levels:.1f} levels of 255 apart on average" if same_shape else "of different sizes"
            raise UserError(
                f"data.decode gpu: nvImageCodec {decoder.version} and libjpeg-turbo decode '{samples.shards.name(sample_id)}' (sample "
                f"{sample_id}) to images {what}, more than {ALLOWED_MEAN_LEVELS}: set --data.decode cpu, or install another version."
            )
        worst = max(worst, levels)
    told = f"; {refused} of them are left to the CPU" if refused else ""
    return f"decoding on the GPU: {len(made) + arrays} images tested, at most {worst:.2f} levels from the CPU's on average{told}"


def gpu_decoder(samples: Samples, device: torch.device, threads: int) -> BatchDecoder:
    """Return a decoder that passed `check_decoder`, and add the result to `samples.note`. UserError where it cannot be used.

    Arrays (images of 16 bits, of floats, or of other than 1 or 3 channels) are left to the CPU; a data set of nothing else is refused.
    """
    manifest = samples.shards.manifest
    if samples.channels != 3 or "uint8" not in manifest.dtypes:
        raise UserError(
            f"data.decode gpu decodes 8-bit JPEG, PNG and WebP of 1 or 3 channels, and '{samples.shards.folder}' holds arrays of "
            f"{', '.join(map(str, manifest.channels))} channels, {', '.join(manifest.dtypes)}: set --data.decode cpu."
        )
    decoder = BatchDecoder(device, threads)
    found = check_decoder(decoder, samples)
    samples.note = f"{samples.note}; {found}" if samples.note else found
    return decoder
