"""JSON as distckpt writes it, and a reader that takes nothing else for it.

Python's own reader keeps the last of two equal keys, accepts NaN and can be made to
overflow its stack; for files that decide what is deleted that is not good enough.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from json.encoder import encode_basestring_ascii
from typing import Any, NoReturn


class JsonError(ValueError):
    """Text that is not strict JSON; callers turn it into their own format error."""


def dumps(value: object) -> str:
    """Encode to compact ASCII JSON; NaN and infinities are refused."""
    return _ENCODER.encode(value)


def quote(text: str) -> str:
    """Encode a string, quickly."""
    return encode_basestring_ascii(text)


def lines(items: Sequence[str]) -> str:
    """Make a list of values that are encoded already, one a line."""
    return "[\n " + ",\n ".join(items) + "\n]" if items else "[]"


def loads(data: bytes) -> Any:
    """Decode one strict JSON document.

    Raises:
        JsonError: Not UTF-8, not JSON, a key that stands twice in one object, NaN or
            an infinity (also as ``1e999``), the integer ``-0``, nested too deeply, or
            numbers with thousands of digits.
    """
    try:
        return _DECODER.decode(data.decode("utf-8"))
    except RecursionError:
        msg = "nested too deeply"
        raise JsonError(msg) from None
    except JsonError:
        raise
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError included
        raise JsonError(str(error)) from None


def cut(text: str, start: int) -> tuple[Any, int]:
    """Decode the value that begins at a position; returns it and where it ends.

    Raises:
        JsonError: As ``loads``.
    """
    try:
        return _DECODER.raw_decode(text, start)
    except RecursionError:
        msg = "nested too deeply"
        raise JsonError(msg) from None
    except JsonError:
        raise
    except ValueError as error:
        raise JsonError(str(error)) from None


def is_unicode(text: str) -> bool:
    """Tell whether a string is text: JSON can spell lone surrogates, UTF-8 cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                msg = f"key {key!r} stands twice in one object"
                raise JsonError(msg)
            seen.add(key)
    return result


def _parse_int(text: str) -> int:
    if text == "-0":  # Other readers take it for a float.
        _refuse_constant(text)
    return int(text)


def _parse_float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        _refuse_constant(text)
    return value


def _refuse_constant(text: str) -> NoReturn:
    msg = f"{text} is not JSON"
    raise JsonError(msg)


_ENCODER = json.JSONEncoder(allow_nan=False, separators=(",", ":"))
_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys,
    parse_int=_parse_int,
    parse_float=_parse_float,
    parse_constant=_refuse_constant,
)
