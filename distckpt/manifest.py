"""The manifest of one attempt: what belongs to it, as a checked dataclass and JSON.

Written last, by the chief, so an attempt's directory that has one is complete; the
record holds its digest. An attempt is self-contained: copied elsewhere, it still
verifies and restores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple, NoReturn

from distckpt import layout, paths, stamp, strict_json, values
from distckpt.collector import collector_paused
from distckpt.errors import ConfigError, FormatError, ManifestError
from distckpt.layout import Assignment, Table
from distckpt.record import DIGEST_LENGTH, digest, is_hex
from distckpt.remarks import NOTHING, Remarks
from distckpt.stamp import Stamp

MAX_SIZE_BYTES = 256 * 2**20

_MAX_WORLD_SIZE = 10_000_000
_CHECKSUM = b',\n"checksum": '
# What stands around the tables and between two of them. There are raw newlines in it, and
# none in any JSON string, so it is nothing else. Lines inside a table begin with a blank
# or a bracket.
_LAYOUTS = b'\n"layouts": [\n'
_BETWEEN = ",\n{"
_VALUES = b'\n],\n"values": '


class Shard(NamedTuple):
    """One rank's shard file.

    Attributes:
        size_bytes: Size of the whole file.
        header: Digest of the file's header, which holds the blocks' checksums.
        layout: Index of the rank's table in the manifest's ``layouts``.
    """

    size_bytes: int
    header: str
    layout: int


@dataclass(frozen=True)
class Manifest:
    """What one attempt consists of.

    Attributes:
        attempt: The attempt itself.
        chain: The record chain that made it.
        step: Training step, if the manager had a step counter.
        created: Wall time of the chief, for people.
        shards: One shard file a rank.
        layouts: Tables; ranks with equal tables share one.
        values: The job-wide plain values by path, encoded by ``values.encode``, or by
            ``values.encode_text``.
        remarks: What the user has said of it.
        stamp: The manifest's format and features.
    """

    attempt: paths.Attempt
    chain: str
    step: int | None
    created: float
    shards: tuple[Shard, ...]
    layouts: tuple[Table, ...]
    values: dict[str, Any] = field(default_factory=dict)
    remarks: Remarks = NOTHING
    stamp: Stamp = stamp.CURRENT

    def __post_init__(self) -> None:
        num_shards = len(self.shards)
        _check(0 < num_shards <= _MAX_WORLD_SIZE, "number of shards", num_shards)
        num_layouts = len(self.layouts)
        for size_bytes, header, index in self.shards:
            _check(
                0 < size_bytes < 2**63
                and 0 <= index < num_layouts
                and is_hex(header, DIGEST_LENGTH),
                "shard",
                (size_bytes, header, index),
            )

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote it."""
        return len(self.shards)

    @cached_property
    def assignment(self) -> Assignment:
        """Which rank's file holds which box; computed, not stored."""
        return layout.assignment_of(self.layouts, [shard.layout for shard in self.shards])

    @property
    def size_bytes(self) -> int:
        """Bytes of all shard files."""
        return sum(shard.size_bytes for shard in self.shards)

    def shard_file(self, rank: int) -> str:
        """Name the shard file of one rank."""
        return paths.shard_file(rank, self.world_size)

    def encode(self) -> bytes:
        """Encode to the bytes of ``manifest.json``."""
        head = {
            **self.stamp.fields,
            "path": self.attempt.published,
            "chain": self.chain,
            "step": self.step,
            "created": self.created,
            "metrics": values.encode(self.remarks.metrics),
            "metadata": self.remarks.encoded,
            "world_size": self.world_size,
        }
        lines = [f'"{key}": {strict_json.dumps(value)}' for key, value in head.items()]
        shards = [
            f'[{shard.size_bytes},"{shard.header}",{shard.layout}]' for shard in self.shards
        ]
        lines.append(f'"shards": {strict_json.lines(shards)}')
        tables = ",\n".join(table.text for table in self.layouts)
        lines.append(f'"layouts": [\n{tables}\n]')
        lines.append(f'"values": {strict_json.lines(_group(self.values))}')
        body = ("{\n" + ",\n".join(lines)).encode()
        return body + _CHECKSUM + f'"{digest(body)}"\n}}\n'.encode()

    @staticmethod
    def decode(data: bytes) -> Manifest:
        """Decode and check the bytes of ``manifest.json``.

        Raises:
            ManifestError: Says what is wrong with them.
            NewerFormatError: A newer version of distckpt wrote it.
        """
        _check(len(data) <= MAX_SIZE_BYTES, "size in bytes", len(data))
        # Tables are large and hardly ever change: those that were decoded lately are not
        # read again. So they are cut out, and all else is read without them.
        head, start, rest = data.partition(_LAYOUTS)
        texts, stop, tail = rest.partition(_VALUES)
        try:
            found = start and stop
            tree = strict_json.loads(
                head + b'\n"layouts": null,\n"values": ' + tail if found else data
            )
        except strict_json.JsonError as error:
            msg = f"not a manifest: {error}"
            raise ManifestError(msg) from None
        _check(isinstance(tree, dict), "content", tree)
        read = stamp.read_stamp(tree, stamp.MANIFEST)
        if read is None:
            _refuse("format", tree.get("format"))
        checksum = tree.pop("checksum", None)
        manifest = _from_tree(tree, texts, read)
        # The record holds the digest of the whole; this one is for copies without records.
        body, _, _ = data.rpartition(_CHECKSUM)
        _check(checksum == digest(body), "checksum", checksum)
        return manifest


_FIELDS = (
    "path",
    "chain",
    "step",
    "created",
    "metrics",
    "metadata",
    "world_size",
    "shards",
    "layouts",
    "values",
)


def _from_tree(tree: dict[str, Any], texts: bytes, read: Stamp) -> Manifest:
    _check(stamp.checked_fields(tree, _FIELDS, read), "fields", list(tree))
    path, chain, step = tree["path"], tree["chain"], tree["step"]
    attempt = paths.parse_published(path) if isinstance(path, str) else None
    if attempt is None:
        msg = f"manifest: bad path: {path!r:.200}"
        raise ManifestError(msg)
    _check(is_hex(chain, 16), "chain", chain)
    _check(step is None or type(step) is int, "step", step)
    created = tree["created"]
    _check(type(created) is float and math.isfinite(created), "created", created)
    remarks = _decode_remarks(tree["metrics"], tree["metadata"])
    shards = tree["shards"]
    _check(isinstance(shards, list), "shards", shards)
    world_size = tree["world_size"]
    _check(type(world_size) is int and world_size == len(shards), "world_size", world_size)
    _check(tree["layouts"] is None, "layouts", tree["layouts"])
    return Manifest(
        attempt=attempt,
        chain=chain,
        step=step,
        created=created,
        shards=tuple(map(_decode_shard, shards)),
        layouts=_decode_tables(texts),
        values=_ungroup(tree["values"]),
        remarks=remarks,
        stamp=read,
    )


def _decode_remarks(metrics: Any, metadata: Any) -> Remarks:
    try:
        decoded = values.decode(metrics)
        _check(type(values.decode(metadata)) is dict, "metadata", metadata)
        _check(type(decoded) is dict, "metrics", metrics)
        _check({*map(type, decoded.values())} <= {float}, "metrics", metrics)
        # By the rules for what is saved: a repair makes an entry of a record from it.
        return Remarks(Remarks.of(decoded, None).metrics, metadata)
    except (FormatError, ConfigError) as error:
        msg = f"manifest: metrics or metadata: {error}"
        raise ManifestError(msg) from error


def _decode_shard(fields: Any) -> Shard:
    good = (
        isinstance(fields, list)
        and len(fields) == 3
        and type(fields[0]) is int
        and isinstance(fields[1], str)
        and type(fields[2]) is int
    )
    _check(good, "shard", fields)
    return Shard(*fields)


def _decode_tables(texts: bytes) -> tuple[Table, ...]:
    _check(texts.isascii(), "layouts", texts)
    first, *others = texts.decode().split(_BETWEEN)
    return tuple(map(Table.from_text, [first, *(f"{{{text}" for text in others)]))


def _group(encoded: dict[str, Any]) -> list[str]:
    """Write each distinct value once: optimizer settings repeat for each parameter."""
    # By identity first: thousands of names may share one object.
    names_of: dict[int, list[str]] = {}
    for path, value in encoded.items():
        names_of.setdefault(id(value), []).append(path)
    groups: dict[str, list[str]] = {}
    for names in names_of.values():
        groups.setdefault(values.text_of(encoded[names[0]]), []).extend(names)
    return [f"[{value},{strict_json.dumps(names)}]" for value, names in groups.items()]


def _ungroup(groups: Any) -> dict[str, Any]:
    _check(isinstance(groups, list), "values", groups)
    with collector_paused():
        return _ungrouped(groups)


def _ungrouped(groups: list[Any]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for group in groups:
        _check(
            isinstance(group, list)
            and len(group) == 2
            and isinstance(group[1], list)
            and {*map(type, group[1])} <= {str},
            "values",
            group,
        )
        value, names = group
        try:
            values.check(value)
        except FormatError as error:
            msg = f"manifest: value {names[:1]}: {error}"
            raise ManifestError(msg) from error
        size = len(result)
        result.update(dict.fromkeys(names, value))
        _check(len(result) == size + len(names), "values: a name stands twice in", names)
    return result


def _check(condition: bool, what: str, found: Any) -> None:
    if not condition:
        _refuse(what, found)


def _refuse(what: str, found: Any) -> NoReturn:
    msg = f"manifest: bad {what}: {found!r:.200}"
    raise ManifestError(msg)
