import hashlib
import io
import json
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.format.tar_writer import MAX_MEMBER_BYTES, Member, Sample, header, write_index, write_shard
from shards.images.proof import Stored
from shards.storage.place import open_place


def sample(position: int, data: bytes, ext: str = "jpg", label: int | None = None) -> Sample:
    stored = Stored(data, ext, 4, 3, 3, "uint8", "kept", "0" * 32, np.zeros((1, 3), np.uint8), (4, 3))
    return Sample(f"{position:09d}", stored, f"é/{position} a.jpg", label, None if label is None else "bee")


SAMPLES = [sample(3, b"abc", label=1), sample(4, b"x" * 512, "png"), sample(5, b"y" * 5000, "webp", label=12)]


@given(
    st.text("abcdefghijklmnopqrstuvwxyz0123456789.", min_size=1, max_size=100),
    st.integers(0, MAX_MEMBER_BYTES),
)
def testheaders_are_those_of_tarfile(name: str, size: int):
    info = tarfile.TarInfo(name)
    info.size, info.mode = size, 0o644
    assert header(name, size) == info.tobuf(tarfile.USTAR_FORMAT, "ascii", "strict")


def test_the_archive_is_byte_for_byte_that_of_tarfile(tmp_path: Path):
    written = write_shard(open_place(tmp_path), "shard-000000.tar", SAMPLES)
    assert written is not None
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for each in SAMPLES:
            facts = {
                "height": 3,
                "label": each.class_name,
                "source": each.source,
                "width": 4,
            }
            files = {each.stored.ext: each.stored.data}
            if each.label is not None:
                files["cls"] = str(each.label).encode()
            files["json"] = json.dumps(facts, separators=(",", ":"), ensure_ascii=False).encode()
            for suffix, data in files.items():
                info = tarfile.TarInfo(f"{each.key}.{suffix}")
                info.size, info.mode = len(data), 0o644
                tar.addfile(info, io.BytesIO(data))
    data = (tmp_path / "shard-000000.tar").read_bytes()
    assert data == out.getvalue()
    assert (written[0].bytes, written[0].num_samples) == (len(data), 3)
    assert written[0].sha256 == hashlib.sha256(data).hexdigest()


def test_offsets_are_those_of_tarfile(tmp_path: Path):
    written = write_shard(open_place(tmp_path), "a.tar", SAMPLES)
    assert written is not None
    with tarfile.open(tmp_path / "a.tar") as tar:
        found = [Member(info.name, info.offset_data, info.size) for info in tar]
    assert [member for entry in written[1] for member in entry.members] == found


def test_the_crc_covers_all_bytes_of_a_sample(tmp_path: Path):
    written = write_shard(open_place(tmp_path), "a.tar", SAMPLES)
    assert written is not None
    data = (tmp_path / "a.tar").read_bytes()
    starts = [entry.members[0].offset - 512 for entry in written[1]]
    end = sum(512 + -(-member.size // 512) * 512 for entry in written[1] for member in entry.members)
    for entry, start, stop in zip(written[1], starts, [*starts[1:], end], strict=True):
        assert entry.crc32 == zlib.crc32(data[start:stop])


def test_the_index_is_dalis_text(tmp_path: Path):
    members = [
        [Member("000000003.jpg", 512, 3), Member("000000003.cls", 1536, 1)],
        [Member("000000004.png", 2560, 9)],
    ]
    write_index(open_place(tmp_path), "a.idx", members)
    assert (tmp_path / "a.idx").read_text() == (
        "v1.2 2\njpg 512 3 000000003.jpg cls 1536 1 000000003.cls\npng 2560 9 000000004.png\n"
    )


def test_without_samples_nothing_is_written(tmp_path: Path):
    assert write_shard(open_place(tmp_path), "a.tar", iter([])) is None
    assert list(tmp_path.iterdir()) == []


def test_an_error_while_reading_leaves_no_file(tmp_path: Path):
    def samples():
        yield SAMPLES[0]
        raise RuntimeError("gone")

    with pytest.raises(RuntimeError, match="gone"):
        write_shard(open_place(tmp_path), "a.tar", samples())
    assert list(tmp_path.iterdir()) == []
