"""Digests of replicated state: what they see, what a sample covers, and what they cost."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from distckpt import Checkpoint, strict_json
from distckpt.capture import capture
from distckpt.errors import SaveFailed
from distckpt.messages import Phase, Vote
from distckpt.replica_digests import (
    Replicas,
    leaf_digests,
    num_turns,
    positional_sum,
    report_all,
    report_sampled,
)
from distckpt.replicas import _judge, _told_of, differing


def captured_of(**objects):
    """Return what is captured, and the classes of one rank."""
    captured = capture(Checkpoint(**objects))
    return captured, Replicas().classes(captured, captured.shared.table(), 0)


# The digest on a device, here of memory of the host


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 4096, 100_003])
def test_sum_sees_every_bit(size):
    """A flip anywhere changes it."""
    data = torch.randint(0, 256, (size,), dtype=torch.uint8)
    before = int(positional_sum(data))
    for at in {0, size // 2, size - 1} if size else ():
        for bit in range(8):
            data[at] ^= 1 << bit
            assert int(positional_sum(data)) != before
            data[at] ^= 1 << bit
    assert int(positional_sum(data)) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sum_sees_changes_that_would_cancel_out(dtype):
    """Signs that flip, and differences that add up to nothing."""
    data = torch.randn(1024, generator=torch.Generator().manual_seed(0)).to(dtype)
    raw = data.view(torch.uint8)
    before = int(positional_sum(raw))
    for changed in (-data, data.clone(), data.clone()):
        changed[8 : 8 + 32 : 16] *= -1
        assert int(positional_sum(changed.view(torch.uint8))) != before
    numbers = torch.arange(64, dtype=torch.int64)
    sums = {int(positional_sum(numbers.view(torch.uint8)))}
    for at, by in ((0, 2), (1, 4), (7, 8)):
        moved = numbers.clone()
        moved[at] += 5
        moved[at + by] -= 10
        moved[at + 2 * by] += 5
        sums.add(int(positional_sum(moved.view(torch.uint8))))
    assert len(sums) == 4


def test_sum_sees_positions():
    """Blocks that have changed places, and zeros at the end, make another sum."""
    data = torch.randint(0, 256, (1024,), dtype=torch.uint8)
    swapped = torch.cat([data[512:], data[:512]])
    assert int(positional_sum(swapped)) != int(positional_sum(data))
    longer = torch.cat([data, torch.zeros(8, dtype=torch.uint8)])
    assert int(positional_sum(longer)) != int(positional_sum(data))


def test_sum_does_not_depend_on_alignment_or_chunks(monkeypatch):
    """A part of a tensor may begin anywhere."""
    data = torch.randint(0, 256, (5000,), dtype=torch.uint8)
    expected = int(positional_sum(data))
    shifted = torch.cat([torch.zeros(3, dtype=torch.uint8), data])[3:]
    assert int(positional_sum(shifted)) == expected
    monkeypatch.setattr("distckpt.replica_digests._CHUNK", 7)
    assert int(positional_sum(data)) == expected


# Samples


@pytest.mark.parametrize(
    ("count", "size"), [(1, 3_000_000), (40, 70_001), (3000, 900), (5, 3)]
)
def test_every_byte_has_its_turn(count, size):
    """Within the number of saves that is promised; what is small has it each time."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(size)) for _ in range(count)])
    captured, (one, *_) = captured_of(model=model)
    turns = num_turns(one)
    for number, at in ((0, 0), (count // 2, size // 3), (count - 1, size - 1)):
        before = [report_sampled(captured, [one], turn).digests for turn in range(turns)]
        with torch.no_grad():
            model[number][at] = 1
        after = [report_sampled(captured, [one], turn).digests for turn in range(turns)]
        changed = sum(a != b for a, b in zip(before, after, strict=True))
        assert changed == 1, (turns, changed)
        with torch.no_grad():
            model[number][at] = 0


def test_small_state_that_is_no_parameter_is_compared_each_time():
    """A data loader's generator must not wait for its turn."""
    large = nn.ParameterList([nn.Parameter(torch.zeros(3_000_000))])
    small = torch.zeros(16)
    captured, (one, *_) = captured_of(model=large, small=small)
    before = [report_sampled(captured, [one], turn).digests for turn in range(3)]
    small[3] = 1
    after = [report_sampled(captured, [one], turn).digests for turn in range(3)]
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_blocks_of_dense_memory_are_not_copied():
    """Whatever the order of the elements: as in channels last."""
    weight = torch.zeros(512, 256, 3, 3).to(memory_format=torch.channels_last)
    captured, (one,) = captured_of(x=weight)
    began = time.process_time()
    for turn in range(20):
        report_sampled(captured, [one], turn)
    assert time.process_time() - began < 20 * 0.02
    digests = {report_sampled(captured, [one], turn).digests[0] for turn in range(2)}
    with torch.no_grad():
        weight[511, 255, 2, 2] = 1
    assert num_turns(one) == 2
    assert {report_sampled(captured, [one], t).digests[0] for t in range(2)} != digests


def test_strided_tensors_are_digested_as_their_elements_stand():
    """Whatever lies in memory between them."""
    base = torch.arange(24.0).view(4, 6)
    strided, plain = base[:, ::2], base[:, ::2].contiguous()
    digests = []
    for tensor in (strided, plain):
        captured, (one,) = captured_of(x=tensor)
        digests.append((leaf_digests(captured, one), report_sampled(captured, [one], 0)[1]))
    assert digests[0] == digests[1]


# Many ranks


def test_a_thousand_ranks_say_less_than_a_megabyte():
    """With 5,000 tensors, of which all differ on half of the ranks.

    Each detail is padded to the longest; the digests are broadcast, not gathered.
    """
    model = nn.ParameterList([nn.Parameter(torch.zeros(4)) for _ in range(5000)])
    captured, classes = captured_of(model=model)
    same = report_all(captured, classes)
    right = b"".join(leaf_digests(captured, classes[0]))
    with torch.no_grad():
        for parameter in model:
            parameter[0] = 1
    other = report_all(captured, classes)
    own = b"".join(leaf_digests(captured, classes[0]))
    votes = [
        Vote(Phase.DECIDE, detail=(same, other)[rank % 2].packed, rank=rank)
        for rank in range(1000)
    ]
    asked = differing(votes)
    assert asked == {classes[0].key.hex(): [0, 5000]}
    told = strict_json.dumps({"key": _told_of(classes[0], own, right)}).encode()
    size = 1000 * (len(votes[0].detail) + len(told)) + len(right)
    assert size < 1_000_000
    named = [v._replace(detail=told if v.rank % 2 else b"") for v in votes]
    with pytest.raises(SaveFailed) as caught:
        _judge("ckpt-1", named)
    assert caught.value.failures[1].startswith("model/0, model/1, ")
    assert caught.value.failures[999].endswith(" and 4992 more")


@pytest.mark.full
@pytest.mark.parametrize(("tensors", "aim_ms"), [(600, 1.0), (20_000, 3.0)])
def test_cost_of_comparing(tensors, aim_ms, report_figures):
    """Printed; the limits leave room for a busy machine."""
    count = tensors // 4
    size = 650_000 if tensors == 600 else 512
    model = nn.ParameterList([nn.Parameter(torch.zeros(size)) for _ in range(count)])
    moments = [torch.zeros(size) for _ in range(3 * count)]
    captured, classes = captured_of(model=model, moments=moments)
    gigabytes = (
        sum(leaf.known.size_bytes for leaf in captured.shared.tensors.values()) / 1e9
    )
    began = time.process_time()
    report_all(captured, classes)
    everything = time.process_time() - began
    took = []
    for turn in range(20):
        began = time.process_time()
        report_sampled(captured, classes, turn)
        took.append(1e3 * (time.process_time() - began))
    sampled = sorted(took)[len(took) // 2]
    report_figures(
        f"{tensors} tensors, {gigabytes:.2f} GB: everything {everything:.3f} s "
        f"({everything / gigabytes:.2f} s/GB), a later save {sampled:.2f} ms "
        f"(aim {aim_ms} ms), all within {num_turns(classes[0])} saves"
    )
    assert sampled < 4 * aim_ms
    if tensors == 600:
        assert everything / gigabytes < 4 * 0.15
