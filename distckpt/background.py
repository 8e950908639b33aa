"""What of an asynchronous save goes on behind the training loop, and how it is brought in.

Its outcome shows on all ranks at the same call: the first one at which the chief knows it.
"""

from __future__ import annotations

import atexit
import threading
from collections.abc import Sequence
from functools import partial

from distckpt import shard_file
from distckpt.agree import Ran, agree
from distckpt.cadence import Cadence
from distckpt.capture import Captured
from distckpt.comm import Answer, How
from distckpt.commit import write_and_commit
from distckpt.errors import ManagerBroken, OutcomeUnknown, SaveFailed
from distckpt.events import STAGE
from distckpt.flight import Flight
from distckpt.messages import Phase, Vote, check_called_alike, raise_failures
from distckpt.save_plan import SavePlan
from distckpt.save_state import SaveState
from distckpt.session import Session
from distckpt.snapshot import Snapshot
from distckpt.worker import yield_to_others

# How long a process that ends waits for a save under way.
EXIT_SECONDS = 30.0
# For the outcome of a save, when its manager broke elsewhere.
_LAST_SECONDS = 1.0
# For all ranks to hear that Ctrl-C has ended a save, before this one is seen to leave.
_TELL_SECONDS = 5.0
# How often to look whether a save is through.
_ASK_SECONDS = 1.0
# How long a change may take that is under way when its tensor is copied.
_SETTLE_SECONDS = 1.0


def take_off(
    session: Session,
    save_state: SaveState,
    flight: Flight,
    captured: Captured,
    plan: SavePlan,
    *,
    lazily: bool,
) -> None:
    """S4: copy what is saved; all the rest goes on behind the caller.

    Args:
        session: The manager's, on this rank.
        save_state: The state that saves need.
        flight: The save; the job's from now on.
        captured: What this rank has to save.
        plan: What all ranks agreed to write.
        lazily: Leave what only the steps of optimizers change to be copied later.
    """
    # Not raised here: the other ranks must hear of it, so it will be this one's vote.
    staged = Ran(lambda: _stage(session, save_state, flight, captured, plan, lazily))
    # Where no optimizer is tracked, all is copied by now. To hold the steps all the same
    # would import torch's compiler: a second or more, where nobody has made an optimizer.
    lazily = lazily and staged.error is None and staged.result.is_waiting
    if lazily:
        flight.hold_streams = staged.result.hold_stream
        flight.let_go = staged.result.let_go
        flight.hold_optimizers()
    save_state.flight = flight
    atexit.register(flight.wait_done, EXIT_SECONDS)
    fly = partial(_fly, session, flight, plan, staged, lazily)
    flight.thread = threading.Thread(target=fly, name="distckpt-save", daemon=True)
    try:
        flight.thread.start()
    except RuntimeError:  # no thread to be had: better done now than not at all
        fly()
    if staged.error is not None and not isinstance(staged.error, Exception):
        # Ctrl-C. Who hears first that this rank is gone knows nothing of the outcome.
        flight.done.wait(_TELL_SECONDS)
        raise staged.error


def _stage(
    session: Session,
    save_state: SaveState,
    flight: Flight,
    captured: Captured,
    plan: SavePlan,
    lazily: bool,
) -> Snapshot:
    # Ctrl-C while the save was begun: nothing is copied yet, so it can end here.
    session.decisions.lane.worker.raise_interrupt()
    file = save_state.file_of(captured, plan.layouts)
    draft = save_state.draft(flight.attempt, captured, file)
    size = shard_file.image_bytes(draft, file.outline)
    leaves = (captured.shared, captured.per_rank)
    pinned = any(leaf.known.device == "cuda" for p in leaves for leaf in p.tensors.values())
    later = captured.shared.optimized | captured.per_rank.optimized if lazily else ()
    arena = save_state.arena_for(size, pinned)
    return Snapshot(arena, file.moves(captured, later), draft, file.outline)


def _fly(
    session: Session, flight: Flight, plan: SavePlan, staged: Ran[Snapshot], lazily: bool
) -> None:
    """Bring a save to its end; on a thread of its own."""
    yield_to_others()
    attempt = flight.attempt
    target = session.directory.new_shard(attempt, session.rank, session.world_size)
    copied = Ran(lambda: staged.value().copy_rest())
    flight.staged.set()

    def write() -> shard_file.Written:
        copied.value()
        written = staged.result.write(target)
        if lazily:
            # A change that began while its tensor was copied may still go on.
            flight.released.wait(_SETTLE_SECONDS)
            staged.result.check_unchanged()
        return written

    if copied.error is None:
        session.events.tell(
            STAGE,
            seconds=staged.seconds + copied.seconds,
            checkpoint=attempt.prefix,
            step=flight.saving.step,
            size_bytes=staged.result.size_bytes,
        )
    try:
        flight.answer = write_and_commit(session, flight.saving, plan, write, yields=True)
    except BaseException as error:
        # Ctrl-C was raised where it came; later this rank says what all others say.
        flight.error = error if isinstance(error, Exception) else error.__cause__ or error
    finally:
        session.commits.lane.be_idle()
        flight.finish()


def bring_in(
    session: Session,
    save_state: SaveState,
    cadence: Cadence,
    call: Ran[Vote] | None = None,
    *,
    wait: bool = True,
) -> bool:
    """Learn together what came of the asynchronous save under way: collective.

    Args:
        session: The manager's, on this rank.
        save_state: The state that saves need.
        cadence: The rules for when to save.
        call: What this rank's call of ``save()`` says of itself, to be compared.
        wait: Wait until the outcome is there.

    Returns:
        Whether it is through, and committed; False if it goes on.

    Raises:
        DistckptError: It was not committed. All is as if it had never begun.
    """
    flight = save_state.flight
    assert flight is not None
    call = call or Ran(lambda: Vote(Phase.LAND))
    flight.release()
    if wait and call.error is None:
        flight.wait_staged()
        flight.done.wait()
    try:
        answer = agree(
            session.decisions,
            Phase.LAND,
            call,
            lambda votes: _judge(save_state, cadence, votes),
            says=lambda vote: vote,
            how=How(at_once=True),
        )
    except ManagerBroken as error:
        # The save may know more: whether it was committed.
        flight.done.wait(_LAST_SECONDS)
        if isinstance(flight.error, ManagerBroken):
            raise flight.error from error
        told = _with_outcome(session, flight, error)
        if told is None:
            raise
        raise told from error
    if not answer["landed"]:
        flight.calls_left = answer["calls"]
        return False
    flight.done.wait()
    flight.wait_for_thread()
    save_state.flight = None
    atexit.unregister(flight.wait_done)
    flight.release_optimizers()
    if flight.error is not None:
        _undo(save_state, cadence, flight)
        raise flight.error
    assert flight.answer is not None
    cadence.save_seconds.append(flight.seconds)
    session.take_changes(flight.answer)
    return True


def _with_outcome(
    session: Session, flight: Flight, error: ManagerBroken
) -> ManagerBroken | None:
    """Say what this rank knows of a save that cannot be agreed on any more, if it does."""
    path = session.path(flight.attempt.prefix)
    if flight.answer is not None:
        committed, text = True, f"{path} was committed before."
    elif flight.error is not None and not isinstance(flight.error, OutcomeUnknown):
        committed, text = False, f"{path} was not committed: {flight.error}"
    else:
        return None
    told = type(error)(f"{error} {text}", error.ranks)
    told.committed = committed
    return told


def _judge(save_state: SaveState, cadence: Cadence, votes: Sequence[Vote]) -> Answer:
    raise_failures(votes, "save() was refused", SaveFailed)
    check_called_alike(votes)
    assert save_state.flight is not None
    return {
        "landed": save_state.flight.done.is_set(),
        "calls": cadence.pace.calls_in(_ASK_SECONDS),
    }


def _undo(save_state: SaveState, cadence: Cadence, flight: Flight) -> None:
    """Set numbering and interval back to where they were before the save."""
    if cadence.gate.last_step == flight.saving.step:
        cadence.gate.last_step = flight.last_step
    if cadence.clock is not None:
        cadence.clock.undo()
    # After an unknown outcome the number may be in use.
    is_free = not isinstance(flight.error, OutcomeUnknown)
    if is_free and save_state.tracked.save_counter == flight.counter + 1:
        save_state.tracked.save_counter = flight.counter
