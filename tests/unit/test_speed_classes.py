"""The tests about the tests: speed classes, and what the default classes must show."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

sys.path.append(str(Path(__file__).parents[1] / "crash"))

from mutants import MUTANTS

ROOT = Path(__file__).parents[2]
TESTS = ROOT / "tests"

# The tables of docs/protocol.md that say what goes wrong, by their headings, and what the
# header of each begins with.
TABLES = {
    "Waiting": "what happens to a rank",
    "Claim": "#",
    "Save": "#",
    "Asynchronous saves": "#",
    "Restore": "a rank finds",
}
DEFAULT = "not full and not long"


def rows_of_the_protocol() -> list[str]:
    """Name every row: by the heading and by what its first cell says before a colon."""
    text = (ROOT / "docs" / "protocol.md").read_text()
    names = []
    for heading, first in TABLES.items():
        section = re.split(r"^## ", text, flags=re.MULTILINE)
        (body,) = (part for part in section if part.startswith(f"{heading}\n"))
        lines = iter(body.splitlines())
        header = next(line for line in lines if line.startswith(f"| {first} |"))
        next(lines)
        for line in lines:
            if not line.startswith("|"):
                break
            cells = [cell.strip() for cell in line.strip("|").split("|")]
            name = f"{heading.lower()}: {cells[0].partition(':')[0]}"
            # One step of an asynchronous save goes on in two threads.
            names.append(f"{name} ({cells[1]})" if "| thread |" in header else name)
    return names


class Collected(NamedTuple):
    """A test that a run would play, its class, and the rows that it covers."""

    test: str
    speed_class: str
    covers: list[str]


def run_pytest(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> list[Collected]:
    """Collect the default classes of all files that these tests are about."""
    files = {
        str(path)
        for path in TESTS.rglob("test_*.py")
        if "mark.covers(" in path.read_text() and path != Path(__file__)
    }
    files |= {
        str(ROOT / mutant.killed_by.partition("::")[0]) for mutant in MUTANTS.values()
    }
    found = tmp_path_factory.mktemp("collected") / "tests.json"
    done = run_pytest(
        *("--collect-only", "-m", DEFAULT, *sorted(files)),
        DISTCKPT_TESTS_COLLECTED=str(found),
    )
    assert done.returncode == 0, done.stdout
    trees: list[dict[str, Any]] = json.loads(found.read_text())
    return [Collected(tree["test"], tree["class"], tree["covers"]) for tree in trees]


def test_the_tables_of_the_protocol_are_read():
    """A table that is written otherwise must not count as one without rows."""
    rows = rows_of_the_protocol()
    assert len(rows) == len({*rows})
    for heading in TABLES:
        assert sum(row.startswith(f"{heading.lower()}: ") for row in rows) >= 3, rows


@pytest.mark.full  # to collect is to import what all ranks need
def test_every_row_of_the_protocol_is_shown_by_the_default_classes(collected):
    """So is nothing else: a marker that names no row is out of date."""
    covered = {row for one in collected for row in one.covers}
    rows = rows_of_the_protocol()
    missing = [row for row in rows if row not in covered]
    assert not missing, (
        f"no test of the default classes has @pytest.mark.covers of {missing}"
    )
    assert covered <= {*rows}, covered - {*rows}


@pytest.mark.full
def test_every_mutant_has_a_test_in_the_default_classes_or_is_listed(collected):
    """Whether that test fails: tests/crash/test_mutants.py, in class full."""
    default = {one.test.partition("[")[0] for one in collected}
    default |= {test.partition("::")[0] for test in default}
    for name, mutant in MUTANTS.items():
        assert mutant.killed_by in default or mutant.only_in_full, name


# The limit


_COSTLY = """
import os, time
import conftest, pytest
conftest.LIMIT_SECONDS["unit"] = 0.05
pytestmark = pytest.mark.unit

def spin(seconds):
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass

def test_cheap():
    time.sleep(0.3)

def test_within_the_margin():
    spin(0.06)

def test_costly():
    spin(0.15)

def test_costly_in_a_child():
    if os.fork() == 0:
        spin(0.15)
        os._exit(0)
    os.wait()
"""


@pytest.mark.full
def test_a_test_over_twice_the_processor_time_of_its_class_fails(tmp_path):
    """In its own process or in those that it waits for. Waiting costs nothing."""
    file = tmp_path / "test_costly.py"
    file.write_text(_COSTLY)
    more = ("-p", "conftest", "-o", "markers=unit: u", "--rootdir", str(tmp_path))
    environment = {"PYTHONPATH": str(TESTS), "DISTCKPT_TEST_COSTS": str(tmp_path / "costs")}
    for variable in ("DISTCKPT_EVERY_CRASH", "DISTCKPT_EVERY_RESHARD"):
        environment[variable] = ""
    done = run_pytest(str(file), *more, **environment)
    failed = re.findall(r"^ERROR .*::(\w+)", done.stdout, re.MULTILINE)
    assert failed == ["test_costly", "test_costly_in_a_child"], done.stdout
    assert re.search(r"took 0\.\d s of processor time", done.stdout), done.stdout
    assert "may take 0.05 s and fails at 0.1 s" in done.stdout
    costs = (tmp_path / "costs").read_text().splitlines()
    assert len(costs) == 4
