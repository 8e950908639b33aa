"""Examine a run directory: what its filesystem can do, who holds it, what is left over.

For a person, by way of ``distckpt doctor``. Changes nothing: the files that it tries the
filesystem with are removed again, and have names that the next claim would sweep.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Collection, Iterator

from distckpt import leases, mailbox, paths, run_checks, state, words
from distckpt.errors import FormatError, NewerFormatError, StorageError
from distckpt.janitor import chain_of
from distckpt.record import Record
from distckpt.run_directory import BAD, OK, WARNING, Finding, RunDirectory

# A claim refuses less; a save of any size needs more.
_LITTLE_BYTES = 2**30
_FEW_INODES = 10_000
# Below any epoch that was ever claimed, so every claim sweeps it.
_EPOCH = 0


def examine(directory: RunDirectory, *, tries: bool = True) -> Iterator[Finding]:
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
    about, *others = directory.examine()
    yield about
    yield from _room(directory)
    yield from others
    if tries:
        nonce = paths.random_hex(8)
        names = (paths.probe_file(_EPOCH, nonce, n) for n in itertools.count(1))
        yield from directory.try_out(names)
    yield _holder(directory)
    yield records
    if record is not None:
        yield _copy(directory, record)
        yield from _missing(directory, record)
    yield from _leftovers(directory, record)
    yield from _from_others(directory)


def _room(directory: RunDirectory) -> Iterator[Finding]:
    free, inodes = directory.room()
    if free is None:
        return
    text = words.size(free)
    if free < _LITTLE_BYTES:
        yield Finding("free space", WARNING, f"only {text}")
    else:
        yield Finding("free space", OK, text)
    if inodes is not None and inodes < _FEW_INODES:
        text = f"only {inodes}: a save makes a file a rank"
        yield Finding("free inodes", WARNING, text)


# Who is there, and what is left


def _holder(directory: RunDirectory) -> Finding:
    if not directory.has_lock_file():
        return Finding("held by", OK, "nobody; it was never claimed")
    lock = directory.owner()
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


def _records(directory: RunDirectory) -> tuple[Record | None, Finding]:
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


def _copy(directory: RunDirectory, newest: Record) -> Finding:
    try:
        is_equal = state.read_copy(directory) == newest
    except (FormatError, NewerFormatError, StorageError):
        is_equal = False
    if is_equal:
        return Finding("state file", OK, "is the newest record's copy")
    text = "is behind the newest record; the next save puts it right"
    return Finding("state file", WARNING, text)


def _missing(directory: RunDirectory, newest: Record) -> Iterator[Finding]:
    """Tell of what is listed, and not there."""
    gone = run_checks.gone_from(directory, newest)
    for entry in sorted((*newest.committed, *newest.missing), key=lambda e: e.record):
        if entry.attempt.published in gone:
            text = (
                f"{entry.attempt.prefix}: {entry.attempt.published} is not there. No rule "
                "counts it; put back, it is taken back by the next claim or commit"
            )
            yield Finding("missing", WARNING, text)


def _leftovers(directory: RunDirectory, newest: Record | None) -> Iterator[Finding]:
    """Tell of what belongs to nothing, and what will become of it."""
    listed: set[str] = set()
    if newest is not None:
        every = (*newest.live, *newest.kept, *newest.bad, *newest.missing)
        listed = {entry.attempt.published for entry in every}
    found = 0
    for name in directory.names():
        text = _fate_of(directory, name, newest, listed)
        if text:
            found += 1
            yield Finding("left over", WARNING, f"{name}: {text}")
    temporary = state.temporary_files(directory)
    if temporary:
        found += 1
        files = words.count(len(temporary), "temporary file")
        text = f"{files} of records; the next claim removes what is left of them"
        yield Finding("left over", WARNING, text)
    if not found:
        yield Finding("left over", OK, "nothing")


def _from_others(directory: RunDirectory) -> Iterator[Finding]:
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
    directory: RunDirectory, name: str, newest: Record | None, listed: Collection[str]
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
    if chain_of(directory.attempt(published)) == newest.chain:
        return "published but never committed; the next claim deletes it"
    return "of another run directory, of a newer distckpt, or damaged; nothing deletes it"


def _ago(seconds: float) -> str:
    passed = time.time() - seconds
    if passed < 0:
        return f"{words.duration(-passed)} in the future"
    return f"{words.duration(passed)} ago"
