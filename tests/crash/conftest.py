"""Fixtures of the crash tests: a fast scratch directory."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))

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
