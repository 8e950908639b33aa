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


def read_lines(path: str, offset: int) -> tuple[list[list[Any]], int]:
    """Read the whole lines from an offset on; returns them and where they end."""
    if not os.path.exists(path):
        return [], 0
    with open(path, "rb") as file:
        file.seek(offset)
        data = file.read()
    end = data.rfind(b"\n") + 1
    return [json.loads(line) for line in data[:end].splitlines()], offset + end
