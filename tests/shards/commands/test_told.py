"""What the commands say: formats by their names, partial labels, contradictions, classes that a split lacks, swapped folders."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastssl.cli import main
from shards.commands.progress import renumbered
from shards.images.pixels import BadImage
from shards.images.proof import prove
from tests.pictures import encoded, picture

Told = Callable[..., tuple[int, str]]


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """The exit code and what is printed, in one line, of a command that runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> tuple[int, str]:
        code = main(list(words))
        out, err = capsys.readouterr()
        return code, " ".join((out + err).split())

    return run


def save(name: str, seed: int) -> None:
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(encoded(picture(seed), "PNG"))


def of(kind: str) -> bytes:
    out = io.BytesIO()
    try:
        Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(out, kind)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow writes no {kind}")
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (lambda: of("AVIF"), "an AVIF image, which is not read; turn it into JPEG or PNG first"),
        (lambda: of("JPEG2000"), "a JPEG 2000 image, which is not read"),
        (lambda: b"\0\0\0\x18ftypmif1\0\0\0\0mif1heic" + bytes(40), "an HEIC image"),
        (lambda: b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf" + bytes(40), "an AVIF image"),
        (
            lambda: b"\0\0\0\x18ftypisom\0\0\0\0isommp42" + bytes(40),
            "a film or another file of the MP4 family",
        ),
        (lambda: b"\xff\x0a" + bytes(40), "a JPEG XL image"),
        (lambda: b"\n<!DOCTYPE html><html>403</html>", "a web page \\(HTML\\), which is not read$"),
        (lambda: b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
    ],
)
def test_a_format_that_is_not_read_is_named(data: Callable[[], bytes], words: str):
    with pytest.raises(BadImage, match=f"^{words}"):
        prove(data(), "photo.jpg")


def test_how_many_images_are_labelled(told: Told):
    for i in range(6):
        save(f"photos/{i}.png", i)
    labels = "\n".join(f"{i}.png,{'ab'[i % 2] if i < 4 else ''}" for i in range(6))
    Path("photos/list.csv").write_text(f"path,label\n{labels}\n")
    code, text = told("shard", "photos/list.csv", "out", "--workers", "0")
    assert code == 0
    assert "classes 2, 4 of 6 labelled" in text


@pytest.mark.parametrize("dedupe", ["mark", "drop"])
def test_equal_images_of_two_classes_are_pointed_out(told: Told, dedupe: str):
    for i in range(4):
        save(f"photos/ant/{i}.png", i)
        save(f"photos/bee/{i}.png", i + (10 if i else 0))
    save("photos/ant/again.png", 1)
    code, text = told("shard", "photos", "out", "--workers", "0", "--dedupe", dedupe)
    assert code == 0
    one, other = "'ant/0.png' (ant)", "'bee/0.png' (bee)"
    words = "Warning: 1 image has the pixels of an earlier one of another class: "
    assert f"{words}{one} = {other}." in text or f"{words}{other} = {one}." in text
    assert words in told("inspect", "out")[1]


def test_equal_images_of_one_class_are_no_contradiction(told: Told):
    for i in range(3):
        save(f"photos/ant/{i}.png", 1)
    assert "another class" not in told("shard", "photos", "out", "--workers", "0")[1]


def test_a_part_of_a_split_without_some_class_is_told(told: Told):
    for scene in range(10):
        for i in range(4):
            save(f"photos/{'rare' if scene == 0 else 'abc'[i % 3]}/s{scene}_{i}.png", 10 * scene + i)
    assert told("shard", "photos", "out", "--workers", "0")[0] == 0
    lacking = []
    for seed in range(6):
        flags = [
            "--val",
            "0.2",
            "--test",
            "0.2",
            "--group-by",
            r"/s(\d+)_",
            "--seed",
            str(seed),
            "--name",
            f"s{seed}",
        ]
        code, text = told("split", "out", *flags)
        assert code == 0
        lacking.append(
            sum(f"{name} has no image of 1 of 4 classes: rare." in text for name in ("train", "val", "test"))
        )
    # The one scene of the class is in one part, and the two others lack it.
    assert lacking == [2] * 6


def test_stratify_with_one_image_of_each_value_is_not_blamed_on_the_share(told: Told):
    for i in range(6):
        save(f"photos/c{i}/x.png", i)
    assert told("shard", "photos", "out", "--workers", "0")[0] == 0
    code, text = told("split", "out", "--val", "0.3", "--stratify", "label")
    assert code == 2
    assert "val would be empty: each value of --stratify label has one image" in text
    assert "larger" not in text


def test_classes_that_get_other_numbers_are_told(told: Told):
    for number in (3, 7, 10):
        save(f"photos/{number}/x.png", number)
    text = told("shard", "photos", "out", "--workers", "0")[1]
    assert "Classes get numbers from 0 on, in .cls and the tables: '3' is 0, '7' is 1, '10' is 2." in text
    assert renumbered(["0", "1", "2"]) == renumbered(["ant", "7"]) == renumbered([]) == ""


@pytest.mark.parametrize("source", ["missing", "empty", "shards"])
def test_swapped_folders_are_noticed(told: Told, source: str):
    save("photos/ant/0.png", 0)
    if source == "empty":
        Path(source).mkdir()
    if source == "shards":
        assert told("shard", "photos", "shards", "--workers", "0")[0] == 0
    code, text = told("shard", source, "photos")
    assert code == 2
    assert f"'photos' holds images: were SOURCE and DEST swapped? fastssl shard photos {source}" in text
    save("more/0.png", 1)
    code, text = told("shard", "more", "photos")
    assert code == 2
    assert "swapped" not in text
