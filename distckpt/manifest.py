"""The manifest of one attempt: what belongs to it, as a checked dataclass and JSON.

Written last, by the chief, so an attempt's directory that has one is complete; the
record holds its digest. An attempt is self-contained: copied elsewhere, it still
verifies and restores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from distckpt import layout, paths, strict_json, values
from distckpt.errors import FormatError, ManifestError
from distckpt.layout import Assignment, Row, Table
from distckpt.record import DIGEST_LENGTH, digest, is_hex

FORMAT = 1
MAX_SIZE_BYTES = 256 * 2**20

_MAX_WORLD_SIZE = 10_000_000
_CHECKSUM = b',\n"checksum": '


@dataclass(frozen=True, slots=True)
class Shard:
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
        values: The job-wide plain values by path, encoded by ``values.encode``.
    """

    attempt: paths.Attempt
    chain: str
    step: int | None
    created: float
    shards: tuple[Shard, ...]
    layouts: tuple[Table, ...]
    values: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        num_shards = len(self.shards)
        _check(0 < num_shards <= _MAX_WORLD_SIZE, "number of shards", num_shards)
        for rank, shard in enumerate(self.shards):
            _check(
                0 < shard.size_bytes < 2**63
                and 0 <= shard.layout < len(self.layouts)
                and is_hex(shard.header, DIGEST_LENGTH),
                f"shard of rank {rank}",
                shard,
            )
        for table in self.layouts:
            layout.check_table(table)

    @property
    def world_size(self) -> int:
        """Number of ranks that wrote it."""
        return len(self.shards)

    @cached_property
    def assignment(self) -> Assignment:
        """Which rank's file holds which box; computed, not stored."""
        return Assignment(self.layouts, [shard.layout for shard in self.shards])

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
            "format": FORMAT,
            "path": self.attempt.published,
            "chain": self.chain,
            "step": self.step,
            "created": self.created,
            "world_size": self.world_size,
        }
        lines = [f'"{key}": {strict_json.dumps(value)}' for key, value in head.items()]
        shards = [
            {
                "file": self.shard_file(rank),
                "bytes": shard.size_bytes,
                "header": shard.header,
                "layout": shard.layout,
            }
            for rank, shard in enumerate(self.shards)
        ]
        lines.append(f'"shards": {_one_a_line(shards)}')
        tables = ",\n".join(
            _one_a_line([row.to_json() for row in table]) for table in self.layouts
        )
        lines.append(f'"layouts": [{tables}]')
        lines.append(f'"values": {_one_a_line(_group(self.values))}')
        body = ("{\n" + ",\n".join(lines)).encode()
        return body + _CHECKSUM + f'"{digest(body)}"\n}}\n'.encode()

    @staticmethod
    def decode(data: bytes) -> Manifest:
        """Decode and check the bytes of ``manifest.json``.

        Raises:
            ManifestError: Says what is wrong with them.
        """
        _check(len(data) <= MAX_SIZE_BYTES, "size in bytes", len(data))
        try:
            tree = strict_json.loads(data)
        except strict_json.JsonError as error:
            msg = f"not a manifest: {error}"
            raise ManifestError(msg) from None
        _check(isinstance(tree, dict), "content", tree)
        if type(tree.get("format")) is not int or tree["format"] != FORMAT:
            msg = (
                f"manifest of format {tree.get('format')!r:.20}; this version of "
                f"distckpt reads format {FORMAT}. It was written by another version."
            )
            raise ManifestError(msg)
        manifest = _from_tree(tree)
        # The record holds the digest of the whole; this one is for copies without records.
        body, _, _ = data.rpartition(_CHECKSUM)
        _check(tree["checksum"] == digest(body), "checksum", tree["checksum"])
        return manifest


_FIELDS = (
    "format",
    "path",
    "chain",
    "step",
    "created",
    "world_size",
    "shards",
    "layouts",
    "values",
    "checksum",
)


def _from_tree(tree: dict[str, Any]) -> Manifest:
    _check(tuple(tree) == _FIELDS, "fields", list(tree))
    path, chain, step = tree["path"], tree["chain"], tree["step"]
    attempt = paths.parse_published(path) if isinstance(path, str) else None
    if attempt is None:
        msg = f"manifest: bad path: {path!r:.200}"
        raise ManifestError(msg)
    _check(is_hex(chain, 16), "chain", chain)
    _check(step is None or type(step) is int, "step", step)
    created = tree["created"]
    _check(type(created) is float and math.isfinite(created), "created", created)
    shards, layouts = tree["shards"], tree["layouts"]
    _check(isinstance(shards, list), "shards", shards)
    world_size = tree["world_size"]
    _check(type(world_size) is int and world_size == len(shards), "world_size", world_size)
    _check(
        isinstance(layouts, list) and all(isinstance(rows, list) for rows in layouts),
        "layouts",
        layouts,
    )
    return Manifest(
        attempt=attempt,
        chain=chain,
        step=step,
        created=created,
        shards=tuple(
            _decode_shard(fields, rank, len(shards)) for rank, fields in enumerate(shards)
        ),
        layouts=tuple(tuple(map(Row.from_json, rows)) for rows in layouts),
        values=_ungroup(tree["values"]),
    )


def _decode_shard(fields: Any, rank: int, world_size: int) -> Shard:
    known = ("file", "bytes", "header", "layout")
    good = (
        isinstance(fields, dict)
        and tuple(fields) == known
        # Names follow from rank and world size: no path of a manifest is ever joined.
        and fields["file"] == paths.shard_file(rank, world_size)
        and type(fields["bytes"]) is int
        and isinstance(fields["header"], str)
        and type(fields["layout"]) is int
    )
    _check(good, f"shard of rank {rank}", fields)
    return Shard(fields["bytes"], fields["header"], fields["layout"])


def _group(encoded: dict[str, Any]) -> list[list[Any]]:
    """Write each distinct value once: optimizer settings repeat for each parameter."""
    groups: dict[str, list[Any]] = {}
    for path, value in encoded.items():
        groups.setdefault(strict_json.dumps(value), [value, []])[1].append(path)
    return list(groups.values())


def _ungroup(groups: Any) -> dict[str, Any]:
    _check(isinstance(groups, list), "values", groups)
    result: dict[str, Any] = {}
    for group in groups:
        _check(
            isinstance(group, list)
            and len(group) == 2
            and isinstance(group[1], list)
            and all(isinstance(path, str) for path in group[1]),
            "values",
            group,
        )
        value, names = group
        try:
            values.decode(value)
        except FormatError as error:
            msg = f"manifest: value {names[:1]}: {error}"
            raise ManifestError(msg) from error
        for name in names:
            _check(name not in result, "value that stands twice", name)
            result[name] = value
    return result


def _one_a_line(items: list[Any]) -> str:
    if not items:
        return "[]"
    return "[\n " + ",\n ".join(map(strict_json.dumps, items)) + "\n]"


def _check(condition: bool, what: str, found: Any) -> None:
    if not condition:
        msg = f"manifest: bad {what}: {found!r:.200}"
        raise ManifestError(msg)
