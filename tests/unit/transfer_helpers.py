"""What the tests of export and import share: a small job's state, and comparisons."""

from __future__ import annotations

import json
import os

import numpy as np
import torch
from click.testing import CliRunner
from torch_helpers import assert_same
from unit_helpers import make_saved

from distckpt import cli, dtypes
from distckpt.layout import SHARDED, SPLIT, Row
from distckpt.sharding import Sharding, mesh_of


class Tied(torch.nn.Module):
    """A model with a tied tensor, a buffer and a normalization."""

    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(6, 4)
        self.norm = torch.nn.BatchNorm1d(4)
        self.head = torch.nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.norm(self.embed(x)))


def make_job(seed=0, model=Tied):
    """Make a model, an optimizer of two groups and a scheduler, all of them one step on."""
    torch.manual_seed(seed)
    model = model()
    groups = [{"params": model.embed.parameters(), "lr": 0.1}]
    groups.append({"params": model.norm.parameters(), "weight_decay": 0.0})
    optimizer = torch.optim.AdamW(groups, lr=0.01 + seed)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    model(torch.arange(6)).square().mean().backward()
    optimizer.step()
    optimizer.zero_grad()
    for _ in range(seed):
        scheduler.step()
    return model, optimizer, scheduler


def assert_same_job(found, expected):
    """Fail unless two jobs' objects are equal down to every bit."""
    assert_same(dict(found[0].state_dict()), dict(expected[0].state_dict()))
    one, other = (dict(job[1].state_dict()) for job in (found, expected))
    assert_same(one["state"], other["state"])
    for mine, theirs in zip(one["param_groups"], other["param_groups"], strict=True):
        assert_same(dict(sorted(mine.items())), dict(sorted(theirs.items())))
    assert_same(found[2].state_dict(), expected[2].state_dict())


def make_odd(run_dir, names=None, world_size=3):
    """Save tensors of all dtypes and odd shapes by simulated ranks; returns their bytes."""
    rows, arrays = [], {}
    for name in sorted(dtypes.names()) if names is None else names:
        size = dtypes.item_size_bytes(name)
        for shape in ((5, 3), (), (0, 2)):
            data = np.arange(np.prod(shape) * size, dtype=np.uint8) % 2
            full = f"odd/{name}.{len(rows)}"
            rows.append(Row(full, name, shape, SPLIT))
            arrays[full] = data.reshape(-1, size).view(f"V{size}").reshape(shape)
    for placement in ("S0", "S1"):
        sharding = Sharding(mesh_of((world_size,), range(world_size)), (placement,))
        full = f"odd/cut.{placement}"
        rows.append(Row(full, "int32", (40, 50), SHARDED, sharding=sharding))
        arrays[full] = np.arange(2000, dtype=np.int32).reshape(40, 50)
    saved = make_saved(run_dir, 7, table=tuple(rows), arrays=arrays, world_size=world_size)
    return saved, {
        row.name: (row.dtype, row.shape, arrays[row.name].tobytes()) for row in rows
    }


def run(*arguments):
    """Run the command in this process."""
    return CliRunner().invoke(cli.main, list(arguments), catch_exceptions=False)


def run_ok(*arguments):
    """Run the command and return what it says as JSON."""
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def left_beside(target):
    """Return what is in the directory of a target that was not made."""
    return sorted(os.listdir(os.path.dirname(target)))
