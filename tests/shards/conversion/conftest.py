"""A finished shard folder for the tests that append to it or label it; see `tests.shards.growing`."""

import shutil
from pathlib import Path

import pytest

from tests.shards.growing import begin


@pytest.fixture(scope="package")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sources and their shards. Tests must not write to them."""
    return begin(tmp_path_factory.mktemp("append"))


@pytest.fixture
def folder(begun: Path, tmp_path: Path) -> Path:
    """A copy of the shards."""
    shutil.copytree(begun / "shards", tmp_path / "shards")
    return tmp_path / "shards"
