"""Merging what the shards noted: of millions of refused images none stays in memory."""

import dataclasses
import json
import multiprocessing
import resource
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest

from shards.checking.verify import verify
from shards.conversion.convert import Part, convert
from shards.conversion.merge import merge
from shards.conversion.shard_maker import Marks, read_marks, read_rows, write_rows
from shards.conversion.shard_plan import Plan, read_plan
from shards.errors import UserError
from shards.format import layout
from shards.storage.opening import open_place

PER_SHARD = 1000
NUM_SHARDS = 60
REASON = "damaged: " + "x" * 800


def refused(folder: Path) -> Plan:
    """Notes, beside the one good shard of a folder, shards of refused images: some 50 MB of JSON."""
    place = open_place(folder)
    marks = read_marks(place, 0)
    assert marks is not None
    rows = read_rows(place, 0)
    for shard in range(1, NUM_SHARDS):
        bad = [
            {"position": shard * PER_SHARD + i, "reason": REASON, "source": f"ü/{i}.jpg"}
            for i in range(PER_SHARD)
        ]
        write_rows(place, shard, rows.slice(0, 0), Marks(None, bad, marks.statistics, 0))
    return longer(read_plan(place), NUM_SHARDS * PER_SHARD)


def longer(plan: Plan, num_images: int) -> Plan:
    settings = dataclasses.replace(plan.settings, num_images=num_images, samples_per_shard=PER_SHARD)
    return dataclasses.replace(plan, settings=settings)


def memory_of_merging(folder: Path) -> int:
    """By how many bytes this process grows while it merges."""
    plan = refused(folder)
    merge(plan.place, longer(plan, PER_SHARD))  # imports, and what one shard takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    manifest = merge(plan.place, plan)
    assert manifest.num_quarantined == (NUM_SHARDS - 1) * PER_SHARD
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024


def test_memory_does_not_grow_with_the_number_of_refused_images(make_folder, tmp_path: Path):
    dest = tmp_path / "out"
    convert(make_folder(8), dest, samples_per_shard=PER_SHARD, part=Part(0, 1), workers=0)
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        grown = process.submit(memory_of_merging, dest).result()
    lines = (dest / layout.QUARANTINE).read_bytes().splitlines()
    assert len(lines) == (NUM_SHARDS - 1) * PER_SHARD
    assert sum(map(len, lines)) > 50e6
    assert grown < 10e6
    assert json.loads(lines[-1]) == {"position": 59_999, "reason": REASON, "source": "ü/999.jpg"}


def test_where_no_image_is_good_the_reasons_are_kept(tmp_path: Path):
    (tmp_path / "photos").mkdir()
    for i in range(5):
        (tmp_path / "photos" / f"{i}.jpg").write_bytes(b"text")
    with pytest.raises(
        UserError, match=r"None of the 5 images can be used\. The first: \d\.jpg: .* All stand in '.*jsonl'"
    ):
        convert(tmp_path / "photos", tmp_path / "out", samples_per_shard=2, workers=0)
    lines = (tmp_path / "out" / layout.QUARANTINE).read_text().splitlines()
    assert sorted(json.loads(line)["source"] for line in lines) == [f"{i}.jpg" for i in range(5)]
    with pytest.raises(UserError, match="is unfinished"):
        verify(open_place(tmp_path / "out"))
