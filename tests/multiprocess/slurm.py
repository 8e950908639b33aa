"""Stands in for Slurm's srun, scancel and scontrol, which are not here.

``slurm.py srun ...`` does what the manual says of what launch/slurm.sbatch asks of srun,
for a job whose nodes are all this machine; so do the others. The folder that the variable
``SLURM_STAND_IN`` names has the state: a file ``preempted``, if the job is, and
``requeued`` and ``signalled``, with a line for each time.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import NoReturn

# The tasks of a step have it, and what they start; srun and the batch script have not.
_IN_A_STEP = "SLURM_STEP_ID=0"


def srun(*arguments: str) -> int:
    """Run a command on each node; return the highest of their exit statuses."""
    first = next(i for i, word in enumerate(arguments) if not word.startswith("--"))
    options = dict(word[2:].split("=") for word in arguments[:first])
    tasks: list[subprocess.Popen[bytes]] = []

    def kill_tasks(*_: object) -> NoReturn:
        for task in tasks:
            task.kill()
        sys.exit(128 + signal.SIGTERM)

    signal.signal(signal.SIGTERM, kill_tasks)
    for node in range(int(os.environ["SLURM_JOB_NUM_NODES"])):
        own = [_IN_A_STEP, f"SLURM_PROCID={node}"]
        tasks.append(
            subprocess.Popen(["env", *own, *arguments[first:]], start_new_session=True)
        )
    deadline = float("inf")
    while any(task.poll() is None for task in tasks):
        ended = [task.returncode for task in tasks if task.returncode is not None]
        if ended:
            deadline = min(deadline, time.monotonic() + float(options["wait"]))
        others_die = any(ended) and options["kill-on-bad-exit"] != "0"
        if others_die or time.monotonic() > deadline:
            for task in tasks:
                task.kill()
        time.sleep(0.02)
    # As a shell does: 128 and the number of the signal.
    return max(code if code >= 0 else 128 - code for code in (t.returncode for t in tasks))


def scancel(option: str, job: str) -> int:
    """Send a signal to all processes of all steps, and not to the batch script."""
    name, _, value = option.partition("=")
    assert name == "--signal", option
    number = signal.Signals[f"SIG{value}"]
    _note("signalled")
    state = f"SLURM_STAND_IN={os.environ['SLURM_STAND_IN']}"
    marks = {_IN_A_STEP, f"SLURM_JOB_ID={job}", state}
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environment = (process / "environ").read_text(errors="replace")
            if marks <= {*environment.split("\0")}:
                os.kill(int(process.name), number)
    return 0


def scontrol(*arguments: str) -> int:
    """Show a job, or note that it is queued again."""
    state, job = Path(os.environ["SLURM_STAND_IN"]), os.environ["SLURM_JOB_ID"]
    if arguments == ("show", "job", job):
        when = "2026-01-02T03:04:05" if (state / "preempted").exists() else "None"
        print(f"JobId={job} JobName=gpt\n   JobState=RUNNING\n   PreemptTime={when}")
    else:
        assert arguments == ("requeue", job), arguments
        _note("requeued")
    return 0


def _note(what: str) -> None:
    with open(Path(os.environ["SLURM_STAND_IN"]) / what, "a") as file:
        file.write("once\n")


if __name__ == "__main__":
    sys.exit(
        {"srun": srun, "scancel": scancel, "scontrol": scontrol}[sys.argv[1]](*sys.argv[2:])
    )
