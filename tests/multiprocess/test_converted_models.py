"""Models under FSDP2 can be converted and moved while a Checkpoint tracks them."""

from __future__ import annotations

import pytest
import torch
from harness import run_ranks, values_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from distckpt import Checkpoint, CheckpointManager, CheckpointOptions


def _convert(rank, directory, moment):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 2))
    mesh = init_device_mesh("cpu", (2,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(3, 6)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    checkpoint = Checkpoint(model=model, optimizer=optimizer)
    manager = CheckpointManager(checkpoint, directory, 2)
    manager.restore_or_initialize()
    options = {"lazy": CheckpointOptions(enable_async=True, staging="lazy")}
    manager.save(options=options.get(moment))
    if moment == "lazy":
        manager.wait_staged()
    if moment == "restored":
        manager.restore("latest")
    if moment == "closed":
        manager.close()
    model.to(torch.bfloat16)
    model.half()
    model.cpu()
    model.float()
    if moment != "closed":
        manager.save()
        manager.restore("latest")
        model.to_empty(device="cpu")
        manager.restore("latest")
        manager.close()
    return [parameter.dtype for parameter in model.parameters()]


@pytest.mark.parametrize("moment", ["saved", "restored", "lazy", "closed"])
def test_sharded_model_is_converted_after_a_call_of_the_manager(moment, tmp_path):
    """``nn.Module.to`` swaps DTensors, which torch refuses where weak references are."""
    for dtypes in values_of(run_ranks(_convert, 2, str(tmp_path / "run"), moment)):
        assert dtypes == [torch.float32] * 4
