"""The harness itself: it must show failures, deaths and hangs for what they are."""

import os
import signal
import time
from pathlib import Path

import torch
import torch.distributed as dist
from harness import run_ranks, values_of


def _sum_of_ranks(rank):
    tensor = torch.tensor([rank])
    dist.all_reduce(tensor)
    return int(tensor)


def _fail_on_one(rank):
    if rank == 1:
        raise ValueError("only me")
    return rank


def _die_on_one(rank, flag):
    if rank == 0:
        Path(flag).touch()
        return rank
    while not os.path.exists(flag):  # rank 0 may still be connecting
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)
    return None


def _hang_on_one(rank):
    if rank == 1:
        time.sleep(60)
    return rank


def test_ranks_talk_over_gloo():
    """Ranks are one process group."""
    assert values_of(run_ranks(_sum_of_ranks, 4)) == [6, 6, 6, 6]


def test_an_error_on_one_rank_leaves_the_others_alone():
    """One rank's exception is told, and the other returns."""
    results = run_ranks(_fail_on_one, 2)
    assert results[0].value == 0
    assert results[1].error == ("ValueError", "only me")


def test_a_killed_rank_is_reported_with_its_signal(tmp_path):
    """A death shows as a negative exit code."""
    results = run_ranks(_die_on_one, 2, str(tmp_path / "flag"))
    assert results[0].ok
    assert results[1].exit_code == -signal.SIGKILL


def test_a_hanging_rank_is_killed_at_the_deadline():
    """What still runs at the deadline is killed and said to be."""
    results = run_ranks(_hang_on_one, 2, timeout=2)
    assert results[0].ok
    assert results[1].killed
