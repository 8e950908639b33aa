"""What tests of several folders share, and the speed classes that they belong to.

Each test belongs to one class, which says how much processor time it may take. A folder has
a class; a test that leaves it says so by a marker. tests/README.md has the table.
"""

from __future__ import annotations

import json
import math
import multiprocessing.forkserver
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from _pytest.runner import runtestprotocol

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
_TESTS = Path(__file__).parent

# Processor time that one test of a class may take, in seconds. It fails at twice that.
LIMIT_SECONDS = {"unit": 1.0, "ranks": 5.0, "durability": 10.0, "full": 60.0}
_MARGIN = 2.0
# What `launch/torture.sh` plays: it takes as long as it takes.
_LONG = "long"
_CLASSES = (*LIMIT_SECONDS, _LONG)
_CLASS_OF_FOLDER = {
    "unit": "unit",
    "scale": "durability",
    "multiprocess": "ranks",
    "gpu": "ranks",
    "crash": "durability",
    "clients": "full",
}
# Who plays more than a part of the campaigns, or a mutant, knows that it takes longer.
_LONGER = ("DISTCKPT_EVERY_CRASH", "DISTCKPT_EVERY_RESHARD", "DISTCKPT_MUTANT")
_IS_LIMITED = not any(os.environ.get(name) for name in _LONGER)
_COSTS_FILE = os.environ.get("DISTCKPT_TEST_COSTS")
_COLLECTED_FILE = os.environ.get("DISTCKPT_TESTS_COLLECTED")
_LEFT_OUT_FILE = os.environ.get("DISTCKPT_TESTS_LEFT_OUT")
_SECONDS_PER_TICK = 1 / os.sysconf("SC_CLK_TCK")


def class_of(item: pytest.Item) -> str:
    """Return the speed class of a test: that of its marker, else that of its folder.

    Where hypothesis draws all its examples, and not a fifth, its tests are of class full.
    """
    marked = [name for name in _CLASSES if item.get_closest_marker(name)]
    if len(marked) > 1:
        msg = f"{item.nodeid} is marked with more than one speed class: {marked}"
        raise pytest.UsageError(msg)
    if marked:
        return marked[0]
    is_of_hypothesis = getattr(getattr(item, "obj", None), "is_hypothesis_test", False)
    if is_of_hypothesis and os.environ.get("DISTCKPT_ALL_EXAMPLES"):
        return "full"
    return _CLASS_OF_FOLDER[item.path.relative_to(_TESTS).parts[0]]


@pytest.hookimpl(tryfirst=True)  # before -m is applied
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark each test with its speed class; put those that measure time last.

    In launch/test.sh nothing else runs beside them then.
    """
    for item in items:
        item.add_marker(class_of(item))
    items.sort(key=lambda item: item.get_closest_marker("alone") is not None)


def pytest_deselected(items: list[pytest.Item]) -> None:
    """Write down what a run leaves out, for the last line of launch/test.sh."""
    if _LEFT_OUT_FILE:
        # Two processes that collect the same write it twice; the reader sorts that out.
        with open(_LEFT_OUT_FILE, "a", encoding="utf-8") as file:
            file.writelines(f"{class_of(item)} {item.nodeid}\n" for item in items)


def pytest_collection_finish(session: pytest.Session) -> None:
    """Write down what a run has collected, for the tests that are about the tests."""
    if _COLLECTED_FILE:
        collected = [
            {
                "test": item.nodeid,
                "class": class_of(item),
                "covers": [
                    row for mark in item.iter_markers("covers") for row in mark.args
                ],
            }
            for item in session.items
        ]
        Path(_COLLECTED_FILE).write_text(json.dumps(collected), encoding="utf-8")


# Processor time


def _processor_seconds() -> float:
    """Return the processor time of this process and of all that it has waited for.

    Ranks are forked and waited for by a server of the harness. What still runs counts when
    it has ended.
    """
    used = [
        resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    total = sum(usage.ru_utime + usage.ru_stime for usage in used)
    server = multiprocessing.forkserver._forkserver._forkserver_pid
    if server is not None:
        with open(f"/proc/{server}/stat", encoding="utf-8") as file:
            # Its name, which may hold anything, ends with the last parenthesis.
            fields = file.read().rpartition(")")[2].split()
        total += sum(int(ticks) for ticks in fields[11:15]) * _SECONDS_PER_TICK
    return total


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool:
    """Run a test; fail it if it took more than twice the processor time of its class.

    A test that was too expensive runs a second time, and that time counts: the first test
    that uses a module of torch or of hypothesis pays for importing it.
    """
    if "harness" in sys.modules and item.path.parent.name in (
        "multiprocess",
        "ranks",
        "gpu",
    ):
        # Else the first test of ranks pays for importing torch.
        sys.modules["harness"].warm_up()
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports, seconds = _run(item, nextitem)
    name = class_of(item)
    limit = LIMIT_SECONDS.get(name, math.inf) if _IS_LIMITED else math.inf
    if seconds > _MARGIN * limit and all(report.passed for report in reports):
        reports, seconds = _run(item, nextitem)
        if seconds > _MARGIN * limit and reports[-1].passed:
            reports[-1].outcome = "failed"
            reports[-1].longrepr = (
                f"{item.nodeid} took {seconds:.1f} s of processor time, when it ran a "
                f"second time. A test of class {name!r} may take {limit:g} s and fails at "
                f"{_MARGIN * limit:g} s. Make it cheaper, or move what it repeats to class "
                "'full' by @pytest.mark.full (see tests/README.md)."
            )
    if _COSTS_FILE:
        with open(_COSTS_FILE, "a", encoding="utf-8") as file:
            file.write(f"{seconds:.3f} {name} {item.nodeid}\n")
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def _run(
    item: pytest.Item, nextitem: pytest.Item | None
) -> tuple[list[pytest.TestReport], float]:
    """Run set-up, test and teardown; returns their reports and the processor seconds."""
    began = _processor_seconds()
    reports = runtestprotocol(item, log=False, nextitem=nextitem)
    return reports, _processor_seconds() - began


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
