"""The ranks' side of a save: S1 to S8 of docs/protocol.md, as numbered steps."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from distckpt import paths, strict_json
from distckpt.claim import ensure_claimed
from distckpt.comm import Answer
from distckpt.commit import write_and_commit
from distckpt.errors import (
    ConfigError,
    OutcomeUnknown,
    RestoreFailed,
    SaveFailed,
    StorageError,
)
from distckpt.job import Job, Ran, agree
from distckpt.messages import Phase, Vote, raise_failures
from distckpt.paths import Attempt
from distckpt.record import digest
from distckpt.save_plan import capture_and_plan


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
        write_and_commit(job, attempt, step, captured, plan)  # S5 to S8
    except OutcomeUnknown:
        raise  # the number may be in use
    except Exception:
        # Not after Ctrl-C, for the same reason.
        job.checkpoint.save_counter = counter
        raise
    # S8 (every rank): only now does anything remember this save.
    job.gate.last_step = step
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
