"""What each rank has of its own, restored by another number of ranks: as the mark says."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from harness import run_ranks, values_of
from outcome_helpers import outcome

from distckpt import Checkpoint, CheckpointManager, PerRank, RestoreOptions

NUM_SAMPLES = 24


class Loader:
    """A data loader that knows which samples this rank still has to see."""

    def __init__(self, left):
        self.left = list(left)

    def state_dict(self):
        return {"left": self.left, "seen": torch.tensor(NUM_SAMPLES - len(self.left))}

    def load_state_dict(self, state):
        self.left = list(state["left"])


def _divide(saved, rank, world_size):
    """Give what is left of all to the ranks in turn."""
    left = sorted(sample for state in saved for sample in state["left"])
    assert [int(state["seen"]) for state in saved] == [
        NUM_SAMPLES - len(state["left"]) for state in saved
    ]
    return {"left": left[rank::world_size]}


def _own_things(rank, world_size, loader_resize):
    mine = range(rank, NUM_SAMPLES, world_size)
    return Checkpoint(
        model=torch.nn.Linear(2, 2),
        loader=PerRank(Loader(mine), resize=loader_resize),
        seed=PerRank(100 + rank, resize="by_rank"),
        drawn=PerRank(torch.full((2,), float(rank)), resize="by_rank"),
        loss=PerRank(
            torch.tensor(float(rank)),
            resize=lambda saved, rank, world_size: torch.stack(saved).mean(),
        ),
    )


def _save(rank, directory, world_size):
    checkpoint = _own_things(rank, world_size, _divide)
    del checkpoint.loader.value.left[:2]  # the first two are seen
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        manager.save()
    return checkpoint.loader.value.left


def _restore(rank, directory, world_size):
    checkpoint = _own_things(rank, world_size, _divide)
    checkpoint.seed.value, checkpoint.drawn.value = -1, torch.full((2,), -1.0)
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        manager.restore_or_initialize()
        manager.save()
    return (
        checkpoint.loader.value.left,
        checkpoint.seed.value,
        checkpoint.drawn.value.tolist(),
        float(checkpoint.loss.value),
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        pytest.param(4, 2, marks=pytest.mark.full),
        (2, 3),
        (2, 1),
        pytest.param(1, 2, marks=pytest.mark.full),
    ],
)
def test_what_is_per_rank_goes_to_other_ranks_as_its_mark_says(tmp_path, before, after):
    """Divided by a function of all; by the rank's number; new ranks keep what they have."""
    directory = str(tmp_path / "run")
    saved = values_of(run_ranks(_save, before, directory, before, process_group=before > 1))
    found = values_of(run_ranks(_restore, after, directory, after, process_group=after > 1))
    divided = [left for left, *_ in found]
    assert sorted(chain(*saved)) == sorted(chain(*divided))
    for rank, (left, seed, drawn, loss) in enumerate(found):
        assert abs(len(left) - (NUM_SAMPLES - 2 * before) / after) < 1
        has_saved = rank < before
        assert seed == (100 + rank if has_saved else -1)
        assert drawn == ([float(rank)] * 2 if has_saved else [-1.0] * 2)
        assert loss == pytest.approx((before - 1) / 2)


def _fail(rank, directory, which):
    def cannot(saved, rank, world_size):
        raise ZeroDivisionError("no way")

    def too_small(saved, rank, world_size):
        return torch.zeros(1)

    objects = {
        "function": {"seed": PerRank(0, resize=cannot)},
        "shape": {"drawn": PerRank(torch.zeros(2), resize=too_small)},
        "module": {"drawn": PerRank(torch.nn.Linear(1, 1), resize=cannot)},
        "missing": {"other": PerRank(1, resize=_divide)},
        "error": {"seed": PerRank(0, resize="by_rank"), "drawn": PerRank(torch.zeros(2))},
    }[which]
    manager = CheckpointManager(Checkpoint(**objects), directory, max_to_keep=None)
    found = outcome(manager.restore_or_initialize, RestoreOptions(include=[*objects]))
    manager.close()
    return found


@pytest.mark.parametrize(
    ("which", "kind", "text"),
    [
        ("function", "RestoreFailed", "no way"),
        pytest.param(
            "shape",
            "RestoreFailed",
            "resize made a tensor of shape [1]",
            marks=pytest.mark.full,
        ),
        ("module", "UnsupportedError", "not for modules"),
        pytest.param(
            "missing", "MismatchError", "other: a plain value here", marks=pytest.mark.full
        ),
        pytest.param(
            "error",
            "MismatchError",
            "drawn) cannot be given to other ranks",
            marks=pytest.mark.full,
        ),
    ],
)
def test_what_cannot_be_resized_fails_alike_on_all_ranks(tmp_path, which, kind, text):
    """And says what to do."""
    directory = str(tmp_path / "run")
    values_of(run_ranks(_save, 3, directory, 3))
    for found in values_of(run_ranks(_fail, 2, directory, which)):
        assert found.kind == kind and text in found.text, found
