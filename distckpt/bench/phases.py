"""What is measured, in which order: every contender in turn, again and again."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch

from distckpt.bench import limit, measure
from distckpt.bench.calls import COLD, MODES, SAVE, WARM
from distckpt.bench.contender import Pending
from distckpt.bench.fresh import Answer, Asked, Server, free_port, ranks_environment
from distckpt.bench.loop import StepLoop
from distckpt.bench.ours import time_gated_calls
from distckpt.bench.results import BYTES, FIRST_ROWS, OURS, ROWS, WorkloadResults
from distckpt.bench.team import ContenderFailed, Team
from distckpt.bench.turns import Options, Turns
from distckpt.bench.workloads import Workload

_IN_BYTES = {row.key for row in ROWS if row.unit == BYTES}


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
        self._called: set[tuple[str, str]] = set()

    def run(self) -> None:
        """Run all phases that were asked for."""
        self._make_all()
        for phase, measure_it in PHASES.items():
            if phase in self.options.phases:
                measure_it(self)
        self._close_all()

    def first_calls(self) -> None:
        """Time the first call of a new process: saves, asynchronous saves and restores."""
        server = Server()
        try:
            names = list(self._contenders)
            for name, _ in self._in_turn(names, "first calls", self.options.repeat):
                self._guard(name, "first call", self._first_calls_of, name, server)
        finally:
            server.close()
        self._share_eager("first", "first_durable")

    def _first_calls_of(self, name: str, server: Server) -> None:
        folder = self._new_folder(name)
        # Each call in a process that makes no other; the restores of what the first saved.
        for call in (SAVE, WARM, COLD):
            self._first_call(name, call, folder, server)
        self._delete(folder)
        for mode in self._modes[name]:
            folder = self._new_folder(name)
            self._first_call(name, mode, folder, server)
            self._delete(folder)

    def _first_call(self, name: str, call: str, folder: str, server: Server) -> None:
        asked = Asked(
            name,
            self.workload.name,
            self.workload.scale,
            self.workload.device.type == "cuda",
            self.team.timeout_seconds,
            folder,
            int(call in (WARM, COLD)),
            (call,),
        )
        team = self.team
        port = int(team.texts(str(free_port()))[0])
        server.ask(
            asked,
            ranks_environment(
                team.rank, team.world_size, team.local_rank, team.local_world_size, port
            ),
        )
        answers = team.texts(server.answer(team.timeout_seconds).to_json())
        found = [Answer.from_json(text) for text in answers]
        problem = next((answer.problem for answer in found if answer.problem), "")
        if problem:
            raise ContenderFailed(problem)
        for figure, values in found[0].figures.items():
            # It is made alike, whatever is called then.
            if figure in FIRST_ROWS and (figure != "made" or call == SAVE):
                self._tell(f"first {figure}: {values[0]:.4f} s")
                self.results.add(FIRST_ROWS[figure], name, values[0])

    def _repeat(self, names: list[str], call: str, label: str) -> None:
        """Make a call again and again; the first one counts as a warm-up."""
        for name, repetition in self._in_turn(names, label, 1 + self.options.repeat):
            self._guard(name, label, self._one, name, call, repetition == 0)

    def _one(self, name: str, call: str, is_warm_up: bool) -> None:
        figures = self.calls.run(self._any(name), call)
        self._called.add((name, call))
        for row, value in figures.items():
            if row not in _IN_BYTES:
                self._tell(f"{row}: {value:.4f} s")
            if not is_warm_up:
                self.results.add(row, name, value)

    def saves(self) -> None:
        """Time durable saves."""
        self._repeat([*self._contenders, *self._limits], SAVE, "save")
        # The others would hold memory and disk for nothing.
        for name in [name for name in self._limits if name != limit.BUFFERED]:
            self._delete(self._limits.pop(name).folder)

    def asyncs(self) -> None:
        """Time asynchronous saves, with nothing else going on."""
        copy = limit.Copy(self.workload)
        for repetition in range(1 + self.options.repeat):
            timed = self.team.timed(copy.run)
            if repetition > 0:
                self.results.add("copy", limit.COPY, timed.seconds)
        del copy
        for mode in MODES:
            self._repeat(self._able(mode), mode, f"async {mode}")
        self._share_eager("blocked", "staged", "durable")

    def lost_time(self) -> None:
        """Time the steps of a training loop while a save is under way."""
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            loop = StepLoop(self.workload, self.team)
            self._lost_to_copy(loop)
            for mode in MODES:
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
            self.calls.settle()
            lost, *_ = self.team.timed(lambda: loop.lost_to_copy(copy.run)).values
            self.results.add("lost", limit.COPY, lost)

    def _one_lost(self, name: str, mode: str, loop: StepLoop) -> None:
        contender = self._contenders[name]
        if (name, mode) not in self._called:
            # What is done once in a process is not what each save costs.
            self.calls.run(contender, mode)
        self.calls.settle()

        def start() -> Pending:
            return contender.start(mode)

        lost, blocked, durable, step = self.calls.attempt(
            contender, lambda: loop.lost_to(start)
        ).values
        self._tell(
            f"lost {lost:.3f} s in {durable:.2f} s (a step takes {step * 1e3:.0f} ms)"
        )
        self.calls.attempt(contender, contender.tidy)
        self.results.add(f"{mode}.lost", name, lost)
        self.results.add(f"{mode}.lost_blocked", name, blocked)
        self.results.add(f"{mode}.lost_durable", name, durable)
        self.results.add(f"{mode}.lost_step", name, step)

    def warm_restores(self) -> None:
        """Time restores of files that are in the page cache."""
        self._restores(WARM)

    def cold_restores(self) -> None:
        """Time restores of files that are not."""
        self._restores(COLD)

    def _restores(self, call: str) -> None:
        everyone = list(self._contenders)
        if limit.BUFFERED in self._limits:
            # What is in the page cache is not fetched from the device: that is no limit.
            ways = [*limit.READS]
            if call == WARM:
                ways.remove(limit.READ_DIRECT)
            everyone += ways
        self._repeat(everyone, call, f"restore, {call}")

    def memory(self) -> None:
        """Sample memory in repetitions of their own, each on a contender of its own.

        One that has saved before holds memory already, which would not show.
        """
        for name in list(self._contenders):
            self._guard(name, "closing", self._close, self._contenders[name])
            self._contenders.pop(name, None)
            for what in ("save", *MODES, "restore"):
                if name not in self.results.failures:
                    self._guard(name, f"memory, {what}", self._one_memory, name, what)
        self._share_rows("memory.eager", "memory.lazy")

    def _one_memory(self, name: str, what: str) -> None:
        if what in MODES and what not in self._modes[name]:
            return
        self._tell_what("memory,", what, name)
        measure.release_memory()
        before = measure.memory_bytes()
        contender = self._make(name)
        if what == "restore":
            self.calls.save(contender)
            self.workload.overwrite()
            before = measure.memory_bytes()

        def action() -> list[float]:
            with measure.PeakMemory() as peak:
                if what in MODES:
                    self.calls.until_durable(contender, what)
                elif what == "save":
                    contender.save()
                else:
                    contender.load()
            return [peak.peak_bytes - before]

        (on_top,) = self.calls.attempt(contender, action).values
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
    "first": Runner.first_calls,
    "save": Runner.saves,
    "async": Runner.asyncs,
    "lost": Runner.lost_time,
    "warm": Runner.warm_restores,
    "cold": Runner.cold_restores,
    "memory": Runner.memory,
    "gate": Runner.gate,
}
