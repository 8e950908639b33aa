"""The tensors in plain values, by the names under which they are stored."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from distckpt import instances, wrapper_tensors
from distckpt.errors import UnsupportedError
from distckpt.names import part_of

# Most of what is large are lists of these.
_WITHOUT_TENSORS = frozenset((type(None), bool, int, float, complex, str, bytes))


def join(*parts: object) -> str:
    """Build a name from a path that is a name already and keys below it."""
    first, *keys = parts
    return "/".join([str(first), *(key_text(key, str(first)) for key in keys)])


def key_text(key: object, path: str) -> str:
    """Spell one key of a container."""
    if type(key) is str or type(key) is int:
        return part_of(key)
    msg = f"{path}: a key of type {type(key).__name__}; only str and int keys are tracked."
    raise UnsupportedError(msg)


def tensors_in(
    value: Any, name: str, depth: int = 64
) -> Iterator[tuple[str, torch.Tensor]]:
    """Walk the tensors in a plain value, by the names that ``add_value`` gives them."""
    if isinstance(value, torch.Tensor):
        yield name, value
        return
    if depth == 0 or isinstance(value, (set, frozenset)):
        return
    for key, item in instances.children_of(value):
        if type(item) not in _WITHOUT_TENSORS and has_tensor(item, depth - 1):
            yield from tensors_in(item, join(name, key), depth - 1)


def has_tensor(value: Any, depth: int = 64) -> bool:
    """Tell whether a tensor stands in a tree of containers that ``values`` can encode."""
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0:
        return False
    if type(value) in (list, tuple, dict):
        items = value.values() if type(value) is dict else value
        if {*map(type, items)} <= _WITHOUT_TENSORS:
            return False
    return any(
        has_tensor(item, depth - 1)
        for _, item in instances.children_of(value)
        if type(item) not in _WITHOUT_TENSORS
    )


def live_tensors(value: Any, name: str) -> dict[str, torch.Tensor]:
    """Return the tensors in a plain value, by the names that they are saved under.

    Of one that is made of others, these.
    """
    found: dict[str, torch.Tensor] = {}
    for full, tensor in tensors_in(value, name):
        if wrapper_tensors.is_wrapper(tensor):
            try:
                found.update(wrapper_tensors.flattened(full, tensor).inner)
            except UnsupportedError:
                continue  # nothing is saved that could be read into it
        else:
            found[full] = tensor
    return found
