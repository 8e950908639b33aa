"""Making a manager: check its arguments on every rank, read what is committed.

Bad arguments are votes like every other error: those of one rank reach all of them.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from distckpt import identity, paths, readers, storage, strict_json, values
from distckpt.checkpoint import Checkpoint
from distckpt.chief import Chief
from distckpt.clock import Clock
from distckpt.comm import Answer, Channel
from distckpt.errors import (
    ConfigError,
    DistckptError,
    ManagerBroken,
    RestoreFailed,
    StorageError,
    UnsupportedError,
)
from distckpt.events import DELETE, Events, Sink
from distckpt.exchange_plan import is_faster_once
from distckpt.gate import IntervalGate
from distckpt.groups import invite, open_channels
from distckpt.janitor import Janitor
from distckpt.job import Job, Ran, Stop, agree
from distckpt.liveness import Liveness
from distckpt.lookout import Lookout
from distckpt.messages import Phase, Vote, describe, raise_failures
from distckpt.paths import Attempt
from distckpt.policy import OnSignal, spelled
from distckpt.preemption import Notice
from distckpt.pretrained import Pretrained
from distckpt.record import digest
from distckpt.replica_digests import ALWAYS, SAMPLED, UNCHECKED, Replicas
from distckpt.retention import Retention
from distckpt.sinks import History, say_line
from distckpt.waiting import Whereabouts
from distckpt.worker import Worker

_logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT = timedelta(minutes=5)
_STORAGE_SHARE = 0.75
_LOOK_SECONDS = 5.0
# What is replicated is read by each rank, or once for all.
AUTO, EACH, ONCE = "auto", "each", "once"
_BOOT_ID_FILE = "/proc/sys/kernel/random/boot_id"
_BOOT_ID_BYTES = 64


@dataclass(frozen=True, slots=True)
class Arguments:
    """What a manager was given; see ``CheckpointManager``."""

    checkpoint: Any
    directory: Any
    max_to_keep: Any
    keep_checkpoint_every_n_hours: Any
    checkpoint_name: Any
    step_counter: Any
    checkpoint_interval: Any
    init_fn: Any
    timeout: Any
    takeover: Any
    read_replicated: Any = AUTO
    replicas: Any = SAMPLED
    on_event: Any = ()

    @property
    def wait(self) -> timedelta:
        """How long to wait for another rank: the default, if what was given is bad.

        For a bad timeout to reach all ranks they have to be connected.
        """
        good = isinstance(self.timeout, timedelta) and self.timeout > timedelta(0)
        return self.timeout if good else DEFAULT_TIMEOUT

    def sinks(self) -> list[Sink]:
        """Return who is told of events, checked."""
        given = self.on_event
        sinks = [given] if callable(given) else given
        if not isinstance(sinks, (list, tuple)) or not all(map(callable, sinks)):
            msg = f"on_event must be callable, or a list of such, got {given!r:.100}."
            raise ConfigError(msg)
        return [*sinks]

    def retention(self) -> Retention:
        """Return the retention rule, checked."""
        return Retention(self.max_to_keep, self.keep_checkpoint_every_n_hours)

    def digest(self) -> bytes:
        """Return what must be equal on all ranks."""
        fields = [
            readers.checked_path(self.directory),
            self.retention().spelled(),
            self.checkpoint_name,
            spelled(self.checkpoint_interval),
            bool(self.takeover),
            self.read_replicated,
            self.replicas,
        ]
        return bytes.fromhex(digest(strict_json.dumps(values.encode(fields)).encode()))


def construct(arguments: Arguments, process_group: dist.ProcessGroup | None) -> Job:
    """Connect the ranks, check the arguments and read what is committed: collective.

    Writes nothing: the directory is claimed by the first save or restore.

    Raises:
        ConfigError, UnsupportedError: A bad argument, on every rank.
        CorruptStateError, StorageError: The directory's state cannot be read.
    """
    # A rank whose filesystem hangs gives up before the others give up waiting for it.
    # One for both lanes: what a call that hangs has left behind must be over before any
    # other work of this manager begins.
    worker = Worker(_STORAGE_SHARE * arguments.wait.total_seconds())
    whereabouts = Whereabouts()
    lanes = [
        whereabouts.lane("decisions", worker, "in no call of this manager"),
        whereabouts.lane("commits", worker, "saving nothing"),
    ]
    decisions, commits = open_channels(process_group, arguments.wait, lanes)
    try:
        connect = invite([decisions, commits], whereabouts)
        made = Ran(lambda: _make_job(arguments, decisions, commits, connect()))
        job = _agree_on_job(arguments, made, decisions)
        worker.raise_interrupt()
        if job.stop is not None:
            job.stop.notice.begin()
        decisions.lane.be_idle()
        return job
    except BaseException as error:
        # An answer of the chief ends it on every rank; else somebody may be waiting.
        is_answer = isinstance(error, DistckptError) and not isinstance(
            error, ManagerBroken
        )
        for channel in (decisions, commits):
            channel.close("" if is_answer else describe(error))
        raise


def _agree_on_job(arguments: Arguments, made: Ran[Job], decisions: Channel) -> Job:
    def decide(votes: Sequence[Vote]) -> Answer:
        raise_failures(votes, "making a CheckpointManager failed", RestoreFailed)
        ranks = [vote.rank for vote in votes if vote.digest_a != votes[0].digest_a]
        if ranks:
            msg = (
                f"CheckpointManager was made with other arguments on ranks {ranks[:16]} "
                "than on the chief; they must be the same everywhere."
            )
            raise ConfigError(msg)
        job = made.result
        # Not the job: a deletion under way would keep the lock of one that is let go.
        events = job.events
        events.add(History(job.directory))
        events.add(say_line)

        def tell_of_deletion(attempt: Attempt, seconds: float) -> None:
            events.tell(DELETE, seconds=seconds, checkpoint=attempt.prefix)

        job.chief = Chief(
            job.directory,
            checkpoint_name=arguments.checkpoint_name,
            retention=arguments.retention(),
            identity=identity.current(),
            takeover=bool(arguments.takeover),
            # The other ranks wait for the chief while it waits for the lock.
            max_lock_wait_seconds=job.timeout_seconds / 2,
            janitor=Janitor(job.directory, tell_of_deletion),
        )
        if job.gate.when.clocked:
            job.clock = Clock(job.gate.when.clocked)
        if job.gate.when.asked:
            what, look = "requests of other processes", job.chief.save_requests
            job.requests = Lookout(what, look, _look_worker(job.timeout_seconds))
        num_hosts = len({vote.digest_b for vote in votes})
        return {**job.lists(), "hosts": num_hosts}

    answer = agree(
        decisions,
        Phase.CONSTRUCT,
        made,
        decide,
        says=lambda _: Vote(
            Phase.CONSTRUCT, digest_a=arguments.digest(), digest_b=_host(arguments)
        ),
    )
    job = made.result
    job.take_lists(answer)
    job.reads_once = job.world_size > 1 and (
        arguments.read_replicated == ONCE
        or (
            arguments.read_replicated == AUTO
            and is_faster_once(job.world_size, answer["hosts"])
        )
    )
    return job


def _host(arguments: Arguments) -> bytes:
    """Return what tells this rank's host from others, where that matters."""
    boot_id = b""
    if arguments.read_replicated == AUTO:
        with suppress(StorageError), storage.OpenFile(_BOOT_ID_FILE) as file:
            boot_id = file.read(0, _BOOT_ID_BYTES)
    return identity.host(boot_id)


def _make_job(
    arguments: Arguments,
    decisions: Channel,
    commits: Channel,
    liveness: Liveness | None,
) -> Job:
    if arguments.wait is not arguments.timeout:
        msg = f"timeout must be a positive datetime.timedelta, got {arguments.timeout!r}."
        raise ConfigError(msg)
    if not isinstance(arguments.checkpoint, Checkpoint):
        msg = (
            f"checkpoint must be a distckpt.Checkpoint, got {arguments.checkpoint!r:.100}."
        )
        raise ConfigError(msg)
    name = arguments.checkpoint_name
    if not isinstance(name, str) or not paths.is_checkpoint_name(name):
        msg = (
            "checkpoint_name must be letters, digits, '.', '_' and '-', not starting with "
            f"'.' or '-' and not ending with '-'; got {name!r:.200}."
        )
        raise ConfigError(msg)
    init_fn = arguments.init_fn
    if not (init_fn is None or callable(init_fn) or isinstance(init_fn, Pretrained)):
        msg = f"init_fn must be callable, or from_pretrained(...), got {init_fn!r:.100}."
        raise ConfigError(msg)
    if arguments.read_replicated not in (AUTO, EACH, ONCE):
        msg = (
            f"read_replicated must be {AUTO!r}, {EACH!r} or {ONCE!r}, got "
            f"{arguments.read_replicated!r:.100}."
        )
        raise ConfigError(msg)
    if arguments.replicas not in (SAMPLED, ALWAYS, UNCHECKED):
        msg = (
            f"replicas must be {SAMPLED!r}, {ALWAYS!r} or {UNCHECKED!r}, got "
            f"{arguments.replicas!r:.100}."
        )
        raise ConfigError(msg)
    retention = arguments.retention()
    gate = IntervalGate(arguments.checkpoint_interval)
    needs_steps = gate.when.interval is not None or retention.needs_steps
    if needs_steps and arguments.step_counter is None:
        msg = "step_counter must be given if checkpoint_interval or max_to_keep has steps."
        raise ConfigError(msg)
    return Job(
        replicas=Replicas(arguments.replicas),
        checkpoint=arguments.checkpoint,
        directory=readers.checked_path(arguments.directory),
        decisions=decisions,
        commits=commits,
        liveness=liveness,
        gate=gate,
        read_step=_step_reader(arguments.step_counter),
        init_fn=arguments.init_fn,
        timeout_seconds=arguments.wait.total_seconds(),
        stop=_stop(gate.when.told, arguments.wait.total_seconds()),
        events=Events(arguments.sinks(), decisions.rank),
    )


def _stop(told: OnSignal | None, timeout_seconds: float) -> Stop | None:
    if told is None:
        return None
    if told.signals and threading.current_thread() is not threading.main_thread():
        msg = "on_signal: signals can be handled by a manager of the main thread only."
        raise ConfigError(msg)
    file, path = None, told.file
    if path is not None:
        what, worker = "the file that tells to stop", _look_worker(timeout_seconds)
        file = Lookout(what, lambda: storage.exists(path), worker)
    return Stop(Notice(told.signals), file, told.grace_period_seconds)


def _look_worker(timeout_seconds: float) -> Worker:
    # Gives up before the others give up waiting for this rank.
    return Worker(min(_LOOK_SECONDS, _STORAGE_SHARE * timeout_seconds))


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
