"""The ranks' side of a save: S1 to S8 of docs/protocol.md, as numbered steps."""

from __future__ import annotations

import logging
import operator
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from functools import partial
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from distckpt import savable, shard_file, strict_json
from distckpt.asking import answer_requests, ask, has_time_to_save, note_saved
from distckpt.background import bring_in, take_off
from distckpt.checkpoint import Captured, objects_of
from distckpt.claim import ensure_claimed
from distckpt.comm import Answer
from distckpt.commit import updated_lists, write_and_commit
from distckpt.errors import (
    ConfigError,
    OutcomeUnknown,
    RestoreFailed,
    SaveFailed,
    StorageError,
)
from distckpt.events import SAVE
from distckpt.flight import Flight, Saving
from distckpt.gate import Decision
from distckpt.job import Job, Ran, agree, draft_of, own_file_of
from distckpt.messages import Phase, Vote, check_called_alike, raise_failures
from distckpt.paths import Attempt
from distckpt.record import digest
from distckpt.remarks import Remarks
from distckpt.save_plan import SavePlan, decide_and_plan

_logger = logging.getLogger(__name__)


Staging: TypeAlias = Literal["eager", "lazy"]
WhenBusy: TypeAlias = Literal["wait", "skip"]


@dataclass(frozen=True, slots=True)
class CheckpointOptions:
    """How one save is done.

    Attributes:
        enable_async: Return when the state is copied; the rest goes on behind the training
            loop. What came of it shows at a later call: of ``save()``, about a second
            after, of ``sync()``, ``close()`` or ``restore_or_initialize()``.
        staging: ``"eager"``: all is copied when ``save()`` returns. ``"lazy"``: what only
            the ``step()`` of a tracked optimizer changes (its parameters and its state) is
            copied while forward and backward run, and the next ``step()`` of any optimizer
            waits for it. Whatever else changes these must call ``wait_staged()`` first:
            torch counts most changes in place, and a sample of each tensor (the first and
            last 4 KiB) is compared when it is copied, so that ``p.data``, numpy views and
            replays of CUDA graphs that change all of a tensor fail the save. A change of
            some elements in between, by such means, cannot be seen.
        when_busy: What to do while an earlier save is still under way: ``"wait"`` for it,
            or ``"skip"`` this one.
        validate_replicas: Compare all that ranks believe to be replicated, as with
            ``replicas="always"``, and fail the save, naming tensors and ranks, if it
            differs.
    """

    enable_async: bool = False
    staging: Staging = "eager"
    when_busy: WhenBusy = "wait"
    validate_replicas: bool = False


@dataclass(frozen=True, slots=True)
class Request:
    """One call of ``save()``, which must be alike on all ranks but for the remarks."""

    step: int | None
    number: int | None
    check_interval: bool
    options: CheckpointOptions
    remarks: Remarks

    def vote(self, phase: Phase) -> Vote:
        """Return what is compared between ranks."""
        options = [*astuple(self.options)]
        fields = [self.step, self.number, self.check_interval, *options]
        compared = bytes.fromhex(digest(strict_json.dumps(fields).encode()))
        return Vote(phase, step=self.step, call=compared[:12])


class Call(NamedTuple):
    """The arguments of one call of ``save()``, as they were given."""

    number: Any
    check_interval: Any
    options: Any
    metrics: Any
    metadata: Any

    def request(self, step: int | None) -> Request:
        """Check them."""
        remarks = Remarks.of(self.metrics, self.metadata)
        return _request(step, self.number, self.check_interval, self.options, remarks)


def save(job: Job, call: Call) -> str | None:
    """Save a checkpoint if the interval allows; see ``CheckpointManager.save``."""
    if job.clock is None:
        return _save(job, call)
    costs, path = job.clock.costs, None
    costs.enter()
    try:
        path = _save(job, call)
    finally:
        costs.leave(has_saved=path is not None, under_way=job.flight is not None)
    return path


def _save(job: Job, given: Call) -> str | None:
    job.pace.num_calls += 1
    check_interval = given.check_interval
    step_read = Ran(job.step)
    if job.steps is not None and step_read.error is None:
        _warn(job.steps.see(step_read.result, job.latest))
    # First of all, so that all ranks count the same calls until they ask again.
    told_to_stop, due = ask(job)
    # Where all ranks ask at any step, a step counter that raises is a vote like any error.
    # Elsewhere they may not ask now; this rank's error is its own.
    if step_read.error is not None and not (job.gate.is_open or told_to_stop or due):
        raise step_read.error
    reasons = [*due]
    if step_read.error is None:
        step = step_read.result
        if told_to_stop and not job.gate.has_news(step):
            _end_with_the_last(job)
            return None
        is_wanted = told_to_stop or (bool(due) and job.gate.has_news(step))
        if not is_wanted and not job.gate.allows(step, check_interval):
            job.decision, job.gate.refused_step = None, step
            if job.steps is not None:
                _warn(job.steps.note_refused(not check_interval, job.latest))
            savable.agree_once(job)
            if due:
                answer_requests(job)
            _look_after_flight(job)
            return None
        reasons += job.gate.reasons(step, bool(check_interval))
    reasons += ["told to stop"] if told_to_stop else []
    if job.undefined:
        raise RestoreFailed(job.undefined)
    request = Ran(lambda: given.request(step_read.value()))
    if told_to_stop:
        request = _committed_on_return(request)
    if job.flight is not None and not _clear_the_way(job, request):
        return None
    if told_to_stop and not has_time_to_save(job):
        job.decision = Decision(False, ("there is no time for it before the end",))
        return None
    call = Ran(lambda: request.value().vote(Phase.DECIDE))
    if not job.claimed:
        # The first call of this manager: if all ranks make it alike, claim.
        _compare_calls(job, call)
        ensure_claimed(job)
    counter, last_step = job.checkpoint.save_counter, job.gate.last_step
    began = time.monotonic()
    try:
        # The saved state holds the counter of the save itself, as in TensorFlow.
        job.checkpoint.save_counter = counter + 1
        begin = partial(_begin, job, request, counter)
        attempt, captured, plan = decide_and_plan(  # S1 to S3
            job, call, begin, lambda: request.result.options.validate_replicas
        )
        step, options = request.result.step, request.result.options
        saving = Saving(attempt, step, request.result.remarks, tuple(reasons), began)
        if options.enable_async:
            flight = Flight(saving, counter, last_step)
            take_off(job, flight, captured, plan, lazily=options.staging == "lazy")  # S4
        else:
            write = partial(_write, job, attempt, captured, plan)
            changes = write_and_commit(job, saving, plan, write)  # S5 to S8
            job.take_lists(updated_lists(job, changes))
            job.save_seconds.append(time.monotonic() - began)
    except OutcomeUnknown:
        raise  # the number may be in use
    except Exception:
        # Not after Ctrl-C, for the same reason.
        job.checkpoint.save_counter = counter
        raise
    # S8 (every rank): only now does anything remember this save.
    job.gate.last_step = step
    job.is_checked = True
    if job.steps is not None:
        job.steps.note_saved()
        assert step is not None, "there is a step counter"
        _warn(job.numbers.see(objects_of(job.checkpoint), step))
    if job.clock is not None:
        job.clock.reset(began)
    job.decision = Decision(True, saving.reasons)
    if told_to_stop:
        note_saved(job)
    job.events.tell(
        SAVE,
        seconds=time.monotonic() - began,
        checkpoint=attempt.prefix,
        step=step,
        detail={"asynchronous": options.enable_async},
    )
    return job.shown(attempt.prefix)


def _warn(text: str | None) -> None:
    if text is not None:
        _logger.warning("%s", text)


def _write(
    job: Job, attempt: Attempt, captured: Captured, plan: SavePlan
) -> shard_file.Written:
    # Ctrl-C while the save was begun: nothing is written yet, so it can end here.
    job.decisions.lane.worker.raise_interrupt()
    file = own_file_of(job, captured, plan.layouts)
    draft = draft_of(job, attempt, captured, file)
    target = job.directory.new_shard(attempt, job.rank, job.world_size)
    return shard_file.write_outlined(target, draft, file.outline, file.loader(captured))


# The last save of a job that is told to stop


def _committed_on_return(request: Ran[Request]) -> Ran[Request]:
    """Save at once and wait for it: nobody knows how much time there will be after it."""

    def changed() -> Request:
        options = request.value().options
        options = replace(options, enable_async=False, when_busy="wait")
        return replace(request.result, options=options)

    return Ran(changed)


def _end_with_the_last(job: Job) -> None:
    """See to it that the save at this very step is committed."""
    if job.flight is not None:
        bring_in(job)
    job.decision = Decision(False, ("told to stop, and this step is saved",))
    note_saved(job)


# An asynchronous save under way


def _look_after_flight(job: Job) -> None:
    """Ask now and then what has become of it; all ranks at the same call."""
    if job.flight is not None:
        job.flight.calls_left -= 1
        if job.flight.calls_left <= 0:
            bring_in(job, wait=False)


def _clear_the_way(job: Job, request: Ran[Request]) -> bool:
    """Bring in the one under way before another save; False to skip that one."""
    waits = request.error is None and request.result.options.when_busy == "wait"
    call = Ran(lambda: request.value().vote(Phase.LAND))
    flight = job.flight
    if bring_in(job, call, wait=waits):
        return True
    if job.chief is not None and flight is not None:
        step, under_way = request.result.step, flight.attempt.prefix
        _logger.warning("no save at step %s: %s is still under way", step, under_way)
    busy = "the save before" if flight is None else flight.attempt.prefix
    job.decision = Decision(False, (f"{busy} is still under way",))
    return False


# The question that all ranks ask


def _request(
    step: int | None, number: Any, check_interval: Any, options: Any, remarks: Remarks
) -> Request:
    if options is None:
        options = CheckpointOptions()
    if not isinstance(options, CheckpointOptions):
        msg = f"options must be CheckpointOptions, got {options!r:.100}."
        raise ConfigError(msg)
    for name, known in (("staging", get_args(Staging)), ("when_busy", get_args(WhenBusy))):
        if getattr(options, name) not in known:
            msg = f"options: {name} must be one of {known}, got {options!r:.200}."
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
    options = replace(
        options,
        enable_async=bool(options.enable_async),
        validate_replicas=bool(options.validate_replicas),
    )
    return Request(step, number, bool(check_interval), options, remarks)


def _compare_calls(job: Job, call: Ran[Vote]) -> None:
    # Bad arguments of one rank must reach all of them, so they are a vote too.

    def decide(votes: Sequence[Vote]) -> Answer:
        raise_failures(votes, "save() was refused", SaveFailed)
        check_called_alike(votes)
        return {}

    agree(job.decisions, Phase.DECIDE, call, decide, says=lambda vote: vote)


def _begin(job: Job, request: Ran[Request], counter: int) -> Attempt:
    """S2 (chief): make the pending directory of a new attempt."""
    assert job.chief is not None
    try:
        return job.chief.begin(request.result.number, counter)
    except StorageError as error:
        text = f"the save could not be begun on the chief: {error}"
        msg = f"saving into {job.directory}: {text}; no checkpoint was made."
        raise SaveFailed(msg, {0: text}) from error
