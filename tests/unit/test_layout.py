"""Who writes what: every element exactly once, evenly, and the same on every rank."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import layout
from distckpt.boxes import Box
from distckpt.errors import ManifestError
from distckpt.layout import SPLIT, WHOLE, Assignment, Row, check_table

MAX_EXAMPLES = 60

_dtypes = st.sampled_from(["float32", "uint8", "float64", "bfloat16", "complex128"])
# Up to 4 MB: large enough to be cut, small enough to count element by element.
_shapes = st.one_of(
    st.lists(st.integers(0, 7), max_size=3),
    st.tuples(st.integers(1, 600), st.integers(1, 300)),
    st.tuples(st.integers(1, 3), st.integers(1, 40), st.integers(1, 900)),
    st.tuples(st.integers(1, 200_000)),
).map(tuple)


@st.composite
def _jobs(draw):
    """Random rows, each named by a random set of tables; random ranks per table."""
    num_tables = draw(st.integers(1, 3))
    world_size = draw(st.integers(num_tables, 9))
    table_of_rank = list(range(num_tables)) + [
        draw(st.integers(0, num_tables - 1)) for _ in range(world_size - num_tables)
    ]
    table_of_rank = draw(st.permutations(table_of_rank))
    tables = [[] for _ in range(num_tables)]
    for index in range(draw(st.integers(1, 5))):
        row = Row(
            f"t{index}", draw(_dtypes), draw(_shapes), draw(st.sampled_from([SPLIT, WHOLE]))
        )
        holders = draw(st.sets(st.integers(0, num_tables - 1), min_size=1))
        for holder in holders:
            tables[holder].append(row)
    return [tuple(rows) for rows in tables], table_of_rank


def region(box):
    return tuple(
        slice(start, start + length)
        for start, length in zip(box.offset, box.shape, strict=True)
    )


@settings(max_examples=MAX_EXAMPLES)
@given(job=_jobs())
def test_every_element_of_every_tensor_is_written_exactly_once(job):
    """No hole, no overlap, whatever the tables."""
    tables, table_of_rank = job
    assignment = Assignment(tables, table_of_rank)
    for name, row in assignment.rows.items():
        count = np.zeros(row.shape, np.uint8)
        for rank in range(len(table_of_rank)):
            for piece in assignment.pieces_of_rank(rank):
                if piece.row.name == name:
                    count[region(piece.box)] += 1
        assert (count == 1).all(), name


@settings(max_examples=MAX_EXAMPLES)
@given(job=_jobs())
def test_no_rank_writes_a_tensor_that_its_table_does_not_name(job):
    """What a rank does not hold it cannot write."""
    tables, table_of_rank = job
    assignment = Assignment(tables, table_of_rank)
    for rank, index in enumerate(table_of_rank):
        named = {row.name for row in tables[index]}
        assert {piece.row.name for piece in assignment.pieces_of_rank(rank)} <= named


@settings(max_examples=MAX_EXAMPLES)
@given(job=_jobs())
def test_pieces_of_a_tensor_are_those_of_the_ranks(job):
    """Saving and restoring see the same plan."""
    tables, table_of_rank = job
    assignment = Assignment(tables, table_of_rank)
    by_name = {
        (piece.row.name, piece.box, piece.rank)
        for name in assignment.rows
        for piece in assignment.pieces_of(name)
    }
    by_rank = {
        (piece.row.name, piece.box, rank)
        for rank in range(len(table_of_rank))
        for piece in assignment.pieces_of_rank(rank)
    }
    assert by_name == by_rank


@settings(max_examples=MAX_EXAMPLES)
@given(job=_jobs())
def test_tensor_of_at_most_64_kib_is_never_cut(job):
    """A small tensor is one entry of one file."""
    tables, table_of_rank = job
    assignment = Assignment(tables, table_of_rank)
    for name, row in assignment.rows.items():
        if row.size_bytes <= 64 * 1024:
            assert len(assignment.pieces_of(name)) == 1


@settings(max_examples=MAX_EXAMPLES)
@given(job=_jobs())
def test_pieces_of_one_rank_and_tensor_are_few(job):
    """At most two boxes a dimension, so that headers stay small."""
    tables, table_of_rank = job
    assignment = Assignment(tables, table_of_rank)
    for name, row in assignment.rows.items():
        ranks = [piece.rank for piece in assignment.pieces_of(name)]
        limit = max(1, 2 * len(row.shape) - 1)
        assert all(ranks.count(rank) <= limit for rank in ranks)


def gpt2_small():
    """List the parameters of GPT-2 small with AdamW's state, as rows."""
    shapes = {"wte.weight": (50257, 768), "wpe.weight": (1024, 768)}
    for block in range(12):
        shapes |= {
            f"h.{block}.ln_1.weight": (768,),
            f"h.{block}.ln_1.bias": (768,),
            f"h.{block}.attn.c_attn.weight": (768, 2304),
            f"h.{block}.attn.c_attn.bias": (2304,),
            f"h.{block}.attn.c_proj.weight": (768, 768),
            f"h.{block}.attn.c_proj.bias": (768,),
            f"h.{block}.ln_2.weight": (768,),
            f"h.{block}.ln_2.bias": (768,),
            f"h.{block}.mlp.c_fc.weight": (768, 3072),
            f"h.{block}.mlp.c_fc.bias": (3072,),
            f"h.{block}.mlp.c_proj.weight": (3072, 768),
            f"h.{block}.mlp.c_proj.bias": (768,),
        }
    shapes |= {"ln_f.weight": (768,), "ln_f.bias": (768,)}
    kinds = ("model", "optimizer/exp_avg", "optimizer/exp_avg_sq")
    return tuple(
        Row(f"{kind}/{name}", "float32", shape, SPLIT)
        for kind in kinds
        for name, shape in shapes.items()
    )


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_gpt2_over_replicas_is_balanced_within_three_percent(world_size):
    """No rank is the one that all wait for."""
    assignment = Assignment([gpt2_small()], [0] * world_size)
    loads = [
        sum(piece.size_bytes for piece in assignment.pieces_of_rank(rank))
        for rank in range(world_size)
    ]
    fair = sum(loads) / world_size
    assert max(abs(load - fair) for load in loads) <= 0.03 * fair


@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_gpt2_over_replicas_is_cut_at_the_borders_only(world_size):
    """Nearly all tensors lie in one file."""
    table = gpt2_small()
    assignment = Assignment([table], [0] * world_size)
    cut = [row.name for row in table if len(assignment.pieces_of(row.name)) > 1]
    assert len(cut) <= world_size - 1


def test_split_cut_falls_on_a_multiple_of_the_grain():
    """A border moves to the nearest whole sub-array of at most 64 KiB."""
    row = Row("w", "float32", (1000, 100, 100), SPLIT)
    assignment = Assignment([(row,)], [0, 0, 0])
    starts = [piece.box.offset[0] for piece in assignment.pieces_of("w")]
    assert starts == [0, 333, 667]
    assert all(piece.box.shape[1:] == (100, 100) for piece in assignment.pieces_of("w"))


def test_whole_row_is_written_by_the_lowest_rank_that_names_it():
    """Buffers may differ between replicas: one rank's value counts."""
    row = Row("running_mean", "float32", (8,), WHOLE)
    assignment = Assignment([(), (row,)], [0, 1, 0, 1])
    assert [piece.rank for piece in assignment.pieces_of("running_mean")] == [1]


def test_replica_groups_share_their_own_tensors_only():
    """Two groups of replicas, each of its own half: every rank writes half of a half."""
    first = Row("first", "uint8", (2**20,), SPLIT)
    second = Row("second", "uint8", (2**20,), SPLIT)
    assignment = Assignment([(first,), (second,)], [0, 1, 0, 1])
    found = {
        rank: [(piece.row.name, piece.box) for piece in assignment.pieces_of_rank(rank)]
        for rank in range(4)
    }
    low, high = Box((0,), (2**19,)), Box((2**19,), (2**19,))
    assert found == {
        0: [("first", low)],
        2: [("first", high)],
        1: [("second", low)],
        3: [("second", high)],
    }


def test_tensor_that_all_tables_name_is_shared_by_all_ranks():
    """Tables that differ elsewhere still share what they have in common."""
    shared = Row("shared", "uint8", (4 * 2**20,), SPLIT)
    own = Row("own", "uint8", (1,), SPLIT)
    assignment = Assignment([(shared,), (own, shared)], [0, 1, 1, 0])
    assert [piece.rank for piece in assignment.pieces_of("shared")] == [0, 1, 2, 3]


def test_assignment_does_not_depend_on_how_tables_are_numbered():
    """Whoever numbers the tables, the plan is the same."""
    first = (Row("a", "uint8", (2**20,), SPLIT), Row("b", "uint8", (2**20,), SPLIT))
    second = (first[1], Row("c", "uint8", (2**20,), SPLIT))
    one = Assignment([first, second], [0, 1, 0, 1])
    other = Assignment([second, first], [1, 0, 1, 0])
    for rank in range(4):
        assert one.pieces_of_rank(rank) == other.pieces_of_rank(rank)


def test_same_as_row_is_written_by_nobody_and_found_with_its_other():
    """Tied weights take no second place on the disk."""
    table = (
        Row("embedding", "float32", (8, 4), SPLIT),
        Row("head", "float32", (8, 4), SPLIT, same_as="embedding"),
    )
    assignment = Assignment([table], [0, 0])
    assert assignment.pieces_of("head") == assignment.pieces_of("embedding")
    written = [p.row.name for rank in (0, 1) for p in assignment.pieces_of_rank(rank)]
    assert written == ["embedding"]


@pytest.mark.parametrize(
    ("row", "text"),
    [
        (Row("w", "float32", (5,), SPLIT), r"float32 \[5\] \(split\) on ranks 1, 3"),
        (Row("w", "float64", (4,), SPLIT), r"float64 \[4\] \(split\) on ranks 1, 3"),
        (Row("w", "float32", (4,), WHOLE), r"float32 \[4\] \(whole\) on ranks 1, 3"),
    ],
    ids=["shape", "dtype", "kind"],
)
def test_row_that_differs_between_ranks_is_refused_by_name(row, text):
    """The message names the tensor, both descriptions and the ranks."""
    known = Row("w", "float32", (4,), SPLIT)
    expected = rf"'w' differs between ranks: float32 \[4\] \(split\) on ranks 0, 2, {text}"
    with pytest.raises(ManifestError, match=expected):
        Assignment([(known,), (row,)], [0, 1, 0, 1])


def test_differing_row_on_many_ranks_names_some_and_counts_all():
    """The message stays readable at scale."""
    tables = [(Row("w", "uint8", (1,), SPLIT),), (Row("w", "uint8", (2,), SPLIT),)]
    with pytest.raises(ManifestError, match=r"7, \.\.\. \(500 ranks\)"):
        Assignment(tables, [0] * 500 + [1] * 500)


@pytest.mark.parametrize(
    "table",
    [
        (Row("a", "uint8", (1,), SPLIT), Row("a", "uint8", (1,), SPLIT)),
        (Row("a", "uint8", (1,), SPLIT, same_as="b"),),
        (Row("a", "uint8", (1,), SPLIT, same_as="a"),),
        (Row("b", "uint8", (2,), SPLIT), Row("a", "uint8", (1,), SPLIT, same_as="b")),
        (Row("b", "int8", (1,), SPLIT), Row("a", "uint8", (1,), SPLIT, same_as="b")),
        (
            Row("a", "uint8", (1,), SPLIT),
            Row("b", "uint8", (1,), SPLIT, same_as="a"),
            Row("c", "uint8", (1,), SPLIT, same_as="b"),
        ),
    ],
    ids=["twice", "nothing", "itself", "shape", "dtype", "chain"],
)
def test_table_that_contradicts_itself_is_refused(table):
    """A table is checked before anything is read by it."""
    with pytest.raises(ManifestError):
        check_table(table)


@pytest.mark.parametrize(
    "fields",
    [
        ("", "uint8", (1,), SPLIT),
        ("x" * 5000, "uint8", (1,), SPLIT),
        ("x\ud800", "uint8", (1,), SPLIT),
        ("x", "quint8", (1,), SPLIT),
        ("x", "uint8", (1,), "shared"),
        ("x", "uint8", (-1,), SPLIT),
        ("x", "uint8", (1,) * 65, SPLIT),
        ("x", "uint8", (2**62, 2), SPLIT),
        ("x", "float64", (2**60,), SPLIT),
        ("x", "uint8", (2**40, 2**40, 0), SPLIT),
        ("x", "uint8", (10**4000, 10**4000), SPLIT),
    ],
    ids=lambda fields: repr(fields)[:40],
)
def test_row_that_cannot_be_is_refused(fields):
    """Nothing of an impossible size or name ever reaches arithmetic or a file."""
    with pytest.raises(ManifestError):
        Row(*fields)


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        ["x", "uint8", [1]],
        ["x", "uint8", [1], SPLIT, "", ""],
        [1, "uint8", [1], SPLIT],
        ["x", "uint8", 1, SPLIT],
        ["x", "uint8", [1.0], SPLIT],
        ["x", "uint8", [True], SPLIT],
        ["x", "uint8", [1], SPLIT, None],
        {"name": "x"},
    ],
    ids=repr,
)
def test_json_that_is_no_row_is_refused(fields):
    """A manifest's table is checked field by field."""
    with pytest.raises(ManifestError):
        Row.from_json(fields)


@pytest.mark.parametrize(
    "row",
    [
        Row("w", "float32", (3, 4), SPLIT),
        Row("w", "float32", (), WHOLE),
        Row("v", "float32", (3,), WHOLE, same_as="w"),
    ],
    ids=lambda row: row.name + row.kind,
)
def test_row_through_json_comes_back_the_same(row):
    """What a manifest says of a tensor is what was meant."""
    assert Row.from_json(row.to_json()) == row


def test_size_of_a_row_counts_bytes():
    """Sizes are in bytes of the true dtype."""
    assert Row("w", "complex128", (3, 5), SPLIT).size_bytes == 3 * 5 * 16


def test_grain_is_what_the_format_says():
    """The cut is part of the format: changing it needs a new version."""
    assert layout._GRAIN_BYTES == 64 * 1024
