"""Snapshots: the bytes of the call, laid out as the file that a direct save writes."""

from __future__ import annotations

import gc
import subprocess
import weakref

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.optimizer import _global_optimizer_pre_hooks
from unit_helpers import FileTarget, open_shard_at

from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointOptions,
    PerRank,
    shard_file,
)
from distckpt.arena import Arena
from distckpt.capture import capture
from distckpt.errors import SaveFailed, StorageError
from distckpt.layout import Layouts
from distckpt.own_file import OwnFile
from distckpt.shard_header import Draft
from distckpt.snapshot import Snapshot
from distckpt.storage import posix

_KEY = bytes(16)


class Plan:
    """What one rank saves of a checkpoint."""

    def __init__(self, checkpoint, rank=0, world_size=1):
        self.captured = capture(checkpoint)
        table = self.captured.shared.table()
        self.file = OwnFile(self.captured, Layouts(_KEY, [table], [0] * world_size), rank)
        self._about = {
            "attempt": "ckpt-1.e1-00000000",
            "rank": rank,
            "world_size": world_size,
            "per_rank_values": self.captured.per_rank.values,
        }

    def _draft(self):
        return Draft(self.file.outline, **self._about)

    def snapshot(self, lazily=False):
        draft = self._draft()
        arena = Arena(shard_file.image_bytes(draft, self.file.outline), False)
        arena.bytes.fill_(0xAB)
        later = self.captured.shared.optimized if lazily else ()
        moves = self.file.moves(self.captured, later)
        return Snapshot(arena, moves, draft, self.file.outline)

    def write_directly(self, path):
        load = self.file.loader(self.captured)
        return shard_file.write_outlined(
            FileTarget(path), self._draft(), self.file.outline, load
        )


def _bytes_of(path):
    with open(path, "rb") as file:
        return file.read()


def _everything():
    base = torch.arange(3000, dtype=torch.float64).view(50, 60)
    weight = torch.arange(24.0).view(4, 6)
    return Checkpoint(
        strided=base.t()[3:9, ::2],
        empty=torch.zeros(0, 5),
        scalar=torch.tensor(3.5, dtype=torch.bfloat16),
        conjugate=torch.arange(7).to(torch.complex64).conj(),
        truths=torch.tensor([True, False, True]),
        fp8=torch.arange(9, dtype=torch.float32).to(torch.float8_e4m3fn),
        tied=[weight, weight],
        module=nn.Sequential(nn.Linear(70, 90), nn.BatchNorm1d(90)),
        own=PerRank([torch.arange(1000), "text"]),
    )


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_image_is_the_file_that_a_direct_save_writes(tmp_path, rank):
    """Byte for byte, its header too; whatever lay in the memory before."""
    torch.manual_seed(0)
    plan = Plan(_everything(), rank, 3)
    snapshot = plan.snapshot()
    direct, copied = str(tmp_path / "direct"), str(tmp_path / "copied")
    assert snapshot.write(FileTarget(copied)) == plan.write_directly(direct)
    assert _bytes_of(copied) == _bytes_of(direct)


@pytest.fixture(params=["ext4 or so", "tmpfs", "ramfs"])
def folder(request, tmp_path, small_disk):
    """Make a directory on filesystems that write directly, may do so, and refuse to."""
    if request.param == "tmpfs":
        yield small_disk("size=200m")
    elif request.param == "ramfs":
        path = tmp_path / "ramfs"
        path.mkdir()
        command = ["mount", "-t", "ramfs", "ramfs", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            pytest.skip(f"a ramfs cannot be mounted here: {done.stderr.strip()}")
        yield str(path)
        subprocess.run(["umount", "--lazy", str(path)], check=True)
    else:
        yield str(tmp_path)


@pytest.mark.parametrize(
    "size",
    [
        *(0, 1, 4095, 4096, 4097, 2**24 + 1),
        *(
            pytest.param(size, marks=pytest.mark.full)
            for size in (2**24 - 1, 2**24, 5 * 2**22 + 4097)
        ),
    ],
)
def test_file_has_its_exact_size_whatever_direct_writes_need(folder, size):
    """Around each border of pages and of calls; readers of safetensors take it."""
    data = (torch.arange(size) * 37 % 251).to(torch.uint8)
    path = f"{folder}/file"
    written = Plan(Checkpoint(data=data)).snapshot().write(FileTarget(path))
    with open_shard_at(path) as reader:
        assert reader.size_bytes == written.size_bytes
        assert reader.header_digest == written.header
        assert reader.verify() == size
    if size:
        (found,) = load_file(path).values()
        assert torch.equal(found, data)
    with pytest.raises(StorageError, match="exists"):
        Plan(Checkpoint(data=data)).snapshot().write(FileTarget(path))


def test_direct_writes_are_used_where_they_can_be(tmp_path):
    """On a filesystem that has them; where it has none, all works without."""
    with posix.NewFile(str(tmp_path / "probe"), direct=True) as file:
        if not file._is_direct:
            pytest.skip("the filesystem of the temporary directory has none")
    with posix.NewFile(str(tmp_path / "file"), 8192, direct=True) as file:
        aligned = Arena(8192, False).bytes[:8192].fill_(5).numpy().data
        file.write_at(0, [aligned])
        assert file._is_direct  # it took them
        # Memory that lies anywhere is written all the same.
        file.write_at(4096, [memoryview(bytearray(4097))[1:]])
        file.finish(5000)
    assert _bytes_of(tmp_path / "file") == b"\5" * 4096 + bytes(904)


# What is copied later


class Trained:
    """A module, an optimizer with state, and a tensor beside them."""

    def __init__(self):
        torch.manual_seed(0)
        self.module = nn.Sequential(nn.Linear(20, 30), nn.BatchNorm1d(30))
        self.optimizer = torch.optim.AdamW(self.module.parameters())
        self.beside = torch.ones(100)
        self.checkpoint = Checkpoint(
            module=self.module, optimizer=self.optimizer, beside=self.beside
        )
        self.step()

    def step(self):
        self.module(torch.rand(5, 20)).square().sum().backward()
        self.optimizer.step()


def test_lazy_copy_has_what_was_there_at_the_call(tmp_path):
    """What no optimizer changes may change at once; the rest once it is let go."""
    trained = Trained()
    plan = Plan(trained.checkpoint)
    direct, lazy = str(tmp_path / "direct"), str(tmp_path / "lazy")
    expected = plan.write_directly(direct)
    snapshot = plan.snapshot(lazily=True)
    trained.beside.zero_()
    trained.module[1].running_mean.fill_(9.0)
    trained.module[1].num_batches_tracked.add_(5)
    snapshot.copy_rest()
    snapshot.let_go()
    trained.step()
    snapshot.let_go()
    snapshot.check_unchanged()
    assert snapshot.write(FileTarget(lazy)) == expected
    assert _bytes_of(lazy) == _bytes_of(direct)


@pytest.mark.parametrize("when", ["before the copy", "after the copy", "let go"])
@pytest.mark.parametrize("what", ["parameter", "state", "step count", "alias"])
def test_lazy_copy_of_what_was_changed_is_refused(what, when):
    """A change that shows only after the copy may have begun before it."""
    trained = Trained()
    snapshot = Plan(trained.checkpoint).snapshot(lazily=True)
    weight = trained.module[0].weight
    state = trained.optimizer.state[weight]
    tensor, name = {
        "parameter": (weight, "module/0.weight"),
        "state": (state["exp_avg"], "optimizer/state/module/0.weight/exp_avg"),
        "step count": (state["step"], "optimizer/state/module/0.weight/step"),
        "alias": (weight.detach()[3:4, 2:3], "module/0.weight"),
    }[what]

    def change():
        with torch.no_grad():
            tensor.add_(1.0)

    def check():
        if when == "before the copy":
            change()
        snapshot.copy_rest()
        if when != "before the copy":
            change()
        if when == "let go":
            snapshot.let_go()
            trained.step()
        snapshot.check_unchanged()

    with pytest.raises(SaveFailed, match="wait_staged") as caught:
        check()
    assert name in str(caught.value)


@pytest.mark.parametrize("lazily", [False, True])
def test_tensors_can_go_once_they_are_copied(tmp_path, lazily):
    """While the file is written, what the user has dropped takes no memory any more."""
    trained = Trained()
    plan = Plan(trained.checkpoint)
    snapshot = plan.snapshot(lazily=lazily)
    snapshot.copy_rest()
    snapshot.let_go()
    gone = [weakref.ref(trained.module[0].weight), weakref.ref(trained.beside)]
    plan.captured = trained.checkpoint = None
    del trained
    gc.collect()
    assert [there() for there in gone] == [None, None]
    assert snapshot.write(FileTarget(tmp_path / "file")).size_bytes > 0


def test_lazy_copy_outlives_the_tensors_it_is_of(tmp_path):
    """An optimizer that loads a state drops its tensors, and a parameter its memory."""
    trained = Trained()
    plan = Plan(trained.checkpoint)
    direct, lazy = str(tmp_path / "direct"), str(tmp_path / "lazy")
    expected = plan.write_directly(direct)
    snapshot = plan.snapshot(lazily=True)
    del plan
    trained.optimizer.state.clear()
    for parameter in trained.module.parameters():
        parameter.data = torch.zeros_like(parameter)
    reused = [torch.full((30, 20), -1.0) for _ in range(50)]
    snapshot.copy_rest()
    assert snapshot.write(FileTarget(lazy)) == expected
    assert _bytes_of(lazy) == _bytes_of(direct)
    assert reused


@pytest.mark.parametrize("has_optimizer", [True, False])
def test_lazy_save_holds_optimizers_only_if_it_copies_later(tmp_path, has_optimizer):
    """Without an optimizer all is copied at the call, and nothing is hooked or imported."""
    model = nn.Linear(3, 3)
    optimizers = {"optimizer": torch.optim.AdamW(model.parameters())}
    checkpoint = Checkpoint(model=model, **(optimizers if has_optimizer else {}))
    options = CheckpointOptions(enable_async=True, staging="lazy")
    before = len(_global_optimizer_pre_hooks)
    with CheckpointManager(checkpoint, str(tmp_path), 1) as manager:
        path = manager.save(options=options)
        assert len(_global_optimizer_pre_hooks) == before + has_optimizer
        manager.sync()
        assert manager.latest_checkpoint == path
    assert len(_global_optimizer_pre_hooks) == before
