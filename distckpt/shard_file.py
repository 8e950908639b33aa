"""One rank's file: a valid safetensors file with block checksums in its header.

::

    8 bytes          length of the header, little endian
    header           JSON, padded with spaces so that data starts at a multiple of 4096
    data             entries one behind the other, without gaps

Sizes are known before the first byte, so the data streams first and the header, with
its checksums, is written last into the space kept for it. Checksums cover blocks that
count from each entry's start, so a partial read verifies exactly what it read.

Bytes come in and go out as buffers: no torch in this module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import xxhash

from distckpt import calls, dtypes, shard_header
from distckpt.errors import ChecksumError, NewerFormatError, ShardFileError
from distckpt.layout import Piece
from distckpt.record import digest
from distckpt.run_directory import Buffer, NewShard, Source
from distckpt.shard_header import (
    CHECKSUM_BYTES,
    LENGTH,
    MAX_HEADER_BYTES,
    Draft,
    Header,
    Outline,
    Stored,
)

# Short runs are read together in spans of at most so many bytes.
_SPAN_BYTES = 4 * 2**20
# What images are aligned to, in memory and in length: so can be written past the cache.
IMAGE_BYTES = 4096
# What is handed to one call, after its checksums or before them.
_BATCH_BYTES = 2**20
_BATCH_BUFFERS = 512
_READ_BYTES = 128 * 1024
# What is asked for at a time of a tensor that is not held whole.
_STREAM_BYTES = 8 * 2**20


class Entry(NamedTuple):
    """One box of one tensor, to be written.

    Attributes:
        piece: What the bytes are.
        load: Returns the bytes, contiguous and row-major, just when they are needed.
        per_rank: Whether the tensor is this rank's own (``PerRank``).
    """

    piece: Piece
    load: Callable[[], Buffer]
    per_rank: bool = False


class Streamed(NamedTuple):
    """One box of one tensor, to be written without holding all of it.

    Attributes:
        piece: What the bytes are.
        stream: Yields them, row-major, in pieces of the length that it is given; the last
            one may be shorter. A piece is used before the next is asked for.
    """

    piece: Piece
    stream: Callable[[int], Iterable[Buffer]]


class Part(NamedTuple):
    """One whole entry that is to be read.

    Attributes:
        stored: The entry.
        buffer: Filled with its bytes; whoever reads keeps its memory alive.
    """

    stored: Stored
    buffer: Buffer


class Batch(NamedTuple):
    """Entries that are read by one call: a large one, or neighbours of a block each."""

    parts: list[Part]
    buffers: list[Buffer]
    size_bytes: int


def batches_of(parts: Iterable[Part], block_bytes: int) -> list[Batch]:
    """Gather small neighbours, to be read together.

    Args:
        parts: In file order.
        block_bytes: Of the file.
    """
    batches: list[Batch] = []
    gathered: list[Part] = []
    size = end = 0

    def flush() -> None:
        if gathered:
            buffers = [part.buffer for part in gathered]
            batches.append(Batch([*gathered], buffers, size))
            gathered.clear()

    for part in parts:
        length = part.stored.size_bytes
        is_small = length <= block_bytes
        if (
            not is_small
            or part.stored.start != end
            or size + length > _BATCH_BYTES
            or len(gathered) == _BATCH_BUFFERS
        ):
            flush()
            size = 0
        if is_small:
            gathered.append(part)
            size += length
            end = part.stored.start + length
        else:
            batches.append(Batch([part], [part.buffer], length))
    flush()
    return batches


class Written(NamedTuple):
    """What a vote says about a shard file."""

    size_bytes: int
    header: str


def order(piece: Piece) -> int:
    """Return what entries are sorted by: the widest elements come first.

    So each entry is aligned to its elements.
    """
    return -dtypes.item_size_bytes(piece.row.dtype)


# Returns the bytes of some entries of an outline, from one index to before another, just
# when they are needed.
Load: TypeAlias = Callable[[int, int], Iterable[Buffer]]


def write(
    target: NewShard,
    entries: Iterable[Entry],
    *,
    per_rank_values: dict[str, Any],
    **whose: Any,
) -> Written:
    """Write one shard file with these entries; see ``write_outlined``.

    Args:
        target: The file.
        entries: What to write; equal names are an error.
        per_rank_values: This rank's own plain values, encoded.
        **whose: ``attempt``, ``rank`` and ``world_size``, as for a ``Draft``.
    """
    ordered = sorted(entries, key=lambda entry: order(entry.piece))
    outline = Outline([(entry.piece, entry.per_rank) for entry in ordered])
    draft = Draft(outline, per_rank_values=per_rank_values, **whose)

    def load(first: int, stop: int) -> list[Buffer]:
        return [entry.load() for entry in ordered[first:stop]]

    return write_outlined(target, draft, outline, load)


def write_outlined(target: NewShard, draft: Draft, outline: Outline, load: Load) -> Written:
    """Write one shard file and make its content and its name durable.

    After return the file survives a power loss. No file of this name may exist, and the
    attempt is never begun here: where it is gone, another manager took over.

    Called by: every rank. Collectives: none.

    Args:
        target: The file.
        draft: The header.
        outline: What to write.
        load: Returns its bytes.

    Raises:
        StorageError: Names operation and path.
    """
    return _write_batches(target, draft, outline, _batched(target, outline, load))


def write_streamed(
    target: NewShard,
    entries: Iterable[Streamed],
    *,
    per_rank_values: dict[str, Any],
    **whose: Any,
) -> Written:
    """Write one shard file of tensors that are never held whole; see ``write_outlined``.

    Args:
        target: The file.
        entries: What to write; equal names are an error.
        per_rank_values: This rank's own plain values, encoded.
        **whose: ``attempt``, ``rank`` and ``world_size``, as for a ``Draft``.
    """
    ordered = sorted(entries, key=lambda entry: order(entry.piece))
    outline = Outline([(entry.piece, False) for entry in ordered])
    draft = Draft(outline, per_rank_values=per_rank_values, **whose)
    step = max(
        outline.block_bytes, _STREAM_BYTES // outline.block_bytes * outline.block_bytes
    )
    batches = ([piece] for entry in ordered for piece in entry.stream(step))
    return _write_batches(target, draft, outline, batches)


def _write_batches(
    target: NewShard, draft: Draft, outline: Outline, batches: Iterable[list[Buffer]]
) -> Written:
    """Write a file from batches: several small entries, or whole blocks of one."""
    with target.create(draft.size_bytes + outline.data_bytes) as file:
        position = draft.size_bytes
        checksums = bytearray()
        for batch in batches:
            checksums += _checksums_of(batch, outline.block_bytes)
            file.write_at(position, batch)
            position += sum(map(len, batch))
        head = draft.encode(bytes(checksums))
        file.write_at(0, [head])
        file.finish(position)
    return Written(position, digest(head))


def image_bytes(draft: Draft, outline: Outline) -> int:
    """Return how long the image of a file is, with its padding; see ``write_image``."""
    size = draft.size_bytes + outline.data_bytes
    return -(-size // IMAGE_BYTES) * IMAGE_BYTES


def write_image(
    target: NewShard, image: memoryview, draft: Draft, outline: Outline
) -> Written:
    """Write a shard file whose entries lie in memory as they will in the file; durably.

    Past the page cache where that can be done. Else as ``write``, which see.

    Args:
        target: The file.
        image: ``image_bytes`` long, at a multiple of ``IMAGE_BYTES``: room for the header,
            then the entries.
        draft: The header.
        outline: What the file holds.
    """
    calls.check_wanted("write", str(target))
    size = draft.size_bytes + outline.data_bytes
    checksums = bytearray()
    start = draft.size_bytes
    for entry_bytes in outline.sizes:
        entry = image[start : start + entry_bytes]
        if entry_bytes:
            checksums += _checksums(entry, outline.block_bytes)
        start += entry_bytes
    head = draft.encode(bytes(checksums))
    image[: len(head)] = head
    image[size:] = bytes(len(image) - size)
    with target.create(size, is_image=True) as file:
        file.write_at(0, [image])
        file.finish(size)
    return Written(size, digest(head))


def _checksums(buffer: memoryview, block_bytes: int) -> bytes:
    return b"".join(
        [
            xxhash.xxh3_64_digest(buffer[start : start + block_bytes])
            for start in range(0, len(buffer), block_bytes)
        ]
    )


def _checksums_of(buffers: Sequence[Buffer], block_bytes: int) -> bytes:
    if len(buffers) == 1:
        return _checksums(memoryview(buffers[0]).cast("B"), block_bytes)
    # Several make up a batch only if each is no longer than one block.
    return b"".join(map(xxhash.xxh3_64_digest, buffers))


def _batched(target: NewShard, outline: Outline, load: Load) -> Iterator[list[Buffer]]:
    """Gather small entries into one vectored write, and cut large ones.

    So little at a time that what was read for the checksums is still in the cache when it
    is written.
    """
    step = _step_bytes(outline.block_bytes)
    for first, stop in _batches(outline.sizes, outline.block_bytes):
        calls.check_wanted("write", str(target))
        buffers = [buffer for buffer in load(first, stop) if len(buffer)]
        assert sum(map(len, buffers)) == sum(outline.sizes[first:stop]), outline
        if len(buffers) > 1:
            yield buffers
        elif buffers:
            buffer = memoryview(buffers[0]).cast("B")
            for start in range(0, len(buffer), step):
                yield [buffer[start : start + step]]


def _batches(sizes: Sequence[int], block_bytes: int) -> Iterator[tuple[int, int]]:
    """Cut entries into runs that are written together: many small ones, or one."""
    first = total = 0
    for index, size in enumerate(sizes):
        if index > first and (
            size > block_bytes
            or total + size > _BATCH_BYTES
            or index - first == _BATCH_BUFFERS
        ):
            yield first, index
            first, total = index, 0
        total += size
        if size > block_bytes:
            yield first, index + 1
            first, total = index + 1, 0
    if first < len(sizes):
        yield first, len(sizes)


def _step_bytes(block_bytes: int) -> int:
    return max(block_bytes, _BATCH_BYTES // block_bytes * block_bytes)


class ShardReader:
    """A shard file open for reading: header parsed and checked, nothing else read.

    Attributes:
        path: The file.
        header: What the file says of itself.
        header_digest: Digest of the header, to be compared with the manifest's.
        num_block_reads: Blocks read so far, for tests and reports.

    Args:
        file: The file; closed with this, and if this cannot be made.
        expected_digest: The header's digest in the manifest; None skips that check.

    Raises:
        ChecksumError: The header is not the one that was committed.
        ShardFileError: The header is not valid.
        NewerFormatError: A newer version of distckpt wrote it.
        StorageError: The file cannot be read.
    """

    def __init__(self, file: Source, expected_digest: str | None = None) -> None:
        self.path = file.path
        self.num_block_reads = 0
        self._file = file
        try:
            self.header = self._parse(expected_digest)
        except (ShardFileError, NewerFormatError) as error:
            self._file.close()
            msg = f"{file.path}: {error}"
            raise type(error)(msg) from error
        except BaseException:
            self._file.close()
            raise

    @property
    def size_bytes(self) -> int:
        """Size of the whole file."""
        return self._file.size_bytes

    def _parse(self, expected_digest: str | None) -> Header:
        prefix = self._file.read(0, LENGTH.size)
        if len(prefix) < LENGTH.size:
            msg = f"{len(prefix)} bytes are too few for a header"
            raise ShardFileError(msg)
        (length,) = LENGTH.unpack(prefix)
        if length > min(MAX_HEADER_BYTES, self.size_bytes - LENGTH.size):
            msg = f"header of {length} bytes in a file of {self.size_bytes}"
            raise ShardFileError(msg)
        text = self._file.read(LENGTH.size, length)
        self.header_digest = digest(prefix + text)
        # Before a damaged header is taken for one of a newer format.
        if expected_digest not in (None, self.header_digest):
            msg = (
                f"{self.path}: header digest {self.header_digest}, expected "
                f"{expected_digest}."
            )
            raise ChecksumError(msg)
        self._data_start = LENGTH.size + length
        return shard_header.parse(text, self.size_bytes - self._data_start)

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
        block = self.header.block_bytes
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

    def read_entries(self, parts: Iterable[Part]) -> None:
        """Read whole entries, verifying them; see ``read_batches``.

        Args:
            parts: In file order.
        """
        self.read_batches(batches_of(parts, self.header.block_bytes))

    def read_batches(self, batches: Iterable[Batch]) -> None:
        """Read what ``batches_of`` has gathered, verifying it.

        Args:
            batches: In file order. Their buffers are undefined after an error.

        Raises:
            ChecksumError, ShardFileError, StorageError: See ``read_into``.
        """
        self._file.expect_in_order()
        for batch in batches:
            first = batch.parts[0]
            if first.stored.size_bytes > self.header.block_bytes:
                self._read_blocks(first.stored, 0, memoryview(first.buffer).cast("B"))
            else:
                self._read_small(batch)

    def _read_small(self, batch: Batch) -> None:
        """Read neighbours of one block each by one call."""
        parts, buffers, size_bytes = batch
        first = parts[0].stored
        count = self._file.read_vector(self._data_start + first.start, buffers)
        if count < size_bytes:
            msg = f"{self.path}: ends inside tensor {parts[-1].stored.name!r}."
            raise ShardFileError(msg)
        found = b"".join(map(xxhash.xxh3_64_digest, buffers))
        self.num_block_reads += len(parts)
        start = first.first_block * CHECKSUM_BYTES
        if found != self.header.checksums[start : start + len(found)]:
            for index, part in enumerate(parts):
                at = index * CHECKSUM_BYTES
                self._compare(part.stored, 0, found[at : at + CHECKSUM_BYTES])

    def read_runs(
        self, stored: Stored, runs: Iterable[tuple[int, int, int]], buffer: memoryview
    ) -> None:
        """Read runs of one entry to where they belong in a buffer, verifying them.

        Runs that are shorter than a block and close to each other, the rows of a column
        that was cut otherwise when it was saved, are read together: one by one, each
        would cost the whole block around it.

        Args:
            stored: The entry.
            runs: ``(index in the entry, index in the buffer, length)``, in elements, by
                ascending index in the entry.
            buffer: Undefined after an error.

        Raises:
            ChecksumError, ShardFileError, StorageError: See ``read_into``.
        """
        item = dtypes.item_size_bytes(stored.dtype)
        near: list[tuple[int, int, int]] = []
        for source, target, length in runs:
            run = (source * item, target * item, length * item)
            if near and not self._belongs_to(run, near):
                self._read_together(stored, near, buffer)
                near = []
            near.append(run)
        if near:
            self._read_together(stored, near, buffer)

    def _belongs_to(
        self, run: tuple[int, int, int], near: Sequence[tuple[int, int, int]]
    ) -> bool:
        source, _, size = run
        first, (before, _, size_before) = near[0][0], near[-1]
        return (
            max(size, size_before) < self.header.block_bytes
            and source - (before + size_before) < self.header.block_bytes
            and source + size - first <= max(_SPAN_BYTES, self.header.block_bytes)
        )

    def _read_together(
        self, stored: Stored, near: Sequence[tuple[int, int, int]], buffer: memoryview
    ) -> None:
        first, target, size = near[0]
        if len(near) == 1:
            self.read_into(stored, first, buffer[target : target + size])
            return
        span = memoryview(bytearray(near[-1][0] + near[-1][2] - first))
        self.read_into(stored, first, span)
        for source, target, size in near:
            buffer[target : target + size] = span[source - first : source - first + size]

    def _read_around(self, stored: Stored, offset: int, buffer: memoryview) -> None:
        if not buffer:
            return
        start = offset // self.header.block_bytes * self.header.block_bytes
        stop = (
            -(-(offset + len(buffer)) // self.header.block_bytes) * self.header.block_bytes
        )
        scratch = memoryview(bytearray(min(stop, stored.size_bytes) - start))
        self._read_blocks(stored, start, scratch)
        buffer[:] = scratch[offset - start : offset - start + len(buffer)]

    def _read_blocks(self, stored: Stored, start: int, buffer: memoryview) -> None:
        block = self.header.block_bytes
        index = start // block

        def verify(piece: memoryview) -> None:
            nonlocal index
            found = _checksums(piece, block)
            self._compare(stored, index, found)
            index += len(found) // CHECKSUM_BYTES

        # So little at a time that hashing finds the bytes in the nearest cache. Measured:
        # an eighth longer than reading alone with 128 KiB, a third with 1 MiB.
        stride = max(block, _READ_BYTES // block * block)
        position = self._data_start + stored.start + start
        count = self._file.read_in_pieces(position, buffer, stride, verify)
        if count < len(buffer):
            msg = f"{self.path}: ends inside tensor {stored.name!r}."
            raise ShardFileError(msg)
        self.num_block_reads += index - start // block

    def _compare(self, stored: Stored, index: int, found: bytes) -> None:
        """Compare the checksums of blocks of one entry, from an index on."""
        start = (stored.first_block + index) * CHECKSUM_BYTES
        expected = self.header.checksums[start : start + len(found)]
        if found == expected:
            return
        at = 0
        while found[at : at + CHECKSUM_BYTES] == expected[at : at + CHECKSUM_BYTES]:
            at += CHECKSUM_BYTES
            index += 1
        msg = (
            f"{self.path}: tensor {stored.key!r}, block {index} (bytes "
            f"{index * self.header.block_bytes} on): checksum "
            f"{found[at : at + CHECKSUM_BYTES].hex()}, expected "
            f"{expected[at : at + CHECKSUM_BYTES].hex()}. The bytes are not those that "
            "were written."
        )
        raise ChecksumError(msg)

    def checksums_of(self, stored: Stored) -> bytes:
        """Return what the blocks of one entry must hash to; reads nothing."""
        num_blocks = -(-stored.size_bytes // self.header.block_bytes)
        start = stored.first_block * CHECKSUM_BYTES
        return self.header.checksums[start : start + num_blocks * CHECKSUM_BYTES]

    def verify(self, advance: Callable[[int], object] = lambda _: None) -> int:
        """Read every byte and verify it; returns the number of bytes.

        Args:
            advance: Told how many bytes more are through.
        """
        self._file.expect_in_order()
        total = 0
        step = _step_bytes(self.header.block_bytes)
        # No larger than an entry: the length of a block is what the file says.
        largest = max((s.size_bytes for s in self.header.entries.values()), default=0)
        scratch = memoryview(bytearray(min(step, largest)))
        for stored in self.header.entries.values():
            for offset in range(0, stored.size_bytes, step):
                size = min(step, stored.size_bytes - offset)
                self._read_blocks(stored, offset, scratch[:size])
                advance(size)
            total += stored.size_bytes
        return total

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def __enter__(self) -> ShardReader:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()
