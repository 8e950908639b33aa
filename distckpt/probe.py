"""What a claim tries out before anything depends on it: links, room, one directory."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass

from distckpt import paths, words
from distckpt.errors import StorageError
from distckpt.run_directory import RunDirectory
from distckpt.storage.store import Place

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

    directory: RunDirectory
    epoch: int
    nonce: str
    directory_of_chief: str = ""

    def leave(self) -> None:
        """Write the chief's file, for the others to see."""
        self._write_or_remove(0)

    def remove(self) -> None:
        """Remove the chief's file."""
        self._remove(0)

    def try_on(self, rank: int) -> None:
        """Show that a rank sees the chief's file and can write one of its own.

        Raises:
            StorageError: Says which of the two it cannot.
        """
        if rank == 0:
            return
        if not self._place(0).exists():
            of_chief = self.directory_of_chief
            there = f" ({of_chief} there)" if of_chief else ""
            msg = (
                f"{self.directory} is not the chief's directory{there}: its probe "
                f"{self._name(0)} is not visible here. Every rank needs "
                "the same shared directory."
            )
            raise StorageError(msg, operation="probe", path=str(self.directory))
        self._write_or_remove(rank)
        self._remove(rank)

    def _name(self, rank: int) -> str:
        return paths.probe_file(self.epoch, self.nonce, rank)

    def _place(self, rank: int) -> Place:
        return self.directory.places.root / self._name(rank)

    def _remove(self, rank: int) -> None:
        self.directory.places.root.remove(self._name(rank))

    def _write_or_remove(self, rank: int) -> None:
        try:
            self._place(rank).write(b"")
        except StorageError:
            # The next claim of this manager has the same epoch, and would not sweep it.
            with suppress(StorageError):
                self._remove(rank)
            raise


def remove(directory: RunDirectory, name: str) -> None:
    """Remove a file that the probe of a dead claim has left."""
    directory.places.root.remove(name)


def check_store(directory: RunDirectory, epoch: int) -> None:
    """Refuse a store that cannot keep two jobs apart, or one that is full.

    Raises:
        StorageError: Says what is missing.
    """
    directory.check_create(epoch)
    room = directory.room().size_bytes
    if room is not None and room < _MIN_FREE_BYTES:
        msg = f"{directory}: only {words.size(room)} are free; make room first."
        raise StorageError(msg, operation="statvfs", path=str(directory))
