"""Who writes what, what each rank gets back, and what ranks must agree on."""

from __future__ import annotations

import os

import pytest
import torch
from harness import run_ranks, values_of
from outcome_helpers import (
    assert_all_whole,
    attempt_directory,
    make_checkpoint,
    make_model,
    outcome,
    state_of,
    train,
)
from safetensors import safe_open
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distckpt import (
    Checkpoint,
    CheckpointManager,
    OneRank,
    PerRank,
    paths,
    readers,
    tensors,
)
from distckpt.comm import GroupChannel
from distckpt.layout import SPLIT, WHOLE, Assignment
from distckpt.messages import Phase
from distckpt.run_directory import AttemptDirectory


class Gpt(nn.Module):
    """The tensors of a GPT-2: embeddings, blocks, a tied head; no forward pass."""

    def __init__(self, vocabulary, context, width, depth):
        super().__init__()
        self.wte = nn.Embedding(vocabulary, width)
        self.wpe = nn.Embedding(context, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "ln_1": nn.LayerNorm(width),
                    "attn": nn.Linear(width, 3 * width),
                    "proj": nn.Linear(width, width),
                    "ln_2": nn.LayerNorm(width),
                    "fc": nn.Linear(width, 4 * width),
                    "out": nn.Linear(4 * width, width),
                }
            )
            for _ in range(depth)
        )
        self.ln_f = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.wte.weight
        self.register_buffer("mask", torch.ones(context, context).tril().bool())


def _gpt_checkpoint(seed):
    torch.manual_seed(seed)
    model = Gpt(vocabulary=5003, context=128, width=160, depth=4)
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.rand_like(parameter)
    optimizer.step()
    return Checkpoint(model=model, optimizer=optimizer)


def _save_gpt(rank, directory):
    checkpoint = _gpt_checkpoint(0)
    with CheckpointManager(checkpoint, directory, max_to_keep=1) as manager:
        return manager.save()


def _assert_safetensors(path):
    """Open every shard file in the official package; returns the names in each."""
    directory = attempt_directory(path)
    manifest = readers.read_manifest(AttemptDirectory.at(directory))
    names = []
    for rank in range(manifest.world_size):
        file = os.path.join(directory, paths.shard_file(rank, manifest.world_size))
        with safe_open(file, framework="pt") as opened:
            keys = list(opened.keys())
            for key in keys:
                opened.get_tensor(key)
            names.append(set(keys))
    return names


def _excess(sizes):
    return max(sizes) / (sum(sizes) / len(sizes)) - 1


@pytest.mark.full
@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_replicated_bytes_of_a_gpt_are_balanced_within_3_percent(tmp_path, world_size):
    """Every rank writes its share of parameters and optimizer state, and all of it fits."""
    directory = str(tmp_path / "run")
    (path, *_) = values_of(run_ranks(_save_gpt, world_size, directory))
    manifest = readers.read_manifest(AttemptDirectory.at(attempt_directory(path)))
    split = [
        sum(
            p.size_bytes
            for p in manifest.assignment.pieces_of_rank(r)
            if p.row.kind == SPLIT
        )
        for r in range(world_size)
    ]
    files = [shard.size_bytes for shard in manifest.shards]
    print(
        f"\n{world_size} ranks, {sum(files) / 2**20:.1f} MiB: replicated bytes per rank "
        f"{split}, the most loaded has {_excess(split):+.2%}; files {_excess(files):+.2%}"
    )
    assert _excess(split) <= 0.03
    assert _excess(files) <= 0.03
    names = _assert_safetensors(path)
    whole = [rank for rank in range(world_size) if "model/mask" in names[rank]]
    assert whole == [0]

    expected = _gpt_checkpoint(0)
    live = _gpt_checkpoint(1)
    live.restore(path)
    for key, value in expected.model.state_dict().items():
        assert torch.equal(live.model.state_dict()[key], value), key
    for mine, theirs in zip(
        live.model.parameters(), expected.model.parameters(), strict=True
    ):
        for key, value in expected.optimizer.state[theirs].items():
            assert torch.equal(live.optimizer.state[mine][key], value)
    assert live.model.head.weight is live.model.wte.weight


def test_full_size_gpt2_is_balanced_within_3_percent():
    """The arithmetic alone, for GPT-2 of 124 million parameters with AdamW."""
    with torch.device("meta"):
        model = Gpt(vocabulary=50257, context=1024, width=768, depth=12)
    rows = [
        tensors.row_of(f"{prefix}{name}", parameter, SPLIT)
        for name, parameter in model.named_parameters()
        for prefix in ("model/", "optimizer/exp_avg/", "optimizer/exp_avg_sq/")
    ]
    rows.append(tensors.row_of("model/mask", model.mask, WHOLE))
    for world_size in (2, 3, 4, 8, 64):
        assignment = Assignment([tuple(rows)], [0] * world_size)
        sizes = [
            sum(p.size_bytes for p in assignment.pieces_of_rank(r) if p.row.kind == SPLIT)
            for r in range(world_size)
        ]
        print(f"\nGPT-2 124M on {world_size} ranks: {_excess(sizes):+.3%}")
        assert _excess(sizes) <= 0.03


# What each rank has, and what it gets back


def _save_with_own(rank, directory):
    checkpoint = make_checkpoint(
        values=PerRank({"rank": rank, "list": [rank] * (rank + 1)}),
        tensor=PerRank(torch.full((rank + 1,), float(rank))),
        shared=OneRank(torch.full((3,), float(rank))),
        same="for all",
    )
    model = DistributedDataParallel(checkpoint.model)
    checkpoint.model = model
    train(checkpoint)
    # DDP lets buffers differ: each rank has seen other data.
    model.module[1].running_mean.fill_(rank + 10)
    with CheckpointManager(checkpoint, directory, max_to_keep=1) as manager:
        path = manager.save()
        weights = [p.tolist() for p in model.parameters()]
        momentum = state_of(checkpoint)["momentum"]
    live = make_checkpoint(
        seed=1,
        values=PerRank({}),
        tensor=PerRank(torch.zeros(rank + 1)),
        shared=OneRank(torch.zeros(3)),
        same="",
    )
    live.model = DistributedDataParallel(live.model)
    with CheckpointManager(live, directory, max_to_keep=1) as manager:
        assert manager.restore_or_initialize() == path
    assert live.values.value == {"rank": rank, "list": [rank] * (rank + 1)}
    assert live.tensor.value.tolist() == [rank] * (rank + 1)
    assert live.shared.value.tolist() == [0, 0, 0]
    assert live.model.module[1].running_mean.tolist() == [10.0] * 8
    assert live.same == "for all"
    assert [p.tolist() for p in live.model.parameters()] == weights
    assert state_of(live)["momentum"] == momentum
    return path


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
def test_each_rank_gets_back_its_own_and_the_lowest_rank_s_buffers(tmp_path, world_size):
    """PerRank values never mix; buffers and plain tensors are the lowest rank's, whole."""
    directory = str(tmp_path / "run")
    (path, *_) = values_of(run_ranks(_save_with_own, world_size, directory))
    names = _assert_safetensors(path)
    for rank, found in enumerate(names):
        assert "tensor" in found
        whole = {"shared", "step", "model/1.running_mean", "model/1.num_batches_tracked"}
        assert whole & found == (whole if rank == 0 else set())
    directory = attempt_directory(path)
    manifest = readers.read_manifest(AttemptDirectory.at(directory))
    assert "values" not in manifest.values
    for rank in range(world_size):
        with readers.open_shard(AttemptDirectory.at(directory), manifest, rank) as reader:
            assert reader.header.per_rank_values["values"]["rank"] == rank
            (own,) = [e for e in reader.header.entries.values() if e.per_rank]
            assert own.global_shape == (rank + 1,)


def _differ_then_agree(rank, directory):
    checkpoint = make_checkpoint(epoch=rank // 2, config={"host": f"host-{rank}"}, same=1)
    found = []
    with CheckpointManager(checkpoint, directory, max_to_keep=1) as manager:
        found.append(outcome(manager.save))
        assert (manager.latest_checkpoint, checkpoint.save_counter) == (None, 0)
        checkpoint.epoch, checkpoint.config = 5, PerRank(checkpoint.config)
        found.append(outcome(manager.save))
        # Values that only some ranks have are no contradiction.
        if rank == 1:
            checkpoint.only_here = [1]
        found.append(outcome(manager.save))
        # Tensors of different shape or type are.
        checkpoint.table = torch.zeros(2 + rank // 2)
        checkpoint.kind = torch.zeros(1, dtype=torch.float16 if rank else torch.float32)
        found.append(outcome(manager.save))
        del checkpoint.kind
        found.append(outcome(manager.save))
        del checkpoint.table
        found.append(outcome(manager.save))
    return found


def test_values_and_tensors_that_differ_between_ranks_are_errors_naming_both(tmp_path):
    """A ConfigError on all ranks, with values and ranks; the manager stays usable."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_differ_then_agree, 4, directory))
    for per_call in zip(*results, strict=True):
        assert len({(o.kind, str(o.text)) for o in per_call}) == 1
    values, fixed, some, kind, shape, last = results[0]
    assert values.kind == "ConfigError"
    for text in (
        "2 plain values differ",
        "epoch is 0 on ranks 0, 1, 1 on ranks 2, 3",
        'config is {"host":"host-0"} on rank 0',
        '{"host":"host-3"} on rank 3',
        "PerRank",
    ):
        assert text in values.text
    assert fixed.text == os.path.join(directory, "ckpt-1")
    assert some.text == os.path.join(directory, "ckpt-2")
    assert kind.kind == shape.kind == "ConfigError"
    assert "'table' differs between ranks" in shape.text
    assert "float32 [2]" in shape.text and "on ranks 0, 1" in shape.text
    assert "float32 [3]" in shape.text and "on ranks 2, 3" in shape.text
    assert last.text == os.path.join(directory, "ckpt-3")


class Stage(nn.Module):
    """One stage of a pipeline."""

    def __init__(self, number, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((number + 2, 3), value))
        self.register_buffer("seen", torch.tensor(value))


def _pipeline(rank, value):
    """Each pair of ranks holds one stage; all share an embedding."""
    stage = Stage(rank // 2, value)
    embedding = nn.Embedding(4, 2)
    nn.init.constant_(embedding.weight, value)
    parameters = [*stage.parameters(), *embedding.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=value)
    for parameter in parameters:
        parameter.grad = torch.full_like(parameter, value)
    optimizer.step()
    return Checkpoint(
        stages={f"stage{rank // 2}": stage},
        embedding=embedding,
        optimizer=optimizer,
        **{f"note{rank // 2}": rank // 2},
    )


def _run_pipeline(rank, directory):
    checkpoint = _pipeline(rank, 1.0)
    expected = [p.clone() for g in checkpoint.optimizer.param_groups for p in g["params"]]
    with CheckpointManager(checkpoint, directory, max_to_keep=1) as manager:
        path = manager.save()
    live = _pipeline(rank, 0.5)
    with CheckpointManager(live, directory, max_to_keep=1) as manager:
        restored = manager.restore_or_initialize()
    found = [p for g in live.optimizer.param_groups for p in g["params"]]
    assert all(map(torch.equal, found, expected))
    for mine, theirs in zip(
        found, checkpoint.optimizer.param_groups[0]["params"], strict=True
    ):
        for key, value in checkpoint.optimizer.state[theirs].items():
            assert torch.equal(live.optimizer.state[mine][key], value)
    assert live.optimizer.param_groups[0]["lr"] == 1.0
    assert live.stages[f"stage{rank // 2}"].seen == 1.0
    # What no rank asks for is still a mismatch, on all of them.
    if rank // 2 == 1:
        del live.stages
        live.optimizer = torch.optim.Adam(live.embedding.parameters())
    with CheckpointManager(live, directory, max_to_keep=1) as manager:
        lacking = outcome(manager.restore_or_initialize)
    return path, restored, lacking


def test_ranks_that_track_different_modules_save_and_restore(tmp_path):
    """In a pipeline tensors that only some ranks have are saved by these and come back."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_run_pipeline, 4, directory))
    path = os.path.join(directory, "ckpt-1")
    assert {(a, b) for a, b, _ in results} == {(path, path)}
    names = _assert_safetensors(path)
    assert ["stages/stage0/seen" in found for found in names] == [True, False, False, False]
    assert ["stages/stage1/seen" in found for found in names] == [False, False, True, False]
    for _, _, lacking in results:
        assert lacking.kind == "MismatchError"
        assert "stages/stage1/weight: in the checkpoint, nothing here" in lacking.text
        assert "stages/stage0" not in lacking.text


# Other numbers of ranks


def _job(rank, directory, seed, wrap, own, steps):
    """Restore, train, save; returns the state before and after."""
    checkpoint = make_checkpoint(seed, **({"own": PerRank(rank)} if own else {}))
    if wrap:
        checkpoint.model = DistributedDataParallel(checkpoint.model)
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        restored = outcome(manager.restore_or_initialize)
        if restored.kind != "ok":
            return restored, None, None
        inner = checkpoint.model.module if wrap else checkpoint.model
        before = {k: v.tolist() for k, v in inner.state_dict().items()}
        if steps:
            train(checkpoint, steps)
            manager.save()
        after = {k: v.tolist() for k, v in inner.state_dict().items()}
    return restored, before, after


def test_ddp_and_one_process_read_each_other_s_checkpoints(tmp_path):
    """Two ranks, one process without a group, four ranks: each goes on from the last."""
    directory = str(tmp_path / "run")
    saved = None
    for world_size, group in ((2, True), (1, False), (4, True), (1, True)):
        results = values_of(
            run_ranks(
                _job,
                world_size,
                directory,
                world_size,
                group,
                False,
                2,
                process_group=group,
            )
        )
        for restored, before, after in results:
            assert (restored.text is None) == (saved is None)
            if saved is not None:
                assert before == saved
            assert after == results[0][2]
        saved = results[0][2]


def test_another_number_of_ranks_with_per_rank_is_a_mismatch_that_says_so(tmp_path):
    """A rank's own state cannot be given to another rank; nothing is guessed."""
    directory = str(tmp_path / "run")
    values_of(run_ranks(_job, 2, directory, 0, False, True, 1))
    for world_size in (1, 4):
        group = world_size > 1
        results = values_of(
            run_ranks(_job, world_size, directory, 0, False, True, 0, process_group=group)
        )
        for restored, _, _ in results:
            assert restored.kind == "MismatchError"
            assert f"saved by 2 ranks, this job has {world_size}" in restored.text
            assert "PerRank: own" in restored.text
    results = values_of(run_ranks(_job, 4, directory, 1, False, False, 0))
    assert {restored.text for restored, _, _ in results} == {f"{directory}/ckpt-1"}


def test_model_of_the_harness_is_the_same_for_the_same_seed():
    """Equal seeds give equal weights: what the comparisons above rest on."""
    one, other = make_model(3).state_dict(), make_model(3).state_dict()
    assert all(torch.equal(one[key], other[key]) for key in one)


# Ranks that track different things


def _save_different_things(rank, directory):
    """Save tables that differ between ranks, several times; count the exchanges."""
    exchanged = []
    consult = GroupChannel.consult

    def counted(self, vote, decide, **more):
        if vote.phase is Phase.TABLES:
            exchanged.append(len(vote.detail))
        return consult(self, vote, decide, **more)

    GroupChannel.consult = counted
    # Two stages of a pipeline with two replicas each, and something that all have.
    stage = {f"stage{rank // 2}": torch.full((5,), float(rank // 2))}
    checkpoint = Checkpoint(stage=stage, common=torch.ones(3), epoch=0)
    seen = []
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        for epoch in range(3):
            checkpoint.epoch = epoch
            manager.save()
            seen.append(len(exchanged))
        checkpoint.more = torch.zeros(2)
        manager.save()
        seen.append(len(exchanged))
        for tensor in stage.values():
            tensor.fill_(-1.0)
        manager.restore_or_initialize()
    return seen, exchanged, {name: value.tolist() for name, value in stage.items()}


def test_tables_that_differ_between_ranks_are_exchanged_once(tmp_path):
    """At the next saves they are known; each distinct one is sent by one rank alone."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_save_different_things, 4, directory))
    for rank, (seen, sent, stage) in enumerate(results):
        assert seen == [1, 1, 1, 2]
        assert [bool(size) for size in sent] == [rank in (0, 2)] * 2
        assert stage == {f"stage{rank // 2}": [rank // 2] * 5}
    assert_all_whole(directory)
