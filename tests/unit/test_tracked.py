"""Optimizers, schedulers and whatever else has a state: training goes on alike."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch_helpers import assert_same, manifest_of, restore, rows_of, save, stored

from distckpt import (
    Checkpoint,
    CheckpointManager,
    ConfigError,
    MismatchError,
    PerRank,
    SaveFailed,
    UnsupportedError,
)


def _model(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)).to(dtype)


def _train(model, optimizer, steps, first=0, scheduler=None):
    """Train on data that follows from the step alone; returns the losses."""
    losses = []
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(step)
        data = torch.rand(4, 6, generator=generator).to(model[0].weight.dtype)

        def closure(data=data):
            optimizer.zero_grad()
            loss = model(data).float().square().sum()
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        if scheduler is not None:
            scheduler.step(*([losses[-1]] if _wants_metric(scheduler) else []))
    return losses


def _wants_metric(scheduler):
    return isinstance(scheduler, lr_scheduler.ReduceLROnPlateau)


def _state_by_name(model, optimizer):
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: dict(sorted(optimizer.state.get(p, {}).items()))
        for group in optimizer.param_groups
        for p in group["params"]
    }


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "sgd-momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.05),
    "adam-amsgrad": lambda p: torch.optim.Adam(p, lr=0.05, amsgrad=True, betas=(0.8, 0.9)),
    "adam-tensor-lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(0.05)),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.05, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.05, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05, initial_accumulator_value=0.5),
    "adadelta": lambda p: torch.optim.Adadelta(p),
    "adamax": lambda p: torch.optim.Adamax(p, lr=0.05),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.05, t0=2),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.05, momentum=0.9, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.05),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.05),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.05),
    "muon": lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], lr=0.05),
    "lbfgs": lambda p: torch.optim.LBFGS(p, lr=0.05, max_iter=2, history_size=3),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_restored_without_a_warm_up_step_trains_on_alike(run_dir, name):
    """A fresh optimizer takes the state by parameter name; later losses are equal bits."""
    model = _model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    _train(model, optimizer, 3)
    path = save(run_dir, model=model, optimizer=optimizer)

    live = _model()
    live_optimizer = OPTIMIZERS[name](list(live.parameters()))
    restore(run_dir, model=live, optimizer=live_optimizer)
    assert_same(dict(live.state_dict()), dict(model.state_dict()))
    assert_same(_state_by_name(live, live_optimizer), _state_by_name(model, optimizer))
    for key, value in optimizer.param_groups[0].items():
        if key != "params":
            assert_same(live_optimizer.param_groups[0][key], value)
    saved = {row for row in rows_of(path) if row.startswith("optimizer/state/")}
    names = {f"optimizer/state/model/{n}" for n, _ in model.named_parameters()}
    assert all(any(row.startswith(f"{n}/") for n in names) for row in saved)
    assert (not saved) == (name == "sgd")

    assert _train(live, live_optimizer, 3, first=3) == _train(model, optimizer, 3, first=3)
    assert_same(dict(live.state_dict()), dict(model.state_dict()))
    assert_same(_state_by_name(live, live_optimizer), _state_by_name(model, optimizer))


def test_optimizers_tried_are_all_of_torch():
    """An optimizer that a new torch brings is missed here."""
    known = {
        name.lower()
        for name in torch.optim.__all__
        if inspect.isclass(getattr(torch.optim, name)) and name != "Optimizer"
    }
    # SparseAdam takes sparse gradients alone; its state is Adam's.
    assert known - {"sparseadam"} == {name.partition("-")[0] for name in OPTIMIZERS}


@pytest.mark.parametrize("name", ["sgd-momentum", "adamw", "adam-tensor-lr", "lbfgs"])
def test_optimizer_that_has_trained_already_is_set_back(run_dir, name):
    """State that is there is overwritten in place."""
    model = _model()
    optimizer = OPTIMIZERS[name](list(model.parameters()))
    _train(model, optimizer, 2)
    expected = copy.deepcopy(_state_by_name(model, optimizer))
    weights = copy.deepcopy(dict(model.state_dict()))
    save(run_dir, model=model, optimizer=optimizer)
    _train(model, optimizer, 2, first=7)
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"] * 0.5
    lr = optimizer.param_groups[0]["lr"]
    tensors = {
        id(value)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    restore(run_dir, model=model, optimizer=optimizer)
    assert_same(_state_by_name(model, optimizer), expected)
    assert_same(dict(model.state_dict()), weights)
    assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.05)
    if isinstance(lr, torch.Tensor):
        assert optimizer.param_groups[0]["lr"] is lr
    if name == "adamw":
        assert tensors == {
            id(value) for state in optimizer.state.values() for value in state.values()
        }


def test_state_that_the_checkpoint_lacks_is_removed(run_dir):
    """Momentum gathered since is dropped when the checkpoint has none."""
    model = _model()
    optimizer = torch.optim.Adam(model.parameters())
    save(run_dir, model=model, optimizer=optimizer)
    _train(model, optimizer, 2)
    restore(run_dir, model=model, optimizer=optimizer)
    assert not optimizer.state
    assert "state" in optimizer.state_dict()

    fresh = _model()
    assert _train(model, optimizer, 2) == _train(
        fresh, torch.optim.Adam(fresh.parameters()), 2
    )


def test_parameter_without_state_among_others_stays_without(run_dir):
    """A parameter that never had a gradient has no entry, before and after."""
    model = _model()
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.Adam(model.parameters())
    _train(model, optimizer, 1)
    assert len(optimizer.state) == 3
    save(run_dir, model=model, optimizer=optimizer)
    live = _model()
    live_optimizer = torch.optim.Adam(live.parameters())
    _train(live, live_optimizer, 1)
    restore(run_dir, model=live, optimizer=live_optimizer)
    assert live[0].weight not in live_optimizer.state
    assert_same(_state_by_name(live, live_optimizer), _state_by_name(model, optimizer))


def test_float32_state_of_bfloat16_parameters_keeps_its_bits(run_dir):
    """Moments of a wider type than the parameter's are not rounded on the way."""
    model = _model(torch.bfloat16)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    _train(model, optimizer, 1)
    torch.manual_seed(1)
    for state in optimizer.state.values():
        state["exp_avg"] = torch.rand(state["exp_avg"].shape, dtype=torch.float32)
        state["exp_avg_sq"] = torch.rand(state["exp_avg_sq"].shape, dtype=torch.float32)
    path = save(run_dir, model=model, optimizer=optimizer)
    rows = rows_of(path)
    assert rows["model/0.weight"].dtype == "bfloat16"
    assert rows["optimizer/state/model/0.weight/exp_avg"].dtype == "float32"
    live = _model(torch.bfloat16)
    live_optimizer = torch.optim.Adam(live.parameters(), lr=0.1)
    restore(run_dir, model=live, optimizer=live_optimizer)
    assert_same(_state_by_name(live, live_optimizer), _state_by_name(model, optimizer))
    assert live_optimizer.state[live[0].weight]["exp_avg"].dtype is torch.float32


def _groups(model, order, settings):
    parameters = dict(model.named_parameters())
    return [
        {"params": [parameters[name] for name in names], **extra}
        for names, extra in zip(order, settings, strict=True)
    ]


def test_parameters_in_another_order_and_other_groups_restore_right(run_dir):
    """Groups may be permuted, split and merged, as long as the settings agree."""
    names = [name for name, _ in _model().named_parameters()]
    model = _model()
    order = [[names[0], names[1]], [names[2], names[3]]]
    settings = [{"lr": 0.1}, {"lr": 0.2}]
    optimizer = torch.optim.AdamW(_groups(model, order, settings))
    _train(model, optimizer, 2)
    save(run_dir, model=model, optimizer=optimizer)

    live = _model()
    order = [[names[3]], [names[1], names[0]], [names[2]]]
    other = torch.optim.AdamW(_groups(live, order, [{}, {}, {}]), lr=9.0)
    restore(run_dir, model=live, optimizer=other)
    assert [group["lr"] for group in other.param_groups] == [0.2, 0.1, 0.2]
    assert_same(
        _state_by_name(live, other),
        {name: _state_by_name(model, optimizer)[name] for group in order for name in group},
    )
    assert _train(live, other, 2, first=2) == _train(model, optimizer, 2, first=2)


@pytest.mark.parametrize("lr", [(0.1, 0.2), (torch.tensor(0.1), torch.tensor(0.2))])
def test_parameters_with_other_settings_in_one_group_are_a_mismatch(run_dir, lr):
    """What was saved with two learning rates cannot live in one group."""
    names = [name for name, _ in _model().named_parameters()]
    model = _model()
    optimizer = torch.optim.AdamW(
        _groups(model, [names[:2], names[2:]], [{"lr": lr[0]}, {"lr": lr[1]}])
    )
    save(run_dir, model=model, optimizer=optimizer)
    live = _model()
    one_group = torch.optim.AdamW(live.parameters(), lr=lr[0])
    with pytest.raises(
        MismatchError, match=r"optimizer/settings/model/2.weight: saved with"
    ):
        restore(run_dir, model=live, optimizer=one_group)


def test_parameter_of_no_tracked_module_is_an_error_that_says_so(run_dir):
    """State needs a name, and the name comes from the module."""
    model, other = _model(), nn.Linear(3, 7)
    optimizer = torch.optim.SGD([*model.parameters(), other.weight])
    match = r"optimizer: parameter 4 of group 0 \(shape \(7, 3\)\) belongs to no tracked"
    with pytest.raises(ConfigError, match=match):
        save(run_dir, model=model, optimizer=optimizer)
    save(run_dir, model=model, optimizer=optimizer, other=other)
    with pytest.raises(ConfigError, match=match):
        restore(run_dir, model=model, optimizer=optimizer)


def test_optimizer_tracked_before_its_model_and_two_of_one_model(run_dir):
    """Neither the order of the arguments nor the number of optimizers matters."""
    model = _model()
    first = torch.optim.Adam(model[0].parameters())
    second = torch.optim.SGD(model[2].parameters(), lr=0.1, momentum=0.5)
    for optimizer in (first, second):
        _train(model, optimizer, 1)
    save(run_dir, first=first, nested=[second], models={"m": model})
    live = _model()
    live_first = torch.optim.Adam(live[0].parameters())
    live_second = torch.optim.SGD(live[2].parameters(), lr=0.3, momentum=0.1)
    restore(run_dir, first=live_first, nested=[live_second], models={"m": live})
    assert_same(_state_by_name(live, live_first), _state_by_name(model, first))
    assert_same(_state_by_name(live, live_second), _state_by_name(model, second))
    assert live_second.param_groups[0]["lr"] == 0.1


def test_tied_parameter_has_one_state_under_its_first_name(run_dir):
    """A tied weight is optimized once."""

    def tied():
        model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        model[1].weight = model[0].weight
        return model, torch.optim.Adam(model.parameters())

    model, optimizer = tied()
    model(torch.ones(3)).sum().backward()
    optimizer.step()
    path = save(run_dir, model=model, optimizer=optimizer)
    assert not any("optimizer/state/model/1.weight" in name for name in rows_of(path))
    live, live_optimizer = tied()
    restore(run_dir, model=live, optimizer=live_optimizer)
    assert_same(live_optimizer.state_dict()["state"], optimizer.state_dict()["state"])


def test_settings_with_every_plain_kind_come_back(run_dir):
    """Tuples, None, bools and keys of the user's own in a group survive."""
    model = _model()
    extra = {"name": "decoder", "milestones": (1, 2), "nothing": None, "flag": True}
    optimizer = torch.optim.SGD([{"params": list(model.parameters()), **extra}], lr=0.1)
    save(run_dir, model=model, optimizer=optimizer)
    live = _model()
    live_optimizer = torch.optim.SGD(live.parameters(), lr=0.2)
    restore(run_dir, model=live, optimizer=live_optimizer)
    for key, value in {**extra, "lr": 0.1}.items():
        assert_same(live_optimizer.param_groups[0][key], value)


def test_setting_that_cannot_be_stored_is_refused_with_its_path(run_dir):
    """A function among the settings is named."""
    model = _model()
    groups = [{"params": list(model.parameters()), "callback": print}]
    with pytest.raises(
        UnsupportedError, match=r"optimizer/settings/model/0.weight.*callba"
    ):
        save(run_dir, model=model, optimizer=torch.optim.SGD(groups))


# Schedulers

SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [2, 4, 4, 5]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, total_iters=4),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.8),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.5)],
        [4],
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 6),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, total_iters=4), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(
        o, mode="max", patience=1, threshold=0.0
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=12),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 8),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, swa_lr=0.01, anneal_epochs=4),
}


def test_schedulers_tried_are_all_of_torch():
    """A scheduler that a new torch brings is missed here."""
    known = {
        name
        for name in lr_scheduler.__all__
        if inspect.isclass(getattr(lr_scheduler, name)) and name != "LRScheduler"
    }
    assert known == SCHEDULERS.keys() - {"SWALR"}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float-lr", "tensor-lr"])
def test_scheduler_goes_on_where_it_was(run_dir, name, tensor_lr):
    """After a restore the learning rates and losses of later steps are the same bits."""

    def make():
        model = _model()
        lr = torch.tensor(0.05) if tensor_lr else 0.05
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
        return {
            "model": model,
            "optimizer": optimizer,
            "scheduler": SCHEDULERS[name](optimizer),
        }

    def go_on(objects):
        rates = []
        for step in range(3, 8):
            _train(objects["model"], objects["optimizer"], 1, step, objects["scheduler"])
            rates.append(float(objects["optimizer"].param_groups[0]["lr"]))
        return rates

    trained, live = make(), make()
    _train(trained["model"], trained["optimizer"], 3, 0, trained["scheduler"])
    if callable(trained["scheduler"].state_dict().get("anneal_func")):
        # SWALR of older versions of torch has a function in its state.
        with pytest.raises(UnsupportedError, match=r"scheduler\['anneal_func'\].*function"):
            save(run_dir, **trained)
        return
    save(run_dir, **trained)
    restore(run_dir, **live)
    assert go_on(live) == go_on(trained)
    assert_same(dict(live["model"].state_dict()), dict(trained["model"].state_dict()))


def test_scheduler_with_a_stateful_lambda_keeps_it(run_dir):
    """LambdaLR stores the attributes of callable objects; they come back."""

    class Decay:
        def __init__(self, rate):
            self.rate = rate

        def __call__(self, step):
            return self.rate**step

    model = _model()
    optimizer = torch.optim.SGD(model.parameters())
    live_rule = Decay(0.9)
    save(run_dir, scheduler=lr_scheduler.LambdaLR(optimizer, Decay(0.5)))
    restore(run_dir, scheduler=lr_scheduler.LambdaLR(optimizer, live_rule))
    assert live_rule.rate == 0.5


def test_grad_scaler_keeps_its_scale(run_dir):
    """The scaler of mixed precision is saved through its state dict."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    model = _model()
    optimizer = torch.optim.SGD(model.parameters())
    for _ in range(3):
        scaler.scale(model(torch.ones(6)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
    save(run_dir, scaler=scaler)
    live = torch.amp.GradScaler("cpu", init_scale=2.0)
    restore(run_dir, scaler=live)
    assert live.state_dict() == scaler.state_dict()
    assert live.get_scale() != 2.0


class Loader:
    """Has a state dict with everything that may stand in one."""

    def __init__(self, state=None):
        self.state = state
        self.num_loads = 0

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state
        self.num_loads += 1


def test_any_object_with_a_state_dict_gets_back_what_it_gave(run_dir):
    """Tensors at any depth, int keys, tuples and bytes come back as they were."""
    state = {
        "cursor": 17,
        3: torch.arange(4),
        "deep": [{"t": (torch.ones(2), None)}, b"\0\xff", {1: {2: torch.zeros(())}}],
        "no/slash~": {"~1": float("-inf")},
    }
    path = save(run_dir, loaders=[Loader(state)])
    assert "loaders/~i0/deep/~i0/t/~i0" in stored(path)
    live = Loader()
    restore(run_dir, loaders=[live])
    assert_same(live.state, state)
    assert live.num_loads == 1


def test_object_that_has_no_state_yet_is_given_one(run_dir):
    """Also where its tensors may have to be sharded, so that it is asked for its own."""
    import torch.distributed.tensor

    save(run_dir, loader=Loader({"tensor": torch.arange(4)}))
    live = Loader()
    restore(run_dir, loader=live)
    assert_same(live.state, {"tensor": torch.arange(4)})


def test_state_dict_is_loaded_only_when_everything_fits(run_dir):
    """User code does not run in a restore that is refused."""
    save(run_dir, loader=Loader({"n": 1}), weight=torch.zeros(2))
    live = Loader("untouched")
    with pytest.raises(MismatchError):
        restore(run_dir, loader=live, weight=torch.zeros(3))
    assert (live.state, live.num_loads) == ("untouched", 0)


def test_object_that_raises_in_state_dict_is_named_as_cause(run_dir):
    """The original exception is the cause of the failed save."""

    class Broken(Loader):
        def state_dict(self):
            raise ZeroDivisionError("no state today")

    with pytest.raises(SaveFailed, match="ZeroDivisionError: no state today") as caught:
        save(run_dir, loader=Broken())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_tracked_kinds_that_changed_are_mismatches_that_name_both(run_dir):
    """A value where a tensor was, and all other such swaps, are listed together."""
    save(run_dir, a=torch.ones(2), b=5, c=Loader({"x": 1}), d=[torch.ones(1)])
    live = {"a": 5, "b": torch.ones(2), "c": nn.Linear(1, 1), "d": {"k": torch.ones(1)}}
    with pytest.raises(MismatchError) as caught:
        restore(run_dir, **live)
    text = str(caught.value)
    assert "a: a plain value here, a tensor in the checkpoint" in text
    assert "b: a tensor here, a plain value in the checkpoint" in text
    assert "c/weight: a tensor here, not there in the checkpoint" in text
    assert "c: in the checkpoint, nothing here" in text
    assert "d/k: a tensor here, not there in the checkpoint" in text
    assert "d/~i0: in the checkpoint, nothing here" in text
    assert live["b"].tolist() == [1, 1]


def test_same_object_under_two_names_is_saved_under_both(run_dir):
    """Aliases of a module are ties, aliases of a scheduler two values."""
    model = nn.Linear(2, 2)
    path = save(run_dir, a=model, b=model)
    assert sorted(stored(path)) == ["a/bias", "a/weight"]
    live = nn.Linear(2, 2)
    restore(run_dir, a=live, b=live)
    assert_same(dict(live.state_dict()), dict(model.state_dict()))


def test_values_of_an_optimizer_are_few_and_named(run_dir):
    """Settings are one entry a parameter, under the parameter's name."""
    model = _model()
    path = save(run_dir, model=model, optimizer=torch.optim.SGD(model.parameters()))
    assert sorted(manifest_of(path).values) == [
        "optimizer/class",
        *sorted(f"optimizer/settings/model/{name}" for name, _ in model.named_parameters()),
        "save_counter",
    ]


def test_a_shared_optimizer_of_per_rank_parameters_is_refused(run_dir):
    """Its state differs between ranks and would be mixed from several."""
    model = _model()
    checkpoint = Checkpoint(
        model=PerRank(model), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
    )
    with pytest.raises(ConfigError, match="wrap the optimizer in PerRank, too"):
        CheckpointManager(checkpoint, run_dir, max_to_keep=1).save()


def test_state_of_no_parameter_is_refused(run_dir):
    """What cannot be named is not dropped silently."""
    model = _model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer.state["calls"] = {"n": torch.tensor(7.0)}
    checkpoint = Checkpoint(model=model, optimizer=optimizer)
    with pytest.raises(UnsupportedError, match="'calls'"):
        CheckpointManager(checkpoint, run_dir, max_to_keep=1).save()


def test_settings_of_an_empty_group_and_nan_settings_come_back(run_dir):
    """A group that is filled later keeps its learning rate; NaN equals NaN."""

    def make():
        model = _model()
        groups = [{"params": [], "lr": 0.5}, {"params": list(model.parameters())}]
        return Checkpoint(model=model, optimizer=torch.optim.SGD(groups, lr=0.1))

    saved, live = make(), make()
    saved.optimizer.param_groups[0]["lr"] = 0.9
    saved.optimizer.param_groups[1]["clip"] = float("nan")
    CheckpointManager(saved, run_dir, max_to_keep=1).save()
    CheckpointManager(live, run_dir, max_to_keep=1).restore_or_initialize()
    assert live.optimizer.param_groups[0]["lr"] == 0.9
    assert live.optimizer.param_groups[1]["clip"] != live.optimizer.param_groups[1]["clip"]
