"""Two and three incarnations of one job in one directory, switched at random calls.

The scheduler is deterministic: a schedule follows from its seed. Whatever they do to each
other, one line of history comes of it, all that was acknowledged is in it, and only the one
that claimed last goes on.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import campaign
import pytest
from campaign import Campaign, in_two_parts
from figures import Figures
from incarnations import NEW, OLD, THIRD, Contest
from mutants import applied
from scenario import SMALL_TABLE, all_saved_as

from distckpt import state

# Thousands of schedules; a busy machine may take its time.
pytestmark = pytest.mark.timeout(1200)

SIZE = 2_000
_MAX_SWITCHES = 7
_KEPT_RECORDS = (64, 2, 1)


@dataclass(frozen=True)
class Schedule:
    """Who hands over to whom, before which call.

    Attributes:
        num_actors: How many incarnations there are.
        kept_records: How many records are kept.
        stops: See ``incarnations.Stops``.
    """

    num_actors: int
    kept_records: int
    stops: dict[str, dict[int, str]]


class Schedules(Campaign[Schedule]):
    """Random schedules of the real claim, save and retention code."""

    name = "schedules"
    about = "two and three incarnations interleaved at random calls"

    @contextmanager
    def opened(self, scratch: str) -> Iterator[None]:
        """Count the calls that each makes alone."""
        with all_saved_as(SMALL_TABLE):
            contest = Contest(os.path.join(scratch, "counted"), {}, 3)
            contest.run()
            contest.close()
            self._num_calls = contest.baton.num_calls
            yield

    def point(self, source: random.Random, index: int) -> Schedule:
        """Return one."""
        num_actors = source.choice((2, 3))
        names = [OLD, NEW, THIRD][:num_actors]
        stops: dict[str, dict[int, str]] = {name: {} for name in names}
        for _ in range(source.randint(1, _MAX_SWITCHES)):
            who = source.choice(names)
            other = source.choice([name for name in names if name != who])
            stops[who][source.randrange(self._num_calls[who])] = other
        return Schedule(num_actors, source.choice(_KEPT_RECORDS), stops)

    def play(self, folder: str, point: Schedule, figures: Figures) -> None:
        """Play one, and check what came of it."""
        directory = os.path.join(folder, "run")
        shutil.rmtree(directory, ignore_errors=True)
        kept, state._KEPT_RECORDS = state._KEPT_RECORDS, point.kept_records
        contest = Contest(directory, point.stops, point.num_actors)
        try:
            contest.run()
            num_fenced = sum(actor.fenced for actor in contest.actors.values())
            figures.count("fenced", num_fenced)
            figures.check(point, contest.check)
        finally:
            contest.close()
            state._KEPT_RECORDS = kept


CAMPAIGN = Schedules()


# The last four find a mutant that the others do not.
@in_two_parts(SIZE, (*range(56), 113, 116, 207, 283))
def test_incarnations_at_random_calls_stay_in_line(
    scratch: str, report_figures: Callable[[str], None], indexes: Collection[int]
):
    """Two or three that wake and sleep by turns make one history between them."""
    figures = campaign.run(CAMPAIGN, scratch, indexes)
    report_figures(str(figures))
    figures.demand_zeros()
    assert figures.others["fenced"] > len(indexes) / 2


@pytest.mark.full
def test_incarnations_with_a_sweep_of_any_epoch_are_found(
    scratch: str, report_figures: Callable[[str], None]
):
    """The campaign itself: the mistake that a first draft of the protocol had."""
    with applied("sweep-of-any-epoch"):
        figures = campaign.run(CAMPAIGN, scratch, range(200))
    report_figures(str(figures))
    assert figures.findings
