"""What the ranks ask each other now and then: told to stop? is a save due, or asked for?

And, when told to stop, whether there is time for one more save.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

from distckpt import words
from distckpt.comm import Answer
from distckpt.errors import SaveFailed
from distckpt.job import Job, Ran, agree
from distckpt.messages import Phase, Vote, raise_failures

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


def ask(job: Job) -> Asked:
    """Ask now and then what no rank can tell by itself: all at the same call.

    Called by: every rank, first thing in ``save()``. Collectives: one round about every
    second, if there are rules that need it: ``on_signal``, until all know that the job is
    told to stop, those of time and ``on_request``.
    """
    stop = job.stop
    always_asks = bool(job.gate.when.clocked or job.gate.when.asked)
    if stop is None and not always_asks:
        return _NOTHING
    due: tuple[str, ...] = ()
    if always_asks or (stop is not None and not stop.agreed):
        job.calls_left -= 1
        if job.calls_left <= 0:
            answer = _ask(job)
            job.calls_left, due = answer["calls"], tuple(answer["due"])
            if stop is not None and not stop.agreed and answer["told"]:
                stop.agreed = stop.is_due = True
                stop.notice.take()
                if job.chief is not None:
                    ranks = words.ranks(answer["told"])
                    _logger.warning("told to stop (%s): saving once more", ranks)
    return Asked(stop is not None and stop.agreed and stop.is_due, due)


def has_time_to_save(job: Job) -> bool:
    """Agree on whether a save can end before the job is ended.

    Called by: every rank, when all have agreed to stop. Collectives: one round.
    """
    assert job.stop is not None
    answer = _ask(job)
    if answer["has_time"]:
        return True
    job.stop.is_due = False
    if job.chief is not None:
        _logger.warning(
            "no save before the end: earlier ones took up to %s, and of the grace period "
            "%s are left",
            *(words.took(answer["needed"]), words.duration(max(0.0, answer["left"]))),
        )
    return False


def note_saved(job: Job) -> None:
    """Note that the newest state is saved: nothing is left to be done before the end."""
    assert job.stop is not None
    job.stop.is_due = False


def answer_requests(job: Job) -> None:
    """Answer who asks for a save when there is nothing that is not saved yet."""
    if job.chief is not None and job.flight is None and job.requested:
        job.chief.answer(job.requested)


def _ask(job: Job) -> Answer:
    stop = job.stop
    looked = Ran(lambda: _look(job))

    def says(seconds: float | None) -> Vote:
        # In milliseconds, one more than there are: 0 says that nobody has told it.
        told = 0 if seconds is None else 1 + int(1000 * seconds)
        return Vote(Phase.ASK, size_bytes=told)

    def decide(votes: Sequence[Vote]) -> Answer:
        raise_failures(votes, "save() was refused", SaveFailed)
        told = [vote.rank for vote in votes if vote.size_bytes]
        passed = max(vote.size_bytes for vote in votes) / 1000
        grace = 0.0 if stop is None else stop.grace_period_seconds
        needed = max(job.save_seconds, default=0.0)
        return {
            "told": told[:16],
            "has_time": needed <= grace - passed,
            "needed": float(needed),
            "left": float(grace - passed),
            "calls": job.pace.calls_in(_ASK_SECONDS),
            "due": _due(job),
        }

    return agree(job.decisions, Phase.ASK, looked, decide, says=says)


def _due(job: Job) -> list[str]:
    due = [] if job.clock is None else job.clock.due()
    asking = [request.by for request in job.requested[:_MAX_NAMED]]
    return due + [f"{job.gate.when.asked}: asked for by {', '.join(asking)}"] * bool(asking)


def _look(job: Job) -> float | None:
    """Return since how many seconds this rank is told to stop; None if it is not."""
    if job.requests is not None:
        job.requested = job.requests.look(job.check_alive) or []
    if job.stop is None:
        return None
    notice, file = job.stop.notice, job.stop.file
    if notice.since is None and file is not None and file.look(job.check_alive):
        notice.note()
    return None if notice.since is None else time.monotonic() - notice.since
