"""What several test modules share: a clock to set, and questions to a run directory."""

import logging
import os
import time

from distckpt import paths, readers, state
from distckpt.errors import CheckpointNotFound
from distckpt.run_directory import RunDirectory


class Clock:
    """Stands in for ``time.time``: tells what it was set to."""

    def __init__(self, now=0.0):
        self.now = float(now)

    def __call__(self):
        return self.now

    def set(self, now):
        self.now = float(now)


def set_clock(now):
    """Replace this process's wall clock; for ranks, which end with their test."""
    clock = Clock(now)
    time.time = clock
    return clock


class Warnings(logging.Handler):
    """Collects what the library logs, from warnings on."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.texts = []

    def emit(self, record):
        self.texts.append(record.getMessage())


def collect_warnings():
    """Attach a collector to the library's logger; for ranks."""
    handler = Warnings()
    logging.getLogger("distckpt").addHandler(handler)
    return handler


def attempts_of(path):
    """List the published directories that lie behind a prefix, whatever a record says."""
    root, prefix = os.path.split(os.fspath(path))
    names = os.listdir(root or os.curdir)
    parsed = ((name, paths.parse_published(name)) for name in names)
    return sorted(name for name, a in parsed if a is not None and a.prefix == prefix)


def exists(path):
    """Tell whether a checkpoint is there; the record and the disk must agree."""
    found = attempts_of(path)
    try:
        located = readers.locate(path)
    except CheckpointNotFound:
        assert found == [], f"{path}: unlisted, but {found} is there"
        return False
    assert found == [located.directory.name], (path, found, located)
    return located.directory.has_manifest()


def published(directory):
    """List the prefixes of all published attempts in a run directory, sorted."""
    parsed = map(paths.parse_published, os.listdir(directory))
    return sorted(attempt.prefix for attempt in parsed if attempt is not None)


def numbers(prefixes):
    """Return the numbers of prefixes like ``runs/gpt/ckpt-7``."""
    return [int(os.path.basename(path).split("-", 1)[1]) for path in prefixes]


def newest_record(directory):
    """Read the newest record of a run directory."""
    head = state.read_head(RunDirectory.at(os.fspath(directory)))
    assert head is not None
    return head.record


def snapshot(directory):
    """Describe everything below a directory but the history, so that any change shows."""
    found = {}
    for folder, folders, files in os.walk(directory):
        # Written behind the loop, whenever there is time.
        if paths.EVENTS_DIRECTORY in folders:
            folders.remove(paths.EVENTS_DIRECTORY)
        for name in (*folders, *files):
            path = os.path.join(folder, name)
            status = os.lstat(path)
            found[path] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found
