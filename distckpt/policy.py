"""Save now? Keep which? Pure functions; the rules are TensorFlow's, to the comparison.

Source: ``tensorflow/python/checkpoint/checkpoint_management.py`` (2.16),
``CheckpointManager.__init__``, ``save`` and ``_sweep``.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from distckpt.errors import ConfigError
from distckpt.record import Entry, Record

_SECONDS_PER_HOUR = 3600.0
_MAX_CALLS = 1_000_000


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


class IntervalGate:
    """Tells by step whether a call can save; the same on every rank, without messages.

    Unlike TensorFlow's, the last step moves only when a save has succeeded, so that a
    failed one can be tried again at the same step.

    Attributes:
        interval: Steps between saves; None lets every call save.
        last_step: Step of the last save or restore; None if unknown, and then the next
            call saves whatever its step.
    """

    def __init__(self, interval: int | None) -> None:
        if interval is not None and type(interval) is not int:
            msg = f"checkpoint_interval must be an integer or None; got {interval!r}."
            raise ConfigError(msg)
        self.interval = interval
        self.last_step: int | None = None

    @property
    def is_open(self) -> bool:
        """Tell whether a call may save whatever the step is."""
        return self.interval is None or self.last_step is None

    def allows(self, step: int | None, check_interval: bool) -> bool:
        """Tell whether a call at this step may save."""
        if self.interval is None or self.last_step is None or step is None:
            return True
        if step == self.last_step:
            return False
        return not check_interval or step >= self.last_step + self.interval


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
