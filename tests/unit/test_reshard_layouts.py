"""From any layout to any other, drawn at random: each element arrives in its place."""

from __future__ import annotations

import math
import os
import tempfile
from contextlib import ExitStack
from itertools import product

import numpy as np
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_helpers import FileTarget, bytes_of, open_shard_at

from distckpt import boxes, shard_file, sharding
from distckpt.layout import SHARDED, SPLIT, Assignment, Row, Table
from distckpt.read_plan import ReadPlan
from distckpt.sharding import Sharding, mesh_of

MAX_EXAMPLES = examples(150)


@st.composite
def shardings(draw, tensor_dims):
    """Draw how a tensor of so many dimensions lies on some ranks; None: it is plain."""
    if draw(st.integers(0, 5)) == 0:
        return None
    mesh_shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    count = math.prod(mesh_shape)
    cuts = [f"S{dim}" for dim in range(tensor_dims)] + [f"T{d}" for d in range(tensor_dims)]
    placements = draw(
        st.lists(
            st.sampled_from(["R", *cuts]),
            min_size=len(mesh_shape),
            max_size=len(mesh_shape),
        ).filter(lambda p: not sharding.why_not(p, len(mesh_shape), tensor_dims))
    )
    ranks = draw(st.permutations(range(count)))
    return Sharding(mesh_of(mesh_shape, ranks), tuple(placements))


@st.composite
def changes(draw):
    """Draw a tensor's shape, and two ways for it to lie."""
    shape = tuple(draw(st.lists(st.integers(0, 9), max_size=3)))
    return shape, draw(shardings(len(shape))), draw(shardings(len(shape)))


def part_of(array, placed, coordinate):
    """Cut out what lies at a coordinate, as ``torch.chunk`` does, one cut after another.

    Of a strided cut the later dimension of the mesh comes first: FSDP2 cuts what tensor
    parallelism has cut before it.
    """
    order = [*range(len(placed.placements))]
    order.sort(key=lambda dim: placed.placements[dim].startswith("T"))
    for mesh_dim in order:
        placement, count = placed.placements[mesh_dim], placed.mesh.shape[mesh_dim]
        if placement != "R":
            dim = int(placement[1:])
            length = -(-array.shape[dim] // count)
            start = min(coordinate[mesh_dim] * length, array.shape[dim])
            index = [slice(None)] * array.ndim
            index[dim] = slice(start, start + length)
            array = array[tuple(index)]
    return array


def held_by_each(array, placed):
    """Walk ``(box, values)`` of what each rank holds."""
    if placed is None:
        yield boxes.whole(array.shape), array
        return
    for coordinate in product(*map(range, placed.mesh.shape)):
        box = placed.box_at(array.shape, coordinate)
        yield box, part_of(array, placed, coordinate)


@settings(max_examples=MAX_EXAMPLES, deadline=None)
@given(change=changes())
def test_what_lies_one_way_is_read_to_lie_another_way(change):
    """Whatever the meshes, sizes and cuts; real files in between."""
    shape, before, after = change
    array = np.arange(math.prod(shape), dtype=np.uint16).reshape(shape)
    world_size = 2 if before is None else math.prod(before.mesh.shape)
    kind = SPLIT if before is None else SHARDED
    table = Table([Row("t", "uint16", shape, kind, "", before)])
    assignment = Assignment([table], [0] * world_size)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        readers = []
        for rank in range(world_size):
            path = os.path.join(folder, f"{rank}.safetensors")
            entries = [
                shard_file.Entry(piece, lambda piece=piece: bytes_of(piece, {"t": array}))
                for piece in assignment.pieces_of_rank(rank)
            ]
            whose = {"attempt": "a", "rank": rank, "world_size": world_size}
            shard_file.write(FileTarget(path), entries, per_rank_values={}, **whose)
            readers.append(stack.enter_context(open_shard_at(path)))
        for box, expected in held_by_each(array, after):
            assert box.shape == expected.shape
            assert np.array_equal(read(assignment, readers, box), expected), box


def read(assignment, readers, box):
    """Read one box by the plan for it; every element must come exactly once."""
    found = np.zeros(box.shape, dtype=np.uint16)
    times = np.zeros(box.size, dtype=np.uint8)
    buffer = memoryview(found.reshape(-1)).cast("B")
    if box.size == 0:
        return found
    plan = ReadPlan(assignment, [("t", box)])
    for rank in plan.sources:
        reader = readers[rank]
        for stored, source in plan.located(rank, reader.header.entries):
            region = boxes.overlap(stored.box, box)
            assert region is not None, "a source that has nothing"
            runs = [*boxes.contiguous_runs(region, stored.box, box)]
            for _, target, length in runs:
                times[target : target + length] += 1
            if source.start is not None:
                # All of the entry goes there in one run.
                whole = sum(length for *_, length in runs)
                assert whole == stored.box.size and runs[0][1] * 2 == source.start
            reader.read_runs(stored, runs, buffer)
    assert (times == 1).all()
    return found
