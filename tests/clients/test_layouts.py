"""Layouts of transformers and torchtitan are restored in each other, bit by bit.

``layouts.py`` has them, and runs in the environment of the libraries.
"""

from __future__ import annotations

import json
import subprocess
from typing import Any

import pytest
from test_walk import PYTHON, ROOT, require_environment


@pytest.mark.parametrize("model", ["Llama", "Mixtral", "two experts", "four experts"])
def test_every_layout_is_restored_in_every_other(model, tmp_path, report_figures):
    """With tensor, expert and FSDP2 parallelism, and in one process; or it is refused."""
    require_environment()
    results_file = tmp_path / "results.json"
    layouts = ROOT / "tests/clients/layouts.py"
    done = subprocess.run(
        [str(PYTHON), str(layouts), model, "--json", str(results_file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert results_file.is_file(), done.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(results_file.read_text())
    if any(result["verdict"].startswith("not run") for result in results):
        pytest.skip(results[0]["verdict"])
    assert done.returncode == 0, done.stdout[-5000:]
    pairs = [result for result in results if result["to"]]
    assert len({(pair["from"], pair["to"]) for pair in pairs}) == len(pairs) >= 9
    # Else nothing would be tested but plain tensors.
    assert sum(pair["sharded"] > 0 for pair in pairs) >= len(pairs) / 2
    report_figures(
        f"{model}: {len(pairs)} pairs of layouts, "
        f"{sum(pair['tensors'] for pair in pairs):,} full tensors equal; "
        f"{len(results) - len(pairs)} layouts refused"
    )
