"""The ranks of a manager find each other: private gloo groups, and the chief's address."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]  # public, not exported
    PrefixStore,
    ProcessGroupGloo,
)
from torch.distributed.distributed_c10d import _get_default_store

from distckpt import liveness, paths, words
from distckpt.comm import Answer, Channel, GroupChannel, SoloChannel
from distckpt.errors import ConfigError, PeerTimeout
from distckpt.line import Address
from distckpt.liveness import ChiefLiveness, Liveness
from distckpt.messages import Phase, Vote
from distckpt.record import digest
from distckpt.rendezvous import incarnation
from distckpt.waiting import Lane, Whereabouts

# How many groups this process has made over the same ranks: the next one's keys in the
# store must be new, and the same on all of them.
_GAVE_UP = "gave up"
_num_made: Counter[tuple[int, ...]] = Counter()


def open_channels(
    process_group: dist.ProcessGroup | None,
    timeout: timedelta,
    lanes: Sequence[Lane],
) -> list[Channel]:
    """Make channels over all ranks of a process group: collective.

    Args:
        process_group: Its members are the manager's ranks; None means the default
            group, or this process alone where none is initialized. Any backend.
        timeout: How long any wait may take.
        lanes: Of the threads that get one each.

    Raises:
        PeerTimeout: Not every rank came.
    """
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            msg = "process_group was given, but torch.distributed is not initialized."
            raise ConfigError(msg)
        return [SoloChannel(lane) for lane in lanes]
    rank = dist.get_rank(process_group)
    if rank < 0:
        msg = f"rank {dist.get_rank()} is not a member of the given process_group."
        raise ConfigError(msg)
    members = tuple(dist.get_process_group_ranks(process_group))
    if len(members) == 1:
        return [SoloChannel(lane, members[0]) for lane in lanes]
    return [
        GroupChannel(lane, _new_group(members, rank, timeout), rank, members, timeout)
        for lane in lanes
    ]


def _new_group(members: tuple[int, ...], rank: int, timeout: timedelta) -> Any:
    """Connect some ranks by gloo, with nobody else taking part.

    Not by ``dist.new_group``: it names a group of some ranks by how many groups each of
    them knows, which need not be the same number, and uses a name again when a group
    was destroyed.
    """
    who = digest(",".join(map(str, members)).encode())
    key = f"distckpt/groups/{incarnation()}/{who}/{_num_made[members]}"
    _num_made[members] += 1
    try:
        store = PrefixStore(key, _get_default_store())
        _check_in(store, rank, len(members), timeout)
        return ProcessGroupGloo(store, rank, len(members), timeout=timeout)
    except RuntimeError as error:
        msg = f"rank {rank}: not every rank came to make a CheckpointManager: {error}"
        raise PeerTimeout(msg) from error


def _check_in(store: Any, rank: int, world_size: int, timeout: timedelta) -> None:
    """Wait until all ranks are here, before gloo waits for them: it names nobody.

    Raises:
        PeerTimeout: Names the ranks that did not come, or that one has given up before:
            gloo would wait for half a minute then.
    """
    if store.check([_GAVE_UP]):
        told = store.get(_GAVE_UP).decode()
        msg = f"rank {rank} came too late to make a CheckpointManager: {told}"
        raise PeerTimeout(msg)
    store.set(f"here/{rank}", "")
    if store.add("number of ranks", 1) == world_size:
        store.set("all are here", "")
    try:
        store.wait(["all are here"], timeout)
    except RuntimeError as error:
        missing = [r for r in range(world_size) if not store.check([f"here/{r}"])]
        text = (
            f"rank {rank} of {world_size} waited {timeout.total_seconds():g} s for "
            f"{words.ranks(missing) if missing else 'ranks that have given up'} to make a "
            "CheckpointManager. Every rank has to make one: not below 'if rank == 0'. "
            "Let the launcher restart the job."
        )
        store.set(_GAVE_UP, text)
        raise PeerTimeout(text, missing) from error


def invite(
    channels: Sequence[Channel], whereabouts: Whereabouts
) -> Callable[[], Liveness | None]:
    """Tell all ranks where the chief listens: collective.

    Returns:
        Connects this rank, so that it notices when another one is gone; what it returns
        is None with one rank. It raises ``ConfigError`` if the chief cannot be reached.
    """
    groups = [channel for channel in channels if isinstance(channel, GroupChannel)]
    if not groups:
        return lambda: None
    of_chief: list[ChiefLiveness] = []

    def listen(votes: Sequence[Vote]) -> Answer:
        token = paths.random_hex(16)
        of_chief.append(liveness.listen(len(votes), token, whereabouts))
        return of_chief[0].address._asdict()

    answer = groups[0].consult(Vote(Phase.CONNECT), listen)
    address = Address(tuple(answer["hosts"]), answer["port"], answer["token"])

    def connect() -> Liveness:
        found = of_chief[0] if of_chief else _join(address, groups[0].rank, whereabouts)
        for channel in groups:
            channel.liveness = found
        return found

    return connect


def _join(address: Address, rank: int, whereabouts: Whereabouts) -> Liveness:
    try:
        return liveness.join(address, rank, whereabouts)
    except OSError as error:
        msg = (
            f"the chief cannot be reached from {socket.gethostname()}: {error}. "
            "Set MASTER_ADDR to an address of its machine that all ranks can reach."
        )
        raise ConfigError(msg) from error
