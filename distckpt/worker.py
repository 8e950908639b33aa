"""Storage work off the caller's thread, so that a call that hangs can be left behind.

A call into a filesystem can hang for ever (a dead NFS server, a frozen volume, a stopped
FUSE daemon), and no signal ends it. So the work of one manager runs on threads of its
own: the caller waits, and once a single call has hung for as long as the limit, leaves
with a ``StorageTimeout`` that names it. What hangs goes on hanging; what comes next waits
for it first, so never more than one of a manager's threads is at work.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from collections.abc import Callable
from contextlib import suppress
from typing import Any, Generic, TypeVar

from distckpt import calls
from distckpt.errors import StorageTimeout

_Result = TypeVar("_Result")

_POLL_SECONDS = 0.05
_LOW_PRIORITY = 10
# Of all managers: a task stays here for as long as its thread has it.
_filling: weakref.WeakSet[Any] = weakref.WeakSet()


class Worker:
    """Runs the storage work of one manager, one task after the other.

    Args:
        limit_seconds: How long a single call into the filesystem may take.

    Attributes:
        interrupt: A Ctrl-C (or exit) that came while a task had to be finished; to be
            raised by whoever made the call, once all ranks know how it ended.
    """

    def __init__(self, limit_seconds: float) -> None:
        self._limit_seconds = limit_seconds
        self._last: _Task[object] | None = None
        self.interrupt: BaseException | None = None

    def finish(self, body: Callable[[], _Result]) -> _Result:
        """Run what must not be left half-done: a commit, a claim.

        The first Ctrl-C waits until it is through; the second one does not, and leaves
        it to go on alone.

        Raises:
            StorageTimeout: A call into the filesystem hangs, or that of an earlier task
                still does. The task may go on when the call comes back.
        """
        task = _Task(body)
        try:
            self._start(task)
            self._wait(task)
        except StorageTimeout:
            raise
        except BaseException as error:
            # Ctrl-C, or what a signal's handler raises: the task cannot raise in here.
            if self.interrupt is not None or not task.has_begun():
                raise
            self.interrupt = error
            self._wait(task)
        return task.result()

    def raise_interrupt(self) -> None:
        """Raise what has interrupted a task meanwhile, if anything has; once."""
        interrupt, self.interrupt = self.interrupt, None
        if interrupt is not None:
            raise interrupt

    def run(
        self,
        body: Callable[[], _Result],
        each_time: Callable[[bool], None],
        *,
        fills_tensors: bool = False,
        yields: bool = False,
    ) -> _Result:
        """Run what may be given up: writing or reading this rank's tensors.

        Args:
            body: The work.
            fills_tensors: Whether it writes into live tensors. What is left behind of
                such work could do so when another manager has filled them: it waits.
            yields: Whether whoever else wants the processor goes first.
            each_time: Called some twenty times a second while waiting, and told whether
                the work has made progress; what it raises ends the waiting, and the
                work with its next call into the filesystem.

        Raises:
            StorageTimeout: As ``finish``.
        """
        task = _Task(body, yields)
        try:
            for other in list(_filling) if fills_tensors else ():
                self._wait(other)
            self._start(task, fills_tensors)
            self._wait(task, each_time)
        except BaseException:
            task.calls.stopped = True
            raise
        return task.result()

    def _start(self, task: _Task[_Result], fills_tensors: bool = False) -> None:
        if self._last is not None:
            # It outlived its caller. Two at a time would be in each other's way.
            self._wait(self._last)
        thread = threading.Thread(target=task.run, name="distckpt-storage", daemon=True)
        self._last = task  # type: ignore[assignment]
        if fills_tensors:
            _filling.add(task)
        try:
            thread.start()
        except RuntimeError:
            # No thread to be had, or the interpreter is on its way out: better done
            # without a way to leave it than not at all.
            task.run()
        except BaseException:
            if not task.has_begun():
                self._last = None
                _filling.discard(task)
            raise

    def _wait(
        self, task: _Task[_Result], each_time: Callable[[bool], None] | None = None
    ) -> None:
        seen = 0
        while not task.done.wait(_POLL_SECONDS):
            if each_time is not None:
                seen, before = task.calls.num_finished, seen
                each_time(seen != before)
            call = task.calls.current
            if call is not None and time.monotonic() - call.since > self._limit_seconds:
                msg = (
                    f"{call.operation} {call.path}: did not come back within "
                    f"{self._limit_seconds:g} s; the filesystem hangs, or is slower than "
                    "the manager's timeout allows."
                )
                raise StorageTimeout(msg, operation=call.operation, path=call.path)

    @property
    def current_call(self) -> calls.Call | None:
        """The call into the filesystem that is under way, if any."""
        return None if self._last is None else self._last.calls.current


def yield_to_others() -> None:
    """Let whoever else wants the processor go before this thread, from now on."""
    # Linux alone has a priority for each thread; to lower one's own is always allowed.
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOW_PRIORITY)


class _Task(Generic[_Result]):
    """One body on one thread."""

    def __init__(self, body: Callable[[], _Result], yields: bool = False) -> None:
        self._body: Callable[[], _Result] | None = body
        self._yields = yields
        self._result: _Result | None = None
        self._error: BaseException | None = None
        self._begun = threading.Event()
        self.calls = calls.Calls()
        self.done = threading.Event()

    def run(self) -> None:
        """Run the body; called by the thread."""
        self._begun.set()
        if self._yields:
            yield_to_others()
        try:
            assert self._body is not None
            with calls.watch_this_thread(self.calls):
                self._result = self._body()
        except BaseException as error:
            self._error = error
        self._body = None  # and what it holds: tensors, files
        self.done.set()

    def has_begun(self) -> bool:
        """Tell whether a thread runs it; Ctrl-C may have come before there was one."""
        return self._begun.wait(1.0)

    def result(self) -> _Result:
        """Return what the body returned, or raise what it raised; once."""
        result, error = self._result, self._error
        self._result = self._error = None
        try:
            if error is not None:
                raise error
            return result  # type: ignore[return-value]
        finally:
            del error, result
