"""Zip archives as torch makes them: records that are stored as they are, aligned.

Several may stand in one file, one behind the other. An archive is written from front to
back, and nothing of it is held in memory but its table of records.
"""

from __future__ import annotations

import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from distckpt.errors import ChecksumError, FormatError
from distckpt.files import Buffer, NewFile, OpenFile

# Where torch has its records begin, so that tensors can be mapped into memory.
_ALIGNMENT = 64
_LIMIT_32 = 0xFFFFFFFF
_LIMIT_16 = 0xFFFF
_UTF8 = 0x800
_VERSION = 45  # the first that knows 64-bit sizes
_DATE = (1 << 5) | 1  # the first day of 1980: what is written does not depend on the clock

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR_64 = struct.Struct("<4sLQL")
_END = struct.Struct("<4s4H2LH")
_EXTRA = struct.Struct("<2H")
_EXTRA_64 = 1
_EXTRA_PADDING = 0x4246  # "FB", as torch pads


class _Listed(NamedTuple):
    name: bytes
    size_bytes: int
    crc: int
    start: int


class ZipWriter:
    """Writes one archive into a file.

    Args:
        file: The file.
        start: Where in it the archive begins.

    Attributes:
        end: Where it ends, so far.
    """

    def __init__(self, file: NewFile, start: int) -> None:
        self._file = file
        self._start = start
        self._listed: list[_Listed] = []
        self.end = start

    def add(self, name: str, size_bytes: int, pieces: Iterable[Buffer]) -> None:
        """Write one record.

        Args:
            name: Its name.
            size_bytes: How long it will be.
            pieces: Its bytes.
        """
        encoded = name.encode()
        start = self.end - self._start
        extra = _local_extra(start + _LOCAL.size + len(encoded), size_bytes)
        begin = self.end + _LOCAL.size + len(encoded) + len(extra)
        position = begin
        crc = 0
        for piece in pieces:
            crc = zlib.crc32(piece, crc)
            self._file.write_at(position, [piece])
            position += len(piece)
        assert position - begin == size_bytes, f"{name}: {position - begin} of {size_bytes}"
        listed = _Listed(encoded, size_bytes, crc, start)
        # Last, as the checksum stands in it.
        self._file.write_at(self.end, [_local(listed, extra)])
        self._listed.append(listed)
        self.end = position

    def finish(self) -> int:
        """Write the table of records; returns where the archive ends."""
        table = b"".join(map(_central, self._listed))
        start = self.end - self._start
        ends = _ends(len(self._listed), len(table), start)
        self._file.write_at(self.end, [table + ends])
        self.end += len(table) + len(ends)
        return self.end


def _local_extra(at: int, size_bytes: int) -> bytes:
    """Return what stands between a record's name and its first byte."""
    sizes = b""
    if size_bytes >= _LIMIT_32:
        sizes = _EXTRA.pack(_EXTRA_64, 16) + struct.pack("<2Q", size_bytes, size_bytes)
    padding = -(at + len(sizes) + _EXTRA.size) % _ALIGNMENT
    return sizes + _EXTRA.pack(_EXTRA_PADDING, padding) + bytes(padding)


def _local(listed: _Listed, extra: bytes) -> bytes:
    size = min(listed.size_bytes, _LIMIT_32)
    fields = (_VERSION, _UTF8, 0, 0, _DATE, listed.crc, size, size)
    head = _LOCAL.pack(b"PK\3\4", *fields, len(listed.name), len(extra))
    return head + listed.name + extra


def _central(listed: _Listed) -> bytes:
    large = [n for n in (listed.size_bytes, listed.size_bytes) if n >= _LIMIT_32]
    if listed.start >= _LIMIT_32:
        large.append(listed.start)
    extra = b""
    if large:
        extra = _EXTRA.pack(_EXTRA_64, 8 * len(large)) + struct.pack(
            f"<{len(large)}Q", *large
        )
    size, start = min(listed.size_bytes, _LIMIT_32), min(listed.start, _LIMIT_32)
    fields = (_VERSION, _VERSION, _UTF8, 0, 0, _DATE, listed.crc, size, size)
    head = _CENTRAL.pack(
        b"PK\1\2", *fields, len(listed.name), len(extra), 0, 0, 0, 0, start
    )
    return head + listed.name + extra


def _ends(count: int, size: int, start: int) -> bytes:
    """Return what stands behind the table, in the long form where numbers are large."""
    long = b""
    if count >= _LIMIT_16 or size >= _LIMIT_32 or start >= _LIMIT_32:
        rest = _END_64.size - 12
        long = _END_64.pack(
            b"PK\6\6", rest, _VERSION, _VERSION, 0, 0, count, count, size, start
        )
        long += _LOCATOR_64.pack(b"PK\6\7", 0, start + size, 1)
    count = min(count, _LIMIT_16)
    size, start = min(size, _LIMIT_32), min(start, _LIMIT_32)
    return long + _END.pack(b"PK\5\6", 0, 0, count, count, size, start, 0)


class Record(NamedTuple):
    """One record of an archive that is read.

    Attributes:
        file: The file.
        name: Its name.
        start: Its first byte in the file.
        size_bytes: Its length.
        crc: Its checksum; None if the archive has none.
    """

    file: OpenFile
    name: str
    start: int
    size_bytes: int
    crc: int | None

    def stream(
        self, piece_bytes: int, offset: int = 0, size_bytes: int | None = None
    ) -> Iterator[memoryview]:
        """Read it, or a part of it, piece by piece.

        The checksum is of the whole: when all of it is read it is compared before the last
        piece is given away; before a part is read, all of it is.

        Yields:
            Memory that holds the piece until the next one is asked for. All pieces but the
            last are ``piece_bytes`` long.

        Raises:
            ChecksumError: The bytes are not those that were written.
            FormatError: The file ends before the record.
            StorageError: It cannot be read.
        """
        size = self.size_bytes - offset if size_bytes is None else size_bytes
        assert 0 <= offset <= offset + size <= self.size_bytes, self
        is_whole = size == self.size_bytes
        if not is_whole and size:
            self.check(piece_bytes)
        crc = 0
        buffer = memoryview(bytearray(min(piece_bytes, size)))
        for at in range(0, size, piece_bytes):
            piece = buffer[: min(piece_bytes, size - at)]
            if self.file.read_into(self.start + offset + at, piece) < len(piece):
                msg = f"{self.file.path}: ends inside record {self.name!r:.200}."
                raise FormatError(msg)
            crc = zlib.crc32(piece, crc)
            if is_whole and at + len(piece) == size and self.crc not in (None, crc):
                msg = (
                    f"{self.file.path}: record {self.name!r:.200} (bytes {self.start} to "
                    f"{self.start + size}): CRC-32 {crc:08x}, expected {self.crc:08x}. The "
                    "bytes are not those that were written."
                )
                raise ChecksumError(msg)
            yield piece

    def check(self, piece_bytes: int) -> None:
        """Read all of it against its checksum; errors as ``stream``."""
        for _ in self.stream(piece_bytes):
            pass

    def read(self, max_bytes: int) -> bytes:
        """Read a small one; errors as ``stream``."""
        if self.size_bytes > max_bytes:
            msg = (
                f"{self.file.path}: record {self.name!r:.200} has {self.size_bytes} bytes, "
                f"more than {max_bytes}."
            )
            raise FormatError(msg)
        return b"".join(map(bytes, self.stream(max(1, self.size_bytes))))


def read_records(file: OpenFile, start: int, size_bytes: int) -> dict[str, Record]:
    """Read the table of an archive's records; nothing of the records themselves.

    Args:
        file: The file.
        start: Where in it the archive begins.
        size_bytes: Its length.

    Raises:
        FormatError: It is no zip archive, or one that is compressed or damaged.
        StorageError: It cannot be read.
    """
    where = f"{file.path}, bytes {start} to {start + size_bytes}"
    view = _View(file, start, size_bytes)
    try:
        with zipfile.ZipFile(view) as archive:
            listed = archive.infolist()
    # Only BadZipFile is documented. But damaged tables also make it decode names that are
    # no text, or (before Python 3.12) seek to before the start: both ValueErrors; or refuse
    # a version of the format that it does not know: NotImplementedError.
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        msg = f"{where}: no zip archive: {error}."
        raise FormatError(msg) from error
    # torch can be told to write none; then it writes zeros.
    has_checksums = any(one.CRC for one in listed)
    records: dict[str, Record] = {}
    for one in listed:
        if one.compress_type != zipfile.ZIP_STORED or one.flag_bits & 1:
            msg = f"{where}: record {one.filename!r:.200} is compressed or encrypted."
            raise FormatError(msg)
        begin = _first_byte(view, one)
        if one.filename in records or begin is None:
            msg = f"{where}: record {one.filename!r:.200} is damaged or stands there twice."
            raise FormatError(msg)
        crc = one.CRC if has_checksums else None
        records[one.filename] = Record(
            file, one.filename, start + begin, one.file_size, crc
        )
    return records


def _first_byte(view: _View, one: zipfile.ZipInfo) -> int | None:
    if one.header_offset < 0:
        return None
    view.seek(one.header_offset)
    head = view.read(_LOCAL.size)
    if len(head) < _LOCAL.size or head[:4] != b"PK\3\4":
        return None
    *_, name_length, extra_length = _LOCAL.unpack(head)
    begin = one.header_offset + _LOCAL.size + int(name_length) + int(extra_length)
    return begin if begin + one.file_size <= view.size_bytes else None


class _View:
    """A part of a file, as the zipfile module wants it."""

    def __init__(self, file: OpenFile, start: int, size_bytes: int) -> None:
        self._file = file
        self._start = start
        self._at = 0
        self.size_bytes = size_bytes

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = 0) -> int:
        at = offset + (0, self._at, self.size_bytes)[whence]
        if at < 0:
            msg = f"a position before the start: {at}"
            raise ValueError(msg)
        self._at = at
        return at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.size_bytes - self._at)
        data = self._file.read(
            self._start + self._at, left if size < 0 else min(size, left)
        )
        self._at += len(data)
        return data
