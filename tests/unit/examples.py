"""How many examples hypothesis draws: a fifth by default, all of them in class full."""

from __future__ import annotations

import os

ALL = bool(os.environ.get("DISTCKPT_ALL_EXAMPLES"))


def examples(number: int) -> int:
    """Return how many of so many examples this run draws; they follow from one seed."""
    return number if ALL else max(10, number // 5)
