"""Tracked objects <-> named leaves, one class for each kind of object.

Each knows both ways: what to save, and how to take it back. ``plan`` decides what a
restore will read and lists what does not fit, without changing anything; tensors are
then filled in place; finishers, which run user code, come last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from distckpt import modules
from distckpt.errors import UnsupportedError
from distckpt.leaves import Leaves, join, key_text
from distckpt.module_node import ModuleNode, Owners
from distckpt.node import Node, Resized, live_tensors
from distckpt.optimizer_node import OptimizerNode
from distckpt.per_rank import PerRank, Resize
from distckpt.restore_plan import RestorePlan

_MAX_DEPTH = 64


@dataclass(slots=True)
class Nodes:
    """The tracked objects of one ``Checkpoint``: the job's, and this rank's own.

    Attributes:
        shared: The job's.
        per_rank: This rank's.
        resize: By path, what to do with the latter if another number of ranks saved it.
    """

    shared: list[Node]
    per_rank: list[Node]
    resize: dict[str, Resize]


def walk(objects: Mapping[str, Any], set_value: Callable[[str, Any], None]) -> Nodes:
    """Turn what a ``Checkpoint`` tracks into nodes.

    Args:
        objects: By top-level name.
        set_value: Called on restore for a plain value that cannot be updated in place.

    Raises:
        UnsupportedError: Names the path of an object that cannot be tracked.
    """
    walker = _Walker()
    for name, value in objects.items():
        walker.visit(key_text(name, name), value, partial(set_value, name))
    return Nodes(walker.shared, walker.per_rank, walker.resize)


class _Walker:
    def __init__(self) -> None:
        self.shared: list[Node] = []
        self.per_rank: list[Node] = []
        self.resize: dict[str, Resize] = {}
        self._owners = Owners()

    def visit(
        self,
        path: str,
        value: Any,
        assign: Callable[[Any], None],
        mark: PerRank | None = None,
        depth: int = 0,
    ) -> None:
        if depth > _MAX_DEPTH:
            msg = f"{path[:200]}: nested deeper than {_MAX_DEPTH} levels; a cycle?"
            raise UnsupportedError(msg)
        if isinstance(value, PerRank):
            inner = partial(setattr, value, "value")
            self.visit(path, value.value, inner, value, depth + 1)
            return
        per_rank = mark is not None
        nodes = self.per_rank if per_rank else self.shared
        if mark is not None:
            self.resize[path] = mark.resize
        if isinstance(value, nn.Module):
            modules.check_supported(value, path)
            # First, as it takes the state dict: only that puts back the parameters that
            # the optimizer has, where FSDP2 has gathered them for a forward pass.
            node = ModuleNode(path, value)
            nodes.append(node)
            self._owners.add(node, per_rank)
        elif isinstance(value, Optimizer):
            modules.check_supported(value, path)
            nodes.append(OptimizerNode(path, value, self._owners, per_rank))
        elif isinstance(value, torch.Tensor):
            nodes.append(TensorNode(path, value))
        elif _is_stateful(value):
            nodes.append(StatefulNode(path, value))
        elif isinstance(value, (dict, list)) and _holds_tracked(value):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                set_item = partial(value.__setitem__, key)
                self.visit(join(path, key), item, set_item, mark, depth + 1)
        elif isinstance(value, tuple) and _holds_tracked(value):
            msg = f"{path}: a tuple cannot be updated in place; use a list."
            raise UnsupportedError(msg)
        else:
            nodes.append(ValueNode(path, value, assign))


def _is_stateful(value: Any) -> bool:
    return (
        not isinstance(value, type)
        and callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    )


def _holds_tracked(value: Any, depth: int = 0) -> bool:
    if isinstance(value, (PerRank, torch.Tensor)) or _is_stateful(value):
        return True
    if depth > _MAX_DEPTH:
        return False  # the encoder refuses it with a better message
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return False
    return any(_holds_tracked(item, depth + 1) for item in value)


class TensorNode:
    """A tensor that is tracked itself; restored in place."""

    def __init__(self, path: str, tensor: torch.Tensor) -> None:
        self.path = path
        self._tensor = tensor

    def capture(self, leaves: Leaves) -> None:
        """Add it, whole."""
        leaves.add_tensor(self.path, self._tensor)

    def plan(self, plan: RestorePlan) -> None:
        """Read into it."""
        plan.read_into(self.path, self._tensor)

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Read all; copy what is made of them."""
        saved = [plan.read_whole(self.path) for plan in plans if plan.selects(self.path)]
        if saved:
            plans[0].finishers.append(lambda: self._copy(resize(saved)))

    def _copy(self, made: torch.Tensor) -> None:
        if made.shape != self._tensor.shape:
            # copy_ would repeat a smaller one.
            msg = (
                f"{self.path}: resize made a tensor of shape {list(made.shape)}, here is "
                f"one of shape {list(self._tensor.shape)}."
            )
            raise ValueError(msg)
        with torch.no_grad():
            self._tensor.copy_(made)


class StatefulNode:
    """Anything with ``state_dict`` and ``load_state_dict``: a scheduler, a loader."""

    def __init__(self, path: str, stateful: Any) -> None:
        self.path = path
        self._stateful = stateful

    def capture(self, leaves: Leaves) -> None:
        """Add its state dict as one value, the tensors in it beside."""
        leaves.add_value(self.path, self._state())

    def plan(self, plan: RestorePlan) -> None:
        """Rebuild the state dict; load it when all ranks have read everything."""
        if not plan.selects(self.path):
            return
        if not plan.saved.has_value(self.path):
            plan.missing(self.path, type(self._stateful).__name__)
            return
        state = plan.take_value(self.path, self._live_tensors)
        plan.finishers.append(lambda: self._load(state))

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Rebuild all state dicts; load what is made of them."""
        states = _values_of(self.path, plans, type(self._stateful).__name__)
        if states:
            plans[0].finishers.append(lambda: self._load(resize(states)))

    def _load(self, state: Any) -> None:
        self._stateful.load_state_dict(state)

    def _state(self) -> dict[Any, Any]:
        state = self._stateful.state_dict()
        return state if type(state) in (dict, OrderedDict) else dict(state)

    def _live_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of its present state, to take the layout of.

        It may not have one yet, nor anything else than None to return for it.
        """
        state = self._stateful.state_dict()
        return live_tensors(dict(state), self.path) if isinstance(state, Mapping) else {}


class ValueNode:
    """A plain value; dicts and lists are updated in place."""

    def __init__(self, path: str, value: Any, assign: Callable[[Any], None]) -> None:
        self.path = path
        self._value = value
        self._assign = assign

    def capture(self, leaves: Leaves) -> None:
        """Add it."""
        leaves.add_value(self.path, self._value)

    def plan(self, plan: RestorePlan) -> None:
        """Set it when all ranks have read everything."""
        if not plan.selects(self.path):
            return
        if not plan.saved.has_value(self.path):
            kind = "a tensor" if self.path in plan.saved.rows else "not there"
            plan.problems.append(
                f"{self.path}: a plain value here, {kind} in the checkpoint"
            )
            plan.saved.take_row(self.path)
            return
        plan.finishers.append(partial(self._set, plan.take_value(self.path)))

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Take all; set what is made of them."""
        found = _values_of(self.path, plans, "a plain value")
        if found:
            plans[0].finishers.append(lambda: self._set(resize(found)))

    def _set(self, value: Any) -> None:
        live = self._value
        if type(live) is type(value) and isinstance(live, dict):
            live.clear()
            live.update(value)
        elif type(live) is type(value) and isinstance(live, list):
            live[:] = value
        else:
            self._assign(value)


def _values_of(path: str, plans: Sequence[RestorePlan], what: str) -> list[Any]:
    """Take the plain values that all ranks have saved; none if they are not restored."""
    selecting = [plan for plan in plans if plan.selects(path)]
    for plan in selecting:
        if not plan.saved.has_value(path):
            plan.missing(path, what)
            return []
    return [plan.take_value(path) for plan in selecting]
