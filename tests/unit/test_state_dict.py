"""``open(path).state_dict(name)``: what a module's ``load_state_dict`` takes, verified."""

from __future__ import annotations

import os
import subprocess
import sys
from collections import OrderedDict, deque
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
from torch import nn
from torch_helpers import assert_same, save
from unit_helpers import ARRAYS, flip_bit, make_saved

import distckpt
from distckpt import Checkpoint, Parts, PerRank, RestoreOptions, RngState
from distckpt.errors import ChecksumError, ConfigError, TensorNotFound

GOLDEN = Path(__file__).parents[1] / "golden"
DTYPES = ("float32", "float64", "bfloat16", "int64", "bool", "complex64")


def assert_loads(state, module):
    """Fail unless a state dict is the module's own, bit for bit."""
    expected = module.state_dict()
    assert {*state} == {*expected}
    for key, value in expected.items():
        assert_same(state[key], value)


def everything(seed=1):
    torch.manual_seed(seed)
    return cases.Everything(seed)


# Modules


def test_state_dict_of_a_module_is_its_own(run_dir):
    """Nested modules, ties, parametrizations, buffers, extra state, names with / and ~."""
    saved, fresh = everything(1), everything(2)
    path = save(run_dir, model=saved)
    with distckpt.open(path) as opened:
        state = opened.state_dict("model")
    assert isinstance(state, OrderedDict)
    assert "layers.1.a/b~" in state and "extra._extra_state" in state
    assert_loads(state, saved)
    fresh.load_state_dict(state)
    assert_loads(fresh.state_dict(), saved)
    assert_same(fresh.extra.extra, saved.extra.extra)


def test_tied_names_share_one_tensor(run_dir):
    """As in a module's own state dict: with assign=True they are tied again."""
    path = save(run_dir, model=cases.Tied())
    with distckpt.open(path) as opened:
        state = opened.state_dict("model")
    assert state["head.weight"] is state["embed.weight"]


@pytest.mark.parametrize(
    "name", ["tied", "tied.embed", "layers", "layers.1", "extra", "batch"]
)
def test_prefix_gives_a_submodules(run_dir, name):
    """Of any depth; extra state comes with it."""
    saved = everything()
    path = save(run_dir, model=saved)
    with distckpt.open(path) as opened:
        assert_loads(opened.state_dict(f"model/{name}"), saved.get_submodule(name))


def test_prefix_is_no_beginning_of_a_longer_name(run_dir):
    saved = nn.ModuleDict({"layer": nn.Linear(2, 2), "layer1": nn.Linear(3, 3)})
    path = save(run_dir, model=saved)
    with distckpt.open(path) as opened:
        assert_loads(opened.state_dict("model/layer"), saved["layer"])
        assert {*opened.state_dict("model")} == {*saved.state_dict()}


def test_modules_with_slashes_in_their_names_come_back(run_dir):
    """A prefix is spelled as ``distckpt show`` has it."""
    saved = nn.ModuleDict({"a/b": nn.ModuleDict({"~": nn.Linear(2, 2)})})
    path = save(run_dir, model=saved)
    with distckpt.open(path) as opened:
        assert_loads(opened.state_dict("model"), saved)
        assert_loads(opened.state_dict("model/a~1b"), saved["a/b"])
        assert_loads(opened.state_dict("model/a~1b.~0"), saved["a/b"]["~"])


def test_wrapped_module_has_its_own_names(run_dir):
    """Whatever wrapped it when it was saved."""
    saved = nn.Sequential(nn.Linear(2, 2))
    path = save(run_dir, model=nn.DataParallel(saved))
    with distckpt.open(path) as opened:
        assert_loads(opened.state_dict("model"), saved)


def test_parts_are_one_module(run_dir):
    """Two stages that were saved under one name."""
    whole = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    stages = [nn.ModuleDict({str(at): whole[at]}) for at in (0, 1)]
    path = save(run_dir, model=Parts(stages))
    with distckpt.open(path) as opened:
        assert_loads(opened.state_dict("model"), whole)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_come_back(run_dir, dtype):
    module = nn.Module()
    module.register_buffer("x", torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)))
    path = save(run_dir, model=module)
    with distckpt.open(path) as opened:
        assert_loads(opened.state_dict("model"), module)


class Versioned(nn.Linear):
    """A module that converts what an older version of its class has saved."""

    _version = 1

    def __init__(self):
        super().__init__(2, 2)
        self.was = "nothing"

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        self.was = metadata.get("version")
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("name", ["model", "model/inner"])
def test_versions_of_classes_are_part_of_it(run_dir, monkeypatch, name):
    """So that load code that converts older states knows what it has."""
    monkeypatch.setattr(Versioned, "_version", 3)
    path = save(run_dir, model=nn.ModuleDict({"inner": Versioned()}))
    monkeypatch.setattr(Versioned, "_version", 4)
    fresh = nn.ModuleDict({"inner": Versioned()})
    with distckpt.open(path) as opened:
        state = opened.state_dict(name)
    (fresh if name == "model" else fresh["inner"]).load_state_dict(state)
    assert fresh["inner"].was == 3


def test_containers_of_objects(run_dir):
    """A dict of tensors is one; one of modules is asked for by module."""
    nets = {"g": nn.Linear(2, 2), "d": nn.Linear(2, 1)}
    tensors = {"a/b": torch.rand(2), 3: torch.rand(1), "n": 7}
    path = save(run_dir, nets=nets, tensors=tensors)
    with distckpt.open(path) as opened:
        assert_loads(opened.state_dict("nets/g"), nets["g"])
        assert_same(opened.state_dict("tensors")["a/b"], tensors["a/b"])
        assert {*opened.state_dict("tensors")} == {"a/b", 3, "n"}
        with pytest.raises(ConfigError, match=r"several objects.*'nets/g', 'nets/d'"):
            opened.state_dict("nets")


def test_what_ranks_have_of_their_own(run_dir):
    saved = everything()
    path = save(run_dir, own=PerRank({"model": saved, "rng": RngState()}))
    with distckpt.open(path) as opened:
        own = opened.per_rank(0)
        assert_loads(own.state_dict("own/model"), saved)
        assert {*own.state_dict("own/rng")} >= {"python", "torch"}
        with pytest.raises(TensorNotFound):
            opened.state_dict("own/model")


@pytest.mark.parametrize("form", ["format-1", "format-2"])
@pytest.mark.parametrize("name", ["replicated", "fsdp", "fsdp-over-tp", "modules"])
def test_modules_of_several_ranks_come_back_whole(form, name):
    """Sharded over four ranks, by this and an earlier version: as a restore has them."""
    restored, fresh = (cases.build(name, seed, as_job=False) for seed in (1, 2))
    names = [at for at, value in fresh.items() if isinstance(value, nn.Module)]
    path = GOLDEN / form / name
    checkpoint = Checkpoint(**{at: restored[at] for at in names})
    # Of what each has saved last.
    newest = distckpt.open(path)
    checkpoint.restore(newest.directory, RestoreOptions(include=names))
    with newest as opened:
        for at in names:
            state = opened.state_dict(at)
            assert_loads(state, restored[at])
            fresh[at].load_state_dict(state)
            assert_loads(fresh[at].state_dict(), restored[at])
    assert names


# Others


def test_state_of_a_scheduler_is_what_it_returned(run_dir):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    path = save(run_dir, model=model, optimizer=optimizer, scheduler=scheduler)
    with distckpt.open(path) as opened:
        state = opened.state_dict("scheduler")
    assert_same(state, scheduler.state_dict())
    scheduler.load_state_dict(state)


def test_state_with_tensors_in_it_has_tensors(run_dir):
    """Not handles."""
    saved = cases.Stateful()
    path = save(run_dir, tree={"x/y": saved})
    with distckpt.open(path) as opened:
        assert_same(opened.state_dict("tree/x~1y"), saved.state_dict())


def test_state_of_format_1_is_a_dict():
    """Which did not tell states from plain values."""
    with distckpt.open(GOLDEN / "format-1" / "values") as opened:
        assert {*opened.state_dict("stateful")} >= {"momentum", "history"}


@pytest.mark.parametrize("name", ["optimizer", "optimizer/state/model/weight", "all/opt"])
def test_optimizer_is_refused_with_what_to_do(run_dir, name):
    """Its entries have names, where its own state dict has numbers."""
    model = nn.Linear(2, 2)
    optimizers = [torch.optim.AdamW(model.parameters()) for _ in range(2)]
    model(torch.ones(1, 2)).sum().backward()
    optimizers[0].step()
    path = save(run_dir, model=model, optimizer=optimizers[0], all={"opt": optimizers[1]})
    with distckpt.open(path) as opened:
        with pytest.raises(
            ConfigError, match=r"an optimizer \(.*AdamW\).*Checkpoint\(model"
        ):
            opened.state_dict(name)


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("step", ConfigError, r"'step' is a tensor; read it by \['step'\]"),
        ("epoch", ConfigError, r"plain value \(int\).*plain_values\['epoch'\]"),
        ("config", ConfigError, r"plain value \(dict\)"),
        ("modle", TensorNotFound, "did you mean 'model'"),
        ("model/encodre", TensorNotFound, "did you mean 'model/encoder'"),
        ("model/encoder.weight", TensorNotFound, "or 'model/encoder'"),
        ("qqqqqq", TensorNotFound, r"'qqqqqq'\. It has 'model', 'step'"),
        ("", ConfigError, "a name"),
        (5, ConfigError, "a name"),
    ],
)
def test_other_names_are_refused_with_what_they_are(run_dir, name, error, text):
    model = nn.ModuleDict({"encoder": nn.ModuleList([nn.Linear(2, 2)])})
    path = save(
        run_dir, model=model, step=torch.tensor(3), epoch=4, config={"versions": {"a": 1}}
    )
    with distckpt.open(path) as opened:
        with pytest.raises(error, match=text):
            opened.state_dict(name)


def test_every_byte_is_verified(run_dir):
    saved = make_saved(run_dir, 1)
    flip_bit(saved.shard(1), 10_000)
    with distckpt.open(saved.prefix) as opened, pytest.raises(ChecksumError):
        opened.state_dict("model")


def test_checkpoint_without_live_objects(run_dir):
    """Of several simulated ranks; the device is the caller's."""
    saved = make_saved(run_dir, 1)
    with distckpt.open(saved.prefix) as opened:
        state = opened.state_dict("model", device="meta")
        assert {key: tuple(value.shape) for key, value in state.items()} == {
            "weight": ARRAYS["model/weight"].shape,
            "bias": ARRAYS["model/bias"].shape,
        }
        assert {value.device.type for value in state.values()} == {"meta"}


def test_torch_is_imported_only_when_tensors_are_asked_for(run_dir):
    """Of a process in which it cannot be: importing it would take the test too long."""
    make_saved(run_dir, 1)
    code = (
        f"import sys, distckpt; opened = distckpt.open({run_dir!r}); opened._repr_html_(); "
        "repr(opened.keys()); assert 'torch' not in sys.modules; "
        "sys.modules['torch'] = None; opened.state_dict('model')"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(distckpt.__file__).parents[1])}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, timeout=60, env=environment)
    assert b"import of torch halted" in done.stderr, done.stderr


def test_state_with_arrays_and_containers_comes_back_as_it_was(tmp_path):
    """As its load_state_dict() takes it."""

    class Loader:
        def __init__(self):
            self.state = {
                "order": np.arange(3000),
                "small": np.float32([1, 2]),
                "seen": {3, 1},
                "recent": deque([torch.ones(2)], maxlen=4),
            }

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    path = save(tmp_path / "run", loader=Loader())
    with distckpt.open(path) as opened:
        state = opened.state_dict("loader")
    assert np.array_equal(state["order"], np.arange(3000))
    assert state["order"].dtype == np.arange(3000).dtype
    assert state["small"].tolist() == [1.0, 2.0] and state["seen"] == {1, 3}
    assert torch.equal(state["recent"][0], torch.ones(2)) and state["recent"].maxlen == 4
