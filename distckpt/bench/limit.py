"""What the hardware allows: the same bytes, moved in the plainest ways."""

from __future__ import annotations

import copy
import ctypes
import itertools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from distckpt.bench.contender import FolderPerSave, sync_folder
from distckpt.bench.results import LIMIT_PREFIX
from distckpt.bench.team import Team
from distckpt.bench.workloads import Workload, bytes_of

COPY = f"{LIMIT_PREFIX}copy"
BUFFERED = f"{LIMIT_PREFIX}buffered"
DIRECT = f"{LIMIT_PREFIX}direct"

_CALL_BYTES = 16 << 20
# So little that what is copied by one call stays in the processor's cache.
_SMALL_CALL_BYTES = 128 << 10
_CALLS_AHEAD = 4
_MAX_BUFFERS = 1024
_BLOCK_BYTES = 4096
_RWF_DONTCACHE = 0x80  # Linux 6.14; Python does not name it
_SYNC_FILE_RANGE_WRITE = 2
_MADV_POPULATE_READ = 22  # Linux 5.14; Python does not name it

Batch = list[memoryview]


def batches_of(
    tensors: Sequence[torch.Tensor], call_bytes: int = _CALL_BYTES
) -> list[Batch]:
    """Cut host tensors' own memory into calls of so many bytes and 1024 buffers at most."""
    batches: list[Batch] = []
    room = 0
    for view in map(_view_of, tensors):
        start = 0
        while start < len(view):
            if room == 0 or len(batches[-1]) == _MAX_BUFFERS:
                batches.append([])
                room = call_bytes
            part = view[start : start + room]
            batches[-1].append(part)
            start += len(part)
            room -= len(part)
    return batches


def _view_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(bytes_of(tensor).numpy())  # type: ignore[arg-type]


class Copy:
    """A copy of this rank's share into memory that has been touched before."""

    def __init__(self, workload: Workload) -> None:
        self._workload = workload
        on_cuda = workload.device.type == "cuda"
        self._sources = list(workload.share)
        self._targets = [
            torch.zeros(t.shape, dtype=t.dtype, pin_memory=on_cuda) for t in self._sources
        ]

    def run(self) -> None:
        """Copy, and wait until it is done."""
        with torch.no_grad():
            torch._foreach_copy_(self._targets, self._sources, non_blocking=True)
        self._workload.synchronize()


class RawFile(FolderPerSave):
    """One file a rank with nothing but the bytes of its share.

    Written with ``pwritev`` from the tensors' own memory, of CUDA tensors from a copy in
    host memory that was made before; read into it again in one of the ways of ``READS``.
    """

    def __init__(self, workload: Workload, team: Team, folder: str, method: str) -> None:
        super().__init__(workload, team, folder)
        self.name = LIMIT_PREFIX + method
        self._write = _METHODS[method]
        self._on_host = _on_host(workload)
        self._share_bytes = workload.share_bytes
        self._way = _WAYS["preadv"]
        share = self._share_of(team.rank)
        self._batches = batches_of(share)
        if method == "direct":
            # Aligned memory, filled before: what the device does without any copying.
            self._aligned = mmap.mmap(-1, max(_BLOCK_BYTES, _rounded(self._share_bytes)))
            at = 0
            for view in map(_view_of, share):
                self._aligned[at : at + len(view)] = view
                at += len(view)
            whole = memoryview(self._aligned)
            self._batches = [
                [whole[start : start + _CALL_BYTES]]
                for start in range(0, len(whole), _CALL_BYTES)
            ]

    def reading(self, name: str) -> RawFile:
        """Return one that restores from the same files in another way, of ``READS``."""
        other = copy.copy(self)
        other._way = _WAYS[name.removeprefix(LIMIT_PREFIX)]
        return other

    def save(self) -> None:
        """Write and sync this rank's file."""
        folder = self.next_folder()
        path = os.path.join(folder, f"rank{self.team.rank}")
        flags = os.O_DIRECT if self.name == DIRECT else 0
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | flags, 0o644)
        try:
            self._write(fd, self._batches)
            os.ftruncate(fd, self._share_bytes)
            os.fsync(fd)
        finally:
            os.close(fd)
        sync_folder(folder)

    def load(self) -> None:
        """Read the files of all ranks whose bytes this one holds."""
        ranks = [self.team.rank]
        if self.workload.replicated:
            # Its own first: so the ranks together read each byte from the device once.
            count = self.team.world_size
            ranks = [(self.team.rank + number) % count for number in range(count)]
        for rank in ranks:
            path = os.path.join(self.newest, f"rank{rank}")
            fd = os.open(path, os.O_RDONLY | self._way.flags)
            try:
                batches = batches_of(self._share_of(rank), self._way.call_bytes)
                self._way.read(fd, batches)
            finally:
                os.close(fd)
        if self.workload.device.type == "cuda":
            with torch.no_grad():
                torch._foreach_copy_(self.workload.local, self._on_host, non_blocking=True)
            self.workload.synchronize()

    def _share_of(self, rank: int) -> list[torch.Tensor]:
        if self.workload.replicated:
            return self._on_host[rank :: self.team.world_size]
        return self._on_host


def _on_host(workload: Workload) -> list[torch.Tensor]:
    if workload.device.type != "cuda":
        return workload.local
    return [tensor.cpu().pin_memory() for tensor in workload.local]


def _rounded(size_bytes: int) -> int:
    return -(-size_bytes // _BLOCK_BYTES) * _BLOCK_BYTES


def _calls(
    fd: int, batches: Sequence[Batch], call: Callable[[int, Batch, int], int]
) -> Iterator[tuple[int, int]]:
    """Move all batches; yield the range that each has taken in the file."""
    at = 0
    for batch in batches:
        start = at
        left = batch
        while left:
            moved = call(fd, left, at)
            if moved <= 0:
                msg = f"the file ended at {at}"
                raise EOFError(msg)
            at += moved
            left = _rest(left, moved)
        yield start, at - start


def _rest(batch: Batch, moved: int) -> Batch:
    for number, part in enumerate(batch):
        if moved < len(part):
            return [part[moved:], *batch[number + 1 :]]
        moved -= len(part)
    return []


def _read(fd: int, batches: Sequence[Batch]) -> None:
    for _ in _calls(fd, batches, os.preadv):
        pass


def _read_in_order(fd: int, batches: Sequence[Batch]) -> None:
    os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
    _read(fd, batches)


def _read_ahead(fd: int, batches: Sequence[Batch]) -> None:
    ahead = 0
    for _, at in itertools.chain([(0, 0)], _ranges(fd, batches)):
        while ahead < at + _CALLS_AHEAD * _CALL_BYTES:
            os.posix_fadvise(fd, ahead, _CALL_BYTES, os.POSIX_FADV_WILLNEED)
            ahead += _CALL_BYTES


def _ranges(fd: int, batches: Sequence[Batch]) -> Iterator[tuple[int, int]]:
    """Read all batches; yield where in the file each has begun and ended."""
    for start, length in _calls(fd, batches, os.preadv):
        yield start, start + length


def _read_direct(fd: int, batches: Sequence[Batch]) -> None:
    """Read past the page cache: into aligned memory, and copy from there."""
    at = have = used = 0
    with mmap.mmap(-1, _CALL_BYTES) as aligned, memoryview(aligned) as memory:
        for part in itertools.chain.from_iterable(batches):
            done = 0
            while done < len(part):
                if used == have:
                    used, have = 0, os.preadv(fd, [memory], at)
                    if have <= 0:
                        msg = f"the file ended at {at}"
                        raise EOFError(msg)
                    at += have
                count = min(len(part) - done, have - used)
                part[done : done + count] = memory[used : used + count]
                done += count
                used += count


def _copy_mapped(fd: int, batches: Sequence[Batch]) -> None:
    _copy_from_map(fd, batches, is_populated=False)


def _copy_populated(fd: int, batches: Sequence[Batch]) -> None:
    _copy_from_map(fd, batches, is_populated=True)


def _copy_from_map(fd: int, batches: Sequence[Batch], is_populated: bool) -> None:
    at = ahead = 0
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as source:
        for part in itertools.chain.from_iterable(batches):
            while is_populated and ahead < at + len(part):
                # All pages of a stretch at once, in place of a fault for every few.
                length = min(_CALL_BYTES, len(mapped) - ahead)
                mapped.madvise(_MADV_POPULATE_READ, ahead, length)
                ahead += length
            with source[at : at + len(part)] as there:
                part[:] = there
            at += len(part)


def _buffered(fd: int, batches: Sequence[Batch]) -> None:
    for _ in _calls(fd, batches, os.pwritev):
        pass


def _sync_file_range(fd: int, batches: Sequence[Batch]) -> None:
    function = ctypes.CDLL(None, use_errno=True).sync_file_range
    function.argtypes = [ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint]
    for start, length in _calls(fd, batches, os.pwritev):
        if function(fd, start, length, _SYNC_FILE_RANGE_WRITE) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))


def _dontcache(fd: int, batches: Sequence[Batch]) -> None:
    def call(fd: int, batch: Batch, at: int) -> int:
        return os.pwritev(fd, batch, at, _RWF_DONTCACHE)

    for _ in _calls(fd, batches, call):
        pass


_METHODS: dict[str, Callable[[int, Sequence[Batch]], None]] = {
    "buffered": _buffered,
    "sync-file-range": _sync_file_range,
    "dontcache": _dontcache,
    "direct": _buffered,
}
METHODS = tuple(_METHODS)


class _Way(NamedTuple):
    """One way of reading.

    Attributes:
        read: Fills buffers from a file.
        call_bytes: How much at a time.
        flags: To open the file with.
    """

    read: Callable[[int, Sequence[Batch]], None]
    call_bytes: int = _CALL_BYTES
    flags: int = 0


_WAYS = {
    "preadv": _Way(_read),
    "preadv-small": _Way(_read_in_order, _SMALL_CALL_BYTES),
    "preadv-ahead": _Way(_read_ahead),
    "preadv-direct": _Way(_read_direct, flags=getattr(os, "O_DIRECT", 0)),
    "mmap": _Way(_copy_mapped),
    "mmap-populate": _Way(_copy_populated),
}
READS = tuple(LIMIT_PREFIX + way for way in _WAYS)
READ_DIRECT = f"{LIMIT_PREFIX}preadv-direct"
