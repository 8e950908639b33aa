"""Checkpoints in other programs' formats, read again by the real libraries."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_state_dict,
)
from torch_helpers import assert_same, raw
from torch_helpers import save as save_objects
from transfer_helpers import (
    Tied,
    assert_same_job,
    left_beside,
    make_job,
    make_odd,
    run,
    run_ok,
)
from unit_helpers import flip_bit, make_saved

import distckpt
from distckpt import PerRank, dtypes
from distckpt.errors import ChecksumError, ConfigError, UnsupportedError
from distckpt.formats import dcp_write, export, torch_save
from distckpt.formats.dcp_verify import verify_dcp
from distckpt.formats.foreign import DCP, EXPORTED, HUGGINGFACE, SAFETENSORS, TORCH
from distckpt.layout import WHOLE, Row
from distckpt.storage import posix

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


def ignore(_):
    """Take no interest in progress."""


def do_export(path, target, to, **options):
    with distckpt.open(path) as opened:
        return export.export(opened, target, to, export.Options(**options), ignore)


@pytest.fixture
def target(tmp_path):
    """Return a path in an empty directory."""
    (tmp_path / "out").mkdir()
    return str(tmp_path / "out" / "target")


@pytest.fixture
def job(run_dir):
    """Save a small job; returns its objects and the checkpoint's path."""
    model, optimizer, scheduler = make_job(2)
    path = save_objects(
        run_dir,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        step=torch.tensor(9),
        rng=PerRank({"own": torch.ones(2)}),
    )
    return (model, optimizer, scheduler), path


# Bit for bit, by dtype


def writable(name, to):
    check = torch_save.check_writable if to in (TORCH, DCP) else None
    try:
        if check is None:
            return dtypes.has_counterpart(name)
        check(name, "")
    except UnsupportedError:
        return False
    return True


def loadable(name, to):
    """Tell whether this version of torch has a dtype, and DCP, which copies, reads it."""
    dtype = getattr(torch, name, None)
    if dtype is None or to != DCP:
        return dtype is not None
    try:
        torch.empty(1, dtype=dtype).copy_(torch.empty(1, dtype=dtype))
    except NotImplementedError:  # float4_e2m1fn_x2 with torch 2.9
        return False
    return True


@pytest.mark.parametrize("to", EXPORTED)
def test_every_dtype_and_shape_of_several_ranks_is_read_by_the_real_library(
    run_dir, target, to
):
    """Sharded by rows and by columns, without dimensions, without elements."""
    names = [n for n in sorted(dtypes.names()) if writable(n, to) and loadable(n, to)]
    saved, expected = make_odd(run_dir, names)
    more = {"tracked_object": "odd"} if to == HUGGINGFACE else {}
    do_export(saved.prefix, target, to, **more)
    if to == TORCH:
        found = torch.load(target, weights_only=True)
    elif to == DCP:
        found = {
            name.replace("/", "."): torch.empty(shape, dtype=getattr(torch, dtype))
            for name, (dtype, shape, _) in expected.items()
        }
        dcp.load(found, checkpoint_id=target, no_dist=True)
        found = {name.replace("odd.", "odd/", 1): t for name, t in found.items()}
    else:
        file = target if to == SAFETENSORS else os.path.join(target, "model.safetensors")
        found = load_file(file)
    prefix = "odd/" if to == HUGGINGFACE else ""
    assert len(found) == len(expected)
    for name, (dtype, shape, data) in expected.items():
        tensor = found[name.removeprefix(prefix)]
        assert (tensor.dtype, tuple(tensor.shape)) == (getattr(torch, dtype), shape)
        assert raw(tensor) == data


@pytest.mark.parametrize("to", EXPORTED)
def test_dtypes_without_a_place_in_the_format_are_refused_before_anything_is_written(
    run_dir, target, to
):
    """By the tensor's name."""
    dtype = "complex128" if to in (SAFETENSORS, HUGGINGFACE) else "int4"
    saved, _ = make_odd(run_dir, [dtype])
    more = {"tracked_object": "odd"} if to == HUGGINGFACE else {}
    with pytest.raises(UnsupportedError, match=rf"odd.{dtype}|{dtype}"):
        do_export(saved.prefix, target, to, **more)
    assert left_beside(target) == []


# safetensors and Hugging Face


def test_safetensors_has_full_names_and_nothing_of_one_rank_alone(job, target):
    """Of tied tensors the first name; the others stand in the metadata."""
    (model, optimizer, _), path = job
    assert run_ok("export", path, "--to", "safetensors", "--output", target)["ok"]
    found = load_file(target)
    assert "rng/own" not in found
    assert "model/head.weight" not in found
    assert raw(found["model/embed.weight"]) == raw(model.embed.weight)
    moment = optimizer.state[model.embed.weight]["exp_avg"]
    assert raw(found["optimizer/state/model/embed.weight/exp_avg"]) == raw(moment)
    with safe_open(target, "pt") as file:
        assert file.metadata() == {
            "format": "pt",
            "model/head.weight": "model/embed.weight",
        }


def test_object_takes_one_and_strips_its_name_so_that_the_model_loads_it(job, target):
    """Ties included, by the package's own loader."""
    (model, _, _), path = job
    run_ok("export", path, "--to", "safetensors", "--object", "model", "--output", target)
    other = Tied()
    load_model(other, target)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_data_of_each_tensor_is_aligned(job, target):
    """Programs map it into memory."""
    do_export(job[1], target, SAFETENSORS)
    with open(target, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    assert (8 + length) % 8 == 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = dtypes.code_size_bytes(entry["dtype"])
            assert (8 + length + entry["data_offsets"][0]) % size == 0


def test_huggingface_in_one_file_has_the_models_own_names(job, target):
    """As from_pretrained wants them: no prefix, tied ones once, and the format."""
    (model, _, _), path = job
    run_ok("export", path, "--to", "huggingface", "--output", target)
    assert os.listdir(target) == ["model.safetensors"]
    with safe_open(os.path.join(target, "model.safetensors"), "pt") as file:
        assert file.metadata() == {"format": "pt"}
        names = set(file.keys())
    assert names == set(model.state_dict()) - {"head.weight"}


def test_huggingface_in_several_files_has_an_index(job, target):
    """Sizes, names and files as save_pretrained writes them."""
    (model, _, _), path = job
    command = ["export", path, "--to", "huggingface", "--output", target]
    run_ok(*command, "--max-shard-bytes", "50")
    files = sorted(os.listdir(target))
    assert files[0] == "model-00001-of-00003.safetensors"
    assert files[-1] == "model.safetensors.index.json"
    with open(os.path.join(target, files[-1])) as file:
        index = json.load(file)
    state = {k: v for k, v in model.state_dict().items() if k != "head.weight"}
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in state.values())
    assert set(index["weight_map"]) == set(state)
    for name, file in index["weight_map"].items():
        assert raw(load_file(os.path.join(target, file))[name]) == raw(state[name])


def test_huggingface_copies_the_configuration_and_no_weights(job, target, tmp_path):
    """A download is a directory of links."""
    source = tmp_path / "config"
    (source / "sub").mkdir(parents=True)
    (tmp_path / "blob").write_text("{}")
    (source / "config.json").symlink_to(tmp_path / "blob")
    (source / "model.safetensors").write_text("old weights")
    (source / "pytorch_model.bin").write_text("old weights")
    do_export(job[1], target, HUGGINGFACE, config=str(source))
    assert sorted(os.listdir(target)) == ["config.json", "model.safetensors"]
    assert not os.path.islink(os.path.join(target, "config.json"))


def test_configuration_that_is_not_there_is_refused_before_anything_is_written(job, target):
    """Not after hours."""
    with pytest.raises(ConfigError, match="no such file"):
        do_export(job[1], target, HUGGINGFACE, config=target + ".json")
    assert left_beside(target) == []


def test_only_takes_names_by_pattern(job, target):
    """And a tied tensor under the first name that is taken."""
    command = ["export", job[1], "--to", "safetensors", "--output", target]
    run_ok(*command, "--only", "model/head.*", "--only", "step")
    assert set(load_file(target)) == {"model/head.weight", "step"}


@pytest.mark.parametrize("options", [{"tracked_object": "ema"}, {"patterns": ("x*",)}])
def test_nothing_to_export_is_an_error_that_says_what_there_is(job, target, options):
    """Rather than an empty file."""
    with pytest.raises(ConfigError, match="There are tensors of model, optimizer, step"):
        do_export(job[1], target, SAFETENSORS, **options)


# torch


def test_torch_loads_a_flat_dict_in_which_tied_tensors_are_one(job, target):
    """With weights_only, and mapped."""
    (model, _, _), path = job
    run_ok("export", path, "--to", "torch", "--object", "model", "--output", target)
    found = torch.load(target, weights_only=True, mmap=True)
    assert found["head.weight"].data_ptr() == found["embed.weight"].data_ptr()
    other = Tied()
    other.load_state_dict(found)
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


# DCP


@pytest.mark.parametrize("flat", [False, True])
def test_dcp_is_loaded_by_a_job_that_uses_it(job, target, flat):
    """Model, optimizer and scheduler, in both of torch's spellings, bit for bit."""
    expected, path = job
    run_ok("export", path, "--to", "dcp", "--output", target, "--rename", "optimizer=optim")
    model, optimizer, scheduler = make_job(1)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    own, optim = get_state_dict(model, optimizer, options=options)
    state = {"model": own, "optim": optim, "scheduler": scheduler.state_dict()}
    dcp.load(state, checkpoint_id=target, no_dist=True)
    set_state_dict(
        model,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict=state["optim"],
        options=options,
    )
    scheduler.load_state_dict(state["scheduler"])
    assert_same_job((model, optimizer, scheduler), expected)


def test_dcp_is_verified_by_our_own_command_and_has_tied_tensors_once(job, target):
    """Two names, one place."""
    run_ok("export", job[1], "--to", "dcp", "--output", target)
    assert verify_dcp(target, lambda _: ignore).ok
    size = os.path.getsize(os.path.join(target, "__0_0.distcp"))
    names = ("model.embed.weight", "model.head.weight")
    found = {name: torch.zeros(6, 4) for name in names}
    dcp.load(found, checkpoint_id=target, no_dist=True)
    assert found[names[0]].equal(found[names[1]])
    assert size < 1_000_000


def test_dcp_of_large_tensors_is_cut_into_chunks(run_dir, target, monkeypatch):
    """So that a rank that loads some rows need not read all."""
    monkeypatch.setattr(dcp_write, "_CHUNK_BYTES", 1000)
    saved, expected = make_odd(run_dir, ["int8"])
    do_export(saved.prefix, target, DCP)
    chunks = dcp.FileSystemReader(target).read_metadata().state_dict_metadata
    assert len(chunks["odd.cut.S0"].chunks) == 8
    found = {"odd.cut.S0": torch.zeros(40, 50, dtype=torch.int32)}
    dcp.load(found, checkpoint_id=target, no_dist=True)
    assert raw(found["odd.cut.S0"]) == expected["odd/cut.S0"][2]
    assert verify_dcp(target, lambda _: ignore).ok


def test_dcp_values_with_tensors_inside_are_spelled_as_torch_would(run_dir, target):
    """Dicts are walked, lists where they hold tensors."""

    class Stateful:
        def state_dict(self):
            return {"a": [torch.ones(2), {"b": 5}], 7: (1, 2), "s": "x", "n": None}

        def load_state_dict(self, state):
            pass

    path = save_objects(run_dir, thing=Stateful())
    do_export(path, target, DCP)
    metadata = dcp.FileSystemReader(target).read_metadata()
    dcp.save({"thing": Stateful()}, checkpoint_id=target + ".torch", no_dist=True)
    theirs = dcp.FileSystemReader(target + ".torch").read_metadata()
    found = {k: v for k, v in metadata.planner_data.items() if k != "save_counter"}
    assert found == theirs.planner_data


@pytest.mark.parametrize("options", [["--object", "model"], ["--only", "*"]])
def test_dcp_of_a_part_is_refused(job, target, options):
    """A job loads what it asks for."""
    result = run("export", job[1], "--to", "dcp", "--output", target, *options)
    assert result.exit_code == 2
    assert "as a whole" in result.stderr


# Faults


@pytest.mark.parametrize("to", EXPORTED)
def test_damaged_block_is_named_and_nothing_is_left(run_dir, target, to):
    """Neither the target nor its beginnings."""
    saved = make_saved(run_dir, 1)
    flip_bit(saved.shard(1), 10_000)
    result = run("export", saved.prefix, "--to", to, "--output", target)
    assert result.exit_code == 1
    assert saved.shard(1) in result.stderr
    assert "tensor 'model/weight[48:96,0:1024]', block 0" in result.stderr
    assert left_beside(target) == []


@pytest.mark.parametrize("to", EXPORTED)
def test_what_the_disk_has_not_kept_is_noticed_and_nothing_is_left(
    run_dir, target, to, monkeypatch
):
    """What was written is read again before it gets its name."""
    saved = make_saved(run_dir, 1)
    finish = posix.NewFile.finish

    def lose_a_bit(file, size_bytes):
        finish(file, size_bytes)
        if size_bytes > 300_000:
            flip_bit(file.path, 200_000)

    monkeypatch.setattr(posix.NewFile, "finish", lose_a_bit)
    with pytest.raises(ChecksumError):
        do_export(saved.prefix, target, to)
    assert left_beside(target) == []


@pytest.mark.parametrize("to", EXPORTED)
def test_target_that_is_there_is_not_replaced(run_dir, target, to):
    """A file or a directory, empty or not."""
    saved = make_saved(run_dir, 1)
    os.mkdir(target)
    result = run("export", saved.prefix, "--to", to, "--output", target)
    assert result.exit_code == 2
    assert "is not replaced" in result.stderr
    assert left_beside(target) == ["target"]


@pytest.mark.parametrize("to", EXPORTED)
def test_killed_in_the_middle_leaves_no_target_and_the_next_try_works(run_dir, target, to):
    """What is left has another name."""
    saved = make_saved(run_dir, 1)
    code = (
        "import os, signal, distckpt\n"
        "from distckpt.formats import export\n"
        f"with distckpt.open({saved.prefix!r}) as opened:\n"
        f"    export.export(opened, {target!r}, {to!r}, export.Options(),\n"
        "                  lambda _: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    left = left_beside(target)
    assert len(left) == 1
    assert left[0].startswith(".target.")
    assert left[0].endswith(".partial")
    assert run("export", saved.prefix, "--to", to, "--output", target).exit_code == 0


@pytest.mark.parametrize(
    "to",
    [
        pytest.param(to, marks=() if to == "safetensors" else pytest.mark.full)
        for to in EXPORTED
    ],
)
def test_memory_is_bounded_whatever_the_tensor(run_dir, target, to):
    """A tensor of 64 MiB by way of pieces of 8."""
    table = (Row("model/w", "uint8", (64, 2**20), WHOLE),)
    arrays = {"model/w": np.ones((64, 2**20), np.uint8)}
    saved = make_saved(run_dir, 1, table=table, arrays=arrays)
    del arrays
    do_export(saved.prefix, target + ".first", to)
    tracemalloc.start()
    try:
        do_export(saved.prefix, target, to)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 24 * 2**20


# The command


def test_export_says_what_it_has_done(job, target):
    """One line for people."""
    result = run("export", job[1], "--to", "safetensors", "--output", target)
    assert result.exit_code == 0
    assert result.stdout.startswith(f"ok   {target}: 16 tensors, 0 plain values, ")
    assert "read again in" in result.stdout


def test_export_of_a_run_directory_takes_its_newest(run_dir, target):
    """As distckpt.open does."""
    make_saved(run_dir, 1)
    found = run_ok("export", run_dir, "--to", "torch", "--output", target)
    assert (found["num_tensors"], found["path"]) == (3, target)


@pytest.mark.parametrize(
    "arguments",
    [
        ["--to", "nonsense", "--output", "x"],
        ["--to", "torch"],
        ["--output", "x"],
        ["--to", "dcp", "--output", "x", "--rename", "a"],
        ["--to", "torch", "--output", "x", "--rename", "a=b"],
        ["--to", "dcp", "--output", "x", "--rename", "nothing=else"],
        ["--to", "torch", "--output", "x", "--config", "y"],
        ["--to", "huggingface", "--output", "x", "--max-shard-bytes", "0"],
    ],
    ids=" ".join,
)
def test_wrong_usage_of_export_exits_with_2(run_dir, arguments):
    """As everywhere."""
    saved = make_saved(run_dir, 1)
    assert run("export", saved.prefix, *arguments).exit_code == 2


def test_export_of_what_is_not_there_exits_with_3(tmp_path):
    """As everywhere."""
    command = ["export", str(tmp_path / "ckpt-1"), "--to", "torch", "--output", "x"]
    assert run(*command).exit_code == 3


def test_export_does_not_import_torch(run_dir, target):
    """Not even to write what torch loads."""
    saved = make_saved(run_dir, 1)
    for to in EXPORTED:
        code = (
            "import sys; from distckpt import cli\n"
            f"command = ['export', {saved.prefix!r}, '--to', {to!r}]\n"
            f"cli.main([*command, '--output', {target + to!r}], standalone_mode=False)\n"
            "assert 'torch' not in sys.modules"
        )
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
