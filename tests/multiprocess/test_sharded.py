"""Sharded tensors: every placement, FSDP2 as it trains, and restoring on other layouts."""

from __future__ import annotations

import os
import re
import threading

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks, values_of
from outcome_helpers import assert_all_whole, attempt_directory, outcome
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from distckpt import Checkpoint, CheckpointManager, PerRank, Replicated, loading, readers
from distckpt.layout import SHARDED
from distckpt.run_directory import AttemptDirectory

# What is saved is made from these alone, so that each process knows what must come back.


def _raw(tensor):
    plain = tensor.detach().contiguous().reshape(-1)
    return bytes(plain.view(torch.uint8).numpy().tobytes()) if plain.numel() else b""


def _full(tensor):
    """Return all of a tensor, put together by torch: only on a line of ranks.

    Where several dimensions of a mesh cut one of the tensor and lengths are uneven, torch
    puts it together wrong; so on other meshes ``_assert_parts`` compares what each rank
    holds.
    """
    if not isinstance(tensor, DTensor):
        return tensor
    assert tensor.device_mesh.ndim == 1, "see the docstring"
    return tensor.full_tensor()


def _assert_parts(found, expected):
    """Fail unless this rank holds its parts of what is expected, given in full."""
    parts, wanted = dict(found), dict(expected)
    for name, tensor in found.items():
        if isinstance(tensor, DTensor):
            full = _distribute(expected[name], tensor.device_mesh, tensor.placements)
            parts[name], wanted[name] = tensor.to_local(), full.to_local()
    _assert_same(parts, wanted)


def _assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        one, other = found[name], value
        if isinstance(other, torch.Tensor):
            assert (one.dtype, one.shape) == (other.dtype, other.shape), name
            one, other = _raw(one), _raw(other)
        assert one == other, name


def _manager(checkpoint, directory):
    return CheckpointManager(checkpoint, directory, max_to_keep=None)


def _restore(checkpoint, directory, path):
    with _manager(checkpoint, directory) as manager:
        assert manager.restore_or_initialize() == path


# Single tensors on every kind of mesh


SHAPES = [(8, 6), (7, 5), (3, 2), (1, 9), (2, 3, 4), (0, 4), (5,)]
DTYPES = [
    *(torch.float32, torch.bfloat16, torch.complex64, torch.bool, torch.int8),
    *(torch.float8_e4m3fn, torch.float64),
]


def _fulls():
    """Make a tensor of each shape, and of each dtype, full of different bytes."""
    made = {}
    for index, shape in enumerate(SHAPES):
        dtype = DTYPES[index]
        count = torch.Size(shape).numel()
        if dtype is torch.bool:
            made[str(index)] = (torch.arange(count) % 3 == 0).view(shape)
            continue
        size = count * torch.empty(0, dtype=dtype).element_size()
        pattern = (torch.arange(size) * 41 % 251).to(torch.uint8)
        made[str(index)] = (
            pattern.view(dtype).view(shape) if size else torch.empty(shape, dtype=dtype)
        )
    return made


def _meshes():
    return {
        "line": init_device_mesh("cpu", (4,)),
        "grid": init_device_mesh("cpu", (2, 2)),
        "some": DeviceMesh("cpu", [1, 3]),
        "shuffled": DeviceMesh("cpu", [3, 0, 2, 1]),
        "tall": DeviceMesh("cpu", [[2], [0], [1], [3]]),
    }


PLACEMENTS = {
    "line": [(Shard(0),), (Shard(1),), (Replicate(),)],
    "grid": [
        (Shard(0), Shard(0)),
        (Shard(1), Shard(0)),
        (Replicate(), Shard(0)),
        (Shard(1), Replicate()),
    ],
    "some": [(Shard(0),), (Replicate(),)],
    "shuffled": [(Shard(0),)],
    "tall": [(Shard(0), Replicate())],
}


def _distribute(full, mesh, placements):
    """Give each rank its part of what all have, without talking."""
    return distribute_tensor(full, mesh, placements, src_data_rank=None)


def _everywhere(meshes, fill):
    """Make every tensor in every placement that its dimensions allow."""
    made = {}
    for kind, mesh in meshes.items():
        for number, placements in enumerate(PLACEMENTS[kind]):
            for name, full in _fulls().items():
                dims = [p.dim for p in placements if isinstance(p, Shard)]
                if all(dim < full.dim() for dim in dims):
                    made[f"{kind}{number}.{name}"] = _distribute(
                        fill(full), mesh, placements
                    )
    # One whose part lies in memory with gaps.
    wide = torch.arange(60.0).view(6, 10)
    local = fill(wide)[:, ::2].chunk(4)[dist.get_rank()] if dist.get_rank() < 3 else None
    local = fill(wide)[:0, ::2] if local is None else local
    made["strided"] = DTensor.from_local(
        local, meshes["line"], [Shard(0)], run_check=False, shape=(6, 5), stride=(5, 1)
    )
    return made


def _zeros(full):
    return torch.zeros_like(full.view(torch.uint8) if full.numel() else full).view(
        full.dtype
    )


def _save_and_restore_everywhere(rank, directory):
    meshes = _meshes()
    saved = _everywhere(meshes, torch.clone)
    with _manager(Checkpoint(tensors=saved), directory) as manager:
        path = manager.save()
    live = _everywhere(meshes, _zeros)
    _restore(Checkpoint(tensors=live), directory, path)
    for name, tensor in saved.items():
        assert _raw(live[name].to_local()) == _raw(tensor.to_local()), name
    # On other meshes and cut along other dimensions: what is saved has no layout.
    other = {}
    for name, full in _fulls().items():
        for number, (kind, placements) in enumerate(
            [("line", [Shard(0)]), ("grid", [Shard(0), Shard(1)]), ("some", [Replicate()])]
        ):
            if all(getattr(p, "dim", 0) < full.dim() for p in placements):
                other[number, name] = _distribute(_zeros(full), meshes[kind], placements)
    for number in {number for number, _ in other}:
        for prefix in ("line1", "grid1", "shuffled0"):
            live = {f"{prefix}.{n}": t for (i, n), t in other.items() if i == number}
            keys = {key for key in saved if key.startswith(f"{prefix}.")} & live.keys()
            rest = {key: value for key, value in saved.items() if key not in keys}
            tensors = {**rest, **{key: live[key] for key in keys}}
            _restore(Checkpoint(tensors=tensors), directory, path)
            for key in keys:
                full = _fulls()[key.rpartition(".")[2]]
                mesh, placements = live[key].device_mesh, live[key].placements
                expected = _distribute(full, mesh, placements).to_local()
                assert _raw(live[key].to_local()) == _raw(expected), (number, key)
    return path


def test_every_placement_comes_back_bit_for_bit_in_place_elsewhere_and_in_one_process(
    tmp_path,
):
    """Cut along any dimension, uneven, empty, on grids, on some ranks, in any order."""
    directory = str(tmp_path / "run")
    (path, *_) = values_of(run_ranks(_save_and_restore_everywhere, 4, directory))
    assert_all_whole(directory)
    manifest = readers.read_manifest(AttemptDirectory.at(attempt_directory(path)))
    rows = manifest.assignment.rows
    assert {row.kind for row in rows.values()} == {SHARDED}
    live = {}
    expected = {"strided": torch.arange(60.0).view(6, 10)[:, ::2]}
    for row in rows.values():
        name = row.name.removeprefix("tensors/")
        live[name] = torch.zeros(row.shape, dtype=getattr(torch, row.dtype))
        if name != "strided":
            expected[name] = _fulls()[name.rpartition(".")[2]]
    Checkpoint(tensors=live).restore(path)
    _assert_same(live, expected)


def _refused(rank, directory):
    line, grid = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    full = torch.arange(8.0)
    local = torch.ones(4 + rank)
    tried = {
        "partial": DTensor.from_local(full, line, [Partial()], run_check=False),
        "order": DTensor.from_local(
            full.view(2, 4)[rank], grid, [Shard(0), _StridedShard(0, split_factor=2)],
            run_check=False, shape=(8,), stride=(1,),
        ),
        "factor": DTensor.from_local(
            full.view(2, 4)[rank], grid, [_StridedShard(0, split_factor=4), Shard(0)],
            run_check=False, shape=(8,), stride=(1,),
        ),
        # Nine elements are cut in five and four, not in four and five.
        "uneven": DTensor.from_local(
            local, line, [Shard(0)], run_check=False, shape=(9,), stride=(1,)
        ),
        "per_rank": PerRank(_distribute(full, line, [Shard(0)])),
    }  # fmt: skip
    found = {}
    for name, tensor in tried.items():
        with _manager(Checkpoint(**{name: tensor}), directory) as manager:
            found[name] = outcome(manager.save)
            assert manager.latest_checkpoint is None
    good = {name: _distribute(full, line, [Shard(0)]) for name in "ab"}
    with _manager(Checkpoint(tensors=good), directory) as manager:
        manager.save()
    bad = {
        "a": _distribute(torch.zeros(9), line, [Shard(0)]),
        "b": _distribute(torch.zeros(8, dtype=torch.float64), line, [Replicate()]),
    }
    with _manager(Checkpoint(tensors=bad), directory) as manager:
        found["mismatch"] = outcome(manager.restore_or_initialize)
    assert bad["a"].to_local().abs().sum() == 0
    # A manager without one of the mesh's ranks; outside the group nothing is called.
    alone = dist.new_group([0], use_local_synchronization=True) if rank == 0 else None
    if rank == 0:
        with CheckpointManager(
            Checkpoint(x=good["a"]), f"{directory}-alone", 1, process_group=alone
        ) as manager:
            found["outside"] = outcome(manager.save)
    dist.barrier()
    return found


def test_what_cannot_be_saved_or_does_not_fit_is_refused_on_all_ranks(tmp_path):
    """By name and with what to do; all ranks raise the same."""
    first, second = values_of(run_ranks(_refused, 2, str(tmp_path / "run")))
    assert "[1] in the default group" in first.pop("outside").text
    assert {k: v[:2] for k, v in first.items()} == {k: v[:2] for k, v in second.items()}
    kinds = {name: found.kind for name, found in first.items()}
    assert kinds.pop("mismatch") == "MismatchError"
    assert {*kinds.values()} == {"UnsupportedError"}
    texts = {name: found.text for name, found in first.items()}
    assert "'partial'" in texts["partial"]
    assert "full_tensor()" in texts["partial"]
    assert "strided cut of dimension 0 without a plain one" in texts["order"]
    assert "split factor 2" in texts["factor"]
    assert "this rank holds [4] of its [9]" in texts["uneven"]
    assert "PerRank" in texts["per_rank"]
    assert "tensors/a: float32 [8] in the checkpoint, float32 [9] here" in texts["mismatch"]
    assert "tensors/b: float32 [8] in the checkpoint, float64 [8]" in texts["mismatch"]


# FSDP2 in training


class Net(nn.Module):
    """Tied embeddings, uneven lengths, parameters shorter than there are ranks."""

    def __init__(self, vocabulary):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 6)) for _ in range(2)
        )
        self.scale = nn.Parameter(torch.ones(1))
        self.shift = nn.Parameter(torch.zeros(1))
        self.head = nn.Linear(6, vocabulary, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, tokens):
        self.calls += 1
        x = self.embedding(tokens) * self.scale + self.shift
        for block in self.blocks:
            x = x + block(x)
        return self.head(x).float().square().mean()


class RowMeans(torch.optim.Optimizer):
    """Keeps state of other shapes than the parameter's, as factored optimizers do.

    Torch's own, Adafactor, does not work with sharded tensors, nor does its fused SGD.
    """

    def __init__(self, params, cut=False):
        super().__init__(list(params), {"lr": 0.05})
        self.cut = cut

    @torch.no_grad()
    def step(self):
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            mesh = parameter.device_mesh
            means = parameter.grad.full_tensor().square().mean()
            if not state:
                zeros = _distribute(torch.zeros(3), mesh, [Replicate()] * mesh.ndim)
                state.update(step=0, means=zeros, like=torch.zeros_like(parameter))
                if self.cut:
                    state["cut"] = _distribute(torch.zeros(3), mesh, [Shard(0)])
            state["step"] += 1
            state["means"].to_local().add_(means)
            state["like"].add_(parameter.grad)
            scale = 0.05 / (1 + state["means"].to_local()[0].sqrt())
            parameter.to_local().sub_(scale * state["like"].to_local())


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "sgd-foreach": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, foreach=True),
    "own": lambda p: RowMeans(p),
}


class Ema:
    """Keeps averages of parameters, sharded as they are; its state is its own."""

    def __init__(self, model, lazy=False):
        self.model = model
        self.average = {} if lazy else self._now()
        self.threads = set()

    def _now(self):
        return {n: p.detach().clone() for n, p in self.model.named_parameters()}

    def update(self):
        for name, parameter in self.model.named_parameters():
            self.average[name].lerp_(parameter.detach(), 0.5)

    def state_dict(self):
        self.threads.add(threading.current_thread())
        return {"average": self.average, "decay": 0.5}

    def load_state_dict(self, state):
        self.average = state["average"]


def _fsdp(seed, vocabulary, mesh=None, policy=None):
    torch.manual_seed(seed)
    model = Net(vocabulary)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),)) if mesh is None else mesh
    options = {} if policy is None else {"mp_policy": policy}
    for block in model.blocks:
        fully_shard(block, mesh=mesh, **options)
    return fully_shard(model, mesh=mesh, **options)


def _job(seed, optimizer="adamw", **more):
    model = _fsdp(seed, **more)
    return Checkpoint(
        model=model,
        optimizer=OPTIMIZERS[optimizer](model.parameters()),
        step=torch.zeros((), dtype=torch.int64),
    )


def _train(job, steps, accumulate=1):
    """Train on data that follows from step and rank; returns the losses."""
    losses = []
    vocabulary = job.model.embedding.num_embeddings
    for _ in range(steps):
        job.optimizer.zero_grad()
        for part in range(accumulate):
            seed = 1000 * int(job.step) + 10 * part + dist.get_rank()
            generator = torch.Generator().manual_seed(seed)
            if accumulate > 1:
                job.model.set_requires_gradient_sync(part == accumulate - 1)
            loss = job.model(torch.randint(vocabulary, (4,), generator=generator))
            loss.backward()
            losses.append(loss.item())
        job.optimizer.step()
        job.step += 1
    return losses


def _state(job):
    """Return everything a job has trained, each tensor in full."""
    return {
        name: _full(value).clone() if isinstance(value, torch.Tensor) else value
        for name, value in _live(job).items()
    }


def _live(job):
    """Return everything a job has trained, each tensor as it lies."""
    found = {f"model/{name}": value for name, value in job.model.state_dict().items()}
    for name, parameter in job.model.named_parameters():
        for key, value in sorted(job.optimizer.state[parameter].items()):
            found[f"{name}/{key}"] = value
    return {**found, "step": job.step}


def _layout(job):
    """Return how everything lies: a restored state must lie as a trained one."""
    return {
        f"{name}/{key}": (type(value).__name__, str(getattr(value, "placements", "")))
        for name, parameter in job.model.named_parameters()
        for key, value in sorted(job.optimizer.state[parameter].items())
    }


def _continue(directory, make, train):
    """Save in the middle of training; go on, and again from the checkpoint: the same."""
    job = make(0)
    train(job, 2)
    # A forward pass alone leaves the root's parameters gathered.
    job.model(torch.zeros(1, dtype=torch.int64))
    with _manager(job, directory) as manager:
        path = manager.save()
    losses = train(job, 2)
    fresh = make(1)
    fresh.model(torch.zeros(1, dtype=torch.int64))
    _restore(fresh, directory, path)
    assert train(fresh, 2) == losses
    _assert_same(_state(fresh), _state(job))
    assert _layout(fresh) == _layout(job)
    assert fresh.model.head.weight is fresh.model.embedding.weight
    return path


def _train_through_restarts(rank, directory):
    world_size = dist.get_world_size()
    vocabulary = world_size - 1  # the last rank's part of the embedding is empty
    paths = {}
    for name in OPTIMIZERS:
        paths[name] = _continue(
            f"{directory}/{name}",
            lambda seed, name=name: _job(seed, name, vocabulary=vocabulary),
            _train,
        )
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    paths["mixed"] = _continue(
        f"{directory}/mixed",
        lambda seed: _job(seed, vocabulary=vocabulary, policy=policy),
        _train,
    )
    paths["accumulated"] = _continue(
        f"{directory}/accumulated",
        lambda seed: _job(seed, vocabulary=vocabulary),
        lambda job, steps: _train(job, steps, accumulate=2),
    )
    return paths


@pytest.mark.full
@pytest.mark.parametrize("world_size", [2, 4])
def test_fsdp_restored_into_fresh_objects_trains_on_bit_for_bit(tmp_path, world_size):
    """Every optimizer, without a warm-up step; tied weights whose part is empty."""
    paths, *_ = values_of(
        run_ranks(_train_through_restarts, world_size, str(tmp_path), timeout=100)
    )
    manifest = readers.read_manifest(AttemptDirectory.at(attempt_directory(paths["adamw"])))
    rows = manifest.assignment.rows
    tied = {row.name: row.same_as for row in rows.values() if row.same_as}
    assert tied == {"model/head.weight": "model/embedding.weight"}
    assert len(manifest.layouts) == 1, "all ranks describe the same"
    parts = {
        name: sum(piece.row.name == name for piece in manifest.assignment.pieces_of(name))
        for name in ("model/scale", "model/shift", "model/embedding.weight")
    }
    vocabulary = world_size - 1
    assert parts == {
        "model/scale": 1,
        "model/shift": 1,
        "model/embedding.weight": vocabulary,
    }


# Tensor parallelism under FSDP2: strided shards


class Wide(nn.Module):
    """Two layers that tensor parallelism cuts, and one that it leaves alone."""

    def __init__(self, length):
        super().__init__()
        self.up, self.down = nn.Linear(4, length), nn.Linear(length, 4)
        self.plain = nn.Linear(4, 3)

    def forward(self, x):
        return self.plain(self.down(torch.tanh(self.up(x))))


def _wide(seed, length):
    torch.manual_seed(seed)
    return Wide(length)


def _parallel(seed, length, shape):
    model = _wide(seed, length)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("data", "tensor"))
    parallelize_module(
        model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()}
    )
    # As torch trains them: what tensor parallelism leaves alone is sharded by data only.
    return fully_shard(model, mesh=mesh["data"])


def _save_two_dimensional(rank, directory, lengths, shape):
    paths = {}
    for length in lengths:
        model = _parallel(0, length, shape)
        placements = {n: str(p.placements) for n, p in model.named_parameters()}
        assert "_StridedShard" in placements["up.weight"], placements
        tracked = Checkpoint(model=Replicated(model))
        with _manager(tracked, f"{directory}/{length}") as manager:
            paths[length] = manager.save()
        live = _parallel(1, length, shape)
        _restore(Checkpoint(model=live), f"{directory}/{length}", paths[length])
        for name, parameter in model.named_parameters():
            found = live.get_parameter(name).to_local()
            assert torch.equal(found, parameter.to_local()), name
    return paths


@pytest.mark.parametrize(
    ("shape", "lengths"),
    [
        pytest.param((2, 2), (8, 5, 6, 7, 3), id="2x2", marks=pytest.mark.full),
        pytest.param((3, 2), (7,), id="3x2"),
    ],
)
def test_strided_shards_of_real_two_dimensional_training_are_put_together_right(
    tmp_path, shape, lengths
):
    """One process reads the model that was cut by tensor parallelism and then by FSDP2."""
    paths, *_ = values_of(
        run_ranks(_save_two_dimensional, shape[0] * shape[1], str(tmp_path), lengths, shape)
    )
    for length, path in paths.items():
        live = _wide(1, length)
        Checkpoint(model=live).restore(path)
        _assert_same(dict(live.state_dict()), dict(_wide(0, length).state_dict()))


# Other numbers of ranks, other strategies


def _plain_job(seed, vocabulary=5):
    torch.manual_seed(seed)
    model = Net(vocabulary)
    return Checkpoint(
        model=model,
        optimizer=OPTIMIZERS["adamw"](model.parameters()),
        step=torch.zeros((), dtype=torch.int64),
    )


def _hybrid_mesh():
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))


def _made(strategy, seed):
    if strategy == "hybrid":
        return _job(seed, vocabulary=5, mesh=_hybrid_mesh())
    if strategy == "fsdp":
        return _job(seed, vocabulary=5)
    job = _plain_job(seed)
    if strategy == "ddp":
        job.model = DistributedDataParallel(job.model)
    return job


def _unwrapped(job):
    model = getattr(job.model, "module", job.model)
    return Checkpoint(model=model, optimizer=job.optimizer, step=job.step)


def _move(rank, directory, strategy, reference):
    """Restore the newest checkpoint, compare it with the first one, save it again."""
    job = _made(strategy, seed=1 if reference else 0)
    if reference:
        with _manager(job, directory) as manager:
            assert manager.restore_or_initialize() is not None
            expected = _plain_job(2)
            expected.restore(reference)
            _assert_parts(_live(_unwrapped(job)), _live(expected))
            path = manager.save()
        _train(_unwrapped(job), 1)
        return path
    _train(job, 2)
    with _manager(job, directory) as manager:
        return manager.save()


@pytest.mark.full
def test_job_moves_between_strategies_and_numbers_of_ranks_bit_for_bit(tmp_path):
    """FSDP2 on 4, 2 and 3 ranks, DDP, HSDP, one process: each from the one before."""
    directory, reference = str(tmp_path / "run"), None
    chain = [("fsdp", 4), ("fsdp", 2), ("fsdp", 3), ("ddp", 2), ("fsdp", 2), ("hybrid", 4)]
    chain += [("one", 1), ("hybrid", 4), ("one", 1)]
    for strategy, world_size in chain:
        grouped = strategy != "one"
        if grouped:
            results = run_ranks(_move, world_size, directory, strategy, reference)
            path = values_of(results)[0]
        else:
            job = _plain_job(3)
            with _manager(job, directory) as manager:
                manager.restore_or_initialize()
                path = manager.save()
        reference = reference or path
    first, last = _plain_job(4), _plain_job(5)
    first.restore(reference)
    last.restore(path)
    _assert_same(_state(last), _state(first))
    assert_all_whole(directory)


# Who writes and who reads what


def _balanced(rank, directory):
    torch.manual_seed(0)
    mesh = _hybrid_mesh()
    model = nn.Sequential(*(nn.Linear(128, 256) for _ in range(8)))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    with _manager(Checkpoint(model=model), directory) as manager:
        path = manager.save()
    opened = []
    original = loading.open_shard

    def open_shard(directory, manifest, rank):
        opened.append(rank)
        return original(directory, manifest, rank)

    loading.open_shard = open_shard
    _restore(Checkpoint(model=model), directory, path)
    hybrid, opened = opened, []
    line = init_device_mesh("cpu", (4,))
    sharded = {str(i): _distribute(torch.rand(9, 5), line, [Shard(0)]) for i in range(3)}
    with _manager(Checkpoint(tensors=sharded), f"{directory}-sharded") as manager:
        manager.save()
        manager.restore_or_initialize()
    fully = opened
    # Restored by two of the ranks.
    opened = []
    half = DeviceMesh("cpu", [0, 1])
    other = {str(i): _distribute(torch.rand(9, 5), half, [Shard(0)]) for i in range(3)}
    with _manager(Checkpoint(tensors=other), f"{directory}-sharded") as manager:
        manager.restore_or_initialize()
    halved = opened
    # Beside its own part every rank needs the step counts, which are not sharded.
    opened = []
    job = _job(0, vocabulary=5)
    _train(job, 1)
    with _manager(job, f"{directory}-job") as manager:
        manager.save()
        manager.restore_or_initialize()
    return path, hybrid, fully, halved, opened


@pytest.mark.full
def test_hybrid_shards_are_balanced_and_only_files_with_something_are_opened(tmp_path):
    """Replicas write half of what they share; nobody opens a file without need."""
    found = values_of(run_ranks(_balanced, 4, str(tmp_path / "run")))
    manifest = readers.read_manifest(AttemptDirectory.at(attempt_directory(found[0][0])))
    sizes = [
        sum(piece.size_bytes for piece in manifest.assignment.pieces_of_rank(rank))
        for rank in range(4)
    ]
    assert sum(sizes) == 8 * (128 * 256 + 256) * 4
    assert max(sizes) <= 1.03 * sum(sizes) / 4
    _, hybrid, fully, halved, job = zip(*found, strict=True)
    assert hybrid == ([0, 2], [1, 3], [0, 2], [1, 3])
    # Nine rows on four ranks are three each, and none for the last.
    assert fully == ([0], [1], [2], [])
    # On two ranks they are five and four.
    assert halved == ([0, 1], [1, 2], [], [])
    assert [sorted(opened) for opened in job] == [[0], [0, 1], [0, 2], [0, 3]]


def _in_separate_halves(rank, directory):
    """Tensor parallelism in each of two halves, and nothing that says they are copies."""
    both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))
    torch.manual_seed(0)
    full = torch.rand(512, 256)

    def objects(fill):
        mesh = both["tensor"]
        return {
            "cut": _distribute(fill(full), mesh, [Shard(0)]),
            "copied": _distribute(fill(full), mesh, [Replicate()]),
        }

    saved, live = objects(torch.clone), objects(torch.zeros_like)
    with _manager(Checkpoint(tensors=saved), f"{directory}-undeclared") as manager:
        undeclared = outcome(manager.save)
    with _manager(Checkpoint(tensors=Replicated(saved)), directory) as manager:
        path = manager.save()
        own = saved["cut"].to_local()
        before = own.clone()
        own.add_(float(rank == 3))
        drifted = outcome(manager.save)
        own.copy_(before)
    _restore(Checkpoint(tensors=live), directory, path)
    for name, tensor in saved.items():
        assert torch.equal(live[name].to_local(), tensor.to_local())
    # A model that only some ranks have, and of which the others know nothing.
    stage = both["tensor"]
    name = f"stage{rank // 2}"
    stages = {name: _distribute(full * (1 + rank // 2), stage, [Shard(1)])}
    with _manager(Checkpoint(tensors=stages), f"{directory}-stages") as manager:
        of_stages = manager.save()
    stages = {name: _distribute(torch.zeros_like(full), stage, [Shard(1)])}
    _restore(Checkpoint(tensors=stages), f"{directory}-stages", of_stages)
    expected = (full * (1 + rank // 2)).chunk(2, 1)[rank % 2]
    assert torch.equal(stages[name].to_local(), expected)
    # A rank that does not have what it should hold a part of.
    tensors = {} if rank == 3 else {"x": saved["copied"], "y": saved["cut"]}
    with _manager(Checkpoint(tensors=Replicated(tensors)), f"{directory}-hole") as manager:
        found = outcome(manager.save)
    return path, of_stages, undeclared, drifted, found


def test_separate_meshes_are_copies_if_they_hold_one_tensor(tmp_path):
    """If that is declared: ranks of different halves share the work, and are compared.

    A rank without its part is an error.
    """
    found = values_of(run_ranks(_in_separate_halves, 4, str(tmp_path / "run")))
    path, of_stages, undeclared, drifted, _ = found[0]
    assert undeclared.kind == "ConfigError"
    assert "lies on ranks 0, 1 and, by itself, on ranks 2, 3" in undeclared.text
    assert "Checkpoint(tensors=Replicated(tensors))" in undeclared.text
    assert "Checkpoint(tensors=PerGroup(tensors, mesh))" in undeclared.text
    assert drifted.failures == {3: "tensors/cut[256, 0]"}
    manifest = readers.read_manifest(AttemptDirectory.at(attempt_directory(path)))
    sizes = [shard.size_bytes for shard in manifest.shards]
    assert max(sizes) <= 1.03 * sum(sizes) / 4
    torch.manual_seed(0)
    full = torch.rand(512, 256)
    live = {"cut": torch.zeros(512, 256), "copied": torch.zeros(512, 256)}
    Checkpoint(tensors=live).restore(path)
    _assert_same(live, {"cut": full, "copied": full})
    live = {f"stage{i}": torch.zeros(512, 256) for i in range(2)}
    Checkpoint(tensors=live).restore(of_stages)
    _assert_same(live, {"stage0": full, "stage1": full * 2})
    kinds = {outcome.kind for *_, outcome in found}
    assert kinds == {"ConfigError"}
    assert re.search("'tensors/[xy]' is sharded over rank 3", found[1][-1].text)


def _files_open_in(directory):
    files = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    names = (os.readlink(file) for file in files if os.path.islink(file))
    return [name for name in names if name.startswith(directory)]


def _with_average(rank, directory):
    model = _fsdp(0, 3)
    ema = Ema(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0)
    ema.update()
    own = PerRank(torch.full((2,), float(rank)))
    with _manager(Checkpoint(model=model, ema=ema, own=own), directory) as manager:
        path = manager.save()
    other = _fsdp(1, 3)
    fresh = Ema(other)
    own = PerRank(torch.zeros(2))  # whose header is read before anything is planned
    _restore(Checkpoint(model=other, ema=fresh, own=own), directory, path)
    assert fresh.threads == {threading.current_thread()}, "user code is not for others"
    assert torch.equal(own.value, torch.full((2,), float(rank)))
    for name, tensor in ema.average.items():
        assert fresh.average[name].placements == tensor.placements
        assert torch.equal(fresh.average[name].to_local(), tensor.to_local())
    fresh.update()
    lazy = Ema(other, lazy=True)
    with _manager(Checkpoint(model=other, ema=lazy, own=own), directory) as manager:
        found = [outcome(manager.restore_or_initialize)]
    assert not _files_open_in(attempt_directory(path))
    # State that is cut, but in another shape than the parameter.
    jobs = [_job(seed, vocabulary=3) for seed in (0, 1)]
    for job in jobs:
        job.optimizer = RowMeans(job.model.parameters(), cut=True)
    _train(jobs[0], 1)
    with _manager(jobs[0], f"{directory}-cut") as manager:
        cut = manager.save()
    with _manager(jobs[1], f"{directory}-cut") as manager:
        found.append(outcome(manager.restore_or_initialize))
    _train(jobs[1], 1)
    _restore(jobs[1], f"{directory}-cut", cut)
    _assert_same(_state(jobs[1]), _state(jobs[0]))
    return path, found


@pytest.mark.full
def test_average_of_sharded_parameters_comes_back_as_the_live_one_lies(tmp_path):
    """An object's own state dict says how its tensors lie; one that does not is told."""
    results = values_of(run_ranks(_with_average, 2, str(tmp_path / "run")))
    for _, (lazy, cut) in results:
        assert (lazy.kind, cut.kind) == ("MismatchError", "MismatchError")
        assert "ema/average/scale: float32 [1], sharded in the checkpoint" in lazy.text
        assert "float32 [3], sharded in the checkpoint" in cut.text
        assert "optimizer" in cut.text and "model/scale" in cut.text
        assert "model/scale/means" not in cut.text
    path = results[0][0]
    torch.manual_seed(0)
    truth = Net(3)
    torch.manual_seed(1)
    model = Net(3)
    ema = Ema(model, lazy=True)
    Checkpoint(model=model, ema=ema).restore(path)
    for name, parameter in truth.named_parameters():
        expected = parameter.detach().clone().lerp_(parameter.detach() * 3.0, 0.5)
        assert torch.equal(ema.average[name], expected), name


def _take_over_average(rank, directory):
    model = _fsdp(1, 3)
    ema = Ema(model)
    with _manager(Checkpoint(model=model, ema=ema), directory) as manager:
        assert manager.restore_or_initialize() is not None
    ema.update()
    return {name: _part(tensor) for name, tensor in ema.average.items()}


def _part(tensor):
    return (
        tensor.placements,
        tensor.device_mesh.get_coordinate()[0],
        _raw(tensor.to_local()),
    )


def test_average_of_a_plain_model_becomes_that_of_a_sharded_one(tmp_path):
    """It lies as the live average does, however it was saved, and goes on as one."""
    directory = str(tmp_path / "run")
    torch.manual_seed(0)
    model = Net(3)
    ema = Ema(model)
    with _manager(Checkpoint(model=model, ema=ema), directory) as manager:
        manager.save()
    for rank, parts in enumerate(values_of(run_ranks(_take_over_average, 2, directory))):
        for name, full in ema.average.items():
            chunks = [*full.chunk(2), full[:0]]
            assert parts[name] == ((Shard(0),), rank, _raw(chunks[rank])), name


def _with_local_state(rank, directory):
    """Try to save state, and to restore into it, that is a plain part of what is cut."""
    model = _fsdp(0, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    bad, listed, good = {}, {}, {}
    for name, parameter in model.named_parameters():
        local = torch.zeros_like(parameter.to_local())
        bad[parameter] = {"part": local}
        listed[parameter] = {"parts": [local]}
        good[parameter] = {"step": torch.ones(1), "scalar": torch.ones(()), "name": name}
    checkpoint = Checkpoint(model=model, optimizer=optimizer)

    def attempt(state, what):
        optimizer.state.clear()
        optimizer.state.update({key: dict(entry) for key, entry in state.items()})
        with _manager(checkpoint, directory) as manager:
            return outcome(getattr(manager, what))

    found = [attempt(bad, "save"), attempt(listed, "save")]
    assert attempt(good, "save").kind == "ok"
    found.append(attempt(bad, "restore_or_initialize"))
    for parameter in model.parameters():
        assert {*optimizer.state[parameter]} == {"part"}, "nothing was changed"
    assert attempt({}, "restore_or_initialize").kind == "ok"
    for parameter, entry in good.items():
        _assert_same(optimizer.state[parameter], entry)
    return found


def test_state_that_is_a_plain_part_of_something_cut_is_refused_by_name(tmp_path):
    """It would be taken for the whole, and one rank's given to all; a count is whole."""
    for found in values_of(run_ranks(_with_local_state, 2, str(tmp_path / "run"))):
        assert {refused.kind for refused in found} == {"UnsupportedError"}
        for refused, name in zip(found, ("part", "parts/~i0", "part"), strict=True):
            assert f"embedding.weight/{name}: a plain tensor of shape [" in refused.text
            assert "each rank holds its own part" in refused.text
            assert "zeros_like(parameter)" in refused.text
