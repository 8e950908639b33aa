"""Tensors that are made of others: stored as these, and made again; or refused by name."""

from __future__ import annotations

import dataclasses
import enum
import json

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from torch_helpers import assert_same, manifest_of, raw, restore, rows_of, save

import distckpt
from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointOptions,
    MismatchError,
    PerRank,
    RestoreOptions,
    UnsupportedError,
    instances,
    values,
    wrapper_tensors,
)
from distckpt.cli import main


class Rounding(enum.Enum):
    """Stands in a context."""

    NEAREST = "nearest"
    STOCHASTIC = "stochastic"


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Stands in a context, too."""

    sizes: tuple[int, ...]
    rounding: Rounding = Rounding.NEAREST


class Coded(torch.Tensor):
    """Codes of a byte with a scale: as quantized weights and moments are."""

    @staticmethod
    def __new__(cls, codes, scale, context=None):
        return torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=scale.dtype, device=codes.device
        )

    def __init__(self, codes, scale, context=None):
        self.codes = codes
        self.scale = scale
        self.context = context

    def __tensor_flatten__(self):
        return ["codes", "scale"], {"context": self.context}

    @classmethod
    def __tensor_unflatten__(cls, parts, meta, outer_size, outer_stride):
        made = cls(parts["codes"], parts["scale"], meta["context"])
        assert made.shape == outer_size
        return made

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        name = func.__name__.partition(".")[0]
        if name in ("detach", "alias", "view"):
            return cls(args[0].codes, args[0].scale, args[0].context)
        if name == "copy_":
            args[0].codes.copy_(args[1].codes)
            args[0].scale.copy_(args[1].scale)
            return args[0]
        raise NotImplementedError(func)


class Recoded(Coded):
    """Another class with the same parts."""


def coded(seed, context=None, kind=Coded, shape=(4, 6)):
    """Make one from a seed."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 255, shape, generator=generator).to(torch.uint8)
    return kind(codes, torch.randn(shape[0], generator=generator), context)


def assert_same_parts(found, expected):
    """Fail unless two have equal parts, down to the last."""
    assert type(found) is type(expected)
    assert found.__tensor_flatten__()[0] == expected.__tensor_flatten__()[0]
    parts = map(wrapper_tensors.plain_parts, (found, expected))
    for one, other in zip(*parts, strict=True):
        assert_same(one, other)


def layer(seed, weight):
    """Make a linear layer with a weight of its own kind."""
    torch.manual_seed(seed)
    module = nn.Linear(6, 4)
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


# Modules


CONTEXTS = [
    None,
    [True, torch.bfloat16],
    {"size": torch.Size([4, 6]), "blocks": Blocks((1, 2)), "kept": {1: (None, 2.5)}},
    Rounding.STOCHASTIC,
]


@pytest.mark.parametrize("context", CONTEXTS, ids=range(len(CONTEXTS)))
def test_parameter_is_filled_in_place_whatever_its_context(run_dir, context):
    """Its parts are plain tensors in the file; the live object stays the same one."""
    path = save(run_dir, model=layer(0, coded(0, context)))
    assert {*rows_of(path)} == {
        "model/bias",
        "model/weight/~inner/codes",
        "model/weight/~inner/scale",
    }
    live = layer(1, coded(1, context))
    weight, codes = live.weight, live.weight.codes
    restore(run_dir, model=live)
    assert live.weight is weight and weight.codes is codes
    assert_same_parts(live.weight.data, coded(0, context))
    assert_same(live.bias, layer(0, coded(0)).bias)


def test_what_a_file_says_of_it_is_plain(run_dir):
    """The class is named for people; nothing of it is code."""
    context = {"blocks": Blocks((1, 2)), "dtype": torch.int4}
    path = save(run_dir, model=layer(0, coded(0, context)))
    encoded = manifest_of(path).values["model/weight"]
    name, stored_context, shape, stride, dtype, requires_grad, inner = encoded["$wrapper"]
    assert name == instances.name_of(Coded)
    assert stored_context["context"]["dtype"] == {"$torch": ["dtype", "int4"]}
    assert (shape, stride, dtype, requires_grad) == ([4, 6], [6, 1], "float32", False)
    assert inner["codes"] == {"$tensor": "model/weight/~inner/codes"}


def test_parts_are_opened_compared_verified_and_exported(run_dir, tmp_path):
    """Whoever reads checkpoints sees plain tensors, and what they are parts of."""
    first = save(run_dir, model=layer(0, coded(0)))
    second = save(f"{run_dir}-2", model=layer(0, coded(1)))
    with distckpt.open(first) as opened:
        found = opened["model/weight/~inner/codes"].numpy()
        assert np.array_equal(found, coded(0).codes.numpy())
        wrapper = opened.plain_values["model/weight"]
        assert (wrapper.class_name, wrapper.shape) == (instances.name_of(Coded), (4, 6))
        assert wrapper.context == {"context": None}
        with pytest.raises(distckpt.DistckptError, match="model/weight/~inner/codes"):
            opened["model/weight"]
    run = CliRunner().invoke
    assert run(main, ["verify", first]).exit_code == 0
    assert "model/weight/~inner/codes" in run(main, ["show", first]).output
    shown = run(main, ["diff", first, second, "--json"])
    assert shown.exit_code == 1
    names = {one["name"] for one in json.loads(shown.output)["tensors"]}
    assert {"model/weight/~inner/codes", "model/weight/~inner/scale"} <= names
    for target in ("safetensors", "torch", "dcp"):
        output = str(tmp_path / target)
        exported = run(main, ["export", first, "--to", target, "--output", output])
        assert exported.exit_code == 0, exported.output
    output = str(tmp_path / "hf")
    refused = run(main, ["export", first, "--to", "huggingface", "--output", output])
    assert refused.exit_code == 2 and "'model/weight' is made of others" in refused.output


def test_nested_and_tied_ones_come_back_and_stay_tied(run_dir):
    """What one is made of may be made of others; what is one object stays one."""

    def make(seed):
        torch.manual_seed(seed)
        inner = TwoTensor(torch.randn(3), torch.randn(3))
        module = nn.Module()
        module.nested = nn.Parameter(
            TwoTensor(inner, TwoTensor(torch.randn(3), torch.ones(3)))
        )
        module.tied = module.nested
        module.register_buffer("state", TwoTensor(torch.randn(2), torch.randn(2)))
        return module

    saved, live = make(0), make(1)
    path = save(run_dir, m=saved)
    rows = rows_of(path)
    assert rows["m/nested/~inner/a/~inner/b"].same_as == ""
    assert rows["m/tied/~inner/a/~inner/b"].same_as == "m/nested/~inner/a/~inner/b"
    restore(run_dir, m=live)
    assert live.tied is live.nested
    for name in ("nested", "state"):
        assert_same_parts(getattr(live, name).data, getattr(saved, name).data)


@pytest.mark.parametrize(
    ("saved", "live", "message"),
    [
        (coded(0), coded(0, kind=Recoded), r"class .*Coded in .*, .*Recoded here"),
        (coded(0, [1]), coded(0, [True]), r"context': \[1\]} in .*, of .*\[True\]} here"),
        (
            coded(0, Rounding.NEAREST),
            coded(0, Rounding.STOCHASTIC),
            "'nearest'} in the checkpoint, of .*'stochastic'} here",
        ),
        (coded(0), coded(0, shape=(6, 6)), r"shape \[4, 6\] in .*, \[6, 6\] here"),
        (coded(0), torch.zeros(4, 6), r"a tensor here, a .*Coded, which is made of"),
        (torch.zeros(4, 6), coded(0), r"a .*Coded here, float32 \[4, 6\] in"),
        (None, coded(0), r"a .*Coded here, not there in"),
    ],
    ids=["class", "context", "member", "shape", "plain-here", "plain-there", "missing"],
)
def test_one_that_differs_in_more_than_its_elements_is_a_mismatch(
    run_dir, saved, live, message
):
    """Both are named, and nothing was touched."""

    def make(weight):
        module = nn.Module()
        if weight is not None:
            module.weight = nn.Parameter(weight, requires_grad=False)
        module.other = nn.Parameter(torch.ones(2))
        return module

    save(run_dir, m=make(saved))
    here = make(live)
    before = [raw(part) for part in wrapper_tensors.plain_parts(here.weight)]
    with pytest.raises(MismatchError, match=f"1 difference:\n  m/weight: .*{message}"):
        restore(run_dir, m=here)
    assert [raw(part) for part in wrapper_tensors.plain_parts(here.weight)] == before
    # What is excluded is left as it is.
    restored = make(live)
    with CheckpointManager(Checkpoint(m=restored), run_dir, None) as manager:
        if saved is not None:
            manager.restore_or_initialize(RestoreOptions(exclude="m/weight"))


def test_device_in_a_context_is_where_the_tensor_lies(run_dir):
    """As of any other tensor, it is no difference."""
    one, other = (
        wrapper_tensors.flattened("w", coded(0, torch.device(name))).wrapper
        for name in ("cuda:1", "cpu")
    )
    assert one.context != other.context
    assert wrapper_tensors.difference(one, other) == ""
    moved = wrapper_tensors.context_on(one, {"codes": torch.ones(1)})
    assert moved == other.context


def test_names_are_renamed_and_selected_with_the_outer_one(run_dir):
    """A function that knows the outer names alone renames the parts as well."""
    saved, live = layer(0, coded(0)), layer(1, coded(1))
    save(run_dir, old=saved)
    rename = {"old/weight": "new/weight", "old/bias": "new/bias"}.get
    options = RestoreOptions(rename=lambda name: rename(name, name))
    with CheckpointManager(Checkpoint(new=live), run_dir, None) as manager:
        manager.restore_or_initialize(options)
    assert_same_parts(live.weight.data, saved.weight.data)
    live = layer(1, coded(1))
    with CheckpointManager(Checkpoint(old=live), run_dir, None) as manager:
        manager.restore_or_initialize(RestoreOptions(include="old/weight"))
    assert_same_parts(live.weight.data, saved.weight.data)
    assert_same(live.bias, layer(1, coded(1)).bias)


class Loads(nn.Linear):
    """A module with load code of its own, which sees the entries as they were saved."""

    def _load_from_state_dict(self, state, prefix, *args):
        self.seen = type(state[f"{prefix}weight"])
        super()._load_from_state_dict(state, prefix, *args)


class Detaching(nn.Linear):
    """A module whose state dict has other objects on the same memory."""

    def state_dict(self, *args, **kwargs):
        state = super().state_dict(*args, **kwargs)
        return {**state}


@pytest.mark.parametrize("kind", [Loads, Detaching])
def test_module_with_load_code_gets_it_whole(run_dir, kind):
    """Read into new memory, or filled where it lies; loaded by the module's own code."""

    def make(seed):
        torch.manual_seed(seed)
        module = kind(6, 4)
        module.weight = nn.Parameter(coded(seed), requires_grad=False)
        return module

    saved, live = make(0), make(1)
    save(run_dir, m=saved)
    restore(run_dir, m=live)
    assert_same_parts(live.weight.data, saved.weight.data)
    assert_same(live.bias, saved.bias)
    if kind is Loads:
        assert issubclass(live.seen, Coded)


# Optimizers


class LowBit(torch.optim.Optimizer):
    """Keeps its moments coded, as torchao's do."""

    def __init__(self, parameters, context=None, kind=Coded):
        super().__init__(parameters, {"lr": 0.1})
        self.context, self.kind = context, kind

    def step(self):
        """Make state, or change it."""
        for group in self.param_groups:
            for number, parameter in enumerate(group["params"]):
                state = self.state[parameter]
                if not state:
                    shape = tuple(parameter.shape)
                    moment = coded(7 + number, self.context, self.kind, shape)
                    state.update(step=torch.tensor(0.0), moment=moment)
                state["step"] += 1
                state["moment"].codes.add_(1)


def optimized(seed, steps=0, **settings):
    """Make a model and an optimizer that has stepped."""
    torch.manual_seed(seed)
    model = nn.Linear(6, 4)
    optimizer = LowBit(model.parameters(), **settings)
    for _ in range(steps):
        optimizer.step()
    return {"model": model, "optimizer": optimizer}


@pytest.mark.parametrize("steps", [0, 1], ids=["fresh", "stepped"])
def test_optimizer_state_is_made_anew_or_filled_in_place(run_dir, steps):
    """A class that is loaded in the process is found by its name."""
    saved = optimized(0, 3, context=[True, torch.float16])
    save(run_dir, **saved)
    live = optimized(1, steps, context=[True, torch.float16])
    before = {**live["optimizer"].state.get(live["model"].weight, {})}
    restore(run_dir, **live)
    for name, parameter in live["model"].named_parameters():
        state = live["optimizer"].state[parameter]
        expected = saved["optimizer"].state[getattr(saved["model"], name)]
        assert_same_parts(state["moment"], expected["moment"])
        assert state["moment"].context == [True, torch.float16]
        assert_same(state["step"], expected["step"])
    if steps:
        assert live["optimizer"].state[live["model"].weight]["moment"] is before["moment"]


def test_optimizer_saved_without_state_drops_what_is_there(run_dir):
    """As with plain state."""
    save(run_dir, **optimized(0, 0))
    live = optimized(1, 2)
    restore(run_dir, **live)
    assert not live["optimizer"].state


def test_class_that_is_not_loaded_is_named_with_what_to_do(run_dir, monkeypatch):
    """Nothing is imported by a name in a file; the way out is one step, or an import."""
    save(run_dir, **optimized(0, 2))
    monkeypatch.setattr(wrapper_tensors, "loaded_class", lambda name: None)
    match = r"moment: a .*Coded cannot be made: this process has no.*import.*one step"
    with pytest.raises(MismatchError, match=match):
        restore(run_dir, **optimized(1))
    restore(run_dir, **optimized(1, 1))  # it is there: nothing has to be found


def test_context_that_cannot_be_made_is_named_with_what_to_do(run_dir):
    """Its class is in no live object."""
    save(run_dir, **optimized(0, 2, context=Blocks((3,))))
    match = r"moment: .*no object of class .*Blocks.* is there.*one step"
    with pytest.raises(MismatchError, match=match):
        restore(run_dir, **optimized(1))
    live = optimized(1, 1, context=Blocks((3,)))
    restore(run_dir, **live)
    moment = live["optimizer"].state[live["model"].weight]["moment"]
    assert moment.context == Blocks((3,))


def test_class_is_found_among_those_that_are_loaded():
    """The later of two that have one name, and none that lacks the protocol."""
    assert wrapper_tensors.loaded_class(instances.name_of(Coded)) is Coded
    assert wrapper_tensors.loaded_class(instances.name_of(TwoTensor)) is TwoTensor
    for name in ("torch.nn.parameter.Parameter", "torch.Tensor", "os.system", ""):
        assert wrapper_tensors.loaded_class(name) is None


def test_optimizer_of_coded_parameters_keeps_plain_state(run_dir):
    """The parameter is made of others, its momentum is not."""

    def make(seed):
        model = layer(seed, coded(seed))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        torch.manual_seed(seed)
        optimizer.state[model.weight]["momentum_buffer"] = torch.randn(4, 6)
        return {"model": model, "optimizer": optimizer}

    saved, live = make(0), make(1)
    save(run_dir, **saved)
    live["optimizer"].state.clear()
    restore(run_dir, **live)
    found = live["optimizer"].state[live["model"].weight]["momentum_buffer"]
    assert_same(found, saved["optimizer"].state[saved["model"].weight]["momentum_buffer"])


def test_state_for_a_parameter_that_is_sharded_here_is_a_mismatch(run_dir, on_a_mesh):
    """Nothing tells how its parts would lie on the ranks."""
    save(run_dir, **optimized(0, 2))
    live = optimized(1)
    live["model"].weight = nn.Parameter(on_a_mesh(torch.zeros(4, 6)))
    live["optimizer"] = LowBit(live["model"].parameters())
    with pytest.raises(MismatchError, match=r"moment: .* sharded here; exclude"):
        restore(run_dir, **live)


# Elsewhere


class Holder:
    """An object with a state dict, which may be anything."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        """Return it."""
        return self.state

    def load_state_dict(self, state):
        """Take another one."""
        self.state = state


@pytest.mark.parametrize("is_there", [True, False])
def test_one_in_the_state_of_an_object_is_made_anew(run_dir, is_there):
    """Like plain tensors there; with or without one in its place."""
    saved = Holder({"ema": [coded(0), (coded(2), 1)], "n": 3})
    path = save(run_dir, holder=saved)
    assert "holder/ema/~i1/~i0/~inner/codes" in rows_of(path)
    live = Holder({"ema": [coded(1), (coded(1), 1)], "n": 0} if is_there else {})
    old = live.state.get("ema", [None])[0]
    restore(run_dir, holder=live)
    assert live.state["n"] == 3 and live.state["ema"][0] is not old
    assert_same_parts(live.state["ema"][0], coded(0))
    assert_same_parts(live.state["ema"][1][0], coded(2))


def test_one_that_is_tracked_itself_is_filled_in_place(run_dir):
    """For the job, for each rank of its own, and in a list."""
    save(run_dir, t=coded(0), own=PerRank(coded(2)), many=[coded(3), {"x": coded(4)}])
    t, own, many = coded(9), coded(9), [coded(9), {"x": coded(9)}]
    restore(run_dir, t=t, own=PerRank(own), many=many)
    for found, seed in ((t, 0), (own, 2), (many[0], 3), (many[1]["x"], 4)):
        assert_same_parts(found, coded(seed))
    with pytest.raises(MismatchError, match="t: a plain value here, a tensor in"):
        restore(run_dir, t=1, own=PerRank(own), many=many)


@pytest.mark.parametrize("staging", ["eager", "lazy"])
def test_asynchronous_save_has_what_was_there_at_the_call(run_dir, staging):
    """The parts change below torch's count of changes, so all are copied at once."""
    objects = optimized(0, 2)
    expected = objects["optimizer"].state[objects["model"].weight]["moment"].codes.clone()
    options = CheckpointOptions(enable_async=True, staging=staging)
    with CheckpointManager(Checkpoint(**objects), run_dir, None) as manager:
        path = manager.save(options=options)
        objects["optimizer"].step()
        manager.sync()
    with distckpt.open(path) as opened:
        name = "optimizer/state/model/weight/moment/~inner/codes"
        assert_same(opened[name].torch(), expected)


# Refused


class Ragged(Coded):
    """One whose protocol fails."""

    def __tensor_flatten__(self):
        raise NotImplementedError("not in this mode")


class NoProtocol(torch.Tensor):
    """A subclass with memory of its own kind, and nothing that tells which."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise NotImplementedError(func)


def _jagged():
    rows = [torch.ones(2, 3), torch.ones(4, 3)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: coded(0, print), r"context\['context'\].*builtin_function.*not stored"),
        (lambda: coded(0, torch.ones(1)), r"context\['context'\].*torch\.Tensor"),
        (lambda: coded(0, kind=Ragged), r"__tensor_flatten__\(\) fails.*not in this mode"),
        (lambda: NoProtocol(torch.ones(2)), r"Give its class __tensor_flatten__\(\)"),
        (_jagged, r"different lengths.*values\(\) and offsets\(\)"),
        (
            lambda: Coded(torch.ones(2, dtype=torch.uint8), torch.ones(2).to_sparse()),
            r"/~inner/scale' cannot be stored: its layout is torch.sparse_coo",
        ),
        (
            lambda: Coded(torch.ones(2, dtype=torch.uint8), torch.ones(2, device="meta")),
            r"/~inner/scale' .*meta device",
        ),
        (lambda: Coded(torch.ones(2, dtype=torch.uint8), 1.5), r"'scale' is no tensor"),
    ],
    ids=[
        *("code", "tensor", "fails", "no-protocol", "ragged", "sparse", "meta", "number"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_one_that_is_more_than_its_parts_is_refused_by_name(run_dir, make, message):
    """At the save, where it can still be helped."""
    try:
        tensor = make()
    except AttributeError:  # a number has no dtype for the outer one
        codes = torch.ones(2, dtype=torch.uint8)
        tensor = Coded(codes, torch.ones(2))
        tensor.scale = 1.5
    with pytest.raises(UnsupportedError, match=f"x/t.*{message}"):
        save(run_dir, x={"t": tensor})


def test_one_inside_of_a_sharded_tensor_is_refused_by_name(run_dir, on_a_mesh):
    """Its parts would have to be sharded, and nothing tells how."""
    sharded = on_a_mesh(coded(0))
    match = r"'t' cannot be stored: of the part that this rank holds.*Coded.*sharded one"
    with pytest.raises(UnsupportedError, match=match):
        save(run_dir, t=sharded)


def test_hostile_description_is_a_format_error():
    """Whatever stands in a file: nothing is made of it."""
    good = wrapper_tensors.flattened("w", coded(0)).wrapper.encoded["$wrapper"]
    values.decode({"$wrapper": good})
    for at, bad in [
        *((0, 7), (0, ""), (2, [1.5]), (2, None), (3, "x"), (4, 1), (5, 1), (6, [])),
        *((6, {"a": 1}), (6, {"a": {"$tensor": 1}}), (6, {"a": {"$wrapper": []}})),
        *((1, {"$new": 1}), (6, {"a": {"$enum": ["c", "n"]}})),
    ]:
        fields = [*good]
        fields[at] = bad
        with pytest.raises(distckpt.FormatError):
            values.decode({"$wrapper": fields})
    with pytest.raises(distckpt.FormatError):
        values.decode({"$wrapper": good[:3]})
