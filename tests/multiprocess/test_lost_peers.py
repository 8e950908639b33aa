"""Ranks that are lost, slow, or whose filesystem hangs: named, waited for, or told so.

In all phases and ways: tests/crash/ranks/test_hangs.py.
"""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch
from harness import run_ranks, values_of
from lost_peer_helpers import (
    DEADLINE_SECONDS,
    NoNetwork,
    lose,
    lose_network,
    manager_of,
    network_of,
)
from outcome_helpers import make_checkpoint, outcome

from distckpt import Checkpoint, PerRank

# Lost


def _covers(*rows):
    return [pytest.mark.covers(f"waiting: {row}") for row in rows]


@pytest.mark.parametrize(
    ("how", "phase", "victim"),
    [
        pytest.param("kill", "WRITE", 1, marks=_covers("it dies")),
        pytest.param("kill", "READ", 0, marks=_covers("it is the chief, and dies")),
        pytest.param("stop", "PLAN", 2, marks=_covers("it is stopped, or cut off")),
        pytest.param(
            *("stop", "DECIDE", 0), marks=_covers("it is the chief, stopped or cut off")
        ),
        pytest.param(
            *("absent", "PROBE", 1), marks=_covers("it is alive, but does not come")
        ),
    ],
)
def test_lost_rank_is_named_in_time_by_all_others(tmp_path, how, phase, victim):
    lose(str(tmp_path / "run"), 3, how, phase, victim)


@pytest.mark.parametrize(
    "lost",
    [
        pytest.param(1, marks=_covers("it is stopped, or cut off")),
        pytest.param(
            0, marks=[*_covers("it is the chief, stopped or cut off"), pytest.mark.full]
        ),
    ],
)
def test_rank_that_is_cut_off_is_named_in_time_by_all_others(tmp_path, lost):
    try:
        with network_of(2) as network:
            lose_network(str(tmp_path / "run"), network, "drop", lost)
    except NoNetwork as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")


# Slow is not lost


def _write_slowly(rank, directory):
    """Save for three times as long as the deadline, one call at a time."""
    tensors = {f"t{index}": torch.full((2**19,), float(index)) for index in range(10)}
    checkpoint = Checkpoint(slow=PerRank(tensors if rank == 1 else {}))
    manager = manager_of(checkpoint, directory, DEADLINE_SECONDS)
    real = os.pwritev

    def slowly(*arguments):
        time.sleep(0.3 * DEADLINE_SECONDS)
        return real(*arguments)

    os.pwritev = slowly
    started = time.monotonic()
    return manager.save(), time.monotonic() - started


def test_a_slow_writer_is_waited_for_while_it_gets_on(tmp_path):
    """The deadline of the others counts from its last sign of progress."""
    directory = str(tmp_path / "run")
    for path, seconds in values_of(run_ranks(_write_slowly, 4, directory)):
        assert path == f"{directory}/ckpt-1"
        assert seconds > 3 * DEADLINE_SECONDS


# A read that hangs


def _hang_in_a_read(rank, directory):
    checkpoint = make_checkpoint()
    with manager_of(checkpoint, directory) as manager:
        manager.save()
    manager = manager_of(checkpoint, directory, DEADLINE_SECONDS)
    answers = threading.Event()
    real = os.preadv

    def hang(descriptor, buffers, offset):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(".safetensors") and offset >= 4096:  # a tensor's bytes
            answers.wait(30)
        return real(descriptor, buffers, offset)

    if rank == 1:
        os.preadv = hang
    first = outcome(manager.restore_or_initialize)
    refused = outcome(manager.save)
    os.preadv = real
    answers.set()
    return first, refused, outcome(manager.restore_or_initialize), outcome(manager.save)


@pytest.mark.covers("waiting: its filesystem hangs")
def test_a_read_that_hangs_ends_the_restore_on_all_ranks(tmp_path):
    """No older checkpoint is tried behind the same call; later all is well again."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_hang_in_a_read, 2, directory))
    for first, refused, second, saved in results:
        assert first.kind == "StorageTimeout" and first.text == results[0][0].text
        assert "rank 1: read " in first.text and "rank-0000" in first.text
        assert first.net_seconds < DEADLINE_SECONDS + 1
        assert refused.kind == "RestoreFailed" and "mixture" in refused.text
        assert second.text == f"{directory}/ckpt-1", second
        assert saved.kind == "ok", saved
