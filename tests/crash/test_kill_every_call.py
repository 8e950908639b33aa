"""The process is killed at every call of the storage module, and nothing is lost."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
from campaign import Part, part_of_every
from figures import Figures
from harness import EVERYTHING
from mutants import applied
from scenario import (
    FAILED,
    HUNG,
    KILLED,
    Journal,
    Listing,
    check_readable,
    claim_and_check_clean,
    in_child,
    in_workers,
    recover,
    run,
)
from storage_calls import AFTER, BEFORE, LOOKING, MIDDLE, Call, Counter, Killer, intercepted

from distckpt import state

# Hundreds of crash points; a busy machine may take its time.
pytestmark = pytest.mark.timeout(1200)

_RECOVERY_SEED = 50
_NUM_FIRST_KILLS = 6 if EVERYTHING else 3
_NUM_THREADED = 100
# By default; each after every first kill.
_ONE_SECOND_KILL_OF = 6


@pytest.fixture
def few_records(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep so few records that some are pruned under the kills, too."""
    monkeypatch.setattr(state, "_KEPT_RECORDS", 4)


def _kill(
    figures: Figures, where: str, stage: Stage, killer: Killer, body: Callable[[], None]
) -> None:
    """Run something in a child that is killed at one call; file how it ended."""

    def die() -> None:
        with intercepted(killer):
            body()

    status = in_child(die, stage.errors)
    figures.tried += 1
    if status == KILLED:
        figures.count("killed")
    elif status == HUNG:
        figures.hung.append(where)
    elif status == FAILED:
        with open(stage.errors, encoding="utf-8") as file:
            figures.wrong.append(f"{where}: {file.read()}")
    elif status != 0:
        figures.wrong.append(f"{where}: exit status {status}")


class Stage:
    """One run directory after the other, each with its journal outside it."""

    def __init__(self, scratch: str) -> None:
        self.directory = os.path.join(scratch, "jobs", "run")
        self.journal = os.path.join(scratch, "journal")
        self.errors = os.path.join(scratch, "errors")
        self._copy = os.path.join(scratch, "copy")

    def clear(self) -> None:
        """Start with nothing."""
        shutil.rmtree(os.path.dirname(self.directory), ignore_errors=True)
        self.forget()

    def forget(self) -> None:
        """Begin a new journal."""
        if os.path.exists(self.journal):
            os.unlink(self.journal)

    def keep(self) -> None:
        """Remember the run directory as it is."""
        shutil.rmtree(self._copy, ignore_errors=True)
        if os.path.exists(self.directory):
            shutil.copytree(self.directory, self._copy)

    def put_back(self) -> None:
        """Make the run directory what it was."""
        self.clear()
        if os.path.exists(self._copy):
            shutil.copytree(self._copy, self.directory)

    def live(self, *, threaded: bool = False, staged: bool = False) -> None:
        """Run the whole scenario."""
        journal = Journal(self.journal, ())
        try:
            run(self.directory, journal, threaded=threaded, staged=staged)
        finally:
            journal.close()

    def check(self) -> Listing:
        """Check what a survivor sees; returns what is listed."""
        return check_readable(self.directory, Journal.possible(self.journal))

    def recover(self, listing: Listing, seed: int) -> None:
        """Come back, save, and check that all is well and nothing is left behind."""
        self.forget()
        journal = Journal(self.journal, listing)
        try:
            recover(self.directory, journal, seed)
            claim_and_check_clean(self.directory)
            check_readable(self.directory, [journal.listing])
        finally:
            journal.close()


def _calls(body: Callable[[], None]) -> list[Call]:
    counter = Counter()
    with intercepted(counter):
        body()
    return counter.calls


# Index of the call, where to kill, and its name.
Point = tuple[int, str, str]


def _points(calls: list[Call], *, all_places: bool) -> list[Point]:
    """List where to kill: everywhere, or once for each state that a disk can be in."""
    points = []
    for index, call in enumerate(calls):
        changes = call.name not in LOOKING
        places = [
            *[BEFORE] * (changes or all_places),
            *[MIDDLE] * call.has_middle,
            # After a call that only looks is before the next one.
            *[AFTER] * (changes and all_places),
        ]
        points += [(index, place, call.label) for place in places]
    return points


def _share_out(
    scratch: str, jobs: Sequence[Any], work: Callable[[Stage, Figures, Any], None]
) -> Figures:
    def work_in(folder: str, job: Any) -> dict[str, Any]:
        figures = Figures()
        work(Stage(folder), figures, job)
        return asdict(figures)

    total = Figures()
    for result in in_workers(scratch, jobs, work_in):
        total.add(Figures(**result))
    return total


@part_of_every(8)
def test_kill_at_every_call_loses_nothing(
    scratch: str, report_figures: Callable[[str], None], few_records: None, part: Part
):
    """A kill before, in or after any storage call leaves all that was acknowledged."""
    calls = _calls(Stage(scratch).live)
    all_points = _points(calls, all_places=EVERYTHING)
    points = part.of(all_points, kind=lambda point: point[1:])
    figures = _share_out(scratch, points, _kill_and_recover)
    report_figures(f"{len(calls)} calls, {figures}")
    figures.demand_zeros()
    assert figures.others["killed"] == figures.tried == len(points)
    assert len(all_points) > (500 if EVERYTHING else 250)


def _kill_and_recover(stage: Stage, figures: Figures, point: Point) -> None:
    index, place, name = point
    where = f"{place} call {index}, {name}"
    stage.clear()
    _kill(figures, where, stage, Killer(index, place), stage.live)
    figures.check(where, lambda: stage.recover(stage.check(), _RECOVERY_SEED))


@pytest.mark.covers("claim: C4")
@part_of_every(_ONE_SECOND_KILL_OF)
def test_kill_again_in_recovery_loses_nothing(
    scratch: str, report_figures: Callable[[str], None], few_records: None, part: Part
):
    """A second kill at any call of the recovery leaves all that was acknowledged."""
    points = _points(_calls(Stage(scratch).live), all_places=False)
    sample = random.Random(7).sample(points, _NUM_FIRST_KILLS)
    figures = _share_out(scratch, sample, partial(_kill_twice, part))
    report_figures(f"{len(sample)} first kills, {figures}")
    figures.demand_zeros()
    # Each recovery has some 60 calls to be killed at.
    least = 50 * part.share * len(sample)
    assert figures.others["killed"] == figures.tried > least


def _kill_twice(part: Part, stage: Stage, figures: Figures, point: Point) -> None:
    index, place, name = point
    first = f"{place} call {index}, {name}"
    stage.clear()
    _kill(figures, first, stage, Killer(index, place), stage.live)
    listing = stage.check()
    stage.keep()

    def come_back() -> None:
        journal = Journal(stage.journal, listing)
        try:
            recover(stage.directory, journal, _RECOVERY_SEED)
        finally:
            journal.close()

    # Counted for each first kill: what there is to sweep differs.
    for again, place, name in part.of(_points(_calls(come_back), all_places=False)):
        where = f"{first}; then {place} call {again}, {name}"
        stage.put_back()
        _kill(figures, where, stage, Killer(again, place), come_back)
        figures.check(where, lambda: stage.recover(stage.check(), _RECOVERY_SEED + 1))


@part_of_every(8)
def test_kill_with_janitor_thread_at_random_calls_loses_nothing(
    scratch: str, report_figures: Callable[[str], None], few_records: None, part: Part
):
    """Deletions that really run behind the saves lose nothing either."""
    source = random.Random(11)
    num_calls = len(_calls(Stage(scratch).live))
    places = [BEFORE, AFTER]
    points = [
        (source.randrange(num_calls), source.choice(places), "with a thread")
        for _ in range(_NUM_THREADED)
    ]
    points = part.of(points)
    figures = _share_out(scratch, points, _kill_with_thread_and_recover)
    report_figures(str(figures))
    figures.demand_zeros()
    # The last calls may not be reached: how many there are depends on the thread.
    assert figures.tried == len(points) and figures.others["killed"] > 0.9 * len(points)


def _kill_with_thread_and_recover(stage: Stage, figures: Figures, point: Point) -> None:
    index, place, name = point
    where = f"{place} call {index}, {name}"
    stage.clear()
    live = partial(stage.live, threaded=True)
    _kill(figures, where, stage, Killer(index, place), live)
    figures.check(where, lambda: stage.recover(stage.check(), _RECOVERY_SEED))


# The tests themselves: a protocol with one step wrong must be found out.


@pytest.mark.full
def test_kill_with_deletion_before_commit_is_found(
    scratch: str, report_figures: Callable[[str], None]
):
    """Deleting before the record, the classical mistake, is seen as a loss."""
    figures = _kill_mutant(scratch, "deleted-before-the-commit")
    report_figures(str(figures))
    assert figures.torn and not figures.wrong


@pytest.mark.full
def test_kill_with_record_in_place_is_found(
    scratch: str, report_figures: Callable[[str], None]
):
    """A record written under its final name is seen as a chain that cannot be read."""
    figures = _kill_mutant(scratch, "record-written-in-place")
    report_figures(str(figures))
    assert figures.unopenable and not figures.wrong


def _kill_mutant(scratch: str, name: str) -> Figures:
    with applied(name):
        points = _points(_calls(Stage(scratch).live), all_places=False)
        return _share_out(scratch, points[::2], _kill_and_look)


def _kill_and_look(stage: Stage, figures: Figures, point: Point) -> None:
    index, place, name = point
    where = f"{place} call {index}, {name}"
    stage.clear()
    _kill(figures, where, stage, Killer(index, place), stage.live)
    figures.check(where, stage.check)
