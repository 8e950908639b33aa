"""The bytes of tensors as numbers, and how far two lots of them are apart: no torch.

Floating point of every width becomes float64, which holds each of their values; integers
stay what they are, and their differences are exact.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from distckpt import dtypes

Array: TypeAlias = npt.NDArray[Any]

# So few elements at a time that what is computed from them stays in the nearest cache, in
# memory that the process has already. Measured: four times as many take twice as long.
_CHUNK = 8 * 1024
# Squares of what is in between neither overflow nor lose digits.
_SMALL_SQUARE, _LARGE_SQUARE = 1e-280, 1e300

_INTEGERS = {
    f"{sign}int{bits}": f"<{letter}{bits // 8}"
    for sign, letter in (("", "i"), ("u", "u"))
    for bits in (8, 16, 32, 64)
}
_FLOATS = {"float16": "<f2", "float32": "<f4", "float64": "<f8"}
_COMPLEX = {"complex64": "<c8", "complex128": "<c16"}
# Exponent's bits and bias of the formats of one byte, and whether infinities are in them.
_SMALL_FLOATS = {
    "float8_e4m3fn": (4, 7, False),
    "float8_e5m2": (5, 15, True),
    "float8_e4m3fnuz": (4, 8, False),
    "float8_e5m2fnuz": (5, 16, False),
}
_SCALES = "float8_e8m0fnu"


def are_numbers(dtype: str) -> bool:
    """Tell whether elements of this dtype can be computed with here.

    Bits are no numbers; what is packed or narrower than a byte is not unpacked.
    """
    return _reader_of(dtype) is not None


def numbers_of(raw: Array, dtype: str) -> Array:
    """Return the values of elements: float64, complex128, or integers of their own type.

    Args:
        raw: Their bytes, as ``uint8``.
        dtype: torch's name of their type, one of numbers; booleans become 0 and 1.
    """
    read = _reader_of(dtype)
    assert read is not None, dtype
    with np.errstate(invalid="ignore"):  # a signalling NaN is a NaN
        values: Array = read(raw)
    return values


@lru_cache(maxsize=64)
def _reader_of(dtype: str) -> Callable[[Array], Array] | None:
    if dtype in _INTEGERS:
        return lambda raw: raw.view(_INTEGERS[dtype])
    if dtype == "bool":
        return lambda raw: raw
    if dtype in _FLOATS:
        return lambda raw: raw.view(_FLOATS[dtype]).astype(np.float64)
    if dtype in _COMPLEX:
        return lambda raw: raw.view(_COMPLEX[dtype]).astype(np.complex128)
    if dtype == "complex32":
        return lambda raw: raw.view("<f2").astype(np.float64).view(np.complex128)
    if dtype == "bfloat16":
        return _read_bfloat16
    if dtype == "bcomplex32":
        return lambda raw: _read_bfloat16(raw).view(np.complex128)
    if dtype in _SMALL_FLOATS or dtype == _SCALES:
        table = _scales() if dtype == _SCALES else _small_floats(*_SMALL_FLOATS[dtype])
        return lambda raw: table[raw]
    return None


def _read_bfloat16(raw: Array) -> Array:
    # The upper half of a float32.
    upper: Array = raw.view("<u2").astype("<u4") << np.uint32(16)
    return upper.view("<f4").astype(np.float64)


def _small_floats(exponent_bits: int, bias: int, has_infinities: bool) -> Array:
    """Return the values of all 256 bytes; after Micikevicius et al. 2022."""
    mantissa_bits = 7 - exponent_bits
    is_unsigned_zero = bias == 2 ** (exponent_bits - 1)  # "uz": one zero, one NaN
    table = np.empty(256)
    for byte in range(256):
        exponent = byte >> mantissa_bits & (1 << exponent_bits) - 1
        mantissa = byte & (1 << mantissa_bits) - 1
        fraction = mantissa / (1 << mantissa_bits) + (exponent > 0)
        value = math.ldexp(fraction, max(exponent, 1) - bias)
        if is_unsigned_zero:
            value = math.nan if byte == 0x80 else value
        elif has_infinities and exponent == (1 << exponent_bits) - 1:
            value = math.nan if mantissa else math.inf
        elif not has_infinities and byte & 0x7F == 0x7F:
            value = math.nan
        table[byte] = -value if byte & 0x80 else value
    return table


def _scales() -> Array:
    """Return the values of ``float8_e8m0fnu``: powers of two, and one NaN."""
    return np.array([math.ldexp(1.0, byte - 127) for byte in range(255)] + [math.nan])


class Distance:
    """How far two tensors are apart, given their elements piece by piece.

    Elements of one dtype differ if their bytes do, so 0.0 and -0.0 differ, and a NaN does
    not differ from itself. Those of two dtypes are compared as float64 (or complex128), and
    all NaNs are equal. Only elements that are finite in both have a distance; complex ones
    that in their plane.

    Args:
        dtype: The elements' type in the first tensor.
        other_dtype: That in the second.

    Attributes:
        num_elements: How many were compared.
        num_differing: How many of them differ.
        num_new_nan: Not NaN in the first, NaN in the second.
        num_new_infinite: Not infinite in the first, infinite in the second.
        largest: The largest distance of two elements: exact of integers, else a float. None
            if they are no numbers.
    """

    def __init__(self, dtype: str, other_dtype: str) -> None:
        self._dtypes = (dtype, other_dtype)
        self._sizes = tuple(map(dtypes.item_size_bytes, self._dtypes))
        self._are_alike = dtype == other_dtype
        self._are_numbers = all(map(are_numbers, self._dtypes))
        self._are_exact = self._are_alike and (dtype == "bool" or dtype in _INTEGERS)
        self.num_elements = 0
        self.num_differing = 0
        self.num_new_nan = 0
        self.num_new_infinite = 0
        self.largest: float | None = 0 if self._are_numbers else None
        self._moved = _Norm()
        self._length = _Norm()

    @property
    def can_compare(self) -> bool:
        """Tell whether elements of the two types can be compared at all."""
        return self._are_alike or self._are_numbers

    @property
    def relative(self) -> float | None:
        """The length of the difference over that of the first tensor (L2).

        None if they are no numbers, or if the first has no length and the second has.
        """
        if not self._are_numbers:
            return None
        if not self._moved.value:
            return 0.0
        return self._moved.value / self._length.value if self._length.value else None

    def add(self, first: memoryview, second: memoryview) -> None:
        """Compare some more elements, given their bytes."""
        raw, other_raw = np.frombuffer(first, np.uint8), np.frombuffer(second, np.uint8)
        item, other_item = self._sizes
        count = len(raw) // item
        assert count * item == len(raw) and count * other_item == len(other_raw)
        self.num_elements += count
        with np.errstate(over="ignore", invalid="ignore"):
            for start in range(0, count, _CHUNK):
                stop = start + _CHUNK
                self._add_chunk(
                    raw[start * item : stop * item],
                    other_raw[start * other_item : stop * other_item],
                )

    def _add_chunk(self, raw: Array, other_raw: Array) -> None:
        dtype, other_dtype = self._dtypes
        if self._are_alike:
            num_differing = _count_differing(raw, other_raw, self._sizes[0])
            self.num_differing += num_differing
            if not self._are_numbers:
                return
            if not num_differing:
                values = numbers_of(raw, dtype)
                self._length.add(_floats(values if self._are_exact else _finite(values)))
                return
        values, other_values = numbers_of(raw, dtype), numbers_of(other_raw, other_dtype)
        if self._are_exact:
            self._add_exactly(values, other_values)
            return
        if not self._are_alike:
            same = (values == other_values) | (np.isnan(values) & np.isnan(other_values))
            self.num_differing += int(np.count_nonzero(~same))
        self._add_floats(values, other_values)

    def _add_exactly(self, values: Array, other_values: Array) -> None:
        larger, smaller = np.maximum(values, other_values), np.minimum(values, other_values)
        # Modulo 2**64, so that it is right from one end of int64 to the other.
        apart = larger.astype(np.uint64) - smaller.astype(np.uint64)
        self._note_largest(int(apart.max()))
        self._moved.add(_floats(apart))
        self._length.add(_floats(values))

    def _add_floats(self, values: Array, other_values: Array) -> None:
        apart = other_values - values
        # Nearly always all of them are finite, and so is then what this adds up.
        square = _sum_of_squares(_floats(apart))
        if not math.isfinite(square):
            new_nan = np.isnan(other_values) & ~np.isnan(values)
            new_infinite = np.isinf(other_values) & ~np.isinf(values)
            self.num_new_nan += int(np.count_nonzero(new_nan))
            self.num_new_infinite += int(np.count_nonzero(new_infinite))
            finite = np.isfinite(values) & np.isfinite(other_values)
            values, apart = values[finite], apart[finite]
            if not len(values):
                return
            square = _sum_of_squares(_floats(apart))
        self._note_largest(float(np.abs(apart).max()))
        self._moved.add(_floats(apart), square)
        self._length.add(_floats(values))

    def _note_largest(self, apart: float) -> None:
        assert self.largest is not None
        self.largest = max(self.largest, apart)


def _count_differing(raw: Array, other_raw: Array, item: int) -> int:
    if item not in (1, 2, 4, 8):
        width = 8 if item % 8 == 0 else 1
        parts = raw.view(f"<u{width}") != other_raw.view(f"<u{width}")
        return int(np.count_nonzero(parts.reshape(-1, item // width).any(axis=1)))
    kind = f"<u{item}"
    return int(np.count_nonzero(raw.view(kind) != other_raw.view(kind)))


def _finite(values: Array) -> Array:
    finite = np.isfinite(values)
    return values if finite.all() else values[finite]


def _floats(values: Array) -> Array:
    """Return values as float64; of complex ones both parts, one behind the other."""
    if values.dtype.kind == "c":
        return np.ascontiguousarray(values).view(np.float64)
    return values.astype(np.float64, copy=False)


class _Norm:
    """The length of a vector that comes in pieces, without overflow on the way."""

    def __init__(self) -> None:
        self.value = 0.0

    def add(self, values: Array, square: float | None = None) -> None:
        if square is None:
            square = _sum_of_squares(values)
        if _SMALL_SQUARE < square < _LARGE_SQUARE:
            self.value = math.hypot(self.value, math.sqrt(square))
            return
        largest = float(np.abs(values).max(initial=0.0))
        if largest:
            scaled = values / largest
            length = largest * math.sqrt(_sum_of_squares(scaled))
            self.value = math.hypot(self.value, length)


def _sum_of_squares(values: Array) -> float:
    # No BLAS: it may start threads, which wait for each other on a busy machine.
    return float(np.einsum("i,i->", values, values))
