"""Regions against numpy, which does the same by brute force."""

from __future__ import annotations

from math import prod

import numpy as np
import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt.boxes import Box, contiguous_runs, overlap, split_range, whole

MAX_EXAMPLES = examples(80)

_shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def _boxes_in(draw, shape, count):
    boxes = []
    for _ in range(count):
        offset = tuple(draw(st.integers(0, length)) for length in shape)
        lengths = tuple(
            draw(st.integers(0, length - start))
            for start, length in zip(offset, shape, strict=True)
        )
        boxes.append(Box(offset, lengths))
    return boxes


@st.composite
def _shape_and_boxes(draw, count=2):
    shape = draw(_shapes)
    return shape, draw(_boxes_in(shape, count))


def slices(box, origin=None):
    """Index a region in a buffer that starts at ``origin``."""
    origin = origin or (0,) * len(box.offset)
    return tuple(
        slice(start - base, start - base + length)
        for start, base, length in zip(box.offset, origin, box.shape, strict=True)
    )


@settings(max_examples=MAX_EXAMPLES)
@given(case=_shape_and_boxes())
def test_overlap_of_two_boxes_is_what_numpy_marks_twice(case):
    """Exactly the shared elements, and None only where there are none."""
    shape, (first, second) = case
    marks = np.zeros(shape, int)
    marks[slices(first)] += 1
    marks[slices(second)] += 1
    shared = overlap(first, second)
    found = np.zeros(shape, bool)
    if shared is not None:
        assert shared.size > 0
        found[slices(shared)] = True
    assert np.array_equal(found, marks == 2)


@settings(max_examples=MAX_EXAMPLES)
@given(case=_shape_and_boxes())
def test_overlap_is_symmetric(case):
    """Who asks does not matter."""
    _, (first, second) = case
    assert overlap(first, second) == overlap(second, first)


@settings(max_examples=MAX_EXAMPLES)
@given(case=_shape_and_boxes())
def test_contiguous_runs_copy_what_numpy_copies(case):
    """Copied run by run, the target holds the region and nothing else changed."""
    shape, (source, target) = case
    region = overlap(source, target)
    if region is None:
        return
    values = np.arange(prod(shape)).reshape(shape)
    from_buffer = values[slices(source)].ravel()
    to_buffer = np.full(target.size, -1)
    for source_index, target_index, length in contiguous_runs(region, source, target):
        to_buffer[target_index : target_index + length] = from_buffer[
            source_index : source_index + length
        ]
    expected = np.full(target.shape, -1)
    expected[slices(region, target.offset)] = values[slices(region)]
    assert np.array_equal(to_buffer.reshape(target.shape), expected)


@settings(max_examples=MAX_EXAMPLES)
@given(case=_shape_and_boxes())
def test_contiguous_runs_together_are_as_long_as_the_region(case):
    """No element is copied twice."""
    _, (source, target) = case
    region = overlap(source, target)
    if region is None:
        return
    runs = list(contiguous_runs(region, source, target))
    assert sum(length for _, _, length in runs) == region.size


@settings(max_examples=MAX_EXAMPLES)
@given(case=_shape_and_boxes(count=1))
def test_contiguous_runs_of_a_box_into_itself_are_one(case):
    """Equal layouts are one read, not one a row."""
    _, (box,) = case
    expected = [(0, 0, box.size)] if box.size else []
    assert list(contiguous_runs(box, box, box)) == expected


def test_contiguous_runs_of_whole_rows_are_merged():
    """Row-wise resharding reads one range, not one a row."""
    source, target = whole((8, 4, 5)), Box((2, 0, 0), (3, 4, 5))
    assert list(contiguous_runs(target, source, target)) == [(40, 0, 60)]


def test_contiguous_runs_of_an_empty_region_are_none():
    """Nothing to copy is no run, not one of length zero."""
    empty = Box((0, 0), (0, 3))
    assert list(contiguous_runs(empty, empty, empty)) == []


@st.composite
def _ranges(draw):
    shape = draw(_shapes)
    start = draw(st.integers(0, prod(shape)))
    return shape, start, draw(st.integers(start, prod(shape)))


@settings(max_examples=examples(2) * MAX_EXAMPLES)
@given(case=_ranges())
def test_split_range_gives_the_range_in_row_major_order(case):
    """Laid end to end the boxes are exactly the range."""
    shape, start, stop = case
    values = np.arange(prod(shape)).reshape(shape)
    parts = [values[slices(box)].ravel() for box in split_range(shape, start, stop)]
    found = np.concatenate([np.zeros(0, int), *parts])
    assert found.tolist() == list(range(start, stop))


@settings(max_examples=MAX_EXAMPLES)
@given(case=_ranges())
def test_split_range_gives_boxes_inside_the_tensor(case):
    """No box leaves the tensor."""
    shape, start, stop = case
    assert all(box.is_within(shape) for box in split_range(shape, start, stop))


@settings(max_examples=MAX_EXAMPLES)
@given(case=_ranges())
def test_split_range_gives_few_boxes(case):
    """At most two boxes a dimension: headers stay small."""
    shape, start, stop = case
    assert len(split_range(shape, start, stop)) <= max(1, 2 * len(shape) - 1)


@pytest.mark.parametrize(
    ("box", "shape", "inside"),
    [
        (Box((), ()), (), True),
        (Box((0,), (3,)), (3,), True),
        (Box((1,), (3,)), (3,), False),
        (Box((3,), (0,)), (3,), True),
        (Box((-1,), (1,)), (3,), False),
        (Box((0,), (-1,)), (3,), False),
        (Box((0,), (1,)), (3, 1), False),
    ],
)
def test_is_within_at_the_borders_is_exact(box, shape, inside):
    """A description that leaves its tensor is found out."""
    assert box.is_within(shape) is inside


def test_box_of_zero_dimensions_has_one_element():
    """A scalar is one element."""
    assert whole(()).size == 1
