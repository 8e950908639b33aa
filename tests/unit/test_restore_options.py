"""Some of a checkpoint is restored, under other names; all else is left and not missed."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch_helpers import save

from distckpt import (
    Checkpoint,
    CheckpointManager,
    ConfigError,
    MismatchError,
    PerRank,
    RestoreOptions,
    from_pretrained,
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
        ("model/layers", "model/layers.0.weight", True),
        ("model/layers.1", "model/layers.10.weight", False),
        ("model/head*", "model/head2.weight", True),
    ],
)
def test_patterns_are_the_shells_and_select_what_is_below(pattern, name, is_selected):
    """Case counts, on every system."""
    assert Names(RestoreOptions(include=pattern)).selects(name) is is_selected
    assert Names(RestoreOptions(exclude=pattern)).selects(name) is not is_selected


STATE = "optimizer/state/model/head.weight/exp_avg"
SETTINGS = "optimizer/settings/model/head.weight"


@pytest.mark.parametrize("name", [STATE, SETTINGS])
@pytest.mark.parametrize(
    ("pattern", "is_excluded", "is_included"),
    [
        ("model/head", True, True),
        ("model/head.*", True, True),
        ("*.weight", True, True),
        ("model/body", False, False),
        # A whole object includes itself alone; without it its optimizer makes no sense.
        ("model", True, False),
        ("model/*", True, False),
        ("optimizer", True, True),
        ("optimizer/*/model/head", True, True),
    ],
)
def test_entries_of_an_optimizer_follow_their_parameter(
    pattern, is_excluded, is_included, name
):
    """See decision 25."""
    assert Names(RestoreOptions(exclude=pattern)).selects(name) is not is_excluded
    assert Names(RestoreOptions(include=pattern)).selects(name) is is_included


def trained(model, steps=1, lr=0.1):
    """Return a model and its optimizer, which has state."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        sum(parameter.square().sum() for parameter in model.parameters()).backward()
        optimizer.step()
    return model, optimizer


def heads(outputs):
    """Return a model with a head of some size."""
    return nn.ModuleDict({"body": nn.Linear(4, 4), "head": nn.Linear(4, outputs)})


@pytest.mark.parametrize("outputs", [2, 3])
def test_new_head_keeps_its_weights_and_gets_no_moments(tmp_path, outputs):
    """Whether it has the size of the old one or not; as README has it."""
    model, optimizer = trained(heads(2))
    path = save(tmp_path / "a", model=model, optimizer=optimizer)
    live = heads(outputs)
    other = torch.optim.AdamW(live.parameters(), lr=0.1)
    before = live["head"].weight.detach().clone()
    Checkpoint(model=live, optimizer=other).restore(
        path, RestoreOptions(exclude="model/head")
    )
    assert torch.equal(live["body"].weight, model["body"].weight)
    assert torch.equal(live["head"].weight, before)
    assert live["head"].weight not in other.state and live["body"].weight in other.state


def test_part_of_a_model_brings_its_moments_if_there_is_an_optimizer(tmp_path):
    """And nothing is missed if there is none."""
    model, optimizer = trained(heads(2))
    path = save(tmp_path / "a", model=model, optimizer=optimizer)
    live = heads(3)
    other = torch.optim.AdamW(live.parameters(), lr=0.7)
    options = RestoreOptions(include="model/body")
    Checkpoint(model=live, optimizer=other).restore(path, options)
    assert [*other.state] == [live["body"].weight, live["body"].bias]
    alone = heads(3)
    Checkpoint(model=alone).restore(path, options)
    assert torch.equal(alone["body"].weight, model["body"].weight)
    wrong = torch.optim.SGD(live.parameters())
    with pytest.raises(
        MismatchError, match="optimizer/class: AdamW in the checkpoint, SGD"
    ):
        Checkpoint(model=live, optimizer=wrong).restore(path, options)


def test_moments_that_are_made_anew_must_have_the_shape_of_their_parameter(tmp_path):
    """Else the next step would fail, or train with the moments of another tensor."""
    model, optimizer = trained(heads(2))
    path = save(tmp_path / "a", model=model, optimizer=optimizer)
    live = heads(3)
    other = torch.optim.AdamW(live.parameters(), lr=0.1)
    options = RestoreOptions(include=["model/body", "optimizer"])
    with pytest.raises(MismatchError, match=r"head.weight/exp_avg: .*\[2, 4\].*\[3, 4\]"):
        Checkpoint(model=live, optimizer=other).restore(path, options)
    assert not other.state


@pytest.mark.parametrize(
    "options",
    [
        RestoreOptions(exclude="model/haed"),
        RestoreOptions(include=["model", "model/haed"]),
        RestoreOptions(rename={"model/haed.": "model/head."}),
    ],
    ids=["exclude", "include", "rename"],
)
def test_pattern_that_matches_nothing_is_an_error_with_near_names(tmp_path, options):
    """A typing error would restore what was to be left out."""
    path = save(tmp_path / "a", model=heads(2))
    with pytest.raises(MismatchError, match=r"model/haed.*model/head\.weight") as caught:
        Checkpoint(model=heads(2)).restore(path, options)
    assert str(caught.value).count("model/head.") >= 2
    checkpoint = Checkpoint(model=heads(2))
    with CheckpointManager(checkpoint, tmp_path / "a", 1) as manager:
        with pytest.raises(MismatchError, match="model/haed"):
            manager.restore_or_initialize(options)


def test_pattern_may_match_what_only_the_program_has(tmp_path):
    """That is how something new is left out."""
    path = save(tmp_path / "a", model=nn.ModuleDict({"body": nn.Linear(4, 4)}))
    live = heads(2)
    Checkpoint(model=live).restore(path, RestoreOptions(exclude="model/head"))


FLOATS = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]


PAIRS = [
    pytest.param(
        saved, here, marks=() if torch.float32 in (saved, here) else pytest.mark.full
    )
    for saved in FLOATS
    for here in FLOATS
]


@pytest.mark.parametrize(("saved", "here"), PAIRS)
def test_floating_point_tensors_are_converted_if_asked_for(tmp_path, saved, here):
    """As torch converts them; also what a rank has for itself, and what is strided."""
    values = torch.randn(70_000, generator=torch.Generator().manual_seed(0)).to(saved)
    odd = values[:9].view(3, 3)
    path = save(tmp_path / "a", x=values, own=PerRank(values[:5]), odd=odd)
    live = {"x": torch.zeros(70_000, dtype=here), "own": torch.zeros(5, dtype=here)}
    strided = torch.zeros(3, 3, dtype=here).t()
    checkpoint = Checkpoint(x=live["x"], own=PerRank(live["own"]), odd=strided)
    if saved != here:
        with pytest.raises(MismatchError, match="x: "):
            checkpoint.restore(path)
    checkpoint.restore(path, RestoreOptions(cast=True))
    for found, expected in ((live["x"], values), (live["own"], values[:5]), (strided, odd)):
        assert found.dtype == here
        assert torch.equal(found.double(), expected.to(here).double())


@pytest.mark.parametrize(
    ("saved", "here"), [(torch.int32, torch.float32), (torch.float32, torch.int32)]
)
def test_other_tensors_are_never_converted(tmp_path, saved, here):
    """Numbers that count are no floating-point numbers."""
    path = save(tmp_path / "a", x=torch.zeros(3, dtype=saved))
    with pytest.raises(MismatchError):
        Checkpoint(x=torch.zeros(3, dtype=here)).restore(path, RestoreOptions(cast=True))


def test_weights_of_half_precision_begin_a_job_of_full_precision(tmp_path):
    """From a checkpoint and from a safetensors file."""
    model = heads(2).to(torch.bfloat16)
    path = save(tmp_path / "a", model=model)
    file = str(tmp_path / "w.safetensors")
    save_file(model.state_dict(), file)
    for source in (path, file):
        live = heads(2)
        init_fn = from_pretrained(source, RestoreOptions(cast=True))
        run = str(tmp_path / f"run{len(source)}")
        with CheckpointManager(Checkpoint(model=live), run, 1, init_fn=init_fn) as manager:
            manager.restore_or_initialize()
        assert torch.equal(live["head"].weight, model["head"].weight.float())
        strict = CheckpointManager(
            Checkpoint(model=heads(2)), f"{run}-s", 1, init_fn=from_pretrained(source)
        )
        with strict, pytest.raises(MismatchError, match="bfloat16"):
            strict.restore_or_initialize()
