"""N-dimensional regions of a tensor: overlap, split, contiguous runs.

Everything counts in elements of the global tensor, in row-major order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Box:
    """A region: where it starts and how far it reaches, one integer per dimension."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        assert len(self.offset) == len(self.shape), f"{self.offset=} {self.shape=}"

    @property
    def size(self) -> int:
        """Number of elements; 1 for a 0-dim tensor."""
        return prod(self.shape)

    def is_within(self, shape: tuple[int, ...]) -> bool:
        """Tell whether the region lies inside a tensor of this shape."""
        return len(shape) == len(self.shape) and all(
            offset >= 0 and length >= 0 and offset + length <= limit
            for offset, length, limit in zip(self.offset, self.shape, shape, strict=True)
        )


def whole(shape: tuple[int, ...]) -> Box:
    """Return the region that is all of a tensor."""
    return Box((0,) * len(shape), tuple(shape))


def checked_size(shape: Sequence[int], limit: int) -> int | None:
    """Count the elements; None once the product of leading lengths passes a limit.

    So also for a shape with a zero behind: readers with fixed-size integers refuse it.
    """
    size = 1
    for length in shape:
        size *= length
        if size > limit:
            return None
    return size


def overlap(first: Box, second: Box) -> Box | None:
    """Return the region that two regions share; None if they share no element."""
    offset = tuple(map(max, first.offset, second.offset))
    shape = tuple(
        min(a + la, b + lb) - start
        for a, la, b, lb, start in zip(
            first.offset,
            first.shape,
            second.offset,
            second.shape,
            offset,
            strict=True,
        )
    )
    return Box(offset, shape) if all(length > 0 for length in shape) else None


def contiguous_runs(
    region: Box, source: Box, target: Box
) -> Iterator[tuple[int, int, int]]:
    """Walk a region in runs that are contiguous in both of two row-major buffers.

    Args:
        region: What to copy; must lie inside ``source`` and ``target``.
        source: The region that the first buffer holds.
        target: The region that the second buffer holds.

    Yields:
        ``(source_index, target_index, length)``, in elements from each buffer's start.
    """
    if region.size == 0:
        return
    # Trailing dimensions that the region spans entirely in both buffers merge into
    # one run, together with the first one that it does not span.
    run_dim = len(region.shape)
    length = 1
    while run_dim > 0:
        run_dim -= 1
        length *= region.shape[run_dim]
        if not (region.shape[run_dim] == source.shape[run_dim] == target.shape[run_dim]):
            break
    source_strides = _strides(source.shape)
    target_strides = _strides(target.shape)
    source_start = _index(region.offset, source.offset, source_strides)
    target_start = _index(region.offset, target.offset, target_strides)
    strides = list(zip(source_strides, target_strides, strict=True))
    for source_index, target_index in _starts(
        region.shape[:run_dim], strides, source_start, target_start
    ):
        yield source_index, target_index, length


def split_range(shape: tuple[int, ...], start: int, stop: int) -> list[Box]:
    """Cut the row-major elements ``start`` to ``stop`` of a tensor into boxes.

    The boxes come in row-major order; each is contiguous in the tensor's memory.
    """
    assert 0 <= start <= stop <= prod(shape), f"{shape=} {start=} {stop=}"
    if start == stop:
        return []
    if (start, stop) == (0, prod(shape)):
        return [whole(shape)]
    row = prod(shape[1:])
    first_row, within_first = divmod(start, row)
    last_row, within_last = divmod(stop, row)
    if first_row == last_row:
        return _in_row(shape, first_row, within_first, within_last)
    result = []
    if within_first:
        result += _in_row(shape, first_row, within_first, row)
        first_row += 1
    if first_row < last_row:
        result.append(
            Box(
                (first_row, *(0,) * (len(shape) - 1)),
                (last_row - first_row, *shape[1:]),
            )
        )
    if within_last:
        result += _in_row(shape, last_row, 0, within_last)
    return result


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> list[Box]:
    return [
        Box((row, *box.offset), (1, *box.shape))
        for box in split_range(shape[1:], start, stop)
    ]


def _strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = [1] * len(shape)
    for dim in range(len(shape) - 2, -1, -1):
        strides[dim] = strides[dim + 1] * shape[dim + 1]
    return tuple(strides)


def _index(
    offset: tuple[int, ...], origin: tuple[int, ...], strides: tuple[int, ...]
) -> int:
    return sum((o - b) * s for o, b, s in zip(offset, origin, strides, strict=True))


def _starts(
    shape: tuple[int, ...], strides: Sequence[tuple[int, int]], source: int, target: int
) -> Iterator[tuple[int, int]]:
    """Walk the elements of a region of two buffers: there may be millions."""
    if not shape:
        yield source, target
        return
    (source_stride, target_stride), length = strides[0], shape[0]
    starts = zip(
        range(source, source + length * source_stride, source_stride),
        range(target, target + length * target_stride, target_stride),
        strict=True,
    )
    if len(shape) == 1:
        yield from starts
        return
    for first, second in starts:
        yield from _starts(shape[1:], strides[1:], first, second)
