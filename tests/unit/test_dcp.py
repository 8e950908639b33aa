"""Directories of torch's distributed checkpoint (DCP), read and checked without torch."""

from __future__ import annotations

import json
import os
import pickle

import pytest
import torch
import torch.distributed.checkpoint as dcp
from click.testing import CliRunner
from torch.distributed.checkpoint.metadata import _MEM_FORMAT_ENCODING, Metadata
from torch_helpers import assert_same, raw
from unit_helpers import flip_bit

from distckpt import cli
from distckpt.boxes import Box
from distckpt.errors import (
    CheckpointNotFound,
    ChecksumError,
    FormatError,
    UnsafeCheckpointError,
    UnsupportedError,
)
from distckpt.formats import dcp_metadata
from distckpt.formats.dcp_directory import DcpDirectory
from distckpt.formats.dcp_metadata import Chunk, DcpMetadata, DcpTensor, DcpValue, Place
from distckpt.formats.dcp_verify import verify_dcp
from distckpt.storage import posix

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def ignore(_):
    """Take no interest in progress."""
    return lambda _: None


STATE = {
    "model": {
        "w": torch.arange(35.0).reshape(5, 7),
        "b": torch.ones(3, dtype=torch.bfloat16),
    },
    "step": 5,
    "extra": {"a": [1, 2], "t": torch.tensor(3), "l": [torch.zeros(2)]},
    "empty": torch.zeros(0, 4),
}


@pytest.fixture
def saved(tmp_path):
    """Save as a job of one process does; returns the directory."""
    path = str(tmp_path / "dcp")
    dcp.save(STATE, checkpoint_id=path, no_dist=True)
    return path


def read_metadata(path):
    with open(os.path.join(path, ".metadata"), "rb") as file:
        return pickle.load(file)


def write_metadata(path, metadata):
    with open(os.path.join(path, ".metadata"), "wb") as file:
        pickle.dump(metadata, file)


def place_of(path, name):
    """Return where the first item of a name lies."""
    with DcpDirectory(path) as directory:
        entry = directory.entries[name]
        return entry.chunks[0].place if isinstance(entry, DcpTensor) else entry.place


def content(tensor, piece_bytes=16):
    return b"".join(map(bytes, tensor.stream(piece_bytes)))


# Reading


def test_directory_has_what_torch_has_saved(saved):
    """Names, paths, tensors, values."""
    with DcpDirectory(saved) as directory:
        assert set(directory.entries) == {
            *{"model.w", "model.b", "step", "extra.a", "extra.t", "extra.l.0", "empty"},
        }
        assert directory.paths["extra.l.0"] == ("extra", "l", 0)
        assert content(directory.tensor("model.w")) == raw(STATE["model"]["w"])
        assert content(directory.tensor("model.b")) == raw(STATE["model"]["b"])
        assert content(directory.tensor("extra.t")) == raw(torch.tensor(3))
        assert content(directory.tensor("empty")) == b""
        assert_same(directory.value("extra.a"), [1, 2])
        assert directory.value("step") == 5


class Cut:
    """Saves one tensor in chunks along any dimensions, as ranks would."""

    def __init__(self, path, tensor, boxes):
        from distckpt.formats import torch_save

        chunks = []
        end = 0
        os.mkdir(path)
        with posix.NewFile(os.path.join(path, "data")) as file:
            for box in boxes:
                index = tuple(
                    slice(start, start + length)
                    for start, length in zip(box.offset, box.shape, strict=True)
                )
                part = tensor[index].contiguous()
                tree = torch_save.stored_tensor("int32", box.shape, "0")
                start = end
                end = torch_save.write(file, start, tree, {"0": InMemory(part)})
                chunks.append(Chunk(box, Place("data", start, end - start)))
            file.finish(end)
        entry = DcpTensor("int32", tuple(tensor.shape), tuple(chunks))
        data = dcp_metadata.encode(DcpMetadata({"w": entry}, {"w": ("w",)}))
        posix.write_new_file(os.path.join(path, ".metadata"), data)


class InMemory:
    def __init__(self, tensor):
        self.data = raw(tensor)
        self.size_bytes = len(self.data)

    def stream(self, piece_bytes):
        yield memoryview(self.data)


def test_metadata_of_an_early_python_3_11_is_read(tmp_path, monkeypatch):
    """Their pickles get the members of enumerations by ``getattr``."""

    def reduce(self, protocol):
        return getattr, (type(self), self.name)

    monkeypatch.setattr(_MEM_FORMAT_ENCODING, "__reduce_ex__", reduce)
    path = str(tmp_path / "dcp")
    dcp.save(STATE, checkpoint_id=path, no_dist=True)
    with open(os.path.join(path, ".metadata"), "rb") as file:
        assert b"getattr" in file.read()
    with DcpDirectory(path) as directory:
        assert content(directory.tensor("model.w")) == raw(STATE["model"]["w"])


LAYOUTS = {
    "rows": [Box((0, 0), (2, 6)), Box((2, 0), (3, 6))],
    "rows out of order": [Box((2, 0), (3, 6)), Box((0, 0), (2, 6))],
    "columns": [Box((0, 0), (5, 2)), Box((0, 2), (5, 4))],
    "both": [
        Box((0, 0), (2, 2)),
        Box((0, 2), (2, 4)),
        Box((2, 0), (3, 2)),
        Box((2, 2), (3, 4)),
    ],
    "with an empty one": [Box((0, 0), (5, 6)), Box((5, 0), (0, 6))],
}


@pytest.mark.parametrize("boxes", LAYOUTS.values(), ids=LAYOUTS)
def test_tensors_come_back_however_they_were_cut(tmp_path, boxes):
    """Row-major, in pieces of one length; torch finds the same."""
    path = str(tmp_path / "dcp")
    tensor = torch.arange(30, dtype=torch.int32).reshape(5, 6)
    Cut(path, tensor, boxes)
    with DcpDirectory(path) as directory:
        stored = directory.tensor("w")
        assert content(stored) == raw(tensor)
        lengths = [len(piece) for piece in stored.stream(16)]
        assert lengths == [16] * 7 + [8]
    found = {"w": torch.zeros(5, 6, dtype=torch.int32)}
    dcp.load(found, checkpoint_id=path, no_dist=True)
    assert_same(found["w"], tensor)
    assert verify_dcp(path, ignore).ok


def test_what_is_no_directory_of_dcps_is_not_found(tmp_path):
    """With the reason."""
    with pytest.raises(CheckpointNotFound, match=r"no \.metadata"):
        DcpDirectory(str(tmp_path))


# Metadata that was made to do harm, or is damaged


class Runs:
    def __reduce__(self):
        return os.system, ("touch witness",)


class Evaluates:
    def __reduce__(self):
        return eval, ("open('witness', 'w')",)


@pytest.mark.parametrize("evil", [Runs(), Evaluates()])
@pytest.mark.parametrize("where", ["all", "entry", "place", "planner"])
def test_crafted_metadata_is_refused_and_not_run(saved, monkeypatch, tmp_path, evil, where):
    """Wherever it stands in it, with the name of what it would run."""
    monkeypatch.chdir(tmp_path)
    metadata = read_metadata(saved)
    if where == "all":
        metadata = evil
    elif where == "entry":
        metadata.state_dict_metadata["evil"] = evil
    elif where == "place":
        metadata.storage_data = {"evil": [evil]}
    else:
        metadata.planner_data = evil
    write_metadata(saved, metadata)
    with pytest.raises(UnsafeCheckpointError, match=r"posix\.system|eval"):
        DcpDirectory(saved)
    assert not os.path.exists("witness")


def test_crafted_value_is_refused_and_not_run(saved, monkeypatch, tmp_path):
    """torch loads values with a reader that runs what they name."""
    monkeypatch.chdir(tmp_path)
    path = str(tmp_path / "evil")
    dcp.save({"evil": Runs()}, checkpoint_id=path, no_dist=True)
    with DcpDirectory(path) as directory:
        with pytest.raises(UnsafeCheckpointError, match=r"posix\.system"):
            directory.value("evil")
    assert not os.path.exists("witness")


def change(where):
    """Return a function that changes the fields of the place of model.w."""

    def apply(metadata):
        for index, place in metadata.storage_data.items():
            if index.fqn == "model.w":
                where(place)

    return apply


def change_chunk(**fields):
    def apply(metadata):
        chunk = metadata.state_dict_metadata["model.w"].chunks[0]
        for name, value in fields.items():
            setattr(chunk, name, torch.Size(value))

    return apply


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (change(lambda p: setattr(p, "relative_path", "../secret")), "no file beside it"),
        (change(lambda p: setattr(p, "relative_path", "/etc/passwd")), "no file beside it"),
        (change(lambda p: setattr(p, "relative_path", "..")), "no file beside it"),
        (change(lambda p: setattr(p, "relative_path", "a\\b")), "no file beside it"),
        (change(lambda p: setattr(p, "offset", -1)), "lies at -1"),
        (change(lambda p: setattr(p, "length", 2**70)), "lies at"),
        (change(lambda p: setattr(p, "transform_descriptors", ["zstd"])), "extension"),
        (change_chunk(offsets=(3, 0)), "outside of"),
        (change_chunk(sizes=(2**40, 7)), "outside of"),
        (change_chunk(offsets=(0,)), "outside of"),
        (lambda m: setattr(m, "storage_data", None), "nothing says where"),
        (lambda m: setattr(m, "state_dict_metadata", None), "lists nothing"),
        (lambda m: m.state_dict_metadata.update({7: None}), "no text"),
        (lambda m: m.state_dict_metadata.update(x=None), "TensorStorageMetadata should be"),
        (lambda m: m.planner_data.update(step=()), "a path that is none"),
        (
            lambda m: setattr(
                m.state_dict_metadata["model.w"], "size", torch.Size([2**40] * 3)
            ),
            "impossible shape",
        ),
        (
            lambda m: setattr(
                m.state_dict_metadata["model.w"].properties, "layout", torch.sparse_coo
            ),
            "odd layout",
        ),
    ],
)
def test_impossible_metadata_is_refused_with_the_reason(saved, damage, reason):
    """No name is joined to a path, no number believed."""
    metadata = read_metadata(saved)
    damage(metadata)
    write_metadata(saved, metadata)
    with pytest.raises((FormatError, UnsupportedError), match=reason):
        DcpDirectory(saved)


@pytest.mark.full
def test_metadata_damaged_anywhere_is_read_or_refused_and_nothing_else(saved):
    """No other error, whatever byte it is."""
    path = os.path.join(saved, ".metadata")
    num_refused = 0
    for at in range(os.path.getsize(path)):
        flip_bit(path, at, 0x41)
        report = verify_dcp(saved, ignore)
        num_refused += not report.ok
        flip_bit(path, at, 0x41)
    assert num_refused > 100


def test_metadata_with_one_list_of_chunks_a_thousand_times_is_refused(saved):
    """It is small on disk, and would take long."""
    metadata = read_metadata(saved)
    entry = metadata.state_dict_metadata["model.w"]
    entry.chunks = entry.chunks * 1000
    metadata.state_dict_metadata.update({f"x{i}": entry for i in range(1000)})
    write_metadata(saved, metadata)
    with pytest.raises(FormatError, match="chunks in as many bytes"):
        DcpDirectory(saved)


# Writing


def test_metadata_that_is_written_is_what_torch_reads(tmp_path):
    """The same objects as torch would have made."""
    entries = {
        "m.w": DcpTensor(
            "bfloat16", (4, 2), (Chunk(Box((0, 0), (4, 2)), Place("f", 0, 9)),)
        ),
        "s": DcpValue(Place("f", 9, 5)),
    }
    paths = {"m.w": ("m", "w"), "s": ("s", 0)}
    data = dcp_metadata.encode(DcpMetadata(entries, paths))
    found = pickle.loads(data)
    assert type(found) is Metadata
    tensor = found.state_dict_metadata["m.w"]
    assert (tensor.size, tensor.properties.dtype) == (torch.Size([4, 2]), torch.bfloat16)
    assert tensor.properties.memory_format == torch.contiguous_format
    assert tensor.chunks[0].sizes == torch.Size([4, 2])
    assert found.planner_data == paths
    assert {(i.fqn, i.offset): p.relative_path for i, p in found.storage_data.items()} == {
        ("m.w", torch.Size([0, 0])): "f",
        ("s", None): "f",
    }
    assert dcp_metadata.decode(data) == DcpMetadata(entries, paths)


# Gaps


@pytest.mark.parametrize(
    ("boxes", "reason"),
    [
        ([Box((0, 0), (2, 6))], "12 of 30 elements"),
        ([], "0 of 30 elements"),
        ([Box((0, 0), (3, 6)), Box((2, 0), (3, 6))], "overlap"),
        ([Box((0, 0), (5, 4)), Box((0, 3), (5, 3))], "overlap"),
        ([Box((0, 0), (5, 6)), Box((0, 0), (5, 6))], "overlap"),
    ],
)
def test_gaps_and_overlaps_are_found(boxes, reason):
    """By arithmetic alone."""
    chunks = tuple(Chunk(box, Place("f", 0, 1)) for box in boxes)
    assert reason in dcp_metadata.gaps_of(DcpTensor("int32", (5, 6), chunks))[0]


@pytest.mark.parametrize("boxes", LAYOUTS.values(), ids=LAYOUTS)
def test_whole_tensors_have_no_gaps(boxes):
    """However they were cut."""
    chunks = tuple(Chunk(box, Place("f", 0, 1)) for box in boxes)
    assert dcp_metadata.gaps_of(DcpTensor("int32", (5, 6), chunks)) == []


def test_gaps_of_a_tensor_in_ten_thousand_chunks_are_found_at_once():
    """Not by comparing each with each."""
    for axis in (0, 1):
        offset = [(i, 0) if axis == 0 else (0, i) for i in range(10_000)]
        shape = (1, 2) if axis == 0 else (2, 1)
        whole = (10_000, 2) if axis == 0 else (2, 10_000)
        chunks = tuple(Chunk(Box(at, shape), Place("f", 0, 1)) for at in offset)
        assert dcp_metadata.gaps_of(DcpTensor("int8", whole, chunks)) == []


# Verifying


def run(*arguments):
    return CliRunner().invoke(cli.main, list(arguments), catch_exceptions=False)


def test_verify_of_a_whole_directory_is_ok_and_says_how_much(saved):
    """The command tells it from a run directory by itself."""
    result = run("verify", saved)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"ok   {saved}: 1 file, ")


def test_verify_finds_the_flipped_bit_that_torch_loads(saved):
    """Named with file and record."""
    place = place_of(saved, "model.w")
    path = os.path.join(saved, place.file)
    with open(path, "rb") as file:
        data = file.read()
    at = data.index(raw(STATE["model"]["w"]), place.offset)
    flip_bit(path, at + 6)
    loaded = {"model": {"w": torch.zeros(5, 7)}}
    dcp.load(loaded, checkpoint_id=saved, no_dist=True)
    assert not loaded["model"]["w"].equal(STATE["model"]["w"])
    result = run("verify", saved)
    lines = result.stdout.splitlines()
    assert result.exit_code == 1
    assert lines[0] == f"BAD  {saved}"
    assert "model.w: " in lines[1]
    assert path in lines[1]
    assert "CRC-32" in lines[1]


def test_verify_finds_a_damaged_value(saved):
    """Not only tensors have checksums."""
    place = place_of(saved, "step")
    path = os.path.join(saved, place.file)
    with open(path, "rb") as file:
        file.seek(place.offset)
        at = file.read(place.size_bytes).index(b"\x80\x02")
    flip_bit(path, place.offset + at + 3)
    assert any(p.startswith("step: ") for p in verify_dcp(saved, ignore).problems)


def test_verify_finds_a_short_file_and_a_missing_one(saved):
    """One line for a file that is gone, one for each item behind the end of a short one."""
    place = place_of(saved, "model.w")
    path = os.path.join(saved, place.file)
    os.truncate(path, place.offset + 5)
    problems = verify_dcp(saved, ignore).problems
    assert any("model.w" in problem and "cut off" in problem for problem in problems)
    os.unlink(path)
    assert len(verify_dcp(saved, ignore).problems) == 1
    assert path in verify_dcp(saved, ignore).problems[0]


def test_verify_finds_what_is_in_no_file(saved):
    """What a writer's swallowed error leaves behind."""
    metadata = read_metadata(saved)
    for index in [i for i in metadata.storage_data if i.fqn in ("model.w", "step")]:
        del metadata.storage_data[index]
    write_metadata(saved, metadata)
    problems = verify_dcp(saved, ignore).problems
    assert sorted(p.split(":")[0] for p in problems) == ["model.w", "step"]
    assert all("in no file" in problem for problem in problems)


def test_verify_finds_a_missing_chunk(saved):
    """A tensor that only half was saved of."""
    metadata = read_metadata(saved)
    metadata.state_dict_metadata["model.w"].size = torch.Size([6, 7])
    write_metadata(saved, metadata)
    assert verify_dcp(saved, ignore).problems == [
        "model.w: its chunks have 35 of 42 elements"
    ]


def test_verify_finds_a_tensor_of_another_shape_where_a_chunk_should_be(saved):
    """Whole, and with right checksums, but not what the metadata says."""
    metadata = read_metadata(saved)
    entry = metadata.state_dict_metadata["model.w"]
    entry.size = entry.chunks[0].sizes = torch.Size([7, 5])
    write_metadata(saved, metadata)
    problems = verify_dcp(saved, ignore).problems
    assert len(problems) == 1
    assert "float32 (5, 7) lies where" in problems[0]


def test_verify_names_files_that_do_not_belong(saved):
    """What an earlier, larger job has left there; harmless."""
    stale = os.path.join(saved, "__7_0.distcp")
    open(stale, "w").close()
    result = run("verify", saved)
    assert result.exit_code == 0
    assert f"does not belong to it: {stale}" in result.stdout


def test_verify_says_when_there_are_no_checksums(tmp_path):
    """Then nothing tells; that is no fault."""
    path = str(tmp_path / "dcp")
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        dcp.save(STATE, checkpoint_id=path, no_dist=True)
    finally:
        torch.serialization.set_crc32_options(before)
    result = run("verify", path)
    assert result.exit_code == 0
    assert "without checksums" in result.stdout


def test_verify_as_json_says_the_same(saved):
    """For scripts, with the same exit code."""
    os.unlink(os.path.join(saved, "__0_0.distcp"))
    result = run("verify", saved, "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["ok"]) == (1, False)
    assert found["checkpoints"][0]["path"] == saved


def test_verify_of_damaged_metadata_is_one_problem(saved):
    """It is wrong with the checkpoint, and no traceback."""
    with open(os.path.join(saved, ".metadata"), "wb") as file:
        file.write(b"no pickle")
    result = run("verify", saved)
    assert (result.exit_code, len(result.stdout.splitlines())) == (1, 3)


def test_every_chunk_of_a_tensor_is_checked(tmp_path):
    """One line for each that is damaged."""
    path = str(tmp_path / "dcp")
    Cut(path, torch.arange(30, dtype=torch.int32).reshape(5, 6), LAYOUTS["both"])
    with DcpDirectory(path) as directory:
        places = [chunk.place for chunk in directory.entries["w"].chunks]
        starts = [directory.item("w", place).record.start for place in places]
    for start in starts:
        flip_bit(os.path.join(path, "data"), start)
    problems = verify_dcp(path, ignore).problems
    assert len(problems) == 4
    with DcpDirectory(path) as directory:
        with pytest.raises(ChecksumError):
            content(directory.tensor("w"))
