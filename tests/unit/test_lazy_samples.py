"""Lazy staging sees changes that torch does not count."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch
from torch import nn

import distckpt
from distckpt import Checkpoint, CheckpointManager, CheckpointOptions, SaveFailed, snapshot
from distckpt.boxes import whole
from distckpt.known import KnownTensor
from distckpt.leaves import Leaf
from distckpt.own_file import Move

_LAZY = CheckpointOptions(enable_async=True, staging="lazy")


def _clamp(model):
    for parameter in model.parameters():
        parameter.data.clamp_(-0.01, 0.01)


def _numpy(model):
    model.weight.detach().numpy()[...] += 1


def _memory(model):
    data = model.bias.detach()
    ctypes.memset(data.data_ptr(), 7, data.numel() * 4)


def _average(model):
    model.weight.data.mul_(0.9).add_(torch.ones(()), alpha=0.1)


@pytest.fixture
def held(monkeypatch):
    """Let the copy begin only when it is told to: large models take as long."""
    gate, copy_rest = threading.Event(), snapshot.Snapshot.copy_rest

    def slow(self):
        gate.wait(20)
        return copy_rest(self)

    monkeypatch.setattr(snapshot.Snapshot, "copy_rest", slow)
    return gate


def _saved(run_dir, size, change, held):
    torch.manual_seed(0)
    model = nn.Linear(size, size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model(torch.ones(1, size)).sum().backward()
    optimizer.step()
    checkpoint = Checkpoint(model=model, optimizer=optimizer)
    with CheckpointManager(checkpoint, run_dir, 2) as manager:
        expected = model.weight.detach().clone()
        manager.save(options=_LAZY)
        if change is not None:
            change(model)
        held.set()
        manager.sync()
        with distckpt.open(manager.latest_checkpoint) as opened:
            return torch.equal(opened["model/weight"].torch(), expected)


@pytest.mark.parametrize("size", [8, 128], ids=["small", "large"])
@pytest.mark.parametrize("change", [_clamp, _numpy, _memory, _average])
def test_change_that_torch_does_not_count_fails_the_save(run_dir, size, change, held):
    """Else weights of one step would be committed with moments of another."""
    with pytest.raises(
        SaveFailed, match=r"model/(weight|bias).* changed before being copied"
    ):
        _saved(run_dir, size, change, held)


def test_save_that_nobody_disturbs_is_committed(run_dir, held):
    """The samples agree."""
    assert _saved(run_dir, 128, None, held)


def test_change_after_the_copy_is_none(run_dir):
    """What is compared is the copy, not the tensor."""
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    checkpoint = Checkpoint(model=model, optimizer=optimizer)
    with CheckpointManager(checkpoint, run_dir, 2) as manager:
        manager.save(options=_LAZY)
        manager.wait_staged()
        _clamp(model)
        manager.sync()
        assert manager.latest_checkpoint


def _move(tensor, position):
    known = KnownTensor(tensor, "w")
    leaf = Leaf(tensor, known, "split", known.identity)
    size = tensor.numel() * tensor.element_size()
    return Move("w", leaf, whole(tuple(tensor.shape)), None, position, size)


def test_samples_of_a_device_are_those_of_the_host():
    """Made by the device's own operations; here on memory of the host."""
    tensors = [torch.randn(10), torch.randn(5000), torch.randn(64, 64).t().contiguous()]
    moves, position = [], 0
    for tensor in tensors:
        moves.append(_move(tensor, position))
        position += moves[-1].size_bytes
    on_host = [
        move._replace(
            memory=(ctypes.c_char * move.size_bytes).from_address(
                move.leaf.tensor.data_ptr()
            )
        )
        for move in moves
    ]
    assert [*snapshot.DeviceSamples(moves).taken()] == [*snapshot.samples_of(on_host)]
    assert [*snapshot.DeviceSamples([]).taken()] == []
