"""Real ranks, one of them killed at every call: the other says what is true, in time.

By default every sixth call is struck, once: before, in the middle of and after it by
turns. With ``DISTCKPT_EVERY_CRASH=1`` in the environment all are, everywhere.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import pytest
from campaign import Part, part_of_every
from figures import Figures, Wrong, demand
from harness import EVERYTHING
from job_scenario import (
    SCENARIOS,
    Crash,
    Notes,
    Point,
    Scenario,
    Template,
    Told,
    changes_the_disk,
    check_come_back,
    check_listing,
    check_whole,
    count_calls,
    every_place,
    one_place_each,
)
from mutants import deleted_before_the_commit
from storage_calls import AFTER, BEFORE, MIDDLE

# Hundreds of jobs; a busy machine may take its time.
pytestmark = pytest.mark.timeout(2700)

LATE_SECONDS = 1.0
# Starting many processes at once slows all of them down on a small machine.
AT_A_TIME = 2

(SAVE_AND_RELEASE,) = (one for one in SCENARIOS if one.name == "save-release")


@dataclass
class KillFigures(Figures):
    """What came of the kills: what the survivors were told, what was listed after each."""

    seconds: list[float] = field(default_factory=list)
    said: dict[str, int] = field(default_factory=dict)
    listed: list[bool] = field(default_factory=list)

    def __str__(self) -> str:
        said = ", ".join(f"{text} {num}" for text, num in sorted(self.said.items()))
        return (
            f"{super().__str__()}; named {median(self.seconds):.2f} s (median) to "
            f"{max(self.seconds):.2f} s after the kill; outcome said: {said}"
        )


class Stage:
    """Where jobs are played, each in a directory of its own."""

    def __init__(self, scratch: str, world_size: int) -> None:
        self._scratch = scratch
        self._world_size = world_size
        self._template = Template(scratch, world_size)
        # Of each rank, by the scenario and what spoils it.
        self._calls: dict[tuple[Any, ...], list[list[Point]]] = {}

    def _calls_of(
        self, scenario: Scenario, rank: int, spoil: Callable[[], None] | None = None
    ) -> list[Point]:
        job = (self._world_size, scenario, spoil)
        if job not in self._calls:
            self._calls[job] = count_calls(self._scratch, self._template, *job)
        return self._calls[job][rank]

    def kills(
        self,
        scenario: Scenario,
        victim: int,
        *,
        everywhere: bool = EVERYTHING,
        spoil: Callable[[], None] | None = None,
        each: int = 6,
    ) -> list[Crash]:
        """List the kills of one rank at all calls of a scenario, or at one of ``each``."""
        calls = self._calls_of(scenario, victim, spoil)
        chosen = every_place(calls) if everywhere else one_place_each(calls)[victim::each]
        return [
            Crash(scenario, self._world_size, victim, point, spoil=spoil)
            for point in chosen
        ]

    def kills_in_the_commit(
        self, *, everywhere: bool = EVERYTHING, spoil: Callable[[], None] | None = None
    ) -> list[Crash]:
        """List the kills of the chief while it commits."""
        kills = self.kills(SAVE_AND_RELEASE, 0, everywhere=everywhere, spoil=spoil)
        points = [(crash, crash.point) for crash in kills if crash.point is not None]
        return [
            crash
            for crash, point in points
            if point.phase == "WRITE"
            and (point.deciding or point.name in ("vote", "answer"))
        ]

    def kill_in(self, scenario: Scenario, step: Step) -> Crash:
        """Return the kill of a rank in one step of the protocol."""
        point = step.find(self._calls_of(scenario, step.victim))
        return Crash(scenario, self._world_size, step.victim, point)

    def play_all(self, crashes: Sequence[Crash]) -> KillFigures:
        """Play them, a few at a time; what was late is tried again with less going on."""
        figures = KillFigures(tried=len(crashes))
        with ThreadPoolExecutor(AT_A_TIME) as pool:
            seconds = list(pool.map(lambda crash: self._play(figures, crash), crashes))
        for index, crash in enumerate(crashes):
            if seconds[index] > LATE_SECONDS:
                seconds[index] = self._play(figures, crash)
            if seconds[index] > LATE_SECONDS:
                figures.wrong.append(f"{crash}: named after {seconds[index]:.2f} s")
        figures.seconds = seconds
        return figures

    def _play(self, figures: KillFigures, crash: Crash) -> float:
        """Play one and file what it finds; returns after how long all had noticed."""
        folder = tempfile.mkdtemp(dir=self._scratch)
        late = [0.0]
        figures.check(crash, lambda: late.append(self._kill(figures, crash, folder)))
        shutil.rmtree(folder)
        return late[-1]

    def _kill(self, figures: KillFigures, crash: Crash, folder: str) -> float:
        directory, notes = os.path.join(folder, "run"), Notes(os.path.join(folder, "notes"))
        self._template.prepare(directory, crash.scenario)
        results = crash.play(directory, notes)
        ((_, killed_at),) = notes.read("struck")
        known = self._template.attempts
        is_listed = check_listing(directory, crash.scenario, known, notes)
        figures.listed.append(is_listed)
        seconds, held_up = [], 0.0
        for rank, result in enumerate(results):
            if rank == crash.victim:
                continue
            demand(Wrong, result.ok, result)
            seen = [Told(*one) for one in result.value[0]]
            _check_told(crash, seen, is_listed)
            seconds.append(seen[-1].ended - max(killed_at, seen[-1].began))
            # What one rank says in time comes late where another waits for a processor.
            held_up += seen[-1].held_up
            outcome = _outcome_said(crash.scenario, seen)
            figures.said[outcome] = figures.said.get(outcome, 0) + 1
        if EVERYTHING or changes_the_disk(crash.point):
            check_come_back(directory, crash.world_size, crash.scenario, is_listed)
        else:
            check_whole(directory)  # a point beside it lets a job come back
        return max(0.0, max(seconds) - held_up)


def _check_told(crash: Crash, seen: Sequence[Told], is_listed: bool) -> None:
    """Check that a survivor names the victim, and what it says of the save."""
    last = seen[-1]
    demand(Wrong, last.is_broken, f"nobody was missed: {seen}")
    demand(Wrong, last.ranks == (crash.victim,), f"{last.ranks} blamed: {last.text}")
    demand(Wrong, f"rank {crash.victim}" in last.text, last.text)
    truth = {"committed": is_listed, "not committed": not is_listed}
    outcome = _outcome_said(crash.scenario, seen)
    demand(Wrong, truth.get(outcome, True), f"said {outcome}, {is_listed=}: {seen[0].text}")


def _outcome_said(scenario: Scenario, seen: Sequence[Told]) -> str:
    """Tell what a rank was told about its save."""
    if not scenario.saves:
        return "nothing"
    # By the call itself, or by the next one.
    saved = seen[:2][-1] if scenario.staging else seen[0]
    if saved.kind == "ok":
        return "committed"
    return {True: "committed", False: "not committed", None: "unknown"}[saved.committed]


# A sample of the saves is in the next test.
@part_of_every(6)
@pytest.mark.parametrize(
    "scenario",
    [
        pytest.param(one, id=one.name, marks=pytest.mark.full if one.saves else ())
        for one in SCENARIOS
    ],
)
def test_rank_killed_at_every_call_is_named_and_nothing_is_lost(
    scratch: str, report_figures: Callable[[str], None], scenario: Scenario, part: Part
):
    """The chief or the other; what is said of the save is true, and a fresh job goes on."""
    stage = Stage(scratch, 2)
    crashes = [crash for victim in (0, 1) for crash in stage.kills(scenario, victim)]
    crashes = part.of(crashes)
    figures = stage.play_all(crashes)
    report_figures(str(figures))
    figures.demand_zeros()


@dataclass(frozen=True)
class Step:
    """A row of the table "Save" in docs/protocol.md, and a call in which a rank dies there.

    Attributes:
        name: Of the row.
        victim: Which rank dies.
        call: Its name, and the phase of the vote that was cast last.
        where: Before the call, in the middle of it, or after it.
        is_listed: Whether what the job saved is there afterwards.
    """

    name: str
    victim: int
    call: tuple[str, str]
    where: str
    is_listed: bool

    def find(self, calls: Sequence[Point]) -> Point:
        """Return the first such call of a job."""
        found = next(point for point in calls if (point.name, point.phase) == self.call)
        return found._replace(where=self.where)


STEPS = [
    Step("S1", 1, ("vote", "DECIDE"), BEFORE, False),
    Step("S2", 0, ("make_directory", "DECIDE"), AFTER, False),
    Step("S3", 1, ("answer", "DECIDE"), BEFORE, False),
    Step("S5", 1, ("NewFile.write_at", "DECIDE"), MIDDLE, False),
    Step("S6", 1, ("vote", "WRITE"), BEFORE, False),
    Step("S7", 0, ("link", "WRITE"), BEFORE, False),
    Step("S7", 0, ("link", "WRITE"), AFTER, True),
    Step("S8", 0, ("answer", "WRITE"), BEFORE, True),
    Step("S9", 0, ("remove_tree", ""), MIDDLE, True),
]


@pytest.fixture(scope="module")
def stage(shared_scratch: str) -> Stage:
    """Make what the tests of all steps share, once."""
    return Stage(shared_scratch, 2)


@pytest.mark.parametrize(
    "step",
    [
        pytest.param(
            step,
            id=f"{step.name}-{step.where}",
            marks=pytest.mark.covers(f"save: {step.name}"),
        )
        for step in STEPS
    ],
)
def test_job_that_dies_in_a_step_of_a_save_leaves_what_the_table_says(
    stage: Stage, step: Step
):
    """Swept until the record is there, valid from then on; and a fresh job goes on."""
    figures = stage.play_all([stage.kill_in(SAVE_AND_RELEASE, step)])
    figures.demand_zeros()
    assert figures.listed[-1] == step.is_listed


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_chief_killed_in_the_commit_is_said_to_have_committed_or_unknown(
    scratch: str, report_figures: Callable[[str], None], world_size: int
):
    """Never that it failed, once it may be on the disk: at every call of the commit."""
    stage = Stage(scratch, world_size)
    crashes = stage.kills_in_the_commit(everywhere=EVERYTHING)
    figures = stage.play_all(crashes)
    report_figures(str(figures))
    figures.demand_zeros()
    assert "not committed" not in figures.said
    assert figures.said["committed"] and figures.said["unknown"]


# The tests themselves: a protocol with one step wrong must be found out.


@pytest.mark.full
def test_chief_killed_after_a_deletion_before_the_commit_is_found(
    scratch: str, report_figures: Callable[[str], None]
):
    """Real ranks find it out, too."""
    stage = Stage(scratch, 2)
    crashes = stage.kills_in_the_commit(everywhere=True, spoil=deleted_before_the_commit)
    figures = stage.play_all(crashes[::2])
    report_figures(str(figures))
    assert figures.torn
