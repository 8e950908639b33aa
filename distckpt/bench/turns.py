"""What every phase needs: the contenders, their turns, and going on when one fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from distckpt.bench import limit
from distckpt.bench.calls import Calls
from distckpt.bench.contender import EAGER, LAZY, Contender
from distckpt.bench.ours import Ours
from distckpt.bench.peers import PEERS, why_unusable
from distckpt.bench.results import LIMIT_PREFIX, OURS, WorkloadResults
from distckpt.bench.team import ContenderFailed, Team
from distckpt.bench.workloads import Workload

_Made = TypeVar("_Made")


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for.

    Attributes:
        repeat: Repetitions that count.
        phases: Names of ``PHASES``.
        compare: Names of peers.
        say: Tells the user what runs.
    """

    repeat: int
    phases: Sequence[str]
    compare: Sequence[str]
    say: Callable[[str], None]


class Turns:
    """The contenders of one workload; every method is called by all ranks together."""

    def __init__(
        self,
        workload: Workload,
        team: Team,
        folder: str,
        options: Options,
        results: WorkloadResults,
    ) -> None:
        self.workload = workload
        self.team = team
        self.options = options
        self.results = results
        self.calls = Calls(workload, team)
        self._folder = folder
        self._num_made = 0
        self._contenders: dict[str, Contender] = {}
        self._modes: dict[str, tuple[str, ...]] = {}
        self._limits: dict[str, limit.RawFile] = {}

    def _close_all(self) -> None:
        self._limits.clear()
        for name, contender in list(self._contenders.items()):
            self._guard(name, "closing", self._close, contender)
        self._contenders.clear()
        self._delete(self._folder)

    def _delete(self, folder: str) -> None:
        self.team.first_here(lambda: shutil.rmtree(folder, ignore_errors=True))

    def _make_all(self) -> None:
        for name in (OURS, *self.options.compare):
            if name != OURS:
                reasons = {text for text in self.team.texts(why_unusable(name)) if text}
                if reasons:
                    self._fail(name, sorted(reasons)[0])
                    continue
            self._guard(name, "start", self._add, name)
        if not {"save", "warm", "cold"} & set(self.options.phases):
            return
        for method in limit.METHODS:
            self._guard(LIMIT_PREFIX + method, "start", self._add_limit, method)

    def _add(self, name: str) -> None:
        self._contenders[name] = self._make(name)
        self._modes[name] = self._contenders[name].modes

    def _add_limit(self, method: str) -> None:
        folder = self._new_folder(method)
        self._limits[LIMIT_PREFIX + method] = self._together(
            lambda: limit.RawFile(self.workload, self.team, folder, method)
        )

    def _make(self, name: str) -> Contender:
        make = Ours if name == OURS else PEERS[name]
        folder = self._new_folder(name)
        return self._together(lambda: make(self.workload, self.team, folder))

    def _together(self, make: Callable[[], _Made]) -> _Made:
        made: list[_Made] = []
        self.team.timed(lambda: made.append(make()))
        return made[0]

    def _new_folder(self, name: str) -> str:
        self._num_made += 1
        return os.path.join(self._folder, f"{self._num_made:03}-{name}")

    def _any(self, name: str) -> Contender:
        if name in limit.READS:
            return self._limits[limit.BUFFERED].reading(name)
        return self._limits[name] if name in self._limits else self._contenders[name]

    def _in_turn(
        self, names: Iterable[str], what: str, count: int
    ) -> Iterable[tuple[str, int]]:
        """Take turns, forwards, then backwards: nobody is always behind another."""
        names = list(names)
        for repetition in range(count):
            for name in names if repetition % 2 == 0 else reversed(names):
                if name not in self.results.failures:
                    self._tell_what(what, f"{repetition + 1}/{count}", name)
                    yield name, repetition

    def _able(self, mode: str) -> list[str]:
        """Return who can save in a mode."""
        return [name for name, modes in self._modes.items() if mode in modes]

    def _share_eager(self, *rows: str) -> None:
        for row in rows:
            self._share_rows(f"{EAGER}.{row}", f"{LAZY}.{row}")

    def _share_rows(self, eager: str, lazy: str) -> None:
        """Compare the lazy mode with the only one that a peer has."""
        for name, series in self.results.series.get(eager, {}).items():
            if LAZY not in self._modes.get(name, (LAZY,)):
                self.results.series.setdefault(lazy, {})[name] = series

    def _close(self, contender: Contender) -> None:
        self.calls.attempt(contender, contender.close)

    def _guard(self, name: str, what: str, do: Callable[..., None], *args: Any) -> None:
        """Do something for one contender; if it fails, go on without it."""
        try:
            do(*args)
        except ContenderFailed as error:
            self._fail(name, f"{what}: {error}")

    def _fail(self, name: str, reason: str) -> None:
        self.results.failures[name] = reason
        self._contenders.pop(name, None)
        self._limits.pop(name, None)
        self._tell(f"{name} goes on no further: {reason}")

    def _tell(self, text: str) -> None:
        self.options.say(f"    {text}")

    def _tell_what(self, what: str, which: str, name: str) -> None:
        self.options.say(f"{self.workload.name}: {what} {which}: {name}")
