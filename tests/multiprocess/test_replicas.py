"""Replicas that have drifted apart are found before a checkpoint is made of a mixture."""

from __future__ import annotations

import json

import pytest
import torch
from click.testing import CliRunner
from harness import run_ranks, values_of
from outcome_helpers import committed, outcome
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointOptions,
    OneRank,
    PerGroup,
    Replicated,
    RestoreOptions,
)
from distckpt.cli import main

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
    checkpoint = Checkpoint(model=model, optimizer=optimizer)
    manager = CheckpointManager(
        checkpoint, directory, max_to_keep=None, replicas="unchecked"
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


@pytest.mark.full
def test_parts_are_compared_with_those_that_hold_the_same(tmp_path):
    """Of a mesh with replicas; what nobody else holds may be what it is."""
    directory = str(tmp_path / "run")
    for found in values_of(run_ranks(_sharded, 4, directory, None)):
        assert found.kind == "ok", found
    for found in values_of(run_ranks(_sharded, 4, f"{directory}-2", 3)):
        assert found.kind == "SaveFailed"
        # Of two that differ nobody knows which is right: the second one is named.
        assert found.failures == {3: "t/hybrid[4, 0]"}


# What every manager compares, unless it is told not to


def _outcome_of(checkpoint, directory, **options):
    with CheckpointManager(checkpoint, directory, max_to_keep=None, **options) as manager:
        return outcome(manager.save), outcome(manager.save)


class Loader:
    """Its state has the tensor of a generator, as those of torchdata have."""

    def __init__(self, seed):
        self.generator = torch.Generator().manual_seed(seed)

    def state_dict(self):
        return {"position": 0, "generator": self.generator.get_state()}

    def load_state_dict(self, state):
        self.generator.set_state(state["generator"])


def _module(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))


def _average(rank):
    averaged = torch.optim.swa_utils.AveragedModel(_module(0))
    with torch.no_grad():
        averaged.module[0].weight[5, 5] += rank
    return averaged


# By name: what differs between ranks, and the names that the error has.
DIFFERENT = {
    "tensor": (lambda rank: torch.full((3,), rank), "x"),
    "in a dict": (lambda rank: {"ema": [torch.full((3,), rank)]}, "x/ema/~i0"),
    "generator": (Loader, "x/generator"),
    "same names": (_module, "x/0.bias"),
    "average": (_average, "x/module.0.weight"),
    "strided": (lambda rank: torch.full((3, 4), rank).t(), "x"),
}


def _save_different(rank, directory, name, options):
    return _outcome_of(Checkpoint(x=DIFFERENT[name][0](rank)), directory, **options)


@pytest.mark.parametrize(
    "name",
    ["tensor", "generator", "same names"]
    + [
        pytest.param(n, marks=pytest.mark.full) for n in ("in a dict", "average", "strided")
    ],
)
def test_what_differs_between_ranks_fails_the_first_save(tmp_path, name):
    """The error names it, the rank, and the ways to declare it."""
    directory = str(tmp_path / "run")
    for both in values_of(run_ranks(_save_different, 2, directory, name, {})):
        for found in both:
            assert found.kind == "SaveFailed", found
            assert f"rank 1: {DIFFERENT[name][1]}" in found.text, found.text
            for way in ("PerRank(x)", "PerGroup(x, mesh)", "OneRank(x)"):
                assert way in found.text
    assert committed(directory) == []


@pytest.mark.full
def test_nothing_is_compared_where_it_is_said_so(tmp_path):
    """The lowest rank's is stored then."""
    options = {"replicas": "unchecked"}
    results = values_of(run_ranks(_save_different, 2, str(tmp_path), "tensor", options))
    assert {found.kind for both in results for found in both} == {"ok"}


def _drift_later(rank, directory, mode, size, saves):
    weight = nn.Parameter(torch.zeros(size))
    model = nn.ParameterDict({"w": weight})
    checkpoint = Checkpoint(model=model)
    with CheckpointManager(checkpoint, directory, 1, replicas=mode) as manager:
        manager.save()
        with torch.no_grad():
            weight[size // 3] += rank
        return [outcome(manager.save).kind for _ in range(saves)]


@pytest.mark.parametrize(
    "mode", ["sampled", pytest.param("always", marks=pytest.mark.full)]
)
def test_a_single_number_that_drifts_is_found_within_the_promised_saves(tmp_path, mode):
    """Blocks take turns: of 20 MiB, every byte has its turn in five saves."""
    size, turns = 5 * 2**20, 5 if mode == "sampled" else 1
    for found in values_of(run_ranks(_drift_later, 2, tmp_path, mode, size, turns)):
        assert "SaveFailed" in found


def _drift_after_restore(rank, directory):
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(5 * 2**20))})
    with CheckpointManager(Checkpoint(model=model), directory, max_to_keep=9) as manager:
        manager.save()
        manager.restore_or_initialize()
        with torch.no_grad():
            model["w"][12345] += rank
        return outcome(manager.save).kind


def test_first_save_after_a_restore_compares_everything(tmp_path):
    """What a rank has read may be other bytes than those of others."""
    assert values_of(run_ranks(_drift_after_restore, 2, tmp_path)) == ["SaveFailed"] * 2


def _differing_buffers(rank, directory):
    import logging

    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("distckpt").addHandler(handler)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    for parameter in model.parameters():
        nn.init.constant_(parameter, 0.5)
    model[1].running_mean.fill_(rank)
    with CheckpointManager(Checkpoint(model=model), directory, max_to_keep=None) as manager:
        for _ in range(3):
            manager.save()
            model[1].running_mean.add_(rank + 1)
    live = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    with CheckpointManager(Checkpoint(model=live), directory, max_to_keep=None) as manager:
        manager.restore_or_initialize()
    texts = [one.getMessage() for one in records if "buffers differ" in one.getMessage()]
    return texts, live[1].running_mean.tolist()


def test_buffers_that_differ_are_named_once_in_the_log(tmp_path):
    """As those of batch normalization under DDP; the lowest rank's are stored."""
    results = values_of(run_ranks(_differing_buffers, 3, tmp_path))
    assert [mean for _, mean in results] == [[2.0] * 4] * 3
    (text,), *others = (texts for texts, _ in results)
    assert "those of rank 0 are stored: model/1.running_mean." in text
    assert others == [[], []]


def _one_rank(rank, directory):
    mark = OneRank({"t": torch.full((3,), rank), "n": rank, "loader": Loader(rank)})
    checkpoint = Checkpoint(x=mark, step=1)
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        saved = [outcome(manager.save).kind for _ in range(2)]
    fresh = OneRank({"t": torch.full((3,), 9), "n": 9, "loader": Loader(9)})
    with CheckpointManager(Checkpoint(x=fresh, step=0), directory, None) as manager:
        manager.restore_or_initialize()
    found = fresh.value
    state = Loader(0).state_dict()["generator"]
    alike = torch.equal(found["loader"].generator.get_state(), state)
    return saved, found["t"].tolist(), found["n"], alike


def test_what_one_rank_has_is_stored_and_shown_as_that(tmp_path):
    """All get it back."""
    results = values_of(run_ranks(_one_rank, 3, tmp_path))
    assert results == [(["ok", "ok"], [0, 0, 0], 0, True)] * 3
    shown = CliRunner().invoke(main, ["show", str(tmp_path)])
    assert "0 (one rank's)" in shown.stdout
    values = json.loads(CliRunner().invoke(main, ["show", "--json", str(tmp_path)]).stdout)
    assert values["values"]["x/n"] == {"$one": 0}


class Experts(nn.Module):
    """The same names on all ranks, other values for each expert."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.up = nn.Linear(4, 8)


def _grouped(rank, directory, shape, saves):
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "ep"))
    group = mesh["ep"].get_local_rank()
    experts = Experts(group if saves else 7)
    optimizer = torch.optim.AdamW(experts.parameters(), lr=0.1)
    if saves:
        experts.up(torch.ones(2, 4)).sum().backward()
        optimizer.step()
    checkpoint = Checkpoint(experts=PerGroup(experts, mesh["ep"]), optimizer=optimizer)
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        found = outcome(manager.save if saves else manager.restore_or_initialize)
    moment = optimizer.state.get(experts.up.weight, {}).get("exp_avg")
    return found, group, experts.up.weight.tolist(), moment is not None and moment.tolist()


def test_groups_are_stored_each_and_restored_by_other_numbers_of_ranks(tmp_path):
    """Two experts on four ranks, then on two; the optimizer follows."""
    saved = values_of(run_ranks(_grouped, 4, tmp_path, (2, 2), True))
    expected = {group: (weight, moment) for _, group, weight, moment in saved}
    assert len(expected) == 2 and expected[0] != expected[1]
    for found, group, weight, moment in values_of(
        run_ranks(_grouped, 2, tmp_path, (1, 2), False)
    ):
        assert found.kind == "ok", found
        assert (weight, moment) == expected[group]
    for found, *_ in values_of(run_ranks(_grouped, 3, tmp_path, (1, 3), False)):
        assert found.kind == "MismatchError"
        assert "experts: 2 groups in the checkpoint, 3 here" in found.text


def _drifted_group(rank, directory):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    experts = Experts(mesh["ep"].get_local_rank())
    with torch.no_grad():
        experts.up.weight[0, 0] += rank == 3
    checkpoint = Checkpoint(experts=PerGroup(experts, mesh["ep"]))
    return _outcome_of(checkpoint, directory)[0]


@pytest.mark.full
def test_replicas_of_one_group_are_compared_among_themselves(tmp_path):
    """The error says which rank of the group is another."""
    for found in values_of(run_ranks(_drifted_group, 4, tmp_path)):
        assert found.failures == {3: "experts/~g1/up.weight"}


def _on_disjoint_meshes(rank, directory, declared, drifted):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("group", "cut"))["cut"]
    whole = torch.arange(12.0).view(6, 2) + (drifted and rank == 3)
    tensor = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    value = Replicated({"w": tensor}) if declared else {"w": tensor}
    return _outcome_of(Checkpoint(experts=value), directory)


@pytest.mark.full
def test_one_name_on_disjoint_meshes_must_be_declared(tmp_path):
    """Whatever the values are: they may be experts, or copies."""
    for both in values_of(run_ranks(_on_disjoint_meshes, 4, tmp_path / "a", False, False)):
        for found in both:
            assert found.kind == "ConfigError"
            assert "Checkpoint(experts=PerGroup(experts, mesh))" in found.text
            assert "Checkpoint(experts=Replicated(experts))" in found.text
    for both in values_of(run_ranks(_on_disjoint_meshes, 4, tmp_path / "b", True, False)):
        assert [found.kind for found in both] == ["ok", "ok"], both
    for both in values_of(run_ranks(_on_disjoint_meshes, 4, tmp_path / "c", True, True)):
        assert both[0].kind == "SaveFailed"
        assert both[0].failures == {3: "experts/w[3, 0]"}


def _tied_stages(rank, directory, drifts):
    """Have a tensor in the first and in the last stage, as tied embeddings are."""
    stage = nn.ParameterDict({f"layer{rank}": nn.Parameter(torch.ones(2))})
    if rank != 1:
        stage["embedding"] = nn.Parameter(torch.full((3,), float(drifts and rank)))
    return _outcome_of(Checkpoint(model=stage), directory)


def test_what_some_stages_of_a_pipeline_share_is_compared(tmp_path):
    """Which names those are is known when all tables are."""
    for both in values_of(run_ranks(_tied_stages, 3, tmp_path / "a", False)):
        assert [found.kind for found in both] == ["ok", "ok"], both
    for first, _ in values_of(run_ranks(_tied_stages, 3, tmp_path / "b", True)):
        assert first.failures == {2: "model/embedding"}


# State that comes later, and tables that change


def _state_that_comes_later(rank, directory):
    torch.manual_seed(0)
    model = nn.Linear(2048, 2048, bias=False)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = Checkpoint(model=model, optimizer=optimizer)
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        manager.save()
        moment = torch.zeros(2048, 2048)
        moment[1000, 3] += rank
        optimizer.state[model.weight] = {"step": torch.tensor(1.0), "exp_avg": moment}
        return outcome(manager.save)


def test_state_that_comes_later_is_compared_in_full(tmp_path):
    """A sample of 16 MiB would miss one number."""
    for found in values_of(run_ranks(_state_that_comes_later, 2, tmp_path)):
        assert found.failures == {1: "optimizer/state/model/weight/exp_avg"}


def _tables_that_become_equal(rank, directory):
    tensors = {"a": torch.zeros(3), **({"b": torch.zeros(4)} if rank == 0 else {})}
    checkpoint = Checkpoint(x=tensors)
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        assert manager.save()
        if rank == 1:
            tensors["b"] = torch.ones(4)
        return outcome(manager.save)


def test_tables_that_become_equal_are_compared(tmp_path):
    """By the rank whose table has changed, and by the one whose table has not."""
    for found in values_of(run_ranks(_tables_that_become_equal, 2, tmp_path)):
        assert found.failures == {1: "x/b"}


class _Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def state_dict(self, *args, **kwargs):
        return super().state_dict(*args, **kwargs)


def _buffers_of_an_overridden_state_dict(rank, directory):
    model = _Own()
    model.norm.running_mean.fill_(float(rank))
    return _outcome_of(Checkpoint(model=model), directory)


@pytest.mark.full
def test_buffers_are_known_where_a_state_dict_is_overridden(tmp_path):
    """By their memory: they are no error there either."""
    for both in values_of(run_ranks(_buffers_of_an_overridden_state_dict, 2, tmp_path)):
        assert [found.kind for found in both] == ["ok", "ok"], both


def _one_rank_of_other_shapes(rank, directory):
    mark = OneRank({"t": torch.full((rank + 1,), float(rank))})
    return _outcome_of(Checkpoint(x=mark), directory)


@pytest.mark.full
def test_tensors_of_one_rank_may_have_another_shape_on_others(tmp_path):
    """The lowest rank's is stored."""
    for both in values_of(run_ranks(_one_rank_of_other_shapes, 2, tmp_path)):
        assert [found.kind for found in both] == ["ok", "ok"], both
    live = Checkpoint(x=OneRank({"t": torch.zeros(1)}))
    live.restore(f"{tmp_path}/ckpt-1", RestoreOptions(include="x"))
    assert live.x.value["t"].tolist() == [0.0]


def _error_while_naming(rank, directory):
    from distckpt import replicas

    if rank == 1:

        def fails(*_):
            raise MemoryError("no room")

        replicas.leaf_digests = fails
    return _outcome_of(Checkpoint(x=torch.full((3,), float(rank))), directory)[0]


@pytest.mark.full
def test_an_error_while_it_is_found_out_what_differs_is_a_vote(tmp_path):
    """No rank waits for one that failed."""
    for found in values_of(run_ranks(_error_while_naming, 2, tmp_path)):
        assert found.kind == "SaveFailed" and "no room" in found.text
