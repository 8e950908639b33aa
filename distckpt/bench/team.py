"""The ranks of one benchmark: they meet, time together, and agree on what failed."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta

import click
import torch
import torch.distributed as dist
from torch.distributed import HashStore  # type: ignore[attr-defined]  # public, not exported

from distckpt import init_process_group


class ContenderFailed(Exception):
    """What one contender was doing failed on some rank; raised alike on all ranks."""


@dataclass(frozen=True, slots=True)
class Timed:
    """What one attempt took.

    Attributes:
        seconds: From barrier to the slowest rank's end.
        values: What the action returned, the largest of all ranks each.
    """

    seconds: float
    values: list[float]


class Team:
    """All ranks of the job, with a gloo group that only the benchmark uses.

    Outside torchrun it is a job of one rank.

    Args:
        use_cuda: Choose a device; tensors on it go over NCCL on the job's group, unless
            several ranks of a host share a device, where NCCL refuses to work: over gloo.
        timeout_seconds: How long a collective may take, the peers' included.
        is_alone: Be a job of one rank, whatever launcher the environment speaks of.
    """

    def __init__(
        self, use_cuda: bool, timeout_seconds: float, is_alone: bool = False
    ) -> None:
        environment = {} if is_alone else os.environ
        self.timeout_seconds = timeout_seconds
        backend = _on_cuda(environment) if use_cuda else "gloo"
        timeout = timedelta(seconds=timeout_seconds)
        if "RANK" in environment:
            init_process_group(backend, timeout=timeout)
        else:
            dist.init_process_group(
                backend, store=HashStore(), rank=0, world_size=1, timeout=timeout
            )
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()
        self.local_rank = int(environment.get("LOCAL_RANK", self.rank))
        self.local_world_size = int(environment.get("LOCAL_WORLD_SIZE", self.world_size))
        self.group = self.new_group()

    @property
    def speaks(self) -> bool:
        """Tell whether this rank talks to the user."""
        return self.rank == 0

    def new_group(self) -> dist.ProcessGroup:
        """Make another gloo group of all ranks; collective."""
        timeout = timedelta(seconds=self.timeout_seconds)
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        return group

    def barrier(self) -> None:
        """Wait for all ranks."""
        self.largest([0.0])

    def largest(self, values: Sequence[float]) -> list[float]:
        """Return the largest of all ranks' values, one by one."""
        tensor = torch.tensor(list(values), dtype=torch.float64)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        result: list[float] = tensor.tolist()
        return result

    def texts(self, text: str) -> list[str]:
        """Return every rank's text, without pickle."""
        mine = json.dumps(text).encode()
        size = int(self.largest([len(mine)])[0])
        padded = torch.frombuffer(bytearray(mine.ljust(size)), dtype=torch.uint8)
        everyone = [torch.empty_like(padded) for _ in range(self.world_size)]
        dist.all_gather(everyone, padded, group=self.group)
        return [json.loads(bytes(each.tolist())) for each in everyone]

    def timed(
        self,
        action: Callable[[], Sequence[float] | None],
        abandon: Callable[[], None] = lambda: None,
    ) -> Timed:
        """Run an action on all ranks together.

        Args:
            action: What to run.
            abandon: Called where it has failed, so that others do not wait for this rank
                inside of it.

        Raises:
            ContenderFailed: It failed on some rank, whatever it did on this one: so all
                ranks go on to the same thing.
        """
        self.barrier()
        started = time.perf_counter()
        problem = ""
        values: list[float] = []
        try:
            values = list(action() or ())
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # DCP's CheckpointException is no Exception
            problem = _one_line(error)
        seconds = time.perf_counter() - started
        if problem:
            # Not before the error is gone: its frames would hold what is to be let go.
            abandon()
        seconds, failed, count = self.largest([seconds, bool(problem), len(values)])
        if failed:
            found = [f"rank {r}: {t}" for r, t in enumerate(self.texts(problem)) if t]
            raise ContenderFailed("; ".join(found))
        assert len(values) == count
        return Timed(seconds, self.largest(values) if values else [])

    def first_here(self, action: Callable[[], None]) -> None:
        """Run an action on one rank of each host, while the others wait.

        Raises:
            ContenderFailed: It failed on one of them.
        """
        self.timed(lambda: action() if self.local_rank == 0 else None)


def _on_cuda(environment: Mapping[str, str]) -> str:
    """Choose this rank's device; return the backend of the job's group."""
    local_rank = int(environment.get("LOCAL_RANK", 0))
    local_world_size = int(environment.get("LOCAL_WORLD_SIZE", 1))
    num_devices = torch.cuda.device_count()
    if num_devices == 0:
        msg = "--cuda: there is no CUDA device here."
        raise click.UsageError(msg)
    torch.cuda.set_device(local_rank % num_devices)
    torch.zeros(1, device="cuda")  # else a device mesh chooses the device LOCAL_RANK
    return "cpu:gloo,cuda:gloo" if local_world_size > num_devices else "cpu:gloo,cuda:nccl"


def _one_line(error: BaseException) -> str:
    lines = traceback.format_exception_only(error)[0].strip().splitlines()
    return (lines[0] if lines else type(error).__name__)[:200]
