"""Notes that this process is told to stop: a signal sets a flag, and nothing else.

Python's own handlers run on the main thread, between two of its instructions: not while it
waits in a collective for a rank that is gone. So the system also writes each signal into a
socket, from which a thread of ours learns it at once; if nobody takes the flag in time,
that thread lets the signal do what it would have done without us.

Signals belong to the process, so there is one ``_Signals`` for all managers in it.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import socket
import threading
import time
import weakref
from collections import deque
from contextlib import suppress
from types import FrameType
from typing import Any

# A flag that no call of the manager takes for so long was not meant for it.
_UNTAKEN_SECONDS = 5.0
_UNTAKEN_CALLS = 3
_REMEMBERED_CALLS = 8
_LOOK_SECONDS = 0.5
_LIBC = ctypes.CDLL(None)


class Notice:
    """Whether this process was told to stop, for one manager.

    Args:
        signals: Names of the signals that tell it.

    Attributes:
        signals: The same, as numbers.
        since: When it was told, by the monotonic clock; None if it was not.
    """

    def __init__(self, signals: tuple[str, ...]) -> None:
        self.signals = tuple(signal.Signals[name] for name in signals)
        self.since: float | None = None
        self._told_by: signal.Signals | None = None
        self._taken = False
        self._calls_under_way = 0
        self._left_at: float | None = None
        self._between_calls: deque[float] = deque(maxlen=_REMEMBERED_CALLS)
        self._longest_between = 0.0

    def begin(self) -> None:
        """Handle the signals from now on; on the main thread."""
        _process.add(self)

    def end(self) -> None:
        """Handle them no more; on the main thread, else they are only let pass.

        What was noted and not taken is still let pass in time, if there is any.
        """
        if self.since is None or self._taken:
            _process.discard(self)

    def note(self, told_by: signal.Signals | None = None) -> None:
        """Note that the job is to stop."""
        if self.since is None:
            self.since, self._told_by = time.monotonic(), told_by

    def take(self) -> None:
        """Note that all ranks know it: from now on it is the program's business.

        Other managers of this process need not take it, too: it has reached the program.
        """
        for notice in _process.alive():
            if notice.since is not None:
                notice._taken = True
        self._taken = True

    def enter(self) -> None:
        """Note that a call of the manager begins: it has its own limits."""
        if self._left_at is not None:
            self._between_calls.append(time.monotonic() - self._left_at)
            # Worked out here: the thread that asks must not walk what is being changed.
            self._longest_between = max(self._between_calls)
        self._calls_under_way += 1

    def leave(self) -> None:
        """Note that it has ended."""
        self._calls_under_way -= 1
        self._left_at = time.monotonic()

    def untaken(self, now: float) -> signal.Signals | None:
        """Return the signal that nobody has taken, if it is time to let it pass."""
        if self.since is None or self._taken or self._calls_under_way:
            return None
        steps = _UNTAKEN_CALLS * self._longest_between
        waited = now - max(self.since, self._left_at or 0.0)
        return self._told_by if waited > max(_UNTAKEN_SECONDS, steps) else None


class _Signals:
    """The handlers of this process, for all managers in it."""

    def __init__(self) -> None:
        # Replaced as a whole, never changed: a handler or the thread may be looking. Not
        # kept alive: a manager that is dropped without close() has let go, too.
        self._notices: tuple[weakref.ref[Notice], ...] = ()
        self._before: dict[signal.Signals, Any] = {}
        self._let_pass: set[signal.Signals] = set()
        self._reading: socket.socket | None = None
        self._writing: socket.socket | None = None

    def add(self, notice: Notice) -> None:
        """Note signals for a manager."""
        self._notices = (*map(weakref.ref, self.alive()), weakref.ref(notice))
        if notice.signals:
            self._watch()
        for number in notice.signals:
            if number not in self._before:
                self._let_pass.discard(number)
                self._before[number] = signal.signal(number, self._handle)

    def discard(self, notice: Notice) -> None:
        """Note them no more; what nobody notes is handled as before."""
        others = [other for other in self.alive() if other is not notice]
        self._notices = tuple(map(weakref.ref, others))
        wanted = {number for other in others for number in other.signals}
        if threading.current_thread() is not threading.main_thread():
            return  # nobody else may set a handler; ours lets it pass
        for number in {*self._before} - wanted:
            self._restore(number)
        if not self._before and self._reading is not None:
            assert self._writing is not None
            self._writing.shutdown(socket.SHUT_RDWR)  # ends the thread
            self._stop_watching()

    def alive(self) -> list[Notice]:
        """Return those whose managers have not let go."""
        found = (reference() for reference in self._notices)
        return [notice for notice in found if notice is not None]

    def _restore(self, number: signal.Signals) -> None:
        before = self._before.pop(number)
        if signal.getsignal(number) == self._handle:
            signal.signal(number, signal.SIG_DFL if before is None else before)

    # Handling

    def _handle(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal; Python calls it on the main thread."""
        told = signal.Signals(number)
        if not self._note(told) or told in self._let_pass:
            self._as_before(told, frame)
        elif self._writing is not None:
            # Where the socket is somebody else's, the thread learns it from here.
            with suppress(OSError):
                self._writing.send(bytes([number]))

    def _note(self, number: signal.Signals) -> bool:
        """Tell the managers; False if none wants to know."""
        found = False
        for notice in self.alive():
            if number in notice.signals:
                notice.note(number)
                found = True
        return found

    def _as_before(self, number: signal.Signals, frame: FrameType | None) -> None:
        before = self._before.get(number)
        if callable(before):
            before(int(number), frame)
        elif before != signal.SIG_IGN:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    # The thread

    def _watch(self) -> None:
        if self._reading is not None:
            return
        self._reading, self._writing = socket.socketpair()
        for end in (self._reading, self._writing):
            end.setblocking(False)
        # One a process: if somebody has it, it stays his.
        other = signal.set_wakeup_fd(self._writing.fileno(), warn_on_full_buffer=False)
        if other != -1:
            signal.set_wakeup_fd(other, warn_on_full_buffer=False)
        threading.Thread(
            target=self._look, args=(self._reading,), name="distckpt-signals", daemon=True
        ).start()

    def _stop_watching(self) -> None:
        """Give the socket back."""
        assert self._reading is not None and self._writing is not None
        other = signal.set_wakeup_fd(-1)
        if other not in (-1, self._writing.fileno()):
            signal.set_wakeup_fd(other, warn_on_full_buffer=False)
        self._writing.close()
        self._reading = self._writing = None

    def _look(self, reading: socket.socket) -> None:
        """Learn of signals, and let pass what nobody takes; on a thread of its own."""
        is_noted = False
        with reading:
            while True:
                # For ever, as long as nothing has come.
                seconds = _LOOK_SECONDS if is_noted else None
                ready, _, _ = select.select([reading], [], [], seconds)
                if ready:
                    numbers = reading.recv(64)
                    if not numbers:
                        return
                    for number in set(numbers) & {*map(int, self._before)}:
                        is_noted |= self._note(signal.Signals(number))
                now = time.monotonic()
                for notice in self.alive():
                    untaken = notice.untaken(now)
                    if untaken is not None:
                        self._pass_on(untaken)

    def _pass_on(self, number: signal.Signals) -> None:
        """Let a signal do what it would have done without us."""
        if number in self._let_pass:
            return
        self._let_pass.add(number)
        if self._before.get(number) == signal.SIG_DFL:
            # Only the main thread may set a handler by way of Python, and it may be in a
            # call that never ends.
            _LIBC.signal(int(number), 0)
        os.kill(os.getpid(), number)

    def forget(self) -> None:
        """Be as if nothing had been handled: in a process that was forked."""
        if self._reading is None:
            return
        # A worker of a data loader must end when it is told to, and must not tell its
        # parent, with whom it shares the socket.
        self._notices = ()
        for number in [*self._before]:
            self._restore(number)
        self._stop_watching()


_process = _Signals()
os.register_at_fork(after_in_child=_process.forget)
