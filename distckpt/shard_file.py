"""One rank's file: a valid safetensors file with block checksums in its header.

::

    8 bytes          length of the header, little endian
    header           JSON, padded with spaces so that data starts at a multiple of 4096
    data             entries one behind the other, without gaps

Sizes are known before the first byte, so the data streams first and the header, with
its checksums, is written last into the space kept for it. Checksums cover blocks that
count from each entry's start, so a partial read verifies exactly what it read.

The rules for reading are those of the safetensors package (what it rejects is rejected
here), and narrower. Bytes come in and go out as buffers: no torch in this module.
"""

from __future__ import annotations

import base64
import os
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

import xxhash

from distckpt import dtypes, layout, storage, strict_json, values
from distckpt.boxes import Box, checked_size
from distckpt.errors import ChecksumError, FormatError, ManifestError, ShardFileError
from distckpt.layout import Piece, Row
from distckpt.record import digest

FORMAT = 1
ALIGNMENT = 4096

# Small blocks: a reader of some rows pays for whole blocks around them. They grow for
# entries so large that the header would pass its limit otherwise.
_BLOCK_BYTES = 128 * 1024
_MAX_CHECKSUMS_BYTES = 16 * 2**20
_CHECKSUM_BYTES = 8

# The safetensors package's own limit.
_MAX_HEADER_BYTES = 100_000_000
_LENGTH = struct.Struct("<Q")
_METADATA = "__metadata__"
_OUR_KEY = "distckpt"
_CHECKSUMS_KEY = "distckpt.checksums"


class Entry(NamedTuple):
    """One box of one tensor, to be written.

    Attributes:
        piece: What the bytes are.
        load: Returns the bytes, contiguous and row-major, just when they are needed.
        per_rank: Whether the tensor is this rank's own (``PerRank``).
    """

    piece: Piece
    load: Callable[[], memoryview]
    per_rank: bool = False


class Written(NamedTuple):
    """What a vote says about a shard file."""

    size_bytes: int
    header: str


def write(
    path: str,
    entries: Sequence[Entry],
    *,
    attempt: str,
    rank: int,
    world_size: int,
    per_rank_values: dict[str, Any],
) -> Written:
    """Write one shard file and make its content and its name durable.

    After return the file survives a power loss. No file of this name may exist, and
    its directory is never made here: where it is gone, another manager took over.

    Called by: every rank. Collectives: none.

    Args:
        path: Inside the attempt's pending directory.
        entries: What to write; equal names are an error.
        attempt: Published name of the attempt, so that a file cannot stand in another.
        rank: Who writes.
        world_size: Of how many.
        per_rank_values: This rank's own plain values, encoded.

    Raises:
        StorageError: Names operation and path.
    """
    # Widest elements first, so that every entry is aligned to its own element size.
    ordered = sorted(entries, key=lambda e: -dtypes.item_size_bytes(e.piece.row.dtype))
    block_bytes = _block_bytes(entry.piece.size_bytes for entry in ordered)
    header = _Header(
        ordered,
        block_bytes=block_bytes,
        attempt=attempt,
        rank=rank,
        world_size=world_size,
        per_rank_values=per_rank_values,
    )
    with storage.NewFile(path) as file:
        position = header.size_bytes
        checksums = bytearray()
        for data in _batched(ordered):
            for buffer in data:
                for start in range(0, len(buffer), block_bytes):
                    checksums += xxhash.xxh3_64_digest(buffer[start : start + block_bytes])
            file.write_at(position, data)
            position += sum(map(len, data))
        head = header.encode(bytes(checksums))
        file.write_at(0, [head])
        file.finish(position)
    storage.sync_directory(os.path.dirname(path))
    return Written(position, digest(head))


def _batched(entries: Sequence[Entry]) -> Iterator[list[memoryview]]:
    """Gather small entries into one vectored write; large ones come alone."""
    batch: list[memoryview] = []
    size = 0
    for entry in entries:
        buffer = entry.load()
        assert len(buffer) == entry.piece.size_bytes, entry.piece
        if buffer:
            batch.append(buffer)
            size += len(buffer)
        if size >= 2**20 or len(batch) >= 512:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _block_bytes(sizes: Iterator[int]) -> int:
    sizes_list = list(sizes)
    block = _BLOCK_BYTES
    while _num_blocks(sizes_list, block) * _CHECKSUM_BYTES > _MAX_CHECKSUMS_BYTES:
        if block >= max(sizes_list):
            break
        block *= 2
    return block


def _num_blocks(sizes: Sequence[int], block_bytes: int) -> int:
    return sum(-(-size // block_bytes) for size in sizes)


class _Header:
    """Everything but the checksums, whose length is known beforehand."""

    def __init__(
        self,
        entries: Sequence[Entry],
        *,
        block_bytes: int,
        attempt: str,
        rank: int,
        world_size: int,
        per_rank_values: dict[str, Any],
    ) -> None:
        self._tree: dict[str, Any] = {_METADATA: {}}
        described = {}
        position = 0
        sizes = []
        for entry in entries:
            row, box = entry.piece.row, entry.piece.box
            key = _key(entry.piece)
            if key in self._tree:
                msg = f"tensor {key!r} stands twice in one shard file"
                raise ShardFileError(msg)
            size = entry.piece.size_bytes
            self._tree[key] = {
                "dtype": dtypes.safetensors_code(row.dtype),
                "shape": _stored_shape(row.dtype, box.shape),
                "data_offsets": [position, position + size],
            }
            description = _describe(entry)
            if description:
                described[key] = description
            position += size
            sizes.append(size)
        num_blocks = _num_blocks(sizes, block_bytes)
        self._tree[_METADATA] = {
            "format": "pt",  # Hugging Face's readers ask for it.
            _OUR_KEY: strict_json.dumps(
                {
                    "format": FORMAT,
                    "attempt": attempt,
                    "rank": rank,
                    "world_size": world_size,
                    "block_bytes": block_bytes,
                    "entries": described,
                    "values": per_rank_values,
                }
            ),
            _CHECKSUMS_KEY: _encode_checksums(bytes(num_blocks * _CHECKSUM_BYTES)),
        }
        self.size_bytes = len(self._padded())
        if self.size_bytes > _MAX_HEADER_BYTES:
            msg = (
                f"shard file header of {self.size_bytes} bytes for {len(entries)} "
                f"tensors; the limit is {_MAX_HEADER_BYTES}."
            )
            raise ShardFileError(msg)

    def encode(self, checksums: bytes) -> bytes:
        self._tree[_METADATA][_CHECKSUMS_KEY] = _encode_checksums(checksums)
        data = self._padded()
        assert len(data) == self.size_bytes, "the header changed its size"
        return data

    def _padded(self) -> bytes:
        text = strict_json.dumps(self._tree).encode("ascii")
        size = -(-(_LENGTH.size + len(text)) // ALIGNMENT) * ALIGNMENT
        return (_LENGTH.pack(size - _LENGTH.size) + text).ljust(size, b" ")


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


def _describe(entry: Entry) -> dict[str, Any]:
    """Say what safetensors' own fields do not: only where there is more to say."""
    row, box = entry.piece.row, entry.piece.box
    description: dict[str, Any] = {}
    if not entry.piece.is_whole:
        description["name"] = row.name
        description["shape"] = list(row.shape)
        description["offset"] = list(box.offset)
    if not dtypes.has_counterpart(row.dtype):
        description["dtype"] = row.dtype
    if entry.per_rank:
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


class ShardReader:
    """A shard file open for reading: header parsed and checked, nothing else read.

    Attributes:
        path: The file.
        header: Digest of the header, to be compared with the manifest's.
        attempt: Published name of the attempt that the file was written for.
        rank: The rank that wrote it.
        world_size: Of how many.
        entries: What it holds, by key.
        per_rank_values: That rank's own plain values, encoded.
        num_block_reads: Blocks read so far, for tests and reports.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.num_block_reads = 0
        self._file = storage.OpenFile(path)
        try:
            self._parse()
        except FormatError as error:
            self._file.close()
            msg = f"{path}: {error}"
            raise ShardFileError(msg) from error
        except BaseException:
            self._file.close()
            raise

    @property
    def size_bytes(self) -> int:
        """Size of the whole file."""
        return self._file.size_bytes

    def _parse(self) -> None:
        prefix = self._file.read(0, _LENGTH.size)
        if len(prefix) < _LENGTH.size:
            _refuse(f"{len(prefix)} bytes are too few for a header")
        (length,) = _LENGTH.unpack(prefix)
        if length > min(_MAX_HEADER_BYTES, self.size_bytes - _LENGTH.size):
            _refuse(f"header of {length} bytes in a file of {self.size_bytes}")
        text = self._file.read(_LENGTH.size, length)
        if not text.startswith(b"{"):
            _refuse("header does not start with '{'")
        self.header = digest(prefix + text)
        self._data_start = _LENGTH.size + length
        try:
            tree = strict_json.loads(text)
            spans = _parse_entries(tree, self.size_bytes - self._data_start)
            self._parse_ours(tree.get(_METADATA), spans)
        except strict_json.JsonError as error:
            _refuse(f"header: {error}")

    def _parse_ours(self, metadata: Any, spans: dict[str, _Span]) -> None:
        if not isinstance(metadata, dict) or _OUR_KEY not in metadata:
            _refuse("a safetensors file, but not one that distckpt wrote")
        ours = strict_json.loads(metadata[_OUR_KEY].encode())
        fields = ("format", "attempt", "rank", "world_size", "block_bytes", "entries")
        if not isinstance(ours, dict) or _typed(ours, "format", int) != FORMAT:
            _refuse("shard file of another format version")
        if tuple(ours) != (*fields, "values"):
            _refuse(f"metadata with fields {list(ours)}")
        self.attempt = _typed(ours, "attempt", str)
        self.rank = _typed(ours, "rank", int)
        self.world_size = _typed(ours, "world_size", int)
        self._block_bytes = _typed(ours, "block_bytes", int)
        if self._block_bytes < 1:
            _refuse("blocks of no bytes")
        self.per_rank_values: dict[str, Any] = _typed(ours, "values", dict)
        for value in self.per_rank_values.values():
            values.decode(value)
        described = _typed(ours, "entries", dict)
        if not described.keys() <= spans.keys():
            _refuse("metadata that describes an entry that is not there")
        self.entries: dict[str, Stored] = {}
        block = 0
        for key, span in spans.items():
            stored = _stored(key, span, described.get(key, {}), block)
            self.entries[key] = stored
            block += -(-stored.size_bytes // self._block_bytes)
        self._checksums = _decode_checksums(metadata.get(_CHECKSUMS_KEY), block)

    def read_into(self, stored: Stored, offset: int, buffer: memoryview) -> None:
        """Read bytes of one entry into a buffer, verifying every block they touch.

        Args:
            stored: The entry.
            offset: First byte, from the entry's start.
            buffer: Filled whole. Undefined after an error.

        Raises:
            ChecksumError: Names file, tensor and block.
            ShardFileError: The file ends too early.
            StorageError: The read itself failed.
        """
        assert 0 <= offset <= offset + len(buffer) <= stored.size_bytes, stored
        block = self._block_bytes
        end = offset + len(buffer)
        first_whole = -(-offset // block) * block
        last_whole = end if end == stored.size_bytes else end // block * block
        if first_whole >= last_whole:
            self._read_around(stored, offset, buffer)
            return
        # Whole blocks go straight to where they belong; only the ragged ends go
        # through a buffer of their own.
        if offset < first_whole:
            self._read_around(stored, offset, buffer[: first_whole - offset])
        self._read_blocks(
            stored, first_whole, buffer[first_whole - offset : last_whole - offset]
        )
        if last_whole < end:
            self._read_around(stored, last_whole, buffer[last_whole - offset :])

    def _read_around(self, stored: Stored, offset: int, buffer: memoryview) -> None:
        if not buffer:
            return
        start = offset // self._block_bytes * self._block_bytes
        stop = -(-(offset + len(buffer)) // self._block_bytes) * self._block_bytes
        scratch = memoryview(bytearray(min(stop, stored.size_bytes) - start))
        self._read_blocks(stored, start, scratch)
        buffer[:] = scratch[offset - start : offset - start + len(buffer)]

    def _read_blocks(self, stored: Stored, start: int, buffer: memoryview) -> None:
        block = self._block_bytes
        index = start // block
        # A few MiB at a time, so that hashing finds the bytes still in the cache.
        stride = max(block, 2**21 // block * block)
        for at in range(0, len(buffer), stride):
            part = buffer[at : at + stride]
            position = self._data_start + stored.start + start + at
            if self._file.read_into(position, part) < len(part):
                msg = f"{self.path}: ends inside tensor {stored.name!r}."
                raise ShardFileError(msg)
            for begin in range(0, len(part), block):
                found = xxhash.xxh3_64_digest(part[begin : begin + block])
                self._compare(stored, index, found)
                index += 1

    def _compare(self, stored: Stored, index: int, found: bytes) -> None:
        self.num_block_reads += 1
        start = (stored.first_block + index) * _CHECKSUM_BYTES
        expected = self._checksums[start : start + _CHECKSUM_BYTES]
        if found != expected:
            msg = (
                f"{self.path}: tensor {stored.key!r}, block {index} (bytes "
                f"{index * self._block_bytes} on): checksum {found.hex()}, expected "
                f"{expected.hex()}. The bytes are not those that were written."
            )
            raise ChecksumError(msg)

    def verify(self) -> int:
        """Read every byte and verify it; returns the number of bytes."""
        total = 0
        step = max(self._block_bytes, 2**21 // self._block_bytes * self._block_bytes)
        # No larger than an entry: the length of a block is what the file says.
        largest = max((s.size_bytes for s in self.entries.values()), default=0)
        scratch = memoryview(bytearray(min(step, largest)))
        for stored in self.entries.values():
            for offset in range(0, stored.size_bytes, step):
                size = min(step, stored.size_bytes - offset)
                self._read_blocks(stored, offset, scratch[:size])
            total += stored.size_bytes
        return total

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


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
    if len(checksums) != num_blocks * _CHECKSUM_BYTES:
        _refuse(f"{len(checksums)} bytes of checksums for {num_blocks} blocks")
    return checksums


def _typed(fields: dict[str, Any], name: str, kind: type) -> Any:
    value = fields.get(name)
    if type(value) is not kind:
        _refuse(f"metadata: {name} is {value!r:.100}")
    return value


def _refuse(reason: str) -> NoReturn:
    raise ShardFileError(reason)
