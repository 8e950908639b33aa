"""The chain of records: read the newest, append the next.

Creating a record's numbered file exclusively is compare-and-swap, the only one that
every filesystem that matters offers. A writer that finds its number taken has been
fenced. See docs/protocol.md for the proof.
"""

from __future__ import annotations

import errno
from contextlib import suppress
from dataclasses import dataclass
from typing import NoReturn

from distckpt import paths
from distckpt.errors import (
    CorruptStateError,
    FencedError,
    FormatError,
    NewerFormatError,
    OutcomeUnknown,
    StorageError,
)
from distckpt.record import MAX_SIZE_BYTES, Record, digest
from distckpt.run_directory import RunDirectory
from distckpt.storage.store import Created, Place

_KEPT_RECORDS = 64
_MAX_RACES = 10


@dataclass(frozen=True, slots=True)
class Head:
    """The newest record, and the digest that its successor names."""

    record: Record
    digest: str


def read_head(directory: RunDirectory) -> Head | None:
    """Read the newest record of a run directory; None if it has no chain.

    Raises:
        CorruptStateError: There are records but the newest is not valid, or there are
            checkpoints but no records. Never taken for a fresh start.
        NewerFormatError: A newer version of distckpt wrote the newest record.
        UnsafeCheckpointError: The records are elsewhere, by way of a link.
        StorageError: The directory cannot be read.
    """
    directory.refuse_linked_records()
    races = 0
    while True:
        number = _newest_number(directory)
        if number is None:
            return None
        try:
            return read_numbered(directory, number)
        except StorageError as error:
            # Listed, then pruned before it was opened: newer ones are there.
            races += 1
            if races == _MAX_RACES or not isinstance(error.__cause__, FileNotFoundError):
                raise


def _newest_number(directory: RunDirectory) -> int | None:
    number = _newest_named(directory)
    if number == 0:
        checkpoint = _any_checkpoint(directory)
        if checkpoint is None:
            return None
        # A record comes before the first checkpoint, so one must be there by now, also
        # when another manager has made both between the two lists.
        number = _newest_named(directory)
        if number == 0:
            _refuse_lost_chain(directory, checkpoint)
    return number


def _newest_named(directory: RunDirectory) -> int:
    number = _newest_listed(directory)
    # A directory listing may be stale on network filesystems; a name never is.
    while directory.places.record(number + 1).exists():
        number += 1
    return number


def has_records(directory: RunDirectory) -> bool:
    """Tell whether a directory has a chain, valid or not."""
    return bool(record_numbers(directory))


def copy_without_records(directory: RunDirectory) -> str | None:
    """Return the path of a file called like the state file, if there are no records."""
    places = directory.places
    is_alone = places.state_file.exists() and not places.records.exists()
    return str(places.state_file) if is_alone else None


def is_newest(directory: RunDirectory, head: Head | None) -> bool:
    """Tell, asking by name, whether no record follows this one."""
    number = 0 if head is None else head.record.number
    if directory.places.record(number + 1).exists():
        return False
    if head is None:
        return not record_numbers(directory)  # the first may have been pruned
    # Asked last: while the record itself stands, its successor cannot have been pruned.
    return directory.places.record(number).exists()


def refuse_lost_records(directory: RunDirectory, head: Head) -> None:
    """Raise if the newest record has been lost, so that an older one seems to be it.

    The copy for people is written after its record is durable, so it is never ahead of the
    records, unless some are gone. A claim would delete what they had committed.

    Raises:
        CorruptStateError: The copy is of this chain, and newer than any record.
        NewerFormatError: A newer version of distckpt wrote the copy.
    """
    try:
        copied = read_copy(directory)
    except (FormatError, StorageError):
        return  # damaged or missing: it decides nothing
    if copied.chain != head.record.chain or copied.number <= head.record.number:
        return
    newest = read_head(directory)  # a job may have appended between the two
    if newest is not None and newest.record.number >= copied.number:
        return
    msg = (
        f"{directory}: its newest record is number {head.record.number}, but the state "
        f"file {paths.STATE_FILE!r} is a copy of number {copied.number}: records are lost. "
        f"'distckpt repair {directory}' rebuilds them. If they were put back to an older "
        "state on purpose, remove the state file."
    )
    raise CorruptStateError(msg)


def read_copy(directory: RunDirectory) -> Record:
    """Read the state file, the copy of the newest record for people.

    Raises:
        StorageError: It is not there, or cannot be read.
        FormatError: It is no record, or no regular file.
        NewerFormatError: A newer version of distckpt wrote it.
    """
    place = directory.places.state_file
    data = place.read(MAX_SIZE_BYTES)
    try:
        return Record.decode(data)
    except NewerFormatError as error:
        msg = f"{place}: {error}"
        raise NewerFormatError(msg) from error


def append(directory: RunDirectory, record: Record) -> Head:
    """Append one record; after return it is durable and acknowledged.

    Called by: the chief alone, as its only way to change anything.

    Raises:
        FencedError: Another writer has appended.
        OutcomeUnknown: The link was tried and the disk will not say, or not say
            durably, whether the record is there.
        StorageError: It failed before the link was tried; nothing has changed.
    """
    path = directory.places.record(record.number)
    data = record.encode()
    if len(data) > MAX_SIZE_BYTES:
        num_listed = len(record.committed)
        msg = (
            f"{path}: a record of {len(data)} bytes, for {num_listed} checkpoints; at most "
            f"{MAX_SIZE_BYTES} are read again. Keep fewer: give max_to_keep."
        )
        raise StorageError(msg, operation="append", path=str(path), errno=errno.EFBIG)
    made = path.create(data, directory.places.scratch(record.epoch))
    if made.outcome is Created.TAKEN:
        msg = f"{path} is taken by another record; a newer manager owns the directory."
        raise FencedError(msg) from made.error
    if made.outcome is Created.UNKNOWN:
        # Perhaps a newer manager has swept what this one was writing, and pruned the
        # record that took its number.
        with suppress(StorageError):
            if _newest_listed(directory) > record.number:
                raise _overtaken(path) from made.error
        raise _unknown(path, made.error) from made.error
    # The link alone proves nothing to a writer that was stopped for long: its number may
    # have been taken, overtaken and pruned. Only the newest number counts.
    try:
        newest = _newest_listed(directory)
    except StorageError as error:
        raise _unknown(path, error) from error
    if newest > record.number:
        raise _overtaken(path)
    return Head(record, digest(data))


def prune(directory: RunDirectory) -> None:
    """Remove records long behind the newest; the newest holds everything in full."""
    old = record_numbers(directory)[:-_KEPT_RECORDS]
    directory.places.records.remove(*map(paths.record_file, old))


def write_copy(directory: RunDirectory, head: Head) -> None:
    """Replace the state file, the copy of the newest record for people."""
    places = directory.places
    scratch = places.scratch(head.record.epoch)
    places.state_file.replace(head.record.encode(), scratch)


def temporary_files(directory: RunDirectory) -> list[str]:
    """List the files that were to become records, of living and dead writers."""
    names = directory.places.records.names()
    return [name for name in names if paths.parse_temporary_file(name) is not None]


def sweep(directory: RunDirectory, epoch: int) -> None:
    """Remove the temporary files of lower epochs."""
    names = temporary_files(directory)
    old = [name for name in names if (paths.parse_temporary_file(name) or 0) < epoch]
    directory.places.records.remove(*old)


def record_numbers(directory: RunDirectory) -> list[int]:
    """List the numbers that have a file, valid or not, ascending."""
    names = directory.places.records.names()
    numbers = (paths.parse_record_file(name) for name in names)
    return sorted(number for number in numbers if number is not None)


def _newest_listed(directory: RunDirectory) -> int:
    return max(record_numbers(directory), default=0)


def read_numbered(directory: RunDirectory, number: int) -> Head:
    """Read the record of one number.

    Raises:
        CorruptStateError: It is not valid, or that of another number.
        NewerFormatError: A newer version of distckpt wrote it.
        StorageError: It cannot be read.
    """
    path = directory.places.record(number)
    data = path.read(MAX_SIZE_BYTES)
    try:
        record = Record.decode(data)
        if record.number != number:
            msg = f"it says it is record {record.number}"
            raise CorruptStateError(msg)
    except CorruptStateError as error:
        msg = (
            f"{path}: {error}. The newest record decides what is committed, so nothing "
            f"is guessed: 'distckpt repair {directory}' says which checkpoints there are "
            "whole, and rebuilds the records from them. Do not just remove the file: the "
            "next claim would then delete what it committed."
        )
        raise CorruptStateError(msg) from error
    except NewerFormatError as error:
        msg = f"{path}: {error}"
        raise NewerFormatError(msg) from error
    return Head(record, digest(data))


def _any_checkpoint(directory: RunDirectory) -> str | None:
    names = directory.names()
    published = (name for name in names if paths.parse_published(name) is not None)
    return next(published, None)


def _refuse_lost_chain(directory: RunDirectory, checkpoint: str) -> NoReturn:
    msg = (
        f"{directory} has checkpoints ({checkpoint}, ...) but no records in "
        f"{paths.RECORDS_DIRECTORY}: starting afresh would abandon them. "
        f"'distckpt repair {directory}' rebuilds the records from those that are whole."
    )
    raise CorruptStateError(msg)


def _overtaken(path: Place) -> FencedError:
    return FencedError(
        f"another manager has appended after {path}; this one is fenced. The newest record "
        "says whether it knew of this one."
    )


def _unknown(path: Place, error: OSError | None) -> OutcomeUnknown:
    return OutcomeUnknown(
        f"the disk does not say whether {path} was committed ({error}). The next claim "
        "of the directory decides; until an append succeeds nothing is deleted."
    )
