"""Tensors that are made of other tensors, by torch's own protocol for such classes.

``__tensor_flatten__`` says which attributes hold the tensors and what is to be known
besides; ``__tensor_unflatten__`` makes one of them. They are stored as the plain tensors
that they are made of, and a plain value: never as a pickle.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from distckpt import instances, strict_json, values
from distckpt.errors import UnsupportedError
from distckpt.names import inner_name
from distckpt.torch_versions import name_of_dtype
from distckpt.value_tags import TensorRef, Wrapper

# Of torch's own that have the protocol: sharded tensors, which are stored otherwise, and
# those that stand for another tensor while something is under way.
_NOT_MEANT = (
    "torch.distributed.",
    "torch._subclasses.fake_",
    "torch._subclasses.functional_",
)


class Flat(NamedTuple):
    """A tensor, taken apart.

    Attributes:
        wrapper: What it is, and the names of what it is made of.
        inner: The plain or sharded tensors that it is made of, by full name.
    """

    wrapper: Wrapper
    inner: dict[str, torch.Tensor]


def is_wrapper(value: object) -> bool:
    """Tell whether a value is a tensor that is made of others."""
    kind: Any = type(value)
    return kind is not torch.Tensor and _is_wrapper_type(kind)


@lru_cache(maxsize=256)
def _is_wrapper_type(kind: type) -> bool:
    return (
        issubclass(kind, torch.Tensor)
        and kind.__torch_dispatch__ is not torch.Tensor.__torch_dispatch__
        and callable(getattr(kind, "__tensor_flatten__", None))
        and callable(getattr(kind, "__tensor_unflatten__", None))
        and not any(base.__module__.startswith(_NOT_MEANT) for base in kind.__mro__)
    )


def wrapper_types(kinds: set[type]) -> set[type]:
    """Return those of some types whose tensors are made of others."""
    return {kind for kind in kinds if kind is not torch.Tensor and _is_wrapper_type(kind)}


def flattened(name: str, tensor: torch.Tensor) -> Flat:
    """Take a tensor apart, down to plain and sharded ones.

    Raises:
        UnsupportedError: It is more than its inner tensors and plain values.
    """
    inner: dict[str, torch.Tensor] = {}
    return Flat(_flattened(name, tensor, inner), inner)


def _flattened(name: str, tensor: Any, inner: dict[str, torch.Tensor]) -> Wrapper:
    class_name = instances.name_of(type(tensor))
    what = f"tensor {name!r} cannot be stored: it is a {class_name}"
    try:
        attributes, context = tensor.__tensor_flatten__()
    except Exception as error:
        msg = f"{what}, whose __tensor_flatten__() fails: {type(error).__name__}: {error}"
        raise UnsupportedError(msg) from error
    shape, stride = tuple(tensor.shape), tuple(tensor.stride())
    if {*map(type, (*shape, *stride))} - {int}:
        msg = (
            f"{what}, whose rows have different lengths. Store its values() and offsets(), "
            "and make it again of them."
        )
        raise UnsupportedError(msg)
    try:
        encoded = values.encode(context, "context")
    except UnsupportedError as error:
        msg = f"{what}, and what it consists of besides its tensors is not plain: {error}"
        raise UnsupportedError(msg) from error
    found: dict[str, TensorRef | Wrapper] = {}
    for attribute in attributes:
        part = getattr(tensor, attribute)
        part_name = inner_name(name, attribute)
        if not isinstance(part, torch.Tensor):
            msg = f"{what}, whose {attribute!r} is no tensor but a {type(part).__name__}."
            raise UnsupportedError(msg)
        if is_wrapper(part):
            found[attribute] = _flattened(part_name, part, inner)
        else:
            inner[part_name] = part
            found[attribute] = TensorRef(part_name)
    dtype = name_of_dtype(tensor.dtype)
    return Wrapper(class_name, encoded, shape, stride, dtype, tensor.requires_grad, found)


def plain_parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Walk the plain or sharded tensors that a tensor is made of, or itself."""
    if is_wrapper(tensor):
        any_: Any = tensor
        for attribute in any_.__tensor_flatten__()[0]:
            yield from plain_parts(getattr(tensor, attribute))
    else:
        yield tensor


def difference(here: Wrapper, saved: Wrapper) -> str:
    """Say how a live tensor differs from a saved one in all but its elements; or ``""``."""
    for what, there, found in (
        ("class", saved.class_name, here.class_name),
        ("shape", list(saved.shape), list(here.shape)),
        ("dtype", saved.dtype, here.dtype),
        ("tensors inside", sorted(saved.inner), sorted(here.inner)),
    ):
        if there != found:
            return f"{what} {there} in the checkpoint, {found} here"
    if not _is_same(saved.context, here.context):
        contexts = [_shown(wrapper.context) for wrapper in (saved, here)]
        return (
            f"a {here.class_name} of {contexts[0]} in the checkpoint, of {contexts[1]} here"
        )
    for name, one in here.inner.items():
        other = saved.inner[name]
        if isinstance(one, Wrapper) and isinstance(other, Wrapper):
            inner = difference(one, other)
            if inner:
                return f"{name}: {inner}"
        elif isinstance(one, Wrapper) or isinstance(other, Wrapper):
            return f"{name}: on one side a plain tensor, on the other one made of others"
    return ""


def _is_same(one: Any, other: Any) -> bool:
    # As text: to Python 1, 1.0 and True are equal. A device is where a tensor lies, as of
    # any other tensor.
    spelled = (strict_json.dumps(_on_device(context, "")) for context in (one, other))
    return next(spelled) == next(spelled)


def _on_device(context: Any, device: str) -> Any:
    """Return an encoded context with another device in it."""
    if isinstance(context, list):
        return [_on_device(item, device) for item in context]
    if not isinstance(context, dict):
        return context
    if context.keys() == {"$torch"} and context["$torch"][0] == "device":
        return {"$torch": ["device", device]}
    return {key: _on_device(item, device) for key, item in context.items()}


def context_on(wrapper: Wrapper, parts: Mapping[str, Any]) -> Any:
    """Return an encoded context for parts that lie where they lie here."""
    devices = {str(part.device) for part in parts.values()}
    return _on_device(wrapper.context, *devices) if len(devices) == 1 else wrapper.context


def _shown(context: Any) -> str:
    return f"{values.decode(context)!r:.200}"


def loaded_class(class_name: str) -> Any:
    """Return the class of that name, if there is one in this process; imports nothing."""
    found = None
    level: list[type] = [torch.Tensor]
    seen: set[type] = set()
    while level:
        below: list[Any] = []
        for kind in level:
            below += type.__subclasses__(kind)
        level = [kind for kind in dict.fromkeys(below) if kind not in seen]
        seen.update(level)
        for kind in level:
            if instances.name_of(kind) == class_name and _is_wrapper_type(kind):
                found = kind  # of two that were defined one after the other, the later
    return found


def made(
    kind: Any, wrapper: Wrapper, context: Any, parts: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Make a tensor of its parts.

    Args:
        kind: Its class.
        wrapper: What it is.
        context: What ``__tensor_flatten__`` has said besides, decoded.
        parts: The tensors, by attribute.
    """
    with torch.inference_mode(False), torch.no_grad():
        tensor: torch.Tensor = kind.__tensor_unflatten__(
            dict(parts), context, torch.Size(wrapper.shape), wrapper.stride
        )
    if wrapper.requires_grad and not tensor.requires_grad:
        tensor.requires_grad_(True)
    return tensor
