"""How the processes of a run find each other: the environment that starts them, and the store in which they meet."""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import NoReturn

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from shards.errors import UserError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_WAY_OUT = "start the processes with torchrun, or unset all of them for a single process."
# Between two looks into the store.
LOOK_S = 0.02


def read_environment() -> tuple[int, int, int]:
    """Return (rank, world, local rank) as torchrun sets them; (0, 1, 0) if it set none.

    Of a mistake that all processes share, the first one speaks; the others end without a word.

    Raises:
        UserError: some of the variables are missing or no numbers, a rank is not below the number of processes, there is no address
            at which several processes meet; or Slurm started several processes, each of which would train alone.
    """
    found = {name: os.environ[name] for name in _NAMES if name in os.environ}
    if not found:
        _refuse_bare_srun()
        return 0, 1, 0
    missing = [name for name in _NAMES if name not in found]
    if missing:
        _refuse(f"The environment sets {', '.join(found)} but not {', '.join(missing)}: {_WAY_OUT}")
    for name, value in found.items():
        if not value.isdecimal():
            _refuse(f"The environment sets {name} to '{value}', which is no number: {_WAY_OUT}")
    rank, world, local_rank = (int(found[name]) for name in _NAMES)
    if rank >= world:
        raise UserError(
            f"The environment sets RANK to {rank} and WORLD_SIZE to {world}, but ranks count from 0 to {world - 1}: {_WAY_OUT}"
        )
    if world > 1:
        lacking = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if lacking:
            _refuse(
                f"The environment sets WORLD_SIZE to {world} but not {' and '.join(lacking)}, where the processes meet: {_WAY_OUT}"
            )
        port = os.environ["MASTER_PORT"]
        if not port.isdecimal() or not 0 < int(port) < 2**16:
            _refuse(f"The environment sets MASTER_PORT to '{port}', but a port is a number from 1 to 65535.")
    return rank, world, local_rank


def _refuse_bare_srun() -> None:
    count = os.environ.get("SLURM_STEP_NUM_TASKS") or os.environ.get("SLURM_NTASKS", "1")
    number = os.environ.get("SLURM_PROCID")
    if number is None or not count.isdecimal() or int(count) < 2:
        return
    if number != "0":
        raise SystemExit(2)
    raise UserError(
        f"Slurm started {count} processes without RANK and WORLD_SIZE, so that each would train alone: use `fastssl launch slurm`, or "
        "set them as docs/slurm.md shows. For a single process: srun --ntasks 1, or unset SLURM_PROCID."
    )


def _refuse(text: str) -> NoReturn:
    """Raise UserError in the first process, and in one that cannot know whether it is; end the others."""
    rank = os.environ.get("RANK", "")
    if rank.isdecimal() and int(rank) > 0:
        raise SystemExit(2)
    raise UserError(text)


def open_store(rank: int, world: int, timeout_s: float) -> Store:
    """Return the store in which the processes of this start of the run meet.

    Raises:
        UserError: the port is in use, or the first process cannot be reached.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    try:
        store, _, _ = next(rendezvous("env://", rank, world, timeout=timedelta(seconds=timeout_s)))
    except RuntimeError as error:
        if "EADDRINUSE" in str(error):
            raise UserError(
                f"The port {place} is in use, such as by another run on this machine: set another MASTER_PORT, or with torchrun "
                "--rdzv-endpoint HOST:PORT (--standalone takes a free one)."
            ) from error
        raise UserError(
            f"Process {rank} of {world} cannot reach the first one at {place} ({str(error).splitlines()[0]}): check MASTER_ADDR and "
            "MASTER_PORT, and that the nodes reach each other."
        ) from error
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return store
    # torchrun keeps its store when it starts the workers again, with all that they had written there.
    return PrefixStore(agree(store, rank, world, timeout_s), store)


def agree(
    store: Store, rank: int, world: int, timeout_s: float, wait: Callable[[float], None] = time.sleep
) -> str:
    """Return a word that all processes of this start share, and those of no earlier one; the store may hold anything of those.

    Counting the starts does not give one: each of several nodes counts its own. So the first process welcomes each of the others,
    which it finds by a word of their own, until all of them have answered with its word, and then lets them go.

    Raises:
        UserError: after `timeout_s` some process has not come.
    """
    own, end_s = uuid.uuid4().hex, time.monotonic() + timeout_s
    missing, heard = set(range(1, world)), ""
    if rank:
        store.set(f"fastssl/here/{rank}", own)
    while time.monotonic() < end_s:
        if rank == 0:
            missing -= {other for other in missing if _welcome(store, own, other)}
            if not missing:
                store.set(f"fastssl/go/{own}", "")
                return own
        elif store.check([f"fastssl/welcome/{own}"]):
            # Of an earlier start, perhaps, whose first process is not gone yet: the present one's replaces it.
            word = store.get(f"fastssl/welcome/{own}").decode()
            if word != heard:
                heard = word
                store.set(f"fastssl/heard/{word}/{rank}", "")
            if store.check([f"fastssl/go/{word}"]):
                return word
        wait(LOOK_S)
    whom = f"process {min(missing)} of {world}" if rank == 0 else "the first process"
    raise UserError(
        f"Process {rank} of {world} has waited {timeout_s:.0f} s for {whom}: look for its error, and start again."
    )


def _welcome(store: Store, own: str, other: int) -> bool:
    """Give our word to the process that says it is number `other`; return whether it has heard it."""
    if store.check([f"fastssl/heard/{own}/{other}"]):
        return True
    if store.check([f"fastssl/here/{other}"]):
        store.set(f"fastssl/welcome/{store.get(f'fastssl/here/{other}').decode()}", own)
    return False
