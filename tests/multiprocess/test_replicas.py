"""Replicas that have drifted apart are found before a checkpoint is made of a mixture."""

from __future__ import annotations

import pytest
import torch
from harness import run_ranks, values_of
from outcome_helpers import committed, outcome
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from distckpt import Checkpoint, CheckpointManager, CheckpointOptions

COMPARED = CheckpointOptions(validate_replicas=True)
BEHIND = CheckpointOptions(validate_replicas=True, enable_async=True)


def _model():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def _drift(rank, directory, drifted, options):
    model, optimizer = _model()
    # One rank's buffers are saved anyway.
    model[1].running_mean.fill_(float(rank))
    manager = CheckpointManager(
        Checkpoint(model=model, optimizer=optimizer), directory, max_to_keep=None
    )
    assert manager.save(options=options) == f"{directory}/ckpt-1"
    weight = model[0].weight
    with torch.no_grad():
        if rank in drifted:
            weight[0, 0] += 1e-6
            optimizer.state[weight]["exp_avg"].view(torch.int32)[1, 1] ^= 1
    failed = outcome(manager.save, options=options)
    unnoticed = outcome(manager.save)
    manager.close()
    return failed, unnoticed


@pytest.mark.parametrize("drifted", [pytest.param([1], marks=pytest.mark.full), [0, 2]])
@pytest.mark.parametrize("options", [COMPARED, BEHIND], ids=["sync", "async"])
def test_replicas_that_differ_fail_the_save_and_are_named(tmp_path, drifted, options):
    """By tensor and by rank; nothing is left of the save, and its number is free."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_drift, 5, directory, drifted, options))
    for failed, unnoticed in results:
        assert failed.kind == "SaveFailed", failed
        assert failed.failures == dict.fromkeys(
            drifted, "model/0.weight, optimizer/state/model/0.weight/exp_avg"
        )
        assert unnoticed.text == f"{directory}/ckpt-2"
    assert len({failed.text for failed, _ in results}) == 1
    assert committed(directory) == ["ckpt-2", "ckpt-1"]


def _sharded(rank, directory, bad_rank):
    mesh = init_device_mesh("cpu", (2, 2))
    whole = torch.arange(48.0).view(8, 6)
    tensors = {
        "hybrid": distribute_tensor(
            whole, mesh, [Replicate(), Shard(0)], src_data_rank=None
        ),
        "cut": distribute_tensor(whole, mesh, [Shard(0), Shard(1)], src_data_rank=None),
    }
    for tensor in tensors.values():
        if rank == bad_rank:
            tensor.to_local().add_(1)
    manager = CheckpointManager(Checkpoint(t=tensors), directory, max_to_keep=None)
    found = outcome(manager.save, options=COMPARED)
    manager.close()
    return found


def test_parts_are_compared_with_those_that_hold_the_same(tmp_path):
    """Of a mesh with replicas; what nobody else holds may be what it is."""
    directory = str(tmp_path / "run")
    for found in values_of(run_ranks(_sharded, 4, directory, None)):
        assert found.kind == "ok", found
    for found in values_of(run_ranks(_sharded, 4, f"{directory}-2", 3)):
        assert found.kind == "SaveFailed"
        # Of two that differ nobody knows which is right: the second one is named.
        assert found.failures == {3: "t/hybrid[4, 0]"}
