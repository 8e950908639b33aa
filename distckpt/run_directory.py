"""A run directory as a place: can it be one, what is in it, what is there instead."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress

from distckpt import paths, state, storage
from distckpt.errors import (
    ConfigError,
    DistckptError,
    FormatError,
    NewerFormatError,
    StorageError,
)
from distckpt.record import Record

_MAX_NAMED = 5


def check_usable(directory: str) -> None:
    """Refuse a directory that a manager must not begin to write to.

    Raises:
        ConfigError: It is a file, or has a file called ``checkpoint`` that is not ours,
            which a manager would replace.
        StorageError: It cannot be looked at.
    """
    if not storage.exists(directory):
        parent = os.path.dirname(os.path.abspath(directory))
        while not storage.exists(parent):
            parent = os.path.dirname(parent)
        if not storage.is_directory(parent):
            msg = f"{directory} cannot be a run directory: {parent} is not a directory."
            raise ConfigError(msg)
        return
    if not storage.is_directory(directory):
        msg = f"{directory} is not a directory, and a run directory is needed."
        raise ConfigError(msg)
    path = os.path.join(directory, paths.STATE_FILE)
    records = os.path.join(directory, paths.RECORDS_DIRECTORY)
    if storage.exists(path) and not storage.exists(records) and not _is_ours(directory):
        msg = (
            f"{path} is there, and distckpt has not made it: a manager would replace it. "
            "Move it, or use another directory."
        )
        raise ConfigError(msg)


def _is_ours(directory: str) -> bool:
    try:
        state.read_copy(directory)
    except NewerFormatError:
        return True
    except (FormatError, StorageError):
        return False
    return True


def make(directory: str) -> None:
    """Make a run directory and its parents, where missing, and make them durable.

    Raises:
        StorageError: It cannot be made; names the parent in which that failed.
    """
    try:
        storage.make_directories(directory)
    except StorageError as error:
        parent = os.path.dirname(error.path or directory)
        if error.operation != "mkdir":
            raise
        msg = (
            f"the run directory {directory} cannot be made: no directory can be made in "
            f"{parent} ({error})."
        )
        raise StorageError(
            msg, operation="mkdir", path=directory, errno=error.errno
        ) from error


def run_directories_in(path: str) -> list[str]:
    """Return the run directories directly below a directory."""
    found = []
    for name in storage.list_directory(path):
        below = os.path.join(path, name)
        with suppress(StorageError):  # not everybody may look everywhere
            if storage.is_directory(below) and state.has_records(below):
                found.append(below)
    return found


def instead_of_records(directory: str) -> str:
    """Say what there is where a run directory was expected, and no record is."""
    try:
        if not storage.exists(directory):
            return f"{directory} does not exist."
        if not storage.is_directory(directory):
            return f"{directory} is not a directory."
        below = run_directories_in(directory)
    except DistckptError:
        return ""
    if not below:
        return f"{directory}: no checkpoint is committed there."
    return (
        f"{directory} is not a run directory, but holds some: {_few(below)}. "
        "Was one of these meant?"
    )


def gone_from(directory: str, record: Record) -> set[str]:
    """Return the names of attempts that a record lists and a directory has not.

    Raises:
        StorageError: The directory cannot be listed.
    """
    names: Collection[str] = storage.list_directory(directory)
    if paths.RECORDS_DIRECTORY not in names:
        return set()
    there = {*names}
    every = (*record.committed, *record.missing)
    listed = {entry.attempt.published for entry in every}
    return {
        name for name in listed - there if not storage.exists(os.path.join(directory, name))
    }


def _few(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MAX_NAMED} more" if len(items) > _MAX_NAMED else ""
    return f"{', '.join(items[:_MAX_NAMED])}{more}"
