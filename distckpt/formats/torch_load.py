"""Read what ``torch.save`` writes, without torch: nothing that it names is run."""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NoReturn

from distckpt import dtypes
from distckpt.boxes import checked_size
from distckpt.errors import FormatError, UnsupportedError
from distckpt.files import OpenFile
from distckpt.formats import pickle_read
from distckpt.formats.foreign import PIECE_BYTES
from distckpt.formats.pickle_tree import Call, Global, Reference
from distckpt.formats.torch_save import (
    BY_DTYPE,
    BY_STORAGE,
    COUNTER,
    ORDERED,
    STORAGES,
    UNTYPED,
)
from distckpt.formats.zip_file import Record, read_records

_MAX_PICKLE_BYTES = 2**30
_MAX_SIZE_BYTES = 2**62
_MAX_DEPTH = 64
# A list may stand in a list many times over without being any longer on disk.
_MAX_NODES_PER_BYTE = 100

_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_ENCODE = Global("_codecs", "encode")
_BYTES = Global("__builtin__", "bytes")  # what Python makes of b"" in protocol 2
_DTYPE_OF_STORAGE = {Global("torch", name): dtype for dtype, name in STORAGES.items()}
_DTYPES = {Global("torch", name): name for name in dtypes.names()}
_ALLOWED = frozenset(
    {BY_STORAGE, BY_DTYPE, _PARAMETER, UNTYPED, Global("torch", "UntypedStorage")}
    | {ORDERED, COUNTER, _ENCODE, _BYTES}
    | _DTYPE_OF_STORAGE.keys()
    | _DTYPES.keys()
)


def read(file: OpenFile, start: int, size_bytes: int) -> Any:
    """Read the tree of one archive, with an ``ArchivedTensor`` for each tensor.

    Args:
        file: The file.
        start: Where in it the archive begins.
        size_bytes: Its length.

    Raises:
        FormatError: It is not what ``torch.save`` writes.
        UnsafeCheckpointError: Its pickle names what has no place in it.
        UnsupportedError: It holds what is neither a tensor nor a plain value.
        StorageError: It cannot be read.
    """
    where = f"{file.path}, bytes {start} to {start + size_bytes}"
    records = read_records(file, start, size_bytes)
    root = next(iter(records), "").partition("/")[0]
    pickled = records.get(f"{root}/data.pkl")
    order = records.get(f"{root}/byteorder")
    if pickled is None or f"{root}/constants.pkl" in records:
        msg = f"{where}: a zip archive, but not one that torch.save has written."
        raise FormatError(msg)
    if order is not None and order.read(16) != b"little":
        msg = f"{where}: written on a machine with another byte order."
        raise FormatError(msg)
    try:
        data = pickled.read(_MAX_PICKLE_BYTES)
        reader = _Reader(records, root, len(data) * _MAX_NODES_PER_BYTE)
        return reader.convert(pickle_read.loads(data, _ALLOWED), "its tree", 0)
    except (FormatError, UnsupportedError) as error:
        msg = f"{where}: {error}"
        raise type(error)(msg) from error


@dataclass(frozen=True, slots=True)
class ArchivedTensor:
    """A tensor in an archive.

    Attributes:
        dtype: torch's name of the element type.
        shape: Its shape.
        record: What its elements lie in.
        offset_bytes: Where in it the first one lies.
        strides: From element to element, in elements.
    """

    dtype: str
    shape: tuple[int, ...]
    record: Record
    offset_bytes: int
    strides: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return prod(self.shape) * dtypes.item_size_bytes(self.dtype)

    @property
    def identity(self) -> object:
        """Return what two tensors share when they are the same memory; None if empty."""
        if not self.size_bytes:
            return None
        return self.record.name, self.offset_bytes, self.shape, self.strides, self.dtype

    def stream(self, piece_bytes: int) -> Iterator[memoryview]:
        """Read its bytes; see ``foreign.Tensor``.

        What does not lie row-major in the archive is held in memory as a whole.
        """
        if not self.size_bytes or _is_row_major(self.shape, self.strides):
            yield from self.record.stream(piece_bytes, self.offset_bytes, self.size_bytes)
            return
        data = memoryview(self._gathered())
        for at in range(0, len(data), piece_bytes):
            yield data[at : at + piece_bytes]

    def _gathered(self) -> bytes:
        import numpy as np
        from numpy.lib.stride_tricks import as_strided

        item = dtypes.item_size_bytes(self.dtype)
        span = _last_element(self.shape, self.strides) * item + item
        raw = b"".join(map(bytes, self.record.stream(PIECE_BYTES, self.offset_bytes, span)))
        elements = np.frombuffer(raw, dtype=f"V{item}")
        steps = [stride * item for stride in self.strides]
        return as_strided(elements, self.shape, steps, writeable=False).tobytes()


def _is_row_major(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    expected = 1
    for length, stride in zip(reversed(shape), reversed(strides), strict=True):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _last_element(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    return sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))


class _Reader:
    """Turns the tree of a pickle into tensors and plain values."""

    def __init__(self, records: Mapping[str, Record], root: str, max_nodes: int) -> None:
        self._records = records
        self._root = root
        self._nodes_left = max_nodes

    def convert(self, node: Any, path: str, depth: int) -> Any:
        """Return the value that a node stands for."""
        self._nodes_left -= 1
        if depth > _MAX_DEPTH or self._nodes_left < 0:
            _refuse(f"{path[:200]}: nested too deeply, or far too large")
        kind = type(node)
        if node is None or kind in (bool, int, float, str, bytes):
            return node
        if kind in (list, tuple):
            items = enumerate(node)
            return kind(self.convert(item, f"{path}[{i}]", depth + 1) for i, item in items)
        if kind is dict:
            return dict(self._pairs([*node.items()], path, depth))
        if isinstance(node, Call):
            return self._convert_call(node, path, depth)
        _refuse_kind(path, str(node) if kind is Global else kind.__name__)

    def _pairs(
        self, pairs: list[tuple[Any, Any]], path: str, depth: int
    ) -> Iterator[tuple[Any, Any]]:
        for key, value in pairs:
            if type(key) not in (str, int, float, bool, bytes, type(None)):
                _refuse_kind(f"{path}: key", type(key).__name__)
            yield key, self.convert(value, f"{path}[{key!r:.100}]", depth + 1)

    def _convert_call(self, call: Call, path: str, depth: int) -> Any:
        arguments = call.arguments
        if call.function in (BY_STORAGE, BY_DTYPE) and not call.is_new:
            return self._tensor(call.function, arguments, path)
        if call.function == _PARAMETER and len(arguments) == 3:
            return self.convert(arguments[0], path, depth + 1)
        if call.function == ORDERED and not arguments:
            # What a module's state dict has beside, its ``_metadata``, is of no use here.
            return OrderedDict(self._pairs(call.items, path, depth))
        if call.function == COUNTER and len(arguments) == 1 and type(arguments[0]) is dict:
            return Counter(dict(self._pairs([*arguments[0].items()], path, depth)))
        if call.function == _BYTES and not arguments:
            return b""
        if call.function == _ENCODE and len(arguments) == 2 and arguments[1] == "latin1":
            try:
                return str(arguments[0]).encode("latin1")
            except UnicodeEncodeError as error:
                _refuse(f"{path}: bytes that are none: {error}")
        _refuse_kind(path, str(call.function))

    def _tensor(
        self, function: Global, arguments: tuple[Any, ...], path: str
    ) -> ArchivedTensor:
        num_needed = 6 if function == BY_STORAGE else 7
        beside = arguments[num_needed:]
        if len(arguments) < num_needed or any(beside):
            _refuse(f"{path}: a tensor with {len(arguments)} arguments: {beside!r:.100}")
        reference, offset, shape, strides = arguments[:4]
        dtype, key = _dtype_and_key(
            reference, arguments[6] if num_needed == 7 else None, path
        )
        record = self._records.get(f"{self._root}/data/{key}")
        if record is None:
            _refuse(f"{path}: its record {key!r:.100} is not in the archive")
        item = dtypes.item_size_bytes(dtype)
        if (
            not _are_counts(shape)
            or not _are_counts(strides)
            or len(shape) != len(strides)
            or not _are_counts((offset,))
            or checked_size(shape, _MAX_SIZE_BYTES // item) is None
        ):
            _refuse(
                f"{path}: a tensor with offset, shape and strides {arguments[1:4]!r:.200}"
            )
        tensor = ArchivedTensor(dtype, shape, record, offset * item, strides)
        end = tensor.offset_bytes + (_last_element(shape, strides) + 1) * item
        size = tensor.size_bytes
        if size and (end > record.size_bytes or size > record.size_bytes):
            _refuse(
                f"{path}: a tensor of {size} bytes, to byte {end} of its record, which has "
                f"{record.size_bytes}"
            )
        return tensor


def _dtype_and_key(reference: Any, by_name: Any, path: str) -> tuple[str, str]:
    key = reference.key if isinstance(reference, Reference) else None
    if type(key) is not tuple or len(key) != 5 or key[0] != "storage":
        _refuse(f"{path}: a tensor without a storage")
    _, storage, name, _, _ = key
    dtype = _DTYPE_OF_STORAGE.get(storage) if by_name is None else _DTYPES.get(by_name)
    if dtype is None or type(name) is not str:
        _refuse(f"{path}: a tensor of {storage} and {by_name}")
    return dtype, name


def _are_counts(items: Any) -> bool:
    return type(items) is tuple and all(
        type(item) is int and 0 <= item < _MAX_SIZE_BYTES for item in items
    )


def _refuse(reason: str) -> NoReturn:
    raise FormatError(f"{reason}.")


def _refuse_kind(path: str, kind: str) -> NoReturn:
    msg = f"{path}: {kind:.200} is neither a tensor nor a plain value."
    raise UnsupportedError(msg)
