"""Plain values restored into live objects: classes, arrays, tensors in them, in place."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import json
import logging
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from decimal import Decimal
from pathlib import PurePosixPath
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch_helpers import assert_same, manifest_of, restore, rows_of, save

import distckpt
from distckpt import Checkpoint, MismatchError, PerRank, UnsupportedError, instances


class Phase(enum.Enum):
    """What a training loop may be in."""

    WARMUP = enum.auto()
    MAIN = enum.auto()


class Level(enum.IntEnum):
    """Members that are numbers."""

    LOW = 1
    HIGH = 7


@dataclasses.dataclass
class Record:
    """One of many, in a list that grows."""

    step: int
    phase: Phase = Phase.WARMUP
    scores: dict[str, float] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class Progress:
    """What a training loop keeps of itself."""

    epoch: int = 0
    phase: Phase = Phase.WARMUP
    best: Record | None = None
    history: list[Record] = dataclasses.field(default_factory=list)
    seen: int = dataclasses.field(default=0, init=False)

    def __post_init__(self):
        self.seen = -1  # a restore does not run this


@dataclasses.dataclass(frozen=True)
class Frozen:
    """A configuration that cannot be changed."""

    lr: float
    sizes: tuple[int, ...] = ()


@dataclasses.dataclass
class Slotted:
    """A dataclass without a dict of its own."""

    __slots__ = ("x", "y")
    x: int
    y: object


Point = namedtuple("Point", "x y")


class Tag(str):
    """A text with a class of its own."""

    __slots__ = ()


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


def progress():
    """Make one with everything in it."""
    made = Progress(3, Phase.MAIN, Record(2, Phase.MAIN, {"loss": 0.5}), [Record(1)])
    made.seen = 77
    return made


INSTANCES = [
    (Phase.MAIN, Phase.WARMUP),
    (Level.HIGH, Level.LOW),
    (progress(), Progress()),
    (Frozen(0.1, (1, 2)), Frozen(0.2)),
    (Slotted(1, [Phase.MAIN]), Slotted(0, [Phase.WARMUP])),
    (Point(1, [Level.HIGH]), Point(0, [Level.LOW])),
    (Tag("a"), Tag("b")),
    ({Phase.MAIN, Phase.WARMUP}, {Phase.WARMUP}),
    ({Phase.MAIN: Point(1, 2)}, {Phase.WARMUP: Point(0, 0)}),
    ([Record(1), Record(2, Phase.MAIN)], [Record(0)]),
    (deque([Point(1, 2)], 5), deque([Point(0, 0)], 5)),
    (SimpleNamespace(phase=Phase.MAIN), SimpleNamespace(phase=Phase.WARMUP)),
    (OrderedDict(a=(Frozen(1.0),)), OrderedDict(a=(Frozen(2.0),))),
    (Counter({Phase.MAIN: 2}), Counter({Phase.WARMUP: 1})),
]


@pytest.mark.parametrize(("saved", "live"), INSTANCES, ids=lambda v: type(v).__name__)
def test_instance_comes_back_with_the_class_of_the_live_one(run_dir, saved, live):
    """Tracked, for each rank, deep in a value, and in an object's state."""
    state = {"k": [{"v": saved}]}
    save(run_dir, x=saved, own=PerRank(saved), deep=state, holder=Holder(state))
    other = {"k": [{"v": live}]}
    holder = Holder(other)
    here = restore(run_dir, x=live, own=PerRank(live), deep={**other}, holder=holder)
    for found in (
        *(here.x, here.own.value),
        *(here.deep["k"][0]["v"], holder.state["k"][0]["v"]),
    ):
        assert type(found) is type(saved) and found == saved


def test_what_can_be_changed_is_updated_in_place(run_dir):
    """Whoever holds it sees the restored content; what cannot is replaced."""
    saved = {
        "data": progress(),
        "names": {"a", "b"},
        "last": deque([1, 2], 3),
        "by": defaultdict(list, {1: [2]}),
        "space": SimpleNamespace(a=1),
        "args": argparse.Namespace(lr=1),
        "raw": bytearray(b"xyz"),
        "array": np.arange(6.0).reshape(2, 3),
        "large": np.arange(4000).reshape(4, 1000),
    }
    live = {
        "data": Progress(),
        "names": set(),
        "last": deque([9, 9, 9], 3),
        "by": defaultdict(list),
        "space": SimpleNamespace(b=2),
        "args": argparse.Namespace(),
        "raw": bytearray(),
        "array": np.zeros((2, 3)),
        "large": np.zeros((4, 1000), dtype=np.int64),
    }
    save(run_dir, **saved)
    before = {**live}
    here = restore(run_dir, **live)
    for name, expected in saved.items():
        found = getattr(here, name)
        assert found is before[name], name
        if isinstance(expected, np.ndarray):
            assert np.array_equal(found, expected)
        else:
            assert found == expected
    assert before["data"].seen == 77
    assert not hasattr(before["space"], "b")


@pytest.mark.parametrize(
    ("saved", "live"),
    [
        (Frozen(0.1), Frozen(0.2)),
        (deque([1], 2), deque([9], 3)),
        (np.zeros(3), np.ones(4)),
        (np.zeros(3), np.ones(3, np.float32)),
        (np.zeros(3), np.broadcast_to(np.ones(1), 3)),
        ({1}, [1]),
        (Decimal(1), Decimal(2)),
        (PurePosixPath("a"), PurePosixPath("b")),
    ],
    ids=["frozen", "maxlen", "shape", "dtype", "read-only", "kind", "decimal", "path"],
)
def test_what_cannot_be_changed_is_replaced(run_dir, saved, live):
    """And the live one stays as it is."""
    save(run_dir, x=saved)
    before = repr(live)
    here = restore(run_dir, x=live)
    assert type(here.x) is type(saved) and repr(here.x) == repr(saved)
    assert here.x is not live and repr(live) == before


def test_class_that_only_an_annotation_names_is_found(run_dir):
    """A list that is empty in a fresh program: its type tells what goes into it."""
    save(run_dir, p=progress())
    here = restore(run_dir, p=Progress())
    assert here.p.history == [Record(1)] and here.p.best.phase is Phase.MAIN


def test_class_that_nothing_live_has_leaves_plain_values_and_a_warning(run_dir, caplog):
    """Nothing is imported by a name in a file."""
    save(run_dir, history=[Record(1, Phase.MAIN)], n=1)
    with caplog.at_level(logging.WARNING):
        here = restore(run_dir, history=[], n=0)
    assert here.history == [{"step": 1, "phase": 2, "scores": {}}]
    (said,) = [r.message for r in caplog.records if "history" in r.message]
    assert f"{instances.name_of(Phase)}, {instances.name_of(Record)}" in said


def test_class_of_another_name_is_not_taken(run_dir, monkeypatch):
    """A class that was moved is another one."""
    save(run_dir, x=Frozen(0.1))
    monkeypatch.setattr(Frozen, "__module__", "elsewhere")
    assert restore(run_dir, x=Frozen(0.2)).x == {"lr": 0.1, "sizes": ()}


def _changed(**namespace):
    """Make a class that is called ``Changing``, whatever it consists of."""
    fields = [(n, int, v) if v is not None else (n, int) for n, v in namespace.items()]
    made = dataclasses.make_dataclass("Changing", fields)
    made.__module__ = __name__
    return made


def test_class_with_other_fields_fits_where_defaults_fill_what_is_new(run_dir):
    """What is gone, or new without a default, is a mismatch."""
    save(run_dir, x=_changed(a=None, b=2)(1))
    grown = _changed(a=None, b=2, c=7)
    assert restore(run_dir, x=grown(0)).x == grown(1, 2, 7)
    with pytest.raises(MismatchError, match=r"x: a .*Changing cannot.*no field 'b' any"):
        restore(run_dir, x=_changed(a=None)(0))
    with pytest.raises(MismatchError, match=r"has a field 'c' now, without a default"):
        restore(run_dir, x=_changed(a=None, b=None, c=None)(0, 0, 0))


def test_member_is_found_by_its_name_and_else_by_its_value(run_dir):
    """Counted values move; a renamed member keeps its value."""

    def make(text):
        made = enum.Enum("Moving", text, module=__name__)
        made.__qualname__ = "Moving"
        return made

    save(run_dir, x=make("A B").B)
    moved = make("NEW A B")
    assert restore(run_dir, x=moved.A).x is moved.B
    renamed = make("A SECOND")
    assert restore(run_dir, x=renamed.A).x is renamed.SECOND
    with pytest.raises(MismatchError, match=r"x: .*Moving .* no member B = 2 any more"):
        restore(run_dir, x=make("A").A)


def test_named_tuple_with_other_fields_is_a_mismatch(run_dir):
    """By position they would be mixed up."""
    save(run_dir, x=Point(1, 2))
    other = namedtuple("Point", "y x")
    other.__module__, other.__qualname__ = __name__, Point.__qualname__
    with pytest.raises(MismatchError, match=r"fields \['y', 'x'\] now, and had \['x', 'y'"):
        restore(run_dir, x=other(0, 0))


def test_default_of_a_defaultdict_is_that_of_the_live_one(run_dir):
    """A function is in no file."""
    saved = defaultdict(lambda: 5, {"a": defaultdict(list, {1: [2]})})
    save(run_dir, x=saved, holder=Holder({"d": saved}))
    live, holder = defaultdict(lambda: 6), Holder({"d": defaultdict(lambda: 7)})
    here = restore(run_dir, x=live, holder=holder)
    assert here.x is live and here.x["new"] == 6
    assert here.x["a"] == {1: [2]} and here.x["a"]["new"] == []
    assert holder.state["d"]["new"] == 7
    here = restore(run_dir, x={}, holder=Holder({}))
    assert type(here.x) is dict


def test_descriptions_of_torch_come_back_as_themselves(run_dir):
    """dtypes, devices, layouts, sizes: torch itself has them."""
    saved = {
        "dtype": [torch.bfloat16, torch.float8_e5m2],
        "device": torch.device("cuda:3"),
        "layout": torch.sparse_csr,
        "format": torch.channels_last,
        "scheme": torch.per_tensor_affine,
        "size": torch.Size([2, 3]),
        torch.int8: 1,
    }
    path = save(run_dir, x=saved, holder=Holder(saved))
    holder = Holder({})
    here = restore(run_dir, x={}, holder=holder)
    for found in (here.x, holder.state):
        assert found == saved
        assert type(found["size"]) is torch.Size and found["dtype"][0] is torch.bfloat16
    with distckpt.open(path) as opened:
        found = opened.plain_values["x"]
        assert found["dtype"] == ["torch.bfloat16", "torch.float8_e5m2"]
        assert (found["device"], found["size"]) == ("cuda:3", (2, 3))


def test_dtype_that_this_torch_lacks_is_a_mismatch_by_name(run_dir, monkeypatch):
    """Found out before anything is touched."""
    from distckpt import torch_versions

    save(run_dir, x={"dtype": torch.int4}, t=torch.ones(1))
    known = {k: v for k, v in torch_versions._dtypes_by_name().items() if k != "int4"}
    monkeypatch.setattr(torch_versions, "_dtypes_by_name", lambda: known)
    t = torch.zeros(1)
    with pytest.raises(MismatchError, match=r"x: this version of torch .* no dtype 'int4'"):
        restore(run_dir, x={}, t=t)
    assert t == 0


# Tensors and arrays in values


@dataclasses.dataclass
class Window:
    """Tensors in a dataclass."""

    values: list[torch.Tensor]
    mean: torch.Tensor
    count: int = 0


def test_tensors_in_containers_of_all_kinds_are_stored_beside(run_dir):
    """By the path that leads to them, and made again in the same containers."""

    def make(v):
        return {
            "deque": deque([torch.full((2,), v), 1], 4),
            "default": defaultdict(list, {"a": [torch.full((2,), v + 1)]}),
            "point": Point(torch.full((2,), v + 2), "y"),
            "space": SimpleNamespace(t=torch.full((2,), v + 3)),
            "window": Window([torch.full((2,), v + 4)], torch.full((), v + 5), 3),
            "tuple": (torch.full((2,), v + 6),),
            "plain": 1,
        }

    holder, live = Holder(make(0.0)), Holder(make(10.0))
    path = save(run_dir, h=holder)
    assert {*rows_of(path)} == {
        *("h/deque/~i0", "h/default/a/~i0", "h/point/x", "h/space/t"),
        *("h/window/values/~i0", "h/window/mean", "h/tuple/~i0"),
    }
    restore(run_dir, h=live)
    found, expected = live.state, holder.state
    assert found["deque"].maxlen == 4 and type(found["point"]) is Point
    assert type(found["window"]) is Window and found["window"].count == 3
    for get in (
        lambda s: s["deque"][0],
        lambda s: s["default"]["a"][0],
        lambda s: s["point"].x,
        lambda s: s["space"].t,
        lambda s: s["window"].values[0],
        lambda s: s["window"].mean,
        lambda s: s["tuple"][0],
    ):
        assert_same(get(found), get(expected))


ARRAYS = {
    "float": np.linspace(0, 1, 2000),
    "columns": np.asfortranarray(np.arange(2000.0).reshape(50, 40)),
    "strided": np.arange(8000, dtype=np.int32)[::4],
    "bool": np.arange(5000) % 3 == 0,
    "complex": np.arange(1000) * (1 + 2j),
    "unsigned": np.arange(3000, dtype=np.uint16),
    "big-endian": np.arange(2000, dtype=">i4"),
    "text": np.array(["ab", "ß€", ""] * 700),
    "bytes": np.array([b"xyz"] * 2000),
    "dates": np.arange("2020-01", "2040-01", dtype="M8[D]"),
    "long": np.arange(500, dtype=np.longdouble) / 3,
}


@pytest.mark.parametrize("name", ARRAYS)
def test_large_array_is_stored_like_a_tensor(run_dir, name):
    """Its elements are checked block by block, and written by the ranks together."""
    saved = ARRAYS[name]
    path = save(run_dir, x=saved, own=PerRank([saved]), holder=Holder({"a": (saved, 1)}))
    assert {*rows_of(path)} == {"x", "holder/a/~i0"}
    assert len(json.dumps(manifest_of(path).values)) < 1000
    holder = Holder({})
    here = restore(run_dir, x=None, own=PerRank([]), holder=holder)
    for found in (here.x, here.own.value[0], holder.state["a"][0]):
        assert type(found) is np.ndarray
        assert (found.dtype, found.shape) == (saved.dtype, saved.shape)
        assert found.flags.f_contiguous == saved.copy("K").flags.f_contiguous
        assert found.tobytes() == saved.tobytes() and found.flags.writeable
    with distckpt.open(path) as opened:
        handle = opened.plain_values["x"]
        assert handle.size_bytes == saved.nbytes
        if name in ("float", "bool", "unsigned"):
            assert np.array_equal(handle.numpy(), saved)


def test_array_that_may_not_be_written_is_saved(run_dir):
    """As one that is mapped from a file."""
    saved = np.arange(3000)
    saved.flags.writeable = False
    save(run_dir, x={"a": saved})
    assert np.array_equal(restore(run_dir, x={}).x["a"], saved)


def test_array_is_saved_as_it_was_at_the_call(run_dir):
    """An asynchronous save has a copy of it."""
    saved = np.arange(3000)
    options = distckpt.CheckpointOptions(enable_async=True)
    with distckpt.CheckpointManager(Checkpoint(x=saved), run_dir, None) as manager:
        manager.save(options=options)
        saved += 1
        manager.sync()
    assert np.array_equal(restore(run_dir, x=None).x, saved - 1)


def test_function_of_per_rank_gets_instances_and_arrays(run_dir):
    """As the ranks had them."""
    state = {"phase": Phase.MAIN, "a": np.arange(3000), "small": np.arange(2)}
    save(run_dir, x=PerRank(state), o=PerRank(Holder(state)))
    got = []

    def resize(saved, rank, world_size):
        got.append(saved)
        return saved[0]

    live = {"phase": Phase.WARMUP}
    x, o = PerRank({**live}, resize=resize), PerRank(Holder({**live}), resize=resize)
    from distckpt import loading

    original = loading.Loading._is_resized
    loading.Loading._is_resized = property(lambda self: True)
    try:
        Checkpoint(x=x, o=o).restore(f"{run_dir}/ckpt-1")
    finally:
        loading.Loading._is_resized = original
    for (found,) in got:
        assert found["phase"] is Phase.MAIN
        assert np.array_equal(found["a"], state["a"])
        assert np.array_equal(found["small"], state["small"])
    assert x.value["phase"] is Phase.MAIN and o.value.state["phase"] is Phase.MAIN


@pytest.mark.parametrize(
    "state",
    [
        defaultdict(int, {"a": 1}),
        Counter("ab"),
        OrderedDict(a=1),
        [1, {"b": torch.ones(2)}],
        (Phase.MAIN, 2),
        Record(1, Phase.MAIN),
        Point(1, 2),
        np.arange(3000),
        np.arange(3),
        torch.arange(3),
        None,
        7,
    ],
    ids=lambda state: type(state).__name__,
)
def test_state_of_an_object_may_be_anything_that_can_be_stored(run_dir, state):
    """Whatever its ``state_dict()`` returns is what its ``load_state_dict()`` gets."""
    save(run_dir, x=Holder(state))
    live = Holder((Phase.WARMUP, 1) if isinstance(state, tuple) else state)
    if type(state) is Point:
        live.state = Point(0, 0)
    restore(run_dir, x=live)
    if isinstance(state, np.ndarray):
        assert np.array_equal(live.state, state)
    else:
        assert_same(live.state, state)
    assert live.state is not state or not hasattr(state, "__len__")


def test_object_that_has_no_state_before_it_is_given_one(run_dir, caplog):
    """Then nothing tells the classes, and plain values are given to it."""

    class Late(Holder):
        def state_dict(self):
            return {"phase": self.state["phase"]}

    save(run_dir, x=Late({"phase": Phase.MAIN}))
    live = Late({})
    with caplog.at_level(logging.WARNING):
        restore(run_dir, x=live)
    assert live.state == {"phase": 2}
    assert any("x: asked for what it has now" in r.message for r in caplog.records)


def test_extra_state_of_a_module_may_be_anything_that_can_be_stored(run_dir):
    """With the classes of what is there now."""

    class Extra(nn.Linear):
        def __init__(self, state):
            super().__init__(2, 2)
            self.extra = state

        def get_extra_state(self):
            return self.extra

        def set_extra_state(self, state):
            self.extra = state

    saved = {"p": progress(), "a": np.arange(3000), "names": {"x"}}
    save(run_dir, m=Extra(saved))
    live = Extra({"p": Progress()})
    restore(run_dir, m=live)
    assert live.extra["p"] == saved["p"] and live.extra["names"] == {"x"}
    assert np.array_equal(live.extra["a"], saved["a"])


def test_optimizers_settings_and_state_may_have_instances(run_dir):
    """Whatever a program puts there."""

    def make(phase, array):
        model = nn.Linear(2, 2)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        optimizer.param_groups[0]["phase"] = phase
        optimizer.state[model.weight]["note"] = {"phase": phase, "a": array}
        return {"model": model, "optimizer": optimizer}

    save(run_dir, **make(Phase.MAIN, np.arange(3000)))
    live = make(Phase.WARMUP, np.arange(1))
    restore(run_dir, **live)
    optimizer, weight = live["optimizer"], live["model"].weight
    assert optimizer.param_groups[0]["phase"] is Phase.MAIN
    note = optimizer.state[weight]["note"]
    assert note["phase"] is Phase.MAIN and np.array_equal(note["a"], np.arange(3000))


# Refused


@pytest.mark.parametrize(
    ("make", "hint"),
    [
        (lambda: torch.utils.data.DataLoader([1]), "StatefulDataLoader"),
        (lambda: nn.Linear(1, 1).parameters(), r"Checkpoint\(model=model\)"),
        (lambda: torch.Generator(), "RngState"),
        (lambda: deque([nn.Linear(1, 1)]), "Track the module itself"),
        (lambda: {torch.ones(1): 1}, "no path leads to it"),
        (lambda: {"a": {(1, 2): torch.ones(1)}}, "a key of type tuple"),
    ],
    ids=["loader", "parameters", "generator", "module", "key", "tuple-key"],
)
def test_refusal_says_what_to_do(run_dir, make, hint):
    """By the type of what is refused."""
    with pytest.raises(UnsupportedError, match=hint):
        save(run_dir, x=make())


def test_value_that_contains_itself_is_refused_by_its_path(run_dir):
    """Through containers and instances of every kind."""
    record = Record(1)
    record.scores["self"] = record
    with pytest.raises(UnsupportedError, match=r"x\.scores\['self'\].*contain itself"):
        save(run_dir, x=record)
    both = []
    both.append([both, both])
    with pytest.raises(UnsupportedError, match="contain itself"):
        save(run_dir, x=both)
