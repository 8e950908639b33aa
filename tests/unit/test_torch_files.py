"""Archives as torch.save makes them: written and read without torch, held against torch."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from collections import Counter, OrderedDict

import numpy as np
import pytest
import torch
from torch_helpers import assert_same, raw
from unit_helpers import flip_bit

from distckpt import dtypes
from distckpt.errors import (
    ChecksumError,
    FormatError,
    UnsafeCheckpointError,
    UnsupportedError,
)
from distckpt.formats import torch_load, torch_save, zip_file
from distckpt.storage import posix


class Memory:
    """A tensor in memory, to be streamed."""

    def __init__(self, dtype, shape, data):
        self.dtype, self.shape, self.data = dtype, shape, data
        self.size_bytes = len(data)

    def stream(self, piece_bytes):
        view = memoryview(self.data)
        for at in range(0, len(view), piece_bytes):
            yield view[at : at + piece_bytes]


class Zeros:
    """A large tensor that takes no memory."""

    dtype = "uint8"

    def __init__(self, size_bytes):
        self.shape = (size_bytes,)
        self.size_bytes = size_bytes

    def stream(self, piece_bytes):
        piece = memoryview(bytes(piece_bytes))
        for at in range(0, self.size_bytes, piece_bytes):
            yield piece[: min(piece_bytes, self.size_bytes - at)]


def read(path, start=0, size_bytes=None):
    with posix.OpenFile(str(path)) as file:
        size = file.size_bytes - start if size_bytes is None else size_bytes
        return torch_load.read(file, start, size)


def content(tensor, path, piece_bytes=7):
    """Read a tensor of an archive; its file was closed."""
    with posix.OpenFile(str(path)) as file:
        record = tensor.record._replace(file=file)
        again = torch_load.ArchivedTensor(
            tensor.dtype, tensor.shape, record, tensor.offset_bytes, tensor.strides
        )
        return b"".join(map(bytes, again.stream(piece_bytes)))


def with_pickle(path, data, records=()):
    """Make an archive with this pickle in it."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", data)
        archive.writestr("archive/byteorder", "little")
        for name, content in records:
            archive.writestr(f"archive/{name}", content)
    return path


def writable_dtypes():
    return sorted(
        name
        for name in dtypes.names()
        if hasattr(torch, name)
        and (name in torch_save.STORAGES or name in torch_save._BY_NAME)
    )


# Written here, read by torch


@pytest.mark.parametrize("mmap", [False, True])
def test_torch_loads_every_dtype_and_shape(tmp_path, mmap):
    """Also with weights_only, and mapped into memory."""
    tensors = {}
    for name in writable_dtypes():
        for shape in ((3, 4), (), (0, 3)):
            size = int(np.prod(shape)) * dtypes.item_size_bytes(name)
            tensors[f"{name}{shape}"] = Memory(
                name, shape, bytes(i % 2 for i in range(size))
            )
    tree = {
        name: torch_save.stored_tensor(one.dtype, one.shape, str(i))
        for i, (name, one) in enumerate(tensors.items())
    }
    path = str(tmp_path / "t.pt")
    with posix.NewFile(path) as file:
        stored = {str(i): one for i, one in enumerate(tensors.values())}
        file.finish(torch_save.write(file, 0, tree, stored))
    found = torch.load(path, weights_only=True, mmap=mmap)
    again = read(path)
    assert list(found) == list(again) == list(tensors)
    for name, one in tensors.items():
        assert found[name].dtype == getattr(torch, one.dtype)
        assert tuple(found[name].shape) == again[name].shape == one.shape
        assert raw(found[name]) == content(again[name], path) == one.data
    assert zipfile.ZipFile(path).testzip() is None


def test_records_begin_where_they_can_be_mapped(tmp_path):
    """At multiples of 64 bytes, as torch's own."""
    path = str(tmp_path / "t.pt")
    with posix.NewFile(path) as file:
        tree = [torch_save.stored_tensor("uint8", (3,), str(i)) for i in range(9)]
        stored = {str(i): Memory("uint8", (3,), b"abc") for i in range(9)}
        file.finish(torch_save.write(file, 0, tree, stored))
    for one in read(path):
        assert one.record.start % 64 == 0


def test_plain_values_are_loaded_by_torch_with_their_types(tmp_path):
    """Containers, too."""
    value = {
        "ordered": OrderedDict(a=1, b=[2.5, None, True]),
        "count": Counter("abca"),
        "pair": (b"x\xff", b"", "ü"),
        7: -(2**70),
    }
    path = str(tmp_path / "t.pt")
    with posix.NewFile(path) as file:
        file.finish(torch_save.write(file, 0, torch_save.to_tree(value), {}))
    assert_same(torch.load(path, weights_only=True), value)
    assert_same(read(path), value)


def test_numpy_scalars_become_numbers():
    """A pickle of numpy's would run numpy's code."""
    found = torch_save.to_tree({"x": [np.float32(0.5), np.int8(3)]})
    assert_same(found, {"x": [0.5, 3]})


def test_dtypes_that_torch_cannot_save_are_refused_by_name():
    """Rather than written as something else."""
    with pytest.raises(UnsupportedError, match=r"'w'.*int4"):
        torch_save.check_writable("int4", "w")


def test_archives_past_4_gib_are_read_by_torch_and_by_zip_tools(tmp_path, monkeypatch):
    """With numbers of 64 bits: the limits are lowered, the files are the same."""
    monkeypatch.setattr(zip_file, "_LIMIT_32", 1000)
    path = str(tmp_path / "t.pt")
    zeros = Zeros(2000)
    with posix.NewFile(path) as file:
        tree = [torch_save.stored_tensor("uint8", (2000,), str(i)) for i in range(3)]
        writer_end = torch_save.write(file, 0, tree, {str(i): zeros for i in range(3)})
        file.finish(writer_end)
    monkeypatch.undo()
    with open(path, "rb") as file:
        data = file.read()
    # What was cut to the lowered limit is spelled as the real one is.
    data = data.replace(struct.pack("<2L", 1000, 1000), b"\xff" * 8)
    at = data.index(b"PK\1\2")
    while data[at : at + 4] == b"PK\1\2":
        name, extra = struct.unpack_from("<2H", data, at + 28)
        if struct.unpack_from("<L", data, at + 42) == (1000,):
            data = data[: at + 42] + b"\xff" * 4 + data[at + 46 :]
        at += 46 + name + extra
    end = data.rindex(b"PK\5\6")
    start = data[end + 16 : end + 20]
    assert struct.unpack("<L", start) == (1000,)
    data = data[: end + 16] + b"\xff" * 4 + data[end + 20 :]
    assert zipfile.ZipFile(io.BytesIO(data)).testzip() is None
    assert [len(t) for t in torch.load(io.BytesIO(data), weights_only=True)] == [2000] * 3


# Written by torch, read here


def test_what_torch_saves_is_read_without_torch(tmp_path):
    """State dicts, parameters, views, ties, optimizers."""
    module = torch.nn.Linear(3, 2)
    base = torch.arange(24, dtype=torch.int16).reshape(4, 6)
    value = {
        "model": module.state_dict(),
        "parameter": module.weight,
        "transposed": base.t(),
        "columns": base[:, 1:4],
        "rows": base[1:3],
        "last": base.reshape(2, 3, 4).to(memory_format=torch.contiguous_format)[1, 2, 3],
        "empty": torch.empty(0, 5),
        "list": [torch.ones(2), 3, ("x", None)],
    }
    path = str(tmp_path / "t.pt")
    torch.save(value, path)
    found = read(path)
    for name in ("parameter", "transposed", "columns", "rows", "last", "empty"):
        assert found[name].shape == tuple(value[name].shape)
        assert content(found[name], path) == raw(value[name])
    assert type(found["model"]) is OrderedDict
    assert content(found["model"]["bias"], path) == raw(module.bias)
    assert found["parameter"].identity == found["model"]["weight"].identity
    assert found["list"][1:] == [3, ("x", None)]


def test_part_of_a_storage_is_checked_with_all_of_it(tmp_path):
    """The checksum is of the whole record."""
    path = str(tmp_path / "t.pt")
    torch.save(torch.arange(1000)[10:20], path)
    tensor = read(path)
    flip_bit(path, tensor.record.start + 8 * 900)
    with pytest.raises(ChecksumError, match=r"archive/data/0|t/data/0"):
        content(tensor, path)


def test_flipped_bit_that_torch_loads_is_found(tmp_path):
    """torch writes checksums, and does not read them."""
    path = str(tmp_path / "t.pt")
    torch.save(torch.zeros(100), path)
    tensor = read(path)
    flip_bit(path, tensor.record.start + 50)
    assert torch.load(path, weights_only=True).any()
    with pytest.raises(ChecksumError, match="not those that were written"):
        content(tensor, path)


def test_archive_without_checksums_is_read(tmp_path):
    """torch can be told to write none."""
    path = str(tmp_path / "t.pt")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        torch.save(torch.ones(5), path)
    finally:
        torch.serialization.set_crc32_options(before)
    tensor = read(path)
    assert tensor.record.crc is None
    assert content(tensor, path) == raw(torch.ones(5))


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (torch.device("cpu"), "torch.device"),
        (torch.float32, "torch.float32"),
        (torch.ones(2).to_sparse(), "_rebuild_sparse_tensor"),
        (torch.ones(2, dtype=torch.complex64).conj(), "a tensor with 7 arguments"),
        (np.float32(1), "numpy"),
        ({1, 2}, "set"),
        (torch.ones(1).expand(1000), "a tensor of 4000 bytes"),
    ],
    ids=str,
)
def test_what_is_neither_tensor_nor_plain_value_is_refused(tmp_path, value, reason):
    """By its name, or its path."""
    path = str(tmp_path / "t.pt")
    torch.save({"a": [value]}, path)
    with pytest.raises((UnsupportedError, FormatError), match=reason) as caught:
        read(path)
    assert path in str(caught.value)


class Runs:
    def __reduce__(self):
        return os.system, ("touch witness",)


def test_crafted_pickle_in_an_archive_is_refused_and_not_run(tmp_path, monkeypatch):
    """Even when a tensor is made of what it returns."""
    monkeypatch.chdir(tmp_path)
    path = with_pickle("t.pt", pickle.dumps({"w": Runs()}, 2))
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system"):
        read(path)
    assert os.listdir(tmp_path) == ["t.pt"]


def rebuild(storage_key, offset, shape, strides, *, numel=4):
    """Return the pickle of a tensor with these numbers, as torch spells it."""
    from distckpt.formats import pickle_write
    from distckpt.formats.pickle_tree import Call, Global, Reference

    key = ("storage", Global("torch", "FloatStorage"), storage_key, "cpu", numel)
    hooks = Call(Global("collections", "OrderedDict"))
    arguments = (Reference(key), offset, shape, strides, False, hooks)
    return pickle_write.dumps(Call(Global("torch._utils", "_rebuild_tensor_v2"), arguments))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (("../../../etc/passwd", 0, (4,), (1,)), "is not in the archive"),
        (("1", 0, (4,), (1,)), "is not in the archive"),
        ((0, 0, (4,), (1,)), "a tensor of"),
        (("0", 1, (4,), (1,)), "to byte 20 of its record"),
        (("0", 0, (5,), (1,)), "to byte 20"),
        (("0", 0, (4,), (2,)), "to byte 28"),
        (("0", 0, (2**62,), (0,)), "offset, shape and strides"),
        (("0", 0, (2**40,), (0,)), "a tensor of 4398046511104 bytes"),
        (("0", 0, (2**32, 2**32), (0, 0)), "offset, shape and strides"),
        (("0", -1, (1,), (1,)), "offset, shape and strides"),
        (("0", 0, (-4,), (1,)), "offset, shape and strides"),
        (("0", 0, (4,), (1, 1)), "offset, shape and strides"),
        (("0", 0, ("4",), (1,)), "offset, shape and strides"),
        (("0", 0, [4], (1,)), "offset, shape and strides"),
        (("0", 0, (2,), (-1,)), "offset, shape and strides"),
    ],
    ids=str,
)
def test_tensors_with_impossible_numbers_are_refused(tmp_path, arguments, reason):
    """Nothing outside of its own record can be reached."""
    path = with_pickle(str(tmp_path / "t.pt"), rebuild(*arguments), [("data/0", bytes(16))])
    with pytest.raises(FormatError, match=reason):
        read(path)


def test_lists_nested_in_themselves_or_without_end_are_refused(tmp_path):
    """They are small on disk."""
    loop = []
    loop.append(loop)
    bomb = ["x"]
    for _ in range(40):
        bomb = [bomb, bomb]
    for value in (loop, bomb):
        path = with_pickle(str(tmp_path / "t.pt"), pickle.dumps(value, 2))
        with pytest.raises(FormatError, match="nested too deeply, or far too large"):
            read(path)
        os.unlink(path)


def _compressed(path):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", pickle.dumps([0] * 1000, 2))


def _twice(path):
    with (
        pytest.warns(UserWarning, match="Duplicate"),
        zipfile.ZipFile(path, "w") as archive,
    ):
        for _ in range(2):
            archive.writestr("archive/data.pkl", b"N.")


def _script(path):
    with_pickle(path, b"N.", [("constants.pkl", b"N.")])


def _big_endian(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/data.pkl", b"N.")
        archive.writestr("archive/byteorder", "big")


def _legacy(path):
    torch.save(torch.ones(2), path, _use_new_zipfile_serialization=False)


def _other(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "x")


def _empty(path):
    open(path, "w").close()


def _cut(path):
    torch.save(torch.ones(2), path)
    os.truncate(path, os.path.getsize(path) - 30)


def _not_utf8(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("archive/\u00e4", "x")
    with open(path, "r+b") as file:
        data = file.read()
        file.seek(data.rindex("\u00e4".encode()))
        file.write(b"\xff\xff")


def _of_a_later_version(path):
    torch.save(torch.ones(2), path)
    with open(path, "r+b") as file:
        data = file.read()
        file.seek(data.rindex(b"PK\1\2") + 6)  # what is needed to extract it
        file.write(struct.pack("<H", 73))


def _table_before_the_start(path):
    with_pickle(path, b"N.")
    with open(path, "r+b") as file:
        data = file.read()
        file.seek(data.rindex(b"PK\5\6") + 12)  # how long it is
        file.write(struct.pack("<L", len(data) + 1))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_table_before_the_start, "no zip archive"),
        (_not_utf8, "no zip archive: 'utf-8' codec"),
        (_of_a_later_version, "no zip archive: zip file version 7.3"),
        (_compressed, "compressed"),
        (_twice, "twice"),
        (_script, "not one that torch.save has written"),
        (_big_endian, "byte order"),
        (_legacy, "no zip archive"),
        (_other, "not one that torch.save has written"),
        (_empty, "no zip archive"),
        (_cut, "no zip archive"),
    ],
)
def test_other_archives_are_refused_with_the_reason(tmp_path, make, reason):
    """One sentence, with the file's path."""
    path = str(tmp_path / "t.pt")
    make(path)
    with pytest.raises(FormatError, match=reason) as caught:
        read(path)
    assert path in str(caught.value)


def test_archive_damaged_anywhere_is_read_or_refused_and_nothing_else(tmp_path):
    """No other error, whatever byte it is."""
    path = str(tmp_path / "t.pt")
    torch.save({"w": torch.arange(8), "v": [1, "x"]}, path)
    num_refused = 0
    for at in range(os.path.getsize(path)):
        flip_bit(path, at, 0x41)
        try:
            for one in read(path).values():
                if isinstance(one, torch_load.ArchivedTensor):
                    content(one, path)
        except (FormatError, UnsupportedError):
            num_refused += 1
        flip_bit(path, at, 0x41)
    assert num_refused > 300
