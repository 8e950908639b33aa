"""The rules for when to save: steps, time, requests of others, a notice to stop."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from distckpt.clock import Clock
from distckpt.gate import NOT_CALLED, Decision, IntervalGate, Pace
from distckpt.lookout import Lookout
from distckpt.mailbox import Request
from distckpt.preemption import Notice
from distckpt.step_watch import NumberWatch, StepWatch


@dataclass(slots=True)
class Stop:
    """The notice that the job is to stop, as this rank knows it.

    Attributes:
        notice: Whether this process was told.
        file: Whether a file is there that tells it, too; None for no such file.
        grace_period_seconds: How long after that the job is ended.
        agreed: Whether all ranks know it.
        is_due: Whether the save for it is still to be made.
    """

    notice: Notice
    file: Lookout[bool] | None
    grace_period_seconds: float
    agreed: bool = False
    is_due: bool = False


@dataclass(slots=True)
class Cadence:
    """The state of the rules for when to save, on one rank.

    Attributes:
        gate: The step interval, alike on all ranks.
        read_step: Returns the training step; None without a step counter.
        stop: Whether the job is told to stop; None if it does not ask for that.
        decision: Why the last call of ``save()`` has saved, or not; None if the rules have
            ruled it out.
        pace: How often ``save()`` is called.
        calls_left: After how many more calls of ``save()`` to ask about all this.
        save_seconds: How long the last saves took, from the question to the commit.
        steps: Watches the step counter; on the chief, if there is one.
        numbers: Watches tracked numbers that are named like the step; on the chief.
        clock: When rules of time want a save; on the chief, if there are any.
        requests: Polls the requests of other processes; on the chief, if there are rules
            for them.
        requested: The requests for a save at the last poll; on the chief.
    """

    gate: IntervalGate
    read_step: Callable[[], int] | None = None
    stop: Stop | None = None
    decision: Decision | None = NOT_CALLED
    pace: Pace = field(default_factory=Pace)
    calls_left: int = 1
    save_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    steps: StepWatch | None = None
    numbers: NumberWatch = field(default_factory=NumberWatch)
    clock: Clock | None = None
    requests: Lookout[list[Request]] | None = None
    requested: list[Request] = field(default_factory=list)

    def step(self) -> int | None:
        """Return the training step; None without a step counter."""
        return None if self.read_step is None else self.read_step()
