"""The contract of a store, in terms of what the protocol needs of it.

A store has folders and files under names. Every implementation passes the tests of
``tests/unit/test_stores.py``, with an error at each of its verbs. The protocol asks:

* ``create`` is compare-and-swap: of all who create one name, one succeeds, and after that
  every reader sees its bytes, whole.
* The effect of a verb survives a loss of power once it has returned, unless it says
  otherwise.
* An attempt is invisible until ``publish`` has returned, and never half visible.

All errors are ``StorageError``s that carry the operation and the name. Every verb may be
called by any thread, and by several at once.

The verbs are those of restic's backends and zarr's stores, but for the ones about attempts:
a filesystem and an object store do not publish and delete in the same way.
"""

from __future__ import annotations

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from types import TracebackType
from typing import Any, NamedTuple, Protocol, TypeAlias

from distckpt.errors import UnsafeCheckpointError
from distckpt.paths import Attempt

Buffer: TypeAlias = Any  # memory that can be asked for its length: memoryview, ctypes array


class Created(Enum):
    """The outcome of ``Store.create``."""

    MADE = "made"
    TAKEN = "taken"
    UNKNOWN = "unknown"


class Creation(NamedTuple):
    """The outcome of creating one file.

    Attributes:
        outcome: ``MADE``: it is there, durably, with these bytes. ``TAKEN``: it has other
            bytes. ``UNKNOWN``: the store will not say.
        error: The error that the store reported; None after plain success.
    """

    outcome: Created
    error: OSError | None = None


class Room(NamedTuple):
    """The room that is left.

    Attributes:
        size_bytes: Bytes; None where there is no limit, or none is known.
        num_files: Files; None where there is no limit.
    """

    size_bytes: int | None
    num_files: int | None


OK, WARNING, BAD = "ok", "warning", "BAD"


class Finding(NamedTuple):
    """One thing that was looked at, for people.

    Attributes:
        what: For example ``"hard links"``.
        verdict: ``OK``, ``WARNING`` or ``BAD``.
        text: The finding, and a remedy.
    """

    what: str
    verdict: str
    text: str


class Sink(Protocol):
    """A file that is being written."""

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write buffers one after the other, from an offset on, to the last byte."""

    def finish(self, size_bytes: int) -> None:
        """Check the size, and make content and name durable.

        Args:
            size_bytes: Of the content; what padding has added to it is cut off.
        """

    def __enter__(self) -> Sink:
        """Return this."""

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Give up what was not finished."""


class Source(Protocol):
    """A file open for reading by offset.

    Attributes:
        path: Its name, for messages.
        size_bytes: Its size when it was opened.
    """

    path: str
    size_bytes: int

    def expect_in_order(self) -> None:
        """Tell the store that the file will be read from its start to its end."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill a buffer from an offset on; returns fewer bytes only at the file's end."""

    def read_in_pieces(
        self,
        offset: int,
        buffer: memoryview,
        piece_bytes: int,
        have: Callable[[memoryview], None],
    ) -> int:
        """Fill a buffer a piece at a time; ``have`` is called with each that is there."""

    def read_vector(self, offset: int, buffers: Sequence[Buffer]) -> int:
        """Fill buffers one after the other; fewer bytes only at the file's end."""

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Read bytes from an offset on; fewer only at the file's end."""

    def close(self) -> None:
        """Close the file."""

    def __enter__(self) -> Source:
        """Return this."""

    def __exit__(self, *exception: object) -> None:
        """Close it."""


class Owner(Protocol):
    """A courtesy: tells a second job early that the first still runs."""

    def acquire(self, wait_seconds: float) -> bool:
        """Take it, from an older manager of this process too; False if another has it."""

    def release(self) -> None:
        """Let go; harmless if it is not held."""


class Store(ABC):
    """A store; names in it are parts joined by ``join``."""

    def join(self, folder: str, name: str) -> str:
        """Return the name of what is in a folder."""
        return posixpath.join(folder, name)

    # Small files

    @abstractmethod
    def create(self, name: str, data: bytes, scratch: str) -> Creation:
        """Create a file that nobody else may have created: compare-and-swap.

        Args:
            name: Of the file.
            data: All of it. They must differ from those of everybody else who may create
                this name: so after a lost answer the bytes tell whose it is.
            scratch: A new name in the same folder, which the store may use meanwhile. If
                the process dies, it may be left.

        Raises:
            StorageError: It failed before the name could be there: nothing has changed.
        """

    @abstractmethod
    def replace(self, name: str, data: bytes, scratch: str) -> None:
        """Put a file in place of the one that has its name: whole, the old or the new one.

        Args:
            name: Of the file.
            data: All of it.
            scratch: A new name, which the store may use meanwhile.
        """

    @abstractmethod
    def write(self, name: str, data: bytes) -> None:
        """Write a small file under a name that nobody else uses; fails if it is there.

        Its name need not survive a loss of power.
        """

    @abstractmethod
    def read(self, name: str, max_size_bytes: int) -> bytes:
        """Read all of a file.

        Raises:
            StorageError: It cannot be read, or is larger than that. Of a file that is not
                there the cause is ``FileNotFoundError``.
            UnsafeCheckpointError: It is a link, a device, a FIFO.
        """

    @abstractmethod
    def note(self, name: str, data: bytes) -> None:
        """Append to a file, made if it is not there; may be lost."""

    @abstractmethod
    def remove(self, folder: str, names: Sequence[str], *, durable: bool = False) -> None:
        """Remove files of a folder, in this order; it is no error if one is gone already.

        Args:
            folder: The folder.
            names: Of the files in it.
            durable: After return they do not come back after a loss of power. If one comes
                back, so do all after it.
        """

    # Looking

    @abstractmethod
    def exists(self, name: str) -> bool:
        """Tell whether a name exists, asking by name: never stale, whatever it is."""

    @abstractmethod
    def is_folder(self, name: str) -> bool:
        """Tell whether a name is that of a folder, or of a link to one."""

    @abstractmethod
    def link_target(self, name: str) -> str | None:
        """Return the absolute name that a link leads to; None for what is no link."""

    @abstractmethod
    def names(self, folder: str) -> list[str]:
        """List the names in a folder, sorted; empty if there is no such folder."""

    @abstractmethod
    def stamp(self, name: str) -> float:
        """Return a number that changes whenever a file is written or refreshed.

        Raises:
            StorageError: Of a file that is not there the cause is ``FileNotFoundError``.
        """

    @abstractmethod
    def refresh(self, name: str) -> None:
        """Change the stamp of a file that is there.

        Raises:
            StorageError: As ``stamp``.
        """

    @abstractmethod
    def room(self, folder: str) -> Room:
        """Return how much may still be written."""

    # Folders

    @abstractmethod
    def make_folder(self, name: str) -> None:
        """Make a folder and its parents, where missing."""

    @abstractmethod
    def check_create(self, folder: str, scratch: str, other: str) -> None:
        """Try out that ``create`` can keep two writers apart.

        Args:
            folder: The run directory, for messages.
            scratch: A new name, which the store may use meanwhile, as ``create`` does.
            other: Another one.

        Raises:
            StorageError: It cannot.
        """

    @abstractmethod
    def owner(self, folder: str) -> Owner:
        """Return the lock of a run directory."""

    @abstractmethod
    def examine(self, folder: str) -> Iterator[Finding]:
        """Yield findings on the store that a run directory is in, for people."""

    @abstractmethod
    def try_out(self, folder: str, names: Iterator[str]) -> Iterator[Finding]:
        """Try, in a run directory, all that distckpt relies on.

        Args:
            folder: The run directory.
            names: New names for small files in it, which are removed again.
        """

    # Attempts of a run directory

    @abstractmethod
    def begin(self, folder: str, attempt: Attempt) -> None:
        """Make room for the files of a new attempt, where no reader sees them.

        Called by: the chief. It need not survive a loss of power.
        """

    @abstractmethod
    def new_shard(
        self, folder: str, attempt: Attempt, file: str, size_bytes: int, is_image: bool
    ) -> Sink:
        """Begin to write a file of an attempt that was begun and is not published.

        Called by: every rank.

        Args:
            folder: The run directory.
            attempt: Of which it is.
            file: Its name in the attempt. Nothing of that name may be there.
            size_bytes: How large it will be, if that is known, else 0: a full disk is found
                at once then, where the store can tell.
            is_image: It is written at once, from memory whose address and length are
                multiples of ``shard_file.IMAGE_BYTES``.
        """

    @abstractmethod
    def publish(self, folder: str, attempt: Attempt, manifest: bytes) -> None:
        """Write the manifest and make the attempt visible, whole and durable.

        Called by: the chief, when all ranks have written.
        """

    @abstractmethod
    def discard(self, folder: str, attempt: Attempt) -> None:
        """Delete a published attempt so that no half of it can come back.

        Called by: the chief.
        """

    @abstractmethod
    def clear(self, folder: str, attempt: Attempt, *, is_own: bool = False) -> bool:
        """Delete all files of an attempt that is not published; there may be none.

        Called by: the chief.

        Args:
            folder: The run directory.
            attempt: Of this chief, or of an older epoch.
            is_own: It is this chief's. If not, it is taken out of its writer's reach first:
                a stopped one that goes on would publish what is left of it, which nobody
                could tell from an attempt that was copied here.

        Returns:
            Whether there was anything; True if it is its own.
        """

    @abstractmethod
    def unfinished(self, names: Sequence[str]) -> list[Attempt]:
        """Return the attempts that ``clear`` is for, of the names in a run directory."""

    # Reading

    @abstractmethod
    def open(self, name: str) -> Source:
        """Open a file for reading.

        Raises:
            StorageError: As ``read``.
            UnsafeCheckpointError: It is a link, a device, a FIFO.
        """


@dataclass(frozen=True, slots=True)
class Place:
    """A name in a store; ``/`` joins it.

    Its text, for messages and users, is the name as the store has it.
    """

    store: Store
    name: str

    def __truediv__(self, name: str) -> Place:
        return Place(self.store, self.store.join(self.name, name))

    def __str__(self) -> str:
        return self.name

    def exists(self) -> bool:
        """See ``Store.exists``."""
        return self.store.exists(self.name)

    def is_folder(self) -> bool:
        """See ``Store.is_folder``."""
        return self.store.is_folder(self.name)

    def link_target(self) -> str | None:
        """See ``Store.link_target``."""
        return self.store.link_target(self.name)

    def refuse_link(self) -> None:
        """Refuse a name that is a link, so that what is below it may be anywhere.

        Whoever made it could else have jobs read and write anywhere.

        Raises:
            UnsafeCheckpointError: It is one.
        """
        if self.link_target() is not None:
            msg = f"{self} is a symbolic link; nothing below it is read or written."
            raise UnsafeCheckpointError(msg)

    def names(self) -> list[str]:
        """See ``Store.names``."""
        return self.store.names(self.name)

    def make_folder(self) -> None:
        """See ``Store.make_folder``."""
        self.store.make_folder(self.name)

    def create(self, data: bytes, scratch: Place) -> Creation:
        """See ``Store.create``."""
        return self.store.create(self.name, data, scratch.name)

    def replace(self, data: bytes, scratch: Place) -> None:
        """See ``Store.replace``."""
        self.store.replace(self.name, data, scratch.name)

    def write(self, data: bytes) -> None:
        """See ``Store.write``."""
        self.store.write(self.name, data)

    def note(self, data: bytes) -> None:
        """See ``Store.note``."""
        self.store.note(self.name, data)

    def read(self, max_size_bytes: int) -> bytes:
        """See ``Store.read``."""
        return self.store.read(self.name, max_size_bytes)

    def open(self) -> Source:
        """See ``Store.open``."""
        return self.store.open(self.name)

    def remove(self, *names: str, durable: bool = False) -> None:
        """See ``Store.remove``: files in this folder."""
        self.store.remove(self.name, names, durable=durable)

    def stamp(self) -> float:
        """See ``Store.stamp``."""
        return self.store.stamp(self.name)

    def refresh(self) -> None:
        """See ``Store.refresh``."""
        self.store.refresh(self.name)

    def room(self) -> Room:
        """See ``Store.room``."""
        return self.store.room(self.name)
