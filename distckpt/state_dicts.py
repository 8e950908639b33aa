"""State dicts of modules and other objects, made from the names in a checkpoint.

A checkpoint stores what a module's state dict has under ``<path>/<key>``, and the state of
any other object as one value. No live object is needed to put either together again.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from distckpt import names, values
from distckpt.arrays import Form
from distckpt.errors import ConfigError, TensorNotFound
from distckpt.formats import optimizers
from distckpt.near import did_you_mean
from distckpt.value_tags import TensorRef, Wrapper

_VERSIONS = "versions"
_MAX_SHOWN = 8


@dataclass(frozen=True, slots=True)
class Source:
    """The names in a checkpoint, and its values.

    Attributes:
        where: Its directory, for messages.
        tensors: The names of its tensors.
        encoded: Its plain values and states of objects, as ``values.encode`` makes them.
        knows_kinds: Whether the values tell which of them are states of objects. Format 1
            did not.
    """

    where: str
    tensors: Collection[str]
    encoded: Mapping[str, Any]
    knows_kinds: bool

    @property
    def names(self) -> Iterator[str]:
        """All names."""
        yield from self.tensors
        yield from self.encoded


def state_dict_of(
    source: Source, name: str, read: Callable[[str], Any]
) -> OrderedDict[Any, Any] | dict[Any, Any]:
    """Make the state dict of what is stored under a name.

    Args:
        source: The names and values of the checkpoint.
        name: The path of a module, of a submodule in it, of another object with a state
            dict, or of a dict of tensors and values.
        read: Called with the names of tensors; returns what stands for each.

    Raises:
        ConfigError: There is something else under that name; the message says what.
        TensorNotFound: There is nothing.
    """
    if not isinstance(name, str) or not name:
        msg = f"state_dict: a name such as 'model' is needed, got {name!r:.100}."
        raise ConfigError(msg)
    if name in source.tensors:
        msg = f"{source.where}: {name!r} is a tensor; read it by [{name!r}].torch()."
        raise ConfigError(msg)
    _refuse_optimizer(source, name)
    versions = _versions_at(source, name)
    if name in source.encoded and versions is None:
        return _state_at(source, name, read)
    found = _entries(source, f"{name}/")
    if not found:
        # Below a module's path stand the names of its submodules, with dots.
        path = name.rpartition("/")[0]
        found = _entries(source, f"{name}.") if path else {}
        versions = _versions_at(source, path)
        inner = str(names.key_of(name.rpartition("/")[2]))
        versions = _of_submodule(versions or {}, inner)
    if not found:
        raise _nothing(source, name)
    state: OrderedDict[Any, Any] = OrderedDict()
    for key, full in found.items():
        if full in source.tensors:
            state[key] = read(full)
        else:
            state[key] = _Reader(read, f"{source.where}: {full}").decode(
                source.encoded[full]
            )
    if versions:
        # torch hands these to load code that converts what is older.
        metadata = {at: {"version": number} for at, number in versions.items()}
        state._metadata = OrderedDict(metadata)  # type: ignore[attr-defined]
    return state


class _Reader(values.Decoder):
    """Decodes values with what is read in place of references to tensors."""

    def __init__(self, read: Callable[[str], Any], where: str) -> None:
        self._read = read
        self._where = where

    def tensor(self, name: str) -> Any:
        return self._read(name)

    def array(self, form: Form, name: str) -> Any:
        return form.array_of(self._read(name).cpu().numpy())

    def wrapper(self, wrapper: Wrapper, live: values.Live) -> Any:
        msg = (
            f"{self._where}: a {wrapper.class_name} is made of other tensors, and nothing "
            "live tells how: restore it into a module that has one, with "
            "Checkpoint(model=model).restore(path)."
        )
        raise ConfigError(msg)


def _state_at(source: Source, name: str, read: Callable[[str], Any]) -> dict[Any, Any]:
    encoded = source.encoded[name]
    value = values.decode(encoded)
    may_be_state = (
        not source.knows_kinds or values.class_of_state(encoded) is not None
    ) and isinstance(value, dict)
    if not may_be_state:
        msg = (
            f"{source.where}: {name!r} is a plain value ({type(value).__name__}), "
            f"which has no state dict; take plain_values[{name!r}]."
        )
        raise ConfigError(msg)
    state: dict[Any, Any] = _Reader(read, f"{source.where}: {name}").decode(encoded)
    return state


def _entries(source: Source, start: str) -> dict[Any, str]:
    """Return the full names that begin so, by the key that the rest spells.

    Raises:
        ConfigError: They belong to several objects.
    """
    found: dict[Any, str] = {}
    deeper: list[str] = []
    inside: set[str] = set()
    for full in source.names:
        if not full.startswith(start):
            continue
        rest = full[len(start) :]
        if "/" in rest:
            deeper.append(full)
            continue
        found[names.key_of(rest)] = full
        if full in source.encoded:
            inside.update(_tensors_in(values.decode(source.encoded[full])))
    others = {
        start + full[len(start) :].partition("/")[0]: None
        for full in deeper
        if full not in inside
    }
    if others:
        msg = (
            f"{source.where}: {start[:-1]!r} holds several objects; ask for one of them: "
            f"{_few(others)}."
        )
        raise ConfigError(msg)
    return found


def _tensors_in(value: Any) -> Iterator[str]:
    """Walk the names of the tensors in a decoded value."""
    if isinstance(value, TensorRef):
        yield value.name
    elif isinstance(value, (dict, list, tuple, deque)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(item)


def _refuse_optimizer(source: Source, name: str) -> None:
    for optimizer in optimizers.find(source.encoded, source.tensors):
        path = optimizer.path
        if f"{name}/".startswith(f"{path}/"):
            encoded = source.encoded.get(f"{path}/{optimizers.CLASS}")
            kind = f" ({encoded})" if isinstance(encoded, str) else ""
            last = path.rpartition("/")[2]
            example = last if last.isidentifier() else "optimizer"
            msg = (
                f"{source.where}: {path!r} is the state of an optimizer{kind}, stored by "
                "the names of its parameters: its load_state_dict() would not take that. "
                "Restore it together with its module: "
                f"Checkpoint(model=model, {example}=optimizer).restore(path)."
            )
            raise ConfigError(msg)


def _versions_at(source: Source, path: str) -> dict[str, int] | None:
    """Return the versions of a module's members; None: no module has stored any there."""
    encoded = source.encoded.get(path)
    if not isinstance(encoded, dict) or encoded.keys() != {_VERSIONS}:
        return None
    below = f"{path}/"
    if not any(full.startswith(below) for full in source.names):
        return None  # a plain dict of the user's
    versions = values.decode(encoded)[_VERSIONS]
    return versions if isinstance(versions, dict) else None


def _of_submodule(versions: Mapping[str, int], inner: str) -> dict[str, int]:
    found = {}
    for at, version in versions.items():
        if at == inner or at.startswith(f"{inner}."):
            found[at[len(inner) + 1 :]] = version
    return found


def _nothing(source: Source, name: str) -> TensorNotFound:
    objects = dict.fromkeys(full.partition("/")[0] for full in source.names)
    hint = did_you_mean(name, _paths(source))
    msg = f"{source.where}: nothing is stored under {name!r}{hint}"
    if objects:
        msg = f"{msg} It has {_few(objects)}."
    return TensorNotFound(msg)


def _paths(source: Source) -> Iterable[str]:
    """Return all that might be asked for: objects, and modules in them."""
    found: dict[str, None] = {}
    inside = tuple(
        f"{one.path}/" for one in optimizers.find(source.encoded, source.tensors)
    )
    for full in source.names:
        if inside and full.startswith(inside):
            continue
        path, _, last = full.rpartition("/")
        while path and path not in found:
            found[path] = None
            path = path.rpartition("/")[0]
        path = full.rpartition("/")[0]
        while path and "." in last:
            last = last.rpartition(".")[0]
            found[f"{path}/{last}"] = None
    return found


def _few(found: Collection[str]) -> str:
    shown = ", ".join(map(repr, [*found][:_MAX_SHOWN]))
    return f"{shown}, ... ({len(found)})" if len(found) > _MAX_SHOWN else shown
