"""The power is cut in the middle of real saves of real ranks, on a real filesystem.

By default every fourth call that changes the disk is cut, once: before, in the middle of
and after it by turns, alternately with the journal kept or lost. With
``DISTCKPT_EVERY_CRASH=1`` in the environment all are, everywhere, both ways.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
from campaign import Part, part_of_every
from figures import Figures
from harness import EVERYTHING
from job_scenario import (
    SCENARIOS,
    Crash,
    Notes,
    PowerCut,
    Scenario,
    Template,
    changes_the_disk,
    check_come_back,
    check_listing,
    count_calls,
    every_place,
    one_place_each,
)
from power import LOG_FLUSHED, LOG_LOST, Disk, mounted_disk

from distckpt.storage import posix

# Many jobs; a busy machine may take its time.
pytestmark = [pytest.mark.timeout(2700), pytest.mark.usefixtures("power_switch")]

# What is on a disk at the beginning: nothing, or two checkpoints.
_EMPTY, _SAVED = "empty", "saved"


@dataclass
class CutFigures(Figures):
    """What came of the cuts, and how many checkpoints were acknowledged before them."""

    acknowledged: int = 0

    def __str__(self) -> str:
        return f"{super().__str__()}; {self.acknowledged} checkpoints acknowledged"


class Stage:
    """Disks to cut the power of: each cut begins with a copy of an image."""

    def __init__(self, scratch: str, world_size: int = 2) -> None:
        self._scratch = scratch
        self._world_size = world_size
        self._template = Template(scratch, world_size)
        for name in (_EMPTY, _SAVED):
            folder = os.path.join(scratch, name)
            with mounted_disk(self._image(name), folder) as disk:
                if name == _SAVED:
                    self._template.copy_to(os.path.join(disk.path, "run"))
                subprocess.run(["sync", "--file-system", disk.path], check=True)

    def _image(self, name: str) -> str:
        return os.path.join(self._scratch, f"{name}.image")

    def cuts(
        self,
        spoil: Callable[[], None] | None = None,
        scenarios: Sequence[Scenario] = SCENARIOS,
        each: int = 6,
    ) -> list[Crash]:
        """List the calls of two ranks at which the power is to be cut, and where."""
        found = []
        size = self._world_size
        for scenario in scenarios:
            counted = count_calls(self._scratch, self._template, size, scenario)
            for victim in (0, size - 1):
                calls = [point for point in counted[victim] if changes_the_disk(point)]
                chosen = every_place(calls) if EVERYTHING else one_place_each(calls)[::each]
                found += [(scenario, size, victim, point) for point in chosen]
        modes = (LOG_LOST, LOG_FLUSHED)
        return [
            Crash(*arguments, strike=PowerCut(mode), spoil=spoil)
            for number, arguments in enumerate(found)
            for mode in (modes if EVERYTHING else modes[number % 2 :][:1])
        ]

    def play_all(self, cuts: Sequence[Crash]) -> CutFigures:
        """Play them, two at a time."""
        figures = CutFigures(tried=len(cuts))

        def play(index: int) -> None:
            folder = tempfile.mkdtemp(dir=self._scratch)
            figures.check(cuts[index], lambda: self._cut(figures, cuts[index], folder))
            shutil.rmtree(folder)

        with ThreadPoolExecutor(2) as pool:
            list(pool.map(play, range(len(cuts))))
        return figures

    def _cut(self, figures: CutFigures, cut: Crash, folder: str) -> None:
        scenario, notes = cut.scenario, Notes(os.path.join(folder, "notes"))
        image = self._image(_EMPTY if scenario.before is None else _SAVED)
        before, after = (os.path.join(folder, f"image-{when}") for when in (1, 2))
        directory = os.path.join(folder, "disk", "run")
        _copy(image, before)
        with _mounted(before, os.path.dirname(directory)):
            cut.play(directory, notes)
        is_new = bool(notes.read("acknowledged"))
        figures.acknowledged += len(scenario.before or ()) + is_new
        # Another image, another device: nothing that anybody remembers of the first one.
        _copy(before, after)
        with _mounted(after, os.path.dirname(directory)):
            known = self._template.attempts
            is_listed = check_listing(directory, scenario, known, notes)
            check_come_back(directory, self._world_size, scenario, is_listed)


@contextmanager
def _mounted(image: str, path: str) -> Iterator[None]:
    os.makedirs(path, exist_ok=True)
    disk = Disk(image, path)
    disk.mount()
    try:
        yield
    finally:
        disk.unmount()


def _copy(image: str, target: str) -> None:
    subprocess.run(["cp", "--sparse=always", image, target], check=True)


@part_of_every(8)
@pytest.mark.parametrize(
    ("world_size", "each"), [(2, 8), pytest.param(4, 8, marks=pytest.mark.full)]
)
def test_power_cut_in_a_job_loses_nothing_that_was_acknowledged(
    scratch: str,
    report_figures: Callable[[str], None],
    world_size: int,
    each: int,
    part: Part,
):
    """At every call of either rank; a fresh job finds all of it, byte for byte."""
    stage = Stage(scratch, world_size)
    cuts = stage.cuts(each=each)
    figures = stage.play_all(part.of(cuts))
    report_figures(str(figures))
    figures.demand_zeros()
    assert len(cuts) > 10 and figures.acknowledged > figures.tried


def do_not_sync_files() -> None:
    """Leave the content of files to the kernel."""
    posix.os.fsync = lambda descriptor: None


@pytest.mark.full
def test_power_cut_in_a_job_without_file_fsync_is_found(
    scratch: str, report_figures: Callable[[str], None]
):
    """The cuts are real."""
    stage = Stage(scratch)
    cuts = stage.cuts(spoil=do_not_sync_files)
    figures = stage.play_all(cuts[1::4])  # with the journal kept: names without content
    report_figures(str(figures))
    assert figures.lost or figures.torn or figures.unopenable
