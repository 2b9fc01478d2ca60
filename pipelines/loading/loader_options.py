"""How a loader works: settings of the views, shared with the configuration's section `data`, and those of one process."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from pipelines.engines.engine_table import EngineName
from shards.errors import UserError, nearest

if TYPE_CHECKING:  # the command line reads the settings, and must not wait for torch
    import torch

    from pipelines.kernels.view_params import Form


@dataclass(frozen=True)
class ViewSettings:
    """How samples become views."""

    engine: EngineName = "fused"
    """What makes the views: 'fused' (ours), 'dali' or 'kornia' (NVIDIA's and Kornia's operations, the same draws), or 'reference'
    (PIL and torchvision, one image at a time)."""
    threads: int = 0
    """Threads that decode and augment; 0 means one per core that this process may use, divided among the ranks here."""
    augment_on: Literal["cpu", "gpu"] = "cpu"
    """Where views are made ('reference': only 'cpu'): 'gpu' frees CPU cores and takes time of the GPU. With train.micro_batch only
    'fused' makes them there: a chunk's views when the step asks for the chunk, for each pass anew."""
    decode: Literal["cpu", "gpu"] = "cpu"
    """Where images are decoded with data.augment_on gpu: 'gpu' (nvImageCodec) helps where few CPU cores serve a GPU, whose memory then
    holds the decoded images of up to 3 batches; arrays, such as 16 bits, are left to the CPU."""
    order: Literal["auto", "global", "blocks"] = "auto"
    """'global' shuffles all samples; 'blocks' shuffles shards, and samples within a few shards, so that few are in use at a time.
    'auto' is 'blocks' for remote shards."""
    block_shards: int = 16
    """Shards whose samples are shuffled together with data.order blocks."""
    cache: Literal["none", "ram", "gpu"] = "none"
    """Keep the data set in memory: 'ram' as pixels where they fit and as encoded bytes where not, once for all ranks of a machine and
    filled before the first step of a run; 'gpu' as pixels on the GPU."""
    cache_gb: float = 0.0
    """Memory that caches may fill, in 10^9 bytes: on a machine for 'ram', of each GPU for 'gpu'; 0 is half of what is free at the
    start."""
    value_range: Literal["auto", "type", "percentiles"] = "auto"
    """What becomes 0 and 1: the ends of the type's range (65535 for 16 bits), or the 1st and 99th percentile of each channel. auto:
    percentiles for the recipe multispectral, type for the others."""
    side_stream: bool = True
    """Let a GPU copy, and make views where data.augment_on is gpu, on a stream beside the step's; False does it between the steps."""
    max_bad_share: float = 0.001
    """Stop when more than ten samples, and more than this share of those read, are bad; others stand in till then. 0: at the first."""
    masks: bool = False
    """Batches carry the masks of their views too, for segmentation: the same crops, flips and turns, made on the CPU."""
    mask_ignore: int = 255
    """Class index in masks for pixels whose class is not known: of samples without a mask, and of erased rectangles."""

    def __post_init__(self) -> None:
        for name, kind in get_type_hints(ViewSettings).items():
            known, value = get_args(kind), getattr(self, name)
            if known and name != "engine" and value not in known:
                raise UserError(f"data.{name} is {value!r}, but it must be one of {', '.join(known)}.")
        if self.threads < 0:
            raise UserError(f"data.threads is {self.threads}, but it must be 0 (one per core) or more.")
        if self.block_shards < 1:
            raise UserError(f"data.block_shards is {self.block_shards}, but it must be at least 1.")
        if self.cache_gb < 0:
            raise UserError(f"data.cache_gb is {self.cache_gb}, but it must be 0 (automatic) or more.")
        if not -(2**31) <= self.mask_ignore < 2**31:
            raise UserError(f"data.mask_ignore is {self.mask_ignore}, but masks are integers of 32 bits.")
        if not 0 <= self.max_bad_share <= 1:
            raise UserError(
                f"data.max_bad_share is {self.max_bad_share}, but it must be a share between 0 and 1."
            )


@dataclass(frozen=True)
class LoaderOptions(ViewSettings):
    """How the loader of one process works: `ViewSettings`, the process's place among the ranks, and where its batches go."""

    rank: int = 0
    """Number of this process among those that share a batch."""
    world: int = 1
    """Processes that share a batch."""
    device: torch.device | str = "cpu"
    """Where the views go; copies to a GPU overlap with the work on it."""
    form: Form | None = None
    """Element type and layout of views that the engine fused makes on a GPU; None, and all other views: float32, channels first."""
    reuse_memory: bool = False
    """Write later batches over earlier ones: views on a CPU are valid until the next batch is asked for. Saves memory, for loops that
    keep nothing of a batch. False: a batch is the caller's for as long as it is kept."""
    log: Callable[[str], None] | None = None
    """Takes one line about each sample found bad; without it they are warnings."""


OPTION_NAMES = tuple(field.name for field in dataclasses.fields(LoaderOptions))


def make_options(
    caller: str,
    given: Mapping[str, Any],
    known: tuple[str, ...] = OPTION_NAMES,
    base: LoaderOptions | None = None,
) -> LoaderOptions:
    """Return the options that keyword arguments of `caller` set, on top of `base`.

    Raises:
        UserError: one has a name that is not in `known`, or a value that is not allowed.
    """
    for name in given:
        if name not in known:
            raise UserError(f"{caller} has no option '{name}'.{nearest(name, known)}")
    return dataclasses.replace(base or LoaderOptions(), **given)
