"""Check what torch's distributed checkpoint (DCP) writes and never reads again.

Every item lies in a zip archive with checksums; torch loads it without comparing them, and
without asking whether anything is missing.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from distckpt import files
from distckpt.errors import DistckptError
from distckpt.formats import dcp_metadata
from distckpt.formats.dcp_directory import DcpDirectory, StoredDcpTensor
from distckpt.formats.dcp_metadata import METADATA_FILE, Chunk, DcpTensor, Place
from distckpt.formats.foreign import PIECE_BYTES, Advance
from distckpt.formats.zip_file import read_records
from distckpt.verify import Report

# What lies at each place: names, and chunks of tensors.
_Items: TypeAlias = dict[Place, list[tuple[str, Chunk | None]]]


def verify_dcp(path: str, begin: Callable[[int], Advance]) -> Report:
    """Read every record of a DCP checkpoint and compare its checksum.

    Also found: chunks that no file has or that overlap, tensors that they do not make up,
    files that are missing or cut off, items that are not what the metadata says.

    Args:
        path: The directory.
        begin: Told how many bytes will be read; returns what is told when some were.

    Returns:
        A report; faults of the checkpoint never raise.
    """
    report = Report(path)
    try:
        directory = DcpDirectory(path)
    except DistckptError as error:
        report.problems.append(str(error))
        return report
    with directory:
        items = _items(directory)
        advance = begin(sum(place.size_bytes for place in items))
        _Check(directory, report, advance).run(items)
    return report


def _items(directory: DcpDirectory) -> _Items:
    """Return what lies at each place; tied tensors may share one."""
    items: _Items = {}
    for name, entry in directory.entries.items():
        if isinstance(entry, DcpTensor):
            for chunk in entry.chunks:
                if chunk.place is not None:
                    items.setdefault(chunk.place, []).append((name, chunk))
        elif entry.place is not None:
            items.setdefault(entry.place, []).append((name, None))
    return items


class _Check:
    def __init__(self, directory: DcpDirectory, report: Report, advance: Advance) -> None:
        self._directory = directory
        self._report = report
        self._advance = advance
        self._num_unchecked = 0

    def run(self, items: _Items) -> None:
        """Fill the report."""
        directory, report = self._directory, self._report
        for name, entry in directory.entries.items():
            if isinstance(entry, DcpTensor):
                report.problems += [f"{name}: {gap}" for gap in dcp_metadata.gaps_of(entry)]
            elif entry.place is None:
                report.problems.append(f"{name}: it is in no file")
        by_file: dict[str, list[Place]] = {}
        for place in items:
            by_file.setdefault(place.file, []).append(place)
        report.num_files = len(by_file)
        for file in sorted(by_file):
            if self._is_right(partial(self._open, file)):
                for place in sorted(by_file[file]):
                    self._check_place(place, items[place])
        if self._num_unchecked:
            report.notes.append(
                f"{self._num_unchecked} items were written without checksums "
                "(set_crc32_options(False)): nothing tells whether they are right"
            )
        known = {METADATA_FILE, *by_file}
        report.foreign = [
            os.path.join(directory.path, name)
            for name in files.list_directory(directory.path)
            if name not in known
        ]

    def _open(self, file: str) -> None:
        """Open a file of which nothing was read yet."""
        self._directory.file_of("", Place(file, 0, 0))

    def _check_place(self, place: Place, items: list[tuple[str, Chunk | None]]) -> None:
        name = items[0][0]
        if not self._is_right(partial(self._check_records, name, place), name):
            return
        for name, chunk in items:
            entry = self._directory.entries[name]
            if chunk is not None and isinstance(entry, DcpTensor):
                tensor = StoredDcpTensor(self._directory, name, entry)
                self._is_right(partial(tensor.stored, chunk))

    def _check_records(self, name: str, place: Place) -> None:
        file = self._directory.file_of(name, place)
        for record in read_records(file, place.offset, place.size_bytes).values():
            for piece in record.stream(PIECE_BYTES):
                self._report.size_bytes += len(piece)
            self._num_unchecked += record.crc is None and record.name.endswith("/data.pkl")
        self._advance(place.size_bytes)

    def _is_right(self, check: Callable[[], object], name: str = "") -> bool:
        """Make a check; what it raises is a problem of the checkpoint."""
        try:
            check()
        except DistckptError as error:
            self._report.problems.append(f"{name}: {error}" if name else str(error))
            return False
        return True
