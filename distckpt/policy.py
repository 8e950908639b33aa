"""Save now? Keep which? Pure functions; the rules are TensorFlow's, to the comparison.

Source: ``tensorflow/python/checkpoint/checkpoint_management.py`` (2.16),
``CheckpointManager.__init__``, ``save`` and ``_sweep``.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from distckpt.errors import ConfigError
from distckpt.record import Entry, Record

_SECONDS_PER_HOUR = 3600.0
_MAX_CALLS = 1_000_000
# The system does not let anybody handle these; Python and Ctrl-C have use for the others.
_NOT_HANDLED = {"SIGKILL", "SIGSTOP", "SIGINT", "SIGCHLD", "SIGSEGV", "SIGFPE", "SIGBUS"}


@dataclass(frozen=True, slots=True)
class Retention:
    """How many checkpoints stay managed, and which are preserved when they leave.

    Attributes:
        max_to_keep: Number of managed checkpoints; None keeps all.
        keep_every_n_hours: Of those that leave, preserve one for every so many hours;
            None or 0 preserves none.
    """

    max_to_keep: int | None
    keep_every_n_hours: float | None = None

    def __post_init__(self) -> None:
        keep, hours = self.max_to_keep, self.keep_every_n_hours
        if keep is not None and (type(keep) is not int or keep < 1):
            msg = (
                f"max_to_keep must be a positive integer, or None to keep all; got "
                f"{keep!r}."
            )
            raise ConfigError(msg)
        if hours is not None and (type(hours) not in (int, float) or math.isnan(hours)):
            msg = f"keep_checkpoint_every_n_hours must be a number; got {hours!r}."
            raise ConfigError(msg)


class Managed(NamedTuple):
    """What a manager holds in memory: TensorFlow's ``_maybe_delete`` and its clock."""

    live: tuple[Entry, ...]
    forgotten: tuple[Entry, ...]
    last_preserved: float
    seconds_behind: float = 0.0


class Swept(NamedTuple):
    """What retention decides when a checkpoint was added."""

    live: tuple[Entry, ...]
    preserved: tuple[Entry, ...]
    dropped: tuple[Entry, ...]
    last_preserved: float


def recover(record: Record | None, now: float) -> Managed:
    """Apply TensorFlow's recovery rule to what the newest record lists.

    With no commit so far the preservation clock starts one second ago, so that a
    checkpoint saved at once by a manager made again at once is still managed.

    Returns:
        Managed checkpoints with clamped times, those that are forgotten (neither listed
        nor deleted from now on), the preservation clock, and by how many seconds this
        clock is behind it (0.0 if it is not).
    """
    if record is None or record.last_preserved is None:
        return Managed((), (), now - 1.0)
    last_preserved = record.last_preserved
    behind = 0.0
    if now < last_preserved:
        behind = last_preserved - now
        last_preserved = now
    live, forgotten = [], []
    for entry in record.live:
        clamped = min(entry.time, now)
        if clamped > last_preserved:
            live.append(replace(entry, time=clamped))
        else:
            forgotten.append(entry)
    return Managed(tuple(live), tuple(forgotten), last_preserved, behind)


def sweep(live: Sequence[Entry], last_preserved: float, retention: Retention) -> Swept:
    """Decide who leaves the managed checkpoints, oldest first.

    Args:
        live: Managed checkpoints, oldest first, the one just added last.
        last_preserved: Time of the newest preserved checkpoint.
        retention: The rule.
    """
    remaining = list(live)
    preserved, dropped = [], []
    if retention.max_to_keep is not None:
        while len(remaining) > retention.max_to_keep:
            entry = remaining.pop(0)
            hours = retention.keep_every_n_hours
            if hours and entry.time - hours * _SECONDS_PER_HOUR >= last_preserved:
                preserved.append(entry)
                last_preserved = entry.time
            else:
                dropped.append(entry)
    return Swept(tuple(remaining), tuple(preserved), tuple(dropped), last_preserved)


@dataclass(frozen=True, slots=True)
class OnSignal:
    """When a job is told that it will be ended; see ``on_signal``."""

    signals: tuple[str, ...]
    file: str | None
    grace_period_seconds: float

    def __or__(self, other: int | None) -> SaveWhen:
        return SaveWhen(_checked_interval(other), saves_always=other is None, told=self)

    __ror__ = __or__


@dataclass(frozen=True, slots=True)
class SaveWhen:
    """What ``checkpoint_interval`` comes to.

    Attributes:
        interval: Steps between saves; None for no such rule.
        saves_always: Whether every call saves.
        told: Save, too, when the job is told to stop.
    """

    interval: int | None
    saves_always: bool
    told: OnSignal | None

    def alike(self) -> list[Any]:
        """Return what must be the same on all ranks: a file may be one of each host's."""
        told = self.told
        if told is None:
            return [self.interval, self.saves_always]
        given = [[*told.signals], told.file is not None, told.grace_period_seconds]
        return [self.interval, self.saves_always, *given]

    @staticmethod
    def of(interval: Any) -> SaveWhen:
        """Read ``checkpoint_interval`` as users write it.

        Raises:
            ConfigError: It is neither an integer, nor None, nor a rule.
        """
        if isinstance(interval, SaveWhen):
            return interval
        if isinstance(interval, OnSignal):
            return SaveWhen(None, saves_always=False, told=interval)
        checked = _checked_interval(interval)
        return SaveWhen(checked, saves_always=checked is None, told=None)


def _checked_interval(interval: Any) -> int | None:
    if interval is None or type(interval) is int:
        return interval
    msg = (
        "checkpoint_interval must be an integer, None, on_signal(...), or two of these "
        f"with | between them; got {interval!r:.100}."
    )
    raise ConfigError(msg)


def on_signal(
    *signals: str,
    file: str | os.PathLike[str] | None = None,
    grace_period_seconds: float = 30.0,
) -> OnSignal:
    """Save once more when the job is told that it will be ended: preemption.

    For ``checkpoint_interval``: ``500 | on_signal("SIGTERM")`` saves every 500 steps and
    once when a rank gets a SIGTERM. The signal only sets a flag. The ranks agree on it at
    the next call of ``save()`` that asks (about one a second), whichever of them was told;
    that call saves, whatever the step and synchronously, and from then on
    ``manager.should_stop`` is true on all ranks. Call ``save()`` in long evaluations, too.

    The save is not begun if it could not end in time: if the longest of the last saves of
    this job took longer than is left of the grace period. (Newest is then what there was.)

    If no call of the manager is made for the time of three steps, and at least 5 seconds,
    after a signal, it acts as if this rule were not there: a process that hangs, or is
    about something else, ends at once. So does one whose manager is broken: torchrun sends
    SIGTERM to all workers when one was lost.

    Args:
        signals: Names, such as ``"SIGTERM"`` or, for Slurm's ``--signal``, ``"SIGUSR1"``.
        file: Or the path of a file: once it is there, the job is to stop. Looked for by
            every rank, so it may be another one on each host.
        grace_period_seconds: How long after the signal the job is ended; torchrun's
            launcher, Slurm and Kubernetes wait for 30 seconds, if not told otherwise.

    Raises:
        ConfigError: A signal that there is not, or that cannot be handled; or none at all.
    """
    for name in signals:
        number = getattr(signal, name, None) if str(name).startswith("SIG") else None
        if not isinstance(number, signal.Signals) or name in _NOT_HANDLED:
            msg = f"on_signal: {name!r:.100} is not a signal that can be handled."
            raise ConfigError(msg)
    if not signals and file is None:
        msg = 'on_signal: name a signal, such as on_signal("SIGTERM"), or a file.'
        raise ConfigError(msg)
    path = None if file is None else os.fspath(file)
    grace = grace_period_seconds
    if type(grace) not in (int, float) or not 0 < grace < math.inf:
        msg = f"on_signal: grace_period_seconds must be positive, got {grace!r:.100}."
        raise ConfigError(msg)
    return OnSignal(tuple(dict.fromkeys(signals)), path, float(grace))


class IntervalGate:
    """Tells by step whether a call can save; the same on every rank, without messages.

    Unlike TensorFlow's, the last step moves only when a save has succeeded, so that a
    failed one can be tried again at the same step.

    Args:
        interval: ``checkpoint_interval``, as users write it.

    Attributes:
        when: The same, checked.
        last_step: Step of the last save or restore; None if unknown, and then the next
            call saves whatever its step, if there is an interval.
    """

    def __init__(self, interval: Any) -> None:
        self.when = SaveWhen.of(interval)
        self.last_step: int | None = None

    @property
    def is_open(self) -> bool:
        """Tell whether a call may save whatever the step is."""
        has_interval = self.when.interval is not None
        return self.when.saves_always or (has_interval and self.last_step is None)

    def allows(self, step: int | None, check_interval: bool) -> bool:
        """Tell whether a call at this step may save."""
        if self.is_open:
            return True
        if not self.has_news(step):
            return False
        interval, last_step = self.when.interval, self.last_step
        if not check_interval or interval is None:
            return not check_interval
        assert step is not None and last_step is not None
        return step >= last_step + interval

    def has_news(self, step: int | None) -> bool:
        """Tell whether anything can have changed since the last save or restore."""
        return step is None or step != self.last_step


class Pace:
    """How often ``save()`` is called."""

    def __init__(self) -> None:
        self.num_calls = 0
        self._looked_at = 0
        self._looked_when = time.monotonic()

    def calls_in(self, seconds: float) -> int:
        """Return how many calls to expect, from those since this was asked last."""
        now = time.monotonic()
        calls, elapsed = self.num_calls - self._looked_at, now - self._looked_when
        self._looked_at, self._looked_when = self.num_calls, now
        return max(1, min(_MAX_CALLS, int(calls * seconds / max(elapsed, 1e-3))))
