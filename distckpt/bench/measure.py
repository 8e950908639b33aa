"""What is measured around an attempt: bytes moved, memory, and the state of the caches."""

from __future__ import annotations

import ctypes
import gc
import os
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType

_SETTLED_BYTES = 16 << 20
_DROP_CACHES = "/proc/sys/vm/drop_caches"
_SAMPLE_SECONDS = 0.02


@dataclass(frozen=True, slots=True)
class Moved:
    """What this process has moved so far, as the kernel counts it; zeros elsewhere.

    Attributes:
        written: Through ``write`` and its like, into the page cache or past it.
        read: Through ``read`` and its like; what is mapped is not counted.
        disk_written: Made dirty in the page cache, or written past it.
        disk_read: Fetched from the device.
    """

    written: int
    read: int
    disk_written: int
    disk_read: int

    def since(self, before: Moved) -> Moved:
        """Return what was moved between two readings."""
        return Moved(
            self.written - before.written,
            self.read - before.read,
            self.disk_written - before.disk_written,
            self.disk_read - before.disk_read,
        )


def moved() -> Moved:
    """Read this process's counters."""
    counters: dict[str, int] = {}
    with suppress(OSError), open("/proc/self/io") as file:
        for line in file:
            name, _, value = line.partition(":")
            counters[name] = int(value)
    names = ("wchar", "rchar", "write_bytes", "read_bytes")
    return Moved(*(counters.get(name, 0) for name in names))


def settle(limit_seconds: float = 5.0) -> None:
    """Write back what is dirty, so that one save does not pay for what was before it.

    Other programs may go on writing, so the wait is bounded.
    """
    os.sync()
    deadline = time.monotonic() + limit_seconds
    while _unwritten_bytes() > _SETTLED_BYTES and time.monotonic() < deadline:
        time.sleep(0.05)


def _unwritten_bytes() -> int:
    fields = memory_fields()
    return fields.get("Dirty", 0) + fields.get("Writeback", 0)


def memory_fields() -> dict[str, int]:
    """Return the host's memory figures in bytes; none where there is no /proc."""
    fields: dict[str, int] = {}
    with suppress(OSError), open("/proc/meminfo") as file:
        for line in file:
            name, _, rest = line.partition(":")
            words = rest.split()
            if words and words[-1] == "kB":
                fields[name] = int(words[0]) * 1024
    return fields


def can_drop_caches() -> bool:
    """Tell whether the whole page cache can be dropped here."""
    return os.geteuid() == 0 and os.access(_DROP_CACHES, os.W_OK)


def cold_method() -> str:
    """Say how ``cool`` empties the page cache."""
    return "drop_caches" if can_drop_caches() else "posix_fadvise(DONTNEED)"


def cool(folder: str) -> None:
    """Have the files of a folder read from the device next time."""
    os.sync()
    if can_drop_caches():
        with open(_DROP_CACHES, "w") as file:
            file.write("3")
        return
    for path in files_in(folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def warm(folder: str) -> None:
    """Have the files of a folder in the page cache, however they were written."""
    buffer = bytearray(4 << 20)
    for path in files_in(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def files_in(folder: str) -> Iterator[str]:
    """Return every file below a folder, in the same order everywhere."""
    for parent, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            path = os.path.join(parent, name)
            if os.path.isfile(path):
                yield path


def release_memory() -> None:
    """Give back what Python and the C library hold without using it."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def memory_bytes() -> int:
    """Return this process's share of the memory (PSS), shared pages by their parts."""
    with suppress(OSError), open("/proc/self/smaps_rollup") as file:
        for line in file:
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    return 0


class PeakMemory:
    """Sample this process's memory in a thread, and keep the largest."""

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()
        self._look()

    def _sample(self) -> None:
        while not self._stop.wait(_SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        self.peak_bytes = max(self.peak_bytes, memory_bytes())
