"""Values, and tensors made of others: compared between ranks, and restored by others."""

from __future__ import annotations

import dataclasses
import enum

import numpy as np
import torch
from harness import run_ranks, values_of
from outcome_helpers import outcome
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor

import distckpt
from distckpt import Checkpoint, CheckpointManager, OneRank, PerRank

MOMENT = "optimizer/state/model/weight/moment"


class Phase(enum.Enum):
    """A value of a class."""

    WARMUP = 1
    MAIN = 2


@dataclasses.dataclass
class Progress:
    """A value of a class that is updated in place."""

    phase: Phase = Phase.WARMUP
    seen: set[str] = dataclasses.field(default_factory=set)
    noise: np.ndarray | None = None


class Moments(torch.optim.Optimizer):
    """Keeps its state in tensors that are made of others."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self):
        """Make state, or change it."""
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                first = parameter.detach() + 1
                state["moment"] = TwoTensor(first, first * 2)
            state["moment"].a.add_(1)


def _filled(value):
    return TwoTensor(torch.full((3,), value), torch.full((3,), value))


def _objects(rank, seed, steps, value):
    torch.manual_seed(seed)
    model = nn.Linear(64, 700)  # large enough to be cut among ranks
    optimizer = Moments(model.parameters())
    for _ in range(steps):
        optimizer.step()
    progress = Progress(Phase(value), {f"x{value}"}, np.arange(4000) * value)
    return {
        "model": model,
        "optimizer": optimizer,
        "progress": progress,
        "own": PerRank(
            {"phase": Phase(value), "t": _filled(rank + value)},
            resize="by_rank",
        ),
        "one": OneRank(_filled(10 * rank + value)),
    }


def _save(rank, directory):
    objects = _objects(rank, 0, 2, 2)
    with CheckpointManager(Checkpoint(**objects), directory, None) as manager:
        path = manager.save()
        # Of the largest tensor: blocks of it have their turn at each save.
        if rank == 1:
            objects["optimizer"].state[objects["model"].weight]["moment"].b.neg_()
        drifted = outcome(manager.save)
        objects["optimizer"].state[objects["model"].weight]["moment"].b.abs_()
        objects["progress"].seen.add(f"rank {rank}")
        differing = outcome(manager.save)
    return path, drifted, differing


def _restore(rank, directory):
    objects = _objects(rank, 1, 0, 1)
    with CheckpointManager(Checkpoint(**objects), directory, None) as manager:
        manager.restore_or_initialize()
    moment = objects["optimizer"].state[objects["model"].weight]["moment"]
    progress = objects["progress"]
    own = objects["own"].value
    return {
        "moment": (type(moment).__name__, moment.a.clone(), moment.b.clone()),
        "weight": objects["model"].weight.detach().clone(),
        "progress": (progress.phase is Phase.MAIN, progress.seen, progress.noise),
        "own": (own["phase"].name, own["t"].a.tolist()),
        "one": objects["one"].value.b.tolist(),
    }


def test_values_and_parts_of_two_ranks_are_compared_and_restored_by_three(tmp_path):
    """Differences are named by the part, and by the value."""
    directory = str(tmp_path / "run")
    for path, drifted, differing in values_of(run_ranks(_save, 2, directory)):
        assert path == f"{directory}/ckpt-1"
        assert drifted.kind == "SaveFailed", drifted
        assert drifted.failures == {1: f"{MOMENT}/~inner/b"}
        assert differing.kind == "ConfigError", differing
        assert "1 plain value differs" in differing.text
        assert "progress is " in differing.text
    with distckpt.open(directory) as opened:
        ranks = {rank for rank, _ in opened[f"{MOMENT}/~inner/a"]._find(_whole(opened))}
        assert ranks == {0, 1}, "each rank has written a part"
    expected = _objects(0, 0, 2, 2)
    moment = expected["optimizer"].state[expected["model"].weight]["moment"]
    for rank, found in enumerate(values_of(run_ranks(_restore, 3, directory))):
        kind, first, second = found["moment"]
        assert kind == "TwoTensor"
        assert torch.equal(first, moment.a) and torch.equal(second, moment.b)
        assert torch.equal(found["weight"], expected["model"].weight)
        is_main, seen, noise = found["progress"]
        assert is_main and seen == {"x2"} and np.array_equal(noise, np.arange(4000) * 2)
        phase, own = found["own"]
        assert (phase, own) == (
            ("MAIN", [rank + 2] * 3) if rank < 2 else ("WARMUP", [rank + 1] * 3)
        )
        assert found["one"] == [2] * 3


def _whole(opened):
    from distckpt.boxes import whole

    return whole(opened[f"{MOMENT}/~inner/a"].shape)
