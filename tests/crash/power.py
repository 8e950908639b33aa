"""A disk whose power can be cut: a filesystem on a loop device, shut down as by a crash.

``FS_IOC_SHUTDOWN`` stops the filesystem at once: what is not on the disk by then is lost.
Mounting it again replays the journal, as after a real power cut.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from storage_calls import MIDDLE, Call, Killer

_SHUTDOWN = 0x8004587D  # _IOR('X', 125, __u32), linux/fs.h
# What is written out first: everything; the journal, so that names survive that were not
# synced, without content; nothing.
ALL_SYNCED, LOG_FLUSHED, LOG_LOST = 0, 1, 2
MODES = (ALL_SYNCED, LOG_FLUSHED, LOG_LOST)

EXT4, XFS = "ext4", "xfs"
_MIB = 2**20
# The image is sparse: what is not written takes no room. mkfs.xfs makes no smaller one.
_SIZE_BYTES = {EXT4: 48 * _MIB, XFS: 300 * _MIB}
_MAKE = {EXT4: ["mkfs.ext4", "-q", "-F"], XFS: ["mkfs.xfs", "-q", "-f"]}
# Two disks with one identity may be mounted: the one that was cut, where somebody holds it,
# and its copy.
_OPTIONS = {EXT4: "loop", XFS: "loop,nouuid"}


class NoPowerSwitch(Exception):
    """This machine cannot mount such a disk."""


@contextmanager
def mounted_disk(image: str, path: str, kind: str = EXT4) -> Iterator[Disk]:
    """Make a filesystem in a file and mount it."""
    disk = Disk(image, path, kind)
    command = _MAKE[kind]
    if shutil.which(command[0]) is None:
        msg = f"{command[0]} is not installed"
        raise NoPowerSwitch(msg)
    with open(image, "wb") as file:
        file.truncate(_SIZE_BYTES[kind])
    subprocess.run([*command, image], check=True, stdout=subprocess.DEVNULL)
    os.makedirs(path, exist_ok=True)
    try:
        disk.mount()
    except subprocess.CalledProcessError as error:
        msg = f"a loop device cannot be mounted here: {error.stderr.strip()}"
        raise NoPowerSwitch(msg) from error
    try:
        yield disk
    finally:
        disk.unmount()


@dataclass(frozen=True, slots=True)
class Disk:
    """A filesystem in a file, mounted at a path."""

    image: str
    path: str
    kind: str = EXT4

    def mount(self) -> None:
        """Mount it; replays the journal."""
        command = ["mount", "-o", _OPTIONS[self.kind], self.image, self.path]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def unmount(self) -> None:
        """Unmount it, even if some process looks into it."""
        subprocess.run(["umount", "--lazy", self.path], check=True)

    def cut(self, mode: int) -> None:
        """Cut the power."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", mode))
        finally:
            os.close(descriptor)

    def switch_on(self) -> None:
        """Come back after a cut.

        The kernel keeps the filesystem that was cut for as long as somebody holds it: a
        process that looks into it, or one with a mount namespace of its own, such as a
        container or a FUSE daemon that was started meanwhile. Mounting the image then gives
        just that filesystem again. A copy of the image is another disk to the kernel, and
        holds what was on the disk at the cut.
        """
        self.unmount()
        self.mount()
        if self._is_up():
            return
        self.unmount()
        copy = f"{self.image}.copy"
        subprocess.run(["cp", "--sparse=always", self.image, copy], check=True)
        os.replace(copy, self.image)
        self.mount()
        if not self._is_up():
            raise OSError(
                errno.EIO, "a disk does not come back after a power cut", self.path
            )

    def _is_up(self) -> bool:
        try:
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            return False
        return True


@dataclass(slots=True)
class Cutter(Killer):
    """A hook that cuts the power at one call, and ends this process."""

    disk: Disk | None = None
    mode: int = LOG_LOST

    def __call__(self, call: Call) -> Any:
        """Run the call, or cut the power before or in the middle of it."""
        index, self.num_calls = self.num_calls, self.num_calls + 1
        if index != self.index:
            return call.run()
        if self.where == MIDDLE and call.has_middle:
            call.run_half()
        assert self.disk is not None
        self.disk.cut(self.mode)
        os.kill(os.getpid(), signal.SIGKILL)
        return None
