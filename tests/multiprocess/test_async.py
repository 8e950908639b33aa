"""Asynchronous saves on real ranks: what is saved, when results show, what fails."""

from __future__ import annotations

import errno
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from datetime import timedelta

import exits
import pytest
import torch
import torch.distributed as dist
from async_helpers import (
    EAGER,
    LAZY,
    SKIP,
    Trained,
    Writes,
    assert_same,
    is_copying,
)
from harness import run_ranks, values_of
from outcome_helpers import LoggedTexts, assert_all_whole, committed, leftovers, outcome
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointOptions,
    ManagerBroken,
    PerRank,
    SaveFailed,
    latest_checkpoint,
)
from distckpt.comm import GroupChannel
from distckpt.messages import Phase
from distckpt.snapshot import Snapshot

# Whose bytes are saved


def _make_trained(kind, seed, width):
    if kind == "plain":
        return Trained(seed, width)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return Trained(seed, width, lambda model: fully_shard(model, mesh=mesh))


def _change_at_once(rank, directory, kind, width, num_saves):
    trained, twin = (_make_trained(kind, seed, width) for seed in (0, 1))
    for one in (trained, twin):
        one.forward_and_backward()
        one.optimizer.step()  # which makes its state
    manager = CheckpointManager(trained.checkpoint, directory, max_to_keep=1)
    num_copying = 0
    for number in range(1, num_saves + 1):
        options = EAGER if number % 4 == 0 else LAZY
        for group in trained.optimizer.param_groups:
            group["foreach"] = number % 2 == 1
        trained.forward_and_backward()
        expected = trained.content()
        path = manager.save(options=options)
        if number % 3 == 0:
            trained.forward_and_backward()
        trained.change_what_no_optimizer_changes()
        num_copying += is_copying(manager)
        if options is EAGER:
            with torch.no_grad():
                torch._foreach_zero_([*trained.model.parameters()])
        trained.optimizer.step()
        assert not is_copying(manager)
        manager.sync()
        assert path == manager.latest_checkpoint == f"{directory}/ckpt-{number}"
        rng = torch.get_rng_state()
        twin.checkpoint.restore(path)
        assert_same(twin.content(), expected)
        torch.set_rng_state(rng)
        dist.barrier()
    manager.close()
    return num_copying


@pytest.mark.covers("asynchronous saves: S4 (caller's)", "asynchronous saves: S4 (behind)")
@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.full), "fsdp2"])
def test_what_is_saved_is_what_was_there_at_the_call(tmp_path, kind, report_figures):
    """Everything is changed at the earliest legal moment, most of it while it is copied."""
    num_saves = 6
    results = values_of(
        run_ranks(_change_at_once, 2, str(tmp_path / "run"), kind, 1536, num_saves)
    )
    report_figures(f"steps that came while copies were made: {results} of {num_saves}")
    assert all(results)


# Changes that a lazy save cannot allow


def _double(parameter):
    parameter.mul_(2)


def _part_of(parameter):
    # Of all of it both ranks would draw numbers, or take views, together.
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


def _fill_slowly(parameter):
    _part_of(parameter).normal_()


def _change_by_alias(parameter):
    _part_of(parameter).detach().view(-1)[-1:].fill_(1.0)


def _change_many(parameter):
    # Of sharded ones torch does not count what this changes.
    torch._foreach_add_([_part_of(parameter)], 1.0)


def _change_in_inference_mode(parameter):
    with torch.inference_mode():
        parameter.add_(1.0)


CHANGES = [
    _double,
    _fill_slowly,
    _change_by_alias,
    _change_many,
    _change_in_inference_mode,
]


class OneWeight:
    """One large weight, and an optimizer that has it."""

    def __init__(self, kind, size):
        self.model = torch.nn.Linear(size, 1024, bias=False)
        with torch.no_grad():
            self.model.weight.fill_(1.0)
        if kind == "fsdp2":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            fully_shard(self.model, mesh=mesh)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5)
        self.checkpoint = Checkpoint(model=self.model, optimizer=self.optimizer)

    def is_all(self, value):
        return bool((_part_of(self.model.weight) == value).all())


def _change_too_early(rank, directory, kind):
    size = 8192
    weight, twin = OneWeight(kind, size), OneWeight(kind, size)
    manager = CheckpointManager(weight.checkpoint, directory, max_to_keep=1)
    seen = []
    for change in CHANGES:
        with torch.no_grad():
            weight.model.weight.fill_(2.0)
        before = manager.latest_checkpoint, weight.checkpoint.save_counter
        manager.save(options=LAZY)
        if rank == 1:
            with torch.no_grad():
                change(weight.model.weight)
        seen.append(outcome(manager.sync))
        assert (manager.latest_checkpoint, weight.checkpoint.save_counter) == before
        with torch.no_grad():
            weight.model.weight.fill_(3.0)
        path = manager.save(options=LAZY)
        manager.wait_staged()
        with torch.no_grad():
            change(weight.model.weight)
        manager.sync()
        twin.checkpoint.restore(path)
        assert twin.is_all(3.0)
    manager.close()
    return seen, manager.checkpoint.save_counter


@pytest.mark.covers("asynchronous saves: S4 (behind)")
@pytest.mark.parametrize("kind", [pytest.param("plain", marks=pytest.mark.full), "fsdp2"])
def test_lazily_saved_tensor_changed_too_early_is_named_and_never_saved(tmp_path, kind):
    """However it is changed, and though the change outlasts the copy; later it may be."""
    directory = str(tmp_path / "run")
    results = run_ranks(_change_too_early, 2, directory, kind, timeout=40)
    for seen, counter in values_of(results):
        assert [one.kind for one in seen] == ["SaveFailed"] * len(CHANGES), seen
        for one in seen:
            assert "model/weight" in one.text and "wait_staged()" in one.text
            assert one.failures.keys() == {1}
        assert counter == len(CHANGES)


# A save under way, and the calls meanwhile


def _interval_manager(directory, step, interval, **more):
    checkpoint = Checkpoint(weight=torch.ones(1000), own=PerRank(torch.ones(100)))
    return CheckpointManager(
        checkpoint,
        directory,
        max_to_keep=2,
        step_counter=step,
        checkpoint_interval=interval,
        **more,
    )


def _skip_wait_and_ask(rank, directory):
    logged = LoggedTexts()
    writes = Writes()
    step = torch.tensor(0)
    manager = _interval_manager(directory, step, 10)
    first = manager.save()
    found = {}
    # One that is under way is nowhere, and calls at other steps cost nothing.
    step += 10
    writes.hold()
    second = manager.save(options=EAGER)
    assert second == f"{directory}/ckpt-2"
    assert manager.checkpoint.save_counter == 2
    assert manager.latest_checkpoint == first and manager.checkpoints == [first]
    assert latest_checkpoint(directory) == first
    step += 1
    assert manager.save() is None  # which asks what has become of it
    nanoseconds = []
    for _ in range(2000):
        started = time.perf_counter_ns()
        assert manager.save() is None
        nanoseconds.append(time.perf_counter_ns() - started)
    found["gated"] = statistics.median(nanoseconds) * 1e-9
    # Another one is skipped, or refused alike.
    step.fill_(20)
    assert manager.save(options=SKIP) is None
    step.fill_(21)
    assert manager.save(options=SKIP) is None
    found["logged"] = [*logged.texts]
    options = CheckpointOptions(True, ["eager", "lazy"][rank], "skip")
    found["differing"] = outcome(manager.save, options=options)
    found["bad"] = outcome(manager.save, options="bad" if rank else SKIP)
    assert manager.checkpoint.save_counter == 2
    assert manager.latest_checkpoint == first and manager.checkpoints == [first]
    # Another one waits for it, whatever another rank is told to do.
    threading.Timer(0.3, writes.go_on).start()
    found["mixed"] = outcome(manager.save, options=[EAGER, SKIP][rank])
    third = manager.save(options=LAZY)
    assert third == f"{directory}/ckpt-3"
    assert manager.latest_checkpoint == second and manager.checkpoints == [first, second]
    # A save that is not asynchronous, and a restore, wait as well.
    step += 10
    fourth = manager.save()
    assert manager.checkpoints == [third, fourth]
    assert manager.latest_checkpoint == latest_checkpoint(directory) == fourth
    manager.checkpoint.weight.fill_(5.0)
    step += 10
    fifth = manager.save(options=LAZY)
    manager.checkpoint.weight.fill_(6.0)
    assert manager.restore_or_initialize() == fifth
    assert manager.checkpoint.weight.tolist() == [5.0] * 1000
    assert manager.latest_checkpoint == fifth
    # What became of one shows at a call that saves nothing, on all ranks at the same.
    step += 10
    sixth = manager.save(options=EAGER)
    num_calls = 0
    started = time.monotonic()
    while manager.latest_checkpoint != sixth:
        assert manager.save() is None
        num_calls += 1
        time.sleep(0.001)
        assert time.monotonic() - started < 10
    found["calls"] = num_calls
    found["shown"] = time.monotonic() - started
    assert manager.checkpoints == [fifth, sixth]
    manager.close()
    return found


@pytest.mark.covers("asynchronous saves: L0 (caller's)")
def test_calls_while_a_save_is_under_way(tmp_path):
    """They see nothing of it, cost nothing, are skipped or wait; its result shows alike."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_skip_wait_and_ask, 2, directory, timeout=30))
    chief, other = results
    # The helper spins at one step until the save is through.
    chief["logged"] = [text for text in chief["logged"] if "step_counter" not in text]
    assert len(chief["logged"]) == 2 and not other["logged"]
    assert "step 20" in chief["logged"][0] and "ckpt-2" in chief["logged"][0]
    assert chief["calls"] == other["calls"]
    for found in results:
        assert found["gated"] < 20e-6, found["gated"]
        assert found["differing"].kind == found["mixed"].kind == "ConfigError"
        assert found["bad"].kind == "ConfigError" and "rank 1" in found["bad"].text
        assert found["mixed"].seconds > 0.1
        assert found["shown"] < 4.0, found["shown"]


# Failures behind the training loop


def _fail_behind(rank, directory, victim):
    writes = Writes()
    step = torch.tensor(0)
    manager = _interval_manager(directory, step, 10, timeout=timedelta(seconds=3))
    first = manager.save()
    ways = {
        "save": lambda: manager.save(options=EAGER),
        "sync": manager.sync,
        "restore": manager.restore_or_initialize,
        "gated": lambda: _call_until_it_shows(manager, step),
    }
    seen = {}
    for name, call in ways.items():
        step += 10
        before = manager.checkpoint.save_counter
        writes.hold()
        path = manager.save(options=LAZY if name == "sync" else EAGER)
        assert manager.checkpoint.save_counter == before + 1
        writes.go_on(errno.EIO if rank == victim else None)
        if name == "save":
            step += 10
        found = seen[name] = outcome(call)
        writes.go_on()
        assert manager.checkpoint.save_counter == before
        assert manager.latest_checkpoint == latest_checkpoint(directory) == first
        dist.barrier()
        assert leftovers(directory) == []
        dist.barrier()
        # As if it had never begun: due at once, and the same number.
        assert manager.save(options=EAGER) == path, found
        manager.sync()
        assert manager.latest_checkpoint == path
        first = path
    # One that hangs; what comes next does not wait for ever either.
    step += 10
    if rank == victim:
        writes.hold()
    before = manager.checkpoint.save_counter
    manager.save(options=EAGER)
    seen["hang"] = outcome(manager.sync)
    assert manager.checkpoint.save_counter == before
    writes.go_on()
    path = manager.save(options=EAGER)
    manager.sync()
    assert manager.latest_checkpoint == path
    dist.barrier()
    assert leftovers(directory) == []
    dist.barrier()
    # And the last one fails in close().
    step += 10
    writes.hold()
    manager.save(options=EAGER)
    writes.go_on(errno.ENOSPC if rank == victim else None)
    seen["close"] = outcome(manager.close)
    writes.go_on()
    seen["closed"] = outcome(manager.save)
    assert manager.latest_checkpoint == latest_checkpoint(directory) == path
    return seen


def _call_until_it_shows(manager, step):
    step += 1
    num_calls = 0
    started = time.monotonic()
    while time.monotonic() - started < 20:
        num_calls += 1
        try:
            assert manager.save() is None
        except SaveFailed as error:
            msg = f"{num_calls} calls"
            raise SaveFailed(msg, error.failures) from error
        time.sleep(0.001)
    return "never"


@pytest.mark.covers(
    "asynchronous saves: S5 to S8 (behind)", "asynchronous saves: L3 (caller's)"
)
@pytest.mark.parametrize("victim", [pytest.param(0, marks=pytest.mark.full), 1])
def test_failure_behind_the_loop_shows_on_all_ranks_at_the_same_call(tmp_path, victim):
    """In save, sync, restore, a call that saves nothing, close; and then all is well."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_fail_behind, 2, directory, victim, timeout=40))
    for seen in results:
        closed = seen.pop("closed")
        assert closed.kind == "ManagerBroken" and "closed" in closed.text
        hang = seen.pop("hang")
        # The chief cannot even clear away what it began.
        assert hang.kind == ("SaveFailed" if victim else "StorageTimeout"), hang
        assert "did not come back" in hang.text and hang.net_seconds < 6
        for name, found in seen.items():
            assert found.kind == "SaveFailed", (name, found)
            assert found.failures.keys() == {victim}, (name, found)
            assert found.text == results[0][name].text


# The end of a process with a save under way


ENDINGS = {
    2: {
        "return": (0, True),
        "destroy-groups": (0, True),
        "interrupt-in-with": (-signal.SIGINT, True),
        "interrupt-in-sync": (-signal.SIGINT, None),
        "error-of-one-in-with": (1, True),
        "hang-error-in-with": (1, False),
    },
    1: {
        "exit-code": (exits.ERROR_CODE, True),
        "interrupt": (-signal.SIGINT, True),
        "hang": (0, False),
    },
}


@pytest.mark.full
@pytest.mark.parametrize("world_size", [1, 2])
def test_process_that_ends_waits_for_its_save_within_bounds(tmp_path, world_size):
    """By its end, an exit, Ctrl-C or an error: committed or invisible, and no crash."""
    endings = ENDINGS[world_size]
    command = [sys.executable, exits.__file__, str(tmp_path), str(world_size), *endings]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    # gloo of torch 2.9 prints to the same place that its ranks are connected.
    found = json.loads(done.stdout.splitlines()[-1])
    for ending, (expected, is_committed) in endings.items():
        label = ending, found[ending]
        for rank, (code, seconds) in enumerate(found[ending]):
            text = (tmp_path / ending / f"error-{rank}").read_text()
            assert code == expected, (*label, text)
            if ending == "error-of-one-in-with" and rank == 0:
                assert "its program raised ValueError" in text, text
                assert "ckpt-2 was committed before" in text, text
            assert seconds < 15, label
            assert "terminate called" not in text, (*label, text)
        directory = str(tmp_path / ending / "run")
        assert_all_whole(directory)
        newest = os.path.basename(latest_checkpoint(directory))
        assert newest in ("ckpt-1", "ckpt-2")
        assert is_committed is None or (newest == "ckpt-2") is is_committed, label


# A rank that is lost behind the training loop

_DEADLINE_SECONDS = 1.2


def _lose_behind(rank, directory, victim, how, where):
    survivors = [one for one in range(3) if one != victim]
    group = dist.new_group(survivors)
    step = torch.tensor(0)
    checkpoint = Trained(0, 256).checkpoint
    del checkpoint.rng
    manager = CheckpointManager(
        checkpoint,
        directory,
        max_to_keep=None,
        step_counter=step,
        checkpoint_interval=10,
        timeout=timedelta(seconds=_DEADLINE_SECONDS),
    )
    manager.save()
    pids = [None] * 3
    dist.all_gather_object(pids, os.getpid())
    step += 10
    if rank == victim:
        _strike_at(where, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    manager.save(options=LAZY)
    if rank == victim:
        time.sleep(60)  # it strikes itself behind this
    step += 1
    total = torch.ones(1000)
    started = time.monotonic()
    num_steps = 0
    while True:
        dist.all_reduce(total, group=group)
        total /= 2
        num_steps += 1
        found = outcome(_told, manager.save)
        # All leave the loop at the same step, as a job that handles it would.
        has_shown = torch.tensor(float(found.kind != "ok"))
        dist.all_reduce(has_shown, group=group)
        if has_shown or time.monotonic() - started > 20:
            break
        time.sleep(0.002)
    seconds = time.monotonic() - started
    others = outcome(_told, manager.save), outcome(_told, manager.sync)
    dist.all_reduce(total, group=group)
    assert total.tolist() == [2.0] * 1000
    if how == "stop" and rank == survivors[0]:
        os.kill(pids[victim], signal.SIGKILL)
    return found, float(has_shown), seconds, others


def _strike_at(where, number):
    def strike():
        os.kill(os.getpid(), number)

    if where == "staging":
        copy_rest = Snapshot.copy_rest

        def copy_half(self):
            rest = [*self._rest]

            def half():
                yield from rest[: len(rest) // 2]
                strike()
                yield from rest[len(rest) // 2 :]

            self._rest = half()
            copy_rest(self)

        Snapshot.copy_rest = copy_half
    elif where == "vote":
        consult = GroupChannel.consult

        def strike_at_write(self, vote, *rest, **more):
            if vote.phase is Phase.WRITE:
                strike()
            return consult(self, vote, *rest, **more)

        GroupChannel.consult = strike_at_write
    else:
        # At the rename that publishes, or in the midst of the shard file.
        name = {"commit": "rename", "write": "pwritev"}[where]
        setattr(os, name, lambda *arguments, **more: strike())


def _told(call):
    try:
        return call()
    except ManagerBroken as error:
        told = (type(error).__name__, error.ranks, error.committed, str(error))
        raise Told(json.dumps(told)) from error


class Told(Exception):
    """Carries what an error says beside its text."""


@pytest.mark.covers("asynchronous saves: S5 to S8 (behind)")
@pytest.mark.parametrize(
    ("victim", "how", "where"),
    [
        pytest.param(2, "kill", "staging", marks=pytest.mark.full),
        (1, "stop", "write"),
        pytest.param(0, "stop", "vote", marks=pytest.mark.full),
        (0, "kill", "commit"),
    ],
)
def test_rank_lost_behind_the_loop_is_named_and_training_is_not_disturbed(
    tmp_path, victim, how, where
):
    """The survivors' own collectives go on; a call that saves nothing brings the news."""
    directory = str(tmp_path / "run")
    results = run_ranks(_lose_behind, 3, directory, victim, how, where, timeout=40)
    survivors = [result for rank, result in enumerate(results) if rank != victim]
    late = 4.0 + (_DEADLINE_SECONDS if how == "stop" else 0.0)
    told = []
    for found, num_shown, seconds, others in values_of(survivors):
        assert num_shown == 2 and seconds < late, (found, num_shown, seconds)
        texts = [json.loads(one.text) for one in (found, *others)]
        expected = "PeerLost" if how == "kill" else "PeerTimeout"
        assert [kind for kind, *_ in texts] == [expected] * 3, texts
        assert texts[0][1] == [victim], texts
        told.append(texts[0][2])
    # Nothing was committed. Only the chief may know that.
    assert told in ([None, None], [False, None], [False, False]), told
    assert_all_whole(directory)
    assert committed(directory) == ["ckpt-1"]
    back = run_ranks(_come_back, 3, directory)
    assert values_of(back) == [f"{directory}/ckpt-1"] * 3


def _come_back(rank, directory):
    checkpoint = Trained(1, 256).checkpoint
    del checkpoint.rng
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        restored = manager.restore_or_initialize()
        manager.save(options=EAGER)
    assert manager.latest_checkpoint == f"{directory}/ckpt-2"
    return restored


# What is saved from one call to the next


def _rss_bytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGESIZE")


def _save_twenty_times(rank, directory):
    weight = torch.zeros(2**24)  # 64 MiB
    checkpoint = Checkpoint(weight=weight)
    manager = CheckpointManager(checkpoint, directory, max_to_keep=1)
    bare = _rss_bytes()
    resident = []
    for number in range(20):
        weight.fill_(number)
        manager.save(options=LAZY if number % 2 else EAGER)
        weight.fill_(-1.0)
        manager.sync()
        resident.append(_rss_bytes() - bare)
    size = weight.nbytes
    limit = 1.05 * size + 64 * 2**20
    assert max(resident) < limit, (max(resident), limit)
    assert resident[-1] - resident[2] < 8 * 2**20, resident
    assert (manager._save_state.arena.bytes.nbytes) < limit
    # Where there is much less to save, the memory goes back, too.
    checkpoint.weight = weight = torch.zeros(2**20)
    manager.save(options=EAGER)
    manager.sync()
    small = manager._save_state.arena.bytes.nbytes
    manager.close()
    return small, _rss_bytes() - bare


def test_memory_of_copies_is_kept_bounded_and_given_back(tmp_path):
    """Twenty saves take as much as the first; close() gives all of it back."""
    results = run_ranks(_save_twenty_times, 1, str(tmp_path / "run"), process_group=False)
    ((small, left),) = values_of(results)
    assert small <= 1.05 * 2**22 + 64 * 2**20
    assert left < 16 * 2**20, left


def _tensors_of_all_kinds():
    base = torch.arange(3000, dtype=torch.float64).view(50, 60)
    return {
        "strided": base.t()[3:9, ::2],
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(3.5, dtype=torch.bfloat16),
        "complex": torch.arange(7).to(torch.complex64).conj(),
        "bool": torch.tensor([True, False, True]),
        "fp8": torch.arange(9, dtype=torch.float32).to(torch.float8_e4m3fn),
    }


def _change_structure(rank, directory, world_size):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    model[1].weight = model[0].weight
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    checkpoint = Checkpoint(
        model=model,
        optimizer=optimizer,
        all_kinds=_tensors_of_all_kinds(),
        own=PerRank({"noise": torch.full((100 + rank,), float(rank)), "rank": rank}),
    )
    other = Checkpoint(x=torch.arange(1000.0))
    manager = CheckpointManager(checkpoint, directory, max_to_keep=None)
    second = CheckpointManager(other, directory + "-2", max_to_keep=None)
    shapes = [(3,), (3,), (300_000,), (5, 5), (0,), (300_000,)]
    for number, shape in enumerate(shapes, 1):
        options = (EAGER, LAZY, None)[number % 3]
        optimizer.zero_grad()
        model(torch.rand(4, 8)).square().mean().backward()
        checkpoint.changing = torch.full(shape, float(number))
        if number % 2:
            checkpoint.now_and_then = torch.full((number,), 7.0 * number)
        else:
            del checkpoint.now_and_then
        other.x.add_(1)
        weight, own = model[0].weight.detach().clone(), number * 10.0 + rank
        checkpoint.own.value["noise"].fill_(own)
        path = manager.save(options=options)
        in_second = second.save(options=EAGER)
        if options is EAGER:
            checkpoint.all_kinds["strided"].neg_()
            checkpoint.changing.zero_()
        checkpoint.own.value["noise"].fill_(-1.0)
        other.x.neg_()
        optimizer.step()  # of one manager's; that of the other has nothing to wait for
        manager.sync()
        second.sync()
        if options is EAGER:
            checkpoint.all_kinds["strided"].neg_()
        expected = _tensors_of_all_kinds()
        twin = Checkpoint(
            model=torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)),
            all_kinds={name: torch.zeros_like(t) for name, t in expected.items()},
            own=PerRank({"noise": torch.zeros(100 + rank), "rank": -1}),
            changing=torch.zeros(shape),
        )
        if number % 2:
            twin.now_and_then = torch.zeros(number)
        twin.optimizer = torch.optim.SGD(twin.model.parameters(), lr=0.1, momentum=0.9)
        twin.model[1].weight = twin.model[0].weight
        twin.optimizer = torch.optim.SGD(twin.model.parameters(), lr=0.1, momentum=0.9)
        twin.restore(path)
        assert torch.equal(twin.model[0].weight, weight)
        for name, tensor in expected.items():
            assert torch.equal(twin.all_kinds[name].to(tensor.dtype), tensor), name
        assert twin.own.value["rank"] == rank
        assert twin.own.value["noise"].tolist() == [own] * (100 + rank)
        assert (twin.changing == number).all()
        assert number % 2 == 0 or (twin.now_and_then == 7.0 * number).all()
        found = Checkpoint(x=torch.zeros(1000))
        found.restore(in_second)
        assert torch.equal(found.x, -other.x)
        other.x.neg_()
    manager.close()
    second.close()
    return True


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.full), 2])
def test_structure_that_changes_from_save_to_save_is_saved_as_it_is(tmp_path, world_size):
    """Also with tied, strided and empty tensors, two managers, and saves of both kinds."""
    directory = str(tmp_path / "run")
    assert all(
        values_of(
            run_ranks(
                _change_structure,
                world_size,
                directory,
                world_size,
                process_group=world_size > 1,
            )
        )
    )
    for folder in (directory, f"{directory}-2"):
        assert_all_whole(folder)


def _interrupt_the_copy(rank, directory):
    manager = CheckpointManager(Checkpoint(x=torch.ones(10)), directory, max_to_keep=None)
    manager.save()
    copy = Snapshot._copy

    def interrupt(self, moves):
        Snapshot._copy = copy
        os.kill(os.getpid(), signal.SIGINT)
        return copy(self, moves)

    Snapshot._copy = interrupt
    first = outcome(manager.save, options=EAGER)
    later = outcome(manager.sync)
    assert manager.latest_checkpoint == f"{directory}/ckpt-1"
    return first, later, manager.save(options=EAGER), outcome(manager.close)


def test_interrupt_while_copying_is_raised_once(tmp_path):
    """The save fails, as the next call says; the one after that works."""
    directory = str(tmp_path / "run")
    results = run_ranks(_interrupt_the_copy, 1, directory, process_group=False)
    ((first, later, saved, closed),) = values_of(results)
    assert first.kind == "KeyboardInterrupt"
    assert later.kind == "SaveFailed", later
    assert saved == f"{directory}/ckpt-2" and closed.kind == "ok"
    assert committed(directory) == ["ckpt-2", "ckpt-1"]


def _be_fenced(rank, directory):
    writes = Writes()
    manager = CheckpointManager(Checkpoint(x=torch.ones(10)), directory, max_to_keep=None)
    manager.save()
    seen = {}
    for how in ("writing", "written"):
        before = manager.checkpoint.save_counter
        if how == "writing":
            writes.hold()
        manager.save(options=EAGER)
        if how == "written":
            manager._save_state.flight.done.wait()
        newer = CheckpointManager(
            Checkpoint(x=torch.zeros(10)), directory, max_to_keep=None, takeover=True
        )
        restored = newer.restore_or_initialize()
        writes.go_on()
        seen[how] = (
            outcome(manager.sync),
            outcome(manager.save),
            outcome(manager.close),
            manager.checkpoint.save_counter - before,
            restored,
        )
        saved = newer.save(options=EAGER)
        newer.sync()
        assert newer.latest_checkpoint == latest_checkpoint(directory) == saved
        assert leftovers(directory) == []
        manager = newer
    manager.close()
    return seen


def test_manager_that_was_taken_over_behind_the_loop_says_so(tmp_path):
    """While it writes, nothing comes of it; what it has committed by then is kept."""
    directory = str(tmp_path / "run")
    (seen,) = values_of(run_ranks(_be_fenced, 1, directory, process_group=False))
    first, later, closed, counted, restored = seen["writing"]
    assert first.kind == later.kind == "FencedError", seen
    assert closed.kind == "ok" and counted == 0
    assert restored == f"{directory}/ckpt-1"
    first, later, closed, counted, restored = seen["written"]
    assert counted == 1 and restored == f"{directory}/ckpt-3", seen
    assert_all_whole(directory)
