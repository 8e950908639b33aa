"""Checkpoints that four ranks of an earlier version saved, restored by two of this one."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import cases
import pytest
import torch.distributed as dist
from described import describe, describe_own, merged, spelled
from harness import run_ranks, values_of

from distckpt import Checkpoint, CheckpointManager

GOLDEN = Path(__file__).parents[1] / "golden"
FORMATS = sorted(path.name for path in GOLDEN.glob("format-*"))
# Which directory is restored into the objects of which: all have the same model.
PAIRS = [("fsdp", "fsdp"), ("hsdp", "fsdp"), ("fsdp-over-tp", "tensor-parallel")]


def _restore_and_save(rank, folder):
    """Restore each on two ranks, save once more, and return what is held then."""
    found = []
    for saved, kind in PAIRS:
        objects = cases.build(kind, cases.LIVE, as_job=True)
        checkpoint = Checkpoint(**objects)
        directory = os.path.join(folder, saved)
        with CheckpointManager(checkpoint, directory, None) as manager:
            restored = manager.restore_or_initialize()
            held = describe(objects).to_parts()
            own = describe_own(objects).to_parts()
            after = manager.save()
            found.append((restored, held, own, after, manager.checkpoints))
    return found


@pytest.mark.parametrize(
    "name",
    [
        *FORMATS[:-1],
        # All other tests write and read the newest format.
        *(pytest.param(name, marks=pytest.mark.full) for name in FORMATS[-1:]),
    ],
)
def test_two_ranks_restore_what_four_have_saved_and_go_on(name, tmp_path):
    """Sharded in other ways, and divided anew what each rank had of its own."""
    for saved, _ in PAIRS:
        shutil.copytree(GOLDEN / name / saved, tmp_path / saved)
    ranks = values_of(run_ranks(_restore_and_save, 2, str(tmp_path)))
    for (saved, _), *of_ranks in zip(PAIRS, *ranks, strict=True):
        expected = json.loads((GOLDEN / name / f"{saved}.expected.json").read_text())
        wanted = expected["checkpoints"]["ckpt-1"]
        tensors, ties, values = merged([held for _, held, _, _, _ in of_ranks])
        assert tensors == wanted["tensors"]
        assert ties == wanted["same_as"]
        assert {**values, "save_counter": "1"} == wanted["values"]
        parts = [own["values"]["loader"]["left"] for own in wanted["per_rank"]]
        every = sorted(int(sample) for part in parts for sample in re.findall(r"\d+", part))
        assert every == [0, 1, 2, 3]
        for rank, (restored, _, own, after, listed) in enumerate(of_ranks):
            assert restored == str(tmp_path / saved / "ckpt-1")
            assert own[2]["loader"]["left"] == spelled(every[rank::2])
            assert after == str(tmp_path / saved / "ckpt-2")
            assert listed == [restored, after]
    assert not dist.is_initialized()
