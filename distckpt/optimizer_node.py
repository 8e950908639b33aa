"""Optimizers to named leaves and back."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer

from distckpt import names, tensors, wrapper_tensors
from distckpt.errors import ConfigError, UnsupportedError
from distckpt.known import KnownTensors
from distckpt.layout import SPLIT, WHOLE
from distckpt.leaves import Leaves
from distckpt.module_node import Owners
from distckpt.node import Described, Resized, no_function
from distckpt.optimizers import (
    Stated,
    class_of,
    held_optimizers,
    keep_flags,
    may_have_state,
    memory_of,
    restore_kinds,
    tensors_in_any,
)
from distckpt.restore_plan import RestorePlan
from distckpt.taken import Taken
from distckpt.tensor_paths import join, tensors_in
from distckpt.value_tags import NOTHING


class OptimizerNode:
    """An optimizer: state and settings by parameter name, so no order matters.

    State is set directly rather than by ``load_state_dict``, which would cast it to the
    parameter's dtype: fp32 moments of bf16 parameters would come back rounded. Nothing is
    lost by that, because the optimizer's ``state_dict`` and ``load_state_dict`` are torch's
    and have no hooks; of others see ``OwnOptimizerNode``.

    Args:
        path: Its path.
        optimizer: Itself.
        owners: The tracked modules, which name its parameters.
        per_rank: Whether each rank has another one.
        part: Its number among the parts that have one path.
    """

    def __init__(
        self,
        path: str,
        optimizer: Optimizer,
        owners: Owners,
        per_rank: bool,
        part: int = 0,
    ) -> None:
        self.path = path
        self._optimizer = optimizer
        self._owners = owners
        self._per_rank = per_rank
        self._part = part

    def _groups(self, known: KnownTensors) -> list[_Group]:
        """List the groups with their parameters' names."""
        return [
            _Group(group, self._named(known, index, group["params"]))
            for index, group in enumerate(self._optimizer.param_groups)
        ]

    def _named(
        self, known: KnownTensors, index: int, parameters: Iterable[torch.Tensor]
    ) -> list[tuple[str, torch.Tensor]]:
        named = []
        for position, parameter in enumerate(parameters):
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
        return named

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
        """Add each parameter's state and settings, and the class."""
        groups = self._groups(leaves.known)
        self._refuse_other_state()
        everything: list[tuple[str, torch.Tensor]] = []
        for index, (group, named) in enumerate(groups):
            settings = {**_settings(group), _GROUP: index}
            if not named:
                leaves.add_value(self._empty_group(index), _settings(group))
            leaves.add_values([f"{self.path}/settings/{n}" for n, _ in named], settings)
            everything += named
        states = self._states_of(everything)
        live, described = self._live(leaves.known, everything, states)
        leaves.add_described(described.names, live, described.known, described.kinds)
        leaves.counts.update(compress(described.names, map(WHOLE.__eq__, described.kinds)))
        self._add_optimized(leaves, everything, states)
        if len(live) < sum(map(len, states)):
            for full, value, parameter in self._walk(everything, states):
                if not isinstance(value, torch.Tensor):
                    _refuse_local_parts(full, value, parameter)
                    leaves.add_value(full, value)
                elif wrapper_tensors.is_wrapper(value):
                    _refuse_local_parts(full, value, parameter)
                    leaves.add_parameter(full, value)
        self._add_class(leaves, has_state=any(states))

    def _add_optimized(
        self,
        leaves: Leaves,
        named: Iterable[tuple[str, torch.Tensor]],
        states: Iterable[Mapping[Any, Any]],
    ) -> None:
        leaves.optimized.update(id(parameter) for _, parameter in named)
        leaves.optimized.update(id(value) for state in states for value in state.values())

    def _add_class(self, leaves: Leaves, has_state: bool) -> None:
        name = f"{self.path}/{_CLASS}"
        class_name = class_of(self._optimizer)
        # Parts of one optimizer have one path, and one class.
        if self._part == 0:
            leaves.add_value(name, class_name)
        else:
            first = leaves.values.get(name)
            if first is None or first.tree != class_name:
                msg = (
                    f"{self.path}: parts of different classes: {first and first.tree} and "
                    f"{class_name}. Track them under names of their own."
                )
                raise UnsupportedError(msg)
        if not has_state and may_have_state(self._optimizer):
            leaves.stateless.append(self.path)

    def check_holds_no_other(self, tracked: Collection[int]) -> None:
        """Refuse an optimizer that holds another one whose state would be lost.

        Args:
            tracked: Ids of all optimizers that are tracked.

        Raises:
            UnsupportedError: Names the attribute that holds it.
        """
        for attribute, inner in held_optimizers(self._optimizer):
            if id(inner) not in tracked and not self._has_state_of(inner):
                msg = (
                    f"{self.path}: {type(self._optimizer).__name__} holds another "
                    f"optimizer ({attribute}: {type(inner).__name__}), whose state its "
                    "state_dict() does not have. Track that one as well, under a name of "
                    f"its own: Checkpoint(..., inner_optimizer=optimizer.{attribute})."
                )
                raise UnsupportedError(msg)

    def _has_state_of(self, inner: Optimizer) -> bool:
        # An optimizer of torchao's has no state at all.
        return getattr(inner, "state", None) is self._optimizer.state

    def _states_of(
        self, named: Iterable[tuple[str, torch.Tensor]]
    ) -> list[Mapping[Any, Any]]:
        # Not state[parameter]: that would add an empty entry.
        return [self._optimizer.state.get(p, _NO_STATE) for _, p in named]

    def _live(
        self,
        known: KnownTensors,
        named: Sequence[tuple[str, torch.Tensor]],
        states: Sequence[Mapping[Any, Any]],
    ) -> tuple[list[torch.Tensor], Described]:
        """Return the tensors of the state that are not made of others, and what they are.

        Described once for as long as they stay as they are; see ``known.Seen``.
        """
        values = [value for state in states for value in state.values()]
        are_tensors = [isinstance(value, torch.Tensor) for value in values]
        parameters = [parameter for _, parameter in named]
        wrapper_types = wrapper_tensors.wrapper_types({*map(type, (*values, *parameters))})
        if wrapper_types:
            are_tensors = [
                is_tensor and type(value) not in wrapper_types
                for is_tensor, value in zip(are_tensors, values, strict=True)
            ]
            parameters = [p for p in parameters if type(p) not in wrapper_types]
        live = [*compress(values, are_tensors)]
        described = known.recall(
            (self.path, self._part),
            [*parameters, *live],
            ([name for name, _ in named], [[*state] for state in states], are_tensors),
            lambda: self._describe(known, named, states),
        )
        return live, described

    def _describe(
        self,
        known: KnownTensors,
        named: Sequence[tuple[str, torch.Tensor]],
        states: Sequence[Mapping[Any, Any]],
    ) -> Described:
        described = Described([], [], [])
        for full, value, parameter in self._walk(named, states):
            if isinstance(value, torch.Tensor) and not wrapper_tensors.is_wrapper(value):
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
        groups = self._groups(plan.known)
        self._refuse_other_state()
        self._plan_class(plan)
        is_same_state = self._plan_same_state(
            plan, [n for group in groups for n in group.named]
        )
        divided: dict[int, set[int]] = {}
        for index, (group, named) in enumerate(groups):
            if not is_same_state:
                for name, parameter in named:
                    self._plan_state(plan, group, name, parameter)
            settings = self._plan_settings(plan, index, named, divided, group)
            if settings is not None:
                plan.finish(self.path, partial(_set_settings, group, settings))
        self._report_divided(plan, divided)
        if not plan.saved.names_under(f"{self.path}/"):
            return
        # As load_state_dict does it: some optimizers make there what is not saved.
        everything = {
            "state": self._optimizer.state,
            "param_groups": self._optimizer.param_groups,
        }
        plan.finish(self.path, lambda: self._optimizer.__setstate__(everything))

    def _plan_class(self, plan: RestorePlan) -> None:
        name = f"{self.path}/{_CLASS}"
        saved, here = plan.saved.any_value(name), class_of(self._optimizer)
        plan.saved.take_values([name])
        is_restored = bool(plan.saved.names_under(f"{self.path}/"))
        # There is none of an earlier version, and of what was imported.
        if (
            is_restored
            and saved not in (None, here)
            and not plan.saved.names.excludes(name)
        ):
            plan.problems.append(
                f"{name}: {saved} in the checkpoint, {here} here; if this one can go on "
                f"from its state and settings, exclude {name!r}"
            )

    def _plan_settings(
        self,
        plan: RestorePlan,
        index: int,
        named: Sequence[tuple[str, torch.Tensor]],
        divided: dict[int, set[int]],
        group: Mapping[str, Any],
    ) -> Taken | None:
        """Take a group's settings.

        Args:
            plan: Of the restore.
            index: The group's number here.
            named: Its parameters.
            divided: To be filled: by number of a saved group, those that it became here.
            group: The settings that it has now.

        Returns:
            None if none are restored.
        """
        if not named:
            return self._plan_empty(plan, self._empty_group(index), group)
        taken: str | None = None
        settings: Taken | None = None
        for name, _ in named:
            full = f"{self.path}/settings/{name}"
            if not plan.selects(full):
                continue
            if not plan.saved.has_value(full):
                plan.missing(full, "an optimized parameter")
                continue
            if taken is not None and plan.saved.repeats(full, taken):
                continue
            saved_in = plan.saved.number_in_value(full, _GROUP)
            if saved_in is not None:
                divided.setdefault(saved_in, set()).add(index)
            found = plan.take_value(full, lambda: _settings(group))
            if taken is None:
                taken, settings = full, found
            elif not plan.saved.same_value(full, taken, but=_GROUP):
                plan.problems.append(
                    f"{full}: saved with other settings than the parameters before "
                    f"it, and all are in one group (number {index}) here"
                )
        return settings

    def _report_divided(
        self, plan: RestorePlan, divided: Mapping[int, Collection[int]]
    ) -> None:
        """Report groups that have been split: all parts would get the same settings."""
        for saved_in, indexes in divided.items():
            # What was divided for no other settings may be so.
            if len({_spelled(self._optimizer.param_groups[i]) for i in indexes}) > 1:
                plan.problems.append(
                    f"{self.path}/settings: group {saved_in} of the checkpoint is split "
                    f"into groups {sorted(indexes)} here, and all of these would get its "
                    f"settings; to keep those of the program, exclude "
                    f"'{self.path}/settings'"
                )

    def _plan_same_state(
        self, plan: RestorePlan, named: Sequence[tuple[str, torch.Tensor]]
    ) -> bool:
        """Read into all of the state, if just the same is saved: nearly always."""
        states = self._states_of(named)
        live, described = self._live(plan.known, named, states)
        if len(live) < sum(map(len, states)):
            return False
        if {*described.names} != {*plan.saved.names_under(f"{self.path}/state/")}:
            return False
        plan.read_described(described.names, live, described.known)
        return True

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Refuse it: no function makes an optimizer."""
        raise no_function(self.path)

    def _empty_group(self, index: int) -> str:
        return join(f"{self.path}/empty_groups", index)

    def _plan_empty(
        self, plan: RestorePlan, name: str, group: Mapping[str, Any]
    ) -> Taken | None:
        if not plan.selects(name):
            return None
        if plan.saved.has_value(name):
            return plan.take_value(name, lambda: _settings(group))
        plan.missing(name, "a group without parameters")
        return None

    def _plan_state(
        self,
        plan: RestorePlan,
        group: Mapping[str, Any],
        name: str,
        parameter: torch.Tensor,
    ) -> None:
        live = self._optimizer.state.get(parameter, {})
        state = self._read_state(plan, group, name, parameter, live, reads_into_live=True)
        plan.finish(self.path, partial(self._set_state, parameter, state))

    def _read_state(
        self,
        plan: RestorePlan,
        group: Mapping[str, Any],
        name: str,
        parameter: torch.Tensor,
        live: Mapping[Any, Any],
        reads_into_live: bool,
    ) -> dict[Any, Any]:
        """Return a parameter's state, whose tensors are filled by the time of finishing."""
        prefix = f"{self.path}/state/{name}"
        live_keys = {join(prefix, key): key for key in live}
        state: dict[Any, Any] = {}
        for full, key in live_keys.items():
            _refuse_local_parts(full, live[key], parameter)
            if not plan.selects(full):
                state[key] = live[key]
        for full in plan.saved.names_below(prefix):
            key = live_keys.get(full, _key_of(full))
            is_wrapper = plan.saved.wrapper(full) is not None
            if is_wrapper and tensors.is_sharded(parameter):
                plan.problems.append(
                    f"{full}: a tensor that is made of others in the checkpoint, for a "
                    f"parameter that is sharded here; exclude {full!r}"
                )
                plan.saved.take_value_and_parts(full)
            elif (
                reads_into_live
                and isinstance(live.get(key), torch.Tensor)
                and (is_wrapper or full in plan.saved.rows)
            ):
                state[key] = live[key]
                plan.read_into(full, live[key])
            elif full not in plan.saved.rows:
                own = partial(live.get, key, NOTHING)
                state[key] = plan.take_value(full, own, parameter.device)
            else:
                device = _device_of(key, group, parameter)
                state[key] = plan.read_beside(
                    full, parameter, device, is_count=key in _COUNTS
                )
                plan.check_shape_of_state(full, name, parameter)
        return state

    def _set_state(self, parameter: torch.Tensor, state: dict[Any, Any]) -> None:
        if state:
            self._optimizer.state[parameter] = _made(state)
        else:
            self._optimizer.state.pop(parameter, None)


class OwnOptimizerNode(OptimizerNode):
    """An optimizer that is saved and restored by its own ``state_dict``.

    It overrides ``state_dict`` or ``load_state_dict``, or has hooks for them: a wrapper, an
    optimizer with further state. What ``state_dict()`` says is stored by the names of the
    parameters, and further entries below ``extra``. A restore makes such a state dict and
    loads it, with one copy of the state.

    Args:
        path: Its path.
        optimizer: Itself.
        stated: What its ``state_dict()`` says.
        owners: The tracked modules, which name its parameters.
        per_rank: Whether each rank has another one.
        part: Its number among the parts that have one path.
    """

    def __init__(
        self,
        path: str,
        optimizer: Optimizer,
        stated: Stated,
        owners: Owners,
        per_rank: bool,
        part: int = 0,
    ) -> None:
        super().__init__(path, optimizer, owners, per_rank, part)
        self._stated = stated

    def _groups(self, known: KnownTensors) -> list[_Group]:
        return [
            _Group(stated, self._named(known, index, group["params"]))
            for index, (stated, group) in enumerate(
                zip(self._stated.groups, self._optimizer.param_groups, strict=True)
            )
        ]

    def _refuse_other_state(self) -> None:
        """Refuse nothing: all that its ``state_dict()`` says is stored."""

    def _states_of(
        self, named: Iterable[tuple[str, torch.Tensor]]
    ) -> list[Mapping[Any, Any]]:
        return [self._stated.state_of.get(id(p), _NO_STATE) for _, p in named]

    def _add_optimized(self, *_: object) -> None:
        """Add nothing: a wrapper's step may do more than torch's hooks can see."""

    def _has_state_of(self, inner: Optimizer) -> bool:
        states = getattr(inner, "state", None)
        if not states:
            return True  # not yet: its state_dict() may well name it
        stated = {
            memory_of(tensor)
            for state in (*self._stated.state_of.values(), self._stated.extra)
            for tensor in tensors_in_any(state)
        }
        return stated.issuperset(
            memory_of(tensor)
            for state in states.values()
            for tensor in tensors_in_any(state)
        )

    def capture(self, leaves: Leaves) -> None:
        """Add state, settings and further entries as its ``state_dict()`` says."""
        super().capture(leaves)
        for key, value in self._stated.extra.items():
            leaves.add_value(join(f"{self.path}/{_EXTRA}", key), value)

    def plan(self, plan: RestorePlan) -> None:
        """Make a state dict of the checkpoint's; it is loaded when all is read."""
        groups = self._groups(plan.known)
        self._plan_class(plan)
        state: dict[Any, Any] = {}
        made: list[dict[str, Any]] = []
        divided: dict[int, set[int]] = {}
        flags = [keep_flags({}, group) for group, _ in groups]
        for index, (group, named) in enumerate(groups):
            ids = group["params"]
            for number, (name, parameter) in zip(ids, named, strict=True):
                live = self._stated.state_of.get(id(parameter), _NO_STATE)
                found = self._read_state(
                    plan, group, name, parameter, live, reads_into_live=False
                )
                if found:
                    state[number] = found
            taken = self._plan_settings(plan, index, named, divided, group)
            settings = _settings(group if taken is None else taken.value())
            settings = {**settings, **flags[index]}
            kept = {k: v for k, v in group.items() if k in _NOT_SETTINGS}
            made.append({**settings, **kept})
        self._report_divided(plan, divided)
        extra = self._plan_extra(plan)
        if not plan.saved.names_under(f"{self.path}/"):
            return
        order = [key for key in self._stated.order if key in ("state", "param_groups")]
        whole = {"state": state, "param_groups": made}
        loaded = {**{key: whole[key] for key in order}, **extra}
        plan.finish(self.path, lambda: self._load(loaded))

    def _plan_extra(self, plan: RestorePlan) -> dict[Any, Any]:
        prefix = f"{self.path}/{_EXTRA}"
        extra: dict[Any, Any] = {
            key: value
            for key, value in self._stated.extra.items()
            if not plan.selects(join(prefix, key))
        }
        for full in plan.saved.names_below(prefix):
            key = _key_of(full)
            if full in plan.saved.rows:
                extra[key] = plan.read_whole(full)
            else:
                live = self._stated.extra.get(key)
                extra[key] = plan.take_value(full, partial(_itself, live))
        return extra

    def _load(self, loaded: dict[str, Any]) -> None:
        states = {number: _made(state) for number, state in loaded["state"].items()}
        loaded = {**_made(loaded), "state": states}
        before = [{**group} for group in self._optimizer.param_groups]
        given = {number: {**state} for number, state in loaded["state"].items()}
        numbers = [number for group in loaded["param_groups"] for number in group["params"]]
        self._optimizer.load_state_dict(loaded)
        parameters = [p for group in self._optimizer.param_groups for p in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            self._undo_rounding(parameter, given.get(number, {}))
        for group, old in zip(self._optimizer.param_groups, before, strict=True):
            restore_kinds(group, old)

    def _undo_rounding(self, parameter: torch.Tensor, given: Mapping[Any, Any]) -> None:
        """Set what torch's ``load_state_dict`` has cast to the parameter's dtype."""
        states = getattr(self._optimizer, "state", None)
        state = states.get(parameter) if isinstance(states, Mapping) else None
        if not isinstance(state, dict):
            return
        for key, value in given.items():
            loaded = state.get(key)
            if (
                isinstance(value, torch.Tensor)
                and isinstance(loaded, torch.Tensor)
                and loaded.dtype != value.dtype
                and loaded.dtype == parameter.dtype
                and loaded.shape == value.shape
            ):
                state[key] = value.to(loaded.device)


class _Group(NamedTuple):
    """A group of parameters.

    Attributes:
        settings: The group, as the optimizer or its ``state_dict()`` has it.
        named: Full names of its parameters, and themselves.
    """

    settings: dict[str, Any]
    named: list[tuple[str, torch.Tensor]]


# Entries of an optimizer that are neither state nor settings.
_CLASS, _EXTRA = "class", "extra"

# The number of a parameter's group, among its settings. No setting can be called so.
_GROUP = "params"

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


_NOT_SETTINGS = ("params", "param_names")


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in _NOT_SETTINGS}


def _set_settings(group: dict[str, Any], settings: Taken) -> None:
    """Set a group's settings; flags, and what is a tensor, stay what they are here."""
    before = {**group}
    group.update(_settings(settings.value()))
    restore_kinds(group, before)


def _made(items: Mapping[Any, Any]) -> dict[Any, Any]:
    """Return items, each plain value among them made."""
    return {k: v.value() if isinstance(v, Taken) else v for k, v in items.items()}


def _itself(value: Any) -> Any:
    return value


def _spelled(group: Mapping[str, Any]) -> str:
    return repr(sorted(_settings(group).items(), key=repr))


def _key_of(full_name: str) -> Any:
    return names.key_of(full_name.rpartition("/")[2])


def _device_of(key: Any, group: Mapping[str, Any], parameter: torch.Tensor) -> torch.device:
    # The rule of torch.optim.Optimizer._process_value_according_to_param_policy.
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return torch.device("cpu")
    return parameter.device
