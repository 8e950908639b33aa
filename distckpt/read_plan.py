"""Which bytes of which shard files make up what a rank wants of its tensors: arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from distckpt import boxes, dtypes
from distckpt.boxes import Box
from distckpt.layout import Assignment
from distckpt.shard_header import Entries, Stored

# One tensor's name, and the box of it that is wanted.
Wanted = tuple[str, Box]


class Source(NamedTuple):
    """What one entry of a shard file gives to one tensor.

    Attributes:
        entry: Name and box of the entry.
        name: The tensor that is filled.
        start: Where in the memory of the wanted box it goes, in bytes, if all of the
            entry goes there in one run; else None.
    """

    entry: tuple[str, Box]
    name: str
    start: int | None


class Located(NamedTuple):
    """A source, and where in its file it lies."""

    stored: Stored
    source: Source


class ReadPlan:
    """From which files a rank reads what.

    Args:
        assignment: What lies where.
        wanted: What the rank wants.

    Attributes:
        sources: What comes from each rank's file.
    """

    def __init__(self, assignment: Assignment, wanted: Sequence[Wanted]) -> None:
        self._assignment = assignment
        self._wanted = wanted
        self.sources: dict[int, list[Source]] = {}
        self._located: dict[int, tuple[Entries, list[Located]]] = {}
        for name, box in wanted:
            for piece in assignment.pieces_of(name, box):
                start = _start_of(piece.box, box, piece.row.dtype)
                source = Source((piece.row.name, piece.box), name, start)
                self.sources.setdefault(piece.rank, []).append(source)

    def is_of(self, assignment: Assignment, wanted: Sequence[Wanted]) -> bool:
        """Tell whether it is what these would make."""
        return assignment is self._assignment and wanted == self._wanted

    def located(self, rank: int, entries: Entries) -> list[Located]:
        """Return what comes from one rank's file, in file order.

        Args:
            rank: Whose file.
            entries: What it holds, which is what the assignment says.
        """
        known = self._located.get(rank)
        if known is None or known[0] is not entries:
            sources = self.sources[rank]
            located = [Located(entries.by_box[source.entry], source) for source in sources]
            located.sort(key=lambda one: one.stored.start)
            known = self._located[rank] = entries, located
        return known[1]


class ReadPlans:
    """Remembers the last plan: a job reads what its own layout has written."""

    def __init__(self) -> None:
        self._last: ReadPlan | None = None

    def plan(self, assignment: Assignment, wanted: Sequence[Wanted]) -> ReadPlan:
        """Plan what to read, or return the last plan if it is the same."""
        if self._last is None or not self._last.is_of(assignment, wanted):
            self._last = ReadPlan(assignment, wanted)
        return self._last


def _start_of(stored: Box, wanted: Box, dtype: str) -> int | None:
    if stored == wanted:
        return 0
    if boxes.overlap(stored, wanted) != stored:
        return None
    runs = list(boxes.contiguous_runs(stored, stored, wanted))
    return runs[0][1] * dtypes.item_size_bytes(dtype) if len(runs) == 1 else None
