"""What the ranks ask each other now and then: told to stop? is a save due, or asked for?

And, when told to stop, whether there is time for one more save.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

from distckpt import words
from distckpt.agree import Ran, agree
from distckpt.cadence import Cadence
from distckpt.comm import Answer
from distckpt.errors import SaveFailed
from distckpt.messages import Phase, Vote, raise_failures
from distckpt.session import Session

_logger = logging.getLogger(__name__)

# About how often to ask.
_ASK_SECONDS = 1.0
_MAX_NAMED = 4


class Asked(NamedTuple):
    """What a call of ``save()`` has learned.

    Attributes:
        told_to_stop: Whether it is to save because the job is told to stop, however it
            goes on, if there is anything new.
        due: Why else it is to save, whatever the step says, if there is anything new.
    """

    told_to_stop: bool = False
    due: tuple[str, ...] = ()


_NOTHING = Asked()


def ask(session: Session, cadence: Cadence) -> Asked:
    """Ask now and then what no rank can tell by itself: all at the same call.

    Called by: every rank, first thing in ``save()``. Collectives: one round about every
    second, if there are rules that need it: ``on_signal``, until all know that the job is
    told to stop, those of time and ``on_request``.
    """
    stop = cadence.stop
    always_asks = bool(cadence.gate.when.clocked or cadence.gate.when.asked)
    if stop is None and not always_asks:
        return _NOTHING
    due: tuple[str, ...] = ()
    if always_asks or (stop is not None and not stop.agreed):
        cadence.calls_left -= 1
        if cadence.calls_left <= 0:
            answer = _ask(session, cadence)
            cadence.calls_left, due = answer["calls"], tuple(answer["due"])
            if stop is not None and not stop.agreed and answer["told"]:
                stop.agreed = stop.is_due = True
                stop.notice.take()
                if session.chief is not None:
                    ranks = words.ranks(answer["told"])
                    _logger.warning("told to stop (%s): saving once more", ranks)
    return Asked(stop is not None and stop.agreed and stop.is_due, due)


def has_time_to_save(session: Session, cadence: Cadence) -> bool:
    """Agree on whether a save can end before the job is ended.

    Called by: every rank, when all have agreed to stop. Collectives: one round.
    """
    assert cadence.stop is not None
    answer = _ask(session, cadence)
    if answer["has_time"]:
        return True
    cadence.stop.is_due = False
    if session.chief is not None:
        _logger.warning(
            "no save before the end: earlier ones took up to %s, and of the grace period "
            "%s are left",
            *(words.took(answer["needed"]), words.duration(max(0.0, answer["left"]))),
        )
    return False


def note_saved(cadence: Cadence) -> None:
    """Note that the newest state is saved: nothing is left to be done before the end."""
    assert cadence.stop is not None
    cadence.stop.is_due = False


def answer_requests(session: Session, cadence: Cadence) -> None:
    """Answer who asks for a save, when there is nothing that is not saved yet."""
    if session.chief is not None and cadence.requested:
        session.chief.answer(cadence.requested)


def _ask(session: Session, cadence: Cadence) -> Answer:
    stop = cadence.stop
    looked = Ran(lambda: _look(session, cadence))

    def says(seconds: float | None) -> Vote:
        # In milliseconds, one more than there are: 0 says that nobody has told it.
        told = 0 if seconds is None else 1 + int(1000 * seconds)
        return Vote(Phase.ASK, size_bytes=told)

    def decide(votes: Sequence[Vote]) -> Answer:
        raise_failures(votes, "save() was refused", SaveFailed)
        told = [vote.rank for vote in votes if vote.size_bytes]
        passed = max(vote.size_bytes for vote in votes) / 1000
        grace = 0.0 if stop is None else stop.grace_period_seconds
        needed = max(cadence.save_seconds, default=0.0)
        return {
            "told": told[:16],
            "has_time": needed <= grace - passed,
            "needed": float(needed),
            "left": float(grace - passed),
            "calls": cadence.pace.calls_in(_ASK_SECONDS),
            "due": _due(cadence),
        }

    return agree(session.decisions, Phase.ASK, looked, decide, says=says)


def _due(cadence: Cadence) -> list[str]:
    due = [] if cadence.clock is None else cadence.clock.due()
    asking = [request.by for request in cadence.requested[:_MAX_NAMED]]
    return due + [f"{cadence.gate.when.asked}: asked for by {', '.join(asking)}"] * bool(
        asking
    )


def _look(session: Session, cadence: Cadence) -> float | None:
    """Return since how many seconds this rank is told to stop; None if it is not."""
    if cadence.requests is not None:
        cadence.requested = cadence.requests.look(session.check_alive) or []
    if cadence.stop is None:
        return None
    notice, file = cadence.stop.notice, cadence.stop.file
    if notice.since is None and file is not None and file.look(session.check_alive):
        notice.note()
    return None if notice.since is None else time.monotonic() - notice.since
