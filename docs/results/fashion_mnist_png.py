"""Write the Fashion-MNIST IDX files of a folder as PNG files in class folders: python fashion_mnist_png.py IDX_FOLDER DEST.

Debian's package dataset-fashion-mnist puts the IDX files under /usr/share/datasets/fashion-mnist.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image

NAMES = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot")


def read_idx(path: Path) -> np.ndarray:
    """The uint8 array of an IDX file: 4 bytes of magic whose last is the number of dimensions, the dimensions, the data."""
    data = gzip.decompress(path.read_bytes())
    shape = np.frombuffer(data, ">u4", count=data[3], offset=4)
    return np.frombuffer(data, np.uint8, offset=4 + 4 * data[3]).reshape(shape)


def main() -> None:
    source, dest = map(Path, sys.argv[1:3])
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images = read_idx(source / f"{prefix}-images-idx3-ubyte.gz")
        labels = read_idx(source / f"{prefix}-labels-idx1-ubyte.gz")
        for name in NAMES:
            (dest / split / name).mkdir(parents=True, exist_ok=True)
        for i, (image, label) in enumerate(zip(images, labels, strict=True)):
            Image.fromarray(image).save(dest / split / NAMES[label] / f"{i:05d}.png")
        print(f"{dest / split}: {len(images)} images")


if __name__ == "__main__":
    main()
