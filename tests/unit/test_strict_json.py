"""Only strict JSON comes in, and only strict JSON goes out."""

from __future__ import annotations

import json
import math
from contextlib import suppress

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import strict_json

MAX_EXAMPLES = examples(150)

_trees = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=MAX_EXAMPLES)
@given(tree=_trees)
def test_tree_written_and_read_is_the_same(tree):
    """What is written comes back, keys in order."""
    found = strict_json.loads(strict_json.dumps(tree).encode())
    assert repr(found) == repr(tree)


@settings(max_examples=MAX_EXAMPLES)
@given(tree=_trees)
def test_text_written_is_ascii_on_one_line(tree):
    """Formats that put one thing on a line can rely on it."""
    text = strict_json.dumps(tree)
    assert text.isascii()
    assert "\n" not in text


@settings(max_examples=MAX_EXAMPLES)
@given(
    data=st.binary(max_size=64)
    | st.text('{}[]",:0-1.eE+naNfIity\\u d8', max_size=24).map(str.encode)
)
def test_arbitrary_bytes_give_a_tree_or_json_error(data):
    """No other exception comes out."""
    with suppress(strict_json.JsonError):
        strict_json.loads(data)


_numbers = st.sampled_from(
    [
        *("1e999", "-1E+400", "1.5e999", "-0", "-0.0", "0e999", "-0e5", "1e308", "3e123"),
        *("x-0,", "9" * 400, "9" * 400 + ".0", "1e-999", "12"),
    ]
)


@settings(max_examples=2 * MAX_EXAMPLES)
@given(
    numbers=st.lists(_numbers, max_size=3),
    texts=st.lists(_numbers | st.just("0e1234ab"), max_size=3),
)
def test_reader_without_hooks_takes_what_the_one_with_hooks_takes(numbers, texts):
    """Whether a number is odd is told from the bytes; what looks so in a text is none."""
    joined = ",".join([*numbers, *map(json.dumps, texts)])
    data = f'{{"a": [{joined}], "b":{numbers[0] if numbers else 1}}}'.encode()
    found = []
    for decoder in (strict_json._FAST_DECODER, strict_json._DECODER):
        with pytest.MonkeyPatch.context() as patch:
            if decoder is strict_json._DECODER:
                patch.setattr(strict_json, "_may_hold_odd_numbers", lambda data: True)
            try:
                found.append(repr(strict_json.loads(data)))
            except strict_json.JsonError:
                found.append("error")
    assert found[0] == found[1]


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"{}{}",
        b"[1,]",
        b"{'a':1}",
        b'{"a":1,"a":1}',
        b'[{"b":{"a":1,"a":2}}]',
        b'{"a":1,"\\u0061":2}',
        b"NaN",
        b"[Infinity]",
        b"-Infinity",
        b"1e999",
        b"[-1e400]",
        b"-0",
        b"01",
        b"+1",
        b'"\x01"',
        b'"\xff"',
        b"\xef\xbb\xbf{}",
        b'"\xed\xa0\x80"',
        b"[" * 200_000,
        b'{"a":' * 200_000,
        b"9" * 10_000,
    ],
    ids=lambda data: repr(data[:24]),
)
def test_text_that_is_not_strict_json_is_refused(data):
    """Python's own reader takes or dies of many of these."""
    with pytest.raises(strict_json.JsonError):
        strict_json.loads(data)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, [math.nan]])
def test_number_that_json_lacks_is_not_written(value):
    """NaN never reaches a file by accident."""
    with pytest.raises(ValueError, match="JSON"):
        strict_json.dumps(value)


def test_key_that_stands_twice_is_named():
    """The message says which key."""
    with pytest.raises(strict_json.JsonError, match="'k' stands twice"):
        strict_json.loads(b'{"k":1,"j":2,"k":1}')


def test_negative_zero_float_keeps_its_sign():
    """Refusing the integer -0 does not touch the float."""
    assert math.copysign(1, strict_json.loads(b"-0.0")) == -1


def test_plain_json_of_another_writer_is_read():
    """Spaces and indents are fine where a format does not forbid them."""
    tree = {"a": [1, 2.5, None, True, "ä"]}
    assert strict_json.loads(json.dumps(tree, indent=2).encode()) == tree
