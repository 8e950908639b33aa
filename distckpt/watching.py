"""What happens in a run directory, as its records tell it: commits, deletions, claims.

Only records are read, each once: a look that finds nothing new asks for two names.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from distckpt import record, state
from distckpt.errors import CorruptStateError, NewerFormatError, StorageError
from distckpt.record import Entry, Record
from distckpt.run_directory import RunDirectory
from distckpt.state import Head
from distckpt.words import count, duration

# What can happen.
WAITING = "waiting"
BEGIN = "begin"
CLAIM = "claim"
COMMIT = "commit"
KEPT = "kept"
BAD = "bad"
MISSING = "missing"
DELETION = "deletion"
REPAIR = "repair"
PRUNE = "prune"
GAP = "gap"
OTHER_RECORDS = "other records"
STALE = "stale"
UNREADABLE = "unreadable"

# No commit for so many times the usual interval is worth a word.
_STALE_INTERVALS = 3
# But where there is one every few milliseconds, a breath is not.
_LEAST_STALE_SECONDS = 10.0
_MAX_COMMITS = 33


@dataclass(frozen=True, slots=True)
class Event:
    """Something that has happened.

    Attributes:
        kind: One of the words above.
        time: When, seconds since the epoch.
        text: What there is to say about it; nothing if ``entry`` says it all.
        record: The record that tells of it; None if none does.
        entry: The checkpoint that it is about; None if it is about none.
    """

    kind: str
    time: float
    text: str = ""
    record: Record | None = None
    entry: Entry | None = None

    @property
    def kept_by(self) -> list[str]:
        """What keeps the checkpoint."""
        if self.record is None or self.entry is None:
            return []
        return self.entry.kept_by(self.record.rules)


class Watcher:
    """Follows the records of one run directory, which need not be there yet.

    Args:
        directory: The run directory.
        num_last: How many of the last commits are told of at the beginning.
    """

    def __init__(self, directory: RunDirectory, num_last: int) -> None:
        self._directory = directory
        self._num_last = num_last
        self._head: Head | None = None
        self._pace = _Pace()
        self._said = ""

    def look(self) -> list[Event]:
        """Return what has happened since the last look, in its order.

        Raises:
            CorruptStateError: The newest record is not valid, or records are lost.
            UnsafeCheckpointError: The records are elsewhere, by way of a link.
        """
        try:
            return [*self._look()]
        except StorageError as error:
            return [*self._say_once(UNREADABLE, str(error))]

    def _look(self) -> Iterator[Event]:
        if self._head is None:
            yield from self._look_for_records()
        elif state.is_newest(self._directory, self._head):
            self._said = ""
            yield from self._look_at_pace(self._head.record)
        else:
            yield from self._follow(self._head)

    def _look_for_records(self) -> Iterator[Event]:
        if not self._directory.is_folder():
            yield from self._say_once(WAITING, "the directory is not there")
            return
        head = state.read_head(self._directory)
        if head is None:
            yield from self._say_once(WAITING, "no job has claimed the directory")
            return
        yield from self._begin(head)

    def _say_once(self, kind: str, text: str) -> Iterator[Event]:
        if self._said != kind:
            self._said = kind
            yield Event(kind, time.time(), text)

    def _begin(self, head: Head) -> Iterator[Event]:
        self._head, self._said = head, ""
        newest = head.record
        oldest_first = newest.committed[::-1]
        self._pace = _Pace()
        self._pace.begin(oldest_first)
        checkpoints = count(len(oldest_first), "checkpoint")
        text = f"{_job(newest)}, epoch {newest.epoch}: {checkpoints}"
        yield Event(BEGIN, newest.written, text, newest)
        for entry in oldest_first[len(oldest_first) - self._num_last :]:
            yield Event(COMMIT, entry.time, record=newest, entry=entry)

    def _follow(self, head: Head) -> Iterator[Event]:
        """Go from the record that is known to the newest, by way of those between."""
        newest = state.read_head(self._directory)
        self._said = ""
        if newest is None:
            self._head = None
            yield Event(OTHER_RECORDS, time.time(), "its records are gone")
            return
        before = head.record
        if newest.record.chain != before.chain or newest.record.number < before.number:
            text = "not those of before: the directory was made anew, or put back"
            yield Event(OTHER_RECORDS, time.time(), text, newest.record)
            yield from self._begin(newest)
            return
        num_missed = 0
        for number in range(before.number + 1, newest.record.number + 1):
            after = newest.record
            if number < after.number:
                try:
                    after = state.read_numbered(self._directory, number).record
                except (StorageError, CorruptStateError, NewerFormatError):
                    num_missed += 1  # pruned already; only the newest must be whole
                    continue
            if num_missed:
                records = count(num_missed, "record")
                text = f"{records} gone before it could be told what was in them"
                yield Event(GAP, after.written, text, after)
                num_missed = 0
            yield from self._between(before, after)
            before = after
        self._head = newest

    def _between(self, before: Record, after: Record) -> Iterator[Event]:
        """Tell what is different between a record and a later one."""
        written = after.written
        if after.action == record.CLAIM and after.run == before.run:
            yield Event(CLAIM, written, f"{_job(after)}, epoch {after.epoch}", after)
        elif after.action == record.CLAIM:
            text = f"{_job(after)} takes over from {_job(before)}, epoch {after.epoch}"
            yield Event(CLAIM, written, text, after)
        elif after.action == record.REPAIR:
            yield Event(REPAIR, written, "the records were repaired by hand", after)
        elif after.action == record.PRUNE:
            yield Event(PRUNE, written, "checkpoints were dropped by hand", after)
        known = {e.attempt for e in _listed(before)} | {e.attempt for e in before.releasing}
        for entry in after.committed[::-1]:
            if entry.attempt not in known:
                self._pace.note(entry)
                yield Event(COMMIT, entry.time, record=after, entry=entry)
        for kind, of_before, of_after in (
            (KEPT, before.kept, after.kept),
            (BAD, before.bad, after.bad),
            (MISSING, before.missing, after.missing),
            (DELETION, before.releasing, after.releasing),
        ):
            known = {entry.attempt for entry in of_before}
            for entry in of_after:
                if entry.attempt not in known:
                    yield Event(kind, written, record=after, entry=entry)

    def _look_at_pace(self, newest: Record) -> Iterator[Event]:
        text = self._pace.behind()
        if text:
            yield Event(STALE, time.time(), text, newest)


def _listed(of: Record) -> Iterable[Entry]:
    return (*of.live, *of.kept, *of.bad, *of.missing)


def _job(of: Record) -> str:
    restart = f" (restart {of.restart})" if of.restart else ""
    return f"job {of.run!r}{restart}"


class _Pace:
    """How often there is a commit, and whether it is time for one."""

    def __init__(self) -> None:
        # Number of its record, and time.
        self._commits: deque[tuple[int, float]] = deque(maxlen=_MAX_COMMITS)
        self._heard = 0.0
        self._was_said = False

    def begin(self, entries: Iterable[Entry]) -> None:
        """Learn from the commits of before, oldest first."""
        for entry in entries:
            self.note(entry)
        if self._commits:
            # By the clock of the chief's host; from here on, by this one's alone.
            self._heard -= max(0.0, time.time() - self._commits[-1][1])

    def note(self, entry: Entry) -> None:
        """Take note of a commit."""
        self._commits.append((entry.record, entry.time))
        self._heard = time.monotonic()
        self._was_said = False

    @property
    def usual_seconds(self) -> float | None:
        """The usual time between two commits; None if that is not known."""
        # Nearly every record is a commit: so also what was deleted meanwhile counts.
        intervals = [
            (time - time_before) / (number - number_before)
            for (number_before, time_before), (number, time) in pairwise(self._commits)
            if number > number_before
        ]
        return median(intervals) if intervals else None

    def behind(self) -> str:
        """Say, once, that there has been no commit for long; "" if there is no need to."""
        usual = self.usual_seconds
        waited = time.monotonic() - self._heard
        if usual is None or self._was_said:
            return ""
        if waited <= max(_STALE_INTERVALS * usual, _LEAST_STALE_SECONDS):
            return ""
        self._was_said = True
        return f"no commit for {duration(waited)}; usually it takes {duration(usual)}"
