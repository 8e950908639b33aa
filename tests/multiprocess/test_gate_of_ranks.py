"""The step interval costs nothing, and the chief alone decides for all ranks."""

import gc
import os
import statistics
import sys
import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks, values_of
from ranks_helpers import (
    attempts_of,
    exists,
    newest_record,
    numbers,
    published,
    set_clock,
    snapshot,
)

from distckpt import (
    Checkpoint,
    CheckpointManager,
    ConfigError,
    get_checkpoint_state,
    latest_checkpoint,
    paths,
)

_LIMIT_SECONDS = 20e-6


def _count_collectives():
    """Count what this rank asks of torch.distributed from now on."""
    counts = {"gather": 0, "broadcast": 0, "other": 0}

    def counted(name, real):
        def call(*arguments, **options):
            counts[name if name in counts else "other"] += 1
            return real(*arguments, **options)

        return call

    for name in (
        "gather",
        "broadcast",
        "all_gather",
        "all_reduce",
        "barrier",
        "reduce",
        "scatter",
        "send",
        "recv",
        "all_gather_object",
        "broadcast_object_list",
        "gather_object",
        "new_group",
    ):
        setattr(dist, name, counted(name, getattr(dist, name)))
    # The manager's own go to its groups directly.
    for name in ("gather", "broadcast", "allreduce", "barrier", "send", "recv"):
        for kind in (dist.ProcessGroup, dist.ProcessGroupGloo):
            setattr(kind, name, counted(name, getattr(kind, name)))
    return counts


# What a gated call costs


def _call_while_gated(_, directory):
    step = torch.tensor(0)
    manager = CheckpointManager(
        Checkpoint(w=torch.ones(1000)),
        directory,
        max_to_keep=2,
        step_counter=step,
        checkpoint_interval=1_000_000,
    )
    assert manager.save() is not None
    manager.sync()
    before = snapshot(directory)
    dist.barrier()
    counts = _count_collectives()
    medians = []
    gc.disable()
    for _ in range(7):
        nanoseconds = []
        for _ in range(1000):
            step += 1
            started = time.perf_counter_ns()
            path = manager.save()
            nanoseconds.append(time.perf_counter_ns() - started)
            assert path is None
        medians.append(statistics.median(nanoseconds) * 1e-9)
    gc.enable()
    gated = dict(counts)
    dist.barrier()
    assert snapshot(directory) == before
    # The counters do count: the save that is due takes the same on every rank.
    step.fill_(1_000_000)
    assert manager.save() is not None
    return gated, counts, min(medians)


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.full), 4])
def test_gated_save_makes_no_collective_and_takes_microseconds(tmp_path, world_size):
    """A call that the interval rules out can be made at every step of training."""
    for gated, counts, seconds in values_of(
        run_ranks(_call_while_gated, world_size, str(tmp_path))
    ):
        assert gated == {"gather": 0, "broadcast": 0, "other": 0}
        assert seconds < _LIMIT_SECONDS, f"{seconds * 1e6:.1f} us"
        if world_size > 1:
            assert counts["gather"] == counts["broadcast"] >= 2
        else:
            assert counts["gather"] == counts["broadcast"] == 0


# Ranks that call differently


def _call_differently(rank, directory):
    step = torch.tensor(0)
    checkpoint = Checkpoint(step=torch.tensor(0))
    manager = CheckpointManager(
        checkpoint,
        directory,
        max_to_keep=2,
        step_counter=step,
        checkpoint_interval=5,
        timeout=timedelta(seconds=20),
    )
    assert numbers([manager.save()]) == [1]
    told = []

    def refuse(**options):
        with pytest.raises(ConfigError) as caught:
            manager.save(**options)
        told.append(str(caught.value))
        assert checkpoint.save_counter == len(manager.checkpoints)
        assert manager.latest_checkpoint == f"{directory}/ckpt-{checkpoint.save_counter}"

    # Other steps, at which both would save.
    step.fill_(5 + rank)
    refuse()
    step.fill_(5)
    # Other arguments.
    refuse(checkpoint_number=10 + rank)
    refuse(checkpoint_number=[None, 10][rank])
    refuse(check_interval=rank == 0)
    assert numbers([manager.save()]) == [2]
    step.fill_(10)
    # Another number from the counter: it is part of what is saved, and differs.
    checkpoint.save_counter += rank
    with pytest.raises(ConfigError, match=r"save_counter: 3 \(rank 0\), 4 \(rank 1\)"):
        manager.save()
    checkpoint.save_counter -= rank
    assert numbers([manager.save()]) == [3]
    manager.sync()
    assert numbers(manager.checkpoints) == [2, 3]
    assert published(directory) == ["ckpt-2", "ckpt-3"]
    hidden = [name for name in os.listdir(directory) if name.endswith(".pending")]
    assert hidden == []
    manager.close()
    return told


def test_calls_that_differ_between_ranks_are_refused_on_all(tmp_path):
    """Another step or argument on one rank is a ConfigError that names it, on all.

    Nothing is saved, no number is lost, and the next save works.
    """
    one, other = values_of(run_ranks(_call_differently, 2, str(tmp_path)))
    assert one == other
    assert len(one) == 4
    assert "the chief at step 5;" in one[0]
    assert "rank 1 at step 6" in one[0]
    for text in one[1:]:
        assert "rank 1 at step 5" in text


def _pass_a_bad_argument_on_one(rank, directory, at_fault):
    step = torch.tensor(3)
    checkpoint = Checkpoint()
    manager = CheckpointManager(
        checkpoint,
        directory,
        max_to_keep=None,
        step_counter=step,
        checkpoint_interval=1,
        timeout=timedelta(seconds=5),
    )
    told = []

    def refuse(**options):
        with pytest.raises(ConfigError) as caught:
            manager.save(**(options if rank == at_fault else {}))
        told.append(str(caught.value))
        assert isinstance(caught.value.__cause__, ConfigError) is (rank == at_fault)

    # In the call that claims the directory, and in a later one.
    for number in (1, 2):
        refuse(checkpoint_number="7")
        refuse(checkpoint_number=1.5)
        refuse(options="fast")
        assert checkpoint.save_counter == number - 1
        assert numbers([manager.save()]) == [number]
        step += 1
    return told


@pytest.mark.parametrize("at_fault", [pytest.param(0, marks=pytest.mark.full), 1])
def test_bad_argument_on_one_rank_is_refused_on_all(tmp_path, at_fault):
    """A rank with an argument that no rank may pass does not leave the others waiting."""
    one, other = values_of(
        run_ranks(_pass_a_bad_argument_on_one, 2, str(tmp_path / "run"), at_fault)
    )
    assert one == other
    for text, bad in zip(one, ["'7'", "1.5", "'fast'"] * 2, strict=True):
        assert f"(1 of 2 ranks): rank {at_fault}: " in text
        assert bad in text


# The chief alone


def _watch_writes():
    """Note every change that this process asks of the filesystem from now on."""
    changes = []
    events = {
        "os.link": 1,
        "os.rename": 1,
        "os.mkdir": 0,
        "os.rmdir": 0,
        "os.remove": 0,
        "os.truncate": 0,
        "os.symlink": 1,
        "shutil.rmtree": 0,
    }

    def watch(event, arguments):
        if event in events:
            changes.append((event, os.fspath(arguments[events[event]])))
        elif event == "open":
            path, _, flags = arguments
            if isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                changes.append(("open", path))

    sys.addaudithook(watch)
    return changes


def _live_with_another_clock(rank, directory):
    # One hour behind on one rank, a year ahead on the other.
    clock = set_clock(10_000.0 if rank == 0 else 5_000_000.0)
    manager = CheckpointManager(
        Checkpoint(w=torch.nn.Linear(10, 10)), directory, 1, keep_checkpoint_every_n_hours=1
    )
    changes = _watch_writes()
    for _ in range(4):
        clock.now += 1800.0 if rank == 0 else 1.0
        manager.save()
    manager.sync()
    changes = [
        (event, os.path.relpath(path, directory))
        for event, path in list(changes)
        if isinstance(path, str) and path.startswith(directory)
    ]
    return manager.checkpoints, changes


def test_chief_alone_keeps_the_clock_and_writes_but_for_shard_files(tmp_path):
    """Times and preservation are the chief's; another rank writes its shard, no more."""
    directory = os.path.realpath(tmp_path)
    (listed, by_chief), (listed_too, by_other) = values_of(
        run_ranks(_live_with_another_clock, 2, directory)
    )
    assert listed == listed_too == [f"{directory}/ckpt-4"]
    found = get_checkpoint_state(directory)
    assert found.all_model_checkpoint_timestamps == [17_200.0]
    # Saved at 11800, 13600, 15400, 17200; the clock of preservation starts at 9999.
    assert found.last_preserved_timestamp == 13_600.0
    assert published(directory) == ["ckpt-2", "ckpt-4"]

    probes = [c for c in by_other if paths.parse_probe_file(c[1]) is not None]
    assert [event for event, _ in probes] == ["open", "os.remove"]
    shards = [c for c in by_other if c not in probes]
    assert [event for event, _ in shards] == ["open"] * 4
    for _, path in shards:
        folder, name = os.path.split(path)
        assert name == paths.shard_file(1, 2)
        assert paths.parse_pending(folder) is not None
    assert not [c for c in by_chief if os.path.basename(c[1]) == paths.shard_file(1, 2)]
    assert {"os.link", "os.rename", "os.mkdir", "open"} <= {event for event, _ in by_chief}


# sync()


def _drop_something_large(_, directory):
    manager = CheckpointManager(Checkpoint(), directory, max_to_keep=1)
    first = manager.save()
    if dist.get_rank() == 0:
        (name,) = attempts_of(first)
        for count in range(4000):
            open(os.path.join(directory, name, f"side-{count}"), "x").close()
    second = manager.save()
    early = [name for name in os.listdir(directory) if "ckpt-1." in name]
    manager.sync()
    late = [name for name in os.listdir(directory) if "ckpt-1." in name]
    assert not exists(first)
    assert exists(second)
    assert manager.latest_checkpoint == latest_checkpoint(directory) == second
    assert manager.checkpoints == [second]
    # Harmless when nothing is outstanding, and as often as one likes.
    manager.sync()
    manager.sync()
    return early, late, manager.latest_checkpoint


@pytest.mark.parametrize("world_size", [pytest.param(1, marks=pytest.mark.full), 2])
def test_sync_waits_for_deletions_and_leaves_ranks_alike(tmp_path, world_size):
    """save() does not wait for what it drops; sync() does, on every rank."""
    values = values_of(run_ranks(_drop_something_large, world_size, str(tmp_path)))
    assert any(early for early, _, _ in values)
    assert [late for _, late, _ in values] == [[]] * world_size
    assert {latest for _, _, latest in values} == {f"{tmp_path}/ckpt-2"}
    record = newest_record(tmp_path)
    assert [entry.attempt.prefix for entry in record.live] == ["ckpt-2"]
