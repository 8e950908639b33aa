"""The only module that touches the filesystem.

Everything durable follows one order: write, fsync, close, then make the name appear
(rename or link), then fsync the directory. A failed fsync is never tried again: the
kernel has already dropped the pages, and a second call would report success.
(Rebello et al., "Can Applications Recover from fsync Failures?", ATC 2020.)

A file that is read is never a link, and never blocks as a FIFO would; deleting works
relative to open directories, so that nothing outside them can be reached.

Every call can be seen by other threads while it runs (``calls.py``).
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, NoReturn

from distckpt import words
from distckpt.calls import watched
from distckpt.errors import StorageError, UnsafeCheckpointError
from distckpt.storage.store import Buffer, Room

_READ_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
_CREATE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW
# What one vectored call may carry: buffers (IOV_MAX) and bytes.
_MAX_BUFFERS = 1024
_MAX_CALL_BYTES = 16 * 2**20
# How much is read between two signs of progress.
_NOTED_BYTES = 4 * 2**20
_SYNC_BYTES = 2**30
# How much is written before the disk is told to begin with it.
_WRITE_BACK_BYTES = 16 * 2**20
# What direct writes must be multiples of: memory, offset and length. More than any disk's
# sector, as much as a page.
DIRECT_BYTES = 4096

_LIBC = ctypes.CDLL(None, use_errno=True)
_FALLOC_FL_KEEP_SIZE = 1
_SYNC_FILE_RANGE_WRITE = 2
_AT_FDCWD = -100
_RENAME_NOREPLACE = 1
_NOT_HERE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.ESPIPE)


def make_directory(path: str) -> None:
    """Make one new directory; fails if the path exists."""
    with _reported("mkdir", path):
        os.mkdir(path)


def make_directories(path: str) -> None:
    """Make a directory and its parents, where missing, and make them durable."""
    missing = []
    current = os.path.abspath(path)
    while not is_directory(current):
        missing.append(current)
        parent = os.path.dirname(current)
        if parent == current:
            break
        current = parent
    for directory in reversed(missing):
        with _reported("mkdir", directory):
            # Another process may be making the same parents.
            os.makedirs(directory, exist_ok=True)
        sync_directory(os.path.dirname(directory))


def sync_directory(path: str) -> None:
    """Make the names in a directory durable."""
    with _reported("fsync", path):
        descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def write_new_file(path: str, data: bytes) -> None:
    """Create a file that must not exist, with this content, durably.

    The directory is not synced: the caller does so once for all names it adds.
    """
    with NewFile(path) as file:
        file.write_at(0, [data])
        file.finish(len(data))


class NewFile:
    """A file that is created exclusively, written once and made durable.

    Args:
        path: Where; nothing may be there.
        size_bytes: How large it will be, if that is known: then a full disk is found at
            once, where the filesystem can tell.
        direct: Write past the page cache, where the filesystem can. It costs hardly any
            processor time, but leaves nothing in the cache for a reader. Buffers, offsets
            and lengths must be multiples of ``DIRECT_BYTES``.
    """

    def __init__(self, path: str, size_bytes: int = 0, direct: bool = False) -> None:
        self.path = path
        self._size_bytes = size_bytes
        self._unsynced_bytes = 0
        self._write_back_from = 0
        self._can_write_back = hasattr(_LIBC, "sync_file_range")
        with _reported("open", path):
            self._descriptor = os.open(path, _CREATE_FLAGS, 0o666)
        try:
            self._is_padded = direct
            self._is_direct = direct and self._set_direct(True)
            self._reserve(size_bytes)
        except BaseException:
            os.close(self._descriptor)
            raise

    def _set_direct(self, on: bool) -> bool:
        # Not when it is opened: a filesystem that cannot do it would say so only when it
        # has made the file.
        flag = getattr(os, "O_DIRECT", 0)
        if flag:
            with suppress(OSError):
                flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
                flags = flags | flag if on else flags & ~flag
                fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags)
                return True
        return False

    def _reserve(self, size_bytes: int) -> None:
        """Have the filesystem set space aside, so that a full one says so at once."""
        if not size_bytes or not hasattr(_LIBC, "fallocate"):
            return
        with _reported("fallocate", self.path, size_bytes):
            _call_libc(
                _LIBC.fallocate,
                ctypes.c_int(self._descriptor),
                ctypes.c_int(_FALLOC_FL_KEEP_SIZE),
                ctypes.c_int64(0),
                ctypes.c_int64(size_bytes),
            )

    def write_at(self, offset: int, buffers: Sequence[Buffer]) -> None:
        """Write buffers one behind the other, from an offset on, to the last byte."""
        for batch in _batches(buffers):
            size = sum(map(len, batch))
            with _reported("write", self.path, self._size_bytes):
                written = self._write_vector(batch, offset)
                if written < size:
                    self._write_rest(batch, written, offset)
            offset += size
            if not self._is_direct:
                self._write_back(offset)
            self._sync_now_and_then(size)

    def _write_vector(self, batch: Sequence[Buffer], offset: int) -> int:
        try:
            return os.pwritev(self._descriptor, batch, offset)
        except OSError as error:
            if not self._is_direct or error.errno != errno.EINVAL:
                raise
            # It took the flag, and cannot do it all the same.
            self._is_direct = False
            self._set_direct(False)
            return os.pwritev(self._descriptor, batch, offset)

    def _write_back(self, offset: int) -> None:
        """Have the disk begin: else all its work is left for the last fsync.

        Measured, ext4: a durable write of 512 MiB takes 0.25 s instead of 0.36 s.
        """
        size = offset - self._write_back_from
        if not self._can_write_back or size < _WRITE_BACK_BYTES:
            return
        with _reported("sync_file_range", self.path):
            self._can_write_back = _call_libc(
                _LIBC.sync_file_range,
                ctypes.c_int(self._descriptor),
                ctypes.c_int64(self._write_back_from),
                ctypes.c_int64(size),
                ctypes.c_uint(_SYNC_FILE_RANGE_WRITE),
            )
        self._write_back_from = offset

    def _sync_now_and_then(self, size_bytes: int) -> None:
        """Keep the last fsync short.

        One call for all of a large file would take minutes, and could not be told from
        one that hangs.
        """
        self._unsynced_bytes += size_bytes
        if self._unsynced_bytes >= _SYNC_BYTES:
            self._unsynced_bytes = 0
            with _reported("fsync", self.path):
                os.fdatasync(self._descriptor)

    def _write_rest(self, batch: Sequence[Buffer], written: int, offset: int) -> None:
        # A short write is no error by itself; the next call says what the matter is.
        position = 0
        for buffer in batch:
            end = position + len(buffer)
            while written < end:
                rest = memoryview(buffer).cast("B")[max(written, position) - position :]
                count = os.pwrite(self._descriptor, rest, offset + written)
                if count == 0:
                    raise OSError(errno.EIO, "write wrote nothing")
                written += count
            position = end

    def finish(self, size_bytes: int) -> None:
        """Check the size, sync the content and close, all of them checked.

        Args:
            size_bytes: Of the content; what direct writes have added to it is cut off.
        """
        if self._is_padded:
            with _reported("truncate", self.path):
                os.ftruncate(self._descriptor, size_bytes)
        with _reported("fstat", self.path):
            found = os.fstat(self._descriptor).st_size
        if found != size_bytes:
            msg = f"{self.path}: wrote {size_bytes} bytes, the file has {found}."
            raise StorageError(msg, operation="fstat", path=self.path)
        with _reported("fsync", self.path):
            os.fsync(self._descriptor)
        descriptor, self._descriptor = self._descriptor, -1
        with _reported("close", self.path):
            os.close(descriptor)

    def __enter__(self) -> NewFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            # Only reached when something failed already; that error is the one to see.
            with suppress(OSError):
                os.close(descriptor)


def can_write_directly(path: str) -> bool:
    """Try out, with a new small file, whether writes go past the page cache."""
    with NewFile(path, direct=True) as file:
        file.write_at(0, [memoryview(mmap.mmap(-1, DIRECT_BYTES))])
        is_direct = file._is_direct
        file.finish(1)
    return is_direct


class OpenFile:
    """A regular file open for reading by offset.

    Attributes:
        path: Its path, for messages.
        size_bytes: Its size when it was opened.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        with _reported("open", path):
            try:
                self._descriptor = os.open(path, _READ_FLAGS)
            except OSError as error:
                if error.errno == errno.ELOOP:
                    msg = (
                        f"{path} is a symbolic link; checkpoints are read from files only."
                    )
                    raise UnsafeCheckpointError(msg) from error
                raise
        try:
            with _reported("fstat", path):
                status = os.fstat(self._descriptor)
            if not stat.S_ISREG(status.st_mode):
                msg = f"{path} is not a regular file; nothing of it is read."
                raise UnsafeCheckpointError(msg)
        except BaseException:
            self.close()
            raise
        self.size_bytes = status.st_size

    def expect_in_order(self) -> None:
        """Tell the system that the file will be read from its start to its end."""
        # Advice: one that is not taken does no harm.
        with suppress(AttributeError, OSError):
            os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_SEQUENTIAL)

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Fill a buffer from an offset on; returns fewer bytes only at the file's end."""
        return self.read_in_pieces(offset, buffer, _NOTED_BYTES, _take_no_notice)

    def read_in_pieces(
        self,
        offset: int,
        buffer: memoryview,
        piece_bytes: int,
        have: Callable[[memoryview], None],
    ) -> int:
        """Fill a buffer from an offset on, a piece at a time.

        Args:
            offset: In the file.
            buffer: Filled whole, but for the file's end.
            piece_bytes: How much is read by one call.
            have: Called with each piece that is there as a whole, while it still lies in
                the processor's cache.

        Returns:
            How many bytes came; fewer only at the file's end.
        """
        done, size = 0, len(buffer)
        while done < size:
            # Seen from other threads as one call for many pieces: to note each of a hundred
            # kilobytes takes a tenth of the time of reading it.
            stop = min(done + _NOTED_BYTES, size)
            with _reported("read", self.path):
                while done < stop:
                    piece = buffer[done : min(done + piece_bytes, stop)]
                    count = self._read_piece(piece, offset + done)
                    if count < len(piece):
                        return done + count
                    have(piece)
                    done += count
        return done

    def _read_piece(self, piece: memoryview, offset: int) -> int:
        count = os.preadv(self._descriptor, [piece], offset)
        while 0 < count < len(piece):
            more = os.preadv(self._descriptor, [piece[count:]], offset + count)
            if more == 0:
                break
            count += more
        return count

    def read_vector(self, offset: int, buffers: Sequence[Buffer]) -> int:
        """Fill buffers one behind the other; fewer bytes only at the file's end."""
        with _reported("read", self.path):
            count = os.preadv(self._descriptor, buffers, offset)
        done = 0
        for buffer in buffers:
            # Nearly always all of it came at once.
            if count - done < len(buffer):
                rest = memoryview(buffer).cast("B")[max(0, count - done) :]
                count += self.read_into(offset + max(done, count), rest)
                if count < done + len(buffer):
                    break
            done += len(buffer)
        return count

    def read(self, offset: int, size_bytes: int) -> bytes:
        """Read bytes from an offset on; fewer only at the file's end."""
        buffer = bytearray(size_bytes)
        count = self.read_into(offset, memoryview(buffer))
        return bytes(buffer[:count])

    def close(self) -> None:
        """Close the file."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            # Nothing was written: what close says cannot concern the bytes that were read.
            with suppress(OSError):
                os.close(descriptor)

    def __enter__(self) -> OpenFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def read_file(path: str, max_size_bytes: int) -> bytes:
    """Read a whole regular file from one open descriptor.

    Raises:
        StorageError: It cannot be read, or is larger than ``max_size_bytes``.
        UnsafeCheckpointError: It is a link, a device, a FIFO.
    """
    with OpenFile(path) as file:
        if file.size_bytes > max_size_bytes:
            msg = f"{path}: {file.size_bytes} bytes, more than {max_size_bytes}."
            raise StorageError(msg, operation="read", path=path, errno=errno.EFBIG)
        return file.read(0, file.size_bytes)


def exists(path: str) -> bool:
    """Tell whether a name exists, asking by name, whatever it is."""
    with _reported("lstat", path), suppress(FileNotFoundError, NotADirectoryError):
        os.lstat(path)
        return True
    return False


def link_target(path: str) -> str | None:
    """Return the absolute path that a link leads to; None for what is no link."""
    with _reported("lstat", path), suppress(FileNotFoundError, NotADirectoryError):
        if stat.S_ISLNK(os.lstat(path).st_mode):
            return os.path.realpath(path)
    return None


def is_directory(path: str) -> bool:
    """Tell whether a path is a directory (or a link to one)."""
    with _reported("stat", path):
        return os.path.isdir(path)


def list_directory(path: str) -> list[str]:
    """List the names in a directory, sorted; empty if there is no such directory."""
    with _reported("list", path), suppress(FileNotFoundError):
        return sorted(os.listdir(path))
    return []


def replace_file(path: str, data: bytes) -> None:
    """Write a file, in place of what has its name; whole or not at all."""
    temporary = f"{path}.{os.urandom(4).hex()}.partial"
    try:
        write_new_file(temporary, data)
        rename(temporary, path)
    except StorageError:
        with suppress(StorageError):
            remove_file(temporary)
        raise


def append_to_file(path: str, data: bytes) -> None:
    """Append to a file, made if it is not there; not durable, for what may be lost."""
    with _reported("append", path):
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
        descriptor = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        try:
            os.write(descriptor, data)
        finally:
            os.close(descriptor)


def link(source: str, target: str) -> None:
    """Give a file a second name that must not exist: compare-and-swap on any disk."""
    with _reported("link", target):
        os.link(source, target, follow_symlinks=False)


def rename(source: str, target: str) -> None:
    """Rename, replacing a file of the target's name."""
    with _reported("rename", target):
        os.rename(source, target)


def rename_new(source: str, target: str) -> None:
    """Rename a file or directory; fails if the target's name exists.

    Where the system cannot do both in one step, the name is looked for first.
    """
    with _reported("rename", target):
        if hasattr(_LIBC, "renameat2") and _call_libc(
            _LIBC.renameat2,
            ctypes.c_int(_AT_FDCWD),
            os.fsencode(source),
            ctypes.c_int(_AT_FDCWD),
            os.fsencode(target),
            ctypes.c_uint(_RENAME_NOREPLACE),
        ):
            return
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), target)
        os.rename(source, target)


def remove_file(path: str) -> None:
    """Remove a file; it is no error if it is gone already."""
    with _reported("unlink", path), suppress(FileNotFoundError):
        os.unlink(path)


def remove_tree(path: str) -> None:
    """Remove a directory and all in it, never following a link out of it."""
    # File by file, so that many large ones are not taken for one call that hangs.
    with suppress(StorageError):
        _remove_files(path)
    with _reported("remove", path), suppress(FileNotFoundError):
        if not shutil.rmtree.avoids_symlink_attacks:
            raise OSError(errno.ENOTSUP, "no race-free way to delete a directory here")
        shutil.rmtree(path)


def _remove_files(directory: str) -> None:
    """Remove what can be removed directly in a directory, relative to it."""
    with _reported("open", directory):
        descriptor = os.open(
            directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        )
    try:
        with _reported("list", directory):
            names = os.listdir(descriptor)
        for name in names:
            with _reported("unlink", f"{directory}/{name}"), suppress(OSError):
                os.unlink(name, dir_fd=descriptor)
    finally:
        os.close(descriptor)


def room(path: str) -> Room:
    """Return what this user may still write to a filesystem."""
    with _reported("statvfs", path):
        status = os.statvfs(path)
    num_files = status.f_favail if status.f_files else None
    return Room(status.f_bavail * status.f_frsize, num_files)


def modified(path: str) -> float:
    """Return when a file was last written, by the filesystem's clock."""
    with _reported("stat", path):
        return os.stat(path).st_mtime


def touch(path: str) -> None:
    """Note on a file that is there that it was written now, by the filesystem's clock."""
    with _reported("utime", path):
        os.utime(path, follow_symlinks=False)


def is_writable_by_others(path: str) -> bool:
    """Tell whether any user may rename and delete in a directory; False if it is none."""
    with _reported("stat", path), suppress(FileNotFoundError):
        mode = os.stat(path).st_mode
        return bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX
    return False


def _take_no_notice(_: memoryview) -> None:
    """Let a piece that was read pass."""


def _batches(
    buffers: Sequence[Buffer],
) -> Iterator[list[Buffer]]:
    if len(buffers) <= _MAX_BUFFERS and sum(map(len, buffers)) <= _MAX_CALL_BYTES:
        yield [*buffers]
        return
    batch: list[Buffer] = []
    size = 0
    for buffer in buffers:
        for start in range(0, len(buffer), _MAX_CALL_BYTES):
            part = buffer[start : start + _MAX_CALL_BYTES]
            if batch and (len(batch) == _MAX_BUFFERS or size + len(part) > _MAX_CALL_BYTES):
                yield batch
                batch, size = [], 0
            batch.append(part)
            size += len(part)
    if batch:
        yield batch


def _call_libc(function: Any, *arguments: Any) -> bool:
    """Call what has no place in ``os``; False if the filesystem does not know it."""
    if function(*arguments) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NOT_HERE:
        return False
    raise OSError(number, os.strerror(number))


@contextmanager
def _reported(operation: str, path: str, needed_bytes: int = 0) -> Iterator[None]:
    """Let a call be seen while it runs, and say which one it was if it fails.

    Args:
        operation: The call.
        path: On what.
        needed_bytes: How large a file becomes, for the message of a full disk; 0 if that
            is not known.
    """
    with watched(operation, path):
        try:
            yield
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            _fail(operation, path, error, needed_bytes)


def _fail(operation: str, path: str, error: OSError, needed_bytes: int) -> NoReturn:
    reason = error.strerror or str(error)
    hint = ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        with suppress(OSError):
            status = os.statvfs(os.path.dirname(path) or ".")
            needed = f"{words.size(needed_bytes)} needed, " if needed_bytes else ""
            free = words.size(status.f_bavail * status.f_frsize)
            inodes = words.count(status.f_favail, "inode")
            hint = f" ({needed}{free} and {inodes} are free there)"
    msg = f"{operation} {path}: {reason}{hint}"
    raise StorageError(msg, operation=operation, path=path, errno=error.errno) from error
