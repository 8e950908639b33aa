"""What is made for others is whole when it has its name, and never replaces anything."""

from __future__ import annotations

import os

import pytest

from distckpt.errors import ConfigError, StorageError
from distckpt.formats.placing import Placing
from distckpt.storage import posix


def make_file(path):
    posix.write_new_file(path, b"x")


def make_directory(path):
    os.mkdir(path)
    make_file(os.path.join(path, "inside"))


@pytest.mark.parametrize("make", [make_file, make_directory])
def test_placing_gives_the_name_at_the_end(tmp_path, make):
    """Nothing else is left beside it."""
    target = str(tmp_path / "new" / "parents" / "target")
    with Placing(target) as placing:
        make(placing.path)
        assert not os.path.exists(target)
    assert os.listdir(os.path.dirname(target)) == ["target"]


@pytest.mark.parametrize("make", [make_file, make_directory])
def test_placing_after_an_error_leaves_nothing(tmp_path, make):
    """Ctrl-C included."""
    with pytest.raises(KeyboardInterrupt), Placing(str(tmp_path / "target")) as placing:
        make(placing.path)
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [make_file, make_directory])
def test_placing_never_replaces_what_is_there(tmp_path, make):
    """Neither at the start, nor what somebody has made meanwhile."""
    target = str(tmp_path / "target")
    make(target)
    with pytest.raises(ConfigError, match="is not replaced"), Placing(target):
        pass
    os.rename(target, target + ".moved")
    with pytest.raises(StorageError, match="target"), Placing(target) as placing:
        make(placing.path)
        make(target)
    assert sorted(os.listdir(tmp_path)) == ["target", "target.moved"]


def test_rename_new_without_help_of_the_system_looks_first(tmp_path, monkeypatch):
    """Older systems have no rename that fails if the name exists."""
    monkeypatch.setattr(posix, "_LIBC", object())
    source, target = str(tmp_path / "source"), str(tmp_path / "target")
    make_file(source)
    posix.rename_new(source, target)
    make_file(source)
    with pytest.raises(StorageError, match="File exists"):
        posix.rename_new(source, target)
