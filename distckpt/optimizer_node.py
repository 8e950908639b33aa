"""Optimizers to named leaves and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import compress
from typing import Any

import torch
from torch.optim import Optimizer

from distckpt import names, tensors
from distckpt.errors import ConfigError, UnsupportedError
from distckpt.known import KnownTensors
from distckpt.layout import SPLIT, WHOLE
from distckpt.leaves import Leaves, join, tensors_in
from distckpt.module_node import Owners
from distckpt.node import Described, Resized, live_tensors, no_function
from distckpt.restore_plan import RestorePlan


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
        states = self._states_of(everything)
        live, described = self._live(leaves.known, everything, states)
        leaves.add_described(described.names, live, described.known, described.kinds)
        leaves.optimized.update(id(parameter) for _, parameter in everything)
        leaves.optimized.update(id(value) for state in states for value in state.values())
        if len(live) < sum(map(len, states)):
            for full, value, parameter in self._walk(everything, states):
                if not isinstance(value, torch.Tensor):
                    _refuse_local_parts(full, value, parameter)
                    leaves.add_value(full, value)

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
        """Return all tensors of the state, and what they are.

        Described once for as long as they stay as they are; see ``known.Seen``.
        """
        values = [value for state in states for value in state.values()]
        are_tensors = [isinstance(value, torch.Tensor) for value in values]
        live = [*compress(values, are_tensors)]
        described = known.recall(
            self.path,
            [*(parameter for _, parameter in named), *live],
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
        groups = [*self._groups(plan.known)]
        is_same_state = self._plan_same_state(
            plan, [n for _, named in groups for n in named]
        )
        for index, (group, named) in enumerate(groups):
            taken: str | None = None
            if not named:
                self._plan_empty(plan, group, self._empty_group(index))
            for name, parameter in named:
                if not is_same_state:
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

    def _plan_same_state(
        self, plan: RestorePlan, named: Sequence[tuple[str, torch.Tensor]]
    ) -> bool:
        """Read into all of the state, if just the same is saved: nearly always."""
        states = self._states_of(named)
        if not all(isinstance(v, torch.Tensor) for s in states for v in s.values()):
            return False
        live, described = self._live(plan.known, named, states)
        if {*described.names} != {*plan.saved.names_under(f"{self.path}/state/")}:
            return False
        plan.read_described(described.names, live, described.known)
        return True

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Refuse it: no function makes an optimizer."""
        raise no_function(self.path)

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
                own = partial(live_tensors, live.get(key), full)
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
