"""A training loop whose steps are timed, to see what a save behind it costs."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn

from distckpt.bench.contender import Pending
from distckpt.bench.team import Team
from distckpt.bench.workloads import Workload

_Result = TypeVar("_Result")

_WIDTH = 512
_BATCH = 128
_STEP_SECONDS = 0.04
_QUIET_STEPS = 30
_STEPS_AFTER_A_COPY = 10


class StepLoop:
    """Steps that keep one core a rank busy, and meet in an all_reduce on the job's group.

    Each goes forward and backward through a small network, exchanges, and steps that
    network's optimizer and the workload's own. The latter has no gradients, so it changes
    nothing, but what waits for it, waits.

    Args:
        workload: Whose optimizer is stepped.
        team: The ranks.
    """

    def __init__(self, workload: Workload, team: Team) -> None:
        self._workload = workload
        self._team = team
        device = workload.device
        layers = [nn.Linear(_WIDTH, _WIDTH) for _ in range(4)]
        self._network = nn.Sequential(*layers).to(device)
        self._optimizer = torch.optim.AdamW(self._network.parameters(), lr=1e-5)
        self._input = torch.randn(_BATCH, _WIDTH, device=device)
        # Every rank's part, and what it has to say: still saving, failed.
        self._exchanged = torch.zeros(1024, device=device)
        self._rounds = 1
        seconds = statistics.median(self._step()[0] for _ in range(10))
        self._rounds = max(1, round(_STEP_SECONDS / team.largest([seconds])[0]))

    def lost_to(self, start: Callable[[], Pending]) -> list[float]:
        """Save behind the loop; return seconds lost, blocked, until durable, and of a step.

        Lost is what the caller was blocked, and what the steps took longer until the save
        was durable than they do without one.
        """
        before = self._quiet()
        save = _Watched(start)
        begun = time.perf_counter()
        save.start()
        blocked = time.perf_counter() - begun
        deadline = begun + self._team.timeout_seconds
        window = []
        is_saving = True
        while is_saving:
            seconds, is_saving, has_failed = self._step(save)
            window.append(seconds)
            # All ranks learn this in the same step, so none is left alone in the next.
            if has_failed:
                raise save.error or RuntimeError("another rank failed")
            if time.perf_counter() > deadline:
                save.fail(TimeoutError("the save does not become durable"))
        durable = time.perf_counter() - begun
        step = _usual(before + self._quiet())
        save.check()
        return [blocked + sum(window) - step * len(window), blocked, durable, step]

    def lost_to_copy(self, copy: Callable[[], None]) -> list[float]:
        """Copy between two steps; return seconds lost, blocked, and of a step."""
        before = self._quiet()
        begun = time.perf_counter()
        copy()
        blocked = time.perf_counter() - begun
        window = [self._step()[0] for _ in range(_STEPS_AFTER_A_COPY)]
        step = _usual(before + self._quiet())
        return [blocked + sum(window) - step * len(window), blocked, step]

    def _quiet(self) -> list[float]:
        return [self._step()[0] for _ in range(_QUIET_STEPS)]

    def _step(self, save: _Watched | None = None) -> tuple[float, bool, bool]:
        """Make one step; return its seconds, and whether any rank is saving, or failed."""
        begun = time.perf_counter()
        output = self._input
        for _ in range(self._rounds):
            output = self._network(output)
            output = output / (1 + output.abs().mean())
        output.square().mean().backward()  # type: ignore[no-untyped-call]
        if save is not None:
            self._exchanged[0] = float(save.goes_on())
            self._exchanged[1] = float(save.error is not None)
        dist.all_reduce(self._exchanged)
        is_saving, has_failed = (value > 0 for value in self._exchanged[:2].tolist())
        self._exchanged.zero_()
        if save is not None:
            save.before_optimizer_step()
        if self._workload.optimizer is not None:
            self._workload.optimizer.step()
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._workload.synchronize()
        return time.perf_counter() - begun, is_saving, has_failed


def _usual(seconds: list[float]) -> float:
    """Return what a step takes when no save is under way.

    The mean: on a busy machine some steps take much longer, with a save and without one,
    and against a median all of that would count as lost to the save.
    """
    return statistics.fmean(seconds)


class _Watched:
    """A save whose errors are kept until all ranks can hear of them."""

    def __init__(self, start: Callable[[], Pending]) -> None:
        self.error: BaseException | None = None
        self._start = start
        self._pending: Pending | None = None

    def start(self) -> None:
        self._pending = self._keeping_error(self._start)

    def goes_on(self) -> bool:
        return (
            self._pending is not None and self._keeping_error(self._pending.done) is False
        )

    def before_optimizer_step(self) -> None:
        if self._pending is not None:
            self._keeping_error(self._pending.before_optimizer_step)

    def check(self) -> None:
        """Raise what has been kept, or what went wrong behind."""
        if self.error is not None:
            raise self.error
        if self._pending is not None:
            self._pending.check()

    def fail(self, error: BaseException) -> None:
        self.error = self.error or error

    def _keeping_error(self, call: Callable[[], _Result]) -> _Result | None:
        try:
            return call()
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:
            self.fail(error)
            return None
