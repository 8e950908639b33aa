"""A directory that torch's distributed checkpoint (DCP) has written: read without torch.

Each item is an archive of its own in a ``.distcp`` file, as ``torch.save`` makes it.
torch writes its checksums and never reads them; here all are compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from math import prod
from typing import Any

from distckpt import dtypes, files
from distckpt.boxes import contiguous_runs, split_range, whole
from distckpt.errors import CheckpointNotFound, FormatError
from distckpt.few_open import FewOpen
from distckpt.files import OpenFile
from distckpt.formats import dcp_metadata, torch_load
from distckpt.formats.dcp_metadata import (
    METADATA_FILE,
    Chunk,
    DcpTensor,
    DcpValue,
    Path,
    Place,
)
from distckpt.formats.foreign import PIECE_BYTES, joined

_MAX_METADATA_BYTES = 2**32


def is_dcp(path: str) -> bool:
    """Tell whether a path is a directory of DCP's."""
    return files.exists(os.path.join(path, METADATA_FILE))


class DcpDirectory:
    """What a DCP checkpoint holds; its metadata is read, and nothing else yet.

    Attributes:
        path: The directory.
        entries: Tensors and values by full name, parts joined by dots.
        paths: The keys on the way to each of them.

    Raises:
        CheckpointNotFound: It is no directory of DCP's.
        FormatError: Its metadata is not valid, or not safe to read.
        UnsupportedError: It uses what is not read here.
        StorageError: It cannot be read.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        file = os.path.join(path, METADATA_FILE)
        if not is_dcp(path):
            msg = (
                f"{path} is no checkpoint of DCP's: it has no {METADATA_FILE}. (What was "
                "written with use_collectives=False has one a rank, and is not read.)"
            )
            raise CheckpointNotFound(msg)
        data = files.read_file(file, _MAX_METADATA_BYTES)
        try:
            metadata = dcp_metadata.decode(data)
        except FormatError as error:
            msg = f"{file}: {error}"
            raise type(error)(msg) from error
        self.entries: Mapping[str, DcpTensor | DcpValue] = metadata.entries
        self.paths: Mapping[str, Path] = metadata.paths
        self._files = FewOpen(partial(_open, path))

    def tensor(self, name: str) -> StoredDcpTensor:
        """Return one tensor, to be streamed.

        Raises:
            FormatError: Its chunks do not make up all of it.
        """
        entry = self.entries[name]
        assert isinstance(entry, DcpTensor), name
        gaps = dcp_metadata.gaps_of(entry)
        if gaps:
            msg = f"{self.path}: tensor {name!r}: {'; '.join(gaps[:3])}."
            raise FormatError(msg)
        return StoredDcpTensor(self, name, entry)

    def value(self, name: str) -> Any:
        """Read one plain value; tensors inside it are ``ArchivedTensor``s.

        Raises:
            FormatError, UnsupportedError: It is not plain, or damaged.
            StorageError: It cannot be read.
        """
        entry = self.entries[name]
        assert isinstance(entry, DcpValue), name
        return self.item(name, entry.place)

    def item(self, name: str, place: Place | None) -> Any:
        """Read the tree of one item's archive; errors as ``value``."""
        if place is None:
            msg = f"{self.path}: {name!r} is in no file."
            raise FormatError(msg)
        file = self.file_of(name, place)
        return torch_load.read(file, place.offset, place.size_bytes)

    def file_of(self, name: str, place: Place) -> OpenFile:
        """Return the file that an item lies in; open until many others were asked for.

        Raises:
            FormatError: It ends before the item does.
            StorageError: It cannot be opened.
        """
        file = self._files.get(place.file)
        if place.offset + place.size_bytes > file.size_bytes:
            msg = (
                f"{file.path}: {file.size_bytes} bytes, and {name!r} should end at "
                f"{place.offset + place.size_bytes}: cut off, or another file."
            )
            raise FormatError(msg)
        return file

    def close(self) -> None:
        """Close the files."""
        self._files.close()

    def __enter__(self) -> DcpDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _open(directory: str, name: str) -> OpenFile:
    return OpenFile(os.path.join(directory, name))


class StoredDcpTensor:
    """A tensor of a DCP checkpoint; see ``foreign.Tensor``."""

    def __init__(self, directory: DcpDirectory, name: str, entry: DcpTensor) -> None:
        self.dtype = entry.dtype
        self.shape = entry.shape
        self._directory = directory
        self._name = name
        chunks = [chunk for chunk in entry.chunks if chunk.box.size]
        self._chunks = sorted(chunks, key=lambda chunk: chunk.box.offset)

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * dtypes.item_size_bytes(self.dtype)

    @property
    def identity(self) -> object:
        """Return what two tensors share when they lie in one place; None if empty."""
        if not self._chunks:
            return None
        return (self.dtype, self.shape, *((c.box.offset, c.place) for c in self._chunks))

    def stream(self, piece_bytes: int) -> Iterator[memoryview]:
        """Read its bytes; see ``foreign.Tensor``.

        What was cut along another dimension than the first is put together in memory.
        """
        if self._is_in_order():
            if len(self._chunks) == 1:
                yield from self.stored(self._chunks[0]).stream(piece_bytes)
                return
            streams = (self.stored(c).stream(piece_bytes) for c in self._chunks)
            yield from joined(streams, piece_bytes)
            return
        data = memoryview(self._put_together())
        for at in range(0, len(data), piece_bytes):
            yield data[at : at + piece_bytes]

    def _is_in_order(self) -> bool:
        """Tell whether the chunks lie one behind the other, row-major."""
        at = 0
        for chunk in self._chunks:
            if [chunk.box] != split_range(self.shape, at, at + chunk.box.size):
                return False
            at += chunk.box.size
        return True

    def _put_together(self) -> bytearray:
        item = dtypes.item_size_bytes(self.dtype)
        data = bytearray(self.size_bytes)
        target = whole(self.shape)
        for chunk in self._chunks:
            part = b"".join(map(bytes, self.stored(chunk).stream(PIECE_BYTES)))
            for source, at, length in contiguous_runs(chunk.box, chunk.box, target):
                run = part[source * item : (source + length) * item]
                data[at * item : (at + length) * item] = run
        return data

    def stored(self, chunk: Chunk) -> torch_load.ArchivedTensor:
        """Return what lies where a chunk should be.

        Raises:
            FormatError: It is something else.
            StorageError: It cannot be read.
        """
        found = self._directory.item(self._name, chunk.place)
        expected = (self.dtype, chunk.box.shape)
        is_tensor = isinstance(found, torch_load.ArchivedTensor)
        if not is_tensor or (found.dtype, found.shape) != expected:
            what = f"{found.dtype} {found.shape}" if is_tensor else type(found).__name__
            msg = (
                f"{self._directory.path}: tensor {self._name!r}: {what} lies where the "
                f"chunk at {chunk.box.offset} should be, {self.dtype} {chunk.box.shape}."
            )
            raise FormatError(msg)
        stored: torch_load.ArchivedTensor = found
        return stored
