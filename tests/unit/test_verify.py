"""Every fault of a checkpoint is found and named, and none of them raises."""

from __future__ import annotations

import os

import pytest
from unit_helpers import ARRAYS, flip_bit, make_saved

from distckpt import state
from distckpt.errors import UnsafeCheckpointError
from distckpt.readers import locate, read_manifest
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.verify import verify_attempt


@pytest.fixture
def saved(run_dir):
    return make_saved(run_dir, 1000)


def verify(saved, digest=None):
    return verify_attempt(AttemptDirectory.at(saved.published), digest)


def test_verify_of_a_whole_checkpoint_finds_nothing(saved):
    """All bytes are read and right."""
    entry = state.read_head(RunDirectory.at(saved.directory)).record.live[0]
    report = verify(saved, entry.manifest)
    assert (report.ok, report.problems, report.foreign) == (True, [], [])


def test_verify_counts_all_files_and_bytes(saved):
    """Each byte of the job's tensors once."""
    report = verify(saved)
    assert (report.num_files, report.size_bytes) == (
        2,
        sum(array.nbytes for array in ARRAYS.values()),
    )


@pytest.mark.parametrize("offset", [4096, 100_000, -1])
def test_verify_finds_a_flipped_bit_with_file_tensor_and_block(saved, offset):
    """One bit anywhere in the data."""
    path = saved.shard(1)
    flip_bit(path, offset % os.path.getsize(path))
    (problem,) = verify(saved).problems
    assert problem.startswith(f"{path}: tensor 'model/")
    assert ", block 0 " in problem or ", block 1 " in problem


@pytest.mark.parametrize("size", [0, 7, 100, 4096, 100_000])
def test_verify_finds_a_truncated_shard(saved, size):
    """Cut off anywhere."""
    os.truncate(saved.shard(0), size)
    (problem,) = verify(saved).problems
    assert problem.startswith(saved.shard(0))


def test_verify_finds_a_missing_shard(saved):
    """The file that is not there is named."""
    os.unlink(saved.shard(0))
    (problem,) = verify(saved).problems
    assert saved.shard(0) in problem


def test_verify_finds_all_faults(saved):
    """Not only the first one."""
    os.unlink(saved.shard(0))
    os.truncate(saved.shard(1), 5000)
    assert len(verify(saved).problems) == 2


def test_verify_finds_a_missing_manifest(saved):
    """An attempt without one was never complete."""
    os.unlink(saved.file("manifest.json"))
    (problem,) = verify(saved).problems
    assert "manifest.json" in problem


def test_verify_finds_another_manifest_than_committed(saved):
    """The chain of trust starts at the record."""
    assert "not the manifest that was committed" in verify(saved, "0" * 32).problems[0]


def test_verify_reports_files_that_do_not_belong(saved):
    """Harmless, but somebody should know."""
    with open(saved.file("notes"), "w"):
        pass
    report = verify(saved)
    assert (report.ok, report.foreign) == (True, [saved.file("notes")])


def test_verify_of_a_missing_directory_is_a_problem(tmp_path):
    """Faults never raise."""
    assert not verify_attempt(AttemptDirectory.at(str(tmp_path / "no")), None).ok


@pytest.mark.parametrize("position", range(0, 1100, 13))
def test_verify_finds_a_flipped_bit_anywhere_in_the_manifest(saved, position):
    """With the record's digest no bit of it goes unnoticed."""
    entry = state.read_head(RunDirectory.at(saved.directory)).record.live[0]
    path = saved.file("manifest.json")
    flip_bit(path, position % os.path.getsize(path))
    assert not verify(saved, entry.manifest).ok


def test_checkpoint_that_is_a_link_is_refused_but_for_who_names_it_himself(saved):
    """By the records it is of the run; a link that a person gives is his own."""
    elsewhere = os.path.join(os.path.dirname(saved.directory), "elsewhere")
    os.rename(saved.published, elsewhere)
    os.symlink(elsewhere, saved.published)
    assert (
        "symbolic link"
        in verify_attempt(AttemptDirectory.at(saved.published), None).problems[0]
    )
    with pytest.raises(UnsafeCheckpointError):
        read_manifest(locate(saved.prefix).directory)
    assert str(locate(saved.published).directory) == elsewhere
    assert verify_attempt(locate(saved.published).directory, None).ok
