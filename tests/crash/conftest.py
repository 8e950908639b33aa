"""Fixtures of the crash tests: a fast scratch directory, a power switch."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))
# Real ranks are the business of the tests in another folder.
sys.path.append(os.path.join(os.path.dirname(__file__), "..", "multiprocess"))

from power import LOG_LOST, NoPowerSwitch, mounted_disk

_MEMORY = "/dev/shm"


@pytest.fixture
def scratch(tmp_path: Path) -> Iterator[str]:
    """Make an empty directory, in memory where there is one: crash points are many."""
    if not os.access(_MEMORY, os.W_OK):
        yield str(tmp_path)
        return
    directory = tempfile.mkdtemp(prefix="distckpt-crash-", dir=_MEMORY)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def power_switch(tmp_path: Path) -> None:
    """Skip where no disk can be mounted whose power can be cut."""
    try:
        with mounted_disk(str(tmp_path / "image"), str(tmp_path / "mounted")) as disk:
            disk.cut(LOG_LOST)
    except (NoPowerSwitch, OSError) as error:
        pytest.skip(str(error))
