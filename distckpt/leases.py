"""Leases: what a reader reads is not deleted under its hands.

A lease is a small file that names an attempt; its reader touches it now and then. The
reader writes it, and then looks whether the attempt is still listed. The chief first
appends the record that lists it no more, and then, before it deletes, looks for leases. So
one of the two sees the other: a reader that was told that it may read has left its lease
before that record, and the deleter looks after it.

A reader that died touches nothing any more. The deleter goes by its own clock: a lease that
it has seen unchanged for longer than the lease promises has ended. No clocks are compared.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import NamedTuple

from distckpt import identity, paths, strict_json
from distckpt.durations import seconds_of
from distckpt.errors import ConfigError, FormatError, StorageError
from distckpt.paths import Attempt
from distckpt.run_directory import RunDirectory
from distckpt.storage.store import Place

_logger = logging.getLogger(__name__)

SECONDS = 60.0
_MAX_SECONDS = 3600.0
_MIN_SECONDS = 0.1
# How often a lease is touched while it lasts: a few may fail, or be late.
_TOUCHES = 6
_MAX_SIZE_BYTES = 4096


def checked_seconds(seconds: float | timedelta | None) -> float | None:
    """Check how long a lease lasts when its reader has died; None for no lease at all.

    Raises:
        ConfigError: It is no such time.
    """
    if seconds is None:
        return None
    length = seconds_of("lease_seconds", seconds)
    if not _MIN_SECONDS <= length <= _MAX_SECONDS:
        msg = (
            f"lease_seconds must be from {_MIN_SECONDS} to {_MAX_SECONDS:.0f}, or None for "
            f"no lease; got {seconds!r:.100}."
        )
        raise ConfigError(msg)
    return length


class Lease:
    """Keeps one attempt from being deleted, until it is released or this process dies.

    It holds only if the attempt is still listed after this was made.

    Args:
        directory: The run directory.
        attempt: What is to be kept.
        seconds: How long it lasts when nobody touches it any more.

    Raises:
        StorageError: The lease could not be written.
        UnsafeCheckpointError: Leases are elsewhere, by way of a link.
    """

    def __init__(self, directory: RunDirectory, attempt: Attempt, seconds: float) -> None:
        self._folder = _folder(directory)
        self._folder.make_folder()
        self._name = paths.lease_file(attempt)
        self._seconds = seconds
        self._ended = threading.Event()
        tree = {"seconds": seconds, "by": identity.this_process()}
        # Not durable: after a power cut there is no reader either.
        (self._folder / self._name).write(strict_json.dumps(tree).encode())
        self._thread = threading.Thread(
            target=self._touch, name="distckpt-lease", daemon=True
        )
        self._thread.start()

    def _touch(self) -> None:
        while not self._ended.wait(self._seconds / _TOUCHES):
            try:
                (self._folder / self._name).refresh()
            except StorageError as error:
                _logger.warning("a lease may end before it is given back: %s", error)
                if isinstance(error.__cause__, FileNotFoundError):
                    return  # the chief has taken it for that of a dead reader

    def release(self) -> None:
        """Let the attempt be deleted."""
        self._ended.set()
        self._thread.join(self._seconds)
        with suppress(StorageError):  # it ends by itself
            self._folder.remove(self._name)


@contextmanager
def leased(lease: Lease | None) -> Iterator[None]:
    """Hold a lease, if there is one, for as long as a block runs."""
    try:
        yield
    finally:
        if lease is not None:
            lease.release()


class _Seen(NamedTuple):
    """A lease as it was seen last: its stamp, since when, how long it lasts."""

    stamp: float
    since: float
    seconds: float


class Leases:
    """The leases in a run directory, as the one who deletes sees them.

    Args:
        directory: The run directory.
        now: The clock.
    """

    def __init__(
        self, directory: RunDirectory, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._directory = directory
        self._now = now
        self._seen: dict[str, _Seen] = {}

    def hold(self, attempt: Attempt) -> bool:
        """Tell whether a reader that lives holds an attempt; removes leases of dead ones.

        Raises:
            StorageError, UnsafeCheckpointError: It cannot be told.
        """
        alive = {self._lives(name) for name in names_of(self._directory, attempt)}
        return True in alive

    def _lives(self, name: str) -> bool:
        folder = _folder(self._directory)
        place = folder / name
        try:
            stamp = place.stamp()
        except StorageError as error:
            if isinstance(error.__cause__, FileNotFoundError):
                return False
            raise
        seen = self._seen.get(name)
        if seen is None or seen.stamp != stamp:
            seconds = seen.seconds if seen is not None else _seconds_of(place)
            self._seen[name] = _Seen(stamp, self._now(), seconds)
            return True
        if self._now() - seen.since <= seen.seconds:
            return True
        _logger.info("%s: its reader has touched it no more; it has ended", place)
        folder.remove(name)
        del self._seen[name]
        return False


def names_of(directory: RunDirectory, attempt: Attempt) -> list[str]:
    """Return the files of an attempt's leases, of living and dead readers.

    Raises:
        StorageError, UnsafeCheckpointError: They cannot be looked for.
    """
    names = _folder(directory).names()
    return [name for name in names if paths.parse_lease_file(name) == attempt]


def held(directory: RunDirectory) -> list[tuple[Attempt, float]]:
    """List all leases, of living and dead readers, with the seconds since each was touched.

    By this host's clock, for people.

    Raises:
        StorageError, UnsafeCheckpointError: They cannot be looked for.
    """
    found = []
    folder = _folder(directory)
    for name in folder.names():
        attempt = paths.parse_lease_file(name)
        if attempt is not None:
            with suppress(StorageError):  # given back meanwhile
                found.append((attempt, time.time() - (folder / name).stamp()))
    return found


def _seconds_of(place: Place) -> float:
    """Read how long a lease lasts; whatever it says, not for ever."""
    with suppress(StorageError, FormatError, ConfigError, strict_json.JsonError):
        tree = strict_json.loads(place.read(_MAX_SIZE_BYTES))
        if isinstance(tree, dict):
            return checked_seconds(tree.get("seconds")) or SECONDS
    return SECONDS


def _folder(directory: RunDirectory) -> Place:
    folder = directory.places.leases
    folder.refuse_link()
    return folder
