"""Fixtures of the crash tests: a fast scratch directory and the printed figures."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

sys.path.insert(0, os.path.dirname(__file__))

_MEMORY = "/dev/shm"
_figures = pytest.StashKey[list[str]]()


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
def report_figures(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print one line of figures at the end of the run, whatever is captured."""
    lines = request.config.stash.setdefault(_figures, [])
    return lambda line: lines.append(f"{request.node.name}: {line}")


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Show the figures of all crash tests that ran."""
    lines = config.stash.get(_figures, [])
    if lines:
        terminalreporter.section("crash points")
        for line in lines:
            terminalreporter.line(line)
