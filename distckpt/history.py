"""The history that chiefs have kept in a run directory, read again; for the report."""

from __future__ import annotations

import logging
import os

from distckpt import paths, storage
from distckpt.errors import FormatError, StorageError
from distckpt.events import Event

_logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 16 * 2**20


def read_history(directory: str) -> list[Event]:
    """Return all events that are kept, oldest first.

    What cannot be read is a warning: it is told what there is. Lines that are cut off, by a
    crash for example, are passed over.

    Raises:
        UnsafeCheckpointError: The history is elsewhere, by way of a link.
        StorageError: The directory cannot be listed.
    """
    folder = os.path.join(directory, paths.EVENTS_DIRECTORY)
    storage.refuse_link(folder)
    names = [n for n in storage.list_directory(folder) if paths.parse_events_file(n)]
    events = []
    for name in names:
        path = os.path.join(folder, name)
        try:
            data = storage.read_file(path, _MAX_FILE_BYTES)
        except (StorageError, FormatError) as error:
            _logger.warning("a part of the history cannot be read: %s", error)
            continue
        found = (Event.from_json(line) for line in data.splitlines())
        events += [event for event in found if event is not None]
    return sorted(events, key=lambda event: event.time)
