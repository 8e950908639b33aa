"""The chain: one winner per number, and never a guess about what is committed."""

from __future__ import annotations

import dataclasses
import errno
import os
import shutil

import pytest
from unit_helpers import DIGEST, make_attempt, make_entry, make_record, record_path

from distckpt import paths, state
from distckpt.errors import (
    CorruptStateError,
    FencedError,
    FormatError,
    OutcomeUnknown,
    StorageError,
    UnsafeCheckpointError,
)
from distckpt.record import Record, digest
from distckpt.run_directory import RunDirectory
from distckpt.storage import posix

OTHER_WRITER = "0123456701234567"


@pytest.fixture
def chain(tmp_path):
    """Make a run directory with an empty records directory."""
    (tmp_path / ".state").mkdir()
    return str(tmp_path)


def next_record(head, **fields):
    """Make the record that follows a head."""
    if head is None:
        return make_record(1, **fields)
    return make_record(head.record.number + 1, previous=head.digest, **fields)


def extend(directory, count=1, **fields):
    """Append records, as one writer would; returns the last head."""
    head = state.read_head(RunDirectory.at(directory))
    for _ in range(count):
        head = state.append(RunDirectory.at(directory), next_record(head, **fields))
    return head


def names(directory):
    return posix.list_directory(os.path.join(directory, ".state"))


def fail(operation):
    """Make a function that fails as storage does."""

    def call(path, *_):
        raise StorageError("failed", operation=operation, path=path, errno=errno.EIO)

    return call


# Reading


def test_read_head_without_a_directory_is_none(tmp_path):
    """A run directory need not exist yet."""
    assert state.read_head(RunDirectory.at(str(tmp_path / "no"))) is None


def test_read_head_of_an_empty_chain_is_none(chain):
    """A records directory alone is a fresh start."""
    assert state.read_head(RunDirectory.at(chain)) is None


def test_read_head_gives_the_newest_record(chain):
    """The newest record holds everything."""
    head = extend(chain, 3)
    assert state.read_head(RunDirectory.at(chain)) == head


def test_read_head_gives_the_digest_of_the_files_bytes(chain):
    """The next record names it."""
    head = extend(chain)
    with open(record_path(chain, 1), "rb") as file:
        assert (
            state.read_head(RunDirectory.at(chain)).digest
            == digest(file.read())
            == head.digest
        )


@pytest.mark.parametrize("hidden", [1, 2, 3])
def test_read_head_with_a_stale_listing_finds_the_newest_by_name(
    chain, monkeypatch, hidden
):
    """A network filesystem may list less than there is; a name never lies."""
    extend(chain, 3)
    real = posix.list_directory
    monkeypatch.setattr(posix, "list_directory", lambda path: real(path)[:-hidden])
    assert state.read_head(RunDirectory.at(chain)).record.number == 3


def _truncated(data):
    return data[: len(data) // 2]


def _flipped(data):
    return data[:40] + bytes([data[40] ^ 1]) + data[41:]


@pytest.mark.parametrize(
    "damage",
    [lambda _: b"", _truncated, _flipped, lambda _: b"\xff" * 100, lambda d: d * 2],
    ids=["empty", "truncated", "flipped", "garbage", "doubled"],
)
def test_read_head_with_a_damaged_newest_record_is_a_corrupt_state(chain, damage):
    """Never "no checkpoint", and never silently the record before."""
    extend(chain, 2)
    path = record_path(chain, 2)
    with open(path, "rb") as file:
        data = file.read()
    with open(path, "wb") as file:
        file.write(damage(data))
    with pytest.raises(CorruptStateError, match=r"00002\.json"):
        state.read_head(RunDirectory.at(chain))


def test_read_head_of_a_record_under_another_number_is_a_corrupt_state(chain):
    """A copied record file does not become the newest."""
    extend(chain, 2)
    shutil.copy(
        record_path(chain, 1),
        record_path(chain, 3),
    )
    with pytest.raises(CorruptStateError, match="it says it is record 1"):
        state.read_head(RunDirectory.at(chain))


@pytest.mark.parametrize("kind", ["directory", "link", "dangling", "fifo"])
@pytest.mark.timeout(1200)
def test_read_head_with_no_file_in_a_records_place_is_a_format_error(chain, kind):
    """Whatever stands there, it is not "no checkpoint"."""
    extend(chain)
    path = record_path(chain, 2)
    if kind == "directory":
        os.mkdir(path)
    elif kind == "fifo":
        os.mkfifo(path)
    else:
        os.symlink(record_path(chain, 1 if kind == "link" else 9), path)
    with pytest.raises(FormatError):
        state.read_head(RunDirectory.at(chain))


def test_read_head_that_cannot_be_listed_is_a_storage_error(tmp_path):
    """An unreadable directory is not "no checkpoint"."""
    (tmp_path / ".state").write_bytes(b"a file in its place")
    with pytest.raises(StorageError):
        state.read_head(RunDirectory.at(str(tmp_path)))


@pytest.mark.parametrize("with_directory", [True, False])
def test_read_head_with_checkpoints_but_no_records_is_a_corrupt_state(
    tmp_path, with_directory
):
    """A lost chain is not a fresh start: that would abandon the checkpoints."""
    (tmp_path / make_attempt(7).published).mkdir()
    if with_directory:
        (tmp_path / ".state").mkdir()
    with pytest.raises(CorruptStateError, match=r"ckpt-7.*no records"):
        state.read_head(RunDirectory.at(str(tmp_path)))


@pytest.mark.parametrize("name", [make_attempt().pending, make_attempt().trash, "notes"])
def test_read_head_with_leftovers_but_no_records_is_none(tmp_path, name):
    """A first save that died committed nothing."""
    (tmp_path / name).mkdir()
    assert state.read_head(RunDirectory.at(str(tmp_path))) is None


@pytest.mark.parametrize("name", ["x", "1.json", ".e1-0011223344556677.tmp", "~"])
def test_read_head_takes_other_files_for_no_record(chain, name):
    """Editors and dead writers leave things behind."""
    extend(chain)
    open(os.path.join(chain, ".state", name), "w").close()
    assert state.read_head(RunDirectory.at(chain)).record.number == 1


def test_has_records_tells_a_chain_from_none(chain):
    """Valid or not."""
    before = state.has_records(RunDirectory.at(chain))
    extend(chain)
    assert (before, state.has_records(RunDirectory.at(chain))) == (False, True)


def test_is_newest_asks_by_name(chain, monkeypatch):
    """Before each save, without listing."""
    first = extend(chain)
    newest = extend(chain)
    monkeypatch.setattr(posix, "list_directory", fail("list"))
    assert (
        state.is_newest(RunDirectory.at(chain), first),
        state.is_newest(RunDirectory.at(chain), newest),
    ) == (False, True)


# Appending


def test_append_in_the_durable_order(chain, monkeypatch):
    """Content synced, then linked, then the directory synced, and only then listed."""
    log = []
    for name in ("write_new_file", "link", "sync_directory", "list_directory"):
        real = getattr(posix, name)

        def call(*arguments, name=name, real=real):
            log.append(name)
            return real(*arguments)

        monkeypatch.setattr(posix, name, call)
    state.append(RunDirectory.at(chain), make_record(1))
    assert log == ["write_new_file", "link", "sync_directory", "list_directory"]


def test_append_leaves_no_temporary_file(chain):
    """Only the record itself stays."""
    extend(chain)
    assert names(chain) == [paths.record_file(1)]


def test_append_of_two_writers_at_one_number_lets_one_win(chain):
    """Exclusive creation is compare-and-swap."""
    head = extend(chain)
    state.append(RunDirectory.at(chain), next_record(head))
    with pytest.raises(FencedError, match=r"00002\.json"):
        state.append(RunDirectory.at(chain), next_record(head, writer=OTHER_WRITER))


def test_append_that_lost_changes_nothing(chain):
    """The winner's record stands untouched, and no temporary file stays."""
    head = extend(chain)
    winner = state.append(RunDirectory.at(chain), next_record(head))
    with pytest.raises(FencedError):
        state.append(RunDirectory.at(chain), next_record(head, writer=OTHER_WRITER))
    assert state.read_head(RunDirectory.at(chain)) == winner
    assert names(chain) == [paths.record_file(1), paths.record_file(2)]


def test_append_whose_reply_was_lost_is_a_success(chain, monkeypatch):
    """NFS: the link was made, the answer never came, the retry said EEXIST."""
    real = posix.link

    def link(source, target):
        real(source, target)
        raise StorageError("lost", operation="link", path=target, errno=errno.EEXIST)

    monkeypatch.setattr(posix, "link", link)
    head = state.append(RunDirectory.at(chain), make_record(1))
    assert state.read_head(RunDirectory.at(chain)) == head


def test_append_whose_link_failed_and_left_nothing_is_unknown(chain, monkeypatch):
    """The link may still arrive: nobody may act as if it had not happened."""
    monkeypatch.setattr(posix, "link", fail("link"))
    with pytest.raises(OutcomeUnknown, match=r"00001\.json"):
        state.append(RunDirectory.at(chain), make_record(1))


def test_append_whose_record_cannot_be_read_back_is_unknown(chain, monkeypatch):
    """A lost reply on a disk that stopped answering."""
    monkeypatch.setattr(posix, "link", fail("link"))
    monkeypatch.setattr(posix, "read_file", fail("read"))
    with pytest.raises(OutcomeUnknown):
        state.append(RunDirectory.at(chain), make_record(1))


def test_append_whose_directory_sync_failed_is_unknown(chain, monkeypatch):
    """Linked but perhaps not durable: not acknowledged."""
    monkeypatch.setattr(posix, "sync_directory", fail("fsync"))
    with pytest.raises(OutcomeUnknown):
        state.append(RunDirectory.at(chain), make_record(1))


def test_append_whose_listing_failed_is_unknown(chain, monkeypatch):
    """Whether this writer was overtaken cannot be told."""
    monkeypatch.setattr(posix, "list_directory", fail("list"))
    with pytest.raises(OutcomeUnknown):
        state.append(RunDirectory.at(chain), make_record(1))


def test_append_whose_file_could_not_be_written_is_a_storage_error(chain, monkeypatch):
    """Before the link nothing has changed, and the error says so by its class."""
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(5, "EIO")))
    with pytest.raises(StorageError):
        state.append(RunDirectory.at(chain), make_record(1))
    assert names(chain) == []


def test_append_by_a_writer_that_was_overtaken_and_pruned_is_fenced(chain):
    """Stopped for long, its number is free again; only the newest number counts."""
    stopped = extend(chain)
    extend(chain, 70, writer=OTHER_WRITER)
    state.prune(RunDirectory.at(chain))
    assert not posix.exists(record_path(chain, 2))
    with pytest.raises(FencedError, match="has appended after"):
        state.append(RunDirectory.at(chain), next_record(stopped))


def test_append_by_an_overtaken_writer_does_not_hide_the_newest(chain):
    """The stray record of the stopped writer is old, whatever it says."""
    stopped = extend(chain)
    newest = extend(chain, 70, writer=OTHER_WRITER)
    state.prune(RunDirectory.at(chain))
    with pytest.raises(FencedError):
        state.append(RunDirectory.at(chain), next_record(stopped))
    assert state.read_head(RunDirectory.at(chain)) == newest


@pytest.mark.parametrize("listed", [0, 1])
def test_append_with_a_stale_listing_is_no_other_error(chain, monkeypatch, listed):
    """A listing that does not show the own record yet fences nobody."""
    head = extend(chain, listed) if listed else None
    real = posix.list_directory
    monkeypatch.setattr(
        posix,
        "list_directory",
        lambda path: [name for name in real(path) if name == paths.record_file(1)][:listed],
    )
    appended = state.append(RunDirectory.at(chain), next_record(head))
    assert appended.record.number == listed + 1


def test_append_without_a_records_directory_is_a_storage_error(tmp_path):
    """Whoever removed it is told, not followed."""
    with pytest.raises(StorageError):
        state.append(RunDirectory.at(str(tmp_path)), make_record(1))


# Pruning and the copy


def test_prune_keeps_the_last_64(chain):
    """The newest holds everything; the others are for people."""
    extend(chain, 70)
    state.prune(RunDirectory.at(chain))
    assert names(chain) == [paths.record_file(number) for number in range(7, 71)]


def test_prune_of_a_short_chain_removes_nothing(chain):
    """Fewer than 64 all stay."""
    extend(chain, 64)
    state.prune(RunDirectory.at(chain))
    assert len(names(chain)) == 64


def test_prune_leaves_other_files_alone(chain):
    """Only records are counted and removed."""
    extend(chain, 66)
    open(os.path.join(chain, ".state", "0-notes"), "w").close()
    state.prune(RunDirectory.at(chain))
    assert "0-notes" in names(chain)


def test_write_copy_is_the_newest_record(chain):
    """The state file is a copy for people, byte for byte."""
    head = extend(chain, live=(make_entry(1),), last_preserved=1.0)
    state.write_copy(RunDirectory.at(chain), head)
    with open(os.path.join(chain, paths.STATE_FILE), "rb") as file:
        assert Record.decode(file.read()) == head.record


def test_write_copy_replaces_by_rename(chain):
    """A reader that has the old one open goes on reading it whole."""
    path = os.path.join(chain, paths.STATE_FILE)
    state.write_copy(RunDirectory.at(chain), extend(chain))
    with open(path, "rb") as file:
        before = os.stat(path).st_ino
        state.write_copy(RunDirectory.at(chain), extend(chain))
        assert Record.decode(file.read()).number == 1
    assert os.stat(path).st_ino != before


def test_write_copy_that_fails_leaves_no_temporary_file(chain, monkeypatch):
    """A full disk is not made fuller."""
    head = extend(chain)
    monkeypatch.setattr(posix, "rename", fail("rename"))
    with pytest.raises(StorageError):
        state.write_copy(RunDirectory.at(chain), head)
    assert names(chain) == [paths.record_file(1)]


def test_record_names_its_predecessors_digest(chain):
    """The chain can be followed backwards."""
    first = extend(chain)
    second = extend(chain)
    assert second.record.previous == first.digest != DIGEST


def test_append_refuses_a_record_that_is_not_valid(chain):
    """What cannot be read back is not even built."""
    with pytest.raises(CorruptStateError):
        dataclasses.replace(make_record(1), number=0)


def test_append_of_a_record_that_nobody_could_read_is_refused(chain, monkeypatch):
    """Found before anything is written, not by the next job that opens the directory."""
    monkeypatch.setattr(state, "MAX_SIZE_BYTES", 100)
    before = sorted(os.walk(chain))
    with pytest.raises(StorageError, match="max_to_keep"):
        state.append(RunDirectory.at(chain), make_record(1))
    assert sorted(os.walk(chain)) == before


def test_records_that_are_elsewhere_are_refused(chain, tmp_path):
    """A directory that somebody has made could have us write anywhere."""
    records = os.path.join(chain, paths.RECORDS_DIRECTORY)
    os.rename(records, tmp_path / "elsewhere")
    os.symlink(tmp_path / "elsewhere", records)
    with pytest.raises(UnsafeCheckpointError, match="symbolic link"):
        state.read_head(RunDirectory.at(chain))
