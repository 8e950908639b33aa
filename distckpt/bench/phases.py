"""What is measured, in which order: every contender in turn, again and again."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

import torch

from distckpt.bench import limit, measure
from distckpt.bench.contender import EAGER, LAZY, Contender, Pending, wait_done
from distckpt.bench.loop import StepLoop
from distckpt.bench.ours import time_gated_calls
from distckpt.bench.results import OURS, WorkloadResults
from distckpt.bench.team import ContenderFailed, Team
from distckpt.bench.turns import Options, Turns
from distckpt.bench.workloads import Workload

_MODES = (EAGER, LAZY)


class Runner(Turns):
    """Measures one workload; every method is called by all ranks together."""

    def __init__(
        self,
        workload: Workload,
        team: Team,
        folder: str,
        options: Options,
        results: WorkloadResults,
    ) -> None:
        super().__init__(workload, team, folder, options, results)
        self._staged: set[tuple[str, str]] = set()

    def run(self) -> None:
        """Run all phases that were asked for."""
        self._make_all()
        for phase, measure_it in PHASES.items():
            if phase in self.options.phases:
                measure_it(self)
        self._close_all()

    def saves(self) -> None:
        """Time durable saves."""
        everyone = [*self._contenders, *self._limits]
        for name, repetition in self._in_turn(everyone, "save", 1 + self.options.repeat):
            self._guard(name, "save", self._one_save, name, repetition == 0)
        # The others would hold memory and disk for nothing.
        for name in [name for name in self._limits if name != limit.BUFFERED]:
            self._delete(self._limits.pop(name).folder)

    def _one_save(self, name: str, is_first: bool) -> None:
        timed, moved = self._saved(self._any(name))
        self._tell(f"{timed.seconds:.3f} s")
        if is_first:
            self.results.add("save.first", name, timed.seconds)
            return
        self.results.add("save", name, timed.seconds)
        self.results.add("save.written", name, moved[0])
        self.results.add("save.disk_written", name, moved[2])

    def asyncs(self) -> None:
        """Time saves behind the caller, with nothing else going on."""
        copy = limit.Copy(self.workload)
        for repetition in range(1 + self.options.repeat):
            timed = self.team.timed(copy.run)
            if repetition > 0:
                self.results.add("copy", limit.COPY, timed.seconds)
        del copy
        for mode in _MODES:
            able = self._able(mode)
            label = f"async {mode}"
            for name, repetition in self._in_turn(able, label, 1 + self.options.repeat):
                self._guard(name, label, self._one_async, name, mode, repetition == 0)
        self._share_eager("first", "blocked", "staged", "durable")

    def _one_async(self, name: str, mode: str, is_first: bool) -> None:
        contender = self._contenders[name]
        self._settle()
        timed = self._attempt(contender, lambda: self._behind(contender, mode))
        blocked, staged, durable = timed.values
        self._tell(f"blocked {blocked:.4f} s, durable after {durable:.3f} s")
        self._tidy(contender)
        if is_first:
            self.results.add(f"{mode}.first", name, blocked)
            return
        self.results.add(f"{mode}.blocked", name, blocked)
        self.results.add(f"{mode}.staged", name, staged)
        self.results.add(f"{mode}.durable", name, durable)

    def _behind(self, contender: Contender, mode: str) -> list[float]:
        begun = time.perf_counter()
        pending = contender.start(mode)
        blocked = time.perf_counter() - begun
        pending.wait_staged()
        staged = time.perf_counter() - begun
        wait_done(pending, self.team.timeout_seconds)
        durable = time.perf_counter() - begun
        pending.check()
        self._staged.add((contender.name, mode))
        return [blocked, staged, durable]

    def lost_time(self) -> None:
        """Time the steps of a training loop while a save is under way."""
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            loop = StepLoop(self.workload, self.team)
            self._lost_to_copy(loop)
            for mode in _MODES:
                able = self._able(mode)
                label = f"lost time, async {mode}"
                for name, _ in self._in_turn(able, label, self.options.repeat):
                    self._guard(name, label, self._one_lost, name, mode, loop)
        finally:
            torch.set_num_threads(num_threads)
        self._share_eager("lost", "lost_blocked", "lost_durable")

    def _lost_to_copy(self, loop: StepLoop) -> None:
        copy = limit.Copy(self.workload)
        copy.run()
        for _ in range(self.options.repeat):
            self._settle()
            lost, *_ = self.team.timed(lambda: loop.lost_to_copy(copy.run)).values
            self.results.add("lost", limit.COPY, lost)

    def _one_lost(self, name: str, mode: str, loop: StepLoop) -> None:
        contender = self._contenders[name]
        if (name, mode) not in self._staged:
            # What is done once in a process is not what each save costs.
            self._attempt(contender, lambda: self._behind(contender, mode))
        self._settle()

        def start() -> Pending:
            return contender.start(mode)

        lost, blocked, durable, step = self._attempt(
            contender, lambda: loop.lost_to(start)
        ).values
        self._tell(
            f"lost {lost:.3f} s in {durable:.2f} s (a step takes {step * 1e3:.0f} ms)"
        )
        self._tidy(contender)
        self.results.add(f"{mode}.lost", name, lost)
        self.results.add(f"{mode}.lost_blocked", name, blocked)
        self.results.add(f"{mode}.lost_durable", name, durable)
        self.results.add(f"{mode}.lost_step", name, step)

    def warm_restores(self) -> None:
        """Time restores of files that are in the page cache."""
        self._restores("warm", measure.warm)

    def cold_restores(self) -> None:
        """Time restores of files that are not."""
        self._restores("cold", measure.cool)

    def _restores(self, row: str, prepare: Callable[[str], None]) -> None:
        everyone = list(self._contenders)
        if limit.BUFFERED in self._limits:
            everyone += [limit.READ, limit.MAPPED]
        # The first of a process is kept apart; only the warm one shows what it costs.
        label = f"restore, {row}"
        for name, repetition in self._in_turn(everyone, label, 1 + self.options.repeat):
            self._guard(name, label, self._one_restore, name, row, prepare, repetition == 0)

    def _one_restore(
        self, name: str, row: str, prepare: Callable[[str], None], is_first: bool
    ) -> None:
        contender = self._any(name)
        if contender.num_saves == 0:
            self._saved(contender)
        self._settle()
        self.team.first_here(lambda: prepare(contender.folder))
        self.workload.overwrite()
        try:
            timed, moved = self._moving(contender, contender.load)
            self.team.timed(self.workload.check)
        except ContenderFailed:
            self.workload.fill()
            raise
        self._tell(f"{timed.seconds:.3f} s, verified")
        if is_first:
            if row == "warm":
                self.results.add("warm.first", name, timed.seconds)
            return
        self.results.add(row, name, timed.seconds)
        if row == "warm":
            self.results.add("warm.read", name, moved[1])
        else:
            self.results.add("cold.disk_read", name, moved[3])

    def memory(self) -> None:
        """Sample memory in repetitions of their own, each on a contender of its own.

        One that has saved before holds memory already, which would not show.
        """
        for name in list(self._contenders):
            self._guard(name, "closing", self._close, self._contenders[name])
            self._contenders.pop(name, None)
            for what in ("save", *_MODES, "restore"):
                if name not in self.results.failures:
                    self._guard(name, f"memory, {what}", self._one_memory, name, what)
        self._share_rows("memory.eager", "memory.lazy")

    def _one_memory(self, name: str, what: str) -> None:
        if what in _MODES and what not in self._modes[name]:
            return
        self._tell_what("memory,", what, name)
        measure.release_memory()
        before = measure.memory_bytes()
        contender = self._make(name)
        if what == "restore":
            self._saved(contender)
            self.workload.overwrite()
            before = measure.memory_bytes()

        def action() -> list[float]:
            with measure.PeakMemory() as peak:
                if what in _MODES:
                    self._behind(contender, what)
                elif what == "save":
                    contender.save()
                else:
                    contender.load()
            return [peak.peak_bytes - before]

        (on_top,) = self._attempt(contender, action).values
        self._tell(f"{on_top / 1e6:.0f} MB")
        self.results.add(f"memory.{what}", name, on_top)
        self._close(contender)
        self._delete(contender.folder)

    def gate(self) -> None:
        """Time calls that the interval rules out."""
        if OURS in self.results.failures:
            return
        self._tell_what("gated call", "", OURS)
        folder = os.path.join(self._folder, "gate")
        self._guard(OURS, "gated call", self._gate, folder)

    def _gate(self, folder: str) -> None:
        seconds = self.team.timed(lambda: time_gated_calls(folder)).values
        self._tell(f"{statistics.median(seconds) * 1e6:.2f} us")
        for value in seconds:
            self.results.add("gate", OURS, value)


# In the order in which they are run: after ``memory`` nobody has a checkpoint any more.
PHASES: dict[str, Callable[[Runner], None]] = {
    "save": Runner.saves,
    "async": Runner.asyncs,
    "lost": Runner.lost_time,
    "warm": Runner.warm_restores,
    "cold": Runner.cold_restores,
    "memory": Runner.memory,
    "gate": Runner.gate,
}
