"""Start ``torch.distributed`` so that a restart under torchrun works."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # public, not exported
    DistStoreError,
    PrefixStore,
    Store,
    TCPStore,
)
from torch.distributed.constants import default_pg_timeout

from distckpt import words
from distckpt.durations import seconds_of

_KEYS = "distckpt/rendezvous"
_POLL_SECONDS = 0.02
# What the workers of this start of the job agreed on; "" if they did not.
_agreed = ""


def incarnation() -> str:
    """Return what tells this start of the workers from earlier ones of the same job."""
    return _agreed or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def init_process_group(
    backend: str | None = None, timeout: float | timedelta | None = None, **options: Any
) -> None:
    """Initialize the default process group; in place of torch's function of this name.

    torchrun's agent keeps its store through a restart of the workers, and a plain
    ``init_process_group`` then reads the addresses of the dead ones: over half of the
    restarts on gloo hang or fail. Here the workers agree on keys of their own first. (The
    restart count does not do: agents of an elastic job that joined at different times
    have different ones.) Outside torchrun this is torch's function.

    Called by: every rank, once. Collectives: a rendezvous.

    Args:
        backend: As torch's; any.
        timeout: As torch's: for the rendezvous and for the group's collectives; in seconds
            or as a timedelta.
        **options: Passed on; ``init_method``, ``store``, ``rank`` and ``world_size`` are
            set here under torchrun.

    Source:
        https://github.com/pytorch/pytorch/issues/135712
    """
    global _agreed
    arguments = dict(options)
    length = None
    if timeout is not None:
        length = timedelta(seconds=seconds_of("timeout", timeout))
        arguments["timeout"] = length
    if dist.is_torchelastic_launched() and "init_method" not in options:
        rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        agent_has_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        store = TCPStore(
            os.environ["MASTER_ADDR"],
            int(os.environ["MASTER_PORT"]),
            world_size,
            is_master=rank == 0 and not agent_has_store,
            timeout=length or default_pg_timeout,
            wait_for_workers=False,
        )
        _agreed = _agree(store, rank, world_size, length or default_pg_timeout)
        arguments |= {
            "store": PrefixStore(f"{_KEYS}/{_agreed}", store),
            "rank": rank,
            "world_size": world_size,
        }
    dist.init_process_group(backend, **arguments)


def _agree(store: Store, rank: int, world_size: int, timeout: timedelta) -> str:
    """Agree on a name that no earlier start of the workers has used; returns it.

    The store may hold what the dead have written, under every key that could be thought
    of. So each rank writes a number that it draws, and rank 0 answers with the name beside
    that number: who finds its own number has been answered just now.

    Raises:
        DistStoreError: Not all ranks came in time.
    """
    deadline = time.monotonic() + timeout.total_seconds()
    drawn = os.urandom(8).hex()
    if rank == 0:
        _answer_all(store, drawn, range(1, world_size), deadline)
        return drawn
    store.set(f"{_KEYS}/hello/{rank}", drawn)
    answer = f"{_KEYS}/answer/{rank}"
    while True:
        store.wait([answer], _left(deadline))
        number, _, name = store.get(answer).decode().partition(" ")
        if number == drawn:
            store.set(f"{_KEYS}/came/{rank}", name)
            return name
        if time.monotonic() > deadline:
            msg = f"rank {rank}: rank 0 did not answer within {timeout}; has it died?"
            raise DistStoreError(msg)
        time.sleep(_POLL_SECONDS)


def _answer_all(store: Store, name: str, ranks: Sequence[int], deadline: float) -> None:
    """Tell all other ranks the name, until each has said that it knows it."""
    waiting = list(ranks)
    answered: dict[int, bytes] = {}
    while waiting:
        hellos = [f"{_KEYS}/hello/{rank}" for rank in waiting]
        try:
            store.wait(hellos, _left(deadline))
        except DistStoreError as error:
            # What it says names all of them.
            absent = [
                r for r, key in zip(waiting, hellos, strict=True) if not store.check([key])
            ]
            raise DistStoreError(_absent(absent)) from error
        for rank, drawn in zip(waiting, store.multi_get(hellos), strict=True):
            # Some are of the dead: then those of the living are still to come.
            if answered.get(rank) != drawn:
                store.set(f"{_KEYS}/answer/{rank}", f"{drawn.decode()} {name}")
                answered[rank] = drawn
        came = [f"{_KEYS}/came/{rank}" for rank in waiting]
        if store.check(came):
            said = zip(waiting, store.multi_get(came), strict=True)
            waiting = [rank for rank, known in said if known.decode() != name]
        if waiting and time.monotonic() > deadline:
            raise DistStoreError(_absent(waiting))
        time.sleep(_POLL_SECONDS * bool(waiting))


def _absent(ranks: Sequence[int]) -> str:
    return f"{words.ranks(ranks)} did not come to init_process_group in time."


def _left(deadline: float) -> timedelta:
    return timedelta(seconds=max(0.001, deadline - time.monotonic()))
