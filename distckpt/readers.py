"""What other processes use to look at a run directory: without torch, without a job.

Nothing here takes a lock or needs a process group, or writes anything but the leases of
``checkpoints_iterator``.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Literal, overload

from distckpt import paths, state, words
from distckpt.durations import seconds_of
from distckpt.errors import (
    CheckpointNotFound,
    ChecksumError,
    FormatError,
    ManifestError,
    NewerFormatError,
    ShardFileError,
    StorageError,
)
from distckpt.layout import Assignment
from distckpt.leases import SECONDS, Lease, checked_seconds, leased, names_of
from distckpt.locations import Path, absolute, checked_path
from distckpt.manifest import MAX_SIZE_BYTES, Manifest
from distckpt.near_paths import there_is
from distckpt.record import Entry, Record, digest
from distckpt.run_checks import instead_of_records
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.shard_file import ShardReader
from distckpt.shard_header import Entries

_logger = logging.getLogger(__name__)

_MAX_RACES = 100
_MAX_SHOWN = 10


@dataclass(frozen=True, slots=True, repr=False)
class CheckpointState:
    """TensorFlow's four fields of the state file, paths joined to the directory.

    Attributes:
        model_checkpoint_path: The newest checkpoint.
        all_model_checkpoint_paths: The managed ones, oldest first.
        all_model_checkpoint_timestamps: When each was saved, seconds since the epoch.
        last_preserved_timestamp: Time of the last one that retention preserved.
    """

    model_checkpoint_path: str
    all_model_checkpoint_paths: list[str]
    all_model_checkpoint_timestamps: list[float]
    last_preserved_timestamp: float

    @property
    def all_model_checkpoint_dates(self) -> list[datetime]:
        """The timestamps as datetimes in UTC."""
        return [*map(words.utc, self.all_model_checkpoint_timestamps)]

    @property
    def last_preserved_date(self) -> datetime:
        """The timestamp as a datetime in UTC."""
        return words.utc(self.last_preserved_timestamp)

    def __repr__(self) -> str:
        dates = [*map(words.utc_date, self.all_model_checkpoint_timestamps)]
        last_preserved = words.utc_date(self.last_preserved_timestamp)
        return (
            f"CheckpointState(model_checkpoint_path={self.model_checkpoint_path!r}, "
            f"all_model_checkpoint_paths={self.all_model_checkpoint_paths}, "
            f"all_model_checkpoint_dates={dates}, last_preserved_date={last_preserved!r})"
        )


def get_checkpoint_state(directory: str | os.PathLike[str]) -> CheckpointState | None:
    """Read what is managed in a run directory; None if nothing is.

    Raises:
        CorruptStateError: There is a state but it cannot be read. (TensorFlow takes that
            for "no checkpoint", and jobs start from scratch.)
        StorageError: The directory cannot be read.
    """
    run = RunDirectory.at(checked_path(directory))
    record = read_record(run)
    if record is None or record.last_preserved is None or not record.live:
        return None
    live = [run.path_of(entry.attempt.prefix) for entry in record.live]
    return CheckpointState(
        model_checkpoint_path=live[-1],
        all_model_checkpoint_paths=live,
        all_model_checkpoint_timestamps=[entry.time for entry in record.live],
        last_preserved_timestamp=record.last_preserved,
    )


@overload
def latest_checkpoint(
    directory: str | os.PathLike[str], *, strict: Literal[True]
) -> str: ...


@overload
def latest_checkpoint(
    directory: str | os.PathLike[str], *, strict: bool = False
) -> str | None: ...


def latest_checkpoint(
    directory: str | os.PathLike[str], *, strict: bool = False
) -> str | None:
    """Return the path of the newest committed checkpoint; None if there is none.

    The path is the prefix that users see, ``<directory>/<name>-<number>``. A committed
    checkpoint whose files are gone is reported in the log, as in TensorFlow.

    Args:
        directory: The run directory. One that does not exist has no checkpoint, as in
            TensorFlow.
        strict: Raise instead of returning None; the error says what is there instead.

    Raises:
        CheckpointNotFound: With ``strict``: there is none.
        CorruptStateError: There is a state but it cannot be read.
        StorageError: The directory cannot be read.
    """
    root = checked_path(directory)
    run = RunDirectory.at(root)
    found = None
    for _ in range(_MAX_RACES):
        record = read_record(run)
        if record is None or not record.live:
            if strict:
                raise CheckpointNotFound(_none_in(root))
            return None
        if found == record.number:
            break
        attempt = record.live[-1].attempt
        if run.attempt(attempt).has_manifest():
            return run.path_of(attempt.prefix)
        # Perhaps a running job has just replaced it: then there is a newer record.
        found = record.number
    text = f"{root}: the newest checkpoint's files are gone"
    if strict:
        raise CheckpointNotFound(f"{text}.")
    _logger.error("%s", text)
    return None


def _none_in(root: str) -> str:
    said = instead_of_records(absolute(root))
    return said or f"{root}: no checkpoint is committed there."


def checkpoints_iterator(
    directory: str | os.PathLike[str],
    min_interval_secs: float | timedelta = 0,
    timeout: float | timedelta | None = None,
    timeout_fn: Callable[[], bool] | None = None,
    *,
    lease_seconds: float | timedelta | None = SECONDS,
) -> Iterator[str]:
    """Yield the newest checkpoint's path each time there is a new one.

    Names, defaults and meaning are those of ``tf.train.checkpoints_iterator``: not every
    checkpoint is yielded, only the newest when the caller asks. While the body of the loop
    runs it is leased: a job that drops it meanwhile deletes it later.

    Args:
        directory: The run directory; need not exist yet.
        min_interval_secs: Least time between two yields, in seconds or as a timedelta.
        timeout: How long to wait for a new one, in seconds or as a timedelta; None waits
            for ever.
        timeout_fn: Called after a timeout; the iterator ends if it returns True, or if
            there is none.
        lease_seconds: How long a lease lasts when this process has died: its thread touches
            the lease more often than that. None takes none, as where the run directory
            cannot be written; a lease that cannot be taken is a warning.
    """
    # Checked at once, not by the first next().
    return _iterate(
        RunDirectory.at(checked_path(directory)),
        seconds_of("min_interval_secs", min_interval_secs, may_be_zero=True),
        None if timeout is None else seconds_of("timeout", timeout, may_be_zero=True),
        timeout_fn,
        checked_seconds(lease_seconds),
    )


def _iterate(
    run: RunDirectory,
    min_interval_seconds: float,
    timeout: float | None,
    timeout_fn: Callable[[], bool] | None,
    seconds: float | None,
) -> Iterator[str]:
    last: str | None = None
    while True:
        attempt = _wait_for_other(run, last, timeout)
        if attempt is None:
            if timeout_fn is None or timeout_fn():
                return
            continue
        lease = _lease(run, attempt, seconds)
        # One that was dropped before the lease was there may be deleted at any time.
        if lease is not None and not _is_committed(run, attempt):
            lease.release()
            continue
        started = time.monotonic()
        last = attempt.published
        with leased(lease):
            yield run.path_of(attempt.prefix)
        rest = started + min_interval_seconds - time.monotonic()
        if rest > 0:
            time.sleep(rest)


def _lease(
    run: RunDirectory, attempt: paths.Attempt, seconds: float | None
) -> Lease | None:
    if seconds is None:
        return None
    try:
        return Lease(run, attempt, seconds)
    except (StorageError, FormatError) as error:
        path = run.path_of(attempt.prefix)
        _logger.warning("%s may be deleted while it is read: %s", path, error)
        return None


def _is_committed(run: RunDirectory, attempt: paths.Attempt) -> bool:
    record = read_record(run)
    return record is not None and any(e.attempt == attempt for e in record.committed)


def _wait_for_other(
    run: RunDirectory, last: str | None, timeout: float | None
) -> paths.Attempt | None:
    deadline = None if timeout is None else time.monotonic() + timeout
    while True:
        record = read_record(run)
        if record is not None and record.live:
            attempt = record.live[-1].attempt
            if attempt.published != last:
                return attempt
        if deadline is not None and time.monotonic() + 1.0 > deadline:
            return None
        time.sleep(1.0)


def read_record(run: RunDirectory) -> Record | None:
    """Read the newest record, also while a job appends and prunes."""
    head = state.read_head(run)
    return None if head is None else head.record


@dataclass(frozen=True, slots=True)
class Located:
    """Where a checkpoint lies.

    Attributes:
        directory: The attempt's directory.
        manifest_digest: What the record says of its manifest; None without records.
    """

    directory: AttemptDirectory
    manifest_digest: str | None


def locate(path: Path) -> Located:
    """Find the attempt that a path means.

    Args:
        path: A prefix as ``save()`` returns it, or an attempt's directory itself. A
            prefix means the attempt that the newest record names; in a copy without
            records, the newest one whose files are whole.

    Raises:
        CheckpointNotFound: Nothing committed is there.
        CorruptStateError, StorageError: It cannot be told.
    """
    # Absolute: what is found is read later, perhaps after a chdir.
    text = absolute(checked_path(path))
    if AttemptDirectory.at(text).has_manifest():
        # A link that somebody names himself is his own.
        attempt = AttemptDirectory.at(os.path.realpath(text))
        return Located(attempt, _digest_in_records(attempt))
    root, name = os.path.split(text)
    wanted = paths.parse_prefix(name)
    if wanted is None:
        msg = (
            f"{text} is no checkpoint: neither a path like 'runs/gpt/ckpt-12' nor a "
            f"directory with a {paths.MANIFEST_FILE}. {instead_of_records(text)}"
            f"{there_is(text)}"
        )
        raise CheckpointNotFound(msg.strip())
    run = RunDirectory.at(root)
    if not run.is_folder():
        msg = f"{text}: no such checkpoint. {instead_of_records(root)}{there_is(root)}"
        raise CheckpointNotFound(msg.strip())
    if not state.has_records(run):
        return Located(_newest_whole(run, name), None)
    record = read_record(run)
    assert record is not None
    for entry in (*record.committed, *_still_read(run, record, name)):
        if entry.attempt.prefix == name:
            return Located(run.attempt(entry.attempt), entry.manifest)
    known = [entry.attempt for entry in record.committed]
    msg = (
        f"{text}: no such checkpoint. Committed in {root}, newest first: "
        f"{_few(known) or 'none'}."
    )
    if len(known) > _MAX_SHOWN:
        known.sort(key=lambda attempt: abs(attempt.number - wanted[1]))
        msg = f"{msg} Nearest to it: {_few(known[:2])}."
    raise CheckpointNotFound(msg)


def _few(attempts: list[paths.Attempt]) -> str:
    shown = ", ".join(attempt.prefix for attempt in attempts[:_MAX_SHOWN])
    return f"{shown}, ... ({len(attempts)})" if len(attempts) > _MAX_SHOWN else shown


def _still_read(run: RunDirectory, record: Record, prefix: str) -> list[Entry]:
    """Return what is dropped, but leased: whoever has the lease opens it by its name."""
    dropped = [entry for entry in record.releasing if entry.attempt.prefix == prefix]
    return [entry for entry in dropped if names_of(run, entry.attempt)]


def locate_newest(path: Path) -> Located:
    """Find the attempt that a path means; a run directory means its newest checkpoint.

    Raises:
        CheckpointNotFound: Nothing committed is there.
        CorruptStateError, StorageError: It cannot be told.
    """
    text = checked_path(path)
    run = RunDirectory.at(text)
    if not run.is_folder() or not state.has_records(run):
        return locate(text)
    for _ in range(_MAX_RACES):
        newest = latest_checkpoint(text)
        if newest is None:
            raise CheckpointNotFound(_none_in(text))
        try:
            return locate(newest)
        except CheckpointNotFound:
            continue  # a running job has just replaced it
    msg = f"{text}: its newest checkpoint is replaced again and again."
    raise CheckpointNotFound(msg)


def _digest_in_records(directory: AttemptDirectory) -> str | None:
    if not state.has_records(directory.run):
        return None
    record = read_record(directory.run)
    assert record is not None
    for entry in (*record.committed, *record.bad, *record.releasing, *record.missing):
        if entry.attempt.published == directory.name:
            return entry.manifest
    return None


def _newest_whole(run: RunDirectory, prefix: str) -> AttemptDirectory:
    found = []
    for name in run.names():
        attempt = paths.parse_published(name)
        if attempt is not None and attempt.prefix == prefix:
            directory = run.attempt(attempt)
            try:
                manifest = read_manifest(directory)
                for rank in range(manifest.world_size):
                    open_shard(directory, manifest, rank).close()
            except (FormatError, StorageError) as error:
                _logger.warning("%s is not whole: %s", directory, error)
                continue
            found.append((attempt.epoch, manifest.created, name))
    if not found:
        path = run.path_of(prefix)
        msg = f"{path}: no such checkpoint."
        if not run.is_folder():
            msg = f"{path}: no such checkpoint; {run} is not a directory.{there_is(path)}"
        raise CheckpointNotFound(msg)
    return run.attempt_called(max(found)[2])


def read_manifest(
    directory: AttemptDirectory, expected_digest: str | None = None
) -> Manifest:
    """Read and check the manifest of an attempt.

    Args:
        directory: The attempt's directory.
        expected_digest: What the record says of it; None skips that check.

    Raises:
        ChecksumError: It is not the manifest that was committed.
        ManifestError: It is not a valid manifest.
        NewerFormatError: A newer version of distckpt wrote it.
        UnsafeCheckpointError: It, or the directory, is a link.
        StorageError: It cannot be read.
    """
    path = directory.manifest
    data = directory.read_manifest(MAX_SIZE_BYTES)
    found = digest(data)
    if expected_digest is not None and found != expected_digest:
        msg = (
            f"{path}: digest {found}, expected {expected_digest}. It is not the "
            "manifest that was committed."
        )
        raise ChecksumError(msg)
    try:
        return Manifest.decode(data)
    except (ManifestError, NewerFormatError) as error:
        msg = f"{path}: {error}"
        raise type(error)(msg) from error


def open_shard(directory: AttemptDirectory, manifest: Manifest, rank: int) -> ShardReader:
    """Open one rank's shard file and hold it against the manifest.

    Size, header digest, attempt, rank and the boxes that the layout tables promise are
    compared; the data is verified when it is read.

    Raises:
        ChecksumError, ShardFileError, UnsafeCheckpointError: It is not the file that
            was committed.
        NewerFormatError: A newer version of distckpt wrote it.
        StorageError: It cannot be opened.
    """
    path = directory.path_of(manifest.shard_file(rank))
    shard = manifest.shards[rank]
    file = directory.open(manifest.shard_file(rank))
    reader = ShardReader(file, shard.header)
    try:
        if reader.size_bytes != shard.size_bytes:
            msg = (
                f"{path}: {reader.size_bytes} bytes, expected {shard.size_bytes}: cut "
                "off, or another file."
            )
            raise ShardFileError(msg)
        expected = (manifest.attempt.published, rank, manifest.world_size)
        header = reader.header
        found = (header.attempt, header.rank, header.world_size)
        if found != expected:
            msg = f"{path}: written as {found}, expected {expected}."
            raise ShardFileError(msg)
        differing = _differing(manifest.assignment, rank, header.entries)
        if differing:
            msg = f"{path}: does not hold what the manifest says: {differing}, ..."
            raise ShardFileError(msg)
    except BaseException:
        reader.close()
        raise
    return reader


# A job reads what its own layout has written, over and over.
@lru_cache(maxsize=8)
def _differing(assignment: Assignment, rank: int, entries: Entries) -> list[str]:
    """Compare what a file holds with what it should; returns the first names."""
    promised = {(p.row.name, p.box) for p in assignment.pieces_of_rank(rank)}
    return sorted(name for name, _ in promised ^ entries.by_box.keys())[:5]
