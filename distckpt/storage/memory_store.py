"""A store in the memory of this process: for tests, and for what needs no disk.

It keeps to the contract of ``store.py`` but for one point: nothing survives the process.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import NoReturn

from distckpt import paths
from distckpt.errors import StorageError, UnsafeCheckpointError
from distckpt.paths import Attempt
from distckpt.storage.store import (
    OK,
    Buffer,
    Created,
    Creation,
    Finding,
    Owner,
    Room,
    Sink,
    Source,
    Store,
)


class MemoryStore(Store):
    """A tree of names in memory; every verb is atomic.

    Args:
        max_size_bytes: How much fits into it; None for no limit.
    """

    def __init__(self, max_size_bytes: int | None = None) -> None:
        self._lock = threading.RLock()
        self._max_size_bytes = max_size_bytes
        self._files: dict[str, bytes] = {}
        self._stamps: dict[str, float] = {}
        self._folders = {"/"}
        self._owners: dict[str, _MemoryOwner] = {}
        self._num_changes = 0

    # Small files

    def create(self, name: str, data: bytes, scratch: str) -> Creation:
        """See ``Store.create``."""
        with self._lock:
            found = self._files.get(name)
            if found is not None:
                taken = FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), name)
                return Creation(Created.MADE if found == data else Created.TAKEN, taken)
            self._put("create", name, data)
            return Creation(Created.MADE)

    def replace(self, name: str, data: bytes, scratch: str) -> None:
        """See ``Store.replace``."""
        with self._lock:
            self._put("replace", name, data)

    def write(self, name: str, data: bytes) -> None:
        """See ``Store.write``."""
        with self._lock:
            if self.exists(name):
                _fail("write", name, errno.EEXIST)
            self._put("write", name, data)

    def note(self, name: str, data: bytes) -> None:
        """See ``Store.note``."""
        with self._lock:
            self._put("note", name, self._files.get(name, b"") + data)

    def read(self, name: str, max_size_bytes: int) -> bytes:
        """See ``Store.read``."""
        data = self._data_of("read", name)
        if len(data) > max_size_bytes:
            msg = f"{name}: {len(data)} bytes, more than {max_size_bytes}."
            raise StorageError(msg, operation="read", path=name, errno=errno.EFBIG)
        return data

    def remove(self, folder: str, names: Sequence[str], *, durable: bool = False) -> None:
        """See ``Store.remove``."""
        with self._lock:
            for name in names:
                self._files.pop(self.join(folder, name), None)
                self._stamps.pop(self.join(folder, name), None)

    # Looking

    def exists(self, name: str) -> bool:
        """See ``Store.exists``."""
        with self._lock:
            return name in self._files or name in self._folders

    def is_folder(self, name: str) -> bool:
        """See ``Store.is_folder``."""
        with self._lock:
            return name in self._folders

    def link_target(self, name: str) -> str | None:
        """See ``Store.link_target``: there are no links here."""
        return None

    def names(self, folder: str) -> list[str]:
        """See ``Store.names``."""
        start = self.join(folder, "")
        with self._lock:
            below = [n for n in (*self._files, *self._folders) if n.startswith(start)]
        found = {name[len(start) :].partition("/")[0] for name in below}
        return sorted(found - {""})

    def stamp(self, name: str) -> float:
        """See ``Store.stamp``: the number of the change."""
        with self._lock:
            self._data_of("stamp", name)
            return self._stamps[name]

    def refresh(self, name: str) -> None:
        """See ``Store.refresh``."""
        with self._lock:
            self._put("refresh", name, self._data_of("refresh", name))

    def room(self, folder: str) -> Room:
        """See ``Store.room``."""
        if self._max_size_bytes is None:
            return Room(None, None)
        return Room(max(0, self._max_size_bytes - self._size_bytes()), None)

    # Folders

    def make_folder(self, name: str) -> None:
        """See ``Store.make_folder``."""
        with self._lock:
            while name not in self._folders:
                if name in self._files:
                    _fail("make_folder", name, errno.EEXIST)
                self._folders.add(name)
                name = os.path.dirname(name)

    def check_create(self, folder: str, scratch: str, other: str) -> None:
        """See ``Store.check_create``: it can."""

    def owner(self, folder: str) -> Owner:
        """See ``Store.owner``."""
        with self._lock:
            return self._owners.setdefault(folder, _MemoryOwner())

    def examine(self, folder: str) -> Iterator[Finding]:
        """See ``Store.examine``."""
        yield Finding("store", OK, "memory of this process")

    def try_out(self, folder: str, names: Iterator[str]) -> Iterator[Finding]:
        """See ``Store.try_out``: there is nothing to be tried."""
        yield from ()

    # Attempts

    def begin(self, folder: str, attempt: Attempt) -> None:
        """See ``Store.begin``."""
        with self._lock:
            pending = self.join(folder, attempt.pending)
            if not self.is_folder(folder):
                _fail("begin", pending, errno.ENOENT)
            if pending in self._folders:
                _fail("begin", pending, errno.EEXIST)
            self._folders.add(pending)

    def new_shard(
        self, folder: str, attempt: Attempt, file: str, size_bytes: int, is_image: bool
    ) -> Sink:
        """See ``Store.new_shard``."""
        name = self.join(self.join(folder, attempt.pending), file)
        if self.exists(name):
            _fail("new_shard", name, errno.EEXIST)
        self._check("new_shard", name, size_bytes)
        return _MemorySink(name, self._finish)

    def publish(self, folder: str, attempt: Attempt, manifest: bytes) -> None:
        """See ``Store.publish``."""
        pending = self.join(folder, attempt.pending)
        published = self.join(folder, attempt.published)
        with self._lock:
            if self.exists(published):
                _fail("publish", published, errno.EEXIST)
            self._put("publish", self.join(pending, paths.MANIFEST_FILE), manifest)
            for name in [n for n in self._files if n.startswith(f"{pending}/")]:
                moved = published + name[len(pending) :]
                self._files[moved] = self._files.pop(name)
                self._stamps[moved] = self._stamps.pop(name)
            self._folders.discard(pending)
            self._folders.add(published)

    def discard(self, folder: str, attempt: Attempt) -> None:
        """See ``Store.discard``."""
        published = self.join(folder, attempt.published)
        if not self._remove_folder(published):
            _fail("discard", published, errno.ENOENT)

    def clear(self, folder: str, attempt: Attempt, *, is_own: bool = False) -> bool:
        """See ``Store.clear``."""
        return self._remove_folder(self.join(folder, attempt.pending))

    def unfinished(self, names: Sequence[str]) -> list[Attempt]:
        """See ``Store.unfinished``."""
        found = map(paths.parse_pending, names)
        return [attempt for attempt in found if attempt is not None]

    # Reading

    def open(self, name: str) -> Source:
        """See ``Store.open``."""
        return _MemorySource(name, self._data_of("open", name))

    # Within

    def _data_of(self, operation: str, name: str) -> bytes:
        with self._lock:
            if name in self._folders:
                msg = f"{name} is not a regular file; nothing of it is read."
                raise UnsafeCheckpointError(msg)
            if name not in self._files:
                _fail(operation, name, errno.ENOENT)
            return self._files[name]

    def _put(self, operation: str, name: str, data: bytes) -> None:
        if os.path.dirname(name) not in self._folders:
            _fail(operation, name, errno.ENOENT)
        if name in self._folders:
            _fail(operation, name, errno.EISDIR)
        self._check(operation, name, len(data) - len(self._files.get(name, b"")))
        self._num_changes += 1
        self._files[name] = data
        self._stamps[name] = float(self._num_changes)

    def _finish(self, name: str, data: bytes) -> None:
        with self._lock:
            self._put("finish", name, data)

    def _check(self, operation: str, name: str, more_bytes: int) -> None:
        most = self._max_size_bytes
        if most is not None and more_bytes > max(0, most - self._size_bytes()):
            _fail(operation, name, errno.ENOSPC)

    def _size_bytes(self) -> int:
        with self._lock:
            return sum(map(len, self._files.values()))

    def _remove_folder(self, folder: str) -> bool:
        with self._lock:
            if folder not in self._folders:
                return False
            for name in [n for n in self._files if n.startswith(f"{folder}/")]:
                del self._files[name], self._stamps[name]
            self._folders.discard(folder)
            return True


class _MemoryOwner:
    """The lock of a run directory: the newest manager of this process has it."""

    def acquire(self, wait_seconds: float) -> bool:
        """See ``Owner.acquire``: there is no other process."""
        return True

    def release(self) -> None:
        """See ``Owner.release``."""


class _MemorySink:
    """A file that is being written."""

    def __init__(self, name: str, finish: Callable[[str, bytes], None]) -> None:
        self._name = name
        self._finish = finish
        self._data = bytearray()

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """See ``Sink.write_at``."""
        for buffer in buffers:
            data = memoryview(buffer).cast("B")
            end = offset + len(data)
            self._data.extend(bytes(max(0, end - len(self._data))))
            self._data[offset:end] = data
            offset = end

    def finish(self, size_bytes: int) -> None:
        """See ``Sink.finish``."""
        if len(self._data) < size_bytes:
            msg = f"{self._name}: wrote {len(self._data)} bytes, expected {size_bytes}."
            raise StorageError(msg, operation="finish", path=self._name)
        self._finish(self._name, bytes(self._data[:size_bytes]))

    def __enter__(self) -> Sink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._data = bytearray()


class _MemorySource:
    """A file open for reading; what becomes of its name changes nothing."""

    def __init__(self, path: str, data: bytes) -> None:
        self.path = path
        self.size_bytes = len(data)
        self._data = memoryview(data)

    def expect_in_order(self) -> None:
        """See ``Source.expect_in_order``."""

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """See ``Source.read_into``."""
        data = self._data[offset : offset + len(buffer)]
        buffer[: len(data)] = data
        return len(data)

    def read_in_pieces(
        self,
        offset: int,
        buffer: memoryview,
        piece_bytes: int,
        have: Callable[[memoryview], None],
    ) -> int:
        """See ``Source.read_in_pieces``."""
        count = self.read_into(offset, buffer)
        for start in range(0, len(buffer), piece_bytes):
            piece = buffer[start : start + piece_bytes]
            if start + len(piece) <= count:
                have(piece)
        return count

    def read_vector(self, offset: int, buffers: Sequence[Buffer]) -> int:
        """See ``Source.read_vector``."""
        done = 0
        for buffer in buffers:
            memory = memoryview(buffer).cast("B")
            count = self.read_into(offset + done, memory)
            done += count
            if count < len(memory):
                break
        return done

    def read(self, offset: int, size_bytes: int) -> bytes:
        """See ``Source.read``."""
        return bytes(self._data[offset : offset + size_bytes])

    def close(self) -> None:
        """See ``Source.close``."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _fail(operation: str, name: str, number: int) -> NoReturn:
    cause = OSError(number, os.strerror(number), name)
    msg = f"{operation} {name}: {os.strerror(number)}"
    raise StorageError(msg, operation=operation, path=name, errno=number) from cause
