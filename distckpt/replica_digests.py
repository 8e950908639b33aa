"""What a rank holds that others should hold, too, and digests of it.

Ranks that list the same names, with the same boxes, are one *replica class*: all that is in
it must be equal on them. A rank is in few classes: one of its plain tensors, one of its
buffers, and one for each way in which its sharded tensors have replicas.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import (
    Callable,
    Collection,
    Hashable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import xxhash

from distckpt import layout, tensors
from distckpt.capture import Captured
from distckpt.known import window
from distckpt.layout import Layouts, Row, Table
from distckpt.leaves import Leaf

SAMPLED, ALWAYS, UNCHECKED = "sampled", "always", "unchecked"

LEAF_DIGEST_BYTES = 8
_PACKED = struct.Struct("<8s16sI")

# A later save compares so many blocks of what is large, and as much of what is small.
_BLOCK_BYTES = 64 * 1024
_BLOCKS = 64
_SMALL_BYTES = 64 * 1024
_MOST_SMALL_BYTES = _BLOCKS * _BLOCK_BYTES
_MOST_SMALL = 256
_MOST_PIECES = 600

_SALT = 0x2545F4914F6CDD1D

# Elements of a device's memory that are summed at a time.
_CHUNK = 2**22


class ReplicaClass(NamedTuple):
    """Tensors that are equal on all ranks that list the same.

    Attributes:
        key: Equal on the ranks that are compared.
        names: Of the tensors, with the place of a part behind it, in order.
        indexes: Which leaves they are.
        are_buffers: Whether they are buffers of modules, of which one rank's is stored.
        small: Positions of those that every save compares.
        large: Positions of the others.
        starts: Where each of these begins, if they lay end to end; and where the last ends.
    """

    key: bytes
    names: list[str]
    indexes: list[int]
    are_buffers: bool
    small: list[int]
    large: list[int]
    starts: list[int]


@dataclass(slots=True)
class Replicas:
    """What one manager knows of its replicas on this rank.

    Attributes:
        mode: ``"sampled"``, ``"always"`` or ``"unchecked"``.
        is_first: Whether the next save compares everything.
        drifting: Names of buffers that are known to differ between ranks.
    """

    mode: str = SAMPLED
    is_first: bool = True
    drifting: frozenset[str] = frozenset()
    _made_of: Hashable = None
    _classes: list[ReplicaClass] = field(default_factory=list)
    _compared: set[str] = field(default_factory=set)

    def classes(self, captured: Captured, table: Table, rank: int) -> list[ReplicaClass]:
        """List the classes that this rank is in, as its own table tells.

        Args:
            captured: What this rank has to save.
            table: Its table.
            rank: This rank.
        """
        made_of = (table.digest, self.drifting)
        if made_of != self._made_of:
            self._classes = _classes(captured, table, None, rank, self.drifting)
            self._made_of = made_of
        return self._classes

    def classes_across(
        self, captured: Captured, table: Table, layouts: Layouts, rank: int
    ) -> list[ReplicaClass]:
        """List the classes of what ranks with different tables have under one name."""
        return _classes(captured, table, layouts, rank, self.drifting)

    def is_new(self, one: ReplicaClass) -> bool:
        """Tell whether a class has names that were never compared in full."""
        return self.is_first or not self._compared.issuperset(one.names)

    def note_compared(self, classes: Iterable[ReplicaClass]) -> None:
        """Remember that classes have been compared, once a save has found them equal."""
        if self.is_first:
            self._compared.clear()
        for one in classes:
            self._compared.update(one.names)
        self.is_first = False


class _Member(NamedTuple):
    name: str
    leaf: int
    is_small: bool


def _classes(
    captured: Captured,
    table: Table,
    layouts: Layouts | None,
    rank: int,
    drifting: frozenset[str],
) -> list[ReplicaClass]:
    shared = captured.shared
    tables_of = _tables_of(layouts)
    members: dict[tuple[bool, Hashable], list[_Member]] = {}
    leaves = shared.tensors.items()
    for index, ((name, leaf), row) in enumerate(zip(leaves, table, strict=True)):
        if row.same_as or not leaf.known.size_bytes or name in shared.one_rank:
            continue
        is_buffer = name in shared.buffers
        if is_buffer and name in drifting:
            continue
        where = _replicated_where(row, rank, tables_of.get(name, ()), shared.copies)
        if where is None:
            continue
        at = "" if leaf.known.is_whole else str([*_offset_of(leaf)])
        is_state = leaf.kind == layout.SPLIT or row.sharding is not None
        is_small = (
            not is_state
            and name not in shared.counts
            and leaf.known.size_bytes <= _SMALL_BYTES
        )
        member = _Member(f"{name}{at}", index, is_small)
        members.setdefault((is_buffer, where), []).append(member)
    return [
        _make_class(where, is_buffer, sorted(found), shared.tensors)
        for (is_buffer, where), found in members.items()
    ]


def _tables_of(layouts: Layouts | None) -> dict[str, tuple[int, ...]]:
    """Return which tables name each tensor; nothing if all have one table."""
    found: dict[str, tuple[int, ...]] = {}
    if layouts is not None and len(layouts.tables) > 1:
        for number, table in enumerate(layouts.tables):
            for row in table:
                found[row.name] = (*found.get(row.name, ()), number)
    return found


def _replicated_where(
    row: Row, rank: int, tables: tuple[int, ...], copies: Collection[str]
) -> Hashable | None:
    """Return what is equal for tensors that the same ranks hold; None: no other rank."""
    if row.sharding is None:
        return tables
    coordinate = row.sharding.coordinate_of(rank)
    lengths = row.sharding.mesh.shape
    if coordinate is not None and row.name in copies:
        # Copies on other meshes have the same coordinate there.
        return ("copies", coordinate, lengths)
    if coordinate is None or all(
        index is not None or length == 1
        for index, length in zip(coordinate, lengths, strict=True)
    ):
        return None
    return tuple(row.sharding.mesh.ranks_at(coordinate))


def _offset_of(leaf: Leaf) -> tuple[int, ...]:
    assert leaf.known.box is not None
    return tuple(leaf.known.box.offset)


def _make_class(
    where: Hashable, is_buffer: bool, members: Sequence[_Member], leaves: Mapping[str, Leaf]
) -> ReplicaClass:
    names = [member.name for member in members]
    every = [*leaves.values()]
    kinds = (_kind_of(every[member.leaf]) for member in members)
    # Tensors of other shapes are no replicas: comparing tables refuses them.
    text = "\n".join([repr(where), str(is_buffer), *names, *map(repr, kinds)])
    small: list[int] = []
    large: list[int] = []
    starts, size = [0], 0
    for position, member in enumerate(members):
        leaf_size = every[member.leaf].known.size_bytes
        fits = len(small) < _MOST_SMALL and size + leaf_size <= _MOST_SMALL_BYTES
        if member.is_small and fits:
            small.append(position)
            size += leaf_size
        else:
            large.append(position)
            starts.append(starts[-1] + leaf_size)
    return ReplicaClass(
        xxhash.xxh3_64_digest(text.encode()),
        names,
        [member.leaf for member in members],
        is_buffer,
        small,
        large,
        starts,
    )


def _kind_of(leaf: Leaf) -> tuple[Any, ...]:
    known = leaf.known
    strides = known.memory_of(leaf.tensor).stride() if _is_dense(leaf) else ()
    return known.dtype, known.shape, strides


def _is_dense(leaf: Leaf) -> bool:
    """Tell whether memory has the elements in another order, and nothing else."""
    known = leaf.known
    if known.is_row_major or known.device != "cpu":
        return False
    memory = known.memory_of(leaf.tensor)
    if memory.is_conj() or memory.is_neg():
        return False
    expected = 1
    for stride, length in sorted(zip(memory.stride(), memory.shape, strict=True)):
        if length != 1 and stride != expected:
            return False
        expected *= length
    return True


def _address_of(leaf: Leaf) -> int:
    """Return where the bytes lie that are compared; 0: they must be copied."""
    if leaf.known.address or not _is_dense(leaf):
        return leaf.known.address
    return leaf.known.memory_of(leaf.tensor).data_ptr()


class Report(NamedTuple):
    """Digests of this rank's classes.

    Attributes:
        classes: Which.
        digests: One each.
    """

    classes: list[ReplicaClass]
    digests: list[bytes]

    @property
    def packed(self) -> bytes:
        """The keys and digests, one class after the other."""
        pairs = zip(self.classes, self.digests, strict=True)
        return b"".join(
            _PACKED.pack(one.key, digest, len(one.names)) for one, digest in pairs
        )


def unpacked(packed: bytes) -> Iterator[tuple[bytes, bytes, int]]:
    """Walk what ``Report.packed`` holds: keys, digests, numbers of tensors."""
    return _PACKED.iter_unpack(packed)


def report_all(captured: Captured, classes: list[ReplicaClass]) -> Report:
    """Digest everything."""
    return Report(classes, [_all_of(captured, one) for one in classes])


def _all_of(captured: Captured, one: ReplicaClass) -> bytes:
    return xxhash.xxh3_128_digest(b"".join(leaf_digests(captured, one)))


def leaf_digests(captured: Captured, one: ReplicaClass) -> list[bytes]:
    """Digest each tensor of a class, in order."""
    every = [*captured.shared.tensors.values()]
    leaves = [every[index] for index in one.indexes]
    digests: list[bytes | None] = [_host_digest(leaf) for leaf in leaves]
    on_device = [at for at, digest in enumerate(digests) if digest is None]
    sums = _device_digests([leaves[at] for at in on_device])
    for at, digest in zip(on_device, sums, strict=True):
        digests[at] = digest
    return [digest for digest in digests if digest is not None]


def report_sampled(
    captured: Captured,
    classes: list[ReplicaClass],
    turn: int,
    is_new: Callable[[ReplicaClass], bool] = lambda _: False,
) -> Report:
    """Digest what is small, and blocks of all else that change from save to save.

    Args:
        captured: What this rank has to save.
        classes: Its classes.
        turn: Number of the save: after ``num_turns`` of them every byte has had its turn.
        is_new: Tells of which classes everything is to be compared.
    """
    every = [*captured.shared.tensors.values()]
    digests = [
        _all_of(captured, one) if is_new(one) else _sampled(every, one, turn)
        for one in classes
    ]
    return Report(classes, digests)


def num_turns(one: ReplicaClass) -> int:
    """Return after how many saves each block of a class has been compared."""
    total = one.starts[-1]
    num_blocks = -(-total // _BLOCK_BYTES)
    # A block of many small tensors takes longer than one of a large one.
    pieces_of_block = 1 + len(one.large) * _BLOCK_BYTES / max(total, 1)
    blocks_a_save = min(max(int(_MOST_PIECES / pieces_of_block), 1), _BLOCKS)
    return max(-(-num_blocks // blocks_a_save), 1)


def _sampled(every: Sequence[Leaf], one: ReplicaClass, turn: int) -> bytes:
    digest = xxhash.xxh3_128()
    device: list[torch.Tensor] = []
    for at in one.small:
        leaf = every[one.indexes[at]]
        _add_range(digest, device, leaf, 0, leaf.known.size_bytes)
    for at, start, stop in _blocks(one, turn):
        _add_range(digest, device, every[one.indexes[at]], start, stop)
    if device:
        # One copy to the host for all of them.
        digest.update(torch.stack(device).cpu().numpy().tobytes())
    return digest.digest()


def _blocks(one: ReplicaClass, turn: int) -> Iterator[tuple[int, int, int]]:
    """Walk the parts of tensors whose turn it is: position, first byte, end.

    They are spread evenly, and begin one block later at each save.
    """
    total, turns = one.starts[-1], num_turns(one)
    for number in range(turn % turns, -(-total // _BLOCK_BYTES), turns):
        first, last = number * _BLOCK_BYTES, min((number + 1) * _BLOCK_BYTES, total)
        position = bisect_right(one.starts, first) - 1
        while first < last:
            begins, ends = one.starts[position], one.starts[position + 1]
            stop = min(last, ends)
            yield one.large[position], first - begins, stop - begins
            first, position = stop, position + 1


def _add_range(
    digest: Any, device: list[torch.Tensor], leaf: Leaf, start: int, stop: int
) -> None:
    known = leaf.known
    address = _address_of(leaf)
    if address:
        digest.update(window(address + start, stop - start))
    elif known.device != "cpu" and known.is_row_major:
        memory = tensors.flat_bytes(known.memory_of(leaf.tensor))
        device.append(positional_sum(memory[start:stop]))
    else:
        # Strided: only a copy has its bytes in order.
        assert known.box is not None
        digest.update(tensors.box_bytes(leaf.tensor, known.box)[start:stop])


def _host_digest(leaf: Leaf) -> bytes | None:
    known = leaf.known
    address = _address_of(leaf)
    if address:
        return xxhash.xxh3_64_digest(window(address, known.size_bytes))
    if known.device != "cpu" and known.is_row_major:
        return None
    assert known.box is not None
    return xxhash.xxh3_64_digest(tensors.box_bytes(leaf.tensor, known.box))


def _device_digests(leaves: Sequence[Leaf]) -> list[bytes]:
    if not leaves:
        return []
    sums = [
        positional_sum(tensors.flat_bytes(leaf.known.memory_of(leaf.tensor)))
        for leaf in leaves
    ]
    # One copy to the host for all of them.
    found = torch.stack(sums).cpu().tolist()
    return [value.to_bytes(LEAF_DIGEST_BYTES, "little", signed=True) for value in found]


def positional_sum(data: torch.Tensor) -> torch.Tensor:
    """Sum bytes, each 8 as an integer that is mixed with its position, modulo 2**64.

    On the device that has them, with bounded memory. Mixed as in splitmix64 (Steele, Lea
    and Flood, 2014), so that changes do not cancel out: of an XOR, or of a sum of products,
    two changes of the highest bits would.

    Args:
        data: Bytes, contiguous.

    Returns:
        One int64 on the same device.
    """
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    num_whole = data.numel() // 8 * 8
    for start in range(0, num_whole, 8 * _CHUNK):
        part = data[start : min(start + 8 * _CHUNK, num_whole)]
        # An unaligned view would be refused; a copy of the part is not.
        aligned = part if part.data_ptr() % 8 == 0 else part.clone()
        total += _mixed(aligned.view(torch.int64), start // 8).sum()
    if num_whole < data.numel():
        rest = torch.zeros(8, dtype=torch.uint8, device=data.device)
        rest[: data.numel() - num_whole] = data[num_whole:]
        total += _mixed(rest.view(torch.int64), num_whole // 8)[0]
    return total + data.numel()


def _mixed(numbers: torch.Tensor, first: int) -> torch.Tensor:
    positions = torch.arange(
        first + 1, first + 1 + numbers.numel(), dtype=torch.int64, device=numbers.device
    )
    # Twice: a position and a number must not make up for each other.
    mixed = _finalized(positions.mul_(-7046029254386353131))
    return _finalized(mixed.bitwise_xor_(numbers).add_(_SALT))


def _finalized(values: torch.Tensor) -> torch.Tensor:
    for shift, factor in (
        (30, -4658895280553007687),
        (27, -7723592293110705685),
        (31, 1),
    ):
        # int64 is shifted with its sign, which the mask takes off.
        shifted = (values >> shift).bitwise_and_((1 << (64 - shift)) - 1)
        values = values.bitwise_xor_(shifted).mul_(factor)
    return values
