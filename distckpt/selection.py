"""Which region of a tensor an index like ``[2:5, :, 3]`` means: arithmetic."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NoReturn

from distckpt.boxes import Box, whole
from distckpt.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Selection:
    """A region of a tensor, and the shape that it is given to the caller in.

    Attributes:
        box: The region.
        dims: Dimensions of the tensor that the caller sees; an integer index takes one
            away.
    """

    box: Box
    dims: tuple[int, ...]

    @staticmethod
    def of_all(shape: tuple[int, ...]) -> Selection:
        """Select all of a tensor."""
        return Selection(whole(shape), tuple(range(len(shape))))

    @property
    def shape(self) -> tuple[int, ...]:
        """Lengths of the dimensions that the caller sees."""
        return tuple(self.box.shape[dim] for dim in self.dims)

    def narrowed(self, index: Any, name: str) -> Selection:
        """Select a part of what is selected, as numpy's basic indexing does.

        Args:
            index: Integers, slices of step 1, ``...``, or a tuple of these.
            name: The tensor's, for messages.

        Raises:
            ConfigError: Anything else, or a position that is not there.
        """
        offset, shape = [*self.box.offset], [*self.box.shape]
        dims = []
        items = _one_for_each(index, len(self.dims), name)
        for dim, item in zip(self.dims, items, strict=True):
            start, length, is_kept = _span(item, shape[dim], name)
            offset[dim] += start
            shape[dim] = length
            if is_kept:
                dims.append(dim)
        return Selection(Box(tuple(offset), tuple(shape)), tuple(dims))


def _one_for_each(index: Any, num_dims: int, name: str) -> list[Any]:
    """Return one item for each dimension: what is left out is all of it."""
    items = [*index] if isinstance(index, tuple) else [index]
    at = [position for position, item in enumerate(items) if item is Ellipsis]
    if len(at) > 1:
        _refuse(name, "an index may have one '...' only", index)
    missing = num_dims - (len(items) - len(at))
    if missing < 0:
        _refuse(name, f"it has {num_dims} dimensions, the index more", index)
    fill = [slice(None)] * missing
    if not at:
        return items + fill
    return items[: at[0]] + fill + items[at[0] + 1 :]


def _span(item: Any, length: int, name: str) -> tuple[int, int, bool]:
    """Return where an item starts, how many elements it has, and if the dimension stays."""
    if isinstance(item, slice):
        try:
            start, stop, step = item.indices(length)
        except (TypeError, ValueError):
            _refuse(name, "slices take integers, and no step of 0", item)
        if step != 1:
            _refuse(name, "only slices with step 1 are read", item)
        return start, max(0, stop - start), True
    try:
        # What numpy takes for a mask is no position.
        position = None if "bool" in type(item).__name__ else operator.index(item)
    except TypeError:
        position = None
    if position is None:
        _refuse(name, "an index is made of integers, slices and '...'", item)
    if not -length <= position < length:
        _refuse(name, f"position {position} in a dimension of {length} elements", item)
    return position % length, 1, False


def _refuse(name: str, reason: str, index: Any) -> NoReturn:
    msg = f"tensor {name!r}: {reason}; got {index!r:.100}. Read it whole and index that."
    raise ConfigError(msg)
