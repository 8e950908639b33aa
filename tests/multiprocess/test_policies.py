"""Rules for saving and keeping on real ranks: the chief decides, all do the same."""

from __future__ import annotations

import itertools
import os
import time

import pytest
import torch.distributed as dist
from harness import run_ranks, values_of
from outcome_helpers import (
    assert_all_whole,
    attempt_directory,
    flip_last_bit,
    make_manager,
    outcome,
    state_of,
    train,
)

from distckpt import (
    CheckpointOptions,
    best,
    every,
    latest,
    on_signal,
    readers,
)
from distckpt import open as open_checkpoint
from distckpt.run_directory import RunDirectory

_SECONDS = 20.0


def _make(directory, max_to_keep, when=None, checkpoint=None):
    return make_manager(
        directory, max_to_keep, when, checkpoint=checkpoint, timeout_seconds=_SECONDS
    )


def _numbers(manager):
    return [int(path.rpartition("-")[2]) for path in manager.checkpoints]


# Keeping

_LOSSES = (0.5, 0.3, float("nan"), 0.9, 0.4, 0.8)


def _keep_the_best(rank, directory, is_async):
    rule = latest(1) | best(2, "loss", mode="min")
    kept, options = [], CheckpointOptions(enable_async=is_async)
    checkpoint, manager = _make(directory, rule)
    for index, loss in enumerate(_LOSSES):
        if index == 3:  # as after a restart
            manager.close()
            checkpoint, manager = _make(directory, rule)
            manager.restore_or_initialize()
        train(checkpoint)
        # The chief's count; ranks may have other numbers, or none.
        said = {"loss": loss} if rank == 0 else {"loss": 0.0} if index % 2 else None
        manager.save(options=options, metrics=said, metadata={"index": index, "by": rank})
        manager.sync()
        kept.append(_numbers(manager))
    manager.close()
    return kept


@pytest.mark.parametrize(
    "is_async",
    [
        pytest.param(False, id="at-once"),
        pytest.param(True, id="behind", marks=pytest.mark.full),
    ],
)
def test_the_best_and_the_newest_are_kept_over_restarts(tmp_path, is_async):
    """A NaN displaces none that has a number; all ranks see the same lists."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_keep_the_best, 2, directory, is_async))
    assert results[0] == results[1]
    assert results[0] == [[1], [1, 2], [1, 2, 3], [1, 2, 4], [2, 5], [2, 5, 6]]
    assert_all_whole(directory)
    left = [name for name in os.listdir(directory) if name.startswith("ckpt-")]
    assert len(left) == 3
    with open_checkpoint(os.path.join(directory, "ckpt-5")) as opened:
        assert opened.metrics == {"loss": 0.4}
        assert opened.metadata == {"index": 4, "by": 0}


def _keep_by_function(rank, directory):
    def odd(checkpoints):
        return [one for one in checkpoints if one.number % 2]

    checkpoint, manager = _make(directory, odd)
    for _ in range(4):
        train(checkpoint)
        manager.save()
    manager.close()
    return _numbers(manager)


def test_a_function_of_the_users_decides_what_stays(tmp_path):
    results = values_of(run_ranks(_keep_by_function, 2, str(tmp_path)))
    assert results == [[1, 3, 4]] * 2


def _disagree(rank, directory):
    return outcome(_make, directory, latest(1 + rank))


def test_other_rules_on_another_rank_are_refused_on_all(tmp_path):
    for told in values_of(run_ranks(_disagree, 2, str(tmp_path))):
        assert told.kind == "ConfigError" and "different arguments" in told.text


def _say_nonsense(rank, directory):
    checkpoint, manager = _make(directory, 3)
    train(checkpoint)
    said = {"loss": "low"} if rank == 1 else {"loss": 0.5}
    first = outcome(manager.save, metrics=said)
    second = outcome(manager.save, metrics={"loss": 0.5})
    manager.close()
    return first, second


def test_metrics_that_are_none_on_one_rank_fail_that_save_on_all(tmp_path):
    for first, second in values_of(run_ranks(_say_nonsense, 2, str(tmp_path))):
        assert first.kind == "ConfigError" and "'loss' must be a number" in first.text
        assert second.kind == "ok" and second.text.endswith("ckpt-1")


# Saving


def _save_by_the_clock(rank, directory, when):
    checkpoint, manager = _make(directory, None, when)
    manager.restore_or_initialize()
    began, saved = time.monotonic(), []
    # Ranks need not have the same clock, nor the same pace.
    while len(saved) < 3:
        train(checkpoint)
        time.sleep(0.004 * (1 + rank))
        if manager.save() is not None:
            seconds = time.monotonic() - began
            saved.append((int(checkpoint.step), seconds, manager.last_decision))
        else:
            assert not manager.last_decision.saves
    manager.close()
    return saved


@pytest.mark.full
def test_a_rule_of_time_saves_by_the_chiefs_clock_at_one_step_on_all(tmp_path):
    when = every(seconds=1.5) | on_signal("SIGUSR1")
    one, other = values_of(run_ranks(_save_by_the_clock, 2, str(tmp_path), when))
    assert [step for step, _, _ in one] == [step for step, _, _ in other]
    for number, (_, seconds, decision) in enumerate(one, 1):
        # Asked about once a second.
        assert 1.5 * number <= seconds < 4.0 * number
        assert decision.saves and decision.reasons[0].startswith("every(seconds=1.5): ")
    assert [decision for _, _, decision in one] == [decision for _, _, decision in other]


def _save_by_either(rank, directory):
    when = every(steps=100) | every(hours=1)
    checkpoint, manager = _make(directory, None, when)
    assert str(manager.last_decision) == "not saved: save() was not called yet"
    said = []
    for _ in range(201):
        train(checkpoint)
        manager.save()
        said.append(str(manager.last_decision))
    manager.close()
    return said


def test_each_rule_speaks_for_itself(tmp_path):
    """The first call saves, as with a number; then every hundredth."""
    said, other = values_of(run_ranks(_save_by_either, 2, str(tmp_path)))
    assert said == other
    assert [n for n, text in enumerate(said, 1) if text.startswith("saved")] == [
        1,
        101,
        201,
    ]
    assert said[0] == "saved: every(steps=100): nothing was saved or restored before"
    assert said[1] == (
        "not saved: every(steps=100): 1 since step 1; every(hours=1): it is not time yet"
    )
    assert said[100] == "saved: every(steps=100): 100 since step 1"


def _save_as_cost_allows(rank, directory):
    checkpoint, manager = _make(directory, 2, every(overhead=0.2))
    manager.restore_or_initialize()
    began, saved, cost = time.monotonic(), [], 0.0
    for step in itertools.count():
        train(checkpoint)
        time.sleep(0.002)
        dist.barrier()  # waiting for a rank that the machine holds up is no cost of a save
        called = time.monotonic()
        if manager.save() is not None:
            saved.append(str(manager.last_decision))
            if step >= 1000:  # the costs of those before are made up for
                overhead = cost / (called - began)
                break
            cost += time.monotonic() - called
    manager.close()
    return saved, overhead


@pytest.mark.full
def test_overhead_is_measured_and_kept(tmp_path):
    """The first save is to know the cost; then no more often than it allows."""
    for saved, overhead in values_of(run_ranks(_save_as_cost_allows, 2, str(tmp_path))):
        assert "is not known yet" in saved[0]
        assert len(saved) >= 2 and all("every(overhead=0.2): " in text for text in saved)
        assert overhead < 0.2


def _fail_by_the_clock(rank, directory):
    checkpoint, manager = _make(directory, None, every(seconds=0.1))
    manager.restore_or_initialize()
    state = readers.read_record(RunDirectory.at(directory))
    time.sleep(0.2)
    train(checkpoint)
    checkpoint.odd = object() if rank == 1 else 5
    first = outcome(manager.save)
    checkpoint.odd = 5
    told, deadline = None, time.monotonic() + 10
    while told is None and time.monotonic() < deadline:
        time.sleep(0.01)
        told = manager.save()
    manager.close()
    return first, told, state.committed, state_of(checkpoint)["save_counter"]


def test_a_save_by_the_clock_that_failed_is_due_again(tmp_path):
    results = values_of(run_ranks(_fail_by_the_clock, 2, str(tmp_path)))
    for first, told, committed, counter in results:
        assert first.kind != "ok" and committed == ()
        assert told.endswith("ckpt-1") and counter == 1


# Restoring what is asked for


def _restore_this_and_that(rank, directory):
    rule = latest(9) | best(1, "loss", mode="min")
    checkpoint, manager = _make(directory, rule)
    states = {}
    for loss in (0.5, 0.2, 0.9, None):
        train(checkpoint)
        said = None if loss is None else {"loss": loss, "low": -loss}
        path = manager.save(metrics=said)
        states[int(path.rpartition("-")[2])] = state_of(checkpoint)["model"]
    told = {}
    asked = {
        "latest": "latest",
        "best": "best",
        "lowest": best(1, "low", mode="min"),
        "number": 1,
        "name": "ckpt-2",
        "path": os.path.join(directory, "ckpt-3"),
        "gone": 7,
        "no metric": best(1, "accuracy", mode="max"),
        "no name": "elephant",
        "elsewhere": "/elsewhere/ckpt-1",
        "nonsense": 2.5,
        "not alike": 1 + rank,
    }
    for name, which in asked.items():
        before = state_of(checkpoint)["model"]
        first = outcome(manager.restore, which)
        found = state_of(checkpoint)["model"]
        if first.kind == "ok":
            assert found == states[int(first.text.rpartition("-")[2])]
        else:
            assert found == before
        told[name] = (first.kind, first.text)
    # An older one: the next save has a number of its own, and is the newest.
    manager.restore(1)
    train(checkpoint)
    told["next"] = ("ok", manager.save())
    told["then"] = ("ok", manager.restore("latest"))
    manager.close()
    return told


def test_restore_takes_what_is_asked_for(tmp_path):
    directory = str(tmp_path / "run")
    one, other = values_of(run_ranks(_restore_this_and_that, 2, directory))
    assert one == other
    numbers = {
        name: int(text.rpartition("-")[2])
        for name, (kind, text) in one.items()
        if kind == "ok"
    }
    assert numbers == {
        "latest": 4,
        "best": 2,
        "lowest": 3,
        "number": 1,
        "name": 2,
        "path": 3,
        "next": 5,
        "then": 5,
    }
    errors = {name: told for name, told in one.items() if told[0] != "ok"}
    assert {name: kind for name, (kind, _) in errors.items()} == {
        "gone": "CheckpointNotFound",
        "no metric": "CheckpointNotFound",
        "no name": "CheckpointNotFound",
        "elsewhere": "ConfigError",
        "nonsense": "ConfigError",
        "not alike": "ConfigError",
    }
    assert "newest first: ckpt-4, ckpt-3" in errors["gone"][1]
    assert "has the metric 'accuracy'" in errors["no metric"][1]
    assert "from_pretrained" in errors["elsewhere"][1]
    assert "on rank 1." in errors["not alike"][1]


def _restore_nothing(rank, directory):
    checkpoint, manager = _make(directory, 3)
    told = [outcome(manager.restore, which) for which in ("latest", "best", 1)]
    train(checkpoint)
    manager.save()
    manager.close()
    return told


def test_restore_of_nothing_says_so_and_the_job_can_go_on(tmp_path):
    for latest_, best_, number in values_of(run_ranks(_restore_nothing, 2, str(tmp_path))):
        assert latest_.kind == number.kind == "CheckpointNotFound"
        assert "newest first: none" in latest_.text
        assert best_.kind == "ConfigError" and 'best(1, "val_loss"' in best_.text


def _restore_what_is_corrupt(rank, directory):
    checkpoint, manager = _make(directory, best(3, "loss", mode="min"))
    for loss in (0.1, 0.2, 0.3):
        train(checkpoint)
        manager.save(metrics={"loss": loss})
    manager.sync()
    if rank == 0:
        folder = attempt_directory(os.path.join(directory, "ckpt-1"))
        for name in os.listdir(folder):
            if name.endswith(".safetensors"):
                flip_last_bit(os.path.join(folder, name))
    manager.sync()
    by_number = outcome(manager.restore, 1)
    by_rule = outcome(manager.restore, "best")
    manager.close()
    return by_number, by_rule


def test_restore_by_number_has_no_fallback_and_by_rule_the_next_best(tmp_path):
    directory = str(tmp_path / "run")
    for by_number, by_rule in values_of(run_ranks(_restore_what_is_corrupt, 2, directory)):
        assert by_number.kind == "RestoreFailed" and "ckpt-1 is corrupt" in by_number.text
        assert by_rule.text.endswith("ckpt-2")
