"""Pickles are read without running anything, and written so that Python reads them."""

from __future__ import annotations

import os
import pickle
from collections import OrderedDict
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distckpt.errors import UnsafeCheckpointError, UnsupportedError
from distckpt.formats import pickle_read, pickle_write
from distckpt.formats.pickle_tree import Call, Global, Reference

PROTOCOLS = (2, 3, 4, 5)
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**2000), 2**2000)
    | st.floats(allow_nan=False)
    | st.text(st.characters(exclude_categories=()))
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner)
        | st.lists(inner).map(tuple)
        | st.dictionaries(st.text() | st.integers(), inner)
    ),
    max_leaves=20,
)


class Everything:
    """Allows every name, and remembers them."""

    def __init__(self):
        self.seen = []

    def __contains__(self, name):
        self.seen.append(str(name))
        return True


class Runs:
    """What would run a function when Python's own reader loads it."""

    def __init__(self, function, *arguments):
        self.what = function, arguments

    def __reduce__(self):
        return self.what


@given(VALUES, st.sampled_from(PROTOCOLS))
def test_plain_values_are_read_as_python_reads_them(value, protocol):
    """Types too: 1, 1.0 and True are not the same."""
    found = pickle_read.loads(pickle.dumps(value, protocol), ())
    assert repr(found) == repr(value)


@given(VALUES)
def test_plain_values_are_written_so_that_python_reads_them(value):
    """And so that this reader does."""
    data = pickle_write.dumps(value)
    assert repr(pickle.loads(data)) == repr(value)
    assert repr(pickle_read.loads(data, ())) == repr(value)


@given(st.binary(max_size=300))
def test_bytes_that_are_no_pickle_are_refused_and_nothing_else_happens(data):
    """Whatever they are."""
    try:
        pickle_read.loads(data, ())
    except UnsafeCheckpointError:
        return
    assert data.endswith(b".")


@given(VALUES, st.data())
def test_damaged_pickles_are_refused_or_read_as_something(value, draw):
    """A byte may change what it says, but nothing else happens."""
    data = bytearray(pickle.dumps(value, draw.draw(st.sampled_from(PROTOCOLS))))
    data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
    with suppress(UnsafeCheckpointError):
        pickle_read.loads(bytes(data), ())


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize(
    ("value", "name"),
    [
        (Runs(os.system, "touch witness"), "posix.system"),
        (Runs(eval, "open('witness', 'w')"), "eval"),
        (Runs(exec, "open('witness', 'w')"), "exec"),
        ([{"deep": (Runs(os.system, "touch witness"),)}], "posix.system"),
        (Runs(getattr, "os", "system"), "getattr"),
        (os.system, "posix.system"),
        (Runs(OrderedDict, [("a", Runs(os.system, "touch witness"))]), "posix.system"),
    ],
)
def test_names_that_nobody_expects_are_refused_and_nothing_is_run(
    tmp_path, monkeypatch, value, name, protocol
):
    """Also inside of what is expected."""
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(value, protocol)
    with pytest.raises(UnsafeCheckpointError, match=name):
        pickle_read.loads(data, {Global("collections", "OrderedDict")})
    assert not os.listdir(tmp_path)


def test_allowed_names_are_only_named():
    """Nothing is imported, nothing is called."""
    everything = Everything()
    tree = pickle_read.loads(pickle.dumps(Runs(os.system, "exit 1"), 2), everything)
    assert isinstance(tree, Call)
    assert (str(tree.function), tree.arguments) == ("posix.system", ("exit 1",))
    assert everything.seen == ["posix.system"]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "not a whole pickle"),
        (b"\x80\x02", "not a whole pickle"),
        (b"\x80\x06N.", "protocol 6"),
        (b"N", "not a whole pickle"),
        (b"NN.", "does not end"),
        (b"N.N", "does not end"),
        (b"(.", "a mark where"),
        (b"t.", "without a mark"),
        (b"NNs.", "not a whole pickle"),
        (b"N(NNu.", "items for a NoneType"),
        (b"}(Nu.", "a key without a value"),
        (b"}(]Nu.", "a key that is none"),
        (b"N(Ne.", "entries for a NoneType"),
        (b"N)R.", "a call of what is no name"),
        (b"NNb.", "state for a NoneType"),
        (b"h\x00.", "nothing is remembered as 0"),
        (b"j\xff\xff\xff\xff.", "nothing is remembered"),
        (b"q\x00.", "not a whole pickle"),
        (b"(q\x00.", "nothing to remember"),
        (b"(N\x86.", "a tuple of too little"),
        (b"N\x86.", "a tuple of too little"),
        (b"\x8b\xff\xff\xff\x7f.", "an integer of"),
        (b"X\xff\xff\xff\xff.", "bytes at byte"),
        (b"\x8e\xff\xff\xff\xff\xff\xff\xff\xff.", "bytes at byte"),
        (b"X\x01\x00\x00\x00\xff.", "not a whole pickle"),
        (b"cos", "without an end"),
        (b"K\x01K\x02\x93.", "a name that is no text"),
        (b"iposix\nsystem\n.", "operation b'i'"),
        (b"oN.", "operation b'o'"),
        (b"\x82\x01.", "operation"),
        (b"Pname\n.", "operation b'P'"),
        (b"\x97.", "operation"),
    ],
)
def test_odd_pickles_are_refused_with_the_reason(data, reason):
    """Those that Python's reader might run, and those that are none."""
    with pytest.raises(UnsafeCheckpointError, match=reason):
        pickle_read.loads(data, ())


def test_huge_memo_numbers_take_no_memory():
    """Python's own reader makes a list that long."""
    assert pickle_read.loads(b"Nr\xff\xff\xff\x7f.", ()) is None


def test_calls_references_and_names_are_written_as_they_are_read():
    """One that stands twice is made once."""
    name = Global("torch", "float32")
    call = Call(Global("collections", "OrderedDict"), items=[("a", 1)], state={"x": 2})
    tree = {"name": name, "again": [name, call, call], "kept": Reference(("s", 1))}
    everything = Everything()
    found = pickle_read.loads(pickle_write.dumps(tree), everything)
    assert found["name"] == name
    first, second = found["again"][1:]
    assert first is second
    assert (first.items, first.state, first.is_new) == ([("a", 1)], {"x": 2}, False)
    assert found["kept"].key == ("s", 1)


def test_many_bytes_values_do_not_get_mixed_up():
    """Each is a call of its own, made on the way and gone again."""
    value = [bytes([i, 255]) for i in range(200)]
    assert pickle.loads(pickle_write.dumps(value)) == value


def test_a_value_without_a_place_in_a_pickle_is_refused():
    """By its type."""
    with pytest.raises(UnsupportedError, match="type object"):
        pickle_write.dumps([object()])
