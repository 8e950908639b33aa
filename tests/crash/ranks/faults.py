"""Hard errors that one rank brings about for real, and takes away again.

Nothing of the library or of ``os`` is replaced: the operating system says no. A fault is
made in the test, sent to the ranks and begun and ended in one of them.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import resource
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from typing import Any

from power import LOG_FLUSHED, Disk

from distckpt import paths, readers
from distckpt.run_directory import RunDirectory

_NEW_NAMESPACE = 0x00020000  # CLONE_NEWNS, linux/sched.h
_RECURSIVE_PRIVATE = 0x4000 | 0x40000  # MS_REC | MS_PRIVATE, linux/mount.h
_FREEZE, _THAW = 0xC0045877, 0xC0045878  # FIFREEZE, FITHAW, linux/fs.h
_NOBODY = 65534


class Fault:
    """Something that goes wrong on one rank, from ``begin`` to ``end``.

    Attributes:
        reason: What the operating system then says.
    """

    reason = ""

    def missing(self) -> str:
        """Say, in the test's process, what this machine lacks for it."""
        return ""

    def prepare(self) -> None:
        """Do, on the rank that it will happen on, what must come before the manager."""

    def begin(self, directory: str, rank: int) -> None:
        """Let it happen from now on to a run directory."""

    def end(self) -> None:
        """Take the cause away."""


def names_in(directory: str, rank: int) -> dict[str, str]:
    """Say how the paths are called, in a save at its capture, that a fault may be about."""
    record = readers.read_record(RunDirectory.at(directory))
    number = 0 if record is None else record.number
    live = [] if record is None else [entry.attempt for entry in record.live]
    pending = [paths.parse_pending(name) for name in os.listdir(directory)]
    names = {
        "directory": "",
        "state": paths.RECORDS_DIRECTORY,
        "record": os.path.join(paths.RECORDS_DIRECTORY, paths.record_file(number + 1)),
        "newest_record": os.path.join(paths.RECORDS_DIRECTORY, paths.record_file(number)),
        "copy": paths.STATE_FILE,
    }
    if live:
        names |= {"oldest": live[0].published, "newest": live[-1].published}
        names["trash"] = live[0].trash
    for attempt in filter(None, pending):
        names |= {"pending": attempt.pending, "published": attempt.published}
    found = {key: os.path.join(directory, name) for key, name in names.items()}
    found["directory"] = directory
    found["rank"] = str(rank)
    return found


class Injected(Fault):
    """System calls of this process fail, as strace makes them: all its threads.

    Args:
        calls: Which, as strace names them.
        path: On which path only; names of ``names_in`` in braces.
        error: What they report.
        when: Which of them, in strace's words: ``"2"``, ``"2+"``; counted by thread.
        result: What they return without having done anything, instead of an error.
    """

    def __init__(
        self,
        calls: str,
        path: str = "",
        *,
        error: str = "EIO",
        when: str = "1+",
        result: int | None = None,
    ) -> None:
        self._calls, self._path = calls, path
        outcome = f"error={error}" if result is None else f"retval={result}"
        self._what = f"inject={calls}:{outcome}:when={when}"
        self.reason = os.strerror(getattr(errno, error))
        self._strace: subprocess.Popen[str] | None = None

    def missing(self) -> str:
        return _no_strace()

    def begin(self, directory: str, rank: int) -> None:
        command = ["strace", "-f", "-p", str(os.getpid()), "-e", self._what]
        command += ["-e", f"trace={self._calls}"]
        if self._path:
            command += ["-P", self._path.format(**names_in(directory, rank))]
        self._strace = _attached(command)

    def end(self) -> None:
        assert self._strace is not None
        said = _detach(self._strace)
        assert "(INJECTED)" in said, f"{self._what} never happened: {said}"


def _attached(command: Sequence[str]) -> subprocess.Popen[str]:
    """Start strace and wait until it holds every thread."""
    strace = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert strace.stderr is not None
    said = []
    for line in strace.stderr:
        if "attached" in line:
            return strace
        said.append(line)
    strace.wait()
    strace.stderr.close()
    raise OSError(errno.EPERM, "".join(said))


def _detach(strace: subprocess.Popen[str]) -> str:
    """End it; returns what it has traced."""
    strace.send_signal(signal.SIGTERM)
    return strace.communicate()[1]


@lru_cache
def _no_strace() -> str:
    if shutil.which("strace") is None:
        return "strace is not installed"
    sleeper = subprocess.Popen(["sleep", "60"])
    try:
        _detach(_attached(["strace", "-p", str(sleeper.pid)]))
    except OSError as error:
        return f"strace may not attach here: {error}"
    finally:
        sleeper.kill()
        sleeper.wait()
    return ""


class Permission(Fault):
    """The process may not write what only root may."""

    reason = os.strerror(errno.EACCES)

    def missing(self) -> str:
        return "" if os.geteuid() == 0 else "only root can drop its rights"

    def begin(self, directory: str, rank: int) -> None:
        os.setegid(_NOBODY)
        os.seteuid(_NOBODY)

    def end(self) -> None:
        os.seteuid(0)
        os.setegid(0)


class FileSize(Fault):
    """No file of this process may be larger: the last bytes of one do not fit."""

    reason = os.strerror(errno.EFBIG)

    def __init__(self, size_bytes: int) -> None:
        self._size_bytes = size_bytes

    def begin(self, directory: str, rank: int) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_FSIZE)
        limits = (self._size_bytes, self._before[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def end(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._before)


class Descriptors(Fault):
    """The process has as many open files as it may."""

    reason = os.strerror(errno.EMFILE)

    def begin(self, directory: str, rank: int) -> None:
        self._before = resource.getrlimit(resource.RLIMIT_NOFILE)
        # The three that are never given back, and not the lowest that is free now: what
        # another thread closes meanwhile (the history's, a collective's) would be one more.
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, self._before[1]))

    def end(self) -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, self._before)


class _Mounts(Fault):
    """Something is mounted over the run directory, or over a part of it."""

    def __init__(self) -> None:
        self._mounted: list[str] = []

    def missing(self) -> str:
        return no_mounts()

    def _bind(self, source: str, target: str) -> None:
        run("mount", "--bind", source, target)
        self._mounted.append(target)

    def end(self) -> None:
        while self._mounted:
            _unmount(self._mounted.pop())


def _unmount(target: str) -> None:
    """Unmount; whatever still looks into it for a moment (udev, a thread) is waited for."""
    deadline = time.monotonic() + 5.0
    while True:
        try:
            run("umount", target)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


class _OwnMounts(_Mounts):
    """The same, but only this rank sees it."""

    def prepare(self) -> None:
        # Threads that are made later are in the same namespace.
        libc = ctypes.CDLL(None, use_errno=True)
        _checked(libc.unshare(_NEW_NAMESPACE))
        _checked(libc.mount(b"none", b"/", None, _RECURSIVE_PRIVATE, None))


def _checked(result: int) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


class ReadOnly(_Mounts):
    """The run directory is mounted read-only, for all."""

    reason = os.strerror(errno.EROFS)

    def begin(self, directory: str, rank: int) -> None:
        self._bind(directory, directory)
        run("mount", "-o", "remount,bind,ro", directory)


class ReadOnlyHere(ReadOnly, _OwnMounts):
    """The run directory is mounted read-only, on this rank's host."""


class Hidden(_OwnMounts):
    """This rank's host sees an empty directory where there is a checkpoint."""

    reason = os.strerror(errno.ENOENT)

    def begin(self, directory: str, rank: int) -> None:
        newest = names_in(directory, rank)["newest"]
        run("mount", "-t", "tmpfs", "-o", "size=4k", "tmpfs", newest)
        self._mounted.append(newest)


class Elsewhere(_OwnMounts):
    """This rank's host sees another directory than the chief's."""

    reason = "not the chief's directory"

    def begin(self, directory: str, rank: int) -> None:
        run("mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", directory)
        self._mounted.append(directory)


class TruncatedHere(_OwnMounts):
    """This rank's host sees a shard file, its own one, without its end."""

    reason = "bytes"

    def begin(self, directory: str, rank: int) -> None:
        path = _shard(directory, rank)
        short = os.path.join(os.path.dirname(directory), "short")
        shutil.copyfile(path, short)
        os.truncate(short, os.path.getsize(short) - 1)
        self._bind(short, path)


class Truncated(Fault):
    """A shard file of the newest checkpoint, this rank's, has lost its end for good."""

    reason = "bytes"

    def begin(self, directory: str, rank: int) -> None:
        path = _shard(directory, rank)
        os.truncate(path, os.path.getsize(path) - 1)


class Missing(Fault):
    """A shard file of the newest checkpoint, this rank's, is away for a while."""

    reason = os.strerror(errno.ENOENT)

    def begin(self, directory: str, rank: int) -> None:
        self._path = _shard(directory, rank)
        self._aside = os.path.join(os.path.dirname(directory), "aside")
        os.rename(self._path, self._aside)

    def end(self) -> None:
        os.rename(self._aside, self._path)


class Unreadable(Permission):
    """A shard file of the newest checkpoint, this rank's, may be read by root only."""

    def begin(self, directory: str, rank: int) -> None:
        os.chmod(_shard(directory, rank), 0o600)
        super().begin(directory, rank)


def _shard(directory: str, rank: int) -> str:
    newest = names_in(directory, rank)["newest"]
    (name,) = [n for n in os.listdir(newest) if n.startswith(f"rank-{rank:05d}")]
    return os.path.join(newest, name)


class FullDisk(Fault):
    """Something else has written the disk full.

    Args:
        leave_bytes: How much is left free.
    """

    reason = os.strerror(errno.ENOSPC)

    def __init__(self, leave_bytes: int = 0) -> None:
        self._leave_bytes = leave_bytes

    def begin(self, directory: str, rank: int) -> None:
        self._filler = os.path.join(os.path.dirname(directory), "filler")
        status = os.statvfs(directory)
        size = status.f_bavail * status.f_frsize - self._leave_bytes
        with open(self._filler, "wb") as file:
            os.posix_fallocate(file.fileno(), 0, size)

    def end(self) -> None:
        os.unlink(self._filler)


class NoInodes(Fault):
    """Something else has used the inodes up.

    Args:
        leave: How many are left.
    """

    reason = os.strerror(errno.ENOSPC)

    def __init__(self, leave: int = 0) -> None:
        self._leave = leave

    def begin(self, directory: str, rank: int) -> None:
        self._folder = os.path.join(os.path.dirname(directory), "fillers")
        os.mkdir(self._folder)
        for index in range(os.statvfs(directory).f_favail - self._leave):
            open(os.path.join(self._folder, str(index)), "xb").close()

    def end(self) -> None:
        shutil.rmtree(self._folder)


class Quota(Fault):
    """The quota of the run directory's subvolume is used up."""

    reason = os.strerror(errno.EDQUOT)

    def begin(self, directory: str, rank: int) -> None:
        volume = os.path.dirname(directory)
        number = run("btrfs", "inspect-internal", "rootid", volume).strip()
        # Through the volume above it, which has no quota.
        self._target = (f"0/{number}", os.path.dirname(volume))
        used = sum(
            os.path.getsize(os.path.join(folder, name))
            for folder, _, names in os.walk(volume)
            for name in names
        )
        run("btrfs", "qgroup", "limit", str(used + 2**20), *self._target)

    def end(self) -> None:
        run("btrfs", "qgroup", "limit", "none", *self._target)


class LittleRoom(FullDisk):
    """Something else has left less than a claim wants."""

    reason = "are free; make room"

    def __init__(self) -> None:
        super().__init__(2**19)


class Several(Fault):
    """Every victim has a fault of its own."""

    def __init__(self, of_rank: dict[int, Fault]) -> None:
        self._of_rank = of_rank

    def missing(self) -> str:
        return "".join(fault.missing() for fault in self._of_rank.values())

    def begin(self, directory: str, rank: int) -> None:
        self._mine = self._of_rank[rank]
        self._mine.begin(directory, rank)

    def end(self) -> None:
        self._mine.end()


class Stopped(Fault):
    """The filesystem has shut itself down, until it is mounted again."""

    reason = os.strerror(errno.EIO)

    def __init__(self, disk: Disk) -> None:
        self.disk = disk

    def begin(self, directory: str, rank: int) -> None:
        self.disk.cut(LOG_FLUSHED)


class Immutable(Fault):
    """The oldest checkpoint cannot be deleted: somebody has protected it."""

    reason = os.strerror(errno.EPERM)

    def missing(self) -> str:
        if shutil.which("chattr") is None:
            return "chattr is not installed"
        return "" if os.geteuid() == 0 else "only root can protect files"

    def begin(self, directory: str, rank: int) -> None:
        self._path = names_in(directory, rank)["oldest"]
        run("chattr", "+i", self._path)

    def end(self) -> None:
        run("chattr", "-i", self._path)


class Frozen(Fault):
    """The filesystem does not answer: who writes waits until it is over."""

    def begin(self, directory: str, rank: int) -> None:
        self._disk = os.path.dirname(directory)
        freeze(self._disk)

    def end(self) -> None:
        thaw(self._disk)


class FrozenHere(_OwnMounts):
    """What this rank's host has mounted there does not answer when a shard is written.

    Args:
        disk: Where another filesystem is mounted.
    """

    reason = "did not come back"

    def __init__(self, disk: str) -> None:
        super().__init__()
        self._disk = disk

    def begin(self, directory: str, rank: int) -> None:
        self._bind(self._disk, names_in(directory, rank)["pending"])
        freeze(self._disk)

    def end(self) -> None:
        # The mount itself went when the chief removed what was below it, or goes with
        # the rank.
        thaw(self._disk)


def freeze(path: str) -> None:
    """Let a filesystem not answer those who write to it."""
    _control(path, _FREEZE)


def thaw(path: str) -> None:
    """Let a filesystem answer again, if it was frozen."""
    with suppress(OSError):
        _control(path, _THAW)


def _control(path: str, request: int) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        fcntl.ioctl(descriptor, request, struct.pack("i", 0))
    finally:
        os.close(descriptor)


def run(*command: str) -> str:
    """Run a command and return its output; its error output is the error."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(errno.EIO, f"{' '.join(command)}: {done.stderr.strip()}")
    return done.stdout


@lru_cache
def no_mounts() -> str:
    """Say why nothing can be mounted here."""
    if shutil.which("unshare") is None:
        return "there is no unshare command here"
    # In a namespace of its own, that ends with the command.
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "tmpfs", "/mnt"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return f"nothing can be mounted here: {done.stderr.strip()}" if done.returncode else ""


def unmount_below(folder: str) -> None:
    """Take away what a rank had mounted that was killed before it came to it."""
    with open("/proc/self/mounts", encoding="utf-8") as file:
        targets = [line.split()[1] for line in file]
    for target in reversed(targets):
        if target.startswith(folder + os.sep):
            run("umount", "--lazy", target)


class CannotMount(Exception):
    """This machine cannot mount such a disk."""


@contextmanager
def disk_with_quota(folder: str) -> Iterator[str]:
    """Mount a btrfs with quotas; yields a subvolume."""
    if shutil.which("mkfs.btrfs") is None:
        msg = "btrfs-progs is not installed"
        raise CannotMount(msg)
    image, disk = os.path.join(folder, "image"), os.path.join(folder, "disk")
    os.makedirs(disk)
    with open(image, "wb") as file:
        file.truncate(128 * 2**20)
    run("mkfs.btrfs", "-q", image)
    try:
        run("mount", "-o", "loop", image, disk)
    except OSError as error:
        raise CannotMount(str(error)) from error
    try:
        run("btrfs", "quota", "enable", disk)
        volume = os.path.join(disk, "volume")
        run("btrfs", "subvolume", "create", volume)
        yield volume
    finally:
        run("umount", "--lazy", disk)


def open_files() -> list[str]:
    """List what this process's descriptors refer to."""
    found = []
    for name in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue  # the descriptor that listed them
    return sorted(found)


def num_threads() -> int:
    """Count this process's threads, Python's or not."""
    return len(os.listdir("/proc/self/task"))


def unlisted(directory: str) -> list[str]:
    """Name all that is in a run directory and belongs to nothing."""
    import scenario

    record: Any = readers.read_record(RunDirectory.at(directory))
    return scenario.unlisted(directory, record)
