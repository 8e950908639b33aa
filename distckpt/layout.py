"""Which rank writes which box of which tensor: by arithmetic, without messages.

Every rank describes its tensors in a table of rows. From the tables of all ranks alone
follows who writes what, when saving, and what lies in which file, when restoring. So a
manifest holds one table for all ranks that share it: O(ranks) + O(tensors).

The rules are part of the on-disk format (docs/format.md):

* ``whole``, ``one``: the lowest rank whose table names the tensor writes all of it.
* ``split``: every rank whose table names it holds all of it, in equal copies.
* ``sharded``: every rank of its mesh holds one box of it (``sharding.py``). Rows that
  differ only in their meshes, which then share no rank, are copies of each other.
* Ranks that hold the same box share the work: all boxes that one same set of ranks holds
  are laid end to end, in table order, and cut into as many equal ranges as there are
  ranks; a box across a border is cut there, at a multiple of its grain.
* A row that is ``same_as`` another is written by nobody.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from math import prod
from operator import add
from threading import Lock
from typing import Any, NamedTuple, NoReturn

from distckpt import dtypes, sharding, strict_json, words
from distckpt.boxes import Box, checked_size, overlap, split_range, whole
from distckpt.errors import ManifestError
from distckpt.record import digest
from distckpt.sharding import Mesh, Sharding

SPLIT = "split"
WHOLE = "whole"
SHARDED = "sharded"
# Like "whole": the tensors that other ranks have under this name may be different.
ONE = "one"

# A cut falls on whole sub-arrays of at most this size, so that a border costs little
# balance and a small tensor is never cut at all.
_GRAIN_BYTES = 64 * 1024

_MAX_NAME_LENGTH = 4096
_MAX_DIMS = 64
_MAX_SIZE_BYTES = 2**62

# Tables of so much text stay decoded, and so many assignments worked out.
_MAX_DECODED_LENGTH = 16 * 2**20
_MAX_ASSIGNMENTS = 4


# The dtype of a row, if it is spelled with the bytes of an element: in no JSON string stand
# quotes like these.
_LONG_DTYPE = re.compile(r'(?<=,")[a-z][a-z0-9_]*:[0-9]+(?=",\[)')


class _RowFields(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    same_as: str = ""
    sharding: Sharding | None = None


class Row(_RowFields):
    """One tensor of one rank, checked when made; a tuple, because there are many.

    Attributes:
        name: Full name, for example ``model/layers.0.weight``.
        dtype: torch's name of the element type.
        shape: Global shape.
        kind: ``"split"``, ``"whole"``, ``"one"`` or ``"sharded"``.
        same_as: The earlier row whose memory this one shares; "" for none.
        sharding: Of a sharded tensor; the mesh's ranks are those of the manager.
    """

    __slots__ = ()

    def __new__(
        cls,
        name: str,
        dtype: str,
        shape: tuple[int, ...],
        kind: str,
        same_as: str = "",
        sharding: Sharding | None = None,
    ) -> Row:
        """Check and make it."""
        _check_name(name)
        if not dtypes.is_known(dtype):
            _refuse(f"tensor {name!r}: unknown dtype {dtype!r}")
        if kind not in _KINDS:
            _refuse(f"tensor {name!r}: unknown kind {kind!r}")
        if len(shape) > _MAX_DIMS or min(shape, default=0) < 0:
            _refuse(f"tensor {name!r}: impossible shape {shape!r:.200}")
        limit = _MAX_SIZE_BYTES // dtypes.item_size_bytes(dtype)
        if checked_size(shape, limit) is None:
            _refuse(f"tensor {name!r}: impossible size {shape!r:.200}")
        if (kind == SHARDED) != (sharding is not None):
            _refuse(f"tensor {name!r}: {kind} with sharding {sharding!r}")
        if sharding is not None:
            reason = sharding.why_not(len(shape))
            if reason:
                _refuse(f"tensor {name!r}: {reason}")
        return super().__new__(cls, name, dtype, shape, kind, same_as, sharding)

    def named(self, name: str, same_as: str = "") -> Row:
        """Make the row of a tensor like this one; only its name is checked."""
        _check_name(name)
        _, dtype, shape, kind, _, sharding = self
        return tuple.__new__(Row, (name, dtype, shape, kind, same_as, sharding))

    @property
    def size_bytes(self) -> int:
        """Bytes of the global tensor."""
        return prod(self.shape) * dtypes.item_size_bytes(self.dtype)


_KINDS = frozenset((SPLIT, WHOLE, SHARDED, ONE))


def _check_name(name: str) -> None:
    if not 0 < len(name) <= _MAX_NAME_LENGTH:
        _refuse(f"tensor name of {len(name)} characters")
    if not strict_json.is_unicode(name):
        _refuse(f"tensor name {name!r} is not Unicode text")


class Table(tuple[Row, ...]):
    """The tensors of one rank, in their order.

    What follows from it is worked out once, and two tables with equal rows have equal
    texts.

    Raises:
        ManifestError: A name stands twice, or a ``same_as`` leads nowhere.
    """

    def __new__(cls, rows: Iterable[Row] = ()) -> Table:
        """Check and make it."""
        table = super().__new__(cls, rows)
        table._check()
        return table

    def _check(self) -> None:
        rows = {row.name: row for row in self}
        if len(rows) < len(self):
            seen: set[str] = set()
            for row in self:
                if row.name in seen:
                    _refuse(f"tensor {row.name!r} stands twice in one table")
                seen.add(row.name)
        earlier: set[str] = set()
        for name, dtype, shape, _, same_as, placed in self:
            if same_as:
                if same_as not in earlier or rows[same_as].same_as:
                    _refuse(f"tensor {name!r} is the same as {same_as!r}: nothing")
                other = rows[same_as]
                if (other.dtype, other.shape, other.sharding) != (dtype, shape, placed):
                    _refuse(f"tensor {name!r} is not the same as {same_as!r}")
            earlier.add(name)

    @cached_property
    def text(self) -> str:
        """The table as JSON, one row a line: what manifests hold and ranks exchange.

        ASCII without a raw newline in front of anything but a blank, ``]`` or its end, so
        that it can be cut out of a longer text.
        """
        number_of: dict[Sharding, int] = {}
        # Most rows have one of few, on one mesh, and to hash that costs more than its id.
        number_of_id: dict[tuple[int, tuple[str, ...]], int] = {}
        rest_of: dict[Hashable, str] = {}
        lines = []
        quote = strict_json.quote
        for name, dtype, shape, kind, same_as, placed in self:
            lies: str | int | None = kind
            if placed is not None:
                same = (id(placed.mesh), placed.placements)
                lies = number_of_id.get(same)
                if lies is None:
                    lies = number_of.setdefault(placed, len(number_of))
                    number_of_id[same] = lies
            key = (dtype, shape, lies)
            rest = rest_of.get(key)
            if rest is None:
                rest = rest_of[key] = strict_json.dumps([dtype, list(shape), lies])[1:-1]
            tie = f",{quote(same_as)}" if same_as else ""
            lines.append(f"[{quote(name)},{rest}{tie}]")
        placements = [strict_json.dumps(one.to_json()) for one in number_of]
        shardings, rows = strict_json.lines(placements), strict_json.lines(lines)
        return f'{{"shardings":{shardings},"rows":{rows}}}'

    @cached_property
    def digest(self) -> bytes:
        """The digest of the text: 16 raw bytes, equal for equal tables."""
        return bytes.fromhex(digest(self.text.encode()))

    @staticmethod
    def from_text(text: str) -> Table:
        """Decode; a table that was decoded lately is the same object.

        Raises:
            ManifestError: It is not exactly the text of a table.
        """
        table = _decoded.get(text)
        if table is None:
            text = _LONG_DTYPE.sub(lambda found: dtypes.canonical(found[0]), text)
            table = _decode_table(text)
            # Whatever a row may have been taken for: there is no other spelling of it.
            if table.text != text:
                _refuse(f"a table that is spelled otherwise: {text!r:.200}")
            _decoded.add(table)
        return table


class _Decoded:
    """The tables that were decoded last, up to some length of text."""

    def __init__(self) -> None:
        self._tables: dict[str, Table] = {}
        self._length = 0
        self._lock = Lock()

    def get(self, text: str) -> Table | None:
        return self._tables.get(text)

    def add(self, table: Table) -> None:
        with self._lock:
            if table.text not in self._tables:
                self._tables[table.text] = table
                self._length += len(table.text)
            while self._length > _MAX_DECODED_LENGTH:
                oldest = next(iter(self._tables))
                del self._tables[oldest]
                self._length -= len(oldest)


_decoded = _Decoded()


def _decode_table(text: str) -> Table:
    """Decode what may be the text of a table, or something like it."""
    try:
        tree = json.loads(text)
    except (ValueError, RecursionError) as error:
        _refuse(f"not a table: {error}")
    if not isinstance(tree, dict) or tuple(tree) != ("shardings", "rows"):
        _refuse(f"not a table: {text!r:.200}")
    if not isinstance(tree["shardings"], list) or not isinstance(tree["rows"], list):
        _refuse(f"not a table: {text!r:.200}")
    shardings = [Sharding.from_json(fields) for fields in tree["shardings"]]
    # Nearly every row is like one before: then only its name is new.
    known: dict[Hashable, Row] = {}
    rows = []
    for fields in tree["rows"]:
        if type(fields) is not list or not 4 <= len(fields) <= 5:
            _refuse(f"not a table row: {fields!r:.200}")
        name, dtype, shape, lies = fields[:4]
        same_as = fields[4] if len(fields) == 5 else ""
        if type(name) is not str or type(shape) is not list or type(same_as) is not str:
            _refuse(f"not a table row: {fields!r:.200}")
        key = (dtype, *shape, lies)
        try:
            like = known.get(key)
        except TypeError:  # a list, or the like, where a string or number belongs
            _refuse(f"not a table row: {fields!r:.200}")
        if like is None:
            row = known[key] = _decode_row(fields, same_as, shardings)
        else:
            row = like.named(name, same_as)
        rows.append(row)
    return Table(rows)


def _decode_row(fields: list[Any], same_as: str, shardings: Sequence[Sharding]) -> Row:
    name, dtype, shape, lies = fields[:4]
    if type(dtype) is not str or not all(type(length) is int for length in shape):
        _refuse(f"not a table row: {fields!r:.200}")
    if lies in (SPLIT, WHOLE, ONE):
        return Row(name, dtype, tuple(shape), lies, same_as)
    if type(lies) is not int or not 0 <= lies < len(shardings):
        _refuse(f"not a table row: {fields!r:.200}")
    return Row(name, dtype, tuple(shape), SHARDED, same_as, shardings[lies])


class _PieceFields(NamedTuple):
    row: Row
    box: Box
    rank: int
    size_bytes: int


class Piece(_PieceFields):
    """One box of one tensor, and the rank that writes it.

    Attributes:
        row: The tensor.
        box: Which part of it.
        rank: Who writes it.
        size_bytes: Bytes of the box.
    """

    __slots__ = ()

    def __new__(cls, row: Row, box: Box, rank: int) -> Piece:
        """Work out its size."""
        return super().__new__(cls, row, box, rank, _size_bytes(row, box))

    @property
    def is_whole(self) -> bool:
        """Tell whether the piece is all of its tensor."""
        return self.box.shape == self.row.shape


class _Place:
    """Which tables name a tensor, and on which meshes: one object for all tensors alike.

    Made table by table: each knows the one without its own table. So ten thousand tables
    that name the same tensors make as many of these, not as many lists.

    Attributes:
        holders: Which ranks hold the box at a coordinate, as far as asked for.
    """

    __slots__ = ("_before", "_index", "_mesh", "holders")

    def __init__(self, before: _Place | None, index: int, mesh: Mesh | None) -> None:
        self._before = before
        self._index = index
        self._mesh = mesh
        self.holders: dict[sharding.Coordinate | None, tuple[int, ...]] = {}

    @property
    def tables(self) -> list[int]:
        """The tables, that of the lowest rank first."""
        return [index for index, _ in self._steps()]

    @property
    def meshes(self) -> dict[Mesh, list[int]]:
        """Of a sharded tensor: its meshes, and which tables say so."""
        meshes: dict[Mesh, list[int]] = {}
        for index, mesh in self._steps():
            if mesh is not None:
                meshes.setdefault(mesh, []).append(index)
        return meshes

    def _steps(self) -> list[tuple[int, Mesh | None]]:
        steps = []
        place: _Place | None = self
        while place is not None:
            steps.append((place._index, place._mesh))
            place = place._before
        return steps[::-1]


class Assignment:
    """Who writes what, for all ranks; made once per set of tables.

    What one rank writes, or where one box lies, is worked out when it is asked for, and
    costs as much as there are tensors and as there are boxes in that box: nobody ever
    works out all boxes of all ranks. Threads may ask at the same time: what is remembered
    is whole before it can be seen.

    Attributes:
        rows: Every tensor of the job by name.

    Raises:
        ManifestError: The tables contradict each other, or name ranks that are not there.
    """

    def __init__(
        self, tables: Sequence[Sequence[Row]], table_of_rank: Sequence[int]
    ) -> None:
        self.rows: dict[str, Row] = {}
        self._tables = tables
        self._table_of_rank = table_of_rank
        self._ranks_of_table: dict[int, list[int]] = {}
        for rank, index in enumerate(table_of_rank):
            self._ranks_of_table.setdefault(index, []).append(rank)
        # In the order of the lowest rank that has each.
        self._order = [*self._ranks_of_table]
        self._place_of_name: dict[str, _Place] = {}
        self._sharded_tables: set[int] = set()
        self._unite()
        self._check_meshes()
        # One tuple for each set of ranks.
        self._holder_sets: dict[tuple[int, ...], tuple[int, ...]] = {}
        # By the identity of these tuples, which live as long as the assignment: a set
        # may have ten thousand ranks, and every tensor asks for its own.
        self._shared_by: dict[int, _Shared] = {}
        # By table, too, for the ranks of one without sharded tensors, which hold the same.
        self._shared_of: dict[tuple[int, int | None], list[_Shared]] = {}
        # The same box is asked for of many tensors.
        self._holder_sets_of_box: dict[Hashable, list[tuple[int, ...]]] = {}

    def _unite(self) -> None:
        """Find all rows, in the order of the lowest rank that has each."""
        rows, places = self.rows, self._place_of_name
        for index in self._order:
            # By identity: all of them live on in the places and the tables.
            next_places: dict[tuple[int, int], _Place] = {}
            for row in self._tables[index]:
                name = row.name
                mesh = None if row.sharding is None else row.sharding.mesh
                before = places.get(name)
                if before is None:
                    rows[name] = row
                else:
                    known = rows[name]
                    # Of what one rank's is stored others may have another shape.
                    is_free = known.kind == row.kind == ONE
                    if known is not row and not is_free and not _agree(known, row):
                        ranks = self._ranks_of_table
                        _refuse_differing(known, row, ranks[before.tables[0]], ranks[index])
                key = (id(before), id(mesh))
                place = next_places.get(key)
                if place is None:
                    place = next_places[key] = _Place(before, index, mesh)
                    if mesh is not None:
                        self._sharded_tables.add(index)
                places[name] = place

    def _check_meshes(self) -> None:
        """Refuse meshes with ranks that do not have the tensor, or have another mesh."""
        world_size = len(self._table_of_rank)
        name_of = {place: name for name, place in self._place_of_name.items()}
        for place, name in name_of.items():
            for mesh, tables in place.meshes.items():
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
        pieces = list(self._written_whole.get(rank, ()))
        for shared in self._shared_with(rank):
            pieces += shared.pieces_of_rank.get(rank, ())
        return pieces

    @cached_property
    def _written_whole(self) -> dict[int, list[Piece]]:
        """The tensors that one rank each writes alone, by rank."""
        found: dict[int, list[Piece]] = {}
        for row in self.rows.values():
            if not row.same_as and self._is_written_whole(row):
                piece = self._whole_piece(row)
                found.setdefault(piece.rank, []).append(piece)
        return found

    def pieces_of(self, name: str, box: Box | None = None) -> list[Piece]:
        """Return the pieces that make up one tensor, also of a ``same_as`` row.

        Args:
            name: The tensor.
            box: Only those that share an element with this region of it.
        """
        row = self.rows[name]
        if row.same_as:
            row = self.rows[row.same_as]
        if self._is_written_whole(row):
            pieces = [self._whole_piece(row)]
        else:
            pieces = []
            for holders in self._holder_sets_of(row, box):
                pieces += self._shared_among(holders).pieces_of_name[row.name]
        if box is None or (box.shape == row.shape and box.size > 0):
            return pieces
        if box.size == 0:
            return []
        return [
            piece
            for piece in pieces
            if piece.box == box or overlap(piece.box, box) is not None
        ]

    @staticmethod
    def _is_written_whole(row: Row) -> bool:
        # Boxes without elements are written by nobody, but the tensor must be there.
        return row.kind in (WHOLE, ONE) or (row.kind == SHARDED and 0 in row.shape)

    def _whole_piece(self, row: Row) -> Piece:
        place = self._place_of_name[row.name]
        meshes = place.meshes
        if meshes:
            lowest = min(mesh.lowest for mesh in meshes)
        else:
            lowest = min(self._ranks_of_table[index][0] for index in place.tables)
        return Piece(row, whole(row.shape), lowest)

    def _holder_sets_of(self, row: Row, box: Box | None) -> list[tuple[int, ...]]:
        """List the sets of ranks that hold the boxes of a tensor in a region."""
        place = self._place_of_name[row.name]
        if row.sharding is None:
            return [self._holders(place, None)]
        region = whole(row.shape) if box is None else box
        placements = row.sharding.placements
        key = (id(place), row.shape, placements, region.offset, region.shape)
        found = self._holder_sets_of_box.get(key)
        if found is None:
            found = [
                self._holders(place, coordinate)
                for coordinate, _ in row.sharding.boxes_overlapping(row.shape, region)
            ]
            self._holder_sets_of_box[key] = found
        return found

    def _holders(
        self, place: _Place, coordinate: sharding.Coordinate | None
    ) -> tuple[int, ...]:
        """Return the ranks, ascending, that hold one box of a tensor."""
        holders = place.holders.get(coordinate)
        if holders is None:
            if coordinate is None:
                tables = place.tables
                ranks = [rank for index in tables for rank in self._ranks_of_table[index]]
            else:
                meshes = place.meshes
                ranks = [rank for mesh in meshes for rank in mesh.ranks_at(coordinate)]
            holders = tuple(sorted(ranks))
            holders = self._holder_sets.setdefault(holders, holders)
            place.holders[coordinate] = holders
        return holders

    def _shared_among(self, holders: tuple[int, ...]) -> _Shared:
        shared = self._shared_by.get(id(holders))
        if shared is None:
            self._shared_with(holders[0])
            shared = self._shared_by[id(holders)]
        return shared

    def _shared_with(self, rank: int) -> list[_Shared]:
        """Return what a rank holds, by the sets of ranks that it shares the work with."""
        index = self._table_of_rank[rank]
        key = (index, rank if index in self._sharded_tables else None)
        known = self._shared_of.get(key)
        if known is not None:
            return known
        # By the identity of the holders; the tensors of each set in their order.
        held: dict[int, _Held] = {}
        # Where a tensor goes of one place, mesh, placements and shape.
        seen: dict[Hashable, tuple[list[Row], list[Box], Box] | None] = {}
        for own in self._in_order(index):
            row = self.rows[own.name]
            if row.same_as or self._is_written_whole(row):
                continue
            place = self._place_of_name[row.name]
            placed = own.sharding
            alike: Hashable = (id(place), row.shape)
            if placed is not None:
                alike = (id(place), row.shape, id(placed.mesh), placed.placements)
            if alike in seen:
                found = seen[alike]
            else:
                found = seen[alike] = self._find_held(held, rank, own, place)
            if found is not None:
                rows, boxes, box = found
                rows.append(row)
                boxes.append(box)
        shared = [
            self._shared_by.get(identity)
            or self._shared_by.setdefault(identity, _Shared(one))
            for identity, one in held.items()
        ]
        return self._shared_of.setdefault(key, shared)

    def _find_held(
        self, held: dict[int, _Held], rank: int, own: Row, place: _Place
    ) -> tuple[list[Row], list[Box], Box] | None:
        """Find the lists that a rank's box of a tensor belongs to; None if it has none."""
        coordinate, box = None, whole(own.shape)
        if own.sharding is not None:
            coordinate = own.sharding.coordinate_of(rank)
            if coordinate is None:
                return None
            box = own.sharding.box_at(own.shape, coordinate)
            if box.size == 0:
                return None
        holders = self._holders(place, coordinate)
        one = held.setdefault(id(holders), _Held(holders, [], []))
        return one.rows, one.boxes, box

    def _in_order(self, index: int) -> Sequence[Row]:
        """Return the rows of a table in the order of all rows."""
        table = self._tables[index]
        if index == self._order[0]:
            return table
        return sorted(table, key=lambda row: self._position[row.name])

    @cached_property
    def _position(self) -> dict[str, int]:
        return {name: position for position, name in enumerate(self.rows)}


def assignment_of(tables: Sequence[Table], table_of_rank: Sequence[int]) -> Assignment:
    """Return who writes what; for tables that were asked for lately, the same object.

    Raises:
        ManifestError: The tables contradict each other, or name ranks that are not there.
    """
    digests = tuple(table.digest for table in tables)
    return _assignment_of(_Tables(digests, tuple(table_of_rank), tuple(tables)))


@dataclass(frozen=True, slots=True)
class _Tables:
    """The tables of all ranks; compared by what they say."""

    digests: tuple[bytes, ...]
    table_of_rank: tuple[int, ...]
    tables: tuple[Table, ...] = field(compare=False)


@lru_cache(maxsize=_MAX_ASSIGNMENTS)
def _assignment_of(of: _Tables) -> Assignment:
    return Assignment(of.tables, of.table_of_rank)


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
        self.assignment = assignment_of(tables, table_of_rank)


class _Held(NamedTuple):
    """The boxes that one set of ranks holds, in their order."""

    ranks: tuple[int, ...]
    rows: list[Row]
    boxes: list[Box]


class _Shared:
    """The boxes that one set of ranks holds, and who of them writes what.

    Attributes:
        pieces_of_rank: What each of them writes.
    """

    def __init__(self, held: _Held) -> None:
        self.pieces_of_rank: dict[int, list[Piece]] = {}
        for piece in _split_evenly(held):
            self.pieces_of_rank.setdefault(piece.rank, []).append(piece)

    @cached_property
    def pieces_of_name(self) -> dict[str, list[Piece]]:
        """The pieces of each tensor's box, in the order of the ranks."""
        found: dict[str, list[Piece]] = {}
        for pieces in self.pieces_of_rank.values():
            for piece in pieces:
                found.setdefault(piece.row.name, []).append(piece)
        return found


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


def _split_evenly(held: _Held) -> Iterator[Piece]:
    """Cut all boxes, laid end to end, into equal ranges; the ranks ascend."""
    ranks, rows, boxes = held
    sizes_bytes = list(map(_size_bytes, rows, boxes))
    total = sum(sizes_bytes)
    last = len(ranks) - 1
    start = 0
    index = 0
    # The border between ranks[index] and the next one, in bytes from the start.
    border = total // len(ranks)
    for row, held_box, size_bytes in zip(rows, boxes, sizes_bytes, strict=True):
        stop = start + size_bytes
        cut = 0
        while index < last and border < stop:
            next_cut = max(cut, _nearest_cut(row, held_box, border - start))
            yield from _range_pieces(row, held_box, cut, next_cut, ranks[index])
            cut = next_cut
            index += 1
            border = total * (index + 1) // len(ranks)
        if cut == 0:
            yield tuple.__new__(Piece, (row, held_box, ranks[index], size_bytes))
        else:
            yield from _range_pieces(row, held_box, cut, held_box.size, ranks[index])
        start = stop


def _range_pieces(row: Row, held: Box, start: int, stop: int, rank: int) -> Iterator[Piece]:
    """Walk the boxes of a range of elements of a box."""
    for box in split_range(held.shape, start, stop):
        yield Piece(row, Box(tuple(map(add, held.offset, box.offset)), box.shape), rank)


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
        f"{_describe(known, other)} on {words.ranks(known_ranks)}, "
        f"{_describe(other, known)} on {words.ranks(other_ranks)}. All ranks must track "
        "the same model. What each rank is meant to have for itself is marked with "
        "PerRank, what differs between groups of ranks with PerGroup."
    )


def _describe(row: Row, other: Row) -> str:
    """Describe a row; of how it lies only what another one has otherwise."""
    text = f"{row.dtype} {list(row.shape)}"
    if row.same_as != other.same_as:
        text += f", same as {row.same_as!r}" if row.same_as else ", not tied"
    if (row.kind, row.sharding) != (other.kind, other.sharding):
        text += f" ({row.kind}{'' if row.sharding is None else f' {row.sharding}'})"
    return text


def _refuse(reason: str) -> NoReturn:
    msg = f"layout: {reason}"
    raise ManifestError(msg)
