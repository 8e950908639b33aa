"""distckpt itself, used as its users do."""

from __future__ import annotations

import time
from typing import Literal

import torch

# Public names alone: an older or newer library has them, too, and is measured with this.
from distckpt import Checkpoint, CheckpointManager, CheckpointOptions, latest_checkpoint
from distckpt.bench.contender import EAGER, LAZY, Contender, Pending
from distckpt.bench.results import OURS
from distckpt.bench.team import Team
from distckpt.bench.workloads import Workload

_CALLS_PER_BLOCK = 1000


class _Behind(Pending):
    def __init__(self, ours: Ours, before: str | None) -> None:
        self._ours = ours
        self._before = before

    def wait_staged(self) -> None:
        self._ours.manager.wait_staged()

    def before_optimizer_step(self) -> None:
        # The manager hooks the optimizer itself.
        pass

    def done(self) -> bool:
        # What the chief has committed is durable on all ranks. ``sync()`` would wait for
        # the deletion of the old one as well, which no other is made to wait for.
        if self._ours.team.rank != 0:
            return True
        return latest_checkpoint(self._ours.folder) != self._before

    def check(self) -> None:
        self._ours.manager.sync()


class Ours(Contender):
    """A ``CheckpointManager`` that keeps one checkpoint."""

    name = OURS
    modes = (EAGER, LAZY)

    def __init__(self, workload: Workload, team: Team, folder: str) -> None:
        super().__init__(workload, team, folder)
        self.manager = CheckpointManager(workload.checkpoint(), folder, max_to_keep=1)

    def save(self) -> None:
        """Save durably."""
        self.num_saves += 1
        self.manager.save()

    def start(self, mode: str) -> Pending:
        """Begin a save that goes on behind the caller."""
        self.num_saves += 1
        before = self.manager.latest_checkpoint
        staging: Literal["eager", "lazy"] = "lazy" if mode == LAZY else "eager"
        options = CheckpointOptions(enable_async=True, staging=staging)
        self.manager.save(options=options)
        pending = _Behind(self, before)
        if mode == EAGER:
            pending.wait_staged()
        return pending

    def load(self) -> None:
        """Restore the newest into the workload's own tensors."""
        if self.manager.restore_or_initialize() is None:
            msg = "there was nothing to restore"
            raise ValueError(msg)

    def tidy(self) -> None:
        """Wait for the deletion of the old ones."""
        self.manager.sync()

    def close(self) -> None:
        """Close the manager."""
        self.manager.close()


def time_gated_calls(folder: str, num_blocks: int = 20) -> list[float]:
    """Return the seconds of one gated call, for each block of calls; collective."""
    step = torch.zeros((), dtype=torch.int64)
    with CheckpointManager(
        Checkpoint(step=step), folder, 1, step_counter=step, checkpoint_interval=1 << 40
    ) as manager:
        manager.save()
        blocks = []
        for _ in range(num_blocks + 1):
            step += 1  # outside: adding to a tensor takes about as long
            started = time.perf_counter()
            for _ in range(_CALLS_PER_BLOCK):
                manager.save()
            blocks.append((time.perf_counter() - started) / _CALLS_PER_BLOCK)
    return blocks[1:]
