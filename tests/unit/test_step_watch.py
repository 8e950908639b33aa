"""A step counter that does not move, or goes back, is named before work is lost."""

from __future__ import annotations

import logging
from datetime import timedelta

import numpy as np
import pytest
import torch

from distckpt import Checkpoint, CheckpointManager, ConfigError, UnsupportedError, every


def _warnings(caplog):
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def _manager(run_dir, step, **more):
    more = {"max_to_keep": 2, "checkpoint_interval": 10} | more
    return CheckpointManager(
        Checkpoint(x=torch.zeros(1)), run_dir, step_counter=step, **more
    )


@pytest.mark.parametrize("kind", ["tensor", "callable"])
def test_counter_that_was_rebound_draws_one_warning(run_dir, caplog, kind):
    """After a hundred calls, with the likely cause."""
    step = torch.tensor(0)
    counter = step if kind == "tensor" else lambda frozen=step: frozen
    manager = _manager(run_dir, counter)
    for _ in range(99):
        step = step + 1
        manager.save()
    assert _warnings(caplog) == []
    for _ in range(200):
        step = step + 1
        manager.save()
    (text,) = _warnings(caplog)
    assert "step_counter has been 0 for 100 calls" in text
    assert "nothing was saved since ckpt-1" in text
    assert "step = step + 1" in text and "step += 1" in text
    manager.close()


def test_counter_that_stands_still_where_every_call_saves_is_named_too(run_dir, caplog):
    """Then all these checkpoints say that they are of one step."""
    with _manager(run_dir, torch.tensor(7), checkpoint_interval=None) as manager:
        for _ in range(100):
            manager.save()
    assert "all these checkpoints are of one step" in _warnings(caplog)[0]


def test_closing_after_many_calls_and_one_save_draws_the_warning(run_dir, caplog):
    """The counter moved, and the interval was never over."""
    step = torch.tensor(0)
    with _manager(run_dir, step, checkpoint_interval=5000) as manager:
        for _ in range(1000):
            step += 1
            manager.save()
        assert _warnings(caplog) == []
    (text,) = _warnings(caplog)
    assert "called 1000 times and has saved once" in text
    assert "steps 1 to 1000" in text and "checkpoint_interval=5000" in text


def test_job_that_saves_now_and_then_closes_without_a_warning(run_dir, caplog):
    """Nothing is wrong with it."""
    step = torch.tensor(0)
    with _manager(run_dir, step, checkpoint_interval=400) as manager:
        for _ in range(1000):
            step += 1
            manager.save()
        manager.save(check_interval=False)
    assert _warnings(caplog) == []


def test_explicit_save_that_saves_nothing_draws_a_warning(run_dir, caplog):
    """With the cause where the counter has not moved for some calls."""
    step = torch.tensor(0)
    with _manager(run_dir, step) as manager:
        for _ in range(20):
            step = step + 1
            manager.save()
        assert manager.save(check_interval=False) is None
    text = _warnings(caplog)[0]
    assert (
        "save(check_interval=False) saved nothing: step_counter is 0, which ckpt-1" in text
    )
    assert "step = step + 1" in text


def test_explicit_save_right_after_the_due_one_draws_none(run_dir, caplog):
    """The last step of the loop was due: it is saved, and all is well."""
    step = torch.tensor(0)
    with _manager(run_dir, step) as manager:
        for _ in range(11):
            step += 1
            manager.save()
        assert manager.save(check_interval=False) is None
    assert _warnings(caplog) == []


def test_explicit_save_of_what_was_just_restored_draws_none_at_first(run_dir, caplog):
    """A job that was through is started again; a second call at that step is a mistake."""
    step = torch.tensor(3)
    with _manager(run_dir, step) as manager:
        manager.save()
    checkpoint = Checkpoint(x=torch.zeros(1), step=step)
    with CheckpointManager(checkpoint, run_dir + "2", 2, step_counter=step) as manager:
        manager.save()
    with CheckpointManager(
        checkpoint, run_dir + "2", 2, step_counter=step, checkpoint_interval=5
    ) as manager:
        manager.restore_or_initialize()
        assert manager.save(check_interval=False) is None
        assert _warnings(caplog) == []
        assert manager.save(check_interval=False) is None
    assert "saved nothing: step_counter is 3, which ckpt-1 has" in _warnings(caplog)[0]


def test_counter_that_goes_back_draws_one_warning(run_dir, caplog):
    """As in TensorFlow nothing is due then."""
    step = torch.tensor(900)
    with _manager(run_dir, step) as manager:
        manager.save()
        step.fill_(0)
        for _ in range(50):
            step += 1
            assert manager.save() is None
        step.fill_(0)
        manager.save()
    (text,) = _warnings(caplog)
    assert "went back from 900 to 1" in text and "checkpoint_interval=10" in text


def test_restore_that_sets_the_counter_back_draws_no_warning(run_dir, caplog):
    """The manager has done it."""
    step = torch.tensor(0)
    checkpoint = Checkpoint(step=step)
    with CheckpointManager(
        checkpoint, run_dir, None, step_counter=step, checkpoint_interval=10
    ) as manager:
        for _ in range(30):
            step += 1
            manager.save()
        manager.restore(1)
        for _ in range(30):
            step += 1
            manager.save()
    assert _warnings(caplog) == []


@pytest.mark.parametrize(
    "counter",
    [5, True, 2.0, "3", b"3", np.int64(4), np.float32(4), np.bool_(True), 3 + 0j],
    ids=lambda value: type(value).__name__,
)
def test_value_that_never_changes_is_no_step_counter(run_dir, counter):
    """Scalars of numpy, strings and bools included."""
    with pytest.raises(UnsupportedError, match="never changes"):
        _manager(run_dir, counter)


@pytest.mark.parametrize("counter", [{}, [1], object()], ids=["dict", "list", "object"])
def test_what_int_does_not_accept_is_no_step_counter(run_dir, counter):
    """Found when the manager is made."""
    with pytest.raises(UnsupportedError, match=r"something that int\(\) accepts"):
        _manager(run_dir, counter)


@pytest.mark.parametrize("returned", ["3", True, None, b"3"])
def test_callable_counter_has_to_return_a_number(run_dir, returned):
    """int() would take some of these."""
    with _manager(run_dir, lambda: returned) as manager:
        with pytest.raises(ConfigError, match="is no step"):
            manager.save()


def test_counter_that_changes_in_place_is_accepted(run_dir):
    """An array without dimensions, an object with __int__, a callable."""

    class Counter:
        def __init__(self):
            self.value = 1

        def __int__(self):
            return self.value

    array = np.zeros((), dtype=np.int64)
    for number, counter in enumerate([array, Counter(), lambda: np.int64(3)]):
        with _manager(f"{run_dir}{number}", counter) as manager:
            assert manager.save()


def _save_often(run_dir, checkpoint, change):
    step = torch.tensor(0)
    with CheckpointManager(checkpoint, run_dir, 2, step_counter=step) as manager:
        for _ in range(12):
            step += 1
            change(int(step))
            manager.save()


def test_tracked_number_that_is_named_like_the_step_and_stands_still(run_dir, caplog):
    """``step += 1`` on a plain number does not reach the one that is tracked."""
    _save_often(run_dir, Checkpoint(x=torch.zeros(1), step=0, epoch=3), lambda _: None)
    (text,) = _warnings(caplog)
    assert "step is 0 in each of the last 10 checkpoints" in text
    assert "from 1 to 10" in text and "checkpoint.step = step" in text


def test_tracked_number_that_is_assigned_draws_no_warning(run_dir, caplog):
    """The program does what the page says."""
    checkpoint = Checkpoint(step=0)
    _save_often(run_dir, checkpoint, lambda step: setattr(checkpoint, "step", step))
    assert _warnings(caplog) == []


@pytest.mark.parametrize("interval", [0, -3])
def test_interval_of_zero_or_less_is_accepted_with_a_warning(run_dir, caplog, interval):
    """As in TensorFlow each call at a new step saves."""
    step = torch.tensor(0)
    with _manager(run_dir, step, checkpoint_interval=interval) as manager:
        assert f"checkpoint_interval={interval}" in _warnings(caplog)[0]
        for _ in range(3):
            step += 1
            assert manager.save()


@pytest.mark.parametrize("timeout", [60, 60.0, timedelta(seconds=60)])
def test_lengths_of_time_are_seconds_or_a_timedelta(run_dir, timeout):
    """In all arguments."""
    step = torch.tensor(0)
    with CheckpointManager(
        Checkpoint(x=1),
        run_dir,
        3,
        keep_checkpoint_every_n_hours=timedelta(minutes=90),
        step_counter=step,
        checkpoint_interval=timedelta(minutes=5),
        timeout=timeout,
    ) as manager:
        assert manager._session.timeout_seconds == 60.0
        assert manager._session.chief._retention.keep_every_n_hours == 1.5
        (rule,) = manager._cadence.gate.when.clocked
        assert rule.seconds == 300.0


def test_rules_take_a_timedelta():
    """Beside words as well."""
    assert every(minutes=timedelta(minutes=20)) == every(minutes=20)
    rule = every(steps=500) | timedelta(hours=1)
    assert str(rule) == "every(steps=500) | every(seconds=3600.0)"


@pytest.mark.parametrize("timeout", [0, -1, True, "60", None, float("nan"), float("inf")])
def test_other_timeouts_are_refused(run_dir, timeout):
    """With what would do."""
    with pytest.raises(ConfigError, match=r"timeout must be a number of seconds or a"):
        CheckpointManager(Checkpoint(x=1), run_dir, 3, timeout=timeout)
