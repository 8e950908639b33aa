"""The soak test, for a short while: workers of a real job are killed at random."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import EVERYTHING

ROOT = Path(__file__).parents[3]


# Mostly imports; a busy machine may take its time.
@pytest.mark.long
@pytest.mark.skipif(
    not EVERYTHING,
    reason="takes a minute; set DISTCKPT_EVERY_CRASH=1, or run launch/soak.sh",
)
@pytest.mark.timeout(1200)
def test_soak_for_half_a_minute_loses_nothing(
    tmp_path: Path, report_figures: Callable[[str], None]
):
    """Replicated and sharded, it goes on from the newest acknowledged, and says so."""
    command = [sys.executable, str(ROOT / "launch" / "soak.py"), "--minutes", "0.4"]
    command += ["--ranks", "2", "--seed", "7", "--directory", str(tmp_path / "soak")]
    soak = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        said, _ = soak.communicate(timeout=380)
    finally:
        soak.terminate()  # and with it all that it has started
    assert soak.returncode == 0, said
    found = dict(re.findall(r"^(\w[\w ]*\w) +(\d+)\b", said, re.MULTILINE))
    names = ("kills", "restarts", "saves acknowledged", "lost", "hung")
    report_figures(", ".join(f"{found[name]} {name}" for name in names))
    assert int(found["kills"]) and int(found["saves acknowledged"])
    assert found["lost"] == found["hung"] == "0"
