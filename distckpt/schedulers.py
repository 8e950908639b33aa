"""Learning rate schedulers: does a saved state fit the optimizer?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch.optim.lr_scheduler import LRScheduler

from distckpt import words

# Lists that have one item for each group of the optimizer.
_BY_GROUP = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "base_momentums",
    "max_momentums",
    "swa_lrs",
)


def refusals(scheduler: LRScheduler, state: Any) -> Iterator[str]:
    """Tell why a saved state does not fit a scheduler.

    It has lists with one item for each group of the optimizer. torch loads them whatever
    their length, and fails at a later step, or never.
    """
    optimizer = getattr(scheduler, "optimizer", None)
    groups = getattr(optimizer, "param_groups", None)
    if not isinstance(state, Mapping) or groups is None:
        return
    for key in _BY_GROUP:
        values = state.get(key)
        if isinstance(values, (list, tuple)) and len(values) not in (0, len(groups)):
            yield (
                f"{key} of {words.count(len(values), 'group')} in the checkpoint, the "
                f"optimizer has {len(groups)} here; to begin without its state, exclude it"
            )
            return
    # Of those that are made of schedulers.
    inner, states = getattr(scheduler, "_schedulers", ()), state.get("_schedulers", ())
    for one, its_state in zip(inner, states, strict=False):
        if isinstance(one, LRScheduler):
            yield from refusals(one, its_state)
