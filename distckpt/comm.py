"""How ranks talk: one round of votes up and the chief's answer down.

Every exchange of the protocol is one ``consult``: all ranks vote, the chief decides, all
ranks get the same answer or raise the same error. Since a rank's errors are votes too,
every rank makes the same collectives in the same order, whatever happens on it.

Messages go over gloo groups of the manager's own: training's collectives cannot
interleave with them, and they need no device.
"""

from __future__ import annotations

import ctypes
import socket
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist

from distckpt import liveness, messages, paths
from distckpt.errors import (
    ConfigError,
    Desync,
    DistckptError,
    ManagerBroken,
    PeerTimeout,
    RanksFailed,
    StorageTimeout,
)
from distckpt.line import Address
from distckpt.liveness import ChiefLiveness, Liveness, Place
from distckpt.messages import Phase, Vote
from distckpt.waiting import Waiting, Whereabouts
from distckpt.worker import Worker

Answer: TypeAlias = dict[str, Any]
Decide: TypeAlias = Callable[[Sequence[Vote]], Answer]
# What a call that hangs while the chief decides is to be taken for.
Judge: TypeAlias = Callable[[StorageTimeout], DistckptError]


def as_it_is(error: StorageTimeout) -> DistckptError:
    """Take a call that hangs for nothing else."""
    return error


# An answer nearly always fits into one message of fixed size; a longer one follows.
_FRAME_BYTES = 512
_FRAME = struct.Struct("<BI")
_ANSWER, _SEND_DETAILS = 0, 1

_FIRST_POLL_SECONDS = 50e-6
_LAST_POLL_SECONDS = 2e-3
# gloo's own limit for one operation. Ours come first, and they can be moved.
_OPERATION_TIMEOUT = timedelta(days=7)


class Channel(Protocol):
    """A way to reach all ranks of a manager, in one order.

    Attributes:
        rank: This rank in the manager's group.
        world_size: Number of ranks.
        members: What torch's default group calls each of them.
    """

    rank: int
    world_size: int
    members: tuple[int, ...]

    def consult(
        self,
        vote: Vote,
        decide: Decide,
        *,
        patient: bool = False,
        hung: Judge = as_it_is,
    ) -> Answer:
        """Vote, let the chief decide, and return its answer: collective.

        Args:
            vote: This rank's word.
            decide: Called on the chief alone, with one vote a rank; returns the answer,
                or raises what every rank then raises.
            patient: Wait for as long as any rank makes progress.
            hung: Makes what all ranks raise if the chief's storage hangs meanwhile.

        Raises:
            DistckptError: What ``decide`` raised, on every rank.
            ManagerBroken: A peer was lost, or is elsewhere; the channel is dead.
        """

    def close(self) -> None:
        """Give the group back; all ranks must be done with it."""


class SoloChannel:
    """One rank: the same code path without a process group."""

    rank = 0
    world_size = 1

    def __init__(self, worker: Worker, member: int = 0) -> None:
        self._worker = worker
        self.members: tuple[int, ...] = (member,)

    def consult(
        self,
        vote: Vote,
        decide: Decide,
        *,
        patient: bool = False,
        hung: Judge = as_it_is,
    ) -> Answer:
        """See ``Channel.consult``."""
        try:
            return self._worker.finish(lambda: decide([vote]))
        except StorageTimeout as error:
            judged = hung(error)
            if judged is error:
                raise
            raise judged from error

    def close(self) -> None:
        """See ``Channel.close``."""


class GroupChannel:
    """All ranks of a private gloo group; group rank 0 is the chief.

    Args:
        name: Tells the channels of one manager apart.
        group: Used by nobody else.
        timeout: How long to wait for another rank.
        worker: Does the chief's work.
        whereabouts: Kept up to date.

    Attributes:
        liveness: Tells who is missing; None until the ranks are connected.
    """

    def __init__(
        self,
        name: str,
        group: dist.ProcessGroup,
        timeout: timedelta,
        worker: Worker,
        whereabouts: Whereabouts,
    ) -> None:
        self._name = name
        self._group: dist.ProcessGroup | None = group
        self._timeout_seconds = timeout.total_seconds()
        self._worker = worker
        self._whereabouts = whereabouts
        self._num_rounds = 0
        self._broken = ""
        self.liveness: Liveness | None = None
        self.rank = dist.get_rank(group)
        self.members = tuple(dist.get_process_group_ranks(group))
        self.world_size = len(self.members)

    def consult(
        self,
        vote: Vote,
        decide: Decide,
        *,
        patient: bool = False,
        hung: Judge = as_it_is,
    ) -> Answer:
        """See ``Channel.consult``."""
        if self._broken:
            raise ManagerBroken(self._broken)
        self._num_rounds += 1
        waiting = self._begin_waiting(vote.phase, patient)
        try:
            if self.rank == 0:
                return self._consult_as_chief(waiting, vote, decide, hung)
            return self._consult_as_rank(waiting, vote)
        except (ManagerBroken, KeyboardInterrupt, SystemExit) as error:
            # Interrupted in a collective is as bad as broken: it stays outstanding.
            if not self._broken:
                self._broken = f"{type(error).__name__}: {error}"
                assert self._group is not None
                _keep_for_ever(self._group)
            raise
        finally:
            self._whereabouts.be_at(f"past phase {vote.phase.name}")

    def _begin_waiting(self, phase: Phase, patient: bool) -> Waiting:
        text = f"waiting in phase {phase.name}"
        place = Place(self._name, self._num_rounds, False, text)
        self._whereabouts.place = place
        who = f"rank {self.rank} of {self.world_size}"
        return Waiting(who, phase, self._timeout_seconds, place, self.liveness, patient)

    def _consult_as_chief(
        self, waiting: Waiting, vote: Vote, decide: Decide, hung: Judge
    ) -> Answer:
        packed = self._gather(waiting, vote.pack(0))
        assert packed is not None
        details = self._gather_details(waiting, vote, packed)
        votes = [
            messages.unpack_vote(data, detail)
            for data, detail in zip(packed, details, strict=True)
        ]
        text = f"deciding in phase {vote.phase.name}"
        self._whereabouts.place = Place(self._name, self._num_rounds, True, text)
        try:
            _check_same_phase(votes)
            # Not on this thread: a call that hangs must not hold up the others.
            answer = self._worker.finish(lambda: decide(votes))
        except StorageTimeout as error:
            judged = hung(error)
            self._answer(vote.phase, messages.encode_error(judged))
            if judged is error:
                raise
            raise judged from error
        except DistckptError as error:
            self._answer(vote.phase, messages.encode_error(error))
            raise
        except BaseException as error:
            # The others must not wait for an answer that never comes.
            text = f"on the chief: {type(error).__name__}: {error}"
            failed = RanksFailed(text, {0: text})
            self._answer(vote.phase, messages.encode_error(failed))
            if isinstance(error, Exception):
                raise failed from error
            raise
        self._answer(vote.phase, messages.encode_answer(answer))
        return answer

    def _answer(self, phase: Phase, data: bytes) -> None:
        waiting = self._begin_waiting(phase, patient=False)
        room = _FRAME_BYTES - _FRAME.size
        fits = len(data) <= room
        self._broadcast_frame(waiting, _ANSWER, len(data), data if fits else b"")
        if not fits:
            self._broadcast(waiting, data)

    def _gather_details(
        self, waiting: Waiting, vote: Vote, packed: Sequence[bytes]
    ) -> list[bytes]:
        lengths = [messages.detail_length(data) for data in packed]
        if not any(lengths):
            return [b""] * len(packed)
        longest = max(lengths)
        self._broadcast_frame(waiting, _SEND_DETAILS, longest, b"")
        padded = self._gather(waiting, vote.detail.ljust(longest, b"\0"))
        assert padded is not None
        return [data[:length] for data, length in zip(padded, lengths, strict=True)]

    def _consult_as_rank(self, waiting: Waiting, vote: Vote) -> Answer:
        self._gather(waiting, vote.pack(self.rank))
        kind, length, inline = self._receive_frame(waiting)
        if kind == _SEND_DETAILS:
            self._gather(waiting, vote.detail.ljust(length, b"\0"))
            kind, length, inline = self._receive_frame(waiting)
        if length > len(inline):
            inline = self._broadcast(waiting, bytes(length))
        return messages.decode_answer(inline[:length])

    def _broadcast_frame(
        self, waiting: Waiting, kind: int, length: int, inline: bytes
    ) -> None:
        frame = (_FRAME.pack(kind, length) + inline).ljust(_FRAME_BYTES, b"\0")
        self._broadcast(waiting, frame)

    def _receive_frame(self, waiting: Waiting) -> tuple[int, int, bytes]:
        frame = self._broadcast(waiting, bytes(_FRAME_BYTES))
        kind, length = _FRAME.unpack_from(frame)
        return kind, length, frame[_FRAME.size :]

    def _gather(self, waiting: Waiting, data: bytes) -> list[bytes] | None:
        group, tensor = self._group, _tensor(data)
        assert group is not None
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        options = dist.GatherOptions()
        options.rootRank = 0
        options.timeout = _OPERATION_TIMEOUT
        output = [parts] if self.rank == 0 else []
        _wait(waiting, lambda: group.gather(output, [tensor], options))
        return [part.numpy().tobytes() for part in parts] if self.rank == 0 else None

    def _broadcast(self, waiting: Waiting, data: bytes) -> bytes:
        group, tensor = self._group, _tensor(data)
        assert group is not None
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = _OPERATION_TIMEOUT
        _wait(waiting, lambda: group.broadcast([tensor], options))
        return tensor.numpy().tobytes()

    def close(self) -> None:
        """See ``Channel.close``."""
        if self.liveness is not None:
            self.liveness.leave()
        if not self._broken:
            self._broken = "this manager is closed."
            # The user may have destroyed all groups already.
            with suppress(Exception):
                dist.destroy_process_group(self._group)
            # Its threads and connections end with the last reference; an exception's
            # traceback may keep this object for long.
            self._group = None


def open_channels(
    process_group: dist.ProcessGroup | None,
    timeout: timedelta,
    names: Sequence[str],
    worker: Worker,
    whereabouts: Whereabouts,
) -> list[Channel]:
    """Make channels over all ranks of a process group: collective.

    Args:
        process_group: Its members are the manager's ranks; None means the default
            group, or this process alone where none is initialized. Any backend.
        timeout: How long any wait may take.
        names: One for each channel.
        worker: Does the chief's work.
        whereabouts: Kept up to date.

    Raises:
        PeerTimeout: Not every rank came.
    """
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            msg = "process_group was given, but torch.distributed is not initialized."
            raise ConfigError(msg)
        return [SoloChannel(worker) for _ in names]
    if dist.get_rank(process_group) < 0:
        msg = f"rank {dist.get_rank()} is not a member of the given process_group."
        raise ConfigError(msg)
    if dist.get_world_size(process_group) == 1:
        return [SoloChannel(worker, dist.get_rank()) for _ in names]
    return [
        GroupChannel(name, _new_group(process_group, timeout), timeout, worker, whereabouts)
        for name in names
    ]


def _new_group(
    process_group: dist.ProcessGroup | None, timeout: timedelta
) -> dist.ProcessGroup:
    members = None
    if process_group is not None:
        members = dist.get_process_group_ranks(process_group)
        if len(members) == dist.get_world_size():
            members = None
    try:
        group: dist.ProcessGroup = dist.new_group(
            members,
            timeout=timeout,
            backend="gloo",
            # Ranks outside process_group do not take part.
            use_local_synchronization=members is not None,
        )
    except RuntimeError as error:
        msg = f"not every rank came to make a manager: {error}"
        raise PeerTimeout(msg) from error
    return group


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


def _wait(waiting: Waiting, start: Callable[[], Any]) -> None:
    """Post a collective and poll it, so that the deadline is ours, not gloo's."""
    pause = _FIRST_POLL_SECONDS
    try:
        work = start()
        while not work.is_completed():
            waiting.go_on()
            time.sleep(pause)
            pause = min(2 * pause, _LAST_POLL_SECONDS)
        work.wait()
    except RuntimeError as error:
        raise waiting.connection_broke(error) from error


def _keep_for_ever(group: dist.ProcessGroup) -> None:
    """Keep a broken group from being destroyed, so that the process can exit at once.

    gloo's destructor waits for operations that will never end. A reference in a global
    would not do: the interpreter drops those on its way out.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(group))


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _check_same_phase(votes: Sequence[Vote]) -> None:
    expected = votes[0].phase
    others = {vote.rank: vote.phase.name for vote in votes if vote.phase is not expected}
    if others:
        msg = (
            f"the chief is in phase {expected.name}, but ranks are elsewhere: {others}. "
            "Every rank must make the same calls of the manager in the same order."
        )
        raise Desync(msg)
