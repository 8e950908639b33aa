"""Save now? TensorFlow's rule of an integer, and rules of words."""

from __future__ import annotations

import pytest

from distckpt.errors import ConfigError
from distckpt.gate import IntervalGate, SaveWhen
from distckpt.policy import every, latest, on_signal


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
        (None, SaveWhen(saves_always=True)),
        (5, SaveWhen(steps=(5,))),
        (every(steps=5), SaveWhen(steps=(5,))),
        (on_signal("SIGTERM"), SaveWhen(told=on_signal("SIGTERM"))),
        (5 | on_signal("SIGTERM"), SaveWhen(steps=(5,), told=on_signal("SIGTERM"))),
        (on_signal("SIGTERM") | 5, SaveWhen(steps=(5,), told=on_signal("SIGTERM"))),
        (
            None | on_signal("SIGTERM"),
            SaveWhen(saves_always=True, told=on_signal("SIGTERM")),
        ),
        (
            every(steps=9) | every(minutes=2) | 7 | every(overhead=0.1),
            SaveWhen(steps=(7, 9), clocked=(every(minutes=2), every(overhead=0.1))),
        ),
    ],
)
def test_checkpoint_interval_is_a_number_a_rule_or_both(given, expected):
    assert SaveWhen.of(given) == expected


@pytest.mark.parametrize("given", ["5", 5.0, True, [5], latest(3), min, 5 | latest(3)])
def test_checkpoint_interval_of_another_kind_is_refused(given):
    with pytest.raises(ConfigError, match="checkpoint_interval"):
        SaveWhen.of(given)
    with pytest.raises((ConfigError, TypeError)):
        SaveWhen.of(on_signal("SIGTERM") | given)


def test_checkpoint_interval_with_two_rules_for_the_end_is_refused():
    with pytest.raises(ConfigError, match="at most one on_signal"):
        SaveWhen.of(on_signal("SIGTERM") | on_signal("SIGUSR1"))


def test_gate_says_what_speaks_for_a_save_whatever_else_does():
    """Every rule is asked, and has its own words."""
    gate = IntervalGate(every(steps=10) | every(steps=4))
    assert len(gate.reasons(3, True)) == 2
    gate.last_step = 100
    assert gate.reasons(103, True) == []
    assert gate.reasons(105, True) == ["every(steps=4): 5 since step 100"]
    assert gate.reasons(110, True) == [
        "every(steps=10): 10 since step 100",
        "every(steps=4): 10 since step 100",
    ]
    assert gate.reasons(101, False) == ["asked for with check_interval=False"]
    assert IntervalGate(None).reasons(None, True) == ["every call saves"]


def test_gate_says_what_a_refused_call_waits_for():
    gate = IntervalGate(10 | every(minutes=5) | on_signal("SIGTERM"))
    gate.last_step, gate.refused_step = 100, 103
    refusal = gate.refusal()
    assert not refusal.saves
    assert refusal.reasons == (
        "every(steps=10): 3 since step 100",
        "every(minutes=5): it is not time yet",
        'on_signal("SIGTERM", grace_period_seconds=30.0): not told',
    )
    assert str(refusal).startswith("not saved: every(steps=10)")
    gate.refused_step = 100
    assert gate.refusal().reasons == ("step 100 was saved, or restored, before",)


def test_gate_of_a_signal_alone_allows_only_calls_that_ask_for_it():
    gate = IntervalGate(on_signal("SIGTERM"))
    assert not gate.allows(3, True)
    assert gate.allows(3, False)
    gate.last_step = 3
    assert not gate.allows(3, False) and not gate.has_news(3)
    assert gate.has_news(4) and gate.has_news(None)
