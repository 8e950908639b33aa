"""launch/slurm.sbatch, with stand-ins for Slurm's commands: what it does when told what.

There is no Slurm here. ``slurm.py`` does what its manual says; the batch script gets the
signals that the manual says it gets, and the steps theirs.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import EVERYTHING
from launch_helpers import INSTALLED, edited, newest, small_program

_STAND_IN = Path(__file__).with_name("slurm.py")
# What torchrun makes of a signal: its workers have ended, and it ends with an error.
_TORCHRUN = """#!/usr/bin/env bash
trap 'echo node $SLURM_PROCID told; exit 1' TERM
echo "node $SLURM_PROCID has $*"
if [ -n "${ENDS_WITH:-}" ]; then exit "$ENDS_WITH"; fi
while true; do sleep 0.02; done
"""


class Slurm:
    """Slurm, as far as one job sees it."""

    def __init__(self, folder: Path, num_nodes: int = 2) -> None:
        self._log = folder / "log"
        self._state = folder
        programs = folder / "slurm"
        programs.mkdir()
        for name in ("srun", "scancel", "scontrol"):
            command = shlex.join([sys.executable, "-S", str(_STAND_IN), name])
            (programs / name).write_text(f'#!/bin/sh\nexec {command} "$@"\n')
            (programs / name).chmod(0o755)
        self._environment = {
            **os.environ,
            "PATH": f"{programs}:{os.environ['PATH']}",
            "OMP_NUM_THREADS": "1",
            "SLURM_STAND_IN": str(folder),
            "SLURM_JOB_ID": str(10**6 + os.getpid()),
            "SLURM_JOB_NUM_NODES": str(num_nodes),
            "SLURM_CPUS_PER_TASK": "1",
        }

    def start(self, script: Path, **environment: str) -> subprocess.Popen[bytes]:
        """Start the batch script, on the first node."""
        with open(self._log, "ab") as log:
            return subprocess.Popen(
                ["bash", str(script)],
                stdout=log,
                stderr=log,
                env={**self._environment, **environment},
            )

    def signal_steps(self) -> None:
        """Send SIGTERM to all processes of the steps."""
        command = [str(self._state / "slurm" / "scancel"), "--signal=TERM"]
        job = self._environment["SLURM_JOB_ID"]
        subprocess.run([*command, job], env=self._environment, check=True)

    def note_preempted(self) -> None:
        """Note that the job is preempted; it has a while to end."""
        (self._state / "preempted").touch()

    @property
    def requeued(self) -> int:
        """How often the job was queued again."""
        return self._count("requeued")

    @property
    def signalled(self) -> int:
        """How often its steps were sent a signal."""
        return self._count("signalled")

    def _count(self, what: str) -> int:
        path = self._state / what
        return len(path.read_text().splitlines()) if path.exists() else 0

    @property
    def log(self) -> str:
        """What the job has said."""
        return self._log.read_text(errors="replace")

    def wait_for(self, word: str, times: int = 1, seconds: float = 60) -> None:
        """Wait until the job has said something."""
        deadline = time.monotonic() + seconds
        while self.log.count(word) < times:
            assert time.monotonic() < deadline, f"waited for {word!r}:\n{self.log[-5000:]}"
            time.sleep(0.02)


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    """Edit the batch script to start a stand-in of torchrun's."""
    programs = tmp_path / "installed"
    programs.mkdir()
    (programs / "torchrun").write_text(_TORCHRUN)
    (programs / "torchrun").chmod(0o755)
    installed = f"export PATH={programs}:$PATH"
    program = "processes=3\ngrace=60\nprogram=(train.py 'two words')"
    return edited("slurm.sbatch", tmp_path, "#SBATCH --nodes=2", installed, program)


def test_launchers_of_all_nodes_get_the_program_and_meet_at_one_place(slurm, script):
    assert slurm.start(script, ENDS_WITH="0").wait(300) == 0
    lines = sorted(line for line in slurm.log.splitlines() if " has " in line)
    assert [line.split()[1] for line in lines] == ["0", "1"]
    (given,) = {line.partition(" has ")[2] for line in lines}
    assert "--nnodes 2 --nproc-per-node 3" in given and given.endswith("train.py two words")
    assert slurm.requeued == 0, "it has ended"


def test_job_that_fails_stays_failed(slurm, script):
    assert slurm.start(script, ENDS_WITH="3").wait(300) == 3
    assert slurm.requeued == 0


def test_signal_before_the_end_of_its_time_reaches_all_nodes_and_queues_it_again(
    slurm, script
):
    job = slurm.start(script)
    slurm.wait_for(" has ", 2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(300) == 1
    assert slurm.log.count("told") == 2 and slurm.requeued == 1


def test_second_signal_is_not_passed_on(slurm, script):
    job = slurm.start(script)
    slurm.wait_for(" has ", 2)
    for _ in range(5):
        job.send_signal(signal.SIGUSR1)
        time.sleep(0.01)
    assert job.wait(300) == 1
    assert slurm.signalled == 1, "another would interrupt torchrun's shutting down"
    assert slurm.log.count("told") == 2 and slurm.requeued == 1


@pytest.mark.parametrize(
    ("preempted", "script_too"),
    [
        (False, False),
        pytest.param(False, True, marks=pytest.mark.full),
        pytest.param(True, False, marks=pytest.mark.full),
        (True, True),
    ],
)
def test_preempted_job_is_queued_again_and_cancelled_one_is_not(
    slurm, script, preempted, script_too
):
    """Both begin with SIGTERM to the steps; in the end the script gets it, too."""
    job = slurm.start(script)
    slurm.wait_for(" has ", 2)
    if preempted:
        slurm.note_preempted()
    if script_too:
        job.send_signal(signal.SIGTERM)
    slurm.signal_steps()
    assert job.wait(300) == 1
    assert slurm.log.count("told") == 2 and slurm.requeued == preempted


@pytest.mark.long
@pytest.mark.skipif(not EVERYTHING, reason="takes a minute; set DISTCKPT_EVERY_CRASH=1")
@pytest.mark.timeout(1200)
def test_job_goes_on_where_it_was_when_its_time_was_up(
    tmp_path, slurm, report_figures: Callable[[str], None]
):
    """Real launchers and workers: it commits, is queued again, and goes on from there."""
    program = f"processes=1\n{small_program(tmp_path, 100_000)}"
    script = edited("slurm.sbatch", tmp_path, "#SBATCH --nodes=2", INSTALLED, program)
    job = slurm.start(script)
    slurm.wait_for("saved", 2)
    told = time.monotonic()
    job.send_signal(signal.SIGUSR1)
    assert job.wait(300) != 0, slurm.log[-5000:]
    took = time.monotonic() - told
    assert slurm.requeued == 1
    (line,) = (line for line in slurm.log.splitlines() if "told to stop at step" in line)
    step = int(line.split("step")[1].split(";")[0])
    assert newest(tmp_path) == step, "the last save is of the step at which it stopped"

    program = f"processes=1\n{small_program(tmp_path, step + 20)}"
    script = edited("slurm.sbatch", tmp_path, "#SBATCH --nodes=2", INSTALLED, program)
    assert slurm.start(script, SLURM_RESTART_COUNT="1").wait(300) == 0, slurm.log[-5000:]
    assert f"going on from step {step}" in slurm.log and "done at step" in slurm.log
    assert newest(tmp_path) == step + 20
    assert slurm.requeued == 1
    report_figures(f"{took:.1f} s from the signal to queued again")
