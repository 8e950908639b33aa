"""What several unit tests make: attempts, entries, records, and real checkpoints."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np

from distckpt import paths, shard_file, values
from distckpt.boxes import whole
from distckpt.chief import Chief
from distckpt.identity import Identity
from distckpt.layout import SPLIT, WHOLE, Assignment, Piece, Row, Table
from distckpt.manifest import Shard
from distckpt.paths import Attempt
from distckpt.record import Entry, Record
from distckpt.remarks import NOTHING
from distckpt.retention import Retention
from distckpt.run_directory import RunDirectory
from distckpt.storage import posix
from distckpt.storage.posix_store import NewShardFile

DIGEST = "0123456789abcdef0123456789abcdef"
CHAIN = "c0ffee00c0ffee00"
WRITER = "abad1deaabad1dea"
SETTLE_SECONDS = 20


def make_attempt(number=1, *, epoch=1, attempt="0a0b0c0d", name="ckpt"):
    """Make an attempt with fixed digits."""
    return Attempt(name, number, epoch, attempt)


def make_entry(number=1, *, time=100.0, record=1, step=None, **fields):
    """Make an entry; ``fields`` go to the attempt."""
    return Entry(make_attempt(number, **fields), record, float(time), step, DIGEST)


def make_record(number=2, **fields):
    """Make a valid record of a given number."""
    defaults = {
        "number": number,
        "previous": DIGEST if number > 1 else "",
        "chain": CHAIN,
        "epoch": 1,
        "writer": WRITER,
        "run": "torchrun-unit",
        "restart": 0,
        "action": "commit",
        "written": 1000.0,
    }
    return Record(**{**defaults, **fields})


ARRAYS = {
    "model/weight": np.arange(96 * 1024, dtype=np.float32).reshape(96, 1024),
    "model/bias": np.arange(7, dtype=np.float32),
    "step": np.array(5, dtype=np.int64),
}
TABLE = (
    Row("model/weight", "float32", (96, 1024), SPLIT),
    Row("model/bias", "float32", (7,), SPLIT),
    Row("step", "int64", (), WHOLE),
)
VALUES = {"epoch": 3, "optimizer/lr": 0.1}


def bytes_of(piece, arrays):
    """Return the bytes of one piece, as a rank would load them."""
    region = tuple(
        slice(start, start + length)
        for start, length in zip(piece.box.offset, piece.box.shape, strict=True)
    )
    part = np.ascontiguousarray(arrays[piece.row.name][region])
    return memoryview(part.tobytes())


def write_shards(
    directory,
    attempt,
    world_size,
    *,
    table=TABLE,
    arrays=ARRAYS,
    own=lambda rank: {},
    own_values=lambda rank: {"seed": rank},
):
    """Write the shard files of all ranks into a directory, as the ranks would.

    ``own`` and ``own_values`` return what a rank has of its own: arrays and plain values.
    """
    assignment = Assignment([table], [0] * world_size)
    shards = []
    for rank in range(world_size):
        written = shard_file.write(
            FileTarget(os.path.join(directory, paths.shard_file(rank, world_size))),
            [
                shard_file.Entry(piece, lambda piece=piece: bytes_of(piece, arrays))
                for piece in assignment.pieces_of_rank(rank)
            ]
            + [own_entry(rank, name, array) for name, array in own(rank).items()],
            attempt=attempt.published,
            rank=rank,
            world_size=world_size,
            per_rank_values={
                name: values.encode(value) for name, value in own_values(rank).items()
            },
        )
        shards.append(Shard(written.size_bytes, written.header, 0))
    return shards


def own_entry(rank, name, array):
    """Make the entry of a tensor that is a rank's own."""
    row = Row(name, str(array.dtype), array.shape, WHOLE)
    piece = Piece(row, whole(array.shape), rank)
    return shard_file.Entry(piece, lambda: memoryview(array.tobytes()), per_rank=True)


def make_chief(
    directory, *, run="unit", restart=0, keep=3, hours=None, name="ckpt", **more
):
    """Make a chief; it has claimed nothing yet."""
    return Chief(
        RunDirectory.at(directory),
        checkpoint_name=name,
        retention=Retention(keep, hours),
        identity=Identity(run, restart),
        **more,
    )


def claim(chief):
    """Claim and wait until the sweep behind it is through."""
    chief.prepare_claim()
    chief.finish_claim()
    settle(chief)
    return chief


def make_claimed(directory, **arguments):
    """Make a chief that has claimed its directory."""
    return claim(make_chief(directory, **arguments))


def settle(chief):
    """Wait until all deletions are through."""
    assert chief.settle(SETTLE_SECONDS), "deletions did not end"


def write_attempt(chief, directory, attempt, *, world_size=2, **more):
    """Write what the ranks write between begin and commit; returns their votes."""
    pending = os.path.join(directory, attempt.pending)
    return write_shards(pending, attempt, world_size, **more)


def commit(
    chief, attempt, shards, *, step=None, table=TABLE, remarks=NOTHING, plain=VALUES
):
    """Commit with these plain values."""
    encoded = {path: values.encode(value) for path, value in plain.items()}
    chief.commit(
        attempt,
        step=step,
        shards=shards,
        layouts=[Table(table)],
        values=encoded,
        remarks=remarks,
    )


def save(
    chief,
    directory,
    number,
    *,
    step=None,
    world_size=2,
    remarks=NOTHING,
    plain=VALUES,
    **more,
):
    """Save one real checkpoint through a chief and wait for the deletions behind it."""
    attempt = chief.begin(number, 0)
    shards = write_attempt(chief, directory, attempt, world_size=world_size, **more)
    table = more.get("table", TABLE)
    commit(chief, attempt, shards, step=step, table=table, remarks=remarks, plain=plain)
    settle(chief)
    return attempt


@dataclass
class Saved:
    """A run directory with one committed checkpoint."""

    directory: str
    attempt: Attempt

    @property
    def prefix(self):
        return os.path.join(self.directory, self.attempt.prefix)

    @property
    def published(self):
        return os.path.join(self.directory, self.attempt.published)

    def file(self, name):
        return os.path.join(self.published, name)

    def shard(self, rank, world_size=2):
        return self.file(paths.shard_file(rank, world_size))


def make_saved(directory, number=1, **more):
    """Make a run directory with one committed checkpoint, its chief gone."""
    chief = make_claimed(directory)
    attempt = save(chief, directory, number, **more)
    chief.close()
    return Saved(directory, attempt)


def numbers(attempts):
    """Return the numbers of attempts."""
    return [attempt.number for attempt in attempts]


def published_numbers(directory):
    """Return, sorted, the numbers of all published attempts on disk."""
    found = (paths.parse_published(name) for name in os.listdir(directory))
    return sorted(attempt.number for attempt in found if attempt is not None)


def flip_bit(path, offset, mask=1):
    """Flip a bit of a file in place."""
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ mask]))


class FileTarget:
    """A file anywhere, to be written like that of a rank."""

    def __init__(self, path):
        self._path = str(path)

    def __str__(self):
        return self._path

    def create(self, size_bytes=0, *, is_image=False):
        """See ``NewShard.create``."""
        return NewShardFile(self._path, size_bytes, direct=is_image)


def open_shard_at(path, expected_digest=None):
    """Open a shard file anywhere."""
    return shard_file.ShardReader(posix.OpenFile(str(path)), expected_digest)


def record_path(directory, number):
    """Return the path of a record's file."""
    return str(RunDirectory.at(directory).places.record(number))
