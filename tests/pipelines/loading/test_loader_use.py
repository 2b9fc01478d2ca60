"""The loader in other people's loops: as an iterable, left early, kept batches, saved and restored, in threads and signals."""

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import pipelines
from pipelines import RECIPES, Batch, Loader, LoaderOptions, Recipe, eval_batches, open_loader
from pipelines.streaming.batch_stream import SLOTS
from pipelines.streaming.host_slot import MemoryPool
from shards.dataset.shard_set import ShardSet
from shards.errors import UserError
from shards.format.layout import Manifest
from shards.splits.split_rules import SplitRule
from shards.splits.split_table import split
from shards.storage.opening import open_place
from tests import needs
from tests.needs import HANGS_S

SMALL = Recipe(size=16)
ROOT = Path(__file__).parents[3]


def opened(shards: ShardSet, **how) -> Loader:
    return open_loader(shards, SMALL, **{"batch": 8, "seed": 5, "threads": 2, **how})


def same(a: Batch, b: Batch) -> bool:
    return a.sample_ids.tolist() == b.sample_ids.tolist() and all(
        torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True)
    )


def ids(batches) -> list[list[int]]:
    return [batch.sample_ids.tolist() for batch in batches]


def our_threads() -> list[str]:
    return [t.name for t in threading.enumerate() if t.name.startswith(("views", "order", "engine"))]


# ---------------------------------------------------------------- a batch owns its memory


@pytest.mark.parametrize("engine", ["fused", "reference", "kornia", "dali"])
def test_batches_that_are_kept_stay_as_they_are(shard_set, engine):
    if engine in ("kornia", "dali"):
        needs.module({"dali": "nvidia.dali"}.get(engine, engine))
    loader = opened(shard_set, engine=engine)
    kept = list(loader)
    copies = [[view.clone() for view in batch.views] for batch in opened(shard_set, engine=engine)]
    assert len(kept) == len(copies) == len(loader) == 5
    for batch, views in zip(kept, copies, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch.views, views, strict=True))


def test_a_kept_view_or_array_of_it_holds_its_memory(shard_set):
    """Also what a caller cut out of a batch that is itself gone."""
    expected = [batch.views[1][3].clone() for batch in opened(shard_set)]
    rows = [batch.views[1][3] for batch in opened(shard_set)]
    arrays = [batch.views[1].numpy()[3] for batch in opened(shard_set)]
    assert all(torch.equal(a, b) for a, b in zip(rows, expected, strict=True))
    assert all(np.array_equal(a, b) for a, b in zip(arrays, expected, strict=True))


def test_a_loop_that_keeps_nothing_gets_the_same_few_blocks(shard_set):
    places = {batch.views[0].data_ptr() for batch in opened(shard_set, batch=2).steps(0, 60)}
    assert len(places) <= SLOTS + 1


def test_memory_is_written_over_where_that_is_asked_for(shard_set):
    kept = list(opened(shard_set, batch=2, reuse_memory=True))
    assert len({batch.views[0].data_ptr() for batch in kept}) == SLOTS
    assert (
        len({batch.views[0].data_ptr() for batch in opened(shard_set, batch=2, reuse_memory=True)}) == SLOTS
    )


def test_memory_comes_back_when_the_last_tensor_is_gone_and_goes_with_its_pool():
    pool = MemoryPool([(4, 2)], torch.float32)
    [one] = pool.take()
    at = one.ctypes.data
    part = torch.from_numpy(one)[1:]
    del one
    [two] = pool.take()
    assert two.ctypes.data != at
    del part
    [three] = pool.take()
    assert three.ctypes.data == at
    gone = weakref.ref(pool)
    del pool
    assert gone() is None
    # Later than its pool.
    del three, two


def test_evaluation_views_are_the_callers_too(shard_set):
    kept = list(eval_batches(shard_set, SMALL, batch=8))
    assert ids(kept) == [shard_set.ids[a : a + 8].tolist() for a in range(0, 41, 8)]
    for batch, again in zip(kept, eval_batches(shard_set, SMALL, batch=8, reuse_memory=True), strict=True):
        assert same(batch, again)


# ---------------------------------------------------------------- iterable


def test_a_loop_is_the_current_epoch_and_the_next_loop_the_next_one(shard_set):
    loader = opened(shard_set)
    for epoch in range(3):
        assert loader.current_epoch == epoch
        assert ids(loader) == ids(loader.epoch(epoch))
    loader.set_epoch(1)
    assert ids(loader) == ids(loader.epoch(1))
    with pytest.raises(UserError, match="-1"):
        loader.set_epoch(-1)


def test_a_loop_left_early_begins_anew_and_leaves_no_threads(shard_set):
    loader, before = opened(shard_set), threading.active_count()
    for _ in range(4):
        for step, batch in enumerate(loader):
            assert batch.sample_ids.tolist() == next(loader.epoch(0, step)).sample_ids.tolist()
            if step == 2:
                break
        assert not our_threads()
    assert threading.active_count() == before
    assert loader.current_epoch == 0


def test_an_iterator_that_is_dropped_ends_its_threads(shard_set):
    iterator = iter(opened(shard_set))
    assert not our_threads()
    next(iterator)
    assert our_threads()
    del iterator
    gc.collect()
    assert not our_threads()


def test_a_cell_that_failed_or_was_interrupted_leaves_no_threads(shard_set):
    """The traceback that a notebook keeps holds the cell's frame, not the loop's iterator."""
    loader = opened(shard_set)
    for error in (ZeroDivisionError, KeyboardInterrupt):
        try:
            for _ in loader:
                raise error
        except error as caught:
            kept = caught
        assert kept.__traceback__ is not None
        assert not our_threads()


def test_two_loops_at_a_time_do_not_disturb_each_other(shard_set):
    loader = opened(shard_set)
    for a, b in zip(loader, loader, strict=True):
        assert same(a, b)
    assert loader.current_epoch == 1


def test_loops_of_lightning_set_the_epoch(shard_set):
    """`_set_sampler_epoch` of Lightning 2 calls `set_epoch` of `loader.sampler`."""
    loader = opened(shard_set)
    assert loader.sampler is loader
    loader.sampler.set_epoch(3)
    assert ids(loader) == ids(loader.epoch(3))


INTERRUPTED = """
import signal, sys
from pipelines import Recipe, open_loader
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the parent may have had it ignored
    loader = open_loader(sys.argv[1], Recipe(size=64), batch=40, threads=2)
    print("ready", flush=True)
    while True:
        for batch in loader:
            pass
"""


def test_ctrl_c_ends_a_loop_at_once(shard_set, tmp_path):
    (tmp_path / "run.py").write_text(INTERRUPTED)
    with subprocess.Popen(
        [sys.executable, tmp_path / "run.py", str(shard_set.folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=HANGS_S)
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in err


# ---------------------------------------------------------------- state


def test_a_state_after_the_last_batch_goes_on_with_the_next_epoch(shard_set):
    loader = opened(shard_set)
    iterator = iter(loader)
    for _ in range(len(loader)):
        next(iterator)
    other = opened(shard_set)
    other.load_state_dict(loader.state_dict())
    assert (other.current_epoch, other.state_dict()["step"]) == (1, 0)
    assert all(same(a, b) for a, b in zip(other, loader.epoch(1), strict=True))


def test_an_iterator_that_never_began_takes_nothing(shard_set):
    loader = opened(shard_set)
    next(iter(loader))
    state = loader.state_dict()
    other = opened(shard_set)
    other.load_state_dict(state)
    iter(other)
    assert other.state_dict() == state
    assert len(list(other)) == len(loader) - 1


@pytest.mark.parametrize(
    "change", [{"step": -1}, {"step": 99}, {"step": "2"}, {"step": 2.5}, {"epoch": -3}], ids=str
)
def test_a_state_that_cannot_be_is_refused(shard_set, change):
    loader = opened(shard_set)
    with pytest.raises(UserError, match=r"The state is at epoch .*, step .*, but an epoch"):
        loader.load_state_dict(loader.state_dict() | change)


@pytest.mark.parametrize(
    "wrong", [{"seed": 0.5}, {"seed": -1}, {"seed": 2**64}, {"batch": 0}, {"batch": 4.0}], ids=str
)
def test_numbers_that_cannot_be_are_refused(shard_set, wrong):
    [name] = wrong
    with pytest.raises(UserError, match=f"{name} is .*, but it must be a whole number"):
        open_loader(shard_set, SMALL, **{"batch": 8, "seed": 0, **wrong})


@pytest.mark.parametrize("at", [1, 3])
def test_a_state_in_the_midst_of_an_epoch_goes_on_with_the_next_batches(shard_set, at):
    loader = opened(shard_set)
    loader.set_epoch(2)
    iterator = iter(loader)
    for _ in range(at):
        next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    assert (state["epoch"], state["step"]) == (2, at)
    left = list(iterator)
    other = opened(shard_set)
    other.load_state_dict(state)
    # As a loop over epochs does it, after a resume too.
    other.set_epoch(other.current_epoch)
    assert other.state_dict() == state
    found = list(other)
    assert len(found) == len(left) == 5 - at
    assert all(same(a, b) for a, b in zip(found, left, strict=True))
    # Both go on with epoch 3, from its first batch.
    assert other.state_dict()["epoch"] == loader.state_dict()["epoch"] == 3
    assert ids(other) == ids(loader) == ids(loader.epoch(3))


def test_a_state_goes_on_with_another_number_of_ranks(shard_set):
    whole = opened(shard_set)
    iterator = iter(whole)
    next(iterator)
    state, left = whole.state_dict(), list(iterator)
    ranks = [opened(shard_set, rank=rank, world=2) for rank in range(2)]
    for loader in ranks:
        loader.load_state_dict(state)
    for batch, *parts in zip(left, *ranks, strict=True):
        assert batch.sample_ids.tolist() == [i for part in parts for i in part.sample_ids.tolist()]
        for view, *halves in zip(batch.views, *(part.views for part in parts), strict=True):
            assert torch.equal(view, torch.cat(halves))
    assert ranks[0].state_dict() == ranks[1].state_dict()


def test_the_state_can_be_stored_with_torch(shard_set, tmp_path):
    torch.save(opened(shard_set).state_dict(), tmp_path / "state.pt")
    opened(shard_set).load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"seed": 6}, r"the seed was 5 and is 6 here"),
        ({"batch": 4}, r"the batch over all ranks was 8 and is 4 here"),
        ({"order": "blocks", "block_shards": 2}, r"the shards in a block .* was 0 and is 2 here"),
    ],
)
def test_a_state_of_another_stream_is_refused_with_both_values(shard_set, other, said):
    with pytest.raises(UserError, match=said):
        opened(shard_set, **other).load_state_dict(opened(shard_set).state_dict())


def test_a_state_of_another_data_set_or_split_is_refused(shard_set, tmp_path):
    state = opened(shard_set).state_dict()
    state["data_set"] = "0" * 64
    with pytest.raises(
        UserError,
        match=rf"the data set was '{'0' * 64}' and is '{Manifest.load(shard_set.folder).options_sha256}'",
    ):
        opened(shard_set).load_state_dict(state)
    part = shard_set.subset(np.arange(20), "some")
    with pytest.raises(UserError, match=r"the number of samples was 20 and is 41"):
        opened(shard_set).load_state_dict(opened(part).state_dict())
    # The same name and number, but other samples.
    other = shard_set.subset(np.arange(1, 21), "some")
    with pytest.raises(UserError, match=r"the split was 'some \w+' and is 'some \w+'"):
        opened(other).load_state_dict(opened(part).state_dict())
    with pytest.raises(UserError, match=r"no state of a loader: it has no 'epoch'"):
        opened(shard_set).load_state_dict({})


def test_another_recipe_is_a_warning(shard_set):
    with pytest.warns(UserWarning, match=r"hue was 0.1 and is 0.3"):
        open_loader(shard_set, replace(SMALL, hue=0.3), batch=8, seed=5).load_state_dict(
            opened(shard_set).state_dict()
        )


# ---------------------------------------------------------------- opening


def test_a_path_a_preset_and_a_split_are_accepted(shard_set, tmp_path):
    for place in (str(shard_set.folder), Path(shard_set.folder)):
        loader = open_loader(place, "moco_v3", batch=8)
        assert (loader.recipe, loader.seed) == (RECIPES["moco_v3"], 0)
    with pytest.raises(UserError, match=r"no recipe called 'moco3'. Did you mean 'moco_v3'"):
        open_loader(shard_set, "moco3", batch=8)
    with pytest.raises(UserError, match="no split"):
        open_loader(shard_set, SMALL, batch=8, split="train")
    copied = shutil.copytree(shard_set.folder, tmp_path / "shards")
    split(open_place(copied), SplitRule(val=0.25, group_by="none"))
    for shards in (copied, ShardSet.open(copied)):
        loader = open_loader(shards, SMALL, batch=8, split="train")
        assert len(loader.shards) == 31
        assert "split 'train': 31 samples" in repr(loader)
    assert sum(len(batch) for batch in eval_batches(copied, SMALL, split="val")) == 10
    part = shard_set.subset(np.arange(20), "some")
    assert len(open_loader(part, SMALL, batch=8, split="some")) == 2
    with pytest.raises(UserError, match=r"split is 'other', but the ShardSet .* 'some'"):
        open_loader(part, SMALL, batch=8, split="other")


def test_an_unknown_option_or_value_is_refused_with_the_nearest_name(shard_set):
    with pytest.raises(UserError, match=r"open_loader has no option 'thread'. Did you mean 'threads'"):
        opened(shard_set, thread=3)
    with pytest.raises(UserError, match=r"eval_batches has no option 'engine'. Known: device, mask_ignore"):
        eval_batches(shard_set, SMALL, engine="dali")
    with pytest.raises(UserError, match=r"data.cache is 'rma', but it must be one of none, ram, gpu"):
        opened(shard_set, cache="rma")


def test_options_and_keywords_go_together(shard_set):
    loader = opened(shard_set, options=LoaderOptions(threads=3, max_bad_share=0.5), threads=1)
    assert (loader.options.threads, loader.options.max_bad_share) == (1, 0.5)


def test_what_is_shown_of_them(shard_set):
    loader = opened(shard_set)
    batch = next(iter(loader))
    assert repr(loader) == (
        f"Loader('{shard_set.folder}': 41 samples; batch 8, 5 steps an epoch, seed 5; engine fused, views on cpu; at epoch 0, step 1)"
    )
    assert repr(batch) == "Batch(8 samples, 8 with label; views 2 x (8, 3, 16, 16) float32 on cpu)"
    assert len(batch) == 8
    dino = replace(RECIPES["dino"], size=16, local_size=8)
    crops = next(iter(open_loader(shard_set, dino, batch=2, options=LoaderOptions(threads=1))))
    assert "views 2 x (2, 3, 16, 16) + 8 x (2, 3, 8, 8) float32" in repr(crops)
    assert "2 lazy" not in repr(crops)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_shows_what_differs_from_the_defaults(name):
    recipe = RECIPES[name]
    assert eval(repr(recipe), {"Recipe": Recipe}) == recipe
    assert repr(replace(SMALL, hflip_p=0.0)) == "Recipe(size=16, hflip_p=0.0)"


def test_names_of_the_package_load_nothing_until_they_are_used():
    script = "import sys, pipelines; assert 'torch' not in sys.modules; pipelines.open_loader; assert 'torch' in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert set(pipelines.__all__) <= set(dir(pipelines))
    assert all(getattr(pipelines, name) is not None for name in pipelines.__all__)
    with pytest.raises(AttributeError, match="open_loeder"):
        pipelines.open_loeder  # noqa: B018
