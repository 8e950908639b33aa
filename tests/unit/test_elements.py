"""Bytes as numbers, and how far they are apart: held against torch's and numpy's own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distckpt import dtypes, elements
from distckpt.elements import Distance

NO_NUMBERS = {
    *{"bits1x8", "bits2x4", "bits4x2", "bits8", "bits16", "float4_e2m1fn_x2"},
    *{f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 8)},
}
NUMBERS = sorted(dtypes.names() - NO_NUMBERS)


def distance_of(one, other, dtype=None, other_dtype=None, piece=None):
    """Return the distance of two arrays; in pieces of so many elements."""
    distance = Distance(dtype or str(one.dtype), other_dtype or dtype or str(other.dtype))
    for start in range(0, len(one), piece or len(one)):
        stop = start + (piece or len(one))
        distance.add(one[start:stop].tobytes(), other[start:stop].tobytes())
    return distance


def figures_of(distance):
    return (distance.num_differing, distance.largest, distance.relative)


# Numbers


def test_all_dtypes_but_bits_and_packed_ones_are_numbers():
    assert {name for name in dtypes.names() if elements.are_numbers(name)} == {*NUMBERS}


@pytest.mark.parametrize("dtype", NUMBERS)
def test_numbers_are_those_that_torch_reads(dtype):
    """Each byte of the narrow ones; of the others random bits, NaN and infinities too."""
    raw = np.random.default_rng(7).integers(0, 256, 4096, np.uint8)
    raw[:256] = np.arange(256)
    if dtype == "bool":
        raw %= 2
    if not hasattr(torch, dtype):
        pytest.skip(f"torch {torch.__version__} has no {dtype}")
    tensor = torch.from_numpy(raw.copy()).view(getattr(torch, dtype))
    wide = tensor.is_floating_point(), tensor.is_complex()
    if any(wide):
        tensor = tensor.to(torch.float64 if wide[0] else torch.complex128)
    found = elements.numbers_of(raw, dtype)
    with np.errstate(invalid="ignore"):  # numpy 2.5 leaves signalling NaN as they are
        assert np.array_equal(found, tensor.numpy(), equal_nan=any(wide))
    assert found.dtype == (np.uint8 if dtype == "bool" else tensor.numpy().dtype)


# Distances


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("piece", [None, 1000])
def test_distance_of_floats_is_that_of_numpy(dtype, piece):
    """In one piece or in many, and past the length that is computed at a time."""
    random = np.random.default_rng(3)
    one = random.standard_normal(20_000).astype(dtype)
    other = one.copy()
    other[5_000:] += random.standard_normal(15_000).astype(dtype)
    distance = distance_of(one, other, piece=piece)
    wide, apart = one.astype(float), other.astype(float) - one.astype(float)
    assert distance.num_elements == 20_000
    assert distance.num_differing == np.count_nonzero(one != other)
    assert distance.largest == np.abs(apart).max()
    expected = np.linalg.norm(apart) / np.linalg.norm(wide)
    assert distance.relative == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("dtype", "one", "other", "largest"),
    [
        ("int64", -(2**63), 2**63 - 1, 2**64 - 1),
        ("int64", 2**62 + 1, 2**62, 1),
        ("uint64", 0, 2**64 - 1, 2**64 - 1),
        ("int8", -128, 127, 255),
        ("uint8", 3, 250, 247),
        ("bool", False, True, 1),
    ],
)
def test_largest_distance_of_integers_is_exact(dtype, one, other, largest):
    """From one end of the range to the other, and where float64 has no such integer."""
    distance = distance_of(np.array([one], dtype), np.array([other], dtype))
    assert (distance.num_differing, distance.largest) == (1, largest)
    assert type(distance.largest) is int


def test_distance_of_complex_numbers_is_in_their_plane():
    one = np.array([0, 1j, 2], np.complex64)
    other = np.array([3 + 4j, 1j, 2], np.complex64)
    distance = distance_of(one, other)
    assert figures_of(distance) == (1, 5.0, pytest.approx(5 / math.sqrt(5)))
    wide = distance_of(one.astype(complex), other.astype(complex))
    assert figures_of(wide) == figures_of(distance)


def test_bytes_decide_whether_elements_differ():
    """What is not bit-identical is different; a NaN that stays as it is is not."""
    one = np.array([0.0, math.nan, 1.0], np.float32)
    other = np.array([-0.0, math.nan, 1.0], np.float32)
    assert figures_of(distance_of(one, other)) == (1, 0.0, 0.0)


def test_new_nan_and_infinities_are_counted_and_have_no_distance():
    """Those that were there before, or are gone, are not new."""
    nan, inf = math.nan, math.inf
    one = np.array([1, 1, 1, nan, inf, nan, 2, inf], np.float32)
    other = np.array([nan, nan, inf, 1, 1, inf, 3, nan], np.float32)
    distance = distance_of(one, other)
    assert (distance.num_new_nan, distance.num_new_infinite) == (3, 2)
    assert figures_of(distance) == (8, 1.0, 0.5)


def test_nothing_but_nan_has_no_distance():
    one, other = np.ones(3, np.float32), np.full(3, math.nan, np.float32)
    assert figures_of(distance_of(one, other)) == (3, 0, 0.0)


def test_unchanged_pieces_count_for_the_length():
    """Also those with NaN in them."""
    one = np.array([3.0, math.nan, 4.0], np.float64)
    other = np.array([3.0, math.nan, 9.0], np.float64)
    assert distance_of(one, other, piece=1).relative == 1.0


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 1e200, 1e300])
def test_lengths_neither_overflow_nor_vanish(scale):
    """Squares of what is stored may."""
    one = np.array([3.0, 4.0]) * scale
    assert distance_of(one, one * 2).relative == pytest.approx(1.0)


def test_what_was_zero_has_no_relative_distance():
    one, other = np.zeros(2, np.float32), np.array([0, 2], np.float32)
    assert figures_of(distance_of(one, other)) == (1, 2.0, None)


def test_two_dtypes_are_compared_by_value():
    """A cast that loses nothing changes nothing."""
    one = np.array([1.5, math.nan, -2.0, 1.0], np.float32)
    other = torch.tensor([1.5, math.nan, -2.0, 4.0]).bfloat16().view(torch.uint8).numpy()
    distance = Distance("float32", "bfloat16")
    distance.add(one.tobytes(), other.tobytes())
    assert figures_of(distance)[:2] == (1, 3.0)
    assert (distance.num_elements, distance.num_new_nan) == (4, 0)


def test_bits_are_counted_and_have_no_distance():
    distance = distance_of(*np.array([[1, 2, 3], [1, 0, 0]], np.uint8), dtype="bits8")
    assert figures_of(distance) == (2, None, None)
    assert Distance("bits8", "bits8").can_compare
    assert not Distance("bits8", "uint8").can_compare
