"""Single calls of one contender, with what has to be done around each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from distckpt.bench import measure
from distckpt.bench.contender import EAGER, LAZY, Contender, wait_done
from distckpt.bench.team import ContenderFailed, Team, Timed
from distckpt.bench.workloads import Workload

SAVE = "save"
WARM = "warm"
COLD = "cold"
MODES = (EAGER, LAZY)
CALLS = (SAVE, *MODES, WARM, COLD)

# By the row of the result table.
Figures = dict[str, float]


class Calls:
    """Makes calls and times them; every method is called by all ranks together.

    Args:
        workload: What is saved and restored.
        team: The ranks.
    """

    def __init__(self, workload: Workload, team: Team) -> None:
        self._workload = workload
        self._team = team

    def run(self, contender: Contender, call: str) -> Figures:
        """Make one call, of ``CALLS``.

        Raises:
            ContenderFailed: It failed on some rank.
        """
        if call == SAVE:
            return self.save(contender)
        if call in MODES:
            return self._asynchronous(contender, call)
        return self._restore(contender, call)

    def save(self, contender: Contender) -> Figures:
        """Save durably."""
        self.settle()
        timed, moved = self._moving(contender, contender.save)
        self.attempt(contender, contender.tidy)
        return {
            SAVE: timed.seconds,
            "save.written": moved[0],
            "save.disk_written": moved[2],
        }

    def _asynchronous(self, contender: Contender, mode: str) -> Figures:
        """Save asynchronously, with nothing else going on."""
        self.settle()
        timed = self.attempt(contender, lambda: self.until_durable(contender, mode))
        self.attempt(contender, contender.tidy)
        rows = [f"{mode}.blocked", f"{mode}.staged", f"{mode}.durable"]
        return dict(zip(rows, timed.values, strict=True))

    def until_durable(self, contender: Contender, mode: str) -> list[float]:
        """Save asynchronously; return seconds blocked, until staged and until durable."""
        begun = time.perf_counter()
        pending = contender.start(mode)
        blocked = time.perf_counter() - begun
        pending.wait_staged()
        staged = time.perf_counter() - begun
        wait_done(pending, self._team.timeout_seconds)
        durable = time.perf_counter() - begun
        pending.check()
        return [blocked, staged, durable]

    def _restore(self, contender: Contender, row: str) -> Figures:
        """Restore files that are in the page cache (warm), or not (cold)."""
        prepare = measure.warm if row == WARM else measure.cool
        if contender.num_saves == 0:
            self.save(contender)
        self.settle()
        self._team.first_here(lambda: prepare(contender.folder))
        self._workload.overwrite()
        try:
            timed, moved = self._moving(contender, contender.load)
            # Also proves that every byte was read: one that maps its file has touched it.
            self._team.timed(self._workload.check)
        except ContenderFailed:
            self._workload.fill()
            raise
        if row == WARM:
            return {row: timed.seconds, "warm.read": moved[1]}
        return {row: timed.seconds, "cold.disk_read": moved[3]}

    def attempt(
        self, contender: Contender, action: Callable[[], Sequence[float] | None]
    ) -> Timed:
        """Run something that a contender does."""
        return self._team.timed(action, contender.abandon)

    def settle(self) -> None:
        """Let the disk finish what was before."""
        self._team.first_here(measure.settle)

    def _moving(
        self, contender: Contender, action: Callable[[], None]
    ) -> tuple[Timed, list[float]]:
        """Time an action, with the bytes that the busiest rank moved."""
        before = measure.moved()
        timed = self.attempt(contender, action)
        moved = measure.moved().since(before)
        counts = [moved.written, moved.read, moved.disk_written, moved.disk_read]
        return timed, self._team.largest(counts)
