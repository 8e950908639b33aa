"""``Parts``: the stages of one model, and their optimizers, share one namespace."""

from __future__ import annotations

import pytest
import torch
from test_own_protocol import ByPostHook, Old, Renamed
from torch import nn
from torch_helpers import assert_same, rows_of, save

from distckpt import Checkpoint, ConfigError, Parts, RestoreOptions, UnsupportedError


class Whole(nn.Module):
    """A model that can be cut into stages, which keep its names."""

    def __init__(self, seed=0, layers=(0, 1, 2)):
        super().__init__()
        torch.manual_seed(seed)
        every = {str(i): nn.Linear(3, 3) for i in range(3)}
        self.layers = nn.ModuleDict({name: every[name] for name in map(str, layers)})

    def forward(self, x):
        for layer in self.layers.values():
            x = layer(x).tanh()
        return x


def stages(seed=0):
    return [Whole(seed, (0, 2)), Whole(seed, (1,))]


def optimizers(parts, lr=0.1):
    return [torch.optim.AdamW(part.parameters(), lr=lr) for part in parts]


def train(parts, their_optimizers):
    for part, optimizer in zip(parts, their_optimizers, strict=True):
        part(torch.ones(2, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()


def test_parts_are_saved_under_the_names_of_the_whole(run_dir):
    """And restored as a whole, or in other parts; the moments too."""
    parts = stages()
    theirs = optimizers(parts)
    train(parts, theirs)
    path = save(run_dir, model=Parts(parts), optimizer=Parts(theirs))
    whole = Whole(1)
    optimizer = torch.optim.AdamW(whole.parameters(), lr=0.7)
    Checkpoint(model=whole, optimizer=optimizer).restore(path)
    weight = whole.layers["1"].weight
    assert torch.equal(weight, parts[1].layers["1"].weight)
    moment = theirs[1].state[parts[1].layers["1"].weight]["exp_avg"]
    assert torch.equal(optimizer.state[weight]["exp_avg"], moment)
    assert optimizer.param_groups[0]["lr"] == 0.1

    again = save(f"{run_dir}-whole", model=whole, optimizer=optimizer)
    assert {*rows_of(again)} == {*rows_of(path)}
    others = [Whole(2, (0,)), Whole(2, (1, 2))]
    their_optimizers = optimizers(others, lr=0.3)
    Checkpoint(model=Parts(others), optimizer=Parts(their_optimizers)).restore(again)
    assert_same(
        dict(others[1].layers["2"].state_dict()), dict(whole.layers["2"].state_dict())
    )
    assert [o.param_groups[0]["lr"] for o in their_optimizers] == [0.1, 0.1]


def test_name_in_two_parts_is_refused(run_dir):
    """One of them would be lost."""
    with pytest.raises(UnsupportedError, match=r"model/layers\.0\.weight: two tracked"):
        save(run_dir, model=Parts([Whole(0, (0,)), Whole(0, (0, 1))]))


def test_optimizers_of_different_classes_are_refused(run_dir):
    """Nothing would tell which class a parameter's state is of."""
    parts = stages()
    mixed = [
        torch.optim.AdamW(parts[0].parameters()),
        torch.optim.SGD(parts[1].parameters()),
    ]
    with pytest.raises(UnsupportedError, match="parts of different classes: AdamW and SGD"):
        save(run_dir, model=Parts(parts), optimizer=Parts(mixed))


@pytest.mark.parametrize("given", [[], [3], [nn.Linear(1, 1), 3]])
def test_parts_of_anything_else_are_refused(given):
    """When they are made."""
    with pytest.raises(ConfigError, match="Parts takes modules or optimizers"):
        Parts(given)


def test_load_code_of_a_part_sees_its_own_names_only(run_dir):
    """Hooks of one stage are not given the tensors of another."""
    path = save(
        run_dir,
        model=Parts([nn.ModuleDict({"a": Old(5.0)}), nn.ModuleDict({"b": Old(7.0)})]),
    )
    cached = nn.ModuleDict({"c": ByPostHook()})
    parts = Parts([nn.ModuleDict({"a": Renamed()}), nn.ModuleDict({"b": Old(1.0)}), cached])
    Checkpoint(model=parts).restore(path, RestoreOptions(exclude="model/c"))
    assert parts[0]["a"].new.tolist() == [5.0] * 3
    assert parts[1]["b"].old.tolist() == [7.0] * 3
