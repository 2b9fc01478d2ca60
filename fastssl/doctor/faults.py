"""Versions with known faults, each with the report or release note that says so."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

_DALI = "https://github.com/NVIDIA/DALI"
_CODEC = "https://github.com/NVIDIA/nvImageCodec"


@dataclass(frozen=True)
class Fault:
    """What is wrong with some versions of a distribution."""

    package: str
    """Distribution's name, or what it begins with: a CUDA version follows."""
    versions: str
    """Those affected, as PEP 440 writes them."""
    level: Literal["warn", "bad"]
    """bad: wrong results or a crash in what fastssl does; warn: in what users may do beside it."""
    what: str
    way_out: str
    source: str


FAULTS = (
    Fault(
        "nvidia-nvimgcodec-cu",
        ">=0.9.0,<0.9.1",
        "warn",
        "GPU decoding of a region fails or ends the process: fn.decoders.image_random_crop(device='mixed')",
        "decode whole images and crop afterwards, as fastssl does",
        f"{_CODEC}/issues/55",
    ),
    Fault(
        "nvidia-nvimgcodec-cu",
        "<=0.8.0",
        "warn",
        "regions of images with an EXIF orientation are cut at the wrong place",
        "convert with `fastssl shard`, which turns such images upright, or update it",
        f"{_DALI}/pull/6344",
    ),
    Fault(
        "nvidia-nvjpeg-cu",
        "<13.0.2",
        "warn",
        "lossless JPEGs of 9 to 15 bits (DICOM) decode to zeros on a GPU without an error",
        "convert with `fastssl shard`, which decodes each image on the CPU once",
        f"{_CODEC}/issues/50",
    ),
    Fault(
        "nvidia-nvimgcodec-cu",
        "<=0.2.0",
        "bad",
        "decoding starts before the memory for it is ready",
        "update it",
        f"{_DALI}/pull/5391",
    ),
    Fault(
        "nvidia-dali-cuda",
        "<2.4.0",
        "warn",
        "the hue of DALI's torchvision-like ColorJitter is taken for degrees, so it hardly acts",
        "update DALI, or leave the colours to fastssl's engines",
        f"{_DALI}/pull/6471",
    ),
    Fault(
        "nvidia-dali-cuda",
        "<2.2.0",
        "warn",
        "fn.readers.webdataset never shuffles the order of tars",
        "read with fastssl, which has an order of its own, or update DALI",
        f"{_DALI}/pull/6288",
    ),
    Fault(
        "nvidia-dali-cuda",
        ">=2.1.0,<2.2.0",
        "bad",
        "outputs of a parallel external_source that a pipeline returns as they are may be corrupted",
        "update DALI",
        f"{_DALI}/releases/tag/v2.1.1",
    ),
    Fault(
        "nvidia-dali-cuda",
        "<1.49.0",
        "bad",
        "a race in the nvImageCodec decoder",
        "update DALI",
        f"{_DALI}/pull/5856",
    ),
    Fault(
        "kornia",
        "<0.9.0",
        "warn",
        "RandomResizedCrop compiles again for every crop under torch.compile: 2 images/s",
        "use fastssl's own engines, or update kornia",
        "https://github.com/kornia/kornia/pull/4659",
    ),
)


def faults_of(package: str, version: str) -> list[Fault]:
    """The known faults of an installed distribution."""
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    try:
        installed = Version(version)
    except InvalidVersion:
        return []
    release = Version(
        ".".join(map(str, installed.release[:3]))
    )  # a build number, as in 0.9.0.20, belongs to its release
    return [
        fault
        for fault in FAULTS
        if (package == fault.package or package.removeprefix(fault.package).isdigit())
        and release in SpecifierSet(fault.versions)
    ]
