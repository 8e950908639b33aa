"""Files that are opened when they are needed, and not all held open at once."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

# Checkpoints have more files than a process may hold open.
_MAX_OPEN = 64


class Closable(Protocol):
    """What can be closed."""

    def close(self) -> None:
        """Close it."""


Key = TypeVar("Key")
File = TypeVar("File", bound=Closable)


class FewOpen(Generic[Key, File]):
    """Opens files by key; those that were asked for longest ago are closed again.

    Args:
        open_file: Opens the file of a key.

    Attributes:
        files: Those that are open.
        is_closed: Whether none may be opened any more.
    """

    def __init__(self, open_file: Callable[[Key], File]) -> None:
        self.files: OrderedDict[Key, File] = OrderedDict()
        self.is_closed = False
        self._open_file = open_file

    def get(self, key: Key) -> File:
        """Return a file that stays open until many others were asked for."""
        assert not self.is_closed, "opened after close()"
        file = self.files.get(key)
        if file is None:
            file = self.files[key] = self._open_file(key)
            if len(self.files) > _MAX_OPEN:
                self.files.popitem(last=False)[1].close()
        self.files.move_to_end(key)
        return file

    def close(self) -> None:
        """Close them all."""
        self.is_closed = True
        while self.files:
            self.files.popitem()[1].close()
