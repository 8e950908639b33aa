"""What tests of several folders share."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# A shell starts what it runs in the background with Ctrl-C ignored, and so would all tests
# that are about it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

if os.environ.get("DISTCKPT_MUTANT"):
    # See tests/crash/mutants.py: one step of the protocol is wrong, and a test must see it.
    sys.path.insert(0, str(Path(__file__).parent / "crash"))
    from mutants import apply_from_environment

    apply_from_environment()

_FIGURES = "figures"

# Warnings are errors in tests. Some versions of torch warn of what is no fault of ours.
_WARNINGS_OF_SOME_TORCH = (
    # torch 2.9, whenever DCP saves.
    "ignore:TypedStorage is deprecated:UserWarning",
    # torch 2.14, of the dtype that came with it.
    "ignore:BComplex32 support is experimental:UserWarning",
)


def pytest_configure(config: pytest.Config) -> None:
    """Let pass what some versions of torch warn of."""
    for line in _WARNINGS_OF_SOME_TORCH:
        config.addinivalue_line("filterwarnings", line)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[str], str]]:
    """Mount real small filesystems: ``small_disk("size=4m")`` returns the path of one."""
    mounted: list[str] = []

    def mount(options: str) -> str:
        path = tmp_path / f"disk-{len(mounted)}"
        path.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        except FileNotFoundError:
            pytest.skip("there is no mount command here")
        if done.returncode != 0:
            pytest.skip(f"a tmpfs cannot be mounted here: {done.stderr.strip()}")
        mounted.append(str(path))
        return str(path)

    yield mount
    for path in mounted:
        # Lazily: where a test fails, a lock in there may still be open.
        subprocess.run(["umount", "--lazy", path], check=True)


@pytest.fixture
def report_figures(request: pytest.FixtureRequest) -> Callable[[str], None]:
    """Print one line of figures at the end of the run, whatever is captured."""
    # With the report, so that they also come from another process.
    return lambda line: request.node.user_properties.append((_FIGURES, line))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Show the figures of all tests that ran."""
    reports = [
        report
        for outcome in ("passed", "failed")
        for report in terminalreporter.stats.get(outcome, [])
        if report.when == "call"
    ]
    lines = [
        f"{report.nodeid.rpartition('::')[2]}: {line}"
        for report in reports
        for name, line in report.user_properties
        if name == _FIGURES
    ]
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.line(line)
