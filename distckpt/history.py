"""The history that chiefs keep in a run directory: written, and read for the report."""

from __future__ import annotations

import logging

from distckpt import paths
from distckpt.errors import FormatError, StorageError
from distckpt.events import CLAIM, Event
from distckpt.run_directory import RunDirectory

_logger = logging.getLogger(__name__)

_MAX_FILE_BYTES = 8 * 2**20
_KEPT_FILES = 64
# More is not read.
_MAX_READ_BYTES = 16 * 2**20


class History:
    """Keeps what the chief has done in the run directory, for ``distckpt report``.

    One file for each claim, begun anew when it has grown large; old ones are removed.

    Args:
        directory: The run directory.
    """

    def __init__(self, directory: RunDirectory) -> None:
        self._folder = directory.places.events
        self._file: paths.EventsFile | None = None
        self._size_bytes = 0
        self._nonce = paths.random_hex(4)

    def __call__(self, event: Event) -> None:
        """Append one, from the first claim on."""
        if event.kind == CLAIM:
            self._begin(int(event.detail["epoch"]), 0)
        if self._file is None:
            return  # nothing is written into a directory that is not ours yet
        line = (event.to_json() + "\n").encode()
        if self._size_bytes + len(line) > _MAX_FILE_BYTES:
            self._begin(self._file.epoch, self._file.part + 1)
        (self._folder / _name_of(self._file)).note(line)
        self._size_bytes += len(line)

    def _begin(self, epoch: int, part: int) -> None:
        self._folder.refuse_link()
        self._folder.make_folder()
        self._file = paths.EventsFile(epoch, part, self._nonce)
        self._size_bytes = 0
        found = [paths.parse_events_file(name) for name in self._folder.names()]
        known = sorted(file for file in found if file is not None)
        self._folder.remove(*map(_name_of, known[: -(_KEPT_FILES - 1)]))


def _name_of(file: paths.EventsFile) -> str:
    return paths.events_file(file.epoch, file.nonce, file.part)


def read_history(directory: RunDirectory) -> list[Event]:
    """Return all events that are kept, oldest first.

    What cannot be read is a warning: it is told what there is. Lines that are cut off, by a
    crash for example, are passed over.

    Raises:
        UnsafeCheckpointError: The history is elsewhere, by way of a link.
        StorageError: The directory cannot be listed.
    """
    folder = directory.places.events
    folder.refuse_link()
    names = [name for name in folder.names() if paths.parse_events_file(name)]
    events = []
    for name in names:
        try:
            data = (folder / name).read(_MAX_READ_BYTES)
        except (StorageError, FormatError) as error:
            _logger.warning("a part of the history cannot be read: %s", error)
            continue
        found = (Event.from_json(line) for line in data.splitlines())
        events += [event for event in found if event is not None]
    return sorted(events, key=lambda event: event.time)
