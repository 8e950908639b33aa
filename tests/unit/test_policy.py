"""TensorFlow's rules, to the comparison: recovery, retention, the interval gate."""

from __future__ import annotations

import dataclasses
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_helpers import make_entry, make_record

from distckpt import policy
from distckpt.errors import ConfigError, CorruptStateError
from distckpt.policy import IntervalGate, Retention, SaveWhen, on_signal

MAX_EXAMPLES = 150


def entries(*times):
    """Make entries numbered from 1, saved at these times."""
    return tuple(
        make_entry(number, time=time, record=number, attempt=f"{number:08x}")
        for number, time in enumerate(times, 1)
    )


def record_of(times, last_preserved):
    """Make a record with these managed checkpoints."""
    return make_record(50, live=entries(*times), last_preserved=last_preserved)


# Columns: now, stored times, stored clock; then the clock after, what is managed.
RECOVERY = [
    (1000, (100, 200), 50.0, 50.0, {1: 100, 2: 200}),
    (1000, (100, 200), 100.0, 100.0, {2: 200}),
    (1000, (100, 200), 200.0, 200.0, {}),
    (1000, (100, 200), 0.0, 0.0, {1: 100, 2: 200}),
    (150, (100, 200), 50.0, 50.0, {1: 100, 2: 150}),
    (75, (100, 200), 50.0, 50.0, {1: 75, 2: 75}),
    (50, (100, 200), 50.0, 50.0, {}),
    (49, (100, 200), 50.0, 49.0, {}),
    (1000, (200, 100), 50.0, 50.0, {1: 200, 2: 100}),
]


@pytest.mark.parametrize(("now", "times", "stored", "clock", "managed"), RECOVERY)
def test_recover_manages_what_tensorflow_manages(now, times, stored, clock, managed):
    """TensorFlow's recovery table, in the order of the record."""
    found = policy.recover(record_of(times, stored), float(now))
    assert [(e.attempt.number, e.time) for e in found.live] == list(managed.items())


@pytest.mark.parametrize(("now", "times", "stored", "clock", "managed"), RECOVERY)
def test_recover_sets_the_clock_as_tensorflow_does(now, times, stored, clock, managed):
    """The preservation clock moves back only when it is ahead of now."""
    assert policy.recover(record_of(times, stored), float(now)).last_preserved == clock


@pytest.mark.parametrize(("now", "times", "stored", "clock", "managed"), RECOVERY)
def test_recover_forgets_all_that_is_not_managed(now, times, stored, clock, managed):
    """Nothing falls out of both lists: TensorFlow leaves those on disk for ever."""
    found = policy.recover(record_of(times, stored), float(now))
    forgotten = [e.attempt.number for e in found.forgotten]
    assert sorted([*managed, *forgotten]) == [1, 2]


@pytest.mark.parametrize(("now", "behind"), [(1000, 0.0), (50, 0.0), (49, 1.0), (0, 50.0)])
def test_recover_says_how_far_the_clock_is_behind(now, behind):
    """The warning appears only when time itself went backwards."""
    assert policy.recover(record_of((100,), 50.0), float(now)).seconds_behind == behind


def test_recover_keeps_the_true_time_of_what_is_forgotten():
    """A clamped time is memory only; what leaves keeps the time at which it was saved."""
    found = policy.recover(record_of((100,), 50.0), 40.0)
    assert [entry.time for entry in found.forgotten] == [100.0]


@pytest.mark.parametrize(
    "record", [None, make_record(1, action="claim")], ids=["none", "claim"]
)
def test_recover_without_a_commit_starts_the_clock_a_second_ago(record):
    """A checkpoint saved at once by a manager made again at once is still managed."""
    assert policy.recover(record, 1000.0) == ((), (), 999.0, 0.0)


def test_recover_with_nothing_managed_keeps_the_clock():
    """TensorFlow's row with an empty list of timestamps."""
    found = policy.recover(make_record(3, last_preserved=50.0), 1000.0)
    assert found == ((), (), 50.0, 0.0)


@pytest.mark.parametrize(
    "fields",
    [
        {"live": entries(100, 200), "last_preserved": None},
        {"live": entries(100, 200), "last_preserved": math.nan},
        {"live": entries(100, 200), "last_preserved": math.inf},
        {"live": entries(100)[:1] * 2, "last_preserved": 50.0},
    ],
    ids=["clock-absent", "clock-nan", "clock-inf", "path-twice"],
)
def test_recovery_row_that_cannot_be_is_refused_by_the_record(fields):
    """TensorFlow's rows of damaged state files: no valid record says such a thing."""
    with pytest.raises(CorruptStateError):
        make_record(50, **fields)


@pytest.mark.parametrize("length", [0, 1, 3])
def test_recovery_row_with_unequal_lists_cannot_be_written(length):
    """A path and its time are one entry, so one cannot be there without the other."""
    with pytest.raises(CorruptStateError):
        dataclasses.replace(make_entry(), time=[100.0] * length)


class Manager:
    """What a TensorFlow manager does with its lists, on the rules alone."""

    def __init__(self, now, keep, hours):
        self.retention = Retention(keep, hours)
        self.live, self.preserved, self.deleted = (), [], []
        self.last_preserved = policy.recover(None, float(now)).last_preserved

    def save(self, number, now):
        entry = make_entry(number, time=now, record=number, attempt=f"{number:08x}")
        swept = policy.sweep([*self.live, entry], self.last_preserved, self.retention)
        self.live, self.last_preserved = swept.live, swept.last_preserved
        self.preserved += [e.attempt.number for e in swept.preserved]
        self.deleted += [e.attempt.number for e in swept.dropped]

    def recreate(self, now):
        record = make_record(50, live=self.live, last_preserved=self.last_preserved)
        self.live, _, self.last_preserved, _ = policy.recover(record, float(now))

    @property
    def surviving(self):
        return sorted([*self.preserved, *(e.attempt.number for e in self.live)])


@pytest.mark.parametrize(
    ("gap", "surviving", "clock"),
    [
        (18000, [1, 2, 3, 4, 5, 6, 7], 108000.0),
        (3600, [1, 2, 3, 4, 5, 6, 7], 21600.0),
        (3599, [1, 3, 5, 7], None),
        (3000, [2, 4, 6, 7], 18000.0),
    ],
)
def test_sweep_at_a_fixed_gap_keeps_tensorflows_pattern(gap, surviving, clock):
    """One checkpoint kept, one an hour preserved, seven saves."""
    manager = Manager(0, 1, 1.0)
    for number in range(1, 8):
        manager.save(number, gap * number)
    assert manager.surviving == surviving
    assert clock is None or manager.last_preserved == clock


def test_sweep_with_a_new_manager_before_each_save_keeps_tensorflows_pattern():
    """A restart does not restart the preservation clock."""
    manager = Manager(0, 1, 1.0)
    for number in range(1, 9):
        if number > 1:
            manager.recreate(1800 * number)
        manager.save(number, 1800 * number)
    assert (manager.surviving, manager.last_preserved) == ([2, 4, 6, 8], 10800.0)


@pytest.mark.parametrize(
    ("saved_at", "preserved", "clock"),
    [(13599.0, [1], 13599.0), (13598.999, [], 9999.0)],
)
def test_sweep_at_the_hour_compares_as_tensorflow_does(saved_at, preserved, clock):
    """Exactly an hour after the clock is preserved; a millisecond less is not."""
    manager = Manager(10000, 1, 1.0)
    manager.save(1, saved_at)
    manager.save(2, saved_at + 1)
    assert (manager.preserved, manager.last_preserved) == (preserved, clock)


@pytest.mark.parametrize("hours", [None, 0, 0.0, math.inf])
def test_sweep_without_hours_preserves_nothing(hours):
    """Zero means off, as in TensorFlow, and so does for ever."""
    manager = Manager(0, 1, hours)
    for number in range(1, 4):
        manager.save(number, number * 1e6)
    assert (manager.preserved, manager.deleted) == ([], [1, 2])


def test_sweep_with_negative_hours_preserves_all():
    """TensorFlow never checks the sign, and neither does this rule."""
    manager = Manager(0, 1, -1.0)
    for number in range(1, 4):
        manager.save(number, number)
    assert manager.preserved == [1, 2]


def test_sweep_that_keeps_all_never_moves_the_clock():
    """With max_to_keep None nothing leaves, so nothing is preserved."""
    manager = Manager(0, None, 1.0)
    for number in range(1, 10):
        manager.save(number, number * 7200)
    assert (len(manager.live), manager.last_preserved) == (9, -1.0)


def test_sweep_with_fewer_to_keep_drops_as_many_as_needed():
    """A smaller max_to_keep after a restart takes effect with the next save."""
    swept = policy.sweep(entries(1, 2, 3, 4, 5, 6), 0.0, Retention(2))
    assert [e.attempt.number for e in swept.dropped] == [1, 2, 3, 4]


def test_sweep_goes_by_order_not_by_time_or_number():
    """The oldest is the one that was committed first."""
    swept = policy.sweep(entries(9, 5, 7), 0.0, Retention(2))
    assert [e.attempt.number for e in swept.dropped] == [1]


@settings(max_examples=MAX_EXAMPLES)
@given(
    times=st.lists(st.floats(0, 1e6), min_size=1, max_size=12),
    clock=st.floats(0, 1e6),
    keep=st.none() | st.integers(1, 5),
    hours=st.none() | st.floats(0, 50),
)
def test_sweep_never_loses_or_drops_the_newest(times, clock, keep, hours):
    """Every checkpoint is in exactly one list, the newest in the managed one."""
    live = entries(*times)
    swept = policy.sweep(live, clock, Retention(keep, hours))
    together = sorted(
        (*swept.live, *swept.preserved, *swept.dropped), key=lambda entry: entry.record
    )
    assert together == list(live)
    assert swept.live[-1] == live[-1]


@pytest.mark.parametrize("keep", [0, -1, True, False, 2.5, "3"], ids=repr)
def test_retention_with_max_to_keep_that_is_no_positive_integer_is_refused(keep):
    """TensorFlow lets some of these through and deletes what it has just written."""
    with pytest.raises(ConfigError, match="max_to_keep"):
        Retention(keep)


@pytest.mark.parametrize("hours", ["1", True, [1]], ids=repr)
def test_retention_with_hours_that_are_no_number_is_refused(hours):
    """Found when the manager is made, not at the first deletion."""
    with pytest.raises(ConfigError, match="keep_checkpoint_every_n_hours"):
        Retention(1, hours)


def test_interval_gate_follows_tensorflows_trace():
    """TensorFlow's verified trace: interval 3, the counter starting at 5."""
    trace = [
        (5, True, 1), (5, True, None), (5, False, None), (6, True, None),
        (7, True, None), (7, False, 2), (7, False, None), (9, True, None),
        (10, True, 3), (4, True, None), (4, False, 4), (4, False, None),
        (6, True, None), (7, True, 5), (100, True, 6),
    ]  # fmt: skip
    gate, number, found = IntervalGate(3), 0, []
    for step, check, _ in trace:
        if gate.allows(step, check):
            gate.last_step, number = step, number + 1
            found.append((step, check, number))
        else:
            found.append((step, check, None))
    assert found == trace


def test_interval_gate_after_a_failed_save_allows_the_same_step_again():
    """Asking does not move the last step; only a save that succeeded does."""
    gate = IntervalGate(3)
    gate.last_step = 5
    assert [gate.allows(8, True), gate.allows(8, True)] == [True, True]


def test_interval_gate_with_unknown_last_step_allows_any_step():
    """The first save of a manager goes through, whatever the step."""
    assert IntervalGate(1000).allows(-7, True)


def test_interval_gate_after_a_restore_counts_from_the_restored_step():
    """TensorFlow's testCheckpointIntervalWithRestore: step 0 after a restore is None."""
    gate = IntervalGate(2)
    gate.last_step = 0
    assert [gate.allows(0, True), gate.allows(1, True), gate.allows(2, True)] == [
        False,
        False,
        True,
    ]


@pytest.mark.parametrize("interval", [0, -5])
def test_interval_gate_of_zero_or_less_refuses_only_the_same_step(interval):
    """As in TensorFlow; a step that went backwards needs check_interval=False at 0."""
    gate = IntervalGate(interval)
    gate.last_step = 7
    assert (gate.allows(7, False), gate.allows(8, True)) == (False, True)


def test_interval_gate_without_interval_allows_every_call():
    """check_interval has no effect without an interval."""
    gate = IntervalGate(None)
    gate.last_step = 7
    assert gate.allows(7, True)


@pytest.mark.parametrize("interval", [1.5, True, "3"], ids=repr)
def test_interval_gate_with_interval_that_is_no_integer_is_refused(interval):
    """Found when the manager is made."""
    with pytest.raises(ConfigError, match="checkpoint_interval"):
        IntervalGate(interval)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, SaveWhen(None, True, None)),
        (5, SaveWhen(5, False, None)),
        (on_signal("SIGTERM"), SaveWhen(None, False, on_signal("SIGTERM"))),
        (5 | on_signal("SIGTERM"), SaveWhen(5, False, on_signal("SIGTERM"))),
        (on_signal("SIGTERM") | 5, SaveWhen(5, False, on_signal("SIGTERM"))),
        (None | on_signal("SIGTERM"), SaveWhen(None, True, on_signal("SIGTERM"))),
    ],
)
def test_checkpoint_interval_is_a_number_a_rule_or_both(given, expected):
    assert SaveWhen.of(given) == expected


@pytest.mark.parametrize("given", ["5", 5.0, True, [5]])
def test_checkpoint_interval_of_another_kind_is_refused(given):
    with pytest.raises(ConfigError, match="checkpoint_interval"):
        SaveWhen.of(given)
    with pytest.raises((ConfigError, TypeError)):
        on_signal("SIGTERM") | given


@pytest.mark.parametrize(
    ("signals", "more", "text"),
    [
        ((), {}, "name a signal"),
        (("SIGKILL",), {}, "'SIGKILL'"),
        (("SIGNOTHING",), {}, "'SIGNOTHING'"),
        (("SIG_DFL",), {}, "'SIG_DFL'"),
        (("TERM",), {}, "'TERM'"),
        ((15,), {}, "15"),
        (("SIGTERM",), {"grace_period_seconds": 0}, "grace_period_seconds"),
        (("SIGTERM",), {"grace_period_seconds": float("inf")}, "grace_period_seconds"),
    ],
)
def test_on_signal_with_this_argument_is_refused(signals, more, text):
    with pytest.raises(ConfigError, match=text):
        on_signal(*signals, **more)


def test_gate_of_a_signal_alone_allows_only_calls_that_ask_for_it():
    gate = IntervalGate(on_signal("SIGTERM"))
    assert not gate.allows(3, True)
    assert gate.allows(3, False)
    gate.last_step = 3
    assert not gate.allows(3, False) and not gate.has_news(3)
    assert gate.has_news(4) and gate.has_news(None)
