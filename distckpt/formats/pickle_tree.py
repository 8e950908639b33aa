"""What a pickle says, as a tree that runs nothing.

Beside None, booleans, numbers, strings, bytes, tuples, lists and dicts there stand in it
the names of classes and functions, and what Python would call them with. Nobody calls
them here: ``pickle_read.py`` makes such trees, ``pickle_write.py`` spells them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple


class Global(NamedTuple):
    """The name of a class, a function or a constant of a module."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


# Compared by identity: they stand as keys in dicts, and may contain themselves.


@dataclass(eq=False, slots=True)
class Call:
    """What Python would make by calling something.

    Attributes:
        function: What would be called.
        arguments: With what.
        is_new: Whether ``__new__`` is meant, and not the class.
        state: What the result's attributes, or its ``__setstate__``, would be given.
        items: What would be put into it, key by key.
    """

    function: Global
    arguments: tuple[Any, ...] = ()
    is_new: bool = False
    state: Any = None
    items: list[tuple[Any, Any]] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Reference:
    """What is kept outside of the pickle, by whatever its writer has called it."""

    key: Any
