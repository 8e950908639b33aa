"""The ranks' side of a save: S1 to S8 of docs/protocol.md, as numbered steps."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from distckpt import paths, readers, shard_file, strict_json, tensors
from distckpt.checkpoint import Captured, per_rank_pieces
from distckpt.claim import ensure_claimed
from distckpt.comm import Answer
from distckpt.errors import (
    ConfigError,
    DistckptError,
    ManagerBroken,
    OutcomeUnknown,
    RestoreFailed,
    SaveFailed,
    StorageError,
    StorageTimeout,
)
from distckpt.job import Job, Ran, agree
from distckpt.layout import Assignment, Piece
from distckpt.leaves import Leaf
from distckpt.manifest import Shard
from distckpt.messages import Phase, Vote, raise_failures
from distckpt.paths import Attempt
from distckpt.record import digest
from distckpt.save_plan import SavePlan, capture_and_plan, or_abandon
from distckpt.worker import Worker

_LAST_LOOK_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """How one save is done; nothing can be chosen yet."""


@dataclass(frozen=True, slots=True)
class Request:
    """One call of ``save()``, which must be alike on all ranks."""

    step: int | None
    number: int | None
    check_interval: bool

    def digest(self) -> bytes:
        """Return what is compared between ranks."""
        fields = [self.step, self.number, self.check_interval]
        return bytes.fromhex(digest(strict_json.dumps(fields).encode()))


def save(
    job: Job, number: Any, check_interval: Any, options: CheckpointOptions | None
) -> str | None:
    """Save a checkpoint if the interval allows; see ``CheckpointManager.save``."""
    step_read = Ran(job.step)
    # Where all ranks ask at any step, a step counter that raises is a vote like any error.
    # Elsewhere they may not ask now; this rank's error is its own.
    if step_read.error is not None and not job.gate.is_open:
        raise step_read.error
    if step_read.error is None and not job.gate.allows(step_read.result, check_interval):
        return None
    if job.undefined:
        raise RestoreFailed(job.undefined)
    attempt = _decide(
        job, lambda: _request(step_read.value(), number, check_interval, options)
    )
    step = step_read.result
    counter = job.checkpoint.save_counter
    try:
        # The saved state holds the counter of the save itself, as in TensorFlow.
        job.checkpoint.save_counter = counter + 1
        captured, plan = capture_and_plan(job, attempt)  # S3
        answer = _write_and_commit(job, attempt, step, captured, plan)  # S5 to S8
    except OutcomeUnknown:
        raise  # the number may be in use
    except Exception:
        # Not after Ctrl-C, for the same reason.
        job.checkpoint.save_counter = counter
        raise
    # S8 (every rank): only now does anything remember this save.
    job.gate.last_step = step
    job.take_lists(_updated_lists(job, answer))
    return job.path(attempt.prefix)


# S1, S2: question and answer


def _request(step: int | None, number: Any, check_interval: Any, options: Any) -> Request:
    if options is not None and not isinstance(options, CheckpointOptions):
        msg = f"options must be CheckpointOptions, got {options!r:.100}."
        raise ConfigError(msg)
    if number is not None:
        try:
            number = operator.index(number)
        except TypeError as error:
            msg = f"checkpoint_number must be an integer, got {number!r:.100}."
            raise ConfigError(msg) from error
        if not -(2**63) <= number < 2**63:
            msg = f"checkpoint_number must fit into 64 bits, got {number}."
            raise ConfigError(msg)
    if step is not None and not -(2**63) < step < 2**63:
        msg = f"the training step must fit into 64 bits, step_counter says {step}."
        raise ConfigError(msg)
    return Request(step, number, bool(check_interval))


def _decide(job: Job, make_request: Callable[[], Request]) -> Attempt:
    """Ask the chief; it makes the pending directory of a new attempt."""
    attempt = _ask(job, make_request)
    if attempt is None:
        # The first call of this manager: all ranks made it alike, so now claim.
        ensure_claimed(job)
        attempt = _ask(job, make_request)
    assert attempt is not None
    return attempt


def _ask(job: Job, make_request: Callable[[], Request]) -> Attempt | None:
    # Bad arguments of one rank must reach all of them, so they are a vote too.
    request = Ran(make_request)

    def decide(votes: Sequence[Vote]) -> Answer:
        raise_failures(votes, "save() was refused", SaveFailed)
        return _begin(job, request.result, votes)

    answer = agree(
        job.decisions,
        Phase.DECIDE,
        request,
        decide,
        says=lambda r: Vote(Phase.DECIDE, step=r.step, digest_a=r.digest()),
    )
    return None if answer["attempt"] is None else paths.parse_published(answer["attempt"])


def _begin(job: Job, request: Request, votes: Sequence[Vote]) -> Answer:
    assert job.chief is not None
    differing = [vote for vote in votes if vote.digest_a != request.digest()]
    if differing:
        others = ", ".join(f"rank {v.rank} at step {v.step}" for v in differing[:16])
        msg = (
            f"save() was called differently on {len(differing)} of {len(votes)} ranks: "
            f"the chief at step {request.step} with checkpoint_number={request.number}, "
            f"check_interval={request.check_interval}; {others}, or with other "
            "arguments. Every rank must call save() at the same step in the same way."
        )
        raise ConfigError(msg)
    if not job.claimed:
        return {"attempt": None}
    job.chief.check_not_fenced()
    try:
        attempt = job.chief.begin(request.number, job.checkpoint.save_counter)
    except StorageError as error:
        text = f"the save could not be begun on the chief: {error}"
        msg = f"saving into {job.directory}: {text}; no checkpoint was made."
        raise SaveFailed(msg, {0: text}) from error
    return {"attempt": attempt.published}


# S5 to S8: write, vote, commit, outcome


def _write_and_commit(
    job: Job, attempt: Attempt, step: int | None, captured: Captured, plan: SavePlan
) -> Answer:
    def write() -> shard_file.Written:
        return shard_file.write(
            job.path(attempt.pending, paths.shard_file(job.rank, job.world_size)),
            _entries(job.rank, captured, plan.assignment),
            attempt=attempt.published,
            rank=job.rank,
            world_size=job.world_size,
            per_rank_values=captured.per_rank.values,
        )

    # S5 (every rank): write my file, durably.
    written = Ran(lambda: job.on_disk(f"writing {attempt.prefix}", write))

    commit_began = False

    def decide(votes: Sequence[Vote]) -> Answer:
        nonlocal commit_began
        assert job.chief is not None
        if not all(vote.ok for vote in votes):
            # A pending directory that vanished under a rank is another chief's sweep.
            job.chief.check_not_fenced()
        path = job.path(attempt.prefix)
        what = f"saving {path} failed; no checkpoint was made, older ones are safe"
        raise_failures(votes, what, SaveFailed, keep_kind=False)
        commit_began = True
        return _commit(job, attempt, step, plan, votes)  # S7 (chief)

    def judge_hang(error: StorageTimeout) -> DistckptError:
        if not commit_began:
            return error
        what = f"Whether {job.path(attempt.prefix)} was committed is unknown"
        return OutcomeUnknown(f"{error} {what}; the next save or restore will tell.")

    # S6 (every rank): vote; S8: receive the outcome.
    try:
        return agree(
            job.commits,
            Phase.WRITE,
            written,
            or_abandon(job, attempt, decide),
            says=lambda file: Vote(
                Phase.WRITE,
                size_bytes=file.size_bytes,
                digest_a=bytes.fromhex(file.header),
            ),
            patient=True,
            hung=judge_hang,
        )
    except ManagerBroken as error:
        committed = _is_committed(job, attempt)
        if committed is None and job.chief is not None and not commit_began:
            committed = False
        raise _with_outcome(error, job.path(attempt.prefix), committed) from error


def _is_committed(job: Job, attempt: Attempt) -> bool | None:
    """Look whether a save was committed that lost a rank; None if it is not, as yet."""
    # Not waited for long: the call has had its time already.
    worker = Worker(_LAST_LOOK_SECONDS)
    try:
        record = worker.finish(lambda: readers.read_record(job.directory))
    except DistckptError:
        return None
    listed = record is not None and any(e.attempt == attempt for e in record.committed)
    return True if listed else None


def _with_outcome(error: ManagerBroken, path: str, committed: bool | None) -> ManagerBroken:
    outcome = {
        True: f"{path} was committed before.",
        False: f"{path} was not committed; older checkpoints are safe.",
        None: f"Whether {path} was committed is unknown; the next restore decides.",
    }[committed]
    told = type(error)(f"{error} {outcome}", error.ranks)
    told.committed = committed
    return told


def _entries(
    rank: int, captured: Captured, assignment: Assignment
) -> list[shard_file.Entry]:
    own = [
        _entry(piece, captured.shared.tensors[piece.row.name])
        for piece in assignment.pieces_of_rank(rank)
    ]
    per_rank = [
        _entry(piece, captured.per_rank.tensors[piece.row.name], per_rank=True)
        for piece in per_rank_pieces(captured, rank)
    ]
    return [*own, *per_rank]


def _entry(piece: Piece, leaf: Leaf, per_rank: bool = False) -> shard_file.Entry:
    load = partial(tensors.box_bytes, leaf.tensor, piece.box)
    return shard_file.Entry(piece, load, per_rank)


def _commit(
    job: Job, attempt: Attempt, step: int | None, plan: SavePlan, votes: Sequence[Vote]
) -> Answer:
    assert job.chief is not None
    assert plan.values is not None
    shards = [
        Shard(vote.size_bytes, vote.digest_a.hex(), table)
        for vote, table in zip(votes, plan.table_of_rank, strict=True)
    ]
    try:
        job.chief.commit(
            attempt, step=step, shards=shards, layouts=plan.tables, values=plan.values
        )
    except StorageError as error:
        text = f"the commit failed on the chief: {error}"
        msg = f"save {attempt.prefix}: {text}; no checkpoint was made."
        raise SaveFailed(msg, {0: text}) from error
    return _changes(job, attempt.prefix)


def _changes(job: Job, saved: str) -> Answer:
    """Say how the lists that all ranks hold have changed: the whole would grow for ever."""
    assert job.chief is not None
    held, now = job.checkpoints, [a.prefix for a in job.chief.checkpoints]
    # What is saved again moves to the end.
    before, after = {*held} - {saved}, {*now} - {saved}
    return {
        "latest": saved,
        "removed": [prefix for prefix in held if prefix not in after],
        # Not only the one just saved: a commit of unknown outcome may have turned up.
        "added": [prefix for prefix in now if prefix not in before],
    }


def _updated_lists(job: Job, changes: Answer) -> Answer:
    removed = {*changes["removed"]}
    kept = [prefix for prefix in job.checkpoints if prefix not in removed]
    return {"latest": changes["latest"], "checkpoints": [*kept, *changes["added"]]}
