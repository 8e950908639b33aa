"""Keep which? TensorFlow's rule to the comparison, and rules of words."""

from __future__ import annotations

import dataclasses
import math

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_helpers import make_entry, make_record

from distckpt import retention
from distckpt.errors import ConfigError, CorruptStateError
from distckpt.policy import best, every, latest, on_signal
from distckpt.retention import Retention

MAX_EXAMPLES = examples(150)
NUMBER = Retention(3)


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
    found = retention.recover(record_of(times, stored), float(now), NUMBER)
    assert [(e.attempt.number, e.time) for e in found.live] == list(managed.items())


@pytest.mark.parametrize(("now", "times", "stored", "clock", "managed"), RECOVERY)
def test_recover_sets_the_clock_as_tensorflow_does(now, times, stored, clock, managed):
    """The preservation clock moves back only when it is ahead of now."""
    assert (
        retention.recover(record_of(times, stored), float(now), NUMBER).last_preserved
        == clock
    )


@pytest.mark.parametrize(("now", "times", "stored", "clock", "managed"), RECOVERY)
def test_recover_forgets_all_that_is_not_managed(now, times, stored, clock, managed):
    """Nothing falls out of both lists: TensorFlow leaves those on disk for ever."""
    found = retention.recover(record_of(times, stored), float(now), NUMBER)
    forgotten = [e.attempt.number for e in found.forgotten]
    assert sorted([*managed, *forgotten]) == [1, 2]


@pytest.mark.parametrize(("now", "behind"), [(1000, 0.0), (50, 0.0), (49, 1.0), (0, 50.0)])
def test_recover_says_how_far_the_clock_is_behind(now, behind):
    """The warning appears only when time itself went backwards."""
    assert (
        retention.recover(record_of((100,), 50.0), float(now), NUMBER).seconds_behind
        == behind
    )


def test_recover_keeps_the_true_time_of_what_is_forgotten():
    """A clamped time is memory only; what leaves keeps the time at which it was saved."""
    found = retention.recover(record_of((100,), 50.0), 40.0, NUMBER)
    assert [entry.time for entry in found.forgotten] == [100.0]


@pytest.mark.parametrize(
    "record", [None, make_record(1, action="claim")], ids=["none", "claim"]
)
def test_recover_without_a_commit_starts_the_clock_a_second_ago(record):
    """A checkpoint saved at once by a manager made again at once is still managed."""
    assert retention.recover(record, 1000.0, NUMBER) == ((), (), 999.0, 0.0)


def test_recover_with_nothing_managed_keeps_the_clock():
    """TensorFlow's row with an empty list of timestamps."""
    found = retention.recover(make_record(3, last_preserved=50.0), 1000.0, NUMBER)
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
        self.last_preserved = retention.recover(None, float(now), NUMBER).last_preserved

    def save(self, number, now):
        entry = make_entry(number, time=now, record=number, attempt=f"{number:08x}")
        swept = retention.sweep([*self.live, entry], self.last_preserved, self.retention)
        self.live, self.last_preserved = swept.live, swept.last_preserved
        self.preserved += [e.attempt.number for e in swept.preserved]
        self.deleted += [e.attempt.number for e in swept.dropped]

    def recreate(self, now):
        record = make_record(
            50,
            live=self.live,
            last_preserved=self.last_preserved,
            rules=self.retention.rules,
        )
        self.live, _, self.last_preserved, _ = retention.recover(record, float(now), NUMBER)

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
    swept = retention.sweep(entries(1, 2, 3, 4, 5, 6), 0.0, Retention(2))
    assert [e.attempt.number for e in swept.dropped] == [1, 2, 3, 4]


def test_sweep_goes_by_order_not_by_time_or_number():
    """The oldest is the one that was committed first."""
    swept = retention.sweep(entries(9, 5, 7), 0.0, Retention(2))
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
    swept = retention.sweep(live, clock, Retention(keep, hours))
    together = sorted(
        (*swept.live, *swept.preserved, *swept.dropped), key=lambda entry: entry.record
    )
    assert retention.without_reasons(together) == tuple(live)
    assert swept.live[-1].attempt == live[-1].attempt


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


# Rules of words


def saved(*rows):
    """Make entries from (step, time, loss), numbered from 1."""
    return [
        dataclasses.replace(
            make_entry(
                number, time=time, record=number, attempt=f"{number:08x}", step=step
            ),
            metrics=(("loss", loss),) if loss != "missing" else (),
        )
        for number, (step, time, loss) in enumerate(rows, 1)
    ]


def with_losses(*losses):
    return saved(*((100 * n, 100.0 * n, loss) for n, loss in enumerate(losses, 1)))


def kept_by(rule, entries):
    swept = retention.sweep(entries, 0.0, Retention(rule))
    together = sorted((*swept.live, *swept.dropped), key=lambda entry: entry.record)
    assert [entry.attempt for entry in together] == [entry.attempt for entry in entries]
    return [entry.attempt.number for entry in swept.live]


def test_latest_keeps_the_newest_few():
    assert kept_by(latest(2), with_losses(1.0, 2.0, 3.0, 4.0)) == [3, 4]
    assert kept_by(latest(9), with_losses(1.0, 2.0)) == [1, 2]


@pytest.mark.parametrize(
    ("mode", "losses", "kept"),
    [
        ("min", (0.1, 0.5, 0.2, 0.9), [1, 3, 4]),
        ("max", (0.1, 0.5, 0.2, 0.9), [2, 4]),
        ("min", (0.3, 0.3, 0.3, 0.9), [2, 3, 4]),
        ("min", ("missing", 0.5, None, 0.6, None), [2, 4, 5]),
        ("max", ("missing", 0.5, None, 0.6, "missing"), [2, 4, 5]),
        ("min", ("missing", "missing", None), [3]),
        ("max", (-0.0, -5.0, -1.0), [1, 3]),
    ],
)
def test_best_keeps_the_best_two_and_the_newest(mode, losses, kept):
    """A missing or NaN metric displaces none; of equal ones the newer is better."""
    assert kept_by(best(2, "loss", mode=mode), with_losses(*losses)) == kept


def test_best_by_a_metric_that_nobody_has_keeps_the_newest():
    assert kept_by(best(1, "accuracy", mode="max"), with_losses(1.0, 2.0)) == [2]


def test_every_steps_keeps_the_first_of_each_stretch():
    """As time goes on, what was kept stays kept."""
    manager, steps = [], [10, 90, 110, 150, 190, 205, 300, 320]
    entries = saved(*((step, float(step), "missing") for step in steps))
    for entry in entries:
        manager = retention.sweep([*manager, entry], 0.0, Retention(every(steps=100))).live
    assert [entry.step for entry in manager] == [10, 110, 205, 300, 320]


def test_every_hours_keeps_one_for_so_much_time():
    """Counted from the one that was kept last, as TensorFlow does."""
    hours = [0, 0.5, 1.1, 1.5, 2.0, 2.1, 2.2, 9, 9.5]
    manager = []
    for entry in saved(*((None, 3600.0 * hour, "missing") for hour in hours)):
        manager = retention.sweep([*manager, entry], 0.0, Retention(every(hours=1))).live
    assert [entry.time / 3600 for entry in manager] == [0, 1.1, 2.1, 9, 9.5]


def test_rules_keep_what_any_of_them_wants_and_say_which_did():
    rule = latest(2) | best(1, "loss", mode="min") | every(steps=200)
    swept = retention.sweep(with_losses(0.5, 0.9, 0.1, 0.8, 0.7), 0.0, Retention(rule))
    assert {e.attempt.number: e.why for e in swept.live} == {
        1: (2,),
        2: (2,),
        3: (1,),
        4: (0, 2),
        5: (0,),
    }
    assert Retention(rule).rules == (
        "latest(2)",
        'best(1, "loss", mode="min")',
        "every(steps=200)",
    )


def test_an_integer_and_none_may_stand_among_rules():
    assert kept_by(2 | best(1, "loss", mode="min"), with_losses(0.1, 0.2, 0.3, 0.4)) == [
        *(1, 3, 4),
    ]
    assert kept_by(None | latest(1), with_losses(1.0, 2.0, 3.0)) == [1, 2, 3]


def test_a_function_keeps_what_it_returns_and_the_newest():
    seen = []

    def even(checkpoints):
        seen.extend(checkpoints)
        return [info for info in checkpoints if info.number % 2 == 0]

    entries = with_losses(0.5, None, "missing")
    assert kept_by(even, entries) == [2, 3]
    assert [(i.name, i.step, i.metrics) for i in seen[:3]] == [
        ("ckpt-1", 100, {"loss": 0.5}),
        ("ckpt-2", 200, {"loss": None}),
        ("ckpt-3", 300, {}),
    ]
    assert kept_by(latest(1) | even, entries) == [2, 3]
    assert Retention(latest(1) | even).rules[1].endswith("even")


def test_a_function_that_fails_deletes_nothing(caplog):
    """Neither the save nor a checkpoint is lost for an error in it."""

    def wrong(checkpoints):
        raise LookupError("oh")

    assert kept_by(wrong, with_losses(1.0, 2.0, 3.0)) == [1, 2, 3]
    assert "wrong failed; nothing is deleted" in caplog.text and "oh" in caplog.text


@pytest.mark.parametrize(
    "rule",
    [every(overhead=0.1), latest(2) | on_signal("SIGTERM"), 0 | latest(1), -1 | latest(1)],
    ids=str,
)
def test_a_rule_that_does_not_say_what_to_keep_is_refused(rule):
    with pytest.raises(ConfigError, match="does not say what to keep"):
        Retention(rule)


@pytest.mark.parametrize("rule", [latest, best, every], ids=lambda rule: rule.__name__)
def test_a_word_that_was_not_called_is_no_function_of_the_users(rule):
    """It would fail at each save, and nothing would ever be deleted."""
    with pytest.raises(ConfigError, match=rf"write {rule.__name__}\(\.\.\.\)"):
        Retention(rule)
    with pytest.raises(ConfigError, match="write"):
        latest(1) | rule


def test_more_rules_than_a_record_can_list_are_refused():
    """Not at the first commit."""
    rule = latest(1)
    for _ in range(64):
        rule = rule | latest(1)
    with pytest.raises(ConfigError, match="at most 64"):
        Retention(rule)


def test_hours_beside_rules_are_refused():
    with pytest.raises(ConfigError, match="every\\(hours="):
        Retention(latest(2), 6)


def test_recover_with_rules_forgets_nothing():
    """TensorFlow's clock is that of its own rule."""
    record = record_of((100, 200), 150.0)
    found = retention.recover(record, 50.0, Retention(latest(1)))
    assert found == (record.live, (), 150.0, 0.0)


def test_number_says_what_it_keeps():
    """Not of one that is pinned: the number does not see it."""
    first, *others = with_losses(1.0, 2.0, 3.0)
    entries = [dataclasses.replace(first, pinned=True), *others]
    swept = retention.sweep(entries, 0.0, Retention(2))
    rules = Retention(2).rules
    assert [entry.kept_by(rules) for entry in swept.live] == [
        *(["pinned"], ["max_to_keep=2"], ["max_to_keep=2"]),
    ]
    assert retention.spells_number(rules)
    assert not retention.spells_number(Retention(latest(2)).rules)


@pytest.mark.parametrize(("keep", "reasons"), [(2, {(0,)}), (None, {()})])
def test_number_after_rules_forgets_their_reasons(keep, reasons):
    """They would point into the list of another record."""
    rule = every(steps=1) | latest(3)
    kept = retention.sweep(with_losses(1.0, 2.0, 3.0), 0.0, Retention(rule)).live
    assert any(1 in entry.why for entry in kept)
    swept = retention.sweep(kept, 0.0, Retention(keep))
    assert {entry.why for entry in swept.live} == reasons
    assert len(Retention(keep).rules) == len(max(reasons))


RULES = st.one_of(
    st.builds(latest, st.integers(1, 4)),
    st.builds(
        lambda number, mode: best(number, "loss", mode=mode),
        st.integers(1, 3),
        st.sampled_from(["min", "max"]),
    ),
    st.builds(lambda steps: every(steps=steps), st.integers(1, 500)),
    st.builds(lambda minutes: every(minutes=minutes), st.integers(1, 100)),
)
ROWS = st.tuples(
    st.none() | st.integers(0, 1000),
    st.floats(0, 1e5),
    st.just("missing") | st.none() | st.floats(-10, 10),
)


@settings(max_examples=MAX_EXAMPLES)
@given(rows=st.lists(ROWS, min_size=1, max_size=10), rules=st.lists(RULES, min_size=1))
def test_rules_together_keep_the_union_and_the_newest(rows, rules):
    """What one keeps no other can take away; nobody drops the newest."""
    entries = saved(*rows)
    together = rules[0]
    for rule in rules[1:]:
        together = together | rule
    wanted = {number for rule in rules for number in kept_by(rule, entries)}
    assert set(kept_by(together, entries)) == wanted
    assert len(entries) in wanted


@settings(max_examples=MAX_EXAMPLES)
@given(
    rows=st.lists(ROWS, min_size=1, max_size=12),
    number=st.integers(1, 3),
    mode=st.sampled_from(["min", "max"]),
)
def test_the_best_of_all_times_is_always_there(rows, number, mode):
    """Retention after each save never loses one of the best few of all so far."""
    live = ()
    rule = best(number, "loss", mode=mode)
    so_far = []
    for entry in saved(*rows):
        so_far.append(entry)
        live = retention.sweep([*live, entry], 0.0, Retention(rule)).live
        there = {one.attempt for one in live}
        assert {one.attempt for one in retention.best_of(so_far, rule)[:number]} <= there
        assert len(live) <= number + 1
