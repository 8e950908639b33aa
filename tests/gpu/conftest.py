"""The ranks of the GPU tests come from the harness of the multiprocess tests."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "multiprocess"))
