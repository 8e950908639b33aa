"""Save now? What a rank can tell by itself, from the step; the rest is asked for together.

Source of the rule of an integer: ``tensorflow/python/checkpoint/checkpoint_management.py``
(2.16), ``CheckpointManager.save``.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NamedTuple

from distckpt.errors import ConfigError
from distckpt.policy import Every, OnRequest, OnSignal, Rule, parts_of, spelled

_MAX_CALLS = 1_000_000


class Decision(NamedTuple):
    """Why a call of ``save()`` has saved, or not.

    Attributes:
        saves: Whether a save was begun.
        reasons: What spoke for it, each rule in its own words; if nothing did, what each
            of them waits for.
    """

    saves: bool
    reasons: tuple[str, ...]

    def __str__(self) -> str:
        return f"{'saved' if self.saves else 'not saved'}: {'; '.join(self.reasons)}"


NOT_CALLED = Decision(False, ("save() was not called yet",))


@dataclass(frozen=True, slots=True)
class SaveWhen:
    """What ``checkpoint_interval`` comes to.

    Attributes:
        steps: Numbers of steps between saves, one a rule.
        saves_always: Whether every call saves.
        told: Save, too, when the job is told to stop.
        clocked: Rules that go by the chief's clock.
        asked: Save, too, when another process asks for it.
    """

    steps: tuple[int, ...] = ()
    saves_always: bool = False
    told: OnSignal | None = None
    clocked: tuple[Every, ...] = ()
    asked: OnRequest | None = None

    @property
    def interval(self) -> int | None:
        """Least number of steps between two saves; None for no such rule."""
        return min(self.steps, default=None)

    @staticmethod
    def of(interval: Any) -> SaveWhen:
        """Read ``checkpoint_interval`` as users write it.

        Raises:
            ConfigError: It is neither an integer, nor None, nor a rule for saving.
        """
        try:
            parts = parts_of(interval)
        except ConfigError:
            parts = (interval,)
        steps = [part for part in parts if type(part) is int]
        each = [part for part in parts if isinstance(part, Every)]
        steps += [int(one.amount) for one in each if one.unit == "steps"]
        clocked = [one for one in each if one.unit != "steps"]
        told = [part for part in parts if isinstance(part, OnSignal)]
        asked = [part for part in parts if isinstance(part, OnRequest)]
        known = (type(None), int, Every, OnSignal, OnRequest)
        strange = [part for part in parts if type(part) not in known]
        if strange or len(told) > 1:
            given = spelled(interval) if isinstance(interval, Rule) else repr(interval)
            msg = (
                "checkpoint_interval must be an integer, None, or rules for saving with | "
                "between them: every(...), on_request(), and at most one on_signal(...); "
                f"got {given:.200}."
            )
            raise ConfigError(msg)
        return SaveWhen(
            steps=tuple(steps),
            saves_always=None in parts,
            told=told[0] if told else None,
            clocked=tuple(clocked),
            asked=asked[0] if asked else None,
        )


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
        refused_step: Step of the last call that nothing has allowed.
    """

    def __init__(self, interval: Any) -> None:
        self.when = SaveWhen.of(interval)
        self.last_step: int | None = None
        self.refused_step: int | None = None

    @property
    def is_open(self) -> bool:
        """Tell whether a call may save whatever the step is."""
        return self.when.saves_always or (bool(self.when.steps) and self.last_step is None)

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

    def reasons(self, step: int | None, check_interval: bool) -> list[str]:
        """Say what speaks for a save at this step: all rules are asked."""
        when, last = self.when, self.last_step
        found = ["every call saves"] if when.saves_always else []
        if not check_interval:
            found.append("asked for with check_interval=False")
        for steps in when.steps:
            if last is None:
                found.append(f"every({steps=}): nothing was saved or restored before")
            elif step is not None and step >= last + steps:
                found.append(f"every({steps=}): {step - last} since step {last}")
        return found

    def refusal(self) -> Decision:
        """Say why the last call has not saved, if it was for the rules."""
        step, last = self.refused_step, self.last_step
        if not self.has_news(step):
            return Decision(False, (f"step {step} was saved, or restored, before",))
        waiting = []
        if step is not None and last is not None:
            waiting = [
                f"every({steps=}): {step - last} since step {last}"
                for steps in self.when.steps
            ]
        waiting += [f"{rule}: it is not time yet" for rule in self.when.clocked]
        waiting += [f"{self.when.told}: not told"] if self.when.told else []
        waiting += [f"{self.when.asked}: nobody asks"] if self.when.asked else []
        return Decision(False, tuple(waiting))


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
