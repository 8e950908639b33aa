"""What is known of a tensor holds for as long as it stays as it is, and keeps nothing."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch import nn

from distckpt import Checkpoint, CheckpointManager, known, shard_file
from distckpt.capture import capture, remembered_of
from distckpt.known import KnownTensor, KnownTensors


def _swap(tensor, other):
    tensor.data = other


@pytest.mark.parametrize(
    "change",
    [
        lambda t: _swap(t, torch.zeros(4, 6)),
        lambda t: _swap(t, t.data.t().contiguous().t()),
        lambda t: _swap(t, t.data.double()),
        lambda t: _swap(t, t.data.view(6, 4)),
        lambda t: _swap(t, t.data[:2]),
        lambda t: t.set_(torch.zeros(4, 6)),
        lambda t: t.resize_(2, 2),
    ],
    ids=["memory", "strides", "dtype", "shape", "part", "set", "resize"],
)
def test_tensor_that_changes_its_place_or_shape_is_described_again(change):
    """Its object stays the same."""
    tensor = torch.zeros(4, 6)
    before = KnownTensor(tensor, "w")
    assert before.still_holds(tensor)
    with torch.no_grad():
        tensor.add_(1)
        assert before.still_holds(tensor)
        change(tensor)
    assert not before.still_holds(tensor)
    after = KnownTensor(tensor, "w")
    assert after.still_holds(tensor)
    assert (after.shape, after.dtype) == (
        tuple(tensor.shape),
        str(tensor.dtype).removeprefix("torch."),
    )


def test_another_tensor_at_the_same_place_is_another_tensor():
    """A view looks the same to the last byte, but may be tied otherwise."""
    tensor = torch.zeros(4)
    assert not KnownTensor(tensor, "w").still_holds(tensor.view(4))


def test_complex_tensors_are_described_each_time():
    """They can be given the conjugate of their own memory."""
    tensor = torch.zeros(4, dtype=torch.complex64)
    assert not KnownTensor(tensor, "w").still_holds(tensor)


def test_nothing_is_kept_alive():
    """Between saves a model may be dropped, or moved to another device."""
    tensors = KnownTensors()
    tensor = torch.zeros(1000)
    tensors.describe("w", tensor)
    there = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert there() is None


def test_sharded_tensor_with_another_part_or_layout_is_described_again(on_a_mesh):
    """What makes it up are objects of their own."""
    tensor = on_a_mesh(torch.zeros(4, 6))
    before = KnownTensor(tensor, "w")
    assert before.still_holds(tensor) and before.is_sharded
    local, spec = tensor._local_tensor, tensor._spec
    tensor._local_tensor = torch.zeros(4, 6)
    assert not before.still_holds(tensor)
    tensor._local_tensor, tensor._spec = local, copy.copy(spec)
    assert not before.still_holds(tensor)
    tensor._spec = spec
    assert before.still_holds(tensor)
    before_address = before.address
    local.data = torch.zeros(4, 6)
    assert not before.still_holds(tensor)
    assert KnownTensor(tensor, "w").address == local.data_ptr() != before_address


def test_table_of_an_unchanged_checkpoint_is_the_same_object():
    """With all that was worked out of it; one that changed is made anew."""
    model = nn.Linear(4, 4)
    checkpoint = Checkpoint(model=model, own=torch.zeros(3))
    table = capture(checkpoint).shared.table()
    assert capture(checkpoint).shared.table() is table
    checkpoint.own = torch.zeros(4)
    changed = capture(checkpoint).shared.table()
    assert changed != table
    model.bias = model.weight  # a tie, of objects that were known
    assert capture(checkpoint).shared.table() != changed


def test_names_follow_what_modules_are_wrapped_in():
    """The keys of a state dict may stay the same when a wrapper is put around a part."""

    class Outer(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

    inner = nn.Module()
    inner.module = nn.Linear(2, 2)
    outer = Outer(inner)
    checkpoint = Checkpoint(model=outer)
    names = {*capture(checkpoint).shared.tensors}
    assert names == {"model/inner.module.weight", "model/inner.module.bias"}
    outer.inner = nn.DataParallel(nn.Linear(2, 2))
    assert [*outer.state_dict()] == ["inner.module.weight", "inner.module.bias"]
    names = {*capture(checkpoint).shared.tensors}
    assert names == {"model/inner.weight", "model/inner.bias"}


def test_names_that_are_gone_are_forgotten():
    """A dict of tensors whose keys change all the time does not grow for ever."""
    checkpoint = Checkpoint(tensors={})
    tensors = remembered_of(checkpoint).known
    for step in range(5):
        checkpoint.tensors = {f"{step}-{i}": torch.zeros(1) for i in range(1000)}
        capture(checkpoint)
    assert len(tensors._known) <= 2 * 1000 + known._SLACK


def test_copy_of_a_checkpoint_knows_nothing():
    """It tracks other tensors under the same names."""
    checkpoint = Checkpoint(x=torch.zeros(3))
    capture(checkpoint)
    other = copy.deepcopy(checkpoint)
    leaf = capture(other).shared.tensors["x"]
    assert leaf.known.address == other.x.data_ptr() != checkpoint.x.data_ptr()


def test_state_dict_without_arguments_of_a_user_s_own_is_taken():
    """Parameters are asked for as they are, but only where torch's own method answers."""

    class Own(nn.Linear):
        def state_dict(self):
            return super().state_dict()

    model = Own(2, 2)
    tensors = capture(Checkpoint(model=model)).shared.tensors
    assert {leaf.kind for leaf in tensors.values()} == {"split"}


@pytest.mark.parametrize("block", [4, 16])
def test_entries_are_written_in_runs_of_small_ones_or_one_large(monkeypatch, block):
    """All of them, in order, and within the limits of one call."""
    monkeypatch.setattr(shard_file, "_BATCH_BYTES", 32)
    monkeypatch.setattr(shard_file, "_BATCH_BUFFERS", 5)
    sizes = [1, 0, 40, 3, 3, 17, 0, 0, 0, 0, 0, 0, 4, 4, 4, 16, 16, 16, 2]
    runs = list(shard_file._batches(sizes, block))
    assert [i for first, stop in runs for i in range(first, stop)] == [*range(len(sizes))]
    for first, stop in runs:
        assert stop - first <= 5
        if stop - first > 1:
            assert max(sizes[first:stop]) <= block
            assert sum(sizes[first:stop]) <= 32


def test_another_tensor_object_is_described_again_though_its_id_may_come_back():
    """Ids are given out again; then type, memory and layout have to be the same, too."""
    tensor = torch.zeros(4)
    before = KnownTensor(tensor, "w")
    assert not before.still_holds(torch.zeros(4))
    before._id = id(other := torch.zeros(4))
    assert not before.still_holds(other)
    before._id = id(same := nn.Parameter(tensor, requires_grad=False))
    assert not before.still_holds(same)


@pytest.mark.parametrize("moment", ["saved", "restored", "closed"])
@pytest.mark.parametrize(
    "convert",
    [
        lambda model: model.to(torch.bfloat16),
        lambda model: model.half().cpu(),
        lambda model: model.to_empty(device="cpu"),
    ],
    ids=["to", "half-cpu", "to_empty"],
)
def test_model_can_be_converted_by_swapping_its_tensors(convert, moment, run_dir):
    """torch refuses to swap tensors that have weak references."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.AdamW(model.parameters())
    optimizer.step()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        manager = CheckpointManager(
            Checkpoint(model=model, optimizer=optimizer), run_dir, 2
        )
        manager.save()
        if moment == "restored":
            manager.restore_or_initialize()
        if moment == "closed":
            manager.close()
        convert(model)
        if moment != "closed":
            manager.save()
            manager.close()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
