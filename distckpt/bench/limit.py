"""What the hardware allows: the same bytes, moved in the plainest ways."""

from __future__ import annotations

import copy
import ctypes
import itertools
import mmap
import os
from collections.abc import Callable, Iterator, Sequence

import torch

from distckpt.bench.contender import FolderPerSave, sync_folder
from distckpt.bench.results import LIMIT_PREFIX
from distckpt.bench.team import Team
from distckpt.bench.workloads import Workload, bytes_of

COPY = f"{LIMIT_PREFIX}copy"
READ = f"{LIMIT_PREFIX}preadv"
MAPPED = f"{LIMIT_PREFIX}mmap"
BUFFERED = f"{LIMIT_PREFIX}buffered"

_CALL_BYTES = 16 << 20
_MAX_BUFFERS = 1024
_BLOCK_BYTES = 4096
_RWF_DONTCACHE = 0x80  # Linux 6.14; Python does not name it
_SYNC_FILE_RANGE_WRITE = 2

Batch = list[memoryview]


def batches_of(tensors: Sequence[torch.Tensor]) -> list[Batch]:
    """Cut host tensors' own memory into calls of at most 16 MiB and 1024 buffers."""
    batches: list[Batch] = []
    room = 0
    for view in map(_view_of, tensors):
        start = 0
        while start < len(view):
            if room == 0 or len(batches[-1]) == _MAX_BUFFERS:
                batches.append([])
                room = _CALL_BYTES
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
    host memory that was made before; read with ``preadv`` into it, or mapped and copied.
    """

    def __init__(self, workload: Workload, team: Team, folder: str, method: str) -> None:
        super().__init__(workload, team, folder)
        self.name = LIMIT_PREFIX + method
        self._write = _METHODS[method]
        self._on_host = _on_host(workload)
        self._share_bytes = workload.share_bytes
        self._reads = _read
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

    def mapped(self) -> RawFile:
        """Return one that restores from the same files, mapped."""
        other = copy.copy(self)
        other._reads = _copy_mapped
        return other

    def save(self) -> None:
        """Write and sync this rank's file."""
        folder = self.next_folder()
        path = os.path.join(folder, f"rank{self.team.rank}")
        flags = os.O_DIRECT if self.name == f"{LIMIT_PREFIX}direct" else 0
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
        everybody = range(self.team.world_size)
        for rank in everybody if self.workload.replicated else [self.team.rank]:
            tensors = self._share_of(rank)
            fd = os.open(os.path.join(self.newest, f"rank{rank}"), os.O_RDONLY)
            try:
                self._reads(fd, batches_of(tensors))
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


def _copy_mapped(fd: int, batches: Sequence[Batch]) -> None:
    at = 0
    with mmap.mmap(fd, 0, prot=mmap.PROT_READ) as mapped, memoryview(mapped) as source:
        for part in itertools.chain.from_iterable(batches):
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
