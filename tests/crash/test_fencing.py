"""Two managers of one directory, switched at every call: only the newer one goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable

import pytest
from campaign import Part, part_of_every
from figures import Lost, Torn
from harness import EVERYTHING
from incarnations import NEW, OLD, Contest
from mutants import applied
from scenario import in_workers

from distckpt import state
from distckpt.errors import DistckptError

# Hundreds of crash points; a busy machine may take its time.
pytestmark = pytest.mark.timeout(1200)


def _run_schedules(
    scratch: str, schedules: list[dict[str, dict[int, str]]]
) -> tuple[list[str], int]:
    def work(folder: str, stops: dict[str, dict[int, str]]) -> tuple[str, bool]:
        directory = os.path.join(folder, "run")
        shutil.rmtree(directory, ignore_errors=True)
        contest = Contest(directory, stops)
        contest.run()
        try:
            contest.check()
        except (Torn, Lost, DistckptError) as error:
            return f"{stops}: {type(error).__name__}: {error}", True
        finally:
            contest.close()
        return "", contest.actors[OLD].fenced

    results = in_workers(scratch, schedules, work)
    return [text for text, _ in results if text], sum(fenced for _, fenced in results)


def _num_calls(scratch: str) -> dict[str, int]:
    contest = Contest(os.path.join(scratch, "counted"), {})
    contest.run()
    contest.close()
    return contest.baton.num_calls


@part_of_every(8)
@pytest.mark.parametrize("kept_records", [64, 2] if EVERYTHING else [2])
def test_old_chief_stopped_at_every_call_is_fenced(
    scratch: str,
    report_figures: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    kept_records: int,
    part: Part,
):
    """A chief that sleeps while a newer one claims and saves can harm nothing after."""
    monkeypatch.setattr(state, "_KEPT_RECORDS", kept_records)
    calls = _num_calls(scratch)
    schedules = [{OLD: {index: NEW}} for index in part.of(range(calls[OLD]))]
    wrong, num_fenced = _run_schedules(scratch, schedules)
    report_figures(f"{len(schedules)} schedules, {num_fenced} fenced, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong[:5])
    assert num_fenced > 0.6 * len(schedules) and calls[OLD] > 150


# The tests themselves: the known mistakes must be found out.


@pytest.mark.full
def test_append_by_rename_is_found(scratch: str, report_figures: Callable[[str], None]):
    """A record that replaces another lets a stopped chief undo what was committed."""
    with applied("record-that-replaces-another"):
        schedules = [{OLD: {index: NEW}} for index in range(_num_calls(scratch)[OLD])]
        wrong, _ = _run_schedules(scratch, schedules)
    report_figures(f"{len(schedules)} schedules, {len(wrong)} wrong")
    assert wrong
