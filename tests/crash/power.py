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
import time
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
_PATIENCE_SECONDS = 20.0


class NoPowerSwitch(Exception):
    """This machine cannot mount such a disk."""


@contextmanager
def mounted_disk(image: str, path: str, kind: str = EXT4) -> Iterator[Disk]:
    """Make a filesystem in a file and mount it."""
    disk = Disk(image, path)
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
        subprocess.run(["umount", "--lazy", path], check=True)


@dataclass(frozen=True, slots=True)
class Disk:
    """A filesystem in a file, mounted at a path."""

    image: str
    path: str

    def mount(self) -> None:
        """Mount it; replays the journal."""
        command = ["mount", "-o", "loop", self.image, self.path]
        subprocess.run(command, check=True, capture_output=True, text=True)

    def cut(self, mode: int) -> None:
        """Cut the power."""
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            fcntl.ioctl(descriptor, _SHUTDOWN, struct.pack("I", mode))
        finally:
            os.close(descriptor)

    def switch_on(self) -> None:
        """Come back after a cut.

        A process that has made a mount namespace of its own meanwhile holds the filesystem
        that was cut, and mounting its image gives just that again, until it has ended.
        """
        deadline = time.monotonic() + _PATIENCE_SECONDS
        while True:
            subprocess.run(["umount", self.path], check=True)
            self.mount()
            if self._is_up() or time.monotonic() > deadline:
                return
            time.sleep(0.1)

    def _is_up(self) -> bool:
        descriptor = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            return error.errno != errno.EIO
        finally:
            os.close(descriptor)
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
