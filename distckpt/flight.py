"""An asynchronous save under way on this rank: begun, and not yet brought in."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from distckpt.comm import Answer
from distckpt.paths import Attempt
from distckpt.remarks import Remarks


class Saving(NamedTuple):
    """What one save is about.

    Attributes:
        attempt: What is saved.
        step: At which step; None if that is not known.
        remarks: What the user says of it; the chief's count.
        reasons: What has spoken for it.
        began: When, by the monotonic clock.
    """

    attempt: Attempt
    step: int | None
    remarks: Remarks
    reasons: tuple[str, ...]
    began: float


class Flight:
    """One save on its way from the call to its commit.

    A thread of its own brings it there. What came of it is told to the user only when all
    ranks know it, by the call that brings it in (``background.py``).

    Args:
        saving: What it is about.
        counter: The save counter before.
        last_step: The step of the save before, for the interval.

    Attributes:
        staged: Set when nothing of the user's memory is needed any more.
        done: Set when the outcome is there.
        answer: How the lists of checkpoints change, if it was committed.
        error: Why not.
        calls_left: After how many more calls of ``save()`` to ask whether it is done.
        hold_streams: Keeps a device's later work behind the copies.
        let_go: Called when everything is copied and the user's thread changes nothing.
        released: Set then.
        thread: Brings it to its end.
        seconds: How long it took, when it is done.
    """

    def __init__(
        self,
        saving: Saving,
        counter: int,
        last_step: int | None,
    ) -> None:
        self.saving = saving
        self.counter = counter
        self.last_step = last_step
        self.staged = threading.Event()
        self.done = threading.Event()
        self.answer: Answer | None = None
        self.error: BaseException | None = None
        self.calls_left = 1
        self.hold_streams: Callable[[], None] = _nothing
        self.let_go: Callable[[], None] = _nothing
        self.released = threading.Event()
        self.thread: threading.Thread | None = None
        self.seconds = 0.0
        self._hook: Any = None

    @property
    def attempt(self) -> Attempt:
        """What is saved."""
        return self.saving.attempt

    def finish(self) -> None:
        """Note that the outcome is there."""
        self.seconds = time.monotonic() - self.saving.began
        self.done.set()

    def wait_staged(self) -> None:
        """Wait until the user may change everything."""
        self.hold_streams()
        self.staged.wait()
        self.release()

    def release(self) -> None:
        """Let the user change everything, if all is copied; from the user's thread."""
        if self.staged.is_set() and not self.released.is_set():
            self.let_go()
            self.released.set()

    def wait_done(self, seconds: float) -> None:
        """Wait for the outcome, but not for ever; from the user's thread."""
        deadline = time.monotonic() + seconds
        self.staged.wait(seconds)
        self.release()
        if self.done.wait(max(0.0, deadline - time.monotonic())):
            self.wait_for_thread()

    def wait_for_thread(self) -> None:
        """Wait until the thread is gone that has done it."""
        # It may hold the last reference to the manager's groups. Their destructor takes
        # the interpreter's lock, and ends the process where the interpreter is gone.
        if self.thread is not None and self.thread.is_alive():
            self.thread.join()

    def hold_optimizers(self) -> None:
        """Let the next step of any optimizer wait for the copies."""
        # Of any: what a tracked one optimizes may be another's, too. Where a step is
        # compiled, this is not.
        wait = torch.compiler.disable(self.wait_staged)  # type: ignore[no-untyped-call]
        self._hook = register_optimizer_step_pre_hook(
            lambda optimizer, args, kwargs: wait()
        )

    def release_optimizers(self) -> None:
        """Take the hook away again; not from within a step."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def _nothing() -> None:
    """Hold nothing."""
