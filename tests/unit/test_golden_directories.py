"""Run directories of every format since 0.1: restored, opened, listed, verified, exported.

``tests/golden/`` has them, made by ``make.py`` there, once for each format, with the values
that were in memory next to each. A test that fails here means that jobs lose checkpoints
that an earlier version has saved for them: mend the library, never these files.
"""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import math
import os
import random
import re
import shutil
from pathlib import Path

import cases
import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from described import (
    SUMS,
    covers,
    describe,
    describe_own,
    merged,
    raw,
    spelled,
    spelled_tensor,
    sums_of,
)
from safetensors.torch import load_file
from transfer_helpers import run, run_ok

import distckpt
from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointNotFound,
    ChecksumError,
    RestoreOptions,
    best,
    paths,
    state,
)
from distckpt.run_directory import RunDirectory

GOLDEN = Path(__file__).parents[1] / "golden"
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")

FORMATS = sorted(path.name for path in GOLDEN.glob("format-*"))
ALL = [
    f"{name}/{path.name.partition('.')[0]}"
    for name in FORMATS
    for path in sorted((GOLDEN / name).glob("*.expected.json"))
]
NEWEST_BY_DEFAULT = ("/fsdp", "/crashed-copy")
BAD, RELEASING, MISSING = "bad", "releasing", "missing"
# Of the list of checksums of each format that is frozen.
FROZEN = {"format-1": "54d7bf9f21b559f8d684568aa91fce031468f0e3f8545ed4303f93a3a0a7dc47"}
# Later than all that was made: by this clock nothing comes from the future.
NOW = 2_000_000_000.0


@functools.cache
def expected_of(golden):
    return json.loads((GOLDEN / f"{golden}.expected.json").read_text())


@functools.cache
def with_records():
    return [golden for golden in ALL if expected_of(golden)["has_records"]]


def having(field):
    return [golden for golden in ALL if field in expected_of(golden)]


def some_in_full(names, *more):
    """List parameters: those of the newest format, but for two, are of class full.

    All other tests write and read the newest format.
    """
    return [
        pytest.param(
            name,
            *more,
            marks=pytest.mark.full
            if name.startswith(FORMATS[-1]) and not name.endswith(NEWEST_BY_DEFAULT)
            else (),
        )
        for name in names
    ]


@pytest.fixture
def directory(golden, run_dir, clock):
    """Return a copy of a golden directory, at a time when all in it is old."""
    clock.now = NOW
    shutil.copytree(GOLDEN / golden, run_dir)
    return run_dir


@pytest.fixture(autouse=True)
def generators():
    """Put back the random number generators, which are restored with their states."""
    states = (random.getstate(), np.random.get_state(), torch.get_rng_state())
    yield
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])


def case_of(golden):
    """Return which objects a directory has; one that was copied has those of its source."""
    name = golden.partition("/")[2]
    return "fsdp" if name == "copied" else name


def committed(expected):
    """Return the checkpoints that can be asked for, in the order of their commits."""
    return [name for name, where in expected["lists"] if where in ("live", "kept")]


def whole(expected):
    return [name for name in committed(expected) if name not in expected["damaged"]]


def readable(directory, expected):
    """Return a path to each checkpoint that verifies; of one in no record its directory."""
    found = {name: os.path.join(directory, name) for name in whole(expected)}
    for name in expected["unrecorded"]:
        (path,) = Path(directory).glob(f"{name}.e*")
        found[name] = str(path)
    return found


def tensors_in(named):
    return {
        name: spelled_tensor(handle.dtype, handle.shape, handle.tobytes())
        for name, handle in named.items()
    }


def values_in(named):
    return {name: spelled(value) for name, value in named.plain_values.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_golden_files_are_those_that_were_made(name):
    """They are never made again, and git changes no byte of them."""
    assert sums_of(GOLDEN / name) == json.loads((GOLDEN / name / SUMS).read_text())
    if name in FROZEN:
        listed = (GOLDEN / name / SUMS).read_bytes()
        assert hashlib.sha256(listed).hexdigest() == FROZEN[name]


def test_there_are_golden_directories_of_all_formats():
    assert "format-1" in FORMATS
    for name in FORMATS:
        assert len([golden for golden in ALL if golden.startswith(f"{name}/")]) >= 24


@pytest.mark.parametrize("golden", some_in_full(ALL))
def test_opened_checkpoint_has_what_was_in_memory(golden, directory):
    """Every byte of every tensor, all plain values, and what each rank had of its own."""
    expected = expected_of(golden)
    found = readable(directory, expected)
    assert found
    for name, path in found.items():
        wanted = expected["checkpoints"][name]
        with distckpt.open(path) as opened:
            assert tensors_in(opened) == wanted["tensors"]
            plain = wanted["values"] | wanted.get("plain", {})
            assert _of_objects(values_in(opened)) == plain
            assert (opened.step, opened.world_size) == (
                wanted["step"],
                len(wanted["per_rank"]),
            )
            assert spelled(opened.metrics) == wanted["metrics"]
            assert spelled(opened.metadata) == wanted["metadata"]
            for rank, own in enumerate(wanted["per_rank"]):
                one = opened.per_rank(rank)
                assert tensors_in(one) == own["tensors"]
                assert _of_objects(values_in(one)) == own["values"]
        shown = run_ok("show", path)["tensors"]
        ties = {one["name"]: one["same_as"] for one in shown if one["same_as"]}
        assert ties == wanted["same_as"]


def _of_objects(values):
    """Leave out what a checkpoint holds of optimizers that no object has as a value."""
    return {
        name: {key: item for key, item in value.items() if key != "params"}
        if "/settings/" in name
        else value
        for name, value in values.items()
        if not name.endswith("/class")
    }


@pytest.mark.parametrize("dtype", cases.DTYPES)
@pytest.mark.parametrize("name", some_in_full(FORMATS))
def test_tensor_of_every_dtype_is_read_as_torch_has_it(name, dtype):
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        pytest.skip(f"torch {torch.__version__} has no dtype {dtype}")
    wanted = expected_of(f"{name}/dtypes")["checkpoints"]["ckpt-1"]["tensors"]
    names = [n for n in wanted if n.startswith(f"dtypes/{dtype}/")]
    assert len(names) == 4
    with distckpt.open(GOLDEN / name / "dtypes") as opened:
        for full in names:
            tensor = opened[full].torch()
            assert tensor.dtype is getattr(torch, dtype)
            assert spelled_tensor(dtype, tensor.shape, raw(tensor)) == wanted[full]


# Lists


@pytest.mark.parametrize("golden", some_in_full(with_records()))
def test_lists_are_those_that_jobs_have_left(golden, directory):
    expected = expected_of(golden)
    listed = run_ok("list", directory)["checkpoints"]
    found = [(os.path.basename(one["path"]), one["state"]) for one in reversed(listed)]
    wanted = [(name, where) for name, where in expected["lists"] if where != RELEASING]
    assert found == wanted
    kept_by = expected.get("kept_by", {})
    for one in listed:
        if one["state"] == BAD:
            continue  # its number may be that of another one
        name = os.path.basename(one["path"])
        made = expected["checkpoints"][name]
        assert one["step"] == made["step"]
        metrics = {key: spelled(value) for key, value in one["metrics"].items()}
        assert metrics == {key: _finite(v) for key, v in _metrics(made).items()}
        by = kept_by.get(name, expected["rules"] if one["state"] == "live" else [])
        assert one["kept_by"] == by
        assert one["pinned"] == ("pinned" in by)
        assert one["state"] == MISSING or one["size_bytes"] == sum(
            path.stat().st_size
            for path in Path(directory, one["attempt"]).glob("*.safetensors")
        )


def _metrics(made):
    return {} if made["metrics"] == "dict()" else made["metrics"]


def _finite(text):
    return "None" if text in ("nan", "inf", "-inf") else text


@pytest.mark.parametrize("golden", some_in_full(with_records()))
def test_readers_name_the_newest_and_the_managed(golden, directory):
    expected = expected_of(golden)
    live = [os.path.join(directory, n) for n, where in expected["lists"] if where == "live"]
    assert distckpt.latest_checkpoint(directory) == live[-1]
    managed = distckpt.get_checkpoint_state(directory)
    assert managed.model_checkpoint_path == live[-1]
    assert managed.all_model_checkpoint_paths == live
    times = managed.all_model_checkpoint_timestamps
    assert times == sorted(times)
    iterator = distckpt.checkpoints_iterator(directory, timeout=0)
    assert next(iterator) == live[-1]
    iterator.close()


@pytest.mark.parametrize("golden", some_in_full(with_records()))
def test_newest_record_says_what_was_done_last_and_what_is_being_deleted(golden, directory):
    expected = expected_of(golden)
    newest = state.read_head(RunDirectory.at(directory)).record
    assert (newest.action, newest.epoch) == (expected["action"], expected["epoch"])
    assert [*newest.rules] == expected["rules"]
    releasing = [entry.attempt.prefix for entry in newest.releasing]
    wanted = [name for name, where in expected["lists"] if where == RELEASING]
    # Of others too, until the commit after their deletion.
    assert {*wanted} <= {*releasing}
    assert {*releasing}.isdisjoint(committed(expected))
    if "num_records" in expected:
        assert (
            len(state.record_numbers(RunDirectory.at(directory))) == expected["num_records"]
        )
        assert newest.number > expected["num_records"]


@pytest.mark.parametrize("golden", some_in_full(having("history")))
def test_history_tells_of_all_jobs(golden, directory):
    figures = run_ok("report", directory)
    wanted = expected_of(golden)["history"]
    assert {key: figures[key] for key in wanted} == wanted


# Verification


@pytest.mark.parametrize("golden", some_in_full(with_records()))
def test_verification_finds_the_damaged_and_no_others(golden, directory):
    expected = expected_of(golden)
    result = run("verify", directory, "--json")
    reports = json.loads(result.stdout)
    assert result.exit_code == (1 if expected["damaged"] else 0)
    bad = [os.path.basename(r["path"]) for r in reports["checkpoints"] if not r["ok"]]
    assert bad == expected["damaged"]
    assert len(reports["checkpoints"]) == len(committed(expected))
    for one in run_ok("list", directory)["checkpoints"]:
        if one["state"] == BAD:
            assert run("verify", os.path.join(directory, one["attempt"])).exit_code == 1
    for name in expected["damaged"]:
        with distckpt.open(os.path.join(directory, name)) as opened:
            with pytest.raises(ChecksumError):
                tensors_in(opened)


@pytest.mark.parametrize("golden", some_in_full(ALL))
def test_checkpoint_by_its_path_verifies(golden, directory):
    """Also where there are no records."""
    expected = expected_of(golden)
    for path in readable(directory, expected).values():
        (report,) = run_ok("verify", path)["checkpoints"]
        assert report["num_files"] > 0


# Restoring


def missing_dtypes():
    """Return patterns for the tensors that this torch has no dtype for."""
    return [
        f"dtypes/{name}"
        for name in cases.DTYPES
        if not isinstance(getattr(torch, name, None), torch.dtype)
    ]


def assert_restored(checkpoint, names, wanted, *, counts_on=False):
    """Fail unless live objects hold what was in memory when they were saved.

    Args:
        checkpoint: Tracks the objects.
        names: Their names.
        wanted: What must be in them.
        counts_on: Whether newer checkpoints are there, behind which the numbers go on.
    """
    objects = {name: getattr(checkpoint, name) for name in names}
    tensors, ties, values = merged([describe(objects).to_parts()])
    left_out = tuple(f"{pattern}/" for pattern in missing_dtypes())
    taken = {n: t for n, t in wanted["tensors"].items() if not n.startswith(left_out)}
    assert tensors == taken
    assert ties == wanted["same_as"]
    values["save_counter"] = spelled(checkpoint.save_counter)
    if counts_on:
        assert checkpoint.save_counter >= int(wanted["values"]["save_counter"])
        values["save_counter"] = wanted["values"]["save_counter"]
    assert values.keys() == wanted["values"].keys()
    for name, value in wanted["values"].items():
        assert covers(values[name], value), (name, values[name], value)
    own_tensors, _, own_values = merged([describe_own(objects).to_parts()])
    own = own_of_one(wanted["per_rank"])
    assert own_tensors == own["tensors"]
    assert own_values == own["values"]


def own_of_one(per_rank):
    """Work out what one process has of its own of what several ranks had saved."""
    tensors, values = dict(per_rank[0]["tensors"]), dict(per_rank[0]["values"])
    if len(per_rank) > 1 and "loader" in values:
        left = [re.findall(r"\d+", own["values"]["loader"]["left"]) for own in per_rank]
        samples = sorted(int(sample) for part in left for sample in part)
        values["loader"] = {**values["loader"], "left": spelled(samples)}
    if len(per_rank) > 1 and "own/sum" in tensors:
        parts = [base64.b64decode(own["tensors"]["own/sum"]["data"]) for own in per_rank]
        added = sum(np.frombuffer(part, "<f4") for part in parts)
        tensors["own/sum"] = spelled_tensor("float32", added.shape, added.tobytes())
    return {"tensors": tensors, "values": values}


def make_live(golden):
    objects = cases.build(case_of(golden), cases.LIVE, as_job=False)
    return objects, Checkpoint(**objects)


@pytest.mark.parametrize("golden", some_in_full(with_records()))
def test_job_restores_each_goes_on_and_saves_beside_them(golden, directory):
    """Objects with other values take each checkpoint by its path, then the newest."""
    expected = expected_of(golden)
    objects, checkpoint = make_live(golden)
    options = RestoreOptions(exclude=missing_dtypes())
    more = {"checkpoint_name": "net.v2"} if "kept_by" in expected else {}
    with CheckpointManager(checkpoint, directory, None, **more) as manager:
        for name in whole(expected):
            path = manager.restore(os.path.join(directory, name), options)
            assert path == os.path.join(directory, name)
            made = expected["checkpoints"][name]
            assert_restored(checkpoint, objects, made, counts_on=True)
        if "best_loss" in expected:
            path = manager.restore(best(1, "loss", mode="min"), options)
            assert os.path.basename(path) == expected["best_loss"]
        newest = whole(expected)[-1]
        path = manager.restore_or_initialize(options)
        assert path == os.path.join(directory, newest)
        assert_restored(checkpoint, objects, expected["checkpoints"][newest])
        saved = manager.save()
        assert_restored(checkpoint, objects, _counted(expected["checkpoints"][newest]))
    listed = run_ok("list", directory)["checkpoints"]
    found = [(os.path.basename(one["path"]), one["state"]) for one in reversed(listed)]
    assert [name for name, _ in found] == [
        *(name for name, where in expected["lists"] if where != RELEASING),
        os.path.basename(saved),
    ]
    bad = {name for name, where in expected["lists"] if where == BAD}
    assert {n for n, where in found if where == BAD} == bad | {*expected["damaged"]}
    assert run("verify", directory).exit_code == 0
    _assert_requests_are_taken_up(expected, listed)


def _counted(made):
    """Return what the next save has: the save counter is one more."""
    counter = str(int(made["values"]["save_counter"]) + 1)
    return {**made, "values": {**made["values"], "save_counter": counter}}


def _assert_requests_are_taken_up(expected, listed):
    pinned = [os.path.basename(one["path"]) for one in listed if one["pinned"]]
    assert pinned == expected.get("pinned_after", [])
    by_name = {os.path.basename(one["path"]): one for one in listed}
    for name, metrics in expected.get("metrics_after", {}).items():
        assert by_name[name]["metrics"] == metrics


@pytest.mark.parametrize(
    "golden", some_in_full(g for g in ALL if not expected_of(g)["has_records"])
)
def test_copy_without_records_is_restored_by_its_path(golden, directory):
    """A job does not start afresh in such a directory, and nothing is listed there."""
    expected = expected_of(golden)
    objects, checkpoint = make_live(golden)
    (name,) = expected["unrecorded"]
    checkpoint.restore(os.path.join(directory, name))
    assert_restored(checkpoint, objects, expected["checkpoints"][name])
    with pytest.raises(CheckpointNotFound, match="no such checkpoint"):
        checkpoint.restore(os.path.join(directory, "ckpt-2"))
    assert run("list", directory).exit_code == 3


# Records rebuilt, and what is left over


# Directories whose newest record says more than what lies in them.
LISTING_MORE = (
    "/retention",
    "/rules",
    "/bad",
    "/crashed-save",
    "/crashed-copy",
    "/repaired",
)


@pytest.mark.parametrize(
    ("golden", "copy"),
    [
        *some_in_full(ALL, "lost"),
        *some_in_full((g for g in ALL if g.endswith(LISTING_MORE)), "kept"),
    ],
)
def test_repair_of_lost_records_names_all_that_is_whole(golden, directory, copy):
    """And with the copy of the newest record that people read, all its lists."""
    expected = expected_of(golden)
    records = os.path.join(directory, paths.RECORDS_DIRECTORY)
    shutil.rmtree(records, ignore_errors=True)
    state_file = os.path.join(directory, paths.STATE_FILE)
    if copy == "lost" and os.path.exists(state_file):
        os.remove(state_file)
    said = run_ok("repair", directory, "--yes")
    assert said["repaired"]
    assert said["damage"]
    listed = run_ok("list", directory)["checkpoints"]
    found = {(os.path.basename(one["path"]), one["state"]) for one in listed}
    assert found == _repaired_lists(expected, Path(directory), copy)
    newest = [*whole(expected), *expected["unrecorded"]][-1]
    with distckpt.open(os.path.join(directory, newest)) as opened:
        assert tensors_in(opened) == expected["checkpoints"][newest]["tensors"]


def _repaired_lists(expected, directory, copy):
    found = set()
    copy = "lost" if expected.get("copy_is_behind") else copy
    for name, where in expected["lists"]:
        if name in expected["damaged"] or where == BAD:
            found.add((name, BAD))
        elif where == MISSING:
            if copy == "kept":
                found.add((name, where))
        elif where == RELEASING:
            # Where nothing says any more that it was dropped, it is one like the others.
            if copy == "lost" and [*directory.glob(f"{name}.e*")]:
                found.add((name, "live"))
        else:
            found.add((name, "live" if copy == "lost" else where))
    return found | {(name, "live") for name in expected["unrecorded"]}


@pytest.mark.parametrize("golden", some_in_full(ALL))
def test_doctor_names_what_is_left_over_and_asked_for(golden, directory):
    expected = expected_of(golden)
    result = run("doctor", directory, "--read-only", "--json")
    said = json.loads(result.stdout)
    assert said["ok"] == expected["has_records"]

    def texts(what):
        return [one["text"] for one in said["findings"] if one["what"] == what]

    left = texts("left over")
    wanted = expected["left_over"] or ["nothing"]
    assert len(left) == len(wanted)
    assert all(any(text.startswith(one) for text in left) for one in wanted)
    assert [text.partition(", by")[0] for text in texts("requests")] == expected.get(
        "requests", []
    )
    assert [text.partition(",")[0] for text in texts("lease")] == [
        f"of {name}" for name in expected.get("leases", [])
    ]


# Export


def has_place(dtype, to):
    """Tell whether a dtype can be exported; see docs/formats.md."""
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        return False
    if to in ("torch", "dcp"):
        return re.fullmatch(r"u?int[1-7]", dtype) is None
    common = ("float8_e4m3fn", "float8_e5m2", "complex64")
    has_other_size = dtype.startswith(("complex", "float8", "float4", "bits"))
    is_packed = re.fullmatch(r"u?int[1-7]", dtype)
    return dtype in common or not (has_other_size or is_packed)


# Directories whose tensors have names, dtypes, ties or layouts like in no other.
SPECIAL = ("/values", "/dtypes", "/modules", "/replicated", "/fsdp-over-tp", "/meshes")


@pytest.mark.full
@pytest.mark.parametrize(
    ("golden", "to"),
    [
        *some_in_full(ALL, "torch"),
        *some_in_full((g for g in ALL if g.endswith(SPECIAL)), "safetensors"),
    ],
)
def test_export_to_a_file_has_every_byte(golden, directory, tmp_path, to):
    """As the official packages read it."""
    expected = expected_of(golden)
    name, path = [*readable(directory, expected).items()][-1]
    made = expected["checkpoints"][name]
    chosen = {n: t for n, t in made["tensors"].items() if has_place(t["dtype"], to)}
    assert chosen
    patterns = []
    if len(chosen) < len(made["tensors"]):
        patterns = [part for n in chosen for part in ("--only", n)]
    target = str(tmp_path / "exported")
    run_ok("export", path, "--to", to, "--output", target, *patterns)
    found = torch.load(target, weights_only=True) if to == "torch" else load_file(target)
    stored = {n for n in chosen if to == "torch" or made["same_as"].get(n) not in chosen}
    assert {*found} == stored
    _assert_same_tensors(found, {name: chosen[name] for name in stored})


def _assert_same_tensors(found, wanted):
    for name, one in wanted.items():
        tensor = found[name]
        dtype = str(tensor.dtype).removeprefix("torch.")
        assert spelled_tensor(dtype, tensor.shape, raw(tensor)) == one, name


@pytest.mark.parametrize(
    "golden",
    some_in_full(g for g in ALL if g.endswith(("/modules", "/fsdp", "/fsdp-over-tp"))),
)
def test_export_to_huggingface_has_the_model(golden, directory, tmp_path):
    made = expected_of(golden)["checkpoints"]["ckpt-1"]
    target = tmp_path / "exported"
    path = os.path.join(directory, "ckpt-1")
    run_ok("export", path, "--to", "huggingface", "--output", str(target))
    wanted = {
        name.removeprefix("model/").replace("~1", "/").replace("~0", "~"): tensor
        for name, tensor in made["tensors"].items()
        if name.startswith("model/") and name not in made["same_as"]
    }
    found = load_file(target / "model.safetensors")
    assert found.keys() == wanted.keys()
    _assert_same_tensors(found, wanted)


@pytest.mark.parametrize(
    "golden",
    some_in_full(g for g in ALL if g.endswith(("/fsdp", "/fsdp-over-tp", "/imported-dcp"))),
)
def test_export_to_dcp_has_model_and_optimizer_as_torch_names_them(
    golden, directory, tmp_path
):
    wanted = expected_of(golden)["checkpoints"]["ckpt-1"]["tensors"]
    target = str(tmp_path / "exported")
    path = os.path.join(directory, "ckpt-1")
    run_ok("export", path, "--to", "dcp", "--output", target)
    name_of = {}
    for name in wanted:
        if name.startswith("model/"):
            name_of[name] = name.replace("/", ".")
        elif name.startswith("optimizer/state/model/"):
            rest = name.removeprefix("optimizer/state/model/").replace("/", ".")
            name_of[name] = f"optimizer.state.{rest}"
    assert len(name_of) >= 12
    found = {
        new: torch.empty(wanted[name]["shape"], dtype=getattr(torch, wanted[name]["dtype"]))
        for name, new in name_of.items()
    }
    dcp.load(found, checkpoint_id=target, no_dist=True)
    _assert_same_tensors(found, {new: wanted[name] for name, new in name_of.items()})


def test_sizes_of_golden_files_are_small():
    """They stay in the repository for ever."""
    for name in FORMATS:
        sizes = [p.stat().st_size for p in (GOLDEN / name).rglob("*") if p.is_file()]
        assert math.fsum(sizes) < 4e6
