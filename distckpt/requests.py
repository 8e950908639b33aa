"""What other processes may ask of a running job: a save, pins, metrics; without torch.

Each leaves a file in the run directory, which the chief takes up (``mailbox.py``). Without
a running job it waits for the next one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from distckpt import mailbox, paths, state
from distckpt.durations import seconds_of
from distckpt.errors import CheckpointNotFound, ConfigError
from distckpt.identity import this_process
from distckpt.locations import Path, absolute, checked_path
from distckpt.mailbox import METRICS, PIN, SAVE, UNPIN, Request
from distckpt.near import did_you_mean
from distckpt.near_paths import there_is
from distckpt.readers import read_record
from distckpt.record import Entry
from distckpt.remarks import Remarks
from distckpt.run_directory import RunDirectory

_POLL_SECONDS = 0.2


def pin(path: str | os.PathLike[str], *, timeout: float | timedelta | None = 0) -> bool:
    """Keep a checkpoint, whatever the retention rules say, until it is unpinned.

    After return that is asked for, durably. The running job takes it up with its next
    commit, before it drops anything; the next job, if none runs. Pinned checkpoints do not
    count: the rules keep as many of the others as before.

    Args:
        path: The checkpoint, as ``save()`` returns it.
        timeout: How long to wait until it is done, in seconds or as a timedelta; None
            waits for ever.

    Returns:
        Whether it is known to be done.

    Raises:
        CheckpointNotFound: It is not committed, or was dropped before.
        StorageError, CorruptStateError, NewerFormatError: It could not be asked for.
    """
    return _ask(path, PIN, timeout=timeout, is_done=lambda entry: entry.pinned)


def unpin(path: str | os.PathLike[str], *, timeout: float | timedelta | None = 0) -> bool:
    """Leave a checkpoint to the retention rules again; see ``pin``."""
    return _ask(path, UNPIN, timeout=timeout, is_done=lambda entry: not entry.pinned)


def add_metrics(
    path: str | os.PathLike[str],
    metrics: Mapping[str, Any],
    *,
    timeout: float | timedelta | None = 0,
) -> bool:
    """Add to what ``save(metrics=...)`` has said: for an evaluation that ends later.

    After return that is asked for, durably; the running job takes it up with its next
    commit, before retention decides. ``restore("best")`` goes by it at once.

    Args:
        path: The checkpoint, as ``save()`` returns it.
        metrics: Numbers by name; they replace those of the same name.
        timeout: How long to wait until it is done, in seconds or as a timedelta; None
            waits for ever.

    Returns:
        Whether it is known to be done.

    Raises:
        ConfigError: They are no metrics.
        CheckpointNotFound: It is not committed, or was dropped before.
        StorageError, CorruptStateError, NewerFormatError: It could not be asked for.
    """
    listed = Remarks.of(metrics, None).listed
    if not listed:
        msg = "add_metrics: give at least one metric."
        raise ConfigError(msg)
    return _ask(
        path,
        METRICS,
        listed,
        timeout=timeout,
        is_done=lambda entry: {*listed} <= {*entry.metrics},
    )


def request_save(
    directory: str | os.PathLike[str], *, timeout: float | timedelta | None = 0
) -> str | None:
    """Have the running job save; with the rule ``on_request()`` within about a second.

    Without that rule the next save of the job answers it.

    Args:
        directory: The run directory.
        timeout: How long to wait until it is committed, in seconds or as a timedelta; None
            waits for ever.

    Returns:
        Path of the newest checkpoint once one is committed that was begun after the
        request; None if that took longer.

    Raises:
        CheckpointNotFound: There is no such run directory.
        StorageError, CorruptStateError, NewerFormatError: It could not be asked for.
    """
    given = checked_path(directory)
    root = RunDirectory.at(given)
    seconds = _checked(timeout)
    if not root.is_folder():
        msg = f"{given} is not a directory.{there_is(str(root))}"
        raise CheckpointNotFound(msg)
    # Read whole: nothing is left in a directory whose records this version cannot read.
    if read_record(root) is None:
        msg = f"{given}: no job has claimed it yet, so there is nobody to be asked."
        raise CheckpointNotFound(msg)
    name = mailbox.post(root, Request(SAVE, this_process()))
    if not _wait(lambda: not mailbox.is_waiting(root, name), seconds):
        return None
    record = read_record(root)
    committed = () if record is None else record.committed
    return root.path_of(committed[0].attempt.prefix) if committed else None


def _ask(
    path: Path,
    kind: str,
    metrics: tuple[tuple[str, float | None], ...] = (),
    *,
    timeout: float | timedelta | None,
    is_done: Callable[[Entry], bool],
) -> bool:
    seconds = _checked(timeout)
    root, entry = _entry_of(path)
    attempt = entry.attempt
    name = mailbox.post(root, Request(kind, this_process(), attempt, metrics))

    def done() -> bool:
        # Answered and not as it should be: another request came after it.
        now = _listed(root, attempt.published)
        return is_done(now) or not mailbox.is_waiting(root, name)

    return _wait(done, seconds)


def _checked(timeout: float | timedelta | None) -> float | None:
    return None if timeout is None else seconds_of("timeout", timeout, may_be_zero=True)


def _entry_of(path: Path) -> tuple[RunDirectory, Entry]:
    """Find what a path means: a name as users see it, or that of an attempt."""
    text = checked_path(path).rstrip(os.sep)
    parent, name = os.path.split(absolute(text))
    root = RunDirectory.at(parent)
    if not state.has_records(root):
        msg = f"{text}: {root} is not a run directory.{there_is(parent)}"
        raise CheckpointNotFound(msg)
    return root, _listed(root, name)


def _listed(root: RunDirectory, name: str) -> Entry:
    record = read_record(root)
    committed = () if record is None else record.committed
    for entry in committed:
        if name in (entry.attempt.prefix, entry.attempt.published):
            return entry
    attempt = paths.parse_published(name)
    shown = name if attempt is None else attempt.prefix
    path = root.path_of(shown)
    known = [entry.attempt.prefix for entry in committed]
    hint = did_you_mean(shown, known)
    msg = (
        f"{path}: not committed, or dropped before this was asked for{hint} Committed, "
        f"newest first: {', '.join(known[:10]) or 'none'}."
    )
    raise CheckpointNotFound(msg)


def _wait(is_done: Callable[[], bool], timeout: float | None) -> bool:
    deadline = None if timeout is None else time.monotonic() + timeout
    while not is_done():
        if deadline is not None and time.monotonic() >= deadline:
            return False
        time.sleep(_POLL_SECONDS)
    return True
