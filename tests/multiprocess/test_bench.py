"""The benchmark, run as users run it, on workloads that are next to nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import EVERYTHING

WORKLOADS = ["gpt2-sharded", *(["ddp-replicated"] if EVERYTHING else [])]
# What a peer could be like: one that is not there, and one that fails on one rank alone,
# while the other waits for it.
MISSING = "raise ModuleNotFoundError('made up: it is not there')"
FAILING = """
import os
import torch.distributed as dist

class StateDict(dict):
    pass

class Snapshot:
    @staticmethod
    def take(path, app_state, pg, replicated):
        if os.environ["RANK"] == "1":
            raise RuntimeError("made up: no more paper")
        dist.barrier(pg)
"""
PHASES_IN_SECONDS = {
    *{"save", "save.first", "copy", "warm", "warm.first", "cold", "gate"},
    *{"eager.first", "eager.blocked", "eager.staged", "eager.durable"},
}


def start(
    directory: Path, stubs: Path, *arguments: str, **options
) -> subprocess.Popen[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--master-port", str(port), "-m", "distckpt.bench"),
        *("--directory", str(directory), "--scale", "0.0005", "--repeat", "1", *arguments),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(stubs)}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


@pytest.fixture
def stubs(tmp_path):
    folder = tmp_path / "stubs"
    for name, text in (("safetensors", MISSING), ("torchsnapshot", FAILING)):
        (folder / name).mkdir(parents=True)
        (folder / name / "__init__.py").write_text(text)
    return folder


@pytest.mark.timeout(300)
def test_all_phases_with_peers_that_fail_report_and_leave_nothing(tmp_path, stubs):
    """Every figure is there and positive; who could not go on is named, with reasons."""
    directory, found, chart = tmp_path / "disk", tmp_path / "b.json", tmp_path / "b.png"
    bench = start(
        directory,
        stubs,
        *("--workload", ",".join(WORKLOADS)),
        *("--compare", "dcp-tuned,torch-save,safetensors,torchsnapshot"),
        *("--json", str(found), "--plot", str(chart)),
    )
    output, progress = bench.communicate(timeout=280)
    assert bench.returncode == 0, output + progress
    assert list(directory.iterdir()) == [], "everything is removed"
    results = json.loads(found.read_text())
    assert results["environment"]["world_size"] == 2
    assert list(results["workloads"]) == WORKLOADS
    for name, workload in results["workloads"].items():
        assert name in output
        check_workload(workload)
    if importlib.util.find_spec("matplotlib") is None:
        assert "no chart was drawn" in progress
    else:
        assert chart.read_bytes().startswith(b"\x89PNG")


def check_workload(workload) -> None:
    assert set(workload["failures"]) == {"safetensors", "torchsnapshot"}
    assert "not installed" in workload["failures"]["safetensors"]
    assert "rank 1: RuntimeError: made up" in workload["failures"]["torchsnapshot"]
    phases = workload["phases"]
    assert phases.keys() >= PHASES_IN_SECONDS
    for phase in PHASES_IN_SECONDS:
        assert phases[phase]["unit"] == "seconds"
        for name, series in phases[phase]["results"].items():
            assert series["min"] > 0, (phase, name)
            assert series["min"] <= series["median"] <= series["max"]
    limits = ("buffered", "sync-file-range", "dontcache", "direct")
    able = {f"limit:{how}" for how in limits} - set(workload["failures"])
    contenders = {"distckpt", "dcp-tuned", "torch-save"}
    assert phases["save"]["results"].keys() >= contenders | able - {"limit:direct"}
    for phase in ("warm", "cold"):
        assert phases[phase]["results"].keys() == contenders | {
            "limit:preadv",
            "limit:mmap",
        }
    assert "dcp-tuned" in phases["lazy.lost"]["results"]
    for name in contenders - {"torch-save"}:
        assert phases["memory.restore"]["results"].keys() >= {name}


def test_interrupted_run_removes_what_it_wrote(tmp_path, stubs):
    """Ctrl-C, or a scheduler's SIGTERM, leaves no gigabytes behind."""
    directory = tmp_path / "disk"
    bench = start(directory, stubs, "--repeat", "1000", "--phases", "save")
    deadline = time.monotonic() + 60
    while not any(directory.glob("distckpt-bench-*/*/*/*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    bench.send_signal(signal.SIGINT)
    bench.communicate(timeout=50)
    assert bench.returncode != 0
    assert list(directory.iterdir()) == []


def test_help_and_list_need_no_process_group():
    """What can be measured is told without a job."""
    for option, word in (("--help", "torchrun"), ("--list", "many-small")):
        done = subprocess.run(
            [sys.executable, "-m", "distckpt.bench", option],
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        assert word in done.stdout
