"""Any layout to any layout: every pair, bit for bit; and what is read for it."""

from __future__ import annotations

import os
import sys
from collections import Counter
from functools import cache
from itertools import product

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks, values_of
from reshard_helpers import Job
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

from distckpt import Checkpoint, CheckpointManager, readers
from distckpt.comm import GroupChannel
from distckpt.run_directory import AttemptDirectory

# Every layout of every size that it can have; by default a part of them.
EVERYTHING = "DISTCKPT_EVERY_RESHARD" in os.environ
SIZES = (1, 2, 3, 4, 8)
ALL = [
    ("one", 1),
    *product(("ddp", "stages", "tp", "columns"), SIZES[1:]),
    *product(("fsdp",), SIZES),
    *product(("hsdp", "fsdp-tp"), (4, 8)),
]
SOME = [
    *(("one", 1), ("ddp", 2), ("stages", 3), ("fsdp", 3)),
    *(("tp", 2), ("columns", 3), ("hsdp", 4), ("fsdp-tp", 4)),
]
CONFIGURATIONS = ALL if EVERYTHING else SOME
# By default these restore one another. The other pairs are of class full.
SAMPLE = [("ddp", 2), ("fsdp", 3)]
NAMES = [f"{kind}-{size}" for kind, size in CONFIGURATIONS]


def _folder(root, kind, size):
    return os.path.join(root, f"{kind}-{size}")


def _manager(checkpoint, directory, how="auto"):
    return CheckpointManager(checkpoint, directory, max_to_keep=None, read_replicated=how)


def _save(rank, root, kind, size):
    job = Job(kind, filled=True, with_state=True)
    with _manager(job.checkpoint(), _folder(root, kind, size)) as manager:
        manager.save()


def _restore_from_each(rank, root, kind, size, sources):
    """Restore what each other job has saved; return how many tensors were compared."""
    expected = Job(kind, filled=True, with_state=True)
    compared = []
    for index, source in sources:
        # Into objects that have made a step, and into fresh ones, which must be told by
        # the checkpoint what state they had.
        with_state = index % 2 == 0
        job = Job(kind, filled=False, with_state=with_state)
        how = "once" if index % 3 == 0 else "each"
        with _manager(job.checkpoint(), _folder(root, *source), how) as manager:
            assert manager.restore_or_initialize() is not None
        try:
            compared.append(job.check(expected))
        except AssertionError as error:
            msg = f"{source} to {kind, size}, {how}, state {with_state}"
            raise AssertionError(msg) from error
    return compared


def _run(function, root, kind, size, *more):
    group = size > 1 or kind not in ("one", "ddp", "stages")
    return values_of(
        run_ranks(function, size, root, kind, size, *more, timeout=300, process_group=group)
    )


@pytest.fixture(scope="module")
def save_once(tmp_path_factory):
    """Save one checkpoint of a layout and size, if that was not done before."""
    root = str(tmp_path_factory.mktemp("reshard"))

    @cache
    def save(kind, size):
        _run(_save, root, kind, size)
        return root

    return save


def _pairs():
    """List what restores from which: the sample, and then all that is not in it."""
    pairs = []
    for configuration in CONFIGURATIONS:
        near = [one for one in SAMPLE if configuration in SAMPLE and one in CONFIGURATIONS]
        far = [one for one in CONFIGURATIONS if one not in near]
        name = "-".join(map(str, configuration))
        if near:
            pairs.append(pytest.param(*configuration, near, id=f"{name}-sample"))
        more = {"id": f"{name}-rest", "marks": pytest.mark.full}
        pairs.append(pytest.param(*configuration, far, **more))
    return pairs


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("kind", "size", "sources"), _pairs())
def test_every_layout_restores_what_every_other_has_saved(
    save_once, kind, size, sources, report_figures
):
    """Model and three optimizers, even, uneven, empty and 0-dim, bit for bit."""
    for source in sources:
        root = save_once(*source)
    numbered = [pair for pair in enumerate(CONFIGURATIONS) if pair[1] in sources]
    compared = _run(_restore_from_each, root, kind, size, numbered)
    total = sum(map(sum, compared))
    report_figures(f"{len(sources)} sources, {total} tensors compared on {size} ranks")


# What is read for it

ROWS, COLUMNS = 2048, 1024


class Reads:
    """Counts what this process reads of shard files: bytes, and how many files."""

    def __init__(self):
        self.bytes_of = Counter()
        real = os.preadv

        def count(descriptor, buffers, offset):
            size = real(descriptor, buffers, offset)
            name = os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))
            if offset >= self.data_start.get(name, sys.maxsize):
                self.bytes_of[name] += size
            return size

        self.data_start = {}
        os.preadv = count

    def watch(self, path):
        """Leave the headers of a checkpoint out of account: they are read to know more."""
        directory = str(readers.locate(path).directory)
        manifest = readers.read_manifest(AttemptDirectory.at(directory))
        for rank in range(manifest.world_size):
            with readers.open_shard(
                AttemptDirectory.at(directory), manifest, rank
            ) as reader:
                self.data_start[os.path.basename(reader.path)] = reader._data_start


def _matrix(placement, filled):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    whole = torch.arange(ROWS * COLUMNS, dtype=torch.float32).view(ROWS, COLUMNS)
    part = whole if filled else torch.zeros_like(whole)
    if isinstance(placement, Shard):
        chunks = part.chunk(dist.get_world_size(), placement.dim)
        part = chunks[dist.get_rank()].contiguous()
    return DTensor.from_local(
        part.clone(),
        mesh,
        [placement],
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )


PLACEMENTS = {"rows": Shard(0), "columns": Shard(1), "whole": Replicate()}


def _save_matrices(rank, directory, kind):
    tensors = [_matrix(PLACEMENTS[kind], True) for _ in range(3)]
    with _manager(Checkpoint(tensors=tensors), directory) as manager:
        return manager.save()


def _count_reads(rank, directory, path, kind, how):
    expected = _matrix(PLACEMENTS[kind], True)
    tensors = [_matrix(PLACEMENTS[kind], False) for _ in range(3)]
    reads = Reads()
    reads.watch(path)
    with _manager(Checkpoint(tensors=tensors), directory, how) as manager:
        rounds = _rounds_of(manager.restore_or_initialize)
    assert all(torch.equal(t.to_local(), expected.to_local()) for t in tensors)
    # However it lies: nobody is asked who has what.
    assert rounds == ["CLAIM", "PROBE", "CANDIDATE", "PLAN", "READ", "APPLY"], rounds
    needed = sum(tensor.to_local().nbytes for tensor in tensors)
    return needed, sum(reads.bytes_of.values()), len(reads.bytes_of)


def _rounds_of(call):
    """Make a call; return the phases of the rounds of votes that it took."""
    rounds, consult = [], GroupChannel.consult

    def counted(self, vote, *arguments, **more):
        rounds.append(vote.phase.name)
        return consult(self, vote, *arguments, **more)

    GroupChannel.consult = counted
    call()
    GroupChannel.consult = consult
    return rounds


CHANGES = [
    # From, to, how, at most so much more than is needed, files a rank.
    (("rows", 4), ("rows", 4), "each", 1.0, 1),
    (("columns", 4), ("columns", 4), "each", 1.0, 1),
    (("rows", 4), ("rows", 2), "each", 1.05, 2),
    (("rows", 2), ("rows", 4), "each", 1.05, 1),
    (("rows", 4), ("rows", 3), "each", 1.05, 2),
    (("columns", 4), ("columns", 2), "each", 1.05, 2),
    (("columns", 2), ("rows", 4), "each", 1.05, 2),
    (("rows", 4), ("columns", 4), "once", 1.3, 4),
    (("columns", 2), ("columns", 4), "once", 1.3, 2),
    (("rows", 3), ("columns", 4), "once", 1.3, 3),
    # Without the exchange, blocks are read by all that have something in them.
    (("rows", 4), ("columns", 4), "each", 4.0, 4),
    (("columns", 2), ("columns", 4), "each", 2.0, 1),
]
# By default fewer ranks; more of them, and columns to rows.
IN_THE_SAMPLE = (2, 6)


@pytest.mark.parametrize(
    ("source", "target", "how", "factor", "files"),
    [
        pytest.param(
            *change,
            id=f"{a}{n}-{b}{m}-{how}",
            marks=() if number in IN_THE_SAMPLE else pytest.mark.full,
        )
        for number, change in enumerate(CHANGES)
        for (a, n), (b, m), how, *_ in [change]
    ],
)
def test_a_restore_reads_little_more_than_it_needs(
    tmp_path, report_figures, source, target, how, factor, files
):
    """And opens only files with something for it; counted by the calls that read."""
    directory = str(tmp_path / "run")
    (kind, size), (new_kind, new_size) = source, target
    path = values_of(run_ranks(_save_matrices, size, directory, kind))[0]
    counted = values_of(run_ranks(_count_reads, new_size, directory, path, new_kind, how))
    needed, read = (sum(one[index] for one in counted) for index in (0, 1))
    assert read <= factor * needed, (needed, read)
    assert max(one[2] for one in counted) <= files, counted
    report_figures(
        f"{read / needed:.3f} of what is needed, {[one[2] for one in counted]} files"
    )


# Training goes on

GLOBAL_BATCH, STEPS = 12, 8
# What another order of adding up a gradient of twelve samples may change in a loss of
# about 1.6, in fp32, after some steps of AdamW: a few units of its last place.
TOLERANCE = 2e-6


def _train(rank, directory, last_step):
    """Train on to a step, the same samples whatever the number of ranks; return losses."""
    torch.manual_seed(0)
    layers = nn.Linear(6, 17), nn.Tanh(), nn.Linear(17, 5)
    model = nn.Sequential(*layers)
    for layer in (layers[0], layers[2], model):
        fully_shard(layer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    step = torch.zeros((), dtype=torch.int64)
    checkpoint = Checkpoint(model=model, optimizer=optimizer, step=step)
    losses = []
    with _manager(checkpoint, directory) as manager:
        manager.restore_or_initialize()
        while step < last_step:
            generator = torch.Generator().manual_seed(int(step))
            inputs = torch.randn(GLOBAL_BATCH, 6, generator=generator)
            targets = torch.randint(0, 5, (GLOBAL_BATCH,), generator=generator)
            mine = slice(rank, None, dist.get_world_size())
            loss = nn.functional.cross_entropy(model(inputs[mine]), targets[mine])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            total = loss.detach()
            dist.all_reduce(total)
            losses.append(float(total) / dist.get_world_size())
            step += 1
        manager.save()
    return losses


@pytest.mark.full
def test_a_job_that_changes_its_size_has_the_losses_of_one_that_does_not(
    tmp_path, report_figures
):
    """From 4 ranks to 2, to 3, to 1: the same curve, but for the order of additions."""
    expected = values_of(run_ranks(_train, 4, str(tmp_path / "one"), 4 * STEPS))[0]
    found = []
    for stage, size in enumerate((4, 2, 3, 1), 1):
        results = run_ranks(_train, size, str(tmp_path / "many"), stage * STEPS)
        found += values_of(results)[0]
    worst = max(abs(one - other) for one, other in zip(found, expected, strict=True))
    assert worst <= TOLERANCE, (found, expected)
    assert expected[-1] < expected[0]
    report_figures(f"losses differ by at most {worst:.1e} in {len(expected)} steps")
