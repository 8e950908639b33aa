"""One run directory: the only module that knows what is called how in it, and where.

All other modules name what they mean (a record, an attempt, a lease); here it gets its
place in the store. ``paths.py`` spells and parses the single names.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distckpt import paths
from distckpt.locations import absolute
from distckpt.paths import Attempt
from distckpt.storage.posix_store import local
from distckpt.storage.store import (
    BAD,
    OK,
    WARNING,
    Buffer,
    Finding,
    Owner,
    Place,
    Room,
    Sink,
    Source,
)

__all__ = [
    "BAD",
    "OK",
    "WARNING",
    "AttemptDirectory",
    "Buffer",
    "Finding",
    "NewShard",
    "Owner",
    "Places",
    "RunDirectory",
    "Sink",
    "Source",
]


@dataclass(frozen=True, slots=True)
class Places:
    """The places of what a run directory has in it, beside its attempts.

    For the modules that read and write these: records, requests, leases, the history and
    the probe of a claim.
    """

    root: Place

    @property
    def state_file(self) -> Place:
        """The copy of the newest record, for people."""
        return self.root / paths.STATE_FILE

    @property
    def records(self) -> Place:
        """The folder of the records."""
        return self.root / paths.RECORDS_DIRECTORY

    @property
    def lock_file(self) -> Place:
        """The place of the file that its lock is on."""
        return self.root / paths.LOCK_FILE

    def record(self, number: int) -> Place:
        """Return the place of one record."""
        return self.records / paths.record_file(number)

    def scratch(self, epoch: int) -> Place:
        """Return a new place among the records; what is left there is swept."""
        return self.records / paths.temporary_file(epoch)

    @property
    def requests(self) -> Place:
        """The folder of what other processes ask for."""
        return self.root / paths.REQUESTS_DIRECTORY

    @property
    def leases(self) -> Place:
        """The folder of the leases of readers."""
        return self.root / paths.LEASES_DIRECTORY

    @property
    def events(self) -> Place:
        """The folder of the history."""
        return self.root / paths.EVENTS_DIRECTORY

    def probe(self, epoch: int, nonce: str, rank: int) -> Place:
        """Return the place of the file by which a rank shows that it can write."""
        return self.root / paths.probe_file(epoch, nonce, rank)


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """A run directory in a store; its text is its path.

    Args:
        place: Its place, whether or not it is made yet.
        spelling: The path as the user has spelled it; by default as the store does.
    """

    place: Place
    spelling: str = ""

    @staticmethod
    def at(path: str) -> RunDirectory:
        """Return the run directory of a path as a user spells it.

        Raises:
            StorageError: It is relative, and the working directory is gone.
        """
        # Absolute: it is used for long, perhaps after a chdir.
        return RunDirectory(local(absolute(path)), path)

    def __str__(self) -> str:
        return self.place.name

    @property
    def places(self) -> Places:
        """The places of what it has in it, beside its attempts."""
        return Places(self.place)

    # The directory itself

    def exists(self) -> bool:
        """Tell whether there is anything of its name."""
        return self.place.exists()

    def is_folder(self) -> bool:
        """Tell whether it is a directory."""
        return self.place.is_folder()

    def names(self) -> list[str]:
        """List the names in it, sorted; none if it does not exist."""
        return self.place.names()

    def make(self) -> None:
        """Make it, and its parents, where missing."""
        self.place.make_folder()

    def refuse_linked_records(self) -> None:
        """Refuse a directory whose records lie elsewhere, by way of a link.

        Raises:
            UnsafeCheckpointError: They do.
        """
        self.places.records.refuse_link()

    def make_records(self) -> None:
        """Make the folder of its records, where missing."""
        self.places.records.make_folder()

    def room(self) -> Room:
        """Return how much may still be written."""
        return self.place.room()

    def check_create(self, epoch: int) -> None:
        """See ``Store.check_create``.

        Args:
            epoch: Of the claim that is being made.
        """
        scratch, other = self.places.scratch(epoch), self.places.scratch(epoch)
        self.place.store.check_create(self.place.name, scratch.name, other.name)

    def owner(self) -> Owner:
        """Return its lock."""
        return self.place.store.owner(self.place.name)

    def has_lock_file(self) -> bool:
        """Tell whether it was ever locked."""
        return self.places.lock_file.exists()

    def examine(self) -> Iterator[Finding]:
        """See ``Store.examine``."""
        return self.place.store.examine(self.place.name)

    def try_out(self, names: Iterator[str]) -> Iterator[Finding]:
        """See ``Store.try_out``."""
        return self.place.store.try_out(self.place.name, names)

    # Checkpoints

    def path_of(self, prefix: str) -> str:
        """Return the path that users see, in their spelling: ``runs/gpt/ckpt-1000``."""
        return os.path.join(self.spelling or self.place.name, prefix)

    def attempt(self, attempt: Attempt) -> AttemptDirectory:
        """Return the directory of a published attempt."""
        return self.attempt_called(attempt.published)

    def attempt_called(self, name: str) -> AttemptDirectory:
        """Return the directory of a published attempt, by its name."""
        return AttemptDirectory(self.place / name)

    def has(self, attempt: Attempt) -> bool:
        """Tell, asking by name, whether a published attempt is there."""
        return (self.place / attempt.published).exists()

    def begin(self, attempt: Attempt) -> None:
        """See ``Store.begin``."""
        self.place.store.begin(self.place.name, attempt)

    def new_shard(self, attempt: Attempt, rank: int, world_size: int) -> NewShard:
        """Return the file that a rank is about to write."""
        return NewShard(self.place, attempt, paths.shard_file(rank, world_size))

    def publish(self, attempt: Attempt, manifest: bytes) -> None:
        """See ``Store.publish``."""
        self.place.store.publish(self.place.name, attempt, manifest)

    def discard(self, attempt: Attempt) -> None:
        """See ``Store.discard``."""
        self.place.store.discard(self.place.name, attempt)

    def clear(self, attempt: Attempt, *, is_own: bool = False) -> bool:
        """See ``Store.clear``."""
        return self.place.store.clear(self.place.name, attempt, is_own=is_own)

    def unfinished(self, names: Sequence[str]) -> list[Attempt]:
        """See ``Store.unfinished``."""
        return self.place.store.unfinished(names)


@dataclass(frozen=True, slots=True)
class AttemptDirectory:
    """The directory of a published attempt, or of a copy of one; its text is its path."""

    place: Place

    @staticmethod
    def at(path: str) -> AttemptDirectory:
        """Return the attempt's directory of a path as a user spells it."""
        return AttemptDirectory(local(absolute(path)))

    def __str__(self) -> str:
        return self.place.name

    @property
    def name(self) -> str:
        """The last part of its path."""
        return os.path.basename(self.place.name)

    @property
    def run(self) -> RunDirectory:
        """The directory that it is in."""
        store, name = self.place.store, os.path.dirname(self.place.name)
        return RunDirectory(Place(store, name))

    def exists(self) -> bool:
        """Tell, asking by name, whether it is there."""
        return self.place.exists()

    def has_manifest(self) -> bool:
        """Tell, asking by name, whether it has a manifest."""
        return self.manifest.exists()

    @property
    def manifest(self) -> Place:
        """The place of its manifest."""
        return self.place / paths.MANIFEST_FILE

    def read_manifest(self, max_size_bytes: int) -> bytes:
        """Return the bytes of its manifest.

        Raises:
            UnsafeCheckpointError: It, or the directory, is a link.
            StorageError: It cannot be read.
        """
        # By the records it is a directory of the run; a link could lead anywhere.
        self.place.refuse_link()
        return self.manifest.read(max_size_bytes)

    def path_of(self, file: str) -> str:
        """Return the path of a file in it, for people."""
        return str(self.place / file)

    def open(self, file: str) -> Source:
        """Open a file in it."""
        return (self.place / file).open()

    def names(self) -> list[str]:
        """List the names in it."""
        return self.place.names()

    def link_target(self) -> str | None:
        """Return the absolute path that it leads to, if it is a link."""
        return self.place.link_target()


@dataclass(frozen=True, slots=True)
class NewShard:
    """A file of an attempt, about to be written; its text is for messages.

    Attributes:
        directory: The run directory.
        attempt: Of which it is.
        file: Its name in the attempt.
    """

    directory: Place
    attempt: Attempt
    file: str

    def __str__(self) -> str:
        return str(self.directory / self.attempt.pending / self.file)

    def create(self, size_bytes: int = 0, *, is_image: bool = False) -> Sink:
        """Begin to write it; see ``Store.new_shard``."""
        store, folder = self.directory.store, self.directory.name
        return store.new_shard(folder, self.attempt, self.file, size_bytes, is_image)
