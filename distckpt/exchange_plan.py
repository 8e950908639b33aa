"""Who reads which bytes of replicated tensors for all ranks: arithmetic.

All ranks want the same of these tensors. So what they read is cut into parcels, each is
read by one rank, and every rank can work out alone who reads which and in which order
they are sent.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from distckpt import dtypes, strict_json
from distckpt.layout import Row
from distckpt.read_plan import ReadPlan, Source
from distckpt.record import digest

# What is sent at once, at most: less, and a message costs more than its bytes.
_PARCEL_BYTES = 8 * 2**20
# At least: a multiple of the blocks that checksums are taken of, but for those of files
# of hundreds of GiB, so that no block is read twice.
_GRAIN_BYTES = 128 * 2**10
# A rank reads this many, if there is so much to read: what is left over at the end, or
# read by one rank more than by another, is less than that part of it.
_PARCELS_PER_RANK = 32
# How much more than its share a rank may read so that it opens no file but its own.
_UNEVEN = 1.125

# What a parallel filesystem gives to one host and to all hosts together, and what gloo
# gives to one rank, in bytes a second.
_HOST_READS = 2e9
_ALL_READ = 5e9
_RANK_SENDS = 1e9


class Unit(NamedTuple):
    """Some bytes of one entry of a shard file, in one parcel.

    Attributes:
        source: The entry, and the tensor that it goes to.
        offset: The first of the bytes, from the entry's start.
        size_bytes: How many.
        at: Where in the parcel they lie.
    """

    source: Source
    offset: int
    size_bytes: int
    at: int


class Parcel(NamedTuple):
    """What one rank reads and sends at once.

    Attributes:
        reader: Which rank.
        file_rank: From whose file.
        units: What is in it, one behind the other.
        size_bytes: Bytes of all of it.
    """

    reader: int
    file_rank: int
    units: tuple[Unit, ...]
    size_bytes: int


class ExchangePlan:
    """Who reads what for all, and in which order it is sent.

    Args:
        reads: What every rank wants, in the same order.
        rows: Every tensor of the checkpoint.
        saved_world_size: How many ranks have saved it.
        world_size: How many restore it.

    Attributes:
        parcels: In the order in which they are sent: one of each rank, then the next one
            of each, so that all read at the same time.
        parcel_bytes: Size of the largest.
        pieced: The tensors of which some entry does not go to its place in one run.
    """

    def __init__(
        self,
        reads: ReadPlan,
        rows: Mapping[str, Row],
        saved_world_size: int,
        world_size: int,
    ) -> None:
        self._reads = reads
        sized = {
            rank: [(source, _size_bytes(source, rows)) for source in sources]
            for rank, sources in sorted(reads.sources.items())
        }
        total = sum(size for sources in sized.values() for _, size in sources)
        limit = _parcel_limit(total, world_size)
        packed = []
        for rank, sources in sized.items():
            # As they lie in the file: the widest elements come first.
            sources.sort(key=lambda one: -_item_bytes(one[0], rows))
            packed += [(rank, units) for units in _packed(sources, limit)]
        sizes = [sum(unit.size_bytes for unit in units) for _, units in packed]
        files = [rank for rank, _ in packed]
        readers = _readers(files, sizes, saved_world_size, world_size)
        of_reader: dict[int, list[Parcel]] = {}
        for (rank, units), size, reader in zip(packed, sizes, readers, strict=True):
            parcel = Parcel(reader, rank, tuple(units), size)
            of_reader.setdefault(reader, []).append(parcel)
        self.parcels = _in_turns([of_reader[reader] for reader in sorted(of_reader)])
        self.parcel_bytes = max(sizes, default=0)
        every = (source for sources in reads.sources.values() for source in sources)
        self.pieced = frozenset(source.name for source in every if source.start is None)

    def is_of(self, reads: ReadPlan) -> bool:
        """Tell whether it is what this would make, ranks being the same."""
        return reads is self._reads

    def files_of(self, rank: int) -> list[int]:
        """Return whose files a rank reads from."""
        return sorted({p.file_rank for p in self.parcels if p.reader == rank})


def wants_digest(names: Sequence[str]) -> bytes:
    """Return 16 bytes that are equal on ranks that want the same whole tensors.

    Never zeros: those are a rank's that wants to read all by itself.
    """
    return bytes.fromhex(digest(strict_json.dumps(list(names)).encode()))


def is_faster_once(world_size: int, num_hosts: int) -> bool:
    """Tell whether to read what is replicated once for the job, and to exchange it.

    For each byte: if each host reads it, the storage serves it to all hosts; ranks of one
    host find it in the page cache. Read once, it passes ``log2(ranks)`` times through a
    rank that sends it on (gloo sends along a tree).
    """
    if num_hosts < 2:
        return False
    each = max(1 / _HOST_READS, num_hosts / _ALL_READ)
    return (world_size - 1).bit_length() / _RANK_SENDS < each


def _item_bytes(source: Source, rows: Mapping[str, Row]) -> int:
    return dtypes.item_size_bytes(rows[source.entry[0]].dtype)


def _size_bytes(source: Source, rows: Mapping[str, Row]) -> int:
    return source.entry[1].size * _item_bytes(source, rows)


def _parcel_limit(total: int, world_size: int) -> int:
    share = total // (world_size * _PARCELS_PER_RANK)
    return min(max(-(-share // _GRAIN_BYTES) * _GRAIN_BYTES, _GRAIN_BYTES), _PARCEL_BYTES)


def _packed(sources: Iterable[tuple[Source, int]], limit: int) -> list[list[Unit]]:
    """Pack small entries of one file together, and cut large ones."""
    parcels: list[list[Unit]] = []
    room = 0
    for source, size in sources:
        if size > room:
            parcels.append([])
            room = limit
        offset = 0
        while size - offset > limit:
            parcels[-1].append(Unit(source, offset, limit, 0))
            parcels.append([])
            offset += limit
        parcels[-1].append(Unit(source, offset, size - offset, limit - room))
        room -= size - offset
    return parcels


def _readers(
    files: Sequence[int], sizes: Sequence[int], saved_world_size: int, world_size: int
) -> Sequence[int]:
    """Choose who reads each parcel: equal ranges, or each rank its own file."""
    total = sum(sizes)
    readers = []
    start = 0
    for size in sizes:
        readers.append((2 * start + size) * world_size // (2 * total))
        start += size
    if saved_world_size == world_size:
        most = max(_loads(files, sizes).values(), default=0)
        if most <= _UNEVEN * max(_loads(readers, sizes).values(), default=0):
            return files
    return readers


def _loads(readers: Iterable[int], sizes: Iterable[int]) -> Counter[int]:
    loads: Counter[int] = Counter()
    for reader, size in zip(readers, sizes, strict=True):
        loads[reader] += size
    return loads


def _in_turns(queues: Sequence[Sequence[Parcel]]) -> list[Parcel]:
    longest = max(map(len, queues), default=0)
    return [queue[i] for i in range(longest) for queue in queues if i < len(queue)]
