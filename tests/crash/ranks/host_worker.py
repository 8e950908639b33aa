"""A worker of a sharded job on one of several hosts: trains, saves, tells what it sees.

Run by torchrun: ``host_worker.py DIRECTORY NOTES``. The chief of the first incarnation
freezes at a commit, if the file ``NOTES.freeze`` is there: its host has gone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from datetime import timedelta
from typing import Any

sys.path.append(os.path.join(os.path.dirname(__file__), ".."))

import torch
import torch.distributed as dist
from notes import Notes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import distckpt
from distckpt import Checkpoint, CheckpointManager

_TIMEOUT = timedelta(seconds=6)


def main() -> None:
    """Train for ever."""
    directory, notes_path = sys.argv[1:]
    notes, host = Notes(notes_path), os.environ["HOST"]

    def tell(what: str, *values: object) -> None:
        notes.add(what, host, time.monotonic(), *values)

    torch.set_num_threads(1)
    tell("started", os.getpid(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    try:
        _train(directory, tell, f"{notes_path}.freeze")
    except BaseException as error:
        tell("left", type(error).__name__, str(error)[:500])
        raise


def _train(directory: str, tell: Any, freeze_file: str) -> None:
    distckpt.init_process_group("gloo", timeout=_TIMEOUT)
    world_size = dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    mesh = init_device_mesh("cpu", (world_size,))
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    step = torch.zeros((), dtype=torch.int64)
    checkpoint = Checkpoint(model=model, optimizer=optimizer, step=step)
    manager = CheckpointManager(
        *(checkpoint, directory, 3),
        step_counter=step,
        checkpoint_interval=5,
        timeout=_TIMEOUT,
    )
    path = manager.restore_or_initialize()
    tell("restored", os.path.basename(str(path)), int(step), world_size)
    if dist.get_rank() == 0:
        _freeze_at_a_commit(freeze_file)
    while True:
        torch.manual_seed(int(step))
        model(torch.rand(8, 16)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        path = manager.save()
        if path is not None:
            tell("saved", os.path.basename(path), int(step), world_size)
        time.sleep(0.02)


def _freeze_at_a_commit(freeze_file: str) -> None:
    """Arm a hook that stops this process before it writes a manifest."""

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        is_manifest = event == "open" and str(arguments[0]).endswith(
            ".pending/manifest.json"
        )
        if is_manifest and os.path.exists(freeze_file):
            os.unlink(freeze_file)
            os.kill(os.getpid(), signal.SIGSTOP)

    sys.addaudithook(hook)


if __name__ == "__main__":
    main()
