"""Digests of replicated state: what they see, what a sample covers, and what they cost."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from distckpt import Checkpoint
from distckpt.checkpoint import capture
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
from distckpt.replicas import asked_of, detail_of, differing, judge


def captured_of(**objects):
    """Return what is captured, and the classes of one rank."""
    captured = capture(Checkpoint(**objects))
    return captured, Replicas().classes(captured, captured.shared.table(), None, 0)


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
    """With 5,000 tensors, of which some differ on three ranks."""
    model = nn.ParameterList([nn.Parameter(torch.zeros(4)) for _ in range(5000)])
    captured, classes = captured_of(model=model)
    same = report_all(captured, classes)
    with torch.no_grad():
        model[17][0] = model[4711][2] = 1
    other = report_all(captured, classes)
    bad = {3, 500, 999}

    class Job:
        rank = 0

    votes = [
        Vote(Phase.DECIDE, detail=(other if rank in bad else same).packed, rank=rank)
        for rank in range(1000)
    ]
    judged = differing(votes)
    asked = asked_of(judged)
    size = sum(len(vote.detail) for vote in votes)
    told = []
    for rank in range(1000):
        Job.rank = rank
        with torch.no_grad():
            model[17][0] = model[4711][2] = float(rank in bad)
        if any(rank in ranks for ranks in asked.values()):
            detail = detail_of(Job, captured, classes, asked)
            told.append(Vote(Phase.REPLICAS, detail=detail, rank=rank))
            size += len(detail)
    assert size < 1_000_000
    with pytest.raises(SaveFailed) as caught:
        judge("ckpt-1", judged, told)
    assert caught.value.failures == dict.fromkeys(sorted(bad), "model/17, model/4711")


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
