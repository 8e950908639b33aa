"""What the ranks ask each other now and then: told to stop? is a save due by the clock?

And, when told to stop, whether there is time for one more save.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import NamedTuple

from distckpt import storage
from distckpt.comm import Answer
from distckpt.errors import SaveFailed, StorageError, StorageTimeout
from distckpt.job import Job, Ran, Stop, agree
from distckpt.messages import Phase, Vote, raise_failures

_logger = logging.getLogger(__name__)

# About how often to ask.
_ASK_SECONDS = 1.0


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
    told to stop, and those of time.
    """
    stop = job.stop
    if stop is None and not job.gate.when.clocked:
        return _NOTHING
    due: tuple[str, ...] = ()
    if job.gate.when.clocked or (stop is not None and not stop.agreed):
        job.calls_left -= 1
        if job.calls_left <= 0:
            answer = _ask(job)
            job.calls_left, due = answer["calls"], tuple(answer["due"])
            if stop is not None and not stop.agreed and answer["told"]:
                stop.agreed = stop.is_due = True
                stop.notice.take()
                if job.chief is not None:
                    ranks = answer["told"]
                    _logger.warning("told to stop (rank %s): saving once more", ranks)
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
            "no save before the end: earlier ones took up to %.1f s, and %.1f s of the "
            "grace period are left",
            *(answer["needed"], answer["left"]),
        )
    return False


def note_saved(job: Job) -> None:
    """Note that the newest state is saved: nothing is left to be done before the end."""
    assert job.stop is not None
    job.stop.is_due = False


def _ask(job: Job) -> Answer:
    stop = job.stop
    looked = Ran(lambda: None if stop is None else _look(job, stop))

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
            "due": [] if job.clock is None else job.clock.due(),
        }

    return agree(job.decisions, Phase.ASK, looked, decide, says=says)


def _look(job: Job, stop: Stop) -> float | None:
    """Return since how many seconds this rank is told to stop; None if it is not."""
    notice = stop.notice
    if notice.since is None and stop.file is not None and _is_there(job, stop, stop.file):
        notice.note()
    return None if notice.since is None else time.monotonic() - notice.since


def _is_there(job: Job, stop: Stop, path: str) -> bool:
    # An error is no reason to end a job that could go on.
    try:
        found = stop.worker.run(lambda: storage.exists(path), lambda _: job.check_alive())
    except StorageTimeout as error:
        # Else each of these questions would wait for as long.
        stop.file = None
        _logger.warning("%s is not looked for any more: %s", path, error)
        return False
    except StorageError as error:
        if stop.complaint != str(error):
            _logger.warning("cannot look for the file that tells to stop: %s", error)
        stop.complaint = str(error)
        return False
    stop.complaint = ""
    return found
