"""The chief's clock: when rules of time want a save, and what saves cost the loop."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from statistics import median

from distckpt.policy import Every

_SECONDS_PER_HOUR = 3600.0
_REMEMBERED_STEPS = 64
_REMEMBERED_SAVES = 5


class Costs:
    """What saves cost the training loop: how long it was blocked, and how much slower.

    A step is what lies between two calls of ``save()``. What steps take while a save is
    under way is compared with the median of those before.

    Args:
        now: The clock.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now = now
        self._quiet: deque[float] = deque(maxlen=_REMEMBERED_STEPS)
        self._costs: deque[float] = deque(maxlen=_REMEMBERED_SAVES)
        self._lost: float | None = None  # so far, by the save under way
        self._entered = self._now()
        self._left: float | None = None

    @property
    def seconds(self) -> float | None:
        """The median of the last saves; None if none has ended yet."""
        return median(self._costs) if self._costs else None

    def enter(self) -> None:
        """Note that a call of ``save()`` begins."""
        self._entered = self._now()
        if self._left is None:
            return
        step = self._entered - self._left
        if self._lost is None:
            self._quiet.append(step)
        elif self._quiet:
            self._lost += max(0.0, step - median(self._quiet))

    def leave(self, *, has_saved: bool, under_way: bool) -> None:
        """Note that it ends.

        Args:
            has_saved: Whether it has begun a save, and not failed.
            under_way: Whether a save goes on behind the loop.
        """
        self._left = self._now()
        blocked = self._left - self._entered
        if has_saved:
            self._end()  # the one before, if there was one
            self._lost = blocked
        elif self._lost is not None:
            self._lost += blocked
        if not under_way:
            self._end()

    def _end(self) -> None:
        if self._lost is not None:
            self._costs.append(self._lost)
            self._lost = None


class Clock:
    """Tells when rules of time want a save; on the chief only, the others are told.

    Args:
        rules: Those of the chief's clock.
        now: The clock.

    Attributes:
        costs: What saves have cost.
    """

    def __init__(
        self, rules: Sequence[Every], now: Callable[[], float] = time.monotonic
    ) -> None:
        self._rules = rules
        self._now = now
        self._last = self._before = now()
        self.costs = Costs(now)

    def reset(self, at: float | None = None) -> None:
        """Note that the state was saved, or restored, as it is now, or was then."""
        self._before, self._last = self._last, self._now() if at is None else at

    def undo(self) -> None:
        """Forget the last save: it has failed behind the loop."""
        self._last = self._before

    def due(self) -> list[str]:
        """Say which rules want a save, each with its reason: all are asked."""
        elapsed = self._now() - self._last
        reasons = []
        for rule in self._rules:
            period = period_of(rule, self.costs.seconds)
            if period is None:
                reasons.append(f"{rule}: what a save costs is not known yet")
            elif elapsed >= period:
                reasons.append(f"{rule}: {elapsed:.1f} s of {period:.1f} s have passed")
        return reasons


def period_of(rule: Every, cost_seconds: float | None) -> float | None:
    """Return how many seconds there are to be from one save to the next.

    Args:
        rule: A rule of time.
        cost_seconds: What one save costs the training loop; None if nobody knows yet.

    Returns:
        It, or None if it follows from a cost that is not known.
    """
    if rule.seconds is not None:
        return rule.seconds
    if cost_seconds is None:
        return None
    if rule.unit == "overhead":
        return cost_seconds / rule.amount
    # Young's interval is the work between two saves; this is from the beginning of one to
    # that of the next.
    mtbf_seconds = _SECONDS_PER_HOUR * rule.amount
    return math.sqrt(2 * cost_seconds * mtbf_seconds) + cost_seconds
