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

    In this order: ``open_own``, ``plan``, ``open_files``, ``read``, ``finish``; no live
    object is changed before ``read``. Those that open and read files may run on another
    thread. ``plan`` and ``finish`` run user code: on the thread that trains, as nothing
    else is promised to it. The files are closed by ``close``, or by an error before
    ``read``.

    Attributes:
        unexpected: Names in the checkpoint that nothing here has asked for. A mismatch
            only if no other rank does either. Known once planned.
    """

    def __init__(
        self, directory: str, manifest: Manifest, rank: int, world_size: int
    ) -> None:
        self._directory = directory
        self._manifest = manifest
        self._rank = rank
        self._world_size = world_size
        self._what = name_of(directory, manifest)
        self._readers: dict[int, ShardReader] = {}
        self._stack = ExitStack()
        self._shared = RestorePlan(Saved(manifest.assignment.rows, manifest.values))
        self._per_rank = RestorePlan(Saved({}, {}))
        self._pieces: dict[str, list[Piece]] = {}
        self.unexpected: list[str] = []

    def open_own(self, nodes: Nodes) -> None:
        """Open this rank's own file, if it tracks anything that only its header tells of.

        Raises:
            MismatchError: Another number of ranks has saved it.
            FormatError: The file is not what the manifest says; ``shard_rank`` says whose.
            StorageError: It cannot be opened.
        """
        with self._closed_on_error():
            if nodes.per_rank:
                self._per_rank = RestorePlan(self._own(nodes))

    def plan(self, nodes: Nodes) -> None:
        """List what will be read, and all that does not fit; runs user code.

        Raises:
            MismatchError: Lists every difference.
            UnsupportedError: Something tracked cannot be restored into.
        """
        with self._closed_on_error():
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
            self._shared.raise_problems(self._what)
            self.unexpected = self._shared.saved.left_over()

    def open_files(self) -> None:
        """Open and check every file that will be read.

        Raises:
            FormatError: A file is not what the manifest says; ``shard_rank`` says whose.
            StorageError: A file cannot be opened.
        """
        with self._closed_on_error():
            for name, tensor in self._shared.reads.items():
                self._pieces[name] = self._pieces_of(name, tensor)
                for piece in self._pieces[name]:
                    self._reader(piece.rank)

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _pieces_of(self, name: str, tensor: torch.Tensor) -> list[Piece]:
        """Return what a tensor is read from: only what has a part of this rank's box."""
        box = tensors.held(tensor).box
        return [] if box is None else self._manifest.assignment.pieces_of(name, box)

    def _own(self, nodes: Nodes) -> Saved:
        """Return what this rank has of its own in the checkpoint."""
        if self._world_size != self._manifest.world_size:
            paths = ", ".join(node.path for node in nodes.per_rank[:5])
            msg = (
                f"{self._what} was saved by {self._manifest.world_size} ranks, this job "
                f"has {self._world_size}: what each rank has of its own (PerRank: "
                f"{paths}) cannot be given to other ranks. Restore with the same number "
                "of ranks, or without tracking these."
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
            pieces = self._pieces[name]
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
