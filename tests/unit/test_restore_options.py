"""Some of a checkpoint is restored, under other names; all else is left and not missed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from distckpt import (
    Checkpoint,
    CheckpointManager,
    ConfigError,
    MismatchError,
    PerRank,
    RestoreOptions,
)
from distckpt.restore_names import Names


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Linear(3, 4)
        self.head = nn.Linear(4, 2)
        self.register_buffer("seen", torch.zeros(2))


class Backbone(nn.Module):
    """The same under other names, and with another head."""

    def __init__(self, num_classes=2):
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.head = nn.Linear(4, num_classes)
        self.register_buffer("seen", torch.zeros(2))


def stepped(model):
    """Make an optimizer that has made a step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return optimizer


@pytest.fixture
def saved(tmp_path):
    """Save a model, its optimizer and more; return the path and the objects."""
    model = Encoder()
    nn.init.constant_(model.seen, 7.0)
    objects = {
        "model": model,
        "optimizer": stepped(model),
        "epoch": 5,
        "notes": {"ema": torch.ones(3), "best": 0.5},
        "own": PerRank(torch.full((2,), 9.0)),
    }
    with CheckpointManager(Checkpoint(**objects), tmp_path / "run", 1) as manager:
        return manager.save(), objects


def equal(one, other):
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def fresh(model=None):
    model = model or Encoder()
    return Checkpoint(
        model=model,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.1),
        epoch=0,
        notes={"ema": torch.zeros(3), "best": 0.0},
        own=PerRank(torch.zeros(2)),
    )


def test_only_what_is_included_is_restored(saved):
    """The rest stays as it is, and is neither missing nor too much."""
    path, objects = saved
    live = fresh()
    live.restore(path, RestoreOptions(include="model"))
    assert equal(live.model, objects["model"]) and live.model.seen.tolist() == [7.0, 7.0]
    assert live.epoch == 0 and live.notes["best"] == 0.0
    assert not live.optimizer.state and live.optimizer.param_groups[0]["lr"] == 0.1
    assert live.own.value.tolist() == [0.0, 0.0] and live.save_counter == 0


def test_what_is_excluded_is_left_as_it_is(saved):
    """A new head on an old body, which the checkpoint's head would not fit."""
    path, objects = saved
    model = Encoder()
    model.head = nn.Linear(4, 5)
    before = model.head.weight.detach().clone()
    live = fresh(model)
    options = RestoreOptions(exclude=["model/head.*", "optimizer"])
    live.restore(path, options)
    assert torch.equal(model.body.weight, objects["model"].body.weight)
    assert torch.equal(model.head.weight, before)
    assert live.epoch == 5 and live.notes["ema"].tolist() == [1.0] * 3
    assert live.own.value.tolist() == [9.0, 9.0]


def test_objects_that_the_checkpoint_lacks_can_be_excluded(saved):
    """And what it has besides need not be tracked, if it is not included."""
    path, objects = saved
    live = Checkpoint(model=Encoder(), new=nn.Linear(1, 1), epoch=0)
    with pytest.raises(MismatchError, match="new/weight"):
        live.restore(path)
    live.restore(path, RestoreOptions(include=["model", "epoch"]))
    assert live.epoch == 5 and equal(live.model, objects["model"])


def test_strictness_holds_for_what_is_selected(saved):
    """One error lists all that is missing, too much or misshapen, and nothing else."""
    path, _ = saved
    model = Backbone(num_classes=3)
    live = Checkpoint(model=model)
    with pytest.raises(MismatchError) as caught:
        live.restore(path, RestoreOptions(include="model", exclude="model/head.bias"))
    text = str(caught.value)
    assert "model/trunk.weight: a tensor here, not there" in text
    assert "model/body.weight: in the checkpoint, nothing here" in text
    assert "model/head.weight: float32 [2, 4] in the checkpoint, float32 [3, 4]" in text
    assert "head.bias" not in text and "optimizer" not in text and "epoch" not in text


@pytest.mark.parametrize(
    "rename",
    [
        {"model/body.": "model/trunk."},
        {"model/body": "model/trunk", "model/": "model/"},
        lambda name: name.replace("model/body.", "model/trunk."),
    ],
    ids=["dict", "longest", "function"],
)
def test_names_that_have_changed_are_mapped_also_in_the_optimizer(saved, rename):
    """The state of a parameter follows it."""
    path, objects = saved
    model = Backbone()
    live = fresh(model)
    live.restore(path, RestoreOptions(rename=rename))
    assert torch.equal(model.trunk.weight, objects["model"].body.weight)
    state = objects["optimizer"].state[objects["model"].body.weight]
    assert torch.equal(
        live.optimizer.state[model.trunk.weight]["exp_avg"], state["exp_avg"]
    )
    assert live.optimizer.param_groups[0]["lr"] == 0.5


def test_values_move_with_the_tensors_in_them(saved):
    """They are found under the names that they were saved by."""
    path, _ = saved
    live = Checkpoint(remarks={"ema": torch.zeros(3), "best": 0.0})
    options = RestoreOptions(include="remarks", rename={"notes": "remarks"})
    live.restore(path, options)
    assert live.remarks["ema"].tolist() == [1.0] * 3 and live.remarks["best"] == 0.5


def test_two_names_that_become_one_are_refused(saved):
    """One of them would be lost."""
    path, _ = saved
    live = Checkpoint(model=Encoder())
    with pytest.raises(MismatchError, match=r"both be called 'model/head\.weight'"):
        rename = {"model/body.": "model/head."}
        live.restore(path, RestoreOptions(include="model", rename=rename))


@pytest.mark.parametrize(
    "options",
    [
        "model",
        RestoreOptions(include=3),
        RestoreOptions(exclude=[3]),
        RestoreOptions(rename=3),
        RestoreOptions(rename=lambda name: None),
    ],
    ids=["type", "include", "exclude", "rename", "result"],
)
def test_options_that_make_no_sense_are_refused(saved, options):
    """Before anything is changed; by the manager, too."""
    path, _ = saved
    live = fresh()
    with pytest.raises(ConfigError):
        live.restore(path, options)
    with CheckpointManager(live, path.rpartition("/")[0], 1) as manager:
        with pytest.raises(ConfigError):
            manager.restore_or_initialize(options)
        assert live.epoch == 0


def test_a_manager_restores_its_counter_in_any_case(saved):
    """Else the next save would have the number of a live checkpoint."""
    path, objects = saved
    live = Checkpoint(model=Encoder())
    directory = path.rpartition("/")[0]
    with CheckpointManager(live, directory, 2) as manager:
        assert manager.restore_or_initialize(RestoreOptions(include="model/*")) == path
        assert equal(live.model, objects["model"]) and live.save_counter == 1
        assert manager.save() == f"{directory}/ckpt-2"


@pytest.mark.parametrize(
    ("pattern", "name", "is_selected"),
    [
        ("model", "model/layers.0.weight", True),
        ("model", "model", True),
        ("model", "model2/weight", False),
        ("model/*", "model/a/b", True),
        ("*.weight", "model/layers.0.weight", True),
        ("model/layers.[01].*", "model/layers.2.weight", False),
        ("Model", "model/weight", False),
    ],
)
def test_patterns_are_the_shells_and_select_what_is_below(pattern, name, is_selected):
    """Case counts, on every system."""
    assert Names(RestoreOptions(include=pattern)).selects(name) is is_selected
    assert Names(RestoreOptions(exclude=pattern)).selects(name) is not is_selected
