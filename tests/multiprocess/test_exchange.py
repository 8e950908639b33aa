"""What all ranks want, read once for all of them: as if each had read it itself."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections import Counter
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks, values_of
from outcome_helpers import attempt_directory, outcome
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from distckpt import Checkpoint, CheckpointManager, PerRank, comm, exchange_plan, known
from distckpt.comm import GroupChannel

WIDTH = 768
EVEN = 1.03


def _raw(tensor):
    plain = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    plain = plain.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return bytes(plain.view(torch.uint8).numpy().tobytes()) if plain.numel() else b""


def _manager(checkpoint, directory, how="once", seconds=30.0):
    return CheckpointManager(
        checkpoint,
        directory,
        max_to_keep=None,
        read_replicated=how,
        timeout=timedelta(seconds=seconds),
    )


class Reads:
    """Counts what this process reads of shard files from now on."""

    def __init__(self):
        self.bytes_of = Counter()
        real = os.preadv

        def count(descriptor, buffers, offset):
            size = real(descriptor, buffers, offset)
            name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
            if name.endswith(".safetensors"):
                self.bytes_of[name] += size
            return size

        os.preadv = count

    def clear(self):
        self.bytes_of.clear()

    @property
    def num_bytes(self):
        return sum(self.bytes_of.values())


class Tied(nn.Module):
    """Two names of one weight, normalization with buffers, a strided parameter."""

    def __init__(self, width):
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.norm = nn.BatchNorm1d(width)
        self.last = nn.Linear(width, width, bias=False)
        self.last.weight = self.first.weight
        self.turned = nn.Parameter(torch.randn(width, width + 3).t())
        self.scale = nn.Parameter(torch.tensor(1.5))

    def forward(self, x):
        x = self.last(self.norm(self.first(x)))
        return (x @ self.turned.t()) * self.scale


def _plain(seed):
    torch.manual_seed(seed)
    return {
        "bf16": torch.randn(61, 63).to(torch.bfloat16),
        "step": torch.tensor(seed),
        "empty": torch.empty(0, 4),
        "bools": torch.rand(77) > 0.5,
        "strided": torch.randn(40, 2, 64)[:, 1, ::2],
        "conjugate": torch.randn(33, dtype=torch.complex64).conj(),
        "small": [torch.full((3,), float(seed)), torch.full((1,), seed)],
    }


class State:
    """All that one rank tracks."""

    def __init__(self, rank, seed, steps):
        torch.manual_seed(seed)
        self.model = DistributedDataParallel(Tied(WIDTH))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.plain = _plain(seed)
        self.own = {"noise": torch.randn(50) + rank, "rank": rank + seed}
        for _ in range(steps):
            self.model(torch.randn(4, WIDTH)).sum().backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def checkpoint(self, per_rank=True):
        own = {"own": PerRank(self.own)} if per_rank else {}
        return Checkpoint(
            model=self.model, optimizer=self.optimizer, plain=self.plain, **own
        )

    def raw(self):
        found = {name: _raw(t) for name, t in self.model.state_dict().items()}
        for index, state in self.optimizer.state_dict()["state"].items():
            found |= {f"{index}/{key}": _raw(value) for key, value in state.items()}
        for name, value in self.plain.items():
            found[name] = [_raw(t) for t in (value if type(value) is list else [value])]
        found["noise"], found["rank"] = _raw(self.own["noise"]), self.own["rank"]
        return found


def _save_and_restore_both_ways(rank, directory):
    saved = State(rank, seed=1, steps=2)
    with _manager(saved.checkpoint(), directory) as manager:
        path = manager.save()
    reads = Reads()
    told = {}
    for how in ("each", "once"):
        # Of an optimizer without state all is allocated; of one with state it is filled.
        for steps in (0, 1):
            state = State(rank, seed=2, steps=steps)
            assert state.raw() != saved.raw()
            with _manager(state.checkpoint(), directory, how) as manager:
                reads.clear()
                assert manager.restore_or_initialize() == path
                assert state.raw() == saved.raw()
                told[how] = dict(reads.bytes_of)
                # Again, with all that is remembered.
                state.model.module.first.weight.data.zero_()
                state.plain["strided"].zero_()
                assert manager.restore_or_initialize() == path
                assert state.raw() == saved.raw()
    return path, told


@pytest.mark.full
@pytest.mark.parametrize(
    "world_size",
    [2, pytest.param(3, marks=pytest.mark.full), pytest.param(4, marks=pytest.mark.full)],
)
def test_once_and_each_give_the_same_and_once_reads_its_own_file_only(tmp_path, world_size):
    """Bit for bit, for all that can be tracked; and a rank reads its part of the bytes."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_save_and_restore_both_ways, world_size, directory))
    for rank, (path, told) in enumerate(results):
        folder = Path(attempt_directory(path))
        sizes = {file.name: file.stat().st_size for file in folder.glob("*.safetensors")}
        total = sum(sizes.values())
        own = f"{rank:05}"
        assert len(told["each"]) == world_size
        assert sum(told["each"].values()) >= 0.99 * total
        assert len(told["once"]) == 1
        assert own in next(iter(told["once"])), told
        assert sum(told["once"].values()) <= total / world_size * EVEN + 3 * 4096


def _restore_in_another_world(rank, directory, path):
    state = State(rank, seed=2, steps=1)
    reads = Reads()
    with _manager(state.checkpoint(per_rank=False), directory) as manager:
        reads.clear()
        assert manager.restore_or_initialize() == path
    return reads.num_bytes, len(reads.bytes_of), _common(state)


def _common(state):
    return {n: raw for n, raw in state.raw().items() if n not in ("noise", "rank")}


def _save(rank, directory):
    state = State(rank, seed=1, steps=2)
    with _manager(state.checkpoint(per_rank=False), directory) as manager:
        return manager.save(), _common(state)


@pytest.mark.full
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (2, 3),
        pytest.param(3, 2, marks=pytest.mark.full),
        pytest.param(4, 3, marks=pytest.mark.full),
        pytest.param(1, 4, marks=pytest.mark.full),
    ],
)
def test_saved_by_another_number_of_ranks_is_read_once(tmp_path, before, after):
    """What few have saved is read by many, in even parts, and the other way round."""
    directory = str(tmp_path / "run")
    path, expected = values_of(run_ranks(_save, before, directory))[0]
    folder = Path(attempt_directory(path))
    total = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    results = values_of(run_ranks(_restore_in_another_world, after, directory, path))
    for num_bytes, num_files, found in results:
        assert found == expected
        # A rank's last parcel may be one too many.
        assert num_bytes <= total / after * EVEN + 2 * exchange_plan._GRAIN_BYTES
        assert num_files <= -(-before // after) + 1


def test_one_rank_alone_has_nobody_to_exchange_with(tmp_path):
    """It reads all of it."""
    directory = str(tmp_path / "run")
    ((path, expected),) = values_of(run_ranks(_save, 1, directory))
    ((num_bytes, num_files, found),) = values_of(
        run_ranks(_restore_in_another_world, 1, directory, path)
    )
    assert (found, num_files) == (expected, 1)
    assert (
        num_bytes
        == next(Path(attempt_directory(path)).glob("*.safetensors")).stat().st_size
    )


# What ranks do not want alike


def _mixed(seed, rank, mesh):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(64, 96), nn.BatchNorm1d(96), nn.Linear(96, 7))
    fully_shard(model, mesh=mesh)
    plain = {"table": torch.randn(700, 300), "step": torch.tensor(seed)}
    everywhere = distribute_tensor(torch.randn(50, 60), mesh, [Replicate()])
    cut = distribute_tensor(torch.randn(50, 60), mesh, [Shard(1)])
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    model(torch.randn(4, 64)).sum().backward()
    optimizer.step()
    tensors = {**plain, "everywhere": everywhere, "cut": cut}
    checkpoint = Checkpoint(model=model, optimizer=optimizer, tensors=tensors)

    def raw():
        state = optimizer.state_dict()["state"]
        return [
            *(_raw(t) for t in model.state_dict().values()),
            *(_raw(t) for t in tensors.values()),
            *(_raw(t) for one in state.values() for t in one.values()),
        ]

    return checkpoint, raw


def _restore_mixed(rank, directory):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    checkpoint, saved = _mixed(1, rank, mesh)
    with _manager(checkpoint, directory) as manager:
        path = manager.save()
    reads = Reads()
    told = []
    for how in ("each", "once"):
        checkpoint, raw = _mixed(2, rank, mesh)
        with _manager(checkpoint, directory, how) as manager:
            reads.clear()
            assert manager.restore_or_initialize() == path
            told.append(reads.num_bytes)
        assert raw() == saved()
    return told


@pytest.mark.parametrize("world_size", [2, pytest.param(3, marks=pytest.mark.full)])
def test_sharded_tensors_are_read_by_each_and_replicated_ones_once(tmp_path, world_size):
    """A model sharded by FSDP2, beside tensors that every rank has whole."""
    results = values_of(run_ranks(_restore_mixed, world_size, str(tmp_path / "run")))
    shared = 700 * 300 * 4 + 50 * 60 * 4
    for each, once in results:
        assert each - once > 0.9 * shared * (world_size - 1) / world_size


def _restore_what_differs(rank, directory):
    def make(seed):
        torch.manual_seed(seed)
        tensors = {"common": torch.randn(1000, 100)}
        tensors["own"] = torch.randn(100) if rank == 1 else seed
        return tensors

    saved = make(1)
    more = {"more": saved["own"]} if rank == 1 else {}
    with _manager(Checkpoint(common=saved["common"], **more), directory) as manager:
        path = manager.save()
    reads = Reads()
    found = make(2)
    more = {"more": found["own"]} if rank == 1 else {}
    with _manager(Checkpoint(common=found["common"], **more), directory) as manager:
        reads.clear()
        assert manager.restore_or_initialize() == path
    assert _raw(found["common"]) == _raw(saved["common"])
    assert rank != 1 or _raw(found["own"]) == _raw(saved["own"])
    return reads.num_bytes


def test_ranks_that_want_different_things_read_for_themselves(tmp_path):
    """They learn of it before anything is read, and open what else they need."""
    for num_bytes in values_of(run_ranks(_restore_what_differs, 3, str(tmp_path / "run"))):
        assert num_bytes > 1000 * 100 * 4


# What goes wrong


def _save_two(rank, directory):
    """Save two checkpoints; return the raw state of both."""
    state = State(rank, seed=1, steps=1)
    raws = []
    with _manager(state.checkpoint(), directory) as manager:
        for _ in range(2):
            state.plain["bf16"].add_(1)
            with torch.no_grad():
                state.model.module.first.weight.add_(1)
            manager.save()
            raws.append(state.raw())
    dist.barrier()
    return raws


def _restore_corrupt(rank, directory, victim):
    raws = _save_two(rank, directory)
    if rank == 0:
        shard = next(Path(attempt_directory(f"{directory}/ckpt-2")).glob(f"*{victim:05}*"))
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    dist.barrier()
    state = State(rank, seed=2, steps=1)
    with _manager(state.checkpoint(), directory) as manager:
        assert manager.restore_or_initialize() == f"{directory}/ckpt-1"
        assert state.raw() == raws[0]
        return manager.save()


@pytest.mark.parametrize(
    "victim",
    [pytest.param(0, marks=pytest.mark.full), 1, pytest.param(2, marks=pytest.mark.full)],
)
def test_one_corrupt_block_makes_all_fall_back_together(tmp_path, victim):
    """One rank finds it, and what it has sent counts for nothing."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_restore_corrupt, 3, directory, victim))
    assert set(results) == {f"{directory}/ckpt-2"}  # the bad one is replaced


def _restore_with_a_hitch(rank, directory, hitch):
    raws = _save_two(rank, directory)
    state = State(rank, seed=2, steps=1)
    times = []
    with _manager(state.checkpoint(), directory) as manager:
        if rank == 1 and hitch == "changed on its way":
            real = GroupChannel._ship

            def ship(self, shipment):
                def arrived():
                    if not times and shipment.root != 1:
                        times.append(1)
                        shipment.memory[-1] ^= 1
                    shipment.arrived()

                under_way[id(shipment)] = arrived
                return real(self, shipment)

            under_way = {}
            arrive = comm._arrive

            def arrive_changed(waiting, work, shipment):
                arrived = under_way.pop(id(shipment))
                arrive(waiting, work, shipment._replace(arrived=arrived))

            GroupChannel._ship, comm._arrive = ship, arrive_changed
        elif rank == 1 and hitch == "no memory":
            from distckpt import tensors

            lend = tensors.writable_bytes

            def lend_later(tensor):
                if not times:
                    times.append(1)
                    raise MemoryError
                return lend(tensor)

            tensors.writable_bytes = lend_later
        elif rank == 1:
            read = os.preadv

            def read_later(descriptor, buffers, offset):
                if not times and offset > 100_000:
                    times.append(1)
                    raise OSError(5, "made up")
                return read(descriptor, buffers, offset)

            os.preadv = read_later
        assert manager.restore_or_initialize() == f"{directory}/ckpt-2"
    assert rank != 1 or times
    assert state.raw() == raws[1]


@pytest.mark.full
@pytest.mark.parametrize(
    "hitch",
    [
        "changed on its way",
        pytest.param("no memory", marks=pytest.mark.full),
        pytest.param("read error", marks=pytest.mark.full),
    ],
)
def test_a_hitch_on_one_rank_makes_all_try_once_more(tmp_path, hitch):
    """Whatever a rank cannot read, place or receive, the others are not held up."""
    values_of(run_ranks(_restore_with_a_hitch, 3, str(tmp_path / "run"), hitch))


DEADLINE_SECONDS = 1.2


def _lose_in_exchange(rank, directory, how, victim):
    _save_two(rank, directory)
    state = State(rank, seed=2, steps=1)
    manager = _manager(state.checkpoint(), directory, seconds=DEADLINE_SECONDS)
    note = Path(directory).parent / "struck"
    real, times = GroupChannel._ship, []

    def strike(self, shipment):
        times.append(1)
        if len(times) == 10:
            note.write_text(json.dumps([os.getpid(), time.monotonic()]))
            os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
        return real(self, shipment)

    dist.barrier()
    if rank == victim:
        GroupChannel._ship = strike
    found = outcome(manager.restore_or_initialize)
    ended = time.monotonic()
    pid, struck = json.loads(note.read_text())
    later = outcome(manager.save)
    if how == "stop" and rank == min({0, 1} - {victim}):
        time.sleep(1.0)  # until all have seen it
        os.kill(pid, signal.SIGKILL)
    return found, ended - struck, later


@pytest.mark.parametrize("how", ["kill", pytest.param("stop", marks=pytest.mark.full)])
@pytest.mark.parametrize(
    ("world_size", "victim"),
    [
        (2, 1),
        pytest.param(3, 0, marks=pytest.mark.full),
        pytest.param(4, 2, marks=pytest.mark.full),
    ],
)
def test_a_rank_lost_in_the_exchange_is_named_in_time(tmp_path, how, world_size, victim):
    """Killed: within a second; stopped: within a second of the deadline."""
    directory = str(tmp_path / "run")
    results = run_ranks(_lose_in_exchange, world_size, directory, how, victim)
    survivors = [result for rank, result in enumerate(results) if rank != victim]
    # What one rank says in time comes late where another waits for a processor.
    held_up = sum(found.held_up_seconds for found, _, _ in values_of(survivors))
    for found, seconds, later in values_of(survivors):
        assert found.kind == ("PeerLost" if how == "kill" else "PeerTimeout"), found
        assert re.search(rf"\brank {victim}\b", found.text), found.text
        assert "phase READ" in found.text
        late = seconds - (DEADLINE_SECONDS if how == "stop" else 0)
        assert late - held_up < 1.0, (late, held_up)
        assert later.kind == found.kind and later.net_seconds < 0.2


def _read_slowly(rank, directory, seconds):
    raws = _save_two(rank, directory)
    state = State(rank, seed=2, steps=1)
    manager = _manager(state.checkpoint(), directory, seconds=DEADLINE_SECONDS)
    real, times = os.preadv, []

    def slowly(descriptor, buffers, offset):
        times.append(1)
        if rank == 1 and len(times) > 3:
            time.sleep(seconds) if seconds < 5 else threading.Event().wait(seconds)
        return real(descriptor, buffers, offset)

    os.preadv = slowly
    found = outcome(manager.restore_or_initialize)
    return found, found.kind == "ok" and state.raw() == raws[1]


@pytest.mark.full
def test_a_slow_reader_is_waited_for_while_it_gets_on(tmp_path):
    """However long it takes: each call that comes back counts."""
    results = values_of(run_ranks(_read_slowly, 3, str(tmp_path / "run"), 0.2))
    for found, is_same in results:
        assert found.kind == "ok" and is_same, found
        assert found.seconds > DEADLINE_SECONDS


@pytest.mark.full
def test_a_read_that_hangs_is_reported_by_all(tmp_path):
    """The rank gives up in time, sends on, and votes."""
    for found, _ in values_of(run_ranks(_read_slowly, 3, str(tmp_path / "run"), 30)):
        assert found.kind == "StorageTimeout", found
        assert found.net_seconds < DEADLINE_SECONDS + 1


def _interrupt(rank, directory):
    _save_two(rank, directory)
    state = State(rank, seed=2, steps=1)
    manager = _manager(state.checkpoint(), directory)
    real, times = GroupChannel._ship, []

    def interrupted(self, shipment):
        times.append(1)
        if rank == 1 and len(times) == 10:
            raise KeyboardInterrupt
        return real(self, shipment)

    GroupChannel._ship = interrupted
    return outcome(manager.restore_or_initialize)


@pytest.mark.full
def test_a_rank_that_is_interrupted_is_named_by_the_others(tmp_path):
    """It cannot leave an exchange quietly."""
    results = values_of(run_ranks(_interrupt, 3, str(tmp_path / "run")))
    assert [found.kind for found in results] == [
        "PeerLost",
        "KeyboardInterrupt",
        "PeerLost",
    ]
    assert "KeyboardInterrupt" in results[0].text
    assert all(found.net_seconds < 5 for found in results)


class Adrift:
    """Stands in for a broadcast that hangs, as none can be made to at will."""

    done = False

    def is_completed(self):
        return self.done


def _restore_with_bytes_adrift(rank, directory):
    _save_two(rank, directory)
    state = State(rank, seed=2, steps=1)
    before = state.raw()
    adrift = Adrift()
    if rank == 1:
        comm._adrift.append(adrift)
    with _manager(state.checkpoint(), directory) as manager:
        found = outcome(manager.restore_or_initialize)
        assert state.raw() == before
        adrift.done = True
        manager.restore_or_initialize()
    return found


def test_what_a_broken_manager_may_still_receive_keeps_all_from_restoring(tmp_path):
    """It could come later, over what was restored: that is refused, on every rank."""
    for found in values_of(run_ranks(_restore_with_bytes_adrift, 2, str(tmp_path / "run"))):
        assert found.kind == "RestoreFailed"
        assert "may still arrive" in found.text


# Where memory is


def _restore_out_of_reach(rank, directory):
    """As tensors of a device are restored: their memory is not for the host."""
    raws = _save_two(rank, directory)
    state = State(rank, seed=2, steps=1)
    known.tensors.is_row_major_on_host = lambda _: False
    with _manager(state.checkpoint(), directory) as manager:
        manager.restore_or_initialize()
    assert state.raw() == raws[1]


@pytest.mark.full
def test_memory_out_of_the_hosts_reach_is_filled_by_way_of_a_copy(tmp_path):
    """Piece by piece, as it arrives."""
    values_of(run_ranks(_restore_out_of_reach, 3, str(tmp_path / "run")))


def _save_cut(rank, directory):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    columns = distribute_tensor(torch.randn(600, 500), mesh, [Shard(1)])
    rows = distribute_tensor(torch.randn(3, 700, 50), mesh, [Shard(0)])
    with _manager(Checkpoint(tensors={"c": columns, "r": rows}), directory) as manager:
        manager.save()


def _restore_whole(rank, directory, in_reach):
    torch.manual_seed(0)
    expected = [torch.randn(600, 500), torch.randn(3, 700, 50)]
    if not in_reach:
        known.tensors.is_row_major_on_host = lambda _: False
    reads = Reads()
    columns, rows = torch.zeros(600, 500), torch.zeros(3, 50, 700).transpose(1, 2)
    with _manager(Checkpoint(tensors={"c": columns, "r": rows}), directory) as manager:
        reads.clear()
        manager.restore_or_initialize()
    assert [_raw(columns), _raw(rows)] == list(map(_raw, expected))
    return reads.num_bytes


@pytest.mark.parametrize("in_reach", [pytest.param(True, marks=pytest.mark.full), False])
def test_columns_that_were_saved_apart_are_read_once_and_put_together(tmp_path, in_reach):
    """What does not go to its place in one run, cut into parcels."""
    directory = str(tmp_path / "run")
    values_of(run_ranks(_save_cut, 3, directory))
    total = 4 * (600 * 500 + 3 * 700 * 50)
    for num_bytes in values_of(run_ranks(_restore_whole, 2, directory, in_reach)):
        assert num_bytes < total / 2 + 2 * exchange_plan._GRAIN_BYTES + 3 * 4096


def _restore_one_then_the_other(rank, directory):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    values = torch.randn(600, 500, generator=torch.Generator().manual_seed(0))
    for cut in (0, 1):
        saved = distribute_tensor(values, mesh, [Shard(cut)])
        with _manager(Checkpoint(table=saved), f"{directory}-{cut}") as manager:
            manager.save()
    reads = Reads()
    live = distribute_tensor(torch.zeros(600, 500), mesh, [Shard(1)])
    checkpoint = Checkpoint(table=live)
    told = []
    for cut in (1, 0, 1):
        live.to_local().zero_()
        with _manager(checkpoint, f"{directory}-{cut}") as manager:
            reads.clear()
            manager.restore_or_initialize()
        assert torch.equal(live.full_tensor(), values)
        told.append(reads.num_bytes)
    return told


def test_what_is_exchanged_follows_from_the_checkpoint_that_is_read(tmp_path):
    """Not from the one before, which lay in its files otherwise."""
    total = 600 * 500 * 4
    directory = str(tmp_path / "run")
    for told in values_of(run_ranks(_restore_one_then_the_other, 2, directory)):
        # Columns from columns: its own. From rows: half of it all, and the rest received.
        assert all(num_bytes < total / 2 + 3 * 4096 for num_bytes in told), told


# The argument


def _make_with(rank, directory, how):
    checkpoint = Checkpoint(step=torch.zeros(()))
    return outcome(_manager, checkpoint, directory, how[rank]).kind


@pytest.mark.parametrize(
    "how",
    [
        ("once", "each"),
        pytest.param(("auto", "once"), marks=pytest.mark.full),
        pytest.param(("once", "twice"), marks=pytest.mark.full),
    ],
)
def test_arguments_that_differ_or_are_bad_are_refused(tmp_path, how):
    """On every rank."""
    results = values_of(run_ranks(_make_with, 2, str(tmp_path / "run"), how))
    assert results == ["ConfigError", "ConfigError"]


def _choose(rank, directory, num_hosts):
    from distckpt import construct, identity

    asked = []
    if num_hosts > 1:
        identity.host = lambda _: b"%12d" % (rank % num_hosts)
    construct.is_faster_once = lambda *of: asked.append(of) or True
    manager = _manager(Checkpoint(step=torch.zeros(())), directory, "auto")
    return asked, manager._session.reads_once


@pytest.mark.parametrize(
    "num_hosts",
    [pytest.param(1, marks=pytest.mark.full), 2, pytest.param(3, marks=pytest.mark.full)],
)
def test_auto_decides_by_the_numbers_of_ranks_and_hosts(tmp_path, num_hosts):
    """Told apart by what the kernel calls itself, and by name."""
    results = values_of(run_ranks(_choose, 3, str(tmp_path / "run"), num_hosts))
    assert results == [([(3, num_hosts)], True)] * 3
