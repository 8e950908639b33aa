"""A tensor in a checkpoint as a handle that reads, whole or in part, verified."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from operator import add
from typing import TYPE_CHECKING, Any, TypeAlias

from distckpt import dtypes, readers, torch_versions
from distckpt.boxes import Box, contiguous_runs, overlap, split_range
from distckpt.errors import ConfigError, UnsupportedError
from distckpt.few_open import FewOpen
from distckpt.manifest import Manifest
from distckpt.run_directory import AttemptDirectory
from distckpt.selection import Selection
from distckpt.shard_file import ShardReader
from distckpt.shard_header import Stored

if TYPE_CHECKING:
    import numpy.typing as npt
    import torch

# The entries that share an element with a region, each with the rank whose file it is in.
Find: TypeAlias = Callable[[Box], list[tuple[int, Stored]]]


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
        self, files: Files, find: Find, name: str, dtype: str, selection: Selection
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
            UnsupportedError: This version of torch does not have its dtype.
            ChecksumError, ShardFileError: The bytes are not those that were written.
            StorageError: They cannot be read.
        """
        import torch

        dtype = torch_versions.dtype_of_name(self.dtype, self.name)
        # Whatever the caller's modes are: it may be trained on, and lies on the host.
        with torch.inference_mode(False):
            raw = torch.empty(self.size_bytes, dtype=torch.uint8, device="cpu")
            self.read_into(raw.numpy().data)
            return raw.view(dtype).reshape(self.shape)

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


class Files:
    """The shard files of one checkpoint, opened when they are needed."""

    def __init__(self, directory: AttemptDirectory, manifest: Manifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self.readers = FewOpen(partial(readers.open_shard, directory, manifest))

    def reader(self, rank: int) -> ShardReader:
        """Return one rank's file."""
        if self.readers.is_closed:
            msg = f"{self.directory}: read after close(); keep it open, or open it again."
            raise ConfigError(msg)
        return self.readers.get(rank)

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


_NUMPY_NAMES = {
    **{name: name for name in ("bool", "float16", "float32", "float64")},
    **{name: name for name in ("complex64", "complex128")},
    **{
        f"{sign}int{bits}": f"{sign}int{bits}"
        for sign in ("", "u")
        for bits in (8, 16, 32, 64)
    },
}
