"""A disk that is really full: the save fails, and nothing else does."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from scenario import (
    Journal,
    check_readable,
    claim,
    claim_and_check_clean,
    make_chief,
    save,
    unlisted,
)

from distckpt import paths, readers
from distckpt.errors import OutcomeUnknown, StorageError
from distckpt.run_directory import RunDirectory

_PAGE_BYTES = 4096
# The pending directory, two shard files, the manifest, the record's temporary file.
_SAVE_INODES = 5


def _fill_bytes(disk: str, leave: int) -> list[str]:
    """Leave this many bytes free."""
    path = os.path.join(disk, "filler")
    status = os.statvfs(disk)
    size = status.f_bavail * status.f_frsize - leave
    with open(path, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)
    return [path]


def _fill_inodes(disk: str, leave: int) -> list[str]:
    """Leave this many inodes free."""
    folder = os.path.join(disk, "fillers")
    os.mkdir(folder)
    num_free = os.statvfs(disk).f_favail
    names = [os.path.join(folder, str(index)) for index in range(num_free - leave)]
    for name in names:
        open(name, "xb").close()
    return names


class Job:
    """A manager with two checkpoints on a small disk."""

    def __init__(self, disk: str, journal: str) -> None:
        self._disk = disk
        self._fillers: list[str] = []
        self.directory = os.path.join(disk, "run")
        self.journal = Journal(journal, ())
        self.chief = make_chief(self.directory)
        claim(self.chief)
        self.save(1)
        before = os.statvfs(disk)
        self.save(2)
        after = os.statvfs(disk)
        # What one save takes, with its record.
        self.save_bytes = (before.f_bavail - after.f_bavail) * after.f_frsize

    def save(self, seed: int) -> None:
        """Make one save."""
        save(self.chief, self.directory, self.journal, seed)

    def fill(self, fill: Callable[[str, int], list[str]], leave: int) -> None:
        """Use the disk up."""
        self._fillers = fill(self._disk, leave)

    def empty(self) -> None:
        """Make room again."""
        for filler in self._fillers:
            os.unlink(filler)

    def check(self) -> list[str]:
        """Check what is committed; returns what is there beside it."""
        check_readable(self.directory, [self.journal.listing])
        record = readers.read_record(RunDirectory.at(self.directory))
        assert record is not None
        return unlisted(self.directory, record)

    def end(self) -> None:
        """Save once more, let go, and check that a later manager finds all in order."""
        self.save(9)
        self.check()
        self.chief.close()
        claim_and_check_clean(self.directory)
        self.check()
        self.journal.close()


# Of a save's bytes: none, half a shard file, all but the second one's end, all but the
# manifest and the record, all but the record. Of its inodes: none (the directory), and
# so on to the record's temporary file.
@pytest.mark.parametrize(
    ("options", "fill", "missing"),
    [
        ("size=4m", _fill_bytes, None),
        ("size=4m", _fill_bytes, 64 * _PAGE_BYTES),
        ("size=4m", _fill_bytes, 4 * _PAGE_BYTES),
        ("size=4m", _fill_bytes, 2 * _PAGE_BYTES),
        ("size=4m", _fill_bytes, 1 * _PAGE_BYTES),
        ("nr_inodes=100", _fill_inodes, 5),
        ("nr_inodes=100", _fill_inodes, 4),
        ("nr_inodes=100", _fill_inodes, 3),
        ("nr_inodes=100", _fill_inodes, 2),
        ("nr_inodes=100", _fill_inodes, 1),
    ],
)
def test_save_with_full_disk_fails_and_leaves_no_trace(
    tmp_path: Path,
    small_disk: Callable[[str], str],
    options: str,
    fill: Callable[[str, int], list[str]],
    missing: int | None,
):
    """The error names the path, the pending directory goes, the next save works."""
    disk = small_disk(options)
    job = Job(disk, str(tmp_path / "journal"))
    needed = job.save_bytes if fill is _fill_bytes else _SAVE_INODES
    job.fill(fill, 0 if missing is None else needed - missing)

    with pytest.raises(StorageError) as caught:
        job.save(3)

    error = caught.value
    assert error.errno == errno.ENOSPC
    assert error.path.startswith(job.directory) and error.path in str(error)
    assert "No space left on device" in str(error)
    assert job.check() == []
    job.empty()
    job.end()


def test_commit_with_no_inode_for_the_link_alone_is_unknown(
    tmp_path: Path, small_disk: Callable[[str], str]
):
    """A link that failed may have happened: the attempt stays until a later claim."""
    disk = small_disk("nr_inodes=100")
    job = Job(disk, str(tmp_path / "journal"))
    job.fill(_fill_inodes, _SAVE_INODES)  # a second name takes an inode on a tmpfs

    with pytest.raises(OutcomeUnknown, match="No space left on device"):
        job.save(3)

    (left,) = job.check()
    attempt = paths.parse_published(left)
    assert attempt is not None and attempt.number == 3
    job.empty()
    job.end()


def test_commit_with_no_room_for_the_copy_alone_succeeds(
    tmp_path: Path, small_disk: Callable[[str], str]
):
    """When only the state file's copy finds no room, the checkpoint is committed."""
    disk = small_disk("size=4m")
    job = Job(disk, str(tmp_path / "journal"))
    copy = os.path.join(job.directory, paths.STATE_FILE)
    before = _read(copy)
    job.fill(_fill_bytes, job.save_bytes)

    job.save(3)

    assert _read(copy) == before
    assert job.check() == []
    job.empty()
    job.end()
    assert _read(copy) != before


def test_claim_with_full_disk_fails_before_anything_is_claimed(
    tmp_path: Path, small_disk: Callable[[str], str]
):
    """Too little room is said at the claim, by number of bytes, not after an hour."""
    disk = small_disk("size=4m")
    fillers = _fill_bytes(disk, 2**19)
    chief = make_chief(os.path.join(disk, "run"))
    with pytest.raises(StorageError, match="are free; make room"):
        claim(chief)
    assert not chief.is_claimed
    for filler in fillers:
        os.unlink(filler)
    claim(chief)
    chief.close()


def _read(path: str) -> str:
    with open(path, encoding="utf-8") as file:
        return file.read()
