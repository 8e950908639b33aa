"""Fixtures of the unit tier: a clock, a run directory, quiet property tests."""

from __future__ import annotations

import os
import tempfile
import time

import pytest
from examples import examples
from hypothesis import HealthCheck, settings

# The same examples on every run, and no database: a red test is red for everybody.
settings.register_profile(
    "distckpt",
    max_examples=examples(100),
    database=None,
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
settings.load_profile("distckpt")


class Clock:
    """A wall clock that stands still until a test moves it."""

    def __init__(self, now):
        self.now = float(now)

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    """Replace ``time.time``; timeouts, which use the monotonic clock, go on."""
    clock = Clock(1_700_000_000.0)
    monkeypatch.setattr(time, "time", clock)
    return clock


@pytest.fixture
def run_dir():
    """Return the path of a run directory that does not exist yet.

    In memory where that is possible: thousands of fsyncs on a disk take a minute.
    """
    memory = "/dev/shm"
    parent = memory if os.access(memory, os.W_OK) else None
    # A manager that a test has left open may still tell its history of the end.
    with tempfile.TemporaryDirectory(
        prefix="distckpt-", dir=parent, ignore_cleanup_errors=True
    ) as directory:
        yield os.path.join(directory, "run")


@pytest.fixture
def on_a_mesh(tmp_path):
    """Return a function that makes a sharded tensor of this process alone."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    store = tmp_path / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    mesh = init_device_mesh("cpu", (1,))

    def make(local, placements=None, **more):
        placed = [Shard(0)] if placements is None else placements
        return DTensor.from_local(local, mesh, placed, run_check=False, **more)

    yield make
    dist.destroy_process_group()
