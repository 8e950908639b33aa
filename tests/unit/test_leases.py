"""Leases: a reader that lives keeps what it reads, one that died does not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from unit_helpers import make_attempt, make_claimed, published_numbers, save, settle

from distckpt import leases, paths, readers
from distckpt.errors import CheckpointNotFound, ConfigError, UnsafeCheckpointError
from distckpt.leases import Lease, Leases
from distckpt.run_directory import RunDirectory
from distckpt.verify import verify_attempt

ONE = make_attempt(1)


class Clock:
    seconds = 0.0

    def __call__(self):
        return self.seconds


def folder(directory, *names):
    return os.path.join(directory, paths.LEASES_DIRECTORY, *names)


def left(directory):
    return os.listdir(folder(directory))


def leave_dead(directory, attempt, text='{"seconds": 5.0, "by": "nobody"}'):
    """Leave the lease of a reader that is no more."""
    os.makedirs(folder(directory), exist_ok=True)
    path = folder(directory, paths.lease_file(attempt))
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
    return path


def test_a_lease_holds_its_attempt_and_no_other_until_it_is_released(run_dir):
    seen = Leases(RunDirectory.at(run_dir))
    assert not seen.hold(ONE)
    lease = Lease(RunDirectory.at(run_dir), ONE, 60.0)
    assert seen.hold(ONE)
    assert not seen.hold(make_attempt(2)) and not seen.hold(make_attempt(1, epoch=2))
    lease.release()
    assert not seen.hold(ONE)
    assert left(run_dir) == []


def test_each_of_two_leases_holds(run_dir):
    seen = Leases(RunDirectory.at(run_dir))
    one, other = (
        Lease(RunDirectory.at(run_dir), ONE, 60.0),
        Lease(RunDirectory.at(run_dir), ONE, 60.0),
    )
    one.release()
    assert seen.hold(ONE)
    other.release()
    assert not seen.hold(ONE)


def test_a_lease_that_nobody_touches_ends_by_the_clock_of_who_deletes(run_dir):
    clock = Clock()
    seen = Leases(RunDirectory.at(run_dir), clock)
    path = leave_dead(run_dir, ONE)
    os.utime(path, (4e9, 4e9))  # what the filesystem's clock says does not matter
    assert seen.hold(ONE)
    clock.seconds = 5.0
    assert seen.hold(ONE)
    clock.seconds = 5.1
    assert not seen.hold(ONE)
    assert left(run_dir) == []


def test_a_lease_that_is_touched_lasts(run_dir):
    clock = Clock()
    seen = Leases(RunDirectory.at(run_dir), clock)
    path = leave_dead(run_dir, ONE)
    for number in range(5):
        os.utime(path, (1000 + number, 1000 + number))
        assert seen.hold(ONE)
        clock.seconds += 4.9
    clock.seconds += 0.2
    assert not seen.hold(ONE)


@pytest.mark.parametrize(
    "text",
    ["", "nonsense", "[]", '{"seconds": 1e9}', '{"seconds": "x"}', '{"seconds": -1}'],
)
def test_a_lease_that_says_nothing_sensible_ends_like_any_other(run_dir, text):
    clock = Clock()
    seen = Leases(RunDirectory.at(run_dir), clock)
    leave_dead(run_dir, ONE, text)
    assert seen.hold(ONE)
    clock.seconds = leases.SECONDS + 1
    assert not seen.hold(ONE)


def test_a_fifo_in_the_place_of_a_lease_holds_nobody_up(run_dir):
    clock = Clock()
    seen = Leases(RunDirectory.at(run_dir), clock)
    os.makedirs(folder(run_dir))
    os.mkfifo(folder(run_dir, paths.lease_file(ONE)))
    assert seen.hold(ONE)
    clock.seconds = leases.SECONDS + 1
    assert not seen.hold(ONE)


def test_leases_that_are_elsewhere_are_refused(run_dir, tmp_path):
    os.makedirs(run_dir, exist_ok=True)
    os.symlink(tmp_path, folder(run_dir))
    with pytest.raises(UnsafeCheckpointError, match="symbolic link"):
        Leases(RunDirectory.at(run_dir)).hold(ONE)
    with pytest.raises(UnsafeCheckpointError, match="symbolic link"):
        Lease(RunDirectory.at(run_dir), ONE, 60.0)


def test_a_reader_touches_its_lease_while_it_lives(run_dir):
    lease = Lease(RunDirectory.at(run_dir), ONE, 0.3)
    (name,) = left(run_dir)
    first = os.stat(folder(run_dir, name)).st_mtime_ns
    deadline = time.monotonic() + 20
    while os.stat(folder(run_dir, name)).st_mtime_ns == first:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lease.release()


def test_a_reader_whose_lease_was_taken_away_says_so_and_touches_no_more(run_dir, caplog):
    lease = Lease(RunDirectory.at(run_dir), ONE, 0.3)
    os.unlink(folder(run_dir, left(run_dir)[0]))
    deadline = time.monotonic() + 20
    while "may end before it is given back" not in caplog.text:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lease.release()
    assert not [t for t in threading.enumerate() if t.name == "distckpt-lease"]


def test_the_lease_of_a_reader_that_was_killed_ends(run_dir):
    code = (
        "import sys, os, signal\n"
        "from distckpt.leases import Lease\n"
        "from distckpt.paths import parse_published\n"
        "from distckpt.run_directory import RunDirectory\n"
        "Lease(RunDirectory.at(sys.argv[1]), parse_published(sys.argv[2]), 0.5)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, run_dir, ONE.published], check=False)
    assert len(left(run_dir)) == 1
    seen = Leases(RunDirectory.at(run_dir))
    assert seen.hold(ONE)
    deadline = time.monotonic() + 20
    while seen.hold(ONE):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize("seconds", [0, -1, 1e9, float("nan"), "60", True])
def test_how_long_a_lease_lasts_must_be_a_sensible_time(run_dir, seconds):
    with pytest.raises(ConfigError, match="lease_seconds"):
        next(readers.checkpoints_iterator(run_dir, lease_seconds=seconds))


# With a chief that deletes, and a reader that reads


@pytest.fixture
def chief(run_dir):
    chief = make_claimed(run_dir, keep=1)
    yield chief
    chief.close()


def test_what_is_read_is_dropped_but_not_deleted_before_the_body_ends(run_dir, chief):
    save(chief, run_dir, 1)
    reading = readers.checkpoints_iterator(run_dir, timeout=0)
    path = next(reading)
    for number in (2, 3):
        save(chief, run_dir, number)
    assert published_numbers(run_dir) == [1, 3]
    assert readers.get_checkpoint_state(run_dir).all_model_checkpoint_paths == [
        os.path.join(run_dir, "ckpt-3")
    ]
    # Whoever was given the path opens it by that.
    located = readers.locate(path)
    assert verify_attempt(located.directory, located.manifest_digest).ok
    reading.close()
    save(chief, run_dir, 4)
    assert published_numbers(run_dir) == [4]
    with pytest.raises(CheckpointNotFound):
        readers.locate(path)
    assert left(run_dir) == []


def test_the_next_checkpoint_ends_the_lease_of_the_last(run_dir, chief):
    save(chief, run_dir, 1)
    reading = readers.checkpoints_iterator(run_dir, timeout=0)
    assert next(reading).endswith("ckpt-1")
    save(chief, run_dir, 2)
    assert next(reading).endswith("ckpt-2")
    (name,) = left(run_dir)
    assert paths.parse_lease_file(name).number == 2
    reading.close()


def test_without_a_lease_nothing_is_written_and_nothing_kept(run_dir, chief):
    save(chief, run_dir, 1)
    reading = readers.checkpoints_iterator(run_dir, timeout=0, lease_seconds=None)
    next(reading)
    save(chief, run_dir, 2)
    assert published_numbers(run_dir) == [2]
    assert not os.path.exists(folder(run_dir))
    reading.close()


def test_where_no_lease_can_be_written_it_is_read_without(run_dir, chief, tmp_path, caplog):
    save(chief, run_dir, 1)
    os.symlink(tmp_path, folder(run_dir))
    reading = readers.checkpoints_iterator(run_dir, timeout=0)
    assert next(reading).endswith("ckpt-1")
    assert "may be deleted while it is read" in caplog.text
    reading.close()


def test_one_that_was_dropped_before_its_lease_was_there_is_not_yielded(
    run_dir, chief, monkeypatch
):
    """The chief may have looked before; the next newest is taken."""
    save(chief, run_dir, 1)

    class Late(Lease):
        def __init__(self, *arguments):
            monkeypatch.setattr(readers, "Lease", Lease)
            save(chief, run_dir, 2)
            super().__init__(*arguments)

    monkeypatch.setattr(readers, "Lease", Late)
    reading = readers.checkpoints_iterator(run_dir, timeout=0)
    assert next(reading).endswith("ckpt-2")
    assert [paths.parse_lease_file(name).number for name in left(run_dir)] == [2]
    reading.close()


def test_leases_that_cannot_be_looked_for_hold_up_the_deletion(run_dir, chief, tmp_path):
    """Rather too much is kept than deleted under somebody's hands."""
    save(chief, run_dir, 1)
    os.symlink(tmp_path, folder(run_dir))
    save(chief, run_dir, 2)
    assert published_numbers(run_dir) == [1, 2]
    os.unlink(folder(run_dir))
    save(chief, run_dir, 3)
    assert published_numbers(run_dir) == [3]


def test_what_was_read_when_its_job_ended_is_deleted_by_the_next_claim(run_dir, chief):
    save(chief, run_dir, 1)
    reading = readers.checkpoints_iterator(run_dir, timeout=0)
    next(reading)
    save(chief, run_dir, 2)
    chief.close()
    reading.close()
    assert published_numbers(run_dir) == [1, 2]
    settle(make_claimed(run_dir, keep=1))
    assert published_numbers(run_dir) == [2]
