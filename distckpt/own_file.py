"""What this rank writes in one save: which bytes of which tensor, in file order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from distckpt import boxes, dtypes, layout, shard_file, tensors
from distckpt.boxes import Box
from distckpt.checkpoint import Captured
from distckpt.known import Window, window_of
from distckpt.layout import Layouts, Piece, Row
from distckpt.leaves import Leaf
from distckpt.shard_file import Load
from distckpt.shard_header import Outline
from distckpt.storage import Buffer


class _Part(NamedTuple):
    """One entry of the file.

    Attributes:
        piece: What it is.
        per_rank: Whether it is this rank's own.
        start: Where it begins in what this rank holds of the tensor, in bytes; None if
            it does not lie there in one run.
        window: What gives a buffer of its length at an address.
    """

    piece: Piece
    per_rank: bool
    start: int | None
    window: Window


class Move(NamedTuple):
    """One entry of the file that is copied.

    Attributes:
        name: Of the tensor.
        leaf: What it is of.
        box: Which region of the tensor it is.
        start: As in ``_Part``.
        position: Where it goes, in bytes from the start of the file's data.
        size_bytes: How long it is.
    """

    name: str
    leaf: Leaf
    box: Box
    start: int | None
    position: int
    size_bytes: int


class OwnFile:
    """What this rank's file holds; good until a tensor comes, goes or changes its shape.

    Args:
        captured: What this rank has to save.
        layouts: Who writes what.
        rank: Who this is.

    Attributes:
        outline: What the file will hold and where.

    Raises:
        ShardFileError: Two entries would have the same name.
    """

    def __init__(self, captured: Captured, layouts: Layouts, rank: int) -> None:
        self._layouts = layouts
        self._per_rank_rows = _per_rank_rows(captured)
        shared = layouts.assignment.pieces_of_rank(rank)
        own = [Piece(row, boxes.whole(row.shape), rank) for row in self._per_rank_rows]
        items = [*((piece, False) for piece in shared), *((piece, True) for piece in own)]
        items.sort(key=lambda item: shard_file.order(item[0]))
        self.outline = Outline(items)
        self._parts = []
        for piece, per_rank in items:
            leaf = _leaf_of(captured, piece, per_rank)
            window = window_of(piece.size_bytes)
            self._parts.append(_Part(piece, per_rank, _start_of(piece, leaf), window))

    def is_of(self, captured: Captured, layouts: Layouts) -> bool:
        """Tell whether it is what these would make."""
        rows = _per_rank_rows(captured)
        return layouts is self._layouts and rows == self._per_rank_rows

    def loader(self, captured: Captured) -> Load:
        """Return what gives the bytes; good while the tensors stay as they are."""

        def load(first: int, stop: int) -> list[Buffer]:
            return [_bytes_of(captured, part) for part in self._parts[first:stop]]

        return load

    def moves(self, captured: Captured) -> Iterator[Move]:
        """Walk what a snapshot copies, in file order; entries without bytes left out."""
        position = 0
        sizes = self.outline.sizes
        for (piece, per_rank, start, _), size in zip(self._parts, sizes, strict=True):
            if size:
                leaf = _leaf_of(captured, piece, per_rank)
                yield Move(piece.row.name, leaf, piece.box, start, position, size)
            position += size


def _per_rank_rows(captured: Captured) -> list[Row]:
    """Describe this rank's own tensors, which only it writes, tied or not."""
    leaves = captured.per_rank
    return [
        leaf.known.row(name, leaf.tensor, layout.WHOLE, "", leaves.numbering)
        for name, leaf in leaves.tensors.items()
    ]


def _leaf_of(captured: Captured, piece: Piece, per_rank: bool) -> Leaf:
    leaves = captured.per_rank if per_rank else captured.shared
    return leaves.tensors[piece.row.name]


def _bytes_of(captured: Captured, part: _Part) -> Buffer:
    piece, per_rank, start, window = part
    leaf = _leaf_of(captured, piece, per_rank)
    address = leaf.known.address
    if start is None or not address:
        return tensors.box_bytes(leaf.tensor, piece.box)
    return window(address + start)


def _start_of(piece: Piece, leaf: Leaf) -> int | None:
    held = leaf.known.box
    if held is None or piece.box.size == 0:
        return None
    if held == piece.box:
        return 0
    runs = list(boxes.contiguous_runs(piece.box, held, piece.box))
    if len(runs) > 1:
        return None
    return runs[0][0] * dtypes.item_size_bytes(piece.row.dtype)
