"""What people see who print an object, in a log or a notebook."""

from __future__ import annotations

from datetime import datetime, timezone

import pytest
import torch

from distckpt import (
    Checkpoint,
    CheckpointInfo,
    CheckpointManager,
    CheckpointState,
    ConfigError,
    Event,
    best,
    every,
    get_checkpoint_state,
    latest,
    on_signal,
)

TIME = 1796101445.5  # 2026-12-01 05:04:05.5 UTC
DATE = "2026-12-01T05:04:05Z"
# No calendar reaches so far; anybody may have written it into a record.
FAR = 1e300


def test_dates_of_a_state_are_dates_too():
    """Beside the numbers that TensorFlow has."""
    state = CheckpointState("runs/ckpt-7", ["runs/ckpt-7"], [TIME], TIME - 60)
    assert state.all_model_checkpoint_timestamps == [TIME]
    assert state.all_model_checkpoint_dates == [
        datetime(2026, 12, 1, 5, 4, 5, 500_000, tzinfo=timezone.utc)
    ]
    assert state.last_preserved_date.isoformat() == "2026-12-01T05:03:05.500000+00:00"
    assert repr(state) == (
        "CheckpointState(model_checkpoint_path='runs/ckpt-7', "
        "all_model_checkpoint_paths=['runs/ckpt-7'], "
        f"all_model_checkpoint_dates=['{DATE}'], "
        "last_preserved_date='2026-12-01T05:03:05Z')"
    )


def test_date_of_an_info_is_a_date_too():
    info = CheckpointInfo("ckpt-7", 7, 120, TIME, 4096, {"loss": 0.5})
    assert info.date.timestamp() == info.time == TIME
    assert repr(info) == (
        f"CheckpointInfo(name='ckpt-7', number=7, step=120, date='{DATE}', "
        "size_bytes=4096, metrics={'loss': 0.5})"
    )


def test_date_of_an_event_is_a_date_too():
    """What says nothing is left out, as in its JSON."""
    event = Event("save", TIME, 0, 0.25, "ckpt-7", 120)
    assert event.date.timestamp() == TIME and event.date.tzinfo is timezone.utc
    assert repr(event) == (
        f"Event(kind='save', date='{DATE}', rank=0, seconds=0.25, checkpoint='ckpt-7', "
        "step=120)"
    )
    assert repr(Event("claim", TIME, 3)) == (
        f"Event(kind='claim', date='{DATE}', rank=3, seconds=0)"
    )


@pytest.mark.parametrize(
    "thing",
    [
        CheckpointState("a", ["a"], [FAR], FAR),
        CheckpointInfo("a", 1, None, FAR, 0, {}),
        Event("save", FAR, 0),
    ],
)
def test_time_beyond_the_calendar_is_shown_as_a_number(thing):
    assert "1e+300 s" in repr(thing)


def test_date_beyond_the_calendar_is_an_error_that_says_so():
    with pytest.raises(ConfigError, match="outside the calendar"):
        _ = Event("save", FAR, 0).date


def test_rules_are_shown_as_they_are_written():
    rules = every(steps=500) | on_signal("SIGTERM")
    assert (
        repr(rules) == 'every(steps=500) | on_signal("SIGTERM", grace_period_seconds=30.0)'
    )
    assert repr([latest(3), best("loss", mode="min")]) == (
        '[latest(3), best(1, "loss", mode="min")]'
    )


def test_manager_shows_where_who_and_what_there_is(run_dir):
    """From what it has in memory: also when it is closed, or could not be made."""
    checkpoint = Checkpoint(step=torch.tensor(1))
    with CheckpointManager(checkpoint, run_dir, max_to_keep=3) as manager:
        start = f"<CheckpointManager of {run_dir}: rank 0 of 1"
        assert repr(manager) == f"{start}, no checkpoint, 0 managed>"
        for _ in range(2):
            manager.save()
        assert repr(manager) == f"{start}, newest ckpt-2, 2 managed>"
    assert repr(manager) == f"{start}, newest ckpt-2, 2 managed; this manager is closed>"
    assert "could not be made" in repr(object.__new__(CheckpointManager))
    assert str(get_checkpoint_state(run_dir)).count("Z'") == 3
