"""Ranks meet through a store that has outlived their predecessors, whatever is in it."""

from __future__ import annotations

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks, values_of
from outcome_helpers import make_checkpoint, outcome

import distckpt
from distckpt import CheckpointManager


@pytest.fixture
def agents_store():
    """Serve a store as torchrun's agent does; returns its port."""
    store = dist.TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    yield store.port
    del store


def _meet(rank, port, world_size, restarts, directory, absent=()):
    """Be a worker of torchrun's: meet the others, and save with them."""
    if rank in absent:
        return None
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_RUN_ID="job",
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT=str(restarts[rank]),
    )
    began = outcome(
        distckpt.init_process_group, "gloo", timeout=timedelta(seconds=4 if absent else 20)
    )
    if absent:
        return began
    assert began.kind == "ok", began
    total = torch.ones(1)
    dist.all_reduce(total)
    with CheckpointManager(make_checkpoint(), directory, max_to_keep=None) as manager:
        manager.restore_or_initialize()
        return total.item(), os.path.basename(manager.save())


def test_ranks_with_different_restart_counts_meet_again_and_again(tmp_path, agents_store):
    """An elastic job: agents that joined at different times have counted differently."""
    directory = str(tmp_path / "run")
    starts = [(2, [0, 0]), (2, [1, 1]), (1, [2]), (3, [0, 2, 0]), (2, [0, 0]), (2, [2, 1])]
    for number, (world_size, restarts) in enumerate(starts):
        found = values_of(
            run_ranks(
                *(_meet, world_size, agents_store, world_size, restarts, directory),
                process_group=False,
            )
        )
        assert found == [(world_size, f"ckpt-{number + 1}")] * world_size


@pytest.mark.parametrize("absent", [0, 2])
def test_rank_that_does_not_come_is_no_endless_wait(tmp_path, agents_store, absent):
    arguments = (agents_store, 3, [0, 0, 0], str(tmp_path / "run"), (absent,))
    results = values_of(run_ranks(_meet, 3, *arguments, process_group=False))
    for rank, found in enumerate(results):
        if rank != absent and not (absent == 2 and rank == 1):
            assert found.kind == "DistStoreError", found
            assert found.net_seconds < 6, found
    if absent == 2:
        assert "rank 2 did not come" in results[0].text
