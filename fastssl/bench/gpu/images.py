"""Make photographs and their shards for measurements, once: python -m fastssl.bench.gpu.images PHOTOS SHARDS COUNT."""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image

from pipelines.previews.pictures import SIZES, photographs
from shards.conversion.convert import convert

# Images made from one picture, each with another roll and flip.
PER_ROLL = 25
QUALITY = 90


def make_photographs(folder: Path, count: int) -> None:
    """Write `count` different JPEGs of ImageNet's sizes to `folder`; an existing folder is complete and stays."""
    if folder.exists():
        return
    unfinished = folder.with_name(f".{folder.name}-{os.getpid()}")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    num_pictures = -(-count // PER_ROLL)

    def of_seed(seed: int) -> list[np.ndarray]:
        return photographs(len(SIZES), seed)

    with ThreadPoolExecutor() as pool:
        made = pool.map(of_seed, range(-(-num_pictures // len(SIZES))))
        pictures = [picture for some in made for picture in some][:num_pictures]

        def save(number: int) -> None:
            picture, turn = pictures[number % num_pictures], number // num_pictures
            rolled = np.roll(picture, (turn * 53 % picture.shape[0], turn * 37 % picture.shape[1]), (0, 1))
            image = Image.fromarray(np.ascontiguousarray(rolled[:, :: -1 if turn % 2 else 1]))
            image.save(unfinished / f"{number:05d}.jpg", quality=QUALITY)

        list(pool.map(save, range(count)))
    unfinished.rename(folder)


def main(argv: list[str]) -> int:
    """Make the photographs and shards that are missing."""
    photos, shards, count = Path(argv[0]), Path(argv[1]), int(argv[2])
    make_photographs(photos, count)
    manifest = convert(photos, shards)
    assert manifest is not None
    print(f"{manifest.num_samples} photographs in {shards}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
