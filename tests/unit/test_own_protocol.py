"""An object's own ``state_dict`` and ``load_state_dict`` are the authority on its state."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn
from torch_helpers import assert_same, manifest_of, restore, save, stored

from distckpt import (
    Checkpoint,
    CheckpointManager,
    MismatchError,
    PerRank,
    RestoreFailed,
    RestoreOptions,
    UnsupportedError,
)
from distckpt.errors import DistckptError


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2))


def train(model, optimizer, steps, first=0):
    for index in range(first, first + steps):
        optimizer.zero_grad()
        inputs = torch.randn(5, 4, generator=torch.Generator().manual_seed(index))
        model(inputs).square().mean().backward()
        optimizer.step()
    return [parameter.detach().clone() for parameter in model.parameters()]


# Optimizers


class Container(torch.optim.Optimizer):
    """Several optimizers, which alone have state: as torchtitan's."""

    def __init__(self, model):
        self.optimizers = [torch.optim.AdamW(m.parameters()) for m in (model[0], model[2])]
        super().__init__([*model.parameters()], {})

    def step(self, closure=None):
        for optimizer in self.optimizers:
            optimizer.step()

    def zero_grad(self, set_to_none=True):
        for optimizer in self.optimizers:
            optimizer.zero_grad()

    def state_dict(self):
        return {str(i): o.state_dict() for i, o in enumerate(self.optimizers)}

    def load_state_dict(self, state_dict):
        for i, optimizer in enumerate(self.optimizers):
            optimizer.load_state_dict(state_dict[str(i)])


class Lookahead(torch.optim.Optimizer):
    """A wrapper whose state is that of the wrapped one: as timm's."""

    def __init__(self, base):
        self._base = base
        self.param_groups = base.param_groups
        self.defaults = base.defaults
        self.state = {}
        self._optimizer_step_pre_hooks = self._optimizer_step_post_hooks = {}
        for group in self.param_groups:
            group["lookahead_step"] = 0

    def step(self, closure=None):
        self._base.step()
        for group in self.param_groups:
            group["lookahead_step"] += 1
            for parameter in group["params"]:
                state = self._base.state[parameter]
                slow = state.setdefault("slow", parameter.detach().clone())
                if group["lookahead_step"] % 2 == 0:
                    slow.lerp_(parameter.detach(), 0.5)
                    parameter.data.copy_(slow)

    def zero_grad(self, set_to_none=True):
        self._base.zero_grad()

    def state_dict(self):
        return self._base.state_dict()

    def load_state_dict(self, state_dict):
        self._base.load_state_dict(state_dict)
        self.param_groups = self._base.param_groups


class Counting(torch.optim.AdamW):
    """Adds a key to the state dict."""

    calls = 0

    def step(self, closure=None):
        self.calls += 1
        super().step()

    def state_dict(self):
        return {**super().state_dict(), "calls": self.calls, "extra": torch.ones(2)}

    def load_state_dict(self, state_dict):
        state_dict = dict(state_dict)
        self.calls = state_dict.pop("calls")
        assert state_dict.pop("extra").tolist() == [1, 1]
        super().load_state_dict(state_dict)


class Hooked(torch.optim.AdamW):
    """Its hooks keep a count in the state dict."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = 0
        self.register_step_post_hook(lambda *_: setattr(self, "calls", self.calls + 1))
        self.register_state_dict_post_hook(lambda _, state: {**state, "n": self.calls})
        self.register_load_state_dict_pre_hook(self._take)

    def _take(self, _, state):
        state = dict(state)
        self.calls = state.pop("n")
        return state


class Derived(torch.optim.SGD):
    """Makes something of its settings in ``__setstate__``, as torch lets it."""

    def __setstate__(self, state):
        super().__setstate__(state)
        self.twice = [2 * group["lr"] for group in self.param_groups]


OPTIMIZERS = {
    "container": Container,
    "lookahead": lambda model: Lookahead(torch.optim.AdamW(model.parameters())),
    "more keys": lambda model: Counting(model.parameters()),
    "hooks": lambda model: Hooked(model.parameters()),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_with_a_state_dict_of_its_own_goes_on_bit_for_bit(run_dir, name):
    """Just as after its own ``load_state_dict``."""
    model = net()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 3)
    save(run_dir, model=model, optimizer=optimizer)
    live = net(1)
    other = OPTIMIZERS[name](live)
    train(live, other, 1)
    restore(run_dir, model=live, optimizer=other)
    assert_same(dict(other.state_dict()), dict(optimizer.state_dict()))
    assert getattr(other, "calls", 0) == getattr(optimizer, "calls", 0)
    assert_same(train(live, other, 3, first=3), train(model, optimizer, 3, first=3))


@pytest.mark.parametrize("name", ["lookahead", "more keys", "hooks"])
def test_wrapped_state_is_stored_by_parameter(run_dir, name):
    """So the order of the parameters does not matter, and patterns select it."""
    model = net()
    optimizer = OPTIMIZERS[name](model)
    train(model, optimizer, 2)
    path = save(run_dir, model=model, optimizer=optimizer)
    assert "optimizer/state/model/0.weight/exp_avg" in stored(path)


def test_moments_of_another_dtype_than_the_parameters_are_not_rounded(run_dir):
    """torch's ``load_state_dict`` would cast them."""
    model = net().to(torch.bfloat16)
    optimizer = Hooked(model.parameters())
    for parameter in model.parameters():
        optimizer.state[parameter]["step"] = torch.tensor(1.0)
        optimizer.state[parameter]["exp_avg"] = torch.randn(parameter.shape)
    save(run_dir, model=model, optimizer=optimizer)
    live = net(1).to(torch.bfloat16)
    other = Hooked(live.parameters())
    restore(run_dir, model=live, optimizer=other)
    for one, same in zip(model.parameters(), live.parameters(), strict=True):
        saved, found = optimizer.state[one]["exp_avg"], other.state[same]["exp_avg"]
        assert found.dtype == torch.float32 and torch.equal(found, saved)


def test_setstate_runs(run_dir):
    """It is a part of torch's ``load_state_dict``."""
    model = net()
    save(run_dir, model=model, optimizer=Derived(model.parameters(), lr=0.25))
    live = net(1)
    other = Derived(live.parameters(), lr=1.0)
    restore(run_dir, model=live, optimizer=other)
    assert other.twice == [0.5]


class Sam(torch.optim.Optimizer):
    """Holds an optimizer that its state dict leaves out: as the usual SAM."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})
        self.base_optimizer = torch.optim.AdamW(self.param_groups)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure=None):
        self.base_optimizer.step()


def test_optimizer_that_holds_another_one_and_does_not_save_it_is_refused(run_dir):
    """Before the first step, too; unless the other one is tracked as well."""
    model = net()
    optimizer = Sam(model.parameters())
    with pytest.raises(UnsupportedError, match=r"optimizer: Sam holds .*base_optimizer"):
        save(run_dir, model=model, optimizer=optimizer)
    train(model, optimizer, 2)
    save(run_dir, model=model, optimizer=optimizer, inner=optimizer.base_optimizer)
    live = net(1)
    other = Sam(live.parameters())
    restore(run_dir, model=live, optimizer=other, inner=other.base_optimizer)
    assert_same(train(live, other, 2, first=2), train(model, optimizer, 2, first=2))


class Forgetful(torch.optim.Optimizer):
    """A container whose state dict names settings only."""

    def __init__(self, model):
        self.parts = {"a": torch.optim.AdamW(model.parameters())}
        super().__init__([*model.parameters()], {})

    def step(self, closure=None):
        self.parts["a"].step()

    def state_dict(self):
        return {"state": {}, "param_groups": super().state_dict()["param_groups"]}


def test_container_whose_state_dict_forgets_the_state_is_refused(run_dir):
    """As soon as there is some; nothing tells before."""
    model = net()
    optimizer = Forgetful(model)
    train(model, optimizer, 1)
    with pytest.raises(UnsupportedError, match=r"parts\['a'\]: AdamW"):
        save(run_dir, model=model, optimizer=optimizer)


def test_another_class_of_optimizer_is_a_difference(run_dir):
    """Its settings and its state would be kept by one that does not know them."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 1)
    save(run_dir, model=model, optimizer=optimizer)
    live = net(1)
    other = torch.optim.SGD(live.parameters(), lr=0.5)
    with pytest.raises(MismatchError, match="class: AdamW in the checkpoint, SGD here"):
        restore(run_dir, model=live, optimizer=other)
    assert other.param_groups[0]["lr"] == 0.5 and not other.state
    options = RestoreOptions(exclude="optimizer")
    checkpoint = Checkpoint(model=live, optimizer=other)
    with CheckpointManager(checkpoint, run_dir, max_to_keep=None) as manager:
        manager.restore_or_initialize(options)
    assert other.param_groups[0]["lr"] == 0.5


def test_class_of_a_wrapper_that_only_passes_on_is_that_of_the_wrapped_one(run_dir):
    """So a job may be prepared by a library, or not."""

    class Prepared(torch.optim.Optimizer):
        def __init__(self, optimizer):
            self.optimizer = optimizer

        @property
        def param_groups(self):
            return self.optimizer.param_groups

        @property
        def state(self):
            return self.optimizer.state

        def state_dict(self):
            return self.optimizer.state_dict()

        def load_state_dict(self, state_dict):
            self.optimizer.load_state_dict(state_dict)

    model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, 2)
    save(run_dir, model=model, optimizer=Prepared(optimizer))
    live = net(1)
    other = torch.optim.AdamW(live.parameters())
    restore(run_dir, model=live, optimizer=other)
    assert_same(train(live, other, 2, first=2), train(model, optimizer, 2, first=2))


def test_flags_and_tensor_settings_stay_as_the_program_has_them(run_dir):
    """They say how a step is computed; a compiled step holds the tensor."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5, foreach=True)
    train(model, optimizer, 1)
    save(run_dir, model=model, optimizer=optimizer)
    hooked_dir = f"{run_dir}-hooked"
    save(hooked_dir, model=model, optimizer=_as_hooked(model, optimizer))
    for kind, directory in ((torch.optim.AdamW, run_dir), (Hooked, hooked_dir)):
        live = net(1)
        lr = torch.tensor(0.1)
        other = kind(live.parameters(), lr=lr, foreach=False, fused=False)
        restore(directory, model=live, optimizer=other)
        (group,) = other.param_groups
        assert group["lr"] is lr and lr.item() == 0.5
        assert group["foreach"] is False and group["fused"] is False


def _as_hooked(model, optimizer):
    hooked = Hooked(model.parameters(), lr=0.5, foreach=True)
    hooked.state.update(copy.copy(optimizer.state))
    return hooked


def test_number_stays_a_number_where_a_tensor_was_saved(run_dir):
    """The other way round."""
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.5))
    save(run_dir, model=model, optimizer=optimizer)
    live = net(1)
    other = torch.optim.AdamW(live.parameters(), lr=0.1)
    restore(run_dir, model=live, optimizer=other)
    assert other.param_groups[0]["lr"] == 0.5
    assert type(other.param_groups[0]["lr"]) is float


def test_groups_that_were_split_for_other_settings_are_reported(run_dir):
    """Both parts would get the same settings."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    save(run_dir, model=model, optimizer=optimizer)
    live = net(1)
    groups = [
        {"params": live[0].parameters(), "lr": 0.1},
        {"params": live[2].parameters(), "lr": 0.2},
    ]
    other = torch.optim.SGD(groups)
    with pytest.raises(MismatchError, match=r"group 0 .* is split .*\[0, 1\]"):
        restore(run_dir, model=live, optimizer=other)
    checkpoint = Checkpoint(model=live, optimizer=other)
    with CheckpointManager(checkpoint, run_dir, max_to_keep=None) as manager:
        manager.restore_or_initialize(RestoreOptions(exclude="optimizer/settings"))
    assert [group["lr"] for group in other.param_groups] == [0.1, 0.2]


def _scheduler(kind, optimizer):
    lr = torch.optim.lr_scheduler
    if kind == "lambda":
        return lr.LambdaLR(optimizer, lambda step: 0.5**step)
    if kind == "sequential":
        parts = [lr.LinearLR(optimizer), lr.StepLR(optimizer, 2)]
        return lr.SequentialLR(optimizer, parts, milestones=[3])
    return lr.ReduceLROnPlateau(optimizer)


@pytest.mark.parametrize("kind", ["lambda", "sequential", "plateau"])
def test_scheduler_of_fewer_groups_is_reported(run_dir, kind):
    """torch would fail at the next step, or never."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    save(run_dir, model=model, scheduler=_scheduler(kind, optimizer))
    live = net(1)
    groups = [{"params": live[0].parameters()}, {"params": live[2].parameters()}]
    other = torch.optim.SGD(groups, lr=0.5)
    with pytest.raises(MismatchError, match=r"scheduler: .* of 1 group in the checkpoint"):
        restore(run_dir, model=live, scheduler=_scheduler(kind, other))


def test_another_class_of_scheduler_is_a_difference(run_dir):
    """Its attributes would be set on one that does not use them."""
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    save(run_dir, scheduler=_scheduler("lambda", optimizer))
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5)
    with pytest.raises(MismatchError, match=r"state of LambdaLR .* CosineAnnealingLR here"):
        restore(run_dir, scheduler=cosine)


def test_optimizer_without_state_is_logged_once(run_dir, caplog):
    """Not at the first step, and not one that never has any."""
    model = net()
    idle = torch.optim.AdamW(model.parameters())
    plain = torch.optim.SGD(model.parameters())
    step = [0]
    checkpoint = Checkpoint(model=model, idle=idle, plain=plain)
    manager = CheckpointManager(
        checkpoint, run_dir, max_to_keep=None, step_counter=lambda: step[0]
    )
    with caplog.at_level(logging.WARNING), manager:
        manager.save()
        assert "no state" not in caplog.text
        for step[0] in (1, 2):
            manager.save()
    assert caplog.text.count("has no state at step") == 1
    assert "idle has no state" in caplog.text


# Modules


class Cached(nn.Module):
    """Keeps something derived from its weight, made anew when it is loaded."""

    def __init__(self, value=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((3,), value))
        self.register_buffer("table", torch.zeros(3), persistent=False)
        self.rebuild()

    def rebuild(self):
        self.cache = self.weight.detach() * 2
        self.table.copy_(self.weight.detach() + 1)

    def is_right(self):
        weight = self.weight.detach()
        return torch.equal(self.cache, weight * 2) and torch.equal(self.table, weight + 1)


class ByPostHook(Cached):
    def __init__(self, value=1.0):
        super().__init__(value)
        self.register_load_state_dict_post_hook(lambda module, _: module.rebuild())


class ByLoader(Cached):
    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self.rebuild()


class ByPreHook(Cached):
    def __init__(self, value=1.0):
        super().__init__(value)
        self._register_load_state_dict_pre_hook(self._before)

    def _before(self, state, prefix, *_):
        self.cache = state[f"{prefix}weight"] * 2
        self.table.copy_(state[f"{prefix}weight"] + 1)


class ByMethod(Cached):
    def load_state_dict(self, state_dict, strict=True, assign=False):
        result = super().load_state_dict(state_dict, strict, assign)
        self.rebuild()
        return result


def _by_instance(value=1.0):
    model = Cached(value)
    real = model.load_state_dict

    def load(state_dict, strict=True):
        result = real(state_dict, strict)
        model.rebuild()
        return result

    model.load_state_dict = load
    return model


LOADERS = {
    "post hook": ByPostHook,
    "loader": ByLoader,
    "pre hook": ByPreHook,
    "method": ByMethod,
    "instance": _by_instance,
}


@pytest.mark.parametrize("is_inside", [False, True])
@pytest.mark.parametrize("name", LOADERS)
def test_load_code_of_a_module_runs(run_dir, name, is_inside):
    """What is derived from the weights is as after the module's own load."""
    if is_inside and name in ("method", "instance"):
        pytest.skip("torch itself does not call it of a submodule")

    def make(value):
        made = LOADERS[name](value)
        return nn.ModuleDict({"plain": nn.Linear(2, 2), "x": made}) if is_inside else made

    save(run_dir, model=make(5.0))
    live = make(1.0)
    restore(run_dir, model=live)
    cached = live["x"] if is_inside else live
    assert cached.weight.tolist() == [5.0] * 3 and cached.is_right()


def test_post_hook_of_a_wrapper_runs(run_dir):
    """Data parallel modules have hooks like all others."""
    save(run_dir, model=nn.DataParallel(Cached(5.0)))
    live = nn.DataParallel(Cached(1.0))
    live.register_load_state_dict_post_hook(lambda module, _: module.module.rebuild())
    restore(run_dir, model=live)
    assert live.module.is_right() and live.module.weight.tolist() == [5.0] * 3
    live._register_load_state_dict_pre_hook(lambda *_: None)
    with pytest.raises(UnsupportedError, match="the wrapper DataParallel"):
        restore(run_dir, model=live)


class Renamed(nn.Module):
    """Was called otherwise when it was saved."""

    def __init__(self, value=1.0):
        super().__init__()
        self.new = nn.Parameter(torch.full((3,), value))
        self._register_load_state_dict_pre_hook(self._before)

    def _before(self, state, prefix, *_):
        if f"{prefix}old" in state:
            state[f"{prefix}new"] = state.pop(f"{prefix}old")


class Old(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.old = nn.Parameter(torch.full((3,), value))


def test_hooks_before_the_load_see_the_names_that_were_saved(run_dir):
    """They may rename what an older program has saved."""
    save(run_dir, model=nn.ModuleDict({"a": Old(5.0), "b": nn.Linear(1, 1)}))
    live = nn.ModuleDict({"a": Renamed(), "b": nn.Linear(1, 1)})
    restore(run_dir, model=live)
    assert live["a"].new.tolist() == [5.0] * 3


def test_what_hooks_leave_over_is_an_error_that_names_it(run_dir):
    """torch would call it unexpected, too."""
    save(run_dir, model=nn.ModuleDict({"a": nn.Linear(3, 1), "b": nn.Linear(1, 1)}))
    live = nn.ModuleDict({"a": Renamed(), "b": nn.Linear(1, 1)})
    with pytest.raises(RestoreFailed, match=r"model: .*a\.weight.*misses \['a\.new'\]"):
        restore(run_dir, model=live)


class Versioned(nn.Module):
    """Doubles what version 2 has saved."""

    _version = 3

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def _load_from_state_dict(self, state, prefix, metadata, *args):
        if metadata.get("version", 0) < 3:
            state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2
        super()._load_from_state_dict(state, prefix, metadata, *args)


@pytest.mark.parametrize("version", [1, 2, 3])
def test_version_of_a_module_is_the_one_that_was_saved(run_dir, version, monkeypatch):
    """A loader may convert what an older one has saved."""
    monkeypatch.setattr(Versioned, "_version", version)
    save(run_dir, model=nn.ModuleDict({"v": Versioned()}))
    monkeypatch.setattr(Versioned, "_version", 3)
    live = nn.ModuleDict({"v": Versioned()})
    restore(run_dir, model=live)
    assert live["v"].weight.tolist() == [1.0 if version == 3 else 2.0] * 2


class Growing(nn.Module):
    """Its extra state is a tensor whose size changes, or none."""

    def __init__(self, extra=None):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.extra = extra

    def get_extra_state(self):
        return self.extra

    def set_extra_state(self, state):
        self.extra = state


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        (torch.arange(5), torch.empty(0, dtype=torch.uint8)),
        (torch.empty(0), torch.arange(5)),
        (torch.arange(5), None),
        (None, torch.arange(5)),
        ({"a": torch.arange(3)}, None),
        (torch.tensor(7.0), {"a": 1}),
    ],
)
def test_extra_state_comes_back_as_it_was_saved(run_dir, saved, live):
    """Whatever a fresh module has instead."""
    save(run_dir, model=nn.ModuleDict({"g": Growing(saved)}))
    module = nn.ModuleDict({"g": Growing(live)})
    restore(run_dir, model=module)
    assert_same(module["g"].extra, saved)


class Quantized(nn.Module):
    """Saves what it does not take back: as bitsandbytes' ``Linear4bit``."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.scale = torch.ones(1)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}weight.scale"] = self.scale
        destination[f"{prefix}kind"] = "nf4"


def test_entries_that_a_module_does_not_take_back_fail_the_save(run_dir):
    """When there is time to do something about it."""
    with pytest.raises(UnsupportedError, match=r"model: .* q\.weight\.scale, q\.kind"):
        save(run_dir, model=nn.ModuleDict({"q": Quantized()}))


def test_modules_own_load_is_left_alone_where_nothing_is_selected(run_dir):
    """Other objects are restored without it."""
    save(run_dir, model=ByMethod(5.0), epoch=3)
    live = ByMethod(1.0)
    checkpoint = Checkpoint(model=live, epoch=0)
    with CheckpointManager(checkpoint, run_dir, max_to_keep=None) as manager:
        manager.restore_or_initialize(RestoreOptions(include="epoch"))
    assert checkpoint.epoch == 3 and live.weight.tolist() == [1.0] * 3


# Values


class Counter:
    def __init__(self, count=0):
        self.count = count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        if state["count"] < 0:
            raise KeyError("y")
        self.count = state["count"]


KINDS = {
    "object": lambda: Counter(1),
    "none": lambda: None,
    "dict": lambda: {"count": 1},
    "number": lambda: 3,
    "tensor": lambda: torch.ones(1),
    "module": lambda: nn.Linear(1, 1),
}


@pytest.mark.parametrize(
    "mark",
    [lambda value: value, pytest.param(PerRank, marks=pytest.mark.full)],
    ids=["shared", "per rank"],
)
@pytest.mark.parametrize("saved", KINDS)
@pytest.mark.parametrize("live", KINDS)
def test_a_value_and_an_object_are_different_kinds(run_dir, saved, live, mark):
    """The difference is told before anything is touched."""
    plain = {"none", "dict", "number"}
    if saved == live or {saved, live} <= plain:
        return
    save(run_dir, x=mark(KINDS[saved]()), weight=torch.ones(2))
    other, weight = KINDS[live](), torch.zeros(2)
    checkpoint = Checkpoint(x=mark(other), weight=weight)
    manager = CheckpointManager(checkpoint, run_dir, max_to_keep=None)
    with manager, pytest.raises(MismatchError, match="x"):
        manager.restore_or_initialize()
    assert weight.tolist() == [0, 0]
    tracked = checkpoint.x.value if isinstance(checkpoint.x, PerRank) else checkpoint.x
    assert tracked is other


def test_scaler_that_was_not_enabled_is_told_before_anything_is_touched(run_dir):
    """torch raises for its empty state."""
    save(run_dir, scaler=torch.amp.GradScaler("cpu", enabled=False), weight=torch.ones(2))
    weight = torch.zeros(2)
    with pytest.raises(MismatchError, match="scaler: saved by a GradScaler that was not"):
        restore(run_dir, scaler=torch.amp.GradScaler("cpu"), weight=weight)
    assert weight.tolist() == [0, 0]


@pytest.mark.parametrize("mark", [lambda value: value, PerRank], ids=["shared", "per rank"])
def test_load_state_dict_that_raises_is_named_by_its_path(run_dir, mark):
    """An error of an object deep in a dict says which one it was."""
    save(run_dir, parts=mark({"a": Counter(1), "b": Counter(-1)}))
    with pytest.raises(DistckptError, match=r"parts/b: KeyError: 'y'"):
        restore(run_dir, parts=mark({"a": Counter(), "b": Counter()}))


def test_what_was_saved_says_whose_state_it_is(run_dir):
    """A value is stored with the name of the class."""
    path = save(run_dir, counter=Counter(2), epoch=1)
    encoded = manifest_of(path).values
    assert encoded["counter"] == {"$object": ["Counter", {"count": 2}]}
    assert encoded["epoch"] == 1


class Listing(nn.Module):
    """Has a list of tensors in its state dict: as a metric of torchmetrics."""

    def __init__(self, *values):
        super().__init__()
        self.values = list(values)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        destination[f"{prefix}values"] = [*self.values]

    def _load_from_state_dict(self, state, prefix, *args):
        self.values = state.pop(f"{prefix}values")


def test_list_of_tensors_in_a_state_dict_comes_back(run_dir):
    """As one value, whatever its length here."""
    save(run_dir, model=nn.ModuleDict({"m": Listing(torch.ones(2), torch.zeros(3))}))
    live = nn.ModuleDict({"m": Listing(torch.ones(1))})
    restore(run_dir, model=live)
    assert_same(live["m"].values, [torch.ones(2), torch.zeros(3)])


def test_moments_that_are_made_anew_have_the_memory_format_of_the_parameter(run_dir):
    """torch makes them so, and a fused step is faster."""
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3, 4, 4)).sum().backward()
    optimizer.step()
    save(run_dir, model=model, optimizer=optimizer)
    live = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    other = torch.optim.AdamW(live.parameters())
    restore(run_dir, model=live, optimizer=other)
    saved, found = optimizer.state[model.weight], other.state[live.weight]
    assert torch.equal(saved["exp_avg"], found["exp_avg"])
    assert saved["exp_avg"].stride() == found["exp_avg"].stride()
