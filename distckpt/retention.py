"""Keep which? Pure functions.

The rule of an integer is TensorFlow's, to the comparison; source:
``tensorflow/python/checkpoint/checkpoint_management.py`` (2.16),
``CheckpointManager.__init__`` and ``_sweep``. Rules of ``policy.py`` keep what any of them
wants. Whatever the rule: the newest stays.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from distckpt.errors import ConfigError
from distckpt.paths import Attempt
from distckpt.policy import (
    MIN,
    Best,
    CheckpointInfo,
    Every,
    Latest,
    best_rules,
    parts_of,
    spelled,
)
from distckpt.record import MAX_RULES, Entry, Record

_logger = logging.getLogger(__name__)

_SECONDS_PER_HOUR = 3600.0
_NUMBER = "max_to_keep="  # in records, before TensorFlow's number

# Which of the entries, oldest first, a rule wants to keep.
_Keep = Callable[[Sequence[Entry]], set[int]]


@dataclass(frozen=True, slots=True)
class Retention:
    """How many checkpoints stay managed, and which are preserved when they leave.

    Attributes:
        max_to_keep: Number of managed checkpoints; None keeps all. Or a rule, or a
            function from all to those that stay.
        keep_every_n_hours: Of those that leave, preserve one for every so many hours;
            None or 0 preserves none.
    """

    max_to_keep: Any
    keep_every_n_hours: float | None = None

    def __post_init__(self) -> None:
        if not self.is_number:
            self._check_rules()
            return
        keep, hours = self.max_to_keep, self.keep_every_n_hours
        if keep is not None and keep < 1:
            msg = f"max_to_keep must be positive, or None to keep all; got {keep!r}."
            raise ConfigError(msg)
        if hours is not None and (type(hours) not in (int, float) or math.isnan(hours)):
            msg = f"keep_checkpoint_every_n_hours must be a number; got {hours!r}."
            raise ConfigError(msg)

    def _check_rules(self) -> None:
        try:
            parts = parts_of(self.max_to_keep)
        except ConfigError as error:
            msg = (
                "max_to_keep must be a positive integer, None to keep all, a rule such as "
                f"latest(3) | best(2, ...), or a function: {error}"
            )
            raise ConfigError(msg) from None
        if len(parts) > MAX_RULES:
            msg = f"max_to_keep: at most {MAX_RULES} rules, got {len(parts)}."
            raise ConfigError(msg)
        for part in parts:
            _keeps(part)
        if self.keep_every_n_hours is not None:
            msg = (
                "keep_checkpoint_every_n_hours goes with a number for max_to_keep; beside "
                f"a rule write {spelled(self.max_to_keep)} | every(hours=...)."
            )
            raise ConfigError(msg)

    @property
    def is_number(self) -> bool:
        """Tell whether this is TensorFlow's rule."""
        return self.max_to_keep is None or type(self.max_to_keep) is int

    @property
    def rules(self) -> tuple[str, ...]:
        """What is written in records, so that everyone can see why something is kept.

        None keeps all: there is nothing to say of each.
        """
        if self.max_to_keep is None:
            return ()
        if self.is_number:
            return (f"{_NUMBER}{self.max_to_keep}",)
        return tuple(map(spelled, parts_of(self.max_to_keep)))

    @property
    def num_kept(self) -> int | None:
        """How many checkpoints there will be, at least; None if all are kept.

        Rules of time and functions are not counted.
        """
        if self.max_to_keep is None:
            return None
        if self.is_number:
            return int(self.max_to_keep)
        parts = [Latest(part) if type(part) is int else part for part in self._parts]
        if None in parts:
            return None
        counted = [part.number for part in parts if isinstance(part, (Latest, Best))]
        return max(1, sum(counted))

    @property
    def best(self) -> Best | None:
        """The first rule that says which checkpoint is the best, if there is one."""
        return next((part for part in self._parts if isinstance(part, Best)), None)

    @property
    def needs_steps(self) -> bool:
        """Tell whether a rule goes by the training step."""
        return any(isinstance(part, Every) and part.unit == "steps" for part in self._parts)

    @property
    def _parts(self) -> tuple[Any, ...]:
        return () if self.is_number else parts_of(self.max_to_keep)

    def spelled(self) -> list[Any]:
        """Return what must be the same on all ranks."""
        return [spelled(self.max_to_keep), self.keep_every_n_hours]


def spells_number(rules: Sequence[str]) -> bool:
    """Tell whether rules of a record are TensorFlow's number; see ``Retention.rules``."""
    return any(rule.startswith(_NUMBER) for rule in rules)


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


def recover(record: Record | None, now: float, retention: Retention) -> Managed:
    """Apply TensorFlow's recovery rule to what the newest record lists.

    With no commit so far the preservation clock starts one second ago, so that a
    checkpoint saved at once by a manager made again at once is still managed. Rules have
    no such clock, and forget nothing.

    Returns:
        Managed checkpoints with clamped times, those that are forgotten (neither listed
        nor deleted from now on), the preservation clock, and by how many seconds this
        clock is behind it (0.0 if it is not).
    """
    if record is None or record.last_preserved is None:
        return Managed((), (), now - 1.0)
    last_preserved = record.last_preserved
    if not retention.is_number:
        return Managed(record.live, (), last_preserved)
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
    """Decide who leaves the managed checkpoints.

    Those that are pinned stay beside those that the rule keeps: it does not see them.

    Args:
        live: Managed checkpoints, oldest first, the one just added last.
        last_preserved: Time of the newest preserved checkpoint.
        retention: The rule.
    """
    swept = _sweep([entry for entry in live if not entry.pinned], last_preserved, retention)
    pinned = without_reasons(entry for entry in live if entry.pinned)
    staying = {entry.attempt: entry for entry in (*swept.live, *pinned)}
    remaining = [staying[e.attempt] for e in live if e.attempt in staying]
    return swept._replace(live=tuple(remaining))


def _sweep(live: Sequence[Entry], last_preserved: float, retention: Retention) -> Swept:
    if not retention.is_number:
        return _sweep_by_rules(live, last_preserved, retention)
    keep = len(live) if retention.max_to_keep is None else retention.max_to_keep
    num_leaving = max(0, len(live) - keep)
    preserved, dropped = [], []
    for entry in live[:num_leaving]:
        hours = retention.keep_every_n_hours
        if hours and entry.time - hours * _SECONDS_PER_HOUR >= last_preserved:
            preserved.append(entry)
            last_preserved = entry.time
        else:
            dropped.append(entry)
    remaining = _with_reasons(live[num_leaving:], (0,) if retention.rules else ())
    return Swept(remaining, tuple(preserved), tuple(dropped), last_preserved)


def without_reasons(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    """Forget which rules have kept some: they go with the list of one record's rules."""
    return _with_reasons(entries, ())


def _with_reasons(entries: Iterable[Entry], why: tuple[int, ...]) -> tuple[Entry, ...]:
    # Most of thousands have it already.
    return tuple(e if e.why == why else replace(e, why=why) for e in entries)


# Rules


def _sweep_by_rules(
    live: Sequence[Entry], last_preserved: float, retention: Retention
) -> Swept:
    # Every rule is asked, whatever others say: each has its reason to show.
    wanted = [_keeps(part)(live) for part in parts_of(retention.max_to_keep)]
    staying, dropped = [], []
    for index, entry in enumerate(live):
        why = tuple(n for n, kept in enumerate(wanted) if index in kept)
        if why or index == len(live) - 1:
            staying.append(replace(entry, why=why))
        else:
            dropped.append(entry)
    return Swept(tuple(staying), (), tuple(dropped), last_preserved)


def _keeps(part: Any) -> _Keep:
    """Return what a rule comes to.

    Raises:
        ConfigError: It is none that says what to keep.
    """
    if part is None:
        return lambda entries: {*range(len(entries))}
    if type(part) is int:
        part = Latest(part)
    if isinstance(part, Latest) and part.number > 0:
        return lambda entries: {*range(max(0, len(entries) - part.number), len(entries))}
    if isinstance(part, Best):
        return lambda entries: _best(entries, part)
    if isinstance(part, Every) and part.unit == "steps":
        return lambda entries: _first_of_steps(entries, int(part.amount))
    if isinstance(part, Every) and part.seconds is not None:
        seconds = part.seconds
        return lambda entries: _spaced_out(entries, seconds)
    if callable(part):
        return lambda entries: _asked(entries, part)
    msg = f"max_to_keep: {spelled(part)} does not say what to keep."
    raise ConfigError(msg)


def best_of(entries: Sequence[Entry], rule: Best) -> list[Entry]:
    """Sort those that have the metric: the best first, of equal ones the newest."""
    sign = 1 if rule.mode == MIN else -1
    found = [
        (sign * value, -entry.record, entry)
        for entry in entries
        if (value := entry.metric(rule.metric)) is not None
    ]
    return [entry for _, _, entry in sorted(found, key=lambda one: one[:2])]


def best_metrics(entries: Sequence[Entry], rules: Sequence[str]) -> dict[Attempt, set[str]]:
    """Return the metrics in which each is the best of all, by the rules of a record.

    Those that are the best in none are left out.
    """
    found: dict[Attempt, set[str]] = {}
    for rule in best_rules(rules):
        for entry in best_of(entries, rule)[:1]:
            found.setdefault(entry.attempt, set()).add(rule.metric)
    return found


def _best(entries: Sequence[Entry], rule: Best) -> set[int]:
    index_of = {entry.attempt: index for index, entry in enumerate(entries)}
    return {index_of[entry.attempt] for entry in best_of(entries, rule)[: rule.number]}


def _first_of_steps(entries: Sequence[Entry], steps: int) -> set[int]:
    first: dict[int, int] = {}
    for index, entry in enumerate(entries):
        if entry.step is not None:
            first.setdefault(entry.step // steps, index)
    return {*first.values()}


def _spaced_out(entries: Sequence[Entry], seconds: float) -> set[int]:
    kept: set[int] = set()
    last = -math.inf
    for index, entry in enumerate(entries):
        if entry.time >= last + seconds:
            kept.add(index)
            last = entry.time
    return kept


def _asked(entries: Sequence[Entry], function: Callable[..., Any]) -> set[int]:
    """Ask a function of the user's; one that fails keeps all."""
    infos = [_info(entry) for entry in entries]
    index_of = {info.name: index for index, info in enumerate(infos)}
    try:
        return {index_of[info.name] for info in function(infos)}
    except Exception:
        # To fail the save, or to delete, because of that would be worse.
        _logger.exception("max_to_keep: %s failed; nothing is deleted", spelled(function))
        return {*range(len(entries))}


def _info(entry: Entry) -> CheckpointInfo:
    return CheckpointInfo(
        name=entry.attempt.prefix,
        number=entry.attempt.number,
        step=entry.step,
        time=entry.time,
        size_bytes=entry.size_bytes,
        metrics=dict(entry.metrics),
    )
