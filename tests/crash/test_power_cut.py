"""The power is cut at every call of the storage module, on a real filesystem."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import pytest
from power import LOG_FLUSHED, LOG_LOST, Cutter, mounted_disk
from scenario import in_workers
from test_kill_every_call import Figures, Point, Stage, _calls, _points

from distckpt import state, storage

# Hundreds of crash points; a busy machine may take its time.
pytestmark = [pytest.mark.timeout(400), pytest.mark.usefixtures("power_switch")]

_SEED = 60


@pytest.fixture
def few_records(monkeypatch):
    """Keep so few records that some are pruned under the cuts, too."""
    monkeypatch.setattr(state, "_KEPT_RECORDS", 4)


def _cut_at_all(scratch: str, points: list[tuple[Point, int]]) -> Figures:
    """Run the scenario, cut the power at one point, come back and check; for each point.

    Each worker has one disk for all of its points.
    """
    halves = [points[index::2] for index in range(2)]

    def work(folder: str, mine: Any) -> dict[str, Any]:
        figures = Figures()
        stage = Stage(folder)
        jobs = os.path.dirname(stage.directory)
        with mounted_disk(os.path.join(folder, "image"), jobs) as disk:
            for (index, place, name), mode in mine:
                where = f"mode {mode}, {place} call {index}, {name}"
                stage.clear()
                cutter = Cutter(index, place, disk=disk, mode=mode)
                figures.kill(where, stage, cutter, stage.live)
                disk.switch_on()
                figures.check(where, lambda: stage.recover(stage.check(), _SEED))
        return asdict(figures)

    total = Figures()
    for result in in_workers(scratch, halves, work):
        total.add(Figures(**result))
    return total


def _some_points(scratch: str, every: int = 1) -> list[tuple[Point, int]]:
    """List each state that a disk can be in, alternately with the journal kept or lost."""
    stage = Stage(scratch)
    os.makedirs(
        os.path.dirname(stage.directory)
    )  # there, too, when a disk is mounted on it
    points = _points(_calls(stage.live), all_places=False)[::every]
    modes = (LOG_LOST, LOG_FLUSHED)
    return [(point, modes[number % 2]) for number, point in enumerate(points)]


def test_power_cut_at_every_call_loses_nothing(
    scratch: str, report_figures: Callable[[str], None], few_records: None
):
    """What was acknowledged is there after a cut before or in any storage call."""
    points = _some_points(scratch)
    figures = _cut_at_all(scratch, points)
    report_figures(str(figures))
    figures.demand_zeros()
    assert figures.killed == figures.points == len(points) > 200


def test_power_cut_without_file_fsync_is_found(
    scratch: str, report_figures: Callable[[str], None], monkeypatch
):
    """A file that is not synced is found out: the cuts are real."""
    monkeypatch.setattr(storage.os, "fsync", lambda descriptor: None)
    figures = _cut_at_all(scratch, _some_points(scratch, every=6))
    report_figures(str(figures))
    assert figures.lost or figures.torn or figures.unopenable


def test_power_cut_without_directory_sync_is_found(
    scratch: str, report_figures: Callable[[str], None], monkeypatch
):
    """A name that is not synced is found out."""
    monkeypatch.setattr(storage, "sync_directory", lambda path: None)
    # On ext4 the next fsync of any file takes names along; this one comes at once.
    monkeypatch.setattr(state, "write_copy", lambda directory, head: None)
    figures = _cut_at_all(scratch, _some_points(scratch, every=3))
    report_figures(str(figures))
    assert figures.lost or figures.torn or figures.unopenable
