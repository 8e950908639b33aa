"""Statistics of pairs: is one version slower than another, and by more than chance?"""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

WANTED_CONFIDENCE = 0.95

SLOWER = "slower"
FASTER = "faster"


@dataclass(frozen=True, slots=True)
class Interval:
    """The median of some ratios, and between which values the true one lies.

    Attributes:
        median: Of the ratios.
        low: The lower end.
        high: The upper end.
        confidence: How surely the true median lies between them.
    """

    median: float
    low: float
    high: float
    confidence: float

    @property
    def is_sure(self) -> bool:
        """Tell whether there were enough ratios."""
        return self.confidence >= WANTED_CONFIDENCE


def interval_of(ratios: Sequence[float]) -> Interval:
    """Return the median with its interval from order statistics.

    Exact for any distribution: each ratio lies below the true median as often as a coin
    shows heads. With fewer than 6 ratios even the range of all of them is not sure enough.
    """
    ordered = sorted(ratios)
    count = len(ordered)
    leave_out = 0
    while _confidence(count, leave_out + 1) >= WANTED_CONFIDENCE:
        leave_out += 1
    return Interval(
        statistics.median(ordered),
        ordered[leave_out],
        ordered[count - 1 - leave_out],
        _confidence(count, leave_out),
    )


def _confidence(count: int, leave_out: int) -> float:
    """Return how surely the median lies inside if so many are left out at each end."""
    if count <= 2 * leave_out:
        return 0.0
    outside = 2 * sum(math.comb(count, number) for number in range(leave_out + 1))
    confidence: float = max(0, 2**count - outside) / 2**count
    return confidence


def verdict(changed: Interval, same: Interval) -> str:
    """Say whether B is slower or faster than A beyond what A against A explains.

    B is slower if the whole interval of B against A lies above 1 and above the whole
    interval of A against A; faster if it lies below both. Otherwise, or with too few
    pairs, nothing is said.

    Args:
        changed: Of the ratios of B to A.
        same: Of the ratios of A to A.
    """
    if not (changed.is_sure and same.is_sure):
        return ""
    if changed.low > max(1.0, same.high):
        return SLOWER
    if changed.high < min(1.0, same.low):
        return FASTER
    return ""


def orders(names: Sequence[str], count: int, seed: int) -> Iterator[tuple[str, ...]]:
    """Yield so many orders of names, each of the possible ones as often as another.

    Shuffled, so that what comes and goes on the machine is not in step with them.
    """
    possible = [*itertools.permutations(names)]
    chance = random.Random(seed)
    while count > 0:
        chance.shuffle(possible)
        yield from possible[:count]
        count -= len(possible)
