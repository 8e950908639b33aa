"""Sharded tensors: which box of which tensor a rank holds, by arithmetic alone.

A sharded tensor lies on a mesh, a grid of ranks. For each dimension of the mesh a
placement says what happens along it:

* ``"R"``: the tensor is replicated.
* ``"S<d>"``: dimension ``d`` of the tensor is cut, as ``torch.chunk`` does it: equal
  chunks of the length divided by the ranks, rounded up; the last ones may be shorter or
  empty. Where several dimensions of the mesh cut one of the tensor, each cuts what the
  ones before it left.
* ``"T<d>"``: likewise, but only after the ``"S<d>"`` that follow. So FSDP2 cuts what
  tensor parallelism has cut already, although its dimension of the mesh comes first
  (torch's ``_StridedShard``). Every rank's part is one box, also where lengths are uneven.

The rules are part of the on-disk format (docs/format.md).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod
from typing import Any, NoReturn
from weakref import WeakValueDictionary

from distckpt.boxes import Box
from distckpt.errors import ManifestError

REPLICATE = "R"
SHARD = "S"
STRIDED = "T"

_PLACEMENT = re.compile(r"R|[ST](0|[1-9][0-9]?)")
_MAX_DIMS = 64
_MAX_RANKS = 10_000_000

# A coordinate in a mesh; None stands for every index along that dimension.
Coordinate = tuple[int | None, ...]


# Without slots, so that equal meshes of many rows can be one object, see _interned.
@dataclass(frozen=True)
class Mesh:
    """A grid of ranks, no rank twice.

    Nearly every mesh is regular: ``rank = first + sum(index * stride)``, where each stride
    is larger than all that the smaller ones can add up to. Such a one is kept, and
    written, as these few numbers, however many ranks it has; any other as a list. Made by
    ``mesh_of`` or ``mesh_from_json``, equal meshes are equal objects.

    Attributes:
        shape: How many ranks along each dimension.
        first: The rank at the origin.
        strides: One a dimension; 0 where it has one rank only. Empty for a listed mesh.
        listed: All ranks, row-major, of a mesh that is not regular; else empty.
    """

    shape: tuple[int, ...]
    first: int
    strides: tuple[int, ...]
    listed: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not 0 < len(self.shape) <= _MAX_DIMS or min(self.shape) < 1:
            _refuse(f"mesh of shape {self.shape!r:.200}")
        size = 1
        for length in self.shape:
            size *= length
            if size > _MAX_RANKS:
                _refuse(f"mesh of shape {self.shape!r:.200}")
        if max(self.first, max(self.listed, default=-1)) >= _MAX_RANKS:
            # Without the rank itself: one that is too long to be spelled can be built.
            _refuse(f"mesh of shape {self.shape} with a rank of {_MAX_RANKS} or more")
        if self.listed:
            if len(self.listed) != size or len({*self.listed}) != size:
                _refuse(f"mesh of shape {self.shape} with ranks {self.listed!r:.200}")
            if min(self.listed) < 0 or _regular(self.shape, self.listed) is not None:
                _refuse(f"mesh with ranks {self.listed!r:.200}")
            if (self.first, self.strides) != (self.listed[0], ()):
                _refuse(f"mesh with ranks {self.listed!r:.200}, first {self.first}")
        elif self.first < 0 or not _is_nested(self.shape, self.strides):
            _refuse(f"mesh of shape {self.shape} with strides {self.strides!r:.200}")

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        # Not of the whole list: every row of a table asks for it.
        return hash((self.shape, self.first, self.strides, self.listed[-1:]))

    @property
    def size(self) -> int:
        """Number of ranks."""
        return prod(self.shape)

    @property
    def highest(self) -> int:
        """The highest rank."""
        return max(self.listed) if self.listed else self.first + _reach(self)

    @property
    def lowest(self) -> int:
        """The lowest rank."""
        return min(self.listed) if self.listed else self.first

    @property
    def ranks(self) -> list[int]:
        """All ranks, row-major."""
        return self.ranks_at((None,) * len(self.shape))

    def coordinate_of(self, rank: int) -> tuple[int, ...] | None:
        """Return where a rank stands; None if it is not in the mesh."""
        if self.listed:
            return self._coordinates.get(rank)
        coordinate = [0] * len(self.shape)
        rest = rank - self.first
        for dim in self._descending:
            index, rest = divmod(rest, self.strides[dim])
            if not 0 <= index < self.shape[dim]:
                return None
            coordinate[dim] = index
        return tuple(coordinate) if rest == 0 else None

    def ranks_at(self, coordinate: Coordinate) -> list[int]:
        """Return the ranks at a coordinate, row-major: several where it has a None."""
        choices = [
            range(length) if index is None else (index,)
            for index, length in zip(coordinate, self.shape, strict=True)
        ]
        if self.listed:
            return [self.listed[self._position(index)] for index in product(*choices)]
        ranks = [self.first]
        for indices, stride in zip(choices, self.strides, strict=True):
            ranks = [rank + index * stride for rank in ranks for index in indices]
        return ranks

    def _position(self, coordinate: tuple[int, ...]) -> int:
        position = 0
        for index, length in zip(coordinate, self.shape, strict=True):
            position = position * length + index
        return position

    @cached_property
    def _coordinates(self) -> dict[int, tuple[int, ...]]:
        return dict(zip(self.listed, product(*map(range, self.shape)), strict=True))

    @cached_property
    def _descending(self) -> list[int]:
        """Dimensions with more than one rank, the one with the largest stride first."""
        longer = (dim for dim, length in enumerate(self.shape) if length > 1)
        return sorted(longer, key=lambda dim: -self.strides[dim])

    def to_json(self) -> dict[str, Any]:
        """Encode to a JSON object; equal meshes to equal ones."""
        if self.listed:
            return {"shape": list(self.shape), "ranks": list(self.listed)}
        return {
            "shape": list(self.shape),
            "first": self.first,
            "strides": list(self.strides),
        }


def mesh_of(shape: Sequence[int], ranks: Sequence[int]) -> Mesh:
    """Make a mesh from its ranks, row-major.

    Raises:
        ManifestError: They are no mesh.
    """
    if not ranks or prod(shape) != len(ranks):
        _refuse(f"mesh of shape {shape!r:.200} with {len(ranks)} ranks")
    strides = _regular(shape, ranks)
    if strides is None:
        return _interned(Mesh(tuple(shape), ranks[0], (), tuple(ranks)))
    return _interned(Mesh(tuple(shape), ranks[0], strides))


def mesh_from_json(fields: Any) -> Mesh:
    """Decode a mesh.

    Raises:
        ManifestError: For anything that is not the encoding of a mesh.
    """
    if not isinstance(fields, dict) or tuple(fields) not in (
        ("shape", "first", "strides"),
        ("shape", "ranks"),
    ):
        _refuse(f"not a mesh: {fields!r:.200}")
    lists = [fields[key] for key in ("shape", "strides", "ranks") if key in fields]
    for numbers in lists:
        if not isinstance(numbers, list) or not all(type(n) is int for n in numbers):
            _refuse(f"not a mesh: {fields!r:.200}")
    shape = tuple(fields["shape"])
    if "ranks" in fields:
        ranks = tuple(fields["ranks"])
        return _interned(Mesh(shape, ranks[0] if ranks else -1, (), ranks))
    if type(fields["first"]) is not int:
        _refuse(f"not a mesh: {fields!r:.200}")
    return _interned(Mesh(shape, fields["first"], tuple(fields["strides"])))


_meshes: WeakValueDictionary[object, Mesh] = WeakValueDictionary()


def _interned(mesh: Mesh) -> Mesh:
    """Return the one object that stands for all equal meshes.

    Ten thousand rows on a mesh of ten thousand ranks must not hold that list each.
    """
    # Not by the mesh: a key is held as long as its value, and would be that value.
    key = (mesh.shape, mesh.first, mesh.strides, mesh.listed)
    return _meshes.setdefault(key, mesh)


def _regular(shape: Sequence[int], ranks: Sequence[int]) -> tuple[int, ...] | None:
    """Return the strides that describe a list of ranks; None if none do."""
    strides = []
    step = len(ranks)
    for length in shape:
        step //= length
        strides.append(ranks[step] - ranks[0] if length > 1 else 0)
    if not _is_nested(shape, tuple(strides)):
        return None
    expected = [ranks[0]]
    for length, stride in zip(shape, strides, strict=True):
        expected = [rank + i * stride for rank in expected for i in range(length)]
    return tuple(strides) if expected == list(ranks) else None


def _is_nested(shape: Sequence[int], strides: tuple[int, ...]) -> bool:
    """Tell whether each stride is beyond the reach of the smaller ones.

    Then no rank comes twice, and a rank's coordinate follows by division.
    """
    if len(strides) != len(shape):
        return False
    reach = 0
    for stride, length in sorted(zip(strides, shape, strict=True)):
        if (stride == 0) != (length == 1) or stride < 0:
            return False
        if length > 1 and stride <= reach:
            return False
        reach += stride * (length - 1)
    return reach < 2**63


def _reach(mesh: Mesh) -> int:
    spans = zip(mesh.strides, mesh.shape, strict=True)
    return sum(stride * (length - 1) for stride, length in spans)


@dataclass(frozen=True, slots=True)
class Sharding:
    """How a tensor lies on a mesh.

    Attributes:
        mesh: The ranks.
        placements: One a dimension of the mesh: ``"R"``, ``"S<d>"`` or ``"T<d>"``.
    """

    mesh: Mesh
    placements: tuple[str, ...]

    @property
    def is_replicated(self) -> bool:
        """Tell whether every rank of the mesh holds all of it."""
        return all(placement == REPLICATE for placement in self.placements)

    def coordinate_of(self, rank: int) -> Coordinate | None:
        """Return which box a rank holds: its coordinate, None along what is replicated.

        Returns None if the rank is not in the mesh. Ranks of the same coordinate hold
        the same box.
        """
        found = self.mesh.coordinate_of(rank)
        if found is None:
            return None
        return tuple(
            None if placement == REPLICATE else index
            for index, placement in zip(found, self.placements, strict=True)
        )

    def boxes_overlapping(
        self, shape: tuple[int, ...], region: Box
    ) -> Iterator[tuple[Coordinate, Box]]:
        """Walk the boxes that share an element with a region, with their coordinates.

        Costs as much as there are such boxes, not as there are ranks.
        """
        orders = _orders(self.placements, len(shape))
        found = []
        for dim, order in enumerate(orders):
            start = region.offset[dim]
            stop = start + region.shape[dim]
            sizes = [self.mesh.shape[mesh_dim] for mesh_dim in order]
            found.append(list(_chunks(shape[dim], sizes, start, stop)))
        for chosen in product(*found):
            coordinate: list[int | None] = [None] * len(self.placements)
            for order, (indices, _, _) in zip(orders, chosen, strict=True):
                for mesh_dim, index in zip(order, indices, strict=True):
                    coordinate[mesh_dim] = index
            offset = tuple(start for _, start, _ in chosen)
            yield tuple(coordinate), Box(offset, tuple(length for _, _, length in chosen))

    def box_at(self, shape: tuple[int, ...], coordinate: Coordinate) -> Box:
        """Return the box of a tensor of this shape at a coordinate."""
        return box_at(shape, self.mesh.shape, self.placements, coordinate)

    def why_not(self, tensor_dims: int) -> str:
        """Say why no tensor of so many dimensions can lie so; "" if it can."""
        return _why_not(self.placements, len(self.mesh.shape), tensor_dims)

    def to_json(self) -> dict[str, Any]:
        """Encode to a JSON object."""
        return {"mesh": self.mesh.to_json(), "placements": list(self.placements)}

    @staticmethod
    def from_json(fields: Any) -> Sharding:
        """Decode; raises ``ManifestError`` for anything that is not a sharding."""
        if not isinstance(fields, dict) or tuple(fields) != ("mesh", "placements"):
            _refuse(f"not a sharding: {fields!r:.200}")
        placements = fields["placements"]
        if not isinstance(placements, list) or not all(
            isinstance(placement, str) for placement in placements
        ):
            _refuse(f"not a sharding: {fields!r:.200}")
        return Sharding(mesh_from_json(fields["mesh"]), tuple(placements))


def why_not(placements: Sequence[str], mesh_dims: int, tensor_dims: int) -> str:
    """Say why placements are impossible for a mesh and a tensor; "" if they are not."""
    return _why_not(tuple(placements), mesh_dims, tensor_dims)


# Nearly all tensors of a job have one of few placements and shapes.
@lru_cache(maxsize=1024)
def _why_not(placements: tuple[str, ...], mesh_dims: int, tensor_dims: int) -> str:
    if len(placements) != mesh_dims:
        return f"{len(placements)} placements for a mesh of {mesh_dims} dimensions."
    last_strided: set[str] = set()
    cut: set[str] = set()
    for placement in reversed(placements):
        if not _PLACEMENT.fullmatch(placement):
            return f"unknown placement {placement!r:.50}."
        dim = placement[1:]
        if placement == REPLICATE:
            continue
        if int(dim) >= tensor_dims:
            return f"dimension {dim} is cut, and the tensor has {tensor_dims}."
        if dim in last_strided:
            return (
                f"dimension {dim} is cut before a strided cut of the same dimension; only "
                "the order of FSDP2 over tensor parallelism is supported: one strided cut, "
                "then plain ones."
            )
        if placement[0] == STRIDED:
            if dim not in cut:
                return f"a strided cut of dimension {dim} without a plain one after it."
            last_strided.add(dim)
        cut.add(dim)
    return ""


def split_factor(
    placements: Sequence[str], mesh_shape: Sequence[int], mesh_dim: int
) -> int:
    """Return into how many parts the cuts before a strided one cut its dimension."""
    plain = SHARD + placements[mesh_dim][1:]
    later = range(mesh_dim + 1, len(placements))
    return prod(mesh_shape[dim] for dim in later if placements[dim] == plain)


def box_at(
    shape: tuple[int, ...],
    mesh_shape: Sequence[int],
    placements: Sequence[str],
    coordinate: Coordinate,
) -> Box:
    """Return the box that a tensor of this shape has at a coordinate of a mesh."""
    return _box_at(tuple(shape), tuple(mesh_shape), tuple(placements), coordinate)


@lru_cache(maxsize=1024)
def _box_at(
    shape: tuple[int, ...],
    mesh_shape: tuple[int, ...],
    placements: tuple[str, ...],
    coordinate: Coordinate,
) -> Box:
    offset, lengths = [], []
    for length, order in zip(shape, _orders(placements, len(shape)), strict=True):
        start = 0
        for mesh_dim in order:
            index = coordinate[mesh_dim]
            assert index is not None, "a coordinate is needed where a tensor is cut"
            chunk = -(-length // mesh_shape[mesh_dim])
            skipped = min(index * chunk, length)
            start += skipped
            length = min(chunk, length - skipped)
        offset.append(start)
        lengths.append(length)
    return Box(tuple(offset), tuple(lengths))


@lru_cache(maxsize=1024)
def _orders(placements: tuple[str, ...], tensor_dims: int) -> tuple[tuple[int, ...], ...]:
    """List for each dimension of the tensor the mesh's that cut it, first cut first."""
    orders: list[list[int]] = [[] for _ in range(tensor_dims)]
    last: list[list[int]] = [[] for _ in range(tensor_dims)]
    for mesh_dim, placement in enumerate(placements):
        if placement != REPLICATE:
            strided = placement[0] == STRIDED
            (last if strided else orders)[int(placement[1:])].append(mesh_dim)
    return tuple((*plain, *strided) for plain, strided in zip(orders, last, strict=True))


def _chunks(
    length: int, sizes: Sequence[int], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], int, int]]:
    """Cut a length by one size after the other; walk what overlaps ``start:stop``.

    Yields:
        ``(index in each size, offset, length)`` of each chunk that is not empty.
    """
    start, stop = max(start, 0), min(stop, length)
    if start >= stop:
        return
    if not sizes:
        yield (), 0, length
        return
    chunk = -(-length // sizes[0])
    for index in range(start // chunk, -(-stop // chunk)):
        offset = index * chunk
        inner = min(chunk, length - offset)
        for rest, inside, found in _chunks(inner, sizes[1:], start - offset, stop - offset):
            yield (index, *rest), offset + inside, found


def _refuse(reason: str) -> NoReturn:
    msg = f"sharding: {reason}"
    raise ManifestError(msg)
