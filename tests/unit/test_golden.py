"""The exact bytes of every kind of file, in every format since 0.1.

The files in ``golden/`` were made from the objects below; nothing in them is random. Those
of format 1 are never made again. Those of format 2 are made by running this module as a
script, as long as that format is provisional. After that a change that moves one byte of
them needs a new feature, not new files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from unit_helpers import FileTarget, open_shard_at

from distckpt import shard_file, values
from distckpt.boxes import Box, whole
from distckpt.layout import SHARDED, SPLIT, WHOLE, Piece, Row, Table
from distckpt.manifest import Manifest, Shard
from distckpt.paths import Attempt
from distckpt.record import COMMIT, Entry, Record
from distckpt.remarks import Remarks
from distckpt.sharding import Sharding, mesh_of
from distckpt.stamp import CURRENT_FORMAT, FIRST, Stamp

GOLDEN = Path(__file__).parent / "golden"
STAMPS = {
    "format-1": FIRST,
    "format-2": Stamp(CURRENT_FORMAT, "0.2.0", (), ("a-note", "another-note")),
}

ATTEMPT = Attempt("ckpt", 1000, 3, "77b0c2d1")

RECORD = Record(
    number=17,
    previous="00112233445566778899aabbccddeeff",
    chain="0123456789abcdef",
    epoch=3,
    writer="fedcba9876543210",
    run="torchrun-golden",
    restart=1,
    action=COMMIT,
    written=1700000000.5,
    live=(
        Entry(Attempt("ckpt", 500, 2, "9f2c41aa"), 9, 1699990000.25, 500, "ab" * 16),
        Entry(
            ATTEMPT,
            17,
            1700000000.0,
            1000,
            "cd" * 16,
            size_bytes=20480,
            metrics=(("loss", 0.25), ("nothing", None)),
            why=(0, 2),
        ),
    ),
    kept=(Entry(Attempt("ckpt", -3, 1, "00000000"), 4, 1699980000.0, None, "ef" * 16),),
    bad=(),
    releasing=(Entry(Attempt("ckpt", 1, 1, "11111111"), 2, 1e-05, 0, "01" * 16),),
    last_preserved=1699980000.0,
    last_step=1000,
    rules=("latest(1)", "every(hours=6)", 'best(2, "loss", mode="min")'),
)

ROWS = (
    Row("model/weight", "float32", (3, 4), SPLIT),
    Row("model/tied", "float32", (3, 4), SPLIT, same_as="model/weight"),
    Row("modél/buffer", "bits16", (), WHOLE),
)

MANIFEST = Manifest(
    attempt=ATTEMPT,
    chain="0123456789abcdef",
    step=1000,
    created=1700000000.0,
    shards=(
        Shard(8192, "ab" * 16, 0),
        Shard(4096, "cd" * 16, 1),
        Shard(8192, "ef" * 16, 0),
    ),
    layouts=(Table(ROWS), Table()),
    values={
        "epoch": 3,
        "lr/a": values.encode(0.1),
        "lr/b": values.encode(0.1),
        "state": values.encode({1: (None, True, b"\x00\xff", float("-inf"))}),
        "seed": values.encode(np.uint32(7)),
    },
    remarks=Remarks.of(
        {"loss": 0.25, "nothing": float("inf")}, {"git": "1234abc", "tags": ("a", 1)}
    ),
)


GRID = Sharding(mesh_of((2, 2), [0, 1, 2, 3]), ("T0", "S0"))
SHUFFLED = Sharding(mesh_of((3,), [3, 0, 2]), ("S1",))

SHARDED_MANIFEST = Manifest(
    attempt=ATTEMPT,
    chain="0123456789abcdef",
    step=1000,
    created=1700000000.0,
    shards=tuple(Shard(4096 + rank, "ab" * 16, 0) for rank in range(4)),
    layouts=(
        Table(
            (
                Row("model/weight", "float32", (7, 4), SHARDED, "", GRID),
                Row("model/tied", "float32", (7, 4), SHARDED, "model/weight", GRID),
                Row("model/norm", "bfloat16", (5, 3), SHARDED, "", SHUFFLED),
                Row("step", "int64", (), WHOLE),
            )
        ),
    ),
)
# What follows from it: rank, tensor, offset and shape, in the order of the files.
SHARDED_PIECES = [
    (0, "step", (), ()),
    (0, "model/weight", (0, 0), (2, 4)),
    (0, "model/norm", (0, 1), (5, 1)),
    (1, "model/weight", (4, 0), (2, 4)),
    (2, "model/weight", (2, 0), (2, 4)),
    (2, "model/norm", (0, 2), (5, 1)),
    (3, "model/weight", (6, 0), (1, 4)),
    (3, "model/norm", (0, 0), (5, 1)),
]


def write_shard(path, stamp):
    """Write the golden shard file: a part, a dtype of our own, an empty tensor."""

    def entry(row, box, data, per_rank=False):
        return shard_file.Entry(Piece(row, box, 0), lambda: memoryview(data), per_rank)

    return shard_file.write(
        FileTarget(path),
        [
            entry(ROWS[0], Box((1, 0), (2, 4)), np.arange(8, dtype="<f4").tobytes()),
            entry(ROWS[2], whole(()), b"\x34\x12"),
            entry(Row("empty", "float64", (0, 2), WHOLE), whole((0, 2)), b""),
            entry(Row("rng", "uint8", (5,), WHOLE), whole((5,)), b"hello", True),
        ],
        attempt=ATTEMPT.published,
        rank=1,
        world_size=3,
        per_rank_values={"loader/position": values.encode((12, float("nan")))},
        written_by=stamp,
    )


@pytest.fixture(params=STAMPS)
def form(request):
    """Return the name of a format."""
    return request.param


@pytest.fixture
def read(form):
    """Return a function that reads a golden file of the format."""
    return lambda name: (GOLDEN / form / name).read_bytes()


@pytest.fixture
def stamped(form):
    """Return a function that puts the format's stamp on a record or manifest."""
    return lambda each: replace(each, stamp=STAMPS[form])


def test_record_encodes_to_the_golden_bytes(read, stamped):
    """Older versions read what this one writes."""
    assert stamped(RECORD).encode() == read("record.json")


def test_golden_record_decodes_to_the_record(read, stamped):
    """This version reads what older ones wrote."""
    assert Record.decode(read("record.json")) == stamped(RECORD)


def test_manifest_encodes_to_the_golden_bytes(read, stamped):
    """Older versions read what this one writes."""
    assert stamped(MANIFEST).encode() == read("manifest.json")


def test_golden_manifest_decodes_to_the_manifest(read, stamped):
    """This version reads what older ones wrote."""
    assert Manifest.decode(read("manifest.json")) == stamped(MANIFEST)


def test_sharded_manifest_encodes_to_the_golden_bytes(read, stamped):
    """Meshes and placements have one spelling."""
    assert stamped(SHARDED_MANIFEST).encode() == read("manifest-sharded.json")


def test_golden_sharded_manifest_decodes_to_the_manifest(read, stamped):
    """This version reads what older ones wrote."""
    assert Manifest.decode(read("manifest-sharded.json")) == stamped(SHARDED_MANIFEST)


def test_pieces_of_the_golden_sharded_manifest_are_where_they_were(read):
    """The arithmetic is part of the format, too."""
    assignment = Manifest.decode(read("manifest-sharded.json")).assignment
    found = [
        (rank, piece.row.name, piece.box.offset, piece.box.shape)
        for rank in range(4)
        for piece in assignment.pieces_of_rank(rank)
    ]
    assert found == SHARDED_PIECES


def test_shard_file_is_written_with_the_golden_bytes(tmp_path, form, read):
    """Older versions read what this one writes."""
    write_shard(tmp_path / "shard.safetensors", STAMPS[form])
    assert (tmp_path / "shard.safetensors").read_bytes() == read("shard.safetensors")


@pytest.fixture
def reader(form):
    with open_shard_at(GOLDEN / form / "shard.safetensors") as reader:
        yield reader


def test_golden_shard_file_verifies(reader):
    """The checksums are those of this version."""
    assert reader.verify() == 32 + 2 + 5


def test_golden_shard_file_describes_itself(reader, form):
    """Attempt, rank, values and stamp are where this version looks for them."""
    seed = values.decode(reader.header.per_rank_values["loader/position"])
    header = reader.header
    assert (header.attempt, header.rank, header.world_size) == (ATTEMPT.published, 1, 3)
    assert repr(seed) == "(12, nan)"
    assert header.stamp == STAMPS[form]


@pytest.mark.parametrize(
    ("key", "dtype", "shape", "box", "per_rank", "data"),
    [
        (
            "model/weight[1:3,0:4]",
            "float32",
            (3, 4),
            Box((1, 0), (2, 4)),
            False,
            np.arange(8, dtype="<f4").tobytes(),
        ),
        ("modél/buffer", "bits16", (), whole(()), False, b"\x34\x12"),
        ("empty", "float64", (0, 2), whole((0, 2)), False, b""),
        ("rng", "uint8", (5,), whole((5,)), True, b"hello"),
    ],
    ids=["part", "own-dtype", "empty", "per-rank"],
)
def test_golden_shard_file_holds_this_entry(reader, key, dtype, shape, box, per_rank, data):
    """Every kind of entry is read as it was meant."""
    stored = reader.header.entries[key]
    buffer = bytearray(stored.size_bytes)
    reader.read_into(stored, 0, memoryview(buffer))
    found = (stored.dtype, stored.global_shape, stored.box, stored.per_rank, bytes(buffer))
    assert found == (dtype, shape, box, per_rank, data)


if __name__ == "__main__":
    folder, written_by = GOLDEN / "format-2", STAMPS["format-2"]
    folder.mkdir(exist_ok=True)
    for file, content in {
        "record.json": RECORD,
        "manifest.json": MANIFEST,
        "manifest-sharded.json": SHARDED_MANIFEST,
    }.items():
        (folder / file).write_bytes(replace(content, stamp=written_by).encode())
    (folder / "shard.safetensors").unlink(missing_ok=True)
    write_shard(folder / "shard.safetensors", written_by)
