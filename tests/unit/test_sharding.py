"""Meshes and placements: which box a rank holds is what torch makes it."""

from __future__ import annotations

import gc
import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from distckpt import sharding, strict_json
from distckpt.boxes import Box, overlap, whole
from distckpt.errors import ManifestError
from distckpt.sharding import Mesh, Sharding, mesh_from_json, mesh_of

MAX_EXAMPLES = 150

_mesh_shapes = st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple)
_tensor_shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)


@st.composite
def _shardings(draw):
    """A sharding and the shape of a tensor that it fits."""
    mesh_shape = draw(_mesh_shapes)
    shape = draw(_tensor_shapes)
    ranks = draw(st.permutations(range(math.prod(mesh_shape))))
    if draw(st.booleans()):
        ranks = sorted(ranks)
    known = ["R", *(f"{kind}{dim}" for kind in "ST" for dim in range(len(shape)))]
    placements = [draw(st.sampled_from(known)) for _ in mesh_shape]
    assume(not sharding.why_not(placements, len(mesh_shape), len(shape)))
    return Sharding(mesh_of(mesh_shape, ranks), tuple(placements)), shape


def _chunk(tensor, count, index, dim):
    """Cut as torch.chunk does, but into as many parts as asked for, some of them empty."""
    chunks = tensor.chunk(count, dim)
    return chunks[index] if index < len(chunks) else tensor.narrow(dim, 0, 0)


def _truth(shape, mesh_shape, placements, coordinate):
    """Cut a tensor with torch itself; strided cuts come after the plain ones."""
    tensor = torch.arange(math.prod(shape)).view(shape)
    for kind in "ST":
        for mesh_dim, placement in enumerate(placements):
            if placement[0] == kind:
                count, index = mesh_shape[mesh_dim], coordinate[mesh_dim]
                tensor = _chunk(tensor, count, index, int(placement[1:]))
    return tensor


def _region(box):
    return tuple(
        slice(start, start + length)
        for start, length in zip(box.offset, box.shape, strict=True)
    )


@settings(max_examples=MAX_EXAMPLES)
@given(case=_shardings())
def test_box_of_every_rank_is_what_torch_chunk_makes_it(case):
    """The formula takes the very elements that cutting the tensor gives the rank."""
    placed, shape = case
    everything = torch.arange(math.prod(shape)).view(shape)
    for rank in placed.mesh.ranks:
        coordinate = placed.mesh.coordinate_of(rank)
        box = placed.box_at(shape, placed.coordinate_of(rank))
        expected = _truth(shape, placed.mesh.shape, placed.placements, coordinate)
        assert box.is_within(shape)
        assert box.shape == tuple(expected.shape)
        assert torch.equal(everything[_region(box)], expected)


@settings(max_examples=MAX_EXAMPLES)
@given(case=_shardings())
def test_box_of_plain_cuts_is_that_of_torch_s_own_formula(case):
    """DTensor itself computes the same shapes and offsets."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

    placed, shape = case
    assume(not any(text.startswith("T") for text in placed.placements))
    placements = [
        Replicate() if text == "R" else Shard(int(text[1:])) for text in placed.placements
    ]
    for rank in placed.mesh.ranks:
        coordinate = placed.mesh.coordinate_of(rank)
        box = placed.box_at(shape, placed.coordinate_of(rank))
        local, offset = _compute_local_shape_and_global_offset(
            shape, placed.mesh.shape, list(coordinate), placements
        )
        assert box.shape == local
        assert box.size == 0 or box.offset == offset


@settings(max_examples=MAX_EXAMPLES)
@given(case=_shardings())
def test_boxes_of_all_coordinates_tile_the_tensor(case):
    """Every element lies in exactly one box; ranks of one coordinate hold the same."""
    placed, shape = case
    count = np.zeros(shape, np.uint8)
    coordinates = {placed.coordinate_of(rank) for rank in placed.mesh.ranks}
    for coordinate in coordinates:
        count[_region(placed.box_at(shape, coordinate))] += 1
    assert (count == 1).all()
    held = sorted(rank for c in coordinates for rank in placed.mesh.ranks_at(c))
    assert held == sorted(placed.mesh.ranks)


@settings(max_examples=MAX_EXAMPLES)
@given(case=_shardings(), data=st.data())
def test_boxes_overlapping_a_region_are_found_without_asking_every_rank(case, data):
    """The shortcut finds what looking at every rank finds."""
    placed, shape = case
    offset = tuple(data.draw(st.integers(0, length)) for length in shape)
    region = Box(
        offset,
        tuple(
            data.draw(st.integers(0, length - start))
            for start, length in zip(offset, shape, strict=True)
        ),
    )
    expected = set()
    for rank in placed.mesh.ranks:
        coordinate = placed.coordinate_of(rank)
        box = placed.box_at(shape, coordinate)
        if overlap(box, region) is not None:
            expected.add((coordinate, box))
    found = list(placed.boxes_overlapping(shape, region))
    assert len(found) == len({*found})
    # A tensor without dimensions has one element, and no region leaves it out.
    assert {*found} == expected


def test_uneven_fsdp_over_tensor_parallel_is_one_box_where_torch_s_formula_errs():
    """Seven rows, cut by two and then by three: 2, 2, 0 and 1, 1, 1."""
    placed = Sharding(mesh_of((3, 2), range(6)), ("T0", "S0"))
    boxes = [placed.box_at((7,), placed.coordinate_of(rank)) for rank in range(6)]
    assert [(box.offset[0], box.shape[0]) for box in boxes] == [
        *[(0, 2), (4, 1), (2, 2), (5, 1), (4, 0), (6, 1)]
    ]


# Meshes


@settings(max_examples=MAX_EXAMPLES)
@given(shape=_mesh_shapes, data=st.data())
def test_mesh_knows_where_each_rank_stands(shape, data):
    """However the ranks lie in the grid."""
    size = math.prod(shape)
    ranks = data.draw(st.permutations(range(3, 3 + size)))
    mesh = mesh_of(shape, ranks)
    assert mesh.ranks == list(ranks)
    assert (mesh.size, mesh.lowest, mesh.highest) == (size, 3, 2 + size)
    coordinates = list(itertools.product(*map(range, shape)))
    assert [mesh.coordinate_of(rank) for rank in ranks] == coordinates
    assert [mesh.ranks_at(c) for c in coordinates] == [[rank] for rank in ranks]
    assert all(mesh.coordinate_of(rank) is None for rank in (-1, 0, 2, 3 + size))
    assert (
        mesh_from_json(strict_json.loads(strict_json.dumps(mesh.to_json()).encode()))
        is mesh
    )


@settings(max_examples=MAX_EXAMPLES)
@given(
    shape=_mesh_shapes,
    first=st.integers(0, 20),
    strides=st.lists(st.integers(0, 40), min_size=3, max_size=3),
)
def test_mesh_is_written_by_its_strides_exactly_if_they_are_nested(shape, first, strides):
    """Such a mesh has a rank at most once; others that these strides make are lists."""
    strides = tuple(0 if n == 1 else s for n, s in zip(shape, strides, strict=False))
    ranks = [first]
    for length, stride in zip(shape, strides, strict=True):
        ranks = [rank + i * stride for rank in ranks for i in range(length)]
    fields = {"shape": list(shape), "first": first, "strides": list(strides)}
    if len({*ranks}) < len(ranks):
        with pytest.raises(ManifestError):
            mesh_from_json(fields)
        return
    mesh = mesh_of(shape, ranks)
    assert mesh.ranks == ranks
    if mesh.listed:
        with pytest.raises(ManifestError):
            mesh_from_json(fields)
    else:
        assert mesh.to_json() == fields
        assert [mesh.coordinate_of(r) for r in range(max(ranks) + 2)] == [
            next(
                (
                    c
                    for c in itertools.product(*map(range, shape))
                    if mesh.ranks_at(c) == [r]
                ),
                None,
            )
            for r in range(max(ranks) + 2)
        ]


@pytest.mark.parametrize(
    ("shape", "ranks", "fields"),
    [
        ((2, 4), range(8), {"shape": [2, 4], "first": 0, "strides": [4, 1]}),
        ((4,), [1, 3, 5, 7], {"shape": [4], "first": 1, "strides": [2]}),
        ((2, 2), [0, 4, 1, 5], {"shape": [2, 2], "first": 0, "strides": [1, 4]}),
        ((1, 2), [5, 6], {"shape": [1, 2], "first": 5, "strides": [0, 1]}),
        ((1,), [0], {"shape": [1], "first": 0, "strides": [0]}),
        ((4,), [0, 1, 4, 5], {"shape": [4], "ranks": [0, 1, 4, 5]}),
        ((2,), [1, 0], {"shape": [2], "ranks": [1, 0]}),
    ],
    ids=["rows", "strided", "columns", "row of one", "one", "holes", "backwards"],
)
def test_mesh_has_one_encoding(shape, ranks, fields):
    """Regular ones take a few numbers, whatever their size."""
    mesh = mesh_of(shape, list(ranks))
    assert mesh.to_json() == fields
    assert mesh_from_json(fields) is mesh


def test_mesh_of_a_million_ranks_is_written_read_and_asked_at_once():
    """Nothing is as long as the mesh: a table may have ten thousand rows on it."""
    fields = {"shape": [1000, 1000], "first": 0, "strides": [1000, 1]}
    for _ in range(1000):
        mesh = mesh_from_json(fields)
        assert mesh.coordinate_of(654_321) == (654, 321)
        assert (mesh.highest, mesh.to_json()) == (999_999, fields)


def test_equal_meshes_are_one_object_while_somebody_has_it():
    """And none that nobody has is kept."""
    gc.collect()
    before = len(sharding._meshes)
    one, other = (
        mesh_of((3,), [7, 5, 6]),
        mesh_from_json({"shape": [3], "ranks": [7, 5, 6]}),
    )
    assert one is other
    assert len(sharding._meshes) == before + 1
    del one, other
    gc.collect()
    assert len(sharding._meshes) == before


@pytest.mark.parametrize(
    "fields",
    [
        None,
        [],
        {},
        {"shape": [2]},
        {"shape": [2], "ranks": [0, 1], "first": 0},
        {"ranks": [0, 1], "shape": [2]},
        {"shape": [2], "first": 0},
        {"shape": [2], "strides": [1], "first": 0},
        {"shape": 2, "first": 0, "strides": [1]},
        {"shape": [2], "first": 0, "strides": 1},
        {"shape": [2], "first": True, "strides": [1]},
        {"shape": [2], "first": 0.0, "strides": [1]},
        {"shape": [2], "first": -1, "strides": [1]},
        {"shape": [2.0], "first": 0, "strides": [1]},
        {"shape": [True], "first": 0, "strides": [0]},
        {"shape": [], "first": 0, "strides": []},
        {"shape": [0], "first": 0, "strides": [0]},
        {"shape": [-2], "first": 0, "strides": [1]},
        {"shape": [1] * 65, "first": 0, "strides": [0] * 65},
        {"shape": [2], "first": 0, "strides": []},
        {"shape": [2], "first": 0, "strides": [1, 1]},
        {"shape": [2], "first": 0, "strides": [0]},
        {"shape": [2], "first": 1, "strides": [-1]},
        {"shape": [1], "first": 0, "strides": [1]},
        {"shape": [2, 2], "first": 0, "strides": [1, 1]},
        {"shape": [2, 3], "first": 0, "strides": [2, 1]},
        {"shape": [2], "first": 0, "strides": [2**63]},
        {"shape": [10**7, 10**7], "first": 0, "strides": [10**7, 1]},
        {"shape": [10**4000, 10**4000], "first": 0, "strides": [1, 1]},
        {"shape": [2], "ranks": []},
        {"shape": [0], "ranks": []},
        {"shape": [2], "ranks": [1]},
        {"shape": [2], "ranks": [1, 1]},
        {"shape": [2], "ranks": [0, 1]},
        {"shape": [2], "ranks": [1, -1]},
        {"shape": [2], "ranks": [1, "0"]},
        {"shape": [2], "ranks": [1, None]},
    ],
    ids=lambda fields: repr(fields)[:60],
)
def test_json_that_is_no_mesh_is_refused(fields):
    """Also another encoding of one that could be."""
    with pytest.raises(ManifestError):
        mesh_from_json(fields)


@pytest.mark.parametrize(
    ("shape", "ranks"), [((2,), [0]), ((), []), ((2,), [3, 3]), ((2,), [-1, 0])]
)
def test_ranks_that_are_no_mesh_are_refused(shape, ranks):
    """Not only where they are read."""
    with pytest.raises(ManifestError):
        mesh_of(shape, ranks)


@pytest.mark.parametrize(
    "fields",
    [
        {"shape": [2], "first": 10_000_000, "strides": [1]},
        {"shape": [2], "first": 10**4299, "strides": [1]},
        {"shape": [2], "first": 10**5000, "strides": [1]},
        {"shape": [2], "ranks": [0, 10**5000]},
        {"shape": [3], "ranks": [10**5000, 0, 1]},
    ],
    ids=range(5),
)
def test_rank_beyond_all_others_is_refused_without_spelling_it(fields):
    """Python refuses to write numbers of that length, and messages add to them."""
    with pytest.raises(ManifestError, match="a rank of 10000000 or more"):
        mesh_from_json(fields)


def test_mesh_hashes_without_its_whole_list():
    """Every row of a table asks for it."""
    mesh = mesh_of((3,), [2, 0, 1])
    assert hash(mesh) == hash(Mesh((3,), 2, (), (2, 0, 1)))


# Placements


@pytest.mark.parametrize(
    ("placements", "mesh_dims", "tensor_dims", "reason"),
    [
        (["R"], 1, 0, ""),
        (["S0", "S0"], 2, 1, ""),
        (["T1", "R", "S1"], 3, 2, ""),
        (["T1", "T0", "S1", "S0"], 4, 2, ""),
        (["S0", "T1", "S1"], 3, 2, ""),
        (["R"], 2, 1, "1 placements for a mesh of 2"),
        (["S1"], 1, 1, "dimension 1 is cut, and the tensor has 1"),
        (["S0"], 1, 0, "dimension 0 is cut, and the tensor has 0"),
        (["T0"], 1, 1, "without a plain one after it"),
        (["S0", "T0"], 2, 1, "without a plain one after it"),
        (["T0", "S1"], 2, 2, "without a plain one after it"),
        (["T0", "T0", "S0"], 3, 1, "only the order of FSDP2"),
        (["S0", "T0", "S0"], 3, 1, "only the order of FSDP2"),
        (["P"], 1, 1, "unknown placement 'P'"),
        (["S"], 1, 1, "unknown placement"),
        (["S-1"], 1, 1, "unknown placement"),
        (["S00"], 1, 1, "unknown placement"),
        (["S100"], 1, 1, "unknown placement"),
        (["R0"], 1, 1, "unknown placement"),
        (["S0\n"], 1, 1, "unknown placement"),
        ([""], 1, 1, "unknown placement"),
    ],
    ids=repr,
)
def test_placements_that_cannot_be_say_why(placements, mesh_dims, tensor_dims, reason):
    """Strided cuts only in the order that makes one box a rank."""
    found = sharding.why_not(placements, mesh_dims, tensor_dims)
    assert reason in found
    assert bool(found) == bool(reason)


def test_split_factor_counts_the_plain_cuts_after_a_strided_one():
    """That is how many parts FSDP2 finds the dimension in."""
    assert sharding.split_factor(["T0", "S0"], (2, 3), 0) == 3
    assert sharding.split_factor(["R", "T1", "S0", "S1", "S1"], (9, 2, 7, 3, 5), 1) == 15


@pytest.mark.parametrize(
    "fields",
    [
        None,
        {},
        {"mesh": {"shape": [1], "first": 0, "strides": [0]}},
        {"placements": ["R"], "mesh": {"shape": [1], "first": 0, "strides": [0]}},
        {"mesh": {"shape": [1], "first": 0, "strides": [0]}, "placements": "R"},
        {"mesh": {"shape": [1], "first": 0, "strides": [0]}, "placements": [0]},
        {"mesh": None, "placements": ["R"]},
    ],
    ids=lambda fields: repr(fields)[:60],
)
def test_json_that_is_no_sharding_is_refused(fields):
    """A manifest's table is checked field by field."""
    with pytest.raises(ManifestError):
        Sharding.from_json(fields)


def test_sharding_through_json_comes_back_the_same():
    """What a manifest says of a tensor is what was meant."""
    placed = Sharding(mesh_of((2, 2), [0, 3, 1, 2]), ("T0", "S0"))
    assert Sharding.from_json(placed.to_json()) == placed
    assert not placed.is_replicated
    assert Sharding(placed.mesh, ("R", "R")).is_replicated


def test_tensor_without_dimensions_is_one_box():
    """A replicated scalar is held whole by every rank."""
    placed = Sharding(mesh_of((2,), [0, 1]), ("R",))
    assert placed.box_at((), placed.coordinate_of(1)) == whole(())
    assert list(placed.boxes_overlapping((), whole(()))) == [((None,), whole(()))]
