"""What a claim tries out before anything depends on it: links, room, one directory."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass

from distckpt import paths, storage, words
from distckpt.errors import StorageError

_MIN_FREE_BYTES = 2**20


@dataclass(frozen=True, slots=True)
class Probe:
    """Files by which the ranks show that they share the chief's directory.

    Attributes:
        directory: The run directory.
        epoch: Of the claim, so that what a dead one leaves is swept by the next.
        nonce: Random, so that no rank sees the file of an earlier claim.
        directory_of_chief: The run directory as the chief calls it, for messages.
    """

    directory: str
    epoch: int
    nonce: str
    directory_of_chief: str = ""

    def leave(self) -> None:
        """Write the chief's file, for the others to see."""
        _write_or_remove(self._path(0))

    def remove(self) -> None:
        """Remove the chief's file."""
        storage.remove_file(self._path(0))

    def try_on(self, rank: int) -> None:
        """Show that a rank sees the chief's file and can write one of its own.

        Raises:
            StorageError: Says which of the two it cannot.
        """
        if rank == 0:
            return
        if not storage.exists(self._path(0)):
            of_chief = self.directory_of_chief
            there = f" ({of_chief} there)" if of_chief else ""
            msg = (
                f"{self.directory} is not the chief's directory{there}: its probe "
                f"{os.path.basename(self._path(0))} is not visible here. Every rank needs "
                "the same shared directory."
            )
            raise StorageError(msg, operation="probe", path=self.directory)
        _write_or_remove(self._path(rank))
        storage.remove_file(self._path(rank))

    def _path(self, rank: int) -> str:
        return os.path.join(self.directory, paths.probe_file(self.epoch, self.nonce, rank))


def _write_or_remove(path: str) -> None:
    try:
        storage.write_new_file(path, b"")
    except StorageError:
        # The next claim of this manager has the same epoch, and would not sweep it.
        with suppress(StorageError):
            storage.remove_file(path)
        raise


def check_filesystem(directory: str, epoch: int) -> None:
    """Refuse a filesystem without hard links, or one that is full.

    Raises:
        StorageError: Says what is missing.
    """
    records = os.path.join(directory, paths.RECORDS_DIRECTORY)
    one = os.path.join(records, paths.temporary_file(epoch))
    other = os.path.join(records, paths.temporary_file(epoch))
    _write_or_remove(one)
    try:
        storage.link(one, other)
    except StorageError as error:
        msg = (
            f"{directory}: this filesystem has no hard links ({error}); without them two "
            "jobs could commit over each other. Use another filesystem."
        )
        raise StorageError(msg, operation="link", path=one, errno=error.errno) from error
    finally:
        storage.remove_file(one)
        storage.remove_file(other)
    free = storage.free_bytes(directory)
    if free < _MIN_FREE_BYTES:
        msg = f"{directory}: only {words.size(free)} are free; make room first."
        raise StorageError(msg, operation="statvfs", path=directory)
