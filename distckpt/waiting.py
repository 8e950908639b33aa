"""How one rank waits for the others: for how long, and what it says then.

A wait ends by what is waited for, by the news that a rank is gone, or at its deadline,
which calls the roll: nobody waits for ever, and nobody gives up without a name.
"""

from __future__ import annotations

import time

from distckpt.errors import ManagerBroken, PeerLost, PeerTimeout
from distckpt.liveness import HERE, Liveness, Place, Round, Verdict
from distckpt.messages import Phase, place_of
from distckpt.worker import Worker

# What all others have received already counts for more than the news that one of them
# has gone since.
_NEWS_GRACE_SECONDS = 0.1
# All ranks are there at the deadline: the answer of the last to come is on its way.
_LAST_GRACE_SECONDS = 0.3


class Whereabouts:
    """Where this rank is with all its threads, for the thread that tells others."""

    def __init__(self) -> None:
        self._lanes: list[Lane] = []

    def lane(self, name: str, worker: Worker, idle: str) -> Lane:
        """Add a thread's way through the protocol; see ``Lane``."""
        lane = Lane(name, worker, idle)
        self._lanes.append(lane)
        return lane

    def __call__(self) -> Place:
        """Tell where this rank is, with what its storage work is in."""
        first, *others = self._lanes
        texts = [first.text(), *(lane.text() for lane in others if not lane.is_idle)]
        return Place(
            "; ".join(texts),
            {lane.name: lane.reached for lane in self._lanes},
            tuple(lane.name for lane in self._lanes if lane.decides),
        )


class Lane:
    """One thread's way through the protocol: where it is, and who works for it.

    Set by that thread, told by another one.

    Args:
        name: Of its channel.
        worker: Does its storage work.
        idle: What it does when it does nothing.

    Attributes:
        name: The same.
        worker: The same.
        reached: The last round of the channel that it has come to.
        decides: Whether this rank is the chief, has all votes, and works on the answer.
        is_idle: Whether it does nothing.
    """

    def __init__(self, name: str, worker: Worker, idle: str) -> None:
        self.name = name
        self.worker = worker
        self.reached = 0
        self.decides = False
        self.is_idle = True
        self._idle = idle
        self._text = idle

    def be_at(self, text: str) -> None:
        """Note what it does while it waits for nobody."""
        self.is_idle = self.decides = False
        self._text = text

    def be_idle(self) -> None:
        """Note that it is through with what it did."""
        self.is_idle, self.decides = True, False
        self._text = self._idle

    def come_to(self, text: str) -> Round:
        """Note that it has come to the next round of its channel."""
        self.be_at(text)
        self.reached += 1
        return Round(self.name, self.reached)

    def decide(self, text: str) -> None:
        """Note that this rank, the chief, works on the answer of the round it is in."""
        self._text, self.decides = text, True

    def text(self) -> str:
        """Say where it is, for people."""
        text, call = self._text, self.worker.current_call
        if call is None:
            return text
        seconds = time.monotonic() - call.since
        return f"{text}, since {seconds:.1f} s in {call.operation} {call.path}"


class Waiting:
    """One wait of one rank, in one round of votes and answer.

    Args:
        who: This rank, for messages.
        phase: What it waits in.
        timeout_seconds: How long at most.
        round_: The same, for the roll call.
        liveness: Tells who is missing; None before the ranks are connected.
        patient: Whether the time counts from the last progress of any rank.
    """

    def __init__(
        self,
        who: str,
        phase: Phase,
        timeout_seconds: float,
        round_: Round,
        liveness: Liveness | None,
        patient: bool,
    ) -> None:
        self._who = who
        self._phase = phase
        self._timeout_seconds = timeout_seconds
        self._round = round_
        self._liveness = liveness
        self._patient = patient
        self._since = time.monotonic()
        self._graced_until: float | None = None
        self._news_since: float | None = None

    def go_on(self) -> None:
        """Return if it is right to wait on.

        Raises:
            PeerLost: A rank is gone.
            PeerTimeout: The deadline has passed, and a rank is missing.
        """
        now = time.monotonic()
        if self._liveness is not None and self._liveness.verdict is not None:
            self._news_since = self._news_since or now
            if now - self._news_since > _NEWS_GRACE_SECONDS:
                raise self._error(self._liveness.verdict)
        elif now > self._deadline():
            self._at_deadline()

    def _deadline(self) -> float:
        if self._graced_until is not None:
            return self._graced_until
        since = self._since
        if self._patient and self._liveness is not None:
            since = max(since, self._liveness.last_progress)
        return since + self._timeout_seconds

    def _at_deadline(self) -> None:
        late = (
            f"not every rank came within {self._timeout_seconds:g} s. One is stopped, "
            "hangs, or did not make this call."
        )
        if self._liveness is None:
            raise self._error(Verdict(False, (), late))
        found = self._liveness.call_roll(self._round)
        if isinstance(found, Verdict):
            raise self._error(found)
        if found != HERE:
            # The chief is at work. How long that may take is limited there.
            self._since, self._graced_until = time.monotonic(), None
        elif self._graced_until is None:
            self._graced_until = time.monotonic() + _LAST_GRACE_SECONDS
        else:
            late = "all ranks are here, but what they send does not arrive."
            raise self._error(Verdict(False, (), late))

    def got_something(self) -> None:
        """Count the time anew: the round has gone on."""
        self._since, self._graced_until = time.monotonic(), None

    def connection_broke(self, error: Exception) -> ManagerBroken:
        """Make the error for a collective that failed, as gloo says."""
        reason = str(error).partition(". This is typically")[0]
        found: Verdict | str = HERE
        if self._liveness is not None:
            found = self._liveness.call_roll(self._round, broken=True)
        if not isinstance(found, Verdict):
            # Only gloo knows anything.
            text = f"another rank has probably died ({reason})."
            found = Verdict(True, (), text)
        return self._error(found)

    def _error(self, verdict: Verdict) -> ManagerBroken:
        return broken_by(verdict, f"{self._who}, waiting in {place_of(self._phase)}")


def broken_by(verdict: Verdict, who: str) -> ManagerBroken:
    """Make the error that ends a manager because of what happened to another rank."""
    error_class = PeerLost if verdict.died else PeerTimeout
    msg = f"{who}: {verdict.text} This manager is broken; let the launcher restart the job."
    return error_class(msg, verdict.ranks)
