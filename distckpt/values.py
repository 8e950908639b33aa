"""Plain Python values <-> JSON, without pickle: the same types, the same numbers.

What JSON has, it stands for itself. Everything else is an object with one key that
starts with ``$``:

==================  ==========================================================
``$tuple``          list of items
``$dict``           list of [key, value]: keys that are not strings, or any "$"
``$ordered``        the same, a ``collections.OrderedDict``
``$counter``        the same, a ``collections.Counter``
``$bytes``          base64
``$float``          "inf", "-inf" or "nan" (one NaN is like another)
``$numpy``          [dtype, base64] of a numpy scalar
``$tensor``         name of a tensor that is stored beside
``$object``         [class name, value]: the value is the state of an object
``$one``            value of one rank, which others may have otherwise
==================  ==========================================================

``$one`` and ``$object`` stand at the top only, in this order, and decoding leaves them out.
The class name is empty if nothing tells whether the value is the state of an object.

Anything else is refused with its path in the tree: a value that comes back as another
type is a bug that shows weeks later.
"""

from __future__ import annotations

import base64
import math
import re
import sys
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NoReturn, cast

from distckpt.errors import FormatError, UnsupportedError

_MAX_DEPTH = 64
_MAX_INT_BITS = 4096
_PAIR_TAGS: dict[str, Callable[[Iterable[tuple[Any, Any]]], Any]] = {
    "$dict": dict,
    "$ordered": OrderedDict,
    "$counter": lambda pairs: Counter(dict(pairs)),
}
_OBJECT = "$object"
_ONE = "$one"
_NUMPY_KINDS = "biufc"
# What numpy's ``dtype.str`` is for these kinds; its parser understands far more.
_NUMPY_DTYPE = re.compile(rf"[<>|][{_NUMPY_KINDS}][0-9]{{1,2}}")


@dataclass(frozen=True, slots=True)
class TensorRef:
    """Stands in a tree of values for a tensor that is stored beside it."""

    name: str


def encode(value: object, path: str = "value") -> Any:
    """Turn a plain value into what JSON can carry.

    Args:
        value: None, bool, int, float, str, bytes, numpy scalars, ``TensorRef``, and
            dicts, lists, tuples, OrderedDicts and Counters of these. Subclasses are
            refused: their type would be lost.
        path: Where the value stands, for messages.

    Raises:
        UnsupportedError: Names the path, the type and what to do.
    """
    return _encode(value, path, 0)


def decode(encoded: object) -> Any:
    """Turn what ``encode`` returned back into the value.

    Raises:
        FormatError: Not something that ``encode`` returns.
    """
    if is_of_one_rank(encoded):
        encoded = cast("dict[str, object]", encoded)[_ONE]
    if isinstance(encoded, dict) and encoded.keys() == {_OBJECT}:
        body = encoded[_OBJECT]
        if not (isinstance(body, list) and len(body) == 2 and isinstance(body[0], str)):
            _refuse("$object without a class name and a value")
        encoded = body[1]
    return _decode(encoded, 0)


def as_state(class_name: str, encoded: object) -> Any:
    """Mark an encoded value as the state of an object.

    Args:
        class_name: Name of the object's class; empty: it may be an object's or not.
        encoded: The state, as ``encode`` returns it.
    """
    return {_OBJECT: [class_name, encoded]}


def of_one_rank(encoded: object) -> Any:
    """Mark an encoded value as that of one rank."""
    return {_ONE: encoded}


def is_of_one_rank(encoded: Any) -> bool:
    """Tell whether an encoded value is that of one rank."""
    return isinstance(encoded, dict) and encoded.keys() == {_ONE}


def class_of_state(encoded: Any) -> str | None:
    """Return the class name of an object's state; None for a plain value."""
    if is_of_one_rank(encoded):
        encoded = encoded[_ONE]
    if isinstance(encoded, dict) and encoded.keys() == {_OBJECT}:
        class_name: str = encoded[_OBJECT][0]
        return class_name
    return None


def _encode(value: object, path: str, depth: int) -> Any:
    kind = type(value)
    if value is None or kind is bool or kind is str:
        return value
    if isinstance(value, int) and kind is int:
        if value.bit_length() > _MAX_INT_BITS:
            msg = f"{path}: an integer of more than {_MAX_INT_BITS} bits."
            raise UnsupportedError(msg)
        return value
    if isinstance(value, float) and kind is float:
        return value if math.isfinite(value) else {"$float": repr(value)}
    if isinstance(value, bytes) and kind is bytes:
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    if isinstance(value, TensorRef):
        return {"$tensor": value.name}
    if depth >= _MAX_DEPTH:
        msg = (
            f"{path[:200]}: nested deeper than {_MAX_DEPTH} levels; does the value "
            "contain itself?"
        )
        raise UnsupportedError(msg)
    if isinstance(value, (list, tuple)) and kind in (list, tuple):
        items = [_encode(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
        return items if kind is list else {"$tuple": items}
    if isinstance(value, dict) and kind in (dict, OrderedDict, Counter):
        return _encode_dict(value, path, depth)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.generic):
        if value.dtype.kind not in _NUMPY_KINDS:
            msg = f"{path}: a numpy scalar of dtype {value.dtype} cannot be stored."
            raise UnsupportedError(msg)
        data = base64.b64encode(value.tobytes()).decode("ascii")
        return {"$numpy": [value.dtype.str, data]}
    msg = (
        f"{path}: a value of type {kind.__module__}.{kind.__qualname__} cannot be "
        "stored. Plain values are None, bool, int, float, str, bytes, numpy scalars, "
        "and dicts, lists and tuples of these; give other objects a state_dict() and "
        "a load_state_dict()."
    )
    raise UnsupportedError(msg)


def _encode_dict(value: dict[Any, Any], path: str, depth: int) -> Any:
    plain = type(value) is dict
    if plain and all(type(key) is str and not key.startswith("$") for key in value):
        return {
            key: _encode(item, f"{path}[{key!r}]", depth + 1) for key, item in value.items()
        }
    pairs = [
        [
            _encode(key, f"{path}: key {_shown(key)}", depth + 1),
            _encode(item, f"{path}[{_shown(key)}]", depth + 1),
        ]
        for key, item in value.items()
    ]
    tag = {dict: "$dict", OrderedDict: "$ordered", Counter: "$counter"}[type(value)]
    return {tag: pairs}


def _shown(key: object) -> str:
    try:
        return f"{key!r:.100}"
    except ValueError:  # Python refuses to print very long integers.
        return f"of type {type(key).__qualname__}"


def _decode(encoded: Any, depth: int) -> Any:
    if depth > 2 * _MAX_DEPTH:
        _refuse("nested too deeply")
    if encoded is None or isinstance(encoded, (bool, int, float, str)):
        return encoded
    if isinstance(encoded, list):
        return [_decode(item, depth + 1) for item in encoded]
    if not isinstance(encoded, dict):
        _refuse(f"unexpected {type(encoded).__name__}")
    if not any(key.startswith("$") for key in encoded):
        return {key: _decode(item, depth + 1) for key, item in encoded.items()}
    if len(encoded) != 1:
        _refuse(f"a tag beside other keys: {sorted(encoded)[:5]}")
    ((tag, body),) = encoded.items()
    try:
        return _decode_tagged(tag, body, depth)
    except FormatError:
        raise
    except (TypeError, ValueError, KeyError) as error:
        msg = f"not a valid {tag} value: {error}"
        raise FormatError(msg) from error


def _decode_tagged(tag: str, body: Any, depth: int) -> Any:
    if tag == "$tuple":
        if not isinstance(body, list):
            _refuse("$tuple without a list")
        return tuple(_decode(item, depth + 1) for item in body)
    if tag in _PAIR_TAGS:
        pairs = [(_decode(key, depth + 1), _decode(item, depth + 1)) for key, item in body]
        result = _PAIR_TAGS[tag](pairs)
        if len(result) != len(pairs):
            _refuse(f"{tag} with a key that stands twice")
        return result
    if tag == "$bytes":
        return base64.b64decode(body, validate=True)
    if tag == "$float" and body in ("inf", "-inf", "nan"):
        return float(body)
    if tag == "$tensor" and isinstance(body, str):
        return TensorRef(body)
    if tag == "$numpy":
        return _decode_numpy(*body)
    _refuse(f"unknown tag {tag!r}")


def _decode_numpy(dtype_text: str, data: str) -> Any:
    import numpy as np

    if not _NUMPY_DTYPE.fullmatch(dtype_text):
        _refuse(f"$numpy of dtype {dtype_text!r:.50}")
    dtype = np.dtype(dtype_text)
    raw = base64.b64decode(data, validate=True)
    if len(raw) != dtype.itemsize:
        _refuse(f"$numpy of dtype {dtype_text!r} with {len(raw)} bytes")
    return np.frombuffer(raw, dtype=dtype)[0]


def _refuse(reason: str) -> NoReturn:
    msg = f"not an encoded value: {reason}"
    raise FormatError(msg)
