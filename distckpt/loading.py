"""One rank's reading of one attempt: plan, check, fill tensors, finish.

Nothing here talks to other ranks; ``restore.py`` puts the votes between the parts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from distckpt import tensors
from distckpt.boxes import contiguous_runs, overlap
from distckpt.errors import FormatError, MismatchError
from distckpt.layout import WHOLE, Piece, Row
from distckpt.manifest import Manifest
from distckpt.readers import open_shard
from distckpt.restore_plan import RestorePlan, Saved
from distckpt.shard_file import ShardReader
from distckpt.shard_header import Stored
from distckpt.tracked import Nodes


class Loading:
    """Reads one attempt into live objects.

    Making one opens and checks every file that will be read and lists all that does not
    fit; no live object is changed before ``read``.

    Attributes:
        unexpected: Names in the checkpoint that nothing here has asked for. A mismatch
            only if no other rank does either.

    Raises:
        MismatchError: Lists every difference.
        FormatError: A file is not what the manifest says; ``shard_rank`` says whose.
        StorageError: A file cannot be opened.
    """

    def __init__(
        self, nodes: Nodes, directory: str, manifest: Manifest, rank: int, world_size: int
    ) -> None:
        self._directory = directory
        self._manifest = manifest
        self._rank = rank
        self._readers: dict[int, ShardReader] = {}
        self._stack = ExitStack()
        try:
            what = name_of(directory, manifest)
            self._shared = RestorePlan(Saved(manifest.assignment.rows, manifest.values))
            self._per_rank = RestorePlan(self._own(nodes, world_size, what))
            for node in nodes.shared:
                node.plan(self._shared)
            for node in nodes.per_rank:
                node.plan(self._per_rank)
            self._shared.problems += self._per_rank.problems
            if nodes.per_rank:
                self._shared.problems += [
                    f"{name}: this rank's own in the checkpoint, nothing here"
                    for name in self._per_rank.saved.left_over()
                ]
            self._shared.raise_problems(what)
            self.unexpected = self._shared.saved.left_over()
            for name, tensor in self._shared.reads.items():
                for piece in self._pieces(name, tensor):
                    self._reader(piece.rank)
        except BaseException:
            self._stack.close()
            raise

    def _pieces(self, name: str, tensor: torch.Tensor) -> list[Piece]:
        """Return what a tensor is read from: only what has a part of this rank's box."""
        box = tensors.held(tensor).box
        return [] if box is None else self._manifest.assignment.pieces_of(name, box)

    def _own(self, nodes: Nodes, world_size: int, what: str) -> Saved:
        """Return what this rank has of its own in the checkpoint."""
        if not nodes.per_rank:
            return Saved({}, {})
        if world_size != self._manifest.world_size:
            paths = ", ".join(node.path for node in nodes.per_rank[:5])
            msg = (
                f"{what} was saved by {self._manifest.world_size} ranks, this job has "
                f"{world_size}: what each rank has of its own (PerRank: {paths}) cannot "
                "be given to other ranks. Restore with the same number of ranks, or "
                "without tracking these."
            )
            raise MismatchError(msg)
        reader = self._reader(self._rank)
        rows = {
            e.name: Row(e.name, e.dtype, e.global_shape, WHOLE)
            for e in reader.header.entries.values()
            if e.per_rank
        }
        return Saved(rows, reader.header.per_rank_values, knows_ties=False)

    def _reader(self, rank: int) -> ShardReader:
        reader = self._readers.get(rank)
        if reader is None:
            with _blamed_on(rank):
                reader = open_shard(self._directory, self._manifest, rank)
            self._readers[rank] = self._stack.enter_context(reader)
        return reader

    def read(self) -> None:
        """Fill every tensor, verifying each block; live tensors change from here on.

        Raises:
            ChecksumError, ShardFileError: Bytes are not those that were written;
                ``shard_rank`` says in whose file.
            StorageError: They cannot be read.
        """
        if self._per_rank.reads:
            entries = self._reader(self._rank).header.entries.values()
            own = {e.name: e for e in entries if e.per_rank}
            for name, tensor in self._per_rank.reads.items():
                self._fill(tensor, [(self._rank, own[name])])
        located = {
            (rank, e.name, e.box): e
            for rank, reader in self._readers.items()
            for e in reader.header.entries.values()
            if not e.per_rank
        }
        for name, tensor in self._shared.reads.items():
            pieces = self._pieces(name, tensor)
            self._fill(
                tensor, [(p.rank, located[p.rank, p.row.name, p.box]) for p in pieces]
            )

    def _fill(self, tensor: torch.Tensor, sources: list[tuple[int, Stored]]) -> None:
        target = tensors.held(tensor).box
        if target is None or target.size == 0:
            return
        with tensors.writable_bytes(tensor) as buffer:
            for rank, stored in sources:
                region = overlap(stored.box, target)
                if region is not None:
                    with _blamed_on(rank):
                        runs = contiguous_runs(region, stored.box, target)
                        self._readers[rank].read_runs(stored, runs, buffer)

    def finish(self) -> None:
        """Set plain values and states; runs user code (``load_state_dict``)."""
        for finish in (*self._shared.finishers, *self._per_rank.finishers):
            finish()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def name_of(directory: str, manifest: Manifest) -> str:
    """Name a checkpoint for messages."""
    return f"checkpoint {manifest.attempt.prefix} ({directory})"


@contextmanager
def _blamed_on(rank: int) -> Iterator[None]:
    """Note on a format error whose shard file it was found in."""
    try:
        yield
    except FormatError as error:
        error.shard_rank = rank
        raise
