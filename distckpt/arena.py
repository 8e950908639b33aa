"""Host memory that snapshots live in, kept from save to save."""

from __future__ import annotations

import ctypes
from contextlib import suppress

import torch

_HUGE_BYTES = 2 * 2**20
_MADV_HUGEPAGE = 14
# Headers may grow a little from save to save.
_SLACK_BYTES = 2**20
# What is kept may be larger than what is needed by a twentieth and this.
_SPARE_BYTES = 60 * 2**20


class Arena:
    """One stretch of memory, at an address that direct writes can begin at.

    New memory is slow: the system clears every page of it at the first touch. So it is
    kept from save to save. The first copy touches it: to do so before would be a second
    pass over all of it, and the caller of a lazy save would wait for that. In huge pages,
    where the system allows them, a direct write finds its way from addresses to memory with
    a quarter of the processor time.

    Args:
        size_bytes: How much is needed; there will be a little more.
        pinned: Whether a CUDA device copies to it.

    Attributes:
        bytes: The memory; what it holds at first is undefined.
    """

    def __init__(self, size_bytes: int, pinned: bool) -> None:
        self.pinned = pinned
        size_bytes += _SLACK_BYTES
        with torch.inference_mode(False):
            memory = torch.empty(
                size_bytes + _HUGE_BYTES, dtype=torch.uint8, device="cpu", pin_memory=pinned
            )
        start = -memory.data_ptr() % _HUGE_BYTES
        self.bytes = memory[start : start + size_bytes]
        if not pinned:
            _use_huge_pages(self.bytes)

    def suits(self, size_bytes: int, pinned: bool) -> bool:
        """Tell whether it will do for a snapshot, and is not far too large."""
        has = self.bytes.numel()
        return size_bytes <= has <= size_bytes + size_bytes // 20 + _SPARE_BYTES and (
            self.pinned or not pinned
        )


def _use_huge_pages(memory: torch.Tensor) -> None:
    # Advice: what comes of it is the system's own business.
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(memory.data_ptr()),
            ctypes.c_size_t(memory.numel() // _HUGE_BYTES * _HUGE_BYTES),
            ctypes.c_int(_MADV_HUGEPAGE),
        )
