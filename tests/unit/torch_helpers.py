"""What the tests of tracked objects share: save here, restore into fresh objects there."""

from __future__ import annotations

import copy
import os

import torch
from safetensors.torch import load_file

from distckpt import Checkpoint, CheckpointManager, paths, readers


def save(directory, **objects):
    """Save objects as a job of one process does; returns the checkpoint's path."""
    checkpoint = Checkpoint(**objects)
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        return manager.save()


def restore(directory, **objects):
    """Restore the newest checkpoint into objects; returns their ``Checkpoint``."""
    checkpoint = Checkpoint(**objects)
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        assert manager.restore_or_initialize() is not None
    return checkpoint


def round_trip(directory, saved, live):
    """Save the objects of one dict, restore into those of another."""
    save(directory, **saved)
    return restore(directory, **live)


def raw(tensor):
    """Return a tensor's bytes, row-major, through views and contiguous copies alone."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def assert_same(found, expected):
    """Fail unless two trees are equal in type, shape, dtype and every bit."""
    if isinstance(expected, torch.Tensor):
        assert isinstance(found, torch.Tensor)
        assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
        assert raw(found) == raw(expected)
    elif isinstance(expected, dict):
        assert type(found) is type(expected)
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert_same(found[key], value)
    elif isinstance(expected, (list, tuple)):
        assert type(found) is type(expected)
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    else:
        assert type(found) is type(expected)
        assert found == expected or (found != found and expected != expected)


def manifest_of(path):
    """Return the manifest of the checkpoint at a path."""
    located = readers.locate(path)
    return readers.read_manifest(located.directory, located.manifest_digest)


def rows_of(path):
    """Return the rows of a checkpoint's tensors, by name."""
    return dict(manifest_of(path).assignment.rows)


def stored(path, rank=0, world_size=1):
    """Return what the official safetensors package finds in a rank's shard file."""
    directory = str(readers.locate(path).directory)
    return load_file(os.path.join(directory, paths.shard_file(rank, world_size)))


def snapshot(value):
    """Copy a state dict, so that what is trained later does not change it."""
    return copy.deepcopy(value)
