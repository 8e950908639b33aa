"""Types of Python and of its standard library that JSON lacks: taken apart, made again.

They come back as themselves: the classes are named here, not in a file.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

# What ``str()`` of a Decimal can look like.
_DECIMAL = re.compile(
    r"-?(?:[0-9]{1,4300}(?:\.[0-9]{0,4300})?(?:E[+-]?[0-9]{1,18})?|Infinity|s?NaN[0-9]{0,30})"
)


class Codec(NamedTuple):
    """How values of one type are stored.

    Attributes:
        tag: Stands for the type in a file.
        kind: The type.
        parts: Makes of a value simpler ones, which are encoded in turn.
        made: Makes a value of them. Raises ``TypeError``, ``ValueError`` or
            ``ArithmeticError`` for what ``parts`` never makes.
    """

    tag: str
    kind: type
    parts: Callable[[Any], Any]
    made: Callable[[Any], Any]


def codec_of(kind: type) -> Codec | None:
    """Return how values of a type are stored; None: it is not one of these."""
    return _by_type().get(kind)


def codec_of_tag(tag: str) -> Codec | None:
    """Return what a tag stands for; None: none of these."""
    return _by_tag().get(tag)


@cache
def _by_type() -> dict[type, Codec]:
    return {codec.kind: codec for codec in _codecs()}


@cache
def _by_tag() -> dict[str, Codec]:
    return {codec.tag: codec for codec in _codecs()}


def _codecs() -> list[Codec]:
    # Not at the top: a checkpoint of numbers and texts needs none of these modules.
    import datetime
    import pathlib  # for the names of files alone
    import uuid
    from decimal import Decimal
    from fractions import Fraction

    def made_path(name: str, text: str) -> Any:
        kinds = ("PurePosixPath", "PureWindowsPath", "PosixPath", "WindowsPath")
        if name not in kinds or type(text) is not str:
            raise ValueError(name)
        # A path of another system is a name here, not a file.
        is_of_here = name == type(pathlib.Path()).__name__
        is_posix = name.endswith("PosixPath")
        pure = pathlib.PurePosixPath if is_posix else pathlib.PureWindowsPath
        return pathlib.Path(text) if is_of_here else pure(text)

    def paths() -> list[Codec]:
        kinds = (pathlib.PurePosixPath, pathlib.PureWindowsPath, type(pathlib.Path()))
        return [
            Codec(
                "$path",
                kind,
                lambda value: [type(value).__name__, str(value)],
                lambda parts: made_path(*parts),
            )
            for kind in kinds
        ]

    def time_zone_of(value: Any) -> Any:
        zone = value.tzinfo
        if zone is not None and type(zone) is not datetime.timezone:
            msg = (
                f"its time zone is a {type(zone).__qualname__}, whose rules are not "
                "stored; store value.astimezone(datetime.timezone.utc)"
            )
            raise ValueError(msg)
        return zone

    def parts_of_time(value: Any) -> list[Any]:
        return [value.replace(tzinfo=None).isoformat(), value.fold, time_zone_of(value)]

    def made_time(kind: Any, parts: Any) -> Any:
        text, fold, zone = parts
        _check(type(fold) is int and (zone is None or type(zone) is datetime.timezone))
        return kind.fromisoformat(_text(text)).replace(fold=fold, tzinfo=zone)

    return [
        Codec(
            "$complex",
            complex,
            lambda value: [value.real, value.imag],
            lambda parts: complex(*_typed(parts, float, 2)),
        ),
        Codec(
            "$range",
            range,
            lambda value: [value.start, value.stop, value.step],
            lambda parts: range(*_typed(parts, int, 3)),
        ),
        Codec(
            "$slice",
            slice,
            lambda value: [value.start, value.stop, value.step],
            lambda parts: slice(*_listed(parts, 3)),
        ),
        Codec(
            "$bytearray",
            bytearray,
            lambda value: base64.b64encode(value).decode("ascii"),
            lambda parts: bytearray(base64.b64decode(_text(parts), validate=True)),
        ),
        Codec("$ellipsis", type(...), lambda _: None, lambda _: ...),
        *paths(),
        Codec(
            "$date",
            datetime.date,
            datetime.date.isoformat,
            lambda parts: datetime.date.fromisoformat(_text(parts)),
        ),
        Codec(
            "$datetime",
            datetime.datetime,
            parts_of_time,
            lambda parts: made_time(datetime.datetime, parts),
        ),
        Codec(
            "$time",
            datetime.time,
            parts_of_time,
            lambda parts: made_time(datetime.time, parts),
        ),
        Codec(
            "$timedelta",
            datetime.timedelta,
            lambda value: [value.days, value.seconds, value.microseconds],
            lambda parts: datetime.timedelta(*_typed(parts, int, 3)),
        ),
        Codec(
            "$timezone",
            datetime.timezone,
            # As pickle has it: the difference from UTC, and the name if there is one.
            lambda value: [*value.__getinitargs__()],
            lambda parts: datetime.timezone(*_listed(parts, 1, 2)),
        ),
        Codec("$uuid", uuid.UUID, str, lambda parts: uuid.UUID(_text(parts))),
        Codec(
            "$decimal",
            Decimal,
            lambda value: _decimal(str(value)),
            lambda parts: Decimal(_decimal(parts)),
        ),
        Codec(
            "$fraction",
            Fraction,
            lambda value: [value.numerator, value.denominator],
            lambda parts: Fraction(*_typed(parts, int, 2)),
        ),
    ]


def _check(condition: bool) -> None:
    if not condition:
        raise ValueError


def _listed(parts: Any, *lengths: int) -> list[Any]:
    _check(type(parts) is list and len(parts) in lengths)
    found: list[Any] = parts
    return found


def _typed(parts: Any, kind: type, length: int) -> list[Any]:
    found = _listed(parts, length)
    _check({*map(type, found)} == {kind})
    return found


def _text(parts: Any) -> str:
    _check(type(parts) is str)
    text: str = parts
    return text


def _decimal(parts: Any) -> str:
    text = _text(parts)
    _check(_DECIMAL.fullmatch(text) is not None)
    return text
