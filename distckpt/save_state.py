"""The state that a save needs: the tracked objects, and results of earlier saves."""

from __future__ import annotations

from dataclasses import dataclass, field

from distckpt.arena import Arena
from distckpt.capture import Captured, Tracked
from distckpt.collector import collector_paused
from distckpt.flight import Flight
from distckpt.layout import Layouts
from distckpt.own_file import OwnFile
from distckpt.paths import Attempt
from distckpt.replica_digests import Replicas
from distckpt.shard_header import Draft


@dataclass(slots=True)
class SaveState:
    """The state that a save needs, on one rank.

    Attributes:
        tracked: The tracked objects.
        rank: This rank in the manager's group.
        world_size: Number of ranks in the manager's group.
        replicas: The comparison of equal state between ranks.
        layouts: All ranks' tables at the last save, and who writes what.
        own_file: The contents of this rank's file then.
        arena: The memory that asynchronous saves are copied to.
        flight: The asynchronous save in progress.
        is_checked: Whether all ranks know that what is tracked can be stored.
        warned_of_stateless: Paths of the optimizers whose missing state has been logged.
    """

    tracked: Tracked
    rank: int
    world_size: int
    replicas: Replicas = field(default_factory=Replicas)
    layouts: Layouts | None = None
    own_file: OwnFile | None = None
    arena: Arena | None = None
    flight: Flight | None = None
    is_checked: bool = False
    warned_of_stateless: set[str] = field(default_factory=set)

    def file_of(self, captured: Captured, layouts: Layouts) -> OwnFile:
        """Return what this rank writes, made once for as long as that does not change."""
        if self.own_file is None or not self.own_file.is_of(captured, layouts):
            with collector_paused():
                self.own_file = OwnFile(captured, layouts, self.rank)
        return self.own_file

    def draft(self, attempt: Attempt, captured: Captured, file: OwnFile) -> Draft:
        """Draft the header of this rank's file."""
        return Draft(
            file.outline,
            attempt=attempt.published,
            rank=self.rank,
            world_size=self.world_size,
            per_rank_values=captured.per_rank.values,
        )

    def arena_for(self, size_bytes: int, pinned: bool) -> Arena:
        """Return memory of at least a size, kept from save to save."""
        if self.arena is None or not self.arena.suits(size_bytes, pinned):
            self.arena = None  # never two of them
            self.arena = Arena(size_bytes, pinned)
        return self.arena
