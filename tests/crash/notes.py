"""What the processes of a job tell, also when they die."""

from __future__ import annotations

import json
import os
from typing import Any


class Notes:
    """What the ranks of a job tell, outside the run directory: written at once."""

    def __init__(self, path: str) -> None:
        self._path = path

    def add(self, what: str, *values: Any) -> None:
        """Write one line, whole or not at all."""
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        descriptor = os.open(self._path, flags)
        os.write(descriptor, (json.dumps([what, *values]) + "\n").encode())
        os.close(descriptor)

    def read(self, what: str) -> list[Any]:
        """Return the values of all lines of one kind."""
        if not os.path.exists(self._path):
            return []
        with open(self._path, encoding="utf-8") as file:
            lines = [json.loads(line) for line in file]
        return [values for kind, *values in lines if kind == what]
