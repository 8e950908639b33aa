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

from distckpt.collector import collector_paused


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
        text = data.decode("utf-8")
        decoder = _DECODER if _may_hold_odd_numbers(data) else _FAST_DECODER
        if len(data) < _LARGE_BYTES:
            return decoder.decode(text)
        with collector_paused():
            return decoder.decode(text)
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


# Each byte as what it is in a number: a digit, an exponent, or something else.
_NUMBERS = bytes(
    ord("0" if chr(byte).isdigit() else "e" if chr(byte) in "eE" else chr(byte))
    for byte in range(128)
) + bytes(128)
_MINUS_ZEROS = tuple(b"-0" + end for end in (b",", b"]", b"}", b" ", b"\n", b"\r", b"\t"))
# An exponent, or a number, that float64 may not reach.
_LARGE_EXPONENT = b"e000"
_LONG_NUMBER = b"0" * 300
_MAX_HITS = 10_000
# Of so much text the collector of garbage is kept out of the way.
_LARGE_BYTES = 2**20


def _may_hold_odd_numbers(data: bytes) -> bool:
    """Tell whether there may be ``-0`` or ``1e999``, which the fast decoder would take.

    It calls no Python for each number. Digests are full of what looks like an exponent, so
    what stands in front of it is looked at, too.
    """
    if b"-0" in data and (data.endswith(b"-0") or any(odd in data for odd in _MINUS_ZEROS)):
        return True
    numbers = data.translate(_NUMBERS, b"+")
    if _LONG_NUMBER in numbers:
        return True
    at = numbers.find(_LARGE_EXPONENT)
    for _ in range(_MAX_HITS):
        if at < 0:
            return False
        start = at
        while start > 0 and numbers[start - 1] in b"0.-":
            start -= 1
        if start < at and (start == 0 or numbers[start - 1] in b"[,: \n\r\t"):
            return True
        at = numbers.find(_LARGE_EXPONENT, at + 1)
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
_FAST_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys, parse_constant=_refuse_constant
)
_DECODER = json.JSONDecoder(
    object_pairs_hook=_unique_keys,
    parse_int=_parse_int,
    parse_float=_parse_float,
    parse_constant=_refuse_constant,
)
