"""Fixtures of the crash tests: a fast scratch directory, a power switch."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))
# Real ranks are the business of the tests in another folder.
sys.path.append(os.path.join(os.path.dirname(__file__), "..", "multiprocess"))

from power import EXT4, LOG_LOST, XFS, NoPowerSwitch, mounted_disk

_MEMORY = "/dev/shm"


@contextmanager
def _empty_directory(otherwise: Path) -> Iterator[str]:
    if not os.access(_MEMORY, os.W_OK):
        yield str(otherwise)
        return
    directory = tempfile.mkdtemp(prefix="distckpt-crash-", dir=_MEMORY)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[str]:
    """Make an empty directory, in memory where there is one: crash points are many."""
    with _empty_directory(tmp_path) as directory:
        yield directory


@pytest.fixture(scope="module")
def shared_scratch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Make one for all tests of a module."""
    with _empty_directory(tmp_path_factory.mktemp("shared")) as directory:
        yield directory


@pytest.fixture
def power_switch(tmp_path: Path) -> None:
    """Skip where no disk can be mounted whose power can be cut."""
    _cut_power(tmp_path, EXT4)


@pytest.fixture
def power_switches(tmp_path: Path) -> None:
    """Skip where that is not possible with each kind of filesystem."""
    for kind in (EXT4, XFS):
        _cut_power(tmp_path, kind)


def _cut_power(folder: Path, kind: str) -> None:
    image, path = str(folder / f"{kind}-image"), str(folder / f"{kind}-mounted")
    try:
        with mounted_disk(image, path, kind) as disk:
            disk.cut(LOG_LOST)
    except (NoPowerSwitch, OSError) as error:
        pytest.skip(str(error))
