"""Objects with a state dict of their own making, sharded, on other numbers of ranks."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks, values_of
from outcome_helpers import outcome
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distckpt import Checkpoint, CheckpointManager, Parts, RestoreOptions

WIDTH = 7


class Block(nn.Module):
    """A layer with a buffer that is made of its weight when it is loaded."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.loads = 0
        self.register_load_state_dict_post_hook(self._after)

    def _after(self, module, keys):
        self.loads += 1

    def forward(self, x):
        return self.linear(x).tanh()


class Renamed(Block):
    """Its layer is called otherwise now."""

    def __init__(self):
        super().__init__()
        self.layer = self.linear
        del self.linear
        self._register_load_state_dict_pre_hook(self._before)

    def _before(self, state, prefix, *_):
        for name in ("weight", "bias"):
            if f"{prefix}linear.{name}" in state:
                state[f"{prefix}layer.{name}"] = state.pop(f"{prefix}linear.{name}")

    def forward(self, x):
        return self.layer(x).tanh()


class Container(torch.optim.Optimizer):
    """As torchtitan's: its state dict is flat, of names, made by torch's own functions."""

    def __init__(self, model):
        self.model = model
        self.optimizers = [torch.optim.AdamW(block.parameters()) for block in model]
        super().__init__([*model.parameters()], {})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self):
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        found = {}
        for optimizer in self.optimizers:
            found.update(get_optimizer_state_dict(self.model, optimizer, options=options))
        return found

    def load_state_dict(self, state_dict):
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        for optimizer in self.optimizers:
            set_optimizer_state_dict(self.model, optimizer, state_dict, options=options)


class Hooked(torch.optim.AdamW):
    """Its hooks keep a count in the state dict."""

    calls = 0

    def __init__(self, parameters):
        super().__init__(parameters)
        self.register_state_dict_post_hook(lambda _, state: {**state, "n": self.calls})
        self.register_load_state_dict_pre_hook(self._take)

    def _take(self, _, state):
        state = dict(state)
        self.calls = state.pop("n")
        return state


def _job(seed, kind=Block, optimizer=None, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential(kind(), kind()).to(dtype)
    for block in model:
        fully_shard(block)
    fully_shard(model)
    made = optimizer or (lambda model: torch.optim.AdamW(model.parameters()))
    return model, made(model)


def _train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        x = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
    return [_full(parameter).tolist() for parameter in model.parameters()]


def _full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _manager(directory, **objects):
    return CheckpointManager(Checkpoint(**objects), directory, max_to_keep=None)


OPTIMIZERS = {
    "container": Container,
    "hooks": lambda model: Hooked(model.parameters()),
}


def _save_and_train(rank, directory, name):
    model, optimizer = _job(0, optimizer=OPTIMIZERS[name])
    optimizer.calls = 5
    _train(model, optimizer, range(3))
    with _manager(directory, model=model, optimizer=optimizer) as manager:
        manager.save()
    return _train(model, optimizer, [3, 4])


def _restore_and_train(rank, directory, name):
    model, optimizer = _job(1, optimizer=OPTIMIZERS[name])
    with _manager(directory, model=model, optimizer=optimizer) as manager:
        assert manager.restore_or_initialize()
    assert name == "container" or optimizer.calls == 5
    return _train(model, optimizer, [3, 4])


@pytest.mark.parametrize(
    ("name", "ranks"),
    [
        pytest.param("container", 2, marks=pytest.mark.full),
        pytest.param("container", 3, marks=pytest.mark.full),
        pytest.param("hooks", 2, marks=pytest.mark.full),
        ("hooks", 3),
    ],
)
def test_optimizer_with_a_state_dict_of_its_own_is_resharded(tmp_path, name, ranks):
    """Under FSDP2, on as many ranks and on others; uneven parts included."""
    (expected, *_) = values_of(run_ranks(_save_and_train, 2, tmp_path, name))
    for found in values_of(run_ranks(_restore_and_train, ranks, tmp_path, name)):
        for one, same in zip(found, expected, strict=True):
            if ranks == 2:
                assert one == same
            else:  # sums of gradients are rounded otherwise
                torch.testing.assert_close(torch.tensor(one), torch.tensor(same))


def _save_model(rank, directory, dtype):
    model, _ = _job(0, dtype=dtype)
    with _manager(directory, model=model) as manager:
        manager.save()
    return [_full(parameter).tolist() for parameter in model.parameters()]


def _restore_hooked(rank, directory, kind, options):
    model, _ = _job(1, kind=kind)
    with _manager(directory, model=model) as manager:
        assert manager.restore_or_initialize(options)
    assert all(block.loads == 1 for block in model)
    assert all(isinstance(parameter, DTensor) for parameter in model.parameters())
    return [_full(parameter).tolist() for parameter in model.parameters()]


@pytest.mark.parametrize("kind", [pytest.param(Block, marks=pytest.mark.full), Renamed])
def test_load_hooks_run_where_the_parameters_are_sharded(tmp_path, kind):
    """Those before the load see sharded tensors, if that is what they become."""
    (expected, *_) = values_of(run_ranks(_save_model, 2, tmp_path, torch.float32))
    for found in values_of(run_ranks(_restore_hooked, 3, tmp_path, kind, None)):
        assert found == expected


@pytest.mark.full
def test_half_precision_becomes_full_precision_on_other_ranks(tmp_path):
    """Each rank converts what it holds."""
    (expected, *_) = values_of(run_ranks(_save_model, 2, tmp_path, torch.bfloat16))
    options = RestoreOptions(cast=True)
    for found in values_of(run_ranks(_restore_hooked, 3, tmp_path, Block, options)):
        assert found == expected


# Pipeline stages


class Stage(nn.Module):
    """Some layers of a model, under the names that they have in the whole."""

    def __init__(self, layers, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        every = {str(i): nn.Linear(3, 3) for i in range(4)}
        self.layers = nn.ModuleDict({str(i): every[str(i)] for i in layers})


def _stages(rank, directory, layouts, saves):
    parts = [Stage(layers, 0 if saves else 1) for layers in layouts[rank]]
    optimizers = [torch.optim.AdamW(part.parameters(), lr=0.1) for part in parts]
    if saves:
        for part, optimizer in zip(parts, optimizers, strict=True):
            sum(p.square().sum() for p in part.parameters()).backward()
            optimizer.step()
    with _manager(directory, model=Parts(parts), optimizer=Parts(optimizers)) as manager:
        if saves:
            manager.save()
        else:
            assert manager.restore_or_initialize()
    return {
        name: (
            parameter.tolist(),
            optimizer.state[parameter]["exp_avg"].tolist(),
        )
        for part, optimizer in zip(parts, optimizers, strict=True)
        for name, parameter in part.named_parameters()
    }


def test_stages_of_a_pipeline_are_divided_anew(tmp_path):
    """Interleaved on two ranks, then one stage a rank, then one process."""
    saved = run_ranks(_stages, 2, tmp_path, [[[0], [2]], [[1], [3]]], True)
    expected = {}
    for found in values_of(saved):
        expected.update(found)
    for layouts in ([[[0, 1]], [[2, 3]]], [[[0, 1, 2, 3]]]):
        ranks = len(layouts)
        found = {}
        for one in values_of(run_ranks(_stages, ranks, tmp_path, layouts, False)):
            found.update(one)
        assert found == expected


def _patterns_on_one_rank(rank, directory):
    model = Stage([0, 1] if rank == 0 else [2, 3])
    with _manager(directory, model=model) as manager:
        manager.save()
    live = nn.ModuleDict({"layers": Stage([0, 1] if rank == 0 else [2, 3]).layers})
    if rank == 1:
        live["head"] = nn.Linear(1, 1)
    dist.barrier()
    with _manager(directory, model=live) as manager:
        manager.restore_or_initialize(RestoreOptions(exclude="model/head"))
        return outcome(manager.restore_or_initialize, RestoreOptions(exclude="model/haed"))


def test_pattern_that_matches_on_one_rank_only_is_right(tmp_path):
    """One that matches on none is an error on all."""
    for kind, text, *_ in values_of(run_ranks(_patterns_on_one_rank, 2, tmp_path)):
        assert kind == "MismatchError" and "model/haed: a pattern that matches" in text
