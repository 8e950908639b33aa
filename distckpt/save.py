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
from distckpt.agree import Ran, agree
from distckpt.asking import answer_requests, ask, has_time_to_save, note_saved
from distckpt.background import bring_in, take_off
from distckpt.cadence import Cadence
from distckpt.capture import Captured, objects_of
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
from distckpt.events import SAVE
from distckpt.flight import Flight, Saving
from distckpt.gate import Decision
from distckpt.messages import Phase, Vote, check_called_alike, raise_failures
from distckpt.paths import Attempt
from distckpt.record import digest
from distckpt.remarks import Remarks
from distckpt.save_plan import SavePlan, decide_and_plan
from distckpt.save_state import SaveState
from distckpt.session import Session

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


def save(
    session: Session, save_state: SaveState, cadence: Cadence, call: Call
) -> str | None:
    """Save a checkpoint if the interval allows; see ``CheckpointManager.save``."""
    if cadence.clock is None:
        return _save(session, save_state, cadence, call)
    costs, path = cadence.clock.costs, None
    costs.enter()
    try:
        path = _save(session, save_state, cadence, call)
    finally:
        costs.leave(has_saved=path is not None, under_way=save_state.flight is not None)
    return path


def _save(
    session: Session, save_state: SaveState, cadence: Cadence, given: Call
) -> str | None:
    cadence.pace.num_calls += 1
    check_interval = given.check_interval
    step_read = Ran(cadence.step)
    if cadence.steps is not None and step_read.error is None:
        _warn(cadence.steps.see(step_read.result, session.latest))
    # First of all, so that all ranks count the same calls until they ask again.
    told_to_stop, due = ask(session, cadence)
    # Where all ranks ask at any step, a step counter that raises is a vote like any error.
    # Elsewhere they may not ask now; this rank's error is its own.
    if step_read.error is not None and not (cadence.gate.is_open or told_to_stop or due):
        raise step_read.error
    reasons = [*due]
    if step_read.error is None:
        step = step_read.result
        if told_to_stop and not cadence.gate.has_news(step):
            _end_with_the_last(session, save_state, cadence)
            return None
        is_wanted = told_to_stop or (bool(due) and cadence.gate.has_news(step))
        if not is_wanted and not cadence.gate.allows(step, check_interval):
            cadence.decision, cadence.gate.refused_step = None, step
            if cadence.steps is not None:
                _warn(cadence.steps.note_refused(not check_interval, session.latest))
            savable.agree_once(session, save_state)
            if due and save_state.flight is None:
                answer_requests(session, cadence)
            _look_after_flight(session, save_state, cadence)
            return None
        reasons += cadence.gate.reasons(step, bool(check_interval))
    reasons += ["told to stop"] if told_to_stop else []
    if session.undefined:
        raise RestoreFailed(session.undefined)
    request = Ran(lambda: given.request(step_read.value()))
    if told_to_stop:
        request = _committed_on_return(request)
    if save_state.flight is not None and not _clear_the_way(
        session, save_state, cadence, request
    ):
        return None
    if told_to_stop and not has_time_to_save(session, cadence):
        cadence.decision = Decision(False, ("there is no time for it before the end",))
        return None
    call = Ran(lambda: request.value().vote(Phase.DECIDE))
    if not session.claimed:
        # The first call of this manager: if all ranks make it alike, claim.
        _compare_calls(session, call)
        ensure_claimed(session)
    counter, last_step = save_state.tracked.save_counter, cadence.gate.last_step
    began = time.monotonic()
    try:
        # The saved state holds the counter of the save itself, as in TensorFlow.
        save_state.tracked.save_counter = counter + 1
        begin = partial(_begin, session, request, counter)
        attempt, captured, plan = decide_and_plan(  # S1 to S3
            session,
            save_state,
            call,
            begin,
            lambda: request.result.options.validate_replicas,
        )
        step, options = request.result.step, request.result.options
        saving = Saving(attempt, step, request.result.remarks, tuple(reasons), began)
        if options.enable_async:
            flight = Flight(saving, counter, last_step)
            take_off(
                session,
                save_state,
                flight,
                captured,
                plan,
                lazily=options.staging == "lazy",
            )  # S4
        else:
            write = partial(_write, session, save_state, attempt, captured, plan)
            changes = write_and_commit(session, saving, plan, write)  # S5 to S8
            session.take_changes(changes)
            cadence.save_seconds.append(time.monotonic() - began)
    except OutcomeUnknown:
        raise  # the number may be in use
    except Exception:
        # Not after Ctrl-C, for the same reason.
        save_state.tracked.save_counter = counter
        raise
    # S8 (every rank): only now does anything remember this save.
    cadence.gate.last_step = step
    save_state.is_checked = True
    if cadence.steps is not None:
        cadence.steps.note_saved()
        assert step is not None, "there is a step counter"
        _warn(cadence.numbers.see(objects_of(save_state.tracked), step))
    if cadence.clock is not None:
        cadence.clock.reset(began)
    cadence.decision = Decision(True, saving.reasons)
    if told_to_stop:
        note_saved(cadence)
    session.events.tell(
        SAVE,
        seconds=time.monotonic() - began,
        checkpoint=attempt.prefix,
        step=step,
        detail={"asynchronous": options.enable_async},
    )
    return session.shown(attempt.prefix)


def _warn(text: str | None) -> None:
    if text is not None:
        _logger.warning("%s", text)


def _write(
    session: Session,
    save_state: SaveState,
    attempt: Attempt,
    captured: Captured,
    plan: SavePlan,
) -> shard_file.Written:
    # Ctrl-C while the save was begun: nothing is written yet, so it can end here.
    session.decisions.lane.worker.raise_interrupt()
    file = save_state.file_of(captured, plan.layouts)
    draft = save_state.draft(attempt, captured, file)
    target = session.directory.new_shard(attempt, session.rank, session.world_size)
    return shard_file.write_outlined(target, draft, file.outline, file.loader(captured))


# The last save of a job that is told to stop


def _committed_on_return(request: Ran[Request]) -> Ran[Request]:
    """Save at once and wait for it: nobody knows how much time there will be after it."""

    def changed() -> Request:
        options = request.value().options
        options = replace(options, enable_async=False, when_busy="wait")
        return replace(request.result, options=options)

    return Ran(changed)


def _end_with_the_last(session: Session, save_state: SaveState, cadence: Cadence) -> None:
    """See to it that the save at this very step is committed."""
    if save_state.flight is not None:
        bring_in(session, save_state, cadence)
    cadence.decision = Decision(False, ("told to stop, and this step is saved",))
    note_saved(cadence)


# An asynchronous save under way


def _look_after_flight(session: Session, save_state: SaveState, cadence: Cadence) -> None:
    """Ask now and then what has become of it; all ranks at the same call."""
    if save_state.flight is not None:
        save_state.flight.calls_left -= 1
        if save_state.flight.calls_left <= 0:
            bring_in(session, save_state, cadence, wait=False)


def _clear_the_way(
    session: Session, save_state: SaveState, cadence: Cadence, request: Ran[Request]
) -> bool:
    """Bring in the one under way before another save; False to skip that one."""
    waits = request.error is None and request.result.options.when_busy == "wait"
    call = Ran(lambda: request.value().vote(Phase.LAND))
    flight = save_state.flight
    if bring_in(session, save_state, cadence, call, wait=waits):
        return True
    if session.chief is not None and flight is not None:
        step, under_way = request.result.step, flight.attempt.prefix
        _logger.warning("no save at step %s: %s is still under way", step, under_way)
    busy = "the save before" if flight is None else flight.attempt.prefix
    cadence.decision = Decision(False, (f"{busy} is still under way",))
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


def _compare_calls(session: Session, call: Ran[Vote]) -> None:
    # Bad arguments of one rank must reach all of them, so they are a vote too.

    def decide(votes: Sequence[Vote]) -> Answer:
        raise_failures(votes, "save() was refused", SaveFailed)
        check_called_alike(votes)
        return {}

    agree(session.decisions, Phase.DECIDE, call, decide, says=lambda vote: vote)


def _begin(session: Session, request: Ran[Request], counter: int) -> Attempt:
    """S2 (chief): make the pending directory of a new attempt."""
    assert session.chief is not None
    try:
        return session.chief.begin(request.result.number, counter)
    except StorageError as error:
        text = f"the save could not be begun on the chief: {error}"
        msg = f"saving into {session.directory}: {text}; no checkpoint was made."
        raise SaveFailed(msg, {0: text}) from error
