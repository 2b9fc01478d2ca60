"""A small labelled data set, and one run on it that is never stopped; made once for all tests of the trainer."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from fastssl.cli import main
from fastssl.core import distributed
from fastssl.pretraining.run import train
from shards.conversion.convert import convert
from tests.fastssl.runs import NUM_IMAGES, resolve, tiny, write_yaml
from tests.pictures import picture


@pytest.fixture(autouse=True)
def _single_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    yield
    distributed.cleanup()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 pictures in three class folders, each class in a shade of its own."""
    folder = tmp_path_factory.mktemp("photos")
    for i in range(NUM_IMAGES):
        shade = ("red", "green", "blue")[i % 3]
        (folder / shade).mkdir(exist_ok=True)
        image = picture(i, (24, 20))
        bands = [band.point(lambda v: v // 3) for band in image.split()]
        bands[i % 3] = image.split()[i % 3]
        Image.merge("RGB", bands).save(folder / shade / f"{i:02}.png")
    return folder


@pytest.fixture(scope="session")
def shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures as three shards."""
    folder = tmp_path_factory.mktemp("data") / "shards"
    convert(photos, folder, workers=0, samples_per_shard=25)
    return folder


@pytest.fixture(scope="session")
def unlabelled_shards(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 pictures without a label."""
    folder = tmp_path_factory.mktemp("data") / "unlabelled"
    convert(photos / "red", folder, workers=0)
    return folder


@pytest.fixture(scope="session")
def finished(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that was never stopped. Tests must not write to it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    train(resolve(shards, run))
    return run


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]):
    """Run a command that must fail; return the one sentence it says."""

    def run(*argv: str | Path) -> str:
        code = main([str(a) for a in argv])
        out, err = capsys.readouterr()
        assert code == 2, (out, err)
        [line] = err.splitlines()
        assert line.startswith("fastssl: ")
        assert line.endswith((".", "?")), line
        assert "Traceback" not in out + err
        return line.removeprefix("fastssl: ")

    return run


@pytest.fixture
def config(shards: Path, tmp_path: Path):
    """Write a tiny configuration with some changes; its run folder is tmp_path / "run"."""

    def write(*changes: dict, data: Path | str = shards) -> Path:
        return write_yaml(tmp_path / "tiny.yaml", tiny(data, tmp_path / "run", *changes))

    return write
