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
from functools import lru_cache
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

from distckpt import dtypes, layout, stamp, strict_json, values
from distckpt.boxes import Box, checked_size
from distckpt.errors import FormatError, ManifestError, ShardFileError
from distckpt.layout import Piece, Row
from distckpt.stamp import Stamp

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
# How a header begins.
_PREFIX = f'{{"{_METADATA}":'
_OUR_KEY = "distckpt"
_ENTRIES_KEY = "distckpt.entries"
_CHECKSUMS_KEY = "distckpt.checksums"


class Outline:
    """What a shard file will hold and where: all that is alike in every save.

    Args:
        items: What the file will hold, in data order, and whether it is the rank's own.

    Attributes:
        sizes: Bytes of each item.
        data_bytes: Bytes of all of them.
        block_bytes: Size of the blocks that checksums are taken of.
        num_blocks: How many blocks there are.

    Raises:
        ShardFileError: A name stands twice.
    """

    def __init__(self, items: Sequence[tuple[Piece, bool]]) -> None:
        self.sizes = [piece.size_bytes for piece, _ in items]
        self.data_bytes = sum(self.sizes)
        self.block_bytes = _block_bytes(self.sizes)
        self.num_blocks = _num_blocks(self.sizes, self.block_bytes)
        entries: dict[str, Any] = {}
        described = {}
        position = 0
        for (piece, per_rank), size in zip(items, self.sizes, strict=True):
            key = _key(piece)
            if key in entries or key == _METADATA:
                msg = f"tensor {key!r} stands twice in one shard file"
                raise ShardFileError(msg)
            entries[key] = {
                "dtype": dtypes.safetensors_code(piece.row.dtype),
                "shape": _stored_shape(piece.row.dtype, piece.box.shape),
                "data_offsets": [position, position + size],
            }
            description = _describe(piece, per_rank)
            if description:
                described[key] = description
            position += size
        text = strict_json.dumps(entries)[1:]
        self._entries = f",{text}" if entries else text
        self._described = strict_json.dumps(strict_json.dumps(described))

    def text(self, ours: str, checksums: str) -> str:
        """Return the header, given what is different in every save.

        Args:
            ours: What ``Draft`` has put together.
            checksums: Of all blocks.
        """
        # In this order: a reader cuts off what comes before the entries, see ``parse``.
        metadata = (
            '"format":"pt",'  # Hugging Face's readers ask for it
            f'"{_OUR_KEY}":{strict_json.quote(ours)},'
            f'"{_ENTRIES_KEY}":{self._described},'
            f'"{_CHECKSUMS_KEY}":"{checksums}"'
        )
        return f"{_PREFIX}{{{metadata}}}{self._entries}"


class Draft:
    """The header of a file that is being written: all but the checksums.

    Args:
        outline: What the file will hold.
        attempt: Published name of the attempt.
        rank: Who writes.
        world_size: Of how many.
        per_rank_values: This rank's own plain values, encoded; see ``values.encode_text``.
        written_by: The header's format and features.

    Attributes:
        size_bytes: Where the data starts.

    Raises:
        ShardFileError: There are too many entries.
    """

    def __init__(
        self,
        outline: Outline,
        *,
        attempt: str,
        rank: int,
        world_size: int,
        per_rank_values: dict[str, Any],
        written_by: Stamp = stamp.CURRENT,
    ) -> None:
        self._outline = outline
        fields = {
            **written_by.fields,
            "attempt": attempt,
            "rank": rank,
            "world_size": world_size,
            "block_bytes": outline.block_bytes,
        }
        own = ",".join(
            f"{strict_json.quote(name)}:{values.text_of(value)}"
            for name, value in per_rank_values.items()
        )
        self._ours = f'{strict_json.dumps(fields)[:-1]},"values":{{{own}}}}}'
        checksums_bytes = outline.num_blocks * CHECKSUM_BYTES
        length = LENGTH.size + len(outline.text(self._ours, ""))
        length += len(_encode_checksums(bytes(checksums_bytes)))
        self.size_bytes = -(-length // _ALIGNMENT) * _ALIGNMENT
        if self.size_bytes > MAX_HEADER_BYTES:
            msg = (
                f"shard file header of {self.size_bytes} bytes for {len(outline.sizes)} "
                f"tensors; the limit is {MAX_HEADER_BYTES}."
            )
            raise ShardFileError(msg)

    def encode(self, checksums: bytes) -> bytes:
        """Return the bytes of the header, ``size_bytes`` of them."""
        text = self._outline.text(self._ours, _encode_checksums(checksums)).encode("ascii")
        data = LENGTH.pack(self.size_bytes - LENGTH.size) + text
        assert len(data) <= self.size_bytes, "the header changed its size"
        return data.ljust(self.size_bytes, b" ")


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


class Entries(dict[str, Stored]):
    """What a shard file holds, by key, in data order.

    All headers that say the same of it share one of these: it is never changed.

    Attributes:
        by_box: What is not the rank's own, by tensor's name and box.
        per_rank: What is the rank's own, by tensor's name.
        num_blocks: Blocks of all of them.
    """

    __hash__ = object.__hash__  # type: ignore[assignment]  # by identity: never changed

    def __init__(self, by_key: dict[str, Stored], num_blocks: int) -> None:
        super().__init__(by_key)
        every = by_key.values()
        self.by_box = {(s.name, s.box): s for s in every if not s.per_rank}
        self.per_rank = {s.name: s for s in every if s.per_rank}
        self.num_blocks = num_blocks


@dataclass(frozen=True, slots=True)
class Header:
    """A parsed and checked header.

    Attributes:
        attempt: Published name of the attempt that the file was written for.
        rank: The rank that wrote it.
        world_size: Of how many.
        block_bytes: Size of the blocks that checksums were taken of.
        entries: What the file holds.
        per_rank_values: That rank's own plain values, encoded.
        checksums: Of all blocks, one behind the other.
        stamp: The header's format and features.
    """

    attempt: str
    rank: int
    world_size: int
    block_bytes: int
    entries: Entries
    per_rank_values: dict[str, Any]
    checksums: bytes
    stamp: Stamp


def parse(text: bytes, data_bytes: int) -> Header:
    """Parse and check a header.

    Args:
        text: The header without the 8 bytes of its length.
        data_bytes: Bytes of the file behind it.

    Raises:
        ShardFileError: Says what is wrong with it.
        NewerFormatError: A newer version of distckpt wrote it.
    """
    if not text.startswith(b"{"):
        _refuse("header does not start with '{'")
    try:
        metadata, entries = _cut(text)
        check_metadata(metadata)
        return _parse_ours(metadata, entries, data_bytes)
    except strict_json.JsonError as error:
        msg = f"header: {error}"
        raise ShardFileError(msg) from error
    except ShardFileError:
        raise
    except FormatError as error:
        raise ShardFileError(str(error)) from error


def _cut(text: bytes) -> tuple[Any, str]:
    """Cut a header into its metadata and the JSON object of its entries.

    The entries are alike in every save of a job, and the longest part by far. As text of
    their own they need to be parsed only once.
    """
    whole = _decode(text)
    if not whole.startswith(_PREFIX + "{"):  # spelled by another tool
        tree = strict_json.loads(text)
        if not isinstance(tree, dict):
            _refuse("header is not an object")
        metadata = tree.pop(_METADATA, {})
        return metadata, strict_json.dumps(tree)
    metadata, end = strict_json.cut(whole, len(_PREFIX))
    if whole.startswith(',"', end):
        end += 1
    elif not whole.startswith("}", end):
        _refuse(f"header with {whole[end : end + 20]!r} behind its metadata")
    return metadata, "{" + whole[end:]


def _decode(text: bytes) -> str:
    try:
        return text.decode("utf-8")
    except UnicodeDecodeError as error:
        msg = f"header: {error}"
        raise ShardFileError(msg) from None


def check_metadata(metadata: Any) -> None:
    """Apply the rules of the safetensors package to what stands beside the entries."""
    if not isinstance(metadata, dict) or not all(
        isinstance(value, str) for value in metadata.values()
    ):
        _refuse("__metadata__ is not a map of strings")
    if not all(map(strict_json.is_unicode, (*metadata, *metadata.values()))):
        _refuse("header with text that is not Unicode")


def _parse_ours(metadata: dict[str, str], text: str, data_bytes: int) -> Header:
    if _OUR_KEY not in metadata:
        _refuse("a safetensors file, but not one that distckpt wrote")
    ours = strict_json.loads(metadata[_OUR_KEY].encode())
    fields = ("attempt", "rank", "world_size", "block_bytes", "values")
    found = stamp.read_stamp(ours, stamp.SHARD_FILE) if isinstance(ours, dict) else None
    if found is None:
        _refuse(f"metadata without a format: {ours!r:.200}")
    if not stamp.checked_fields(ours, fields, found):
        _refuse(f"metadata with fields {list(ours)}")
    block_bytes: int = _typed(ours, "block_bytes", int)
    if block_bytes < 1:
        _refuse("blocks of no bytes")
    per_rank_values = _typed(ours, "values", dict)
    for value in per_rank_values.values():
        values.check(value)
    described: str = _typed(metadata, _ENTRIES_KEY, str)
    entries = _parse_entries(
        text, described, block_bytes, data_bytes, found.allows_unknown_fields
    )
    return Header(
        attempt=_typed(ours, "attempt", str),
        rank=_typed(ours, "rank", int),
        world_size=_typed(ours, "world_size", int),
        block_bytes=block_bytes,
        entries=entries,
        per_rank_values=per_rank_values,
        checksums=_decode_checksums(metadata.get(_CHECKSUMS_KEY), entries.num_blocks),
        stamp=found,
    )


# Not many: a reader of other layouts has a file of each rank open, and they all differ.
@lru_cache(maxsize=8)
def _parse_entries(
    text: str, described: str, block_bytes: int, data_bytes: int, allow_unknown: bool
) -> Entries:
    spans = parse_spans(strict_json.loads(text.encode()), data_bytes)
    descriptions = strict_json.loads(described.encode())
    if not isinstance(descriptions, dict) or not descriptions.keys() <= spans.keys():
        _refuse("metadata that describes an entry that is not there")
    by_key: dict[str, Stored] = {}
    block = 0
    for key, span in spans.items():
        stored = _stored(key, span, descriptions.get(key, {}), block, allow_unknown)
        by_key[key] = stored
        block += -(-stored.size_bytes // block_bytes)
    return Entries(by_key, block)


class Span(NamedTuple):
    """One entry of a safetensors header, as it stands there.

    Attributes:
        code: The element type, as safetensors calls it.
        shape: Its shape.
        start: First byte, from the start of the data.
        stop: The byte behind its last.
    """

    code: str
    shape: tuple[int, ...]
    start: int
    stop: int


def parse_spans(tree: dict[str, Any], data_bytes: int) -> dict[str, Span]:
    """Apply the rules of the safetensors package; returns entries in data order.

    Args:
        tree: The header, without its metadata.
        data_bytes: Bytes of the file behind it.

    Raises:
        ShardFileError: Says what is wrong with it.
    """
    if _METADATA in tree:
        _refuse(f"{_METADATA} stands twice")
    if not all(map(strict_json.is_unicode, tree)):
        _refuse("header with text that is not Unicode")
    spans = {key: _parse_span(key, fields) for key, fields in tree.items()}
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


def _parse_span(key: str, fields: Any) -> Span:
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
    return Span(code, tuple(shape), start, stop)


def _are_counts(items: Any) -> bool:
    return isinstance(items, list) and all(
        type(item) is int and 0 <= item < 2**63 for item in items
    )


def _stored(
    key: str, span: Span, description: Any, first_block: int, allow_unknown: bool
) -> Stored:
    known = {"name", "shape", "offset", "dtype", "per_rank"}
    if not isinstance(description, dict) or not (
        allow_unknown or description.keys() <= known
    ):
        _refuse(f"entry {key!r}: described as {description!r:.200}")
    name = description.get("name", key)
    dtype = description.get("dtype", dtypes.dtype_of_code(span.code))
    shape = span.shape
    if "dtype" in description:
        dtype = dtypes.canonical(dtype) if isinstance(dtype, str) else ""
        if not dtypes.is_known(dtype):
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
