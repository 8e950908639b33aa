"""What a Checkpoint is given: looked at by type first, captured once, named when wrong."""

from __future__ import annotations

import copy
import logging
import random
from collections import OrderedDict

import pytest
import torch
from torch import nn

import distckpt
from distckpt import (
    Checkpoint,
    CheckpointManager,
    ConfigError,
    MismatchError,
    Parts,
    PerRank,
    RestoreOptions,
    Trainable,
    UnsupportedError,
    every,
)


def _trained(model=None, seed=0):
    torch.manual_seed(seed)
    model = model or nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    model(torch.ones(3, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def _warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]


# State dicts and other copies


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: {"optimizer": state},
        lambda state: {"all": {"optimizer": state, "epoch": 1}},
        lambda state: {"list": [state]},
        lambda state: {"own": PerRank(state)},
    ],
    ids=["itself", "in-a-dict", "in-a-list", "per-rank"],
)
def test_state_dict_of_an_optimizer_is_refused(run_dir, wrap):
    """It is a copy: moments and counts in it would stay what they are now."""
    model, optimizer = _trained()
    checkpoint = Checkpoint(model=model, **wrap(optimizer.state_dict()))
    with pytest.raises(UnsupportedError, match=r"state dict.*Track the optimizer itself"):
        CheckpointManager(checkpoint, run_dir, 2)
    with pytest.raises(UnsupportedError, match="Track the optimizer itself"):
        checkpoint.check()


@pytest.mark.parametrize(
    ("state", "line"),
    [
        (lambda model: model.state_dict(), "Checkpoint(x=model)"),
        (lambda model: copy.deepcopy(model.state_dict()), "Checkpoint(x=model)"),
        (lambda model: {**model.state_dict()}, "Checkpoint(x=model)"),
        (
            lambda m: {k: v.clone() for k, v in m.state_dict().items()},
            "Checkpoint(x=model)",
        ),
        (lambda m: OrderedDict(m.named_parameters()), "Checkpoint(x=model)"),
        (
            lambda model: torch.optim.lr_scheduler.StepLR(
                torch.optim.SGD(model.parameters(), lr=1.0), 3
            ).state_dict(),
            "Checkpoint(x=scheduler)",
        ),
        (
            lambda _: torch.amp.GradScaler("cpu", enabled=True).state_dict(),
            "Checkpoint(x=scaler)",
        ),
    ],
    ids=["state-dict", "deep-copy", "loose", "clones", "parameters", "scheduler", "scaler"],
)
def test_copy_of_a_state_draws_a_warning_with_the_line_to_write(
    run_dir, caplog, state, line
):
    """It can be stored; training does not change it."""
    with CheckpointManager(Checkpoint(x=state(nn.Linear(2, 2))), run_dir, 2) as manager:
        manager.save()
    (text,) = _warnings(caplog)
    assert line in text


def test_averages_of_the_weights_draw_no_warning(run_dir, caplog):
    """They lie in dicts with the module's names, next to the module."""
    model, optimizer = _trained()
    ema = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    checkpoint = Checkpoint(model=model, optimizer=optimizer, ema=ema, config={"lr": 1})
    with CheckpointManager(checkpoint, run_dir, 2) as manager:
        manager.save()
    assert _warnings(caplog) == []


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (nn.Linear, "is a class"),
        (lambda: None, "cannot be stored"),
        (nn.Linear(2, 2).parameters(), "cannot be stored"),
        (object(), "cannot be stored"),
    ],
    ids=["class", "function", "generator", "object"],
)
def test_what_can_never_be_stored_is_refused_when_the_manager_is_made(run_dir, value, text):
    """Before a job has trained for an hour."""
    with pytest.raises(UnsupportedError, match=text):
        CheckpointManager(Checkpoint(deep={"in": [value]}), run_dir, 2)


def test_objects_without_names_are_answered_with_the_line_to_write():
    """Python's own message says only that there is one too many."""
    with pytest.raises(
        ConfigError, match=r"Checkpoint\(model=model, optimizer=optimizer\)"
    ):
        Checkpoint({"model": nn.Linear(2, 2)})


# Captured once


class Loud:
    """Has a state dict that raises, or cannot be stored, when told so; counts calls."""

    def __init__(self, state=None):
        self.state = {} if state is None else state
        self.num_calls = 0

    def state_dict(self):
        self.num_calls += 1
        if isinstance(self.state, Exception):
            raise self.state
        return self.state

    def load_state_dict(self, state):
        self.state = state


def test_making_a_manager_calls_no_state_dict(run_dir):
    """User code may need what is not set up yet."""
    loud = Loud(RuntimeError("too early"))
    CheckpointManager(Checkpoint(loud=loud), run_dir, 2).close()
    assert loud.num_calls == 0


@pytest.mark.parametrize("call", ["restore_or_initialize", "first save, not due"])
def test_what_cannot_be_stored_is_found_before_a_save_is_due(run_dir, call):
    """An hour later would be too late."""
    loud = Loud({"bad": object()})
    manager = CheckpointManager(
        Checkpoint(loud=loud), run_dir, 2, checkpoint_interval=every(hours=1)
    )
    with pytest.raises(UnsupportedError, match=r"every save would fail.*loud\['bad'\]"):
        if call == "restore_or_initialize":
            manager.restore_or_initialize()
        else:
            manager.save()


def test_found_once_and_not_at_each_call(run_dir):
    """A state dict may cost a second."""
    loud = Loud()
    manager = CheckpointManager(
        Checkpoint(loud=loud), run_dir, 2, checkpoint_interval=every(hours=1)
    )
    for _ in range(5):
        manager.save()
    assert loud.num_calls == 1
    manager.restore_or_initialize()
    assert loud.num_calls == 1
    manager.close()


def test_what_cannot_be_stored_after_a_restore_is_named_and_the_restore_stays(run_dir):
    """The state is whole; only saving it is not possible."""
    x = torch.ones(2)
    with CheckpointManager(Checkpoint(x=x, loud=Loud()), run_dir, 2) as manager:
        manager.save()

    class Spoils(Loud):
        def load_state_dict(self, state):
            self.state = {"bad": object()}

    x = torch.zeros(2)
    with CheckpointManager(Checkpoint(x=x, loud=Spoils()), run_dir, 2) as manager:
        with pytest.raises(UnsupportedError, match="every save would fail"):
            manager.restore_or_initialize()
        assert x.tolist() == [1.0, 1.0]
        manager.checkpoint.loud = 3
        assert manager.save()


def test_what_cannot_be_stored_yet_is_left_to_the_first_save(run_dir, caplog):
    """A lazy module before its first batch, an object that is not ready."""
    lazy, loud = nn.LazyLinear(3), Loud(RuntimeError("not begun"))
    with CheckpointManager(Checkpoint(lazy=lazy, loud=1), run_dir, 2) as manager:
        manager.restore_or_initialize()
        manager.checkpoint.loud = loud
        with pytest.raises(UnsupportedError, match="lazy"):
            manager.save()
        lazy(torch.ones(1, 2))
        with pytest.raises(distckpt.SaveFailed, match="not begun"):
            manager.save()
        loud.state = {}
        assert manager.save()
    manager = CheckpointManager(Checkpoint(loud=Loud(RuntimeError("no"))), run_dir + "2", 2)
    manager.restore_or_initialize()
    assert "the first save fails" in caplog.text
    manager.close()


def test_looking_draws_no_random_numbers(run_dir):
    """As the state dict of torchdata's loader does."""

    class Draws(Loud):
        def state_dict(self):
            torch.rand(3), random.random()
            return {}

    torch.manual_seed(1), random.seed(1)
    expected = torch.rand(1), random.random()
    torch.manual_seed(1), random.seed(1)
    checkpoint = Checkpoint(draws=Draws())
    checkpoint.check()
    with CheckpointManager(checkpoint, run_dir, 2) as manager:
        manager.restore_or_initialize()
        assert (torch.rand(1), random.random()) == expected


def test_check_by_hand_names_what_cannot_be_stored():
    """Local, before there is a manager."""
    Checkpoint(model=nn.Linear(2, 2), epoch=1).check()
    with pytest.raises(UnsupportedError, match="loud"):
        Checkpoint(loud=Loud({1: object()})).check()


# Adapters


def test_dict_of_parameters_goes_with_its_optimizer(run_dir):
    """Adapters alone, without a module that holds nothing else."""
    torch.manual_seed(0)
    base = nn.Linear(4, 4).requires_grad_(False)

    def adapters():
        return {"a": nn.Parameter(torch.randn(4, 2)), "b": nn.Parameter(torch.randn(2, 4))}

    def train(own, optimizer):
        loss = base(torch.ones(1, 4) @ own["a"] @ own["b"]).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    own = adapters()
    optimizer = torch.optim.AdamW(own.values())
    train(own, optimizer)
    with CheckpointManager(Checkpoint(adapters=own, optim=optimizer), run_dir, 2) as m:
        path = m.save()
    with distckpt.open(path) as opened:
        assert "optim/state/adapters/a/exp_avg" in opened
    train(own, optimizer)
    other = adapters()
    resumed = torch.optim.AdamW(other.values())
    with CheckpointManager(Checkpoint(adapters=other, optim=resumed), run_dir, 2) as m:
        m.restore_or_initialize()
    train(other, resumed)
    assert all(torch.equal(own[key], other[key]) for key in own)


def _adapted(seed, base_seed=5):
    torch.manual_seed(base_seed)
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        model[2].weight.add_(seed)
    return _trained(model, seed)


def test_trainable_leaves_frozen_parameters_out_and_restores_the_rest(run_dir):
    """Buffers are saved; the file has no byte of the base."""
    model, optimizer = _adapted(0)
    checkpoint = Checkpoint(model=Trainable(model), optimizer=optimizer)
    with CheckpointManager(checkpoint, run_dir, 2) as manager:
        path = manager.save()
    with distckpt.open(path) as opened:
        names = [name for name in opened if name.startswith("model/")]
    assert "model/2.weight" in names and "model/1.running_mean" in names
    assert not [name for name in names if name.startswith("model/0.")]
    other, resumed = _adapted(1)
    assert not torch.equal(other[2].weight, model[2].weight)
    checkpoint = Checkpoint(model=Trainable(other), optimizer=resumed)
    with CheckpointManager(checkpoint, run_dir, 2) as manager:
        manager.restore_or_initialize()
    for name, value in model.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name
    state, expected = resumed.state_dict()["state"], optimizer.state_dict()["state"]
    assert all(torch.equal(state[k]["exp_avg"], expected[k]["exp_avg"]) for k in expected)


def test_trainable_on_another_base_is_a_mismatch(run_dir):
    """Adapters that were trained on other weights would be wrong without an error."""
    model, _ = _adapted(0)
    with CheckpointManager(Checkpoint(model=Trainable(model)), run_dir, 2) as manager:
        manager.save()
    other, _ = _adapted(0, base_seed=6)
    checkpoint = Checkpoint(model=Trainable(other))
    with CheckpointManager(checkpoint, run_dir, 2) as manager:
        with pytest.raises(MismatchError, match=r"2 frozen parameters \(model/0.weight"):
            manager.restore_or_initialize()
        options = RestoreOptions(exclude="model/~frozen")
        manager.restore_or_initialize(options)
    assert torch.equal(other[2].weight, model[2].weight)


def test_digest_of_a_frozen_parameter_is_taken_again_after_a_change(run_dir):
    """It is kept for as long as the parameter stays as it is."""
    model, _ = _adapted(0)
    trainable = Trainable(model)
    with CheckpointManager(Checkpoint(model=trainable), run_dir, 2) as manager:
        manager.save()
        before = {name: digest for name, (_, digest) in trainable.digests.items()}
        manager.save()
        assert before == {n: digest for n, (_, digest) in trainable.digests.items()}
        with torch.no_grad():
            model[0].weight.add_(1)
        with pytest.raises(MismatchError, match=r"model/0\.weight"):
            manager.restore("latest")
        manager.save()
        manager.restore("latest")


def test_trainable_takes_a_module_only():
    """And says what it got."""
    with pytest.raises(ConfigError, match="got dict"):
        Trainable({})


class Wrapper(nn.Module):
    """As Lightning Fabric's: a state dict without the prefix of what is inside."""

    def __init__(self, inner):
        super().__init__()
        self._forward_module = inner

    def forward(self, x):
        return self._forward_module(x)

    def state_dict(self, **kwargs):
        return self._forward_module.state_dict(**kwargs)

    def load_state_dict(self, state, strict=True):
        return self._forward_module.load_state_dict(state, strict=strict)


def test_wrapper_with_its_own_state_dict_gives_the_optimizer_the_same_names(run_dir):
    """So export, rename and a restore without the wrapper match."""
    model, optimizer = _trained()
    with CheckpointManager(
        Checkpoint(model=Wrapper(model), optimizer=optimizer), run_dir, 2
    ) as manager:
        path = manager.save()
    with distckpt.open(path) as opened:
        names = [*opened]
    assert "model/0.weight" in names
    assert "optimizer/state/model/0.weight/exp_avg" in names
    other, resumed = _trained(seed=1)
    Checkpoint(model=other, optimizer=resumed).restore(path)
    assert torch.equal(other[0].weight, model[0].weight)


def test_parts_of_state_dicts_are_not_parts():
    """Parts takes the objects."""
    with pytest.raises(ConfigError):
        Parts([{}])


# How a mismatch is told


def test_mismatch_is_told_by_object_with_the_option_that_restores_the_rest(run_dir):
    """Sixteen lines of one missing optimizer say less than one."""
    model, optimizer = _trained()
    with CheckpointManager(Checkpoint(model=model, optimizer=optimizer), run_dir, 2) as m:
        m.save()
    wider = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 5))
    checkpoint = Checkpoint(model=wider)
    with CheckpointManager(checkpoint, run_dir, 2) as manager:
        with pytest.raises(MismatchError) as caught:
            manager.restore_or_initialize()
        text = str(caught.value)
        lines = text.splitlines()
        assert sum("optimizer (" in line for line in lines) == 1
        assert "names: optimizer/" in text and "in the checkpoint, nothing here" in text
        expected = "RestoreOptions(exclude=['optimizer', 'model/1.weight', 'model/1.bias'])"
        assert lines[-1].endswith(f"{expected}.")
        manager.restore_or_initialize(eval(expected))
    assert torch.equal(wider[0].weight, model[0].weight)


def test_mismatch_of_dtypes_alone_offers_to_convert(run_dir):
    """bfloat16 weights into a float32 model."""
    model = nn.Linear(4, 4).bfloat16()
    with CheckpointManager(Checkpoint(model=model), run_dir, 2) as manager:
        manager.save()
    with CheckpointManager(Checkpoint(model=nn.Linear(4, 4)), run_dir, 2) as manager:
        with pytest.raises(MismatchError, match=r"RestoreOptions\(cast=True\)"):
            manager.restore_or_initialize()
        manager.restore_or_initialize(RestoreOptions(cast=True))


def test_second_manager_of_a_process_is_named_as_such(run_dir):
    """Else one looks for another job."""
    first = CheckpointManager(Checkpoint(x=1), run_dir, 2)
    first.save()
    second = CheckpointManager(Checkpoint(x=1), run_dir, 2)
    second.restore_or_initialize()
    with pytest.raises(distckpt.FencedError, match="another manager of this same process"):
        first.save(checkpoint_number=7)
    second.close()


def test_call_after_the_block_says_so(run_dir):
    """With what to do."""
    with CheckpointManager(Checkpoint(x=1), run_dir, 2) as manager:
        manager.save()
    with pytest.raises(distckpt.ManagerBroken, match="the with block has ended"):
        manager.save()


class Fetching(torch.utils.data.DataLoader):
    """As torchdata's: its state dict makes an iterator, and draws."""

    num_iterators = 0

    def state_dict(self):
        self.num_iterators += 1
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("is_restored", [False, True])
def test_data_loader_is_not_asked_before_the_loop_has_begun(run_dir, is_restored):
    """It would begin to fetch, with an epoch that is not set yet."""
    if is_restored:
        with CheckpointManager(Checkpoint(own=PerRank(Fetching([1]))), run_dir, 2) as m:
            m.save()
    loader = Fetching([1])
    checkpoint = Checkpoint(own=PerRank(loader))
    with CheckpointManager(
        checkpoint, run_dir, 2, checkpoint_interval=every(hours=1)
    ) as manager:
        manager.restore_or_initialize()
        assert loader.num_iterators == 0
        manager.save()
        manager.save()
        assert loader.num_iterators == 1
