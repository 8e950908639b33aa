"""How the name of a tensor or a plain value is put together from the keys on its way.

Parts are joined by ``/``; ``~`` and ``/`` inside a part are written ``~0`` and ``~1``
(RFC 6901), an integer key ``7`` is written ``~i7``, the group 3 of ``PerGroup`` ``~g3``.
The tensors that another one is made of stand below its name and ``~inner``.
"""

from __future__ import annotations

import re

_INTEGER = "~i"
_GROUP = "~g"
_INNER = "~inner"
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


def group_part(group: int) -> str:
    """Spell the number of a group as one part of a name."""
    return f"{_GROUP}{group}"


def group_of(part: str) -> int | None:
    """Return the number of a group that one part of a name spells; None: it does not."""
    number = part.removeprefix(_GROUP)
    is_group = part.startswith(_GROUP) and number.isascii() and number.isdecimal()
    return int(number) if is_group else None


def inner_name(name: str, attribute: str) -> str:
    """Name a tensor that another one is made of.

    Args:
        name: Of the other one.
        attribute: Under which that one has it.
    """
    return f"{name}/{_INNER}/{escaped(attribute)}"


def split_inner(name: str) -> tuple[str, str]:
    """Split the name of such a tensor: that of the outermost one, and the rest.

    The rest is empty if it is the name of no such tensor.
    """
    outer, found, rest = name.partition(f"/{_INNER}/")
    return outer, f"{found}{rest}"


def keys_of(name: str) -> tuple[str | int, ...]:
    """Return the keys that a name spells."""
    return tuple(map(key_of, name.split("/")))


def joined(*keys: str | int) -> str:
    """Build a name from keys."""
    return "/".join(map(part_of, keys))
