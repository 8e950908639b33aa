"""Names of leaves, and plain values and containers: stored, and updated in place."""

from __future__ import annotations

from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from torch import nn
from torch_helpers import assert_same, manifest_of, restore, rows_of, save

from distckpt import MismatchError, UnsupportedError, tensor_paths

PLAIN = {
    "none": None,
    "bools": [True, False],
    "ints": (0, -1, 2**63, -(2**200)),
    "floats": [0.1, -0.0, 1e308, 5e-324, float("inf"), float("-inf"), float("nan")],
    "texts": ["", "ü€\U0001f600", "\n\0\x7f", "$tuple", "a/b~c"],
    "bytes": [b"", bytes(range(256))],
    "nested": {"a": [{"b": ({"c": [()]},)}], "": {}, "$odd": 1},
    "int keys": {1: "one", -2: "two"},
    "other keys": {None: 1, (1, "a"): 2, 2.5: 3, b"k": 4, True: 5},
    "ordered": OrderedDict([("z", 1), ("a", 2)]),
    "counter": Counter({5: 2, 9: 1}),
    "numpy": [np.float32(0.1), np.int64(-3), np.bool_(True), np.complex64(1 - 2j)],
}


def test_plain_values_of_every_kind_come_back_the_same(run_dir):
    """Type, value and order of every kind survive, as attributes and inside a dict."""
    attributes = {key.replace(" ", "_"): value for key, value in PLAIN.items()}
    save(run_dir, **attributes, all=PLAIN)
    checkpoint = restore(run_dir, **dict.fromkeys(attributes, "other"), all={})
    for key, value in attributes.items():
        assert_same(getattr(checkpoint, key), value)
    assert_same(checkpoint.all, PLAIN)
    assert np.signbit(checkpoint.floats[1])


def test_plain_dicts_and_lists_are_updated_in_place(run_dir):
    """Whoever holds a tracked dict or list sees the restored content."""
    save(run_dir, config={"lr": 0.1, "sizes": [1, 2]}, history=[1, 2, 3], pair=(1, 2))
    config, history = {"old": 1}, [9]
    checkpoint = restore(run_dir, config=config, history=history, pair=[0])
    assert checkpoint.config is config and checkpoint.history is history
    assert config == {"lr": 0.1, "sizes": [1, 2]}
    assert history == [1, 2, 3]
    assert checkpoint.pair == (1, 2)


def test_nested_containers_of_trackables_are_updated_in_place(run_dir):
    """Tensors, modules and values in dicts and lists keep their containers."""

    def make(value):
        return {
            "models": [nn.Linear(2, 2), {"head": nn.Linear(2, 1)}],
            "by_number": {7: torch.full((2,), value), -1: {"epoch": value}},
            "mixed": OrderedDict([("x", torch.full((), value)), ("note", [value])]),
        }

    torch.manual_seed(0)
    saved, live = make(1.0), make(2.0)
    inner = (live["models"][1], live["by_number"][7], live["by_number"][-1])
    path = save(run_dir, tree=saved, empty=[], none={})
    restore(run_dir, tree=live, empty=[], none={})
    assert live["models"][1] is inner[0]
    assert live["by_number"][7] is inner[1] and inner[1].tolist() == [1, 1]
    assert live["by_number"][-1] is inner[2] and inner[2] == {"epoch": 1.0}
    assert live["mixed"]["note"] == [1.0] and live["mixed"]["x"] == 1
    assert_same(live["models"][0].weight, saved["models"][0].weight)
    assert sorted(rows_of(path)) == [
        "tree/by_number/~i7",
        "tree/mixed/x",
        "tree/models/~i0/bias",
        "tree/models/~i0/weight",
        "tree/models/~i1/head/bias",
        "tree/models/~i1/head/weight",
    ]


def test_values_beside_trackables_are_set_in_their_container(run_dir):
    """A plain value in a dict or list of trackables replaces the live one."""
    save(run_dir, d={"t": torch.ones(1), "epoch": 3}, l=[torch.ones(1), "text"])
    d, items = {"t": torch.zeros(1), "epoch": 0}, [torch.zeros(1), None]
    restore(run_dir, d=d, l=items)
    assert (d["epoch"], items[1]) == (3, "text")
    assert d["t"] == 1 and items[0] == 1


def test_names_with_slashes_and_tildes_stay_apart(run_dir):
    """Keys that spell like paths or integer keys are other names."""
    keys = ["a/b", "a~1b", "~i1", 1, "~", "/", "~0", "", "ä ö", "a[0:2]", "."]
    saved = {key: torch.tensor(float(number)) for number, key in enumerate(keys)}
    saved["a"] = {"b": torch.tensor(99.0)}
    path = save(run_dir, x=saved)
    assert len(rows_of(path)) == len(keys) + 1
    live = {key: torch.zeros(()) for key in keys}
    live["a"] = {"b": torch.zeros(())}
    restore(run_dir, x=live)
    assert_same(live, saved)


@pytest.mark.parametrize(
    ("first", "keys", "name"),
    [
        ("model", [], "model"),
        ("model", ["0.weight"], "model/0.weight"),
        ("a/b", ["c/d", "e~f"], "a/b/c~1d/e~0f"),
        ("a", [7, "7", "~i7", -3], "a/~i7/7/~0i7/~i-3"),
    ],
)
def test_join_escapes_keys_but_not_the_path_before(first, keys, name):
    """RFC 6901's escapes, and ``~i`` for integers."""
    assert tensor_paths.join(first, *keys) == name


@pytest.mark.parametrize("key", [None, 1.5, (1, 2), b"x", True])
def test_trackable_under_another_kind_of_key_is_refused(run_dir, key):
    """Containers of trackables have text and integer keys only."""
    kind = type(key).__name__
    with pytest.raises(UnsupportedError, match=rf": tree: a key of type {kind}"):
        save(run_dir, tree={key: torch.ones(1)})


@pytest.mark.parametrize(
    "value",
    [
        object(),
        {torch.ones(1)},
        np.array([object()]),
        np.zeros(2, "i4,f4"),
        np.ma.array([1]),
        memoryview(b"x"),
        (item for item in ()),
        {}.keys(),
        print,
        int,
        lambda: None,
        nn.Linear,
    ],
    ids=lambda value: type(value).__name__,
)
def test_value_that_cannot_be_stored_is_refused_with_its_path(run_dir, value):
    """The message names the path of the value in the tree, however deep it is."""
    with pytest.raises(UnsupportedError, match=r"config\['deep'\]\[1\]: "):
        save(run_dir, config={"deep": [0, value]})
    with pytest.raises(UnsupportedError, match=r"tree/~i3\['k'\]: "):
        save(run_dir, tree={3: {"k": value}, "t": torch.ones(1)})


def test_tuple_of_trackables_is_refused(run_dir):
    """A tuple cannot be updated in place."""
    with pytest.raises(UnsupportedError, match=r"pair/~i0: a tuple cannot be updated"):
        save(run_dir, pair=[(torch.ones(1), 2)])


def test_cycles_and_bottomless_nesting_are_refused(run_dir):
    """A container that contains itself is no endless loop."""
    values, tracked = [1], [torch.ones(1)]
    values.append(values)
    tracked.append(tracked)
    with pytest.raises(UnsupportedError, match="nested deeper than 64"):
        save(run_dir, x=values)
    with pytest.raises(UnsupportedError, match="nested deeper than 64"):
        save(run_dir, x=tracked)


@pytest.mark.full  # the compiler takes seconds to import
def test_two_objects_of_one_name_are_refused(run_dir):
    """A name stands for one thing."""
    model = nn.Module()
    model.register_parameter("w", nn.Parameter(torch.ones(1)))

    class Odd(nn.Module):
        def state_dict(self, *args, **kwargs):
            return {"layer.weight": torch.ones(1), "layer._orig_mod.weight": torch.ones(1)}

    odd = Odd()
    odd.layer = torch.compile(nn.Linear(1, 1))
    with pytest.raises(UnsupportedError, match=r"odd/layer\.weight: two tracked objects"):
        save(run_dir, odd=odd)


def test_containers_of_another_structure_are_a_mismatch(run_dir):
    """Lists of another length and dicts with other keys are listed by name."""
    save(run_dir, items=[torch.ones(1), torch.ones(1)], d={"a": torch.ones(1), "n": 1})
    live = {"items": [torch.zeros(1)], "d": {"b": torch.zeros(1), "m": 2}}
    with pytest.raises(MismatchError) as caught:
        restore(run_dir, **live)
    for text in (
        "items/~i1: in the checkpoint, nothing here",
        "d/a: in the checkpoint, nothing here",
        "d/n: in the checkpoint, nothing here",
        "d/b: a tensor here, not there in the checkpoint",
        "d/m: a plain value here, not there in the checkpoint",
        "5 differences",
    ):
        assert text in str(caught.value)
    assert live == {"items": [torch.zeros(1)], "d": {"b": torch.zeros(1), "m": 2}}


def test_more_than_a_hundred_differences_are_counted(run_dir):
    """The message stays readable: the first hundred, and how many more."""
    save(run_dir, x={f"k{number}": torch.ones(1) for number in range(120)})
    with pytest.raises(
        MismatchError, match=r"(?s)121 differences.*x \(120 names: x/k0, x/k1, \.\.\.\)"
    ) as caught:
        restore(run_dir, y=torch.ones(1))
    assert str(caught.value).count("nothing here") == 1


def test_values_live_in_the_manifest_and_tensors_in_the_shard_file(run_dir):
    """A value with tensors inside leaves references to where they are."""
    path = save(run_dir, mixed=[1, {"plain": 2}], tensors={"t": torch.ones(1), "v": 3})
    assert manifest_of(path).values == {
        "save_counter": 1,
        "mixed": [1, {"plain": 2}],
        "tensors/v": 3,
    }
