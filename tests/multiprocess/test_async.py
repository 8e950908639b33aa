"""Asynchronous saves on real ranks: whose bytes are saved, when results show, what fails."""

from __future__ import annotations

import errno
import os
import statistics
import threading
import time
from datetime import timedelta

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
from outcome_helpers import LoggedTexts, leftovers, outcome
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointOptions,
    PerRank,
    SaveFailed,
    latest_checkpoint,
)

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


@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
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


@pytest.mark.parametrize("kind", ["plain", "fsdp2"])
def test_lazily_saved_tensor_changed_too_early_is_named_and_never_saved(tmp_path, kind):
    """However it is changed, and though the change outlasts the copy; later it may be."""
    directory = str(tmp_path / "run")
    for seen, counter in values_of(run_ranks(_change_too_early, 2, directory, kind, timeout=40)):
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
        step += 0
        assert manager.save() is None
        num_calls += 1
        time.sleep(0.001)
        assert time.monotonic() - started < 10
    found["calls"] = num_calls
    found["shown"] = time.monotonic() - started
    assert manager.checkpoints == [fifth, sixth]
    manager.close()
    return found


def test_calls_while_a_save_is_under_way(tmp_path):
    """They see nothing of it, cost nothing, are skipped or wait; its result shows alike."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_skip_wait_and_ask, 2, directory, timeout=30))
    chief, other = results
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


@pytest.mark.parametrize("victim", [0, 1])
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
        assert "did not come back" in hang.text and hang.seconds < 6
        for name, found in seen.items():
            assert found.kind == "SaveFailed", (name, found)
            assert found.failures.keys() == {victim}, (name, found)
            assert found.text == results[0][name].text


