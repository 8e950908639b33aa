"""The operating system fails at every call, once or for ever, and nothing is lost."""

from __future__ import annotations

import errno
import os
import shutil
import threading
import traceback
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from scenario import (
    TABLE,
    Listing,
    Saved,
    after_commit,
    check_readable,
    claim,
    claim_and_check_clean,
    highest_number,
    in_workers,
    make_chief,
    write_shards,
)
from storage_calls import CAN_LOSE_REPLY, LOST_REPLY, REFUSED, Faults, failing

from distckpt import paths, storage
from distckpt.chief import Chief
from distckpt.errors import DistckptError, OutcomeUnknown, StorageError
from distckpt.values import encode

# Hundreds of crash points; a busy machine may take its time.
pytestmark = pytest.mark.timeout(400)

_ERRORS = (errno.EIO, errno.ENOSPC, errno.EACCES)

# Seeds, with a number where one is asked for: retention drops, a number is used again.
_SAVES = ((1, None), (2, None), (3, None), (4, 2))


class Life:
    """A manager that goes on after errors, as a training loop that catches them would.

    Attributes:
        chief: Its chief.
        possible: What may be listed: more than one after an unknown outcome.
        errors: What it was told.
        counter: The save counter.
    """

    def __init__(
        self, directory: str, faults: Faults, listing: Listing, *, threaded: bool
    ) -> None:
        self._directory = directory
        self._faults = faults
        self._threaded = threaded
        self.chief: Chief | None = None
        self.possible: list[Listing] = [listing]
        self.errors: list[DistckptError] = []
        self.counter = highest_number(listing)

    def live(self) -> None:
        """Save everything; after an error the cause may go away."""
        for seed, number in _SAVES:
            try:
                self.save(seed, number)
            except DistckptError as error:
                self.errors.append(error)
                self._faults.clear()

    def save(self, seed: int, number: int | None = None) -> None:
        """Make one save, claiming first where that has not happened."""
        if self.chief is None:
            self.chief = make_chief(self._directory, threaded=self._threaded)
        chief = self.chief
        if not chief.is_claimed:
            claim(chief)
        attempt = chief.begin(number, self.counter)
        try:
            shards = write_shards(self._directory, attempt, seed)
        except DistckptError:
            chief.abandon(attempt)
            raise
        before = self.possible
        after = [after_commit(one, Saved(attempt.published, seed)) for one in before]
        counter = max(self.counter, attempt.number)
        try:
            chief.commit(
                attempt,
                step=seed,
                shards=shards,
                layouts=[TABLE],
                values={"seed": encode(seed, "seed")},
            )
        except OutcomeUnknown:
            self.possible, self.counter = [*before, *after], counter
            raise
        self.possible, self.counter = after, counter

    def close(self) -> None:
        """Let go."""
        if self.chief is not None:
            assert self.chief.settle(10)
            self.chief.close()


def _past(directory: str) -> Listing:
    """Leave what a dead manager may leave: checkpoints, and every kind of leftover."""
    life = Life(directory, Faults(-1, 0, how=REFUSED, for_ever=False), (), threaded=False)
    life.save(60)
    life.save(61)
    assert life.chief is not None
    unlisted = life.chief.begin(None, 2)
    os.rename(
        os.path.join(directory, unlisted.pending),
        os.path.join(directory, unlisted.published),
    )
    listed = life.possible[0][-1].published
    shutil.copy(
        os.path.join(directory, listed, paths.MANIFEST_FILE),
        os.path.join(directory, unlisted.published),
    )
    pending = life.chief.begin(None, 2)
    write_shards(directory, pending, 62)
    trash = life.chief.begin(None, 2)
    os.rename(os.path.join(directory, trash.pending), os.path.join(directory, trash.trash))
    for name in (paths.temporary_file(1), paths.temporary_file(0)):
        storage.write_new_file(os.path.join(directory, paths.RECORDS_DIRECTORY, name), b"")
    storage.write_new_file(os.path.join(directory, paths.probe_file(1, "0" * 16, 1)), b"")
    life.close()
    return life.possible[0]


class Trial:
    """One past, that every fault begins with."""

    def __init__(self, scratch: str) -> None:
        self._past = os.path.join(scratch, "past")
        self.listing = _past(self._past)
        self.calls = self._count(os.path.join(scratch, "counted"))

    def _count(self, directory: str) -> list[str]:
        shutil.copytree(self._past, directory)
        faults = Faults(-1, 0, how=REFUSED, for_ever=False)
        life = Life(directory, faults, self.listing, threaded=False)
        with failing(faults):
            life.live()
            life.close()
        return faults.names

    def live_with(self, folder: str, point: list[Any]) -> list[str]:
        """Live with one fault; returns what is wrong afterwards, and what was told."""
        index, name, how, for_ever, threaded = point
        where = f"call {index}, {name} {how}{' for ever' * for_ever}"
        directory = os.path.join(folder, "run")
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(self._past, directory)
        files_before, threads_before = _open_files(), threading.enumerate()
        reason = _ERRORS[index % len(_ERRORS)]
        faults = Faults(index, reason, how=how, for_ever=for_ever)
        life = Life(directory, faults, self.listing, threaded=threaded)
        try:
            with failing(faults):
                life.live()
                faults.clear()
                life.save(50)
                life.close()
            _demand(len(life.errors) <= 1, f"told {life.errors}")
            _demand(_open_files() == files_before, f"files {_open_files()}")
            _demand(threading.enumerate() == threads_before, f"{threading.enumerate()}")
            claim_and_check_clean(directory)
            check_readable(directory, life.possible)
        except Exception as error:
            text = f"{where}: {type(error).__name__}: {error}"
            return [text + "".join(traceback.format_exception(error)[-3:]), ""]
        if not faults.fired:
            return ["", "no fault"]
        return ["", type(life.errors[0]).__name__ if life.errors else "nothing"]

    def run(
        self,
        scratch: str,
        points: list[list[Any]],
        report_figures: Callable[[str], None],
    ) -> dict[str, int]:
        """Try all points; returns how often what was told."""
        results = in_workers(scratch, points, self.live_with)
        wrong = [text for text, _ in results if text]
        told = dict(Counter(name for text, name in results if not text))
        report_figures(f"{len(points)} points, {len(wrong)} wrong; told: {told}")
        assert not wrong, "\n".join([f"{len(wrong)} wrong", *wrong[:8]])
        return told


def _demand(condition: bool, text: str) -> None:
    if not condition:
        raise AssertionError(text)


def _open_files() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{name}: {os.readlink(f'/proc/self/fd/{name}')}")
        except FileNotFoundError:
            continue  # the descriptor that listed them
    return found


@pytest.mark.parametrize("how", [REFUSED, LOST_REPLY])
def test_error_once_at_every_call_harms_only_that_save(
    scratch: str, report_figures: Callable[[str], None], how: str
):
    """One failed call fails at most one save, with an error of ours, and leaks nothing."""
    trial = Trial(scratch)
    points = [
        [index, name, how, False, False]
        for index, name in enumerate(trial.calls)
        if how == REFUSED or name in CAN_LOSE_REPLY
    ]
    told = trial.run(scratch, points, report_figures)
    assert len(points) > 60 and "no fault" not in told


def test_error_for_ever_from_every_call_ends_with_the_cause(
    scratch: str, report_figures: Callable[[str], None]
):
    """A disk that stays broken fails the save; once it works, the next one does too."""
    trial = Trial(scratch)
    calls = enumerate(trial.calls)
    points = [[index, name, REFUSED, True, False] for index, name in calls]
    told = trial.run(scratch, points, report_figures)
    assert len(points) > 300 and "no fault" not in told


def test_error_with_janitor_thread_leaks_no_thread(
    scratch: str, report_figures: Callable[[str], None]
):
    """Faults that hit deletions behind the saves end no thread and leave none."""
    trial = Trial(scratch)
    calls = list(enumerate(trial.calls))
    points = [
        [index, name, REFUSED, for_ever, True]
        for for_ever in (False, True)
        for index, name in calls[len(calls) // 3 :: 6]
    ]
    told = trial.run(scratch, points, report_figures)
    # The last calls may not be reached: how many there are depends on the thread.
    assert told.get("no fault", 0) < len(points) / 4


def test_storage_error_names_operation_path_and_reason(scratch: str):
    """Whatever the operating system refuses, the error says what, where and why."""
    path = os.path.join(scratch, "file")
    with failing(Faults(0, errno.EIO, how=REFUSED, for_ever=True)):
        with pytest.raises(StorageError, match=f"open {path}") as caught:
            storage.write_new_file(path, b"data")
    assert (caught.value.operation, caught.value.path) == ("open", path)
    assert caught.value.errno == errno.EIO
