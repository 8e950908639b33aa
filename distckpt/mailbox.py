"""What other processes ask the chief for: a file each, in a directory of the run directory.

Whoever may write the run directory may ask. The chief takes requests up when it commits, in
the order of their names, and removes them when a durable record says what came of them; so
after a crash one may be taken up again, which changes nothing. See docs/format.md.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from distckpt import paths, strict_json
from distckpt.errors import CorruptStateError, FormatError, StorageError
from distckpt.paths import Attempt
from distckpt.record import MAX_METRICS, Entry, is_metric
from distckpt.run_directory import RunDirectory
from distckpt.storage.store import Created, Place

_logger = logging.getLogger(__name__)

SAVE, PIN, UNPIN, METRICS = "save", "pin", "unpin", "metrics"

_FORMAT = 1
_FIELDS = ["format", "kind", "by", "path", "metrics"]
_MAX_SIZE_BYTES = 64 * 2**10
_MAX_BY = 256
# More wait for the next commit.
_MAX_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class Request:
    """One thing that is asked for.

    Attributes:
        kind: ``SAVE``, ``PIN``, ``UNPIN`` or ``METRICS``.
        by: Who asks, for people.
        attempt: Which checkpoint it is about; None for a save.
        metrics: Numbers to be added to it, sorted by name.
        name: Of its file.
    """

    kind: str
    by: str
    attempt: Attempt | None = None
    metrics: tuple[tuple[str, float | None], ...] = ()
    name: str = ""

    def encode(self) -> bytes:
        """Encode to the bytes of its file."""
        path = None if self.attempt is None else self.attempt.published
        values = [_FORMAT, self.kind, self.by, path, dict(self.metrics)]
        return strict_json.dumps(dict(zip(_FIELDS, values, strict=True))).encode()

    @staticmethod
    def decode(data: bytes, name: str) -> Request:
        """Decode and check the bytes of a file.

        Raises:
            CorruptStateError: It is no request.
        """
        try:
            tree = strict_json.loads(data)
        except strict_json.JsonError as error:
            raise CorruptStateError(str(error)) from None
        _check(isinstance(tree, dict) and list(tree) == _FIELDS, "fields", tree)
        _check(tree["format"] == _FORMAT, "format", tree["format"])
        kind, by, path = tree["kind"], tree["by"], tree["path"]
        _check(kind in (SAVE, PIN, UNPIN, METRICS), "kind", kind)
        _check(isinstance(by, str) and len(by) <= _MAX_BY, "by", by)
        attempt = paths.parse_published(path) if isinstance(path, str) else None
        _check((attempt is None) == (kind == SAVE), "path", path)
        metrics = tree["metrics"]
        _check(
            isinstance(metrics, dict) and len(metrics) <= MAX_METRICS, "metrics", metrics
        )
        _check(all(map(is_metric, metrics.items())), "metrics", metrics)
        return Request(kind, by, attempt, tuple(sorted(metrics.items())), name)


def post(directory: RunDirectory, request: Request) -> str:
    """Leave a request for the chief; returns the name of its file.

    After return it is there as a whole, and durable.

    Raises:
        StorageError: It could not be written.
        UnsafeCheckpointError: Requests are elsewhere, by way of a link.
    """
    box = _box(directory)
    box.make_folder()
    name = paths.request_file(time.time_ns())
    made = (box / name).create(request.encode(), box / paths.partial(name))
    if made.outcome is not Created.MADE:
        msg = f"{box / name}: the request could not be written: {made.error}"
        raise StorageError(msg, operation="create", path=str(box / name)) from made.error
    return name


def collect(directory: RunDirectory) -> tuple[list[Request], dict[str, str]]:
    """Read what is asked for, in the order in which it was.

    Returns:
        The requests; and the names of files that are none, though they are called so, with
        the reason.

    Raises:
        StorageError: The directory cannot be read.
        UnsafeCheckpointError: It is elsewhere, by way of a link.
    """
    box = _box(directory)
    requests, refused = [], {}
    names = [name for name in box.names() if paths.is_request_file(name)]
    for name in names[:_MAX_AT_ONCE]:
        try:
            requests.append(Request.decode((box / name).read(_MAX_SIZE_BYTES), name))
        except (StorageError, FormatError) as error:
            # Not one that another process has removed meanwhile.
            if not isinstance(error.__cause__, FileNotFoundError):
                refused[name] = str(error)
    return requests, refused


def is_waiting(directory: RunDirectory, name: str) -> bool:
    """Tell whether a request was not answered yet."""
    return (_box(directory) / name).exists()


def remove(directory: RunDirectory, names: Collection[str]) -> None:
    """Remove requests that are answered, oldest first.

    In this order, and durably: were one to come back after a power cut, so would all newer
    ones about the same checkpoint.
    """
    if names:
        _box(directory).remove(*sorted(names), durable=True)


def sweep(directory: RunDirectory) -> None:
    """Remove what processes have left that died while they asked for something."""
    box = _box(directory)
    box.remove(*(name for name in box.names() if not paths.is_request_file(name)))


def applied(entries: Iterable[Entry], requests: Sequence[Request]) -> tuple[Entry, ...]:
    """Return entries as they are when all that is asked for is done."""
    changed = {entry.attempt: entry for entry in entries}
    for request in requests:
        entry = None if request.attempt is None else changed.get(request.attempt)
        if entry is None:
            continue
        if request.kind == METRICS:
            metrics = dict(entry.metrics) | dict(request.metrics)
            if len(metrics) > MAX_METRICS:
                _logger.warning(
                    "metrics of %s, by %s: not added, with them it would have %d of at "
                    "most %d",
                    *(entry.attempt.prefix, request.by, len(metrics), MAX_METRICS),
                )
                continue
            entry = replace(entry, metrics=tuple(sorted(metrics.items())))
        else:
            entry = replace(entry, pinned=request.kind == PIN)
        changed[entry.attempt] = entry
    return tuple(changed.values())


def _box(directory: RunDirectory) -> Place:
    box = directory.places.requests
    box.refuse_link()
    return box


def _check(condition: bool, what: str, found: Any) -> None:
    if not condition:
        msg = f"bad {what}: {found!r:.200}"
        raise CorruptStateError(msg)
