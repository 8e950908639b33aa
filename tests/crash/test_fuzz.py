"""Whatever stands in a header, a manifest or a record: read right, or refused in our words.

Real ones are changed, byte by byte and token by token, also inside the JSON that stands in
their strings; lengths and checksums are put right again, so that what lies behind them is
reached. Headers are held against the safetensors package: what it rejects is rejected.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import struct
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import campaign
import pytest
import safetensors
from campaign import Campaign, in_two_parts
from figures import Figures, Hung, Wrong, demand
from scenario import SMALL_TABLE, Journal, all_saved_as, claim, make_chief, save

from distckpt import paths, readers, shard_header
from distckpt.errors import (
    CorruptStateError,
    ManifestError,
    NewerFormatError,
    ShardFileError,
)
from distckpt.formats import safetensors_file
from distckpt.manifest import Manifest
from distckpt.record import Record, digest
from distckpt.run_directory import RunDirectory
from distckpt.storage.posix import OpenFile

pytestmark = pytest.mark.timeout(1200)

SIZE = 100_000

HEADER, MANIFEST, RECORD, PLAIN = "headers", "manifests", "records", "plain safetensors"
TARGETS = (HEADER, MANIFEST, RECORD, PLAIN)
_LIMIT_SECONDS = 1.0
_LIMIT_KIB = 64 * 1024

_CHECKSUM = b',\n"checksum": '
_TOKEN = re.compile(rb'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|[\[\]{},:]|true|false|null')
_NUMBERS = (
    *(b"0", b"1", b"-1", b"-0", b"0.0", b"1.5", b"1e3", b"1e999", b"-1e-999", b"NaN"),
    *(b"Infinity", b"-Infinity", b"00", b"0x1", b"1_0", b"+1"),
    *(b"2147483648", b"4294967296", b"9007199254740993", b"9223372036854775807"),
    *(b"9223372036854775808", b"18446744073709551615", b"18446744073709551616"),
    *(b"4611686018427387904", b"1" + b"0" * 40, b"1" + b"0" * 5000),
)
_STRINGS = (
    *(b'""', b'"a"', b'"../../etc/passwd"', b'"/etc/passwd"', b'".."', b'"a/b"'),
    *(
        b'"\\u0000"',
        b'"\\ud800"',
        b'"\\u202e"',
        b'"\\u001b[31m"',
        b'"\xff"',
        b'"\xed\xa0\x80"',
    ),
    *(b'"F32"', b'"F64"', b'"U8"', b'"BF16"', b'"F8_E4M3"', b'"BOOL"', b'"C64"', b'"F4"'),
    *(b'"float32"', b'"float99"', b'"complex128"', b'"split"', b'"whole"', b'"sharded"'),
    *(
        b'"__metadata__"',
        b'"dtype"',
        b'"shape"',
        b'"data_offsets"',
        b'"claim"',
        b'"' + b"n" * 5000 + b'"',
    ),
    *(
        b'"ckpt-1.e1-00000000"',
        b'"CKPT-1.e1-00000000"',
        b'"ckpt-99999999999999999999.e1-00000000"',
    ),
)
_OTHERS = (
    *(b"null", b"true", b"false", b"[]", b"{}", b"[[]]", b'{"a":1,"a":2}', b'[1,"a",null]'),
    *(b"[" * 3000, b"[" * 3000 + b"]" * 3000, b'{"a":' * 2000, b"[0," * 3000 + b"0"),
    *(b"", b" ", b",", b":", b"[", b"]", b"{", b"}", b'"', b"\\", b"\n", b"\x00"),
)


# What we refuse and the package takes: of two equal keys it keeps one; fields that nobody
# knows; element types that torch has no name for; lengths of 64 bits, beside one of 0.
_NARROWER = re.compile(r"stands twice|entry '.*': (dtype '|\{)", re.DOTALL)


@dataclass(frozen=True)
class Input:
    """One input.

    Attributes:
        target: Whom it is for.
        seed: Of what is changed.
    """

    target: str
    seed: str


def mutate(data: bytes, source: random.Random) -> bytes:
    """Change some of it: often one token, sometimes a few, sometimes plain bytes."""
    for _ in range(source.choice((1, 1, 1, 2, 3))):
        if source.random() < 0.2:
            data = _mutate_bytes(data, source)
        else:
            data = _mutate_token(data, source)
    return data


def _mutate_bytes(data: bytes, source: random.Random) -> bytes:
    if not data:
        return source.randbytes(8)
    at, kind = source.randrange(len(data)), source.randrange(5)
    if kind == 0:
        return data[:at] + bytes([data[at] ^ 1 << source.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at]
    if kind == 2:
        return data[:at] + source.randbytes(source.randrange(1, 9)) + data[at:]
    stop = min(len(data), at + source.choice((1, 8, 64, 512)))
    if kind == 3:
        return data[:at] + data[stop:]
    return data[:stop] + data[at:stop] + data[stop:]


def _mutate_token(data: bytes, source: random.Random) -> bytes:
    tokens = _tokens(data)
    if not tokens:
        return _mutate_bytes(data, source)
    start, stop = source.choice(tokens)
    old = data[start:stop]
    if old.startswith(b'"{') and source.random() < 0.8:
        new = _mutate_inside(old, source)
    elif source.random() < 0.15:
        other_start, other_stop = source.choice(tokens)
        new = data[other_start:other_stop]
    elif source.random() < 0.1:
        new = old + b"," + old
    else:
        choices = _OTHERS
        if source.random() < 0.75:
            choices = _STRINGS if old.startswith(b'"') else _NUMBERS
        new = source.choice(choices)
    return data[:start] + new + data[stop:]


@lru_cache(maxsize=8)
def _tokens(data: bytes) -> list[tuple[int, int]]:
    """Find where tokens stand; most often those of the same few originals."""
    return [token.span() for token in _TOKEN.finditer(data)]


def _mutate_inside(quoted: bytes, source: random.Random) -> bytes:
    """Change the JSON that stands in a string."""
    try:
        inner = json.loads(quoted).encode()
    except ValueError:  # what an earlier change has made of it
        return quoted[1:-1]
    changed = mutate(inner, source).decode("utf-8", "replace")
    return json.dumps(changed).encode()


class Fuzz(Campaign[Input]):
    """Headers, manifests, records, and safetensors files of anybody's."""

    name = "fuzz"
    about = "headers, manifests and records with anything in them"

    @contextmanager
    def opened(self, scratch: str) -> Iterator[None]:
        """Save something, to have real ones."""
        directory = os.path.join(scratch, "run")
        with all_saved_as(SMALL_TABLE):
            chief = make_chief(directory)
            claim(chief)
            journal = Journal(os.path.join(scratch, "journal"), ())
            for seed in (1, 2):
                saved = save(chief, directory, journal, seed)
            journal.close()
            chief.close()
        record = readers.read_record(RunDirectory.at(directory))
        assert record is not None
        self._record = record.encode()
        folder = os.path.join(directory, saved.published)
        with open(os.path.join(folder, paths.MANIFEST_FILE), "rb") as file:
            self._manifest = file.read()
        with open(os.path.join(folder, paths.shard_file(0, 2)), "rb") as file:
            shard = file.read()
        length = struct.unpack("<Q", shard[:8])[0]
        # Without its padding: what matters would be a small part of it.
        self._header, self._data = shard[8 : 8 + length].rstrip(), shard[8 + length :]
        tree = {
            "__metadata__": {"format": "pt"},
            "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "b": {"dtype": "I8", "shape": [], "data_offsets": [24, 25]},
            "c": {"dtype": "F16", "shape": [0, 4], "data_offsets": [25, 25]},
        }
        self._plain, self._plain_data = json.dumps(tree).encode(), bytes(25)
        yield

    @contextmanager
    def worker(self, folder: str) -> Iterator[None]:
        """Remember how much memory there was."""
        self._path = os.path.join(folder, "file")
        yield

    def point(self, source: random.Random, index: int) -> Input:
        """Return one."""
        return Input(TARGETS[index % len(TARGETS)], str(source.random()))

    def play(self, folder: str, point: Input, figures: Figures) -> None:
        """Read one."""
        source = random.Random(point.seed)
        original, read = {
            HEADER: (self._header, self._read_header),
            MANIFEST: (_body_of(self._manifest), self._read_manifest),
            RECORD: (_body_of(self._record), self._read_record),
            PLAIN: (self._plain, self._read_plain),
        }[point.target]
        text = mutate(original, source)
        figures.check(point, lambda: self._limited(read, text, source, figures))

    def _limited(
        self,
        read: Callable[[bytes, random.Random], bool],
        text: bytes,
        source: random.Random,
        figures: Figures,
    ) -> None:
        before, began = _max_rss_kib(), time.process_time()
        try:
            accepted = read(text, source)
        except (AssertionError, MemoryError):
            raise
        except Exception as error:
            raise Wrong(f"{type(error).__name__}: {error!s:.300}") from error
        took, grew = time.process_time() - began, _max_rss_kib() - before
        if took > _LIMIT_SECONDS:
            raise Hung(f"took {took:.1f} s")
        demand(Wrong, grew < _LIMIT_KIB, f"took {grew} KiB")
        figures.count("accepted" if accepted else "refused")

    def _read_header(self, text: bytes, _: random.Random) -> bool:
        try:
            shard_header.parse(text, len(self._data))
        except (ShardFileError, NewerFormatError):
            return False
        verdict = _official(text, self._data)
        demand(
            Wrong,
            verdict == "",
            f"accepted, but safetensors says {verdict}: {text!r:.1000}",
        )
        return True

    def _read_manifest(self, text: bytes, source: random.Random) -> bool:
        right = source.random() < 0.9
        data = _with_checksum(text, text if right else _body_of(self._manifest))
        try:
            manifest = Manifest.decode(data)
            _ = manifest.assignment
        except (ManifestError, NewerFormatError):
            return False
        is_right = right or data == self._manifest
        demand(Wrong, is_right, f"wrong checksum accepted: {data!r:.1000}")
        return True

    def _read_record(self, text: bytes, _: random.Random) -> bool:
        data = _with_checksum(text, text)
        try:
            record = Record.decode(data)
        except (CorruptStateError, NewerFormatError):
            return False
        # How a field is spelled that nobody knows yet is not known, either.
        is_right = record.stamp.allows_unknown_fields or record.encode() == data
        demand(Wrong, is_right, f"spelled otherwise: {data!r:.1000}")
        return True

    def _read_plain(self, text: bytes, source: random.Random) -> bool:
        data = self._plain_data
        if source.random() < 0.1:
            data = bytes(source.choice((0, 1, 24, 26, 100)))
        with open(self._path, "wb") as file:
            file.write(struct.pack("<Q", len(text)) + text + data)
        try:
            with OpenFile(self._path) as opened:
                safetensors_file.read(opened)
        except ShardFileError as error:
            refusal = str(error)
        else:
            refusal = ""
        verdict = _official(text, data)
        if refusal and not verdict and _NARROWER.search(refusal):
            return False
        demand(
            Wrong,
            bool(refusal) == bool(verdict),
            f"{refusal or 'accepted'}; safetensors: {verdict or 'accepted'}; {text!r:.800}",
        )
        return not refusal


def _body_of(data: bytes) -> bytes:
    """Return what the checksum of a record or manifest is of."""
    return data.rpartition(_CHECKSUM)[0]


def _with_checksum(body: bytes, of: bytes) -> bytes:
    return body + _CHECKSUM + f'"{digest(of)}"\n}}\n'.encode()


def _official(text: bytes, data: bytes) -> str:
    """Return what the safetensors package says against a file; "" if nothing."""
    try:
        safetensors.deserialize(struct.pack("<Q", len(text)) + text + data)
    except safetensors.SafetensorError as error:
        return str(error) or "no"
    return ""


def _max_rss_kib() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


CAMPAIGN = Fuzz()


@in_two_parts(SIZE, range(2_500))
def test_any_input_is_read_right_or_refused_in_our_words(
    scratch: str, report_figures: Callable[[str], None], indexes: Collection[int]
):
    """In bounded time and memory, and never what the safetensors package rejects."""
    figures = campaign.run(CAMPAIGN, scratch, indexes)
    report_figures(str(figures))
    figures.demand_zeros()
    assert figures.others["accepted"] > len(indexes) / 100, "they get past the first checks"
