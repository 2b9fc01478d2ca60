"""Small image folders for the tests of `shards`."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.pictures import encoded, picture


@pytest.fixture
def make_folder(tmp_path: Path) -> Callable[..., Path]:
    """`make_folder(n)`: a folder of n clean images (JPEG, each third PNG) in classes ant, bee and cat."""

    def make(num_images: int, name: str = "photos") -> Path:
        root = tmp_path / name
        for i in range(num_images):
            kind, suffix = ("PNG", "png") if i % 3 == 2 else ("JPEG", "jpg")
            path = root / ("ant", "bee", "cat")[i % 3] / f"{i:04d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encoded(picture(i, (20 + i % 5, 16 + i % 3)), kind))
        return root

    return make
