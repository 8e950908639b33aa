"""Ranks that fail, die, hang, disagree or leave: no endless waits, one error for all."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from filelock import FileLock, Timeout
from harness import EVERYTHING, run_ranks, values_of
from outcome_helpers import (
    Trap,
    assert_all_whole,
    committed,
    leftovers,
    make_checkpoint,
    outcome,
    state_of,
    train,
    tree_of,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointOptions,
    PerRank,
    SaveFailed,
)
from distckpt.chief import Chief
from distckpt.identity import Identity
from distckpt.retention import Retention
from distckpt.run_directory import RunDirectory
from distckpt.storage import posix

DEADLINE_SECONDS = 2.0


def _manager(checkpoint, directory, seconds=30.0, **more):
    arguments = {"max_to_keep": None, "timeout": timedelta(seconds=seconds), **more}
    return CheckpointManager(checkpoint, directory, **arguments)


def _raiser(error):
    def raise_it():
        raise error

    return raise_it


# User code that raises


def _raise_in_user_code(rank, directory, culprit):
    trap = Trap()
    checkpoint = make_checkpoint(trap=trap)
    mine = rank == culprit
    found = {}

    def init_fn():
        if mine:
            raise ValueError("cannot initialize")

    with _manager(checkpoint, directory, init_fn=init_fn) as manager:
        found["init_fn"] = outcome(manager.restore_or_initialize)
        if mine:
            trap.on_save = _raiser(ValueError("cannot save"))
        found["state_dict"] = outcome(manager.save)
        found["nothing"] = (manager.latest_checkpoint, checkpoint.save_counter)
        trap.on_save = None
        if mine:
            checkpoint.odd = {"deep": object()}
        found["unsupported"] = outcome(manager.save)
        if mine:
            del checkpoint.odd
        train(checkpoint)
        found["saved"] = outcome(manager.save)
        found["trees"] = sorted(n for n in os.listdir(directory) if n.startswith("ckpt-"))
        expected = state_of(checkpoint)
        train(checkpoint)
        if mine:
            trap.on_load = _raiser(ValueError("cannot load"))
        found["load_state_dict"] = outcome(manager.restore_or_initialize)
        found["refused"] = outcome(manager.save)
        trap.on_load = None
        found["restored"] = outcome(manager.restore_or_initialize)
        assert state_of(checkpoint) == expected
        found["saved again"] = outcome(manager.save)
        found["leftovers"] = leftovers(directory) if rank == 0 else []
    return found


@pytest.mark.parametrize(
    ("world_size", "culprit"),
    [
        pytest.param(2, 0, marks=pytest.mark.full),
        (4, 2),
        pytest.param(8, 7, marks=pytest.mark.full),
    ],
)
def test_user_code_that_raises_on_one_rank_is_the_same_error_on_all(
    tmp_path, world_size, culprit
):
    """The same type and table everywhere, the original as the culprit's cause."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_raise_in_user_code, world_size, directory, culprit))
    for what, kind, text in (
        ("init_fn", "RestoreFailed", "ValueError: cannot initialize"),
        ("state_dict", "SaveFailed", "ValueError: cannot save"),
        ("load_state_dict", "RestoreFailed", "trap: ValueError: cannot load"),
    ):
        for rank, found in enumerate(results):
            assert found[what].kind == kind
            assert found[what].failures == {culprit: text}
            assert found[what].text == results[0][what].text
            assert f"rank {culprit}: {text}" in found[what].text
            original = text.replace("ValueError: ", "ValueError('") + "')"
            if what == "load_state_dict":
                original = f"RestoreFailed('{text}')"
            assert found[what].cause == (original if rank == culprit else "")
            assert found[what].net_seconds < 5
    for found in results:
        assert found["nothing"] == (None, 0)
        assert found["unsupported"].kind == "UnsupportedError"
        assert f"rank {culprit}: odd['deep']: a value of type" in found["unsupported"].text
        assert found["saved"].text == found["restored"].text == f"{directory}/ckpt-1"
        assert len(found["trees"]) == 1
        assert "tensors are undefined" in found["load_state_dict"].text
        assert found["refused"].kind == "RestoreFailed"
        assert "Restore successfully before saving" in found["refused"].text
        assert found["saved again"].text == f"{directory}/ckpt-2"
        assert found["leftovers"] == []


def _step_counter_that_raises(rank, directory):
    step = torch.zeros((), dtype=torch.int64)
    broken = []

    def count():
        if broken:
            raise ValueError("no step")
        return int(step)

    with _manager(make_checkpoint(), directory, step_counter=count) as manager:
        if rank == 1:
            broken.append(True)
        first = outcome(manager.save)
        broken.clear()
        return first, outcome(manager.save)


def test_step_counter_that_raises_on_one_rank_is_an_error_on_all(tmp_path):
    """It is read before anybody is asked, and is a vote all the same."""
    directory = str(tmp_path / "run")
    for first, second in values_of(run_ranks(_step_counter_that_raises, 2, directory)):
        assert first.kind == "SaveFailed"
        assert first.failures == {1: "ValueError: no step"}
        assert second.text == f"{directory}/ckpt-1"


def _leave_by_an_error(rank, directory):
    started = time.monotonic()
    with _manager(make_checkpoint(), directory) as manager:
        manager.save()
        if rank == 1:
            raise ValueError("the loss is NaN")
        found = outcome(manager.save)
        return found, time.monotonic() - started


@pytest.mark.parametrize("world_size", [2, pytest.param(4, marks=pytest.mark.full)])
@pytest.mark.covers("waiting: it leaves by an error, Ctrl-C included")
def test_who_leaves_by_an_error_is_not_waited_for(tmp_path, world_size):
    """The others learn at once who has left, and why."""
    directory = str(tmp_path / "run")
    results = run_ranks(_leave_by_an_error, world_size, directory)
    assert results.pop(1).error == ("ValueError", "the loss is NaN")
    for found, seconds in values_of(results):
        assert found.kind == "PeerLost" and seconds < 2
        assert "rank 1 (pid" in found.text and "ValueError: the loss is NaN" in found.text
    assert committed(directory) == ["ckpt-1"]


def _interrupt(rank, directory, kind):
    trap = Trap()
    with _manager(make_checkpoint(trap=trap), directory) as manager:
        manager.save()
    manager = _manager(make_checkpoint(trap=trap), directory, DEADLINE_SECONDS)
    manager.restore_or_initialize()
    if rank == 1:
        trap.on_save = _raiser({"int": KeyboardInterrupt, "exit": SystemExit}[kind]("now"))
    first = outcome(manager.save)
    trap.on_save = None
    second = outcome(manager.save)
    return first, second, outcome(manager.close), leftovers(directory)


@pytest.mark.parametrize("kind", ["int", pytest.param("exit", marks=pytest.mark.full)])
@pytest.mark.covers("waiting: it leaves by an error, Ctrl-C included")
def test_interrupt_in_user_code_stays_one_and_fails_the_save_elsewhere(tmp_path, kind):
    """Ctrl-C and exit are not swallowed, and the other ranks do not wait for them."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_interrupt, 2, directory, kind))
    name = {"int": "KeyboardInterrupt", "exit": "SystemExit"}[kind]
    (first0, second0, *_), (first1, second1, *_) = results
    assert first0.kind == "SaveFailed"
    assert first0.failures == {1: f"{name}: now"}
    assert (first1.kind, first1.text) == (name, "now")
    # The interrupted rank is on its way out; the other is told.
    assert second1.kind == "ManagerBroken" and second1.net_seconds < 0.1
    assert second0.kind == "PeerLost" and name in second0.text
    assert second0.net_seconds < 1
    assert committed(directory) == ["ckpt-1"]
    assert_all_whole(directory)


def _interrupt_the_beginning(rank, directory, enable_async):
    checkpoint = make_checkpoint()
    options = CheckpointOptions(enable_async=enable_async)
    with _manager(checkpoint, directory) as manager:
        manager.save()
        train(checkpoint)
        real = posix.make_directory

        def make_directory(path):
            # The chief's thread for storage is at work, its main thread waits for it.
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
            real(path)

        posix.make_directory = make_directory
        if rank == 1:  # the chief must not be gone before it has told this one, too
            _on_shard_open(lambda: time.sleep(0.3), "write")
        found = [outcome(manager.save, options=options)]
        posix.make_directory = real
        found.append(outcome(manager.sync))
        return found


def _save_again(rank, directory):
    checkpoint = make_checkpoint(seed=1)
    with _manager(checkpoint, directory) as manager:
        return manager.restore_or_initialize(), manager.save(), leftovers(directory)


@pytest.mark.parametrize(
    "enable_async", [pytest.param(False, marks=pytest.mark.full), True]
)
def test_interrupt_while_the_chief_begins_ends_the_save_before_it_writes(
    tmp_path, enable_async
):
    """Raised where it came, once all know; told to the others as why there is no save."""
    directory = str(tmp_path / "run")
    chief, *others = values_of(
        run_ranks(_interrupt_the_beginning, 3, directory, enable_async)
    )
    assert chief[0].kind == "KeyboardInterrupt"
    for first, second in others:
        if enable_async:
            assert first.kind == "ok"
            assert "ckpt-2 was not committed" in second.text
        else:
            assert first.kind == "SaveFailed" and set(first.failures) == {0}
            assert first.failures[0].startswith("KeyboardInterrupt")
        # The chief is on its way out.
        assert second.kind == "PeerLost" and "KeyboardInterrupt" in second.text
        assert second.net_seconds < 1
    assert committed(directory) == ["ckpt-1"]
    assert_all_whole(directory)
    for restored, saved, left in values_of(run_ranks(_save_again, 3, directory)):
        assert restored == f"{directory}/ckpt-1"
        assert saved.startswith(f"{directory}/ckpt-") and left == []


# Ranks that die or stop


def _on_shard_open(action, flag):
    """Act when this process opens a shard file, for writing or for reading."""

    def hook(event, arguments):
        if event == "open" and str(arguments[0]).endswith(".safetensors"):
            writes = bool(arguments[2] & os.O_CREAT)
            if writes == (flag == "write"):
                action()

    sys.addaudithook(hook)


def _lose_peer(rank, directory, phase, victim, how):
    """Strike one rank in a phase of a save or a restore; tell what the others see."""
    with _manager(make_checkpoint(), directory) as manager:
        manager.save()
    trap = Trap()
    checkpoint = make_checkpoint(**({} if phase == "restore" else {"trap": trap}))
    manager = _manager(checkpoint, directory, DEADLINE_SECONDS)
    pids = [torch.zeros((), dtype=torch.int64) for _ in range(dist.get_world_size())]
    dist.all_gather(pids, torch.tensor(os.getpid()))

    def strike():
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[how])

    call = manager.restore_or_initialize if phase == "restore" else manager.save
    if phase != "restore":
        checkpoint.save_counter = 1
    started = time.monotonic()
    if rank == victim:
        if phase == "before":
            strike()
        elif phase == "capture":
            trap.on_save = strike
        else:
            _on_shard_open(strike, {"write": "write", "restore": "read"}[phase])
    first = outcome(call)
    # All survivors are out of their calls by then.
    time.sleep(max(0.0, started + DEADLINE_SECONDS + 2 - time.monotonic()))
    before = tree_of(directory)
    calls = (manager.save, manager.restore_or_initialize, manager.sync, manager.close)
    later = [outcome(call) for call in calls]
    unchanged = tree_of(directory) == before
    if how == "stop" and rank == min({0, 1} - {victim}):
        time.sleep(0.2)
        os.kill(int(pids[victim]), signal.SIGKILL)
    return first, later, unchanged


def _restart(rank, directory):
    trap = Trap()
    checkpoint = make_checkpoint(seed=1)
    with _manager(checkpoint, directory) as manager:
        restored = manager.restore_or_initialize()
        expected = make_checkpoint()
        weights = [p.tolist() for p in expected.model.parameters()]
        assert [p.tolist() for p in checkpoint.model.parameters()] == weights
        checkpoint.trap = trap
        saved = manager.save()
        manager.sync()
        return restored, saved, leftovers(directory)


def _lose_and_restart(directory, world_size, phase, victim, how):
    results = run_ranks(_lose_peer, world_size, directory, phase, victim, how, timeout=30)
    label = f"{how} rank {victim} of {world_size} in {phase}"
    survivors = [r for rank, r in enumerate(results) if rank != victim]
    assert results[victim].exit_code == -signal.SIGKILL, label
    for first, later, unchanged in values_of(survivors):
        assert "ManagerBroken" in first.bases, (label, first)
        # How late exactly: tests/crash/ranks/test_hangs.py.
        assert first.net_seconds < DEADLINE_SECONDS + 2, (label, first)
        for one in later[:3]:
            assert "ManagerBroken" in one.bases, (label, one)
            assert one.net_seconds < 0.2, (label, one)
        assert later[3].kind == "ok", (label, later[3])
        assert later[3].net_seconds < 0.2, (label, later[3])
        assert unchanged, label
    assert committed(directory) == ["ckpt-1"], label
    assert_all_whole(directory)
    for restored, saved, left in values_of(run_ranks(_restart, world_size, directory)):
        assert restored == os.path.join(directory, "ckpt-1"), label
        assert saved == os.path.join(directory, "ckpt-2"), label
        assert left == [], label
    assert_all_whole(directory)


@pytest.mark.full
@pytest.mark.parametrize("phase", ["before", "capture", "write", "restore"])
@pytest.mark.parametrize("world_size", [2, 3, 4] if EVERYTHING else [3])
def test_lost_rank_ends_every_wait_and_a_restart_goes_on(tmp_path, world_size, phase):
    """Killed or stopped, the chief or another: errors in time, silence after, no loss."""
    cases = [(how, victim) for how in ("kill", "stop") for victim in (0, world_size - 1)]
    with ThreadPoolExecutor(len(cases)) as pool:
        running = [
            pool.submit(
                _lose_and_restart,
                str(tmp_path / f"{how}-{victim}"),
                world_size,
                phase,
                victim,
                how,
            )
            for how, victim in cases
        ]
    for one in running:
        one.result()


def _exit_main(rank, rendezvous, directory, how, victim):
    """Break a manager by a lost rank, or by Ctrl-C; then end as any program does."""
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=3
    )
    manager = _manager(Checkpoint(x=torch.zeros(4)), directory, DEADLINE_SECONDS)
    manager.save()
    dist.barrier()
    if rank == victim:
        if how == "interrupt":
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
            time.sleep(0.2)
        else:
            os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[how])
    if how == "interrupt" and rank == 2:
        time.sleep(1)  # somebody has to be waited for
    print(outcome(manager.save).bases[:2], time.monotonic(), flush=True)


def _end_of(process):
    out, err = process.communicate(timeout=300)
    return process.returncode, out, err, time.monotonic()


# The others take as long as these, mostly imports.
ENDS = [("stop", 0), ("kill", 2), ("interrupt", 1)]
if EVERYTHING:
    ENDS += [("stop", 1), ("kill", 0)]


@pytest.mark.full
@pytest.mark.parametrize(("how", "victim"), ENDS)
def test_process_with_a_broken_manager_exits_at_once(tmp_path, how, victim):
    """Neither destructors nor threads hold up the interpreter's normal end."""
    arguments = [str(tmp_path / "rendezvous"), str(tmp_path / "run"), how, str(victim)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(3)
    ]
    try:
        lost = victim if how != "interrupt" else None
        waited = {rank: p for rank, p in enumerate(processes) if rank != lost}
        with ThreadPoolExecutor(len(waited)) as pool:
            ends = list(pool.map(_end_of, waited.values()))
        for rank, (code, out, err, ended) in zip(waited, ends, strict=True):
            assert code == 0, err
            interrupted = how == "interrupt" and rank == victim
            assert ("KeyboardInterrupt" if interrupted else "ManagerBroken") in out, err
            # Ending torch takes a second of processor time, and others may want it, too.
            queued = max(0.0, os.getloadavg()[0] - os.cpu_count())
            assert ended - float(out.split()[-1]) < 3 + queued, (rank, out, queued)
    finally:
        for process in processes:
            process.kill()
            process.communicate()


# Ranks in different calls


def _disagree(rank, directory, calls):
    with _manager(make_checkpoint(), directory) as manager:
        manager.save()
    manager = _manager(make_checkpoint(), directory, DEADLINE_SECONDS)
    manager.restore_or_initialize()
    before = tree_of(directory)
    first = outcome(getattr(manager, calls[rank]))
    later = outcome(manager.save)
    return first, later, tree_of(directory) == before


@pytest.mark.parametrize(
    "calls",
    [
        pytest.param(
            calls,
            id="-".join(calls),
            marks=() if is_default else pytest.mark.full,
        )
        for calls, is_default in [
            (("save", "sync"), True),
            (("sync", "save"), False),
            (("restore_or_initialize", "save"), False),
            (("close", "save"), True),
            (("save", "close"), False),
            (("sync", "sync", "save", "sync"), True),
        ]
    ],
)
def test_ranks_in_different_calls_are_a_desync_on_all(tmp_path, calls):
    """The error names who is where; the manager is broken, nothing is written."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_disagree, len(calls), directory, calls))
    for first, later, unchanged in results:
        assert first.kind == "Desync", first
        assert first.text == results[0][0].text
        assert "the same calls" in first.text
        assert first.net_seconds < 1
        assert "ManagerBroken" in later.bases and later.net_seconds < 0.2
        assert unchanged
    if len(calls) == 4:
        assert "ranks 0, 1, 3 are in sync() or close()" in results[0][0].text
        assert "rank 2 is in save()" in results[0][0].text


# Two managers


def _older_and_newer(rank, directory):
    old_checkpoint, new_checkpoint = make_checkpoint(), make_checkpoint()
    older = _manager(old_checkpoint, directory, max_to_keep=1)
    older.save()
    newer = _manager(new_checkpoint, directory, max_to_keep=1)
    found = [newer.latest_checkpoint, outcome(older.save).text]
    newer.restore_or_initialize()
    newer.save()
    newer.sync()
    dist.barrier()
    before = tree_of(directory)
    found += [
        outcome(older.save),
        outcome(older.restore_or_initialize),
        outcome(older.sync),
    ]
    found.append(old_checkpoint.save_counter)
    found.append(tree_of(directory) == before)
    dist.barrier()
    found.append(outcome(older.close).kind)
    found.append(outcome(newer.save).text)
    newer.close()
    return found


def test_older_of_two_live_managers_is_fenced_on_all_its_ranks(tmp_path):
    """The newer one wins; the older one neither commits nor deletes any more."""
    directory = str(tmp_path / "run")
    for found in values_of(run_ranks(_older_and_newer, 2, directory)):
        latest, second, saved, restored, synced, counter, unchanged, closed, last = found
        assert (latest, second) == (f"{directory}/ckpt-1", f"{directory}/ckpt-2")
        assert saved.kind == restored.kind == synced.kind == "FencedError"
        assert "has been claimed by job" in saved.text
        assert counter == 2 and unchanged
        assert closed == "ok"
        assert last == f"{directory}/ckpt-4"
    assert committed(directory) == ["ckpt-4"]


def _wait_for(path, seconds=30):
    deadline = time.monotonic() + seconds
    while not os.path.exists(path):
        assert time.monotonic() < deadline, path
        time.sleep(0.01)


def _old_job(rank, directory, signals):
    checkpoint = make_checkpoint()
    manager = _manager(checkpoint, directory, max_to_keep=1)
    manager.save()
    dist.barrier()
    if rank == 0:
        open(os.path.join(signals, "old saved"), "w").close()
    _wait_for(os.path.join(signals, "new saved"))
    before = tree_of(directory)
    found = [outcome(manager.save), outcome(manager.save), outcome(manager.sync)]
    unchanged = tree_of(directory) == before
    dist.barrier()
    if rank == 0:
        open(os.path.join(signals, "old done"), "w").close()
    return found, unchanged, outcome(manager.close).kind


def _new_job(rank, directory, signals, takeover):
    _wait_for(os.path.join(signals, "old saved"))
    checkpoint = make_checkpoint()
    with _manager(checkpoint, directory, max_to_keep=2, takeover=takeover) as manager:
        started = time.monotonic()
        restored = manager.restore_or_initialize()
        seconds = time.monotonic() - started
        saved = manager.save()
        manager.sync()
        dist.barrier()
        if rank == 0:
            open(os.path.join(signals, "new saved"), "w").close()
        _wait_for(os.path.join(signals, "old done"))
        return restored, saved, seconds, manager.save()


@pytest.mark.parametrize(
    "same_run",
    [
        pytest.param(True, id="restart", marks=pytest.mark.full),
        pytest.param(False, id="takeover"),
    ],
)
def test_job_whose_directory_was_taken_over_is_fenced_on_all_ranks(tmp_path, same_run):
    """A restart of the same job, or ``takeover``, claims at once and ends the old one."""
    directory, signals = str(tmp_path / "run"), str(tmp_path)
    ids = ("job", "job") if same_run else ("one", "other")

    def run(function, run_id, *arguments):
        environment = {"TORCHELASTIC_RUN_ID": run_id}
        return run_ranks(
            function, 2, directory, signals, *arguments, environment=environment
        )

    with ThreadPoolExecutor(2) as pool:
        old = pool.submit(run, _old_job, ids[0])
        new = pool.submit(run, _new_job, ids[1], not same_run)
        for found, unchanged, closed in values_of(old.result()):
            assert [one.kind for one in found] == ["FencedError"] * 3
            assert f"torchrun-{ids[1]}" in found[0].text
            assert unchanged and closed == "ok"
        for restored, saved, seconds, last in values_of(new.result()):
            assert restored == f"{directory}/ckpt-1"
            assert (saved, last) == (f"{directory}/ckpt-2", f"{directory}/ckpt-3")
            assert seconds < 5
    assert committed(directory) == ["ckpt-3", "ckpt-2"]
    assert_all_whole(directory)


# Process groups


def _in_subgroup(rank, directory):
    group = dist.new_group([1, 3])
    mesh = DeviceMesh("cpu", [1, 3])
    whole = torch.arange(7.0)
    sharded = distribute_tensor(whole, mesh, [Shard(0)], src_data_rank=None)
    checkpoint = make_checkpoint(own=PerRank(rank), sharded=sharded)
    if rank not in (1, 3):
        return outcome(_manager, checkpoint, directory, process_group=group)
    with _manager(checkpoint, directory, process_group=group) as manager:
        train(checkpoint)
        manager.save()
        expected = state_of(checkpoint)
        train(checkpoint)
        checkpoint.own = PerRank(None)
        sharded.to_local().zero_()
        manager.restore_or_initialize()
        assert state_of(checkpoint) == expected
        assert torch.equal(sharded.full_tensor(), whole)
        assert checkpoint.own.value == rank
        manager.sync()
    return sorted(n for n in os.listdir(_attempt_in(directory)))


def _in_overlapping_subgroups(rank, directory):
    """Rank 1 knows a group more than rank 2; managers come and go over the two of them."""
    group = dist.new_group([1, 2])
    dist.new_group([0, 1])
    if rank == 0:
        return None
    saved = []
    for _ in range(3):
        with _manager(make_checkpoint(), directory, 10, process_group=group) as manager:
            manager.restore_or_initialize()
            saved.append(manager.save())
    return saved


def test_managers_over_ranks_that_know_different_groups_come_and_go(tmp_path):
    """Nothing depends on how many groups a rank has seen, or on names used before."""
    directory = str(tmp_path / "run")
    _, *saved = values_of(run_ranks(_in_overlapping_subgroups, 3, directory))
    assert saved == [[f"{directory}/ckpt-{number}" for number in (1, 2, 3)]] * 2


def _attempt_in(directory):
    (name,) = [n for n in os.listdir(directory) if n.startswith("ckpt-1.")]
    return os.path.join(directory, name)


def test_subgroup_of_the_ranks_checkpoints_alone(tmp_path):
    """Two of four ranks save and restore; the others are refused at once."""
    results = values_of(run_ranks(_in_subgroup, 4, str(tmp_path / "run")))
    files = [f"rank-0000{rank}-of-00002.safetensors" for rank in (0, 1)]
    assert results[1] == results[3] == ["manifest.json", *files]
    for rank in (0, 2):
        assert results[rank].kind == "ConfigError"
        assert f"rank {rank} is not a member" in results[rank].text


def _with_backend(rank, directory, rendezvous, backend):
    dist.init_process_group(
        backend, init_method=f"file://{rendezvous}", rank=rank, world_size=2
    )
    checkpoint = make_checkpoint()
    with _manager(checkpoint, directory) as manager:
        saved = manager.save()
    with _manager(checkpoint, directory, process_group=dist.group.WORLD) as manager:
        restored = manager.restore_or_initialize()
    # The training group is as it was.
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    dist.destroy_process_group()
    return saved, restored, tensor.item()


@pytest.mark.parametrize(
    "backend", [pytest.param("cpu:gloo", marks=pytest.mark.full), None]
)
def test_default_group_of_another_backend_string_will_do(tmp_path, backend):
    """The manager makes gloo groups of its own, whatever training uses."""
    directory = str(tmp_path / "run")
    results = values_of(
        run_ranks(
            _with_backend,
            2,
            directory,
            str(tmp_path / "store"),
            backend,
            process_group=False,
        )
    )
    path = f"{directory}/ckpt-1"
    assert results == [(path, path, 2.0)] * 2


# The end of a manager


def _close_and_leave(rank, directory):
    found = {}
    checkpoint = make_checkpoint()
    manager = _manager(checkpoint, directory)
    manager.save()
    manager.close()
    found["close twice"] = outcome(manager.close)
    found["after close"] = [
        outcome(call)
        for call in (manager.save, manager.restore_or_initialize, manager.sync)
    ]
    found["lists"] = (manager.latest_checkpoint, manager.checkpoints)

    def leave():
        with _manager(checkpoint, directory) as inner:
            inner.restore_or_initialize()
            raise SaveFailed(f"left by {rank}", {})

    found["left"] = outcome(leave)
    # The directory is free again at once, and the groups still work.
    with _manager(checkpoint, directory) as again:
        found["again"] = outcome(again.save)
        found["entered"] = again is not None
    manager = _manager(checkpoint, directory, max_to_keep=1)
    real = posix.remove_tree

    def remove_slowly(path):
        time.sleep(0.5)
        real(path)

    posix.remove_tree = remove_slowly
    manager.save()
    if rank == 0:
        lock = FileLock(os.path.join(directory, ".lock"))
        with pytest.raises(Timeout):
            lock.acquire(timeout=0)
    del manager
    if rank == 0:  # though what it has released is still being deleted
        lock.acquire(timeout=0)
        lock.release()
    dist.barrier()
    # Events of a manager that was not closed are told on a thread, which ends by itself.
    deadline = time.monotonic() + 5
    while any("distckpt" in t.name for t in threading.enumerate()):
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    found["threads"] = [t.name for t in threading.enumerate() if "distckpt" in t.name]
    return found


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.full), 2])
def test_closed_left_and_deleted_managers_let_go(tmp_path, world_size):
    """Closing twice is harmless, use after it an error, and no lock or thread stays."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_close_and_leave, world_size, directory))
    for rank, found in enumerate(results):
        assert found["close twice"].kind == "ok"
        for one in found["after close"]:
            assert one.kind == "ManagerBroken" and "closed" in one.text
        assert found["lists"] == (f"{directory}/ckpt-1", [f"{directory}/ckpt-1"])
        assert found["left"].text == f"left by {rank}" and found["left"].net_seconds < 1
        assert found["again"].text == f"{directory}/ckpt-2"
        assert found["threads"] == []


def _without_group(rank, directory):
    assert not dist.is_initialized()
    checkpoint = make_checkpoint(own=PerRank(5))
    with _manager(checkpoint, directory, max_to_keep=1) as manager:
        saved = [manager.save(), manager.save()]
        manager.sync()
    live = make_checkpoint(seed=1, own=PerRank(0))
    with _manager(live, directory, max_to_keep=1) as manager:
        restored = manager.restore_or_initialize()
        checkpoints = manager.checkpoints
    assert state_of(live) == state_of(checkpoint) and live.own.value == 5
    refused = outcome(_manager, live, directory, process_group="group")
    return saved, restored, checkpoints, refused


def test_no_process_group_at_all_is_one_rank(tmp_path):
    """The same code path without ``torch.distributed``."""
    directory = str(tmp_path / "run")
    results = run_ranks(_without_group, 1, directory, process_group=False)
    ((saved, restored, checkpoints, refused),) = values_of(results)
    assert saved == [f"{directory}/ckpt-1", f"{directory}/ckpt-2"]
    assert restored == saved[1] and checkpoints == [saved[1]]
    assert refused.kind == "ConfigError" and "not initialized" in refused.text


def _leave_on_one_rank(rank, directory):
    def body():
        with _manager(make_checkpoint(), directory, DEADLINE_SECONDS) as manager:
            manager.save()
            if rank == 1:
                raise ZeroDivisionError("only here")

    found = outcome(body)
    time.sleep(max(0.0, DEADLINE_SECONDS - found.seconds))
    return found


def test_with_block_left_by_an_error_on_one_rank_ends_the_others_in_time(tmp_path):
    """The error shows at once where it is; the others miss a rank at the deadline."""
    directory = str(tmp_path / "run")
    other, culprit = values_of(run_ranks(_leave_on_one_rank, 2, directory))
    assert (culprit.kind, culprit.text) == ("ZeroDivisionError", "only here")
    assert culprit.net_seconds < 1
    assert "ManagerBroken" in other.bases and other.net_seconds < DEADLINE_SECONDS + 1.5
    assert committed(directory) == ["ckpt-1"]


if __name__ == "__main__":
    _exit_main(int(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5]))


def _be_away_in_a_commit(rank, directory):
    """The chief stops before it writes a manifest; its peer dies meanwhile."""
    manager = CheckpointManager(
        make_checkpoint(), directory, max_to_keep=None, timeout=timedelta(seconds=20)
    )
    manager.save()
    stopped = Path(f"{directory}.pid")
    if rank == 0:
        real = posix.write_new_file

        def stop_first(path, data):
            if path.endswith("manifest.json"):
                stopped.write_text(str(os.getpid()))
                os.kill(os.getpid(), signal.SIGSTOP)
            real(path, data)

        posix.write_new_file = stop_first
        saved = outcome(manager.save)
        return saved, outcome(manager.save), outcome(manager.close)
    threading.Thread(target=outcome, args=(manager.save,), daemon=True).start()
    while not stopped.exists() or not stopped.read_text():
        time.sleep(0.01)
    os._exit(9)


def test_chief_that_was_away_is_told_that_it_is_fenced(tmp_path):
    """Not just that its peers have gone: another job has the directory by now."""
    directory = str(tmp_path / "run")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(run_ranks, _be_away_in_a_commit, 2, directory, timeout=60)
        stopped = Path(f"{directory}.pid")
        while not running.done() and not (stopped.exists() and stopped.read_text()):
            time.sleep(0.01)
        time.sleep(0.5)  # until its peer has gone
        newer = Chief(
            RunDirectory.at(directory),
            checkpoint_name="ckpt",
            retention=Retention(None),
            identity=Identity("newer", 0),
            takeover=True,
        )
        newer.prepare_claim()
        newer.finish_claim()
        assert newer.settle(20)
        os.kill(int(stopped.read_text()), signal.SIGCONT)
        chief, _ = running.result()
    newer.close()
    assert chief.ok, chief
    saved, again, closed = chief.value
    assert saved.kind == again.kind == "FencedError", (saved, again)
    assert "claimed by job 'newer'" in saved.text
    assert closed.kind == "ok" and closed.net_seconds < 5, closed
    assert committed(directory) == ["ckpt-1"]
