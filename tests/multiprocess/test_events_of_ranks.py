"""Events of real ranks: each phase is told where it happens, the slowest rank by name."""

from __future__ import annotations

import os
import threading
import time

import pytest
import torch.distributed as dist
from async_helpers import EAGER
from harness import run_ranks, values_of
from outcome_helpers import (
    Trap,
    flip_last_bit,
    make_checkpoint,
    make_manager,
    outcome,
    train,
)

from distckpt import CheckpointManager, latest, paths
from distckpt import manager as manager_module
from distckpt.events import Event
from distckpt.storage import posix

_SLOW_SECONDS = 0.3


def _make(directory, told, **more):
    return make_manager(
        directory, latest(1), checkpoint=make_checkpoint(**more), on_event=[told.append]
    )


def _live(rank, directory, options):
    told = []
    checkpoint, manager = _make(directory, told)
    if rank == 1:
        finish = posix.NewFile.finish

        def slow(file, size_bytes):
            if ".safetensors" in file.path:
                time.sleep(_SLOW_SECONDS)
            finish(file, size_bytes)

        posix.NewFile.finish = slow
    manager.restore_or_initialize()
    for number in range(2):
        train(checkpoint)
        manager.save(options=options, metrics={"loss": 0.5 + number})
        manager.sync()
    manager.restore_or_initialize()
    manager.close()
    return told


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(None, id="at-once", marks=pytest.mark.full),
        pytest.param(EAGER, id="behind"),
    ],
)
def test_every_phase_is_told_and_the_slowest_rank_is_named(tmp_path, options):
    directory = str(tmp_path / "run")
    told = values_of(run_ranks(_live, 2, directory, options))
    of_all = ["capture", "decide", "write", "vote", "save"] + ["stage"] * (options is EAGER)
    for rank, events in enumerate(told):
        assert {event.rank for event in events} == {rank}
        for kind in of_all:
            found = [event for event in events if event.kind == kind]
            assert [e.checkpoint for e in found] == ["ckpt-1", "ckpt-2"], kind
            assert [e.step for e in found] == [1, 2], kind
        assert [e.kind for e in events if e.kind in ("claim", "restore")] == [
            "claim",
            "restore",
        ]
        assert all(event.size_bytes > 0 for event in events if event.kind == "write")
    slow = [event.seconds for event in told[1] if event.kind == "write"]
    assert min(slow) >= _SLOW_SECONDS
    waited = [event.seconds for event in told[0] if event.kind == "vote"]
    assert min(waited) >= _SLOW_SECONDS / 2

    commits = [event for event in told[0] if event.kind == "commit"]
    assert not [event for event in told[1] if event.kind in ("commit", "delete")]
    for event in commits:
        assert event.detail["ranks"] == 2 and event.detail["slowest_rank"] == 1
        assert event.detail["slowest_seconds"] >= _SLOW_SECONDS
        assert event.detail["mean_seconds"] < event.detail["slowest_seconds"]
        assert event.detail["reasons"] == ["every call saves"]
    assert [event.detail["metrics"] for event in commits] == [{"loss": 0.5}, {"loss": 1.5}]
    assert [e.checkpoint for e in told[0] if e.kind == "delete"] == ["ckpt-1"]

    # The same, of the chief alone, is kept in the run directory.
    folder = os.path.join(directory, paths.EVENTS_DIRECTORY)
    (name,) = os.listdir(folder)
    with open(os.path.join(folder, name), "rb") as file:
        kept = [Event.from_json(line) for line in file]
    assert [(e.kind, e.checkpoint, e.time) for e in kept] == [
        (e.kind, e.checkpoint, e.time) for e in told[0]
    ]


def _fail(rank, directory):
    told = []
    trap = Trap()
    _, manager = _make(directory, told, trap=trap)
    manager.save()
    if rank == 1:
        trap.on_save = _raise
    failed = outcome(manager.save)
    trap.on_save = None
    manager.save()
    manager.close()
    if rank == 0:
        (name,) = [n for n in os.listdir(directory) if n.startswith("ckpt-")]
        for shard in os.listdir(os.path.join(directory, name)):
            if shard.endswith(".safetensors"):
                flip_last_bit(os.path.join(directory, name, shard))
    return failed, told


def _raise():
    raise ValueError("no state today")


def _fall_back(rank, directory):
    told = []
    _, manager = _make(directory, told, trap=Trap())
    restored = outcome(manager.restore_or_initialize)
    manager.close()
    return restored, told


def test_what_fails_is_told_on_all_ranks_and_what_is_passed_over_by_the_chief(tmp_path):
    directory = str(tmp_path / "run")
    for failed, told in values_of(run_ranks(_fail, 2, directory)):
        (error,) = [event for event in told if event.kind == "error"]
        assert error.detail["error"] == failed.kind
        assert "no state today" in error.detail["text"]
    results = values_of(run_ranks(_fall_back, 2, directory))
    for rank, (restored, told) in enumerate(results):
        assert restored.kind == "RestoreFailed"
        kinds = [event.kind for event in told]
        assert kinds.count("fallback") == (rank == 0) and kinds.count("error") == 1


def _refuse(rank, directory):
    return outcome(
        CheckpointManager, make_checkpoint(), directory, 1, on_event="events.jsonl"
    )


def test_what_cannot_be_told_is_refused_on_all_ranks(tmp_path):
    for refused in values_of(run_ranks(_refuse, 2, str(tmp_path))):
        assert refused.kind == "ConfigError" and "on_event" in refused.text


def _leave_while_a_callback_hangs(rank, directory):
    # Longer than any other way to learn of it.
    manager_module._TELL_SECONDS = 30.0
    hangs = threading.Event()
    checkpoint = make_checkpoint()
    _, manager = make_manager(
        directory, 1, checkpoint=checkpoint, on_event=lambda _: rank == 0 and hangs.wait()
    )
    manager.save()
    dist.barrier()
    if rank == 0:
        threading.Timer(10.0, hangs.set).start()
        return outcome(_leave, manager)
    return outcome(manager.sync)


def _leave(manager):
    with manager:
        raise ValueError("left")


def test_who_waits_for_a_rank_does_not_wait_for_its_callbacks(tmp_path):
    """A rank that leaves by an error tells its peers first."""
    left, waited = values_of(
        run_ranks(_leave_while_a_callback_hangs, 2, str(tmp_path / "run"))
    )
    assert left.kind == "ValueError" and left.seconds > 9
    assert waited.kind == "PeerLost" and waited.net_seconds < 5
