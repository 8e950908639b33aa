"""What other processes ask for: files that are whole, checked, applied in order."""

from __future__ import annotations

import json
import logging
import os

import pytest
from unit_helpers import make_attempt, make_entry

from distckpt import mailbox, paths
from distckpt.errors import CorruptStateError, StorageError, UnsafeCheckpointError
from distckpt.mailbox import METRICS, PIN, SAVE, UNPIN, Request
from distckpt.run_directory import RunDirectory
from distckpt.storage import posix

ONE, OTHER = make_attempt(1), make_attempt(2)
REQUESTS = [
    Request(SAVE, "me"),
    Request(PIN, "me", ONE),
    Request(UNPIN, "you", OTHER),
    Request(METRICS, "me", ONE, (("acc", None), ("loss", 0.5))),
]


def box(directory, *names):
    return os.path.join(directory, paths.REQUESTS_DIRECTORY, *names)


def put(directory, data, name=None):
    """Leave a file that is called like a request."""
    os.makedirs(box(directory), exist_ok=True)
    name = name or paths.request_file(1)
    with open(box(directory, name), "wb") as file:
        file.write(data)
    return name


def test_requests_come_back_as_they_were_posted_and_in_that_order(run_dir):
    names = [mailbox.post(RunDirectory.at(run_dir), request) for request in REQUESTS]
    found, refused = mailbox.collect(RunDirectory.at(run_dir))
    assert not refused
    assert [(r.kind, r.by, r.attempt, r.metrics) for r in found] == [
        (r.kind, r.by, r.attempt, r.metrics) for r in REQUESTS
    ]
    assert [request.name for request in found] == names == sorted(names)


def test_where_nobody_ever_asked_there_is_nothing(run_dir):
    assert mailbox.collect(RunDirectory.at(run_dir)) == ([], {})
    mailbox.remove(RunDirectory.at(run_dir), [])
    mailbox.sweep(RunDirectory.at(run_dir))
    assert not os.path.exists(box(run_dir))


def test_a_request_waits_until_it_is_removed(run_dir):
    names = [mailbox.post(RunDirectory.at(run_dir), request) for request in REQUESTS]
    mailbox.remove(RunDirectory.at(run_dir), names[:2])
    assert [mailbox.is_waiting(RunDirectory.at(run_dir), name) for name in names] == [
        False,
        False,
        True,
        True,
    ]
    mailbox.remove(RunDirectory.at(run_dir), names)
    assert mailbox.collect(RunDirectory.at(run_dir)) == ([], {})


TREE = json.loads(REQUESTS[3].encode())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"nonsense",
        b"[" * 100_000,
        b"null",
        b"{}",
        json.dumps(TREE | {"format": 2}).encode(),
        json.dumps(TREE | {"kind": "delete"}).encode(),
        json.dumps(TREE | {"kind": ["pin"]}).encode(),
        json.dumps(TREE | {"by": "x" * 300}).encode(),
        json.dumps(TREE | {"by": 5}).encode(),
        json.dumps(TREE | {"path": None}).encode(),
        json.dumps(TREE | {"path": "../../etc"}).encode(),
        json.dumps(TREE | {"path": 7}).encode(),
        json.dumps(TREE | {"kind": "save"}).encode(),
        json.dumps(TREE | {"metrics": [1]}).encode(),
        json.dumps(TREE | {"metrics": {"loss": "low"}}).encode(),
        json.dumps(TREE | {"metrics": {"loss": True}}).encode(),
        json.dumps(TREE | {"metrics": {f"m{n}": 1.0 for n in range(40)}}).encode(),
        json.dumps(TREE | {"more": 1}).encode(),
        b'{"format": 1, "format": 1}',
        json.dumps(TREE).encode()[:-1],
        b" " * 100_000 + json.dumps(TREE).encode(),
    ],
)
def test_what_is_no_request_is_named_and_takes_no_part(run_dir, data):
    name = put(run_dir, data)
    posted = mailbox.post(RunDirectory.at(run_dir), REQUESTS[1])
    found, refused = mailbox.collect(RunDirectory.at(run_dir))
    assert [request.name for request in found] == [posted]
    assert list(refused) == [name] and refused[name]
    if len(data) < 60_000:  # what is larger is not even read
        with pytest.raises(CorruptStateError):
            Request.decode(data, name)


@pytest.mark.parametrize("kind", ["fifo", "link", "directory"])
def test_what_is_no_file_is_refused_and_not_followed(run_dir, tmp_path, kind):
    os.makedirs(box(run_dir))
    name = paths.request_file(1)
    if kind == "fifo":
        os.mkfifo(box(run_dir, name))
    elif kind == "link":
        (tmp_path / "secret").write_bytes(REQUESTS[1].encode())
        os.symlink(tmp_path / "secret", box(run_dir, name))
    else:
        os.mkdir(box(run_dir, name))
    found, refused = mailbox.collect(RunDirectory.at(run_dir))
    assert found == [] and list(refused) == [name]


@pytest.mark.parametrize(
    "use",
    [
        mailbox.collect,
        lambda directory: mailbox.post(directory, REQUESTS[0]),
        lambda directory: mailbox.remove(directory, ["x"]),
        mailbox.sweep,
    ],
    ids=["collect", "post", "remove", "sweep"],
)
def test_a_directory_of_requests_that_is_a_link_is_refused(run_dir, tmp_path, use):
    """Else whoever made the run directory had files read and removed anywhere."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "x").write_text("mine")
    os.makedirs(run_dir, exist_ok=True)
    os.symlink(elsewhere, box(run_dir))
    with pytest.raises(UnsafeCheckpointError, match="symbolic link"):
        use(RunDirectory.at(run_dir))
    assert os.listdir(elsewhere) == ["x"]


def test_other_names_are_nobodys_request(run_dir):
    put(run_dir, REQUESTS[0].encode(), "notes.txt")
    put(run_dir, REQUESTS[0].encode(), paths.partial(paths.request_file(1)))
    assert mailbox.collect(RunDirectory.at(run_dir)) == ([], {})


def test_sweep_removes_what_died_before_it_was_a_request(run_dir):
    posted = mailbox.post(RunDirectory.at(run_dir), REQUESTS[0])
    put(run_dir, b"half", paths.partial(paths.request_file(1)))
    mailbox.sweep(RunDirectory.at(run_dir))
    assert os.listdir(box(run_dir)) == [posted]


def test_a_request_that_cannot_be_written_leaves_nothing(run_dir, monkeypatch):
    def fail(*_):
        raise StorageError("full", operation="link", path="x", errno=28)

    monkeypatch.setattr(posix, "link", fail)
    with pytest.raises(StorageError, match="full"):
        mailbox.post(RunDirectory.at(run_dir), REQUESTS[0])
    assert os.listdir(box(run_dir)) == []


def test_a_request_is_durable_before_anybody_is_told(run_dir, monkeypatch):
    """Its content before its name, and its name before the return."""
    calls = []
    for name in ("write_new_file", "link", "sync_directory"):
        original = getattr(posix, name)

        def noted(*arguments, name=name, original=original):
            calls.append((name, arguments[0]))
            return original(*arguments)

        monkeypatch.setattr(posix, name, noted)
    mailbox.post(RunDirectory.at(run_dir), REQUESTS[0])
    assert [name for name, _ in calls][-3:] == [
        "write_new_file",
        "link",
        "sync_directory",
    ]
    assert calls[-1][1] == box(run_dir)


# What requests do


def pinned(entries):
    return [entry.attempt.number for entry in entries if entry.pinned]


def test_pins_and_metrics_are_applied_to_the_checkpoint_that_they_name():
    entries = (make_entry(1), make_entry(2))
    now = mailbox.applied(entries, REQUESTS)
    assert pinned(now) == [1]
    assert now[0].metrics == (("acc", None), ("loss", 0.5))
    assert now[1] == entries[1]
    assert [entry.attempt for entry in now] == [entry.attempt for entry in entries]


def test_the_last_word_counts():
    entries = (make_entry(1),)
    pin, unpin = Request(PIN, "me", ONE), Request(UNPIN, "me", ONE)
    assert pinned(mailbox.applied(entries, [pin, unpin])) == []
    assert pinned(mailbox.applied(entries, [unpin, pin])) == [1]


def test_to_apply_the_same_twice_changes_nothing():
    """After a crash requests may be taken up again."""
    entries = (make_entry(1), make_entry(2))
    once = mailbox.applied(entries, REQUESTS)
    assert mailbox.applied(once, REQUESTS) == once


def test_metrics_are_added_and_replace_those_of_their_name():
    more = Request(METRICS, "me", ONE, (("loss", 0.25), ("perplexity", 9.0)))
    (entry,) = mailbox.applied((make_entry(1),), [REQUESTS[3], more])
    assert dict(entry.metrics) == {"acc": None, "loss": 0.25, "perplexity": 9.0}


def test_metrics_beyond_what_an_entry_holds_are_refused_with_a_warning(caplog):
    many = Request(METRICS, "me", ONE, tuple((f"m{n:02}", 1.0) for n in range(31)))
    with caplog.at_level(logging.WARNING):
        (entry,) = mailbox.applied((make_entry(1),), [REQUESTS[3], many])
    assert dict(entry.metrics) == {"acc": None, "loss": 0.5}
    assert "33 of at most 32" in caplog.text


def test_requests_for_what_is_not_there_change_nothing():
    entries = (make_entry(3),)
    assert mailbox.applied(entries, REQUESTS) == entries
