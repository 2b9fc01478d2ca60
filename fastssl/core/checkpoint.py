"""Checkpoints: written atomically, holding plain values and tensors only, and checked when they are loaded."""

from __future__ import annotations

import io
import re
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shards.errors import UserError
from shards.storage.atomic_files import atomic_write

FORMAT = 1
_NAME = re.compile(r"step-(\d{9})\.pt")


class DamagedError(UserError):
    """A checkpoint was cut short, or bits in it have changed."""


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the path of the checkpoint after `step` optimizer steps."""
    return run / "checkpoints" / f"step-{step:09d}.pt"


def step_of(path: Path) -> int:
    """Return the number of optimizer steps in a checkpoint's name."""
    return int(path.stem.removeprefix("step-"))


def list_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first."""
    folder = run / "checkpoints"
    return sorted(p for p in folder.glob("step-*.pt") if _NAME.fullmatch(p.name)) if folder.is_dir() else []


def find_checkpoint(path: Path) -> Path:
    """Return the checkpoint that a path means: the file itself, or the newest one of a run folder or its `checkpoints` folder."""
    if path.is_file():
        return path
    found = list_checkpoints(path) or list_checkpoints(path.parent)
    if not path.exists() or not found:
        raise UserError(
            f"There is no checkpoint at '{path}': give a .pt file, or the folder of a run that has saved one."
        )
    return found[-1]


def save(path: Path, state: dict[str, Any], keep: int = 0, lasting: int = 0) -> None:
    """Write a checkpoint, then remove all but the newest `keep` of its folder (0: keep all) and those of every `lasting`-th step.

    Raises:
        UserError: the disk is full, or the folder cannot be written; older checkpoints stay as they were.
    """
    # Serialise in memory first: torch turns a write error into one of its own that hides the cause.
    buffer = io.BytesIO()
    torch.save({"format": FORMAT, **state}, buffer)
    view = buffer.getbuffer()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, lambda file: file.write(view))
    except UserError as error:
        raise UserError(f"{error} --resume continues from the last checkpoint.") from error
    except OSError as error:
        raise UserError(
            f"'{path}' cannot be written ({error.strerror}): fix that, then continue with --resume."
        ) from error
    if keep:
        for old in list_checkpoints(path.parent.parent)[:-keep]:
            if not lasting or step_of(old) % lasting:
                old.unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running any code in it (`weights_only`).

    Raises:
        DamagedError: the file was cut short, or a bit of it has changed.
        UserError: it is no checkpoint of fastssl, or one of a newer format.
    """
    try:
        # torch writes a checksum of each tensor but does not check it when it reads.
        with zipfile.ZipFile(path) as parts:
            if (part := parts.testzip()) is not None:
                raise DamagedError(f"{_unreadable(path)} The checksum of its part '{part}' is wrong.")
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"There is no checkpoint '{path}'.") from None
    except UserError:
        raise
    # torch and zipfile raise many kinds of errors for a damaged file.
    except Exception as error:
        raise (DamagedError if _NAME.fullmatch(path.name) else UserError)(_unreadable(path)) from error
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"'{path}' is no checkpoint of fastssl: it lacks the entry 'format'.")
    if state["format"] != FORMAT:
        raise UserError(
            f"'{path}' has checkpoint format {state['format']}, but this fastssl reads {FORMAT}: update fastssl."
        )
    return state


def _unreadable(path: Path) -> str:
    if not _NAME.fullmatch(path.name):
        return f"'{path}' is no checkpoint: give a .pt file that fastssl saved, or the folder of a run."
    older = [p for p in list_checkpoints(path.parent.parent) if p.name < path.name]
    if older:
        return f"The checkpoint '{path}' is damaged: remove it, and '{older[-1].name}', the one before it, will be used."
    return f"The checkpoint '{path}' is damaged and is the oldest of its run: remove it, and --resume starts from the beginning."


def load_weights(module: nn.Module, weights: dict[str, Tensor], where: str) -> None:
    """Load weights, all of which must match the module.

    Raises:
        UserError: entries are missing, unknown or of another shape; it names them, with both shapes.
    """
    own = module.state_dict()
    problems = [f"{k} is missing" for k in own if k not in weights]
    problems += [f"{k} is not in the model" for k in weights if k not in own]
    problems += [
        f"{k} is {tuple(weights[k].shape)} there and {tuple(own[k].shape)} here"
        for k in own
        if k in weights and weights[k].shape != own[k].shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(
            f"The weights in '{where}' do not fit this model: {'; '.join(problems[:4])}{more}. Use the configuration that made them."
        )
    module.load_state_dict(weights)
