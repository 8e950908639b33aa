"""Ranks that end with a save under way: a command that plays a list of endings.

``python exits.py <folder> <world size> <ending>...``. Each rank is forked from a process
that has imported everything, and leaves through the interpreter's own way out, which the
ranks of ``harness.py`` do not. Prints JSON: for each ending, each rank's exit code and
seconds.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from outcome_helpers import outcome

import distckpt.background
import distckpt.manager
from distckpt import Checkpoint, CheckpointManager, CheckpointOptions

WRITE_SECONDS = 0.6
EXIT_SECONDS = 2.0
ERROR_CODE = 7


def _interrupt_later(seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def _play(ending, rank, folder, world_size):
    options = CheckpointOptions(True, "lazy" if ending.startswith("lazy") else "eager")
    checkpoint = Checkpoint(weight=torch.zeros(10_000), model=torch.nn.Linear(50, 50))
    checkpoint.optimizer = torch.optim.SGD(checkpoint.model.parameters(), lr=0.1)
    directory = os.path.join(folder, "run")
    manager = CheckpointManager(
        checkpoint, directory, max_to_keep=1, timeout=timedelta(seconds=20)
    )
    manager.save()
    real = os.pwritev

    def slowly(descriptor, *arguments):
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(".safetensors"):
            time.sleep(3600 if ending.startswith("hang") else WRITE_SECONDS)
        return real(descriptor, *arguments)

    os.pwritev = slowly
    if ending.startswith("hang"):
        distckpt.background.EXIT_SECONDS = distckpt.manager.EXIT_SECONDS = EXIT_SECONDS
    if "in-with" in ending:
        with manager:
            manager.save(options=options)
            _end_inside(ending, rank, folder)
        return
    manager.save(options=options)
    if ending == "close":
        manager.close()
    elif ending == "exit-code":
        sys.exit(ERROR_CODE)
    elif ending == "destroy-groups":
        dist.destroy_process_group()
    elif "interrupt-in-sync" in ending:
        _interrupt_later(0.3)
        manager.sync()
    elif "interrupt" in ending:
        _interrupt_later(0.1)
        time.sleep(60)


def _end_inside(ending, rank, folder):
    if ending == "error-in-with":
        raise ValueError
    if ending == "interrupt-in-with":
        _interrupt_later(0.1)
        time.sleep(60)
    if ending == "error-of-one-in-with":
        if rank == 1:
            raise ValueError
        seen = outcome(_committed_or_not, Path(folder))
        raise SystemExit(0 if seen.kind == "ok" else 1)


def _committed_or_not(folder):
    return folder


def _wait(pids):
    started = time.monotonic()
    found = []
    for pid in pids:
        while True:
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                break
            if time.monotonic() - started > 45:
                os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        code = os.waitstatus_to_exitcode(status)
        found.append([code, round(time.monotonic() - started, 2)])
    return found


def main():
    """Play all endings, two at a time; in a forked rank, one."""
    folder, world_size, *endings = sys.argv[1:]
    world_size, torch_threads = int(world_size), 1
    torch.set_num_threads(torch_threads)
    found = {}
    for ending in endings:
        place = os.path.join(folder, ending)
        os.mkdir(place)
        pids = []
        for rank in range(world_size):
            pid = os.fork()
            if pid == 0:
                if world_size > 1:
                    dist.init_process_group(
                        "gloo",
                        init_method=f"file://{place}/rendezvous",
                        rank=rank,
                        world_size=world_size,
                        timeout=timedelta(seconds=60),
                    )
                with open(os.path.join(place, f"error-{rank}"), "w") as file:
                    os.dup2(file.fileno(), 2)
                _play(ending, rank, place, world_size)
                return
            pids.append(pid)
        found[ending] = _wait(pids)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
