"""How ranks talk: one round of votes up and the chief's answer down.

Every exchange of the protocol is one ``consult``: all ranks vote, the chief decides, all
ranks get the same answer or raise the same error. Since a rank's errors are votes too,
every rank makes the same collectives in the same order, whatever happens on it.

Messages go over gloo groups of the manager's own: training's collectives cannot
interleave with them, and they need no device.
"""

from __future__ import annotations

import ctypes
import logging
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol, TypeAlias

import torch
import torch.distributed as dist

from distckpt import messages
from distckpt.errors import (
    ConfigError,
    Desync,
    DistckptError,
    ManagerBroken,
    PeerLost,
    PeerTimeout,
    RanksFailed,
)
from distckpt.messages import Phase, Vote

_logger = logging.getLogger(__name__)

Answer: TypeAlias = dict[str, Any]
Decide: TypeAlias = Callable[[Sequence[Vote]], Answer]

# An answer nearly always fits into one message of fixed size; a longer one follows.
_FRAME_BYTES = 512
_FRAME = struct.Struct("<BI")
_ANSWER, _SEND_DETAILS = 0, 1

_FIRST_POLL_SECONDS = 50e-6
_LAST_POLL_SECONDS = 2e-3


class Channel(Protocol):
    """A way to reach all ranks of a manager, in one order.

    Attributes:
        rank: This rank in the manager's group.
        world_size: Number of ranks.
    """

    rank: int
    world_size: int

    def consult(self, vote: Vote, decide: Decide) -> Answer:
        """Vote, let the chief decide, and return its answer: collective.

        Args:
            vote: This rank's word.
            decide: Called on the chief alone, with one vote a rank; returns the answer,
                or raises what every rank then raises.

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

    def consult(self, vote: Vote, decide: Decide) -> Answer:
        """See ``Channel.consult``."""
        return decide([vote])

    def close(self) -> None:
        """See ``Channel.close``."""


class GroupChannel:
    """All ranks of a private gloo group; group rank 0 is the chief.

    Args:
        group: Used by nobody else.
        timeout: How long to wait for another rank.
    """

    def __init__(self, group: dist.ProcessGroup, timeout: timedelta) -> None:
        self._group: dist.ProcessGroup | None = group
        self._timeout_seconds = timeout.total_seconds()
        self._broken = ""
        self.rank = dist.get_rank(group)
        self.world_size = dist.get_world_size(group)
        self._chief = dist.get_global_rank(group, 0)

    def consult(self, vote: Vote, decide: Decide) -> Answer:
        """See ``Channel.consult``."""
        if self._broken:
            raise ManagerBroken(self._broken)
        try:
            if self.rank == 0:
                return self._consult_as_chief(vote, decide)
            return self._consult_as_rank(vote)
        except (ManagerBroken, KeyboardInterrupt, SystemExit) as error:
            # Interrupted in a collective is as bad as broken: it stays outstanding.
            if not self._broken:
                self._broken = f"{type(error).__name__}: {error}"
                assert self._group is not None
                _keep_for_ever(self._group)
            raise

    def _consult_as_chief(self, vote: Vote, decide: Decide) -> Answer:
        packed = self._gather(vote.phase, vote.pack(0))
        assert packed is not None
        details = self._gather_details(vote, packed)
        votes = [
            messages.unpack_vote(data, detail)
            for data, detail in zip(packed, details, strict=True)
        ]
        try:
            _check_same_phase(votes)
            answer = decide(votes)
            self._broadcast(vote.phase, messages.encode_answer(answer))
            return answer
        except ManagerBroken as error:
            if isinstance(error, Desync):
                self._broadcast(vote.phase, messages.encode_error(error))
            raise
        except DistckptError as error:
            self._broadcast(vote.phase, messages.encode_error(error))
            raise
        except BaseException as error:
            # The others must not wait for an answer that never comes.
            text = f"on the chief: {type(error).__name__}: {error}"
            failed = RanksFailed(text, {0: text})
            self._broadcast(vote.phase, messages.encode_error(failed))
            if isinstance(error, Exception):
                raise failed from error
            raise

    def _gather_details(self, vote: Vote, packed: Sequence[bytes]) -> list[bytes]:
        lengths = [messages.detail_length(data) for data in packed]
        if not any(lengths):
            return [b""] * len(packed)
        longest = max(lengths)
        self._broadcast_frame(vote.phase, _SEND_DETAILS, longest, b"")
        padded = self._gather(vote.phase, vote.detail.ljust(longest, b"\0"))
        assert padded is not None
        return [data[:length] for data, length in zip(padded, lengths, strict=True)]

    def _consult_as_rank(self, vote: Vote) -> Answer:
        self._gather(vote.phase, vote.pack(self.rank))
        kind, length, inline = self._receive_frame(vote.phase)
        if kind == _SEND_DETAILS:
            self._gather(vote.phase, vote.detail.ljust(length, b"\0"))
            kind, length, inline = self._receive_frame(vote.phase)
        if length > len(inline):
            inline = self._broadcast_bytes(vote.phase, bytes(length))
        return messages.decode_answer(inline[:length])

    def _broadcast(self, phase: Phase, data: bytes) -> None:
        room = _FRAME_BYTES - _FRAME.size
        fits = len(data) <= room
        self._broadcast_frame(phase, _ANSWER, len(data), data if fits else b"")
        if not fits:
            self._broadcast_bytes(phase, data)

    def _broadcast_frame(self, phase: Phase, kind: int, length: int, inline: bytes) -> None:
        frame = (_FRAME.pack(kind, length) + inline).ljust(_FRAME_BYTES, b"\0")
        self._broadcast_bytes(phase, frame)

    def _receive_frame(self, phase: Phase) -> tuple[int, int, bytes]:
        frame = self._broadcast_bytes(phase, bytes(_FRAME_BYTES))
        kind, length = _FRAME.unpack_from(frame)
        return kind, length, frame[_FRAME.size :]

    def _gather(self, phase: Phase, data: bytes) -> list[bytes] | None:
        tensor = _tensor(data)
        parts = (
            [torch.empty_like(tensor) for _ in range(self.world_size)]
            if self.rank == 0
            else None
        )
        self._wait(
            phase,
            lambda: dist.gather(
                tensor, parts, dst=self._chief, group=self._group, async_op=True
            ),
        )
        return None if parts is None else [part.numpy().tobytes() for part in parts]

    def _broadcast_bytes(self, phase: Phase, data: bytes) -> bytes:
        tensor = _tensor(data)
        self._wait(
            phase,
            lambda: dist.broadcast(
                tensor, src=self._chief, group=self._group, async_op=True
            ),
        )
        return tensor.numpy().tobytes()

    def _wait(self, phase: Phase, start: Callable[[], Any]) -> None:
        """Post a collective and poll it, so that the deadline is ours, not gloo's."""
        deadline = time.monotonic() + self._timeout_seconds
        pause = _FIRST_POLL_SECONDS
        try:
            work = start()
            while not work.is_completed():
                if time.monotonic() > deadline:
                    raise self._timed_out(phase)
                time.sleep(pause)
                pause = min(2 * pause, _LAST_POLL_SECONDS)
            work.wait()
        except RuntimeError as error:
            if "timed out" in str(error).lower():
                raise self._timed_out(phase) from error
            reason = str(error).partition(". This is typically")[0]
            msg = (
                f"rank {self.rank} of {self.world_size}, phase {phase.name}: another rank "
                "has probably died, the connection to it broke. This manager is broken; "
                f"let the launcher restart the job. ({reason})"
            )
            raise PeerLost(msg) from error

    def _timed_out(self, phase: Phase) -> PeerTimeout:
        return PeerTimeout(
            f"rank {self.rank} of {self.world_size}, phase {phase.name}: another rank did "
            f"not arrive within {self._timeout_seconds:g} s. It is stopped, hangs, or did "
            "not make this call. This manager is broken; let the launcher restart the job."
        )

    def close(self) -> None:
        """See ``Channel.close``."""
        if not self._broken:
            self._broken = "this manager is closed."
            # The user may have destroyed all groups already.
            with suppress(Exception):
                dist.destroy_process_group(self._group)
            # Its threads and connections end with the last reference; an exception's
            # traceback may keep this object for long.
            self._group = None


def open_channels(
    process_group: dist.ProcessGroup | None, timeout: timedelta, count: int
) -> list[Channel]:
    """Make channels over all ranks of a process group: collective.

    Args:
        process_group: Its members are the manager's ranks; None means the default
            group, or this process alone where none is initialized. Any backend.
        timeout: How long any wait may take.
        count: How many; one for each thread that talks.

    Raises:
        PeerTimeout, PeerLost: Not every rank came.
    """
    if not dist.is_available() or not dist.is_initialized():
        if process_group is not None:
            msg = "process_group was given, but torch.distributed is not initialized."
            raise ConfigError(msg)
        return [SoloChannel() for _ in range(count)]
    if dist.get_rank(process_group) < 0:
        msg = f"rank {dist.get_rank()} is not a member of the given process_group."
        raise ConfigError(msg)
    if dist.get_world_size(process_group) == 1:
        return [SoloChannel() for _ in range(count)]
    members = None
    if process_group is not None:
        members = dist.get_process_group_ranks(process_group)
        if len(members) == dist.get_world_size():
            members = None
    channels: list[Channel] = []
    for _ in range(count):
        try:
            group = dist.new_group(
                members,
                timeout=timeout,
                backend="gloo",
                # Ranks outside process_group do not take part.
                use_local_synchronization=members is not None,
            )
        except RuntimeError as error:
            msg = f"not every rank came to make a manager: {error}"
            raise PeerTimeout(msg) from error
        channels.append(GroupChannel(group, timeout))
    return channels


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
