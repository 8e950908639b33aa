"""What a claim tries out before anything depends on it."""

import os

import pytest

from distckpt import paths
from distckpt.errors import StorageError
from distckpt.probe import Probe, check_store
from distckpt.run_directory import RunDirectory
from distckpt.storage import posix
from distckpt.storage.store import Room


def _directory(run_dir):
    os.makedirs(os.path.join(run_dir, paths.RECORDS_DIRECTORY))
    return run_dir


def test_a_rank_that_sees_the_chiefs_file_leaves_nothing(run_dir):
    """A rank writes a file of its own and takes it away again."""
    probe = Probe(RunDirectory.at(_directory(run_dir)), 3, "ab" * 8)
    probe.leave()
    probe.try_on(1)
    assert [n for n in os.listdir(run_dir) if n.startswith(".probe")] == [
        paths.probe_file(3, "ab" * 8, 0)
    ]
    probe.remove()
    assert os.listdir(run_dir) == [paths.RECORDS_DIRECTORY]


def test_a_rank_in_another_directory_says_so(run_dir, tmp_path):
    """A rank that does not see the chief's file has another directory mounted there."""
    Probe(RunDirectory.at(_directory(run_dir)), 1, "ab" * 8).leave()
    with pytest.raises(StorageError, match="not the chief's directory"):
        Probe(RunDirectory.at(str(tmp_path)), 1, "ab" * 8).try_on(1)


def test_a_filesystem_without_hard_links_is_refused(run_dir, monkeypatch):
    """Without links two jobs could commit over each other."""

    def refuse(source, target):
        raise StorageError("link: Operation not supported", operation="link", path=target)

    monkeypatch.setattr(posix, "link", refuse)
    with pytest.raises(StorageError, match="no hard links"):
        check_store(RunDirectory.at(_directory(run_dir)), 1)
    assert os.listdir(os.path.join(run_dir, paths.RECORDS_DIRECTORY)) == []


def test_a_full_filesystem_is_refused(run_dir, monkeypatch):
    """A claim of a full disk would only fail later."""
    monkeypatch.setattr(posix, "room", lambda path: Room(1000, None))
    with pytest.raises(StorageError, match="only 1000 B are free"):
        check_store(RunDirectory.at(_directory(run_dir)), 1)
