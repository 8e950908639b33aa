"""Real gloo ranks for tests, from a pool of warm processes.

A fork server imports torch once; a rank is forked from it in a few milliseconds, fresh
for every test. Unlike ``torch.multiprocessing.spawn``, which ends all ranks as soon as
one fails, the harness lets the survivors go on and shows what they do.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from typing import Any

# What takes long to import, and every rank needs.
PRELOAD = [
    "torch",
    "torch.distributed",
    "torch.optim",
    "torch._dynamo",
    "torch.distributed.algorithms._checkpoint.checkpoint_wrapper",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "distckpt.manager",
    "distckpt.rendezvous",
    "pytest",
]
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(PRELOAD)
# Whether to try everything, instead of the part that CI has the time for.
EVERYTHING = bool(os.environ.get("DISTCKPT_EVERY_CRASH"))
# Tests run several jobs from threads, and starting a process looks after all others: two
# threads that ask for one exit status at a time get it once, and nonsense the other time.
_lock = threading.Lock()


@dataclass
class RankResult:
    """What became of one rank.

    Attributes:
        value: What the function returned.
        error: The exception's class name and text; None if there was none.
        trace: Its traceback.
        seconds: How long the function ran.
        exit_code: As ``Process.exitcode``; negative for a signal. 0 if it was well.
        killed: Whether the harness had to kill it at the deadline.
    """

    value: Any = None
    error: tuple[str, str] | None = None
    trace: str = ""
    seconds: float = 0.0
    exit_code: int | None = None
    killed: bool = False

    @property
    def ok(self) -> bool:
        """Tell whether the function returned."""
        return self.error is None and self.exit_code == 0 and not self.killed


def held_up_seconds(pid: int | str = "self") -> float:
    """Return how long all threads of a process have waited for a processor so far.

    As far as it can be told: some tests take all descriptors of their process.
    """
    nanoseconds = 0
    with suppress(OSError):  # or it has ended
        for thread in os.listdir(f"/proc/{pid}/task"):
            with suppress(FileNotFoundError, ProcessLookupError):
                path = f"/proc/{pid}/task/{thread}/schedstat"
                with open(path, encoding="utf-8") as file:
                    nanoseconds += int(file.read().split()[1])
    return nanoseconds / 1e9


@cache
def warm_up() -> None:
    """Start the fork server, and wait until it has imported what the ranks need."""
    process = _context.Process(target=os.getpid)
    with _lock:
        process.start()
    _exit_code(process, None)


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout: float = 60.0,
    process_group: bool = True,
    environment: dict[str, str] | None = None,
) -> list[RankResult]:
    """Run ``function(rank, *args)`` on so many ranks and tell what became of each.

    Args:
        function: Of a module's top level.
        world_size: Number of ranks.
        *args: Passed on.
        timeout: Seconds until what still runs is killed; so much later as the ranks were
            held up by a busy machine.
        process_group: Initialize the default group (gloo) first.
        environment: Set in every rank.
    """
    with tempfile.TemporaryDirectory() as folder:
        rendezvous = os.path.join(folder, "rendezvous") if process_group else None
        processes, connections = [], []
        for rank in range(world_size):
            ours, theirs = _context.Pipe()
            process = _context.Process(
                target=_main,
                args=(theirs, rendezvous, function, rank, world_size, args, environment),
                daemon=True,
            )
            with _lock:
                process.start()
            theirs.close()
            processes.append(process)
            connections.append(ours)
        results = [RankResult() for _ in range(world_size)]
        try:
            _collect(processes, connections, results, timeout)
        finally:
            for connection in connections:
                connection.close()  # tells a rank that it may exit
            for process, result in zip(processes, results, strict=True):
                exit_code = _exit_code(process, 0 if result.killed else 10)
                if exit_code is None:
                    os.kill(process.pid, signal.SIGKILL)
                    exit_code = _exit_code(process, None)
                if result.exit_code is None:
                    result.exit_code = exit_code
                with _lock:
                    process.close()
    return results


def values_of(results: Sequence[RankResult]) -> list[Any]:
    """Return what all ranks returned; fails showing the errors if some did not."""
    failed = {
        rank: result.trace or result for rank, result in enumerate(results) if not result.ok
    }
    assert not failed, "\n".join(f"rank {rank}: {text}" for rank, text in failed.items())
    return [result.value for result in results]


def _exit_code(process: Any, timeout: float | None) -> int | None:
    """Wait for a process to end; None if it has not."""
    wait([process.sentinel], timeout)
    with _lock:
        process.join(0)
        return process.exitcode


def _collect(
    processes: Sequence[Any],
    connections: Sequence[Connection],
    results: list[RankResult],
    timeout: float,
) -> None:
    waiting = {connection: rank for rank, connection in enumerate(connections)}
    deadline = time.monotonic() + timeout
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            held_up = sum(held_up_seconds(processes[rank].pid) for rank in waiting.values())
            if held_up > 0.1 * timeout:
                deadline, timeout = time.monotonic() + held_up, math.inf  # only once
                continue
            for rank in waiting.values():
                results[rank].killed = True
                os.kill(processes[rank].pid, signal.SIGKILL)
            return
        for connection in ready:
            rank = waiting.pop(connection)  # type: ignore[index]
            try:
                value, error, trace, seconds = connection.recv()  # type: ignore[union-attr]
            except (EOFError, ConnectionResetError):
                results[rank].exit_code = _exit_code(processes[rank], 10)
                continue
            results[rank] = RankResult(value, error, trace, seconds, 0)


def _main(
    connection: Connection,
    rendezvous: str | None,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    args: Sequence[Any],
    environment: dict[str, str] | None,
) -> None:
    import torch
    import torch.distributed as dist

    os.environ.update(environment or {})
    torch.set_num_threads(1)
    if rendezvous is not None:
        dist.init_process_group(
            "gloo",
            init_method=f"file://{rendezvous}",
            rank=rank,
            world_size=world_size,
            timeout=timedelta(seconds=60),
        )
    value, error, trace = None, None, ""
    started = time.monotonic()
    try:
        value = function(rank, *args)
    except BaseException as exception:
        error = (type(exception).__name__, str(exception))
        trace = traceback.format_exc()
    seconds = time.monotonic() - started
    connection.send((value, error, trace, seconds))
    # Leaving early would cut the connections under ranks that are not done.
    try:
        connection.recv()
    except EOFError:
        os._exit(0)
