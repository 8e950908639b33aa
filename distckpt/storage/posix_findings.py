"""Findings on a filesystem, for people: its kind, and trials with small files."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

from distckpt import words
from distckpt.errors import StorageError
from distckpt.storage import posix
from distckpt.storage.lock import keeps_others_out
from distckpt.storage.store import BAD, OK, WARNING, Finding

_MOUNTS_FILE = "/proc/self/mountinfo"
_MOUNTS_BYTES = 2**20
_CLOCK_SECONDS = 5.0


def filesystem(directory: str) -> Finding:
    """Say which filesystem a directory is on."""
    found = None
    with suppress(StorageError), posix.OpenFile(_MOUNTS_FILE) as file:
        found = _mount_of(os.path.realpath(directory), file.read(0, _MOUNTS_BYTES))
    if found is None:
        return Finding("filesystem", OK, "unknown to this system")
    kind, source, point = found
    text = f"{kind} ({source} on {point})"
    if kind in ("tmpfs", "ramfs"):
        return Finding("filesystem", WARNING, f"{text}: in memory, gone with the host")
    if kind == "overlay":
        return Finding("filesystem", WARNING, f"{text}: gone with the container")
    return Finding("filesystem", OK, text)


def _mount_of(path: str, mounts: bytes) -> tuple[str, str, str] | None:
    """Find type, source and mount point of what a path lies on; see proc(5)."""
    best = None
    for line in mounts.decode(errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        fields, kinds = left.split(), right.split()
        if len(fields) < 5 or len(kinds) < 2:
            continue
        point = fields[4].replace("\\040", " ")
        # Later mounts hide earlier ones at the same place.
        is_above = f"{path}/".startswith(f"{point.rstrip('/')}/")
        if is_above and (best is None or len(point) >= len(best[2])):
            best = (kinds[0], kinds[1], point)
    return best


def permissions(directories: Sequence[str]) -> Finding:
    """Say whether other users may rename and delete in some directories."""
    others = [path for path in directories if posix.is_writable_by_others(path)]
    if others:
        text = f"every user may rename and delete in {', '.join(others)}: chmod o-w"
        return Finding("permissions", WARNING, text)
    return Finding("permissions", OK, "other users may not write")


class Trial:
    """Small files by which to find out what a filesystem can do.

    Args:
        directory: The directory they are made in.
        names: New names for them.
    """

    def __init__(self, directory: str, names: Iterator[str]) -> None:
        self._directory = directory
        self._names = names
        self._made: list[str] = []

    def run(self) -> Iterator[Finding]:
        """Try everything that distckpt relies on; removes what it has made."""
        tries: tuple[tuple[str, Callable[[str], Finding | None]], ...] = (
            ("exclusive creation", self._creation),
            ("hard links", self._links),
            ("renaming", self._renaming),
            ("syncing directories", self._syncing),
            ("names", self._case),
            ("direct writes", self._direct),
            ("clock", self._clock),
            ("locks", self._locks),
        )
        try:
            for what, attempt in tries:
                try:
                    found = attempt(what)
                except StorageError as error:
                    found = Finding(what, BAD, str(error))
                yield found or Finding(what, OK, "")
        finally:
            for path in self._made:
                with suppress(StorageError):
                    posix.remove_file(path)

    def _name(self) -> str:
        path = os.path.join(self._directory, next(self._names))
        self._made.append(path)
        return path

    def _write(self, data: bytes = b"") -> str:
        path = self._name()
        posix.write_new_file(path, data)
        return path

    def _creation(self, what: str) -> Finding | None:
        path = self._write()
        with suppress(StorageError):
            posix.write_new_file(path, b"")
            return Finding(what, BAD, "a file that exists is created again")
        return None

    def _links(self, what: str) -> Finding | None:
        one, other = self._write(), self._name()
        posix.link(one, other)
        with suppress(StorageError):
            posix.link(one, other)
            return Finding(what, BAD, "a name that is taken is linked again")
        return None

    def _renaming(self, what: str) -> Finding | None:
        one, other = self._write(), self._name()
        posix.rename(one, other)
        if posix.exists(one) or not posix.exists(other):
            return Finding(what, BAD, "a renamed file has not its new name alone")
        return None

    def _syncing(self, what: str) -> Finding | None:
        posix.sync_directory(self._directory)
        return None

    def _case(self, what: str) -> Finding | None:
        folder, name = os.path.split(self._write())
        if posix.exists(os.path.join(folder, name.upper())):
            text = "upper and lower case are the same: give no two names that differ so"
            return Finding(what, WARNING, text)
        return Finding(what, OK, "upper and lower case differ")

    def _direct(self, what: str) -> Finding | None:
        if posix.can_write_directly(self._name()):
            return Finding(what, OK, "asynchronous saves go past the page cache")
        text = "asynchronous saves go through the page cache"
        return Finding(what, OK, text)

    def _clock(self, what: str) -> Finding | None:
        behind = time.time() - posix.modified(self._write())
        if abs(behind) > _CLOCK_SECONDS:
            where = "behind" if behind > 0 else "ahead of"
            text = f"the filesystem's is {words.duration(abs(behind))} {where} this host's"
            return Finding(what, WARNING, f"{text}: ages are off by so much")
        return Finding(what, OK, "that of the filesystem is this host's")

    def _locks(self, what: str) -> Finding | None:
        if keeps_others_out(self._name()):
            return Finding(what, OK, "keep another process of this host out")
        text = (
            "do not keep another process out: a second job in this directory is noticed "
            "only when it fences the first. Nothing is lost by it"
        )
        return Finding(what, WARNING, text)
