"""``CheckpointManager``: the public methods, each a few lines over the protocols."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import TracebackType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from distckpt import identity, paths, policy, readers, strict_json, values
from distckpt.checkpoint import Checkpoint
from distckpt.chief import Chief
from distckpt.comm import Answer, open_channels
from distckpt.errors import (
    ConfigError,
    DistckptError,
    FencedError,
    ManagerBroken,
    RestoreFailed,
    StorageError,
    UnsupportedError,
)
from distckpt.job import Job, run_phase
from distckpt.messages import Phase, Vote, raise_failures
from distckpt.record import digest
from distckpt.restore import restore_or_initialize
from distckpt.save import CheckpointOptions, save

_logger = logging.getLogger(__name__)
_Result = TypeVar("_Result")

_DEFAULT_TIMEOUT = timedelta(minutes=5)


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
        directory: The run directory, the same on every rank; made when it is claimed.
        max_to_keep: How many checkpoints to manage; None keeps all.
        keep_checkpoint_every_n_hours: Of those that are dropped, preserve one for every
            so many hours.
        checkpoint_name: The first part of every checkpoint's name.
        step_counter: The training step: anything ``int()`` accepts that changes (a
            0-dim tensor, a counter object), or a callable.
        checkpoint_interval: Least number of steps between two saves; needs
            ``step_counter``.
        init_fn: Called by ``restore_or_initialize`` where there is nothing to restore.
        process_group: The ranks that checkpoint together; None means all. Any backend:
            the manager makes gloo groups of its own.
        timeout: How long to wait for another rank.
        takeover: Fence another live job that holds the directory.

    Raises:
        ConfigError, UnsupportedError: A bad argument, on every rank.
        CorruptStateError, StorageError: The directory's state cannot be read.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        directory: readers.Path,
        max_to_keep: int | None,
        keep_checkpoint_every_n_hours: float | None = None,
        checkpoint_name: str = "ckpt",
        step_counter: Any = None,
        checkpoint_interval: int | None = None,
        init_fn: Callable[[], Any] | None = None,
        *,
        process_group: dist.ProcessGroup | None = None,
        timeout: timedelta = _DEFAULT_TIMEOUT,
        takeover: bool = False,
    ) -> None:
        self._unusable: DistckptError | None = None
        # A bad timeout must reach all ranks too, and for that they have to be connected.
        is_timeout = isinstance(timeout, timedelta) and timeout > timedelta(0)
        wait = timeout if is_timeout else _DEFAULT_TIMEOUT
        decisions, commits = open_channels(process_group, wait, 2)
        made: list[tuple[Job, Callable[[], Chief]]] = []

        def body() -> Vote:
            # Bad arguments of one rank must reach all of them, so they are a vote too.
            root = readers.checked_path(directory)
            if not is_timeout:
                msg = f"timeout must be a positive datetime.timedelta, got {timeout!r}."
                raise ConfigError(msg)
            _check_arguments(checkpoint, checkpoint_name, checkpoint_interval, init_fn)
            retention = policy.Retention(max_to_keep, keep_checkpoint_every_n_hours)
            gate = policy.IntervalGate(checkpoint_interval)
            if checkpoint_interval is not None and step_counter is None:
                msg = "step_counter must be given if checkpoint_interval is not None."
                raise ConfigError(msg)
            job = Job(
                checkpoint=checkpoint,
                directory=root,
                decisions=decisions,
                commits=commits,
                gate=gate,
                read_step=_step_reader(step_counter),
                init_fn=init_fn,
                timeout_seconds=wait.total_seconds(),
            )

            def make_chief() -> Chief:
                return Chief(
                    root,
                    checkpoint_name=checkpoint_name,
                    retention=retention,
                    identity=identity.current(),
                    takeover=takeover,
                )

            made.append((job, make_chief))
            arguments = [
                root,
                max_to_keep,
                keep_checkpoint_every_n_hours,
                checkpoint_name,
                checkpoint_interval,
                bool(takeover),
            ]
            key = digest(strict_json.dumps(values.encode(arguments)).encode())
            return Vote(Phase.CONSTRUCT, digest_a=bytes.fromhex(key))

        def decide(votes: Sequence[Vote]) -> Answer:
            raise_failures(votes, "making a CheckpointManager failed", RestoreFailed)
            if len({vote.digest_a for vote in votes}) > 1:
                ranks = [v.rank for v in votes if v.digest_a != votes[0].digest_a]
                msg = (
                    "CheckpointManager was made with other arguments on ranks "
                    f"{ranks[:16]} than on the chief; they must be the same everywhere."
                )
                raise ConfigError(msg)
            job, make_chief = made[0]
            job.chief = make_chief()
            return job.lists()

        answer = run_phase(decisions, Phase.CONSTRUCT, body, decide)
        self._job = made[0][0]
        self._job.take_lists(answer)

    @property
    def checkpoint(self) -> Checkpoint:
        """The objects that are saved."""
        return self._job.checkpoint

    @property
    def directory(self) -> str:
        """The run directory, as it was given."""
        return self._job.directory

    @property
    def checkpoint_interval(self) -> int | None:
        """Least number of steps between two saves."""
        return self._job.gate.interval

    @property
    def latest_checkpoint(self) -> str | None:
        """Path of the newest checkpoint, the same on every rank; None if there is none."""
        latest = self._job.latest
        return None if latest is None else self._job.path(latest)

    @property
    def checkpoints(self) -> list[str]:
        """Paths of the managed checkpoints, oldest first, the same on every rank."""
        return [self._job.path(prefix) for prefix in self._job.checkpoints]

    def save(
        self,
        checkpoint_number: int | None = None,
        check_interval: bool = True,
        options: CheckpointOptions | None = None,
    ) -> str | None:
        """Save a checkpoint, if the interval allows one at this step.

        May be called at every step. A call that the step interval rules out makes no
        collective and returns None. After return of a path the checkpoint is committed:
        durable, whole, and never lost.

        Called by: every rank. Collectives: some, if a save is due.

        Args:
            checkpoint_number: Number to save under, instead of the next one; it may
                replace a checkpoint that has it.
            check_interval: Whether to heed ``checkpoint_interval``; a call at the step of
                the last save returns None all the same.
            options: How to save.

        Returns:
            The checkpoint's path, ``<directory>/<checkpoint_name>-<number>``, or None.

        Raises:
            SaveFailed: Some ranks failed; no checkpoint was made, older ones are safe,
                and the next save may work.
            ConfigError: Ranks called it differently, or the next number is that of a
                live checkpoint.
            UnsupportedError: Something tracked cannot be stored.
            OutcomeUnknown: The disk will not say whether it was committed.
            FencedError, DirectoryInUseError: The directory belongs to another manager.
            ManagerBroken: Another rank is gone; restart the job.
        """
        return self._run(
            lambda: save(self._job, checkpoint_number, check_interval, options)
        )

    def restore_or_initialize(self) -> str | None:
        """Restore the newest checkpoint that verifies; without any, call ``init_fn``.

        All ranks restore the same one. One that is corrupt, confirmed by the chief, or
        unreadable twice is passed over for the next older, together. Only a directory
        in which nothing was ever committed is a fresh start.

        Called by: every rank. Collectives: some.

        Returns:
            Path of what was restored; None if there was nothing.

        Raises:
            MismatchError: The newest does not fit the live objects; lists everything,
                nothing was changed.
            RestoreFailed: Nothing could be restored, or user code failed; the message
                says whether tensors were touched.
            FencedError, DirectoryInUseError: The directory belongs to another manager.
            ManagerBroken: Another rank is gone; restart the job.
        """
        return self._run(lambda: restore_or_initialize(self._job))

    def sync(self) -> None:
        """Wait for what is outstanding, on all ranks.

        After return all deletions are done and all ranks hold the same
        ``latest_checkpoint``.

        Called by: every rank. Collectives: one round.

        Raises:
            StorageError: Deletions are still running at the deadline.
            ManagerBroken: Another rank is gone; restart the job.
        """
        self._run(self._sync)

    def _sync(self) -> None:
        job = self._job

        def decide(votes: Sequence[Vote]) -> Answer:
            assert job.chief is not None
            if not job.wait_for_deletions():
                msg = f"{job.directory}: deletions are still running at the deadline."
                raise StorageError(msg, operation="delete", path=job.directory)
            return job.lists()

        job.take_lists(job.decisions.consult(Vote(Phase.SYNC), decide))

    def close(self) -> None:
        """Wait for what is outstanding on all ranks, then let go of the directory.

        The manager cannot be used any more. Harmless when it is closed already.

        Called by: every rank. Collectives: one round, unless the manager is broken.
        """
        if self._unusable is None:
            try:
                self._sync()
            finally:
                self._let_go(ManagerBroken("this manager is closed."))
                self._job.decisions.close()
                self._job.commits.close()
        elif not isinstance(self._unusable, ManagerBroken):
            self._let_go(ManagerBroken("this manager is closed."))

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
            # The other ranks may be anywhere: no collective, or the error that matters
            # would show only at the deadline.
            self._let_go(ManagerBroken("this manager was left by an error."))

    def _let_go(self, reason: DistckptError) -> None:
        self._unusable = reason
        if self._job.chief is not None:
            self._job.chief.close()

    def _run(self, call: Callable[[], _Result]) -> _Result:
        if self._unusable is not None:
            raise type(self._unusable)(str(self._unusable)) from self._unusable
        try:
            return call()
        except (ManagerBroken, FencedError) as error:
            self._let_go(error)
            raise
        except (KeyboardInterrupt, SystemExit) as error:
            if self._job.world_size > 1:
                self._let_go(ManagerBroken(f"interrupted in a call: {error!r}"))
            raise


def _check_arguments(
    checkpoint: Any, checkpoint_name: Any, checkpoint_interval: Any, init_fn: Any
) -> None:
    if not isinstance(checkpoint, Checkpoint):
        msg = f"checkpoint must be a distckpt.Checkpoint, got {checkpoint!r:.100}."
        raise ConfigError(msg)
    if not isinstance(checkpoint_name, str) or not paths.is_checkpoint_name(
        checkpoint_name
    ):
        msg = (
            f"checkpoint_name must be letters, digits, '.', '_' and '-', not starting "
            f"with '.' or '-' and not ending with '-'; got {checkpoint_name!r:.200}."
        )
        raise ConfigError(msg)
    if init_fn is not None and not callable(init_fn):
        msg = f"init_fn must be callable, got {init_fn!r:.100}."
        raise ConfigError(msg)


def _step_reader(step_counter: Any) -> Callable[[], int] | None:
    if step_counter is None:
        return None
    if type(step_counter) in (int, bool, float):
        msg = (
            f"step_counter={step_counter!r} is a plain number, which never changes; pass "
            "a 0-dim tensor that is the step, or a callable that returns it."
        )
        raise UnsupportedError(msg)
    if isinstance(step_counter, torch.Tensor):
        if step_counter.numel() != 1:
            msg = f"step_counter must have one element, got {tuple(step_counter.shape)}."
            raise ConfigError(msg)
        if step_counter.device.type != "cpu":
            _logger.warning(
                "step_counter is on %s: reading it at every save() call waits for the "
                "device; keep it on the CPU.",
                step_counter.device,
            )
        return lambda: int(step_counter)
    if callable(step_counter):
        return lambda: int(step_counter())
    return lambda: int(step_counter)
