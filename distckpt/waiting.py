"""How one rank waits for the others: for how long, and what it says then.

A wait ends by what is waited for, by the news that a rank is gone, or at its deadline,
which calls the roll: nobody waits for ever, and nobody gives up without a name.
"""

from __future__ import annotations

import time

from distckpt.errors import ManagerBroken, PeerLost, PeerTimeout
from distckpt.liveness import HERE, Liveness, Place, Verdict
from distckpt.messages import Phase
from distckpt.worker import Worker

# What all others have received already counts for more than the news that one of them
# has gone since.
_NEWS_GRACE_SECONDS = 0.1
# All ranks are there at the deadline: the answer of the last to come is on its way.
_LAST_GRACE_SECONDS = 0.3


class Whereabouts:
    """Where this rank is: set by the thread that makes the calls, told by another one.

    Args:
        worker: Whose call into the filesystem belongs to the picture.

    Attributes:
        place: In which round of which channel; or what it does instead.
    """

    def __init__(self, worker: Worker) -> None:
        self._worker = worker
        self._reached: dict[str, int] = {}
        self.place = Place("", 0, False, "in no call of this manager", self._reached)

    def be_at(self, text: str) -> None:
        """Note what this rank does while it waits for nobody."""
        self.place = Place("", 0, False, text, self._reached)

    def come_to(self, channel: str, text: str) -> Place:
        """Note that this rank has come to the next round of a channel."""
        reached = self._reached.get(channel, 0) + 1
        # A new one: the other thread may be telling the last.
        self._reached = {**self._reached, channel: reached}
        self.place = Place(channel, reached, False, text, self._reached)
        return self.place

    def decide(self, text: str) -> None:
        """Note that this rank, the chief, works on the answer of the round it is in."""
        self.place = self.place._replace(decides=True, text=text)

    def __call__(self) -> Place:
        """Tell where this rank is, with what its storage work is in."""
        place, call = self.place, self._worker.current_call
        if call is None:
            return place
        seconds = time.monotonic() - call.since
        text = f"{place.text}, since {seconds:.1f} s in {call.operation} {call.path}"
        return place._replace(text=text)


class Waiting:
    """One wait of one rank, in one round of votes and answer.

    Args:
        who: This rank, for messages.
        phase: What it waits in.
        timeout_seconds: How long at most.
        place: The same, for the roll call.
        liveness: Tells who is missing; None before the ranks are connected.
        patient: Whether the time counts from the last progress of any rank.
    """

    def __init__(
        self,
        who: str,
        phase: Phase,
        timeout_seconds: float,
        place: Place,
        liveness: Liveness | None,
        patient: bool,
    ) -> None:
        self._who = who
        self._phase = phase
        self._timeout_seconds = timeout_seconds
        self._place = place
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
        found = self._liveness.call_roll(self._place)
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
            found = self._liveness.call_roll(self._place, broken=True)
        if not isinstance(found, Verdict):
            found = Verdict(True, (), "another rank has probably died.")
        return self._error(found._replace(text=f"{found.text} ({reason})"))

    def _error(self, verdict: Verdict) -> ManagerBroken:
        return broken_by(verdict, f"{self._who}, waiting in phase {self._phase.name}")


def broken_by(verdict: Verdict, who: str) -> ManagerBroken:
    """Make the error that ends a manager because of what happened to another rank."""
    error_class = PeerLost if verdict.died else PeerTimeout
    msg = f"{who}: {verdict.text} This manager is broken; let the launcher restart the job."
    return error_class(msg, verdict.ranks)
