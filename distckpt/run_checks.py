"""Checks of a directory: can it be a run directory, what is there instead of one."""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import suppress

from distckpt import files, paths, state
from distckpt.errors import (
    ConfigError,
    DistckptError,
    FormatError,
    NewerFormatError,
    StorageError,
)
from distckpt.record import Record
from distckpt.run_directory import RunDirectory

_MAX_NAMED = 5


def check_usable(directory: RunDirectory) -> None:
    """Refuse a directory that a manager must not begin to write to.

    Raises:
        ConfigError: It is a file, or has a file called ``checkpoint`` that is not ours,
            which a manager would replace.
        StorageError: It cannot be looked at.
    """
    if not directory.exists():
        parent = os.path.dirname(str(directory))
        while not files.exists(parent):
            parent = os.path.dirname(parent)
        if not files.is_directory(parent):
            msg = f"{directory} cannot be a run directory: {parent} is not a directory."
            raise ConfigError(msg)
        return
    if not directory.is_folder():
        msg = f"{directory} is not a directory, and a run directory is needed."
        raise ConfigError(msg)
    path = state.copy_without_records(directory)
    if path is not None and not _is_ours(directory):
        msg = (
            f"{path} is there, and distckpt has not made it: a manager would replace it. "
            "Move it, or use another directory."
        )
        raise ConfigError(msg)


def _is_ours(directory: RunDirectory) -> bool:
    try:
        state.read_copy(directory)
    except NewerFormatError:
        return True
    except (FormatError, StorageError):
        return False
    return True


def make(directory: RunDirectory) -> None:
    """Make a run directory and its parents, where missing, and make them durable.

    Raises:
        StorageError: It cannot be made; names the parent in which that failed.
    """
    try:
        directory.make()
    except StorageError as error:
        parent = os.path.dirname(error.path or str(directory))
        if error.operation != "mkdir":
            raise
        msg = (
            f"the run directory {directory} cannot be made: no directory can be made in "
            f"{parent} ({error})."
        )
        raise StorageError(
            msg, operation="mkdir", path=str(directory), errno=error.errno
        ) from error


def run_directories_in(path: str) -> list[str]:
    """Return the run directories directly below a directory."""
    found = []
    for name in files.list_directory(path):
        below = os.path.join(path, name)
        with suppress(StorageError):  # not everybody may look everywhere
            if files.is_directory(below) and state.has_records(RunDirectory.at(below)):
                found.append(below)
    return found


def instead_of_records(directory: str) -> str:
    """Say what there is where a run directory was expected, and no record is."""
    try:
        if not files.exists(directory):
            return f"{directory} does not exist."
        if not files.is_directory(directory):
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


def gone_from(directory: RunDirectory, record: Record) -> set[str]:
    """Return the names of attempts that a record lists and a directory has not.

    Raises:
        StorageError: The directory cannot be listed.
    """
    names: Collection[str] = directory.names()
    if paths.RECORDS_DIRECTORY not in names:
        return set()
    there = {*names}
    every = (*record.committed, *record.missing)
    gone = {e.attempt for e in every if e.attempt.published not in there}
    return {attempt.published for attempt in gone if not directory.has(attempt)}


def _few(items: Sequence[str]) -> str:
    more = f" and {len(items) - _MAX_NAMED} more" if len(items) > _MAX_NAMED else ""
    return f"{', '.join(items[:_MAX_NAMED])}{more}"
