"""Write a directory that torch's distributed checkpoint (DCP) loads: without torch.

Items are streamed one behind the other into one ``.distcp`` file, large tensors cut along
their first dimension, so that a rank that loads a part of one need not read it all.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple, TypeAlias

import xxhash

from distckpt import files
from distckpt.boxes import Box
from distckpt.formats import dcp_metadata, torch_save
from distckpt.formats.dcp_metadata import (
    METADATA_FILE,
    Chunk,
    DcpMetadata,
    DcpTensor,
    DcpValue,
    Path,
    Place,
)
from distckpt.formats.foreign import Advance, Facts, Watched
from distckpt.stored_tensor import StoredTensor

_DATA_FILE = "__0_0.distcp"
# A rank that loads some rows reads, and holds, all of a chunk.
_CHUNK_BYTES = 256 * 2**20


class Item(NamedTuple):
    """What one entry of the directory is to hold.

    Attributes:
        path: The keys on the way to it.
        value: A ``StoredTensor`` or a plain value.
        same_as: The entry that it is the same memory as; "" for none.
    """

    path: Path
    value: Any
    same_as: str = ""


# By full name, parts joined by dots.
Items: TypeAlias = Mapping[str, Item]


def write(directory: str, items: Items, advance: Advance) -> dict[str, Facts]:
    """Write a directory; its files are durable after return, its own name is not.

    Args:
        directory: Made here.
        items: What to write.
        advance: Told how many bytes of tensors were written.

    Returns:
        What was written of each tensor.

    Raises:
        FormatError, StorageError: A tensor cannot be read, or a file not be written.
    """
    files.make_directory(directory)
    entries: dict[str, DcpTensor | DcpValue] = {}
    facts: dict[str, Facts] = {}
    with files.NewFile(os.path.join(directory, _DATA_FILE)) as file:
        end = 0
        for name, item in items.items():
            if item.same_as:
                continue
            if isinstance(item.value, StoredTensor):
                entries[name], facts[name], end = _write_tensor(
                    file, end, item.value, advance
                )
            else:
                start = end
                end = torch_save.write(file, start, torch_save.to_tree(item.value), {})
                entries[name] = DcpValue(Place(_DATA_FILE, start, end - start))
        file.finish(end)
    for name, item in items.items():
        if item.same_as:
            entries[name], facts[name] = entries[item.same_as], facts[item.same_as]
    paths = {name: item.path for name, item in items.items()}
    ordered = {name: entries[name] for name in items}
    data = dcp_metadata.encode(DcpMetadata(ordered, paths))
    files.write_new_file(os.path.join(directory, METADATA_FILE), data)
    return facts


def _write_tensor(
    file: files.NewFile, start: int, tensor: StoredTensor, advance: Advance
) -> tuple[DcpTensor, Facts, int]:
    """Write the chunks of a tensor; returns what they are, and where the last one ends."""
    hasher = xxhash.xxh3_128()
    chunks = []
    for box, part in _cut(tensor):
        watched = Watched(part, advance, hasher)
        tree = torch_save.stored_tensor(tensor.dtype, box.shape, "0")
        end = torch_save.write(file, start, tree, {"0": watched})
        chunks.append(Chunk(box, Place(_DATA_FILE, start, end - start)))
        start = end
    entry = DcpTensor(tensor.dtype, tensor.shape, tuple(chunks))
    return entry, Facts(tensor.dtype, tensor.shape, hasher.digest()), start


def _cut(tensor: StoredTensor) -> list[tuple[Box, StoredTensor]]:
    """Cut a tensor into chunks, each with the region that it is."""
    shape = tensor.shape
    num_rows = shape[0] if shape else 1
    step = max(1, num_rows * _CHUNK_BYTES // max(1, tensor.size_bytes))
    if not shape or tensor.size_bytes <= _CHUNK_BYTES:
        return [(Box((0,) * len(shape), shape), tensor)]
    return [
        (
            Box((first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])),
            tensor[first:last],
        )
        for first in range(0, num_rows, step)
        for last in (min(first + step, num_rows),)
    ]
