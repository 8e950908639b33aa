"""Asynchronous saves of real ranks: one is killed, or the power cut, at every call.

By default some calls are struck, once. With ``DISTCKPT_EVERY_CRASH=1`` in the environment
all are, everywhere.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import test_job_crashes
import test_job_power_cut
from campaign import Part, part_of_every
from job_scenario import ASYNC_SCENARIOS, Scenario

# Many jobs; a busy machine may take its time.
pytestmark = pytest.mark.timeout(2700)


@pytest.mark.covers(
    "asynchronous saves: S1 to S3 (caller's)", "asynchronous saves: S5 to S8 (behind)"
)
@part_of_every(8)
@pytest.mark.parametrize("scenario", ASYNC_SCENARIOS, ids=lambda scenario: scenario.name)
def test_rank_killed_behind_the_loop_is_named_and_nothing_is_lost(
    scratch: str, report_figures: Callable[[str], None], scenario: Scenario, part: Part
):
    """In staging, writing, vote and commit: the next call says what is true, in time."""
    stage = test_job_crashes.Stage(scratch, 2)
    crashes = [
        crash for victim in (0, 1) for crash in stage.kills(scenario, victim, each=8)
    ]
    figures = stage.play_all(part.of(crashes))
    report_figures(str(figures))
    figures.demand_zeros()


@part_of_every(8)
@pytest.mark.usefixtures("power_switch")
def test_power_cut_behind_the_loop_loses_nothing_that_was_acknowledged(
    scratch: str, report_figures: Callable[[str], None], part: Part
):
    """What a call has brought in is there, byte for byte, past the page cache or not."""
    stage = test_job_power_cut.Stage(scratch)
    figures = stage.play_all(part.of(stage.cuts(scenarios=ASYNC_SCENARIOS, each=10)))
    report_figures(str(figures))
    figures.demand_zeros()
    assert figures.acknowledged > figures.tried
