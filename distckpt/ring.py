"""Host memory through which bytes get to a device: filled and copied on in turns.

The memory of a device cannot be read into. By way of a host copy of each tensor, a restore
would need as much memory as its largest one has, and either the disk or the device would
always wait. So what is read goes through a few stretches of (pinned) host memory: while one
is copied to the device, the next is filled.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from distckpt.shard_file import Part, ShardReader
from distckpt.shard_header import Stored

_STRETCH_BYTES = 16 * 2**20
_NUM_STRETCHES = 2


class Ring:
    """Reads entries of shard files into the memory of one device.

    Copies are put into the current stream, so whatever the caller puts there later finds
    them done.

    Args:
        device: The device; any kind.
        stretch_bytes: How much is copied by turns, unless a block is larger.
    """

    def __init__(self, device: torch.device, stretch_bytes: int = _STRETCH_BYTES) -> None:
        self._device = device
        self._is_cuda = device.type == "cuda"
        self._stretch_bytes = stretch_bytes
        self._stretches: list[torch.Tensor] = []
        self._copied: list[torch.cuda.Event | None] = []
        self._index = self._used = 0
        # Of what is gathered in the present stretch: what is to be read, and where it goes.
        self._parts: list[Part] = []
        self._copies: list[tuple[torch.Tensor, torch.Tensor]] = []

    def read(
        self, reader: ShardReader, entries: Iterable[tuple[Stored, torch.Tensor]]
    ) -> None:
        """Read entries of one file, verifying every block.

        Args:
            reader: The file.
            entries: In file order, each with as many bytes on the device, in one dimension.

        Raises:
            ChecksumError, ShardFileError, StorageError: See ``ShardReader.read_into``.
        """
        block = reader.header.block_bytes
        self._reserve(max(self._stretch_bytes, block))
        step = self._stretches[0].numel() // block * block
        for stored, target in entries:
            if stored.size_bytes <= block:
                memory = self._take(reader, stored.size_bytes)
                self._parts.append(Part(stored, memory.numpy().data))
                self._copies.append((memory, target))
                continue
            for start in range(0, stored.size_bytes, step):
                size = min(step, stored.size_bytes - start)
                memory = self._take(reader, size)
                reader.read_into(stored, start, memory.numpy().data)
                self._copies.append((memory, target[start : start + size]))
        self._flush(reader)

    def wait(self) -> None:
        """Wait until all copies are done."""
        for copied in self._copied:
            if copied is not None:
                copied.synchronize()

    def _reserve(self, stretch_bytes: int) -> None:
        if self._stretches and self._stretches[0].numel() >= stretch_bytes:
            return
        self.wait()
        with torch.inference_mode(False):
            self._stretches = [
                torch.empty(stretch_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)
                for _ in range(_NUM_STRETCHES)
            ]
        self._copied = [None] * _NUM_STRETCHES
        self._used = 0

    def _take(self, reader: ShardReader, size_bytes: int) -> torch.Tensor:
        """Return so many bytes of the present stretch, or of the next one."""
        if self._used + size_bytes > self._stretches[0].numel():
            self._flush(reader)
            self._index = (self._index + 1) % _NUM_STRETCHES
            self._used = 0
            copied = self._copied[self._index]
            if copied is not None:
                copied.synchronize()
        start = self._used
        self._used += size_bytes
        return self._stretches[self._index][start : start + size_bytes]

    def _flush(self, reader: ShardReader) -> None:
        """Read what is gathered, and have all of it copied."""
        reader.read_entries(self._parts)
        with torch.no_grad():
            for memory, target in self._copies:
                target.copy_(memory, non_blocking=self._is_cuda)
        self._parts, self._copies = [], []
        if self._is_cuda:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            # Of this device: the thread's current one may be another.
            event.record(torch.cuda.current_stream(self._device))
            self._copied[self._index] = event
