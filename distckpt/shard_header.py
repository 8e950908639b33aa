"""The header of a shard file: what is in the file, and the checksums of its blocks.

Built when a file is written, before the first byte of data and without checksums, whose
length is known; parsed and checked when it is read. The rules for reading are those of
the safetensors package (what it rejects is rejected here), and narrower.
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

from distckpt import dtypes, layout, strict_json, values
from distckpt.boxes import Box, checked_size
from distckpt.errors import FormatError, ManifestError, ShardFileError
from distckpt.layout import Piece, Row

FORMAT = 1
CHECKSUM_BYTES = 8
LENGTH = struct.Struct("<Q")
# The safetensors package's own limit.
MAX_HEADER_BYTES = 100_000_000

_ALIGNMENT = 4096
# Small blocks: a reader of some rows pays for whole blocks around them. They grow for
# entries so large that the header would pass its limit otherwise.
_BLOCK_BYTES = 128 * 1024
_MAX_CHECKSUMS_BYTES = 16 * 2**20

_METADATA = "__metadata__"
_OUR_KEY = "distckpt"
_CHECKSUMS_KEY = "distckpt.checksums"


class Draft:
    """The header of a file that is being written: all but the checksums.

    Args:
        items: What the file will hold, in data order, and whether it is the rank's own.
        attempt: Published name of the attempt.
        rank: Who writes.
        world_size: Of how many.
        per_rank_values: This rank's own plain values, encoded.

    Attributes:
        block_bytes: Size of the blocks that checksums are taken of.
        size_bytes: Where the data starts.

    Raises:
        ShardFileError: A name stands twice, or there are too many.
    """

    def __init__(
        self,
        items: Sequence[tuple[Piece, bool]],
        *,
        attempt: str,
        rank: int,
        world_size: int,
        per_rank_values: dict[str, Any],
    ) -> None:
        sizes = [piece.size_bytes for piece, _ in items]
        self.block_bytes = _block_bytes(sizes)
        self._tree: dict[str, Any] = {_METADATA: {}}
        described = {}
        position = 0
        for (piece, per_rank), size in zip(items, sizes, strict=True):
            key = _key(piece)
            if key in self._tree:
                msg = f"tensor {key!r} stands twice in one shard file"
                raise ShardFileError(msg)
            self._tree[key] = {
                "dtype": dtypes.safetensors_code(piece.row.dtype),
                "shape": _stored_shape(piece.row.dtype, piece.box.shape),
                "data_offsets": [position, position + size],
            }
            description = _describe(piece, per_rank)
            if description:
                described[key] = description
            position += size
        num_blocks = _num_blocks(sizes, self.block_bytes)
        self._tree[_METADATA] = {
            "format": "pt",  # Hugging Face's readers ask for it.
            _OUR_KEY: strict_json.dumps(
                {
                    "format": FORMAT,
                    "attempt": attempt,
                    "rank": rank,
                    "world_size": world_size,
                    "block_bytes": self.block_bytes,
                    "entries": described,
                    "values": per_rank_values,
                }
            ),
            _CHECKSUMS_KEY: _encode_checksums(bytes(num_blocks * CHECKSUM_BYTES)),
        }
        self.size_bytes = len(self._padded())
        if self.size_bytes > MAX_HEADER_BYTES:
            msg = (
                f"shard file header of {self.size_bytes} bytes for {len(items)} "
                f"tensors; the limit is {MAX_HEADER_BYTES}."
            )
            raise ShardFileError(msg)

    def encode(self, checksums: bytes) -> bytes:
        """Return the bytes of the header, ``size_bytes`` of them."""
        self._tree[_METADATA][_CHECKSUMS_KEY] = _encode_checksums(checksums)
        data = self._padded()
        assert len(data) == self.size_bytes, "the header changed its size"
        return data

    def _padded(self) -> bytes:
        text = strict_json.dumps(self._tree).encode("ascii")
        size = -(-(LENGTH.size + len(text)) // _ALIGNMENT) * _ALIGNMENT
        return (LENGTH.pack(size - LENGTH.size) + text).ljust(size, b" ")


def _block_bytes(sizes: Sequence[int]) -> int:
    block = _BLOCK_BYTES
    while _num_blocks(sizes, block) * CHECKSUM_BYTES > _MAX_CHECKSUMS_BYTES:
        if block >= max(sizes):
            break
        block *= 2
    return block


def _num_blocks(sizes: Sequence[int], block_bytes: int) -> int:
    return sum(-(-size // block_bytes) for size in sizes)


def _encode_checksums(checksums: bytes) -> str:
    return base64.b64encode(checksums).decode("ascii")


def _key(piece: Piece) -> str:
    """Name the entry: the tensor's name, with the region where it is a part."""
    if piece.is_whole:
        return piece.row.name
    region = ",".join(
        f"{start}:{start + length}"
        for start, length in zip(piece.box.offset, piece.box.shape, strict=True)
    )
    return f"{piece.row.name}[{region}]"


def _describe(piece: Piece, per_rank: bool) -> dict[str, Any]:
    """Say what safetensors' own fields do not: only where there is more to say."""
    row, box = piece.row, piece.box
    description: dict[str, Any] = {}
    if not piece.is_whole:
        description["name"] = row.name
        description["shape"] = list(row.shape)
        description["offset"] = list(box.offset)
    if not dtypes.has_counterpart(row.dtype):
        description["dtype"] = row.dtype
    if per_rank:
        description["per_rank"] = True
    return description


def _stored_shape(dtype: str, shape: tuple[int, ...]) -> list[int]:
    if dtypes.has_counterpart(dtype):
        return list(shape)
    return [*shape, dtypes.item_size_bytes(dtype)]


@dataclass(frozen=True, slots=True)
class Stored:
    """One entry of a shard file: which box of which tensor, and where it lies.

    Attributes:
        key: Its key in the safetensors header.
        name: Full name of the tensor.
        dtype: torch's name of the element type.
        global_shape: Shape of the whole tensor.
        box: The region that is stored.
        per_rank: Whether it is this rank's own.
        start: First byte, from the start of the data.
        size_bytes: Number of bytes.
        first_block: Index of its first block's checksum.
    """

    key: str
    name: str
    dtype: str
    global_shape: tuple[int, ...]
    box: Box
    per_rank: bool
    start: int
    size_bytes: int
    first_block: int


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed and checked header.

    Attributes:
        attempt: Published name of the attempt that the file was written for.
        rank: The rank that wrote it.
        world_size: Of how many.
        block_bytes: Size of the blocks that checksums were taken of.
        entries: What the file holds, by key, in data order.
        per_rank_values: That rank's own plain values, encoded.
        checksums: Of all blocks, one behind the other.
    """

    attempt: str
    rank: int
    world_size: int
    block_bytes: int
    entries: dict[str, Stored]
    per_rank_values: dict[str, Any]
    checksums: bytes


def parse(text: bytes, data_bytes: int) -> Header:
    """Parse and check a header.

    Args:
        text: The header without the 8 bytes of its length.
        data_bytes: Bytes of the file behind it.

    Raises:
        ShardFileError: Says what is wrong with it.
    """
    if not text.startswith(b"{"):
        _refuse("header does not start with '{'")
    try:
        tree = strict_json.loads(text)
        spans = _parse_entries(tree, data_bytes)
        return _parse_ours(tree.get(_METADATA), spans)
    except strict_json.JsonError as error:
        msg = f"header: {error}"
        raise ShardFileError(msg) from error
    except ShardFileError:
        raise
    except FormatError as error:
        raise ShardFileError(str(error)) from error


def _parse_ours(metadata: Any, spans: dict[str, _Span]) -> Header:
    if not isinstance(metadata, dict) or _OUR_KEY not in metadata:
        _refuse("a safetensors file, but not one that distckpt wrote")
    ours = strict_json.loads(metadata[_OUR_KEY].encode())
    fields = ("format", "attempt", "rank", "world_size", "block_bytes", "entries")
    if not isinstance(ours, dict) or _typed(ours, "format", int) != FORMAT:
        _refuse("shard file of another format version")
    if tuple(ours) != (*fields, "values"):
        _refuse(f"metadata with fields {list(ours)}")
    block_bytes: int = _typed(ours, "block_bytes", int)
    if block_bytes < 1:
        _refuse("blocks of no bytes")
    per_rank_values = _typed(ours, "values", dict)
    for value in per_rank_values.values():
        values.decode(value)
    described = _typed(ours, "entries", dict)
    if not described.keys() <= spans.keys():
        _refuse("metadata that describes an entry that is not there")
    entries: dict[str, Stored] = {}
    block = 0
    for key, span in spans.items():
        stored = _stored(key, span, described.get(key, {}), block)
        entries[key] = stored
        block += -(-stored.size_bytes // block_bytes)
    return Header(
        attempt=_typed(ours, "attempt", str),
        rank=_typed(ours, "rank", int),
        world_size=_typed(ours, "world_size", int),
        block_bytes=block_bytes,
        entries=entries,
        per_rank_values=per_rank_values,
        checksums=_decode_checksums(metadata.get(_CHECKSUMS_KEY), block),
    )


class _Span(NamedTuple):
    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


def _parse_entries(tree: Any, data_bytes: int) -> dict[str, _Span]:
    """Apply the rules of the safetensors package; returns entries in data order."""
    if not isinstance(tree, dict):
        _refuse("header is not an object")
    metadata = tree.get(_METADATA, {})
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        _refuse("__metadata__ is not a map of strings")
    if not all(map(strict_json.is_unicode, (*tree, *metadata, *metadata.values()))):
        _refuse("header with text that is not Unicode")
    spans = {
        key: _parse_span(key, fields) for key, fields in tree.items() if key != _METADATA
    }
    ordered = sorted(spans.items(), key=lambda item: (item[1].start, item[1].stop))
    if ordered and ordered[0][1].start != 0:
        _refuse(f"first entry starts at {ordered[0][1].start}")
    for (_, before), (key, span) in pairwise(ordered):
        if span.start != before.stop:
            _refuse(f"entry {key!r} starts at {span.start}, expected {before.stop}")
    end = ordered[-1][1].stop if ordered else 0
    if end != data_bytes:
        _refuse(f"entries end at {end}, the data at {data_bytes}")
    return dict(ordered)


def _parse_span(key: str, fields: Any) -> _Span:
    if not isinstance(fields, dict) or set(fields) != {
        "dtype",
        "shape",
        "data_offsets",
    }:
        _refuse(f"entry {key!r}: {fields!r:.200}")
    code, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    item = dtypes.code_size_bytes(code) if isinstance(code, str) else None
    if item is None:
        _refuse(f"entry {key!r}: dtype {code!r:.50}")
    if not _are_counts(shape) or not _are_counts(offsets) or len(offsets) != 2:
        _refuse(f"entry {key!r}: {fields!r:.200}")
    start, stop = offsets
    # Python's integers do not overflow, where (2**32)**2 * 4 would be 0 in C.
    size = checked_size(shape, 2**62)
    if size is None or stop - start != size * item:
        _refuse(f"entry {key!r}: {stop - start} bytes for {code} {shape}")
    return _Span(code, tuple(shape), start, stop)


def _are_counts(items: Any) -> bool:
    return isinstance(items, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in items
    )


def _stored(key: str, span: _Span, description: Any, first_block: int) -> Stored:
    known = {"name", "shape", "offset", "dtype", "per_rank"}
    if not isinstance(description, dict) or not description.keys() <= known:
        _refuse(f"entry {key!r}: described as {description!r:.200}")
    name = description.get("name", key)
    dtype = description.get("dtype", dtypes.dtype_of_code(span.code))
    shape = span.shape
    if "dtype" in description:
        if not isinstance(dtype, str) or not dtypes.is_known(dtype):
            _refuse(f"entry {key!r}: dtype {dtype!r:.50}")
        if span.code != "U8" or shape[-1:] != (dtypes.item_size_bytes(dtype),):
            _refuse(f"entry {key!r}: {dtype} stored as {span.code} {list(shape)}")
        shape = shape[:-1]
    global_shape = description.get("shape", list(shape))
    offset = description.get("offset", [0] * len(shape))
    if not _are_counts(global_shape) or not _are_counts(offset):
        _refuse(f"entry {key!r}: described as {description!r:.200}")
    if not isinstance(name, str) or len(offset) != len(shape):
        _refuse(f"entry {key!r}: described as {description!r:.200}")
    box = Box(tuple(offset), shape)
    if not box.is_within(tuple(global_shape)):
        _refuse(f"entry {key!r}: {box} lies outside {global_shape}")
    try:
        row = Row(name, dtype, tuple(global_shape), layout.WHOLE)
    except ManifestError as error:
        raise ShardFileError(str(error)) from error
    return Stored(
        key=key,
        name=row.name,
        dtype=row.dtype,
        global_shape=row.shape,
        box=box,
        per_rank=description.get("per_rank") is True,
        start=span.start,
        size_bytes=span.stop - span.start,
        first_block=first_block,
    )


def _decode_checksums(text: Any, num_blocks: int) -> bytes:
    try:
        checksums = base64.b64decode(text, validate=True)
    except (TypeError, ValueError) as error:
        msg = f"checksums: {error}"
        raise ShardFileError(msg) from error
    if len(checksums) != num_blocks * CHECKSUM_BYTES:
        _refuse(f"{len(checksums)} bytes of checksums for {num_blocks} blocks")
    return checksums


def _typed(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if type(value) is not kind:
        _refuse(f"metadata: {name} is {value!r:.100}")
    return value


def _refuse(reason: str) -> NoReturn:
    raise ShardFileError(reason)
