"""Plain values come back with their type and every bit, or are refused by path."""

from __future__ import annotations

import enum
import math
import struct
from collections import Counter, OrderedDict, defaultdict, namedtuple
from contextlib import suppress

import numpy as np
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from distckpt import strict_json, values
from distckpt.errors import FormatError, UnsupportedError
from distckpt.values import TensorRef

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
_leaves = (
    _keys
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


Point = namedtuple("Point", "x y")


class Colour(enum.IntEnum):
    RED = 1


class Text(str):
    pass


@pytest.mark.parametrize(
    "value",
    [
        {1, 2},
        object(),
        Point(1, 2),
        Colour.RED,
        Text("x"),
        defaultdict(int),
        np.zeros(2),
        np.datetime64("2020-01-01"),
        np.str_("x"),
        np.void(b"x"),
        bytearray(b"x"),
        1j,
        range(3),
        len,
        10**2000,
    ],
    ids=lambda value: type(value).__name__,
)
def test_value_whose_type_would_be_lost_is_refused(value):
    """A value that comes back as another type is a bug that shows weeks later."""
    with pytest.raises(UnsupportedError):
        values.encode(value)


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, {2}]}, r"state\['a'\]\[1\]: "),
        ({"a": {3: object()}}, r"state\['a'\]\[3\]: "),
        ({Text("k"): 1}, r"state: key 'k': "),
        ({10**5000: 1}, r"state: key "),
        ((1, np.zeros(2)), r"state\[1\]: "),
    ],
    ids=["list", "dict", "key", "huge-key", "tuple"],
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
    [lambda x: [x], lambda x: (x,), lambda x: {"k": x}, lambda x: {1: x}],
    ids=["list", "tuple", "dict", "int-keys"],
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
        {"$numpy": ["<M8[s]", "AAAAAAAAAAA="]},
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
