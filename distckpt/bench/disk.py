"""What the disk of one directory can do, and what distckpt makes of it: one process."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass

from distckpt.bench.interrupt import clean_up_at_signals, remove
from distckpt.bench.measure import cold_method, memory_fields
from distckpt.bench.results import LIMIT_PREFIX, OURS, ROWS, Series, WorkloadResults
from distckpt.errors import ConfigError
from distckpt.files import free_bytes

_WORKLOAD = "ddp-replicated"
_WORKLOAD_BYTES = 40 * 1024 * 6144 * 4
_PHASES = ("save", "warm", "cold")
_TIMEOUT_SECONDS = 600.0
# One of distckpt's and one of each of four plain ways, one that is being written; and as
# much is left to others.
_COPIES_ON_DISK = 7
# The tensors, and the same aligned, to be written past the page cache.
_COPIES_IN_MEMORY = 2.5


@dataclass(frozen=True, slots=True)
class Figure:
    """One thing that was measured.

    Attributes:
        what: For example ``"save, durable"``.
        ours: Seconds that distckpt took.
        limit: Seconds of the fastest of some plain ways; None if all of them failed.
        limit_by: Which that was.
    """

    what: str
    ours: Series
    limit: Series | None
    limit_by: str


@dataclass(frozen=True, slots=True)
class DiskResults:
    """What was measured in one directory.

    Attributes:
        filesystem: Its type.
        cold_cache_by: How files were made cold.
        size_bytes: Of one checkpoint.
        figures: The figures.
        failure: Why distckpt could not go on; "" if it could.
    """

    filesystem: str
    cold_cache_by: str
    size_bytes: int
    figures: list[Figure]
    failure: str


def check_room(directory: str, size_bytes: int) -> None:
    """Refuse a size that would fill the disk or the memory; without torch.

    Raises:
        ConfigError: Says how much there is.
        StorageError: The directory cannot be asked.
    """
    _check("disk", directory, _COPIES_ON_DISK * size_bytes, free_bytes(directory))
    memory = memory_fields().get("MemAvailable")
    if memory is not None:
        _check("memory", "this host", int(_COPIES_IN_MEMORY * size_bytes), memory)


def _check(what: str, where: str, needed: int, available: int) -> None:
    if needed > available:
        msg = (
            f"this needs {needed / 2**30:.1f} GiB of {what}, and {where} has "
            f"{available / 2**30:.1f} GiB free; give a smaller --size."
        )
        raise ConfigError(msg)


def measure(
    directory: str, size_bytes: int, repeat: int, say: Callable[[str], None]
) -> DiskResults:
    """Save and restore some tensors, and move the same bytes in the plainest ways.

    What is made in the directory is removed again, also if this is interrupted: to be
    called by the main thread.

    Args:
        directory: On the disk in question.
        size_bytes: Of one checkpoint; taken roughly.
        repeat: How often, besides a first time that does not count.
        say: Told what goes on.
    """
    import torch.distributed as dist

    from distckpt.bench.environment import filesystem_of
    from distckpt.bench.phases import Runner
    from distckpt.bench.team import Team
    from distckpt.bench.turns import Options
    from distckpt.bench.workloads import build

    name = f"distckpt-bench-{secrets.token_hex(4)}"
    folder = os.path.join(os.path.abspath(directory), name)
    clean_up_at_signals(folder)
    try:
        os.mkdir(folder)
        team = Team(False, _TIMEOUT_SECONDS, is_alone=True)
        scale = size_bytes / _WORKLOAD_BYTES
        workload = build(_WORKLOAD, scale, team, use_cuda=False)
        found = WorkloadResults(_WORKLOAD, (OURS,))
        options = Options(repeat, _PHASES, (), say)
        Runner(workload, team, os.path.join(folder, "work"), options, found).run()
        return DiskResults(
            filesystem_of(folder),
            cold_method(),
            workload.local_bytes,
            _figures(found),
            found.failures.get(OURS, ""),
        )
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        remove(folder)


def _figures(found: WorkloadResults) -> list[Figure]:
    figures = []
    for row in ROWS:
        ours = found.get(row.key, OURS)
        if row.key in _PHASES and ours is not None:
            name, limit = found.limit(row) or ("", None)
            figures.append(Figure(row.title, ours, limit, name[len(LIMIT_PREFIX) :]))
    return figures
