"""Modules to named leaves and back."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, compress
from operator import not_
from typing import Any, NamedTuple

import torch
from torch import nn

from distckpt import modules, tensors, wrapper_tensors
from distckpt.errors import RestoreFailed, UnsupportedError
from distckpt.known import KnownTensors
from distckpt.layout import SPLIT, WHOLE
from distckpt.leaves import Leaves
from distckpt.module_loading import (
    EXTRA_STATE,
    Loading,
    key_maker,
    loading_of,
    metadata_of,
    never_loaded,
    versions_of,
    wrappers_hooks,
)
from distckpt.names import escaped
from distckpt.names import key_of as key_of_part
from distckpt.node import Described, Resized, no_function
from distckpt.parts import NamesOfParts
from distckpt.restore_plan import RestorePlan
from distckpt.taken import Taken
from distckpt.tensor_paths import join

_VERSIONS = "versions"


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


class _Wrapped(NamedTuple):
    """A parameter or buffer that is made of other tensors.

    Attributes:
        key: In the state dict.
        tensor: Itself.
        is_parameter: Whether it is one.
    """

    key: str
    tensor: torch.Tensor
    is_parameter: bool


class ModuleNode:
    """An ``nn.Module``: parameters, buffers and extra state, by canonical name.

    The state dict is taken when the node is made.

    Args:
        path: Its path.
        module: Itself.
        names_of_parts: The names of all modules that have one path; None for one module.
        is_trainable_only: Leave frozen parameters out; see ``Trainable``.
    """

    def __init__(
        self,
        path: str,
        module: nn.Module,
        names_of_parts: NamesOfParts | None = None,
        is_trainable_only: bool = False,
    ) -> None:
        self.path = path
        self._outer = module
        self._module = modules.unwrap(module)
        self._names_of_parts = names_of_parts
        self._state = _state_dict_of(self._module)
        if is_trainable_only:
            self._state = _without_frozen(self._module, self._state)
        if names_of_parts is not None:
            canonical = modules.CanonicalNames(self._module)
            names = [f"{path}/{escaped(canonical[key])}" for key in self._state]
            names_of_parts.add(id(self), names)
        # What of it is the module's own parameters and buffers: nearly always all.
        self._own_values: list[torch.Tensor] | None = None
        # Those of them that are made of other tensors, by full name.
        self._wrappers: dict[str, _Wrapped] = {}
        self._own_keys: list[str] = []
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
        own = dict(zip(self._own.names, values, strict=True))
        return {**own, **{name: one.tensor for name, one in self._wrappers.items()}}

    def saved_parameters(self, known: KnownTensors) -> Iterator[tuple[str, torch.Tensor]]:
        """Walk those that stand in the state dict as they are: faster."""
        values = self._own_part(known)
        named = zip(self._own.names, values, strict=True)
        yield from compress(named, self._are_parameters)
        for name, one in self._wrappers.items():
            if one.is_parameter:
                yield name, one.tensor

    def names_by_memory(self, known: KnownTensors) -> Iterator[tuple[object, str]]:
        """Walk what tensors of an overridden ``state_dict()`` share with others, and names.

        A wrapper that leaves its prefix out of the names gives parameters so.
        """
        self._own_part(known)
        for _, name, value in self._others:
            if isinstance(value, torch.Tensor):
                identity = known.describe(name, value).identity
                if identity is not None:
                    yield identity, name

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
            if wrapper_tensors.wrapper_types({*map(type, self._state.values())}):
                entries = zip(self._state, names, self._state.values(), strict=True)
                for index, (key, name, value) in enumerate(entries):
                    if is_own[index] and wrapper_tensors.is_wrapper(value):
                        is_parameter = id(value) in parameters
                        self._wrappers[name] = _Wrapped(key, value, is_parameter)
                own_ids.difference_update(id(one.tensor) for one in self._wrappers.values())
                is_own = [*map(own_ids.__contains__, map(id, self._state.values()))]
            own_names = names if all(is_own) else [*compress(names, is_own)]
            values = [*compress(self._state.values(), is_own)]
            self._are_parameters = [*map({*parameters}.__contains__, map(id, values))]
            # As ids, which tell nothing of objects that are gone, but of these all.
            self._own = known.recall(
                (self.path, id(self._module)),
                values,
                (own_names, parameters),
                lambda: self._describe(known, own_names, values),
            )
            self._own_values = values
            self._own_keys = [*compress(self._state, is_own)]
            entries = zip(self._state, names, self._state.values(), strict=True)
            self._others = [
                entry
                for entry in compress(entries, map(not_, is_own))
                if entry[1] not in self._wrappers
            ]
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

    def _is_buffer(self, value: torch.Tensor) -> bool:
        """Tell whether a tensor that an overridden ``state_dict()`` made is a buffer's."""
        memories = _storages([value])
        return bool(memories) and memories <= _storages(
            modules.buffers(self._module.modules())
        )

    def _memories(self) -> set[object]:
        parameters = modules.parameters(self._module.modules())
        return {
            tensors.identity_of(part)
            for parameter in parameters
            for part in wrapper_tensors.plain_parts(parameter)
        }

    def _other_entries(self, known: KnownTensors) -> Iterator[_Other]:
        """Walk what hooks, or a user's own ``state_dict()``, have put there."""
        owners: dict[str, torch.Tensor] | None = None
        for key, name, value in self._others:
            owner = None
            if isinstance(value, torch.Tensor) and not wrapper_tensors.is_wrapper(value):
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
        self._check_is_loadable()
        self._add_versions(leaves)
        names, known, kinds = self._own
        leaves.add_described(names, values, known, kinds)
        leaves.buffers.update(compress(names, map(WHOLE.__eq__, kinds)))
        for name, one in self._wrappers.items():
            if one.is_parameter:
                leaves.add_parameter(name, one.tensor)
            else:
                self._add_buffer(leaves, name, one.tensor)
        memories: set[object] | None = None
        for _, name, value, owner in self._other_entries(leaves.known):
            if owner is not None:
                leaves.add_parameter(name, value, owner)
            elif not isinstance(value, torch.Tensor):
                leaves.add_value(name, value)
            else:
                # It may be a view of a parameter; what it is shows in its memory.
                memories = self._memories() if memories is None else memories
                parts = wrapper_tensors.plain_parts(value)
                if {*map(tensors.identity_of, parts)} <= memories:
                    leaves.add_parameter(name, value)
                elif self._is_buffer(value):
                    self._add_buffer(leaves, name, value)
                else:
                    leaves.add_tensor(name, value)

    def _add_buffer(self, leaves: Leaves, name: str, value: torch.Tensor) -> None:
        num_tensors = len(leaves.tensors)
        leaves.add_tensor(name, value)
        leaves.buffers.update([*leaves.tensors][num_tensors:])

    def never_loaded(self) -> list[str]:
        """Return the entries of its state dict that it would not take back.

        Once it has been captured or planned.
        """
        if not self._others:
            return []
        prefix = f"{self.path}/"
        names = [str(key_of_part(name.removeprefix(prefix))) for _, name, _ in self._others]
        return never_loaded(self._module, names)

    def _check_is_loadable(self) -> None:
        """Refuse a state dict that the module would not take back."""
        lost = self.never_loaded()
        if lost:
            msg = (
                f"{self.path}: its state dict has entries that its load_state_dict() does "
                f"not take: {', '.join(lost[:8])}{_more(lost)}. Restored without them the "
                "module would be another one. Track the submodules that can be restored, "
                "for instance those that are trained."
            )
            raise UnsupportedError(msg)

    def _add_versions(self, leaves: Leaves) -> None:
        versions = versions_of(self._module, map(type, self._module.modules()))
        if versions:
            # Of another part with this path.
            before = leaves.values.pop(self.path, None)
            if before is not None:
                versions = {**before.tree[_VERSIONS], **versions}
            leaves.add_value(self.path, {_VERSIONS: versions})

    def plan(self, plan: RestorePlan) -> None:
        """Read into live memory; what else is to be done, ``load_state_dict`` does."""
        values = self._own_part(plan.known)
        loading = loading_of(self.path, self._module)
        hooks = self._hooks_of_wrappers()
        versions = self._saved_versions(plan)
        if not self._others and not loading.must_run:
            plan.read_described(self._own.names, values, self._own.known)
            for name, one in self._wrappers.items():
                plan.read_into(name, one.tensor)
        else:
            loaded: dict[str, Any] = dict(zip(self._own_keys, values, strict=True))
            loaded.update((one.key, one.tensor) for one in self._wrappers.values())
            self._plan_own(plan, loading, values)
            self._plan_others(plan, loading, loaded)
            if loading.scopes:
                self._plan_scopes(plan, loading, loaded)
            if self._is_selected(plan):
                plan.finish(self.path, lambda: self._load(loading, loaded, versions))
        if hooks and self._is_selected(plan):
            for hook in hooks:
                plan.finish(self.path, hook)

    def _saved_versions(self, plan: RestorePlan) -> dict[str, int] | None:
        """Return the versions of members as they were saved; None if it was not told."""
        if not plan.saved.knows_kinds:
            return None
        value = plan.saved.any_value(self.path)
        if not isinstance(value, dict) or value.keys() != {_VERSIONS}:
            return {}
        plan.saved.take_values([self.path])
        versions: dict[str, int] = value[_VERSIONS]
        return versions

    def _is_selected(self, plan: RestorePlan) -> bool:
        others = (name for _, name, _ in self._others)
        names = chain(self._own.names, self._wrappers, others)
        return any(map(plan.selects, names))

    def _hooks_of_wrappers(self) -> list[Callable[[], object]]:
        try:
            return wrappers_hooks(self._outer)
        except LookupError as error:
            msg = (
                f"{self.path}: the wrapper {error} has a hook before load_state_dict(), or "
                "overrides it, and would see names with its prefix. Register the hook on "
                "the wrapped module."
            )
            raise UnsupportedError(msg) from None

    def _plan_own(
        self, plan: RestorePlan, loading: Loading, values: Sequence[torch.Tensor]
    ) -> None:
        """Read what other load code does not have to see into its memory."""
        for name, one in self._wrappers.items():
            if not loading.covers(name):
                plan.read_into(name, one.tensor)
        if not loading.scopes:
            plan.read_described(self._own.names, values, self._own.known)
            return
        entries = zip(self._own.names, values, self._own.known, strict=True)
        outside = [entry for entry in entries if not loading.covers(entry[0])]
        plan.read_described(
            [name for name, _, _ in outside],
            [value for _, value, _ in outside],
            [known for _, _, known in outside],
        )

    def _plan_others(
        self, plan: RestorePlan, loading: Loading, loaded: dict[str, Any]
    ) -> None:
        """Read what hooks, or an overridden ``state_dict()``, have put there."""
        memories: set[int] | None = None
        for key, name, value, owner in self._other_entries(plan.known):
            if not plan.selects(name):
                continue
            loaded[key] = value
            if loading.covers(name):
                continue
            if key.rpartition(".")[2] == EXTRA_STATE:
                self._plan_extra_state(plan, key, name, value, loaded)
            elif not isinstance(value, torch.Tensor):
                if plan.saved.has_value(name):
                    loaded[key] = plan.take_value(name, partial(_itself, value))
                else:
                    plan.missing(name, "a plain value in the state dict")
            else:
                if memories is None:
                    members = [*self._module.modules()]
                    own = [*modules.parameters(members), *modules.buffers(members)]
                    memories = _storages(own)
                if not _storages([value]) <= memories:
                    # Made by a hook or an overridden state_dict(): filling it would
                    # not reach the module.
                    if wrapper_tensors.is_wrapper(value) and plan.saved.wrapper(name):
                        loaded[key] = plan.take_value(name, partial(_itself, value))
                        continue
                    if not wrapper_tensors.is_wrapper(value):
                        value = loaded[key] = tensors.empty_like(value, value.dtype)
                plan.read_into(name, value, owner)

    def _plan_extra_state(
        self,
        plan: RestorePlan,
        key: str,
        name: str,
        value: Any,
        loaded: dict[str, Any],
    ) -> None:
        """Read extra state as it was saved: its type and size may change in use."""
        if name in plan.saved.rows:
            like = value if isinstance(value, torch.Tensor) else None
            device = None if like is None else like.device
            loaded[key] = plan.read_for_loading(name, like, device)
        elif plan.saved.has_value(name):
            loaded[key] = plan.take_value(name, partial(_itself, value))
        else:
            plan.missing(name, "extra state")

    def _plan_scopes(
        self, plan: RestorePlan, loading: Loading, loaded: dict[str, Any]
    ) -> None:
        """Read what other load code has to see, under the names that were saved."""
        key_of = dict(zip(self._own.names, self._own_keys, strict=True))
        key_of.update((name, one.key) for name, one in self._wrappers.items())
        key_of.update((name, key) for key, name, _ in self._others)
        live = {name: self._state[key] for name, key in key_of.items()}
        for name, key in key_of.items():
            if loading.covers(name) and plan.selects(name):
                del loaded[key]
        make_key = key_maker(self._module, self._state)
        parameters = modules.parameters(self._module.modules())
        devices = {tensor.device for tensor in parameters}
        device = devices.pop() if len(devices) == 1 else None
        prefix = f"{self.path}/"
        for name in plan.saved.names_under(prefix):
            if not loading.covers(name) or self._is_of_other_part(name):
                continue
            if "/" in name.removeprefix(prefix):
                continue  # a tensor in a value, which brings it
            key = key_of.get(name) or make_key(str(key_of_part(name.removeprefix(prefix))))
            like = live.get(name)
            if name not in plan.saved.rows:
                where = like.device if isinstance(like, torch.Tensor) else device
                loaded[key] = plan.take_value(name, partial(_itself, like), where)
                continue
            if not isinstance(like, torch.Tensor):
                like = self._like_of_renamed(plan, name, live)
            where = device if like is None else like.device
            loaded[key] = plan.read_for_loading(name, like, where)

    def _is_of_other_part(self, name: str) -> bool:
        names = self._names_of_parts
        return names is not None and names.is_of_other(id(self), name)

    def _like_of_renamed(
        self, plan: RestorePlan, name: str, live: Mapping[str, Any]
    ) -> torch.Tensor | None:
        """Return a sharded tensor that an entry may become, once it is renamed.

        Only a sharded one can be copied into a sharded parameter.
        """
        row = plan.saved.rows[name]
        return next(
            (
                tensor
                for other, tensor in live.items()
                if isinstance(tensor, torch.Tensor)
                and tensors.is_sharded(tensor)
                and tuple(tensor.shape) == row.shape
                and other not in plan.saved.rows
            ),
            None,
        )

    def _load(
        self,
        loading: Loading,
        loaded: dict[str, Any],
        versions: Mapping[str, int] | None,
    ) -> None:
        """Load a whole state dict: what was filled in place is handed over as it is."""
        wanted = {*self._own_keys, *loaded}
        state = OrderedDict(
            (key, value.value() if isinstance(value, Taken) else value)
            for key, value in loaded.items()
        )
        state._metadata = metadata_of(self._module, versions)  # type: ignore[attr-defined]
        if loading.is_overridden:
            self._module.load_state_dict(state)
        else:
            result = self._module.load_state_dict(state, strict=False)
            lost = result.unexpected_keys
            missing = [key for key in result.missing_keys if key in wanted]
            if lost or missing:
                msg = (
                    f"{self.path}: load_state_dict() of {type(self._module).__name__} did "
                    f"not take {lost[:8]} and misses {missing[:8]}."
                )
                raise RestoreFailed(msg)

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Refuse it: no function makes a module."""
        raise no_function(self.path)


def _state_dict_of(module: nn.Module) -> Mapping[str, Any]:
    # Parameters as they are: detaching a sharded one costs more than all else about it.
    if type(module).state_dict is nn.Module.state_dict:
        return module.state_dict(keep_vars=True)
    return module.state_dict()  # a user's own may take no arguments


def _without_frozen(module: nn.Module, state: Mapping[str, Any]) -> dict[str, Any]:
    """Leave frozen parameters out of a state dict, and what is said of them there."""
    own = [*modules.parameters(module.modules())]
    frozen = {id(parameter) for parameter in own if not parameter.requires_grad}
    # An overridden state_dict() may give detached ones.
    memories = {
        tensors.identity_of(parameter)
        for parameter in own
        if not parameter.requires_grad and _is_plain(parameter)
    }
    memories.discard(None)
    keys = [
        key
        for key, value in state.items()
        if id(value) in frozen
        or (
            isinstance(value, torch.Tensor)
            and _is_plain(value)
            and tensors.identity_of(value) in memories
        )
    ]
    # A quantized parameter has entries of its own: "weight.absmax" next to "weight".
    below = tuple(f"{key}." for key in keys)
    left_out = {*keys}
    return {
        key: value
        for key, value in state.items()
        if key not in left_out and not (below and key.startswith(below))
    }


def _is_plain(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor has memory of its own to be known by."""
    is_subclass = type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
    return not is_subclass and not tensor.is_meta


def _more(names: Sequence[str]) -> str:
    return f" and {len(names) - 8} more" if len(names) > 8 else ""


def _storages(many: Iterable[torch.Tensor]) -> set[int]:
    """Return where the memory of tensors begins; nothing for those without elements."""
    held = (
        tensors.held(part).memory
        for tensor in many
        for part in wrapper_tensors.plain_parts(tensor)
    )
    return {memory.untyped_storage().data_ptr() for memory in held if memory.numel()}


def _itself(value: Any) -> Any:
    return value


class Owner(NamedTuple):
    """The tracked module that a parameter belongs to.

    Attributes:
        name: Full name of the parameter.
        per_rank: Whether the module is each rank's own.
    """

    name: str
    per_rank: bool


class Owners:
    """Which tracked module each parameter belongs to, or under which name it is tracked."""

    def __init__(self) -> None:
        self._nodes: list[tuple[ModuleNode, bool]] = []
        self._tensors: dict[int, Owner] = {}
        self._owner_of: dict[int, Owner] | None = None
        self._by_memory: dict[object, Owner] = {}
        self._is_complete = False

    def add(self, node: ModuleNode, per_rank: bool) -> None:
        """Note a tracked module."""
        self._nodes.append((node, per_rank))

    def add_tensor(self, path: str, tensor: torch.Tensor, per_rank: bool) -> None:
        """Note a tensor that is tracked itself: adapters in a dict, for instance."""
        self._tensors.setdefault(id(tensor), Owner(path, per_rank))

    def of(self, parameter: torch.Tensor, known: KnownTensors) -> Owner | None:
        """Return the first tracked module that has a parameter; else where it is itself."""
        if self._owner_of is None:  # only optimizers ask
            self._owner_of = self._map(lambda node: node.saved_parameters(known))
            for node, per_rank in self._nodes:
                for memory, name in node.names_by_memory(known):
                    self._by_memory.setdefault(memory, Owner(name, per_rank))
        owner = self._owner_of.get(id(parameter)) or self._tensors.get(id(parameter))
        if owner is None and self._by_memory:
            owner = self._by_memory.get(tensors.identity_of(parameter))
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
