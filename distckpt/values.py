"""Plain Python values <-> JSON, without pickle: the same types, the same numbers.

What JSON has, it stands for itself. Everything else is an object with one key that
starts with ``$``:

==================  ==========================================================
``$tuple``          list of items
``$dict``           list of [key, value]: keys that are not strings, or any "$"
``$ordered``        the same, a ``collections.OrderedDict``
``$counter``        the same, a ``collections.Counter``
``$defaultdict``    [name of the default's type, pairs]
``$set``            list of items, in the order of their texts; ``$frozenset``
``$deque``          [items, maxlen]
``$namespace``      [its class, pairs]: ``SimpleNamespace``, ``argparse.Namespace``
``$bytes``          base64
``$float``          "inf", "-inf" or "nan" (one NaN is like another)
``$numpy``          [dtype, base64] of a numpy scalar
``$array``          [dtype, shape, order, base64 or ``$tensor``] of a numpy array
``$torch``          [kind, text] of a dtype, device, layout, ...; of a Size, numbers
``$tensor``         name of a tensor that is stored beside
``$wrapper``        a tensor that is made of others; see ``Wrapper``
``$enum``           [class, name, value if it is plain] of a member
``$dataclass``      [class, fields, other attributes if there are any]
``$namedtuple``     [class, names, items]
``$scalar``         [class, plain value] of a class derived from str, int, ...
``$object``         [class name, value]: the value is the state of an object
``$one``            value of one rank, which others may have otherwise
==================  ==========================================================

and those of ``value_types.py``. ``$one`` and ``$object`` stand at the top only, in this
order, and decoding leaves them out. The class name is empty if nothing tells whether the
value is the state of an object.

The names of classes are for people. What a file says is never imported or looked up:
without a live object of that class an instance becomes a plain value (``Decoder``).

Anything else is refused with its path in the tree: a value that comes back as another
type is a bug that shows weeks later.
"""

from __future__ import annotations

import base64
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, NamedTuple, NoReturn, TypeAlias

from distckpt import arrays, instances, strict_json, value_types
from distckpt.arrays import Form
from distckpt.errors import FormatError
from distckpt.instances import Parts
from distckpt.value_encoder import Beside, Encoder
from distckpt.value_tags import (
    FACTORIES,
    MAX_DEPTH,
    NO_FACTORY,
    NOTHING,
    OTHER_FACTORY,
    SCALARS,
    SIZE,
    TORCH_KINDS,
    WRAPPER,
    TensorRef,
    Wrapper,
    are_scalars,
    is_large_and_flat,
    is_plain,
    is_tag,
)

_PAIR_TAGS: dict[str, Callable[[Iterable[tuple[Any, Any]]], Any]] = {
    "$dict": dict,
    "$ordered": OrderedDict,
    "$counter": lambda pairs: Counter(dict(pairs)),
}
_OBJECT = "$object"
_ONE = "$one"
_SETS: dict[str, Any] = {"$set": set, "$frozenset": frozenset}
# Instances of live classes, for which a live value is needed.
_OF_CLASSES = ("$enum", "$dataclass", "$namedtuple", "$scalar", WRAPPER)


@dataclass(frozen=True, slots=True)
class Encoded:
    """An encoded value as text: what is compared between ranks, and what a file holds."""

    text: str

    @property
    def tree(self) -> Any:
        """The value as ``encode`` returns it."""
        return strict_json.loads(self.text.encode())


def encode(value: object, path: str = "value", beside: Beside | None = None) -> Any:
    """Turn a plain value into what JSON can carry.

    Args:
        value: None, bool, int, float, str, bytes, ``TensorRef``, and what else the table
            above has; dicts, lists, tuples, sets and so on of these.
        path: Where the value stands, for messages.
        beside: Where tensors go; None: they are refused.

    Raises:
        UnsupportedError: Names the path, the type and what to do.
    """
    return Encoder(path, beside).encode(value)


def encode_text(
    value: object, path: str = "value", beside: Beside | None = None
) -> Encoded:
    """Turn a plain value into text; see ``encode``."""
    return plain_text(value) or Encoded(strict_json.dumps(encode(value, path, beside)))


def plain_text(value: object) -> Encoded | None:
    """Turn a value into text if JSON has it just as it is; None: it has not."""
    return Encoded(strict_json.dumps(value)) if is_plain(value) else None


def text_of(encoded: Any) -> str:
    """Return an encoded value as text, whether it is that already or not."""
    return encoded.text if isinstance(encoded, Encoded) else strict_json.dumps(encoded)


# Marks at the top


def as_state(class_name: str, encoded: Any) -> Any:
    """Mark an encoded value as the state of an object.

    Args:
        class_name: Name of the object's class; empty: it may be an object's or not.
        encoded: The state, as ``encode`` or ``encode_text`` returns it.
    """
    if isinstance(encoded, Encoded):
        return Encoded(f'{{"{_OBJECT}":[{strict_json.quote(class_name)},{encoded.text}]}}')
    return {_OBJECT: [class_name, encoded]}


def of_one_rank(encoded: Any) -> Any:
    """Mark an encoded value as that of one rank."""
    if isinstance(encoded, Encoded):
        return Encoded(f'{{"{_ONE}":{encoded.text}}}')
    return {_ONE: encoded}


def is_of_one_rank(encoded: Any) -> bool:
    """Tell whether an encoded value is that of one rank."""
    if isinstance(encoded, Encoded):
        return encoded.text.startswith(f'{{"{_ONE}":')
    return isinstance(encoded, dict) and encoded.keys() == {_ONE}


def class_of_state(encoded: Any) -> str | None:
    """Return the class name of an object's state; None for a plain value."""
    encoded = _without_rank(encoded)
    if isinstance(encoded, dict) and encoded.keys() == {_OBJECT}:
        class_name: str = encoded[_OBJECT][0]
        return class_name
    return None


def wrapper_of(encoded: Any) -> Wrapper | None:
    """Return the tensor that an encoded value stands for, if it is made of others."""
    encoded = _without_rank(encoded)
    if isinstance(encoded, dict) and encoded.keys() == {WRAPPER}:
        return _decoded_wrapper(encoded[WRAPPER])
    return None


def _without_rank(encoded: Any) -> Any:
    return encoded[_ONE] if is_of_one_rank(encoded) else encoded


def _content(encoded: Any) -> Any:
    """Return an encoded value without the marks at its top."""
    encoded = _without_rank(encoded)
    if isinstance(encoded, dict) and encoded.keys() == {_OBJECT}:
        body = encoded[_OBJECT]
        if not (isinstance(body, list) and len(body) == 2 and isinstance(body[0], str)):
            _refuse("$object without a class name and a value")
        return body[1]
    return encoded


def _decoded_alike(items: Sequence[Any], kind: type) -> list[Any] | None:
    """Decode many small containers of one kind at once; None if there is more in them."""
    if kind is list and are_scalars(chain.from_iterable(items)):
        return [[*item] for item in items]
    if kind is not dict:
        return None
    keys = {*chain.from_iterable(items)}
    if keys == {"$tuple"} and all(items):
        bodies = [item["$tuple"] for item in items]
        if {*map(type, bodies)} == {list} and are_scalars(chain.from_iterable(bodies)):
            return [*map(tuple, bodies)]
    elif not any(map(is_tag, keys)) and are_scalars(
        chain.from_iterable(map(dict.values, items))
    ):
        return [{**item} for item in items]
    return None


# Decoding


class Survey(NamedTuple):
    """What there is in an encoded value.

    Attributes:
        tensors: Names of the tensors in it.
        is_plain: Whether there is nothing that JSON does not have itself.
        has_instances: Whether there are instances of classes that a live value may give.
        has_torch: Whether there are dtypes or the like, which this torch may not have.
        depth: How deep it is nested.
    """

    tensors: list[str]
    is_plain: bool
    has_instances: bool
    has_torch: bool
    depth: int


def survey(encoded: Any) -> Survey:
    """Look through an encoded value without making anything."""
    tensors: list[str] = []
    is_plain_, has_instances, has_torch = True, False, False
    level, depth = [_content(encoded)], 0
    while level:
        depth += 1
        kinds = {*map(type, level)}
        inner = kinds & {list, dict}
        if not inner:
            break
        lists = [item for item in level if type(item) is list] if list in inner else []
        dicts = [item for item in level if type(item) is dict] if dict in inner else []
        if any(map(is_tag, chain.from_iterable(dicts))):
            is_plain_ = False
            for one in dicts:
                tag, body = next(iter(one.items()), ("", None))
                if tag == "$tensor" and isinstance(body, str):
                    tensors.append(body)
                has_instances = has_instances or tag in _OF_CLASSES
                has_torch = has_torch or tag == "$torch"
                if tag == "$defaultdict" and isinstance(body, list):
                    has_instances = has_instances or body[:1] == [OTHER_FACTORY]
        lists = [item for item in lists if not is_large_and_flat(item)]
        level = [*chain.from_iterable(lists)]
        level += chain.from_iterable(map(dict.values, dicts))
    return Survey(tensors, is_plain_, has_instances, has_torch, depth)


def check(encoded: Any) -> None:
    """Check that a value decodes.

    Raises:
        FormatError: It does not.
    """
    found = survey(encoded)
    if not found.is_plain or found.depth > MAX_DEPTH:
        decode(encoded)


def decode(encoded: object) -> Any:
    """Turn what ``encode`` returned back into the value; instances become plain.

    Raises:
        FormatError: Not something that ``encode`` returns.
    """
    return Decoder().decode(encoded)


Live: TypeAlias = Any


class Decoder:
    """Turns encoded values back, without anything live: instances become plain values.

    A member of an enumeration becomes its value, or its name; an instance of a dataclass a
    dict; a named tuple a tuple; what is derived from a plain type that type. dtypes and the
    like of torch's become texts. Where such values cannot stand in a set, or be keys, the
    set becomes a list, and the dict one of pairs.

    A subclass makes of them what it can.
    """

    def decode(self, encoded: object, live: Live = NOTHING) -> Any:
        """Decode one value.

        Args:
            encoded: As ``encode`` returns it.
            live: The value that is in its place now.

        Raises:
            FormatError: It is not something that ``encode`` returns.
        """
        return self._decode(_content(encoded), 0, live)

    # What a subclass may do otherwise

    def tensor(self, name: str) -> Any:
        """Return a tensor that is stored beside."""
        return TensorRef(name)

    def array(self, form: Form, name: str) -> Any:
        """Return an array that is stored beside."""
        return self.tensor(name)

    def wrapper(self, wrapper: Wrapper, live: Live) -> Any:
        """Return a tensor that is made of others."""
        return wrapper._replace(context=self.decode(wrapper.context))

    def of_torch(self, kind: str, body: Any) -> Any:
        """Return a description of torch's."""
        if kind == SIZE:
            return tuple(body)
        return body if kind == "device" else f"torch.{body}"

    def kind_of(self, class_name: str) -> Any:
        """Return the live class of that name; None: there is none."""
        return None

    def cannot_rebuild(self, class_name: str, error: ValueError) -> None:
        """Take note of an instance that does not fit the live class."""

    # The tree

    def _decode(self, encoded: Any, depth: int, live: Live) -> Any:
        if depth > 2 * MAX_DEPTH:
            _refuse("nested too deeply")
        kind = type(encoded)
        if kind in SCALARS:
            return encoded
        if kind is list:
            return self._items(encoded, depth, live)
        if kind is not dict:
            _refuse(f"unexpected {kind.__name__}")
        if not any(map(is_tag, encoded)):
            if {*map(type, encoded.values())} <= SCALARS:
                return {**encoded}
            return {
                key: self._decode(item, depth + 1, child_of(live, key))
                for key, item in encoded.items()
            }
        if len(encoded) != 1:
            _refuse(f"a tag beside other keys: {sorted(encoded)[:5]}")
        ((tag, body),) = encoded.items()
        try:
            return self._tagged(tag, body, depth, live)
        except FormatError:
            raise
        except (TypeError, ValueError, KeyError, ArithmeticError) as error:
            msg = f"not a valid {tag} value: {error}"
            raise FormatError(msg) from error

    def _items(self, encoded: Any, depth: int, live: Live) -> list[Any]:
        if type(encoded) is not list:
            _refuse("a tag without a list")
        kinds = {*map(type, encoded)}
        if kinds <= SCALARS:
            return [*encoded]
        if len(kinds) == 1 and depth < MAX_DEPTH:
            alike = _decoded_alike(encoded, *kinds)
            if alike is not None:
                return alike
        if live is NOTHING:
            return [self._decode(item, depth + 1, NOTHING) for item in encoded]
        return [
            self._decode(item, depth + 1, child_of(live, index))
            for index, item in enumerate(encoded)
        ]

    def _tagged(self, tag: str, body: Any, depth: int, live: Live) -> Any:
        if tag == "$tuple":
            return tuple(self._items(body, depth, live))
        if tag in _PAIR_TAGS:
            return self._mapping(_PAIR_TAGS[tag], tag, body, depth, live)
        if tag == "$bytes":
            return base64.b64decode(body, validate=True)
        if tag == "$float" and body in ("inf", "-inf", "nan"):
            return float(body)
        if tag == "$tensor" and isinstance(body, str):
            return self.tensor(body)
        if tag == "$numpy":
            return arrays.decoded_scalar(*body)
        codec = value_types.codec_of_tag(tag)
        if codec is not None:
            return codec.made(self._decode(body, depth + 1, NOTHING))
        decode = self._OF_TAGS.get(tag)
        if decode is None:
            _refuse(f"unknown tag {tag!r}")
        return decode(self, body, depth, live)

    def _mapping(
        self, make: Callable[[Any], Any], tag: str, body: Any, depth: int, live: Live
    ) -> Any:
        pairs: list[Any] = []
        if (
            {*map(type, body)} == {list}
            and {*map(len, body)} == {2}
            and are_scalars(chain.from_iterable(body))
        ):
            pairs, body = body, []
        for key, item in body:
            found = self._decode(key, depth + 1, NOTHING)
            below = NOTHING if live is NOTHING else child_of(live, found)
            pairs.append((found, self._decode(item, depth + 1, below)))
        try:
            result = make(pairs)
        except TypeError:
            if not _has_instance([key for key, _ in body]):
                raise
            return pairs  # an instance that became plain is no key
        if len(result) != len(pairs):
            if _has_instance([key for key, _ in body]):
                return pairs
            _refuse(f"{tag} with a key that stands twice")
        return result

    def _set_of(self, tag: str, body: Any, depth: int) -> Any:
        items = self._items(body, depth, NOTHING)
        try:
            result = _SETS[tag](items)
        except TypeError:
            if not _has_instance(body):
                raise
            return items
        if len(result) != len(items):
            if _has_instance(body):
                return items
            _refuse(f"{tag} with an item that stands twice")
        return result

    def _set(self, body: Any, depth: int, live: Live) -> Any:
        return self._set_of("$set", body, depth)

    def _frozenset(self, body: Any, depth: int, live: Live) -> Any:
        return self._set_of("$frozenset", body, depth)

    def _deque(self, body: Any, depth: int, live: Live) -> Any:
        items, maxlen = body
        if maxlen is not None and type(maxlen) is not int:
            _refuse("$deque without a length")
        found: deque[Any] = deque(self._items(items, depth, live), maxlen)
        if len(found) != len(items):
            _refuse("$deque with more items than it can have")
        return found

    def _defaultdict(self, body: Any, depth: int, live: Live) -> Any:
        name, pairs = body
        factory: Any = FACTORIES.get(name)
        is_known = factory is not None or name == NO_FACTORY
        if not is_known and name != OTHER_FACTORY:
            _refuse("$defaultdict of an unknown default")
        if type(live) is defaultdict:
            factory, is_known = live.default_factory, True
        make: Any = dict
        if is_known:
            make = lambda found: defaultdict(factory, found)  # noqa: E731
        return self._mapping(make, "$defaultdict", pairs, depth, live)

    def _namespace(self, body: Any, depth: int, live: Live) -> Any:
        name, pairs = body
        if name not in ("SimpleNamespace", "Namespace"):
            _refuse(f"$namespace of {name!r:.50}")
        import argparse
        import types

        attributes = self._mapping(dict, "$namespace", pairs, depth, live)
        if not all(type(key) is str for key in attributes):
            _refuse("$namespace with an attribute without a name")
        made: Any = types.SimpleNamespace() if name != "Namespace" else argparse.Namespace()
        vars(made).update(attributes)
        return made

    def _array(self, body: Any, depth: int, live: Live) -> Any:
        dtype, shape, order, data = body
        form = Form.of((dtype, shape, order))
        if isinstance(data, str):
            return arrays.decoded(form, data)
        if (
            type(data) is dict
            and data.keys() == {"$tensor"}
            and type(data["$tensor"]) is str
        ):
            return self.array(form, data["$tensor"])
        _refuse("$array without elements")

    def _of_torch(self, body: Any, depth: int, live: Live) -> Any:
        kind, found = body
        if kind == SIZE:
            if type(found) is not list or not {*map(type, found)} <= {int}:
                _refuse("$torch of no size")
        elif kind not in TORCH_KINDS or type(found) is not str:
            _refuse(f"$torch of {kind!r:.50}")
        return self.of_torch(kind, found)

    def _member(self, body: Any, depth: int, live: Live) -> Any:
        class_name, name, *rest = body
        _check_class(class_name)
        if (
            len(rest) > 1
            or not (name is None or type(name) is str)
            or [name, *rest] == [None]
        ):
            _refuse("$enum without a name")
        value = self._decode(rest[0], depth + 1, NOTHING) if rest else None
        kind = self.kind_of(class_name)
        if kind is not None:
            try:
                return instances.made_member(kind, name, value, bool(rest))
            except ValueError as error:
                self.cannot_rebuild(class_name, error)
        return value if rest else name

    def _dataclass(self, body: Any, depth: int, live: Live) -> Any:
        class_name, *attributes = body
        _check_class(class_name)
        if not 1 <= len(attributes) <= 2 or any(
            type(one) is not dict for one in attributes
        ):
            _refuse("$dataclass without fields")
        found = [
            {
                name: self._decode(item, depth + 1, child_of(live, name))
                for name, item in one.items()
            }
            for one in attributes
        ]
        parts = Parts(found[0], found[1] if len(found) == 2 else {})
        kind = self.kind_of(class_name)
        if kind is not None:
            try:
                return instances.made_dataclass(kind, parts)
            except ValueError as error:
                self.cannot_rebuild(class_name, error)
        return {**parts.fields, **parts.others}

    def _namedtuple(self, body: Any, depth: int, live: Live) -> Any:
        class_name, names, encoded = body
        _check_class(class_name)
        if type(names) is not list or type(encoded) is not list:
            _refuse("$namedtuple without items")
        if len(names) != len(encoded) or not {*map(type, names)} <= {str}:
            _refuse("$namedtuple without names")
        items = self._items(encoded, depth, live)
        kind = self.kind_of(class_name)
        if kind is not None:
            try:
                return instances.made_namedtuple(kind, names, items)
            except ValueError as error:
                self.cannot_rebuild(class_name, error)
        return tuple(items)

    def _derived(self, body: Any, depth: int, live: Live) -> Any:
        class_name, encoded = body
        _check_class(class_name)
        plain = self._decode(encoded, depth + 1, NOTHING)
        if type(plain) not in instances.SCALAR_BASES:
            _refuse("$scalar of no plain value")
        kind = self.kind_of(class_name)
        if kind is not None:
            try:
                return instances.made_scalar(kind, plain)
            except ValueError as error:
                self.cannot_rebuild(class_name, error)
        return plain

    def _wrapper(self, body: Any, depth: int, live: Live) -> Any:
        return self.wrapper(_decoded_wrapper(body), live)

    _OF_TAGS: Mapping[str, Callable[[Any, Any, int, Any], Any]] = {
        "$set": _set,
        "$frozenset": _frozenset,
        "$deque": _deque,
        "$defaultdict": _defaultdict,
        "$namespace": _namespace,
        "$array": _array,
        "$torch": _of_torch,
        "$enum": _member,
        "$dataclass": _dataclass,
        "$namedtuple": _namedtuple,
        "$scalar": _derived,
        WRAPPER: _wrapper,
    }


def child_of(live: Live, key: Any) -> Live:
    """Return what a live value has in the place of an item; ``NOTHING`` if it has none."""
    if live is NOTHING:
        return NOTHING
    if isinstance(live, Mapping):
        try:
            return live.get(key, NOTHING)
        except TypeError:  # an instance that became plain is no key
            return NOTHING
    if type(key) is int and isinstance(live, (list, tuple, deque)):
        return live[key] if 0 <= key < len(live) else NOTHING
    if type(key) is str and (instances.is_dataclass(live) or instances.is_namespace(live)):
        return getattr(live, key, NOTHING)
    return NOTHING


def _decoded_wrapper(body: Any, depth: int = 0) -> Wrapper:
    class_name, context, shape, stride, dtype, requires_grad, inner = body
    _check_class(class_name)
    are_numbers = all(
        type(one) is list and {*map(type, one)} <= {int} for one in (shape, stride)
    )
    if not are_numbers or type(dtype) is not str or type(requires_grad) is not bool:
        _refuse("$wrapper without a shape")
    if type(inner) is not dict or depth > MAX_DEPTH:
        _refuse("$wrapper without tensors")
    found: dict[str, TensorRef | Wrapper] = {}
    for name, one in inner.items():
        if type(one) is not dict or len(one) != 1:
            _refuse("$wrapper of no tensor")
        ((tag, content),) = one.items()
        if tag == "$tensor" and type(content) is str:
            found[name] = TensorRef(content)
        elif tag == WRAPPER:
            found[name] = _decoded_wrapper(content, depth + 1)
        else:
            _refuse("$wrapper of no tensor")
    return Wrapper(
        class_name, context, tuple(shape), tuple(stride), dtype, requires_grad, found
    )


def _has_instance(encoded: Any) -> bool:
    return survey(encoded).has_instances


def _check_class(name: Any) -> None:
    if type(name) is not str or not 0 < len(name) <= 1000:
        _refuse("an instance without the name of its class")


def _refuse(reason: str) -> NoReturn:
    msg = f"not an encoded value: {reason}"
    raise FormatError(msg)
