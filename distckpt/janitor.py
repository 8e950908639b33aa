"""Deletes behind the training loop: what was released, and what dead writers left.

The deleter, not the committer, is the dangerous zombie: everything here acts only on
what a durable record of this very chief has released, or on leftovers of lower epochs.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Collection
from functools import partial

from distckpt import mailbox, paths, state, storage
from distckpt.errors import FormatError, NewerFormatError, StorageError
from distckpt.leases import Leases
from distckpt.manifest import MAX_SIZE_BYTES, Manifest
from distckpt.paths import Attempt

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
        self, directory: str, told: Callable[[Attempt, float], None] | None = None
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
        published = os.path.join(self._directory, attempt.published)
        trash = os.path.join(self._directory, attempt.trash)
        began = time.monotonic()
        was_there = True
        if storage.exists(published):
            if self._leases.hold(attempt):
                return
            remove_published(self._directory, attempt)
        elif storage.exists(trash):
            storage.remove_tree(trash)
        else:
            was_there = False
        with self._condition:
            self._released.add(attempt)
        if was_there and self._told is not None:
            self._told(attempt, time.monotonic() - began)


def remove_published(directory: str, attempt: Attempt) -> None:
    """Delete a published attempt so that no half of it can come back.

    Renamed and synced first: after a power cut an unsynced ``rm -r`` may be undone in
    part, and a torn attempt must not stand under a published name.
    """
    trash = os.path.join(directory, attempt.trash)
    storage.rename(os.path.join(directory, attempt.published), trash)
    storage.sync_directory(directory)
    storage.remove_tree(trash)


def _sweep(directory: str, epoch: int, chain: str, listed: Collection[Attempt]) -> None:
    for name in storage.list_directory(directory):
        try:
            _sweep_name(directory, name, epoch, chain, listed)
        except StorageError as error:
            _logger.warning("sweeping %s: %s", directory, error)
    records = os.path.join(directory, paths.RECORDS_DIRECTORY)
    for name in storage.list_directory(records):
        written_in = paths.parse_temporary_file(name)
        if written_in is not None and written_in < epoch:
            storage.remove_file(os.path.join(records, name))
    mailbox.sweep(directory)


def _sweep_name(
    directory: str, name: str, epoch: int, chain: str, listed: Collection[Attempt]
) -> None:
    path = os.path.join(directory, name)
    unfinished = paths.parse_pending(name) or paths.parse_trash(name)
    published = paths.parse_published(name)
    probed_in = paths.parse_probe_file(name)
    # Never an epoch at or above our own: it may belong to a chief that fenced us.
    if unfinished is not None and unfinished.epoch < epoch:
        if name == unfinished.pending:
            # Out of its writer's reach first: a stopped one that goes on would publish
            # what is left of it, which nobody could tell from a foreign attempt.
            path = os.path.join(directory, unfinished.trash)
            if storage.exists(path):
                storage.remove_tree(path)
            storage.rename(os.path.join(directory, name), path)
        storage.remove_tree(path)
    elif probed_in is not None and probed_in < epoch:
        storage.remove_file(path)
    elif (
        published is not None
        and published.epoch < epoch
        and published not in listed
        and chain_of(path) == chain
    ):
        # Published but never recorded: its writer died between the two.
        remove_published(directory, published)


def chain_of(path: str) -> str | None:
    """Return the chain that made an attempt; None where its manifest won't tell.

    An attempt that was copied here from another run directory is not ours to delete.
    """
    try:
        data = storage.read_file(os.path.join(path, paths.MANIFEST_FILE), MAX_SIZE_BYTES)
        return Manifest.decode(data).chain
    except (StorageError, FormatError, NewerFormatError):
        return None
