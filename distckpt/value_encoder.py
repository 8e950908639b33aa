"""Plain values to what JSON can carry; ``values.py`` has the table, and the way back."""

from __future__ import annotations

import base64
import enum
import json
import math
import sys
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from typing import Any, NoReturn, Protocol

from distckpt import arrays, instances, value_types
from distckpt.errors import UnsupportedError
from distckpt.value_hints import hint_for
from distckpt.value_tags import (
    MAX_DEPTH,
    MAX_INT_BITS,
    NAMES_OF_FACTORIES,
    NO_FACTORY,
    OTHER_FACTORY,
    SCALARS,
    SIZE,
    TORCH_KINDS,
    TensorRef,
    Wrapper,
    are_all_exact,
    are_exact,
    are_plain_keys,
)


class Beside(Protocol):
    """Where the tensors in a value go."""

    def add(self, value: Any, keys: Sequence[Any]) -> TensorRef | Wrapper | None:
        """Store a tensor, or a large array of numpy's.

        Args:
            value: It may be something else.
            keys: The way to it in the value.

        Returns:
            What stands for it; None if it is no tensor.
        """


class Encoder:
    """Encodes one value; knows the way to what it is at."""

    def __init__(self, path: str, beside: Beside | None) -> None:
        self._path = path
        self._beside = beside
        # The keys on the way, each with how it is spelled in messages.
        self._keys: list[Any] = [None] * (MAX_DEPTH + 1)
        self._spelled: list[Callable[[Any], str]] = [_in_brackets] * (MAX_DEPTH + 1)

    def encode(self, value: Any, depth: int = 0) -> Any:
        """Return what JSON can carry; see ``values.encode``.

        Args:
            value: What is encoded.
            depth: How many containers it is in.
        """
        kind = type(value)
        if kind in SCALARS:
            return self._scalar(value, kind, depth)
        encode = self._OF_KINDS.get(kind)
        if encode is not None:
            self._check_depth(depth)
            return encode(self, value, depth)
        if kind is bytes:
            return {"$bytes": base64.b64encode(value).decode("ascii")}
        if kind is TensorRef:
            return {"$tensor": value.name}
        if self._beside is not None:
            found = self._beside.add(value, self._keys[:depth])
            if found is not None:
                return self._beside_value(value, found)
        self._check_depth(depth)
        return self._other(value, kind, depth)

    def _scalar(self, value: Any, kind: type, depth: int) -> Any:
        if kind is int and value.bit_length() > MAX_INT_BITS:
            msg = f"{self._where(depth)}: an integer of more than {MAX_INT_BITS} bits."
            raise UnsupportedError(msg)
        if kind is float and not math.isfinite(value):
            return {"$float": repr(value)}
        return value

    def _beside_value(self, value: Any, found: TensorRef | Wrapper) -> Any:
        if isinstance(found, Wrapper):
            return found.encoded
        reference = {"$tensor": found.name}
        if arrays.is_array(value):
            return {"$array": [*arrays.form_of(value).fields, reference]}
        return reference

    # Containers

    def _list(self, value: list[Any], depth: int) -> list[Any]:
        return self._items(value, depth)

    def _tuple(self, value: tuple[Any, ...], depth: int) -> Any:
        return {"$tuple": self._items(value, depth)}

    def _deque(self, value: deque[Any], depth: int) -> Any:
        return {"$deque": [self._items(value, depth), value.maxlen]}

    def _set(self, value: Iterable[Any], depth: int) -> Any:
        # By their texts: their own order depends on the process.
        with self._nothing_beside():
            items = self._items([*value], depth, _in_a_set)
        items.sort(key=json.dumps)
        return {"$set" if type(value) is set else "$frozenset": items}

    def _dict(self, value: dict[Any, Any], depth: int) -> Any:
        if are_plain_keys((value,)):
            kinds = {*map(type, value.values())}
            if kinds <= SCALARS and are_exact([*value.values()], kinds):
                return {**value}
            encoded = {}
            self._spelled[depth] = _in_brackets
            for key, item in value.items():
                self._keys[depth] = key
                encoded[key] = self.encode(item, depth + 1)
            return encoded
        return {"$dict": self._pairs(value, depth)}

    def _ordered(self, value: dict[Any, Any], depth: int) -> Any:
        return {"$ordered": self._pairs(value, depth)}

    def _counter(self, value: dict[Any, Any], depth: int) -> Any:
        return {"$counter": self._pairs(value, depth)}

    def _defaultdict(self, value: defaultdict[Any, Any], depth: int) -> Any:
        factory: Any = value.default_factory
        name = NO_FACTORY
        if factory is not None:
            name = OTHER_FACTORY
            if isinstance(factory, type):
                name = NAMES_OF_FACTORIES.get(factory, OTHER_FACTORY)
        return {"$defaultdict": [name, self._pairs(value, depth)]}

    def _namespace(self, value: Any, depth: int) -> Any:
        (name,) = (n for n, kind in instances.namespaces().items() if kind is type(value))
        return {"$namespace": [name, self._pairs(vars(value), depth, _as_attribute)]}

    def _items(
        self,
        items: Sequence[Any],
        depth: int,
        spelled: Callable[[Any], str] | None = None,
    ) -> list[Any]:
        kinds = {*map(type, items)}
        if kinds <= SCALARS and are_exact(items, kinds):
            return [*items]
        if len(kinds) == 1 and depth < MAX_DEPTH - 1:
            alike = _encoded_alike(items, *kinds)
            if alike is not None:
                return alike
        self._spelled[depth] = spelled or _in_brackets
        encoded = []
        for index, item in enumerate(items):
            self._keys[depth] = index
            encoded.append(self.encode(item, depth + 1))
        return encoded

    @contextmanager
    def _nothing_beside(self) -> Iterator[None]:
        """Take no tensors: no path leads into a set, or to a key."""
        beside, self._beside = self._beside, None
        try:
            yield
        finally:
            self._beside = beside

    def _pairs(
        self,
        value: Mapping[Any, Any],
        depth: int,
        spelled: Callable[[Any], str] | None = None,
    ) -> list[list[Any]]:
        if depth < MAX_DEPTH - 1 and are_all_exact([*value], [*value.values()]):
            return [*map(list, value.items())]
        pairs = []
        for key, item in value.items():
            self._keys[depth] = key
            self._spelled[depth] = _as_key
            if type(key) in SCALARS:
                encoded_key = self._scalar(key, type(key), depth + 1)
            else:
                with self._nothing_beside():
                    encoded_key = self.encode(key, depth + 1)
            # Whatever keys inside the key have left there.
            self._keys[depth], self._spelled[depth] = key, spelled or _in_brackets
            pairs.append([encoded_key, self.encode(item, depth + 1)])
        return pairs

    _OF_KINDS: Mapping[type, Callable[[Any, Any, int], Any]] = {
        list: _list,
        tuple: _tuple,
        deque: _deque,
        set: _set,
        frozenset: _set,
        dict: _dict,
        OrderedDict: _ordered,
        Counter: _counter,
        defaultdict: _defaultdict,
    }

    # Everything else

    def _other(self, value: Any, kind: type, depth: int) -> Any:
        if isinstance(value, enum.Enum):
            return self._member(value, depth)
        if arrays.is_scalar(value) or arrays.is_plain_array(value):
            return self._of_numpy(value, depth)
        codec = value_types.codec_of(kind)
        if codec is not None:
            try:
                parts = codec.parts(value)
            except ValueError as error:
                msg = f"{self._where(depth)}: a {kind.__qualname__} cannot be stored"
                raise UnsupportedError(f"{msg}: {error}.") from None
            return {codec.tag: self.encode(parts, depth)}
        found = self._of_torch(value, kind)
        if found is not None:
            return found
        if instances.is_namespace(value):
            return self._namespace(value, depth)
        if instances.is_namedtuple(value):
            self._spelled[depth] = _as_attribute
            items = []
            for name, item in zip(kind._fields, value, strict=True):  # type: ignore[attr-defined]
                self._keys[depth] = name
                items.append(self.encode(item, depth + 1))
            names = list(kind._fields)  # type: ignore[attr-defined]
            return {"$namedtuple": [instances.name_of(kind), names, items]}
        base = instances.scalar_base(value)
        if base is not None:
            plain = self.encode(instances.plain_scalar(value, base), depth)
            return {"$scalar": [instances.name_of(kind), plain]}
        if instances.is_dataclass(value) and not _has_state_dict(value):
            return self._dataclass(value, depth)
        self._refuse(value, depth)

    def _member(self, value: enum.Enum, depth: int) -> Any:
        fields: list[Any] = [instances.name_of(type(value)), value.name]
        try:
            self._keys[depth], self._spelled[depth] = "value", _as_attribute
            fields.append(Encoder("value", None).encode(value.value, depth + 1))
        except UnsupportedError:
            if value.name is None:
                raise
        return {"$enum": fields}

    def _dataclass(self, value: Any, depth: int) -> Any:
        parts = instances.parts_of(value)
        self._spelled[depth] = _as_attribute
        fields = [instances.name_of(type(value))]
        for attributes in parts:
            encoded = {}
            for name, item in attributes.items():
                self._keys[depth] = name
                encoded[name] = self.encode(item, depth + 1)
            if attributes or len(fields) == 1:
                fields.append(encoded)  # type: ignore[arg-type]
        return {"$dataclass": fields}

    def _of_numpy(self, value: Any, depth: int) -> Any:
        reason = arrays.why_not(value)
        is_array = arrays.is_array(value)
        what = "array" if is_array else "scalar"
        if reason:
            msg = f"{self._where(depth)}: a numpy {what} of dtype {value.dtype} cannot be"
            raise UnsupportedError(f"{msg} stored: {reason}.")
        if not is_array:
            return {"$numpy": arrays.encoded_scalar(value)}
        if value.nbytes > arrays.MAX_INLINE_BYTES:
            msg = (
                f"{self._where(depth)}: a numpy array of {value.nbytes} bytes, where at "
                f"most {arrays.MAX_INLINE_BYTES} are stored; track it by Checkpoint(...)."
            )
            raise UnsupportedError(msg)
        form = arrays.form_of(value)
        return {"$array": [*form.fields, arrays.encoded_elements(value)]}

    def _of_torch(self, value: Any, kind: type) -> Any:
        torch = sys.modules.get("torch")
        if torch is None:
            return None
        if kind is torch.Size:
            if {*map(type, value)} <= {int}:
                return {"$torch": [SIZE, list(value)]}
            return None
        for name in TORCH_KINDS:
            if kind is getattr(torch, name):
                return {"$torch": [name, str(value).removeprefix("torch.")]}
        return None

    # Messages

    def _where(self, depth: int) -> str:
        steps = zip(self._spelled[:depth], self._keys[:depth], strict=True)
        return self._path + "".join(spelled(key) for spelled, key in steps)

    def _check_depth(self, depth: int) -> None:
        if depth >= MAX_DEPTH:
            msg = (
                f"{self._where(depth)[:200]}: nested deeper than {MAX_DEPTH} levels; does "
                "the value contain itself?"
            )
            raise UnsupportedError(msg)

    def _refuse(self, value: Any, depth: int) -> NoReturn:
        kind = type(value)
        msg = (
            f"{self._where(depth)}: a value of type {instances.name_of(kind)} cannot be "
            f"stored. {hint_for(value)}"
        )
        raise UnsupportedError(msg)


def _encoded_alike(items: Sequence[Any], kind: type) -> list[Any] | None:
    """Encode many small containers of one kind at once; None if there is more in them."""
    if kind is tuple and are_all_exact([*chain.from_iterable(items)]):
        return [{"$tuple": [*item]} for item in items]
    if kind is list and are_all_exact([*chain.from_iterable(items)]):
        return [[*item] for item in items]
    if (
        kind is dict
        and are_plain_keys(items)
        and are_all_exact([*chain.from_iterable(map(dict.values, items))])
    ):
        return [{**item} for item in items]
    return None


def _has_state_dict(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None))


def _in_brackets(key: Any) -> str:
    return f"[{_shown(key)}]"


def _in_a_set(_: Any) -> str:
    return ": an item"


def _as_attribute(key: Any) -> str:
    return f".{key}"


def _as_key(key: Any) -> str:
    return f": key {_shown(key)}"


def _shown(key: object) -> str:
    try:
        return f"{key!r:.100}"
    except Exception:  # Python refuses to print very long integers.
        return f"of type {type(key).__qualname__}"
