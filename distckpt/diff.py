"""What is different between two checkpoints, and how far tensors have moved: no torch.

Whatever layout each of them has: tensors are compared as wholes. Nothing is read of a
tensor that checksums show to be equal; of any other a few MiB at a time, in the order of
the files if both sides are cut alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple, TypeAlias

from distckpt import boxes, strict_json
from distckpt.boxes import Box
from distckpt.dtypes import item_size_bytes
from distckpt.elements import Distance
from distckpt.opened import OpenedCheckpoint, Part, RankTensors
from distckpt.stored_tensor import StoredTensor
from distckpt.verify import Begin

# What is read at a time of each side: a stretch of one file each, where both are cut alike.
# Else many files give a part of each piece, and each part costs the blocks at its ends.
_PIECE_BYTES = 8 * 2**20
_MIXED_PIECE_BYTES = 32 * 2**20

Shape: TypeAlias = tuple[int, ...]
_Handles: TypeAlias = tuple[StoredTensor, StoredTensor]


class Name(NamedTuple):
    """The name of a tensor or plain value.

    Attributes:
        text: The full name.
        ranks: Whose own it is; none if it is the job's.
    """

    text: str
    ranks: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor that is in both.

    Attributes:
        name: Its name. What ranks have of their own counts as one, where it is alike.
        dtypes: Its dtype in each.
        shapes: Its shape in each.
        distance: How far it has moved; None if that was not found out, or cannot be.
    """

    name: Name
    dtypes: tuple[str, str]
    shapes: tuple[Shape, Shape]
    distance: Distance | None = None

    @property
    def is_changed(self) -> bool:
        """Tell whether anything of it is known to be different."""
        if self.dtypes[0] != self.dtypes[1] or self.shapes[0] != self.shapes[1]:
            return True
        return self.distance is not None and self.distance.num_differing > 0

    @property
    def far(self) -> tuple[float, ...]:
        """What to sort by: larger the farther it has moved, and if that cannot be told."""
        distance = self.distance
        if distance is None:
            return (math.inf,)
        relative = distance.relative
        if relative is None and distance.largest is not None:
            relative = math.inf  # from all zeros
        elif relative is None:
            relative = distance.num_differing / max(1, distance.num_elements)
        has_new = distance.num_new_nan + distance.num_new_infinite > 0
        return (has_new, relative, distance.largest or 0, distance.num_differing)


@dataclass(frozen=True, slots=True)
class ValuePair:
    """A plain value that is in both, and is not the same.

    Attributes:
        name: Its name; of ranks' own with those on which it is different.
        encoded: It in each, as ``values.encode`` makes it; of ranks' own on the first.
    """

    name: Name
    encoded: tuple[Any, Any]


@dataclass(frozen=True, slots=True)
class Difference:
    """What is different between two checkpoints.

    Attributes:
        tensors_in_one: Tensors that only the first has, and those that only the second has.
        values_in_one: Plain values likewise.
        tensors: Tensors in both that are different.
        values: Plain values in both that are different.
        num_equal_tensors: How many are not, as far as was looked.
        num_equal_values: Likewise.
    """

    tensors_in_one: tuple[list[Name], list[Name]]
    values_in_one: tuple[list[Name], list[Name]]
    tensors: list[TensorPair]
    values: list[ValuePair]
    num_equal_tensors: int
    num_equal_values: int

    @property
    def is_equal(self) -> bool:
        """Tell whether nothing is different."""
        in_one = (*self.tensors_in_one, *self.values_in_one)
        return not (self.tensors or self.values or any(in_one))


def compare_names(first: OpenedCheckpoint, second: OpenedCheckpoint) -> Difference:
    """Compare what the manifests say: names, dtypes, shapes, and the job's plain values.

    What each rank has of its own is not looked at: it stands in the shard files.
    """
    found = _Found()
    found.add_shared(first, second)
    return found.difference()


def compare(first: OpenedCheckpoint, second: OpenedCheckpoint, begin: Begin) -> Difference:
    """Compare everything; what is read is verified.

    Read are the headers of all shard files, and those tensors that their checksums do not
    show to be equal.

    Args:
        first: The older one, say.
        second: The newer one.
        begin: Told how many bytes of tensors will be read, of both together.

    Raises:
        FormatError, StorageError: One of them cannot be read, or is damaged.
    """
    found = _Found()
    found.add_shared(first, second)
    # File by file, and not tensor by tensor: there may be more files than can be open.
    for rank in range(max(first.world_size, second.world_size)):
        found.add_own(rank, _own(first, rank), _own(second, rank))
        for side, checkpoint in enumerate((first, second)):
            if rank < checkpoint.world_size:
                found.note(side, checkpoint.parts(rank))
    to_read = [task for task in found.tasks if task.must_be_read]
    advance = begin(sum(task.size_bytes for task in to_read))
    for rank in range(first.world_size):
        for part in first.parts(rank):
            for task in found.tasks_of(0, part):
                if task.must_be_read and task.is_cut_alike:
                    task.read(part.rank, part.box, _PIECE_BYTES, advance)
    for task in to_read:
        if not task.is_cut_alike:
            for rank_or_none, shape in task.wholes():
                whole = boxes.whole(shape)
                task.read(rank_or_none, whole, _MIXED_PIECE_BYTES, advance)
    return found.difference()


class _NoRank(dict[str, StoredTensor]):
    """What a rank that there was not has of its own."""

    encoded_values: Mapping[str, Any] = {}


def _own(checkpoint: OpenedCheckpoint, rank: int) -> RankTensors | _NoRank:
    return checkpoint.per_rank(rank) if rank < checkpoint.world_size else _NoRank()


_Side: TypeAlias = OpenedCheckpoint | RankTensors | _NoRank


class _Task:
    """One comparison of tensors; its result holds for all names that are tied.

    Attributes:
        names: What they are called.
        handles: Both of them, by the rank whose own they are; None if they are the job's.
        distance: The result; None if they cannot be compared.
    """

    def __init__(self, handles: _Handles) -> None:
        first, second = handles
        self.names: list[str] = []
        self.handles: dict[int | None, _Handles] = {}
        self._dtypes = (first.dtype, second.dtype)
        self._shapes = (first.shape, second.shape)
        self._cuts = [0, 0]
        self._contents = [0, 0]
        distance = Distance(*self._dtypes)
        can_compare = first.shape == second.shape and distance.can_compare
        self.distance = distance if can_compare else None

    def note(self, side: int, part: Part) -> None:
        """Take note of a part that a file of one side holds, and of its checksums."""
        # Added up, so that they may come in any order: other ranks may have written them.
        self._cuts[side] += _fingerprint(part.rank, part.box)
        self._contents[side] += _fingerprint(*part[1:])

    @property
    def is_cut_alike(self) -> bool:
        """Tell whether both sides consist of the same parts."""
        return self._cuts[0] == self._cuts[1]

    @property
    def must_be_read(self) -> bool:
        """Tell whether they can be compared, and checksums do not show them to be equal."""
        are_equal = (
            self._dtypes[0] == self._dtypes[1] and self._contents[0] == self._contents[1]
        )
        return self.distance is not None and not are_equal

    @property
    def size_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(
            one.size_bytes + other.size_bytes for one, other in self.handles.values()
        )

    def wholes(self) -> Iterator[tuple[int | None, Shape]]:
        """Walk them, each as a whole."""
        return ((rank, first.shape) for rank, (first, _) in self.handles.items())

    def read(
        self,
        rank: int | None,
        box: Box,
        piece_bytes: int,
        advance: Callable[[int], object],
    ) -> None:
        """Read a region of both, and add up how far they are apart."""
        assert self.distance is not None
        spans = zip(box.offset, box.shape, strict=True)
        region = tuple(slice(start, start + length) for start, length in spans)
        sizes = list(map(item_size_bytes, self._dtypes))
        num_elements = piece_bytes // max(sizes)
        streams = [
            handle[region].stream(num_elements * item)
            for handle, item in zip(self.handles[rank], sizes, strict=True)
        ]
        for piece, other_piece in zip(*streams, strict=True):
            self.distance.add(piece, other_piece)
            advance(len(piece) + len(other_piece))

    def pairs(self) -> Iterator[TensorPair]:
        """Return what came of it, for each of the names."""
        ranks = tuple(rank for rank in self.handles if rank is not None)
        for name in self.names:
            yield TensorPair(Name(name, ranks), self._dtypes, self._shapes, self.distance)


def _fingerprint(*what: Any) -> int:
    return int.from_bytes(blake2b(repr(what).encode(), digest_size=16).digest(), "big")


# By name, and whether they are ranks' own: of which ranks.
_Ranks: TypeAlias = dict[tuple[str, bool], list[int]]


class _Found:
    """Names, sorted into those that are in both and those that are in one."""

    def __init__(self) -> None:
        self._tasks: dict[tuple[Any, ...], _Task] = {}
        # Of each side, by whose own it is and by name.
        self._tasks_of: tuple[_TasksOf, _TasksOf] = ({}, {})
        self._tensors_in_one: tuple[_Ranks, _Ranks] = ({}, {})
        self._values_in_one: tuple[_Ranks, _Ranks] = ({}, {})
        self._changed_values: dict[tuple[str, bool], tuple[list[int], Any, Any]] = {}
        self._all_values: set[tuple[str, bool]] = set()

    @property
    def tasks(self) -> Iterable[_Task]:
        """The comparisons of the tensors that are in both."""
        return self._tasks.values()

    def tasks_of(self, side: int, part: Part) -> Iterable[_Task]:
        """Return what a part of one side is needed for; of tied tensors more than one."""
        return self._tasks_of[side].get((part.rank, part.name), ())

    def note(self, side: int, parts: Iterable[Part]) -> None:
        """Take note of what a file of one side holds."""
        for part in parts:
            for task in self.tasks_of(side, part):
                task.note(side, part)

    def add_shared(self, first: OpenedCheckpoint, second: OpenedCheckpoint) -> None:
        """Take up what the job has."""
        rows, other_rows = (one.manifest.assignment.rows for one in (first, second))
        for name in _in_both(first, second, self._tensors_in_one):
            # Tied names are one tensor; where they are tied in both it is compared once.
            tied = (rows[name].same_as or name, other_rows[name].same_as or name)
            self._add(tied, name, None, (first[name], second[name]), tied)
        self._add_values(first, second)

    def add_own(self, rank: int, first: _Side, second: _Side) -> None:
        """Take up what one rank has of its own."""
        for name in _in_both(first, second, self._tensors_in_one, rank):
            handles = first[name], second[name]
            alike = [(one.dtype, one.shape) for one in handles]
            self._add((name, *alike), name, rank, handles, (name, name))
        self._add_values(first, second, rank)

    def _add(
        self,
        key: tuple[Any, ...],
        name: str,
        rank: int | None,
        handles: _Handles,
        stored_names: tuple[str, str],
    ) -> None:
        task = self._tasks.setdefault(key, _Task(handles))
        if name not in task.names:
            task.names.append(name)
        if rank not in task.handles:
            task.handles[rank] = handles
            for tasks, stored_name in zip(self._tasks_of, stored_names, strict=True):
                tasks.setdefault((rank, stored_name), []).append(task)

    def _add_values(self, first: _Side, second: _Side, rank: int | None = None) -> None:
        encoded, other_encoded = first.encoded_values, second.encoded_values
        for name in _in_both(encoded, other_encoded, self._values_in_one, rank):
            key = (name, rank is not None)
            self._all_values.add(key)
            one, other = encoded[name], other_encoded[name]
            # As text: to Python 1, 1.0 and True are equal.
            if strict_json.dumps(one) != strict_json.dumps(other):
                ranks, _, _ = self._changed_values.setdefault(key, ([], one, other))
                ranks += [] if rank is None else [rank]

    def difference(self) -> Difference:
        """Return what came of it all."""
        pairs = [pair for task in self.tasks for pair in task.pairs()]
        tensors = [pair for pair in pairs if pair.is_changed]
        return Difference(
            tensors_in_one=_names_of(self._tensors_in_one),
            values_in_one=_names_of(self._values_in_one),
            tensors=tensors,
            values=[
                ValuePair(Name(name, tuple(ranks)), (one, other))
                for (name, _), (ranks, one, other) in self._changed_values.items()
            ],
            num_equal_tensors=len(pairs) - len(tensors),
            num_equal_values=len(self._all_values) - len(self._changed_values),
        )


_TasksOf: TypeAlias = dict[tuple[int | None, str], list[_Task]]


def _in_both(
    first: Mapping[str, Any],
    second: Mapping[str, Any],
    in_one: tuple[_Ranks, _Ranks],
    rank: int | None = None,
) -> Iterator[str]:
    """Walk the names that are in both; note those that are in one."""
    for one, other, found in ((first, second, in_one[0]), (second, first, in_one[1])):
        for name in one:
            if name not in other:
                ranks = found.setdefault((name, rank is not None), [])
                ranks += [] if rank is None else [rank]
    yield from (name for name in first if name in second)


def _names_of(in_one: tuple[_Ranks, _Ranks]) -> tuple[list[Name], list[Name]]:
    one, other = (
        [Name(name, tuple(ranks)) for (name, _), ranks in found.items()] for found in in_one
    )
    return one, other
