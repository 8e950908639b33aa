"""Outcomes that the disk would not tell: said to be unknown, and known at the next save."""

from __future__ import annotations

import os

import pytest
from harness import run_ranks, values_of

from distckpt import Checkpoint, CheckpointManager, OutcomeUnknown, StorageError
from distckpt.storage import posix


def _fail_one_sync_of_the_records():
    """Let the next fsync of the records' directory fail, after the record is linked."""
    sync = posix.sync_directory

    def fail(path):
        if os.path.basename(path) != ".state":
            return sync(path)
        posix.sync_directory = sync
        raise StorageError("fsync: Input/output error", operation="fsync", path=path)

    posix.sync_directory = fail


def _save_with_an_unknown_outcome(rank, directory):
    checkpoint = Checkpoint(seed=0)
    seen = []
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        manager.save()
        if rank == 0:
            _fail_one_sync_of_the_records()
        with pytest.raises(OutcomeUnknown, match="does not say"):
            manager.save()
        seen.append((manager.checkpoints, checkpoint.save_counter))
        seen.append(manager.save())
        seen.append((manager.checkpoints, manager.latest_checkpoint))
    return seen


@pytest.mark.parametrize("world_size", [1, 2])
def test_an_unknown_commit_is_known_to_all_ranks_at_the_next_save(tmp_path, world_size):
    """The record was there after all: every rank lists its checkpoint, none is lost."""
    directory = str(tmp_path / "run")
    one, *others = values_of(
        run_ranks(_save_with_an_unknown_outcome, world_size, directory)
    )
    assert all(other == one for other in others)
    paths = [os.path.join(directory, f"ckpt-{number}") for number in (1, 2, 3)]
    assert one == [(paths[:1], 2), paths[2], (paths, paths[2])]
