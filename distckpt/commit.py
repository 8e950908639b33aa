"""S5 to S8 of a save: write, vote, commit, outcome."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress

from distckpt import readers, shard_file
from distckpt.agree import Ran, agree
from distckpt.chief import Chief
from distckpt.comm import Answer, How
from distckpt.errors import (
    DistckptError,
    FencedError,
    ManagerBroken,
    OutcomeUnknown,
    SaveFailed,
    StorageError,
)
from distckpt.events import COMMIT, VOTE, WRITE
from distckpt.flight import Saving
from distckpt.manifest import Shard
from distckpt.messages import Phase, Vote, raise_failures, slowest
from distckpt.paths import Attempt
from distckpt.record import Record
from distckpt.save_plan import SavePlan, or_abandon
from distckpt.session import Session
from distckpt.worker import Worker

_LAST_LOOK_SECONDS = 0.2


def write_and_commit(
    session: Session,
    saving: Saving,
    plan: SavePlan,
    write: Callable[[], shard_file.Written],
    *,
    yields: bool = False,
) -> Answer:
    """Write this rank's file and commit together; after return the checkpoint is there.

    Called by: every rank. Collectives: one round.

    Args:
        session: The manager's, on this rank.
        saving: What it is about.
        plan: What all ranks agreed to write.
        write: Writes this rank's file; may run on another thread.
        yields: Whether whoever else wants the processor goes first.

    Returns:
        How the lists of checkpoints change, for ``Session.take_changes``.

    Raises:
        SaveFailed: Some ranks failed; no checkpoint was made.
        OutcomeUnknown: The disk will not say whether it was committed.
        ManagerBroken: A rank is gone; ``committed`` says what became of the save.
        FencedError: The directory belongs to another manager.
    """
    # S5 (every rank): write my file, durably.
    attempt = saving.attempt
    about = {"checkpoint": attempt.prefix, "step": saving.step}
    what = f"writing {attempt.prefix}"
    written = Ran(lambda: session.on_disk(session.commits, what, write, yields=yields))
    if written.error is None:
        size_bytes = written.result.size_bytes
        session.events.tell(WRITE, seconds=written.seconds, size_bytes=size_bytes, **about)
    chief = _ChiefsPart(session, saving, plan)
    try:
        # S6 (every rank): vote; S7 (chief): commit; S8 (every rank): receive the outcome.
        with session.events.timed(VOTE, **about):
            return agree(
                session.commits,
                Phase.WRITE,
                written,
                or_abandon(session, attempt, chief.decide),
                says=_vote_on_file,
                how=How(patient=True, hung=chief.judge_undone),
            )
    except ManagerBroken as error:
        newest = _newest_record(session)
        if newest is not None and newest.epoch > attempt.epoch:
            raise _fenced(session, attempt, newest, error) from error
        no_vote = written.error is not None
        never_began = session.chief is not None and not chief.began
        committed = False if no_vote or never_began else _is_listed(attempt, newest)
        raise _with_outcome(error, session.path(attempt.prefix), committed) from error


def _vote_on_file(file: shard_file.Written) -> Vote:
    header = bytes.fromhex(file.header)
    return Vote(Phase.WRITE, size_bytes=file.size_bytes, digest_a=header)


_DISK_FULL = (
    "Retention deletes after a commit, so it needs room for one checkpoint more than it "
    "keeps: make room, or keep fewer (max_to_keep)."
)


class _ChiefsPart:
    """S7: what the chief makes of the votes.

    Attributes:
        began: Whether all votes were good, so that the commit was begun.
    """

    def __init__(
        self,
        session: Session,
        saving: Saving,
        plan: SavePlan,
    ) -> None:
        self._session = session
        self._saving = saving
        self._plan = plan
        self.began = False

    def decide(self, votes: Sequence[Vote]) -> Answer:
        """Commit, or raise what all ranks raise."""
        assert self._session.chief is not None
        if not all(vote.ok for vote in votes):
            # A pending directory that vanished under a rank is another chief's sweep. A
            # disk that cannot say so has its table of failures, as without the question.
            with suppress(StorageError):
                self._session.chief.check_not_fenced(by_name=False)
        path = self._session.path(self._saving.attempt.prefix)
        what = f"saving {path} failed; no checkpoint was made, older ones are safe"
        try:
            raise_failures(votes, what, SaveFailed, keep_kind=False)
        except SaveFailed as error:
            # Without a cause: only the ranks that failed have one.
            if any("free there" in text for text in error.failures.values()):
                msg = f"{error} {_DISK_FULL}"
                raise SaveFailed(msg, error.failures) from None
            raise
        self.began = True
        try:
            self._commit(self._session.chief, votes)
        except StorageError as error:
            text = f"the commit failed on the chief: {error}"
            msg = f"saving {path} failed: {text}; no checkpoint was made."
            raise SaveFailed(msg, {0: text}) from error
        return self._session.changes(self._saving.attempt.prefix)

    def _commit(self, chief: Chief, votes: Sequence[Vote]) -> None:
        layouts, values = self._plan
        shards = [
            Shard(vote.size_bytes, vote.digest_a.hex(), table)
            for vote, table in zip(votes, layouts.table_of_rank, strict=True)
        ]
        saving = self._saving
        began = time.monotonic()
        chief.commit(
            saving.attempt,
            step=saving.step,
            shards=shards,
            layouts=layouts.tables,
            values=values,
            remarks=saving.remarks,
        )
        now = time.monotonic()
        self._session.events.tell(
            COMMIT,
            seconds=now - began,
            checkpoint=saving.attempt.prefix,
            step=saving.step,
            size_bytes=sum(shard.size_bytes for shard in shards),
            detail={
                **slowest(votes),
                "total_seconds": round(now - saving.began, 6),
                "reasons": list(saving.reasons),
                "metrics": dict(saving.remarks.listed),
            },
        )

    def judge_undone(self, error: DistckptError) -> DistckptError:
        """Say what it means that the chief has left off: a commit may go through later."""
        if not self.began:
            return error
        path = self._session.path(self._saving.attempt.prefix)
        what = f"Whether {path} was committed is unknown"
        return OutcomeUnknown(f"{error} {what}; the next save or restore will tell.")


def _newest_record(session: Session) -> Record | None:
    """Read the newest record; None if there is none, or it cannot be read just now."""
    # Not waited for long: the call has had its time already.
    worker = Worker(_LAST_LOOK_SECONDS)
    try:
        return worker.finish(lambda: readers.read_record(session.directory))
    except DistckptError:
        return None


def _is_listed(attempt: Attempt, newest: Record | None) -> bool | None:
    """Tell whether an attempt is committed; None if it is not there, as yet."""
    listed = newest is not None and any(e.attempt == attempt for e in newest.committed)
    return True if listed else None


def _fenced(
    session: Session, attempt: Attempt, newest: Record, error: ManagerBroken
) -> FencedError:
    """Say that this rank was away for so long that another job has the directory."""
    what = "was committed before" if _is_listed(attempt, newest) else "was not committed"
    return FencedError(
        f"{session.directory} has been claimed by job {newest.run!r} (epoch "
        f"{newest.epoch}, "
        f"this one is {attempt.epoch}) while this rank was away; {attempt.prefix} {what}, "
        f"or was released since. What came of the other ranks: {error}"
    )


def _with_outcome(error: ManagerBroken, path: str, committed: bool | None) -> ManagerBroken:
    outcome = {
        True: f"{path} was committed before.",
        False: f"{path} was not committed; older checkpoints are safe.",
        None: f"Whether {path} was committed is unknown; the next restore decides.",
    }[committed]
    told = type(error)(f"{error} {outcome}", error.ranks)
    told.committed = committed
    return told
