"""Plain safetensors files, of anybody's: tensors in, tensors out, none of them held."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distckpt import dtypes, strict_json
from distckpt.errors import ShardFileError, UnsupportedError
from distckpt.files import NewFile, OpenFile
from distckpt.formats.foreign import PIECE_BYTES, Tensor
from distckpt.shard_header import (
    LENGTH,
    MAX_HEADER_BYTES,
    check_metadata,
    parse_spans,
)

_METADATA = "__metadata__"
_ALIGNMENT = 8


def check_writable(dtype: str, name: str) -> None:
    """Raise ``UnsupportedError`` for an element type or a name that the format lacks."""
    if not dtypes.has_counterpart(dtype):
        msg = (
            f"tensor {name!r}: safetensors has no {dtype}. Export to torch or dcp, or "
            "leave it out."
        )
        raise UnsupportedError(msg)
    if name == _METADATA:
        msg = f"a tensor cannot be named {name!r} in a safetensors file."
        raise UnsupportedError(msg)


def write(path: str, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a new file, durably; its directory is not synced.

    Args:
        path: Where; nothing may be there.
        tensors: By name. The widest elements come first, so that each is aligned.
        metadata: What stands in the header for people and programs.

    Raises:
        ShardFileError: There are too many for one header.
        FormatError, StorageError: A tensor cannot be read, or the file not be written.
    """
    ordered = sorted(tensors.items(), key=lambda one: -dtypes.item_size_bytes(one[1].dtype))
    header: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name, tensor in ordered:
        header[name] = {
            "dtype": dtypes.safetensors_code(tensor.dtype),
            "shape": list(tensor.shape),
            "data_offsets": [end, end + tensor.size_bytes],
        }
        end += tensor.size_bytes
    text = strict_json.dumps(header).encode()
    text = text.ljust(-(-len(text) // _ALIGNMENT) * _ALIGNMENT)
    if len(text) > MAX_HEADER_BYTES:
        msg = f"{path}: a header of {len(text)} bytes; the limit is {MAX_HEADER_BYTES}."
        raise ShardFileError(msg)
    position = LENGTH.size + len(text)
    with NewFile(path, position + end) as file:
        file.write_at(0, [LENGTH.pack(len(text)) + text])
        for _, tensor in ordered:
            for piece in tensor.stream(PIECE_BYTES):
                file.write_at(position, [piece])
                position += len(piece)
        file.finish(position)


@dataclass(frozen=True, slots=True)
class FileTensor:
    """A tensor in a safetensors file.

    Attributes:
        dtype: torch's name of the element type.
        shape: Its shape.
        size_bytes: Bytes of its elements.
        file: The file.
        start: Its first byte in the file.
    """

    dtype: str
    shape: tuple[int, ...]
    size_bytes: int
    file: OpenFile
    start: int

    def stream(self, piece_bytes: int) -> Iterator[memoryview]:
        """Read its bytes; see ``foreign.Tensor``. The format has no checksums."""
        buffer = memoryview(bytearray(min(piece_bytes, self.size_bytes)))
        for at in range(0, self.size_bytes, piece_bytes):
            piece = buffer[: min(piece_bytes, self.size_bytes - at)]
            if self.file.read_into(self.start + at, piece) < len(piece):
                msg = f"{self.file.path}: ends inside a tensor."
                raise ShardFileError(msg)
            yield piece


def read(file: OpenFile) -> dict[str, FileTensor]:
    """Read the header of a file; returns its tensors by name.

    Raises:
        ShardFileError: It is not a valid safetensors file.
        StorageError: It cannot be read.
    """
    try:
        return _read(file)
    except (ShardFileError, strict_json.JsonError) as error:
        msg = f"{file.path}: not a safetensors file that can be read: {error}"
        raise ShardFileError(msg) from error


def _read(file: OpenFile) -> dict[str, FileTensor]:
    prefix = file.read(0, LENGTH.size)
    length = (
        LENGTH.unpack(prefix)[0] if len(prefix) == LENGTH.size else MAX_HEADER_BYTES + 1
    )
    data_bytes = file.size_bytes - LENGTH.size - length
    if length > MAX_HEADER_BYTES or data_bytes < 0:
        msg = f"no header in {file.size_bytes} bytes."
        raise ShardFileError(msg)
    tree = strict_json.loads(file.read(LENGTH.size, length))
    if not isinstance(tree, dict):
        msg = "its header is no object."
        raise ShardFileError(msg)
    check_metadata(tree.pop(_METADATA, {}))
    start = LENGTH.size + length
    return {
        name: FileTensor(
            dtypes.dtype_of_code(span.code),
            span.shape,
            span.stop - span.start,
            file,
            start + span.start,
        )
        for name, span in parse_spans(tree, data_bytes).items()
    }
