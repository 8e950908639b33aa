"""One row of the walk, and what the rows share: small models, batches, a training loop."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

RIGHT = "right"
Bundle = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """Objects of one library that are saved and restored.

    Attributes:
        library: Its name.
        name: What the objects are.
        make: Makes fresh objects by name, from a seed. Tracked are those whose name does
            not begin with an underscore.
        train: Goes through some steps, numbered; returns what the objects computed.
        expected: ``"right"``, or a pattern of the message of a refusal.
        before: Steps before the save.
        warm: Steps that the fresh objects go through before they are restored.
        ranks: Whether a process group of one rank is needed.
        exact: Whether what was saved is what is right, and not what the object's own
            ``load_state_dict`` makes of it.
        lazy: Whether what was loaded shows in the objects only when they are used next.
    """

    library: str
    name: str
    make: Callable[[int], Bundle]
    train: Callable[[Bundle, range], list[torch.Tensor]]
    expected: str = RIGHT
    before: int = 3
    warm: int = 0
    ranks: bool = False
    exact: bool = False
    lazy: bool = False

    def is_expected(self, verdict: str) -> bool:
        """Tell whether a verdict is the expected one."""
        if self.expected == RIGHT:
            return verdict == RIGHT
        return verdict.startswith("refused") and bool(re.search(self.expected, verdict))


def seeded(number: int) -> torch.Generator:
    """Make a generator of random numbers."""
    return torch.Generator().manual_seed(number)


def batch(step: int, *shape: int) -> torch.Tensor:
    """Make the batch of a step."""
    return torch.randn(shape, generator=seeded(step))


def tokens(
    step: int, vocabulary: int = 50, shape: tuple[int, int] = (2, 8)
) -> torch.Tensor:
    """Make a batch of tokens."""
    return torch.randint(0, vocabulary, shape, generator=seeded(step))


def small_model(seed: int) -> nn.Module:
    """Make a model of four small parameters."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3))


def fit(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    """Train a model on random batches, with what there is of optimizer and scheduler."""
    shape = bundle.get("_shape", (4, 6))
    return fit_on(bundle, steps, lambda model, step: model(batch(step, *shape)))


def fit_on(
    bundle: Bundle,
    steps: range,
    compute: Callable[[Any, int], torch.Tensor],
) -> list[torch.Tensor]:
    """Train a model so that what it computes becomes small; returns what it computes."""
    outputs = []
    model = bundle["model"]
    optimizer, scheduler = bundle.get("optimizer"), bundle.get("scheduler")
    for step in steps:
        torch.manual_seed(1000 + step)
        output = compute(model, step)
        if optimizer is not None:
            optimizer.zero_grad()
            output.float().square().mean().backward()
            optimizer.step()
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            scheduler.step(1.0)
        elif scheduler is not None:
            scheduler.step()
        outputs.append(output.detach().clone())
    return outputs


def forward(bundle: Bundle, steps: range) -> list[torch.Tensor]:
    """Let a model compute, without training it."""
    shape = bundle.get("_shape", (4, 6))
    with torch.no_grad():
        return [bundle["model"](batch(step, *shape)).clone() for step in steps]
