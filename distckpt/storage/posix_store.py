"""The filesystem as a store: each verb as the calls of ``posix.py`` that make it durable.

The order of these calls is what docs/protocol.md proves, and a test holds it against a
record (``tests/multiprocess/test_system_calls.py``).
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import suppress

from distckpt import paths
from distckpt.errors import StorageError
from distckpt.paths import Attempt
from distckpt.storage import posix, posix_findings
from distckpt.storage.lock import DirectoryLock
from distckpt.storage.store import (
    Created,
    Creation,
    Finding,
    Owner,
    Place,
    Room,
    Sink,
    Source,
    Store,
)

# A file of more bytes than anybody writes by ``create`` is not read to settle whose it is.
_MAX_SETTLED_BYTES = 2**26


class PosixStore(Store):
    """The filesystem of this machine; names are absolute paths."""

    def create(self, name: str, data: bytes, scratch: str) -> Creation:
        """See ``Store.create``: a hard link, which must not exist, to a whole file."""
        try:
            # Complete and durable before it gets its name: no reader can ever see half of
            # it.
            posix.write_new_file(scratch, data)
            try:
                posix.link(scratch, name)
            except StorageError as error:
                # EEXIST and lost replies look alike: what the file holds decides.
                settled = _settled(name, data, error)
                if settled.outcome is not Created.MADE:
                    return settled
            try:
                posix.sync_directory(os.path.dirname(name))
            except StorageError as error:
                return Creation(Created.UNKNOWN, error)
        finally:
            with suppress(StorageError):  # left for the sweep of a later claim
                posix.remove_file(scratch)
        return Creation(Created.MADE)

    def replace(self, name: str, data: bytes, scratch: str) -> None:
        """See ``Store.replace``: a rename, which is not synced."""
        try:
            posix.write_new_file(scratch, data)
            posix.rename(scratch, name)
        except StorageError:
            with suppress(StorageError):
                posix.remove_file(scratch)
            raise

    def write(self, name: str, data: bytes) -> None:
        """See ``Store.write``."""
        posix.write_new_file(name, data)

    def read(self, name: str, max_size_bytes: int) -> bytes:
        """See ``Store.read``."""
        return posix.read_file(name, max_size_bytes)

    def note(self, name: str, data: bytes) -> None:
        """See ``Store.note``."""
        posix.append_to_file(name, data)

    def remove(self, folder: str, names: Sequence[str], *, durable: bool = False) -> None:
        """See ``Store.remove``."""
        for name in names:
            posix.remove_file(os.path.join(folder, name))
        if durable:
            posix.sync_directory(folder)

    def exists(self, name: str) -> bool:
        """See ``Store.exists``."""
        return posix.exists(name)

    def is_folder(self, name: str) -> bool:
        """See ``Store.is_folder``."""
        return posix.is_directory(name)

    def link_target(self, name: str) -> str | None:
        """See ``Store.link_target``."""
        return posix.link_target(name)

    def names(self, folder: str) -> list[str]:
        """See ``Store.names``."""
        return posix.list_directory(folder)

    def stamp(self, name: str) -> float:
        """See ``Store.stamp``: the time of the last change, by the filesystem's clock."""
        return posix.modified(name)

    def refresh(self, name: str) -> None:
        """See ``Store.refresh``."""
        posix.touch(name)

    def room(self, folder: str) -> Room:
        """See ``Store.room``."""
        return posix.room(folder)

    def make_folder(self, name: str) -> None:
        """See ``Store.make_folder``; the new names are durable."""
        posix.make_directories(name)

    def check_create(self, folder: str, scratch: str, other: str) -> None:
        """See ``Store.check_create``: a filesystem without hard links is refused."""
        try:
            posix.write_new_file(scratch, b"")
        except StorageError:
            # The next claim of this manager has the same epoch, and would not sweep it.
            with suppress(StorageError):
                posix.remove_file(scratch)
            raise
        try:
            posix.link(scratch, other)
        except StorageError as error:
            msg = (
                f"{folder}: this filesystem has no hard links ({error}); without them two "
                "jobs could commit over each other. Use another filesystem."
            )
            raise StorageError(
                msg, operation="link", path=scratch, errno=error.errno
            ) from error
        finally:
            posix.remove_file(scratch)
            posix.remove_file(other)

    def owner(self, folder: str) -> Owner:
        """See ``Store.owner``: a lock on a file."""
        return DirectoryLock(folder)

    def examine(self, folder: str) -> Iterator[Finding]:
        """See ``Store.examine``."""
        yield posix_findings.filesystem(folder)
        records = os.path.join(folder, paths.RECORDS_DIRECTORY)
        yield posix_findings.permissions([folder, records])

    def try_out(self, folder: str, names: Iterator[str]) -> Iterator[Finding]:
        """See ``Store.try_out``."""
        return posix_findings.Trial(folder, names).run()

    def begin(self, folder: str, attempt: Attempt) -> None:
        """See ``Store.begin``: a hidden directory."""
        # Its name need not be durable: the one that it is published under will be.
        posix.make_directory(os.path.join(folder, attempt.pending))

    def new_shard(
        self, folder: str, attempt: Attempt, file: str, size_bytes: int, is_image: bool
    ) -> Sink:
        """See ``Store.new_shard``; an image goes past the page cache where that works.

        The directory is never made here: where it is gone, another manager took over.
        """
        path = os.path.join(folder, attempt.pending, file)
        return NewShardFile(path, size_bytes, direct=is_image)

    def publish(self, folder: str, attempt: Attempt, manifest: bytes) -> None:
        """See ``Store.publish``: a rename, with everything synced before and after it."""
        pending = os.path.join(folder, attempt.pending)
        posix.write_new_file(os.path.join(pending, paths.MANIFEST_FILE), manifest)
        posix.sync_directory(pending)
        posix.rename(pending, os.path.join(folder, attempt.published))
        posix.sync_directory(folder)

    def discard(self, folder: str, attempt: Attempt) -> None:
        """See ``Store.discard``.

        Renamed and synced first: after a power cut an unsynced ``rm -r`` may be undone in
        part, and a torn attempt must not stand under a published name.
        """
        trash = os.path.join(folder, attempt.trash)
        posix.rename(os.path.join(folder, attempt.published), trash)
        posix.sync_directory(folder)
        posix.remove_tree(trash)

    def clear(self, folder: str, attempt: Attempt, *, is_own: bool = False) -> bool:
        """See ``Store.clear``."""
        pending = os.path.join(folder, attempt.pending)
        trash = os.path.join(folder, attempt.trash)
        if is_own:
            # In place: a disk that refuses to rename must not keep what a failed save left.
            posix.remove_tree(pending)
            posix.remove_tree(trash)
            return True
        was_there = posix.exists(trash)
        if was_there:
            posix.remove_tree(trash)
        if posix.exists(pending):
            was_there = True
            posix.rename(pending, trash)
            posix.remove_tree(trash)
        return was_there

    def unfinished(self, names: Sequence[str]) -> list[Attempt]:
        """See ``Store.unfinished``: of the names that are hidden."""
        found = [paths.parse_pending(name) or paths.parse_trash(name) for name in names]
        return [*dict.fromkeys(attempt for attempt in found if attempt is not None)]

    def open(self, name: str) -> Source:
        """See ``Store.open``."""
        return posix.OpenFile(name)


class NewShardFile(posix.NewFile):
    """A file whose name is durable, too, when it is finished."""

    def finish(self, size_bytes: int) -> None:
        """See ``Sink.finish``."""
        super().finish(size_bytes)
        posix.sync_directory(os.path.dirname(self.path))


def _settled(name: str, data: bytes, error: StorageError) -> Creation:
    """Find out by its bytes whose a file is that could not be created."""
    try:
        found = posix.read_file(name, _MAX_SETTLED_BYTES)
    except StorageError:
        return Creation(Created.UNKNOWN, error)
    return Creation(Created.MADE if found == data else Created.TAKEN, error)


POSIX = PosixStore()


def local(path: str) -> Place:
    """Return the place that an absolute path of this machine names."""
    return Place(POSIX, path)
