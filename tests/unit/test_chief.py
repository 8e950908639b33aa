"""The chief: claims, commits, releases, and is fenced when another takes over."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import subprocess
import sys

import pytest
from unit_helpers import (
    claim,
    commit,
    make_attempt,
    make_chief,
    make_claimed,
    numbers,
    published_numbers,
    record_path,
    save,
    settle,
    write_attempt,
)

from distckpt import chief as chief_module
from distckpt import paths, state
from distckpt.errors import (
    ConfigError,
    CorruptStateError,
    DirectoryInUseError,
    FencedError,
    OutcomeUnknown,
    StorageError,
)
from distckpt.janitor import Janitor
from distckpt.record import CLAIM, COMMIT
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.storage import posix
from distckpt.storage.store import Room
from distckpt.verify import verify_attempt

pytestmark = pytest.mark.alone


class NoSweep(Janitor):
    """Leaves everything, as a janitor that has not come round to it yet."""

    def sweep(self, *_):
        pass

    def release(self, *_):
        pass


def newest(directory):
    return state.read_head(RunDirectory.at(directory)).record


def storage_error(path=""):
    return StorageError("failed", operation="x", path=path, errno=errno.EIO)


def fail_once(monkeypatch, name, match):
    """Let one call of a storage function fail, whose first path contains a text."""
    real = getattr(posix, name)
    left = [1]

    def call(path, *more):
        if left and match in path:
            left.clear()
            raise storage_error(path)
        return real(path, *more)

    monkeypatch.setattr(posix, name, call)


# Claim


def test_chief_made_writes_nothing(run_dir):
    """An evaluation job may make one to read."""
    make_chief(run_dir)
    assert not os.path.exists(run_dir)


def test_first_claim_appends_record_one_of_epoch_one(run_dir):
    """The chain begins with a claim."""
    make_claimed(run_dir, run="job-7", restart=3)
    record = newest(run_dir)
    found = (record.number, record.epoch, record.action, record.run, record.restart)
    assert found == (1, 1, CLAIM, "job-7", 3)


def test_claim_is_a_claim_only_when_finished(run_dir):
    """Ranks show that they can write before the directory changes hands."""
    chief = make_chief(run_dir)
    probe = chief.prepare_claim()
    assert (chief.is_claimed, state.has_records(RunDirectory.at(run_dir))) == (False, False)
    assert paths.probe_file(probe.epoch, probe.nonce, 0) in os.listdir(run_dir)


def test_claim_finished_leaves_no_probe(run_dir):
    """The directory holds what the format says, and nothing else."""
    make_claimed(run_dir)
    assert sorted(os.listdir(run_dir)) == [".lock", ".state", "checkpoint"]


def test_claim_abandoned_leaves_no_probe_and_no_record(run_dir):
    """A claim that another rank's probe broke leaves no trace."""
    chief = make_chief(run_dir)
    chief.prepare_claim()
    chief.abandon_claim()
    assert sorted(os.listdir(run_dir)) == [".lock", ".state"]


def test_claim_after_claim_has_the_next_epoch_of_the_same_chain(run_dir):
    """Epochs fence; the chain's id says whose attempts are whose."""
    make_claimed(run_dir)
    first = newest(run_dir)
    make_claimed(run_dir)
    second = newest(run_dir)
    assert (second.epoch, second.chain) == (first.epoch + 1, first.chain)


def test_claim_copies_the_lists_verbatim(run_dir, clock):
    """TensorFlow's recovery rule reaches the disk with the next commit only."""
    first = make_claimed(run_dir, keep=2, hours=1.0)
    for number in range(1, 5):
        clock.now += 3000
        save(first, run_dir, number)
    before = newest(run_dir)
    clock.now -= 10**6
    make_claimed(run_dir)
    after = newest(run_dir)
    assert (after.live, after.kept, after.last_preserved) == (
        before.live,
        before.kept,
        before.last_preserved,
    )


def test_claim_on_a_corrupt_chain_is_refused(run_dir):
    """Nothing is guessed, nothing is overwritten."""
    make_claimed(run_dir)
    with open(record_path(run_dir, 1), "w") as file:
        file.write("{")
    with pytest.raises(CorruptStateError):
        make_chief(run_dir)


def test_claim_where_there_are_no_hard_links_is_refused(run_dir, monkeypatch):
    """Without them two jobs could commit over each other."""
    monkeypatch.setattr(posix, "link", lambda *_: (_ for _ in ()).throw(storage_error()))
    with pytest.raises(StorageError, match="no hard links"):
        make_chief(run_dir).prepare_claim()
    assert os.listdir(os.path.join(run_dir, ".state")) == []


def test_claim_on_a_full_disk_is_refused(run_dir, monkeypatch):
    """Said at the start, not after the first hour of training."""
    monkeypatch.setattr(posix, "room", lambda _: Room(10, None))
    with pytest.raises(StorageError, match="only 10 B are free"):
        make_chief(run_dir).prepare_claim()


def test_claim_takes_in_what_another_chief_committed_meanwhile(run_dir):
    """Between prepare and finish the old chief may still commit."""
    old = make_claimed(run_dir)
    save(old, run_dir, 1)
    new = make_chief(run_dir)
    new.prepare_claim()
    save(old, run_dir, 2)
    new.finish_claim()
    assert numbers(new.checkpoints) == [1, 2]


def test_claim_that_lost_a_race_reads_again(run_dir, monkeypatch):
    """Another chief's commit in the very last moment is not lost."""
    old = make_claimed(run_dir)
    new = make_chief(run_dir)
    new.prepare_claim()
    real = state.append

    def append(directory, record):
        monkeypatch.setattr(state, "append", real)
        save(old, run_dir, 1)
        return real(directory, record)

    monkeypatch.setattr(state, "append", append)
    new.finish_claim()
    assert (numbers(new.checkpoints), newest(run_dir).epoch) == ([1], 2)


def test_claim_that_loses_every_race_gives_up(run_dir, monkeypatch):
    """No endless loop between two jobs."""
    chief = make_chief(run_dir)
    chief.prepare_claim()

    def append(*_):
        raise FencedError("taken")

    monkeypatch.setattr(state, "append", append)
    with pytest.raises(DirectoryInUseError, match="again and again"):
        chief.finish_claim()


# Save


def test_save_is_committed_published_and_whole(run_dir):
    """After return the checkpoint is durable and verifies."""
    chief = make_claimed(run_dir)
    attempt = save(chief, run_dir, 1000, step=1000)
    entry = newest(run_dir).live[-1]
    report = verify_attempt(
        AttemptDirectory.at(os.path.join(run_dir, attempt.published)), entry.manifest
    )
    assert (entry.attempt, entry.step, report.problems) == (attempt, 1000, [])


def test_save_appends_one_commit_record(run_dir):
    """One record is the one commit point."""
    chief = make_claimed(run_dir)
    save(chief, run_dir, 1)
    record = newest(run_dir)
    assert (record.number, record.action) == (2, COMMIT)


def test_save_happens_in_the_durable_order(run_dir, monkeypatch):
    """Manifest, its directory, the published name, its directory, and then the record."""
    chief = make_claimed(run_dir)
    attempt = chief.begin(1, 0)
    shards = write_attempt(chief, run_dir, attempt)
    log = []
    for name in ("write_new_file", "sync_directory", "rename", "link"):
        real = getattr(posix, name)

        def call(*arguments, name=name, real=real):
            log.append((name, os.path.basename(arguments[-1 if name == "link" else 0])))
            return real(*arguments)

        monkeypatch.setattr(posix, name, call)
    # write_new_file(path, data): the first argument is the path.
    commit(chief, attempt, shards)
    settle(chief)
    steps = [(n, p if not p.endswith(".tmp") else "temporary") for n, p in log[:7]]
    assert steps == [
        ("write_new_file", "manifest.json"),
        ("sync_directory", attempt.pending),
        ("rename", attempt.pending),
        ("sync_directory", os.path.basename(run_dir)),
        ("write_new_file", "temporary"),
        ("link", paths.record_file(2)),
        ("sync_directory", ".state"),
    ]


def test_begin_without_a_number_takes_the_one_after_the_counter(run_dir):
    """The counter is the checkpoint's own."""
    assert make_claimed(run_dir).begin(None, 41).number == 42


@pytest.mark.parametrize("number", [0, -3, 10**18])
def test_begin_with_an_odd_number_uses_it(run_dir, number):
    """Numbers are the user's, as in TensorFlow."""
    chief = make_claimed(run_dir)
    save(chief, run_dir, number)
    assert numbers(make_chief(run_dir).checkpoints) == [number]


@pytest.mark.parametrize("number", [10**19, -(10**30), True], ids=repr)
def test_begin_with_a_number_that_is_no_name_is_refused(run_dir, number):
    """A record with a name that nobody can read would make the chain unreadable."""
    with pytest.raises(ConfigError, match="cannot be the name"):
        make_claimed(run_dir).begin(number, 0)


def test_begin_with_the_default_number_of_a_live_checkpoint_is_refused(run_dir):
    """Somebody forgot to restore: saving would replace good checkpoints one by one."""
    chief = make_claimed(run_dir)
    save(chief, run_dir, 1)
    with pytest.raises(ConfigError, match="restore first"):
        make_claimed(run_dir).begin(None, 0)


def test_begin_with_the_default_number_of_a_kept_checkpoint_is_refused(run_dir, clock):
    """A preserved checkpoint is as precious as a live one."""
    chief = make_claimed(run_dir, keep=1, hours=1.0)
    clock.now += 7200
    save(chief, run_dir, 1)
    save(chief, run_dir, 2)
    with pytest.raises(ConfigError, match="restore first"):
        chief.begin(None, 0)


def test_begin_refused_leaves_no_pending_directory(run_dir):
    """A refused save leaves no trace."""
    chief = make_claimed(run_dir)
    save(chief, run_dir, 1)
    before = sorted(os.listdir(run_dir))
    with pytest.raises(ConfigError):
        chief.begin(None, 0)
    assert sorted(os.listdir(run_dir)) == before


def test_save_of_an_explicit_live_number_replaces_it(run_dir):
    """Asked for, it is done: the old attempt is released, the new one is the newest."""
    chief = make_claimed(run_dir)
    old = save(chief, run_dir, 1)
    save(chief, run_dir, 2)
    new = save(chief, run_dir, 1)
    assert chief.checkpoints[-1] == new != old
    assert numbers(chief.checkpoints) == [2, 1]
    assert not os.path.exists(os.path.join(run_dir, old.published))


def test_save_of_an_explicit_number_keeps_the_old_attempt_until_committed(run_dir):
    """A save that fails takes nothing away."""
    chief = make_claimed(run_dir)
    old = save(chief, run_dir, 1)
    attempt = chief.begin(1, 0)
    chief.abandon(attempt)
    assert chief.latest == old
    assert published_numbers(run_dir) == [1]


def test_save_of_an_explicit_kept_number_replaces_it(run_dir, clock):
    """A preserved number saved again is managed again, as in TensorFlow."""
    chief = make_claimed(run_dir, keep=1, hours=1.0)
    clock.now += 7200
    save(chief, run_dir, 1)
    save(chief, run_dir, 2)
    save(chief, run_dir, 1)
    record = newest(run_dir)
    assert [e.attempt.number for e in record.live] == [1]
    assert 1 not in [e.attempt.number for e in record.kept]


def test_save_orders_by_commit_not_by_number(run_dir):
    """Saving 100, 50, 10 keeps the two that were saved last."""
    chief = make_claimed(run_dir, keep=2)
    for number in (100, 50, 10):
        save(chief, run_dir, number)
    assert (numbers(chief.checkpoints), chief.latest.number) == ([50, 10], 10)


def test_save_stamps_the_time_after_writing(run_dir, clock):
    """As TensorFlow does: the time of completion."""
    chief = make_claimed(run_dir)
    attempt = chief.begin(1, 0)
    clock.now += 100
    commit(chief, attempt, write_attempt(chief, run_dir, attempt))
    assert newest(run_dir).live[0].time == clock.now


def test_save_without_a_step_keeps_the_last_step(run_dir):
    """The step is for people: the last one known."""
    chief = make_claimed(run_dir)
    save(chief, run_dir, 1, step=7)
    save(chief, run_dir, 2)
    assert newest(run_dir).last_step == 7


def test_state_file_follows_the_newest_record(run_dir):
    """People see what the records say."""
    chief = make_claimed(run_dir)
    save(chief, run_dir, 1)
    with open(os.path.join(run_dir, "checkpoint"), "rb") as file:
        copied = file.read()
    assert copied == newest(run_dir).encode()


def test_state_file_is_json_that_people_can_read(run_dir):
    """Any JSON reader will do."""
    save(make_claimed(run_dir), run_dir, 12)
    with open(os.path.join(run_dir, "checkpoint")) as file:
        assert json.load(file)["live"][0]["path"].startswith("ckpt-12.")


def test_state_file_that_cannot_be_written_does_not_fail_the_save(
    run_dir, monkeypatch, caplog
):
    """It is a copy: the commit is durable already."""
    chief = make_claimed(run_dir)
    attempt = chief.begin(1, 0)
    shards = write_attempt(chief, run_dir, attempt)

    def write_copy(*_):
        raise storage_error()

    monkeypatch.setattr(state, "write_copy", write_copy)
    with caplog.at_level(logging.WARNING):
        commit(chief, attempt, shards)
    settle(chief)
    assert chief.latest == attempt
    assert "state file is behind" in caplog.text


def test_state_file_is_never_read(run_dir):
    """Whatever stands in it, the records decide."""
    save(make_claimed(run_dir), run_dir, 1)
    with open(os.path.join(run_dir, "checkpoint"), "w") as file:
        file.write("garbage")
    assert numbers(make_chief(run_dir).checkpoints) == [1]


@pytest.mark.parametrize("name", ["run[1]", "a*b", "what?", "with space", "ä", "-rf"])
def test_directory_with_an_odd_name_works(tmp_path, name):
    """TensorFlow's globs never delete anything in such a directory."""
    directory = str(tmp_path / name)
    chief = make_claimed(directory, keep=2)
    for number in range(1, 5):
        save(chief, directory, number)
    assert published_numbers(directory) == [3, 4]


# Failed saves


def test_abandon_removes_the_pending_directory(run_dir):
    """A full disk must not stay full."""
    chief = make_claimed(run_dir)
    attempt = chief.begin(1, 0)
    write_attempt(chief, run_dir, attempt)
    chief.abandon(attempt)
    assert not os.path.exists(os.path.join(run_dir, attempt.pending))


def test_abandon_that_fails_is_a_warning(run_dir, monkeypatch, caplog):
    """The error of the save is the one to see; the next claim sweeps."""
    chief = make_claimed(run_dir)
    attempt = chief.begin(1, 0)
    fail_once(monkeypatch, "remove_tree", attempt.pending)
    with caplog.at_level(logging.WARNING):
        chief.abandon(attempt)
    assert "left for later" in caplog.text


@pytest.mark.parametrize(
    ("operation", "match"),
    [
        ("write_new_file", "manifest.json"),
        ("rename", ".pending"),
        ("sync_directory", "run"),
    ],
)
def test_commit_that_failed_before_the_record_leaves_no_trace(
    run_dir, monkeypatch, operation, match
):
    """The older checkpoints are as they were, and the disk is no fuller."""
    chief = make_claimed(run_dir)
    save(chief, run_dir, 1)
    attempt = chief.begin(2, 0)
    shards = write_attempt(chief, run_dir, attempt)
    before = newest(run_dir)
    fail_once(monkeypatch, operation, match)
    with pytest.raises(StorageError):
        commit(chief, attempt, shards)
    assert newest(run_dir) == before
    assert published_numbers(run_dir) == [1]
    assert not os.path.exists(os.path.join(run_dir, attempt.pending))


def test_commit_that_failed_gives_its_number_back(run_dir, monkeypatch):
    """The next save may use it."""
    chief = make_claimed(run_dir)
    attempt = chief.begin(None, 0)
    shards = write_attempt(chief, run_dir, attempt)
    fail_once(monkeypatch, "write_new_file", "manifest.json")
    with pytest.raises(StorageError):
        commit(chief, attempt, shards)
    assert chief.begin(None, 0).number == 1


# Unknown outcomes


@pytest.fixture
def unknown(run_dir, monkeypatch):
    """Save 1, then 2 with an outcome that the disk will not tell: the record is there."""
    chief = make_claimed(run_dir, keep=1)
    save(chief, run_dir, 1)
    attempt = chief.begin(2, 0)
    shards = write_attempt(chief, run_dir, attempt)
    fail_once(monkeypatch, "sync_directory", ".state")
    with pytest.raises(OutcomeUnknown):
        commit(chief, attempt, shards)
    settle(chief)
    return chief


def test_unknown_outcome_deletes_nothing(run_dir, unknown):
    """Neither what the record would have released nor the attempt itself."""
    assert published_numbers(run_dir) == [1, 2]


def test_unknown_outcome_then_abandon_deletes_nothing(run_dir, unknown):
    """The attempt may be the newest checkpoint."""
    unknown.abandon(newest(run_dir).live[-1].attempt)
    assert published_numbers(run_dir) == [1, 2]


def test_unknown_outcome_that_was_a_commit_is_adopted(unknown):
    """The next save finds the record and goes on from it."""
    unknown.begin(3, 0)
    assert numbers(unknown.checkpoints) == [2]


def test_unknown_outcome_adopted_still_deletes_nothing_until_a_commit(run_dir, unknown):
    """Found is not durable: only an append that succeeded releases."""
    unknown.begin(3, 0)
    settle(unknown)
    assert published_numbers(run_dir) == [1, 2]


def test_unknown_outcome_adopted_is_released_by_the_next_commit(run_dir, unknown):
    """After that all goes on as usual."""
    save(unknown, run_dir, 3)
    assert (published_numbers(run_dir), numbers(unknown.checkpoints)) == ([3], [3])


@pytest.fixture
def lost(run_dir, monkeypatch):
    """Save 1, then 2 with an outcome that the disk will not tell: nothing is there."""
    chief = make_claimed(run_dir, keep=1)
    save(chief, run_dir, 1)
    attempt = chief.begin(2, 0)
    shards = write_attempt(chief, run_dir, attempt)
    fail_once(monkeypatch, "link", "")
    with pytest.raises(OutcomeUnknown):
        commit(chief, attempt, shards)
    settle(chief)
    return chief


def test_lost_commit_keeps_the_older_checkpoint(run_dir, lost):
    """What was committed is still committed and still there."""
    assert (numbers(lost.checkpoints), published_numbers(run_dir)) == ([1], [1, 2])


def test_lost_commit_then_another_save_goes_through(run_dir, lost):
    """The chief goes on; the attempt that was lost waits for the next claim."""
    save(lost, run_dir, 3)
    assert (numbers(lost.checkpoints), published_numbers(run_dir)) == ([3], [2, 3])


def test_lost_commit_is_swept_by_the_next_claim(run_dir, lost):
    """Published but never recorded: its commit did not happen."""
    make_claimed(run_dir)
    assert published_numbers(run_dir) == [1]


# Retention


@pytest.mark.parametrize(
    ("keep", "left"), [(1, [5]), (3, [3, 4, 5]), (None, [1, 2, 3, 4, 5])]
)
def test_retention_keeps_so_many_on_disk(run_dir, keep, left):
    """What is listed and what is there agree."""
    chief = make_claimed(run_dir, keep=keep)
    for number in range(1, 6):
        save(chief, run_dir, number)
    assert (published_numbers(run_dir), numbers(chief.checkpoints)) == (left, left)


def test_retention_deletes_only_what_a_durable_record_released(run_dir, monkeypatch):
    """At the moment of deletion the record that drops it stands already."""
    chief = make_claimed(run_dir, keep=1)
    save(chief, run_dir, 1)
    seen = []
    real = posix.remove_tree

    def remove_tree(path):
        seen.append([e.attempt.number for e in newest(run_dir).releasing])
        real(path)

    monkeypatch.setattr(posix, "remove_tree", remove_tree)
    save(chief, run_dir, 2)
    assert seen == [[1]]


def test_retention_smaller_after_restart_deletes_nothing_until_a_save(run_dir):
    """A claim moves nothing."""
    first = make_claimed(run_dir, keep=5)
    for number in range(1, 6):
        save(first, run_dir, number)
    second = make_claimed(run_dir, keep=2)
    assert published_numbers(run_dir) == [1, 2, 3, 4, 5]
    save(second, run_dir, 6)
    assert published_numbers(run_dir) == [5, 6]


def test_retention_preserves_one_an_hour(run_dir, clock):
    """Preserved ones stay on disk and in the record, but are not managed."""
    chief = make_claimed(run_dir, keep=1, hours=1.0)
    start = clock.now
    for number in range(1, 8):
        clock.now = start + 3000 * number
        save(chief, run_dir, number)
    record = newest(run_dir)
    assert published_numbers(run_dir) == [2, 4, 6, 7]
    assert [e.attempt.number for e in record.kept] == [2, 4, 6]
    assert record.last_preserved == start + 18000


def test_retention_never_deletes_what_was_preserved(run_dir, clock):
    """Also not under another manager without hours."""
    chief = make_claimed(run_dir, keep=1, hours=1.0)
    clock.now += 7200
    save(chief, run_dir, 1)
    clock.now += 1
    save(chief, run_dir, 2)
    other = make_claimed(run_dir, keep=1)
    for number in (3, 4):
        clock.now += 1
        save(other, run_dir, number)
    assert published_numbers(run_dir) == [1, 4]


def test_forgotten_checkpoints_are_kept_by_the_next_commit(run_dir, clock, caplog):
    """TensorFlow's recovery rule forgets them; they stay on disk and restorable."""
    first = make_claimed(run_dir, keep=3)
    save(first, run_dir, 1)
    clock.now -= 5000
    with caplog.at_level(logging.WARNING):
        second = make_claimed(run_dir, keep=1)
    assert second.checkpoints == []
    assert numbers([e.attempt for e in second.candidates]) == [1]
    clock.now += 10
    save(second, run_dir, 2)
    assert [e.attempt.number for e in newest(run_dir).kept] == [1]
    assert "seconds behind the last preserved checkpoint" in caplog.text


def test_clock_reset_goes_as_in_tensorflow(run_dir, clock):
    """TensorFlow's testClockReset, to the second."""
    clock.now = 10000.0
    first = make_claimed(run_dir, keep=1, hours=1.0)
    for now, number in ((10000, 1), (13600, 2), (17200, 3)):
        clock.now = float(now)
        save(first, run_dir, number)
    assert (published_numbers(run_dir), newest(run_dir).last_preserved) == ([2, 3], 13600.0)
    clock.now = 5000.0
    second = make_claimed(run_dir, keep=1)
    assert (second.latest.number, second.checkpoints) == (3, [])
    for now, number in ((5010, 4), (5020, 5)):
        clock.now = float(now)
        save(second, run_dir, number)
    record = newest(run_dir)
    assert published_numbers(run_dir) == [2, 3, 5]
    assert (record.last_preserved, [e.time for e in record.live]) == (5000.0, [5020.0])


def test_deletion_that_failed_once_is_tried_again(run_dir, monkeypatch):
    """TensorFlow forgets it, and it stays for ever."""
    chief = make_claimed(run_dir, keep=1)
    save(chief, run_dir, 1)
    fail_once(monkeypatch, "rename", "ckpt-1.")
    save(chief, run_dir, 2)
    after_failure = published_numbers(run_dir)
    save(chief, run_dir, 3)
    assert (after_failure, published_numbers(run_dir)) == ([1, 2], [3])


def test_deletion_stays_in_the_record_until_it_is_confirmed(run_dir, monkeypatch):
    """What is being deleted is never out of sight."""
    chief = make_claimed(run_dir, keep=1)
    released = []
    for number in range(1, 5):
        save(chief, run_dir, number)
        released.append([e.attempt.number for e in newest(run_dir).releasing])
    assert released == [[], [1], [2], [3]]


def test_deletion_that_a_dead_chief_left_is_finished_by_the_next(run_dir):
    """The record says what was on its way out."""
    chief = make_claimed(run_dir, keep=1, janitor=NoSweep(run_dir))
    save(chief, run_dir, 1)
    save(chief, run_dir, 2)
    before = published_numbers(run_dir)
    make_claimed(run_dir)
    assert (before, published_numbers(run_dir)) == ([1, 2], [2])


def test_records_of_a_long_run_are_pruned(run_dir):
    """Sixty-four stay, whatever the number of saves."""
    chief = make_claimed(run_dir)
    for number in range(70):
        attempt = chief.begin(number, 0)
        commit(chief, attempt, write_attempt(chief, run_dir, attempt, world_size=1))
    settle(chief)
    assert len(os.listdir(os.path.join(run_dir, ".state"))) == 64


# Bad checkpoints


@pytest.fixture
def with_bad(run_dir):
    """Save 1 and 2, and find 2 bad."""
    chief = make_claimed(run_dir, keep=2)
    save(chief, run_dir, 1)
    save(chief, run_dir, 2)
    chief.confirm_bad(chief.candidates[0])
    return chief


def test_bad_checkpoint_is_no_candidate_any_more(with_bad):
    """The next older one is the latest."""
    assert (with_bad.latest.number, numbers(with_bad.checkpoints)) == (1, [1])


def test_bad_checkpoint_is_recorded_by_the_next_commit_only(run_dir, with_bad):
    """Restoring writes nothing."""
    before = newest(run_dir).bad
    save(with_bad, run_dir, 3)
    assert (before, [e.attempt.number for e in newest(run_dir).bad]) == ((), [2])


def test_bad_checkpoint_stays_on_disk(run_dir, with_bad):
    """Somebody may want to look at it."""
    for number in range(3, 7):
        save(with_bad, run_dir, number)
    make_claimed(run_dir)
    assert published_numbers(run_dir) == [2, 5, 6]


# Fencing


def test_older_chief_cannot_begin(run_dir):
    """The newer claim has fenced it, and the message says whose it was."""
    old = make_claimed(run_dir, run="old")
    make_claimed(run_dir, run="new")
    with pytest.raises(
        FencedError, match=r"claimed by job 'new' \(epoch 2, this one is 1\)"
    ):
        old.begin(1, 0)


def test_older_chief_stays_fenced(run_dir):
    """Also when it asks again."""
    old = make_claimed(run_dir)
    make_claimed(run_dir)
    for _ in range(2):
        with pytest.raises(FencedError):
            old.begin(1, 0)


def test_older_chief_fenced_makes_no_directory(run_dir):
    """It may not write there any more."""
    old = make_claimed(run_dir)
    make_claimed(run_dir)
    before = sorted(os.listdir(run_dir))
    with pytest.raises(FencedError):
        old.begin(1, 0)
    assert sorted(os.listdir(run_dir)) == before


@pytest.mark.parametrize("swept", [True, False])
def test_older_chief_cannot_commit_what_it_had_begun(run_dir, swept):
    """Whether or not its pending directory still stands."""
    old = make_claimed(run_dir)
    attempt = old.begin(1, 0)
    shards = write_attempt(old, run_dir, attempt)
    new = make_claimed(run_dir, **({} if swept else {"janitor": NoSweep(run_dir)}))
    with pytest.raises(FencedError):
        commit(old, attempt, shards)
    assert (newest(run_dir).epoch, new.latest, old.latest) == (2, None, None)


def test_older_chief_overtaken_within_its_commit_is_fenced(run_dir, monkeypatch):
    """The claim comes between its last look and its link: the link decides."""
    old = make_claimed(run_dir)
    attempt = old.begin(1, 0)
    shards = write_attempt(old, run_dir, attempt)
    real = state.append

    def append(directory, record):
        monkeypatch.setattr(state, "append", real)
        make_claimed(run_dir)
        return real(directory, record)

    monkeypatch.setattr(state, "append", append)
    with pytest.raises(FencedError):
        commit(old, attempt, shards)
    assert newest(run_dir).live == ()


def test_older_chief_deletes_nothing_of_the_newer(run_dir):
    """Its retention would drop them; it never gets there."""
    old = make_claimed(run_dir, keep=1)
    save(old, run_dir, 1)
    attempt = old.begin(2, 0)
    shards = write_attempt(old, run_dir, attempt)
    new = make_claimed(run_dir, keep=3)
    save(new, run_dir, 2)
    save(new, run_dir, 3)
    with pytest.raises(FencedError):
        commit(old, attempt, shards)
    settle(old)
    assert published_numbers(run_dir) == [1, 2, 3]


def test_older_chief_abandoning_touches_only_its_own_attempt(run_dir):
    """The same number under a newer epoch is another directory."""
    old = make_claimed(run_dir)
    attempt = old.begin(2, 0)
    new = make_claimed(run_dir)
    saved = save(new, run_dir, 2)
    old.abandon(attempt)
    assert os.path.exists(os.path.join(run_dir, saved.published))


def test_claim_sweeps_a_pending_attempt_of_a_lower_epoch(run_dir):
    """Its writer is dead or fenced."""
    attempt = make_claimed(run_dir).begin(1, 0)
    make_claimed(run_dir)
    assert not os.path.exists(os.path.join(run_dir, attempt.pending))


def test_claim_never_sweeps_an_attempt_of_another_chain(run_dir):
    """Copied here from another run: not ours to delete, and not ours to adopt."""
    other = run_dir + "-other"
    copied = save(make_claimed(other), other, 7)
    make_claimed(run_dir)
    os.rename(
        os.path.join(other, copied.published), os.path.join(run_dir, copied.published)
    )
    chief = make_claimed(run_dir)
    assert published_numbers(run_dir) == [7]
    assert chief.candidates == []


@pytest.mark.parametrize("name", ["notes.txt", "ckpt-1", "backup", ".hidden"])
def test_claim_and_saves_leave_other_peoples_files_alone(run_dir, name):
    """Files and directories."""
    os.makedirs(os.path.join(run_dir, name + ".d"))
    with open(os.path.join(run_dir, name), "w") as file:
        file.write("precious")
    chief = make_claimed(str(make_claimed(run_dir)._directory), keep=1)
    save(chief, run_dir, 1)
    save(chief, run_dir, 2)
    assert {name, name + ".d"} <= set(os.listdir(run_dir))


def test_claim_with_a_foreign_checkpoint_but_no_records_is_refused(run_dir):
    """It may be all that is left of a run."""
    os.makedirs(os.path.join(run_dir, make_attempt(3).published))
    with pytest.raises(CorruptStateError):
        make_chief(run_dir)


# The lock

HOLDER = """
import sys
sys.path.insert(0, sys.argv[2])
from unit_helpers import make_claimed, save
chief = make_claimed(sys.argv[1], run="other-job", restart=2)
save(chief, sys.argv[1], 1)
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def other_job(run_dir):
    """Start another live process that holds the directory, with one checkpoint."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, run_dir, os.path.dirname(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    yield process
    process.kill()
    process.communicate()


def test_claim_while_another_job_lives_names_it(run_dir, other_job, monkeypatch):
    """A second job on the same directory is told early, and by whom."""
    monkeypatch.setattr(chief_module, "_LOCK_WAIT_SECONDS", 0.2)
    chief = make_chief(run_dir, run="mine")
    with pytest.raises(
        DirectoryInUseError, match=r"'other-job' \(restart 2, .*takeover=True"
    ):
        chief.prepare_claim()


def test_claim_refused_by_the_lock_changes_nothing(run_dir, other_job, monkeypatch):
    """The live job never notices."""
    monkeypatch.setattr(chief_module, "_LOCK_WAIT_SECONDS", 0.0)
    before = newest(run_dir)
    with pytest.raises(DirectoryInUseError):
        make_chief(run_dir, run="mine").prepare_claim()
    assert newest(run_dir) == before


def test_claim_by_the_same_job_goes_on_at_once(run_dir, other_job):
    """A process of this very job that has not gone yet is fenced, not waited for."""
    chief = make_claimed(run_dir, run="other-job", restart=3)
    assert (newest(run_dir).epoch, numbers(chief.checkpoints)) == (2, [1])


def test_claim_with_takeover_fences_the_live_job(run_dir, other_job):
    """Asked for, it is done."""
    make_claimed(run_dir, run="mine", takeover=True)
    assert newest(run_dir).run == "mine"


def test_claim_after_the_other_job_was_killed_goes_on(run_dir, other_job):
    """A dead process holds nothing."""
    other_job.kill()
    other_job.wait()
    make_claimed(run_dir, run="mine")
    assert newest(run_dir).run == "mine"


def _another_job_can_claim(run_dir):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from distckpt import chief; chief._LOCK_WAIT_SECONDS = 0\n"
        "from unit_helpers import make_chief\n"
        "make_chief(sys.argv[1], run='other').prepare_claim()"
    )
    arguments = [sys.executable, "-c", code, run_dir, os.path.dirname(__file__)]
    return subprocess.run(arguments, stderr=subprocess.DEVNULL).returncode == 0


def test_live_chief_keeps_another_job_out(run_dir):
    """The control for the two tests below."""
    chief = make_claimed(run_dir)
    assert not _another_job_can_claim(run_dir)
    chief.close()


def test_chief_no_longer_referenced_lets_go(run_dir):
    """Nobody has to call close."""
    chief = make_claimed(run_dir)
    del chief
    gc.collect()
    assert _another_job_can_claim(run_dir)


def test_chief_closed_lets_go(run_dir):
    """Closed is let go."""
    chief = make_claimed(run_dir)
    chief.close()
    assert _another_job_can_claim(run_dir)


def test_newer_of_two_managers_in_one_process_wins(run_dir):
    """It does not wait for the older one's lock, and fences it."""
    older = make_claimed(run_dir)
    newer = claim(make_chief(run_dir))
    save(newer, run_dir, 1)
    with pytest.raises(FencedError):
        older.begin(2, 0)


@pytest.mark.parametrize("times", [1, 100])
def test_claim_that_others_overtake_reads_again(run_dir, monkeypatch, times):
    """What it tries the filesystem with is swept under it; for ever, it says so."""
    others = []

    def overtaken(directory, epoch):
        if len(others) < times:
            others.append(make_chief(str(directory), takeover=True))
            with monkeypatch.context() as honest:
                honest.setattr(chief_module, "check_store", lambda *_: None)
                claim(others[-1])
            raise StorageError("link: No such file", operation="link")

    monkeypatch.setattr(chief_module, "check_store", overtaken)
    mine = make_chief(run_dir, takeover=True)
    if times == 1:
        claim(mine)
        assert newest(run_dir).epoch == 2
    else:
        with pytest.raises(DirectoryInUseError, match="again and again"):
            claim(mine)
        assert len(others) == 16


def test_chief_whose_number_a_stopped_one_has_taken_again_is_told_that_it_is_fenced(
    run_dir, monkeypatch
):
    """Found by schedules of three: the name of its newest record proves nothing then."""
    monkeypatch.setattr(state, "_KEPT_RECORDS", 1)
    older = make_claimed(run_dir)
    attempt = older.begin(None, 0)
    shards = write_attempt(older, run_dir, attempt)
    last = record_path(run_dir, newest(run_dir).number)
    newer = claim(make_chief(run_dir, takeover=True))
    for number in (11, 12):
        save(newer, run_dir, number)
    assert not os.path.exists(last)
    # One that was stopped before its link goes on: the number is free again.
    with open(last, "wb") as file:
        file.write(b"of another writer")
    with pytest.raises(FencedError, match="has been claimed"):
        commit(older, attempt, shards)
