"""Plain values come back with their type and every bit, or are refused by path."""

from __future__ import annotations

import argparse
import array
import dataclasses
import enum
import functools
import io
import math
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import threading
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque, namedtuple
from contextlib import suppress
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from distckpt import strict_json, values
from distckpt.errors import FormatError, UnsupportedError
from distckpt.formats import pickle_write, torch_save
from distckpt.value_tags import TensorRef

MAX_EXAMPLES = examples(150)

_numpy_scalars = st.one_of(
    *(
        hypothesis_numpy.from_dtype(np.dtype(name))
        for name in [
            "?",
            "i1",
            "u1",
            "i2",
            "u2",
            "i4",
            "u4",
            "i8",
            "u8",
            "f2",
            "f4",
            "f8",
            "c8",
            "c16",
        ]
    )
)
_keys = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(st.characters() | st.just("$"), max_size=4)
    | st.binary(max_size=3)
    | st.tuples(st.integers(), st.text(max_size=2))
)
_hashable = (
    _keys
    | st.complex_numbers(allow_nan=False)
    | st.decimals(allow_nan=False)
    | st.fractions()
    | st.datetimes(timezones=st.none() | st.just(timezone.utc))
    | st.dates()
    | st.times()
    | st.timedeltas()
    | st.uuids()
    | st.builds(range, st.integers(-9, 9), st.integers(-9, 9), st.integers(1, 3))
    | st.builds(PurePosixPath, st.text("ab/.", max_size=5))
)
_arrays = hypothesis_numpy.arrays(
    st.sampled_from(["?", "<i4", ">f8", "<c8", "<U3", "|S2", "<M8[s]", "<m8[ms]"]),
    hypothesis_numpy.array_shapes(min_dims=0, min_side=0, max_side=3),
)
_leaves = (
    _hashable
    | _arrays
    | st.frozensets(_hashable, max_size=4)
    | st.sets(_hashable, max_size=4)
    | st.just(math.nan)
    | st.sampled_from([0.0, -0.0, math.inf, -math.inf, 5e-324])
    | st.builds(TensorRef, st.text(max_size=5))
    | _numpy_scalars
)
_trees = st.recursive(
    _leaves,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(_keys, inner, max_size=3)
        | st.dictionaries(_keys, inner, max_size=3).map(OrderedDict)
        | st.dictionaries(_keys, st.integers(), max_size=3).map(Counter)
        | st.lists(inner, max_size=3).map(lambda items: deque(items, 5))
        | st.dictionaries(_keys, inner, max_size=3).map(
            lambda items: defaultdict(list, items)
        )
        | st.dictionaries(st.text(max_size=3), inner, max_size=3).map(
            lambda items: SimpleNamespace(**items)
        )
    ),
    max_leaves=10,
)


def same(first, second):
    """Compare with types, order, signs of zero and NaN."""
    if type(first) is not type(second):
        return False
    if isinstance(first, float) and type(first) is float:
        if math.isnan(first):
            return math.isnan(second)
        return struct.pack("<d", first) == struct.pack("<d", second)
    if isinstance(first, np.generic):
        return first.tobytes() == second.tobytes()
    if isinstance(first, complex):
        return repr(first) == repr(second)
    if isinstance(first, np.ndarray):
        alike = (first.dtype, first.shape) == (second.dtype, second.shape)
        by_columns = [
            a.flags.f_contiguous and not a.flags.c_contiguous for a in (first, second)
        ]
        return alike and first.tobytes() == second.tobytes() and len({*by_columns}) == 1
    if (
        isinstance(first, defaultdict)
        and first.default_factory is not second.default_factory
    ):
        return False
    if isinstance(first, (SimpleNamespace, argparse.Namespace)):
        return same(vars(first), vars(second))
    if isinstance(first, deque):
        return first.maxlen == second.maxlen and same([*first], [*second])
    if isinstance(first, (set, frozenset)):
        pairs = zip(sorted(first, key=repr), sorted(second, key=repr), strict=True)
        return len(first) == len(second) and all(same(*pair) for pair in pairs)
    if isinstance(first, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    if isinstance(first, dict):
        return same(list(first.items()), list(second.items()))
    return first == second


def through_json(encoded):
    return strict_json.loads(strict_json.dumps(encoded).encode())


@settings(max_examples=examples(2) * MAX_EXAMPLES)
@given(value=_trees)
def test_value_through_json_comes_back_the_same(value):
    """Types, order, signs of zero: nothing is lost on the way through a file."""
    found = values.decode(through_json(values.encode(value)))
    assert same(found, value), (found, value)


_encoded_trees = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "$tuple",
                    "$dict",
                    "$ordered",
                    "$counter",
                    "$bytes",
                    "$float",
                    "$numpy",
                    "$tensor",
                    *("$set", "$deque", "$array", "$complex", "$range", "$path", "$enum"),
                    *("$datetime", "$decimal", "$fraction", "$dataclass", "$namedtuple"),
                    *("$scalar", "$wrapper", "$torch", "$defaultdict", "$namespace"),
                    "$new",
                    "a",
                ]
            ),
            inner,
            max_size=2,
        )
    ),
    max_leaves=8,
)


@settings(max_examples=MAX_EXAMPLES)
@given(encoded=_encoded_trees)
def test_arbitrary_tree_decodes_or_is_a_format_error(encoded):
    """A damaged file gives one kind of error."""
    with suppress(FormatError):
        values.decode(encoded)


@settings(max_examples=MAX_EXAMPLES)
@given(
    dtype=st.text("<>|=(),0123456789biufcVOSUMm[] ", max_size=6), data=st.binary(max_size=9)
)
def test_arbitrary_numpy_dtype_decodes_or_is_a_format_error(dtype, data):
    """The text of a dtype never reaches numpy's own little parser unchecked."""
    encoded = values.encode(data)["$bytes"]
    with suppress(FormatError):
        values.decode({"$numpy": [dtype, encoded]})


class Text(str):
    """A text that has more than its characters."""

    note = "of the class"


class Config(dict):
    """A dict that is more than that."""


class Half:
    """What has one half of the protocol of objects with state."""

    def state_dict(self):
        """Return nothing."""


@dataclasses.dataclass
class Failure(Exception):
    """Both an exception and a dataclass."""

    reason: str = ""


def _with_a_note(text):
    text.note = "its own"
    return text


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (object(), "Give it a state_dict"),
        (Config(a=1), r"store dict\(value\)"),
        (types.MappingProxyType({}), r"Store dict\(value\)"),
        ({}.keys(), r"Store list\(value\)"),
        (_with_a_note(Text("x")), "Give it"),
        (Failure("x"), "Give it"),
        (np.zeros(2, dtype=object), "Python objects: store value.tolist"),
        (np.zeros(2, dtype="i4,f4"), "store each field"),
        (np.zeros(2, dtype="V3"), "unsigned integers"),
        (np.ma.array([1]), r"numpy.asarray\(value\)"),
        (np.void(b"x"), "unsigned integers"),
        (np.zeros(2**18 + 1), "at most 1048576 are stored; track it"),
        (np.random.default_rng(0), r"bit_generator\.state"),
        (np.random.RandomState(0), r"get_state\(\)"),
        (random.Random(0), r"getstate\(\)"),
        (memoryview(b"x"), r"bytes\(value\)"),
        (array.array("i", [1]), r"numpy\.array\(value\)"),
        (re.compile("x"), r"value\.pattern"),
        (len, "Code is not stored"),
        (lambda: None, "Code is not stored"),
        ([].append, "Code is not stored"),
        (functools.partial(len), "Code is not stored"),
        (math, "Code is not stored"),
        (Text, "A class is code"),
        ((item for item in ()), r"Checkpoint\(model=model\)"),
        (iter([]), "only once"),
        (Half(), r"no load_state_dict\(\)"),
        (threading.Lock(), "belongs to this process"),
        (io.BytesIO(), "belongs to this process"),
        (datetime.now(ZoneInfo("UTC")), r"time zone is a ZoneInfo.*astimezone"),
        (Decimal("1" * 5000), "a Decimal cannot be stored"),
        (10**2000, "more than 4096 bits"),
        (range(10**2000), "more than 4096 bits"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_value_whose_type_would_be_lost_is_refused_with_a_hint(value, hint):
    """A value that comes back as another type is a bug that shows weeks later."""
    with pytest.raises(UnsupportedError, match=rf"^state\['x'\]\[0\]\S*: .*{hint}"):
        values.encode({"x": [value]}, "state")


# What comes back as itself, without anything live: its class is Python's own, or numpy's.
STANDARD = [
    *({1, "a", (2, None), 2.5}, set(), frozenset("ab"), {frozenset((1,))}),
    *(
        1 + 2j,
        complex("nan"),
        complex(-0.0, math.inf),
        range(3, 10, 2),
        slice(None, 5),
        ...,
    ),
    *(deque([1, {2}], 3), deque(), bytearray(b"x\0"), {1 + 2j: 1}),
    *(defaultdict(int, {1: 2}), defaultdict(None, a=[1]), defaultdict(list, {"x": [1]})),
    *(datetime(2020, 1, 2, 3, 4, 5, 6, fold=1), datetime.now(timezone.utc), date(1, 1, 1)),
    *(time(1, 2, fold=1), time(1, tzinfo=timezone(timedelta(hours=-1), "X"))),
    *(timedelta(-1, 5, 7), timezone.utc, timezone(timedelta(minutes=90))),
    *(uuid.UUID(int=5), Decimal("1.10"), Decimal("-0"), Decimal("1E+1000"), Fraction(1, 3)),
    *(PurePosixPath("a/b"), PureWindowsPath("c:\\x"), Path("/x/y")),
    *(SimpleNamespace(a=1, b={2}), argparse.Namespace(lr=0.1, sizes=[1, (2,)])),
    *(np.str_("ü"), np.str_(""), np.bytes_(b"x"), np.datetime64("2020-01-01T01")),
    *(np.timedelta64(5, "s"), np.datetime64("NaT"), np.longdouble(1) / 3),
]


@pytest.mark.parametrize("value", STANDARD, ids=lambda value: type(value).__name__)
def test_value_of_the_standard_library_comes_back_as_itself(value):
    """Type, content, and the types inside."""
    for tree in (value, [value], {"k": (value, 1)}):
        found = values.decode(through_json(values.encode(tree)))
        assert same(found, tree), (found, tree)


ARRAYS = [
    *(np.arange(6).reshape(2, 3), np.arange(24.0).reshape(2, 3, 4).T, np.array(3)),
    *(
        np.zeros((0, 3)),
        np.array([True, False]),
        np.array([1 + 2j], "c8"),
        np.arange(9)[::2],
    ),
    *(np.asfortranarray(np.ones((3, 4), "f2")), np.array([1, 2], ">i4"), np.ones(2, "f8")),
    *(np.array(["a", "ß€"]), np.array([b"xy", b"z"]), np.zeros(2, "U0"), np.array("x")),
    *(np.array(["2020-01-01", "NaT"], "M8[D]"), np.array([1, 2], "m8[25s]")),
    *(np.array([1, 2], np.longdouble), np.arange(12, dtype="u2").reshape(3, 4)[:, 1:3]),
]


@pytest.mark.parametrize("value", ARRAYS, ids=lambda value: value.dtype.str)
def test_array_comes_back_with_dtype_shape_order_and_every_bit(value):
    """And can be written to, whatever the saved one could."""
    value = value.copy("K")
    value.flags.writeable = False
    found = values.decode(through_json(values.encode({"a": [value]})))["a"][0]
    assert same(found, value) and found.flags.writeable


def test_states_of_numpys_generators_come_back(run_dir):
    """The old one's and the new ones'."""
    old = np.random.RandomState(0)
    state = old.get_state()
    found = values.decode(through_json(values.encode(state)))
    expected, other = old.random(3), np.random.RandomState(1)
    other.set_state(found)
    assert np.array_equal(other.random(3), expected)
    for kind in (np.random.PCG64, np.random.MT19937, np.random.Philox, np.random.SFC64):
        generator = np.random.Generator(kind(0))
        found = values.decode(through_json(values.encode(generator.bit_generator.state)))
        expected, other = generator.random(3), np.random.Generator(kind(1))
        other.bit_generator.state = found
        assert np.array_equal(other.random(3), expected)


def test_set_has_one_spelling_in_every_process():
    """Ranks compare texts, and each has its own seed for the hashes of texts."""
    code = (
        "from distckpt import values; v = {'x': {'a', 'b', ('c', 1), 2, 2.5, None, b'd'},"
        " 'y': frozenset(map(str, range(50)))}; print(values.encode_text(v).text)"
    )
    texts = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
        ).stdout
        for seed in (1, 2)
    }
    assert len(texts) == 1


@settings(max_examples=MAX_EXAMPLES)
@given(value=_trees)
def test_text_is_that_of_the_tree(value):
    """What is found to be plain as a whole is spelled as if it were walked."""
    encoded = values.encode_text(value)
    assert encoded.text == strict_json.dumps(values.encode(value))
    assert encoded.tree == through_json(values.encode(value))
    assert values.check(encoded.tree) is None


@pytest.mark.parametrize(
    "value",
    [
        [[1, 2], [3]],
        [(1, 2), (3, None)],
        [{"a": 1}, {"b": 2.5}],
        [[math.inf]],
        [(math.nan,), (1,)],
        [{"$a": 1}],
        [{"a": math.inf}],
        [[2**4095]],
        [[], [1]],
        [{}, {}],
        {1: 2, "a": 3},
        {True: [1], None: 2},
        [[1, [2]], [3]],
        [{"a": 1}, {1: 1}],
        [OrderedDict(a=1)],
    ],
    ids=repr,
)
def test_many_small_containers_are_as_exact_as_one(value):
    """They are encoded and decoded all at once."""
    encoded = through_json(values.encode(value))
    found = values.decode(encoded)
    assert same(found, value)
    if isinstance(found, list) and found and isinstance(found[0], list):
        assert found[0] is not encoded[0]


@pytest.mark.parametrize(
    "value", [[10**2000], [[10**2000]], {"a": -(10**2000)}, (10**2000,)]
)
def test_integer_that_is_too_long_is_refused_wherever_it_stands(value):
    """Also where all items are looked at together."""
    with pytest.raises(UnsupportedError, match="more than 4096 bits"):
        values.encode_text(value)


# Instances


class Colour(enum.Enum):
    """Members with plain values, and one without."""

    RED = 1
    BLUE = "b"
    CODE = print


class Number(enum.IntEnum):
    """Members that are numbers, too."""

    THREE = 3


class Flags(enum.Flag):
    """Members that can be put together."""

    A = 1
    B = 2


@dataclasses.dataclass
class Run:
    """A dataclass of the usual kind."""

    name: str
    sizes: list[int] = dataclasses.field(default_factory=list)
    best: float | None = dataclasses.field(default=None, init=False)


Point = namedtuple("Point", "x y")


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (Colour.RED, 1),
        (Colour.BLUE, "b"),
        (Colour.CODE, "CODE"),
        (Number.THREE, 3),
        (Flags.A | Flags.B, 3),
        (Run("a", [1]), {"name": "a", "sizes": [1], "best": None}),
        (Point(1, [Colour.RED]), (1, [1])),
        (Text("x"), "x"),
        ({Colour.RED, 5}, {1, 5}),
        ({Colour.RED, 1}, [1, 1]),
        ({Point(1, 2): 3}, {(1, 2): 3}),
        ({(Colour.RED, 0)}, {(1, 0)}),
    ],
    ids=repr,
)
def test_instance_without_a_live_one_becomes_plain(value, plain):
    """Nothing is imported or looked up by a name in a file."""
    found = values.decode(through_json(values.encode({"x": value})))["x"]
    if isinstance(plain, list):
        assert sorted(found) == plain
    else:
        assert same(found, plain)


def test_instances_that_cannot_be_keys_once_they_are_plain_make_lists():
    """The plain form of a frozen dataclass is a dict."""

    @dataclasses.dataclass(frozen=True)
    class Key:
        x: int

    found = values.decode(values.encode([{Key(1)}, {Key(1): 2}]))
    assert found == [[{"x": 1}], [({"x": 1}, 2)]]


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, object()]}, r"state\['a'\]\[1\]: "),
        ({"a": {3: object()}}, r"state\['a'\]\[3\]: "),
        ({(object(),): 1}, r"state: key \(<obj.*\[0\]: "),
        ({10**5000: 1}, r"state: key "),
        ((1, object()), r"state\[1\]: "),
        ([{1, object()}], r"state\[0\]: an item: "),
        (Run("a", [object()]), r"state\.sizes\[0\]: "),
        ([Point(1, object())], r"state\[0\]\.y: "),
        (SimpleNamespace(a=[object()]), r"state\.a\[0\]: "),
        (deque([0, object()]), r"state\[1\]: "),
        (defaultdict(int, {1: object()}), r"state\[1\]: "),
        ({"a": [{"b": 1}, {"b": object()}]}, r"state\['a'\]\[1\]\['b'\]: "),
    ],
    ids=lambda value: type(value).__name__,
)
def test_refused_value_is_named_by_its_path(value, path):
    """The message leads to the culprit."""
    with pytest.raises(UnsupportedError, match=f"^{path}"):
        values.encode(value, "state")


def test_value_that_contains_itself_is_refused():
    """An endless tree ends with a clear error."""
    value = []
    value.append(value)
    with pytest.raises(UnsupportedError, match="contain itself"):
        values.encode(value)


@pytest.mark.parametrize(
    "wrap",
    [
        *(lambda x: [x], lambda x: (x,), lambda x: {"k": x}, lambda x: {1: x}),
        *(lambda x: deque([x]), lambda x: frozenset([x]), lambda x: SimpleNamespace(k=x)),
        *(lambda x: slice(x, None), lambda x: defaultdict(int, {"k": x})),
    ],
    ids=[
        *("list", "tuple", "dict", "int-keys"),
        *("deque", "frozenset", "namespace", "slice", "defaultdict"),
    ],
)
def test_deepest_value_that_is_accepted_comes_back(wrap):
    """Whatever is accepted when saving can be read when restoring."""
    deepest = _deepest(wrap)
    assert same(values.decode(through_json(values.encode(deepest))), deepest)


def _try_encode(value):
    try:
        return values.encode(value)
    except UnsupportedError:
        return None


def _deepest(wrap):
    value = 0
    while _try_encode(wrap(value)) is not None:
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    "encoded",
    [
        {"$new": 1},
        {"$tuple": 1},
        {"$tuple": [], "a": 1},
        {"$dict": None},
        {"$dict": [[1]]},
        {"$dict": [[1, 2], [1, 3]]},
        {"$dict": [[[1], 2]]},
        {"$counter": [[1, 2], [True, 3]]},
        {"$bytes": "!"},
        {"$bytes": 3},
        {"$float": "1.5"},
        {"$float": 1},
        {"$tensor": 1},
        {"$numpy": ["<i4", "AAAA"]},
        {"$numpy": ["|O", "AAAAAAAAAAA="]},
        {"$numpy": ["<M8[s", "AAAAAAAAAAA="]},
        {"$numpy": ["<M8[s]", "AAAA"]},
        {"$array": ["<i4", [1], "C", "AAAA"]},
        {"$array": ["<i4", [1], "K", "AAAAAA=="]},
        {"$array": ["<i4", [-1], "C", ""]},
        {"$array": ["<i4", [2**61, 2**61], "C", ""]},
        {"$array": ["|O", [1], "C", "AAAAAAAAAAA="]},
        {"$array": ["<i4", [1], "C", {"$tensor": 1}]},
        {"$array": ["<i4", [1]]},
        {"$set": [[1]]},
        {"$set": [1, 1]},
        {"$set": 1},
        {"$frozenset": [{"a": 1}]},
        {"$complex": [1, 2]},
        {"$range": [1, 2]},
        {"$range": [1, 2, 0]},
        {"$slice": [1]},
        {"$deque": [[1, 2], 1]},
        {"$deque": [[1], "x"]},
        {"$deque": [[1], -1]},
        {"$defaultdict": ["os.system", []]},
        {"$defaultdict": ["int", [[1]]]},
        {"$namespace": ["Evil", []]},
        {"$namespace": ["Namespace", [[1, 2]]]},
        {"$bytearray": "!"},
        {"$path": ["PosixPath", 1]},
        {"$path": ["Evil", "x"]},
        {"$date": "2020"},
        {"$datetime": ["2020-01-01", 0]},
        {"$datetime": ["2020-01-01", 2, None]},
        {"$datetime": ["2020-01-01", 0, "utc"]},
        {"$timedelta": [10**12, 0, 0]},
        {"$timezone": [5]},
        {"$uuid": "x"},
        {"$decimal": "1 2"},
        {"$fraction": [1, 0]},
        {"$torch": ["system", "x"]},
        {"$torch": ["Size", ["x"]]},
        {"$torch": ["dtype", 1]},
        {"$enum": ["c"]},
        {"$enum": ["c", None]},
        {"$enum": [1, "n"]},
        {"$dataclass": ["c"]},
        {"$dataclass": ["c", [1]]},
        {"$dataclass": ["", {}]},
        {"$namedtuple": ["c", ["x"], [1, 2]]},
        {"$namedtuple": ["c", [1], [1]]},
        {"$scalar": ["c", [1]]},
        {"$scalar": ["c", True]},
        {"a": 1, "$b": 2},
        {"a": [{"b": {"$c": 1, "d": 2}}]},
        {"$numpy": ["i4,i4", "AAAAAAAAAAA="]},
        {"$numpy": ["(,,)i4", "AAAA"]},
        {"$numpy": ["garbage", "AAAA"]},
        {"$numpy": [4, "AAAA"]},
        {"$numpy": None},
        {1, 2},
        b"raw",
    ],
    ids=repr,
)
def test_encoded_value_that_encode_never_returns_is_refused(encoded):
    """A file of another version or a damaged one is not guessed at."""
    with pytest.raises(FormatError):
        values.decode(encoded)


def test_encoded_value_nested_for_ever_is_refused():
    """A hostile file cannot overflow the stack."""
    encoded = 0
    for _ in range(5000):
        encoded = [encoded]
    with pytest.raises(FormatError, match="too deeply"):
        values.decode(encoded)


def test_value_of_every_kind_can_be_exported():
    """As what a pickle says without classes of its own; nothing comes back as itself."""
    plain = (type(None), bool, int, float, str, bytes, list, tuple, dict, Counter)

    def are_plain(value):
        if isinstance(value, dict):
            return all(map(are_plain, [*value, *value.values()]))
        is_list = isinstance(value, (list, tuple))
        return type(value) in plain and (not is_list or all(map(are_plain, value)))

    for value in (*STANDARD, *ARRAYS, Counter("aab"), {1: (2, {3})}):
        tree = torch_save.to_tree(values.decode(values.encode(value)))
        found = pickle.loads(pickle_write.dumps(tree))
        assert are_plain(found), (value, found)
    assert torch_save.to_tree({1, 2}) == [1, 2]
    assert torch_save.to_tree(np.array(["2020-01-01"], "M8[D]")) == ["2020-01-01"]
    assert torch_save.to_tree(Decimal("1.10")) == "1.10"
