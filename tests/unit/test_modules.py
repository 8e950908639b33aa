"""Modules: every way of wrapping gives the same names, and user hooks are heeded."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
)
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch_helpers import assert_same, manifest_of, restore, rows_of, save, stored

from distckpt import (
    Checkpoint,
    CheckpointManager,
    MismatchError,
    SaveFailed,
    UnsupportedError,
)
from distckpt.layout import SHARDED, SPLIT, WHOLE


@pytest.fixture(scope="module")
def one_rank_group(tmp_path_factory):
    """Initialize a gloo group of this process alone."""
    store = tmp_path_factory.mktemp("store") / "rendezvous"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Block(nn.Module):
    """Has a buffer, a module called ``module``, and one called like a wrapper's prefix."""

    def __init__(self):
        super().__init__()
        self.module = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("unsaved", torch.zeros(2), persistent=False)
        self.register_buffer("absent", None)
        self._orig_mod = nn.Linear(3, 1, bias=False)

    def forward(self, x):
        return self._orig_mod(self.norm(self.module(x)))


class Model(nn.Module):
    """Two blocks in a list, and one in a dict."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.heads = nn.ModuleDict({"a/b": Block()})
        self.scale = nn.Parameter(torch.rand(()))
        with torch.no_grad():
            for buffer in self.buffers():
                buffer.add_(seed + 1)


def _plain(model):
    return model


def _compiled(model):
    return torch.compile(model)


def _compiled_inside(model):
    model.blocks[1].module = torch.compile(model.blocks[1].module)
    return model


def _compiled_in_place(model):
    model.blocks[0].compile()
    return model


def _data_parallel(model):
    return DataParallel(model)


def _ddp(model):
    return DistributedDataParallel(model)


def _ddp_of_compiled(model):
    return DistributedDataParallel(torch.compile(model))


def _compiled_ddp(model):
    return torch.compile(DistributedDataParallel(model))


def _checkpointed(model):
    return checkpoint_wrapper(model)


def _checkpointed_inside(model):
    apply_activation_checkpointing(
        model, check_fn=lambda module: isinstance(module, (Block, nn.BatchNorm1d))
    )
    return model


def _all_at_once(model):
    model.blocks[0].module = torch.compile(checkpoint_wrapper(model.blocks[0].module))
    model.heads["a/b"] = checkpoint_wrapper(torch.compile(model.heads["a/b"]))
    return torch.compile(DistributedDataParallel(checkpoint_wrapper(model)))


WRAPPINGS = [
    _plain,
    _data_parallel,
    _ddp,
    _checkpointed,
    _checkpointed_inside,
]
COMPILED = [
    _compiled,
    _compiled_inside,
    _compiled_in_place,
    _ddp_of_compiled,
    _compiled_ddp,
    _all_at_once,
]


@pytest.mark.parametrize(
    "wrappings",
    [
        pytest.param(WRAPPINGS, id="not-compiled"),
        # The compiler takes seconds to import.
        pytest.param([*WRAPPINGS, *COMPILED], id="all", marks=pytest.mark.full),
    ],
)
@pytest.mark.usefixtures("one_rank_group")
def test_every_wrapping_has_the_same_names_and_reads_all_others(tmp_path, wrappings):
    """DDP, DataParallel, compile and activation checkpointing leave no trace on disk."""
    plain = Model(seed=1)
    expected_names = [f"model/{name}".replace("a/b", "a~1b") for name in plain.state_dict()]
    expected = {k: v.clone() for k, v in plain.state_dict().items()}
    directories = []
    for number, wrap in enumerate(wrappings):
        model = Model(seed=1)
        directory = str(tmp_path / str(number))
        wrapped = wrap(model)
        optimizer = torch.optim.SGD(wrapped.parameters())
        path = save(directory, model=wrapped, optimizer=optimizer)
        assert list(rows_of(path)) == expected_names, wrap.__name__
        settings = [n for n in manifest_of(path).values if n.startswith("optimizer/")]
        assert settings.pop() == "optimizer/class"
        assert settings == [
            f"optimizer/settings/model/{name}".replace("a/b", "a~1b")
            for name, _ in plain.named_parameters()
        ]
        directories.append(directory)
    for offset, wrap in enumerate(wrappings):
        # Each reads what the next but three has written; the plain one reads all.
        model = Model(seed=2)
        wrapped = wrap(model)
        source = directories[(offset + 3) % len(directories)]
        optimizer = torch.optim.SGD(wrapped.parameters())
        restore(source, model=wrapped, optimizer=optimizer)
        assert [v.tolist() for v in wrapped.state_dict().values()] == [
            v.tolist() for v in expected.values()
        ]
    for source in directories:
        model = Model(seed=3)
        restore(source, model=model, optimizer=torch.optim.SGD(model.parameters()))
        assert_same(dict(model.state_dict()), expected)


def test_non_persistent_and_absent_buffers_are_not_saved(run_dir):
    """What a state dict leaves out is neither written nor asked for."""
    path = save(run_dir, block=Block())
    names = list(rows_of(path))
    assert "block/unsaved" not in names and "block/absent" not in names
    live = Block()
    restore(run_dir, block=live)
    assert live.absent is None


def test_parameters_keep_their_identity_and_their_gradients(run_dir):
    """Restoring fills the live tensors, so that optimizers and graphs go on with them."""
    save(run_dir, model=Model(seed=1))
    live = Model(seed=2)
    before = {name: id(parameter) for name, parameter in live.named_parameters()}
    live.scale.grad = torch.tensor(3.0)
    restore(run_dir, model=live)
    assert {name: id(parameter) for name, parameter in live.named_parameters()} == before
    assert live.scale.requires_grad and live.scale.grad == 3.0


class WithExtraState(nn.Module):
    """Keeps a plain value and a tensor beside its parameters."""

    def __init__(self, extra):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.extra = extra
        self.num_loads = 0

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state
        self.num_loads += 1


@pytest.mark.parametrize(
    "extra",
    [None, 7, {"seen": 3, "names": ("a", b"b")}, torch.arange(4), {"t": [torch.ones(2)]}],
    ids=["none", "int", "values", "tensor", "tensors-inside"],
)
def test_extra_state_goes_through_the_module_s_own_functions(run_dir, extra):
    """``get_extra_state`` and ``set_extra_state`` are called, at any depth, once."""
    save(run_dir, model=nn.Sequential(WithExtraState(extra)), top=WithExtraState(extra))
    inner, top = WithExtraState("other"), WithExtraState("other")
    if isinstance(extra, torch.Tensor):
        inner.extra, top.extra = torch.zeros_like(extra), torch.zeros_like(extra)
    restore(run_dir, model=nn.Sequential(inner), top=top)
    assert_same(inner.extra, extra)
    assert_same(top.extra, extra)
    assert inner.num_loads == top.num_loads == 1


def test_extra_state_that_cannot_be_stored_is_refused_with_its_path(run_dir):
    """An object in the extra state is named by module and key."""
    with pytest.raises(UnsupportedError, match=r"model/0\._extra_state.*builtins\.object"):
        save(run_dir, model=nn.Sequential(WithExtraState({"key": object()})))


def test_missing_extra_state_is_a_mismatch(run_dir):
    """A module that has extra state needs it in the checkpoint, and the reverse."""
    plain = nn.Module()
    plain.weight = nn.Parameter(torch.ones(2))
    save(run_dir, model=plain)
    with pytest.raises(MismatchError, match="model/_extra_state: extra state here"):
        restore(run_dir, model=WithExtraState(1))


class Halving(nn.Module):
    """Saves its weight in another form, through hooks, and takes it back."""

    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value))
        self.other = nn.Parameter(torch.full((2,), value))
        self.register_state_dict_post_hook(self._after)
        self.register_load_state_dict_pre_hook(self._before)

    @staticmethod
    def _after(module, state, prefix, _metadata):
        state[f"{prefix}half"] = state.pop(f"{prefix}weight").detach() / 2
        state[f"{prefix}note"] = "halved"

    @staticmethod
    def _before(module, state, prefix, *_):
        if f"{prefix}half" in state:
            state[f"{prefix}weight"] = state.pop(f"{prefix}half") * 2
        assert state.pop(f"{prefix}note", "halved") == "halved"


def test_state_dict_hooks_are_heeded_in_both_directions(run_dir):
    """What a hook renames and computes is stored so, and loaded by its counterpart."""
    path = save(run_dir, model=nn.Sequential(Halving(8.0)))
    found = stored(path)
    assert sorted(found) == ["model/0.half", "model/0.other"]
    assert found["model/0.half"].tolist() == [4, 4, 4]
    live = Halving(0.0)
    restore(run_dir, model=nn.Sequential(live))
    assert live.weight.tolist() == [8, 8, 8] and live.other.tolist() == [8, 8]


class Overridden(nn.Module):
    """Has a state dict of its own making."""

    def __init__(self, value):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value))
        self.loaded = None

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {"w": state["weight"], "copy": state["weight"].detach() * 2, "version": 3}

    def load_state_dict(self, state_dict, strict=True, assign=False):
        self.loaded = state_dict
        super().load_state_dict({"weight": state_dict["w"]})


def test_overridden_state_dict_is_what_is_saved(run_dir):
    """A restore makes one like it and gives it to the module's ``load_state_dict``."""
    path = save(run_dir, model=Overridden(1.0))
    assert sorted(stored(path)) == ["model/copy", "model/w"]
    live = Overridden(0.0)
    restore(run_dir, model=live)
    assert live.weight.tolist() == [1, 1, 1]
    assert live.loaded["version"] == 3
    assert live.loaded["copy"].tolist() == [2, 2, 2]


def test_averaged_model_keeps_its_average_and_its_count(run_dir):
    """SWA and EMA models are modules: parameters, buffers and ``n_averaged``."""
    model = nn.Linear(2, 2)
    averaged = AveragedModel(model, use_buffers=True)
    for _ in range(3):
        with torch.no_grad():
            model.weight.add_(1)
        averaged.update_parameters(model)
    save(run_dir, model=model, averaged=averaged)
    live = nn.Linear(2, 2)
    live_averaged = AveragedModel(live, use_buffers=True)
    restore(run_dir, model=live, averaged=live_averaged)
    assert live_averaged.n_averaged == 3
    assert_same(dict(live_averaged.state_dict()), dict(averaged.state_dict()))
    assert_same(dict(live.state_dict()), dict(model.state_dict()))


def test_module_differences_are_all_listed_and_nothing_changes(run_dir):
    """Missing, extra, misshapen and retyped tensors come in one error."""
    save(run_dir, model=nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)}))
    live = nn.ModuleDict({"a": nn.Linear(2, 3), "c": nn.Linear(2, 2).double()})
    before = {k: v.clone() for k, v in live.state_dict().items()}
    with pytest.raises(MismatchError) as caught:
        restore(run_dir, model=live)
    for text in (
        "model/a.weight: float32 [2, 2] in the checkpoint, float32 [3, 2] here",
        "model/a.bias: float32 [2] in the checkpoint, float32 [3] here",
        "model/c.weight: a tensor here, not there in the checkpoint",
        "model/b.weight: in the checkpoint, nothing here",
        "model/b.bias: in the checkpoint, nothing here",
        "6 differences",
        "nothing of it was read",
    ):
        assert text in str(caught.value)
    assert_same(dict(live.state_dict()), before)


def test_differing_dtype_is_a_mismatch(run_dir):
    """A tensor of another type is never converted silently."""
    save(run_dir, model=nn.Linear(2, 2).bfloat16())
    with pytest.raises(
        MismatchError, match=r"bfloat16 \[2, 2\] in the checkpoint, float32"
    ):
        restore(run_dir, model=nn.Linear(2, 2))


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fsdp1_and_zero_optimizer_are_refused_by_name(run_dir):
    """What would be saved wrong is refused before anything is written."""
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.optim import ZeroRedundancyOptimizer

    model = nn.Linear(2, 2)
    zero = ZeroRedundancyOptimizer(model.parameters(), torch.optim.SGD, lr=0.1)
    with pytest.raises(UnsupportedError, match="optimizer: ZeroRedundancyOptimizer"):
        save(run_dir, model=model, optimizer=zero)
    # Making one needs a device; the type alone is what decides.
    sharded = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(sharded)
    with pytest.raises(UnsupportedError, match=r"nested/inner: FSDP1.*fully_shard"):
        save(run_dir, nested={"inner": nn.Sequential(sharded)})


@pytest.mark.parametrize("is_compiled", [False, pytest.param(True, marks=pytest.mark.full)])
@pytest.mark.usefixtures("one_rank_group")
def test_tensor_parallelism_under_ddp_is_refused_and_ddp_alone_is_not(run_dir, is_compiled):
    """Before and after a forward pass, and where only what DDP wraps is tracked."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("data", "tensor"))
    # Plain DDP, over a part of a mesh, too, as in pipeline parallelism.
    for number, part in enumerate((None, mesh["data"])):
        alone = DistributedDataParallel(nn.Linear(2, 2), device_mesh=part)
        alone(torch.ones(1, 2)).sum().backward()
        path = save(f"{run_dir}-{number}", model=alone)
        assert [*rows_of(path)] == ["model/weight", "model/bias"]

    inner = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parallelize_module(inner, mesh["tensor"], {"0": ColwiseParallel()})
    wrapped = DistributedDataParallel(inner, device_mesh=mesh["data"])
    tracked = [wrapped, inner, nn.ModuleList([inner])]
    if is_compiled:
        tracked.append(torch.compile(wrapped))
    for model in (*tracked, inner[0]):
        with pytest.raises(UnsupportedError, match="model: tensor parallelism under DDP"):
            save(run_dir, model=model)
    wrapped(torch.ones(1, 2))
    for model in tracked:
        with pytest.raises(UnsupportedError, match=r"fully_shard \(FSDP2, or HSDP"):
            save(run_dir, model=model)


class Doubling(nn.Linear):
    """Shows its weight doubled in its state dict, and halves what it loads."""

    def __init__(self):
        super().__init__(2, 3)
        self._register_state_dict_hook(self._double)
        self.register_load_state_dict_pre_hook(self._halve)

    @staticmethod
    def _double(module, state, prefix, _):
        state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2

    @staticmethod
    def _halve(module, state, prefix, *_):
        if f"{prefix}weight" in state:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] / 2


def _distribute(module):
    """Put a module on a mesh of this rank alone, parameters cut and buffers replicated."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_module
    from torch.distributed.tensor import distribute_tensor as place

    mesh = init_device_mesh("cpu", (1,))

    def cut(_, module, mesh):
        for name, parameter in list(module._parameters.items()):
            placed = nn.Parameter(place(parameter.detach(), mesh, [Shard(0)]))
            module.register_parameter(name, placed)
        for name, buffer in list(module._buffers.items()):
            module.register_buffer(name, place(buffer, mesh, [Replicate()]))

    return distribute_module(module, mesh, cut)


def _local_state(module):
    return {
        name: value.to_local().clone() if hasattr(value, "to_local") else value.clone()
        for name, value in module.state_dict().items()
    }


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.parametrize("kinds", [(True, True), (True, False), (False, True)], ids=repr)
def test_sharded_module_is_restored_into_a_sharded_one_a_plain_one_and_back(run_dir, kinds):
    """Parameters, buffers, what a hook makes of them, optimizer state without a step."""

    def make(seed, sharded):
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(3, 2), Doubling(), nn.Linear(3, 3))
        model[2].register_buffer("means", torch.rand(4))
        if sharded:
            _distribute(model)
        model[2].register_parameter("tied", model[0].weight)
        return model, torch.optim.Adam(model.parameters(), lr=0.1)

    from torch.distributed.tensor import DTensor

    model, optimizer = make(0, kinds[0])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    path = save(run_dir, model=model, optimizer=optimizer)
    rows = rows_of(path)
    assert rows["model/2.tied"].same_as == "model/0.weight"
    expected = SHARDED if kinds[0] else SPLIT
    assert rows["model/0.weight"].kind == expected
    assert rows["optimizer/state/model/0.weight/exp_avg"].kind == expected
    assert rows["model/2.means"].kind == (SHARDED if kinds[0] else WHOLE)
    assert rows["optimizer/state/model/0.weight/step"].kind == (
        WHOLE if kinds[0] else SPLIT
    )

    live, live_optimizer = make(1, kinds[1])
    restore(run_dir, model=live, optimizer=live_optimizer)
    assert_same(_local_state(live), _local_state(model))
    assert live[2].tied is live[0].weight
    for mine, theirs in zip(live.parameters(), model.parameters(), strict=True):
        state = live_optimizer.state[mine]
        assert isinstance(state["exp_avg"], DTensor) == kinds[1]
        assert type(state["step"]) is torch.Tensor
        assert_same(
            {k: getattr(v, "_local_tensor", v) for k, v in state.items()},
            {k: getattr(v, "_local_tensor", v) for k, v in optimizer.state[theirs].items()},
        )


class Scaled(nn.Module):
    """Has a parameter without dimensions."""

    def __init__(self, value):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(value))


SCALING = {
    "adamw": lambda p: torch.optim.AdamW(p, foreach=False),
    "asgd": lambda p: torch.optim.ASGD(p, foreach=False),
    "nadam": lambda p: torch.optim.NAdam(p, foreach=False),
    "momentum": lambda p: torch.optim.SGD(p, momentum=0.9, foreach=False),
}


@pytest.mark.usefixtures("one_rank_group")
@pytest.mark.parametrize("name", SCALING)
@pytest.mark.parametrize("was_sharded", [False, True], ids=["plain", "sharded"])
def test_state_of_a_parameter_without_dimensions_lies_as_if_trained(
    run_dir, name, was_sharded
):
    """Counts and averages have one shape there; only their keys tell them apart."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import distribute_module

    def make(value, sharded):
        model = Scaled(value)
        if sharded:
            distribute_module(model, init_device_mesh("cpu", (1,)))
        return model, SCALING[name](model.parameters())

    def step(model, optimizer):
        model.scale.grad = torch.full_like(model.scale, 0.5)
        optimizer.step()
        return {k: (type(v), float(v)) for k, v in optimizer.state[model.scale].items()}

    model, optimizer = make(2.0, was_sharded)
    step(model, optimizer)
    save(run_dir, model=model, optimizer=optimizer)
    live, live_optimizer = make(1.0, True)
    restore(run_dir, model=live, optimizer=live_optimizer)
    trained, its_optimizer = make(2.0, True)
    step(trained, its_optimizer)
    found = live_optimizer.state[live.scale]
    assert {key: (type(value), float(value)) for key, value in found.items()} == {
        key: (type(value), float(value))
        for key, value in its_optimizer.state[trained.scale].items()
    }
    assert step(live, live_optimizer) == step(trained, its_optimizer)


@pytest.mark.usefixtures("one_rank_group")
def test_sharded_tensor_under_two_names_is_one_if_it_is_one_object(run_dir):
    """Memory cannot tell: a rank's part may be empty."""
    model = _distribute(nn.Linear(2, 2))
    other = model.weight.detach()
    path = save(run_dir, model=model, same=model.weight, view=other)
    rows = rows_of(path)
    assert {name: row.same_as for name, row in rows.items() if row.same_as} == {
        "same": "model/weight"
    }
    live = _distribute(nn.Linear(2, 2))
    restore(run_dir, model=live, same=live.weight, view=live.weight.detach().clone())
    assert_same(_local_state(live), _local_state(model))
    with pytest.raises(MismatchError, match="view: the same memory as model/weight here"):
        restore(run_dir, model=live, same=live.weight, view=live.weight)


def test_module_that_raises_in_state_dict_fails_the_save_alone(run_dir):
    """An error of user code is a failed save, with the error as its cause."""

    class Raising(nn.Module):
        def state_dict(self, *args, **kwargs):
            raise ZeroDivisionError("broken")

    with pytest.raises(SaveFailed, match="ZeroDivisionError: broken") as caught:
        save(run_dir, model=Raising())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.mark.full
def test_looking_for_wrappers_imports_nothing():
    """The wrappers are looked up among what is imported, not imported to look."""
    import subprocess

    code = (
        "import sys, torch; from distckpt import Checkpoint; from distckpt.checkpoint "
        "import capture; capture(Checkpoint(m=torch.nn.Linear(1, 1))); "
        "print({'torch._dynamo', 'torch.distributed.tensor'} & {*sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


class _PlainStateDict(torch.nn.Linear):
    def state_dict(self):
        return {"weight": self.weight.detach(), "bias": self.bias.detach()}


def test_a_state_dict_that_takes_no_arguments_is_enough(run_dir):
    """A module whose state_dict() has no keywords is saved and restored like any other."""
    saved, live = _PlainStateDict(2, 3), _PlainStateDict(2, 3)
    CheckpointManager(Checkpoint(model=saved), run_dir, max_to_keep=1).save()
    CheckpointManager(
        Checkpoint(model=live), run_dir, max_to_keep=1
    ).restore_or_initialize()
    assert torch.equal(live.weight, saved.weight)
    assert torch.equal(live.bias, saved.bias)
