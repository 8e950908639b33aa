"""Optimizers: what they say of their state, and how their settings are set.

Everything that depends on torch's ``Optimizer`` and on how libraries wrap it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim import SGD, Optimizer

from distckpt import tensors, wrapper_tensors

# How the program computes a step, not what it computes: never taken from a checkpoint.
_FLAGS = ("foreach", "fused", "capturable", "differentiable")

_HOOKS = (
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


def says_all(optimizer: Optimizer) -> bool:
    """Tell whether ``state`` and ``param_groups`` are all that its state dict says.

    That is so unless its class, or itself, overrides ``state_dict`` or ``load_state_dict``,
    or has hooks for them.
    """
    kind = type(optimizer)
    own = vars(optimizer)
    return (
        kind.state_dict is Optimizer.state_dict
        and kind.load_state_dict is Optimizer.load_state_dict
        and "state_dict" not in own
        and "load_state_dict" not in own
        and not any(own.get(hooks) for hooks in _HOOKS)
        and isinstance(own.get("state"), Mapping)
        and isinstance(own.get("param_groups"), list)
    )


@dataclass(frozen=True, slots=True)
class Stated:
    """A state dict of torch's form.

    Attributes:
        groups: Its groups, in the order of the optimizer's.
        state_of: State by the id of the parameter.
        extra: What else stands in it.
        order: Its keys.
    """

    groups: list[dict[str, Any]]
    state_of: dict[int, Mapping[Any, Any]]
    extra: dict[Any, Any]
    order: list[Any]

    @staticmethod
    def of(optimizer: Optimizer, said: Any) -> Stated | None:
        """Read what a ``state_dict()`` has returned; None if its form is another one."""
        if not isinstance(said, Mapping):
            return None
        state, groups = said.get("state"), said.get("param_groups")
        live = getattr(optimizer, "param_groups", None)
        if not isinstance(state, Mapping) or not isinstance(groups, (list, tuple)):
            return None
        if not isinstance(live, (list, tuple)) or len(live) != len(groups):
            return None
        parameter_of: dict[Any, torch.Tensor] = {}
        for stated, group in zip(groups, live, strict=True):
            ids = stated.get("params") if isinstance(stated, dict) else None
            if not isinstance(ids, (list, tuple)) or len(ids) != len(group["params"]):
                return None
            parameter_of.update(zip(ids, group["params"], strict=True))
        known = all(
            key in parameter_of and isinstance(entries, Mapping)
            for key, entries in state.items()
        )
        if not known:
            return None
        return Stated(
            groups=[*groups],
            state_of={id(parameter_of[key]): entries for key, entries in state.items()},
            extra={k: v for k, v in said.items() if k not in ("state", "param_groups")},
            order=[*said],
        )


def class_of(optimizer: Optimizer) -> str:
    """Return the name of an optimizer's class, below wrappers that only pass calls on."""
    # Accelerate's and Lightning's wrappers have the wrapped one as an attribute.
    for _ in range(8):
        inner = getattr(optimizer, "optimizer", None)
        if (
            not isinstance(inner, Optimizer)
            or inner.param_groups is not optimizer.param_groups
        ):
            break
        optimizer = inner
    return type(optimizer).__qualname__


def may_have_state(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer keeps state once it has stepped, as far as one can tell."""
    groups = optimizer.param_groups
    if not any(p.requires_grad for group in groups for p in group["params"]):
        return False
    if type(optimizer) is SGD:
        return any(group["momentum"] for group in groups)
    return True


def held_optimizers(optimizer: Optimizer) -> Iterator[tuple[str, Optimizer]]:
    """Walk the optimizers in an optimizer's attributes, by the name of the attribute."""
    for name, value in vars(optimizer).items():
        if isinstance(value, Optimizer) and value is not optimizer:
            yield name, value
        elif isinstance(value, (list, tuple, dict)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                if isinstance(item, Optimizer) and item is not optimizer:
                    yield f"{name}[{key!r}]", item


def tensors_in_any(value: Any, depth: int = 16) -> Iterator[torch.Tensor]:
    """Walk the tensors in a tree of containers."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in_any(item, depth - 1)
    elif depth and isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in_any(item, depth - 1)


def memory_of(tensor: torch.Tensor) -> object:
    """Return what is equal for two tensors on the same memory."""
    memories = [tensors.held(part).memory for part in wrapper_tensors.plain_parts(tensor)]
    found = tuple(memory.data_ptr() if memory.numel() else None for memory in memories)
    return found[0] if len(found) == 1 else found


def keep_flags(settings: dict[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with the flags of a live group, which say how a step is computed."""
    return {**settings, **{flag: group[flag] for flag in _FLAGS if flag in group}}


def restore_kinds(group: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Give settings that were just loaded the kinds that they had before.

    A flag keeps its value. A tensor stays the same object and is filled: a captured graph
    or a compiled step may hold it. A number stays a number.
    """
    for key, old in before.items():
        if key in _FLAGS:
            group[key] = old
        elif key not in ("params", "param_names") and key in group:
            group[key] = _like(old, group[key])


def _like(old: Any, new: Any) -> Any:
    if isinstance(old, torch.Tensor):
        if new is old:
            return old
        if isinstance(new, torch.Tensor) and new.shape == old.shape:
            with torch.no_grad():
                old.copy_(new)
            return old
        if type(new) in (int, float):
            with torch.no_grad():
                old.fill_(new)
            return old
        return new
    if type(old) in (int, float) and isinstance(new, torch.Tensor) and new.numel() == 1:
        return new.item()
    if type(old) is type(new) and type(old) in (tuple, list) and len(old) == len(new):
        return type(old)(map(_like, old, new))
    return new
