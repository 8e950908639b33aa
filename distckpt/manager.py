"""``CheckpointManager``: the public methods, each a few lines over the protocols."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from types import TracebackType
from typing import Any, Literal, TypeVar

import torch.distributed as dist

from distckpt.background import EXIT_SECONDS, bring_in
from distckpt.cadence import Cadence
from distckpt.checkpoint import Checkpoint
from distckpt.comm import Answer
from distckpt.construct import DEFAULT_TIMEOUT, Arguments, construct
from distckpt.errors import (
    DistckptError,
    FencedError,
    ManagerBroken,
    StorageError,
    StorageTimeout,
)
from distckpt.events import ERROR, FENCE, Sink
from distckpt.gate import Decision
from distckpt.messages import Phase, Vote, describe
from distckpt.policy import Best, KeepFunction, Rule
from distckpt.pretrained import Pretrained
from distckpt.restore import restore, restore_or_initialize
from distckpt.restore_names import RestoreOptions
from distckpt.save import Call, CheckpointOptions, save
from distckpt.save_state import SaveState
from distckpt.session import Session
from distckpt.worker import Worker

_logger = logging.getLogger(__name__)

_Result = TypeVar("_Result")

_CLOSED = (
    "this manager is closed: close() was called, or the with block has ended. Call save() "
    "and restore() before that."
)
_UNLOCK_SECONDS = 1.0
# How long one that closes waits until all events are told.
_TELL_SECONDS = 1.0


class CheckpointManager:
    """Save, keep and restore the checkpoints of one training job.

    What ``tf.train.CheckpointManager`` is for TensorFlow, for many ranks: names, order,
    defaults and meaning of the arguments are the same; docs/tensorflow.md lists the
    deliberate differences.

    Making one is collective, reads, and writes nothing. The first ``save()`` or
    ``restore_or_initialize()`` claims the directory and fences older managers. All
    public methods are collective: every rank must make the same calls in the same
    order. All return the same, or raise the same.

    Args:
        checkpoint: The objects to save.
        directory: The run directory, the same on every rank; made when it is claimed. A
            relative path is that of the working directory at this call.
        max_to_keep: How many checkpoints to manage; None keeps all. Or rules with ``|``
            between them, which keep what any of them wants: ``latest(3) | best(2,
            "val_loss", mode="min") | every(hours=6)``. Or a function from all checkpoints
            to those that stay. The newest stays in any case.
        keep_checkpoint_every_n_hours: Of those that are dropped, preserve one for every
            so many hours, or for each such timedelta.
        checkpoint_name: The first part of every checkpoint's name.
        step_counter: The training step: anything ``int()`` accepts that changes in place
            (a 0-dim tensor with ``step += 1``, a counter object), or a callable. A number
            is refused, as ``step = step + 1`` would leave it behind.
        checkpoint_interval: Least number of steps between two saves; needs
            ``step_counter``. None: every call saves. A timedelta: least time between two
            saves. Or rules with ``|`` between them, each of which has a save made:
            ``every(steps=500) | every(minutes=20)``;
            ``on_signal("SIGTERM")``: once more when the job is told to stop;
            ``on_request()``: when another process asks for it.
        init_fn: Called by ``restore_or_initialize`` where there is nothing to restore; or
            ``from_pretrained(path)``: what the modules then begin with.
        process_group: The ranks that checkpoint together; None means all. Any backend:
            the manager makes gloo groups of its own.
        timeout: How long to wait for a rank that shows no sign of progress, in seconds or
            as a timedelta; a call into the filesystem may take three quarters of it.
        takeover: Fence another live job that holds the directory.
        replicas: What a save compares of the state that several ranks hold alike. It fails,
            naming tensors and ranks, if they differ. ``"sampled"``: everything at the first
            save and at the first after a restore, later all that is small (neither
            parameters nor optimizer state) and blocks of the rest, in turn. ``"always"``:
            everything at each save. ``"unchecked"``: nothing. Buffers that differ are
            logged once.
        read_replicated: How a restore reads what all ranks have use for: what all want
            whole, and tensors that are cut along an inner dimension otherwise than when
            they were saved. ``"each"``: every rank for itself; ranks of one host find it
            in the page cache. ``"once"``: each rank a part of it, which it sends to all
            others; for storage that is slow for many hosts. ``"auto"``: the faster one, by
            the numbers of hosts and ranks; with one host always each
            (docs/decisions/0014).
        on_event: Called with an ``Event`` for everything that happens on this rank; or a
            list of such callables, as there are in ``distckpt.sinks``. On a thread of its
            own.

    Raises:
        ConfigError, UnsupportedError: A bad argument, on every rank.
        CorruptStateError, StorageError: The directory's state cannot be read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: str | os.PathLike[str],
        max_to_keep: int | Rule | KeepFunction | None,
        keep_checkpoint_every_n_hours: float | timedelta | None = None,
        checkpoint_name: str = "ckpt",
        step_counter: Any = None,
        checkpoint_interval: int | timedelta | Rule | None = None,
        init_fn: Callable[[], Any] | Pretrained | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        timeout: float | timedelta = DEFAULT_TIMEOUT,
        takeover: bool = False,
        read_replicated: Literal["auto", "each", "once"] = "auto",
        replicas: Literal["sampled", "always", "unchecked"] = "sampled",
        on_event: Sink | Sequence[Sink] = (),
    ) -> None:
        self._unusable: DistckptError | None = None
        arguments = Arguments(
            checkpoint=checkpoint,
            directory=directory,
            max_to_keep=max_to_keep,
            keep_checkpoint_every_n_hours=keep_checkpoint_every_n_hours,
            checkpoint_name=checkpoint_name,
            step_counter=step_counter,
            checkpoint_interval=checkpoint_interval,
            init_fn=init_fn,
            timeout=timeout,
            takeover=takeover,
            read_replicated=read_replicated,
            replicas=replicas,
            on_event=on_event,
        )
        made = construct(arguments, process_group)
        self._session, self._save_state, self._cadence = made
        self._checkpoint = checkpoint
        self._init_fn = init_fn

    def __repr__(self) -> str:
        session: Session | None = self.__dict__.get("_session")
        if session is None:
            return "<CheckpointManager that could not be made>"
        facts = [
            f"rank {session.rank} of {session.world_size}",
            f"newest {session.latest}" if session.latest else "no checkpoint",
            f"{len(session.checkpoints)} managed",
        ]
        why = str(self._unusable or "").partition("\n")[0].rstrip(".")
        # Without what to do, which the error says.
        why = _CLOSED.partition(":")[0] if why and why in _CLOSED else why
        end = f"; {why:.200}" if why else ""
        return f"<CheckpointManager of {session.directory}: {', '.join(facts)}{end}>"

    @property
    def checkpoint(self) -> Checkpoint:
        """The objects that are saved."""
        return self._checkpoint

    @property
    def directory(self) -> str:
        """The run directory, as it was given."""
        return self._session.directory.spelling

    @property
    def checkpoint_interval(self) -> int | None:
        """Least number of steps between two saves; None if no rule has any."""
        return self._cadence.gate.when.interval

    @property
    def last_decision(self) -> Decision:
        """Why the last call of ``save()`` has saved, or not; which rules, in words.

        The last that returned: what raised an error has said so.
        """
        return self._cadence.decision or self._cadence.gate.refusal()

    @property
    def should_stop(self) -> bool:
        """Whether the job was told to stop; the same on every rank, from the same call on.

        Only with ``on_signal``. The ranks agree in ``save()``, which has then saved, unless
        there was no time left for it: leave the loop, and close the manager.
        """
        return self._cadence.stop is not None and self._cadence.stop.agreed

    @property
    def latest_checkpoint(self) -> str | None:
        """Path of the newest checkpoint, the same on every rank; None if there is none."""
        latest = self._session.latest
        return None if latest is None else self._session.shown(latest)

    @property
    def checkpoints(self) -> list[str]:
        """Paths of the managed checkpoints, oldest first, the same on every rank."""
        return [self._session.shown(prefix) for prefix in self._session.checkpoints]

    def save(
        self,
        checkpoint_number: int | None = None,
        check_interval: bool = True,
        options: CheckpointOptions | None = None,
        *,
        metrics: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> str | None:
        """Save a checkpoint, if the interval allows one at this step.

        May be called at every step. A call that the step interval rules out returns None
        without asking anybody, so ranks whose steps differ are found out only by a call
        that asks. After return of a path the checkpoint is committed: durable, complete
        and listed, until retention drops it or its number is saved again.

        With ``options.enable_async`` the state is copied on return, and the checkpoint not
        committed yet. A later call brings it in, on all ranks the same one, and raises if
        it failed, as if it had never begun; see ``CheckpointOptions``.

        With ``on_signal`` the ranks agree here on whether the job is told to stop, and the
        call at which they do saves, whatever the interval and synchronously.

        Called by: every rank. Collectives: none if the interval rules the call out; else
        two rounds, one more if ranks track different things, three more the first time.
        While an asynchronous save is under way, a round about every second; with
        ``on_signal`` another.

        Args:
            checkpoint_number: Number to save under, instead of the next one; it may
                replace a checkpoint that has it.
            check_interval: Whether to heed ``checkpoint_interval``; a call at the step of
                the last save returns None all the same.
            options: How to save.
            metrics: Numbers by name that are stored with the checkpoint; ``best(...)``
                goes by them. The chief's count.
            metadata: Anything plain, by name, for people and other programs. The chief's.

        Returns:
            The checkpoint's path, ``<directory>/<checkpoint_name>-<number>``, or None.

        Raises:
            SaveFailed: Some ranks failed; no checkpoint was made, older ones are safe,
                and the next save may work.
            ConfigError: Ranks called it differently, or the next number is that of a
                live checkpoint.
            UnsupportedError: Something tracked cannot be stored.
            RestoreFailed: A restore failed half-way before, so there is nothing to save.
            CorruptStateError, StorageError: The directory cannot be claimed.
            StorageTimeout: A call into the filesystem hangs on the chief.
            OutcomeUnknown: The disk will not say whether it was committed.
            FencedError, DirectoryInUseError: The directory belongs to another manager.
            ManagerBroken: Another rank is gone; its ``ranks`` say which, its
                ``committed`` what became of a save under way. Restart the job.
        """
        call = Call(checkpoint_number, check_interval, options, metrics, metadata)
        return self._run(lambda: save(self._session, self._save_state, self._cadence, call))

    def restore_or_initialize(self, options: RestoreOptions | None = None) -> str | None:
        """Restore the newest checkpoint that verifies; without any, call ``init_fn``.

        All ranks restore the same one. One that is corrupt, confirmed by the chief, or
        unreadable twice is passed over for the next older, together. Only a directory
        in which nothing was ever committed is a fresh start.

        Called by: every rank. Collectives: two rounds the first time, then up to four for
        each checkpoint that is tried.

        Args:
            options: What of it is restored, and under which names; by default all. The
                save counter is restored in any case.

        Returns:
            Path of what was restored; None if there was nothing.

        Raises:
            MismatchError: The newest does not fit the live objects; lists everything,
                nothing of it was read.
            RestoreFailed: Nothing could be restored, or user code failed; the message
                says whether tensors were touched.
            ConfigError, UnsupportedError: Something tracked cannot be restored into.
            CorruptStateError, StorageError, OutcomeUnknown: The directory cannot be
                claimed.
            StorageTimeout: A call into the filesystem hangs.
            FencedError, DirectoryInUseError: It belongs to another manager.
            ManagerBroken: Another rank is gone; restart the job.
        """
        return self._run(
            lambda: restore_or_initialize(*self._landed(), self._init_fn, options)
        )

    def restore(
        self,
        which: str | int | os.PathLike[str] | Best,
        options: RestoreOptions | None = None,
    ) -> str:
        """Restore one checkpoint of the run directory, by what it is.

        After return every rank holds its state. What is newer stays where it is, and keeps
        its number: the next save is the newest again. Of several that would do, the first
        that verifies; one that was asked for by number or path, or none.

        Called by: every rank, with the same argument. Collectives: as
        ``restore_or_initialize``, and one round more.

        Args:
            which: ``"latest"``; ``"best"``, by the first ``best(...)`` of ``max_to_keep``;
                ``best(1, "val_loss", mode="min")``; a number; a path as ``save()`` returns
                it, or the last part of it; the run directory itself means the latest.
            options: What to restore of it, under which names.

        Returns:
            The checkpoint's path.

        Raises:
            CheckpointNotFound: No such checkpoint is committed; lists those that are.
            ConfigError: Ranks asked for different ones, or for something unknown.
            RestoreFailed, MismatchError: As ``restore_or_initialize``.
        """
        return self._run(lambda: restore(*self._landed(), which, options))

    def _landed(self) -> tuple[Session, SaveState, Cadence]:
        """Bring in the save in progress, if there is one; returns what a call needs."""
        if self._save_state.flight is not None:
            bring_in(self._session, self._save_state, self._cadence)
        return self._session, self._save_state, self._cadence

    def wait_staged(self) -> None:
        """Wait until the state of the last asynchronous save is copied.

        After return everything may be changed. Needed after ``staging="lazy"`` where
        something other than the ``step()`` of an optimizer changes what one optimizes.

        Called by: any rank. Collectives: none.
        """
        if self._save_state.flight is not None:
            self._save_state.flight.wait_staged()

    def sync(self) -> None:
        """Wait for what is outstanding, on all ranks.

        After return an asynchronous save is committed, all deletions are done (but for what
        somebody reads) and all ranks hold the same ``latest_checkpoint``.

        Called by: every rank. Collectives: one round, one more with a save under way.

        Raises:
            SaveFailed, OutcomeUnknown, FencedError: What became of that save.
            StorageError: Deletions are still running at the deadline.
            ManagerBroken: Another rank is gone; restart the job.
        """
        self._run(self._sync)

    def _sync(self) -> None:
        session, _, _ = self._landed()

        def decide(votes: Sequence[Vote]) -> Answer:
            assert session.chief is not None
            if not session.wait_for_deletions():
                msg = f"{session.directory}: deletions are still running at the deadline."
                raise StorageError(msg, operation="delete", path=str(session.directory))
            return session.lists()

        session.take_lists(session.decisions.consult(Vote(Phase.SYNC), decide))

    def close(self) -> None:
        """Wait for what is outstanding on all ranks, then let go of the directory.

        The manager cannot be used any more. Harmless when it is closed already.

        Called by: every rank. Collectives: one round, unless the manager is broken.

        Raises:
            SaveFailed, OutcomeUnknown, FencedError: What became of a save under way.
            StorageError: Deletions are still running at the deadline.
            ManagerBroken: Another rank is gone. In any case the manager is closed.
        """
        if self._unusable is None:
            self._warn_of_few_saves()
            try:
                self._run(self._sync)
            finally:
                self._let_go(ManagerBroken(_CLOSED))
                self._session.close_channels()
        elif isinstance(self._unusable, FencedError):
            # All ranks were told in the same round, so nobody is left waiting.
            self._let_go(ManagerBroken(_CLOSED))
            self._session.close_channels()

    def _warn_of_few_saves(self) -> None:
        steps = self._cadence.steps
        text = None if steps is None else steps.at_close(self._session.latest)
        if text is not None:
            _logger.warning("%s", text)

    def __enter__(self) -> CheckpointManager:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            if self._save_state.flight is not None:
                # It can come to its end without this thread; a second Ctrl-C leaves it.
                self._save_state.flight.wait_done(EXIT_SECONDS)
            # The other ranks may be anywhere: no collective, or the error that matters
            # would show only at the deadline. Those that wait for this one are told.
            reason = f"its program raised {describe(error)}"
            self._let_go(ManagerBroken("this manager was left by an error."), reason)

    def _let_go(self, unusable: DistckptError, reason: str = "") -> None:
        """Be of no more use; with a reason if others may be waiting for this rank."""
        self._unusable = unusable
        if self._save_state.flight is not None:
            self._save_state.flight.release_optimizers()
        self._save_state.arena = None
        if self._cadence.stop is not None:
            self._cadence.stop.notice.end()
        if self._session.liveness is not None:
            self._session.liveness.leave(reason[:500])
        if self._session.chief is not None:
            # The lock's file may be on a filesystem that hangs.
            with suppress(StorageTimeout):
                Worker(_UNLOCK_SECONDS).finish(self._session.chief.close)
        # Last: whoever waits for this rank must not wait for those who are told.
        self._session.events.wait(_TELL_SECONDS)

    def _run(self, call: Callable[[], _Result]) -> _Result:
        if self._unusable is not None:
            raise _again(self._unusable) from self._unusable
        notice = None if self._cadence.stop is None else self._cadence.stop.notice
        if notice is not None:
            notice.enter()
        try:
            result = call()
        except DistckptError as error:
            kind = FENCE if isinstance(error, FencedError) else ERROR
            what = {"error": type(error).__name__, "text": str(error)[:500]}
            self._session.events.tell(kind, detail=what)
            if isinstance(error, FencedError):
                self._let_go(error)
            elif isinstance(error, ManagerBroken):
                self._let_go(error, describe(error))
            raise
        except (KeyboardInterrupt, SystemExit) as error:
            if self._session.world_size > 1:
                unusable = ManagerBroken(f"interrupted in a call: {error!r}")
                self._let_go(unusable, f"{error!r} in a call of the manager")
            raise
        finally:
            if notice is not None:
                notice.leave()
            self._session.decisions.lane.be_idle()
            # Ctrl-C in the midst of a commit waits until all ranks know its outcome.
            self._session.decisions.lane.worker.raise_interrupt()
        return result


def _again(error: DistckptError) -> DistckptError:
    """Make an error of an earlier call anew, with all that it tells."""
    if not isinstance(error, ManagerBroken):
        return type(error)(str(error))
    told = type(error)(str(error), error.ranks)
    told.committed = error.committed
    return told
