"""One rank of a job that does everything that touches a run directory, in phases.

Run by ``test_system_calls.py`` under strace. The path in a call of ``os.access`` names the
phase that begins there.
"""

from __future__ import annotations

import os
import sys
import time

import torch
import torch.distributed as dist
from torch import nn

import distckpt
from distckpt import Checkpoint, CheckpointManager, CheckpointOptions, PerRank

# Begins the name of a file that is never there.
MARK = "/distckpt-phase-"
# What the main thread does then is no part of the phase.
QUIET = "quiet"


def phase(name):
    """Begin a phase."""
    os.access(MARK + name, os.F_OK)


def wait_until_quiet(directory):
    """Wait until the deletions are through, outside of all phases."""
    phase(QUIET)
    deadline = time.monotonic() + 60
    while any(name.endswith(".trash") for name in os.listdir(directory)):
        assert time.monotonic() < deadline, os.listdir(directory)
        time.sleep(0.05)
    time.sleep(0.3)


def build(rank):
    """Make small tensors, large ones, and one of each rank."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Linear(50, 20_000))
    return {
        "model": model,
        "values": {"epoch": 1, "name": "run"},
        "own": PerRank(torch.full((3,), float(rank)), resize="by_rank"),
        "step": torch.zeros((), dtype=torch.int64),
    }


def manage(directory, objects):
    """Make a manager that keeps two."""
    return CheckpointManager(
        Checkpoint(**objects), directory, 2, step_counter=objects["step"], timeout=60
    )


def save(manager, objects, **options):
    """Save at the next step, and wait for it."""
    objects["step"] += 1
    manager.save(options=CheckpointOptions(**options))
    manager.sync()
    wait_until_quiet(manager.directory)


def main(directory, rank, world_size):
    """Go through all phases."""
    if world_size > 1:
        dist.init_process_group("gloo", rank=rank, world_size=world_size)
    objects = build(rank)
    phase("claim of an empty directory")
    manager = manage(directory, objects)
    manager.restore_or_initialize()
    wait_until_quiet(directory)
    for number in (1, 2, 3):
        phase(f"save {number}")
        save(manager, objects)
    phase("asynchronous save")
    save(manager, objects, enable_async=True)
    phase("lazy save")
    save(manager, objects, enable_async=True, staging="lazy")
    phase("restore of the newest")
    manager.restore("latest")
    phase("restore of an older one")
    manager.restore(manager.checkpoints[0])
    wait_until_quiet(directory)
    if rank == 0:
        distckpt.pin(manager.latest_checkpoint)
        distckpt.add_metrics(manager.latest_checkpoint, {"loss": 1.0})
    if world_size > 1:
        dist.barrier()
    phase("save with requests")
    save(manager, objects)
    phase("end")
    manager.close()
    wait_until_quiet(directory)
    objects = build(rank)
    phase("claim of a directory in use")
    manager = manage(directory, objects)
    manager.restore_or_initialize()
    wait_until_quiet(directory)
    phase("another end")
    manager.close()
    if rank == 0:
        read(directory)


def read(directory):
    """Read as other processes do."""
    phase("state")
    newest = distckpt.latest_checkpoint(directory)
    assert newest is not None
    distckpt.get_checkpoint_state(directory)
    phase("open")
    with distckpt.open(newest) as opened:
        opened["model/1.weight"].numpy()
        opened["model/0.weight"][1:3]
    phase("restore without a manager")
    Checkpoint(**build(0)).restore(newest)
    phase("follow")
    found = distckpt.checkpoints_iterator(directory, timeout=0)
    assert next(found) == newest
    found.close()
    phase("done")


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
