"""`fastssl bench shard`: what stands in its report, what each writer makes of the files, and what is refused."""

import io
import json
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from fastssl.bench import bench_command
from fastssl.bench.conversion import bench_shard, writers
from fastssl.bench.conversion.bench_shard import MeasuredWriter
from fastssl.bench.conversion.writers import Task, Turn
from fastssl.bench.report import Row
from shards.errors import UserError
from tests.pictures import encoded, photo


@pytest.fixture
def source(tmp_path: Path) -> Path:
    for i in range(3):
        path = tmp_path / "photos" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(photo(320, 280, seed=i), "JPEG", quality=90))
    return tmp_path / "photos"


class Here:
    """A pool of one process: this one."""

    def starmap(self, function, parts, chunksize):
        return [function(*part) for part in parts]


@pytest.fixture
def task(source: Path, tmp_path: Path) -> Task:
    folder, files, _ = bench_shard._gather(source, tmp_path / "links", 5)
    return Task(folder, files, 1, Here())  # type: ignore[arg-type]


def test_the_report_compares_each_way_with_its_base(source: Path, tmp_path: Path, capsys) -> None:
    path = tmp_path / "shard.json"
    flags = ["--images", "6", "--workers", "1", "--repeats", "1", "--peers", "False", "--json", str(path)]
    assert bench_command.run(["shard", str(source), *flags, "--out", str(tmp_path)]) == 0
    report = json.loads(path.read_text())
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["decode", "fastssl keep", "decode + encode", "fastssl re-encode"]
    for ours, base in (("fastssl keep", "decode"), ("fastssl re-encode", "decode + encode")):
        assert rows[ours]["ratio_to"] == base
        assert rows[ours]["ratio"] == pytest.approx(rows[ours]["images_per_s"] / rows[base]["images_per_s"])
        cpu = rows[base]["core_ms_per_image"], rows[ours]["core_ms_per_image"]
        assert rows[ours]["cpu_ratio"] == (pytest.approx(cpu[0] / cpu[1]) if all(cpu) else None)
    assert report["kind"] == "shard"
    assert report["settings"]["workers"] == 1
    assert str(tmp_path) not in path.read_text()
    assert {"webdataset", "litdata", "simplejpeg", "pyarrow"} <= report["versions"].keys()
    assert "decode + encode" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith("fastssl-bench-")] == []


def test_webdataset_writes_all_files_and_the_deed_decides_their_bytes(task: Task, tmp_path: Path) -> None:
    stored = {}
    for deed in ("read", "proof", "smaller"):
        (tmp_path / deed).mkdir()
        writers.webdataset(task, tmp_path / deed, deed)
        with tarfile.open(tmp_path / deed / "part0-000000.tar") as tar:
            stored[deed] = [tar.extractfile(m).read() for m in tar.getmembers()]  # type: ignore[union-attr]
    assert stored["read"] == stored["proof"] == [Path(path).read_bytes() for path in task.paths()]
    assert [Image.open(io.BytesIO(data)).size for data in stored["smaller"]] == [(293, 256)] * 5


def test_a_broken_file_is_noticed_by_all_that_decode(task: Task, tmp_path: Path) -> None:
    path = tmp_path / "broken.jpg"
    path.write_bytes(Path(task.paths()[0]).read_bytes()[:-300])
    assert writers.read(str(path))
    for deed in ("proof", "smaller"):
        with pytest.raises(ValueError, match="Premature end"):
            writers.DEEDS[deed](str(path))


def test_links_repeat_the_files_under_names_of_their_own(task: Task, source: Path) -> None:
    assert len(set(task.files)) == 5
    first = [Path(path).resolve() for path in task.paths()]
    assert first[:3] == sorted(source.rglob("*.jpg"))
    assert first[3:] == first[:2]


def test_a_peer_that_fails_keeps_its_place_and_a_fault_of_ours_is_raised(task: Task, tmp_path: Path) -> None:
    def broken(task: Task, out: Path, deed: str) -> Turn:
        (out / "half").write_bytes(b"")
        raise ArithmeticError("no")

    row = Row("x")
    bench_shard.measure(MeasuredWriter("x", broken, "read", "", "", True), task, tmp_path, row, keep=True)
    assert row.error == "ArithmeticError: no"
    with pytest.raises(ArithmeticError):
        bench_shard.measure(MeasuredWriter("x", broken, "read", "", ""), task, tmp_path, row, keep=True)
    assert not (tmp_path / "out").exists()


def test_a_warm_up_does_not_count(task: Task, tmp_path: Path) -> None:
    writer, row = MeasuredWriter("x", lambda task, out, deed: Turn(2.0, 3.0), "read", "", ""), Row("x")
    bench_shard.measure(writer, task, tmp_path, row, keep=False)
    assert row.rates == []
    bench_shard.measure(writer, task, tmp_path, row, keep=True)
    assert (row.rates, row.cores) == ([2.5], [1.5])


def test_our_converter_refuses_to_be_measured_on_bad_images(task: Task, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    Path(task.paths()[4]).unlink()
    (task.folder / task.files[4]).write_bytes(b"junk")
    with pytest.raises(UserError, match="1 of the images are refused"):
        writers.ours(task, tmp_path / "out", "proof")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--images", "0"], "--images is 0"),
        (["--repeats", "0"], "--repeats is 0"),
        (["--out", "nowhere"], "no folder 'nowhere'"),
        (["--json", "no/such/x.json"], "no folder 'no/such'"),
        (["--peers", "False"], "holds no JPEG files"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, flags: list[str], words: str) -> None:
    with pytest.raises(UserError, match=words):
        bench_command.run(["shard", str(tmp_path), *flags])
