"""What a run was made on."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import metadata
from typing import Any

import torch

from distckpt.bench.measure import cold_method, memory_fields
from distckpt.bench.peers import version_of
from distckpt.bench.team import Team


def describe(
    directory: str, team: Team, peers: Sequence[str], use_cuda: bool
) -> dict[str, Any]:
    """Return what figures are worth nothing without."""
    return {
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        "distckpt": _own_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "machine": platform.machine(),
        "cpu_count": len(os.sched_getaffinity(0)),
        "memory_bytes": memory_fields().get("MemTotal", 0),
        "filesystem": filesystem_of(directory),
        "cold_cache": cold_method(),
        "world_size": team.world_size,
        "ranks_per_host": team.local_world_size,
        "threads_per_rank": torch.get_num_threads(),
        "device": torch.cuda.get_device_name() if use_cuda else "cpu",
        "peers": {name: version_of(name) for name in peers},
    }


def _own_version() -> str:
    try:
        return metadata.version("distckpt")
    except metadata.PackageNotFoundError:
        return "not installed, run from its folder"


def filesystem_of(directory: str) -> str:
    """Return the type of the filesystem that a directory lies on."""
    path = os.path.realpath(directory)
    best, found = "", "unknown"
    with suppress(OSError), open("/proc/mounts") as file:
        for line in file:
            _, mount, kind, *_ = line.split()
            inside = path == mount or path.startswith(mount.rstrip("/") + "/")
            # Of two mounts on one place the later one is seen.
            if inside and len(mount) >= len(best):
                best, found = mount, kind
    return found
