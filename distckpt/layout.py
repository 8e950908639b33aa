"""Which rank writes which box of which tensor: by arithmetic, without messages.

Every rank describes its tensors in a table of rows. From the tables of all ranks alone
follows who writes what, when saving, and what lies in which file, when restoring. So a
manifest holds one table for all ranks that share it: O(ranks) + O(tensors).

The rules are part of the on-disk format (docs/format.md):

* ``whole``: the lowest rank whose table names the tensor writes all of it.
* ``split``: every rank whose table names it holds all of it, in equal copies.
* ``sharded``: every rank of its mesh holds one box of it (``sharding.py``). Rows that
  differ only in their meshes, which then share no rank, are copies of each other.
* Ranks that hold the same box share the work: all boxes that one same set of ranks holds
  are laid end to end, in table order, and cut into as many equal ranges as there are
  ranks; a box across a border is cut there, at a multiple of its grain.
* A row that is ``same_as`` another is written by nobody.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from operator import add
from typing import Any, NoReturn

from distckpt import dtypes, sharding, strict_json
from distckpt.boxes import Box, checked_size, overlap, split_range, whole
from distckpt.errors import ManifestError
from distckpt.sharding import Mesh, Sharding

SPLIT = "split"
WHOLE = "whole"
SHARDED = "sharded"

# A cut falls on whole sub-arrays of at most this size, so that a border costs little
# balance and a small tensor is never cut at all.
_GRAIN_BYTES = 64 * 1024

_MAX_NAME_LENGTH = 4096
_MAX_DIMS = 64
_MAX_SIZE_BYTES = 2**62


@dataclass(frozen=True, slots=True)
class Row:
    """One tensor of one rank.

    Attributes:
        name: Full name, for example ``model/layers.0.weight``.
        dtype: torch's name of the element type.
        shape: Global shape.
        kind: ``"split"``, ``"whole"`` or ``"sharded"``.
        same_as: The earlier row whose memory this one shares; "" for none.
        sharding: Of a sharded tensor; the mesh's ranks are those of the manager.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    same_as: str = ""
    sharding: Sharding | None = None

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= _MAX_NAME_LENGTH:
            _refuse(f"tensor name of {len(self.name)} characters")
        if not strict_json.is_unicode(self.name):
            _refuse(f"tensor name {self.name!r} is not Unicode text")
        if not dtypes.is_known(self.dtype):
            _refuse(f"tensor {self.name!r}: unknown dtype {self.dtype!r}")
        if self.kind not in (SPLIT, WHOLE, SHARDED):
            _refuse(f"tensor {self.name!r}: unknown kind {self.kind!r}")
        if len(self.shape) > _MAX_DIMS or min(self.shape, default=0) < 0:
            _refuse(f"tensor {self.name!r}: impossible shape {self.shape!r:.200}")
        limit = _MAX_SIZE_BYTES // dtypes.item_size_bytes(self.dtype)
        if checked_size(self.shape, limit) is None:
            _refuse(f"tensor {self.name!r}: impossible size {self.shape!r:.200}")
        if (self.kind == SHARDED) != (self.sharding is not None):
            _refuse(f"tensor {self.name!r}: {self.kind} with sharding {self.sharding!r}")
        if self.sharding is not None:
            mesh_dims = len(self.sharding.mesh.shape)
            reason = sharding.why_not(self.sharding.placements, mesh_dims, len(self.shape))
            if reason:
                _refuse(f"tensor {self.name!r}: {reason}")

    @property
    def size_bytes(self) -> int:
        """Bytes of the global tensor."""
        return prod(self.shape) * dtypes.item_size_bytes(self.dtype)

    def to_json(self) -> list[Any]:
        """Encode to a JSON list."""
        fields: list[Any] = [self.name, self.dtype, list(self.shape), self.kind]
        if self.sharding is not None:
            fields.append(self.sharding.to_json())
        return [*fields, self.same_as] if self.same_as else fields

    @staticmethod
    def from_json(fields: Any) -> Row:
        """Decode; raises ``ManifestError`` for anything that is not a row."""
        if not isinstance(fields, list) or len(fields) < 4:
            _refuse(f"not a table row: {fields!r:.200}")
        name, dtype, shape, kind, *rest = fields
        placed = Sharding.from_json(rest.pop(0)) if kind == SHARDED and rest else None
        texts = (name, dtype, kind, *rest)
        if (
            len(rest) > 1
            or not all(isinstance(text, str) for text in texts)
            or not isinstance(shape, list)
            or not all(type(length) is int for length in shape)
        ):
            _refuse(f"not a table row: {fields!r:.200}")
        same_as = rest[0] if rest else ""
        return Row(name, dtype, tuple(shape), kind, same_as, placed)


Table = tuple[Row, ...]


def check_table(table: Table) -> None:
    """Raise ``ManifestError`` if a name stands twice or a ``same_as`` leads nowhere."""
    rows: dict[str, Row] = {}
    for row in table:
        if row.name in rows:
            _refuse(f"tensor {row.name!r} stands twice in one table")
        if row.same_as:
            other = rows.get(row.same_as)
            if other is None or other.same_as:
                _refuse(f"tensor {row.name!r} is the same as {row.same_as!r}: nothing")
            elif (other.dtype, other.shape, other.sharding) != (
                row.dtype,
                row.shape,
                row.sharding,
            ):
                _refuse(f"tensor {row.name!r} is not the same as {row.same_as!r}")
        rows[row.name] = row


@dataclass(frozen=True, slots=True)
class Piece:
    """One box of one tensor, and the rank that writes it."""

    row: Row
    box: Box
    rank: int

    @property
    def is_whole(self) -> bool:
        """Tell whether the piece is all of its tensor."""
        return self.box == whole(self.row.shape)

    @property
    def size_bytes(self) -> int:
        """Bytes of the box."""
        return self.box.size * dtypes.item_size_bytes(self.row.dtype)


class Assignment:
    """Who writes what, for all ranks; made once per set of tables.

    What one rank writes, or where one box lies, is worked out when it is asked for, and
    costs as much as there are tensors and as there are boxes in that box: nobody ever
    works out all boxes of all ranks.

    Attributes:
        rows: Every tensor of the job by name.

    Raises:
        ManifestError: The tables contradict each other, or name ranks that are not there.
    """

    def __init__(self, tables: Sequence[Table], table_of_rank: Sequence[int]) -> None:
        self.rows: dict[str, Row] = {}
        self._tables = tables
        self._table_of_rank = table_of_rank
        self._ranks_of_table: dict[int, list[int]] = {}
        for rank, index in enumerate(table_of_rank):
            self._ranks_of_table.setdefault(index, []).append(rank)
        # Which tables name a tensor; and for a sharded one, its meshes in these.
        self._tables_of_name: dict[str, list[int]] = {}
        self._meshes_of_name: dict[str, dict[Mesh, list[int]]] = {}
        self._unite()
        self._check_meshes()
        self._position = {name: index for index, name in enumerate(self.rows)}
        # A set of ranks by what it is asked for with; one tuple for each set.
        self._holders_of_key: dict[Hashable, tuple[int, ...]] = {}
        self._holder_sets: dict[tuple[int, ...], tuple[int, ...]] = {}
        # By the identity of these tuples, which live as long as the assignment: a set
        # may have ten thousand ranks, and every tensor asks for its own.
        self._shared_by: dict[int, _Shared] = {}
        # By table, too, for the ranks of one without sharded tensors, which hold the same.
        self._shared_of: dict[tuple[int, int | None], list[_Shared]] = {}
        self._sharded_tables = {
            index
            for meshes in self._meshes_of_name.values()
            for tables in meshes.values()
            for index in tables
        }
        self._written_whole: dict[int, list[Piece]] | None = None

    def _unite(self) -> None:
        """Find all rows, in the order of the lowest rank that has each."""
        for index in sorted(self._ranks_of_table, key=lambda i: self._ranks_of_table[i][0]):
            for row in self._tables[index]:
                known = self.rows.setdefault(row.name, row)
                tables = self._tables_of_name.setdefault(row.name, [])
                if not _agree(known, row):
                    ranks = self._ranks_of_table
                    _refuse_differing(known, row, ranks[tables[0]], ranks[index])
                tables.append(index)
                if row.sharding is not None:
                    meshes = self._meshes_of_name.setdefault(row.name, {})
                    meshes.setdefault(row.sharding.mesh, []).append(index)

    def _check_meshes(self) -> None:
        """Refuse meshes with ranks that do not have the tensor, or have another mesh."""
        world_size = len(self._table_of_rank)
        checked: set[Hashable] = set()
        for name, meshes in self._meshes_of_name.items():
            key = tuple((mesh, *tables) for mesh, tables in meshes.items())
            if key in checked:
                continue
            checked.add(key)
            for mesh, tables in meshes.items():
                if mesh.highest >= world_size:
                    _refuse(
                        f"tensor {name!r} lies on rank {mesh.highest}, and there are "
                        f"{world_size} ranks"
                    )
                if len(tables) < len(self._ranks_of_table):
                    having = {*tables}
                    for rank in mesh.ranks:
                        if self._table_of_rank[rank] not in having:
                            _refuse(
                                f"tensor {name!r} is sharded over rank {rank}, among "
                                "others, which does not have it, or has it on another "
                                "mesh. Track it on all ranks of its mesh."
                            )
            # Every rank has one table, and that one mesh: so they are disjoint by now.

    def pieces_of_rank(self, rank: int) -> list[Piece]:
        """Return what one rank writes."""
        if self._written_whole is None:
            self._written_whole = {}
            for row in self.rows.values():
                if not row.same_as and self._is_written_whole(row):
                    piece = self._whole_piece(row)
                    self._written_whole.setdefault(piece.rank, []).append(piece)
        pieces = list(self._written_whole.get(rank, ()))
        for shared in self._shared_with(rank):
            pieces += shared.pieces_of_rank.get(rank, ())
        return pieces

    def pieces_of(self, name: str, box: Box | None = None) -> list[Piece]:
        """Return the pieces that make up one tensor, also of a ``same_as`` row.

        Args:
            name: The tensor.
            box: Only those that share an element with this region of it.
        """
        row = self.rows[name]
        row = self.rows[row.same_as or row.name]
        if self._is_written_whole(row):
            pieces = [self._whole_piece(row)]
        else:
            pieces = []
            for holders in self._holder_sets_of(row, box or whole(row.shape)):
                self._shared_with(holders[0])
                pieces += self._shared_by[id(holders)].pieces_of_name[row.name]
        if box is None or (box.size > 0 and box == whole(row.shape)):
            return pieces
        return [piece for piece in pieces if overlap(piece.box, box) is not None]

    @staticmethod
    def _is_written_whole(row: Row) -> bool:
        # Boxes without elements are written by nobody, but the tensor must be there.
        return row.kind == WHOLE or (row.kind == SHARDED and row.size_bytes == 0)

    def _whole_piece(self, row: Row) -> Piece:
        meshes = self._meshes_of_name.get(row.name)
        if meshes:
            lowest = min(mesh.lowest for mesh in meshes)
        else:
            tables = self._tables_of_name[row.name]
            lowest = min(self._ranks_of_table[index][0] for index in tables)
        return Piece(row, whole(row.shape), lowest)

    def _holder_sets_of(self, row: Row, region: Box) -> Iterator[tuple[int, ...]]:
        """Walk the sets of ranks that hold the boxes of a tensor in a region."""
        if row.sharding is None:
            yield self._holders(row, None)
            return
        for coordinate, _ in row.sharding.boxes_overlapping(row.shape, region):
            yield self._holders(row, coordinate)

    def _holders(self, row: Row, coordinate: sharding.Coordinate | None) -> tuple[int, ...]:
        """Return the ranks, ascending, that hold one box of a tensor."""
        key: Hashable
        if coordinate is None:
            key = tuple(self._tables_of_name[row.name])
        else:
            key = (*self._meshes_of_name[row.name], coordinate)
        holders = self._holders_of_key.get(key)
        if holders is None:
            if coordinate is None:
                tables = self._tables_of_name[row.name]
                ranks = [rank for index in tables for rank in self._ranks_of_table[index]]
            else:
                meshes = self._meshes_of_name[row.name]
                ranks = [rank for mesh in meshes for rank in mesh.ranks_at(coordinate)]
            holders = tuple(sorted(ranks))
            holders = self._holder_sets.setdefault(holders, holders)
            self._holders_of_key[key] = holders
        return holders

    def _shared_with(self, rank: int) -> list[_Shared]:
        """Return what a rank holds, by the sets of ranks that it shares the work with."""
        index = self._table_of_rank[rank]
        key = (index, rank if index in self._sharded_tables else None)
        if key in self._shared_of:
            return self._shared_of[key]
        held: dict[int, list[tuple[Row, Box]]] = {}
        holder_sets: list[tuple[int, ...]] = []
        for own in sorted(self._tables[index], key=lambda row: self._position[row.name]):
            row = self.rows[own.name]
            if row.same_as or self._is_written_whole(row):
                continue
            coordinate, box = None, whole(row.shape)
            if own.sharding is not None:
                coordinate = own.sharding.coordinate_of(rank)
                if coordinate is None:
                    continue
                box = own.sharding.box_at(row.shape, coordinate)
                if box.size == 0:
                    continue
            holders = self._holders(row, coordinate)
            if id(holders) not in held:
                holder_sets.append(holders)
            held.setdefault(id(holders), []).append((row, box))
        result = self._shared_of[key] = []
        for holders in holder_sets:
            shared = self._shared_by.get(id(holders))
            if shared is None:
                shared = self._shared_by[id(holders)] = _Shared(held[id(holders)], holders)
            result.append(shared)
        return result


class Layouts:
    """The tables of all ranks of one save.

    Attributes:
        key: Equal for equal tables.
        tables: The distinct ones.
        table_of_rank: Which of them each rank has.
        assignment: Who writes what.

    Raises:
        ManifestError: The tables contradict each other.
    """

    def __init__(
        self, key: bytes, tables: Sequence[Table], table_of_rank: Sequence[int]
    ) -> None:
        self.key = key
        self.tables = tables
        self.table_of_rank = table_of_rank
        self.assignment = Assignment(tables, table_of_rank)


class _Shared:
    """The boxes that one set of ranks holds, and who of them writes what.

    Attributes:
        pieces_of_rank: What each of them writes.
        pieces_of_name: The pieces of each tensor's box.
    """

    def __init__(self, held: Sequence[tuple[Row, Box]], ranks: Sequence[int]) -> None:
        self.pieces_of_rank: dict[int, list[Piece]] = {}
        self.pieces_of_name: dict[str, list[Piece]] = {}
        for piece in _split_evenly(held, ranks):
            self.pieces_of_rank.setdefault(piece.rank, []).append(piece)
            self.pieces_of_name.setdefault(piece.row.name, []).append(piece)


def _agree(known: Row, other: Row) -> bool:
    """Tell whether two ranks' rows can be of one tensor: equal, but for the mesh."""
    one, two = known.sharding, other.sharding
    if one is None or two is None or one == two:
        return known == other
    return (known.dtype, known.shape, known.same_as) == (
        other.dtype,
        other.shape,
        other.same_as,
    ) and (one.placements, one.mesh.shape) == (two.placements, two.mesh.shape)


def _split_evenly(held: Sequence[tuple[Row, Box]], ranks: Sequence[int]) -> Iterator[Piece]:
    total = sum(_size_bytes(row, box) for row, box in held)
    start = 0
    index = 0
    for row, held_box in held:
        stop = start + _size_bytes(row, held_box)
        cut = 0
        while True:
            # The border between ranks[index] and the next one, in bytes from the start.
            border = total * (index + 1) // len(ranks)
            last = index == len(ranks) - 1
            next_cut = held_box.size
            if not last and border < stop:
                next_cut = max(cut, _nearest_cut(row, held_box, border - start))
            if held_box.size == 0:
                yield Piece(row, held_box, ranks[index])
                break
            for box in split_range(held_box.shape, cut, next_cut):
                offset = tuple(map(add, held_box.offset, box.offset))
                yield Piece(row, Box(offset, box.shape), ranks[index])
            cut = next_cut
            if last or border >= stop:
                break
            index += 1
        start = stop


def _size_bytes(row: Row, box: Box) -> int:
    return box.size * dtypes.item_size_bytes(row.dtype)


def _nearest_cut(row: Row, box: Box, offset_bytes: int) -> int:
    """Return the element of a box, at a multiple of its grain, nearest to an offset."""
    item = dtypes.item_size_bytes(row.dtype)
    grain = box.size
    for length in box.shape:
        if grain * item <= _GRAIN_BYTES:
            break
        grain //= length
    return min((offset_bytes + grain * item // 2) // (grain * item) * grain, box.size)


def _refuse_differing(
    known: Row, other: Row, known_ranks: Sequence[int], other_ranks: Sequence[int]
) -> None:
    _refuse(
        f"tensor {known.name!r} differs between ranks: "
        f"{_describe(known)} on ranks {_few(known_ranks)}, "
        f"{_describe(other)} on ranks {_few(other_ranks)}. Wrap what each rank has of "
        "its own in PerRank."
    )


def _describe(row: Row) -> str:
    shared = f", same as {row.same_as!r}" if row.same_as else ""
    placed = "" if row.sharding is None else f" {row.sharding}"
    return f"{row.dtype} {list(row.shape)} ({row.kind}{placed}{shared})"


def _few(ranks: Sequence[int]) -> str:
    text = ", ".join(map(str, ranks[:8]))
    return text if len(ranks) <= 8 else f"{text}, ... ({len(ranks)} ranks)"


def _refuse(reason: str) -> NoReturn:
    msg = f"layout: {reason}"
    raise ManifestError(msg)
