"""Which rank writes which box of which tensor: by arithmetic, without messages.

Every rank describes its tensors in a table of rows. From the tables of all ranks alone
follows who writes what, when saving, and what lies in which file, when restoring. So a
manifest holds one table for all ranks that share it: O(ranks) + O(tensors).

The rules are part of the on-disk format (docs/format.md):

* ``whole``: the lowest rank whose table names the tensor writes all of it.
* ``split``: the ranks whose tables name it hold equal copies and share the work.
  All split tensors of one such set of ranks are laid end to end, in table order, and
  cut into as many equal ranges as there are ranks; a tensor across a border is cut
  there, at a multiple of its grain.
* A row that is ``same_as`` another is written by nobody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from distckpt import dtypes, strict_json
from distckpt.boxes import Box, checked_size, split_range, whole
from distckpt.errors import ManifestError

SPLIT = "split"
WHOLE = "whole"

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
        kind: ``"split"`` or ``"whole"``.
        same_as: The earlier row whose memory this one shares; "" for none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    kind: str
    same_as: str = ""

    def __post_init__(self) -> None:
        if not 0 < len(self.name) <= _MAX_NAME_LENGTH:
            _refuse(f"tensor name of {len(self.name)} characters")
        if not strict_json.is_unicode(self.name):
            _refuse(f"tensor name {self.name!r} is not Unicode text")
        if not dtypes.is_known(self.dtype):
            _refuse(f"tensor {self.name!r}: unknown dtype {self.dtype!r}")
        if self.kind not in (SPLIT, WHOLE):
            _refuse(f"tensor {self.name!r}: unknown kind {self.kind!r}")
        if len(self.shape) > _MAX_DIMS or min(self.shape, default=0) < 0:
            _refuse(f"tensor {self.name!r}: impossible shape {self.shape!r:.200}")
        limit = _MAX_SIZE_BYTES // dtypes.item_size_bytes(self.dtype)
        if checked_size(self.shape, limit) is None:
            _refuse(f"tensor {self.name!r}: impossible size {self.shape!r:.200}")

    @property
    def size_bytes(self) -> int:
        """Bytes of the global tensor."""
        return prod(self.shape) * dtypes.item_size_bytes(self.dtype)

    def to_json(self) -> list[Any]:
        """Encode to a JSON list."""
        fields = [self.name, self.dtype, list(self.shape), self.kind]
        return [*fields, self.same_as] if self.same_as else fields

    @staticmethod
    def from_json(fields: Any) -> Row:
        """Decode; raises ``ManifestError`` for anything that is not a row."""
        if not isinstance(fields, list) or len(fields) not in (4, 5):
            _refuse(f"not a table row: {fields!r:.200}")
        name, dtype, shape, kind, *same_as = fields
        texts = (name, dtype, kind, *same_as)
        if not all(isinstance(text, str) for text in texts) or not (
            isinstance(shape, list) and all(type(length) is int for length in shape)
        ):
            _refuse(f"not a table row: {fields!r:.200}")
        return Row(name, dtype, tuple(shape), kind, *same_as)


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
            elif (other.dtype, other.shape) != (row.dtype, row.shape):
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

    Attributes:
        rows: Every tensor of the job by name.
    """

    def __init__(self, tables: Sequence[Table], table_of_rank: Sequence[int]) -> None:
        self.rows: dict[str, Row] = {}
        self._pieces_of_name: dict[str, list[Piece]] = {}
        self._pieces_of_rank: list[list[Piece]] = [[] for _ in table_of_rank]
        ranks_of_table: dict[int, list[int]] = {}
        for rank, index in enumerate(table_of_rank):
            ranks_of_table.setdefault(index, []).append(rank)

        tables_of_name: dict[str, list[int]] = {}
        for index in sorted(ranks_of_table, key=lambda i: ranks_of_table[i][0]):
            for row in tables[index]:
                known = self.rows.setdefault(row.name, row)
                if known != row:
                    _refuse_differing(
                        known,
                        row,
                        ranks_of_table[tables_of_name[row.name][0]],
                        ranks_of_table[index],
                    )
                tables_of_name.setdefault(row.name, []).append(index)

        shared: dict[tuple[int, ...], list[Row]] = {}
        for name, row in self.rows.items():
            indices = tables_of_name[name]
            if row.same_as:
                continue
            if row.kind == SPLIT:
                shared.setdefault(tuple(indices), []).append(row)
            else:
                lowest = min(ranks_of_table[index][0] for index in indices)
                self._add(Piece(row, whole(row.shape), lowest))
        for indices_key, rows in shared.items():
            ranks = sorted(rank for i in indices_key for rank in ranks_of_table[i])
            for piece in _split_evenly(rows, ranks):
                self._add(piece)

    def _add(self, piece: Piece) -> None:
        self._pieces_of_name.setdefault(piece.row.name, []).append(piece)
        self._pieces_of_rank[piece.rank].append(piece)

    def pieces_of_rank(self, rank: int) -> list[Piece]:
        """Return what one rank writes."""
        return self._pieces_of_rank[rank]

    def pieces_of(self, name: str) -> list[Piece]:
        """Return the pieces that make up one tensor, also of a ``same_as`` row."""
        row = self.rows[name]
        return self._pieces_of_name[row.same_as or row.name]


def _split_evenly(rows: Sequence[Row], ranks: Sequence[int]) -> Iterator[Piece]:
    total = sum(row.size_bytes for row in rows)
    start = 0
    index = 0
    for row in rows:
        stop = start + row.size_bytes
        cut = 0
        while True:
            # The border between ranks[index] and the next one, in bytes from the start.
            border = total * (index + 1) // len(ranks)
            last = index == len(ranks) - 1
            next_cut = row_elements = prod(row.shape)
            if not last and border < stop:
                next_cut = max(cut, _nearest_cut(row, border - start))
            if row_elements == 0:
                yield Piece(row, whole(row.shape), ranks[index])
                break
            for box in split_range(row.shape, cut, next_cut):
                yield Piece(row, box, ranks[index])
            cut = next_cut
            if last or border >= stop:
                break
            index += 1
        start = stop


def _nearest_cut(row: Row, offset_bytes: int) -> int:
    """Return the element, at a multiple of the grain, nearest to an offset."""
    item = dtypes.item_size_bytes(row.dtype)
    grain = prod(row.shape)
    for length in row.shape:
        if grain * item <= _GRAIN_BYTES:
            break
        grain //= length
    return min(
        (offset_bytes + grain * item // 2) // (grain * item) * grain, prod(row.shape)
    )


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
    return f"{row.dtype} {list(row.shape)} ({row.kind}{shared})"


def _few(ranks: Sequence[int]) -> str:
    text = ", ".join(map(str, ranks[:8]))
    return text if len(ranks) <= 8 else f"{text}, ... ({len(ranks)} ranks)"


def _refuse(reason: str) -> NoReturn:
    msg = f"layout: {reason}"
    raise ManifestError(msg)
