"""Rules of time: when they want a save, what saves cost, and what comes of it."""

from __future__ import annotations

import math
import random

import pytest

from distckpt.clock import Clock, Costs, period_of
from distckpt.policy import every


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now

    def pass_(self, seconds):
        self.now += seconds


def test_clock_is_due_when_the_time_has_passed_since_the_last_save():
    time = Time()
    clock = Clock([every(minutes=20), every(seconds=30)], time)
    time.pass_(29.9)
    assert clock.due() == []
    time.pass_(0.1)
    assert clock.due() == ["every(seconds=30): 30.0 s of 30.0 s have passed"]
    time.pass_(1170)
    assert len(clock.due()) == 2
    clock.reset(time.now - 10)  # a save that began then
    time.pass_(20)
    assert len(clock.due()) == 1


def test_clock_after_a_save_that_failed_behind_the_loop_is_as_before():
    time = Time()
    clock = Clock([every(seconds=30)], time)
    time.pass_(31)
    clock.reset()
    assert clock.due() == []
    clock.undo()
    assert len(clock.due()) == 1


def test_rules_of_cost_want_one_save_to_know_it():
    time = Time()
    clock = Clock([every(overhead=0.01), every(optimal_for_mtbf_hours=3)], time)
    assert [reason.split(":")[1] for reason in clock.due()] == [
        " what a save costs is not known yet"
    ] * 2
    clock.costs.enter()
    time.pass_(2.0)
    clock.costs.leave(has_saved=True, under_way=False)
    clock.reset(time.now - 2.0)
    time.pass_(197.9)
    assert clock.due() == []
    time.pass_(0.2)
    assert clock.due() == ["every(overhead=0.01): 200.1 s of 200.0 s have passed"]
    time.pass_(9.9)  # sqrt(2 * 2 * 10800) + 2
    assert len(clock.due()) == 2


@pytest.mark.parametrize(
    ("rule", "cost", "seconds"),
    [
        (every(seconds=7), None, 7.0),
        (every(minutes=2), 5.0, 120.0),
        (every(hours=0.5), None, 1800.0),
        (every(overhead=0.05), None, None),
        (every(overhead=0.05), 3.0, 60.0),
        (every(optimal_for_mtbf_hours=1), None, None),
        (every(optimal_for_mtbf_hours=1), 2.0, 122.0),
    ],
)
def test_period_of_a_rule(rule, cost, seconds):
    assert period_of(rule, cost) == seconds


def step(time, costs, took, *, blocked=0.0, has_saved=False, under_way=False):
    """Train for a step, then call save()."""
    time.pass_(took)
    costs.enter()
    time.pass_(blocked)
    costs.leave(has_saved=has_saved, under_way=under_way)


def test_cost_of_a_save_is_how_long_its_call_took():
    time = Time()
    costs = Costs(time)
    for _ in range(5):
        step(time, costs, 1.0)
    assert costs.seconds is None
    step(time, costs, 1.0, blocked=3.0, has_saved=True)
    assert costs.seconds == pytest.approx(3.0)


def test_cost_of_a_save_behind_the_loop_is_what_steps_take_longer():
    """Blocked for the copy, then slowed down, then blocked for the end."""
    time = Time()
    costs = Costs(time)
    for took in (1.0, 1.1, 0.9, 1.0):
        step(time, costs, took)
    step(time, costs, 1.0, blocked=0.5, has_saved=True, under_way=True)
    step(time, costs, 1.4, under_way=True)
    step(time, costs, 1.0, under_way=True)
    assert costs.seconds is None
    step(time, costs, 1.2, blocked=0.1)
    assert costs.seconds == pytest.approx(0.5 + 0.4 + 0.2 + 0.1)
    step(time, costs, 5.0)  # an evaluation: no save is under way
    assert costs.seconds == pytest.approx(1.2)


def test_save_behind_the_loop_that_ends_in_the_next_one_is_a_cost_of_its_own():
    time = Time()
    costs = Costs(time)
    for _ in range(3):
        step(time, costs, 1.0)
    step(time, costs, 1.0, blocked=0.5, has_saved=True, under_way=True)
    step(time, costs, 1.0, blocked=0.7, has_saved=True, under_way=True)
    assert costs.seconds == pytest.approx(0.5)
    step(time, costs, 1.0)
    assert costs.seconds == pytest.approx(0.6)  # of two, the median


def test_cost_is_the_median_of_the_last_saves():
    """One that was slow for another reason does not count for long."""
    time = Time()
    costs = Costs(time)
    for blocked in (1.0, 50.0, 2.0, 2.0, 3.0):
        step(time, costs, 1.0, blocked=blocked, has_saved=True)
    assert costs.seconds == pytest.approx(2.0)


# What comes of it: a job that fails at random, played by the rule itself.


def goodput_of(rule, *, cost, mtbf, restart, seconds, seed):
    """Play a job for so long; returns the part of the time that was of use.

    A step takes ten seconds. A failure loses what was done since the last save, and the
    time to start again.
    """
    source, time = random.Random(seed), Time()
    time.now = 0.0
    clock = Clock([rule], time)
    clock.costs._costs.append(cost)  # as if measured by an earlier save
    useful = done = 0.0
    next_failure = source.expovariate(1 / mtbf)
    while time.now < seconds:
        is_saving = bool(clock.due())
        took = cost if is_saving else 10.0
        if time.now + took >= next_failure:
            time.now = next_failure + restart
            next_failure = time.now + source.expovariate(1 / mtbf)
            done = 0.0
            clock.reset()
            continue
        began = time.now
        time.pass_(took)
        if is_saving:
            useful, done = useful + done, 0.0
            clock.reset(began)
        else:
            done += took
    return useful / time.now


def computed(period, cost, mtbf, restart):
    """Return the goodput by Daly's model of exponential failures (2006, equation 20)."""
    work = period - cost
    per_work = mtbf * math.exp(restart / mtbf) * (math.exp(period / mtbf) - 1)
    return work / per_work


@pytest.mark.full
def test_goodput_of_the_optimal_interval_is_as_computed_and_the_best(report_figures):
    """Young's interval, over ten weeks, against half and twice as often."""
    cost, mtbf, restart = 20.0, 3 * 3600.0, 60.0
    best = every(optimal_for_mtbf_hours=3)
    period = period_of(best, cost)
    found = {}
    for factor in (0.25, 0.5, 1.0, 2.0, 4.0):
        rule = best if factor == 1.0 else every(seconds=factor * period)
        runs = [
            goodput_of(rule, cost=cost, mtbf=mtbf, restart=restart, seconds=2e6, seed=seed)
            for seed in range(3)
        ]
        found[factor] = sum(runs) / len(runs)
        expected = computed(factor * period, cost, mtbf, restart)
        assert found[factor] == pytest.approx(expected, abs=0.006), factor
    report_figures(
        f"cost {cost:.0f} s, one failure in 3 h: every {period:.0f} s gives a goodput of "
        f"{found[1.0]:.4f} (computed {computed(period, cost, mtbf, restart):.4f}); "
        + ", ".join(f"{f} times: {g:.4f}" for f, g in found.items() if f != 1.0)
    )
    assert found[1.0] == max(found.values())


@pytest.mark.full
def test_overhead_comes_out_as_asked_for(report_figures):
    """One percent of the time, whatever a save costs."""
    for cost in (0.5, 5.0, 50.0):
        time = Time()
        clock = Clock([every(overhead=0.01)], time)
        saving = 0.0
        began = time.now
        while time.now - began < 200_000:
            time.pass_(1.0)
            clock.costs.enter()
            due = bool(clock.due())
            if due:
                clock.reset()
                time.pass_(cost)
                saving += cost
            clock.costs.leave(has_saved=due, under_way=False)
        overhead = saving / (time.now - began)
        report_figures(f"a save costs {cost} s: {100 * overhead:.3f} % of the time")
        assert overhead == pytest.approx(0.01, rel=0.03)
