"""The memory that snapshots live in: where it begins, how large it is, when it is kept."""

from __future__ import annotations

import pytest
import torch

from distckpt.arena import Arena
from distckpt.storage import posix

_MIB = 2**20


@pytest.mark.parametrize("size", [0, 1, 4096, 3 * _MIB + 7, 64 * _MIB])
def test_arena_has_what_is_asked_for_at_an_address_for_direct_writes(size):
    """All of it can be written, and it is hardly more than that."""
    memory = Arena(size, False).bytes
    assert memory.numel() >= size
    assert memory.untyped_storage().nbytes() <= size + 4 * _MIB
    assert memory.data_ptr() % posix.DIRECT_BYTES == 0
    memory.fill_(7)
    assert int(memory[-1]) == 7


def test_arena_made_under_any_mode_can_be_used_under_any_other():
    """The caller's modes and default device do not decide."""
    with torch.inference_mode(), torch.device("meta"):
        memory = Arena(100, False).bytes
    assert memory.device.type == "cpu"
    memory.view(torch.int32)[:3].copy_(torch.ones(3, dtype=torch.int32))


@pytest.mark.parametrize(
    ("had", "needed", "suits"),
    [
        (100, 100, True),
        (100, 101, True),  # within the slack
        (100, 102, False),
        (300, 250, True),
        (300, 200, False),
        (1100, 1000, True),
        (1200, 1000, False),
        (40, 0, True),
    ],
)
def test_arena_is_kept_while_it_is_neither_too_small_nor_far_too_large(had, needed, suits):
    """At most a twentieth and 64 MiB more than what is saved; sizes in MiB."""
    arena = Arena(had * _MIB // 16, False)
    # A sixteenth of the memory, as seen by the rule.
    arena.bytes = _Sized((had + 1) * _MIB)
    assert arena.suits(needed * _MIB, False) is suits
    assert not suits or arena.bytes.numel() <= 1.05 * needed * _MIB + 64 * _MIB


class _Sized:
    """Stands in for memory where only its size counts."""

    def __init__(self, size):
        self._size = size

    def numel(self):
        return self._size


def test_arena_that_is_not_pinned_does_not_suit_a_device():
    """But one that is pinned suits the host."""
    arena = Arena(100, False)
    assert arena.suits(100, False) and not arena.suits(100, True)
    arena.pinned = True
    assert arena.suits(100, False) and arena.suits(100, True)
