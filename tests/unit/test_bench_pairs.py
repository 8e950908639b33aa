"""The statistics of two versions in turns, on figures that are made up or drawn."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from distckpt.bench.pairs import FASTER, SLOWER, Interval, interval_of, orders, verdict


@pytest.mark.parametrize(
    ("count", "low", "high", "confidence"),
    # From tables of the sign test: which order statistics hold the median.
    [
        *((1, 1, 1, 0.0), (5, 1, 5, 0.9375), (6, 1, 6, 0.96875)),
        *((12, 3, 10, 0.96143), (20, 6, 15, 0.95861), (25, 8, 18, 0.95671)),
    ],
)
def test_interval_is_that_of_the_sign_test(count, low, high, confidence):
    """The tightest that is sure enough, or all there is."""
    ratios = [float(number) for number in range(1, count + 1)]
    random.Random(0).shuffle(ratios)
    found = interval_of(ratios)
    assert (found.low, found.high) == (low, high)
    assert found.confidence == pytest.approx(confidence, abs=1e-5)
    assert found.median == (count + 1) / 2
    assert found.is_sure == (count >= 6)


def test_interval_holds_the_true_median_as_often_as_it_says():
    """Of a skewed distribution, like that of times."""
    chance = random.Random(1)
    rounds = 4000
    inside = 0
    for _ in range(rounds):
        found = interval_of([chance.lognormvariate(0, 0.5) for _ in range(12)])
        inside += found.low <= 1.0 <= found.high
    assert inside / rounds == pytest.approx(0.9614, abs=0.012)


def _sure(low, high):
    return Interval((low + high) / 2, low, high, 0.96)


@pytest.mark.parametrize(
    ("changed", "same", "expected"),
    [
        (_sure(1.10, 1.20), _sure(0.95, 1.05), SLOWER),
        (_sure(1.04, 1.20), _sure(0.95, 1.05), ""),
        (_sure(1.01, 1.02), _sure(0.95, 0.99), SLOWER),
        (_sure(0.98, 1.02), _sure(0.90, 0.97), ""),
        (_sure(0.80, 0.90), _sure(0.95, 1.05), FASTER),
        (_sure(0.80, 0.96), _sure(0.95, 1.05), ""),
        (Interval(1.5, 1.4, 1.6, 0.875), Interval(1.0, 0.9, 1.1, 0.875), ""),
    ],
)
def test_verdict_needs_more_than_chance_explains(changed, same, expected):
    """Above 1, and above whatever A against A shows; with enough pairs."""
    assert verdict(changed, same) == expected


def test_a_slower_version_is_found_and_the_same_one_is_not():
    """A quarter more time in twelve pairs whose times vary by a twentieth."""
    chance = random.Random(2)

    def verdicts(factor):
        found = Counter()
        for _ in range(300):
            old, new, again = (
                [chance.lognormvariate(0, 0.05) for _ in range(12)] for _ in range(3)
            )
            changed = interval_of([factor * b / a for a, b in zip(old, new, strict=True)])
            same = interval_of([b / a for a, b in zip(old, again, strict=True)])
            found[verdict(changed, same)] += 1
        return found

    assert verdicts(1.0)[SLOWER] <= 6
    assert verdicts(1.25)[SLOWER] >= 290


def test_orders_give_everyone_every_place_equally_often():
    """In twelve rounds of three: each of the six orders twice."""
    found = Counter(orders(["a", "b", "c"], 12, seed=0))
    assert len(found) == 6
    assert {*found.values()} == {2}
    assert len([*orders(["a", "b"], 3, seed=0)]) == 3
