"""Mistakes that only several ranks can make are named, on all of them, with both values."""

from __future__ import annotations

import os
import time
from datetime import timedelta

import pytest
import torch
from harness import run_ranks, values_of
from outcome_helpers import outcome
from torch import nn

from distckpt import (
    Checkpoint,
    CheckpointManager,
    PerRank,
    RngState,
    Trainable,
    every,
    on_signal,
)


def _manager(directory, checkpoint=None, **more):
    arguments = {"max_to_keep": 2, "timeout": 20.0} | more
    return CheckpointManager(checkpoint or Checkpoint(x=1), directory, **arguments)


def _differ(rank, directory):
    cases = {
        "directory": {"directory": f"{directory}-{rank}"},
        "max_to_keep": {"max_to_keep": 2 + rank},
        "checkpoint_interval": {"checkpoint_interval": every(hours=1 + rank)},
        "step_counter": {"step_counter": torch.tensor(0) if rank else None},
        "replicas": {"replicas": "unchecked" if rank else "always"},
    }
    return {
        name: outcome(lambda more=more: _manager(**{"directory": directory} | more))
        for name, more in cases.items()
    }


def test_arguments_that_differ_are_named_with_both_values(tmp_path):
    """The name, each value, and who gave it."""
    directory = str(tmp_path / "run")
    found = values_of(run_ranks(_differ, 2, directory))
    expected = {
        "directory": (f"'{directory}-0' on rank 0", f"'{directory}-1' on rank 1"),
        "max_to_keep": ("'2' on rank 0", "'3' on rank 1"),
        "checkpoint_interval": ("'every(hours=1)' on rank 0", "'every(hours=2)' on rank 1"),
        "step_counter": ("'none' on rank 0", "'given' on rank 1"),
        "replicas": ("'always' on rank 0", "'unchecked' on rank 1"),
    }
    for of_rank in found:
        for name, texts in expected.items():
            assert of_rank[name].kind == "ConfigError"
            assert f"{name} is {texts[0]}, {texts[1]}" in of_rank[name].text


def _in_other_directories(rank, folder):
    os.chdir(os.path.join(folder, str(rank)))
    manager = _manager("run")
    return outcome(manager.save)


def test_ranks_in_other_working_directories_are_told_both_paths(tmp_path):
    """The relative path is the same, and leads elsewhere."""
    for rank in range(2):
        (tmp_path / str(rank)).mkdir()
    for found in values_of(run_ranks(_in_other_directories, 2, str(tmp_path))):
        assert found.kind == "StorageError"
        assert str(tmp_path / "0" / "run") in found.text
        assert str(tmp_path / "1" / "run") in found.text


def _one_makes_none(rank, directory):
    if rank == 1:
        time.sleep(6)  # past the deadline of the others, however late they begin
        late = outcome(lambda: _manager(directory, timeout=2.0))
    else:
        late = outcome(lambda: _manager(directory, timeout=2.0))
    together = outcome(lambda: _manager(directory).save())
    return late, together


def test_rank_that_makes_no_manager_is_named_within_the_deadline(tmp_path):
    """And one that comes too late is told so at once; then the next try works."""
    found = values_of(run_ranks(_one_makes_none, 3, str(tmp_path / "run")))
    for rank, (late, together) in enumerate(found):
        assert late.kind == "PeerTimeout"
        if rank == 1:
            assert "came too late" in late.text and late.net_seconds < 1
        else:
            assert "for rank 1 to make a CheckpointManager" in late.text
            assert "if rank == 0" in late.text and late.net_seconds < 3.5
        assert together.text == str(tmp_path / "run" / "ckpt-1"), together


class Loud:
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


def _cannot_store(rank, directory):
    def checkpoint():
        return Checkpoint(x=1, own=PerRank(Loud({"bad": object()} if rank == 1 else {})))

    found = []
    manager = _manager(directory, checkpoint())
    found.append(outcome(manager.restore_or_initialize))
    manager.checkpoint.own = PerRank(Loud({}))
    found.append(outcome(manager.save))
    manager.close()
    manager = _manager(directory, checkpoint(), checkpoint_interval=every(hours=1))
    found.append(outcome(manager.save))
    manager.close()
    manager = _manager(
        directory, checkpoint(), checkpoint_interval=on_signal("SIGTERM"), takeover=True
    )
    found.append(outcome(manager.save))
    return found


def test_all_ranks_hear_what_one_cannot_store_before_a_save_is_due(tmp_path):
    """At the restore, or at the first save that is not due."""
    for found in values_of(run_ranks(_cannot_store, 2, str(tmp_path / "run"))):
        restored, saved, *not_due = found
        assert saved.text == str(tmp_path / "run" / "ckpt-1")
        for one in (restored, *not_due):
            assert one.kind == "UnsupportedError"
            assert "(1 of 2 ranks): rank 1: own['bad']" in one.text


def _values_differ(rank, directory):
    torch.manual_seed(rank)
    model = nn.Linear(4, 4 + rank)
    found = []
    for checkpoint in (Checkpoint(rng=RngState()), Checkpoint(model=model)):
        manager = _manager(directory, checkpoint)
        found.append(outcome(manager.save))
        manager.close()
    return found


def test_forgotten_mark_is_answered_with_the_line_to_write(tmp_path):
    """Without the bytes of a generator; and a model is not to be wrapped."""
    for rng, model in values_of(run_ranks(_values_differ, 2, str(tmp_path / "run"))):
        assert "rng (state of RngState) differs between rank 0 and rank 1" in rng.text
        assert 'Checkpoint(rng=PerRank(rng, resize="by_rank"))' in rng.text
        assert len(rng.text) < 300
        assert "tensor 'model/weight' differs between ranks" in model.text
        assert "All ranks must track the same model" in model.text
        assert "layout:" not in model.text and "(split)" not in model.text


def _save_on_one(rank, directory):
    manager = _manager(directory, timeout=timedelta(seconds=2))
    if rank == 0:
        return outcome(manager.save)
    time.sleep(3.5)
    return outcome(manager.save)


def test_call_of_one_rank_alone_is_named_as_the_user_made_it(tmp_path):
    """Not by a phase of the protocol."""
    chief, _ = values_of(run_ranks(_save_on_one, 2, str(tmp_path / "run")))
    assert chief.kind == "PeerTimeout" and "waiting in save()" in chief.text
    assert "in no call of this manager" in chief.text and "if rank == 0" in chief.text


def _frozen(rank, directory, world_size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].requires_grad_(False)
    with torch.no_grad():
        model[1].weight.fill_(world_size)
    manager = _manager(directory, Checkpoint(model=Trainable(model)))
    path = manager.restore_or_initialize()
    value = model[1].weight[0, 0].item()
    saved = None if path else manager.save()
    manager.close()
    return path, saved, value


@pytest.mark.parametrize(("save_with", "restore_with"), [(2, 2), (2, 3), (3, 1)])
def test_trainable_is_restored_by_any_number_of_ranks(tmp_path, save_with, restore_with):
    """What each rank has noted of the frozen parameters is compared where it can be."""
    directory = str(tmp_path / "run")
    values_of(run_ranks(_frozen, save_with, directory, save_with))
    for path, _, value in values_of(
        run_ranks(_frozen, restore_with, directory, restore_with)
    ):
        assert path == f"{directory}/ckpt-1" and value == save_with
