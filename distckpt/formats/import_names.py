"""What the parts of another program's state dict are called in a checkpoint.

By their shape: a dict of tensors is a module's, one with ``state`` and ``param_groups`` an
optimizer's, and anything else is a plain value with tensors in it, as what has a state dict
of its own is stored.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from distckpt import names, values
from distckpt.errors import ConfigError, UnsupportedError
from distckpt.formats.foreign import Tensor
from distckpt.formats.optimizers import SETTINGS, STATE
from distckpt.value_tags import TensorRef
from distckpt.values import as_state

_GROUPS = "param_groups"
_EXTRA = "_extra_state"
_DEFAULT_OBJECT = "model"


@dataclass(slots=True)
class Named:
    """Tensors and plain values by the names that they get.

    Attributes:
        tensors: Tensors by full name.
        values: Plain values by full name, encoded.
        ties: Names of tensors that are the same memory as another, with that one's name,
            which stands before it.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    ties: dict[str, str] = field(default_factory=dict)


def named(
    tree: Mapping[Any, Any],
    *,
    tracked_object: str | None = None,
    renamed: Mapping[str, str] | None = None,
    module: str | None = None,
    ties: Mapping[str, str] | None = None,
) -> Named:
    """Name everything in a tree.

    Args:
        tree: What is imported.
        tracked_object: All of it is the state of one object of this name. None: each key
            names an object, or, if there are tensors alone, all of them are ``model``'s;
            but if each has a ``/`` in its name, these are full names.
        renamed: New names for keys of the tree.
        module: The module whose parameters the optimizers have; None: the only one that
            has them all, or ``model``.
        ties: Full names of tensors that are to be the same memory as others, which they
            are in the live objects. One that the source does not have is added.

    Raises:
        ConfigError: It cannot be told which module an optimizer belongs to; or two tensors
            cannot be one.
        UnsupportedError: Something has no place in a checkpoint.
    """
    found = Named()
    if tracked_object is None and _is_module(tree) and all("/" in name for name in tree):
        found.tensors = dict(tree)
    else:
        if tracked_object is None and _is_module(tree):
            tracked_object = _DEFAULT_OBJECT
        objects = tree if tracked_object is None else {tracked_object: tree}
        _name_objects(found, objects, renamed or {}, module)
    _tie(found, ties or {})
    return found


def _name_objects(
    found: Named,
    objects: Mapping[Any, Any],
    renamed: Mapping[str, str],
    module: str | None,
) -> None:
    unknown = [name for name in renamed if name not in objects]
    if unknown:
        msg = f"no {unknown[0]!r} to be renamed: there are {', '.join(map(str, objects))}."
        raise ConfigError(msg)
    modules = {key: value for key, value in objects.items() if _is_module(value)}
    for key, value in objects.items():
        if not isinstance(key, str):
            _refuse(f"the key {key!r}: tracked objects have names")
        path = names.part_of(renamed.get(key, key))
        if _is_tensor(value):
            found.tensors[path] = value
        elif key in modules:
            _add_module(found, path, value)
        elif _is_optimizer(value):
            state = _by_parameter(value, key)
            owner = _owner_of(state, key, modules, module)
            _add_optimizer(found, path, state, names.part_of(renamed.get(owner, owner)))
        else:
            encoded = _encoded(found, path, value)
            # It may have been the state of an object; nothing tells.
            is_dict = isinstance(value, dict)
            found.values[path] = as_state("", encoded) if is_dict else encoded


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "stream")


def _is_module(value: Any) -> bool:
    """Tell whether it is a dict of tensors, or of extra state beside them."""
    return (
        isinstance(value, dict)
        and any(map(_is_tensor, value.values()))
        and all(_is_tensor(v) or str(k).endswith(_EXTRA) for k, v in value.items())
        and all(isinstance(key, str) for key in value)
    )


def _add_module(found: Named, path: str, module: Mapping[str, Any]) -> None:
    for key, value in module.items():
        name = f"{path}/{names.part_of(key)}"
        if _is_tensor(value):
            found.tensors[name] = value
        else:
            found.values[name] = _encoded(found, name, value)


# Optimizers


@dataclass(slots=True)
class _ByParameter:
    """State and settings of an optimizer, by parameter's name in its module."""

    state: dict[str, dict[Any, Any]] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)


def _is_optimizer(value: Any) -> bool:
    if not isinstance(value, dict):
        return False
    is_nested = isinstance(value.get(_GROUPS), list)
    return is_nested or any(str(key).startswith(f"{_GROUPS}.") for key in value)


def _by_parameter(tree: Mapping[Any, Any], key: str) -> _ByParameter:
    """Gather an optimizer's state, in either way that torch spells it."""
    found = _ByParameter()
    for name, value in tree.items():
        # Flattened: "state.layers.0.weight.exp_avg".
        kind, _, rest = str(name).partition(".")
        parameter, _, last = rest.rpartition(".")
        if kind == _GROUPS and parameter:
            found.settings.setdefault(parameter, {})[last] = value
        elif kind == STATE and parameter:
            found.state.setdefault(parameter, {})[last] = value
        elif name == STATE and isinstance(value, dict):
            _refuse_numbers(value, key)
            found.state.update(value)
        elif name != _GROUPS and name != STATE:
            _refuse(f"{key}: {name!r} in an optimizer's state")
    for group in tree.get(_GROUPS, ()):
        known = group.get("param_names") or group.get("params", ())
        _refuse_numbers(known, key)
        settings = {k: v for k, v in group.items() if k not in ("params", "param_names")}
        found.settings.update(dict.fromkeys(known, settings))
    return found


def _refuse_numbers(parameters: Any, key: str) -> None:
    if any(not isinstance(one, str) for one in parameters):
        msg = (
            f"{key}: an optimizer's state that numbers its parameters instead of naming "
            "them. Save torch.distributed.checkpoint.state_dict.get_optimizer_state_dict("
            f"model, optimizer) instead, or leave it out: --skip '{key}'."
        )
        raise UnsupportedError(msg)


def _owner_of(
    state: _ByParameter, key: str, modules: Mapping[str, Any], module: str | None
) -> str:
    """Return the key of the module that has all the parameters of an optimizer."""
    parameters = [*state.settings, *state.state]
    having = [k for k, m in modules.items() if all(p in m for p in parameters)]
    if module is not None:
        if module not in having:
            msg = f"{key}: {module!r} does not have all parameters of this optimizer."
            raise ConfigError(msg)
        return module
    if len(having) != 1 and _DEFAULT_OBJECT not in having:
        some = ", ".join(having) or "none"
        msg = (
            f"{key}: which module's parameters this optimizer has cannot be told: those "
            f"with all of them are {some}. Name it (--module), or leave the optimizer out: "
            f"--skip '{key}'."
        )
        raise ConfigError(msg)
    return having[0] if len(having) == 1 else _DEFAULT_OBJECT


def _add_optimizer(found: Named, path: str, state: _ByParameter, module: str) -> None:
    for parameter, settings in state.settings.items():
        name = f"{path}/{SETTINGS}/{module}/{names.part_of(parameter)}"
        found.values[name] = _encoded(found, name, settings)
    for parameter, entries in state.state.items():
        for key, value in entries.items():
            name = (
                f"{path}/{STATE}/{module}/{names.part_of(parameter)}/{names.part_of(key)}"
            )
            if _is_tensor(value):
                found.tensors[name] = value
            else:
                found.values[name] = _encoded(found, name, value)


# Plain values


def _encoded(found: Named, name: str, value: Any) -> Any:
    """Encode a plain value; tensors inside it are stored beside, by their path in it."""
    try:
        return values.encode(_with_references(found, name, value), name)
    except UnsupportedError as error:
        msg = f"{error} Leave it out (--skip) if it is not needed."
        raise UnsupportedError(msg) from error


def _with_references(found: Named, name: str, value: Any) -> Any:
    if _is_tensor(value):
        found.tensors[name] = value
        return TensorRef(name)
    if isinstance(value, (dict, list, tuple)) and any(map(_holds_tensor, _items(value))):
        if isinstance(value, dict):
            pairs = [
                (key, _with_references(found, f"{name}/{_part(key, name)}", item))
                for key, item in value.items()
            ]
            return OrderedDict(pairs) if type(value) is OrderedDict else dict(pairs)
        return type(value)(
            _with_references(found, f"{name}/{names.part_of(index)}", item)
            for index, item in enumerate(value)
        )
    return value


def _holds_tensor(value: Any) -> bool:
    return _is_tensor(value) or any(map(_holds_tensor, _items(value)))


def _items(value: Any) -> Sequence[Any]:
    if isinstance(value, dict):
        return [*value.values()]
    return value if isinstance(value, (list, tuple)) else ()


def _part(key: Any, name: str) -> str:
    if type(key) not in (str, int):
        _refuse(f"{name}: a key of type {type(key).__name__} on the way to a tensor")
    return names.part_of(key)


# Ties


def identity_of(tensor: Tensor) -> object:
    """Return what two tensors share when they are the same memory at their source."""
    identity = getattr(tensor, "identity", None)
    return id(tensor) if identity is None else identity


def _tie(found: Named, declared: Mapping[str, str]) -> None:
    """Note which tensors are one: those that are so at the source, and those declared."""
    first_of: dict[object, str] = {}
    for name, tensor in found.tensors.items():
        first = first_of.setdefault(identity_of(tensor), name)
        if first != name:
            found.ties[name] = first
    for name, other in declared.items():
        first = found.ties.get(other, other)
        if first not in found.tensors:
            msg = f"{name!r} cannot be tied to {other!r}: there is no such tensor."
            raise ConfigError(msg)
        if first == found.ties.get(name, name):
            continue
        kept = found.tensors[first]
        tensor = found.tensors.pop(name, kept)
        if (tensor.dtype, tuple(tensor.shape)) != (kept.dtype, tuple(kept.shape)):
            msg = f"{name!r} cannot be tied to {other!r}: another dtype, or another shape."
            raise ConfigError(msg)
        # At the end, as what it is the same as has to stand before it.
        for tied in [name, *(n for n, of in found.ties.items() if of == name)]:
            found.tensors[tied] = found.tensors.pop(tied, tensor)
            found.ties[tied] = first


def _refuse(reason: str) -> NoReturn:
    msg = f"{reason}: this has no place in a checkpoint. Leave it out with --skip."
    raise UnsupportedError(msg)
