"""Notices a step counter that does not move, or that goes back, before work is lost.

``step = step + 1`` is the most natural line in Python, and binds the name to a new object:
the counter that the manager was given stays what it was, and nothing is saved any more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_UNCHANGED_CALLS = 100
_CALLS_OF_A_JOB = 1000
# As many calls at one step may be the last of the loop and one after it.
_CALLS_AT_AN_END = 2

_CAUSE = (
    "Was the name rebound (step = step + 1)? Use step += 1, or step_counter=lambda: step."
)


# Numbers of these names count the steps of a loop.
_STEP_NAMES = frozenset(("step", "steps", "global_step", "iteration", "iter"))
_UNCHANGED_SAVES = 10


class NumberWatch:
    """Watches tracked plain numbers that are named like the step, and do not move.

    ``Checkpoint(step=0)`` holds the number, not the name: ``step += 1`` on a plain number
    binds the name to another one.
    """

    def __init__(self) -> None:
        self._since: dict[str, tuple[int, int, int]] = {}
        self._has_warned = False

    def see(self, objects: Mapping[str, Any], step: int) -> str | None:
        """Take note of what is saved.

        Args:
            objects: What is tracked, by name.
            step: What the step counter says.

        Returns:
            A warning, once; None if nothing looks wrong.
        """
        for name in _STEP_NAMES & objects.keys():
            value = objects[name]
            if type(value) is not int:
                continue
            known, first, num_saves = self._since.get(name, (value, step, 0))
            if known != value:
                first, num_saves = step, 0
            num_saves += 1
            self._since[name] = value, first, num_saves
            if num_saves >= _UNCHANGED_SAVES and step != first and not self._has_warned:
                self._has_warned = True
                return (
                    f"{name} is {value} in each of the last {num_saves} checkpoints, while "
                    f"step_counter went from {first} to {step}. A plain number that the "
                    "program binds anew stays what it was here: assign checkpoint."
                    f"{name} = {name} before save(), or track a tensor ({name} += 1)."
                )
        return None


class StepWatch:
    """Watches the training step over the calls of ``save()``; says what looks wrong.

    Each kind of warning is given once.

    Args:
        interval: Least number of steps between two saves; None if no rule has any.
        saves_always: Whether every call saves.

    Attributes:
        num_calls: Calls of ``save()`` so far.
        num_commits: Those that have begun a checkpoint.
    """

    def __init__(self, interval: int | None, saves_always: bool) -> None:
        self.num_calls = 0
        self.num_commits = 0
        self._interval = interval
        self._saves_always = saves_always
        self._first: int | None = None
        self._step: int | None = None
        self._calls_at_step = 0
        self._has_warned = False
        self._has_warned_of_going_back = False
        self._saved_last = False

    def forget(self) -> None:
        """Take the next step for the first one: a restore has set the counter."""
        self._step, self._calls_at_step = None, 0

    def see(self, step: int | None, latest: str | None) -> str | None:
        """Take note of a call at a step.

        Args:
            step: What the step counter says.
            latest: Name of the newest checkpoint, for the warning.

        Returns:
            A warning; None if nothing looks wrong.
        """
        assert step is not None, "there is a step counter"
        self.num_calls += 1
        before, self._step = self._step, step
        self._first = step if self._first is None else self._first
        if before != step:
            self._calls_at_step = 1
            if before is not None and step < before:
                return self._of_going_back(before, step)
            return None
        self._calls_at_step += 1
        if self._calls_at_step < _UNCHANGED_CALLS or self._has_warned:
            return None
        self._has_warned = True
        effect = (
            "so all these checkpoints are of one step"
            if self._saves_always
            else f"so nothing was saved since {latest or 'then'}"
        )
        return (
            f"step_counter has been {step} for {self._calls_at_step} calls of save(), "
            f"{effect}. {_CAUSE} (If save() is called at each of so many micro-batches of "
            "a step, all is well.)"
        )

    def note_saved(self) -> None:
        """Take note that the call has begun a checkpoint."""
        self.num_commits += 1
        self._saved_last = True

    def note_refused(self, is_explicit: bool, latest: str | None) -> str | None:
        """Take note that the call has saved nothing, for its step.

        Args:
            is_explicit: Whether the caller asked for a save whatever the interval.
            latest: Name of the newest checkpoint.

        Returns:
            A warning, if the caller has asked for a save. None at the end of a loop whose
            last step was due: the call before has saved this very step, or a restore has
            brought it, and this is the first call since.
        """
        saved_last, self._saved_last = self._saved_last, False
        is_at_an_end = self._calls_at_step <= (_CALLS_AT_AN_END if saved_last else 1)
        if not is_explicit or is_at_an_end:
            return None
        where = f", which {latest} has" if latest else ""
        said = f"step_counter is {self._step}{where}"
        text = f"save(check_interval=False) saved nothing: {said}."
        if self._calls_at_step <= _CALLS_AT_AN_END:
            return text
        return (
            f"{text[:-1]}, as at the last {self._calls_at_step} calls of save(). {_CAUSE}"
        )

    def at_close(self, latest: str | None) -> str | None:
        """Return a warning if a job of many calls has saved at most once.

        Args:
            latest: Name of the newest checkpoint.
        """
        if self.num_calls < _CALLS_OF_A_JOB or self.num_commits > 1:
            return None
        saved = "once" if self.num_commits else "never"
        text = f"save() was called {self.num_calls} times and has saved {saved}"
        if self._first == self._step:
            return f"{text}: step_counter was {self._step} all the time. {_CAUSE}"
        rule = "" if self._interval is None else f", checkpoint_interval={self._interval}"
        return (
            f"{text} (steps {self._first} to {self._step}{rule}). What came after "
            f"{latest or 'the beginning'} is in no checkpoint. A shorter interval, or "
            "save(check_interval=False) at the end, saves it."
        )

    def _of_going_back(self, before: int, step: int) -> str | None:
        if self._has_warned_of_going_back:
            return None
        self._has_warned_of_going_back = True
        text = f"step_counter went back from {before} to {step}."
        if self._interval is None or self._saves_always:
            return text
        return (
            f"{text} An interval counts from the last step that was saved, as in "
            f"TensorFlow: with checkpoint_interval={self._interval} nothing is saved until "
            "the counter is past that step again. For a count that begins anew make a "
            "new manager, or count on."
        )
