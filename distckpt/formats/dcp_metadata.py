"""The ``.metadata`` of torch's distributed checkpoints (DCP): read and written.

It is a pickle of torch's classes. Here it is a tree in which they are names
(``pickle_read.py``), and everything else in it is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import add
from typing import Any, NamedTuple, NoReturn, TypeAlias

from distckpt import dtypes
from distckpt.boxes import Box, checked_size
from distckpt.collector import collector_paused
from distckpt.errors import FormatError, UnsupportedError
from distckpt.formats import pickle_read, pickle_write
from distckpt.formats.pickle_tree import Call, Global

METADATA_FILE = ".metadata"

_VERSION = "1.0.0"
_MAX_SIZE_BYTES = 2**62

_TORCH = "torch.distributed.checkpoint"
_METADATA = Global(f"{_TORCH}.metadata", "Metadata")
_INDEX = Global(f"{_TORCH}.metadata", "MetadataIndex")
_TENSOR = Global(f"{_TORCH}.metadata", "TensorStorageMetadata")
_VALUE = Global(f"{_TORCH}.metadata", "BytesStorageMetadata")
_CHUNK = Global(f"{_TORCH}.metadata", "ChunkStorageMetadata")
_PROPERTIES = Global(f"{_TORCH}.metadata", "TensorProperties")
_MEMORY = Global(f"{_TORCH}.metadata", "_MEM_FORMAT_ENCODING")
_META = Global(f"{_TORCH}.metadata", "StorageMeta")
_PLACE = Global(f"{_TORCH}.filesystem", "_StorageInfo")
_SIZE = Global("torch", "Size")
_LAYOUT = Global("torch.serialization", "_get_layout")
_DTYPES = {Global("torch", name): name for name in dtypes.names()}
# Where torch had two of these classes before 2.3.
_OLD = "torch.distributed._shard.sharded_tensor.metadata"
_OLD_PROPERTIES = Global(_OLD, "TensorProperties")
# How a path object says where the checkpoint was written to; nobody looks at it.
_PATHS = {
    Global(module, name)
    for module in ("pathlib", "pathlib._local")
    for name in ("PosixPath", "PurePosixPath", "WindowsPath")
}
# How the first releases of Python 3.11 (3.11.2 of Debian 12 is one) spell the member of an
# enumeration. Nothing here looks it up.
_MEMBER_OF = Global("builtins", "getattr")
_ALLOWED = frozenset(
    {_METADATA, _INDEX, _TENSOR, _VALUE, _CHUNK, _PROPERTIES, _MEMORY, _META, _PLACE}
    | {_SIZE, _LAYOUT, _OLD_PROPERTIES, Global(_OLD, "MEM_FORMAT_ENCODING"), _MEMBER_OF}
    | _PATHS
    | _DTYPES.keys()
)

Path: TypeAlias = "tuple[str | int, ...]"


class Place(NamedTuple):
    """Where one item lies: an archive of its own inside a file."""

    file: str
    offset: int
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Chunk:
    """A region of a tensor, and where it lies; None: nothing says where."""

    box: Box
    place: Place | None


@dataclass(frozen=True, slots=True)
class DcpTensor:
    """A tensor, in as many chunks as it was saved by."""

    dtype: str
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class DcpValue:
    """Anything else, and where it lies; None: nothing says where."""

    place: Place | None


@dataclass(frozen=True, slots=True)
class DcpMetadata:
    """What a DCP checkpoint holds.

    Attributes:
        entries: By full name, parts joined by dots.
        paths: The keys on the way to each entry in the state dict that was saved.
    """

    entries: Mapping[str, DcpTensor | DcpValue]
    paths: Mapping[str, Path]


# Reading


def decode(data: bytes) -> DcpMetadata:
    """Decode and check a ``.metadata`` file.

    Raises:
        UnsafeCheckpointError: It names what has no place in it.
        UnsupportedError: It uses what is not read here.
        FormatError: It contradicts itself, or is no metadata.
    """
    with collector_paused():
        return _decode(data)


def _decode(data: bytes) -> DcpMetadata:
    fields = _fields(pickle_read.loads(data, _ALLOWED), _METADATA)
    places = dict(_places(fields.get("storage_data")))
    listed = fields.get("state_dict_metadata")
    if type(listed) is not dict:
        _refuse("it lists nothing")
    entries: dict[str, DcpTensor | DcpValue] = {}
    num_chunks = 0
    for name, node in listed.items():
        if type(name) is not str:
            _refuse(f"a name that is no text: {name!r:.100}")
        if isinstance(node, Call) and node.function == _VALUE:
            entries[name] = DcpValue(places.get((name, None)))
        else:
            tensor = entries[name] = _tensor(name, node, places)
            num_chunks += len(tensor.chunks)
        # A list may stand in many places of a pickle without being any longer.
        if num_chunks > len(data):
            _refuse(f"more than {len(data)} chunks in as many bytes")
    return DcpMetadata(entries, _paths(fields.get("planner_data"), entries))


def _tensor(name: str, node: Any, places: Mapping[tuple[str, Any], Place]) -> DcpTensor:
    fields = _fields(node, _TENSOR)
    dtype = _dtype(name, fields.get("properties"))
    shape = _lengths(fields.get("size"), name)
    if checked_size(shape, _MAX_SIZE_BYTES // dtypes.item_size_bytes(dtype)) is None:
        _refuse(f"{name!r}: impossible shape {shape!r:.200}")
    chunks = []
    listed = fields.get("chunks")
    if type(listed) is not list:
        _refuse(f"{name!r}: no chunks")
    for chunk_node in listed:
        chunk = _fields(chunk_node, _CHUNK)
        offset = _lengths(chunk.get("offsets"), name)
        sizes = _lengths(chunk.get("sizes"), name)
        if len(offset) != len(sizes) or not Box(offset, sizes).is_within(shape):
            _refuse(f"{name!r}: a chunk at {offset} of {sizes}, outside of {shape}")
        chunks.append(Chunk(Box(offset, sizes), places.get((name, offset))))
    return DcpTensor(dtype, shape, tuple(chunks))


def _dtype(name: str, node: Any) -> str:
    state = node.state if isinstance(node, Call) else None
    is_known = isinstance(node, Call) and node.function in (_PROPERTIES, _OLD_PROPERTIES)
    if not is_known or type(state) is not tuple or len(state) < 2:
        _refuse(f"{name!r}: no properties")
    layout = state[1]
    if not isinstance(layout, Call) or layout.arguments != ("torch.strided",):
        msg = f"{name!r}: a sparse tensor, or one in another odd layout, is not read."
        raise UnsupportedError(msg)
    dtype = _DTYPES.get(state[0])
    if dtype is None:
        _refuse(f"{name!r}: elements of {state[0]}")
    return dtype


def _places(node: Any) -> Iterator[tuple[tuple[str, Any], Place]]:
    if type(node) is not dict:
        _refuse("nothing says where anything lies")
    for key, value in node.items():
        index, info = _fields(key, _INDEX), _fields(value, _PLACE)
        name, offset = index.get("fqn"), index.get("offset")
        file: Any = info.get("relative_path")
        start: Any = info.get("offset")
        size: Any = info.get("length")
        if type(name) is not str or not _is_file_name(file):
            _refuse(f"{name!r:.100} lies in {file!r:.100}, which is no file beside it")
        if not _is_count(start) or not _is_count(size):
            _refuse(f"{name!r} lies at {start!r:.50}, {size!r:.50} bytes")
        if info.get("transform_descriptors"):
            msg = f"{name!r} was written by way of an extension; it cannot be read."
            raise UnsupportedError(msg)
        at = None if offset is None else _lengths(offset, name)
        yield (name, at), Place(file, start, size)


def _paths(node: Any, entries: Mapping[str, Any]) -> dict[str, Path]:
    """Return each entry's path; without one, its name is all there is to it."""
    planned = node if type(node) is dict else {}
    paths: dict[str, Path] = {}
    for name in entries:
        path = planned.get(name, (name,))
        if type(path) is not tuple or not path or not {*map(type, path)} <= {str, int}:
            _refuse(f"{name!r}: a path that is none: {path!r:.100}")
        paths[name] = path
    return paths


def _fields(node: Any, kind: Global) -> dict[str, Any]:
    """Return the attributes of an object of a class."""
    if not isinstance(node, Call) or node.function != kind or type(node.state) is not dict:
        found = node.function if isinstance(node, Call) else type(node).__name__
        _refuse(f"{found} where {kind.name} should be")
    return node.state


def _lengths(node: Any, name: str) -> tuple[int, ...]:
    """Return the numbers of a ``torch.Size``."""
    if isinstance(node, Call) and node.function == _SIZE and len(node.arguments) == 1:
        numbers = node.arguments[0]
        if type(numbers) in (tuple, list) and all(map(_is_count, numbers)):
            return tuple(numbers)
    _refuse(f"{name!r}: a size that is none: {node!r:.200}")


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MAX_SIZE_BYTES


def _is_file_name(text: Any) -> bool:
    """Tell whether text can only mean a file in the directory itself."""
    return (
        type(text) is str
        and text.isprintable()
        and not {*text} & {"/", "\\"}
        and text not in ("", ".", "..", METADATA_FILE)
    )


def _refuse(reason: str) -> NoReturn:
    msg = f"metadata of no DCP checkpoint that can be read: {reason}."
    raise FormatError(msg)


# What it says of a tensor


def gaps_of(tensor: DcpTensor) -> list[str]:
    """Say where chunks of a tensor are missing, lie over each other, or lie nowhere."""
    problems = [
        f"the chunk at {chunk.box.offset} of {chunk.box.shape} is in no file"
        for chunk in tensor.chunks
        if chunk.place is None
    ]
    boxes = [chunk.box for chunk in tensor.chunks if chunk.box.size]
    for one, other in _overlapping(boxes):
        problems.append(f"the chunks at {one.offset} and {other.offset} overlap")
    covered = sum(box.size for box in boxes)
    size = checked_size(tensor.shape, _MAX_SIZE_BYTES) or 0
    if not problems and covered < size:
        problems.append(f"its chunks have {covered} of {size} elements")
    return problems


def _overlapping(boxes: list[Box]) -> Iterator[tuple[Box, Box]]:
    """Walk pairs that share an element, along the dimension that is cut most often."""
    dims = range(len(boxes[0].shape)) if boxes else ()
    dim = max(dims, key=lambda d: len({box.offset[d] for box in boxes}), default=None)
    if dim is None:
        yield from ((boxes[0], box) for box in boxes[1:])
        return
    active: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offset[dim]):
        active = [one for one in active if _end(one)[dim] > box.offset[dim]]
        for one in active:
            ends = zip(_end(one), _end(box), one.offset, box.offset, strict=True)
            if all(min(a, b) > max(c, d) for a, b, c, d in ends):
                yield one, box
        active.append(box)


def _end(box: Box) -> tuple[int, ...]:
    return tuple(map(add, box.offset, box.shape))


# Writing


def encode(metadata: DcpMetadata) -> bytes:
    """Encode to the bytes of a ``.metadata`` file; every place is known."""
    with collector_paused():
        return _encode(metadata)


def _encode(metadata: DcpMetadata) -> bytes:
    listed: dict[str, Call] = {}
    places: list[tuple[Call, Call]] = []
    for name, entry in metadata.entries.items():
        if isinstance(entry, DcpValue):
            listed[name] = _object(_VALUE, {})
            places.append(_placed(name, None, entry.place))
            continue
        listed[name] = _object(
            _TENSOR,
            {
                "properties": _properties(entry.dtype),
                "size": _size(entry.shape),
                "chunks": [
                    _object(
                        _CHUNK,
                        {"offsets": _size(c.box.offset), "sizes": _size(c.box.shape)},
                    )
                    for c in entry.chunks
                ],
            },
        )
        places += [_placed(name, c.box.offset, c.place) for c in entry.chunks]
    nobody: dict[str, Any] = {
        "checkpoint_id": None,
        "save_id": None,
        "load_id": None,
        "modules": [],
    }
    fields = {
        "state_dict_metadata": listed,
        "planner_data": dict(metadata.paths),
        "storage_data": dict(places),
        "storage_meta": _object(_META, nobody),
        "version": _VERSION,
    }
    return pickle_write.dumps(_object(_METADATA, fields))


def _placed(
    name: str, offset: tuple[int, ...] | None, place: Place | None
) -> tuple[Call, Call]:
    assert place is not None, name
    at = None if offset is None else _size(offset)
    index = _object(_INDEX, {"fqn": name, "offset": at, "index": None})
    keys = ("relative_path", "offset", "length")
    return index, _object(_PLACE, dict(zip(keys, place, strict=True)))


def _properties(dtype: str) -> Call:
    layout, memory = Call(_LAYOUT, ("torch.strided",)), Call(_MEMORY, (0,))
    state = (Global("torch", dtype), layout, False, memory, False)
    return Call(_PROPERTIES, is_new=True, state=state)


def _size(numbers: tuple[int, ...]) -> Call:
    return Call(_SIZE, (numbers,))


def _object(kind: Global, fields: dict[str, Any]) -> Call:
    # A class without attributes is given none: Python leaves out an empty state.
    return Call(kind, is_new=True, state=fields or None)
