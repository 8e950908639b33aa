"""Paths that are like one that leads nowhere."""

from __future__ import annotations

import os

from distckpt import files
from distckpt.errors import StorageError
from distckpt.near import near_names


def there_is(path: str) -> str:
    """Spell what is called nearly as the first part of a path that is not there.

    Returns:
        A sentence with a blank before it; "" if the path is there, or nothing is like it.
    """
    parent, name = os.path.split(os.path.abspath(path))
    try:
        if files.exists(os.path.join(parent, name)):
            return ""
        while not files.is_directory(parent):
            parent, name = os.path.split(parent)
        names = [other for other in files.list_directory(parent) if other[0] != "."]
    except StorageError:
        return ""
    shown = ", ".join(os.path.join(parent, other) for other in near_names(name, names))
    return f" There is {shown}." if shown else ""
