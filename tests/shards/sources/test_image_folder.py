import os
from pathlib import Path

import pytest

from shards.errors import UserError
from shards.sources.file_set import looks_like_splits
from shards.sources.image_folder import FolderSource
from shards.storage.opening import open_place


def scan_folder(root: Path) -> list[dict]:
    """The entries, by name."""
    batches = FolderSource(open_place(root)).entries()
    return sorted(
        (row for batch in batches for row in batch.to_pylist()), key=lambda row: row["source"].encode()
    )


def names_of(found: list[dict]) -> list[str]:
    return [row["source"] for row in found]


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(b"12345")


def test_paths_are_sorted_and_labels_are_the_first_folder(tmp_path: Path):
    touch(tmp_path, "b/2.jpg", "b/deep/er/1.PNG", "a/3.webp", "top.tiff", "a b/x.y.JPeG")
    touch(tmp_path, "notes/readme.md", "é/1.bmp")
    found = scan_folder(tmp_path)
    assert names_of(found) == [
        "a b/x.y.JPeG",
        "a/3.webp",
        "b/2.jpg",
        "b/deep/er/1.PNG",
        "top.tiff",
        "é/1.bmp",
    ]
    assert [row["label"] for row in found] == ["a b", "a", "b", "b", None, "é"]
    assert [row["bytes"] for row in found] == [5] * 6
    assert len(found) == 6


def test_hidden_files_and_archive_leftovers_are_skipped(tmp_path: Path):
    touch(tmp_path, "a/1.jpg", ".git/2.jpg", "a/.3.jpg", "__MACOSX/a/4.jpg", "a/__MACOSX/5.jpg")
    assert names_of(scan_folder(tmp_path)) == ["a/1.jpg"]


def test_links_are_followed_but_not_in_circles(tmp_path: Path):
    touch(tmp_path / "elsewhere", "1.jpg")
    root = tmp_path / "root"
    touch(root, "a/2.jpg")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "a" / "circle").symlink_to(root)
    (root / "dangling.jpg").symlink_to(root / "missing")
    found = scan_folder(root)
    assert names_of(found) == ["a/2.jpg", "dangling.jpg", "linked/1.jpg"]
    assert [row["bytes"] for row in found] == [5, 0, 5]


def test_pipes_are_never_opened(tmp_path: Path):
    touch(tmp_path, "1.jpg")
    os.mkfifo(tmp_path / "2.jpg")
    assert names_of(scan_folder(tmp_path)) == ["1.jpg"]


def test_large_folders_come_in_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("shards.sources.source.BATCH_ROWS", 4)
    names = [f"{'abc'[i % 3]}/{i:02d}.jpg" for i in range(19)]
    touch(tmp_path, *names)
    assert [batch.num_rows for batch in FolderSource(open_place(tmp_path)).entries()] == [4, 4, 4, 4, 3]
    assert names_of(scan_folder(tmp_path)) == sorted(names)


def test_a_missing_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"There is no folder '.*nowhere'"):
        scan_folder(tmp_path / "nowhere")


def test_a_file_as_source(tmp_path: Path):
    touch(tmp_path, "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg' is a file"):
        scan_folder(tmp_path / "a.jpg")


def test_an_empty_folder(tmp_path: Path):
    with pytest.raises(UserError, match=r"is empty"):
        scan_folder(tmp_path)


def test_a_folder_without_images_says_what_was_seen(tmp_path: Path):
    touch(tmp_path, "a.txt", "b/c.txt", "d.csv", "LICENSE")
    seen = r"only 4 other files \(2 \.txt, 1 \.csv, 1 without extension\); images are"
    with pytest.raises(UserError, match=seen):
        scan_folder(tmp_path)


def test_a_name_that_is_no_utf8(tmp_path: Path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"")
    with pytest.raises(UserError, match=r"caf\\xe9\.jpg' is not valid UTF-8"):
        scan_folder(tmp_path)


def test_an_unreadable_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    touch(tmp_path, "a/1.jpg")

    def refuse(path: str):
        raise PermissionError(13, "Permission denied", path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"cannot be read \(Permission denied\)"):
        scan_folder(tmp_path)


def test_folders_named_as_splits():
    assert looks_like_splits(["train", "val"])
    assert looks_like_splits(["Test"])
    assert not looks_like_splits(["cat", "train"])
    assert not looks_like_splits([])
