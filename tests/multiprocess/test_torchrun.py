"""The real launcher: a job that loses workers ends where an undisturbed one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import EVERYTHING

from distckpt.readers import read_record
from distckpt.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
# Each takes over twenty seconds of processor time, mostly to import torch.
pytestmark = pytest.mark.full
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SMALL = ["--steps", "30", "--interval", "6", "--width", "32", "--layers", "1"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _command(world_size: int, directory: Path, text: Path, *arguments: str) -> list[str]:
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        *("--nproc-per-node", str(world_size)),
        *("--max-restarts", "3", "--monitor-interval", "0.1"),
        *("--master-port", str(_free_port()), str(ROOT / "launch" / "train.py")),
        *("--directory", str(directory), "--text", str(text), *SMALL, *arguments),
    ]


def _train(world_size: int, directory: Path, text: Path, *arguments: str) -> str:
    done = subprocess.run(
        _command(world_size, directory, text, *arguments),
        capture_output=True,
        text=True,
        timeout=500,
        env=ENVIRONMENT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# Each takes a minute, mostly imports: the others only where everything is tried.
JOBS = [("fsdp", 2)]
if EVERYTHING:
    JOBS += [("ddp", 2), ("fsdp", 4)]


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("strategy", "world_size"), JOBS)
def test_a_job_that_loses_workers_ends_bit_identical(tmp_path, strategy, world_size):
    """Killed once in training and once in a save, it restarts, and nothing differs.

    DDP on more ranks is not tried: any restart changes its first buckets, and the order
    in which gradients are added with them.
    """
    text = tmp_path / "text.txt"
    text.write_bytes(os.urandom(50_000))
    faults, clean = tmp_path / "faults", tmp_path / "clean"
    chosen = ("--strategy", strategy)
    kills = ("--kill-in-training", "10", "--kill-in-save", "18")
    output = _train(world_size, faults, text, *chosen, *kills)
    assert "SIGKILL in training" in output
    assert "SIGKILL in a save" in output
    assert "restart 1: restored" in output
    assert "restart 2: restored" in output
    _train(world_size, clean, text, *chosen)
    compared = subprocess.run(
        [
            *(sys.executable, str(ROOT / "launch" / "compare.py")),
            *(str(faults), str(clean)),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "bit-identical" in compared.stdout
    for tracked in ("model", "optimizer", "rng", "loader", "scheduler"):
        assert tracked in compared.stdout
    leftovers = [p.name for p in faults.glob(".ckpt-*")]
    assert leftovers == [], "the save that died was swept by the next claim"


@pytest.mark.timeout(1200)
def test_a_job_whose_launcher_is_told_to_stop_saves_once_more(
    tmp_path, report_figures: Callable[[str], None]
):
    """SIGTERM to torchrun, as a preempted host gets it: committed in time, to the step."""
    text, directory = tmp_path / "text.txt", tmp_path / "run"
    text.write_bytes(os.urandom(50_000))
    more = ("--steps", "100000", "--interval", "100000", "--strategy", "fsdp")
    job = subprocess.Popen(
        _command(2, directory, text, *more),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=ENVIRONMENT,
    )
    assert job.stdout is not None
    with job:
        lines = (line for line in job.stdout if line.strip())
        assert any("saved" in line for line in lines), "the first call saves"
        told = time.time()
        job.terminate()
        rest = [*lines]
    ended = time.time()
    (last,) = (line for line in rest if "told to stop at step" in line)
    step = int(last.split("step")[1].split(";")[0])
    record = read_record(RunDirectory.at(str(directory)))
    assert record is not None and record.live[-1].step == step > 1
    seconds = record.live[-1].time - told
    report_figures(
        f"{seconds:.2f} s from the signal to committed, {ended - told:.2f} s to the end"
    )
    assert 0 < seconds < 10 and ended - told < 25, "of the 30 that there are"
