"""Examine a run directory: what its filesystem can do, who holds it, what is left over.

For a person, by way of ``distckpt doctor``. Changes nothing: the files that it tries the
filesystem with are removed again, and have names that the next claim would sweep.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import suppress
from typing import NamedTuple

from distckpt import leases, mailbox, paths, run_directory, state, storage, words
from distckpt.errors import FormatError, NewerFormatError, StorageError
from distckpt.janitor import chain_of
from distckpt.lock import DirectoryLock, keeps_others_out
from distckpt.record import Record

OK, WARNING, BAD = "ok", "warning", "BAD"

_MOUNTS_FILE = "/proc/self/mountinfo"
_MOUNTS_BYTES = 2**20
# A claim refuses less; a save of any size needs more.
_LITTLE_BYTES = 2**30
_FEW_INODES = 10_000
_CLOCK_SECONDS = 5.0
# Below any epoch that was ever claimed, so every claim sweeps it.
_EPOCH = 0


class Finding(NamedTuple):
    """One thing that was looked at.

    Attributes:
        what: For example ``"hard links"``.
        verdict: ``OK``, ``WARNING`` or ``BAD``.
        text: What was found, and what to do about it.
    """

    what: str
    verdict: str
    text: str


def examine(directory: str, *, tries: bool = True) -> Iterator[Finding]:
    """Look at a run directory, one finding after the other.

    Args:
        directory: The run directory; must exist.
        tries: Write small files to find out what the filesystem can do.

    Raises:
        StorageError: The directory cannot be looked at.
        NewerFormatError: A newer version of distckpt wrote its records.
    """
    # First, so that nothing is tried in a directory that is not for this version.
    record, records = _records(directory)
    yield _filesystem(directory)
    yield from _room(directory)
    yield _trust(directory)
    if tries:
        yield from _Trial(directory).run()
    yield _holder(directory)
    yield records
    if record is not None:
        yield _copy(directory, record)
        yield from _missing(directory, record)
    yield from _leftovers(directory, record)
    yield from _from_others(directory)


# What the filesystem is


def _filesystem(directory: str) -> Finding:
    found = None
    with suppress(StorageError), storage.OpenFile(_MOUNTS_FILE) as file:
        found = _mount_of(os.path.realpath(directory), file.read(0, _MOUNTS_BYTES))
    if found is None:
        return Finding("filesystem", OK, "unknown to this system")
    kind, source, point = found
    text = f"{kind} ({source} on {point})"
    if kind in ("tmpfs", "ramfs"):
        return Finding("filesystem", WARNING, f"{text}: in memory, gone with the host")
    if kind == "overlay":
        return Finding("filesystem", WARNING, f"{text}: gone with the container")
    return Finding("filesystem", OK, text)


def _mount_of(path: str, mounts: bytes) -> tuple[str, str, str] | None:
    """Find type, source and mount point of what a path lies on; see proc(5)."""
    best = None
    for line in mounts.decode(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) < 5 or len(kinds) < 2:
            continue
        point = fields[4].replace("\\040", " ")
        # Later mounts hide earlier ones at the same place.
        is_above = f"{path}/".startswith(f"{point.rstrip('/')}/")
        if is_above and (best is None or len(point) >= len(best[2])):
            best = (kinds[0], kinds[1], point)
    return best


def _room(directory: str) -> Iterator[Finding]:
    free = storage.free_bytes(directory)
    text = words.size(free)
    if free < _LITTLE_BYTES:
        yield Finding("free space", WARNING, f"only {text}")
    else:
        yield Finding("free space", OK, text)
    inodes = storage.free_inodes(directory)
    if inodes is not None and inodes < _FEW_INODES:
        text = f"only {inodes}: a save makes a file a rank"
        yield Finding("free inodes", WARNING, text)


def _trust(directory: str) -> Finding:
    others = [
        path
        for path in (directory, os.path.join(directory, paths.RECORDS_DIRECTORY))
        if storage.is_writable_by_others(path)
    ]
    if others:
        text = f"every user may rename and delete in {', '.join(others)}: chmod o-w"
        return Finding("permissions", WARNING, text)
    return Finding("permissions", OK, "other users may not write")


class _Trial:
    """Small files by which to find out what the filesystem can do."""

    def __init__(self, directory: str) -> None:
        self._directory = directory
        self._nonce = paths.random_hex(8)
        self._num_names = 0
        self._made: list[str] = []

    def run(self) -> Iterator[Finding]:
        """Try everything that distckpt relies on; removes what it has made."""
        tries: tuple[tuple[str, Callable[[str], Finding | None]], ...] = (
            ("exclusive creation", self._creation),
            ("hard links", self._links),
            ("renaming", self._renaming),
            ("syncing directories", self._syncing),
            ("names", self._case),
            ("direct writes", self._direct),
            ("clock", self._clock),
            ("locks", self._locks),
        )
        try:
            for what, attempt in tries:
                try:
                    found = attempt(what)
                except StorageError as error:
                    found = Finding(what, BAD, str(error))
                yield found or Finding(what, OK, "")
        finally:
            for path in self._made:
                with suppress(StorageError):
                    storage.remove_file(path)

    def _name(self) -> str:
        self._num_names += 1
        name = paths.probe_file(_EPOCH, self._nonce, self._num_names)
        path = os.path.join(self._directory, name)
        self._made.append(path)
        return path

    def _write(self, data: bytes = b"") -> str:
        path = self._name()
        storage.write_new_file(path, data)
        return path

    def _creation(self, what: str) -> Finding | None:
        path = self._write()
        with suppress(StorageError):
            storage.write_new_file(path, b"")
            return Finding(what, BAD, "a file that exists is created again")
        return None

    def _links(self, what: str) -> Finding | None:
        one, other = self._write(), self._name()
        storage.link(one, other)
        with suppress(StorageError):
            storage.link(one, other)
            return Finding(what, BAD, "a name that is taken is linked again")
        return None

    def _renaming(self, what: str) -> Finding | None:
        one, other = self._write(), self._name()
        storage.rename(one, other)
        if storage.exists(one) or not storage.exists(other):
            return Finding(what, BAD, "a renamed file has not its new name alone")
        return None

    def _syncing(self, what: str) -> Finding | None:
        storage.sync_directory(self._directory)
        return None

    def _case(self, what: str) -> Finding | None:
        folder, name = os.path.split(self._write())
        if storage.exists(os.path.join(folder, name.upper())):
            text = "upper and lower case are the same: give no two names that differ so"
            return Finding(what, WARNING, text)
        return Finding(what, OK, "upper and lower case differ")

    def _direct(self, what: str) -> Finding | None:
        if storage.can_write_directly(self._name()):
            return Finding(what, OK, "asynchronous saves go past the page cache")
        text = "asynchronous saves go through the page cache"
        return Finding(what, OK, text)

    def _clock(self, what: str) -> Finding | None:
        behind = time.time() - storage.modified(self._write())
        if abs(behind) > _CLOCK_SECONDS:
            where = "behind" if behind > 0 else "ahead of"
            text = f"the filesystem's is {words.duration(abs(behind))} {where} this host's"
            return Finding(what, WARNING, f"{text}: ages are off by so much")
        return Finding(what, OK, "that of the filesystem is this host's")

    def _locks(self, what: str) -> Finding | None:
        if keeps_others_out(self._name()):
            return Finding(what, OK, "keep another process of this host out")
        text = (
            "do not keep another process out: a second job in this directory is noticed "
            "only when it fences the first. Nothing is lost by it"
        )
        return Finding(what, WARNING, text)


# Who is there, and what is left


def _holder(directory: str) -> Finding:
    if not storage.exists(os.path.join(directory, paths.LOCK_FILE)):
        return Finding("held by", OK, "nobody; it was never claimed")
    lock = DirectoryLock(directory)
    if lock.acquire(0):
        lock.release()
        return Finding("held by", OK, "nobody")
    try:
        head = state.read_head(directory)
    except (FormatError, StorageError):
        head = None  # the finding on the records says so
    if head is None:
        return Finding("held by", OK, "a job that has not claimed it yet")
    newest = head.record
    text = (
        f"job {newest.run!r}, restart {newest.restart}, epoch {newest.epoch}; it wrote "
        f"last {_ago(newest.written)}"
    )
    return Finding("held by", OK, text)


def _records(directory: str) -> tuple[Record | None, Finding]:
    try:
        head = state.read_head(directory)
        if head is not None:
            state.refuse_lost_records(directory, head)
    except (FormatError, StorageError) as error:
        return None, Finding("records", BAD, str(error))
    if head is None:
        return None, Finding("records", OK, "none: no job has claimed the directory yet")
    newest = head.record
    text = (
        f"number {newest.number}, a {newest.action} in epoch {newest.epoch}, "
        f"{_ago(newest.written)}: {len(newest.live)} live, {len(newest.kept)} kept, "
        f"{len(newest.bad)} bad"
    )
    return newest, Finding("records", OK, text)


def _copy(directory: str, newest: Record) -> Finding:
    try:
        is_equal = state.read_copy(directory) == newest
    except (FormatError, NewerFormatError, StorageError):
        is_equal = False
    if is_equal:
        return Finding("state file", OK, "is the newest record's copy")
    text = "is behind the newest record; the next save puts it right"
    return Finding("state file", WARNING, text)


def _missing(directory: str, newest: Record) -> Iterator[Finding]:
    """Tell of what is listed, and not there."""
    gone = run_directory.gone_from(directory, newest)
    for entry in sorted((*newest.committed, *newest.missing), key=lambda e: e.record):
        if entry.attempt.published in gone:
            text = (
                f"{entry.attempt.prefix}: {entry.attempt.published} is not there. No rule "
                "counts it; put back, it is taken back by the next claim or commit"
            )
            yield Finding("missing", WARNING, text)


def _leftovers(directory: str, newest: Record | None) -> Iterator[Finding]:
    """Tell of what belongs to nothing, and what will become of it."""
    listed: set[str] = set()
    if newest is not None:
        every = (*newest.live, *newest.kept, *newest.bad, *newest.missing)
        listed = {entry.attempt.published for entry in every}
    found = 0
    for name in storage.list_directory(directory):
        text = _fate_of(directory, name, newest, listed)
        if text:
            found += 1
            yield Finding("left over", WARNING, f"{name}: {text}")
    records = os.path.join(directory, paths.RECORDS_DIRECTORY)
    temporary = [
        name
        for name in storage.list_directory(records)
        if paths.parse_temporary_file(name) is not None
    ]
    if temporary:
        found += 1
        files = words.count(len(temporary), "temporary file")
        text = f"{files} of records; the next claim removes what is left of them"
        yield Finding("left over", WARNING, text)
    if not found:
        yield Finding("left over", OK, "nothing")


def _from_others(directory: str) -> Iterator[Finding]:
    """Tell of what other processes have left: requests that wait, leases."""
    try:
        requests, refused = mailbox.collect(directory)
        held = leases.held(directory)
    except (StorageError, FormatError) as error:
        yield Finding("requests", BAD, str(error))
        return
    for request in requests:
        what = request.kind if request.attempt is None else f"{request.kind} of "
        name = "" if request.attempt is None else request.attempt.prefix
        text = f"{what}{name}, by {request.by}; the next commit takes it up"
        yield Finding("requests", OK, text)
    if refused:
        text = f"not one: {', '.join([*refused][:4])}; the next commit removes them"
        yield Finding("requests", WARNING, text)
    for attempt, seconds in held:
        text = f"of {attempt.prefix}, touched {words.duration(seconds)} ago"
        yield Finding("lease", OK, text)


def _fate_of(
    directory: str, name: str, newest: Record | None, listed: Collection[str]
) -> str:
    """Say what a name is, and what becomes of it; "" if it belongs where it is."""
    unfinished = paths.parse_pending(name) or paths.parse_trash(name)
    epoch = 0 if newest is None else newest.epoch
    if unfinished is not None:
        if unfinished.epoch >= epoch:
            what = "a save" if name == unfinished.pending else "a deletion"
            return f"{what} under way, or one that died; the next claim removes it"
        return "of a job that died; the next claim removes it"
    if paths.parse_probe_file(name) is not None:
        return "a probe of a claim; the next claim removes it"
    published = paths.parse_published(name)
    if published is None or name in listed:
        return ""
    if newest is None:
        return "a checkpoint in no record; see 'distckpt repair'"
    if any(entry.attempt == published for entry in newest.releasing):
        return "released; about to be deleted"
    if chain_of(os.path.join(directory, name)) == newest.chain:
        return "published but never committed; the next claim deletes it"
    return "of another run directory, of a newer distckpt, or damaged; nothing deletes it"


def _ago(seconds: float) -> str:
    passed = time.time() - seconds
    if passed < 0:
        return f"{words.duration(-passed)} in the future"
    return f"{words.duration(passed)} ago"
