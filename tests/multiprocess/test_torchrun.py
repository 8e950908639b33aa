"""The real launcher: a job that loses workers ends where an undisturbed one does."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SMALL = ["--steps", "40", "--interval", "8", "--width", "32", "--layers", "1"]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _train(directory: Path, text: Path, *arguments: str) -> str:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--max-restarts", "3", "--monitor-interval", "0.1"),
        *("--master-port", str(_free_port()), str(ROOT / "launch" / "train.py")),
        *("--directory", str(directory), "--text", str(text), *SMALL, *arguments),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.timeout(240)
def test_a_job_that_loses_workers_ends_bit_identical(tmp_path):
    """Killed once in training and once in a save, it restarts, and nothing differs."""
    text = tmp_path / "text.txt"
    text.write_bytes(os.urandom(50_000))
    output = _train(
        tmp_path / "faults", text, "--kill-in-training", "14", "--kill-in-save", "25"
    )
    assert "SIGKILL in training" in output
    assert "SIGKILL in a save" in output
    assert "restart 1: restored" in output
    assert "restart 2: restored" in output
    _train(tmp_path / "clean", text)
    compared = subprocess.run(
        [
            *(sys.executable, str(ROOT / "launch" / "compare.py")),
            *(str(tmp_path / "faults"), str(tmp_path / "clean")),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert compared.returncode == 0, compared.stdout + compared.stderr
    assert "bit-identical" in compared.stdout
    for tracked in ("model", "optimizer", "rng", "loader", "scheduler"):
        assert tracked in compared.stdout
    leftovers = [p.name for p in (tmp_path / "faults").glob(".ckpt-*")]
    assert leftovers == [], "the save that died was swept by the next claim"
