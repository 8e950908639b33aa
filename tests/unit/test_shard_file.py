"""A shard file is a valid safetensors file, verified block by block, and hostile ones
are refused, all that the official package refuses among them."""

from __future__ import annotations

import copy
import json
import os
import struct
from math import prod

import numpy as np
import pytest
import safetensors
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st
from unit_helpers import ARRAYS, FileTarget, flip_bit, open_shard_at

from distckpt import dtypes, shard_file, shard_header
from distckpt.boxes import Box, whole
from distckpt.errors import (
    ChecksumError,
    DistckptError,
    ShardFileError,
    StorageError,
    UnsafeCheckpointError,
)
from distckpt.layout import SPLIT, WHOLE, Piece, Row
from distckpt.shard_file import Entry
from distckpt.storage import posix

MAX_EXAMPLES = examples(100)
ATTEMPT = "ckpt-1.e1-0a0b0c0d"
# The sample's entry that is a part of its tensor.
PART = "b[4:6,0:3]"


def entry_of(name, array, *, box=None, shape=None, dtype=None, per_rank=False):
    """Make an entry that holds an array."""
    shape = shape or array.shape
    row = Row(name, dtype or str(array.dtype), tuple(shape), SPLIT)
    piece = Piece(row, box or whole(row.shape), 0)
    return Entry(piece, lambda: memoryview(array.tobytes()), per_rank)


def write(path, entries, **more):
    """Write a shard file of rank 0 of 2."""
    arguments = {"attempt": ATTEMPT, "rank": 0, "world_size": 2, "per_rank_values": {}}
    return shard_file.write(FileTarget(path), entries, **{**arguments, **more})


def write_sample(path):
    """Write a file with two tensors, the first of three blocks."""
    weight = np.arange(80_000, dtype=np.float32).reshape(400, 200)
    return write(path, [entry_of("weight", weight), entry_of("bias", ARRAYS["model/bias"])])


@settings(max_examples=MAX_EXAMPLES)
@given(data=st.data())
def test_runs_are_put_where_they_belong_however_long_and_far_apart(data, tmp_path):
    """Read together or one by one, what arrives is the same."""
    array = np.arange(600_000, dtype=np.uint16)
    path = tmp_path / "runs.safetensors"
    if not path.exists():
        write(path, [entry_of("w", array)])
    lengths = st.sampled_from([1, 2, 50, 3000, 70_000])
    runs, position, target = [], data.draw(lengths) - 1, 0
    while position < len(array) and len(runs) < 30:
        length = min(data.draw(lengths), len(array) - position)
        runs.append((position, target, length))
        position += length + data.draw(lengths) - 1
        target += length
    buffer = memoryview(bytearray(2 * target))
    with open_shard_at(path) as reader:
        reader.read_runs(reader.header.entries["w"], iter(runs), buffer)
    expected = [array[start : start + length] for start, _, length in runs]
    assert buffer == np.concatenate(expected or [array[:0]]).tobytes()


def test_column_that_was_cut_otherwise_is_read_once(tmp_path):
    """One row after the other, each would cost a whole block for a few bytes."""
    array = np.arange(2000 * 256, dtype=np.float32).reshape(2000, 256)
    path = tmp_path / "column.safetensors"
    write(path, [entry_of("w", array)])
    runs = [(256 * row + 64, 64 * row, 64) for row in range(2000)]
    buffer = memoryview(bytearray(4 * 64 * 2000))
    with open_shard_at(path) as reader:
        stored = reader.header.entries["w"]
        reader.read_runs(stored, runs, buffer)
        assert buffer == array[:, 64:128].tobytes()
        num_blocks = -(-stored.size_bytes // reader.header.block_bytes)
        assert reader.num_block_reads <= num_blocks + 1


def test_wrong_byte_among_runs_is_found(tmp_path):
    """What is read together is verified like everything else."""
    path = tmp_path / "runs.safetensors"
    write(path, [entry_of("w", np.arange(100_000, dtype=np.float32))])
    flip_bit(path, path.stat().st_size - 1)
    buffer = memoryview(bytearray(80))
    with open_shard_at(path) as reader:
        stored = reader.header.entries["w"]
        reader.read_runs(stored, [(0, 0, 10), (20, 10, 10)], buffer)
        with pytest.raises(ChecksumError):
            reader.read_runs(stored, [(99_000, 0, 10), (99_100, 10, 10)], buffer)


def split_file(data):
    """Take a file apart into header tree and data."""
    (length,) = struct.unpack("<Q", data[:8])
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def join_file(tree, data, dumps=json.dumps):
    """Put a file together from a header tree, or from its bytes, and data."""
    header = tree if isinstance(tree, bytes) else dumps(tree).encode()
    return struct.pack("<Q", len(header)) + header + data


def official_opens(data):
    """Tell whether the safetensors package takes these bytes for a file."""
    try:
        safetensors.deserialize(data)
    except Exception:  # its own class, a ValueError, a panic: all mean no
        return False
    return True


def ours_opens(path, data):
    """Tell whether we take these bytes for a file; only our own errors may come out."""
    path.write_bytes(data)
    try:
        with open_shard_at(path) as reader:
            reader.verify()
    except DistckptError:
        return False
    return True


# What is written


_numpy_dtypes = ["bool", "uint8", "int8", "int16", "uint16", "int32", "uint32"]
_numpy_dtypes += ["int64", "uint64", "float16", "float32", "float64", "complex64"]


@st.composite
def _arrays(draw):
    arrays = {}
    for index in range(draw(st.integers(0, 5))):
        dtype = np.dtype(draw(st.sampled_from(_numpy_dtypes)))
        shape = tuple(draw(st.lists(st.integers(0, 6), max_size=3)))
        name = draw(st.text(min_size=1, max_size=3)) + str(index)
        raw = draw(st.integers(0, 255))
        data = bytes((raw + i) % 2 for i in range(prod(shape) * dtype.itemsize))
        arrays[name] = np.frombuffer(data, dtype).reshape(shape)
    return arrays


@settings(max_examples=MAX_EXAMPLES // 2)
@given(arrays=_arrays())
def test_file_of_any_arrays_opens_in_the_official_package(tmp_path, arrays):
    """Any tool reads what was written, with equal contents."""
    path = tmp_path / "f.safetensors"
    path.unlink(missing_ok=True)
    write(path, [entry_of(name, array) for name, array in arrays.items()])
    with safetensors.safe_open(path, "np") as file:
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


@settings(max_examples=MAX_EXAMPLES // 2)
@given(arrays=_arrays())
def test_file_of_any_arrays_is_read_by_us_with_equal_contents(tmp_path, arrays):
    """What is written is what is read, verified."""
    path = tmp_path / "f.safetensors"
    path.unlink(missing_ok=True)
    write(path, [entry_of(name, array) for name, array in arrays.items()])
    with open_shard_at(path) as reader:
        found = {}
        for stored in reader.header.entries.values():
            buffer = bytearray(stored.size_bytes)
            reader.read_into(stored, 0, memoryview(buffer))
            found[stored.name] = (stored.dtype, stored.global_shape, bytes(buffer))
    expected = {n: (str(a.dtype), a.shape, a.tobytes()) for n, a in arrays.items()}
    assert found == expected


@pytest.mark.parametrize("dtype", list(dtypes._DTYPES))
def test_file_of_any_dtype_opens_in_the_official_package(tmp_path, dtype):
    """Also what safetensors has no name for: it sees bytes, we see the dtype."""
    path = str(tmp_path / "f")
    data = np.arange(6 * dtypes.item_size_bytes(dtype), dtype=np.uint8)
    write(path, [entry_of("x", data, shape=(2, 3), dtype=dtype)])
    with open(path, "rb") as file:
        ((name, tensor),) = safetensors.deserialize(file.read())
    assert (name, bytes(tensor["data"])) == ("x", data.tobytes())
    with open_shard_at(path) as reader:
        stored = reader.header.entries["x"]
        assert (stored.dtype, stored.global_shape) == (dtype, (2, 3))


def test_data_starts_at_a_multiple_of_4096(tmp_path):
    """Direct I/O and memory maps want it."""
    write_sample(tmp_path / "f")
    (length,) = struct.unpack("<Q", (tmp_path / "f").read_bytes()[:8])
    assert (8 + length) % 4096 == 0


@settings(max_examples=MAX_EXAMPLES // 4)
@given(arrays=_arrays())
def test_every_entry_is_aligned_to_its_element_size(tmp_path, arrays):
    """Readers that map the file can view it directly."""
    path = tmp_path / "f"
    path.unlink(missing_ok=True)
    write(path, [entry_of(name, array) for name, array in arrays.items()])
    with open_shard_at(path) as reader:
        for stored in reader.header.entries.values():
            assert stored.start % dtypes.item_size_bytes(stored.dtype) == 0


def test_written_says_the_size_and_digest_that_a_reader_finds(tmp_path):
    """The vote carries what the manifest will hold."""
    written = write_sample(tmp_path / "f")
    with open_shard_at(tmp_path / "f") as reader:
        assert (reader.size_bytes, reader.header_digest) == written


def test_file_describes_itself(tmp_path):
    """A file cannot stand in another attempt's or rank's place."""
    path = str(tmp_path / "f")
    write(path, [], rank=1, per_rank_values={"seed": {"$tuple": [1]}})
    with open_shard_at(path) as reader:
        header = reader.header
    found = (header.attempt, header.rank, header.world_size, header.per_rank_values)
    assert found == (ATTEMPT, 1, 2, {"seed": {"$tuple": [1]}})


def test_part_of_a_tensor_is_stored_with_where_it_belongs(tmp_path):
    """Name, global shape and offset follow from the file alone."""
    path = str(tmp_path / "f")
    box = Box((4, 0), (2, 3))
    part = np.arange(6, dtype=np.int16).reshape(2, 3)
    write(path, [entry_of("w", part, box=box, shape=(10, 3))])
    with open_shard_at(path) as reader:
        (stored,) = reader.header.entries.values()
    assert (stored.key, stored.name, stored.global_shape, stored.box) == (
        "w[4:6,0:3]",
        "w",
        (10, 3),
        box,
    )


def test_per_rank_tensor_is_marked(tmp_path):
    """What is this rank's own is told from what is shared."""
    path = str(tmp_path / "f")
    write(path, [entry_of("rng", np.zeros(3, np.uint8), per_rank=True)])
    with open_shard_at(path) as reader:
        assert reader.header.entries["rng"].per_rank


def test_equal_names_in_one_file_are_refused(tmp_path):
    """One of them would be lost."""
    entries = [entry_of("x", np.zeros(1)), entry_of("x", np.ones(1))]
    with pytest.raises(ShardFileError, match="'x' stands twice"):
        write(tmp_path / "f", entries)


def test_existing_file_is_never_overwritten(tmp_path):
    """No attempt's file is written twice."""
    (tmp_path / "f").write_bytes(b"old")
    with pytest.raises(StorageError):
        write_sample(tmp_path / "f")
    assert (tmp_path / "f").read_bytes() == b"old"


def test_missing_directory_is_never_made(tmp_path):
    """Where the pending directory is gone, another manager took over."""
    with pytest.raises(StorageError):
        write_sample(tmp_path / "gone" / "f")
    assert not (tmp_path / "gone").exists()


def test_content_is_synced_before_the_directory(tmp_path, monkeypatch):
    """After return the file survives a power loss: content first, then its name."""
    log = []
    for name in ("write_at", "finish"):
        real = getattr(posix.NewFile, name)

        def call(self, *arguments, name=name, real=real):
            log.append(name)
            return real(self, *arguments)

        monkeypatch.setattr(posix.NewFile, name, call)
    monkeypatch.setattr(posix, "sync_directory", lambda path: log.append(path))
    write_sample(tmp_path / "f")
    assert log[-2:] == ["finish", str(tmp_path)]


def test_small_entries_are_written_in_few_calls(tmp_path, monkeypatch):
    """A model of ten thousand small tensors is no ten thousand writes."""
    count = []
    real = os.pwritev
    monkeypatch.setattr(os, "pwritev", lambda *a: count.append(1) or real(*a))
    entries = [entry_of(f"t{i}", np.zeros(1, np.float32)) for i in range(3000)]
    write(tmp_path / "f", entries)
    assert len(count) < 20


def test_blocks_grow_for_entries_so_large_that_checksums_would_not_fit():
    """The header stays below the package's limit for terabytes."""
    sizes = [2**40, 2**38]
    block = shard_header._block_bytes(sizes)
    assert shard_header._num_blocks(sizes, block) * 8 <= 16 * 2**20


# What is read


@settings(max_examples=MAX_EXAMPLES)
@given(data=st.data())
def test_any_range_of_an_entry_reads_as_written(tmp_path, data):
    """Ranges that touch, cross or equal blocks all give the same bytes."""
    path = tmp_path / "f"
    if not path.exists():
        write_sample(path)
    expected = np.arange(80_000, dtype=np.float32).tobytes()
    edges = [0, 1, 131071, 131072, 131073, 262143, 262144, 262145, 319999, 320000]
    point = st.sampled_from(edges) | st.integers(0, 320_000)
    start, stop = sorted((data.draw(point), data.draw(point)))
    with open_shard_at(path) as reader:
        buffer = bytearray(stop - start)
        reader.read_into(reader.header.entries["weight"], start, memoryview(buffer))
    assert bytes(buffer) == expected[start:stop]


@pytest.mark.parametrize(
    ("start", "stop", "blocks"),
    [(0, 320_000, 3), (0, 131072, 1), (131071, 131073, 2), (7, 8, 1), (5, 5, 0)],
)
def test_read_of_a_range_reads_only_the_blocks_it_touches(tmp_path, start, stop, blocks):
    """A reader of some rows does not pay for the whole tensor."""
    write_sample(tmp_path / "f")
    with open_shard_at(tmp_path / "f") as reader:
        reader.read_into(
            reader.header.entries["weight"], start, memoryview(bytearray(stop - start))
        )
        assert reader.num_block_reads == blocks


@pytest.mark.parametrize(
    ("position", "text"),
    [(0, "'weight', block 0"), (131072, "'weight', block 1"), (320_000, "'bias', block 0")],
)
def test_flipped_bit_is_found_with_file_tensor_and_block(tmp_path, position, text):
    """The message says where the damage is."""
    path = str(tmp_path / "f")
    write_sample(path)
    with open_shard_at(path) as reader:
        start = reader.size_bytes - 320_000 - 28
    flip_bit(path, start + position)
    with open_shard_at(path) as reader, pytest.raises(ChecksumError, match=text) as caught:
        reader.verify()
    assert str(caught.value).startswith(path)


def test_flipped_bit_in_another_block_does_not_fail_a_partial_read(tmp_path):
    """What is good can still be read."""
    path = str(tmp_path / "f")
    write_sample(path)
    with open_shard_at(path) as reader:
        flip_bit(path, reader.size_bytes - 28 - 1)  # the last byte of weight
        reader.read_into(reader.header.entries["weight"], 0, memoryview(bytearray(100)))


def test_verify_returns_the_number_of_bytes(tmp_path):
    """Every byte of data is counted once."""
    write_sample(tmp_path / "f")
    with open_shard_at(tmp_path / "f") as reader:
        assert reader.verify() == 320_000 + 28


def test_file_cut_while_it_is_read_says_so(tmp_path):
    """Short data is an error of the file, not of the checksum."""
    path = str(tmp_path / "f")
    write_sample(path)
    with open_shard_at(path) as reader:
        os.truncate(path, reader.size_bytes - 10)
        with pytest.raises(ShardFileError, match="ends inside tensor 'bias'"):
            reader.verify()


def test_link_in_a_shard_files_place_is_unsafe(tmp_path):
    """Checkpoints are read from files only."""
    write_sample(tmp_path / "f")
    (tmp_path / "link").symlink_to(tmp_path / "f")
    with pytest.raises(UnsafeCheckpointError):
        open_shard_at(tmp_path / "link")


def test_file_of_another_tool_says_that_it_is_one(tmp_path):
    """A model from elsewhere is told from a damaged file."""
    from safetensors.numpy import save_file

    save_file({"x": np.zeros(2)}, tmp_path / "f")
    with pytest.raises(ShardFileError, match="not one that distckpt wrote"):
        open_shard_at(tmp_path / "f")


def test_refusal_names_the_file(tmp_path):
    """Of a thousand files the message names the one."""
    (tmp_path / "f").write_bytes(b"")
    with pytest.raises(ShardFileError, match=f"^{tmp_path}/f: "):
        open_shard_at(tmp_path / "f")


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="needs /proc")
def test_refused_file_is_closed(tmp_path):
    """A directory of broken files does not use up the descriptors."""
    (tmp_path / "f").write_bytes(bytes(100))
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(ShardFileError):
        open_shard_at(tmp_path / "f")
    assert len(os.listdir("/proc/self/fd")) == before


# Hostile and damaged files


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Return the bytes of a valid file with several entries."""
    path = tmp_path_factory.mktemp("sample") / "f"
    part = np.arange(6, dtype=np.int16).reshape(2, 3)
    write(
        path,
        [
            entry_of("a", np.arange(4, dtype=np.float32)),
            entry_of("b", part, box=Box((4, 0), (2, 3)), shape=(10, 3)),
            entry_of("c", np.zeros((0, 5), np.float32)),
            entry_of("d", np.arange(32, dtype=np.uint8), shape=(2,), dtype="complex128"),
            entry_of("e", np.array(5, np.int64)),
        ],
        per_rank_values={"seed": 1},
    )
    return path.read_bytes()


@settings(max_examples=MAX_EXAMPLES)
@given(data=st.binary(max_size=60))
def test_arbitrary_file_gives_only_our_errors(tmp_path, data):
    """Never a crash, never another exception."""
    assert not ours_opens(tmp_path / "f", data)


@settings(max_examples=examples(2) * MAX_EXAMPLES)
@given(data=st.data())
def test_file_with_a_piece_replaced_gives_only_our_errors(tmp_path, sample, data):
    """Whatever a disk or a person does to a file; and no stricter than needed."""
    text_end = sample.rindex(b"}", 0, 4096) + 1
    start = data.draw(st.integers(0, text_end))
    stop = data.draw(st.integers(start, min(text_end, start + 10)))
    middle = data.draw(
        st.binary(max_size=4)
        | st.text('0123456789[]{},":-e. \\u', max_size=6).map(str.encode)
    )
    mutated = sample[:start] + middle + sample[stop:]
    if ours_opens(tmp_path / "f", mutated):
        assert official_opens(mutated)


def _set(path, value):
    def mutate(tree):
        for key in path[:-1]:
            tree = tree[key]
        tree[path[-1]] = value

    return mutate


def _rename_key(old, new):
    def mutate(tree):
        tree[new] = tree.pop(old)

    return mutate


# Each changes the header; the data stays. Entries in data order: d e a c b, at
# 0-32, 32-40, 40-56, 56-56, 56-68.
_HEADERS = {
    "overlap": _set(("e", "data_offsets"), [31, 39]),
    "hole": _set(("d", "data_offsets"), [8, 32]),
    "all-shifted": lambda tree: [
        tree[k].update(data_offsets=[o + 8 for o in tree[k]["data_offsets"]])
        for k in ("d", "e", "a", "c", PART)
    ],
    "same-span-twice": lambda tree: tree.update(a2=dict(tree["a"])),
    "missing-entry": lambda tree: tree.pop("a"),
    "reversed-offsets": _set(("a", "data_offsets"), [56, 40]),
    "negative-offset": _set(("d", "data_offsets"), [-32, 0]),
    "float-offset": _set(("d", "data_offsets"), [0.0, 32.0]),
    "string-offset": _set(("d", "data_offsets"), ["0", "32"]),
    "bool-offset": _set(("d", "data_offsets"), [False, 32]),
    "three-offsets": _set(("d", "data_offsets"), [0, 16, 32]),
    "no-offsets": lambda tree: tree["d"].pop("data_offsets"),
    "huge-offset": _set((PART, "data_offsets"), [56, 2**64]),
    "offset-at-the-limit": _set((PART, "data_offsets"), [56, 2**64 - 1]),
    "overflow-shape": _set(("a", "shape"), [2**32, 2**32, 4]),
    "overflow-to-four": _set(("a", "shape"), [2**62 + 1, 4]),
    "overflow-then-zero": _set(("c", "shape"), [2**40, 2**40, 0]),
    "zero-then-overflow": _set(("c", "shape"), [0, 2**40, 2**40]),
    "overflow-dimension": _set(("c", "shape"), [0, 2**64]),
    "negative-shape": _set(("a", "shape"), [-2, -2]),
    "float-shape": _set(("a", "shape"), [4.0]),
    "null-shape": _set(("a", "shape"), None),
    "wrong-shape": _set(("a", "shape"), [5]),
    "many-dimensions": _set(("a", "shape"), [4] + [1] * 2000),
    "many-huge-dimensions": _set(("a", "shape"), [2**62] * 20_000),
    "unknown-dtype": _set(("a", "dtype"), "F31"),
    "lower-dtype": _set(("a", "dtype"), "f32"),
    "null-dtype": _set(("a", "dtype"), None),
    "list-dtype": _set(("a", "dtype"), ["F32"]),
    "four-bit-dtype": _set(("a", "dtype"), "F4"),
    "extra-field": _set(("a", "more"), 1),
    "entry-is-list": _set(("a",), [1]),
    "entry-is-null": _set(("a",), None),
    "metadata-number": _set(("__metadata__", "more"), 3),
    "metadata-nested": _set(("__metadata__", "more"), {"a": "b"}),
    "metadata-list": _set(("__metadata__",), []),
    "metadata-null": _set(("__metadata__",), None),
    "metadata-gone": lambda tree: tree.pop("__metadata__"),
    "ours-not-json": _set(("__metadata__", "distckpt"), "{"),
    "ours-surrogate": _set(("__metadata__", "distckpt"), "\ud800"),
    "metadata-surrogate": _set(("__metadata__", "more"), "\udfff"),
    "key-surrogate": _rename_key("a", "\ud800"),
    "empty-key": _rename_key("a", ""),
    "checksums-gone": lambda tree: tree["__metadata__"].pop("distckpt.checksums"),
    "checksums-short": _set(("__metadata__", "distckpt.checksums"), "AAAA"),
    "checksums-no-base64": _set(("__metadata__", "distckpt.checksums"), "ä"),
}


@pytest.fixture
def mutate(sample):
    """Return a function that applies a header mutation to the sample."""

    def apply(name):
        tree, data = split_file(sample)
        tree = copy.deepcopy(tree)
        _HEADERS[name](tree)
        return join_file(tree, data)

    return apply


@pytest.mark.parametrize("name", _HEADERS)
def test_header_that_the_official_package_rejects_is_rejected_here(tmp_path, mutate, name):
    """Our rules are those of the package, or narrower."""
    data = mutate(name)
    if not official_opens(data):
        assert not ours_opens(tmp_path / "f", data)


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("name", [n for n in _HEADERS if n != "zero-then-overflow"])
def test_header_with_this_fault_is_refused(tmp_path, mutate, name):
    """Each fault is found before a byte of data is believed."""
    assert not ours_opens(tmp_path / "f", mutate(name))


def _text_of(sample):
    tree, data = split_file(sample)
    return json.dumps(tree, separators=(",", ":")).encode(), data


def _raw_mutations(sample):
    text, data = _text_of(sample)
    (length,) = struct.unpack("<Q", sample[:8])
    nested = b'{"a":' * 500 + b"1" + b"}" * 500
    return {
        "empty": b"",
        "seven-bytes": sample[:7],
        "eight-bytes": sample[:8],
        "header-cut": sample[: 8 + length - 1],
        "data-cut": sample[:-1],
        "trailing-byte": sample + b"\0",
        "trailing-block": sample + bytes(4096),
        "length-too-small": struct.pack("<Q", length - 1) + sample[8:],
        "length-too-large": struct.pack("<Q", length + 1) + sample[8:],
        "length-huge": struct.pack("<Q", 2**64 - 1) + sample[8:],
        "length-negative": struct.pack("<q", -1) + sample[8:],
        "length-zero": struct.pack("<Q", 0) + sample[8:],
        "length-over-limit": struct.pack("<Q", 100_000_001) + sample[8:],
        "big-endian-length": struct.pack(">Q", length) + sample[8:],
        "leading-space": join_file(b" " + text, data),
        "leading-bom": join_file(b"\xef\xbb\xbf" + text, data),
        "trailing-null": join_file(text + b"\0", data),
        "trailing-comma": join_file(text[:-1] + b",}", data),
        "two-documents": join_file(text + b"{}", data),
        "list": join_file(b"[" + text + b"]", data),
        "not-utf-8": join_file(text.replace(b'"a"', b'"\xff"'), data),
        "raw-control": join_file(text.replace(b'"a"', b'"a\x01"'), data),
        "encoded-surrogate": join_file(text.replace(b'"a"', b'"\xed\xa0\x80"'), data),
        "duplicate-key": join_file(
            text[:-1] + b',"a":{"dtype":"F32","shape":[4],"data_offsets":[40,56]}}', data
        ),
        "duplicate-field": join_file(
            text.replace(b'"a":{"dtype"', b'"a":{"dtype":"F32","dtype"'), data
        ),
        "minus-zero": join_file(
            text.replace(b'"data_offsets":[0,32]', b'"data_offsets":[-0,32]'), data
        ),
        "exponent": join_file(
            text.replace(b'"data_offsets":[0,32]', b'"data_offsets":[0,32e0]'), data
        ),
        "nan": join_file(text.replace(b'"shape":[4]', b'"shape":[NaN]'), data),
        "leading-zero": join_file(text.replace(b'"shape":[4]', b'"shape":[04]'), data),
        "deep-nesting": join_file(text[:-1] + b',"x":' + nested + b"}", data),
        "very-deep": join_file(text[:-1] + b',"x":' + b"[" * 10**6 + b"}", data),
        "digits": join_file(
            text.replace(b'"shape":[4]', b'"shape":[' + b"4" * 9999 + b"]"), data
        ),
    }


_RAW = list(_raw_mutations(struct.pack("<Q", 2) + b"{}"))


@pytest.mark.parametrize("name", _RAW)
def test_file_with_this_fault_is_refused(tmp_path, sample, name):
    """Lengths that lie, bytes that do not belong, JSON that is none."""
    assert not ours_opens(tmp_path / "f", _raw_mutations(sample)[name])


@pytest.mark.parametrize("name", _RAW)
def test_file_that_the_official_package_rejects_is_rejected_here(tmp_path, sample, name):
    """The differential test on whole files."""
    data = _raw_mutations(sample)[name]
    if not official_opens(data):
        assert not ours_opens(tmp_path / "f", data)


@pytest.mark.parametrize("rewrite", ["indent", "reorder"])
def test_file_rewritten_as_equal_json_still_opens(tmp_path, sample, rewrite):
    """The tests above refuse for the fault, not for the rewriting."""
    tree, data = split_file(sample)
    if rewrite == "reorder":
        tree = dict(reversed(tree.items()))
    header = json.dumps(tree, indent=2 if rewrite == "indent" else None).encode()
    assert ours_opens(tmp_path / "f", join_file(header, data))


_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**65), 2**65)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["F32", "U8", "BF16", "F4", "x", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.fixed_dictionaries(
            {},
            optional={
                "dtype": st.sampled_from(["F32", "U8", "BOOL"]),
                "shape": st.lists(st.integers(-1, 5) | st.just(2**33), max_size=3),
                "data_offsets": st.lists(st.integers(0, 80), min_size=2, max_size=2),
            },
        )
    ),
    max_leaves=6,
)
_places = [(key,) for key in ("a", PART, "c", "d", "e")] + [
    (key, field)
    for key in ("a", PART, "c", "d", "e")
    for field in ("dtype", "shape", "data_offsets")
]


@pytest.mark.full
@settings(max_examples=examples(2) * MAX_EXAMPLES)
@given(
    changes=st.lists(st.tuples(st.sampled_from(_places), _values), min_size=1, max_size=3)
)
def test_random_header_that_the_official_package_rejects_is_rejected_here(
    tmp_path, sample, changes
):
    """The differential test at random: any value in any place."""
    tree, data = split_file(sample)
    for path, value in changes:
        if len(path) == 1 or isinstance(tree[path[0]], dict):
            _set(path, value)(tree)
    mutated = join_file(tree, data)
    if ours_opens(tmp_path / "f", mutated):
        assert official_opens(mutated)


# Our own metadata inside a valid safetensors file

_OURS = {
    "format": _set(("format",), 2),
    "format-true": _set(("format",), True),
    "attempt": _set(("attempt",), 3),
    "rank": _set(("rank",), "0"),
    "rank-bool": _set(("rank",), False),
    "world-size": _set(("world_size",), 2.0),
    "block-zero": _set(("block_bytes",), 0),
    "block-negative": _set(("block_bytes",), -1),
    "block-small": _set(("block_bytes",), 1),
    "values-list": _set(("values",), []),
    "values-bad": _set(("values",), {"seed": {"$new": 1}}),
    "values-numpy": _set(("values",), {"seed": {"$numpy": ["(,)i4", "AAAA"]}}),
    "entries-list": _set(("entries",), []),
    "entry-unknown": _set(("entries", "z"), {}),
    "entry-list": _set(("entries", PART), []),
    "entry-field": _set(("entries", PART, "more"), 1),
    "name-number": _set(("entries", PART, "name"), 3),
    "name-empty": _set(("entries", PART, "name"), ""),
    "name-surrogate": _set(("entries", PART, "name"), "\ud800"),
    "shape-other-dims": _set(("entries", PART, "shape"), [10]),
    "shape-too-small": _set(("entries", PART, "shape"), [5, 3]),
    "shape-float": _set(("entries", PART, "shape"), [10.0, 3]),
    "shape-overflow": _set(("entries", PART, "shape"), [2**62, 2**62]),
    "offset-outside": _set(("entries", PART, "offset"), [9, 0]),
    "offset-negative": _set(("entries", PART, "offset"), [-1, 0]),
    "offset-dims": _set(("entries", PART, "offset"), [4]),
    "dtype-unknown": _set(("entries", "d", "dtype"), "x"),
    "dtype-list": _set(("entries", "d", "dtype"), []),
    "dtype-other-size": _set(("entries", "d", "dtype"), "complex32"),
    "dtype-of-non-bytes": _set(("entries", "a"), {"dtype": "complex32"}),
    "field-gone": lambda tree: tree.pop("values"),
    "field-more": _set(("more",), 1),
}


def _with_ours(sample, change):
    tree, data = split_file(sample)
    metadata = tree["__metadata__"]
    entries = json.loads(metadata["distckpt.entries"])
    ours = {**json.loads(metadata["distckpt"]), "entries": entries}
    change(ours)
    metadata["distckpt.entries"] = json.dumps(ours.pop("entries"))
    metadata["distckpt"] = json.dumps(ours)
    return join_file(tree, data)


@pytest.mark.parametrize("name", _OURS)
def test_metadata_with_this_fault_is_refused(tmp_path, sample, name):
    """What the file says of itself is checked like everything else."""
    assert not ours_opens(tmp_path / "f", _with_ours(sample, _OURS[name]))


@pytest.mark.parametrize("size", [2**40, 2**62, 10**30])
def test_blocks_longer_than_any_memory_do_not_take_it(tmp_path, sample, size):
    """A lie about the length of a block costs no more than the file's own size."""
    data = _with_ours(sample, _set(("block_bytes",), size))
    assert ours_opens(tmp_path / "f", data)


_EDGES = [-1, 0, 1, 2**31, 2**63, 10**30, 1.5, None, True, "", "x", [], {}, [0], [2, 3]]
_OUR_PLACES = [(f,) for f in ("format", "attempt", "rank", "world_size", "block_bytes")]
_OUR_PLACES += [("entries",), ("values",), ("entries", "a"), ("entries", PART)]
_OUR_PLACES += [("entries", PART, f) for f in ("name", "shape", "offset", "per_rank")]
_OUR_PLACES += [("entries", "d", "dtype"), ("values", "seed")]


@pytest.mark.parametrize("place", _OUR_PLACES, ids=repr)
def test_metadata_with_any_edge_value_gives_only_our_errors(tmp_path, sample, place):
    """No value in any place gives another exception."""
    for value in _EDGES:
        ours_opens(tmp_path / "f", _with_ours(sample, _set(place, value)))


def test_whole_rows_are_read_under_their_own_name(tmp_path):
    """A kind is no part of the file: the layout table says it."""
    row = Row("x", "uint8", (3,), WHOLE)
    write(tmp_path / "f", [Entry(Piece(row, whole((3,)), 0), lambda: memoryview(b"abc"))])
    with open_shard_at(tmp_path / "f") as reader:
        assert reader.header.entries["x"].box == whole((3,))
