"""Tracked objects <-> named leaves, one class for each kind of object.

Each knows both ways: what to save, and how to take it back. ``plan`` decides what a
restore will read and lists what does not fit, without changing anything; tensors are
then filled in place; finishers, which run user code, come last.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from distckpt import instances, modules, schedulers, values
from distckpt.errors import UnsupportedError
from distckpt.frozen_node import FrozenNode
from distckpt.leaves import Leaves
from distckpt.marked_nodes import CopiesNode, GroupsNode, OneRankNode
from distckpt.module_node import ModuleNode, Owners
from distckpt.names import group_part
from distckpt.node import Node, Resized
from distckpt.optimizer_node import OptimizerNode, OwnOptimizerNode
from distckpt.optimizers import (
    Stated,
    class_of,
    may_have_state,
    restore_kinds,
    says_all,
    tensors_in_any,
)
from distckpt.parts import NamesOfParts, Parts
from distckpt.per_rank import OneRank, PerGroup, PerRank, Replicated, Resize
from distckpt.restore_plan import RestorePlan
from distckpt.taken import Taken
from distckpt.tensor_paths import join, key_text
from distckpt.trainable import Trainable

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


def walk(
    objects: Mapping[str, Any],
    set_value: Callable[[str, Any], None],
    saves: bool = False,
) -> Nodes:
    """Turn what a ``Checkpoint`` tracks into nodes.

    Args:
        objects: By top-level name.
        set_value: Called on restore for a plain value that cannot be updated in place.
        saves: Whether the nodes are captured next. Then what is large and plain is
            walked once: to be looked through, and encoded.

    Raises:
        UnsupportedError: Names the path of an object that cannot be tracked.
    """
    walker = _Walker(saves)
    for name, value in objects.items():
        walker.visit(key_text(name, name), value, partial(set_value, name))
    walker.check()
    return Nodes(walker.shared, walker.per_rank, walker.resize)


class _Walker:
    def __init__(self, saves: bool) -> None:
        self._saves = saves
        self.shared: list[Node] = []
        self.per_rank: list[Node] = []
        self.resize: dict[str, Resize] = {}
        self._owners = Owners()
        self._optimizers: list[OptimizerNode] = []
        # Ids of the optimizers that are tracked.
        self._tracked: set[int] = set()

    def check(self) -> None:
        """Raise if an optimizer holds one that is not tracked, and does not save it."""
        for node in self._optimizers:
            node.check_holds_no_other(self._tracked)

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
        if isinstance(value, (OneRank, PerGroup, Replicated)):
            self._visit_marked(path, value, mark, depth)
            return
        per_rank = mark is not None
        nodes = self.per_rank if per_rank else self.shared
        if mark is not None:
            self.resize[path] = mark.resize
        if isinstance(value, nn.Module):
            self._visit_modules(path, [value], nodes, per_rank)
        elif isinstance(value, Trainable):
            self._visit_modules(path, [value.module], nodes, per_rank, True)
            frozen = FrozenNode(path, value)
            self.per_rank.append(frozen)
            self.resize[frozen.path] = "by_rank"
        elif isinstance(value, Parts):
            if isinstance(value[0], nn.Module):
                self._visit_modules(path, [*value], nodes, per_rank)
            else:
                for part, optimizer in enumerate(value):
                    self._visit_optimizer(path, optimizer, nodes, per_rank, part)
        elif isinstance(value, Optimizer):
            self._visit_optimizer(path, value, nodes, per_rank)
        elif isinstance(value, torch.Tensor):
            nodes.append(TensorNode(path, value))
            self._owners.add_tensor(path, value, per_rank)
        elif is_stateful(value):
            nodes.append(StatefulNode(path, value))
        elif self._saves and (encoded := values.plain_text(value)):
            nodes.append(ValueNode(path, value, assign, encoded))
        elif isinstance(value, (dict, list)) and holds_tracked(value):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                set_item = partial(value.__setitem__, key)
                self.visit(join(path, key), item, set_item, mark, depth + 1)
        elif isinstance(value, tuple) and holds_tracked(value):
            msg = f"{path}: a tuple cannot be updated in place; use a list."
            raise UnsupportedError(msg)
        else:
            nodes.append(ValueNode(path, value, assign))

    def _visit_marked(
        self,
        path: str,
        value: OneRank | PerGroup | Replicated,
        mark: PerRank | None,
        depth: int,
    ) -> None:
        kind = type(value).__name__
        if mark is not None:
            msg = f"{path}: {kind} inside PerRank: what each rank has is not shared."
            raise UnsupportedError(msg)
        inner = partial(setattr, value, "value")
        begins = len(self.shared)
        if isinstance(value, PerGroup):
            self.shared.append(GroupsNode(path, value.num_groups))
            path = f"{path}/{group_part(value.group)}"
            self.visit(path, value.value, inner, None, depth + 1)
            return
        self.visit(path, value.value, inner, None, depth + 1)
        if len(self.per_rank) and any(node.path.startswith(path) for node in self.per_rank):
            msg = f"{path}: PerRank inside {kind}: mark one of both."
            raise UnsupportedError(msg)
        node_class = OneRankNode if isinstance(value, OneRank) else CopiesNode
        self.shared[begins:] = [node_class(node) for node in self.shared[begins:]]

    def _visit_modules(
        self,
        path: str,
        parts: Sequence[nn.Module],
        nodes: list[Node],
        per_rank: bool,
        is_trainable_only: bool = False,
    ) -> None:
        names = NamesOfParts() if len(parts) > 1 else None
        for part in parts:
            modules.check_supported(part, path)
            # First, as it takes the state dict: only that puts back the parameters that
            # the optimizer has, where FSDP2 has gathered them for a forward pass.
            node = ModuleNode(path, part, names, is_trainable_only)
            nodes.append(node)
            self._owners.add(node, per_rank)

    def _visit_optimizer(
        self,
        path: str,
        optimizer: Optimizer,
        nodes: list[Node],
        per_rank: bool,
        part: int = 0,
    ) -> None:
        modules.check_supported(optimizer, path)
        self._tracked.add(id(optimizer))
        node: OptimizerNode
        if says_all(optimizer):
            node = OptimizerNode(path, optimizer, self._owners, per_rank, part)
        else:
            said = optimizer.state_dict()
            stated = Stated.of(optimizer, said)
            if stated is None:
                # A container with a form of its own; only it can read that.
                if part:
                    kind = type(optimizer).__name__
                    msg = f"{path}: {kind} cannot be one of several parts; track it alone."
                    raise UnsupportedError(msg)
                nodes.append(StatefulNode(path, optimizer, said))
                return
            node = OwnOptimizerNode(path, optimizer, stated, self._owners, per_rank, part)
        nodes.append(node)
        self._optimizers.append(node)


_MARKS = (PerRank, PerGroup, OneRank, Replicated)


def is_stateful(value: Any) -> bool:
    """Tell whether an object has the two methods of a state dict."""
    return (
        not isinstance(value, type)
        and callable(getattr(value, "state_dict", None))
        and callable(getattr(value, "load_state_dict", None))
    )


# What is no tracked object, and has none in it.
_TRACKED = (PerRank, PerGroup, OneRank, Replicated, Parts, Trainable, torch.Tensor)
_NEVER_TRACKED = frozenset((type(None), bool, int, float, complex, str, bytes))


def holds_tracked(value: Any) -> bool:
    """Tell whether an object that is tracked by itself is in a value, or is one.

    Looked for level by level, by type: of numbers there may be millions.
    """
    level: list[Any] = [value]
    for _ in range(_MAX_DEPTH + 1):
        kinds = {*map(type, level)} - _NEVER_TRACKED
        containers = [item for item in level if type(item) in kinds] if kinds else []
        if {*map(type, containers)} - {list, tuple, dict}:
            for item in containers:
                if isinstance(item, _TRACKED) or is_stateful(item):
                    return True
        if len({*map(id, containers)}) < len(containers):
            # Each once: one may contain itself.
            containers = [*{id(item): item for item in containers}.values()]
        lists, dicts = containers, []
        if not kinds <= {list, tuple}:
            lists = [item for item in containers if isinstance(item, (list, tuple))]
            dicts = [item.values() for item in containers if isinstance(item, dict)]
        below = (chain.from_iterable(lists), chain.from_iterable(dicts))
        if {*map(type, chain(*below))} <= _NEVER_TRACKED:
            return False  # nearly always: millions of numbers are not listed again
        level = [*chain.from_iterable(lists), *chain.from_iterable(dicts)]
    return False  # the encoder refuses it with a better message


class TensorNode:
    """A tensor that is tracked itself; restored in place."""

    def __init__(self, path: str, tensor: torch.Tensor) -> None:
        self.path = path
        self._tensor = tensor

    def capture(self, leaves: Leaves) -> None:
        """Add it: a parameter is shared work, all else is written whole."""
        if isinstance(self._tensor, nn.Parameter):
            leaves.add_parameter(self.path, self._tensor)
        else:
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

    def __init__(self, path: str, stateful: Any, state: Any = None) -> None:
        self.path = path
        self._stateful = stateful
        self._known_state = state

    @property
    def stateful(self) -> Any:
        """The object."""
        return self._stateful

    def capture(self, leaves: Leaves) -> None:
        """Add its state dict as one value, and the tensors in it."""
        state = self._state()
        leaves.add_state(self.path, self._class_name, state)
        if isinstance(self._stateful, Optimizer):
            has_state = any(True for _ in tensors_in_any(state))
            if not has_state and may_have_state(self._stateful):
                leaves.stateless.append(self.path)

    @property
    def _class_name(self) -> str:
        if isinstance(self._stateful, Optimizer):
            return class_of(self._stateful)
        return type(self._stateful).__qualname__

    def plan(self, plan: RestorePlan) -> None:
        """Rebuild the state dict; load it when all ranks have read everything."""
        if not plan.selects(self.path):
            return
        if not self._is_there(plan):
            return
        taken = plan.take_value(self.path, self._live_state)
        plan.problems += [f"{self.path}: {reason}" for reason in self._refusals(taken)]
        plan.finish(self.path, lambda: self._load(taken.value()))

    def _is_there(self, plan: RestorePlan) -> bool:
        here = f"an object with a state dict ({self._class_name})"
        if not plan.saved.has_value(self.path):
            is_other = bool(plan.saved.names_under(f"{self.path}/"))
            there = "another kind of object" if is_other else "not there"
            plan.missing(self.path, here, there)
            return False
        saved = plan.saved.class_of(self.path)
        if saved is None:
            plan.problems.append(
                f"{self.path}: {here} here, a plain value in the checkpoint; to begin "
                f"without its state, exclude {self.path!r}"
            )
        elif saved and saved != self._class_name and self._is_one_class():
            plan.problems.append(
                f"{self.path}: the state of {saved} in the checkpoint, {self._class_name} "
                f"here; to begin without it, exclude {self.path!r}"
            )
        return True

    def _is_one_class(self) -> bool:
        """Tell whether the state of another class would be taken for its own."""
        return isinstance(self._stateful, (Optimizer, LRScheduler))

    def _refusals(self, taken: Taken) -> Iterator[str]:
        if isinstance(self._stateful, LRScheduler):
            yield from schedulers.refusals(self._stateful, taken.value())
        is_enabled_here = (
            isinstance(self._stateful, torch.amp.GradScaler) and self._stateful.is_enabled()
        )
        if is_enabled_here and not taken.value():
            yield (
                "saved by a GradScaler that was not enabled, so without state; to begin "
                f"with a new scale, exclude {self.path!r}"
            )

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Rebuild all state dicts; load what is made of them."""
        states = _values_of(self.path, plans, self._class_name, self._live_state)
        if states:
            plans[0].finish(
                self.path, lambda: self._load(resize([one.value() for one in states]))
            )

    def _load(self, state: Any) -> None:
        kept = None
        if isinstance(self._stateful, Optimizer):
            kept = [{**group} for group in self._stateful.param_groups]
        self._stateful.load_state_dict(state)
        if kept is not None:
            for group, old in zip(self._stateful.param_groups, kept, strict=True):
                restore_kinds(group, old)

    def _state(self) -> Any:
        state = self._known_state
        if state is None:
            state = self._stateful.state_dict()
        is_other = isinstance(state, Mapping) and type(state) not in _MAPPINGS
        return dict(state) if is_other else state

    def _live_state(self) -> Any:
        """Return its present state, to take layouts and classes of.

        It may not have one yet, nor anything else than None to return for it.
        """
        return self._state()


# Those that have tags of their own.
_MAPPINGS = (dict, OrderedDict, Counter, defaultdict)


def is_loader(node: Node) -> bool:
    """Tell whether a node is that of a data loader."""
    return isinstance(node, StatefulNode) and is_data_loader(node.stateful)


def is_data_loader(value: Any) -> bool:
    """Tell whether an object is a data loader: torch's, torchdata's, or derived."""
    modules_of = [kind.__module__ for kind in type(value).__mro__]
    return any(name.startswith(("torch.utils.data", "torchdata")) for name in modules_of)


class ValueNode:
    """A plain value; what can be changed is updated in place."""

    def __init__(
        self,
        path: str,
        value: Any,
        assign: Callable[[Any], None],
        encoded: values.Encoded | None = None,
    ) -> None:
        self.path = path
        self._value = value
        self._assign = assign
        self._encoded = encoded

    def capture(self, leaves: Leaves) -> None:
        """Add it."""
        if self._encoded is None:
            leaves.add_value(self.path, self._value)
        else:
            leaves.add_encoded(self.path, self._encoded)

    def plan(self, plan: RestorePlan) -> None:
        """Set it when all ranks have read everything."""
        if not plan.selects(self.path):
            return
        wrapper = plan.saved.wrapper(self.path)
        if wrapper is not None or not plan.saved.has_value(self.path):
            is_tensor = wrapper is not None or self.path in plan.saved.rows
            kind = "a tensor" if is_tensor else "not there"
            plan.problems.append(
                f"{self.path}: a plain value here, {kind} in the checkpoint"
            )
            plan.saved.take_row(self.path)
            plan.saved.take_value_and_parts(self.path)
            return
        saved = plan.saved.class_of(self.path)
        if saved:
            kind = type(self._value).__name__
            plan.problems.append(
                f"{self.path}: a plain value here ({kind}), the state of an object "
                f"({saved}) in the checkpoint; to leave it out, exclude {self.path!r}"
            )
        taken = plan.take_value(self.path, lambda: self._value)
        plan.finish(self.path, lambda: self._set(taken.value()))

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Take all; set what is made of them."""
        found = _values_of(self.path, plans, None, lambda: self._value)
        if found:
            plans[0].finish(
                self.path, lambda: self._set(resize([one.value() for one in found]))
            )

    def _set(self, value: Any) -> None:
        if not instances.updated_in_place(self._value, value):
            self._assign(value)


def _values_of(
    path: str,
    plans: Sequence[RestorePlan],
    class_name: str | None,
    live: Callable[[], Any],
) -> list[Taken]:
    """Take the values that all ranks have saved; none if they are not restored.

    Args:
        path: Of what is restored.
        plans: One for each rank that has saved.
        class_name: Of the object that they are the states of; None: plain values.
        live: Returns the value that is in their place.
    """
    selecting = [plan for plan in plans if plan.selects(path)]
    here = class_name or "a plain value"
    for plan in selecting:
        if not plan.saved.has_value(path):
            plan.missing(path, here)
            return []
        saved = plan.saved.class_of(path)
        if (saved is None) == (class_name is not None) and saved != "":
            there = f"the state of {saved}" if saved else "a plain value"
            plan.problems.append(f"{path}: {here} here, {there} in the checkpoint")
            return []
    return [plan.take_value(path, live) for plan in selecting]
