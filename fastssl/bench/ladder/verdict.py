"""The bottleneck of a run in one sentence: a pure function of the measured ladder and the settings in use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fastssl.bench.report import brief

# The rungs, from the bottom up.
READ, DECODE, TO_DEVICE, AUGMENT, LOADER = "read", "decode", "to device", "augment", "loader"
STUDENT, TEACHER, UPDATE = "student forward + backward", "teacher forward", "EMA + optimiser"
FULL, FULL_AUGMENT, END_TO_END = "full step, synthetic", "full step + augment", "end to end"
RUNGS = (READ, DECODE, TO_DEVICE, AUGMENT, LOADER, STUDENT, TEACHER, UPDATE, FULL, FULL_AUGMENT, END_TO_END)
# The step of the other kind than the run's.
EAGER, COMPILED = "full step, eager", "full step, compiled"
# The step under the profiler.
KERNELS = "full step, profiled"
# Others' steps.
MOCO_V3, TODAY, LIGHTLY = "moco-v3's own kind of step", "plain step of today's PyTorch", "lightly's blocks"

ALL_ON_GPU = "--data.augment-on gpu --data.decode gpu"

# A step that takes this many times as long beside the loader competes with it.
BESIDE = 1.1
# From this many times as fast on, a setting is advised.
FASTER = 1.05
# From this share of what the slower side allows on, nothing is lost between them.
WELL = 0.95


@dataclass(frozen=True)
class Switches:
    """The settings that the advice may change, and the limits of this machine."""

    on_gpu: bool = False
    has_shards: bool = False
    engine: str = "fused"
    augment_on: str = "cpu"
    decode: str = "cpu"
    can_decode: bool = False
    """The GPU could decode these images."""
    cache: str = "none"
    threads: int = 1
    cores: int = 1
    in_chunks: bool = False
    fits_in_ram: bool = False
    """Whether the decoded images would fit in the machine's memory."""
    half: bool = True
    """The step computes in 16 bits."""
    half_is_fast: bool = True
    compiled: bool = True
    can_compile: bool = True
    channels_last: bool = True
    is_cnn: bool = False
    checkpointing: str = "none"


@dataclass(frozen=True)
class Verdict:
    """The sentence, and the numbers that it is based on."""

    bottleneck: str
    """The name of a rung; "contention" where both sides are fast alone."""
    overlap: float | None
    """Rate of end to end / rate that loader and step allow."""
    contention: float | None
    """Time of a step beside the loader / alone."""
    sentence: str


def judge(rates: Mapping[str, float | None], switches: Switches, contention: float | None = None) -> Verdict:
    """Return the bottleneck and the switch to try; if the full step was not measured, say so.

    Args:
        rates: images per second of each rung; None or absent where it was not measured.
        contention: time of a step while the loader works / of the step alone.
    """
    step, loader, whole = rates.get(FULL), rates.get(LOADER), rates.get(END_TO_END)
    if not step:
        return Verdict(FULL, None, None, f"The bottleneck is not known, because '{FULL}' was not measured.")
    if not loader or not whole:
        part, advice = _slow_part_of_step(rates, switches)
        start = f"The step makes {brief(step)} images/s"
        start += f": {advice}" if part == FULL else f", of which {part} takes the most: {advice}"
        missing = (
            "The loader was not measured beside it"
            if switches.has_shards
            else "Give --data.shards to learn whether the loader keeps up"
        )
        return Verdict(part, None, None, f"{start}. {missing}.")
    # On a CPU both share the cores, so their times add up; beside a GPU the slower one decides.
    allowed = min(step, loader) if switches.on_gpu else 1 / (1 / step + 1 / loader)
    overlap = whole / allowed
    told = (
        f"the loader makes {brief(loader)} images/s, the step {brief(step)}, together {brief(whole)}: "
        f"{overlap:.0%} of what they allow"
    )
    if overlap < WELL and switches.on_gpu and contention and contention >= BESIDE:
        # Where the CPU decodes, its threads and the one that launches kernels wait for each other.
        what = "GPU" if switches.augment_on == "gpu" and not _decodes_instead(switches) else "CPU cores"
        if what == "GPU":
            advice = "try --data.augment-on cpu"
        elif _decodes_instead(switches):
            advice = f"try {ALL_ON_GPU}, which leave the cores to launch kernels"
        else:
            advice = f"try --data.threads {max(1, switches.threads * 3 // 4)}, which leaves cores to launch kernels"
        sentence = (
            f"Loader and step compete for the {what} (a step takes {contention:.2f} times as long beside the loader): "
            f"{advice}; {told}."
        )
        return Verdict("contention", overlap, contention, sentence)
    if loader < step:
        part, advice = _slow_part_of_loader(rates, switches)
        sentence = f"The loader is the bottleneck{_in_it(part)}: {advice}; {told}."
    else:
        part, advice = _slow_part_of_step(rates, switches)
        sentence = f"The step is the bottleneck{_in_it(part)}: {advice}; {told}."
    return Verdict(part, overlap, contention, sentence)


def _in_it(part: str) -> str:
    return "" if part in (FULL, LOADER) else f", and in it {part}"


def _slowest(rates: Mapping[str, float | None], names: tuple[str, ...], whole: str) -> str:
    """Return the slowest of the parts `names`; `whole` if none of them was measured."""
    measured = {name: rate for name in names if (rate := rates.get(name))}
    return min(measured, key=lambda name: measured[name]) if measured else whole


def _slow_part_of_loader(rates: Mapping[str, float | None], switches: Switches) -> tuple[str, str]:
    part = _slowest(rates, (READ, DECODE, TO_DEVICE, AUGMENT), LOADER)
    if switches.engine == "reference":
        return part, "try --data.engine fused"
    if switches.threads < switches.cores:
        return part, f"try --data.threads {switches.cores}"
    if part == LOADER:
        return part, "measure its parts as well (--rows end,data)"
    if part == READ:
        return part, "try --data.cache ram, or a faster disk and --data.order blocks"
    if part == DECODE:
        if switches.fits_in_ram and switches.cache == "none":
            return part, "try --data.cache ram, which decodes each image once"
        if _decodes_instead(switches):
            return part, f"try {ALL_ON_GPU}"
        return part, "convert with `fastssl shard --short-side 256`, or use more cores"
    # Only the engine fused makes views of a part of a batch.
    able = not switches.in_chunks or switches.engine == "fused"
    if switches.augment_on == "cpu" and _decodes_instead(switches):
        return part, f"try {ALL_ON_GPU}"
    if switches.on_gpu and switches.augment_on == "cpu" and able:
        return part, "try --data.augment-on gpu" + (
            ", which sends bytes instead of floats" if part == TO_DEVICE else ""
        )
    return part, "try a smaller --recipe.size, or more cores"


def _decodes_instead(switches: Switches) -> bool:
    """Return whether the GPU could decode, and the CPU does."""
    return switches.on_gpu and switches.can_decode and switches.decode == "cpu"


def _slow_part_of_step(rates: Mapping[str, float | None], switches: Switches) -> tuple[str, str]:
    part = _slowest(rates, (STUDENT, TEACHER, UPDATE), FULL)
    if part == UPDATE or _share_of_update(rates) > 0.2:
        return UPDATE, "try a larger --train.batch, so that it comes less often"
    if not switches.half and switches.half_is_fast:
        return part, "try --train.precision bf16"
    if switches.compiled and _faster(rates, EAGER):
        return part, "try --train.compile False, which was faster here"
    # On a CPU compiling often does not pay, so only a measurement can advise it there.
    worth = _faster(rates, COMPILED) if rates.get(COMPILED) else switches.on_gpu
    if not switches.compiled and switches.can_compile and worth:
        return part, "try --train.compile True"
    if not switches.channels_last and switches.is_cnn:
        return part, "try --train.channels-last True"
    if switches.checkpointing != "none":
        return part, "try --train.checkpointing none, if the memory allows"
    return (
        part,
        "no setting makes it faster as it is: use a smaller --model.backbone or --recipe.size, or more devices",
    )


def _faster(rates: Mapping[str, float | None], kind: str) -> bool:
    """Return whether the step of the other kind, EAGER or COMPILED, was measured as clearly faster than the run's."""
    return (rates.get(kind) or 0.0) > FASTER * (rates.get(FULL) or 0.0)


def _share_of_update(rates: Mapping[str, float | None]) -> float:
    update, full = rates.get(UPDATE), rates.get(FULL)
    return full / update if update and full else 0.0
