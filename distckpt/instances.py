"""Instances of classes that are not Python's: taken apart, and made again by a live class.

A file has the name of a class for people only. No name in a file is imported or looked up:
the class is one that an object in the live value has, or that such an object's class names
in its annotations.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import sys
import types
import typing
from collections import deque
from collections.abc import Iterator
from typing import Any, NamedTuple

# Plain types whose subclasses are stored as what they are, and their class.
SCALAR_BASES = (int, float, str, bytes)
_MAX_DEPTH = 64
_MAX_VISITED = 100_000

# Of classes that Python code has made, in ``type.__flags__``.
_IS_OF_PYTHON = 1 << 9


class CannotRebuild(ValueError):
    """An instance that does not fit the live class; says why."""


class Parts(NamedTuple):
    """What is stored of an instance of a dataclass.

    Attributes:
        fields: Its fields, by name.
        others: What else it has been given as attributes.
    """

    fields: dict[str, Any]
    others: dict[str, Any]


def name_of(kind: type) -> str:
    """Return the full name of a class."""
    return f"{kind.__module__}.{kind.__qualname__}"


def is_dataclass(value: object) -> bool:
    """Tell whether a value is an instance of a dataclass that is nothing else besides."""
    return (
        dataclasses.is_dataclass(value)
        and not isinstance(value, type)
        # One derived from a dict, an exception or the like has a content of that kind, too.
        and all(
            kind is object or kind.__flags__ & _IS_OF_PYTHON or kind.__module__ == "typing"
            for kind in type(value).__mro__
        )
    )


def is_namedtuple(value: object) -> bool:
    """Tell whether a value is a named tuple without attributes of its own."""
    names = getattr(type(value), "_fields", None)
    return (
        isinstance(value, tuple)
        and isinstance(names, tuple)
        and len(names) == len(value)
        and all(type(name) is str for name in names)
        and not has_attributes(value)
    )


def scalar_base(value: object) -> type | None:
    """Return the plain type that a value's class is derived from; None: none, or more."""
    kind = type(value)
    for base in SCALAR_BASES:
        if isinstance(value, base) and kind is not base and kind is not bool:
            return None if has_attributes(value) else base
    return None


def has_attributes(value: object) -> bool:
    """Tell whether an instance has attributes of its own."""
    if getattr(value, "__dict__", None):
        return True
    for kind in type(value).__mro__:
        slots = kind.__dict__.get("__slots__", ())
        for slot in (slots,) if isinstance(slots, str) else slots:
            if slot not in ("__dict__", "__weakref__") and hasattr(value, slot):
                return True
    return False


def plain_scalar(value: Any, base: type) -> Any:
    """Return a value of a derived class as one of the plain type, whatever it overrides."""
    if base is bytes:
        return bytes.__getitem__(value, slice(None))
    if base is str:
        return str.__str__(value)
    return int.__int__(value) if base is int else float.__float__(value)


def parts_of(value: Any) -> Parts:
    """Take an instance of a dataclass apart."""
    fields = dataclasses.fields(value)
    known = {field.name for field in fields}
    found = {
        field.name: getattr(value, field.name)
        for field in fields
        if hasattr(value, field.name)
    }
    attributes = getattr(value, "__dict__", {})
    others = {
        name: item
        for name, item in attributes.items()
        if name not in known and not _is_cached(type(value), name)
    }
    return Parts(found, others)


def _is_cached(kind: type, name: str) -> bool:
    # Worked out of the fields, and will be again.
    return isinstance(getattr(kind, name, None), functools.cached_property)


# Made again


def made_dataclass(kind: Any, parts: Parts) -> Any:
    """Make an instance with these fields; nothing of the class's own code runs.

    A field that the class has now and had not then gets its default.

    Raises:
        CannotRebuild: The class has not these fields any more, or one without a default.
    """
    known = {field.name: field for field in dataclasses.fields(kind)}
    lost = [name for name in parts.fields if name not in known]
    if lost:
        msg = f"its class has no field {', '.join(map(repr, lost[:5]))} any more"
        raise CannotRebuild(msg)
    made = object.__new__(kind)
    for name, field in known.items():
        if name in parts.fields:
            value = parts.fields[name]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        elif field.init:
            msg = f"its class has a field {name!r} now, without a default"
            raise CannotRebuild(msg)
        else:
            continue  # it had not been set
        object.__setattr__(made, name, value)
    for name, value in parts.others.items():
        try:
            if name.startswith("__"):
                raise AttributeError(name)  # no class, no dict: what a file says is data
            object.__setattr__(made, name, value)
        except AttributeError:
            msg = f"its class takes no attribute {name!r}"
            raise CannotRebuild(msg) from None
    return made


def made_namedtuple(kind: Any, names: list[str], items: list[Any]) -> Any:
    """Make a named tuple.

    Raises:
        CannotRebuild: The class has other fields now.
    """
    if list(kind._fields) != names:
        msg = f"its class has the fields {list(kind._fields)} now, and had {names}"
        raise CannotRebuild(msg)
    return tuple.__new__(kind, items)


def made_scalar(kind: Any, plain: Any) -> Any:
    """Make an instance of a class derived from the plain type of a value.

    Raises:
        CannotRebuild: It is not derived from that any more.
    """
    base = type(plain)
    if not issubclass(kind, base):
        msg = f"its class is not derived from {base.__name__} any more"
        raise CannotRebuild(msg)
    return base.__new__(kind, plain)


def made_member(kind: Any, name: str | None, value: Any, has_value: bool) -> Any:
    """Return a member of an enumeration: by its name, else by its value.

    The name comes first: values that are counted (``auto()``) move when one is put in.

    Raises:
        CannotRebuild: There is no such member.
    """
    member = kind.__members__.get(name)
    if member is not None:
        return member
    if has_value:
        try:
            return kind(value)
        except (ValueError, TypeError):
            pass
    shown = f"{name or ''} = {value!r:.50}" if has_value else name
    msg = f"its class has no member {shown} any more"
    raise CannotRebuild(msg)


def updated_in_place(live: Any, value: Any) -> bool:
    """Give a live value what another one has, if it can be changed so.

    Whoever else has it sees the change. So are dicts, lists, sets and the like, arrays of
    the same dtype and shape, namespaces, and instances of dataclasses that are not frozen.
    """
    kind = type(live)
    if kind is not type(value):
        return False
    if isinstance(live, (dict, set)):
        live.clear()
        live.update(value)
    elif isinstance(live, (list, bytearray)):
        live[:] = value
    elif kind is deque and live.maxlen == value.maxlen:
        live.clear()
        live.extend(value)
    elif "numpy" in sys.modules and kind is sys.modules["numpy"].ndarray:
        is_alike = live.dtype == value.dtype and live.shape == value.shape
        if not is_alike or not live.flags.writeable:
            return False
        live[...] = value
    elif is_namespace(live):
        vars(live).clear()
        vars(live).update(vars(value))
    elif is_dataclass(live) and not kind.__dataclass_params__.frozen:
        for name in {**parts_of(live).fields, **parts_of(live).others}:
            if not hasattr(value, name):
                delattr(live, name)
        for attributes in parts_of(value):
            for name, item in attributes.items():
                setattr(live, name, item)
    else:
        return False
    return True


# Classes of live values


def classes_in(live: Any) -> dict[str, type]:
    """Return the classes of instances in a live value, and those that they annotate.

    Args:
        live: The object that a value is restored into.
    """
    found: dict[str, type] = {}
    for kind in _kinds_in(live):
        _add_class(found, kind)
    return found


def _kinds_in(live: Any) -> Iterator[type]:
    """Walk the types of all that can be reached, once each object."""
    seen: set[int] = set()
    level = [live]
    for _ in range(_MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if id(value) in seen or type(value) in (int, float, str, bool, type(None)):
                continue
            seen.add(id(value))
            if len(seen) > _MAX_VISITED:
                return
            yield type(value)
            below += (item for _, item in children_of(value))
            if isinstance(value, dict):
                below += value
        if not below:
            return
        level = below


def children_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """Walk what a value holds, with the keys that stand in its path."""
    if isinstance(value, dict):
        yield from value.items()
    elif is_namedtuple(value):
        yield from zip(type(value)._fields, value, strict=True)
    elif isinstance(value, (list, tuple, deque)):
        yield from enumerate(value)
    elif isinstance(value, (set, frozenset)):
        yield from ((None, item) for item in value)
    elif is_dataclass(value):
        fields, others = parts_of(value)
        yield from fields.items()
        yield from others.items()
    elif is_namespace(value):
        yield from vars(value).items()


def is_namespace(value: object) -> bool:
    """Tell whether a value is one of the namespaces of the standard library."""
    return type(value) in namespaces().values()


def namespaces() -> dict[str, type]:
    """Return the namespaces of the standard library, by what they are called in a file."""
    found: dict[str, type] = {"SimpleNamespace": types.SimpleNamespace}
    argparse = sys.modules.get("argparse")
    if argparse is not None:
        found["Namespace"] = argparse.Namespace
    return found


def _add_class(found: dict[str, type], kind: Any) -> None:
    is_own = (
        issubclass(kind, (enum.Enum, *SCALAR_BASES))
        or dataclasses.is_dataclass(kind)
        or (issubclass(kind, tuple) and hasattr(kind, "_fields"))
    )
    name = name_of(kind)
    if not is_own or name in found or kind in SCALAR_BASES or kind is bool:
        return
    found[name] = kind
    if issubclass(kind, enum.Enum):
        return
    try:
        hints = typing.get_type_hints(kind)
    except Exception:  # annotations are code of the user's
        return
    for hint in hints.values():
        for one in _classes_of_hint(hint):
            _add_class(found, one)


def _classes_of_hint(hint: Any, depth: int = 0) -> Iterator[type]:
    if isinstance(hint, type) and typing.get_origin(hint) is None:
        yield hint
    if depth < _MAX_DEPTH:
        for inner in typing.get_args(hint):
            yield from _classes_of_hint(inner, depth + 1)
