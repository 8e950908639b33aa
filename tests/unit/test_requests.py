"""What other processes ask for, and what the chief makes of it: a save, pins, metrics."""

from __future__ import annotations

import logging
import math
import os
import threading

import pytest
from unit_helpers import (
    claim,
    commit,
    make_chief,
    make_claimed,
    numbers,
    published_numbers,
    save,
    settle,
    write_attempt,
)

from distckpt import add_metrics, mailbox, paths, pin, readers, request_save, state, unpin
from distckpt.errors import (
    CheckpointNotFound,
    ConfigError,
    FencedError,
    OutcomeUnknown,
    StorageError,
)
from distckpt.policy import best, latest
from distckpt.remarks import Remarks
from distckpt.run_directory import RunDirectory


@pytest.fixture
def chief(run_dir):
    """A chief that keeps the newest one, and has committed it."""
    chief = make_claimed(run_dir, keep=1)
    save(chief, run_dir, 1)
    yield chief
    chief.close()


def path(directory, number):
    return os.path.join(directory, f"ckpt-{number}")


def entries(directory):
    record = state.read_head(RunDirectory.at(directory)).record
    return {e.attempt.number: e for e in (*record.live, *record.kept)}


def waiting(directory):
    return [request.kind for request in mailbox.collect(RunDirectory.at(directory))[0]]


# Pins


def test_a_pin_keeps_what_the_rules_drop_until_it_is_unpinned(run_dir, chief):
    assert not pin(path(run_dir, 1))  # asked for, and nobody has done it yet
    for number in (2, 3):
        save(chief, run_dir, number)
    assert published_numbers(run_dir) == [1, 3]
    assert [n for n, entry in entries(run_dir).items() if entry.pinned] == [1]
    assert numbers(chief.checkpoints) == [1, 3]
    assert waiting(run_dir) == []
    assert pin(path(run_dir, 1))  # it is so already
    unpin(path(run_dir, 1))
    save(chief, run_dir, 4)
    assert published_numbers(run_dir) == [4]


@pytest.mark.parametrize("rule", [1, latest(1)])
def test_pinned_checkpoints_do_not_count_for_the_rules(run_dir, rule):
    chief = make_claimed(run_dir, keep=rule)
    for number in (1, 2, 3):
        save(chief, run_dir, number)
        pin(path(run_dir, number))
    save(chief, run_dir, 4)
    assert published_numbers(run_dir) == [1, 2, 3, 4]
    save(chief, run_dir, 5)
    assert published_numbers(run_dir) == [1, 2, 3, 5]
    assert [n for n, entry in entries(run_dir).items() if entry.pinned] == [1, 2, 3]


def test_the_best_of_those_that_are_not_pinned_is_kept(run_dir):
    chief = make_claimed(run_dir, keep=latest(1) | best(1, "loss", mode="min"))
    for number in (1, 2, 3, 4):
        save(chief, run_dir, number, remarks=Remarks.of({"loss": float(number)}, None))
        if number == 1:
            pin(path(run_dir, 1))
    assert published_numbers(run_dir) == [1, 2, 4]


def test_a_pin_lasts_over_restarts_and_under_other_rules(run_dir, chief):
    pin(path(run_dir, 1))
    save(chief, run_dir, 2)
    chief.close()
    rules = (latest(1), 1, latest(1) | best(1, "loss", mode="min"))
    for number, rule in enumerate(rules, 3):
        second = make_claimed(run_dir, keep=rule)
        save(second, run_dir, number)
        assert {1, number} <= {*published_numbers(run_dir)}
        assert entries(run_dir)[1].pinned
        second.close()


def test_a_pin_that_is_asked_for_without_a_job_is_taken_up_by_the_next(run_dir, chief):
    chief.close()
    pin(path(run_dir, 1))
    second = make_claimed(run_dir, keep=1)
    save(second, run_dir, 2)
    assert published_numbers(run_dir) == [1, 2]


def test_what_is_dropped_cannot_be_pinned(run_dir, chief):
    save(chief, run_dir, 2)
    with pytest.raises(CheckpointNotFound, match=r"not committed.*newest first: ckpt-2"):
        pin(path(run_dir, 1))
    with pytest.raises(CheckpointNotFound, match="not a run directory"):
        pin(os.path.join(run_dir, "nowhere", "ckpt-1"))
    assert waiting(run_dir) == []


def test_a_pin_that_comes_too_late_is_told_to_both(run_dir, chief, monkeypatch, caplog):
    """Between the chief's look and its record: what asks reads the record once more."""
    attempt = chief.checkpoints[0]

    def late(directory, request, post=mailbox.post):
        save(chief, run_dir, 2)
        return post(directory, request)

    monkeypatch.setattr(mailbox, "post", late)
    with pytest.raises(CheckpointNotFound, match="dropped before this was asked for"):
        pin(path(run_dir, 1))
    with caplog.at_level(logging.WARNING):
        save(chief, run_dir, 3)
    assert (
        f"pin of {attempt.prefix}" in caplog.text
        and "not committed any more" in caplog.text
    )
    assert waiting(run_dir) == []


def test_an_attempt_can_be_named_as_well_as_its_prefix(run_dir, chief):
    pin(os.path.join(run_dir, chief.checkpoints[0].published))
    save(chief, run_dir, 2)
    assert published_numbers(run_dir) == [1, 2]


def test_pin_waits_until_it_is_done(run_dir, chief):
    done = []
    thread = threading.Thread(
        target=lambda: done.append(pin(path(run_dir, 1), timeout=30)), daemon=True
    )
    thread.start()
    while not waiting(run_dir):
        pass
    save(chief, run_dir, 2)
    thread.join(30)
    assert done == [True]


def test_a_pinned_checkpoint_is_not_replaced(run_dir, chief):
    pin(path(run_dir, 1))  # not taken up yet
    with pytest.raises(ConfigError, match="ckpt-1 is pinned"):
        chief.begin(1, 0)
    save(chief, run_dir, 2)
    with pytest.raises(ConfigError, match="ckpt-1 is pinned"):
        chief.begin(1, 0)
    unpin(path(run_dir, 1))
    save(chief, run_dir, 1)
    assert published_numbers(run_dir) == [1]


# Metrics


def test_metrics_that_come_later_decide_what_is_the_best(run_dir):
    chief = make_claimed(run_dir, keep=latest(2) | best(1, "loss", mode="min"))
    for number in (1, 2):
        save(chief, run_dir, number)
    add_metrics(path(run_dir, 1), {"loss": 0.5})
    for number in (3, 4):
        save(chief, run_dir, number, remarks=Remarks.of({"loss": 1.0}, None))
    assert published_numbers(run_dir) == [1, 3, 4]
    assert entries(run_dir)[1].metrics == (("loss", 0.5),)
    add_metrics(path(run_dir, 4), {"loss": 0.25, "acc": math.nan})
    assert [e.attempt.number for e in chief.choose("best")] == [4, 1, 3]  # at once
    save(chief, run_dir, 5)
    assert published_numbers(run_dir) == [4, 5]
    assert entries(run_dir)[4].metrics == (("acc", None), ("loss", 0.25))


@pytest.mark.parametrize("metrics", [None, {}, {"loss": "low"}, [1], {"": 1.0}])
def test_what_are_no_metrics_is_refused(run_dir, chief, metrics):
    with pytest.raises(ConfigError, match="metric"):
        add_metrics(path(run_dir, 1), metrics)
    assert waiting(run_dir) == []


# Saves


def test_the_next_save_that_begins_answers_a_request(run_dir, chief):
    """Not one that was under way: its state may be older than the request."""
    attempt = chief.begin(None, 1)
    assert request_save(run_dir) is None
    commit(chief, attempt, write_attempt(chief, run_dir, attempt))
    settle(chief)
    assert waiting(run_dir) == ["save"]
    save(chief, run_dir, 3)
    assert waiting(run_dir) == []


def test_request_save_returns_the_path_once_it_is_committed(run_dir, chief):
    found = []
    thread = threading.Thread(
        target=lambda: found.append(request_save(run_dir, timeout=30)), daemon=True
    )
    thread.start()
    while not waiting(run_dir):
        pass
    save(chief, run_dir, 2)
    thread.join(30)
    assert found == [path(run_dir, 2)]


def test_a_save_that_fails_answers_nobody(run_dir, chief):
    request_save(run_dir)
    attempt = chief.begin(None, 1)
    chief.abandon(attempt)
    assert waiting(run_dir) == ["save"]


def test_a_directory_that_is_no_run_directory_is_asked_for_nothing(run_dir, tmp_path):
    with pytest.raises(CheckpointNotFound, match="not a directory"):
        request_save(os.path.join(run_dir, "nowhere"))
    with pytest.raises(CheckpointNotFound, match="no job has claimed it"):
        request_save(tmp_path)
    assert os.listdir(tmp_path) == []


# The chief and the mailbox


def test_a_chief_that_is_fenced_takes_up_nothing(run_dir, chief):
    """What a newer chief has not read yet must be there for it."""
    attempt = chief.begin(None, 1)
    shards = write_attempt(chief, run_dir, attempt)
    newer = claim(make_chief(run_dir, keep=1, takeover=True))
    pin(path(run_dir, 1))
    with pytest.raises(FencedError):
        commit(chief, attempt, shards)
    assert waiting(run_dir) == ["pin"]
    save(newer, run_dir, 5)
    assert published_numbers(run_dir) == [1, 5]


def test_requests_stay_until_a_durable_record_has_them(run_dir, chief, monkeypatch):
    pin(path(run_dir, 1))

    def unknown(*_):
        raise OutcomeUnknown("?")

    monkeypatch.setattr(state, "append", unknown)
    with pytest.raises(OutcomeUnknown):
        save(chief, run_dir, 2)
    assert waiting(run_dir) == ["pin"]


@pytest.mark.parametrize("what", ["unreadable", "link"])
def test_requests_that_cannot_be_read_hold_up_no_save(
    run_dir, chief, tmp_path, monkeypatch, caplog, what
):
    if what == "link":
        os.symlink(tmp_path, os.path.join(run_dir, paths.REQUESTS_DIRECTORY))
    else:

        def fail(_):
            raise StorageError("no luck", operation="list", path="x", errno=5)

        monkeypatch.setattr(mailbox, "collect", fail)
    save(chief, run_dir, 2)
    assert "what other processes ask for cannot be read" in caplog.text
    assert published_numbers(run_dir) == [2]


def test_rubbish_among_the_requests_is_removed_and_told_once(run_dir, chief, caplog):
    box = os.path.join(run_dir, paths.REQUESTS_DIRECTORY)
    os.mkdir(box)
    name = paths.request_file(1)
    with open(os.path.join(box, name), "w", encoding="utf-8") as file:
        file.write("rubbish")
    save(chief, run_dir, 2)
    save(chief, run_dir, 3)
    assert caplog.text.count(f"{name}: no request") == 1
    assert os.listdir(box) == []


def test_requests_that_cannot_be_removed_do_not_fail_the_commit(
    run_dir, chief, monkeypatch, caplog
):
    pin(path(run_dir, 1))

    def fail(*_):
        raise StorageError("no luck", operation="unlink", path="x", errno=5)

    with monkeypatch.context() as patch:
        patch.setattr(mailbox, "remove", lambda d, names: fail() if names else None)
        save(chief, run_dir, 2)
    assert "stay where they are" in caplog.text
    assert published_numbers(run_dir) == [1, 2]
    save(chief, run_dir, 3)
    assert waiting(run_dir) == [] and published_numbers(run_dir) == [1, 3]


def test_readers_see_no_request_as_a_checkpoint(run_dir, chief):
    pin(path(run_dir, 1))
    assert readers.latest_checkpoint(run_dir) == path(run_dir, 1)


def test_what_cannot_be_removed_holds_up_no_other_request(run_dir, chief, caplog):
    """A directory that is called like a request stays where it is; the pin counts."""
    box = os.path.join(run_dir, paths.REQUESTS_DIRECTORY)
    os.makedirs(os.path.join(box, paths.request_file(1)))
    pin(path(run_dir, 1))
    save(chief, run_dir, 2)
    assert published_numbers(run_dir) == [1, 2]
    assert waiting(run_dir) == []
    assert "no request" in caplog.text


def test_to_look_for_saves_that_are_asked_for_warns_of_nothing(run_dir, chief, caplog):
    """It is done every second; the next commit tells of rubbish, once."""
    box = os.path.join(run_dir, paths.REQUESTS_DIRECTORY)
    os.mkdir(box)
    with open(os.path.join(box, paths.request_file(1)), "w", encoding="utf-8") as file:
        file.write("rubbish")
    request_save(run_dir)
    for _ in range(3):
        assert [request.kind for request in chief.save_requests()] == ["save"]
    assert "no request" not in caplog.text
