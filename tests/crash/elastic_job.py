"""A job under torch's elastic agent, the one inside torchrun, to be killed in parts.

The agent starts its workers from a server that has imported torch: so a restart takes a
second, not ten, and hundreds can be tried. All else is as under torchrun.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

from notes import Notes, read_lines

# Real ranks are the business of the tests in another folder.
sys.path.append(os.path.join(os.path.dirname(__file__), "..", "multiprocess"))

from harness import PRELOAD

NUM_RANKS = 4
TIMEOUT_SECONDS = 20.0
_PRELOAD = [*PRELOAD, "torch.distributed.elastic.multiprocessing.api", "elastic_job"]
_MAX_RESTARTS = 1_000_000


class Worker(NamedTuple):
    """One worker process, as it told."""

    rank: int
    restart: int
    pid: int
    agent: int


class Told(NamedTuple):
    """Something that a worker told, and when."""

    rank: int
    restart: int
    agent: int
    at: float
    values: list[Any]

    @property
    def incarnation(self) -> tuple[int, int]:
        """Which start of all workers it is from."""
        return self.agent, self.restart


# In the workers


def train(directory: str, notes_path: str, interval: int, max_to_keep: int) -> None:
    """Train for ever; every save is acknowledged in the notes as soon as it is known."""
    import torch
    import torch.distributed as dist
    from outcome_helpers import make_checkpoint
    from outcome_helpers import train as train_one_step

    import distckpt
    from distckpt import CheckpointManager, CheckpointOptions, PerRank

    torch.set_num_threads(1)
    notes, rank = Notes(notes_path), int(os.environ["RANK"])
    restart = int(os.environ["TORCHELASTIC_RESTART_COUNT"])

    def tell(what: str, *values: object) -> None:
        notes.add(what, rank, restart, os.getppid(), time.monotonic(), *values)

    tell("started", os.getpid())
    try:
        timeout = timedelta(seconds=TIMEOUT_SECONDS)
        distckpt.init_process_group("gloo", timeout=timeout)
        tell("connected")
        checkpoint = make_checkpoint(own=PerRank(torch.zeros(3000)))
        step = checkpoint.step
        manager = CheckpointManager(
            checkpoint,
            directory,
            max_to_keep=max_to_keep,
            step_counter=step,
            checkpoint_interval=interval,
            timeout=timeout,
        )
        path = manager.restore_or_initialize()
        is_right = checkpoint.own.value.eq(_own_value(int(step), rank)).all().item()
        tell("restored", os.path.basename(str(path)), is_right)
        is_async = CheckpointOptions(enable_async=True)
        known = manager.latest_checkpoint
        while True:
            train_one_step(checkpoint)
            checkpoint.own.value.fill_(_own_value(int(step), rank))
            dist.barrier()
            if int(step) % 7 == 1:
                tell("stepped", int(step))
            # Some at once, some behind: what is committed is known when it is listed.
            behind = int(step) // interval % 2 == 1
            manager.save(options=is_async if behind else None)
            if manager.latest_checkpoint != known:
                known = manager.latest_checkpoint
                tell("acknowledged", os.path.basename(str(known)))
    except BaseException as error:
        tell("left", type(error).__name__, str(error)[:500])
        raise


def _own_value(step: int, rank: int) -> int:
    return 100 * step + rank if step else 0


# The agent


def _run_agent(
    directory: str, notes_path: str, port: int, interval: int, max_to_keep: int
) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # Torn down with this process, as by a terminal.
    os.setpgid(0, 0)
    # The server that workers are forked from does not get this process's own path.
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)
    multiprocessing.set_forkserver_preload(_PRELOAD)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=NUM_RANKS,
        run_id="elastic",
        rdzv_backend="static",
        rdzv_configs={"rank": 0},
        rdzv_endpoint=f"127.0.0.1:{port}",
        max_restarts=_MAX_RESTARTS,
        monitor_interval=0.05,
        start_method="forkserver",
    )
    elastic_launch(config, train)(directory, notes_path, interval, max_to_keep)


class ElasticJob:
    """The agent, its workers, and what they told.

    Args:
        folder: For the run directory and the notes.
    """

    def __init__(self, folder: str, interval: int = 3, max_to_keep: int = 3) -> None:
        self.directory = os.path.join(folder, "run")
        self._told: dict[str, list[Told]] = {}
        self._read_bytes = 0
        self._notes_path = os.path.join(folder, "notes")
        self._arguments = (interval, max_to_keep)
        self._agent: Any = None
        self._log = os.path.join(folder, "log")

    def start(self) -> None:
        """Start an agent; its workers go on from what is there."""
        context = multiprocessing.get_context("spawn")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        arguments = (self.directory, self._notes_path, port, *self._arguments)
        self._agent = context.Process(
            target=_quietly, args=(self._log, _run_agent, *arguments)
        )
        self._agent.start()

    @property
    def agent_pid(self) -> int:
        """Process id of the agent."""
        return int(self._agent.pid)

    def is_running(self) -> bool:
        """Tell whether the agent is."""
        return bool(self._agent.is_alive())

    def last_words(self) -> str:
        """Return the end of what agent and workers printed."""
        return Path(self._log).read_text(errors="replace")[-3000:]

    def workers(self) -> list[Worker]:
        """Return all workers that ever started, the newest last."""
        return [
            Worker(told.rank, told.restart, told.values[0], told.agent)
            for told in self.told("started")
        ]

    def told(self, what: str) -> list[Told]:
        """Return all that workers have told of one kind."""
        # Only what is new: a job that runs for an hour tells much.
        lines, self._read_bytes = read_lines(self._notes_path, self._read_bytes)
        for kind, rank, restart, agent, at, *values in lines:
            self._told.setdefault(kind, []).append(Told(rank, restart, agent, at, values))
        return self._told.get(what, [])

    def kill_agent(self) -> float:
        """Kill the agent; its workers live on. Returns when."""
        at = time.monotonic()
        os.kill(self.agent_pid, signal.SIGKILL)
        self._agent.join(10)
        return at

    def kill(self, worker: Worker) -> float | None:
        """Kill a worker; returns when, or None if it had gone."""
        at = time.monotonic()
        try:
            os.kill(worker.pid, signal.SIGKILL)
        except ProcessLookupError:
            return None
        return at

    def wait_for(self, condition: Callable[[], bool], seconds: float) -> bool:
        """Wait until something is so; False if it never is."""
        deadline = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.02)
        return True

    def stop(self) -> None:
        """End the agent, and every worker there ever was."""
        if self._agent is not None and self._agent.is_alive():
            os.kill(self.agent_pid, signal.SIGKILL)
            self._agent.join(10)
        for worker in self.workers():
            with suppress(ProcessLookupError):
                if _is_ours(worker.pid):
                    os.kill(worker.pid, signal.SIGKILL)


def is_running(pid: int) -> bool:
    """Tell whether a process has not ended."""
    with suppress(OSError):
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        return state not in ("Z", "X")
    return False


def _is_ours(pid: int) -> bool:
    """Tell whether a process is one of those, and not another that got its id."""
    with suppress(OSError):
        return b"forkserver" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def _quietly(log: str, body: Callable[..., None], *arguments: Any) -> None:
    """Run something with all that it prints in a file."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    body(*arguments)
