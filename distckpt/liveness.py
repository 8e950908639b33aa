"""Who is still there: a connection from every rank to the chief, watched by a thread.

gloo tells only some ranks that a peer has died, with an address and no rank, and nobody
that one is stopped. A connection of the manager's own does better. The kernel closes it
when a process ends, however it ends: the chief sees that within milliseconds and tells
all others. And when somebody waits for too long, the chief calls the roll over it: who
does not answer within half a second is stopped or cut off, who answers from elsewhere has
not made the call.

The threads only listen, blocked in ``select``. They decide nothing but who is missing,
and the first verdict is final.
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import NamedTuple

from distckpt import line
from distckpt.line import Address, Line, Message

_ROLL_SECONDS = 0.5
# For the chief's word on a roll call: the roll itself, and some more on a busy machine.
_WORD_SECONDS = 0.65
_PROGRESS_SECONDS = 0.25
_JOIN_SECONDS = 2.0
_MAX_NAMED = 16


class Place(NamedTuple):
    """Where in the protocol a rank is.

    Attributes:
        text: For people: the phase, the file.
        reached: The last round that it has come to, of each channel.
        deciding: The channels in which it is the chief, has all votes, and works on the
            answer.
    """

    text: str
    reached: dict[str, int]
    deciding: tuple[str, ...] = ()


class Round(NamedTuple):
    """One round of votes and answer that a rank waits in.

    Attributes:
        channel: Name of the channel.
        number: Which round of it, from 1 on.
    """

    channel: str
    number: int


class Verdict(NamedTuple):
    """What is the matter, once and for all.

    Attributes:
        died: Whether ranks are gone, rather than silent or elsewhere.
        ranks: Which.
        text: One sentence, for the error.
    """

    died: bool
    ranks: tuple[int, ...]
    text: str


WAIT, HERE = "wait", "here"


class Liveness:
    """Who is still there, as this rank knows it. The thread ends when this is dropped."""

    def __init__(self, loop: _Loop) -> None:
        self._loop = loop
        finalizer = weakref.finalize(self, loop.stop)
        finalizer.atexit = False  # the kernel closes the connections then
        loop.start()

    @property
    def verdict(self) -> Verdict | None:
        """What is the matter; None while nothing is known to be."""
        return self._loop.verdict

    @property
    def last_progress(self) -> float:
        """When any rank last told that it gets on, by ``time.monotonic``."""
        return self._loop.last_progress

    def note_progress(self) -> None:
        """Tell the ranks that wait that this one gets on with its work."""
        self._loop.note_progress()

    def call_roll(self, round_: Round, broken: bool = False) -> Verdict | str:
        """Find out who is missing; returns within a second.

        Args:
            round_: What this rank waits in.
            broken: Whether a connection broke, rather than the deadline passed.

        Returns:
            The verdict; or ``WAIT`` if the chief works on the answer, or ``HERE`` if all
            ranks are in this round, so that what is waited for must be on its way.
        """
        return self._loop.call_roll(round_, broken)

    def leave(self, reason: str = "") -> None:
        """Say goodbye and end the thread; with a reason, nobody waits for this rank."""
        self._loop.leave(reason)


def listen(world_size: int, token: str, where: Callable[[], Place]) -> ChiefLiveness:
    """Make the chief's side; ranks may connect from now on.

    Args:
        world_size: Number of ranks.
        token: What those who connect have to know.
        where: Tells where the chief is; called by the thread.
    """
    return ChiefLiveness(_ChiefLoop(world_size, token, where))


class ChiefLiveness(Liveness):
    """The chief's side, which the others connect to."""

    @property
    def address(self) -> Address:
        """Where it listens."""
        assert isinstance(self._loop, _ChiefLoop)
        return self._loop.address


def join(address: Address, rank: int, where: Callable[[], Place]) -> Liveness:
    """Connect a rank to the chief.

    Raises:
        OSError: The chief cannot be reached; says what was tried.
    """
    who = {"rank": rank, "name": f"rank {rank} (pid {os.getpid()} on {_host()})"}
    return Liveness(_RankLoop(line.connect(address, who), where))


def _host() -> str:
    return socket.gethostname()


class _Loop(ABC):
    """What both sides have in common: the thread, the verdict, progress."""

    def __init__(self, where: Callable[[], Place]) -> None:
        self.verdict: Verdict | None = None
        self.last_progress = time.monotonic()
        self._where = where
        self._told_progress = 0.0
        # What the chief says to a roll call that this rank asked for.
        self._word: str | None = None
        self._word_is_there = threading.Event()
        self._one_asks = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._wake_in, self._wake_out = socket.socketpair()
        self._wake_in.setblocking(False)
        line.close_in_children(self._wake_in)
        line.close_in_children(self._wake_out)
        self._selector.register(self._wake_in, selectors.EVENT_READ, self._do_jobs)
        # When to do what, if nothing has arrived that changes it.
        self._alarm: tuple[float, Callable[[], None]] | None = None
        self._jobs: list[Callable[[], None]] = []
        self._stopping = False
        self._thread = threading.Thread(
            target=self._run, name="distckpt-liveness", daemon=True
        )

    # Called by other threads

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        self._stopping = True
        self._submit(lambda: None)

    def leave(self, reason: str) -> None:
        def say_goodbye() -> None:
            self._send({"goodbye": reason})
            self._stopping = True

        self._submit(say_goodbye)
        self._thread.join(_JOIN_SECONDS)

    def note_progress(self) -> None:
        self.last_progress = now = time.monotonic()
        if now - self._told_progress >= _PROGRESS_SECONDS:
            self._told_progress = now
            self._send({"progress": True})

    def call_roll(self, round_: Round, broken: bool) -> Verdict | str:
        with self._one_asks:
            self._word = None
            self._word_is_there.clear()
            if self.verdict is None:  # from here on a verdict is a word, too
                self._ask(round_, broken)
                self._word_is_there.wait(_WORD_SECONDS)
            return self.verdict or self._word or self._no_word()

    # What the sides do differently

    @abstractmethod
    def _send(self, message: Mapping[str, object]) -> None:
        """Send to whom this side is connected."""

    @abstractmethod
    def _ask(self, round_: Round, broken: bool) -> None:
        """Have the roll called for this rank."""

    @abstractmethod
    def _no_word(self) -> Verdict | str:
        """Say what it means that the chief's thread has not answered in time."""

    @abstractmethod
    def _close(self) -> None:
        """Close all connections."""

    # The thread

    def _submit(self, job: Callable[[], None]) -> None:
        self._jobs.append(job)
        with suppress(OSError):
            self._wake_out.send(b"!")

    def _do_jobs(self) -> None:
        with suppress(OSError):
            self._wake_in.recv(4096)
        while self._jobs:
            self._jobs.pop(0)()

    def _run(self) -> None:
        try:
            while not self._stopping:
                for key, _ in self._selector.select(self._seconds_left()):
                    key.data()
                if self._alarm is not None and self._seconds_left() == 0:
                    self._alarm[1]()
        finally:
            self._close()
            self._selector.close()
            self._wake_in.close()
            self._wake_out.close()

    def _seconds_left(self) -> float | None:
        return None if self._alarm is None else max(0.0, self._alarm[0] - time.monotonic())

    def _take_word(self, word: str | None) -> None:
        self._word = word
        self._word_is_there.set()


class _RankLoop(_Loop):
    """A rank's side: one connection, to the chief."""

    def __init__(self, to_chief: Line, where: Callable[[], Place]) -> None:
        super().__init__(where)
        self._line = to_chief
        self._selector.register(to_chief, selectors.EVENT_READ, self._receive)

    def _send(self, message: Mapping[str, object]) -> None:
        self._line.send(message)

    def _ask(self, round_: Round, broken: bool) -> None:
        self._line.send({"ask": [*round_], "broken": broken})

    def _no_word(self) -> Verdict:
        text = (
            "rank 0, the chief, does not answer: it is stopped, or one of the two is cut "
            "off from the network."
        )
        return Verdict(False, (0,), text)

    def _receive(self) -> None:
        messages = self._line.receive()
        for message in messages or ():
            self._handle(message)
        if messages is None:
            self._lose_chief("rank 0, the chief, died: its connection closed.")

    def _handle(self, message: Message) -> None:
        if "roll" in message:
            self._line.send({"here": message["roll"], "place": [*self._where()]})
        elif "progress" in message:
            self.last_progress = time.monotonic()
        elif "word" in message:
            self._take_word(message["word"])
        elif "verdict" in message:
            died, ranks, text = message["verdict"]
            self.verdict = self.verdict or Verdict(died, tuple(ranks), text)
            self._take_word(None)
        elif "goodbye" in message:
            reason = message["goodbye"]
            self._lose_chief(f"rank 0, the chief, left: {reason}" if reason else "")

    def _lose_chief(self, text: str) -> None:
        """End: without the chief there is nothing more to learn."""
        if text:
            self.verdict = self.verdict or Verdict(True, (0,), text)
        self._take_word(None)
        self._stopping = True

    def _close(self) -> None:
        self._line.close()


@dataclass
class _Peer:
    """A rank as the chief sees it; rank 0 until it has said who it is."""

    line: Line
    rank: int = 0
    name: str = ""


@dataclass
class _Asker:
    """Somebody who has waited for too long; the peer is None for the chief itself."""

    peer: _Peer | None
    round: Round
    broken: bool


@dataclass
class _Roll:
    """A roll call under way."""

    number: int
    askers: list[_Asker]
    places: dict[int, Place] = field(default_factory=dict)


class _ChiefLoop(_Loop):
    """The chief's side: a connection to every other rank."""

    def __init__(self, world_size: int, token: str, where: Callable[[], Place]) -> None:
        super().__init__(where)
        self._world_size = world_size
        self._peers: dict[int, _Peer] = {}
        self._closed: dict[int, str] = {}
        self._roll: _Roll | None = None
        self._num_rolls = 0
        # Until all have joined, a connection that closes may be tried again.
        self._is_listening = True
        self._listener = line.listen(backlog=min(world_size, 4096))
        line.close_in_children(self._listener)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        port = self._listener.getsockname()[1]
        self.address = Address(line.hosts_of_this_machine(), port, token)

    def _send(self, message: Mapping[str, object]) -> None:
        for peer in list(self._peers.values()):
            peer.line.send(message)

    def _ask(self, round_: Round, broken: bool) -> None:
        self._submit(lambda: self._join_roll(_Asker(None, round_, broken)))

    def _no_word(self) -> str:
        return HERE  # this process is too busy to tell; the one who asks asks only once

    # Connections

    def _accept(self) -> None:
        with suppress(OSError):
            connection, _ = self._listener.accept()
            peer = _Peer(Line(connection))
            self._selector.register(
                peer.line, selectors.EVENT_READ, lambda: self._receive(peer)
            )

    def _receive(self, peer: _Peer) -> None:
        messages = peer.line.receive()
        for message in messages or ():
            self._handle(peer, message)
        if messages is None and self._drop(peer) and not self._is_listening:
            self._lose(peer, f"{peer.name} died: its connection closed.")

    def _drop(self, peer: _Peer) -> bool:
        """Close a connection; False if it is none of a rank, or no longer."""
        with suppress(KeyError, ValueError):
            self._selector.unregister(peer.line)
        peer.line.close()
        if self._peers.get(peer.rank) is not peer:
            return False
        del self._peers[peer.rank]
        return True

    def _handle(self, peer: _Peer, message: Message) -> None:
        if not peer.rank:
            self._admit(peer, message)
        elif "here" in message:
            if self._roll is not None and message["here"] == self._roll.number:
                self._roll.places[peer.rank] = Place(*message["place"])
                self._end_roll_if_complete(self._roll)
        elif "ask" in message:
            self._join_roll(_Asker(peer, Round(*message["ask"]), message["broken"]))
        elif "progress" in message:
            self.note_progress()  # tells all ranks, not more often than one would
        elif "goodbye" in message and self._drop(peer):
            reason = message["goodbye"]
            if reason:
                self._lose(peer, f"{peer.name} left: {reason}")
            else:
                self._closed[peer.rank] = f"{peer.name} has closed its manager."

    def _admit(self, peer: _Peer, message: Message) -> None:
        rank, name = message.get("rank"), message.get("name")
        if (
            message.get("token") != self.address.token
            or type(rank) is not int
            or not 0 < rank < self._world_size
        ):
            self._drop(peer)
            return
        # One that was welcomed too late has tried again.
        earlier = self._peers.get(rank)
        if earlier is not None:
            self._drop(earlier)
        peer.rank, peer.name = rank, str(name)
        self._peers[rank] = peer
        peer.line.welcome()
        if self.verdict is not None:
            self._announce()
        if len(self._peers) == self._world_size - 1:
            self._stop_listening()

    def _stop_listening(self) -> None:
        self._is_listening = False
        with suppress(KeyError, ValueError):
            self._selector.unregister(self._listener)
        self._listener.close()

    def _close(self) -> None:
        self._stop_listening()
        for key in list(self._selector.get_map().values()):
            if isinstance(key.fileobj, Line):
                key.fileobj.close()

    # The roll

    def _join_roll(self, asker: _Asker) -> None:
        if self.verdict is not None:
            self._announce()
            return
        if self._roll is not None:
            self._roll.askers.append(asker)
            return
        self._num_rolls += 1
        roll = self._roll = _Roll(self._num_rolls, [asker], {0: self._where()})
        self._alarm = (time.monotonic() + _ROLL_SECONDS, lambda: self._end_roll(roll))
        self._send({"roll": roll.number})
        self._end_roll_if_complete(roll)

    def _end_roll_if_complete(self, roll: _Roll) -> None:
        # Not a sum: a rank may answer first and close its manager then.
        if len({*roll.places, *self._closed}) == self._world_size:
            self._end_roll(roll)

    def _end_roll(self, roll: _Roll) -> None:
        self._roll = self._alarm = None
        missing = {*range(self._world_size)} - {*roll.places}
        silent = sorted(missing - {*self._closed})
        if silent:
            text = f"no answer from {self._names(silent)}: stopped, or cut off."
            self._judge(Verdict(False, tuple(silent), text))
        elif missing:
            text = " ".join(_first(self._closed.values()))
            self._judge(Verdict(True, tuple(sorted(missing)), text))
        # Many ask at the same time, all for the same round.
        behind: dict[Round, list[int]] = {}
        for asker in roll.askers:
            if asker.round not in behind:
                behind[asker.round] = _ranks_behind(asker.round, roll.places)
            self._answer(asker, behind[asker.round], roll.places)

    def _answer(
        self, asker: _Asker, behind: Sequence[int], places: Mapping[int, Place]
    ) -> None:
        if self.verdict is not None:
            return
        if behind:
            where = (
                f"{self._names([rank])} is {places[rank].text}"
                for rank in behind[: _MAX_NAMED + 1]
            )
            text = (
                f"not all ranks have come: {'; '.join(_first(where))}. Every rank has to "
                "make the call: not below 'if rank == 0'."
            )
            self._judge(Verdict(False, tuple(behind), text))
        elif asker.broken:
            text = "a connection between two ranks broke, though all ranks are alive."
            self._judge(Verdict(True, (), text))
        else:
            word = WAIT if asker.round.channel in places[0].deciding else HERE
            if asker.peer is None:
                self._take_word(word)
            else:
                asker.peer.line.send({"word": word})

    def _lose(self, peer: _Peer, text: str) -> None:
        self._judge(Verdict(True, (peer.rank,), text))

    def _judge(self, verdict: Verdict) -> None:
        """Settle what is the matter, and tell all; what follows from it changes nothing."""
        self.verdict = self.verdict or verdict
        self._announce()

    def _announce(self) -> None:
        assert self.verdict is not None
        died, ranks, text = self.verdict
        self._send({"verdict": [died, [*ranks], text]})
        self._take_word(None)

    def _names(self, ranks: Iterable[int]) -> str:
        return ", ".join(_first(self._name(rank) for rank in ranks))

    def _name(self, rank: int) -> str:
        if rank == 0:
            return "rank 0, the chief,"
        peer = self._peers.get(rank)
        return f"rank {rank}" if peer is None else peer.name


def _ranks_behind(round_: Round, places: Mapping[int, Place]) -> list[int]:
    """List who has not come to a round yet; being through it is having come."""
    return [
        rank
        for rank, place in sorted(places.items())
        if place.reached.get(round_.channel, 0) < round_.number
    ]


def _first(texts: Iterable[str]) -> list[str]:
    every = list(texts)
    more = [f"... ({len(every)} in all)"] if len(every) > _MAX_NAMED else []
    return every[:_MAX_NAMED] + more
