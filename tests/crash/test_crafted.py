"""Run directories made by somebody who means harm: refused, and nothing outside touched.

Whoever made them can compute digests as well as we can, so all of them are right. Each is
looked at by everything that reads (records, verification, the library's and the command's
readers), claimed, saved into and swept, as a job does that finds it: with limits on time
and memory, under an audit of everything that changes files.
"""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import socket
import stat
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from click.testing import CliRunner
from scenario import (
    Journal,
    claim,
    in_child,
    make_chief,
    read_text,
    save,
)

# The last two so that not each child imports them.
from distckpt import cli, opened, paths, readers, record, stamp
from distckpt.errors import DistckptError, FormatError
from distckpt.manifest import Manifest
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.verify import verify_attempt

pytestmark = pytest.mark.timeout(1200)

_SECRET = b"secret: nobody who reads a checkpoint has any business with this\n"
_LIMIT_KIB = 64 * 1024
_CHECKSUM = b',\n"checksum": '
_HUGE = 2**50

REFUSED, HARMLESS = "refused", "harmless"


class Craft:
    """A run directory with one checkpoint of two ranks, to be made into an attack.

    Attributes:
        root: The run directory.
        outside: A directory beside it, with what must not be touched.
        secret: A file in there.
    """

    def __init__(self, folder: str) -> None:
        self.root = os.path.join(folder, "run")
        self.outside = os.path.join(folder, "outside")
        self.secret = os.path.join(self.outside, "secret")
        head = readers.read_record(RunDirectory.at(self.root))
        assert head is not None
        self.number = head.number
        self.attempt = head.live[-1].attempt

    def path(self, *names: str) -> str:
        """Join names to the run directory."""
        return os.path.join(self.root, *names)

    @property
    def record(self) -> str:
        """The newest record."""
        return self.path(paths.RECORDS_DIRECTORY, paths.record_file(self.number))

    @property
    def folder(self) -> str:
        """The attempt's directory."""
        return self.path(self.attempt.published)

    @property
    def manifest(self) -> str:
        """Its manifest."""
        return os.path.join(self.folder, paths.MANIFEST_FILE)

    @property
    def shard(self) -> str:
        """The shard file of rank 1."""
        return os.path.join(self.folder, paths.shard_file(1, 2))

    # Changing what is signed

    def edit_record(self, change: Callable[[bytes], bytes]) -> None:
        """Change the newest record; its checksum will be right."""
        body = change(_body(_read(self.record)))
        _write(self.record, _signed(body))

    def edit_manifest(self, change: Callable[[bytes], bytes]) -> None:
        """Change the manifest; its checksum will be right, and the record knows it."""
        before = _read(self.manifest)
        after = _signed(change(_body(before)))
        _write(self.manifest, after)
        old, new = record.digest(before).encode(), record.digest(after).encode()
        self.edit_record(lambda body: body.replace(old, new))

    def edit_header(self, change: Callable[[bytes], bytes]) -> None:
        """Change the header of a shard file; manifest and record know it."""
        before = _read(self.shard)
        length = struct.unpack("<Q", before[:8])[0]
        text = change(before[8 : 8 + length])
        self.replace_shard(struct.pack("<Q", len(text)) + text + before[8 + length :])

    def replace_shard(self, after: bytes) -> None:
        """Put other bytes in the place of a shard file; manifest and record know it."""
        before = _read(self.shard)
        _write(self.shard, after)
        length = min(struct.unpack("<Q", after[:8])[0], len(after))
        old_length = struct.unpack("<Q", before[:8])[0]
        old = f'[{len(before)},"{record.digest(before[: 8 + old_length])}"'.encode()
        new = f'[{len(after)},"{record.digest(after[: 8 + length])}"'.encode()
        assert old in _read(self.manifest)
        self.edit_manifest(lambda body: body.replace(old, new))


def _read(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def _write(path: str, data: bytes) -> None:
    with open(path, "wb") as file:
        file.write(data)


def _body(data: bytes) -> bytes:
    return data.rpartition(_CHECKSUM)[0]


def _signed(body: bytes) -> bytes:
    return body + _CHECKSUM + f'"{record.digest(body)}"\n}}\n'.encode()


# The attacks


@dataclass(frozen=True)
class Attack:
    """One attack.

    Attributes:
        name: For people.
        make: Makes it.
        outcome: Whether reading must be refused, or is harmless.
    """

    name: str
    make: Callable[[Craft], None]
    outcome: str = REFUSED


def _odd_file(kind: str, path: str, craft: Craft) -> None:
    """Put something odd in the place of a file."""
    content = _read(path)
    os.unlink(path)
    if kind == "link to a secret":
        os.symlink(craft.secret, path)
    elif kind == "link to what was there":
        kept = os.path.join(craft.outside, "kept")
        _write(kept, content)
        os.symlink(kept, path)
    elif kind == "endless link":
        os.symlink("/dev/zero", path)
    elif kind == "link to itself":
        os.symlink(path, path)
    elif kind == "hard link to a secret":
        os.link(craft.secret, path)
    elif kind == "FIFO":
        os.mkfifo(path)
    elif kind == "device":
        os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # /dev/zero
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as listener:
            here = os.open(os.path.dirname(path), os.O_RDONLY)
            listener.bind(f"/proc/self/fd/{here}/{os.path.basename(path)}")
            os.close(here)
    elif kind == "directory":
        os.mkdir(path)
    elif kind == "petabyte":
        with open(path, "wb") as file:
            file.truncate(min(_HUGE, 2**43))
    else:
        assert kind == "nothing in it"
        _write(path, b"")


_KINDS = (
    *("link to a secret", "link to what was there", "endless link", "link to itself"),
    *("hard link to a secret", "FIFO", "device", "socket", "directory", "petabyte"),
    "nothing in it",
)


def _odd_files() -> Iterator[Attack]:
    for target in ("record", "manifest", "shard"):
        for kind in _KINDS:
            yield Attack(
                f"{target}: {kind}",
                lambda craft, kind=kind, target=target: _odd_file(
                    kind, getattr(craft, target), craft
                ),
            )
    for kind in _KINDS:
        yield Attack(
            f"state file: {kind}",
            lambda craft, kind=kind: _odd_file(kind, craft.path(paths.STATE_FILE), craft),
            HARMLESS,
        )
        if kind != "petabyte":
            yield Attack(
                f"lock: {kind}",
                lambda craft, kind=kind: _odd_file(
                    kind, craft.path(paths.LOCK_FILE), craft
                ),
                HARMLESS,
            )


_BAD_JSON = {
    "deep": b"[" * 100_000,
    "deep and closed": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "NaN": b"NaN",
    "infinity": b"1e999",
    "digits": b"1" + b"0" * 100_000,
    "lone surrogate": b'"\\ud800"',
    "not UTF-8": b'"\xff\xfe"',
    "control characters": b'"\x00\x1b[2J"',
    "key twice": b'{"a":1,"a":2}',
    "minus zero": b"-0",
    "float": b"1.0",
    "bool": b"true",
    "null": b"null",
    "negative": b"-1",
    "2**63": b"9223372036854775808",
    "2**64": b"18446744073709551616",
    "list": b"[1]",
    "object": b"{}",
    "text": b'"1"',
}


def _put(field: str, new: bytes) -> Callable[[bytes], bytes]:
    """Return what puts something into a field that holds a number or a text."""
    pattern = re.compile(rb'("' + field.encode() + rb'": ?)("[^"]*"|-?[0-9.e+]+|null)')

    def change(body: bytes) -> bytes:
        changed, number = pattern.subn(lambda found: found[1] + new, body, count=1)
        assert number == 1, (field, body[:300])
        return changed

    return change


def _json_tricks() -> Iterator[Attack]:
    for name, new in _BAD_JSON.items():
        yield Attack(
            f"record: {name} as number",
            lambda craft, new=new: craft.edit_record(_put("number", new)),
        )
        yield Attack(
            f"manifest: {name} as world_size",
            lambda craft, new=new: craft.edit_manifest(_put("world_size", new)),
        )
        yield Attack(
            f"header: {name} as shape",
            lambda craft, new=new: craft.edit_header(
                lambda text: _sub(rb'"shape":\[[0-9,]*\]', b'"shape":' + new, text)
            ),
        )
    for target in ("record", "manifest"):
        edit = f"edit_{target}"
        for name, change in {
            "byte order mark": lambda body: b"\xef\xbb\xbf" + body,
            "UTF-16": lambda body: body.decode().encode("utf-16"),
            "more behind it": lambda body: body + b'}\n{"x": 1',
            "another format": _put("format", b"2"),
            "field that nobody knows": lambda body: body + b',\n"evil": 1',
            "field missing": lambda body: re.sub(
                rb',\n"chain": [^\n]*', b"", body, count=1
            ),
        }.items():
            yield Attack(
                f"{target}: {name}",
                lambda craft, edit=edit, change=change: getattr(craft, edit)(change),
            )


_BAD_PATHS = {
    "parent": b"../outside/ckpt-1.e1-00000000",
    "absolute": b"/etc/ckpt-1.e1-00000000",
    "separator": b"a/b-1.e1-00000000",
    "NUL": b"ckpt\\u0000-1.e1-00000000",
    "newline": b"ckpt\\n-1.e1-00000000",
    "escape": b"ckpt\\u001b[2J-1.e1-00000000",
    "right to left": b"ckpt\\u202e-1.e1-00000000",
    "dots": b"..",
    "empty": b"",
    "hidden": b".ckpt-1.e1-00000000.trash",
    "records": b".state",
    "fullwidth": b"\\uff43kpt-1.e1-00000000",
    "number of 20 digits": b"ckpt-99999999999999999999.e1-00000000",
    "leading zero": b"ckpt-01.e1-00000000",
    "epoch from the future": b"ckpt-1.e999-00000000",
    "epoch of 30 digits": b"ckpt-1.e" + b"9" * 30 + b"-00000000",
    "name of 300": b"c" * 300 + b"-1.e1-00000000",
}


def _traversals() -> Iterator[Attack]:
    for name, path in _BAD_PATHS.items():
        yield Attack(
            f"record: path {name}",
            lambda craft, path=path: craft.edit_record(
                lambda body: body.replace(craft.attempt.published.encode(), path)
            ),
        )
        yield Attack(
            f"manifest: path {name}",
            lambda craft, path=path: craft.edit_manifest(
                lambda body: body.replace(craft.attempt.published.encode(), path)
            ),
        )
    yield Attack("attempt: link out of the directory", _link_attempt_out)
    yield Attack("attempt: link to another attempt", _link_attempt_to_another)
    yield Attack("records: link out of the directory", _link_records_out)
    yield Attack("record: attempt that stands twice", _list_twice)
    yield Attack("record: prefix that stands twice", _list_prefix_twice)
    yield Attack("record: other case of the name", _list_other_case)
    yield Attack("record: lists that fill a record", _list_a_million)


def _link_attempt_out(craft: Craft) -> None:
    target = os.path.join(craft.outside, "attempt")
    os.rename(craft.folder, target)
    os.symlink(target, craft.folder)


def _link_attempt_to_another(craft: Craft) -> None:
    other = craft.path("ckpt-7.e1-00000000")
    os.rename(craft.folder, other)
    os.symlink(os.path.basename(other), craft.folder)


def _link_records_out(craft: Craft) -> None:
    target = os.path.join(craft.outside, "records")
    folder = os.path.dirname(craft.record)
    os.rename(folder, target)
    os.symlink(target, folder)


def _entry_of(body: bytes) -> bytes:
    found = re.search(rb'\{"path":[^}]*\}', body)
    assert found is not None
    return found[0]


def _list_twice(craft: Craft) -> None:
    craft.edit_record(
        lambda body: body.replace(
            _entry_of(body), _entry_of(body) + b",\n " + _entry_of(body)
        )
    )


def _list_prefix_twice(craft: Craft) -> None:
    def change(body: bytes) -> bytes:
        entry = _entry_of(body)
        other = re.sub(rb"-[0-9a-f]{8}\"", b'-00000000"', entry, count=1)
        return body.replace(entry, entry + b",\n " + other)

    craft.edit_record(change)


def _list_other_case(craft: Craft) -> None:
    craft.edit_record(
        lambda body: body.replace(
            craft.attempt.published.encode(), craft.attempt.published.upper().encode()
        )
    )


def _list_a_million(craft: Craft) -> None:
    def change(body: bytes) -> bytes:
        entry = _entry_of(body)
        others = b",\n ".join(
            entry.replace(b"ckpt-", b"c%d-" % number) for number in range(200_000)
        )
        return body.replace(entry, others)

    craft.edit_record(change)


def _header_tricks() -> Iterator[Attack]:
    def edit(name: str, change: Callable[[bytes], bytes]) -> Attack:
        return Attack(f"header: {name}", lambda craft: craft.edit_header(change))

    def raw(name: str, change: Callable[[bytes], bytes]) -> Attack:
        return Attack(
            f"shard: {name}", lambda craft: craft.replace_shard(change(_read(craft.shard)))
        )

    yield raw("length of 2**64-1", lambda data: b"\xff" * 8 + data[8:])
    yield raw("length of 100 MB", lambda data: struct.pack("<Q", 100_000_001) + data[8:])
    yield raw("length behind the end", lambda data: struct.pack("<Q", len(data)) + data[8:])
    yield raw("length of 0", lambda data: bytes(8) + data[8:])
    yield raw("seven bytes", lambda data: data[:7] + b"\0")
    yield raw("data cut off", lambda data: data[:-1])
    yield raw("a program behind the data", lambda data: data + b"#!/bin/sh\n")
    yield raw("a pickle", lambda data: b"\x80\x02cposix\nsystem\nX\x02\x00\x00\x00id\x85R.")
    offsets = rb'"data_offsets":\[(\d+),(\d+)\]'
    yield edit("overlap", lambda text: re.sub(offsets, rb'"data_offsets":[0,\2]', text))
    yield edit(
        "hole", lambda text: re.sub(offsets, rb'"data_offsets":[\g<1>1,\g<2>1]', text)
    )
    yield edit("reversed", lambda text: re.sub(offsets, rb'"data_offsets":[\2,\1]', text))
    yield edit("negative", lambda text: _sub(offsets, b'"data_offsets":[-1,8]', text))
    yield edit(
        "offsets of 2**64",
        lambda text: _sub(offsets, b'"data_offsets":[0,18446744073709551616]', text),
    )
    yield edit("one offset", lambda text: _sub(offsets, b'"data_offsets":[0]', text))
    shape = rb'"shape":\[[0-9,]*\]'
    for name, new in {
        "product that overflows": b"[4294967296,4294967296]",
        "product that overflows to 0": b"[4294967296,4294967296,4]",
        "a million dimensions": b"[" + b"1," * 100_000 + b"1]",
        "2**62 elements": b"[4611686018427387904]",
    }.items():
        yield edit(name, lambda text, new=new: _sub(shape, b'"shape":' + new, text))
    yield edit("unknown dtype", lambda text: text.replace(b'"F32"', b'"EVIL"'))
    yield edit("wider dtype", lambda text: text.replace(b'"F32"', b'"F64"'))
    yield edit("metadata that is no text", lambda text: text.replace(b'"pt"', b"[1]", 1))
    for name, old, new in (
        ("blocks of no bytes", rb'\\"block_bytes\\":\d+', rb'\\"block_bytes\\":0'),
        (
            "blocks of 2**62",
            rb'\\"block_bytes\\":\d+',
            rb'\\"block_bytes\\":4611686018427387904',
        ),
        ("blocks of -1", rb'\\"block_bytes\\":\d+', rb'\\"block_bytes\\":-1'),
        ("another rank", rb'\\"rank\\":1', rb'\\"rank\\":0'),
        ("another world", rb'\\"world_size\\":2', rb'\\"world_size\\":9'),
        ("another attempt", rb'\\"attempt\\":\\"[^"]*\\"', rb'\\"attempt\\":\\"../x\\"'),
        (
            "checksums cut off",
            rb'"distckpt.checksums":"[^"]{8}',
            rb'"distckpt.checksums":"',
        ),
        (
            "checksums of anything",
            rb'"distckpt.checksums":"[^"]*',
            rb'"distckpt.checksums":"!!',
        ),
        ("no checksums", rb'"distckpt.checksums"', rb'"distckpt.nothing"'),
        (
            "offset out of the tensor",
            rb'\\"offset\\":\[\d+',
            rb'\\"offset\\":[4611686018427387904',
        ),
        ("offset below 0", rb'\\"offset\\":\[\d+', rb'\\"offset\\":[-1'),
        (
            "region of another tensor",
            rb'\\"name\\":\\"[^"]*\\"',
            rb'\\"name\\":\\"../../x\\"',
        ),
    ):
        yield edit(name, lambda text, old=old, new=new: _sub(old, new, text))
    yield edit("entry that stands twice", _entry_twice)
    yield edit("names of a megabyte", lambda text: text.replace(b"model/", b"m" * 2**20, 1))


def _sub(old: bytes, new: bytes, text: bytes) -> bytes:
    changed, number = re.subn(old, lambda _: new, text, count=1)
    assert number == 1, (old, text[:500])
    return changed


def _entry_twice(text: bytes) -> bytes:
    found = re.search(rb',"model/[^"]*":\{[^}]*\}', text)
    assert found is not None
    return text.replace(found[0], found[0] * 2)


def _manifest_tricks() -> Iterator[Attack]:
    for name, old, new in (
        ("no shards", rb'"shards": \[.*?\]\n?\]', b'"shards": []'),
        ("shard of -1 bytes", rb'"shards": \[\s*\[\d+', b'"shards": [[-1'),
        (
            "shard of 2**63 bytes",
            rb'"shards": \[\s*\[\d+',
            b'"shards": [[9223372036854775808',
        ),
        ("layout that is not there", rb",0\]", b",7]"),
        ("digest of something else", rb'"[0-9a-f]{32}",0', b'"' + b"0" * 32 + b'",0'),
        ("digest that is none", rb'"[0-9a-f]{32}",0', b'"../x",0'),
        ("tensor that stands twice", rb'\["model/running"', b'["model/weight"'),
        ("tie to nothing", rb'"model/weight"\]', b'"nothing"]'),
        (
            "tie to itself",
            rb'\["model/head",(.*)"model/weight"\]',
            rb'["model/head",\1"model/head"]',
        ),
        ("tensor with another shape", rb"\[40,1024\]", b"[40,1025]"),
        ("tensor of 2**80 bytes", rb"\[40,1024\]", b"[1099511627776,1099511627776]"),
        ("tensor of 100,000 dimensions", rb"\[40,1024\]", b"[" + b"1," * 100_000 + b"1]"),
        ("unknown dtype", rb'"float32"', b'"evil"'),
        ("unknown kind", rb'"split"', b'"evil"'),
        ("sharding that is not there", rb'"split"', b"3"),
        ("name with controls", rb'"model/running"', b'"\\\\ud800"'),
        ("value with an unknown tag", rb'"values": \[', b'"values": [[{"$evil":1},["x"]],'),
        ("values with names twice", rb'"values": \[', b'"values": [[1,["x","x"]],'),
    ):
        yield Attack(
            f"manifest: {name}",
            lambda craft, old=old, new=new: craft.edit_manifest(
                lambda body: _sub_expanded(old, new, body)
            ),
        )


def _sub_expanded(old: bytes, new: bytes, text: bytes) -> bytes:
    changed, number = re.subn(old, new, text, count=1, flags=re.DOTALL)
    assert number == 1, (old, text[:2000])
    return changed


def _leftover_tricks() -> Iterator[Attack]:
    """What a claim sweeps, made into a way out."""

    def left(name: str, make: Callable[[Craft, str], None], pending: bool = True) -> Attack:
        def body(craft: Craft) -> None:
            attempt = paths.Attempt("ckpt", 5, 0, "00000000")
            make(craft, craft.path(attempt.pending if pending else attempt.trash))

        return Attack(f"left over: {name}", body, HARMLESS)

    yield left("pending that is a link", lambda c, path: os.symlink(c.outside, path))
    yield left("trash that is a link", lambda c, path: os.symlink(c.outside, path), False)
    yield left("pending that is a file", lambda c, path: _write(path, b""))
    yield left("pending with a link to a file", _with_link(lambda c: c.secret))
    yield left("pending with a link to a directory", _with_link(lambda c: c.outside))
    yield left("pending with a hard link", _with_hard_link)
    yield left("trash as deep as it can be", _deep, False)
    yield left("trash with a FIFO and a device", _with_odd_files, False)
    yield left("trash with 20,000 files", _with_many, False)
    yield Attack("left over: probe that is a link", _link_probe, HARMLESS)
    yield Attack("left over: temporary file that is a link", _link_temporary, HARMLESS)
    yield Attack("left over: attempt that is a link", _link_unlisted, HARMLESS)
    yield Attack("released: attempt that is a link", _link_released, HARMLESS)
    yield Attack("names that do something to a terminal", _terminal_names, HARMLESS)


def _with_link(target: Callable[[Craft], str]) -> Callable[[Craft, str], None]:
    def make(craft: Craft, path: str) -> None:
        os.mkdir(path)
        os.symlink(target(craft), os.path.join(path, "rank-00000-of-00002.safetensors"))

    return make


def _with_hard_link(craft: Craft, path: str) -> None:
    os.mkdir(path)
    os.link(craft.secret, os.path.join(path, "rank-00000-of-00002.safetensors"))


def _deep(_: Craft, path: str) -> None:
    os.mkdir(path)
    here = os.open(path, os.O_RDONLY)
    for _ in range(3000):
        os.mkdir("d", dir_fd=here)
        below = os.open("d", os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)


def _with_odd_files(_: Craft, path: str) -> None:
    os.mkdir(path)
    os.mkfifo(os.path.join(path, "fifo"))
    os.mknod(os.path.join(path, "device"), stat.S_IFBLK | 0o666, os.makedev(1, 0))


def _with_many(_: Craft, path: str) -> None:
    os.mkdir(path)
    for number in range(20_000):
        _write(os.path.join(path, str(number)), b"")


def _link_probe(craft: Craft) -> None:
    os.symlink(craft.secret, craft.path(paths.probe_file(0, "0" * 16, 1)))


def _link_temporary(craft: Craft) -> None:
    folder = os.path.dirname(craft.record)
    os.symlink(craft.secret, os.path.join(folder, paths.temporary_file(0)))


def _link_unlisted(craft: Craft) -> None:
    target = os.path.join(craft.outside, "attempt")
    shutil.copytree(craft.folder, target)
    os.symlink(target, craft.path("ckpt-9.e0-00000000"))


def _link_released(craft: Craft) -> None:
    """The record says to delete what is a link to somebody's directory."""
    os.symlink(craft.outside, craft.path("ckpt-9.e1-00000000"))

    def change(body: bytes) -> bytes:
        entry = _entry_of(body)
        other = re.sub(rb'"path":"[^"]*"', b'"path":"ckpt-9.e1-00000000"', entry)
        return body.replace(b'"releasing": []', b'"releasing": [\n ' + other + b"\n]")

    craft.edit_record(change)


def _terminal_names(craft: Craft) -> None:
    for name in ("\x1b[2J\x1b[31m", "new\nline", "right\u202eleft", "\udcff"):
        _write(craft.path(name), b"")
        _write(os.path.join(craft.folder, name), b"")


ATTACKS = [
    *_odd_files(),
    *_json_tricks(),
    *_traversals(),
    *_header_tricks(),
    *_manifest_tricks(),
    *_leftover_tricks(),
]


# What somebody does who finds such a directory


def _use(craft: Craft) -> list[str]:
    """Do everything that reads; returns what was refused, and by which error."""
    refused: list[str] = []

    def attempt(what: str, body: Callable[[], object]) -> None:
        try:
            body()
        except DistckptError as error:
            refused.append(f"{what}: {type(error).__name__}")

    attempt("record", lambda: readers.read_record(RunDirectory.at(craft.root)))
    attempt("latest", lambda: readers.latest_checkpoint(craft.root))
    attempt("state", lambda: readers.get_checkpoint_state(craft.root))
    attempt("all of it", lambda: _read_everything(craft.root))
    doctor = ["doctor", "--read-only"]
    for command in (["list"], ["list", "--json"], ["verify"], doctor, ["repair"]):
        _run(refused, *command, craft.root)
    _run(refused, "show", craft.path(craft.attempt.prefix))
    attempt("verify", lambda: _verify(craft.folder))
    return refused


def _verify(folder: str) -> None:
    report = verify_attempt(AttemptDirectory.at(folder), None)
    if not report.ok:
        raise FormatError(report.problems[0])


def _read_everything(root: str) -> None:
    """Read every tensor, verifying it: the newest one's."""
    with opened.open(root) as checkpoint:
        for name in checkpoint:
            checkpoint[name].numpy() if checkpoint[name].dtype != "complex128" else None


def _run(refused: list[str], *arguments: str) -> None:
    done = CliRunner().invoke(cli.main, [*arguments])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    text = done.output.replace("\n", "")
    assert text.isprintable(), f"{arguments} prints {text!r:.300}"
    assert done.exit_code in (0, 1, 3), (arguments, done.exit_code, done.output)
    if done.exit_code:
        refused.append(f"{arguments[0]}: exit {done.exit_code}")


def _live_on(craft: Craft) -> None:
    """Repair, claim, save and sweep, as a job that is started there."""
    _run([], "repair", "--yes", craft.root)
    journal = Journal(os.path.join(os.path.dirname(craft.root), "journal"), ())
    try:
        chief = make_chief(craft.root)
        claim(chief)
        for number in (20, 21, 22):
            save(chief, craft.root, journal, number, number=number)
        assert chief.settle(60)
        chief.close()
    except DistckptError:
        pass
    finally:
        journal.close()


class _Audit:
    """Notes every path outside that is changed or removed."""

    def __init__(self, craft: Craft) -> None:
        self._outside = craft.outside
        self.touched: list[str] = []
        self.is_on = True
        sys.addaudithook(self)

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.is_on or event not in _AUDITED:
            return
        for path in arguments[:2]:
            if isinstance(path, str | bytes):
                # What the system would come to; it is the link itself that is renamed.
                folder, name = os.path.split(os.fsdecode(path))
                self._note(event, os.path.join(os.path.realpath(folder), name))

    def _note(self, event: str, path: str) -> None:
        if path == self._outside or path.startswith(self._outside + os.sep):
            self.touched.append(f"{event} {path}")


_AUDITED = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod"}


def _tree(folder: str) -> dict[str, bytes]:
    return {
        os.path.relpath(os.path.join(where, name), folder): _read(os.path.join(where, name))
        for where, _, names in os.walk(folder)
        for name in names
    }


@pytest.fixture(scope="module")
def template(tmp_path_factory) -> str:
    """Make a healthy run directory."""
    folder = str(tmp_path_factory.mktemp("crafted"))
    directory = os.path.join(folder, "run")
    chief = make_chief(directory)
    claim(chief)
    journal = Journal(os.path.join(folder, "journal"), ())
    save(chief, directory, journal, 1)
    journal.close()
    chief.close()
    _use(Craft(folder))  # imports what the children then have
    return directory


# By default every seventh attack is tried, and those that a mutant of mutants.py needs.
IN_THE_SAMPLE = {
    "header: entry that stands twice",
    "manifest: link to what was there",
}


@pytest.mark.parametrize(
    "attack",
    [
        pytest.param(
            attack,
            id=attack.name,
            marks=()
            if index % 7 == 0 or attack.name in IN_THE_SAMPLE
            else pytest.mark.full,
        )
        for index, attack in enumerate(ATTACKS)
    ],
)
def test_attack_is_refused_or_harmless(scratch: str, template: str, attack: Attack):
    """By an error of ours, in bounded time and memory; what lies outside is untouched."""
    shutil.copytree(template, os.path.join(scratch, "run"))
    outside = os.path.join(scratch, "outside")
    os.mkdir(outside)
    _write(os.path.join(outside, "secret"), _SECRET)
    try:
        craft = Craft(scratch)
        attack.make(craft)
        before = _tree(outside)
        found = os.path.join(scratch, "found")

        def body() -> None:
            audit = _Audit(craft)
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            refused = _use(craft)
            _live_on(craft)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
            audit.is_on = False
            with open(found, "w", encoding="utf-8") as file:
                json.dump([refused, audit.touched, grown], file)

        errors = os.path.join(scratch, "errors")
        assert in_child(body, errors) == 0, read_text(scratch, "errors") or "it hangs"
        refused, touched, grown = json.loads(read_text(scratch, "found"))
        assert _tree(outside) == before, "what lies outside was changed"
        assert not touched
        assert grown < _LIMIT_KIB + _size_kib(craft), f"took {grown} KiB"
        if attack.outcome == REFUSED:
            assert refused, "nobody noticed"
        else:
            assert not refused
    finally:
        # As deep as it can be: deeper than rmtree goes.
        os.system(f"rm -rf {scratch}/*")


def _size_kib(craft: Craft) -> int:
    """Return what a reader may hold: the files that must be read as a whole, some times."""
    sizes = [
        os.path.getsize(path)
        for path in (craft.record, craft.manifest)
        if os.path.isfile(path)
    ]
    return 16 * sum(size for size in sizes if size < 2**30) // 1024


def test_there_are_many_attacks():
    """And each has a name of its own."""
    assert len({attack.name for attack in ATTACKS}) == len(ATTACKS) >= 80


def test_untouched_directory_is_used_without_a_complaint(scratch: str, template: str):
    """Else all of them would be refused for nothing."""
    shutil.copytree(template, os.path.join(scratch, "run"))
    craft = Craft(scratch)
    assert _use(craft) == []
    assert isinstance(Manifest.decode(_read(craft.manifest)), Manifest)
    assert Manifest.decode(_read(craft.manifest)).stamp == stamp.CURRENT
