"""The words for what to save and keep: what they take, and how they are spelled."""

from __future__ import annotations

from datetime import timedelta
from inspect import signature

import pytest

from distckpt.errors import ConfigError
from distckpt.policy import AnyOf, best, every, latest, on_request, on_signal, parse


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


@pytest.mark.parametrize(
    ("rule", "text"),
    [
        (every(steps=500), "every(steps=500)"),
        (every(minutes=0.5), "every(minutes=0.5)"),
        (every(optimal_for_mtbf_hours=3), "every(optimal_for_mtbf_hours=3)"),
        (latest(), "latest(1)"),
        (best(2, "val", mode="max"), 'best(2, "val", mode="max")'),
        (best(1, 'a"b', mode="min"), 'best(1, "a\\"b", mode="min")'),
        (3 | latest(2) | None, "3 | latest(2) | None"),
        (latest(2) | (latest(1) | latest(4)), "latest(2) | latest(1) | latest(4)"),
        (
            on_signal("SIGTERM", file="/somewhere"),
            'on_signal("SIGTERM", file=..., grace_period_seconds=30.0)',
        ),
        (latest(1) | sorted, "latest(1) | sorted"),
    ],
)
def test_rule_is_spelled_as_it_is_written(rule, text):
    """Ranks compare the spelling, and people read it in records and notebooks."""
    assert str(rule) == repr(rule) == text


def test_rules_are_values():
    assert every(steps=5) == every(steps=5) != every(steps=6)
    assert latest(1) | latest(2) == AnyOf((latest(1), latest(2)))
    assert len({latest(1), latest(1), best(1, "a", mode="min")}) == 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: every(),
        lambda: every(steps=1, hours=1),
        lambda: every(steps=0),
        lambda: every(steps=1.5),
        lambda: every(steps=True),
        lambda: every(hours=0),
        lambda: every(hours=-1),
        lambda: every(hours=float("inf")),
        lambda: every(minutes="5"),
        lambda: every(overhead=1.0),
        lambda: latest(0),
        lambda: latest("3"),
        lambda: best(0, "loss", mode="min"),
        lambda: best(1, "", mode="min"),
        lambda: best(1, 5, mode="min"),
        lambda: best(1, "loss", mode="least"),
        lambda: latest(1) | "latest",
        lambda: latest(1) | 2.5,
        lambda: True | latest(1),
    ],
)
def test_rule_with_this_argument_is_refused(make):
    with pytest.raises(ConfigError):
        make()


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: every(500),
            "every(500): too many positional arguments; write every(steps=500).",
        ),
        (lambda: every(step=5), "write every(steps=5)."),
        (lambda: every(minute=2.5), "write every(minutes=2.5)."),
        (lambda: every(500, minutes=1), "write every(steps=500)."),
        (lambda: every("500"), "write every(steps=500)."),
        (lambda: every(timedelta(minutes=5)), "write every(minutes=5)."),
        (lambda: every(), "such as every(steps=500)"),
        (lambda: latest(3, 4), "write latest(3)."),
        (lambda: latest(count=2), "write latest(2)."),
        (
            lambda: best("loss"),
            'write best("loss", mode="min") if the lowest is best, else',
        ),
        (
            lambda: best(2, "loss"),
            'write best(2, "loss", mode="min") if the lowest is best',
        ),
        (lambda: best(2, "loss", "max"), 'write best(2, "loss", mode="max").'),
        (lambda: best("loss", 2, mode="min"), 'write best(2, "loss", mode="min").'),
        (lambda: best(2, mode="min"), 'write best(2, "val_loss", mode="min").'),
        (lambda: best(name="acc", mode="max"), 'write best("acc", mode="max").'),
        (lambda: parse("every(500)"), "write every(steps=500)."),
        (
            lambda: parse("latest(1) | best(2, 'loss')"),
            'write best(2, "loss", mode="min") if',
        ),
        (lambda: parse("lates(3)"), "did you mean 'latest'?"),
        (lambda: parse("latest"), "write latest(...)"),
    ],
)
def test_call_with_other_arguments_is_answered_with_the_line_to_write(call, text):
    with pytest.raises(ConfigError) as caught:
        call()
    assert text in str(caught.value)


def test_best_without_a_number_keeps_one():
    expected = best(1, "loss", mode="min")
    assert best("loss", mode="min") == best(metric="loss", mode="min") == expected
    assert best(number=1, metric="loss", mode="min") == expected
    assert parse('best("loss", mode="min")') == expected


def test_words_still_have_their_signatures():
    """For help() and completion."""
    assert [*signature(every).parameters][:2] == ["steps", "seconds"]
    assert [*signature(best).parameters] == ["number", "metric", "mode"]
    assert every.__name__ == "every" and "max_to_keep" in every.__doc__


@pytest.mark.parametrize(
    "rule",
    [
        latest(3),
        latest() | best(2, "val_loss", mode="min"),
        best(1, 'a"b\u2028', mode="max") | every(hours=1.5) | every(steps=10),
    ],
)
def test_rules_for_keeping_are_read_as_they_are_spelled(rule):
    """What records say of their rules is what the command takes."""
    assert parse(str(rule)) == rule
    assert parse(f"  {rule} ") == rule


@pytest.mark.parametrize(
    "text",
    [
        "",
        "3",
        "latest",
        "latest(1) & latest(2)",
        "latest(1); latest(2)",
        "latest(1) | None",
        "__import__('os').system('true')",
        "latest(__import__('os').getpid())",
        "latest(*[1])",
        "latest(**{'number': 1})",
        "latest(1)(2)",
        "on_signal('SIGTERM')",
        "latest(1, 2)",
        "latest(-1)",
        "every(days=1)",
        "latest(1" + " | latest(1" * 5000,
        "(" * 500 + "latest(1)" + ")" * 500,
        "latest(1)\0",
    ],
)
def test_text_that_is_no_rule_is_refused_and_runs_nothing(text):
    with pytest.raises(ConfigError):
        parse(text)


def test_on_request_is_spelled_and_is_a_value():
    assert str(5 | on_request()) == "5 | on_request()"
    assert on_request() == on_request()
