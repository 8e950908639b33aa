"""What a thread is doing in the filesystem, for other threads to see.

A call into a filesystem can hang for ever, and nothing can end it. Who watches the thread
that makes it need not wait.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from distckpt.errors import StorageError


class Call(NamedTuple):
    """One call into the filesystem: what, on what, since when (``time.monotonic``)."""

    operation: str
    path: str
    since: float


class Calls:
    """The calls of one thread, for other threads to see.

    Attributes:
        current: The call that the thread is in, if any.
        num_finished: How many came back.
        stopped: Set by another thread: the next call fails instead of being made.
    """

    def __init__(self) -> None:
        self.current: Call | None = None
        self.num_finished = 0
        self.stopped = False

    def check_wanted(self, operation: str, path: str) -> None:
        """Raise ``StorageError`` if nobody waits for this thread any more."""
        if self.stopped:
            msg = f"{operation} {path}: not done, nobody waits for it any more."
            raise StorageError(msg, operation=operation, path=path)

    def begin(self, operation: str, path: str) -> None:
        """Note that a call begins."""
        self.check_wanted(operation, path)
        self.current = Call(operation, path, time.monotonic())

    def end(self) -> None:
        """Note that it came back, well or not."""
        self.current = None
        self.num_finished += 1


_thread = threading.local()


@contextmanager
def watch_this_thread(calls: Calls) -> Iterator[None]:
    """Note all calls that this thread makes meanwhile."""
    before = getattr(_thread, "calls", None)
    _thread.calls = calls
    try:
        yield
    finally:
        _thread.calls = before


@contextmanager
def watched(operation: str, path: str) -> Iterator[None]:
    """Let a call be seen from other threads while it runs."""
    calls: Calls | None = getattr(_thread, "calls", None)
    if calls is not None:
        calls.begin(operation, path)
    try:
        yield
    finally:
        if calls is not None:
            calls.end()


def check_wanted(operation: str, path: str) -> None:
    """Raise ``StorageError`` if nobody waits for what this thread does any more.

    To be called before it touches memory that whoever waits for it keeps alive.
    """
    calls: Calls | None = getattr(_thread, "calls", None)
    if calls is not None:
        calls.check_wanted(operation, path)
