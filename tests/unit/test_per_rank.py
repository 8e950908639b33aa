"""``PerRank`` and ``RngState``: what a rank has of its own."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from torch import nn
from torch_helpers import assert_same, manifest_of, restore, rows_of, save, stored

from distckpt import (
    MismatchError,
    OneRank,
    Parts,
    PerRank,
    Replicated,
    RngState,
    values,
)


def _draw():
    return (
        [random.random() for _ in range(3)],
        [random.gauss(0, 1) for _ in range(3)],
        np.random.rand(3).tolist(),
        np.random.randn(3).tolist(),
        torch.rand(3).tolist(),
        torch.randn(5).tolist(),
        torch.randperm(10).tolist(),
    )


@pytest.mark.parametrize("num_draws", [0, 1, 2])
def test_rng_state_continues_every_stream_exactly(run_dir, num_draws):
    """Python, NumPy and torch go on with the very numbers that would have come."""
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    for _ in range(num_draws):
        # An odd number of normal values leaves a spare one in the generators.
        random.gauss(0, 1), np.random.randn(), torch.randn(1)
    save(run_dir, rng=PerRank(RngState()))
    expected = _draw()
    _draw()
    restore(run_dir, rng=PerRank(RngState()))
    assert _draw() == expected


def test_rng_state_holds_plain_values_only(run_dir):
    """No tensor, so that ranks that differ are noticed if ``PerRank`` is forgotten."""
    path = save(run_dir, rng=RngState())
    assert not rows_of(path)
    assert set(values.decode(manifest_of(path).values["rng"])) >= {
        "python",
        "torch",
        "numpy",
    }


def test_per_rank_values_stay_out_of_the_manifest(run_dir):
    """They stand in the rank's own shard file."""
    path = save(run_dir, mine=PerRank(5), shared=6)
    assert manifest_of(path).values == {"save_counter": 1, "shared": 6}


class Loader:
    """A data loader with a cursor."""

    def __init__(self, cursor):
        self.cursor = cursor

    def state_dict(self):
        return {"cursor": self.cursor, "buffer": torch.full((2,), self.cursor)}

    def load_state_dict(self, state):
        self.cursor = state["cursor"]
        assert state["buffer"].tolist() == [self.cursor] * 2


def test_per_rank_marks_anything_anywhere(run_dir):
    """Values, tensors, modules with optimizers, and containers, at any depth."""

    def make(value):
        model = nn.Linear(2, 2)
        nn.init.constant_(model.weight, value)
        return {
            "number": PerRank(value),
            "tensor": PerRank(torch.full((2,), value)),
            "tree": {"deep": [PerRank(Loader(value)), 1], "shared": torch.zeros(1)},
            "inside": PerRank({"a": [torch.full((1,), value), value], "b": {}}),
            "twice": PerRank(PerRank(value)),
            "net": PerRank(
                {"model": model, "optimizer": torch.optim.SGD(model.parameters(), lr=value)}
            ),
        }

    path = save(run_dir, **make(3.0))
    assert sorted(rows_of(path)) == ["tree/shared"]
    assert {"tensor", "inside/a/~i0", "net/model/weight", "tree/shared"} <= set(
        stored(path)
    )
    live = make(0.0)
    restore(run_dir, **live)
    assert live["number"].value == live["twice"].value.value == 3.0
    assert live["tensor"].value.tolist() == [3, 3]
    assert live["tree"]["deep"][0].value.cursor == 3.0
    assert_same(live["inside"].value, {"a": [torch.full((1,), 3.0), 3.0], "b": {}})
    net = live["net"].value
    assert net["optimizer"].param_groups[0]["lr"] == 3.0
    assert net["model"].weight.tolist() == [[3, 3], [3, 3]]


def test_tied_tensors_of_one_rank_come_back(run_dir):
    """A rank's own tensors are stored one by one, tied or not."""
    shared = torch.arange(3)
    save(run_dir, mine=PerRank([shared, shared]))
    live = torch.zeros(3, dtype=torch.int64)
    restore(run_dir, mine=PerRank([live, live]))
    assert_same(live, shared)


def test_optimizer_with_tensor_lr_of_one_rank_comes_back(run_dir):
    """Learning rates that are tensors do not need ties to be one setting."""

    def make(lr):
        model = nn.Linear(2, 2)
        return {"m": model, "o": torch.optim.Adam(model.parameters(), lr=torch.tensor(lr))}

    save(run_dir, mine=PerRank(make(0.5)))
    live = make(0.1)
    restore(run_dir, mine=PerRank(live))
    assert float(live["o"].param_groups[0]["lr"]) == 0.5


def test_per_rank_differences_are_listed_with_the_shared_ones(run_dir):
    """One error for both kinds, and nothing is changed."""
    save(run_dir, mine=PerRank({"t": torch.ones(2), "n": 1}), x=torch.ones(1))
    live = {"t": torch.zeros(3), "m": 2}
    with pytest.raises(MismatchError) as caught:
        restore(run_dir, mine=PerRank(live), x=torch.zeros(2))
    for text in (
        "mine/t: float32 [2] in the checkpoint, float32 [3] here",
        "mine/n: this rank's own in the checkpoint, nothing here",
        "mine/m: a plain value here, not there in the checkpoint",
        "x: float32 [1] in the checkpoint, float32 [2] here",
    ):
        assert text in str(caught.value)
    assert live["t"].tolist() == [0, 0, 0] and live["m"] == 2


def test_checkpoint_without_per_rank_is_a_mismatch_for_a_job_with_it(run_dir):
    """Shared and per-rank are different things under one name."""
    save(run_dir, x=torch.ones(1))
    with pytest.raises(MismatchError, match="x: a tensor here, not there"):
        restore(run_dir, x=PerRank(torch.zeros(1)))


def test_job_without_per_rank_reads_a_checkpoint_that_has_it(run_dir):
    """An evaluation job leaves the ranks' own state where it is."""
    save(run_dir, x=torch.ones(1), mine=PerRank(3))
    live = torch.zeros(1)
    restore(run_dir, x=live)
    assert live == 1


@pytest.mark.parametrize(
    ("mark", "text"),
    [
        (PerRank(3), "PerRank(3)"),
        (PerRank(torch.ones(2), resize="by_rank"), 'PerRank(Tensor, resize="by_rank")'),
        (PerRank("x", resize=max), "PerRank('x', resize=max)"),
        (
            PerRank({"loader": [1, None], "rng": RngState()}),
            "PerRank({'loader': [1, None], 'rng': RngState()})",
        ),
        (OneRank(torch.nn.Linear(1, 1)), "OneRank(Linear)"),
        (Replicated(PerRank(0.5)), "Replicated(PerRank(0.5))"),
        (Parts([torch.nn.ReLU(), torch.nn.Linear(1, 1)]), "Parts([ReLU, Linear])"),
        (PerRank(b"x" * 9), "PerRank(bytes)"),
        (PerRank("x" * 99), "PerRank(str)"),
        (PerRank(10**5000), "PerRank(int)"),
        (PerRank([*range(20)]), "PerRank([0, 1, 2, 3, 4, 5, 6, 7, ...])"),
        (PerRank([[[[[[1]]]]]]), "PerRank([[[[list]]]])"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_repr_shows_what_is_inside_by_its_type(mark, text):
    """For people who print a checkpoint's attributes: no tensor is read."""
    assert repr(mark) == text


def test_repr_of_a_container_that_holds_itself_ends():
    held = {}
    held["again"] = PerRank(held)
    assert repr(PerRank(held)).startswith("PerRank({'again': PerRank({'again': ")
