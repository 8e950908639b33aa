"""Modules to named leaves and back."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import compress
from operator import not_
from typing import Any, NamedTuple

import torch
from torch import nn

from distckpt import modules, tensors
from distckpt.known import KnownTensors
from distckpt.layout import SPLIT, WHOLE
from distckpt.leaves import Leaves, join
from distckpt.node import Described, Resized, live_tensors, no_function
from distckpt.restore_plan import RestorePlan


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
        self._own = Described([], [], [])
        self._others: list[tuple[str, str, Any]] = []

    def named_parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Walk the module's parameters by full name."""
        for name, parameter in modules.named_parameters(self._module):
            yield join(self.path, name), parameter

    def own_tensors(self, known: KnownTensors) -> dict[str, torch.Tensor]:
        """Return the module's own tensors in the state dict, by full name."""
        values = self._own_part(known)
        return dict(zip(self._own.names, values, strict=True))

    def other_tensors(self, known: KnownTensors) -> list[str]:
        """Name the tensors that hooks, or a user's own ``state_dict()``, have put there."""
        self._own_part(known)
        return [name for _, name, value in self._others if isinstance(value, torch.Tensor)]

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
    ) -> Described:
        described = [*map(known.describe, names, values)]
        memories = set() if all(self._are_parameters) else self._memories()
        kinds = [
            # A buffer may be a view of a parameter; what it is shows in its memory.
            SPLIT if is_parameter or one.identity in memories else WHOLE
            for is_parameter, one in zip(self._are_parameters, described, strict=True)
        ]
        return Described(names, described, kinds)

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
                    loaded[key] = plan.take_value(name, partial(live_tensors, value, name))
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
            plan.finishers.append(partial(self._load, loaded))

    def _load(self, state: dict[str, Any]) -> None:
        self._module.load_state_dict(state, strict=False)

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Refuse it: no function makes a module."""
        raise no_function(self.path)


def _state_dict_of(module: nn.Module) -> Mapping[str, Any]:
    # Parameters as they are: detaching a sharded one costs more than all else about it.
    if type(module).state_dict is nn.Module.state_dict:
        return module.state_dict(keep_vars=True)
    return module.state_dict()  # a user's own may take no arguments


def _storage(tensor: torch.Tensor) -> int:
    return tensors.held(tensor).memory.untyped_storage().data_ptr()


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
