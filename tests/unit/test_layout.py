"""Who writes what: every element exactly once, evenly, and the same on every rank."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import layout, sharding, strict_json
from distckpt.boxes import Box, overlap, whole
from distckpt.errors import ManifestError
from distckpt.layout import (
    SHARDED,
    SPLIT,
    WHOLE,
    Assignment,
    Piece,
    Row,
    Table,
    assignment_of,
)
from distckpt.sharding import Sharding, mesh_of

MAX_EXAMPLES = examples(60)

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
        (Row("w", "float32", (5,), SPLIT), r"float32 \[5\] on ranks 1, 3"),
        (Row("w", "float64", (4,), SPLIT), r"float64 \[4\] on ranks 1, 3"),
    ],
    ids=["shape", "dtype"],
)
def test_row_that_differs_between_ranks_is_refused_by_name(row, text):
    """The message names the tensor, both descriptions and the ranks."""
    known = Row("w", "float32", (4,), SPLIT)
    expected = rf"'w' differs between ranks: float32 \[4\] on ranks 0, 2, {text}"
    with pytest.raises(ManifestError, match=expected):
        Assignment([(known,), (row,)], [0, 1, 0, 1])


def test_row_of_another_kind_is_refused_with_both_kinds():
    """How it lies on the ranks is told where that is what differs."""
    rows = Row("w", "float32", (4,), SPLIT), Row("w", "float32", (4,), WHOLE)
    expected = r"\[4\] \(split\) on rank 0, float32 \[4\] \(whole\) on rank 1"
    with pytest.raises(ManifestError, match=expected):
        Assignment([rows[:1], rows[1:]], [0, 1])


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
        Table(table)


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


def text_of(row, shardings=()):
    """Spell a table of one row as a table is spelled."""
    listed = strict_json.lines([strict_json.dumps(one) for one in shardings])
    return f'{{"shardings":{listed},"rows":[\n {strict_json.dumps(row)}\n]}}'


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        ["x", "uint8", [1]],
        ["x", "uint8", [1], SPLIT, "", ""],
        ["x", "uint8", [1], SPLIT, ""],
        [1, "uint8", [1], SPLIT],
        ["x", 1, [1], SPLIT],
        ["x", ["uint8"], [1], SPLIT],
        ["x", "quint8", [1], SPLIT],
        ["x", "uint8", 1, SPLIT],
        ["x", "uint8", "1", SPLIT],
        ["x", "uint8", [1.0], SPLIT],
        ["x", "uint8", [True], SPLIT],
        ["x", "uint8", ["1"], SPLIT],
        ["x", "uint8", [[1]], SPLIT],
        ["x", "uint8", [10**4000], SPLIT],
        ["x", "uint8", [1], SPLIT, None],
        ["x", "uint8", [1], "shared"],
        ["x", "uint8", [1], SHARDED],
        ["x", "uint8", [1], 0],
        ["x", "uint8", [1], -1],
        ["x", "uint8", [1], False],
        ["x", "uint8", [1], None],
        ["x", "uint8", [1], [SPLIT]],
        {"name": "x"},
        {"name": "x", "dtype": "uint8", "shape": [1], "kind": SPLIT},
        "abcd",
    ],
    ids=lambda fields: repr(fields)[:40],
)
def test_json_that_is_no_row_is_refused(fields):
    """A manifest's table is checked field by field."""
    assert Table.from_text(text_of(["x", "uint8", [1], SPLIT]))
    with pytest.raises(ManifestError):
        Table.from_text(text_of(fields))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "null",
        "[]",
        "{}",
        '{"shardings":[]}',
        '{"shardings":[],"rows":{}}',
        '{"shardings":{},"rows":[]}',
        '{"rows":[],"shardings":[]}',
        '{"shardings":[],"rows":[],"more":1}',
        '{"shardings":[],"rows":[],"rows":[]}',
        '{"shardings":[], "rows":[]}',
        '{"shardings":[],"rows":[]}\n',
        '{"shardings":[],"rows":[["w","uint8",[1],"split"]]}',
        '{"shardings":[],"rows":[\n ["w","uint8",[-0],"split"]\n]}',
        '{"shardings":[],"rows":[\n ["w","uint8",[NaN],"split"]\n]}',
        '{"shardings":[],"rows":[\n ["w","uint8",[1e999],"split"]\n]}',
        '{"shardings":[],"rows":[\n ["\\u0077","uint8",[1],"split"]\n]}',
        '{"shardings":[],"rows":[\n ["\\ud800","uint8",[1],"split"]\n]}',
        '{"shardings":[],"rows":[\n ["w\u00e9","uint8",[1],"split"]\n]}',
        "[" * 100_000,
    ],
    ids=lambda text: text[:60],
)
def test_text_that_is_no_table_s_is_refused(text):
    """Only one text stands for each table, so equal digests mean equal tables."""
    with pytest.raises(ManifestError):
        Table.from_text(text)


def test_row_like_one_before_it_is_checked_as_that_was():
    """Rows of one shape are recognised; what merely compares equal is not the same."""
    good = '["v","uint8",[1],"split"]'
    for bad in (
        '["w","uint8",[true],"split"]',
        '["w","uint8",[1.0],"split"]',
        '["","uint8",[1],"split"]',
        '["\\ud800","uint8",[1],"split"]',
        '["v","uint8",[1],"split"]',
    ):
        for first, second in ((good, bad), (bad, good)):
            with pytest.raises(ManifestError):
                Table.from_text(f'{{"shardings":[],"rows":[\n {first},\n {second}\n]}}')


@pytest.mark.parametrize(
    "row",
    [
        Row("w", "float32", (3, 4), SPLIT),
        Row("w", "float32", (), WHOLE),
        Row('\n"é]}', "float32", (2,), SPLIT),
    ],
    ids=lambda row: row.kind,
)
def test_row_through_text_comes_back_the_same(row):
    """What a manifest says of a tensor is what was meant."""
    table = Table([row, row.named("v", same_as=row.name)])
    layout._decoded = layout._Decoded()
    found = Table.from_text(table.text)
    assert found == table
    assert found is not table


@settings(max_examples=MAX_EXAMPLES)
@given(job=_jobs())
def test_table_through_text_comes_back_the_same(job):
    """Digests are those of the text, so they tell tables apart."""
    tables = [Table(rows) for rows in job[0]]
    for one in tables:
        assert Table.from_text(one.text) == one
        for other in tables:
            assert (one.digest == other.digest) is (one == other)


def test_table_that_was_decoded_lately_is_the_same_object():
    """Restoring twice, or from the last save's successor, decodes nothing again."""
    text = Table([Row("w", "float32", (3, 4), SPLIT)]).text
    assert Table.from_text(text) is Table.from_text("".join(text))


def test_decoded_tables_are_forgotten_when_there_is_much_of_them(monkeypatch):
    """They must not fill the memory of a process that reads many checkpoints."""
    monkeypatch.setattr(layout, "_decoded", layout._Decoded())
    tables = [Table([Row(f"w{i}", "float32", (3, 4), SPLIT)]) for i in range(4)]
    monkeypatch.setattr(layout, "_MAX_DECODED_LENGTH", 2 * len(tables[0].text))
    found = [Table.from_text(table.text) for table in tables]
    known = [layout._decoded.get(table.text) for table in tables]
    assert known == [None, None, *found[2:]]


def test_assignment_of_equal_tables_is_the_same_object():
    """Whoever asks: a save, or a restore of what it wrote."""
    rows = [Row("w", "float32", (3, 4), SPLIT)]
    first = assignment_of([Table(rows)], [0, 0])
    assert assignment_of([Table(rows)], [0, 0]) is first
    assert assignment_of([Table(rows)], [0, 0, 0]) is not first


def test_assignment_that_threads_share_answers_each_as_if_alone():
    """Two managers of one process may plan the same tables at the same time."""
    mesh = mesh_of((4, 2), range(8))
    rows = [sharded(f"w{i}", (64 + i, 640), mesh, ["R", "S0"]) for i in range(40)]
    table = Table([*rows, Row("plain", "float32", (640, 640), SPLIT)])

    def plan(assignment):
        return [assignment.pieces_of_rank(rank) for rank in range(8)], [
            assignment.pieces_of(row.name) for row in table
        ]

    alone = plan(Assignment([table], [0] * 8))
    for _ in range(5):
        together = Assignment([table], [0] * 8)
        with ThreadPoolExecutor(4) as pool:
            found = [pool.submit(plan, together) for _ in range(4)]
        assert all(one.result() == alone for one in found)


def test_row_named_otherwise_is_checked_by_its_name():
    """The rest was checked when the first one was made."""
    row = Row("w", "float32", (3, 4), SPLIT)
    assert row.named("v", "w") == Row("v", "float32", (3, 4), SPLIT, "w")
    for name in ("", "x" * 5000, "\ud800"):
        with pytest.raises(ManifestError):
            row.named(name)


def test_piece_knows_its_size_and_whether_it_is_all():
    """A part of a row, and a row."""
    row = Row("w", "float64", (3, 4), SPLIT)
    part, all_of_it = Piece(row, Box((1, 0), (2, 4)), 5), Piece(row, whole((3, 4)), 5)
    assert (part.size_bytes, part.is_whole) == (64, False)
    assert (all_of_it.size_bytes, all_of_it.is_whole) == (96, True)


def test_size_of_a_row_counts_bytes():
    """Sizes are in bytes of the true dtype."""
    assert Row("w", "complex128", (3, 5), SPLIT).size_bytes == 3 * 5 * 16


def test_grain_is_what_the_format_says():
    """The cut is part of the format: changing it needs a new version."""
    assert layout._GRAIN_BYTES == 64 * 1024


# Sharded rows


def sharded(name, shape, mesh, placements, dtype="float32", same_as=""):
    return Row(name, dtype, shape, SHARDED, same_as, Sharding(mesh, tuple(placements)))


@st.composite
def _sharded_jobs(draw):
    """Random rows of all kinds; sharded ones on all ranks, some, or in separate halves."""
    world_size = draw(st.sampled_from([1, 2, 4, 6, 8]))
    half = max(1, world_size // 2)
    groups = [range(world_size)]
    if world_size > 1:
        groups = [range(half), range(half, 2 * half)]
    tables = [[] for _ in groups]
    for index in range(draw(st.integers(1, 6))):
        name, shape, dtype = f"t{index}", draw(_shapes), draw(_dtypes)
        kind = draw(st.sampled_from(["replicated", "all", "some", "separate", "separate"]))
        if kind == "replicated":
            for table in tables:
                table.append(Row(name, dtype, shape, SPLIT))
            continue
        ranks = range(world_size)
        if kind == "some":
            ranks = sorted(draw(st.sets(st.sampled_from(list(ranks)), min_size=1)))
        members = groups if kind == "separate" else [ranks] * len(groups)
        size = len(members[0])
        mesh_shape = draw(
            st.sampled_from([(size,)] + [(n, size // n) for n in (2, 3) if size % n == 0])
        )
        known = ["R", *(f"{kind}{dim}" for kind in "SST" for dim in range(len(shape)))]
        placements = [draw(st.sampled_from(known)) for _ in mesh_shape]
        if sharding.why_not(placements, len(mesh_shape), len(shape)):
            placements = ["R"] * len(mesh_shape)
        for table, own in zip(tables, members, strict=True):
            mesh = mesh_of(mesh_shape, list(own))
            table.append(sharded(name, shape, mesh, placements, dtype))
    table_of_rank = [
        next((i for i, group in enumerate(groups) if rank in group), 0)
        for rank in range(world_size)
    ]
    return [tuple(rows) for rows in tables], table_of_rank


def _held(tables, table_of_rank, rank, name):
    """Return the box that a rank holds of a tensor; None for none."""
    for row in tables[table_of_rank[rank]]:
        if row.name == name and row.sharding is not None:
            coordinate = row.sharding.coordinate_of(rank)
            return coordinate and row.sharding.box_at(row.shape, coordinate)
        if row.name == name:
            return whole(row.shape)
    return None


@settings(max_examples=examples(2) * MAX_EXAMPLES)
@given(job=_sharded_jobs())
def test_every_element_of_sharded_tensors_is_written_once_by_a_rank_that_holds_it(job):
    """Whatever the meshes: no hole, no overlap, nothing that a rank does not have."""
    tables, table_of_rank = job
    assignment = Assignment(tables, table_of_rank)
    pieces = [p for r in range(len(table_of_rank)) for p in assignment.pieces_of_rank(r)]
    for name, row in assignment.rows.items():
        count = np.zeros(row.shape, np.uint8)
        own = [piece for piece in pieces if piece.row.name == name]
        for piece in own:
            count[region(piece.box)] += 1
            held = _held(tables, table_of_rank, piece.rank, name)
            assert held is not None
            assert row.size_bytes == 0 or overlap(held, piece.box) == piece.box
        assert (count == 1).all(), name
        assert own, name
        assert len(own) == 1 or all(piece.box.size for piece in own)
        found = assignment.pieces_of(name)
        assert sorted(found, key=repr) == sorted(own, key=repr)


@settings(max_examples=MAX_EXAMPLES)
@given(job=_sharded_jobs(), data=st.data())
def test_pieces_in_a_box_are_those_that_overlap_it(job, data):
    """What a restore opens is what it needs, found without looking at all boxes."""
    tables, table_of_rank = job
    everything = Assignment(tables, table_of_rank)
    assignment = Assignment(tables, table_of_rank)
    for name, row in assignment.rows.items():
        offset = tuple(data.draw(st.integers(0, length)) for length in row.shape)
        box = Box(
            offset,
            tuple(
                data.draw(st.integers(0, length - start))
                for start, length in zip(offset, row.shape, strict=True)
            ),
        )
        expected = [p for p in everything.pieces_of(name) if overlap(p.box, box)]
        assert assignment.pieces_of(name, box) == expected


@settings(max_examples=MAX_EXAMPLES)
@given(job=_sharded_jobs())
def test_plan_does_not_depend_on_who_is_asked_for_first(job):
    """Ranks work out their own part alone, and must come to the same whole."""
    tables, table_of_rank = job
    ranks = range(len(table_of_rank))
    upwards, downwards = (Assignment(tables, table_of_rank) for _ in range(2))
    first = {rank: upwards.pieces_of_rank(rank) for rank in ranks}
    assert first == {rank: downwards.pieces_of_rank(rank) for rank in reversed(ranks)}


def test_fully_sharded_rank_writes_its_own_box():
    """FSDP2: what a rank holds is in its file, uneven lengths included."""
    row = sharded("w", (5, 3), mesh_of((4,), range(4)), ["S0"])
    assignment = Assignment([(row,)], [0] * 4)
    found = [[p.box for p in assignment.pieces_of_rank(rank)] for rank in range(4)]
    boxes = [Box((0, 0), (2, 3)), Box((2, 0), (2, 3)), Box((4, 0), (1, 3))]
    assert found == [[boxes[0]], [boxes[1]], [boxes[2]], []]


def test_hybrid_replicas_share_the_boxes_that_they_both_hold():
    """HSDP: of each box, and of all boxes of one set of ranks together, a half each."""
    mesh = mesh_of((2, 2), range(4))
    table = tuple(sharded(f"w{i}", (2**20,), mesh, ["R", "S0"], "uint8") for i in range(2))
    assignment = Assignment([table], [0] * 4)
    found = {
        rank: [(p.row.name, p.box) for p in assignment.pieces_of_rank(rank)]
        for rank in range(4)
    }
    low, high = Box((0,), (2**19,)), Box((2**19,), (2**19,))
    assert found == {
        0: [("w0", low)],
        2: [("w1", low)],
        1: [("w0", high)],
        3: [("w1", high)],
    }


def test_replicated_on_a_mesh_is_shared_with_what_is_split():
    """Tensors that all ranks hold are one pile, sharded by name or not."""
    mesh = mesh_of((2,), range(2))
    table = (
        Row("plain", "uint8", (2**20,), SPLIT),
        sharded("distributed", (2**20,), mesh, ["R"], "uint8"),
    )
    assignment = Assignment([table], [0, 0])
    names = [[p.row.name for p in assignment.pieces_of_rank(rank)] for rank in (0, 1)]
    assert names == [["plain"], ["distributed"]]


def test_separate_meshes_of_one_tensor_hold_copies_and_share_the_work():
    """Tensor parallelism in each of two data-parallel halves: both write half."""
    meshes = [mesh_of((2,), [0, 1]), mesh_of((2,), [2, 3])]
    tables = [(sharded("w", (4, 2**18), mesh, ["S0"], "uint8"),) for mesh in meshes]
    assignment = Assignment(tables, [0, 0, 1, 1])
    starts = [[p.box.offset for p in assignment.pieces_of_rank(rank)] for rank in range(4)]
    assert starts == [[(0, 0)], [(2, 0)], [(1, 0)], [(3, 0)]]


def test_rank_outside_the_mesh_that_has_the_tensor_writes_nothing_of_it():
    """Every rank may track a model of which only some hold parts."""
    row = sharded("w", (4,), mesh_of((2,), [1, 3]), ["S0"])
    assignment = Assignment([(row,)], [0] * 4)
    assert [len(assignment.pieces_of_rank(rank)) for rank in range(4)] == [0, 1, 0, 1]


@pytest.mark.parametrize("placement", ["R", "S0", "S1"])
def test_sharded_tensor_without_elements_is_written_by_its_lowest_rank(placement):
    """It has no bytes, but it must be there."""
    row = sharded("w", (0, 3), mesh_of((2,), [2, 1]), [placement])
    assignment = Assignment([(row,)], [0] * 3)
    assert [piece.rank for piece in assignment.pieces_of("w")] == [1]
    assert [len(assignment.pieces_of_rank(rank)) for rank in range(3)] == [0, 1, 0]


def test_tied_sharded_tensor_is_stored_once():
    """Also where a rank's part is empty."""
    mesh = mesh_of((2,), range(2))
    table = (
        sharded("embedding", (1, 4), mesh, ["S0"]),
        sharded("head", (1, 4), mesh, ["S0"], same_as="embedding"),
    )
    table = Table(table)
    assignment = Assignment([table], [0, 0])
    assert assignment.pieces_of("head") == assignment.pieces_of("embedding")
    assert [len(assignment.pieces_of_rank(rank)) for rank in (0, 1)] == [1, 0]


@pytest.mark.parametrize(
    ("tables", "table_of_rank", "text"),
    [
        (
            [(sharded("w", (4,), mesh_of((2,), [0, 2]), ["S0"]),)],
            [0, 0],
            "lies on rank 2, and there are 2 ranks",
        ),
        (
            [(sharded("w", (4,), mesh_of((2,), [0, 1]), ["S0"]),), ()],
            [0, 1],
            "sharded over rank 1, among others, which does not have it",
        ),
        (
            [
                (sharded("w", (4,), mesh_of((2,), [0, 1]), ["S0"]),),
                (sharded("w", (4,), mesh_of((2,), [1, 2]), ["S0"]),),
            ],
            [0, 0, 1],
            "sharded over rank 1, among others, which .* on another mesh",
        ),
        (
            [
                (sharded("w", (4,), mesh_of((2,), [0, 1]), ["S0"]),),
                (sharded("w", (4,), mesh_of((1,), [2]), ["S0"]),),
            ],
            [0, 0, 1],
            r"'w' differs between ranks: float32 \[4\] \(sharded .* on ranks 0, 1",
        ),
        (
            [
                (sharded("w", (4, 4), mesh_of((1,), [0]), ["S0"]),),
                (sharded("w", (4, 4), mesh_of((1,), [1]), ["S1"]),),
            ],
            [0, 1],
            "'w' differs between ranks",
        ),
        (
            [
                (sharded("w", (4,), mesh_of((1,), [0]), ["S0"]),),
                (Row("w", "float32", (4,), SPLIT),),
            ],
            [0, 1],
            r"'w' differs between ranks: .*\(split\) on rank 1\.",
        ),
    ],
    ids=["no such rank", "not there", "overlap", "mesh shape", "placement", "kind"],
)
def test_meshes_that_contradict_the_tables_are_refused(tables, table_of_rank, text):
    """A part that nobody writes, or that two ranks take for theirs, is never saved."""
    with pytest.raises(ManifestError, match=text):
        Assignment(tables, table_of_rank)


def test_asking_for_one_rank_works_out_no_other():
    """At ten thousand ranks nobody can afford all boxes of all tensors."""
    world_size = 10_000
    mesh = mesh_of((world_size,), range(world_size))
    table = tuple(sharded(f"w{i}", (world_size, 8), mesh, ["S0"]) for i in range(1000))
    assignment = Assignment([table], [0] * world_size)
    assert len(assignment.pieces_of_rank(4711)) == 1000
    box = Box((4710, 0), (3, 8))
    assert [p.rank for p in assignment.pieces_of("w7", box)] == [4710, 4711, 4712]
    assert {rank for _, rank in assignment._shared_of} == {4710, 4711, 4712}


def test_files_of_replicas_are_worked_out_once_for_all_of_them():
    """Every rank of a replicated job reads all files, and asks what is in each."""
    table = tuple(Row(f"w{i}", "float32", (64, 64), SPLIT) for i in range(100))
    assignment = Assignment([table], [0] * 1000)
    assert sum(len(assignment.pieces_of_rank(rank)) for rank in range(1000)) == 100
    assert len(assignment._shared_of) == 1


@pytest.mark.parametrize(
    "fields",
    [
        ("w", "float32", (4,), SHARDED),
        ("w", "float32", (4,), SPLIT, "", Sharding(mesh_of((1,), [0]), ("R",))),
        ("w", "float32", (4,), SHARDED, "", Sharding(mesh_of((1,), [0]), ("S1",))),
        ("w", "float32", (4,), SHARDED, "", Sharding(mesh_of((1,), [0]), ("R", "R"))),
        ("w", "float32", (4,), SHARDED, "", Sharding(mesh_of((1,), [0]), ("X",))),
    ],
    ids=["none", "of a split row", "dimension", "count", "unknown"],
)
def test_sharded_row_that_cannot_be_is_refused(fields):
    """Nothing of an impossible sharding reaches arithmetic."""
    with pytest.raises(ManifestError):
        Row(*fields)


_MESH = {"shape": [2], "first": 0, "strides": [1]}
_CUT = {"mesh": _MESH, "placements": ["S0"]}


@pytest.mark.parametrize(
    ("fields", "shardings"),
    [
        (["w", "uint8", [4], 1], [_CUT]),
        (["w", "uint8", [4], -1], [_CUT]),
        (["w", "uint8", [4], False], [_CUT]),
        (["w", "uint8", [4], 0.0], [_CUT]),
        (["w", "uint8", [4], SPLIT], [_CUT]),
        (["w", "uint8", [4], 0, "v"], [_CUT]),
        (["w", "uint8", [], 0], [_CUT]),
        (["w", "uint8", [4], 0], [_CUT, _CUT]),
        (["w", "uint8", [4], 0], [{**_CUT, "placements": ["R"]}, _CUT]),
        (["w", "uint8", [4], 0], [{**_CUT, "placements": ["S1"]}]),
        (["w", "uint8", [4], 0], [{**_CUT, "more": 1}]),
        (["w", "uint8", [4], _CUT], []),
    ],
    ids=repr,
)
def test_json_that_is_no_sharded_row_is_refused(fields, shardings):
    """A manifest's table is checked field by field; no sharding stands there in vain."""
    assert Table.from_text(text_of(["w", "uint8", [4], 0], [_CUT]))
    with pytest.raises(ManifestError):
        Table.from_text(text_of(fields, shardings))


def test_sharded_rows_through_text_come_back_the_same():
    """What a manifest says of a tensor is what was meant."""
    mesh = mesh_of((2, 2), [0, 1, 3, 2])
    row = sharded("v", (3, 4), mesh, ["R", "S1"])
    table = Table(
        [
            row,
            sharded("w", (3, 4), mesh, ["R", "S1"], same_as="v"),
            sharded("x", (3, 4), mesh, ["S1", "R"]),
            sharded("y", (3, 4), mesh_of((4,), range(4)), ["R"]),
        ]
    )
    assert Table.from_text(table.text) == table
    assert table.text.count("placements") == 3


def test_tie_between_tensors_that_lie_otherwise_is_refused():
    """One memory lies on the ranks in one way."""
    mesh = mesh_of((2,), range(2))
    first = sharded("v", (4, 4), mesh, ["S0"])
    with pytest.raises(ManifestError, match="'w' is not the same as 'v'"):
        Table((first, sharded("w", (4, 4), mesh, ["S1"], same_as="v")))


def test_pieces_of_a_whole_tensor_are_not_looked_through(monkeypatch):
    """A process that reads all of it needs every piece; of an empty one, none."""
    mesh = mesh_of((4,), [0, 1, 2, 3])
    rows = tuple(
        Row(name, "float32", shape, SHARDED, sharding=Sharding(mesh, ("S0",)))
        for name, shape in (("full", (9, 5)), ("empty", (0, 5)))
    )
    assignment = Assignment([rows], [0] * 4)
    monkeypatch.setattr(layout, "overlap", None)
    assert assignment.pieces_of("full", whole((9, 5))) == assignment.pieces_of("full")
    monkeypatch.undo()
    assert assignment.pieces_of("empty", whole((0, 5))) == []
