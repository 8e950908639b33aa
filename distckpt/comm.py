"""How ranks talk: one round of votes up and the chief's answer down.

Every exchange of the protocol is one ``consult``: all ranks vote, the chief decides, all
ranks get the same answer or raise the same error. Since a rank's errors are votes too,
every rank makes the same collectives in the same order, whatever happens on it.

Messages go over gloo groups of the manager's own: training's collectives cannot
interleave with them, and they need no device.
"""

from __future__ import annotations

import ctypes
import struct
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
import torch.distributed as dist

from distckpt import messages, words
from distckpt.errors import (
    Desync,
    DistckptError,
    FencedError,
    ManagerBroken,
    RanksFailed,
    RestoreFailed,
    StorageTimeout,
)
from distckpt.liveness import Liveness, Round
from distckpt.messages import Phase, Vote, call_of, place_of
from distckpt.waiting import Lane, Waiting

Answer: TypeAlias = dict[str, Any]
Decide: TypeAlias = Callable[[Sequence[Vote]], Answer]
# What it means for all ranks that the chief has left its work before it was done, because a
# call hangs or somebody is in a hurry.
Judge: TypeAlias = Callable[[DistckptError], DistckptError]


def as_it_is(error: DistckptError) -> DistckptError:
    """Take it for nothing else."""
    return error


class How(NamedTuple):
    """In which manner ranks consult each other.

    Attributes:
        patient: Wait for as long as any rank makes progress.
        hung: Makes what all ranks raise if the chief leaves its work undone.
        at_once: The chief decides without any storage work, even while other such work of
            the manager goes on.
    """

    patient: bool = False
    hung: Judge = as_it_is
    at_once: bool = False


AS_USUAL = How()


# An answer nearly always fits into one message of fixed size; a longer one follows.
_FRAME_BYTES = 512
_FRAME = struct.Struct("<BI")
_ANSWER, _SEND_DETAILS = 0, 1

# Often at first: nearly always the others are there, and what is waited for takes less
# than a millisecond. Then less and less often, by the time that it has taken already: a
# save behind the training loop waits for seconds, and every look takes time of the loop.
_FIRST_POLL_SECONDS = 50e-6
_FIRST_POLLS = 60
_POLLS_PER_TIME = 20
_LAST_POLL_SECONDS = 20e-3
# How many shipments are under way at once: gloo works at two, others are made ready.
SHIPMENTS_UNDER_WAY = 3
# gloo's own limit for one operation. Ours come first, and they can be moved.
_OPERATION_TIMEOUT = timedelta(days=7)


# What was under way when a channel broke: it may still arrive, and fills memory then.
_adrift: list[Any] = []


class Shipment(NamedTuple):
    """Bytes that one rank has and all others get.

    Attributes:
        root: The rank that has them.
        memory: One-dimensional bytes on the host: what it has, or room for them.
        arrived: Called once they are there; on that rank, once they are sent.
    """

    root: int
    memory: torch.Tensor
    arrived: Callable[[], None]


class Channel(Protocol):
    """A way to reach all ranks of a manager, in one order.

    Attributes:
        lane: Of the thread that makes the calls.
        rank: This rank in the manager's group.
        world_size: Number of ranks.
        members: What torch's default group calls each of them.
    """

    lane: Lane
    rank: int
    world_size: int
    members: tuple[int, ...]

    def consult(self, vote: Vote, decide: Decide, how: How = AS_USUAL) -> Answer:
        """Vote, let the chief decide, and return its answer: collective.

        Args:
            vote: This rank's word.
            decide: Called on the chief alone, with one vote a rank; returns the answer,
                or raises what every rank then raises.
            how: In which manner.

        Raises:
            DistckptError: What ``decide`` raised, on every rank.
            ManagerBroken: A peer was lost, or is elsewhere; the channel is dead.
        """

    def exchange(self, phase: Phase, shipments: Iterator[Shipment]) -> None:
        """Send bytes from each rank to all others: collective.

        Args:
            phase: Where in the protocol.
            shipments: Of the same roots and sizes, in the same order, on every rank. Each
                is asked for when there is room for it under way; what it raises breaks
                the channel, because the others wait for it.

        Raises:
            ManagerBroken: A peer was lost, or is elsewhere; the channel is dead, and
                whatever is under way keeps its memory.
        """

    def close(self, reason: str = "") -> None:
        """Give the group back.

        Args:
            reason: Why, if other ranks may not be done with it.
        """


class SoloChannel:
    """One rank: the same code path without a process group."""

    rank = 0
    world_size = 1

    def __init__(self, lane: Lane, member: int = 0) -> None:
        self.lane = lane
        self.members: tuple[int, ...] = (member,)

    def consult(self, vote: Vote, decide: Decide, how: How = AS_USUAL) -> Answer:
        """See ``Channel.consult``."""
        if how.at_once:
            return decide([vote])
        try:
            return self.lane.worker.finish(lambda: decide([vote]))
        except StorageTimeout as error:
            judged = how.hung(error)
            if judged is error:
                raise
            raise judged from error

    def exchange(self, phase: Phase, shipments: Iterator[Shipment]) -> None:
        """See ``Channel.exchange``: there is nobody to send to."""
        for shipment in shipments:
            shipment.arrived()

    def close(self, reason: str = "") -> None:
        """See ``Channel.close``."""


class GroupChannel:
    """All ranks of a private gloo group; group rank 0 is the chief.

    Args:
        lane: Of the thread that makes the calls; its name tells the channels apart.
        group: A gloo backend, used by nobody else.
        rank: This rank in it.
        members: What torch's default group calls its ranks.
        timeout: How long to wait for another rank.

    Attributes:
        liveness: Tells who is missing; None until the ranks are connected.
    """

    def __init__(
        self,
        lane: Lane,
        group: Any,
        rank: int,
        members: Sequence[int],
        timeout: timedelta,
    ) -> None:
        self.lane = lane
        self._group = group
        self._timeout_seconds = timeout.total_seconds()
        self._broken = ""
        self.liveness: Liveness | None = None
        self.rank = rank
        self.members = tuple(members)
        self.world_size = len(members)

    def consult(self, vote: Vote, decide: Decide, how: How = AS_USUAL) -> Answer:
        """See ``Channel.consult``."""
        if self._broken:
            raise ManagerBroken(self._broken)
        text = f"waiting in {place_of(vote.phase)}"
        waiting = self._waiting(vote.phase, self.lane.come_to(text), how.patient)
        try:
            if self.rank == 0:
                return self._consult_as_chief(waiting, vote, decide, how)
            return self._consult_as_rank(waiting, vote)
        except BaseException as error:
            # All but an answer of the chief: a collective may be left outstanding.
            if not isinstance(error, DistckptError) or isinstance(error, ManagerBroken):
                self._break(messages.describe(error))
            raise
        finally:
            self.lane.be_at(f"in {place_of(vote.phase)}, past it")

    def exchange(self, phase: Phase, shipments: Iterator[Shipment]) -> None:
        """See ``Channel.exchange``."""
        if self._broken:
            raise ManagerBroken(self._broken)
        round_ = self.lane.come_to(f"exchanging tensors in {place_of(phase)}")
        waiting = self._waiting(phase, round_, patient=True)
        under_way: deque[tuple[Any, Shipment]] = deque()
        try:
            while True:
                if len(under_way) == SHIPMENTS_UNDER_WAY:
                    _arrive(waiting, *under_way[0])
                    under_way.popleft()
                shipment = next(shipments, None)
                if shipment is None:
                    break
                work = _post(waiting, partial(self._ship, shipment))
                under_way.append((work, shipment))
            while under_way:
                _arrive(waiting, *under_way[0])
                under_way.popleft()
        except BaseException as error:
            # Collectives are left outstanding, or the others wait for some.
            for work, _ in under_way:
                _keep_for_ever(work)
                _adrift.append(work)
            self._break(messages.describe(error))
            raise
        finally:
            self.lane.be_at(f"in {place_of(phase)}, past it")

    def _ship(self, shipment: Shipment) -> Any:
        options = dist.BroadcastOptions()
        options.rootRank = shipment.root
        options.rootTensor = 0
        options.timeout = _OPERATION_TIMEOUT
        return self._group.broadcast([shipment.memory], options)

    def _break(self, reason: str) -> None:
        if not self._broken:
            self._broken = reason
            _keep_for_ever(self._group)

    def _waiting(self, phase: Phase, round_: Round, patient: bool = False) -> Waiting:
        who = f"rank {self.rank} of {self.world_size}"
        return Waiting(who, phase, self._timeout_seconds, round_, self.liveness, patient)

    def _consult_as_chief(
        self, waiting: Waiting, vote: Vote, decide: Decide, how: How
    ) -> Answer:
        packed = self._gather(waiting, vote.pack())
        assert packed is not None
        details = self._gather_details(waiting, vote, packed)
        votes = messages.unpack_votes(packed, details)
        self.lane.decide(f"deciding in {place_of(vote.phase)}")
        try:
            _check_same_phase(votes)
            if how.at_once:
                answer = decide(votes)
            else:
                # Not on this thread: a call that hangs must not hold up the others.
                answer = self.lane.worker.finish(lambda: decide(votes))
        except DistckptError as error:
            judged = how.hung(error) if isinstance(error, StorageTimeout) else error
            try:
                self._answer(vote.phase, messages.encode_error(judged))
            except ManagerBroken as broken:
                # A chief that was away for long: its peers have gone, and a newer one has
                # the directory. That is the reason, and says more than that they went.
                if isinstance(error, FencedError):
                    raise error from broken
                raise
            if judged is error:
                raise
            raise judged from error
        except BaseException as error:
            # The others must not wait for an answer that never comes.
            text = f"on the chief: {messages.describe(error)}"
            failed: DistckptError = RanksFailed(text, {0: text})
            if not isinstance(error, Exception):
                failed = how.hung(failed)  # Ctrl-C again: what was begun goes on alone
            self._answer(vote.phase, messages.encode_error(failed))
            if isinstance(error, Exception):
                raise failed from error
            raise
        self._answer(vote.phase, messages.encode_answer(answer))
        return answer

    def _answer(self, phase: Phase, data: bytes) -> None:
        waiting = self._waiting(phase, Round(self.lane.name, self.lane.reached))
        room = _FRAME_BYTES - _FRAME.size
        fits = len(data) <= room
        self._broadcast_frame(waiting, _ANSWER, len(data), data if fits else b"")
        if not fits:
            self._broadcast(waiting, data)

    def _gather_details(
        self, waiting: Waiting, vote: Vote, packed: Sequence[bytes]
    ) -> list[bytes]:
        lengths = messages.detail_lengths(packed)
        if not any(lengths):
            return [b""] * len(packed)
        longest = max(lengths)
        self._broadcast_frame(waiting, _SEND_DETAILS, longest, b"")
        padded = self._gather(waiting, vote.detail.ljust(longest, b"\0"))
        assert padded is not None
        return [data[:length] for data, length in zip(padded, lengths, strict=True)]

    def _consult_as_rank(self, waiting: Waiting, vote: Vote) -> Answer:
        self._gather(waiting, vote.pack())
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
        parts = [torch.empty_like(tensor) for _ in range(self.world_size)]
        options = dist.GatherOptions()
        options.rootRank = 0
        options.timeout = _OPERATION_TIMEOUT
        output = [parts] if self.rank == 0 else []
        _wait(waiting, lambda: group.gather(output, [tensor], options))
        return [part.numpy().tobytes() for part in parts] if self.rank == 0 else None

    def _broadcast(self, waiting: Waiting, data: bytes) -> bytes:
        group, tensor = self._group, _tensor(data)
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = _OPERATION_TIMEOUT
        _wait(waiting, lambda: group.broadcast([tensor], options))
        return tensor.numpy().tobytes()

    def close(self, reason: str = "") -> None:
        """See ``Channel.close``."""
        if self.liveness is not None:
            self.liveness.leave(reason)
        if not self._broken:
            self._broken = "this manager is closed."
            # Its threads and connections end with the last reference; an exception's
            # traceback may keep this object for long.
            self._group = None


def _wait(waiting: Waiting, start: Callable[[], Any]) -> None:
    """Post a collective and poll it, so that the deadline is ours, not gloo's."""
    _poll(waiting, _post(waiting, start))


def _arrive(waiting: Waiting, work: Any, shipment: Shipment) -> None:
    _poll(waiting, work)
    shipment.arrived()


def _post(waiting: Waiting, start: Callable[[], Any]) -> Any:
    try:
        return start()
    except RuntimeError as error:
        raise waiting.connection_broke(error) from error


def _poll(waiting: Waiting, work: Any) -> None:
    pause, num_polls, since = _FIRST_POLL_SECONDS, 0, time.monotonic()
    try:
        while not work.is_completed():
            try:
                waiting.go_on()
            except ManagerBroken:
                if work.is_completed():  # it came while the roll was called
                    break
                raise
            time.sleep(pause)
            num_polls += 1
            if num_polls > _FIRST_POLLS:
                waited = time.monotonic() - since
                pause = min(waited / _POLLS_PER_TIME, _LAST_POLL_SECONDS)
        work.wait()
    except RuntimeError as error:
        raise waiting.connection_broke(error) from error
    except BaseException:
        _keep_for_ever(work)  # it goes on
        raise
    waiting.got_something()


def check_nothing_adrift() -> None:
    """Raise ``RestoreFailed`` if a broken manager's exchange may still fill tensors."""
    _adrift[:] = [work for work in _adrift if not work.is_completed()]
    if _adrift:
        msg = (
            "another manager of this process lost a rank while it was receiving tensors, "
            "which may still arrive, and in the midst of training. Restart the process."
        )
        raise RestoreFailed(msg)


def _keep_for_ever(broken: object) -> None:
    """Keep a broken group, or its operation, so that the process can exit at once.

    The destructor of a group waits for operations that will never end. torch 2.9 aborts
    the process if a thread of gloo's drops the last reference to an operation while the
    interpreter ends. A reference in a global would not do: the interpreter drops those on
    its way out.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(broken))


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _check_same_phase(votes: Sequence[Vote]) -> None:
    ranks_in: dict[Phase, list[int]] = {}
    for vote in votes:
        ranks_in.setdefault(vote.phase, []).append(vote.rank)
    if len(ranks_in) > 1:
        is_one_call = len({*map(call_of, ranks_in)}) == 1
        name = place_of if is_one_call else call_of
        where = [
            f"{words.ranks(ranks)} {'is' if len(ranks) == 1 else 'are'} in {name(phase)}"
            for phase, ranks in ranks_in.items()
        ]
        msg = (
            f"ranks are in different calls: {'; '.join(where)}. Every rank must make the "
            "same calls of the manager in the same order."
        )
        raise Desync(msg)
