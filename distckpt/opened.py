"""A checkpoint opened for reading, in notebooks and evaluation: no job, no live objects.

Nothing is read before it is asked for: tensors are handles, and of a handle only the
blocks that overlap the wanted region are read, each of them verified. Without torch,
unless a tensor of torch's is asked for.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from operator import add
from typing import TYPE_CHECKING, Any, TypeAlias

from distckpt import dtypes, readers, values
from distckpt.boxes import Box, contiguous_runs, overlap, split_range
from distckpt.errors import ConfigError, ManifestError, TensorNotFound, UnsupportedError
from distckpt.manifest import Manifest
from distckpt.selection import Selection
from distckpt.shard_file import ShardReader
from distckpt.shard_header import Stored
from distckpt.values import TensorRef

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

# A checkpoint of many ranks has more files than a process may hold open.
_MAX_OPEN_FILES = 64

# The entries that share an element with a region, each with the rank whose file it is in.
_Find: TypeAlias = Callable[[Box], list[tuple[int, Stored]]]


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


class StoredTensor:
    """A tensor in a checkpoint, or a part of one: nothing of it is read yet.

    ``handle[2:5, :, 3]`` is a handle for that part alone: integers, slices of step 1 and
    ``...``, negative ones too. ``numpy()``, ``torch()`` and ``tobytes()`` read, and so does
    whatever takes arrays, like ``numpy.asarray(handle)``. In memory is then what was asked
    for, and no more than a few MiB beside it.

    Attributes:
        name: Full name, for example ``model/layers.0.weight``.
        dtype: torch's name of the element type, for example ``"bfloat16"``.
        shape: Shape of what the handle stands for.
    """

    def __init__(
        self, files: _Files, find: _Find, name: str, dtype: str, selection: Selection
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = selection.shape
        self._files = files
        self._find = find
        self._selection = selection

    @property
    def size_bytes(self) -> int:
        """Bytes of what the handle stands for."""
        return self._selection.box.size * dtypes.item_size_bytes(self.dtype)

    def __getitem__(self, index: Any) -> StoredTensor:
        narrowed = self._selection.narrowed(index, self.name)
        return StoredTensor(self._files, self._find, self.name, self.dtype, narrowed)

    def __len__(self) -> int:
        if not self.shape:
            msg = f"tensor {self.name!r} has no dimensions, and so no length."
            raise UnsupportedError(msg)
        return self.shape[0]

    def __iter__(self) -> Iterator[StoredTensor]:
        return (self[index] for index in range(len(self)))

    def __bool__(self) -> bool:
        return True  # a handle, whatever its tensor's length

    def __repr__(self) -> str:
        return f"<stored tensor {self.name}: {self.dtype} {list(self.shape)}>"

    def numpy(self) -> npt.NDArray[Any]:
        """Read and verify it; returns a new array.

        Raises:
            UnsupportedError: numpy has no such element type.
            ChecksumError, ShardFileError: The bytes are not those that were written.
            StorageError: They cannot be read.
        """
        name = _NUMPY_NAMES.get(self.dtype)
        if name is None:
            msg = (
                f"tensor {self.name!r}: numpy has no {self.dtype}. Take torch(), or "
                "tobytes() for its bytes as they are."
            )
            raise UnsupportedError(msg)
        # Imported here: the command looks at checkpoints without it.
        import numpy as np

        raw = np.empty(self.size_bytes, np.uint8)
        self.read_into(raw.data)
        return raw.view(name).reshape(self.shape)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        if copy is False:
            msg = f"tensor {self.name!r} is on disk; an array of it is always a copy."
            raise ConfigError(msg)
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def torch(self) -> torch.Tensor:
        """Read and verify it; returns a new plain tensor on the CPU.

        Raises:
            ChecksumError, ShardFileError: The bytes are not those that were written.
            StorageError: They cannot be read.
        """
        import torch

        # Whatever the caller's modes are: it may be trained on, and lies on the host.
        with torch.inference_mode(False):
            raw = torch.empty(self.size_bytes, dtype=torch.uint8, device="cpu")
            self.read_into(raw.numpy().data)
            return raw.view(getattr(torch, self.dtype)).reshape(self.shape)

    def tobytes(self) -> bytes:
        """Read and verify its bytes, row-major, little-endian; errors as ``numpy``."""
        buffer = bytearray(self.size_bytes)
        self.read_into(memoryview(buffer))
        return bytes(buffer)

    def read_into(self, buffer: memoryview) -> None:
        """Read and verify its bytes into a buffer of that length; errors as ``numpy``."""
        if len(buffer) != self.size_bytes:
            msg = (
                f"tensor {self.name!r}: a buffer of {len(buffer)} bytes for "
                f"{self.size_bytes}."
            )
            raise ConfigError(msg)
        self._read_box(self._selection.box, buffer)

    def stream(self, piece_bytes: int) -> Iterator[memoryview]:
        """Read and verify its bytes piece by piece, row-major.

        Args:
            piece_bytes: Length of each piece but the last; a multiple of 16.

        Yields:
            Memory that holds the piece until the next one is asked for.

        Raises:
            ChecksumError, ShardFileError, StorageError: As ``numpy``.
        """
        item = dtypes.item_size_bytes(self.dtype)
        box = self._selection.box
        scratch = memoryview(bytearray(min(piece_bytes, self.size_bytes)))
        step = piece_bytes // item
        for first in range(0, box.size, step):
            last = min(first + step, box.size)
            at = 0
            for part in split_range(box.shape, first, last):
                size = part.size * item
                start = tuple(map(add, box.offset, part.offset))
                self._read_box(Box(start, part.shape), scratch[at : at + size])
                at += size
            yield scratch[:at]

    def _read_box(self, box: Box, buffer: memoryview) -> None:
        for rank, stored in self._find(box):
            region = overlap(stored.box, box)
            if region is not None:
                runs = contiguous_runs(region, stored.box, box)
                self._files.reader(rank).read_runs(stored, runs, buffer)


class _Files:
    """The shard files of one checkpoint, opened when they are needed."""

    def __init__(self, directory: str, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._readers: OrderedDict[int, ShardReader] = OrderedDict()
        self._is_closed = False

    def reader(self, rank: int) -> ShardReader:
        """Return one rank's file; open until many others were asked for."""
        if self._is_closed:
            msg = f"{self.directory}: read after close(); keep it open, or open it again."
            raise ConfigError(msg)
        reader = self._readers.get(rank)
        if reader is None:
            reader = readers.open_shard(self.directory, self.manifest, rank)
            self._readers[rank] = reader
            if len(self._readers) > _MAX_OPEN_FILES:
                self._readers.popitem(last=False)[1].close()
        self._readers.move_to_end(rank)
        return reader

    def find_own(self, rank: int, name: str, _: Box) -> list[tuple[int, Stored]]:
        """Find what one rank has of its own under a name: one entry for any region."""
        return [(rank, self.reader(rank).header.entries.per_rank[name])]

    def find_shared(self, name: str, box: Box) -> list[tuple[int, Stored]]:
        """Find the entries that share an element with a region of one of the job's."""
        found = []
        for piece in self.manifest.assignment.pieces_of(name, box):
            by_box = self.reader(piece.rank).header.entries.by_box
            found.append((piece.rank, by_box[(piece.row.name, piece.box)]))
        return found

    def close(self) -> None:
        """Close them all; none is opened again."""
        self._is_closed = True
        while self._readers:
            self._readers.popitem()[1].close()


class _Named(Mapping[str, StoredTensor]):
    """Tensors by full name, and plain values beside."""

    def __init__(
        self, handles: dict[str, StoredTensor], encoded: dict[str, Any], where: str
    ) -> None:
        self._handles = handles
        self._encoded = encoded
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
        """The plain values by name, decoded; a tensor inside one is its handle."""
        return {
            name: self._with_handles(values.decode(encoded))
            for name, encoded in self._encoded.items()
        }

    def _with_handles(self, value: Any) -> Any:
        if isinstance(value, TensorRef):
            if value.name not in self._handles:
                msg = f"{self._where}: a value refers to tensor {value.name!r}: not there."
                raise ManifestError(msg)
            return self._handles[value.name]
        if isinstance(value, (list, tuple)):
            return type(value)(map(self._with_handles, value))
        if isinstance(value, dict) and not isinstance(value, Counter):
            return type(value)((k, self._with_handles(v)) for k, v in value.items())
        return value


class RankTensors(_Named):
    """What one rank has of its own (``PerRank``): its tensors by name, its plain values.

    Attributes:
        rank: The rank.
    """

    def __init__(self, files: _Files, rank: int) -> None:
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
        return f"<rank {self.rank}'s own: {len(self)} tensors, {len(self._encoded)} values>"


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
        self._files = files = _Files(directory, manifest)
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

    def close(self) -> None:
        """Close the files; handles cannot be read any more."""
        self._files.close()

    def __enter__(self) -> OpenedCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return (
            f"<checkpoint {self.manifest.attempt.prefix} (step {self.step}): "
            f"{len(self)} tensors, {len(self._encoded)} plain values>"
        )


_NUMPY_NAMES = {
    **{name: name for name in ("bool", "float16", "float32", "float64")},
    **{name: name for name in ("complex64", "complex128")},
    **{
        f"{sign}int{bits}": f"{sign}int{bits}"
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}
