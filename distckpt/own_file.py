"""What this rank writes in one save: which bytes of which tensor, in file order."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from distckpt import boxes, dtypes, layout, shard_file, tensors
from distckpt.boxes import Box
from distckpt.capture import Captured
from distckpt.known import window_of
from distckpt.layout import Layouts, Piece, Row
from distckpt.leaves import Leaf
from distckpt.run_directory import Buffer
from distckpt.shard_file import Load
from distckpt.shard_header import Outline


class _Part:
    """One entry of the file.

    Args:
        piece: What it is.
        index: Of its tensor among all that are captured.
        start: Where it begins in what this rank holds of the tensor, in bytes; None if
            it does not lie there in one run.

    Attributes:
        piece, index, start: The same.
    """

    __slots__ = ("_address", "_buffer", "_window", "index", "piece", "start")

    def __init__(self, piece: Piece, index: int, start: int | None) -> None:
        self.piece = piece
        self.index = index
        self.start = start
        self._window = window_of(piece.size_bytes)
        self._address = 0
        self._buffer: Buffer = b""

    def bytes_of(self, leaf: Leaf) -> Buffer:
        """Return the bytes: the tensor's own memory where that can be had."""
        own = self.memory_of(leaf)
        return tensors.box_bytes(leaf.tensor, self.piece.box) if own is None else own

    def is_plain(self, leaf: Leaf) -> bool:
        """Tell whether it is copied by one call, from a device or on the host."""
        return leaf.known.device == "cuda" or (
            self.start is not None and leaf.known.address != 0
        )

    def memory_of(self, leaf: Leaf) -> Buffer | None:
        """Return the tensor's own memory, if the bytes lie there in one run on the host."""
        address = leaf.known.address
        if self.start is None or not address:
            return None
        if address != self._address:
            # Nearly always the tensor lies where it lay at the last save.
            self._buffer, self._address = self._window(address + self.start), address
        return self._buffer


class Move(NamedTuple):
    """One entry of the file that is copied.

    Attributes:
        name: Of the tensor.
        leaf: What it is of.
        box: Which region of the tensor it is.
        memory: The tensor's own memory of it, if that is one run on the host.
        position: Where it goes, in bytes from the start of the file's data.
        size_bytes: How long it is.
    """

    name: str
    leaf: Leaf
    box: Box
    memory: Buffer | None
    position: int
    size_bytes: int

    @property
    def is_from_device(self) -> bool:
        """Whether it comes from a CUDA device."""
        return self.leaf.known.device == "cuda"


class Moves:
    """What a snapshot copies, in file order; entries without bytes are left out.

    Args:
        captured: What this rank has to save.

    Attributes:
        waiting: The tensors that may be copied later, by name.
    """

    def __init__(self, captured: Captured) -> None:
        self._leaves = _leaves_of(captured)
        self._now: list[tuple[int, _Part]] = []
        self._later: list[tuple[int, _Part]] = []
        self.waiting: dict[str, Leaf] = {}

    def add(self, part: _Part, position: int, later: Collection[int]) -> None:
        """Add an entry; see ``OwnFile.moves``."""
        leaf = self._leaves[part.index]
        if id(leaf.tensor) in later and part.is_plain(leaf):
            self._later.append((position, part))
            self.waiting[part.piece.row.name] = leaf
        else:
            self._now.append((position, part))

    def now(self) -> Iterator[Move]:
        """Walk what must be copied at once."""
        return self._walk(self._now)

    def later(self, from_device: bool) -> Iterator[Move]:
        """Walk what may be copied later: from a device, or on the host."""
        moves = self._walk(self._later)
        return (move for move in moves if move.is_from_device == from_device)

    def _walk(self, parts: Sequence[tuple[int, _Part]]) -> Iterator[Move]:
        for position, part in parts:
            leaf, piece = self._leaves[part.index], part.piece
            memory = part.memory_of(leaf)
            yield Move(piece.row.name, leaf, piece.box, memory, position, piece.size_bytes)


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
        # Tables are alike only if names stand in the same order.
        leaves = _leaves_of(captured)
        names = [*captured.shared.tensors]
        index_of = {(name, False): index for index, name in enumerate(names)}
        for index, row in enumerate(self._per_rank_rows, len(names)):
            index_of[row.name, True] = index
        self._parts = []
        for piece, per_rank in items:
            index = index_of[piece.row.name, per_rank]
            self._parts.append(_Part(piece, index, _start_of(piece, leaves[index])))

    def is_of(self, captured: Captured, layouts: Layouts) -> bool:
        """Tell whether it is what these would make."""
        rows = _per_rank_rows(captured)
        return layouts is self._layouts and rows == self._per_rank_rows

    def loader(self, captured: Captured) -> Load:
        """Return what gives the bytes; good while the tensors stay as they are."""
        leaves = _leaves_of(captured)

        def load(first: int, stop: int) -> list[Buffer]:
            return [part.bytes_of(leaves[part.index]) for part in self._parts[first:stop]]

        return load

    def moves(self, captured: Captured, later: Collection[int] = ()) -> Moves:
        """List what a snapshot copies.

        Args:
            captured: What this rank has to save.
            later: Ids of tensors that may be copied later.
        """
        moves = Moves(captured)
        position = 0
        for part, size in zip(self._parts, self.outline.sizes, strict=True):
            if size:
                moves.add(part, position, later)
            position += size
        return moves


def _leaves_of(captured: Captured) -> list[Leaf]:
    return [*captured.shared.tensors.values(), *captured.per_rank.tensors.values()]


def _per_rank_rows(captured: Captured) -> list[Row]:
    """Describe this rank's own tensors, which only it writes, tied or not."""
    leaves = captured.per_rank
    return [
        leaf.known.row(name, leaf.tensor, layout.WHOLE, "", leaves.numbering)
        for name, leaf in leaves.tensors.items()
    ]


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
