"""What is compared: something that saves and restores one workload."""

from __future__ import annotations

import os
import shutil
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable

from distckpt.bench.team import Team
from distckpt.bench.workloads import Workload

EAGER = "eager"
LAZY = "lazy"


class Pending(ABC):
    """A save that goes on behind the caller."""

    @abstractmethod
    def wait_staged(self) -> None:
        """Wait until the caller may change its tensors."""

    def before_optimizer_step(self) -> None:
        """Do what a user must do before tensors change; nothing if it is automatic."""
        self.wait_staged()

    @abstractmethod
    def done(self) -> bool:
        """Tell whether this rank knows of nothing that is still to be made durable."""

    @abstractmethod
    def check(self) -> None:
        """Raise what went wrong; on all ranks, after ``done``."""


class Contender(ABC):
    """One way of saving; every method but ``abandon`` is called by all ranks together.

    Attributes:
        name: The heading of its column.
        modes: In which ways it can save behind the caller.
        num_saves: How often it has saved in this process.
    """

    name: str
    modes: tuple[str, ...] = ()

    def __init__(self, workload: Workload, team: Team, folder: str) -> None:
        self.workload = workload
        self.team = team
        self.folder = folder
        self.num_saves = 0
        os.makedirs(folder, exist_ok=True)

    @abstractmethod
    def save(self) -> None:
        """Save durably."""

    def start(self, mode: str) -> Pending:
        """Begin a save that goes on behind the caller."""
        raise NotImplementedError(mode)

    @abstractmethod
    def load(self) -> None:
        """Restore the newest into the workload's own tensors."""

    @abstractmethod
    def tidy(self) -> None:
        """Delete all but the newest."""

    def abandon(self) -> None:  # noqa: B027
        """Fail other ranks' collectives, as this rank has failed; by this rank alone."""

    def close(self) -> None:  # noqa: B027
        """Let go of everything; most hold nothing."""


class FolderPerSave(Contender):
    """One that is given a new folder for each save."""

    @property
    def newest(self) -> str:
        """The folder of the save that was begun last."""
        return os.path.join(self.folder, f"{self.num_saves:04}")

    def next_folder(self) -> str:
        """Make the folder of the save that begins now."""
        self.num_saves += 1
        os.makedirs(self.newest, exist_ok=True)
        return self.newest

    def tidy(self) -> None:
        """Delete all but the newest."""
        self.team.first_here(self._delete_old)

    def _delete_old(self) -> None:
        for name in os.listdir(self.folder):
            path = os.path.join(self.folder, name)
            if path != self.newest:
                shutil.rmtree(path, ignore_errors=True)


class InThread(Pending):
    """Waits in a thread for what a peer does, then does what makes it durable."""

    def __init__(
        self, finish: Callable[[], None], staged: Callable[[], object] | None = None
    ) -> None:
        self._finish = finish
        self._staged = staged
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def wait_staged(self) -> None:
        """Wait until the caller may change its tensors."""
        if self._staged is not None:
            self._staged()

    def done(self) -> bool:
        """Tell whether the thread has ended."""
        return not self._thread.is_alive()

    def check(self) -> None:
        """Raise what went wrong."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _run(self) -> None:
        try:
            self._finish()
        except BaseException as error:
            self._error = error


def wait_done(pending: Pending, timeout_seconds: float) -> None:
    """Wait until this rank's part of a save is durable."""
    deadline = time.monotonic() + timeout_seconds
    while not pending.done():
        if time.monotonic() > deadline:
            msg = f"not durable after {timeout_seconds:.0f} s"
            raise TimeoutError(msg)
        time.sleep(0.002)


def sync_path(path: str) -> None:
    """Make a file, or the names in a folder, durable."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(folder: str) -> None:
    """Make the names in a folder durable, and its own."""
    sync_path(folder)
    sync_path(os.path.dirname(folder))
