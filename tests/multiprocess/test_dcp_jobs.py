"""Jobs that save with torch's DCP and jobs of ours take over each other's checkpoints."""

from __future__ import annotations

import json
import os

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from harness import run_ranks, values_of
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distckpt import Checkpoint, CheckpointManager, cli


def _job(world_size, seed):
    """Make a sharded model and its optimizer, one step on; lengths are uneven."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3, bias=False))
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1 * (seed + 1))
    model(torch.ones(2, 7)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def _state(model, optimizer):
    """Return all that there is, put together."""
    full = {name: p.full_tensor().tolist() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state[parameter].items():
            whole = value.full_tensor() if isinstance(value, DTensor) else value
            full[f"{name}.{key}"] = whole.tolist()
    settings = [
        {k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups
    ]
    return full, settings


def _save_by_dcp(rank, world_size, path):
    model, optimizer = _job(world_size, 0)
    own, optim = get_state_dict(model, optimizer)
    dcp.save({"model": own, "optim": optim}, checkpoint_id=path)
    return _state(model, optimizer)


def _load_by_dcp(rank, world_size, path, flat):
    model, optimizer = _job(world_size, 1)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    own, optim = get_state_dict(model, optimizer, options=options)
    state = {"model": own, "optim": optim}
    dcp.load(state, checkpoint_id=path)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
        options=options,
    )
    return _state(model, optimizer)


def _go_on(rank, world_size, directory):
    model, optimizer = _job(world_size, 1)
    checkpoint = Checkpoint(model=model, optimizer=optimizer)
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        assert manager.restore_or_initialize() == os.path.join(directory, "ckpt-1")
        found = _state(model, optimizer)
        assert manager.save() == os.path.join(directory, "ckpt-2")
    return found


def _run(*arguments):
    result = CliRunner().invoke(cli.main, [*arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.full
@pytest.mark.parametrize("flat", [False, True])
def test_sharded_job_goes_from_dcp_to_ours_and_back_on_other_numbers_of_ranks(
    tmp_path, flat
):
    """Model, optimizer and settings, bit for bit, through import, a save, and export."""
    theirs, ours, back = (str(tmp_path / name) for name in ("theirs", "ours", "back"))
    saved = values_of(run_ranks(_save_by_dcp, 2, 2, theirs))[0]
    assert _run("verify", theirs)["ok"]
    _run("import", theirs, "--from", "dcp", "--output", ours, "--rename", "optim=optimizer")
    assert values_of(run_ranks(_go_on, 3, 3, ours)) == [saved] * 3
    _run("export", ours, "--to", "dcp", "--output", back, "--rename", "optimizer=optim")
    assert values_of(run_ranks(_load_by_dcp, 2, 2, back, flat)) == [saved] * 2
