"""Bytes get to a device through little memory of the host, verified, in their places."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from test_shard_file import entry_of, write
from unit_helpers import flip_bit, open_shard_at

from distckpt import ring as ring_module
from distckpt.errors import ChecksumError
from distckpt.ring import Ring

HOST = torch.device("cpu")


def write_arrays(path, sizes):
    """Write a file with an entry of random bytes of each size; returns these."""
    random = np.random.default_rng(len(sizes))
    arrays = {
        f"t{index}": random.integers(0, 256, size, dtype=np.uint8)
        for index, size in enumerate(sizes)
    }
    write(path, [entry_of(name, array) for name, array in arrays.items()])
    return arrays


def targets_for(arrays):
    return {
        name: torch.zeros(len(array), dtype=torch.uint8) for name, array in arrays.items()
    }


def read_all(path, targets, ring):
    with open_shard_at(path) as reader:
        entries = reader.header.entries.values()
        ring.read(reader, [(stored, targets[stored.name]) for stored in entries])
        ring.wait()
        return reader.header.block_bytes


@settings(max_examples=examples(25), deadline=None)
@given(
    sizes=st.lists(
        st.sampled_from([1, 7, 1000, 131_071, 131_072, 131_073, 400_000, 1_000_000]),
        min_size=1,
        max_size=8,
    ),
    stretch=st.sampled_from([1, 131_072, 300_000, 1 << 20]),
)
def test_entries_of_any_size_arrive_whole(tmp_path_factory, sizes, stretch):
    """Shorter than a block, longer than a stretch, and many that share one."""
    path = tmp_path_factory.mktemp("ring") / "f.safetensors"
    arrays = write_arrays(path, sizes)
    targets = targets_for(arrays)
    read_all(path, targets, Ring(HOST, stretch))
    for name, array in arrays.items():
        assert np.array_equal(targets[name].numpy(), array), name


def test_one_ring_reads_file_after_file(tmp_path):
    """Its memory is used again."""
    ring = Ring(HOST, 200_000)
    for index in range(3):
        path = tmp_path / f"{index}.safetensors"
        arrays = write_arrays(path, [50_000] * (index + 3) + [300_000])
        targets = targets_for(arrays)
        read_all(path, targets, ring)
        assert all(np.array_equal(targets[n].numpy(), a) for n, a in arrays.items())


@pytest.mark.parametrize("at", [-1, -700_000])
def test_wrong_byte_is_found_before_it_is_copied(tmp_path, at):
    """In a small entry, and in a large one."""
    path = tmp_path / "f.safetensors"
    arrays = write_arrays(path, [1_000_000, 1000])
    flip_bit(path, path.stat().st_size + at)
    with pytest.raises(ChecksumError):
        read_all(path, targets_for(arrays), Ring(HOST))


def test_memory_is_that_of_the_stretches(tmp_path, monkeypatch):
    """However much goes through: a device has more memory than its host may have free."""
    allocated = []
    empty = torch.empty

    def counted(*shape, **more):
        memory = empty(*shape, **more)
        allocated.append(memory.nbytes)
        return memory

    path = tmp_path / "f.safetensors"
    arrays = write_arrays(path, [4_000_000, 3_000_000])
    targets = targets_for(arrays)
    monkeypatch.setattr(ring_module.torch, "empty", counted)
    read_all(path, targets, Ring(HOST, 1 << 20))
    assert sum(allocated) == 2 << 20
