"""Two incarnations of one job, switched twice, at every two calls of either.

One makes i calls, then the other j calls, then the first goes on to its end, then the
other to its: all i, all j. Both do the same: claim, read what a restore would, save,
release. So it makes no difference which of them begins, and these are all schedules with
two switches. At each switch, and at the end, a bystander restores, too.

By default i is every sixteenth call, and there is no switch just before a call that has
nothing to do with anybody else, such as a write into an open file: it may as well come
after that. With ``DISTCKPT_EVERY_CRASH=1`` in the environment all i and all j are tried.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from threading import current_thread
from typing import Any

import pytest
from campaign import Part, part_of_every
from figures import Figures, Lost, Torn
from harness import EVERYTHING
from incarnations import NEW, OLD, Actor, Contest, Stops
from scenario import (
    Journal,
    Listing,
    Saved,
    after_commit,
    claim,
    claim_and_check_clean,
    in_workers,
    make_chief,
    save,
    unlisted,
)
from storage_calls import Call

from distckpt import paths, readers, state
from distckpt.errors import DistckptError
from distckpt.record import COMMIT, Record
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.verify import verify_attempt

# Thousands of schedules; a busy machine may take its time.
pytestmark = pytest.mark.timeout(2700)

# How many calls of the first one are shared out at once: workers have a time limit.
_AT_ONCE = 26
# Files that are read are never changed, those that are written nobody else opens, and the
# run directory stays where it is.
_PRIVATE = {
    *("NewFile.write_at", "NewFile.finish", "OpenFile.read_into", "OpenFile.close"),
    *("free_bytes", "is_directory", "make_directories"),
}


def _is_private(call: Call) -> bool:
    """Tell whether a call neither sees nor changes what another manager does."""
    if call.name == "sync_directory":
        return paths.parse_pending(os.path.basename(call.arguments[0])) is None
    return call.name in _PRIVATE


@dataclass(frozen=True)
class Template:
    """A run directory with two checkpoints, and how it came to be."""

    directory: str
    saved: Listing
    history: tuple[Record, ...]

    @staticmethod
    def make(scratch: str) -> Template:
        """Make it; its manager is gone afterwards."""
        directory = os.path.join(scratch, "template")
        chief = make_chief(directory)
        claim(chief)
        journal = Journal(os.path.join(scratch, "journal"), ())
        saved = tuple(save(chief, directory, journal, seed) for seed in (1, 2))
        journal.close()
        chief.close()
        records = os.path.join(directory, paths.RECORDS_DIRECTORY)
        numbers = sorted(filter(None, map(paths.parse_record_file, os.listdir(records))))
        history = tuple(
            state.read_numbered(RunDirectory.at(directory), number).record
            for number in numbers
        )
        return Template(directory, saved, history)


@dataclass(slots=True)
class Incarnation(Actor):
    """A job that claims, restores, saves and releases."""

    def live(self, directory: str) -> None:
        """Do all of it, until fenced."""
        self.chief = make_chief(directory)
        claim(self.chief)
        newest = self.chief.candidates[0]
        report = verify_attempt(
            AttemptDirectory.at(os.path.join(directory, newest.attempt.published)),
            newest.manifest,
        )
        if not report.ok:
            self.wrong.append(f"restore: {report}")
        for seed, number in self.tasks:
            if not self._save(directory, seed, number):
                break


class Interleaving(Contest):
    """One schedule of two switches.

    Attributes:
        calls: Of each, whether they are private.
        seen: What the bystander found wrong.
    """

    def __init__(self, directory: str, template: Template, stops: Stops) -> None:
        super().__init__(directory, stops)
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(template.directory, directory)
        self.actors = {
            OLD: Incarnation(OLD, [(11, None)]),
            NEW: Incarnation(NEW, [(12, None)]),
        }
        self.actors[OLD].tried = list(template.saved)
        self.actors[OLD].committed = list(template.saved)
        self.history = list(template.history)
        self.calls: dict[str, list[bool]] = {OLD: [], NEW: []}
        self.seen: list[Exception] = []
        self._stops = stops
        self._is_looking = False

    def _hook(self, call: Call) -> Any:
        calls = self.calls.get(current_thread().name)
        if calls is None or self._is_looking:
            return call.run()
        if len(calls) in self._stops.get(current_thread().name, ()):
            self._look()
        calls.append(_is_private(call))
        return super()._hook(call)

    def _look(self) -> None:
        """Restore as a bystander does: all that is committed, whole."""
        self._is_looking = True
        try:
            self._check_listed(self._listing())
        except (AssertionError, DistckptError) as error:
            self.seen.append(error)
        self._is_looking = False

    def _check_listed(self, listing: Listing) -> None:
        record = readers.read_record(RunDirectory.at(self.directory))
        assert record is not None
        names = [entry.attempt.published for entry in record.live]
        if names != [saved.published for saved in listing]:
            raise Lost(f"listed {names}, expected {listing}")
        for entry in record.live:
            path = os.path.join(self.directory, entry.attempt.published)
            report = verify_attempt(AttemptDirectory.at(path), entry.manifest)
            if not report.ok or report.foreign:
                raise Torn(str(report))

    def _listing(self) -> Listing:
        tried = (*self.actors[OLD].tried, *self.actors[NEW].tried)
        saved_by_name = {saved.published: saved for saved in tried}
        listing: Listing = ()
        for record in self.history:
            if record.action == COMMIT:
                newest: Saved = saved_by_name[record.live[-1].attempt.published]
                listing = after_commit(listing, newest)
        return listing

    def check(self) -> None:
        """Check what the bystander saw, and all that is there at the end."""
        if self.seen:
            raise self.seen[0]
        wrong = [*self.actors[OLD].wrong, *self.actors[NEW].wrong]
        if wrong:
            raise Lost("; ".join(wrong))
        listing = self._check_history()
        self._check_fences()
        self._check_listed(listing)
        record = readers.read_record(RunDirectory.at(self.directory))
        if unlisted(self.directory, record):
            claim_and_check_clean(self.directory)


def _play(
    figures: Figures, folder: str, template: Template, i: int, j: int | None
) -> list[bool]:
    """Play one schedule; returns the calls that the second one made."""
    stops = {OLD: {i: NEW}, NEW: {} if j is None else {j: OLD}}
    contest = Interleaving(os.path.join(folder, "run"), template, stops)
    where = f"switched before calls {i} and {j}"
    contest.run()
    figures.tried += 1
    figures.count("fenced", any(actor.fenced for actor in contest.actors.values()))
    figures.check(where, contest.check)
    contest.close()
    return contest.calls[NEW]


def _switches(calls: list[bool]) -> list[int]:
    return [index for index, is_private in enumerate(calls) if EVERYTHING or not is_private]


@part_of_every(16)
@pytest.mark.parametrize("kept_records", [64, 1] if EVERYTHING else [64])
def test_every_schedule_with_two_switches_loses_nothing(
    scratch: str,
    report_figures: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    kept_records: int,
    part: Part,
):
    """Whatever two incarnations do to each other, one history comes of it, all whole."""
    template = Template.make(scratch)
    monkeypatch.setattr(state, "_KEPT_RECORDS", kept_records)

    def work(folder: str, i: int) -> dict[str, Any]:
        figures = Figures()
        calls = _play(figures, folder, template, i, None)
        for j in part.of(_switches(calls)):
            _play(figures, folder, template, i, j)
        return asdict(figures)

    alone = Interleaving(os.path.join(scratch, "counted"), template, {})
    alone.run()
    alone.check()
    alone.close()
    total = Figures()
    firsts = _switches(alone.calls[OLD])[:: 1 if EVERYTHING else 16]
    for begin in range(0, len(firsts), _AT_ONCE):
        folder = os.path.join(scratch, f"from-{begin}")
        os.mkdir(folder)
        for found in in_workers(folder, firsts[begin : begin + _AT_ONCE], work):
            total.add(Figures(**found))
    report_figures(f"{total}; {len(alone.calls[OLD])} calls, {len(firsts)} switched at")
    total.demand_zeros()
    least = part.share * len(firsts)
    assert total.tried > 20 * least and total.others["fenced"] > 5 * least
