"""The benchmark, run as users run it, on workloads that are next to nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from harness import EVERYTHING

import distckpt

# Each starts processes that import torch, which takes most of its time.
pytestmark = pytest.mark.full

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
    *{"save", "copy", "warm", "cold", "gate"},
    *{"eager.blocked", "eager.staged", "eager.durable"},
}
# The first calls have a test of their own, with fewer contenders.
STEADY = ("save", "async", "lost", "warm", "cold", "memory", "gate")
FIRST = {
    *{"made.first", "save.first", "warm.first", "cold.first", "eager.first", "lazy.first"},
    *{"eager.first_durable", "lazy.first_durable"},
}
READS = ("preadv", "preadv-small", "preadv-ahead", "mmap", "mmap-populate")


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


@pytest.mark.timeout(1200)
def test_all_phases_with_peers_that_fail_report_and_leave_nothing(tmp_path, stubs):
    """Every figure is there and positive; who could not go on is named, with reasons."""
    directory, found, chart = tmp_path / "disk", tmp_path / "b.json", tmp_path / "b.png"
    bench = start(
        directory,
        stubs,
        *("--workload", ",".join(WORKLOADS), "--phases", ",".join(STEADY)),
        *("--compare", "dcp-tuned,torch-save,safetensors,torchsnapshot"),
        *("--json", str(found), "--plot", str(chart)),
    )
    output, progress = bench.communicate(timeout=800)
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
    reads = {f"limit:{how}" for how in READS}
    assert phases["warm"]["results"].keys() == contenders | reads
    direct = {"limit:preadv-direct"} - set(workload["failures"])
    assert phases["cold"]["results"].keys() == contenders | reads | direct
    assert "dcp-tuned" in phases["lazy.lost"]["results"]
    for name in contenders - {"torch-save"}:
        assert phases["memory.restore"]["results"].keys() >= {name}


@pytest.mark.skipif(not EVERYTHING, reason="one rank of it is tried in CI, below")
@pytest.mark.timeout(120)
def test_first_calls_are_made_by_new_processes(tmp_path, stubs):
    """Each restores or saves rightly on all ranks; a peer that fails there is named."""
    found = tmp_path / "b.json"
    bench = start(
        tmp_path / "disk",
        stubs,
        *("--workload", "ddp-replicated", "--phases", "first"),
        *("--compare", "torchsnapshot", "--json", str(found)),
    )
    output, progress = bench.communicate(timeout=110)
    assert bench.returncode == 0, output + progress
    assert list((tmp_path / "disk").iterdir()) == []
    workload = json.loads(found.read_text())["workloads"]["ddp-replicated"]
    assert workload["failures"].keys() == {"torchsnapshot"}
    reason = workload["failures"]["torchsnapshot"]
    assert "rank 1: RuntimeError: made up" in reason
    assert workload["phases"].keys() == FIRST
    for row in FIRST:
        assert workload["phases"][row]["results"]["distckpt"]["min"] > 0
    assert "first restore of a process, warm cache" in output


def test_first_calls_of_one_process(tmp_path, stubs):
    """A new process for each; one that cannot restore what another has saved is named."""
    found = tmp_path / "b.json"
    done = subprocess.run(
        [
            *(
                sys.executable,
                "-m",
                "distckpt.bench",
                "--directory",
                str(tmp_path / "disk"),
            ),
            *("--workload", "ddp-replicated", "--scale", "0.0001", "--repeat", "1"),
            *("--phases", "first", "--compare", "torchsnapshot", "--json", str(found)),
        ],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, "PYTHONPATH": str(stubs)},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert list((tmp_path / "disk").iterdir()) == []
    workload = json.loads(found.read_text())["workloads"]["ddp-replicated"]
    # It has no way to restore.
    reason = "first call: rank 0: TypeError: Snapshot() takes no arguments"
    assert workload["failures"] == {"torchsnapshot": reason}
    assert workload["phases"].keys() == FIRST
    for row in FIRST:
        assert workload["phases"][row]["results"]["distckpt"]["min"] > 0
    assert "first restore of a process, warm cache" in done.stdout


SLOWER = """
import time
_save = CheckpointManager.save

def _save_slowly(self, *arguments, **options):
    time.sleep(1.5)
    return _save(self, *arguments, **options)

CheckpointManager.save = _save_slowly
"""


def test_slower_version_is_told_from_the_same_one(tmp_path):
    """Two folders in turns; each has its own library, and the slower one is found."""
    package = Path(distckpt.__file__).parent
    slow = tmp_path / "slow" / "distckpt"
    shutil.copytree(package, slow)  # with the compiled files, whose times stay the same
    with (slow / "manager.py").open("a") as file:
        file.write(SLOWER)
    found = tmp_path / "ab.json"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "distckpt.bench.ab"),
            *(str(package.parent), str(slow.parent), "--directory", str(tmp_path / "disk")),
            *("--workload", "ddp-replicated", "--scale", "0.0001", "--calls", "save"),
            *("--pairs", "6", "--repeat", "0", "--ranks", "1", "--json", str(found)),
        ],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"A: {package.parent}, imported from {package}/__init__.py" in done.stdout
    assert f"B: {slow.parent}, imported from {slow}/__init__.py" in done.stdout
    assert "B is slower than A: ddp-replicated save.first." in done.stdout
    rows = {row["row"]: row for row in json.loads(found.read_text())["ddp-replicated"]}
    assert rows.keys() == {"made.first", "save.first"}
    assert rows["made.first"]["verdict"] == ""
    assert rows["save.first"]["changed"]["low"] > 1
    assert list((tmp_path / "disk").iterdir()) == []


def test_version_that_is_none_is_refused(tmp_path):
    """Neither a folder with the package nor a revision: nothing is measured."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "distckpt.bench.ab", "no-such", "."),
            *("--directory", str(tmp_path)),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 3
    assert "no-such: neither a folder that holds distckpt nor a git" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_gpu_script_runs_dry_where_there_is_no_device(tmp_path):
    """One of the tests and one phase, on the CPU; it leaves only its results."""
    script = Path(__file__).parents[2] / "launch" / "gpu.sh"
    results = tmp_path / "results"
    settings = {
        "PYTHON": sys.executable,
        "PYTEST_ADDOPTS": "-k gaps",
        "BENCH_PHASES": "gate",
        "BENCH_DIRECTORY": str(tmp_path / "disk"),
        "RESULTS_DIRECTORY": str(results),
    }
    done = subprocess.run(
        [str(script), "--dry-run"],
        capture_output=True,
        text=True,
        timeout=110,
        env={**os.environ, **settings},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for line in ("device: the CPU (dry run)", "tests: ok", "bench: ok", " 1 passed"):
        assert line in done.stdout
    assert "gated call" in done.stdout
    assert json.loads((results / "bench.json").read_text())["options"]["phases"] == ["gate"]
    assert not (tmp_path / "disk").exists()


def test_interrupted_run_removes_what_it_wrote(tmp_path, stubs):
    """Ctrl-C, or a scheduler's SIGTERM, leaves no gigabytes behind."""
    directory = tmp_path / "disk"
    bench = start(directory, stubs, "--repeat", "1000", "--phases", "save")
    deadline = time.monotonic() + 60
    while not any(directory.glob("distckpt-bench-*/*/*/*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    bench.send_signal(signal.SIGINT)
    bench.communicate(timeout=300)
    assert bench.returncode != 0
    assert list(directory.iterdir()) == []


def test_help_and_list_need_no_process_group():
    """What can be measured is told without a job."""
    for option, word in (("--help", "torchrun"), ("--list", "many-small")):
        done = subprocess.run(
            [sys.executable, "-m", "distckpt.bench", option],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == 0, done.stderr
        assert word in done.stdout
