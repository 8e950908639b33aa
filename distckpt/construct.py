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
from numbers import Number
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

from distckpt import (
    files,
    identity,
    object_types,
    paths,
    run_checks,
    strict_json,
    values,
    words,
)
from distckpt.agree import Ran, agree
from distckpt.cadence import Cadence, Stop
from distckpt.capture import objects_of
from distckpt.checkpoint import Checkpoint
from distckpt.chief import Chief
from distckpt.clock import Clock
from distckpt.comm import Answer, Channel
from distckpt.durations import seconds_of
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
from distckpt.history import History
from distckpt.janitor import Janitor
from distckpt.liveness import Liveness
from distckpt.locations import checked_path
from distckpt.lookout import Lookout
from distckpt.messages import Phase, Vote, describe, raise_failures
from distckpt.paths import Attempt
from distckpt.policy import OnSignal, spelled
from distckpt.preemption import Notice
from distckpt.pretrained import Pretrained
from distckpt.replica_digests import ALWAYS, SAMPLED, UNCHECKED, Replicas
from distckpt.retention import Retention
from distckpt.run_directory import RunDirectory
from distckpt.save_state import SaveState
from distckpt.session import Session
from distckpt.sinks import say_line
from distckpt.step_watch import StepWatch
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
        try:
            return timedelta(seconds=seconds_of("timeout", self.timeout))
        except (ConfigError, OverflowError):
            return DEFAULT_TIMEOUT

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
        hours = self.keep_checkpoint_every_n_hours
        if isinstance(hours, timedelta):
            hours = hours / timedelta(hours=1)
        return Retention(self.max_to_keep, hours)

    def compared(self) -> bytes:
        """Return what must be equal on all ranks, as JSON."""
        max_to_keep, hours = self.retention().spelled()
        fields = {
            "directory": checked_path(self.directory, "directory"),
            "max_to_keep": max_to_keep,
            "keep_checkpoint_every_n_hours": hours,
            "checkpoint_name": self.checkpoint_name,
            "step_counter": "none" if self.step_counter is None else "given",
            "checkpoint_interval": spelled(self.checkpoint_interval),
            "takeover": bool(self.takeover),
            "read_replicated": self.read_replicated,
            "replicas": self.replicas,
        }
        return strict_json.dumps(values.encode(fields)).encode()


class Made(NamedTuple):
    """A manager on one rank, in three parts."""

    session: Session
    save_state: SaveState
    cadence: Cadence


def construct(arguments: Arguments, process_group: dist.ProcessGroup | None) -> Made:
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
        ran = Ran(lambda: _make(arguments, decisions, commits, connect()))
        made = _agree(arguments, ran, decisions)
        worker.raise_interrupt()
        if made.cadence.stop is not None:
            made.cadence.stop.notice.begin()
        decisions.lane.be_idle()
        return made
    except BaseException as error:
        # An answer of the chief ends it on every rank; else somebody may be waiting.
        is_answer = isinstance(error, DistckptError) and not isinstance(
            error, ManagerBroken
        )
        for channel in (decisions, commits):
            channel.close("" if is_answer else describe(error))
        raise


def _agree(arguments: Arguments, ran: Ran[Made], decisions: Channel) -> Made:
    def decide(votes: Sequence[Vote]) -> Answer:
        raise_failures(votes, "making a CheckpointManager failed", RestoreFailed)
        _check_equal(votes)
        session, _, cadence = ran.result
        run_checks.check_usable(session.directory)
        # Not the job: a deletion under way would keep the lock of one that is let go.
        events = session.events
        events.add(History(session.directory))
        events.add(say_line)

        def tell_of_deletion(attempt: Attempt, seconds: float) -> None:
            events.tell(DELETE, seconds=seconds, checkpoint=attempt.prefix)

        session.chief = Chief(
            session.directory,
            checkpoint_name=arguments.checkpoint_name,
            retention=arguments.retention(),
            identity=identity.current(),
            takeover=bool(arguments.takeover),
            # The other ranks wait for the chief while it waits for the lock.
            max_lock_wait_seconds=session.timeout_seconds / 2,
            janitor=Janitor(session.directory, tell_of_deletion),
        )
        session.chief.warn_of_little_room()
        _warn_of_arguments(arguments)
        if arguments.step_counter is not None:
            when = cadence.gate.when
            cadence.steps = StepWatch(when.interval, when.saves_always)
        if cadence.gate.when.clocked:
            cadence.clock = Clock(cadence.gate.when.clocked)
        if cadence.gate.when.asked:
            what, look = "requests of other processes", session.chief.save_requests
            cadence.requests = Lookout(what, look, _look_worker(session.timeout_seconds))
        num_hosts = len({vote.digest_b for vote in votes})
        return {**session.lists(), "hosts": num_hosts}

    answer = agree(
        decisions,
        Phase.CONSTRUCT,
        ran,
        decide,
        says=lambda _: Vote(
            Phase.CONSTRUCT, digest_b=_host(arguments), detail=arguments.compared()
        ),
    )
    session = ran.result.session
    session.take_lists(answer)
    session.reads_once = session.world_size > 1 and (
        arguments.read_replicated == ONCE
        or (
            arguments.read_replicated == AUTO
            and is_faster_once(session.world_size, answer["hosts"])
        )
    )
    return ran.result


def _check_equal(votes: Sequence[Vote]) -> None:
    """Refuse arguments that differ between ranks, with all their values."""
    if all(vote.detail == votes[0].detail for vote in votes):
        return
    ranks_of: dict[bytes, list[int]] = {}
    for vote in votes:
        ranks_of.setdefault(vote.detail, []).append(vote.rank)
    given = {detail: strict_json.loads(detail) for detail in ranks_of}
    lines = []
    for name in given[votes[0].detail]:
        ranks_with: dict[str, list[int]] = {}
        for detail, ranks in ranks_of.items():
            text = _shown(given[detail][name])
            ranks_with.setdefault(text, []).extend(ranks)
        if len(ranks_with) > 1:
            each = [f"{text} on {words.ranks(ranks)}" for text, ranks in ranks_with.items()]
            lines.append(f"{name} is {', '.join(each[:8])}")
    msg = (
        f"CheckpointManager was made with different arguments: {'; '.join(lines)}. They "
        "must be the same on every rank."
    )
    raise ConfigError(msg)


def _shown(value: Any) -> str:
    return f"{value!r:.200}"


def _warn_of_arguments(arguments: Arguments) -> None:
    """Say on the chief what is allowed, and probably a mistake."""
    interval = arguments.checkpoint_interval
    if type(interval) is int and interval < 1:
        _logger.warning(
            "checkpoint_interval=%s: each call of save() at a new step saves.", interval
        )
    for text in object_types.look_at(objects_of(arguments.checkpoint)):
        _logger.warning("%s", text)


def _host(arguments: Arguments) -> bytes:
    """Return what tells this rank's host from others, where that matters."""
    boot_id = b""
    if arguments.read_replicated == AUTO:
        with suppress(StorageError), files.OpenFile(_BOOT_ID_FILE) as file:
            boot_id = file.read(0, _BOOT_ID_BYTES)
    return identity.host(boot_id)


def _make(
    arguments: Arguments,
    decisions: Channel,
    commits: Channel,
    liveness: Liveness | None,
) -> Made:
    seconds_of("timeout", arguments.timeout)
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
    object_types.look_at(objects_of(arguments.checkpoint))
    retention = arguments.retention()
    gate = IntervalGate(arguments.checkpoint_interval)
    needs_steps = gate.when.interval is not None or retention.needs_steps
    if needs_steps and arguments.step_counter is None:
        msg = (
            "step_counter must be given if checkpoint_interval or max_to_keep has steps: "
            "step_counter=step, where step is a 0-dim tensor (step += 1)."
        )
        raise ConfigError(msg)
    given = checked_path(arguments.directory, "directory")
    wait_seconds = arguments.wait.total_seconds()
    session = Session(
        directory=RunDirectory.at(given),
        decisions=decisions,
        commits=commits,
        liveness=liveness,
        timeout_seconds=wait_seconds,
        events=Events(arguments.sinks(), decisions.rank),
    )
    save_state = SaveState(
        arguments.checkpoint,
        decisions.rank,
        decisions.world_size,
        Replicas(arguments.replicas),
    )
    step_reader = _step_reader(arguments.step_counter)
    cadence = Cadence(gate, step_reader, _stop(gate.when.told, wait_seconds))
    return Made(session, save_state, cadence)


def _stop(told: OnSignal | None, timeout_seconds: float) -> Stop | None:
    if told is None:
        return None
    if told.signals and threading.current_thread() is not threading.main_thread():
        msg = "on_signal: signals can be handled by a manager of the main thread only."
        raise ConfigError(msg)
    file, path = None, told.file
    if path is not None:
        what, worker = "the file that tells to stop", _look_worker(timeout_seconds)
        file = Lookout(what, lambda: files.exists(path), worker)
    return Stop(Notice(told.signals), file, told.grace_period_seconds)


def _look_worker(timeout_seconds: float) -> Worker:
    # Gives up before the others give up waiting for this rank.
    return Worker(min(_LOOK_SECONDS, _STORAGE_SHARE * timeout_seconds))


def _step_reader(step_counter: Any) -> Callable[[], int] | None:
    if step_counter is None:
        return None
    if isinstance(step_counter, (Number, np.generic, str, bytes)):
        kind = "a plain number" if isinstance(step_counter, Number) else "a plain value"
        msg = (
            f"step_counter={step_counter!r:.50} is {kind}, which never changes; pass a "
            "0-dim tensor that is the step, or a callable that returns it."
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
        return lambda: _as_step(step_counter())
    if not hasattr(step_counter, "__int__") and not hasattr(step_counter, "__index__"):
        msg = (
            f"step_counter must be something that int() accepts, or a callable; got "
            f"{step_counter!r:.100}."
        )
        raise UnsupportedError(msg)
    return lambda: int(step_counter)


def _as_step(value: Any) -> int:
    if isinstance(value, (bool, str, bytes)) or value is None:
        msg = f"step_counter returned {value!r:.50}, which is no step."
        raise ConfigError(msg)
    return int(value)
