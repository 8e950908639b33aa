"""How the name of a tensor or a plain value is put together from the keys on its way.

Parts are joined by ``/``; ``~`` and ``/`` inside a part are written ``~0`` and ``~1``
(RFC 6901), an integer key ``7`` is written ``~i7``.
"""

from __future__ import annotations

import re

_INTEGER = "~i"
_INTEGER_PART = re.compile(rf"{_INTEGER}-?[0-9]{{1,1000}}")


def escaped(text: str) -> str:
    """Spell text as one part of a name."""
    return text.replace("~", "~0").replace("/", "~1")


def part_of(key: str | int) -> str:
    """Spell one key as one part of a name."""
    return f"{_INTEGER}{key}" if isinstance(key, int) else escaped(key)


def key_of(part: str) -> str | int:
    """Return the key that one part of a name spells."""
    if _INTEGER_PART.fullmatch(part):
        return int(part[len(_INTEGER) :])
    return part.replace("~1", "/").replace("~0", "~")


def keys_of(name: str) -> tuple[str | int, ...]:
    """Return the keys that a name spells."""
    return tuple(map(key_of, name.split("/")))


def joined(*keys: str | int) -> str:
    """Build a name from keys."""
    return "/".join(map(part_of, keys))
