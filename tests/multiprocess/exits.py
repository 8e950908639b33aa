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

import torch
import torch.distributed as dist

import distckpt.background
import distckpt.manager
from distckpt import Checkpoint, CheckpointManager, CheckpointOptions

WRITE_SECONDS = 0.6
EXIT_SECONDS = 2.0
ERROR_CODE = 7
DEADLINE_SECONDS = 45.0


def _interrupt_later(seconds):
    threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT)).start()


def _play(ending, rank, folder, world_size):
    options = CheckpointOptions(enable_async=True)
    checkpoint = Checkpoint(weight=torch.zeros(10_000))
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
            _end_inside(ending, rank)
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


def _end_inside(ending, rank):
    if ending in ("error-in-with", "hang-error-in-with"):
        raise ValueError
    if ending == "interrupt-in-with":
        _interrupt_later(0.1)
        time.sleep(60)
    if ending == "error-of-one-in-with" and rank == 1:
        raise ValueError


def _wait(pids):
    started = time.monotonic()
    ending_of = {pid: ending for ending in pids for pid in pids[ending]}
    found = {}
    while len(found) < len(ending_of):
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            seconds = time.monotonic() - started
            found[pid] = os.waitstatus_to_exitcode(status), seconds
        elif time.monotonic() - started > DEADLINE_SECONDS:
            for pid in ending_of.keys() - found.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return {ending: [found[pid] for pid in pids[ending]] for ending in pids}


def main():
    """Play all endings; in a forked rank, one."""
    folder, world_size, *endings = sys.argv[1:]
    world_size = int(world_size)
    torch.set_num_threads(1)
    pids = {ending: [] for ending in endings}
    for ending in endings:
        place = os.path.join(folder, ending)
        os.mkdir(place)
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
            pids[ending].append(pid)
    print(json.dumps(_wait(pids)))


if __name__ == "__main__":
    main()
