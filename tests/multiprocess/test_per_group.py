"""``PerGroup``: values that are equal within a group of ranks and differ between groups."""

from __future__ import annotations

import os

import pytest
import torch
from harness import run_ranks, values_of
from outcome_helpers import attempt_directory, outcome
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

from distckpt import (
    Checkpoint,
    CheckpointManager,
    OneRank,
    PerGroup,
    RestoreOptions,
    readers,
)
from distckpt.run_directory import AttemptDirectory


def _manager(checkpoint, directory):
    return CheckpointManager(checkpoint, directory, max_to_keep=None)


def _trained(seed):
    torch.manual_seed(seed)
    experts = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    optimizer = torch.optim.AdamW(experts.parameters())
    experts(torch.rand(3, 4)).sum().backward()
    optimizer.step()
    return experts, optimizer


def _state(experts, optimizer):
    found = {name: p.tolist() for name, p in experts.named_parameters()}
    for name, parameter in experts.named_parameters():
        found[f"{name} moment"] = optimizer.state[parameter]["exp_avg"].tolist()
    return found


def _mesh(groups, ranks):
    return init_device_mesh("cpu", (ranks, groups), mesh_dim_names=("dp", "ep"))


def _save_groups(rank, directory):
    mesh = _mesh(2, 2)
    number = mesh.get_local_rank("ep")
    experts, optimizer = _trained(seed=number)
    checkpoint = Checkpoint(
        experts=PerGroup(experts, mesh["ep"]),
        optimizer=optimizer,
        note=PerGroup({"stage": number}, mesh["ep"]),
        common=torch.ones(3),
    )
    with _manager(checkpoint, directory) as manager:
        path = manager.save()
        if rank == 3:
            experts[0].weight.data += 1
        drifted = outcome(manager.save)
    with _manager(Checkpoint(experts=experts), f"{directory}-plain") as manager:
        undeclared = outcome(manager.save)
    return path, number, _state(*_trained(number)), drifted, undeclared


def _restore_groups(rank, directory, groups, ranks):
    mesh = _mesh(groups, ranks)
    number = mesh.get_local_rank("ep")
    experts, optimizer = _trained(seed=9)
    checkpoint = Checkpoint(
        experts=PerGroup(experts, mesh["ep"]),
        optimizer=optimizer,
        note=PerGroup({}, mesh["ep"]),
        common=torch.zeros(3),
    )
    with _manager(checkpoint, directory) as manager:
        found = outcome(manager.restore_or_initialize)
    return found, number, _state(experts, optimizer), checkpoint.note.value


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint of two groups of two ranks each."""
    directory = str(tmp_path_factory.mktemp("groups") / "run")
    results = values_of(run_ranks(_save_groups, 4, directory))
    return directory, results, {number: state for _, number, state, *_ in results}


def test_each_group_s_values_are_stored_once_and_compared_within_the_group(saved):
    """Names differ between groups; work is shared within one."""
    _, results, _ = saved
    path, *_, drifted, undeclared = results[0]
    manifest = readers.read_manifest(AttemptDirectory.at(attempt_directory(path)))
    names = [*manifest.assignment.rows]
    assert "experts/~g0/0.weight" in names and "experts/~g1/0.weight" in names
    assert "optimizer/state/experts/~g1/0.weight/exp_avg" in names
    ranks = {p.rank for p in manifest.assignment.pieces_of("experts/~g1/0.weight")}
    assert ranks <= {1, 3}
    assert drifted.failures == {3: "experts/~g1/0.weight"}
    assert undeclared.kind == "SaveFailed" and "PerGroup(x, mesh)" in undeclared.text


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_groups_are_restored_on_another_number_of_ranks_each(saved, ranks):
    """As many groups, with one rank each."""
    directory, _, states = saved
    results = values_of(run_ranks(_restore_groups, 2 * ranks, directory, 2, ranks))
    for found, number, state, note in results:
        assert found.kind == "ok", found
        assert state == states[number]
        assert note == {"stage": number}


def test_another_number_of_groups_is_a_mismatch_that_says_so(saved):
    """One group of two ranks, where two groups have saved."""
    directory, *_ = saved
    for found, *_ in values_of(run_ranks(_restore_groups, 2, directory, 1, 2)):
        assert found.kind == "MismatchError"
        assert "experts: 2 groups in the checkpoint, 1 here" in found.text


def test_one_process_restores_one_group_by_rename(saved):
    """The recipe of the page on restoring."""
    _, results, states = saved
    experts, optimizer = _trained(seed=9)
    checkpoint = Checkpoint(experts=experts, optimizer=optimizer)
    options = RestoreOptions(
        include=["experts", "optimizer"],
        rename={"experts/~g1/": "experts/"},
        exclude="experts/~g*",
    )
    checkpoint.restore(results[0][0], options)
    assert _state(experts, optimizer) == states[1]


# Layouts that tell the truth need no declaration


def _layouts(rank, directory):
    torch.manual_seed(0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("edp", "ep"))
    # Experts as torchtitan has them: cut over the experts, then sharded by FSDP2.
    experts = nn.Module()
    whole = torch.rand(4, 6, 8)
    experts.weight = nn.Parameter(distribute_tensor(whole, mesh["ep"], [Shard(0)]))
    fully_shard(experts, mesh=mesh["edp"])
    world = init_device_mesh("cpu", (4,), mesh_dim_names=("tp",))
    tp = parallelize_module(nn.Linear(8, 8), world["tp"], ColwiseParallel())
    checkpoint = Checkpoint(
        experts=experts, tp=tp, seen=OneRank(torch.full((2,), float(rank)))
    )
    with _manager(checkpoint, directory) as manager:
        return outcome(manager.save), outcome(manager.save)


def test_layouts_that_tell_the_truth_need_no_declaration(tmp_path):
    """Experts over one dimension of a mesh and FSDP2 over another; tensor parallelism."""
    directory = str(tmp_path / "run")
    for first, second in values_of(run_ranks(_layouts, 4, directory)):
        assert (first.kind, second.kind) == ("ok", "ok"), (first, second)
    assert len(os.listdir(directory)) > 2
    live = Checkpoint(experts=_Weight(), tp=nn.Linear(8, 8), seen=OneRank(torch.ones(2)))
    live.restore(f"{directory}/ckpt-2")
    torch.manual_seed(0)
    assert torch.equal(live.experts.weight, torch.rand(4, 6, 8))
    assert live.seen.value.tolist() == [0.0, 0.0]


class _Weight(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(4, 6, 8))
