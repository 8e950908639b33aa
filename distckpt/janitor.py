"""Deletes behind the training loop: what was released, and what dead writers left.

The deleter, not the committer, is the dangerous zombie: everything here acts only on
what a durable record of this very chief has released, or on leftovers of lower epochs.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from functools import partial

from distckpt import mailbox, paths, probe, state
from distckpt.errors import FormatError, NewerFormatError, StorageError
from distckpt.leases import Leases
from distckpt.manifest import MAX_SIZE_BYTES, Manifest
from distckpt.paths import Attempt
from distckpt.run_directory import AttemptDirectory, RunDirectory

_logger = logging.getLogger(__name__)


class Janitor:
    """Runs deletions one after the other on a thread of its own.

    The thread lives only while there is work, so an idle janitor keeps nothing alive
    and cannot hold up the process's exit.

    Args:
        directory: The run directory.
        told: Called with each attempt that was deleted, and how many seconds it took.
    """

    def __init__(
        self, directory: RunDirectory, told: Callable[[Attempt, float], None] | None = None
    ) -> None:
        self._directory = directory
        self._told = told
        self._condition = threading.Condition()
        self._work: deque[Callable[[], None]] = deque()
        self._running = False
        self._thread: threading.Thread | None = None
        self._released: set[Attempt] = set()
        self._leases = Leases(directory)

    def release(self, attempts: Collection[Attempt]) -> None:
        """Delete attempts that a durable record lists as releasing.

        Not those that somebody reads: they stay in that list, and are tried again.
        """
        for attempt in attempts:
            self._submit(partial(self._release, attempt))

    def sweep(self, epoch: int, chain: str, listed: Collection[Attempt]) -> None:
        """Delete what chiefs of lower epochs left behind, and nothing else."""
        self._submit(partial(_sweep, self._directory, epoch, chain, frozenset(listed)))

    def prune_records(self) -> None:
        """Remove records long behind the newest."""
        self._submit(partial(state.prune, self._directory))

    def take_released(self) -> set[Attempt]:
        """Return the attempts deleted so far, to be confirmed in the next record."""
        with self._condition:
            released, self._released = self._released, set()
        return released

    def wait(self, timeout_seconds: float) -> bool:
        """Wait until nothing is outstanding; False if the time was not enough."""
        with self._condition:
            done = self._condition.wait_for(
                lambda: not self._running, timeout=timeout_seconds
            )
            thread = self._thread
        if done and thread is not None:
            thread.join()  # it has nothing left to do but to end
        return done

    def _submit(self, task: Callable[[], None]) -> None:
        with self._condition:
            self._work.append(task)
            if not self._running:
                self._running = True
                self._thread = threading.Thread(
                    target=self._run, name="distckpt-janitor", daemon=True
                )
                self._thread.start()

    def _run(self) -> None:
        while True:
            with self._condition:
                if not self._work:
                    self._running = False
                    self._condition.notify_all()
                    return
                task = self._work.popleft()
            try:
                task()
            except Exception:
                # A deletion that failed must not end the others for the rest of the
                # run; what is still there is tried again after the next commit.
                _logger.warning("cleaning %s", self._directory, exc_info=True)

    def _release(self, attempt: Attempt) -> None:
        began = time.monotonic()
        was_there = True
        if self._directory.has(attempt):
            if self._leases.hold(attempt):
                return
            self._directory.discard(attempt)
        else:
            was_there = self._directory.clear(attempt)
        with self._condition:
            self._released.add(attempt)
        if was_there and self._told is not None:
            self._told(attempt, time.monotonic() - began)


def _sweep(
    directory: RunDirectory, epoch: int, chain: str, listed: Collection[Attempt]
) -> None:
    # Never an epoch at or above our own: it may belong to a chief that fenced us.
    names = directory.names()
    unfinished = [a for a in directory.unfinished(names) if a.epoch < epoch]
    for attempt in unfinished:
        _tried(directory, partial(directory.clear, attempt))
    for name in names:
        published = paths.parse_published(name)
        if published is not None and published.epoch < epoch and published not in listed:
            _tried(directory, partial(_discard_if_ours, directory, published, chain))
    for name in names:
        written_in = paths.parse_probe_file(name)
        if written_in is not None and written_in < epoch:
            _tried(directory, partial(probe.remove, directory, name))
    state.sweep(directory, epoch)
    mailbox.sweep(directory)


def _tried(directory: RunDirectory, step: Callable[[], object]) -> None:
    try:
        step()
    except StorageError as error:
        _logger.warning("sweeping %s: %s", directory, error)


def _discard_if_ours(directory: RunDirectory, published: Attempt, chain: str) -> None:
    # Published but never recorded: its writer died between the two.
    if chain_of(directory.attempt(published)) == chain:
        directory.discard(published)


def chain_of(directory: AttemptDirectory) -> str | None:
    """Return the chain that made an attempt; None where its manifest won't tell.

    An attempt that was copied here from another run directory is not ours to delete.
    """
    try:
        return Manifest.decode(directory.read_manifest(MAX_SIZE_BYTES)).chain
    except (StorageError, FormatError, NewerFormatError):
        return None
