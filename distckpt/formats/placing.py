"""Files and directories for others that are whole when they have their name."""

from __future__ import annotations

import os
from types import TracebackType

from distckpt import files, paths
from distckpt.errors import ConfigError


class Placing:
    """Makes a file or a directory under a temporary name, and puts it in place at the end.

    As a context manager: what is made at ``path`` gets its name when the body is through,
    and is removed if it raises. A process that dies leaves it under the temporary name, and
    nothing under the real one. What is there already is never replaced.

    Args:
        target: The real name.

    Attributes:
        path: The temporary name, beside it. Nothing is there yet.

    Raises:
        ConfigError: Something is there already.
        StorageError: The directory of it cannot be made.
    """

    def __init__(self, target: str) -> None:
        self._target = os.path.abspath(target)
        self._directory, name = os.path.split(self._target)
        self.path = os.path.join(self._directory, paths.partial(name))

    def __enter__(self) -> Placing:
        if files.exists(self._target):
            msg = (
                f"{self._target} is there already, and is not replaced. Remove it, or take "
                "another name."
            )
            raise ConfigError(msg)
        files.make_directories(self._directory)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            try:
                self._put_in_place()
            except BaseException:
                self._remove()
                raise
        else:
            self._remove()

    def _put_in_place(self) -> None:
        if files.is_directory(self.path):
            files.sync_directory(self.path)
        files.rename_new(self.path, self._target)
        files.sync_directory(self._directory)

    def _remove(self) -> None:
        if files.is_directory(self.path):
            files.remove_tree(self.path)
        else:
            files.remove_file(self.path)
