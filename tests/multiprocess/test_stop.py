"""A job that is told to stop: one rank knows, all agree, save once more, and say so."""

from __future__ import annotations

import os
import signal
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from async_helpers import EAGER, Writes
from harness import run_ranks, values_of
from outcome_helpers import (
    LoggedTexts,
    Trap,
    assert_all_whole,
    committed,
    make_checkpoint,
    make_manager,
    outcome,
    state_of,
    train,
)

from distckpt import CheckpointManager, every, files, on_signal
from distckpt.storage import posix

TERM = on_signal("SIGTERM")
_MAX_STEPS = 3000


def _make(directory, when, checkpoint=None, timeout_seconds=20.0):
    return make_manager(
        directory, 3, when, checkpoint=checkpoint, timeout_seconds=timeout_seconds
    )


def _loop(checkpoint, manager, tell, at_step, options=None):
    """Train until told to stop; returns what was saved at which step."""
    saved = {}
    while not manager.should_stop:
        assert int(checkpoint.step) < _MAX_STEPS, "nobody has been told"
        train(checkpoint)
        time.sleep(0.002)
        if int(checkpoint.step) == at_step:
            tell()
        path = manager.save(options=options)
        if path is not None:
            saved[int(checkpoint.step)] = os.path.basename(path)
    return saved


def _tell(rank, victim, how, directory):
    def tell():
        if rank == victim and how == "file":
            Path(directory).with_name(f"stop-{rank}").touch()
        elif rank == victim:
            os.kill(os.getpid(), getattr(signal, how))

    return tell


def _train_until_told(rank, directory, when, victim, how):
    checkpoint, manager = _make(directory, when)
    with manager:
        manager.restore_or_initialize()
        saved = _loop(checkpoint, manager, _tell(rank, victim, how, directory), 12)
        return saved, int(checkpoint.step), committed(directory), state_of(checkpoint)


def _come_back(rank, directory):
    checkpoint, manager = _make(directory, 1000)
    with manager:
        manager.restore_or_initialize()
        return int(checkpoint.step), state_of(checkpoint), manager.should_stop


@pytest.mark.parametrize(
    ("when", "victim", "how"),
    [
        pytest.param(1000 | TERM, 0, "SIGTERM", id="chief", marks=pytest.mark.full),
        pytest.param(1000 | TERM, 2, "SIGTERM", id="other"),
        pytest.param(TERM, 1, "SIGTERM", id="signal-alone"),
        pytest.param(None | TERM, 1, "SIGTERM", id="every-call", marks=pytest.mark.full),
        pytest.param(
            1000 | on_signal("SIGUSR1", "SIGTERM"),
            1,
            "SIGUSR1",
            id="usr1",
            marks=pytest.mark.full,
        ),
    ],
)
def test_all_ranks_save_once_more_and_stop_at_the_same_step(tmp_path, when, victim, how):
    """Whoever is told; what is saved is the state of that step, committed on return."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_train_until_told, 3, directory, when, victim, how))
    assert len({(str(saved), step) for saved, step, _, _ in results}) == 1
    saved, step, listed, state = results[0]
    assert step >= 12 and step in saved, "saved at the very step at which it stops"
    assert listed[0] == saved[step], "committed when save() returned"
    if when is TERM:
        assert list(saved) == [step], "and at no other"
    assert_all_whole(directory)
    for found in values_of(run_ranks(_come_back, 3, directory)):
        assert found == (step, state, False), "the next incarnation is told nothing"


def _watch_a_file(rank, directory):
    file = Path(directory).with_name(f"stop-{rank}")  # each host has its own
    checkpoint, manager = _make(directory, 1000 | on_signal(file=file))
    with manager:
        saved = _loop(checkpoint, manager, _tell(rank, 1, "file", directory), 12)
        return saved, int(checkpoint.step)


def test_file_on_one_rank_tells_all(tmp_path):
    one, other = values_of(run_ranks(_watch_a_file, 2, str(tmp_path / "run")))
    assert one == other
    saved, step = one
    assert step >= 12 and step in saved


def _be_told_while_evaluating(rank, directory, is_saved_before):
    checkpoint, manager = _make(directory, (1 if is_saved_before else 1000) | TERM)
    with manager:
        manager.restore_or_initialize()
        train(checkpoint)
        manager.save()
        if not is_saved_before:
            train(checkpoint)
        os.kill(os.getpid(), signal.SIGTERM)
        paths = []
        while not manager.should_stop:
            paths.append(manager.save())  # the evaluation's own calls: no step is made
            time.sleep(0.01)
        paths.append(manager.save())
        made = [os.path.basename(path) for path in paths if path is not None]
        return made, committed(directory), int(checkpoint.step)


@pytest.mark.parametrize(
    ("is_saved_before", "made"),
    [
        pytest.param(True, [], id="saved", marks=pytest.mark.full),
        pytest.param(False, ["ckpt-2"], id="new"),
    ],
)
def test_evaluation_is_stopped_too_and_saves_only_what_is_new(
    tmp_path, is_saved_before, made
):
    directory = str(tmp_path / "run")
    for found in values_of(
        run_ranks(_be_told_while_evaluating, 2, directory, is_saved_before)
    ):
        assert found[0] == made
        assert found[1][0] == (made or ["ckpt-1"])[-1]


def _have_no_time(rank, directory):
    trap = Trap()
    trap.on_save = lambda: time.sleep(0.8)
    checkpoint = make_checkpoint(trap=trap)
    when = 1000 | on_signal("SIGTERM", grace_period_seconds=0.5)
    _, manager = _make(directory, when, checkpoint)
    logged = LoggedTexts()
    with manager:
        assert manager.save() is not None
        saved = _loop(checkpoint, manager, _tell(rank, 0, "SIGTERM", directory), 5)
        return saved, manager.should_stop, committed(directory), logged.texts


def test_save_that_could_not_end_in_time_is_not_begun(tmp_path):
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_have_no_time, 2, directory))
    for saved, should_stop, listed, _ in results:
        assert (saved, should_stop, listed) == ({}, True, ["ckpt-1"])
    assert any("no save before the end" in text for text in results[0][3])
    names = [name for name in os.listdir(directory) if name.endswith(".pending")]
    assert not names, "nothing was begun"


def _have_one_under_way(rank, directory, is_at_the_same_step):
    writes = Writes()
    checkpoint, manager = _make(directory, (1 if is_at_the_same_step else 1000) | TERM)
    with manager:
        manager.restore_or_initialize()
        train(checkpoint)
        with writes.held():
            assert manager.save(options=EAGER) is not None
            if not is_at_the_same_step:
                train(checkpoint)
            os.kill(os.getpid(), signal.SIGTERM)
        while not manager.should_stop:
            manager.save(options=EAGER)
            time.sleep(0.01)
        return committed(directory), int(checkpoint.step)


@pytest.mark.parametrize(
    ("is_at_the_same_step", "expected"),
    [
        pytest.param(True, 1, id="same", marks=pytest.mark.full),
        pytest.param(False, 2, id="newer"),
    ],
)
def test_save_under_way_is_brought_in_first(tmp_path, is_at_the_same_step, expected):
    """What is acknowledged when ``should_stop`` turns true is committed."""
    directory = str(tmp_path / "run")
    results = run_ranks(_have_one_under_way, 2, directory, is_at_the_same_step)
    for listed, _ in values_of(results):
        assert listed[0] == f"ckpt-{expected}"
    assert_all_whole(directory)


def _fail_the_last_save(rank, directory):
    trap = Trap()
    checkpoint = make_checkpoint(trap=trap)
    _, manager = _make(directory, 1000 | TERM, checkpoint)

    def fail():
        trap.on_save = None
        raise RuntimeError("not now")

    with manager:
        manager.save()
        train(checkpoint)
        trap.on_save = fail if rank == 1 else None
        if rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        while True:
            ended = outcome(manager.save)
            if ended.kind != "ok":
                break
            time.sleep(0.01)
        was_agreed = manager.should_stop
        again = outcome(manager.save)
        return ended.kind, was_agreed, os.path.basename(again.text), manager.save()


def test_last_save_that_fails_is_tried_again_at_the_next_call(tmp_path):
    for found in values_of(run_ranks(_fail_the_last_save, 2, str(tmp_path / "run"))):
        assert found == ("SaveFailed", True, "ckpt-2", None)


def _wait_for_a_stopped_peer(rank, directory):
    _, manager = _make(directory, 1000 | TERM)
    manager.save()
    if rank == 1:
        Path(directory).with_name("pid").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    while not Path(directory).with_name("pid").exists():
        time.sleep(0.01)
    Path(directory).with_name("told").write_text(str(time.monotonic()))
    # What torchrun does to the others when one has gone. The flag must not keep this one.
    os.kill(os.getpid(), signal.SIGTERM)
    dist.all_reduce(torch.ones(1))


def test_rank_that_waits_in_a_collective_ends_soon_after_the_launcher_says_so(tmp_path):
    """Not after the launcher's 30 seconds, nor the collective's timeout."""
    directory = str(tmp_path / "run")
    results = run_ranks(_wait_for_a_stopped_peer, 2, directory, timeout=14)
    assert results[0].exit_code == -signal.SIGTERM
    assert results[1].killed, "the one that was stopped"


def _make_with_failing_counter(directory, when):
    """Make a manager whose step counter raises while there is something in a list."""
    checkpoint, fails = make_checkpoint(), []

    def read():
        if fails:
            raise RuntimeError("no step")
        return int(checkpoint.step)

    manager = CheckpointManager(
        *(checkpoint, directory, 3),
        step_counter=read,
        checkpoint_interval=when,
        timeout=timedelta(seconds=20),
    )
    return checkpoint, manager, fails


def _fail_to_read_the_step(rank, directory):
    """One rank's step counter raises now and then; its program goes on all the same."""
    checkpoint, manager, fails = _make_with_failing_counter(directory, 10**6 | TERM)
    manager.save()
    kinds = set()
    for _ in range(600):
        train(checkpoint)
        time.sleep(0.002)
        fails[:] = [True] * (rank == 1 and int(checkpoint.step) % 3 == 0)
        kinds.add(outcome(manager.save).kind)
        fails.clear()
    if rank == 0:
        os.kill(os.getpid(), signal.SIGTERM)
    saved = _loop(checkpoint, manager, lambda: None, 0)
    manager.close()
    return sorted(kinds), saved


@pytest.mark.full
def test_step_counter_that_raises_on_one_rank_keeps_the_ranks_in_step(tmp_path):
    """All count the same calls until they ask again, whatever else a call comes to."""
    one, other = values_of(run_ranks(_fail_to_read_the_step, 2, str(tmp_path / "run")))
    assert one[0] == ["ok"] and other[0] == ["RuntimeError", "ok"]
    assert one[1] == other[1] and len(one[1]) == 1


def _be_told_without_a_step(rank, directory):
    checkpoint, manager, fails = _make_with_failing_counter(directory, 10**6 | TERM)
    manager.save()
    train(checkpoint)
    os.kill(os.getpid(), signal.SIGTERM)
    fails[:] = [True] * (rank == 1)
    while not manager.should_stop:
        ended = outcome(manager.save)
        time.sleep(0.01)
    fails.clear()
    again = outcome(manager.save)
    manager.close()
    return ended.kind, os.path.basename(again.text)


def test_step_counter_that_raises_at_the_last_save_fails_it_on_all(tmp_path):
    """Nobody is left waiting, and the next call saves."""
    results = run_ranks(_be_told_without_a_step, 2, str(tmp_path / "run"))
    assert values_of(results) == [("SaveFailed", "ckpt-2")] * 2


def _be_due_without_a_step(rank, directory):
    when = every(seconds=0.1) | 10**6
    checkpoint, manager, fails = _make_with_failing_counter(directory, when)
    manager.save()
    train(checkpoint)
    fails[:] = [True] * (rank == 1)
    kinds, deadline = [], time.monotonic() + 10
    while "SaveFailed" not in kinds and time.monotonic() < deadline:
        time.sleep(0.01)
        kinds.append(outcome(manager.save).kind)
    fails.clear()
    saved = None
    while saved is None and time.monotonic() < deadline:
        time.sleep(0.01)
        saved = manager.save()
    manager.close()
    return kinds[-1], os.path.basename(saved)


def test_step_counter_that_raises_when_the_clock_wants_a_save_fails_it_on_all(tmp_path):
    """One rank cannot say whether there is anything new: that is its vote."""
    results = run_ranks(_be_due_without_a_step, 2, str(tmp_path / "run"))
    assert values_of(results) == [("SaveFailed", "ckpt-2")] * 2


def _look_where_nothing_can_be(rank, directory, hangs):
    loop = Path(directory).with_name(f"loop-{rank}")
    loop.symlink_to(loop)
    # Short only where it decides how long the look may hang.
    checkpoint, manager = _make(
        directory,
        10**6 | on_signal("SIGTERM", file=loop / "stop"),
        timeout_seconds=1.0 if hangs else 30.0,
    )
    real, looked = files.exists, []

    def exists(path):
        if path.endswith("/stop"):
            looked.append(path)
            with posix._reported("lstat", path):
                time.sleep(2.0 * hangs)
        return real(path)

    files.exists = exists
    logged = LoggedTexts()
    with manager:
        manager.save()
        for step in range(900):
            train(checkpoint)
            time.sleep(0.002)
            if step % 10 == 0:
                # On a busy machine one rank may get ahead of the other by the deadline.
                dist.barrier()
            manager.save()
        saved = _loop(checkpoint, manager, _tell(rank, 1, "SIGTERM", directory), 905)
    return saved, len(looked), [text for text in logged.texts if "stop" in text]


@pytest.mark.full
@pytest.mark.parametrize("hangs", [False, True], ids=["fails", "hangs"])
def test_file_that_cannot_be_looked_for_ends_no_job(tmp_path, hangs):
    """It is told of once; where looking hangs, it is not done again."""
    arguments = (str(tmp_path / "run"), hangs)
    one, other = values_of(run_ranks(_look_where_nothing_can_be, 2, *arguments))
    assert one[0] == other[0] and len(one[0]) == 1
    for _, num_looked, texts in (one, other):
        assert (num_looked == 1) if hangs else (num_looked > 1)
        told = "not looked for any more" if hangs else "cannot look for the file"
        assert len([text for text in texts if told in text]) == 1, texts


def _disagree(rank, directory):
    return outcome(_make, directory, 1000 | TERM if rank else 1000)


def test_ranks_must_be_given_the_same_rule(tmp_path):
    for found in values_of(run_ranks(_disagree, 2, str(tmp_path / "run"))):
        assert found.kind == "ConfigError" and "different arguments" in found.text
