"""Chief, or who asks it, is killed at every call: what is pinned, or leased, stays."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from contextlib import suppress

import pytest
from campaign import Part, part_of_every
from figures import Figures, Lost, Torn, demand
from harness import EVERYTHING
from scenario import (
    KILLED,
    Journal,
    check_content,
    claim,
    in_child,
    make_chief,
    read_text,
    save,
)
from storage_calls import BEFORE, LOOKING, Counter, Killer, intercepted

from distckpt import paths, pin, readers, unpin
from distckpt.errors import CheckpointNotFound
from distckpt.leases import Lease
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.verify import verify_attempt

pytestmark = pytest.mark.timeout(1200)

_SEED = 1


class Life:
    """A job that saves what somebody asks to keep, and drops all the rest.

    Args:
        scratch: An empty directory.
        leases: Whether it is leased, by a reader that lives; else it is pinned.
    """

    def __init__(self, scratch: str, leases: bool) -> None:
        self.directory = os.path.join(scratch, "run")
        self._scratch = scratch
        self._leases = leases
        self._lease: Lease | None = None
        chief = make_chief(self.directory)
        claim(chief)
        self.kept = save(chief, self.directory, self._journal(), _SEED).published
        chief.close()
        if leases:
            attempt = paths.parse_published(self.kept)
            assert attempt is not None
            self._lease = Lease(RunDirectory.at(self.directory), attempt, 3600.0)
        self._copy = os.path.join(scratch, "copy")
        shutil.copytree(self.directory, self._copy)

    def _journal(self) -> Journal:
        # One file for all, beginning anew: who dies does not close its own.
        path = os.path.join(self._scratch, "journal")
        if os.path.exists(path):
            os.unlink(path)
        return Journal(path, ())

    def again(self) -> None:
        """Begin once more from where only the one is saved."""
        shutil.rmtree(self.directory)
        shutil.copytree(self._copy, self.directory)
        if os.path.exists(self._acknowledged):
            os.unlink(self._acknowledged)

    @property
    def _acknowledged(self) -> str:
        return os.path.join(self._scratch, "acknowledged")

    def go_on(self) -> None:
        """Ask for it to be kept; then save so much that it would be dropped."""
        if not self._leases:
            pin(os.path.join(self.directory, "ckpt-1"))
        with open(self._acknowledged, "xb"):
            pass
        chief = make_chief(self.directory)
        claim(chief)
        journal = self._journal()
        for seed in (2, 3, 4):
            save(chief, self.directory, journal, seed, number=seed)
        chief.close()

    def come_back(self) -> None:
        """Save on, under the next claim."""
        chief = make_chief(self.directory)
        claim(chief)
        journal = self._journal()
        for seed in (11, 12, 13):
            save(chief, self.directory, journal, seed, number=seed)
        chief.close()

    def check(self) -> None:
        """Check that it is there, whole, for whoever was told that it stays."""
        if not os.path.exists(self._acknowledged):
            return
        record = readers.read_record(RunDirectory.at(self.directory))
        assert record is not None
        if not self._leases:
            names = [entry.attempt.published for entry in record.committed]
            demand(Lost, self.kept in names, f"{self.kept} is not in {names}")
        report = verify_attempt(
            AttemptDirectory.at(os.path.join(self.directory, self.kept)), None
        )
        demand(Torn, report.ok, report)

    def let_go(self) -> None:
        """End the pin or the lease; then it goes like any other."""
        if self._lease is not None:
            for name in os.listdir(os.path.join(self.directory, paths.LEASES_DIRECTORY)):
                os.unlink(os.path.join(self.directory, paths.LEASES_DIRECTORY, name))
        else:
            # Who died before it was told that it is asked for may have asked all the same.
            with suppress(CheckpointNotFound):
                unpin(os.path.join(self.directory, "ckpt-1"))
        chief = make_chief(self.directory)
        claim(chief)
        journal = self._journal()
        saved = save(chief, self.directory, journal, 21, number=21)
        chief.close()
        left = os.path.exists(os.path.join(self.directory, self.kept))
        demand(Lost, not left, f"{self.kept} stays for ever")
        check_content(self.directory, saved)


@part_of_every(2)
@pytest.mark.parametrize("leases", [False, True], ids=["pinned", "leased"])
def test_kill_at_every_call_loses_nothing_that_is_kept(
    scratch: str, report_figures: Callable[[str], None], leases: bool, part: Part
):
    """And when it is let go, it is deleted as if nothing had happened."""
    life = Life(scratch, leases)
    counter = Counter()
    with intercepted(counter):
        life.go_on()
    life.check()
    points = [i for i, call in enumerate(counter.calls) if call.name not in LOOKING]
    points = part.of(points[:: 1 if EVERYTHING else 3])
    figures = Figures()
    for index in points:
        life.again()

        def die(index: int = index) -> None:
            with intercepted(Killer(index, BEFORE)):
                life.go_on()

        status = in_child(die, os.path.join(scratch, "errors"))
        figures.tried += 1
        where = f"before call {index}, {counter.calls[index].label}"
        if status != KILLED:
            figures.wrong.append(f"{where}: {status} {read_text(scratch, 'errors')}")
            continue
        for step in (life.check, life.come_back, life.check, life.let_go):
            figures.check(where, step)
    report_figures(f"{'leased' if leases else 'pinned'}: {figures}")
    figures.demand_zeros()
    assert figures.tried > (50 if EVERYTHING else 15)
