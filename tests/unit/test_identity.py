"""A restarted job is told from a second one by what launchers set."""

from __future__ import annotations

import os
import socket

import pytest

from distckpt import identity

HOST = socket.gethostname()


@pytest.mark.parametrize(
    ("environ", "run"),
    [
        ({"TORCHELASTIC_RUN_ID": "abc"}, "torchrun-abc"),
        ({"TORCHELASTIC_RUN_ID": "abc", "SLURM_JOB_ID": "7"}, "torchrun-abc"),
        ({"TORCHELASTIC_RUN_ID": "none", "SLURM_JOB_ID": "7"}, "slurm-7"),
        ({"SLURM_JOB_ID": "7", "MASTER_ADDR": "n1", "MASTER_PORT": "1"}, "slurm-7"),
        ({"MASTER_ADDR": "n1", "MASTER_PORT": "29500"}, "master-n1:29500"),
        ({"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}, f"master-{HOST}:1"),
        ({"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}, f"master-{HOST}:1"),
        ({"MASTER_ADDR": "::1", "MASTER_PORT": "1"}, f"master-{HOST}:1"),
        ({"MASTER_ADDR": "n1"}, f"process-{os.getpid()}@{HOST}"),
        ({"SLURM_JOB_ID": ""}, f"process-{os.getpid()}@{HOST}"),
        ({}, f"process-{os.getpid()}@{HOST}"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else value.split("-")[0],
)
def test_current_with_these_variables_is_this_run(environ, run):
    """The launcher that knows most decides."""
    assert identity.current(environ).run == run


@pytest.mark.parametrize(
    ("text", "restart"), [("0", 0), ("3", 3), ("", 0), ("-1", 0), ("x", 0), ("²", 0)]
)
def test_current_with_restart_count_takes_only_numbers(text, restart):
    """What is no number counts as no restart."""
    found = identity.current({"TORCHELASTIC_RESTART_COUNT": text})
    assert found.restart == restart


def test_current_with_very_long_run_id_is_cut():
    """A run id always fits into a record."""
    assert len(identity.current({"TORCHELASTIC_RUN_ID": "x" * 1000}).run) == 256


def test_current_by_default_reads_the_process_environment(monkeypatch):
    """Without an argument it is this job."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "from-environment")
    assert identity.current().run == "torchrun-from-environment"
