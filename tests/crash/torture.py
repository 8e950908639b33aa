"""Run one campaign for long: ``launch/torture.sh CAMPAIGN --minutes N``.

It says how far it has come, may be ended at any time, and goes on from there when it is
started again with the same seed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

# As conftest.py and pytest do for the tests.
sys.path.append(os.path.join(os.path.dirname(__file__), "ranks"))
sys.path.append(os.path.join(os.path.dirname(__file__), "..", "multiprocess"))

import campaign
import mutants
from campaign import Campaign, Progress
from figures import Figures

# By name; each module has a CAMPAIGN.
MODULES = {
    "errors": "test_errors_at_every_call",
    "fuzz": "test_fuzz",
    "hangs": "test_hangs",
    "kills": "test_kills",
    "power-cuts": "test_power_cut",
    "rank-errors": "test_errors_on_ranks",
    "rot": "test_rot",
    "schedules": "test_schedules",
}
_MEMORY = "/dev/shm"


def load(name: str) -> Campaign[Any]:
    """Import a campaign."""
    found: Campaign[Any] = import_module(MODULES[name]).CAMPAIGN
    assert found.name == name
    return found


def progress_file(folder: Path, name: str, seed: int) -> Path:
    """Say where it is written how far a campaign has come."""
    return folder / f"{name}-{seed}.json"


def read_progress(path: Path, seed: int) -> Progress:
    """Read how far it has come; the beginning, if it has not begun."""
    if not path.exists():
        return Progress(seed)
    tree = json.loads(path.read_text())
    return Progress(**{**tree, "figures": Figures(**tree["figures"])})


def write_progress(path: Path, progress: Progress) -> None:
    """Write it down, so that an end at any time leaves the old or the new."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(progress), indent=1))
    os.replace(temporary, path)


def play_long_tests() -> NoReturn:
    """Run the tests of class long, and end this process with whether they passed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-m", "long", "tests"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "DISTCKPT_EVERY_CRASH": "1"},
        check=False,
    )
    sys.exit(done.returncode)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("campaign", choices=[*sorted(MODULES), "long", "mutants"])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--seed", type=int, default=campaign.SEED)
    parser.add_argument("--size", type=int, help="how many points at most, all together")
    parser.add_argument(
        "--directory", type=Path, default=Path("runs/torture"), help="for its progress"
    )
    arguments = parser.parse_args()
    if arguments.campaign == "mutants":
        mutants.play(list(mutants.MUTANTS))
    if arguments.campaign == "long":
        play_long_tests()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    chosen = load(arguments.campaign)
    path = progress_file(arguments.directory, chosen.name, arguments.seed)
    progress = read_progress(path, arguments.seed)
    print(f"{chosen.name}: {chosen.about}")
    if progress.index:
        print(f"seed {progress.seed}: goes on behind {progress.index} points")
    began = time.monotonic()

    def report(now: Progress) -> None:
        write_progress(path, now)
        print(f"{time.monotonic() - began:7.0f} s  {now.figures}", flush=True)

    memory = _MEMORY if os.access(_MEMORY, os.W_OK) else None
    scratch = tempfile.mkdtemp(prefix="distckpt-torture-", dir=memory)
    try:
        seconds = 60 * arguments.minutes
        campaign.go_on(chosen, scratch, progress, seconds, arguments.size, report)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    write_progress(path, progress)
    end = "all there are" if progress.is_through else "more to come"
    print(
        f"{chosen.name}, seed {progress.seed}, {progress.seconds:.0f} s of work: "
        f"{progress.figures} ({end})"
    )
    for text in progress.figures.findings:
        print(f"FOUND: {text}")
    sys.exit(1 if progress.figures.findings else 0)


if __name__ == "__main__":
    main()
