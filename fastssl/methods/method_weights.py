"""A method's weights in a checkpoint: all but its external parts, of which digests are kept."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.core import checkpoint
from fastssl.methods.method import Method
from fastssl.models.moco_vit import heads_entries
from shards.errors import UserError

_SHOWN = 12  # hexadecimal digits of a digest


def freeze_external(method: Method) -> None:
    """Freeze the method's external parts, in place: no gradients, and evaluation mode, so that no statistics move."""
    for name in method.external:
        assert not f"{method.evaluated}.".startswith(f"{name}."), (
            f"{name} is evaluated: checkpoints must hold it"
        )
        method.get_submodule(name).requires_grad_(False).eval()


def own_weights(method: Method) -> dict[str, Tensor]:
    """Return the method's state dict without the entries of its external parts, and with the heads of ViTs that need it said.

    See `fastssl.models.moco_vit.heads_entries`.
    """
    weights = method.state_dict() | heads_entries(method)
    for key in [key for key in weights if _is_external(method, key)]:
        del weights[key]
    return weights


def external_digests(method: Method) -> dict[str, str]:
    """Return the digest of each external part by its name."""
    return {name: digest(method.get_submodule(name)) for name in method.external}


def digest(module: nn.Module) -> str:
    """Return SHA-256, hexadecimal, of names, dtypes, shapes and bytes of a module's state dict, in the order of the names.

    Device and memory layout do not count.
    """
    found = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        found.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def load_own_weights(method: Method, state: dict[str, Any], digests: dict[str, str], where: str) -> None:
    """Load a checkpoint's weights, all of which must match the method; external parts stay as the run has built them.

    Args:
        method: on any device.
        state: the checkpoint's content: `method`, and `external` (absent: none).
        digests: `external_digests` of the method.
        where: the checkpoint's path, for errors.

    Raises:
        UserError: the checkpoint was made with other external parts; or weights are missing, unknown or of another shape.
    """
    saved = state.get("external", {})
    for name in dict.fromkeys([*digests, *saved]):
        if name not in saved:
            raise UserError(
                f"'{where}' holds no digest of '{name}', which this run's method keeps outside of its checkpoints: use the method "
                "that made it, or start a new run with another --train.out."
            )
        if name not in digests:
            raise UserError(
                f"'{where}' was made with '{name}' (sha256 {saved[name][:_SHOWN]}), which this run's method does not have: use the "
                "method that made it, or start a new run with another --train.out."
            )
        if saved[name] != digests[name]:
            raise UserError(
                f"'{where}' was made with other weights of '{name}' than this run has: sha256 {saved[name][:_SHOWN]} there and "
                f"{digests[name][:_SHOWN]} here. Give the file that the run began with, or start a new run with another --train.out."
            )
    external = {key: value for key, value in method.state_dict().items() if _is_external(method, key)}
    # Compared with the architecture already; older checkpoints do not have them.
    heads = heads_entries(method)
    own = {key: value for key, value in state["method"].items() if key not in heads}
    checkpoint.load_weights(method, {**own, **external}, where)


def _is_external(method: Method, key: str) -> bool:
    return key.startswith(tuple(f"{name}." for name in method.external))
