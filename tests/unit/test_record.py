"""A record is valid as a whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_helpers import DIGEST, make_entry, make_record

from distckpt.errors import CorruptStateError, NewerFormatError
from distckpt.paths import Attempt
from distckpt.record import Entry, Record, digest

MAX_EXAMPLES = examples(50)

_hex8 = st.text("0123456789abcdef", min_size=8, max_size=8)
_hex16 = st.text("0123456789abcdef", min_size=16, max_size=16)
_hex32 = st.text("0123456789abcdef", min_size=32, max_size=32)
_times = st.floats(allow_nan=False, allow_infinity=False)


@st.composite
def records(draw):
    """Draw any valid record."""
    number = draw(st.integers(1, 10**6))
    epoch = draw(st.integers(1, 10**6))
    wanted = st.lists(
        st.tuples(st.integers(-(10**6), 10**12), _hex8),
        unique_by=(lambda pair: pair[0], lambda pair: pair[1]),
        max_size=8,
    )
    rules = draw(st.lists(st.text(max_size=10), max_size=3))
    reasons = st.lists(st.integers(0, len(rules) - 1), max_size=3) if rules else st.just([])
    metrics = st.dictionaries(
        st.text(min_size=1, max_size=8), st.none() | _times, max_size=3
    )
    entries = [
        Entry(
            Attempt("ckpt", wanted_number, draw(st.integers(0, epoch)), attempt),
            draw(st.integers(1, number)),
            draw(_times),
            draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
            draw(_hex32),
            size_bytes=draw(st.just(0) | st.integers(0, 2**62)),
            metrics=tuple(sorted(draw(metrics).items())),
            why=tuple(draw(reasons)),
        )
        for wanted_number, attempt in draw(wanted)
    ]
    cuts = sorted(draw(st.integers(0, len(entries))) for _ in range(3))
    return Record(
        number=number,
        previous=draw(_hex32) if number > 1 else "",
        chain=draw(_hex16),
        epoch=epoch,
        writer=draw(_hex16),
        run=draw(st.text(max_size=20)),
        restart=draw(st.integers(0, 10**6)),
        action=draw(st.sampled_from(["claim", "commit"])),
        written=draw(_times),
        live=tuple(entries[: cuts[0]]),
        kept=tuple(entries[cuts[0] : cuts[1]]),
        bad=tuple(entries[cuts[1] : cuts[2]]),
        releasing=tuple(entries[cuts[2] :]),
        last_preserved=draw(_times) if entries else draw(st.none() | _times),
        last_step=draw(st.none() | st.integers(-(2**63), 2**63 - 1)),
        rules=tuple(rules),
    )


SAMPLE = make_record(
    17,
    epoch=3,
    live=(make_entry(1, attempt="00000001"), make_entry(2, attempt="00000002", step=7)),
    kept=(make_entry(0, attempt="00000003"),),
    releasing=(make_entry(5, attempt="00000004"),),
    last_preserved=50.0,
    last_step=7,
)


@settings(max_examples=MAX_EXAMPLES)
@given(record=records())
def test_record_encoded_and_decoded_is_the_same(record):
    """The chief's memory comes back whole."""
    assert Record.decode(record.encode()) == record


@settings(max_examples=MAX_EXAMPLES)
@given(record=records())
def test_record_has_one_entry_a_line(record):
    """People can read and diff it."""
    lists = (record.live, record.kept, record.bad, record.releasing)
    lines = record.encode().decode("ascii").splitlines()
    assert sum('"manifest":' in line for line in lines) == sum(map(len, lists))


def _decodes_or_refuses(data):
    try:
        Record.decode(data)
    except CorruptStateError:
        return False
    except NewerFormatError:
        # Only what says so in its first field.
        assert not data.startswith(SAMPLE.encode()[: len('{\n"format": "2-provisional.3"')])
        return False
    return True


@settings(max_examples=examples(2) * MAX_EXAMPLES)
@given(data=st.binary(max_size=200))
def test_arbitrary_bytes_are_a_corrupt_state(data):
    """No other exception, and never a record."""
    assert not _decodes_or_refuses(data)


@settings(max_examples=examples(2) * MAX_EXAMPLES)
@given(data=st.data())
def test_record_with_a_piece_replaced_is_a_corrupt_state(data):
    """Cut, doubled, overwritten: never taken for a record."""
    whole = SAMPLE.encode()
    start = data.draw(st.integers(0, len(whole)))
    stop = data.draw(st.integers(start, len(whole)))
    middle = data.draw(st.binary(max_size=8) | st.just(whole[start:stop] * 2))
    mutated = whole[:start] + middle + whole[stop:]
    assert _decodes_or_refuses(mutated) == (mutated == whole)


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


@settings(max_examples=examples(2) * MAX_EXAMPLES)
@given(name=st.sampled_from(sorted(json.loads(SAMPLE.encode()))), value=_json)
def test_record_with_a_field_of_any_other_value_is_a_corrupt_state(name, value):
    """Whatever JSON stands in a field, one kind of error comes out."""
    tree = json.loads(SAMPLE.encode())
    tree[name] = value
    assert not _decodes_or_refuses(json.dumps(tree).encode())


def test_record_with_any_single_bit_flipped_is_a_corrupt_state():
    """Every bit of the file counts."""
    whole = SAMPLE.encode()
    for position in range(len(whole) * 8):
        flipped = bytearray(whole)
        flipped[position // 8] ^= 1 << position % 8
        assert not _decodes_or_refuses(bytes(flipped)), position


@pytest.mark.parametrize("size", range(0, len(SAMPLE.encode()), 7))
def test_record_cut_anywhere_is_a_corrupt_state(size):
    """A torn file is no record."""
    assert not _decodes_or_refuses(SAMPLE.encode()[:size])


@pytest.mark.parametrize("more", [b" ", b"\n", b"\0", b"{}"])
def test_record_with_bytes_behind_it_is_a_corrupt_state(more):
    """Only the exact bytes are the record."""
    assert not _decodes_or_refuses(SAMPLE.encode() + more)


def test_record_with_wrong_checksum_but_valid_fields_is_refused():
    """A plausible edit by hand is found out."""
    data = SAMPLE.encode().replace(b'"step":7', b'"step":8')
    with pytest.raises(CorruptStateError, match="checksum"):
        Record.decode(data)


@pytest.mark.parametrize(
    "fields",
    [
        {"number": 0},
        {"number": True},
        {"number": 2.0},
        {"number": 2**63},
        {"previous": ""},
        {"previous": "x" * 32},
        {"number": 1, "previous": DIGEST},
        {"chain": ""},
        {"chain": "C0FFEE00C0FFEE00"},
        {"epoch": 0},
        {"writer": None},
        {"run": 3},
        {"run": "x" * 257},
        {"restart": -1},
        {"action": "release"},
        {"action": None},
        {"written": 1},
        {"written": math.nan},
        {"written": math.inf},
        {"last_preserved": math.nan},
        {"last_preserved": math.inf},
        {"last_preserved": 5},
        {"last_step": 1.0},
        {"last_step": 2**63},
    ],
    ids=repr,
)
def test_record_with_this_field_is_refused(fields):
    """A record is checked when it is built, so none that is invalid is ever written."""
    with pytest.raises(CorruptStateError):
        make_record(**{"number": 2, **fields})


@pytest.mark.parametrize(
    "lists",
    [
        {"live": (make_entry(1), make_entry(1, attempt="ffffffff"))},
        {"live": (make_entry(1),), "kept": (make_entry(1, attempt="ffffffff"),)},
        {"live": (make_entry(1),), "bad": (make_entry(1),)},
        {"live": (make_entry(1),), "releasing": (make_entry(1),)},
        {"live": (make_entry(1, record=3),)},
        {"live": (make_entry(1, epoch=2),)},
        {"live": (make_entry(1),), "last_preserved": None},
        {"bad": (make_entry(1),), "last_preserved": None},
    ],
    ids=["prefix", "kept", "bad", "releasing", "record", "epoch", "clock", "bad-clock"],
)
def test_record_whose_lists_contradict_each_other_is_refused(lists):
    """What decides about deletion is never ambiguous."""
    with pytest.raises(CorruptStateError):
        make_record(2, **{"last_preserved": 1.0, **lists})


@pytest.mark.parametrize(
    "lists",
    [
        {"live": (make_entry(1),), "bad": (make_entry(1, attempt="ffffffff"),)},
        {"live": (make_entry(1),), "releasing": (make_entry(1, attempt="ffffffff"),)},
    ],
    ids=["bad", "releasing"],
)
def test_record_with_a_number_saved_again_is_accepted(lists):
    """The old attempt of a number may stand beside the new one while it goes."""
    assert make_record(2, last_preserved=1.0, **lists).live


@pytest.mark.parametrize(
    "fields",
    [
        {"record": 0},
        {"record": True},
        {"time": 1},
        {"time": math.nan},
        {"step": 1.5},
        {"step": 2**63},
        {"manifest": "x"},
        {"manifest": None},
        {"attempt": Attempt("ckpt", 10**19, 1, "0a0b0c0d")},
        {"attempt": Attempt("a b", 1, 1, "0a0b0c0d")},
        {"attempt": Attempt("ckpt", True, 1, "0a0b0c0d")},
    ],
    ids=repr,
)
def test_entry_with_this_field_is_refused(fields):
    """An entry that could not be read back is never written."""
    with pytest.raises(CorruptStateError):
        dataclasses.replace(make_entry(), **fields)


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        {},
        {**make_entry().to_json(), "more": 1},
        dict(reversed(make_entry().to_json().items())),
        {**make_entry().to_json(), "path": 3},
        {**make_entry().to_json(), "path": "ckpt-1"},
        {**make_entry().to_json(), "path": "../ckpt-1.e1-0a0b0c0d"},
    ],
    ids=repr,
)
def test_json_that_is_no_entry_is_refused(fields):
    """No path of a record can point outside the run directory."""
    with pytest.raises(CorruptStateError):
        Entry.from_json(fields)


def test_committed_is_ordered_by_commit_newest_first():
    """Not by number, not by list."""
    live = (make_entry(9, record=2), make_entry(1, record=5, attempt="00000001"))
    kept = (make_entry(4, record=3, attempt="00000002"),)
    record = make_record(5, live=live, kept=kept, last_preserved=1.0)
    assert [entry.attempt.number for entry in record.committed] == [1, 4, 9]


def test_has_committed_after_a_claim_alone_is_false():
    """A chain that never committed is a fresh start."""
    assert not make_record(1, action="claim").has_committed


@pytest.mark.parametrize(
    "fields",
    [
        {"size_bytes": -1},
        {"size_bytes": 1.0},
        {"metrics": (("b", 1.0), ("a", 1.0))},
        {"metrics": (("a", 1.0), ("a", 2.0))},
        {"metrics": (("a", 1),)},
        {"metrics": (("a", float("nan")),)},
        {"metrics": (("a", float("inf")),)},
        {"metrics": (("", 1.0),)},
        {"metrics": (("a" * 65, 1.0),)},
        {"metrics": tuple((f"{n:03}", 1.0) for n in range(33))},
        {"why": (-1,)},
        {"why": (True,)},
        {"why": (1.0,)},
    ],
)
def test_entry_with_such_remarks_is_refused(fields):
    with pytest.raises(CorruptStateError):
        dataclasses.replace(make_entry(), **fields)


def test_record_with_a_reason_that_is_no_rule_of_it_is_refused():
    entry = dataclasses.replace(make_entry(), why=(1,))
    make_record(2, live=(entry,), last_preserved=1.0, rules=("a", "b"))
    with pytest.raises(CorruptStateError, match="reasons"):
        make_record(2, live=(entry,), last_preserved=1.0, rules=("a",))


@pytest.mark.parametrize("size", [0, 1, 100])
def test_entry_takes_at_most_170_bytes(size):
    """Lists of thousands stay small: entries of a long run with large numbers."""
    entries = tuple(
        Entry(
            Attempt("ckpt", 10_000_000 + i, 1234, f"{i:08x}"),
            1_000_000 + i,
            1_700_000_000.123457 + i,
            10_000_000 + i,
            DIGEST,
            size_bytes=1_000_000_000_000,
        )
        for i in range(size)
    )
    record = make_record(2_000_000, epoch=2000, live=entries, last_preserved=1.0)
    empty = make_record(2_000_000, epoch=2000, last_preserved=1.0)
    assert len(record.encode()) - len(empty.encode()) <= 170 * size + 3


def test_digest_is_32_hexadecimal_digits():
    """Digests of records, manifests and headers look alike."""
    assert len(digest(b"x")) == 32
    assert int(digest(b"x"), 16) >= 0
