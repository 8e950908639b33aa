"""A checkpoint opened for reading, in notebooks and evaluation: no job, no live objects.

Nothing is read before it is asked for: tensors are handles (``stored_tensor.py``), and of a
handle only the blocks that overlap the wanted region are read, each of them verified.
Without torch, unless a tensor of torch's is asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property, partial
from typing import Any, NamedTuple

from distckpt import readers
from distckpt.boxes import Box
from distckpt.errors import ConfigError, ManifestError, TensorNotFound
from distckpt.manifest import Manifest
from distckpt.selection import Selection
from distckpt.stored_tensor import Files, StoredTensor
from distckpt.values import Decoder


def open(path: readers.Path) -> OpenedCheckpoint:
    """Open a checkpoint for reading: no process group, no torch, nothing tracked.

    The manifest is read and checked; shard files are opened when they are first needed.
    If a running job deletes the checkpoint meanwhile, reading fails with a
    ``StorageError``: open the newest again.

    Args:
        path: A prefix as ``save()`` returns it, an attempt's directory, or a run
            directory, which means its newest checkpoint.

    Raises:
        CheckpointNotFound: Nothing committed is there.
        CorruptStateError, ManifestError, ChecksumError: It is not what was committed.
        StorageError: It cannot be read.
    """
    located = readers.locate_newest(path)
    manifest = readers.read_manifest(located.directory, located.manifest_digest)
    _ = manifest.assignment  # worked out here, where its errors belong
    return OpenedCheckpoint(located.directory, manifest)


class _Named(Mapping[str, StoredTensor]):
    """Tensors by full name, and plain values beside.

    Attributes:
        encoded_values: The plain values by name, as they are stored (``values.encode``).
    """

    def __init__(
        self, handles: dict[str, StoredTensor], encoded: dict[str, Any], where: str
    ) -> None:
        self._handles = handles
        self.encoded_values: Mapping[str, Any] = encoded
        self._where = where

    def __getitem__(self, name: str) -> StoredTensor:
        handle = self._handles.get(name)
        if handle is None:
            close = [known for known in self._handles if str(name) in known][:5]
            hint = f"; did you mean {', '.join(close)}?" if close else "."
            msg = f"{self._where}: no tensor {name!r:.200} among {len(self)}{hint}"
            raise TensorNotFound(msg)
        return handle

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    @cached_property
    def plain_values(self) -> Mapping[str, Any]:
        """The plain values by name, decoded; a tensor inside one is its handle.

        So is an array of more than 4 KiB. Instances of classes are plain values, as
        nothing live tells how to make them; see ``docs/values.md``. Of a tensor that is
        made of others there is what it is besides these (``value_tags.Wrapper``).
        """
        decoder = _Decoder(self._handles, self._where)
        return {
            name: decoder.decode(encoded) for name, encoded in self.encoded_values.items()
        }


class _Decoder(Decoder):
    """Decodes values with handles for the tensors in them."""

    def __init__(self, handles: Mapping[str, StoredTensor], where: str) -> None:
        self._handles = handles
        self._where = where

    def tensor(self, name: str) -> StoredTensor:
        handle = self._handles.get(name)
        if handle is None:
            msg = f"{self._where}: a value refers to tensor {name!r}: not there."
            raise ManifestError(msg)
        return handle


class RankTensors(_Named):
    """What one rank has of its own (``PerRank``): its tensors by name, its plain values.

    Attributes:
        rank: The rank.
    """

    def __init__(self, files: Files, rank: int) -> None:
        header = files.reader(rank).header
        handles = {
            name: StoredTensor(
                files,
                partial(files.find_own, rank, name),
                name,
                stored.dtype,
                Selection.of_all(stored.global_shape),
            )
            for name, stored in header.entries.per_rank.items()
        }
        super().__init__(
            handles, header.per_rank_values, f"rank {rank} of {files.directory}"
        )
        self.rank = rank

    def __repr__(self) -> str:
        num_values = len(self.encoded_values)
        return f"<rank {self.rank}'s own: {len(self)} tensors, {num_values} values>"


class Part(NamedTuple):
    """What one shard file holds of one tensor.

    Attributes:
        name: The tensor's, of tied ones that of the first.
        rank: Whose own it is; None if it is the job's.
        box: Which region of it.
        block_bytes: Size of the blocks that checksums were taken of.
        checksums: Of all its blocks. Parts of equal size and equal checksums, of blocks of
            equal size, have equal bytes.
    """

    name: str
    rank: int | None
    box: Box
    block_bytes: int
    checksums: bytes


class OpenedCheckpoint(_Named):
    """The tensors of a checkpoint by full name, read-only; see ``distckpt.open``.

    Whatever number of ranks saved it, and however their tensors were sharded: each is one
    whole tensor here. What each rank had of its own stands apart, in ``per_rank``. For one
    thread at a time.

    Attributes:
        directory: The attempt's directory.
    """

    def __init__(self, directory: str, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._files = files = Files(directory, manifest)
        handles = {
            row.name: StoredTensor(
                files,
                partial(files.find_shared, row.name),
                row.name,
                row.dtype,
                Selection.of_all(row.shape),
            )
            for row in manifest.assignment.rows.values()
        }
        super().__init__(handles, manifest.values, directory)

    @property
    def number(self) -> int:
        """The checkpoint's number, as in ``ckpt-1000``."""
        return self.manifest.attempt.number

    @property
    def step(self) -> int | None:
        """The training step, if the manager had a step counter."""
        return self.manifest.step

    @property
    def created(self) -> float:
        """When it was saved, seconds since the epoch."""
        return self.manifest.created

    @property
    def metrics(self) -> dict[str, float]:
        """What ``save(metrics=...)`` was given."""
        return dict(self.manifest.remarks.metrics)

    @property
    def metadata(self) -> dict[str, Any]:
        """What ``save(metadata=...)`` was given."""
        return self.manifest.remarks.metadata

    @property
    def world_size(self) -> int:
        """How many ranks saved it."""
        return self.manifest.world_size

    @property
    def size_bytes(self) -> int:
        """Bytes of all its shard files."""
        return self.manifest.size_bytes

    def per_rank(self, rank: int) -> RankTensors:
        """Return what one rank has of its own; opens that rank's file.

        Raises:
            ConfigError: There was no such rank.
            FormatError, StorageError: Its file is not what was committed.
        """
        if type(rank) is not int or not 0 <= rank < self.world_size:
            msg = f"{self.directory} was saved by {self.world_size} ranks, got {rank!r}."
            raise ConfigError(msg)
        return RankTensors(self._files, rank)

    def parts(self, rank: int) -> Iterator[Part]:
        """Walk what one rank's file holds, in its order; reads no more than its header.

        Raises:
            FormatError, StorageError: Its file is not what was committed.
        """
        reader = self._files.reader(rank)
        for stored in reader.header.entries.values():
            yield Part(
                stored.name,
                rank if stored.per_rank else None,
                stored.box,
                reader.header.block_bytes,
                reader.checksums_of(stored),
            )

    def close(self) -> None:
        """Close the files; handles cannot be read any more."""
        self._files.readers.close()

    def __enter__(self) -> OpenedCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<checkpoint {self.manifest.attempt.prefix} (step {self.step}): "
            f"{len(self)} tensors, {len(self.encoded_values)} plain values>"
        )
