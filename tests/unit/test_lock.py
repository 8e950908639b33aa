"""The lock is a courtesy: it tells, it never stands in the way."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys

import pytest

from distckpt.storage import lock
from distckpt.storage.lock import DirectoryLock

pytestmark = pytest.mark.alone

HOLDER = """
import sys
from distckpt.storage.lock import DirectoryLock
lock = DirectoryLock(sys.argv[1])
print(lock.acquire(0), flush=True)
sys.stdin.read()
"""


class Holder:
    """Another process that tries to take the lock and, if it can, holds it."""

    def __init__(self, directory):
        self._process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, directory],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.has_it = self._process.stdout.readline() == "True\n"

    def end(self):
        self._process.communicate()

    def kill(self):
        self._process.kill()
        self._process.communicate()


@pytest.fixture
def holders():
    """Make holders that end with the test."""
    made = []

    def make(directory):
        made.append(Holder(str(directory)))
        return made[-1]

    yield make
    for holder in made:
        if holder._process.returncode is None:
            holder.end()


def test_acquire_of_a_free_lock_keeps_others_out(tmp_path, holders):
    """A second job is told early."""
    mine = DirectoryLock(str(tmp_path))
    assert mine.acquire(0)
    assert not holders(tmp_path).has_it


def test_acquire_of_a_held_lock_gives_up_after_its_time(tmp_path, holders):
    """No endless wait."""
    assert holders(tmp_path).has_it
    assert not DirectoryLock(str(tmp_path)).acquire(0.2)


def test_acquire_waits_for_a_holder_that_ends(tmp_path, holders):
    """A job that is just ending is waited for."""
    holder = holders(tmp_path)
    mine = DirectoryLock(str(tmp_path))
    assert not mine.acquire(0)
    holder.end()
    assert mine.acquire(10)


def test_acquire_after_the_holder_was_killed_gets_it(tmp_path, holders):
    """A dead process holds nothing."""
    holders(tmp_path).kill()
    assert DirectoryLock(str(tmp_path)).acquire(5)


def test_release_lets_another_process_in(tmp_path, holders):
    """A closed manager has let go."""
    mine = DirectoryLock(str(tmp_path))
    mine.acquire(0)
    mine.release()
    assert holders(tmp_path).has_it


def test_lock_no_longer_referenced_is_let_go(tmp_path, holders):
    """Nobody has to call close."""
    mine = DirectoryLock(str(tmp_path))
    mine.acquire(0)
    del mine
    gc.collect()
    assert holders(tmp_path).has_it


def test_acquire_in_one_process_takes_it_from_the_older(tmp_path):
    """Of two managers in one process the newer wins."""
    older, newer = DirectoryLock(str(tmp_path)), DirectoryLock(str(tmp_path))
    assert older.acquire(0)
    assert newer.acquire(0)


def test_release_of_the_older_leaves_the_newers_lock(tmp_path, holders):
    """Closing what has lost already takes nothing away."""
    older, newer = DirectoryLock(str(tmp_path)), DirectoryLock(str(tmp_path))
    older.acquire(0)
    newer.acquire(0)
    older.release()
    assert not holders(tmp_path).has_it


def test_acquire_through_another_path_is_the_same_lock(tmp_path):
    """A link to the directory is the directory."""
    (tmp_path / "run").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "run")
    first = DirectoryLock(str(tmp_path / "run"))
    second = DirectoryLock(str(tmp_path / "link"))
    assert first.acquire(0)
    assert second.acquire(0)


def test_acquire_twice_is_harmless(tmp_path):
    """Claiming again keeps the lock."""
    mine = DirectoryLock(str(tmp_path))
    assert [mine.acquire(0), mine.acquire(0)] == [True, True]


def test_release_of_a_lock_that_is_not_held_is_harmless(tmp_path):
    """Close can always be called."""
    DirectoryLock(str(tmp_path)).release()


@pytest.mark.parametrize(
    "error", [OSError(38, "no locks"), NotImplementedError()], ids=repr
)
def test_acquire_where_locks_do_not_work_goes_on_with_a_warning(
    tmp_path, monkeypatch, caplog, error
):
    """The record chain keeps two chiefs apart, also without locks."""

    def acquire(*_, **__):
        raise error

    monkeypatch.setattr(lock.FileLock, "acquire", acquire)
    with caplog.at_level(logging.WARNING):
        assert DirectoryLock(str(tmp_path)).acquire(0)
    assert "no lock on" in caplog.text


def test_lock_file_stands_in_the_directory(tmp_path):
    """Where the format says it is."""
    mine = DirectoryLock(str(tmp_path))
    mine.acquire(0)
    assert os.listdir(tmp_path) == [".lock"]


@pytest.mark.parametrize(
    "error",
    [
        OSError("no locks here"),
        NotImplementedError("no flock on this filesystem"),
        subprocess.TimeoutExpired("python", 20),
    ],
)
def test_trial_of_locks_that_fails_says_that_they_keep_nobody_out(
    tmp_path, monkeypatch, error
):
    """And ends: the answer is for people."""

    def fail(*_, **__):
        raise error

    monkeypatch.setattr(lock.subprocess, "run", fail)
    assert lock.keeps_others_out(str(tmp_path / "trial")) is False


def test_trial_of_locks_that_work_says_so(tmp_path):
    assert lock.keeps_others_out(str(tmp_path / "trial")) is True


def test_trial_of_a_lock_that_somebody_holds_is_no_endless_wait(tmp_path):
    from filelock import FileLock

    with FileLock(tmp_path / "trial"):
        assert lock.keeps_others_out(str(tmp_path / "trial")) is False
