"""The walk over real libraries says of each row what the row expects.

``walk.py`` says how it compares. It runs in an environment of its own, which
``launch/clients_env.sh`` makes.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
PYTHON = ROOT / ".venv-clients" / "bin" / "python"
PAGE = ROOT / "docs" / "clients.md"


def require_environment() -> None:
    """Skip the test where there is no environment of the libraries."""
    if not (PYTHON.parents[1] / ".distckpt-installed").is_file():
        pytest.skip(
            "there are no libraries to walk over: launch/clients_env.sh installs them"
        )


def rows_of_the_page() -> dict[tuple[str, str], str]:
    """Return the first word of each result in docs/clients.md, by library and object."""
    found = {}
    library = ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("## "):
            library = line.removeprefix("## ")
        elif library and line.startswith("| ") and not line.startswith("| object |"):
            name, verdict, *_ = (
                cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]
            )
            found[library, name] = verdict.partition(" ")[0]
    return found


def test_every_object_comes_back_as_by_its_own_load_or_is_refused(tmp_path, report_figures):
    """So says the page of it, too."""
    require_environment()
    results_file = tmp_path / "results.json"
    done = subprocess.run(
        [str(PYTHON), str(ROOT / "tests/clients/walk.py"), "--json", str(results_file)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert results_file.is_file(), done.stderr[-3000:]
    results: list[dict[str, Any]] = json.loads(results_file.read_text())
    kinds = Counter(re.split(r"[: ]", result["verdict"])[0] for result in results)
    numbers = [sum(result[key] for result in results) for key in ("tensors", "attributes")]
    report_figures(
        f"{len(results)} objects: {dict(kinds)}; {numbers[0]:,} tensors and "
        f"{numbers[1]:,} attributes compared"
    )
    missing = [r for r in results if r["verdict"].startswith("not run")]
    wrong = [r for r in results if not r["is_expected"] and r not in missing]
    assert not wrong, "\n".join(
        f"{r['library']}: {r['name']}: {r['verdict']} (expected: {r['expected']})"
        for r in wrong
    )
    page = rows_of_the_page()
    assert {*page} == {(r["library"], r["name"]) for r in results}, (
        "make docs/clients.md anew: walk.py --write docs/clients.md"
    )
    for result in results:
        if result not in missing:
            first = result["verdict"].partition(" ")[0]
            assert page[result["library"], result["name"]] == first, result
    if missing:
        reasons = {r["verdict"] for r in missing}
        pytest.skip(f"{len(missing)} of {len(results)} rows {sorted(reasons)}")


def test_every_optimizer_and_scheduler_of_torch_has_a_row():
    """A newer torch may bring more."""
    import torch
    from torch.optim import lr_scheduler

    text = "".join(
        (Path(__file__).parent / f"rows_{name}.py").read_text()
        for name in ("optimizers", "schedulers")
    )
    kinds = [
        *((name, kind, torch.optim.Optimizer) for name, kind in vars(torch.optim).items()),
        *(
            (name, kind, lr_scheduler.LRScheduler)
            for name, kind in vars(lr_scheduler).items()
        ),
    ]
    names = [
        name
        for name, kind, base in kinds
        if isinstance(kind, type)
        and issubclass(kind, base)
        and kind is not base
        and not name.startswith("_")
    ]
    assert len(names) > 25
    assert [name for name in names if not re.search(rf"\b{name}\b", text)] == []
