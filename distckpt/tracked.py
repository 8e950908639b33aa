"""Tracked objects <-> named leaves, one class for each kind of object.

Each knows both ways: what to save, and how to take it back. ``plan`` decides what a
restore will read and lists what does not fit, without changing anything; tensors are
then filled in place; finishers, which run user code, come last.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import compress
from operator import not_
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import nn
from torch.optim import Optimizer

from distckpt import modules, names, tensors
from distckpt.errors import ConfigError, UnsupportedError
from distckpt.known import KnownTensor, KnownTensors
from distckpt.layout import SPLIT, WHOLE
from distckpt.leaves import Leaves, join, key_text, tensors_in
from distckpt.per_rank import PerRank, Resize
from distckpt.restore_plan import RestorePlan

_MAX_DEPTH = 64


class Owner(NamedTuple):
    """The tracked module that a parameter belongs to.

    Attributes:
        name: Full name of the parameter.
        per_rank: Whether the module is each rank's own.
    """

    name: str
    per_rank: bool


class Owners:
    """Which tracked module each parameter belongs to."""

    def __init__(self) -> None:
        self._nodes: list[tuple[ModuleNode, bool]] = []
        self._owner_of: dict[int, Owner] | None = None
        self._is_complete = False

    def add(self, node: ModuleNode, per_rank: bool) -> None:
        """Note a tracked module."""
        self._nodes.append((node, per_rank))

    def of(self, parameter: torch.Tensor, known: KnownTensors) -> Owner | None:
        """Return the first tracked module that has a parameter."""
        if self._owner_of is None:  # only optimizers ask
            self._owner_of = self._map(lambda node: node.saved_parameters(known))
        owner = self._owner_of.get(id(parameter))
        if owner is None and not self._is_complete:
            # A state dict need not name every parameter.
            self._is_complete = True
            self._owner_of = self._map(ModuleNode.named_parameters)
            owner = self._owner_of.get(id(parameter))
        return owner

    def _map(
        self, parameters_of: Callable[[ModuleNode], Iterable[tuple[str, torch.Tensor]]]
    ) -> dict[int, Owner]:
        owner_of: dict[int, Owner] = {}
        for node, per_rank in self._nodes:
            for name, own in parameters_of(node):
                owner_of.setdefault(id(own), Owner(name, per_rank))
        return owner_of


# Makes of what all ranks have saved what this one gets.
Resized: TypeAlias = Callable[[list[Any]], Any]


class Node(Protocol):
    """One tracked object at one path."""

    path: str

    def capture(self, leaves: Leaves) -> None:
        """Add what has to be saved."""

    def plan(self, plan: RestorePlan) -> None:
        """Say what will be read, what is to be done then, and what does not fit."""

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """The same, of what another number of ranks has saved.

        Args:
            plans: For what each of them has saved.
            resize: Makes of it, when it is read, what this rank gets.

        Raises:
            UnsupportedError: It is nothing that a function could make.
        """


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


class _Described(NamedTuple):
    """Tensors of one tracked object.

    Attributes:
        names: Full names.
        known: What they are.
        kinds: How plain ones are divided among the ranks.
    """

    names: list[str]
    known: list[KnownTensor]
    kinds: list[str]


class _Other(NamedTuple):
    """One entry of a state dict that is not the module's own object.

    Attributes:
        key: In the state dict.
        name: Full name.
        value: A tensor, or extra state.
        owner: The module's own tensor of that name, if the value is a sharded one that
            only shares its memory: of an empty part no memory tells what it is.
    """

    key: str
    name: str
    value: Any
    owner: torch.Tensor | None


class ModuleNode:
    """An ``nn.Module``: parameters, buffers and extra state, by canonical name.

    The state dict is taken when the node is made.
    """

    def __init__(self, path: str, module: nn.Module) -> None:
        self.path = path
        self._module = modules.unwrap(module)
        self._state = _state_dict_of(self._module)
        # What of it is the module's own parameters and buffers: nearly always all.
        self._own_values: list[torch.Tensor] | None = None
        self._are_parameters: list[bool] = []
        self._own = _Described([], [], [])
        self._others: list[tuple[str, str, Any]] = []

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Walk the module's parameters by full name."""
        for name, parameter in modules.named_parameters(self._module):
            yield join(self.path, name), parameter

    def saved_parameters(self, known: KnownTensors) -> Iterator[tuple[str, torch.Tensor]]:
        """Walk those that stand in the state dict as they are: faster."""
        values = self._own_part(known)
        named = zip(self._own.names, values, strict=True)
        return compress(named, self._are_parameters)

    def _own_part(self, known: KnownTensors) -> list[torch.Tensor]:
        """Return the module's own tensors in the state dict; ``_own`` describes them.

        Described once for as long as they stay as they are; see ``known.Seen``.
        """
        if self._own_values is None:
            members = [*self._module.modules()]
            parameters = [*map(id, modules.parameters(members))]
            own_ids = {*parameters, *map(id, modules.buffers(members))}
            is_own = [*map(own_ids.__contains__, map(id, self._state.values()))]
            names = known.full_names(self.path, members, self._state)
            own_names = names if all(is_own) else [*compress(names, is_own)]
            values = [*compress(self._state.values(), is_own)]
            self._are_parameters = [*map({*parameters}.__contains__, map(id, values))]
            # As ids, which tell nothing of objects that are gone, but of these all.
            self._own = known.recall(
                self.path,
                values,
                (own_names, parameters),
                lambda: self._describe(known, own_names, values),
            )
            self._own_values = values
            entries = zip(self._state, names, self._state.values(), strict=True)
            self._others = [*compress(entries, map(not_, is_own))]
        return self._own_values

    def _describe(
        self, known: KnownTensors, names: list[str], values: Sequence[torch.Tensor]
    ) -> _Described:
        described = [*map(known.describe, names, values)]
        memories = set() if all(self._are_parameters) else self._memories()
        kinds = [
            # A buffer may be a view of a parameter; what it is shows in its memory.
            SPLIT if is_parameter or one.identity in memories else WHOLE
            for is_parameter, one in zip(self._are_parameters, described, strict=True)
        ]
        return _Described(names, described, kinds)

    def _memories(self) -> set[object]:
        parameters = modules.parameters(self._module.modules())
        return {tensors.identity_of(parameter) for parameter in parameters}

    def _other_entries(self, known: KnownTensors) -> Iterator[_Other]:
        """Walk what hooks, or a user's own ``state_dict()``, have put there."""
        owners: dict[str, torch.Tensor] | None = None
        for key, name, value in self._others:
            owner = None
            if isinstance(value, torch.Tensor):
                known.describe(name, value)
                if tensors.is_sharded(value):
                    owners = owners or {
                        join(self.path, own): tensor
                        for own, tensor in modules.tensors_by_name(self._module).items()
                    }
                    owner = owners.get(name)
            yield _Other(key, name, value, owner)

    def capture(self, leaves: Leaves) -> None:
        """Add parameters as shared work, buffers whole, extra state as values."""
        values = self._own_part(leaves.known)
        names, known, kinds = self._own
        leaves.add_described(names, values, known, kinds)
        memories: set[object] | None = None
        for _, name, value, owner in self._other_entries(leaves.known):
            if owner is not None:
                leaves.add_parameter(name, value, owner)
            elif not isinstance(value, torch.Tensor):
                leaves.add_value(name, value)
            else:
                # It may be a view of a parameter; what it is shows in its memory.
                memories = self._memories() if memories is None else memories
                if tensors.identity_of(value) in memories:
                    leaves.add_parameter(name, value)
                else:
                    leaves.add_tensor(name, value)

    def plan(self, plan: RestorePlan) -> None:
        """Read into live memory; what is not live goes through load_state_dict."""
        values = self._own_part(plan.known)
        plan.read_described(self._own.names, values, self._own.known)
        memories: set[int] | None = None
        loaded: dict[str, Any] = {}
        for key, name, value, owner in self._other_entries(plan.known):
            if not plan.selects(name):
                continue
            if not isinstance(value, torch.Tensor):
                if plan.saved.has_value(name):
                    loaded[key] = plan.take_value(name, partial(_tensors_in, value, name))
                else:
                    plan.missing(name, "extra state")
                continue
            if tensors.held(value).memory.numel():
                if memories is None:
                    members = [*self._module.modules()]
                    own = [*modules.parameters(members), *modules.buffers(members)]
                    memories = {_storage(tensor) for tensor in own}
                if _storage(value) not in memories:
                    # Made by a hook or an overridden state_dict(): filling it would not
                    # reach the module.
                    value = loaded[key] = tensors.empty_like(value, value.dtype)
            plan.read_into(name, value, owner)
        if loaded:
            plan.finishers.append(
                lambda: _ignore(self._module.load_state_dict(loaded, strict=False))
            )

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Refuse it: no function makes a module."""
        raise _no_function(self.path)


def _no_function(path: str) -> UnsupportedError:
    msg = (
        f"{path}: PerRank with a function is for plain values, tensors and objects with a "
        'state dict, not for modules and optimizers; use resize="by_rank", or "error".'
    )
    return UnsupportedError(msg)


def _state_dict_of(module: nn.Module) -> Mapping[str, Any]:
    # Parameters as they are: detaching a sharded one costs more than all else about it.
    if type(module).state_dict is nn.Module.state_dict:
        return module.state_dict(keep_vars=True)
    return module.state_dict()  # a user's own may take no arguments


def _storage(tensor: torch.Tensor) -> int:
    return tensors.held(tensor).memory.untyped_storage().data_ptr()


def _tensors_in(value: Any, name: str) -> dict[str, torch.Tensor]:
    return dict(tensors_in(value, name))


def _ignore(_: object) -> None:
    """Drop a result."""


class OptimizerNode:
    """An optimizer: state and settings by parameter name, so no order matters.

    State is set directly rather than by ``load_state_dict``, which would cast it to the
    parameter's dtype: fp32 moments of bf16 parameters would come back rounded.
    """

    def __init__(
        self, path: str, optimizer: Optimizer, owners: Owners, per_rank: bool
    ) -> None:
        self.path = path
        self._optimizer = optimizer
        self._owners = owners
        self._per_rank = per_rank

    def _groups(
        self, known: KnownTensors
    ) -> Iterator[tuple[dict[str, Any], list[tuple[str, Any]]]]:
        """Walk ``(group, [(parameter's name, parameter)])``."""
        for index, group in enumerate(self._optimizer.param_groups):
            named = []
            for position, parameter in enumerate(group["params"]):
                owner = self._owners.of(parameter, known)
                if owner is None:
                    msg = (
                        f"{self.path}: parameter {position} of group {index} (shape "
                        f"{tuple(parameter.shape)}) belongs to no tracked module, so its "
                        "state has no name. Track the module that owns it in the same "
                        "Checkpoint."
                    )
                    raise ConfigError(msg)
                if owner.per_rank and not self._per_rank:
                    # Its state would be taken for equal on all ranks and be mixed.
                    msg = (
                        f"{self.path}: optimizes {owner.name}, which each rank has of its "
                        "own; wrap the optimizer in PerRank, too."
                    )
                    raise ConfigError(msg)
                named.append((owner.name, parameter))
            yield group, named
        self._refuse_other_state()

    def _refuse_other_state(self) -> None:
        groups = self._optimizer.param_groups
        known = {id(p) for group in groups for p in group["params"]}
        for key in self._optimizer.state:
            if id(key) not in known:
                msg = (
                    f"{self.path}: has state that belongs to no parameter of its groups "
                    f"(key {type(key).__name__} {key!r:.60}); it has no name to be stored "
                    "under. Keep it in an object of its own with a state_dict()."
                )
                raise UnsupportedError(msg)

    def capture(self, leaves: Leaves) -> None:
        """Add each parameter's state and settings."""
        everything: list[tuple[str, torch.Tensor]] = []
        for index, (group, named) in enumerate(self._groups(leaves.known)):
            settings = _settings(group)
            if not named:
                leaves.add_value(self._empty_group(index), settings)
            leaves.add_values([f"{self.path}/settings/{n}" for n, _ in named], settings)
            everything += named
        # Not state[parameter]: that would add an empty entry.
        states = [self._optimizer.state.get(p, _NO_STATE) for _, p in everything]
        self._capture_states(leaves, everything, states)

    def _capture_states(
        self,
        leaves: Leaves,
        named: Sequence[tuple[str, torch.Tensor]],
        states: Sequence[Mapping[Any, Any]],
    ) -> None:
        values = [value for state in states for value in state.values()]
        are_tensors = [isinstance(value, torch.Tensor) for value in values]
        parameters = [parameter for _, parameter in named]
        tensors_ = [*compress(values, are_tensors)]
        leaves.optimized.update(map(id, parameters), map(id, values))
        described = leaves.known.recall(
            self.path,
            [*parameters, *tensors_],
            ([name for name, _ in named], [[*state] for state in states], are_tensors),
            lambda: self._describe(leaves.known, named, states),
        )
        leaves.add_described(described.names, tensors_, described.known, described.kinds)
        if not all(are_tensors):
            for full, value, parameter in self._walk(named, states):
                if not isinstance(value, torch.Tensor):
                    _refuse_local_parts(full, value, parameter)
                    leaves.add_value(full, value)

    def _describe(
        self,
        known: KnownTensors,
        named: Sequence[tuple[str, torch.Tensor]],
        states: Sequence[Mapping[Any, Any]],
    ) -> _Described:
        described = _Described([], [], [])
        for full, value, parameter in self._walk(named, states):
            if isinstance(value, torch.Tensor):
                _refuse_local_parts(full, value, parameter)
                # A plain one beside a sharded parameter is a step count. Split, such few
                # bytes would lie in all files, and every rank would open all of them to
                # read its own part.
                is_count = tensors.is_sharded(parameter) and not tensors.is_sharded(value)
                described.names.append(full)
                described.known.append(known.describe(full, value))
                described.kinds.append(WHOLE if is_count else SPLIT)
        return described

    def _walk(
        self,
        named: Iterable[tuple[str, torch.Tensor]],
        states: Iterable[Mapping[Any, Any]],
    ) -> Iterator[tuple[str, Any, torch.Tensor]]:
        """Walk ``(full name, value, parameter)``."""
        for (name, parameter), state in zip(named, states, strict=True):
            for key, value in state.items():
                yield join(f"{self.path}/state/{name}", key), value, parameter

    def plan(self, plan: RestorePlan) -> None:
        """Read into state that is there, allocate what is not, drop what is not saved."""
        for index, (group, named) in enumerate(self._groups(plan.known)):
            taken: str | None = None
            if not named:
                self._plan_empty(plan, group, self._empty_group(index))
            for name, parameter in named:
                self._plan_state(plan, group, name, parameter)
                full = f"{self.path}/settings/{name}"
                if not plan.selects(full):
                    continue
                if not plan.saved.has_value(full):
                    plan.missing(full, "an optimized parameter")
                    continue
                if taken is not None and plan.saved.repeats(full, taken):
                    continue
                settings = plan.take_value(full)
                if taken is None:
                    taken = full
                    plan.finishers.append(partial(_set_settings, group, settings))
                elif not plan.saved.same_value(full, taken):
                    plan.problems.append(
                        f"{full}: saved with other settings than the parameters before "
                        f"it, and all are in one group (number {index}) here"
                    )

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Refuse it: no function makes a optimizer."""
        raise _no_function(self.path)

    def _empty_group(self, index: int) -> str:
        return join(f"{self.path}/empty_groups", index)

    def _plan_empty(self, plan: RestorePlan, group: dict[str, Any], name: str) -> None:
        if not plan.selects(name):
            return
        if plan.saved.has_value(name):
            plan.finishers.append(partial(_set_settings, group, plan.take_value(name)))
        else:
            plan.missing(name, "a group without parameters")

    def _plan_state(
        self,
        plan: RestorePlan,
        group: dict[str, Any],
        name: str,
        parameter: torch.Tensor,
    ) -> None:
        live = self._optimizer.state.get(parameter, {})
        prefix = f"{self.path}/state/{name}"
        live_keys = {join(prefix, key): key for key in live}
        state: dict[str, Any] = {}
        for full, key in live_keys.items():
            _refuse_local_parts(full, live[key], parameter)
            if not plan.selects(full):
                state[key] = live[key]
        for full in plan.saved.names_below(prefix):
            key = live_keys.get(full, _key_of(full))
            if full not in plan.saved.rows:
                own = partial(_tensors_in, live.get(key), full)
                state[key] = plan.take_value(full, own)
            elif isinstance(live.get(key), torch.Tensor):
                state[key] = live[key]
                plan.read_into(full, live[key])
            else:
                device = _device_of(key, group, parameter)
                state[key] = plan.read_beside(
                    full, parameter, device, is_count=key in _COUNTS
                )
        plan.finishers.append(partial(self._set_state, parameter, state))

    def _set_state(self, parameter: torch.Tensor, state: dict[str, Any]) -> None:
        if state:
            self._optimizer.state[parameter] = state
        else:
            self._optimizer.state.pop(parameter, None)


_NO_STATE: dict[Any, Any] = {}

# What torch's optimizers keep as plain tensors without dimensions, whatever the parameter
# is; all else they keep like the parameter.
_COUNTS = ("step", "eta", "mu", "mu_product")


def _refuse_local_parts(full_name: str, value: Any, parameter: torch.Tensor) -> None:
    """Refuse plain state of a parameter of which each rank has another part.

    One rank's would be written, and given to all others. A single element is a count.
    """
    if isinstance(value, torch.Tensor) and tensors.is_sharded(value):
        return  # nearly always
    for name, tensor in tensors_in(value, full_name):
        is_local = not tensors.is_sharded(tensor) and tensor.numel() > 1
        if is_local and tensors.is_cut(parameter):
            msg = (
                f"{name}: a plain tensor of shape {list(tensor.shape)} beside a sharded "
                "parameter: each rank holds its own part of it, and nothing tells which. "
                "Keep it as a DTensor, like torch.zeros_like(parameter)."
            )
            raise UnsupportedError(msg)


def _settings(group: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def _set_settings(group: dict[str, Any], settings: dict[str, Any]) -> None:
    for key, value in settings.items():
        live = group.get(key)
        if isinstance(live, torch.Tensor) and isinstance(value, torch.Tensor):
            with torch.no_grad():  # a captured graph may hold the live one
                live.copy_(value)
        else:
            group[key] = value


def _key_of(full_name: str) -> Any:
    return names.key_of(full_name.rpartition("/")[2])


def _device_of(key: Any, group: dict[str, Any], parameter: torch.Tensor) -> torch.device:
    # The rule of torch.optim.Optimizer._process_value_according_to_param_policy.
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return torch.device("cpu")
    return parameter.device


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
        plan.finishers.append(lambda: _ignore(self._stateful.load_state_dict(state)))

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Rebuild all state dicts; load what is made of them."""
        states = _values_of(self.path, plans, type(self._stateful).__name__)
        if states:
            load = self._stateful.load_state_dict
            plans[0].finishers.append(lambda: _ignore(load(resize(states))))

    def _state(self) -> dict[Any, Any]:
        state = self._stateful.state_dict()
        return state if type(state) in (dict, OrderedDict) else dict(state)

    def _live_tensors(self) -> dict[str, torch.Tensor]:
        """Return the tensors of its present state, to take the layout of.

        It may not have one yet, nor anything else than None to return for it.
        """
        state = self._stateful.state_dict()
        return _tensors_in(dict(state), self.path) if isinstance(state, Mapping) else {}


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
