"""Campaigns outside of the tests: each is found, and goes on where it was."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TORTURE = Path(__file__).with_name("torture.py")


def run(*arguments: str) -> str:
    """Run Python as ``launch/torture.sh`` does: without what conftest.py sets up."""
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env=environment,
        cwd=TORTURE.parent,
        check=False,
        timeout=500,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.full
def test_every_campaign_can_be_loaded_by_its_name():
    """Whichever is asked for: none lives on what another one has imported."""
    run(
        "-c",
        "import sys, torture\n"
        "before, places = {*sys.modules}, [*sys.path]\n"
        "for name in torture.MODULES:\n"
        "    torture.load(name)\n"
        "    sys.path[:] = places\n"
        "    for own in {*sys.modules} - before:\n"
        "        path = str(getattr(sys.modules[own], '__file__', ''))\n"
        f"        if path.startswith({str(TORTURE.parents[1])!r}):\n"
        "            del sys.modules[own]",
    )


def test_what_tries_the_protocol_alone_does_without_torch():
    """With torch in the process, each of thousands of forks takes twenty times as long."""
    modules = ", ".join(sorted(path.stem for path in TORTURE.parent.glob("*.py")))
    path = str(TORTURE.parents[1] / "multiprocess")
    run(
        "-c",
        f"import sys; sys.path.append({path!r}); import {modules}\n"
        "assert 'torch' not in sys.modules, sorted(sys.modules)",
    )


@pytest.mark.full
def test_a_campaign_goes_on_where_it_was(tmp_path):
    """And says so; what it has found before counts."""
    arguments = (str(TORTURE), "fuzz", "--directory", str(tmp_path), "--size")
    run(*arguments, "200")
    before = json.loads((tmp_path / "fuzz-1.json").read_text())
    lines = run(*arguments, "500").splitlines()
    after = json.loads((tmp_path / "fuzz-1.json").read_text())
    assert "goes on behind 200 points" in lines[1] and "500 tried" in lines[-1]
    assert (before["index"], after["index"]) == (200, 500)
    assert after["figures"]["tried"] == 500 and after["seconds"] > before["seconds"]
