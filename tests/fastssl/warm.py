"""Imported by a process that is then forked for each run: it has imported everything and loaded the compiled kernels once."""

import contextlib
import io
import tempfile
import warnings
from pathlib import Path

import torch

from fastssl.pretraining.run import train
from shards.conversion.convert import convert
from tests.fastssl.runs import resolve
from tests.pictures import picture

torch.set_num_threads(1)
warnings.simplefilter("ignore")
with tempfile.TemporaryDirectory() as made, contextlib.redirect_stdout(io.StringIO()):
    folder = Path(made)
    for i in range(8):
        (folder / "photos" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        picture(i, (24, 20)).save(folder / "photos" / str(i % 2) / f"{i}.png")
    convert(folder / "photos", folder / "shards", workers=0)
    train(resolve(folder / "shards", folder / "run", {"train": {"epochs": 1}}))
