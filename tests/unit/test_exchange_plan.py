"""Who reads what for all: everything once, in even parts, and each its own file."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise

import pytest

from distckpt import exchange_plan
from distckpt.boxes import whole
from distckpt.exchange_plan import ExchangePlan, is_faster_once, wants_digest
from distckpt.layout import SPLIT, WHOLE, Assignment, Row, Table
from distckpt.read_plan import ReadPlan

MIB = 2**20


def _rows(kind=SPLIT, *, small=300, large=(3 * MIB, 40 * MIB, 17 * MIB + 2)):
    rows = [Row(f"small/{i}", "float32", (i % 7, 33), kind) for i in range(small)]
    rows += [Row(f"large/{i}", "int8", (size,), kind) for i, size in enumerate(large)]
    return rows


def _plan(rows, saved_world_size, world_size):
    assignment = Assignment([Table(rows)], [0] * saved_world_size)
    wanted = [(row.name, whole(row.shape)) for row in rows if row.size_bytes]
    reads = ReadPlan(assignment, wanted)
    return ExchangePlan(reads, assignment.rows, saved_world_size, world_size)


def _loads(plan):
    loads = Counter()
    for parcel in plan.parcels:
        loads[parcel.reader] += parcel.size_bytes
    return loads


@pytest.mark.parametrize("saved", [1, 2, 3, 8])
@pytest.mark.parametrize("world_size", [2, 3, 8, 64])
@pytest.mark.parametrize("kind", [SPLIT, WHOLE])
def test_each_byte_is_read_once_by_even_parts(saved, world_size, kind):
    """Whatever number of ranks has saved it, and whoever of them."""
    rows = _rows(kind)
    plan = _plan(rows, saved, world_size)
    total = sum(row.size_bytes for row in rows)
    found = {}
    for parcel in plan.parcels:
        assert parcel.size_bytes <= plan.parcel_bytes <= exchange_plan._PARCEL_BYTES
        assert 0 <= parcel.reader < world_size
        at = 0
        for unit in parcel.units:
            assert unit.at == at and unit.size_bytes > 0
            at += unit.size_bytes
            # Blocks are not read twice: a cut falls between them.
            assert unit.offset % exchange_plan._GRAIN_BYTES == 0
            found.setdefault((parcel.file_rank, unit.source.entry), []).append(
                (unit.offset, unit.offset + unit.size_bytes)
            )
        assert at == parcel.size_bytes
    for spans in found.values():
        spans.sort()
        assert spans[0][0] == 0
        assert all(one[1] == other[0] for one, other in pairwise(spans))
    assert sum(spans[-1][1] for spans in found.values()) == total
    assert max(_loads(plan).values()) <= 1.125 * total / world_size + plan.parcel_bytes


def test_ranks_that_saved_it_open_no_file_but_their_own():
    """Where as many restore it, and have written alike."""
    plan = _plan(_rows(), 4, 4)
    assert [plan.files_of(rank) for rank in range(4)] == [[0], [1], [2], [3]]


def test_ranks_read_at_the_same_time():
    """They take turns in sending, so that none has to wait for another's last parcel."""
    readers = [parcel.reader for parcel in _plan(_rows(), 4, 4).parcels]
    assert readers[:8] == [0, 1, 2, 3, 0, 1, 2, 3]


def test_a_file_is_read_in_its_order():
    """From front to back, by each rank."""
    parcels = _plan(_rows(), 1, 2).parcels
    for rank in range(2):
        own = [parcel for parcel in parcels if parcel.reader == rank]
        spans = [(u.source.name, u.offset) for parcel in own for u in parcel.units]
        large = [span for span in spans if span[0].startswith("large")]
        assert large == sorted(large)


def test_nothing_to_read_makes_no_parcels():
    """Not even one."""
    plan = _plan([Row("empty", "float32", (0, 3), SPLIT)], 2, 2)
    assert plan.parcels == [] and plan.parcel_bytes == 0
    assert plan.files_of(0) == []


def test_wants_are_told_apart_by_names_and_never_zeros():
    """In 16 bytes, as they travel in a vote."""
    digests = {
        wants_digest(names) for names in ([], ["a"], ["a", "b"], ["b", "a"], ["a,b"])
    }
    assert len(digests) == 5
    assert all(len(digest) == 16 and digest != bytes(16) for digest in digests)


def test_once_is_faster_only_where_many_hosts_share_a_storage():
    """On one host the page cache has it; on many the storage would be read often."""
    assert not is_faster_once(8, 1)
    assert not is_faster_once(16, 2)
    assert not is_faster_once(2, 2)
    assert is_faster_once(64 * 8, 64)
    assert is_faster_once(4096, 512)
