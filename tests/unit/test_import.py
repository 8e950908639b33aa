"""Run directories of what other programs have saved: restored as any other checkpoint."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tracemalloc
from collections import OrderedDict

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file, save_model
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
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
from unit_helpers import flip_bit

import distckpt
from distckpt import Checkpoint, CheckpointManager, dtypes, values
from distckpt.errors import ConfigError, UnsupportedError
from distckpt.formats import import_names, torch_save
from distckpt.storage import posix

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning")


@pytest.fixture
def target(tmp_path):
    """Return a path in an empty directory."""
    (tmp_path / "out").mkdir()
    return str(tmp_path / "out" / "run")


@pytest.fixture
def source(tmp_path):
    """Return a path where nothing is."""
    return str(tmp_path / "source")


def save_dcp(path, job, flat=False, **more):
    """Save a job as one with torch's DCP does."""
    model, optimizer, scheduler = job
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    own, optim = get_state_dict(model, optimizer, options=options)
    state = {"model": own, "optim": optim, "scheduler": scheduler.state_dict(), **more}
    dcp.save(state, checkpoint_id=path, no_dist=True)


def contents(path):
    """Return what a checkpoint holds: dtype, shape and bytes, and plain values."""
    with distckpt.open(path) as opened:
        tensors = {n: (t.dtype, t.shape, t.tobytes()) for n, t in opened.items()}
        return tensors, dict(opened.manifest.values)


# DCP


@pytest.mark.parametrize("flat", [False, True])
def test_dcp_of_a_job_is_restored_by_a_job_of_ours(target, source, flat):
    """Model, optimizer, scheduler, tensors and values, bit for bit; and it goes on."""
    expected = make_job(2)
    save_dcp(source, expected, flat, step=torch.tensor(7), notes={"a": [1, 2], "b": (3,)})
    command = ["import", source, "--from", "dcp", "--output", target, "--step", "7"]
    command += ["--tie", "model/head.weight=model/embed.weight"]
    found = run_ok(*command, "--rename", "optim=optimizer")
    assert found["path"] == os.path.join(target, "ckpt-1")
    assert run("verify", target).exit_code == 0
    job = make_job(1)
    step, notes = torch.tensor(0), {}
    objects = dict(zip(("model", "optimizer", "scheduler"), job, strict=True))
    checkpoint = Checkpoint(**objects, step=step, notes=notes)
    checkpoint.restore(found["path"])
    assert_same_job(job, expected)
    assert (step, notes) == (7, {"a": [1, 2], "b": (3,)})
    with CheckpointManager(checkpoint, target, max_to_keep=2) as manager:
        assert manager.restore_or_initialize() == found["path"]
        assert manager.save() == os.path.join(target, "ckpt-2")


def test_dcp_without_names_above_the_tensors_is_one_models(target, source):
    """Or another object's, if asked for."""
    model = Tied()
    dcp.save(dict(model.state_dict()), checkpoint_id=source, no_dist=True)
    command = ["import", source, "--from", "dcp", "--output", target]
    found = run_ok(*command, "--tie", "model/head.weight=model/embed.weight")
    other = Tied()
    Checkpoint(model=other).restore(found["path"])
    assert_same(dict(other.state_dict()), dict(model.state_dict()))
    named = target + "-named"
    run_ok("import", source, "--from", "dcp", "--output", named, "--object", "ema")
    assert set(contents(named)[0]) == {f"ema/{name}" for name in model.state_dict()}


def test_dcp_made_by_export_comes_back_the_same(run_dir, target, source):
    """Names, tensors and values of a whole job."""
    model, optimizer, scheduler = make_job(2)
    path = save_objects(
        run_dir, model=model, optimizer=optimizer, scheduler=scheduler, t=torch.ones(2)
    )
    run_ok("export", path, "--to", "dcp", "--output", source)
    run_ok("import", source, "--from", "dcp", "--output", target)
    (tensors, found), (expected_tensors, expected) = contents(target), contents(path)
    assert tensors == expected_tensors
    # A class is not part of what DCP has; nor are the numbers of groups.
    assert expected.pop("optimizer/class") == type(optimizer).__name__
    for name, value in expected.items():
        if name.startswith("optimizer/settings/"):
            value.pop("params", None)
    assert {name: values.decode(value) for name, value in found.items()} == {
        name: values.decode(value) for name, value in expected.items()
    }


def test_dcp_optimizer_of_one_of_several_modules_has_to_be_told(target, source):
    """Unless one of them is called model."""
    model, optimizer, _ = make_job()
    own, optim = get_state_dict(model, optimizer)
    state = {"net": own, "ema": {k: v.clone() for k, v in own.items()}, "optim": optim}
    dcp.save(state, checkpoint_id=source, no_dist=True)
    command = ["import", source, "--from", "dcp", "--output", target]
    result = run(*command)
    assert result.exit_code == 2
    assert "those with all of them are" in result.stderr
    assert "--module" in result.stderr
    run_ok(*command, "--module", "net")
    assert "optim/settings/net/embed.weight" in contents(target)[1]


def test_dcp_value_that_is_not_plain_is_refused_and_can_be_left_out(target, source):
    """Its name is said, and what to do."""
    state = {"w": {"x": torch.ones(2)}, "bad": {"d": torch.device("cpu"), "ok": 1}}
    dcp.save(state, checkpoint_id=source, no_dist=True)
    command = ["import", source, "--from", "dcp", "--output", target]
    result = run(*command)
    assert result.exit_code == 1
    assert "torch.device" in result.stderr
    assert "--skip 'bad.d'" in result.stderr
    assert left_beside(target) == []
    run_ok(*command, "--skip", "bad.d")
    assert values.decode(contents(target)[1]["bad"]) == {"ok": 1}


# torch.save


def test_torch_file_of_a_training_state_is_restored(target, source):
    """The optimizer's by parameter name."""
    expected = make_job(2)
    model, optimizer, scheduler = expected
    own, optim = get_state_dict(model, optimizer)
    torch.save(
        {"model": own, "optimizer": optim, "scheduler": scheduler.state_dict()}, source
    )
    found = run_ok("import", source, "--from", "torch", "--output", target)
    job = make_job(1)
    objects = dict(zip(("model", "optimizer", "scheduler"), job, strict=True))
    Checkpoint(**objects).restore(found["path"])
    assert_same_job(job, expected)


def test_torch_file_with_ties_keeps_them(target, source):
    """Stored once, named twice."""
    model = Tied()
    torch.save(model.state_dict(), source)
    run_ok("import", source, "--from", "torch", "--output", target)
    with distckpt.open(target) as opened:
        rows = opened.manifest.assignment.rows
        assert rows["model/head.weight"].same_as == "model/embed.weight"
        assert raw(model.head.weight) == opened["model/head.weight"].tobytes()


def test_optimizer_that_numbers_its_parameters_is_refused_with_what_to_do(target, source):
    """Nothing tells which is which."""
    model, optimizer, _ = make_job()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, source)
    command = ["import", source, "--from", "torch", "--output", target]
    result = run(*command)
    assert result.exit_code == 2
    assert "get_optimizer_state_dict" in result.stderr
    run_ok(*command, "--skip", "optimizer")
    assert set(contents(target)[0]) == {f"model/{name}" for name in model.state_dict()}


class Runs:
    def __reduce__(self):
        return os.system, ("touch witness",)


def test_torch_file_that_runs_something_is_refused_and_not_run(
    target, source, tmp_path, monkeypatch
):
    """With the name of what it would run; nothing is made."""
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"w": torch.ones(2)}, "x": Runs()}, source)
    result = run("import", source, "--from", "torch", "--output", target)
    assert result.exit_code == 1
    assert "posix.system" in result.stderr
    assert not os.path.exists("witness")
    assert left_beside(target) == []


def test_torch_file_of_old_torch_is_refused_with_what_to_do(target, source):
    """Those are a run of pickles, not an archive."""
    torch.save({"w": torch.ones(2)}, source, _use_new_zipfile_serialization=False)
    result = run("import", source, "--from", "torch", "--output", target)
    assert result.exit_code == 1
    assert "version 1.6 or newer" in result.stderr


def test_torch_views_that_are_not_row_major_come_back_as_they_look(target, source):
    """Transposed, cut out, channels last."""
    base = torch.arange(24.0).reshape(1, 2, 3, 4)
    state = {
        "t": base[0, 0].t(),
        "cut": base[0, :, 1],
        "last": base.to(memory_format=torch.channels_last),
    }
    torch.save(state, source)
    run_ok("import", source, "--from", "torch", "--output", target)
    with distckpt.open(target) as opened:
        for name, tensor in state.items():
            assert_same(opened[f"model/{name}"].torch(), tensor)


# safetensors


def test_safetensors_file_is_one_models(target, source):
    """As save_model writes it."""
    model = torch.nn.Linear(3, 2)
    save_model(model, source)
    found = run_ok("import", source, "--from", "safetensors", "--output", target)
    other = torch.nn.Linear(3, 2)
    Checkpoint(model=other).restore(found["path"])
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_safetensors_directory_with_an_index_is_read_as_a_whole(run_dir, target, source):
    """As Hugging Face's are kept: through links, with other files beside."""
    model, _, _ = make_job()
    path = save_objects(run_dir, model=model)
    command = ["export", path, "--to", "huggingface", "--max-shard-bytes", "50"]
    run_ok(*command, "--output", source)
    linked = source + "-linked"
    os.mkdir(linked)
    for name in os.listdir(source):
        os.symlink(os.path.join(source, name), os.path.join(linked, name))
    save_file({"x": torch.ones(1)}, os.path.join(linked, "other.safetensors"))
    run_ok("import", linked, "--from", "safetensors", "--output", target)
    assert set(contents(target)[0]) == set(contents(path)[0]) - {"model/head.weight"}


def test_safetensors_with_full_names_come_back_under_these(run_dir, target, source):
    """What export has written without --object."""
    saved, expected = make_odd(run_dir, ["bfloat16", "float8_e5m2", "bool"])
    run_ok("export", saved.prefix, "--to", "safetensors", "--output", source)
    run_ok("import", source, "--from", "safetensors", "--output", target)
    assert contents(target)[0] == expected


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no header"),
        (b"\xff" * 100, "no header"),
        (b"\2\0\0\0\0\0\0\0[]", "no object"),
        (b"\2\0\0\0\0\0\0\0{x", "not a safetensors file"),
        (b"\2\0\0\0\0\0\0\0{}", "nothing to import"),
    ],
)
def test_what_is_no_safetensors_file_is_refused(target, source, content, reason):
    """With its path."""
    with open(source, "wb") as file:
        file.write(content)
    result = run("import", source, "--from", "safetensors", "--output", target)
    assert result.exit_code == 1
    assert reason in result.stderr
    assert source in result.stderr


def test_safetensors_index_that_leads_out_of_its_directory_is_refused(target, source):
    """No name from a file is joined to a path unseen."""
    os.mkdir(source)
    with open(os.path.join(source, "model.safetensors.index.json"), "w") as file:
        file.write('{"weight_map": {"w": "../../etc/passwd"}}')
    result = run("import", source, "--from", "safetensors", "--output", target)
    assert result.exit_code == 1
    assert "not beside it" in result.stderr


# Every dtype


@pytest.mark.parametrize("kind", ["dcp", "torch", "safetensors"])
def test_every_dtype_comes_back_bit_for_bit(run_dir, target, source, kind):
    """There and back again."""
    names = [
        name
        for name in sorted(dtypes.names())
        if (
            dtypes.has_counterpart(name)
            if kind == "safetensors"
            else name in torch_save.STORAGES or name in torch_save._BY_NAME
        )
    ]
    saved, expected = make_odd(run_dir, names)
    run_ok("export", saved.prefix, "--to", kind, "--output", source)
    run_ok("import", source, "--from", kind, "--output", target)
    assert contents(target)[0] == expected


# Names


def tensor(size=1):
    """Make what streams."""

    class Streams:
        dtype, shape, size_bytes = "uint8", (size,), size

        def stream(self, piece_bytes):
            yield memoryview(bytes(size))

    return Streams()


def test_names_follow_the_shape_of_the_tree():
    """Modules, optimizers, anything else with tensors in it, tensors, values."""
    w, m, s, t = (tensor() for _ in range(4))
    tree = {
        "model": {"a/b.w": w, "x._extra_state": {"v": 1}},
        "opt": {
            "state": {"a/b.w": {"m": m, "step": 3}},
            "param_groups": [{"params": ["a/b.w"], "lr": 0.1}],
        },
        "loader": OrderedDict(pos=5, seen=[s, {"k": 2}]),
        "t": t,
        "lr": 0.5,
    }
    found = import_names.named(tree)
    assert found.tensors == {
        "model/a~1b.w": w,
        "opt/state/model/a~1b.w/m": m,
        "loader/seen/~i0": s,
        "t": t,
    }
    assert found.values == {
        "model/x._extra_state": {"v": 1},
        "opt/state/model/a~1b.w/step": 3,
        "opt/settings/model/a~1b.w": {"lr": 0.1},
        "loader": values.as_state(
            "",
            {
                "$ordered": [
                    ["pos", 5],
                    ["seen", [{"$tensor": "loader/seen/~i0"}, {"k": 2}]],
                ]
            },
        ),
        "lr": 0.5,
    }


@pytest.mark.parametrize(
    ("tree", "options", "error", "reason"),
    [
        ({"a": 1}, {"renamed": {"b": "c"}}, ConfigError, "no 'b' to be renamed"),
        ({7: 1}, {}, UnsupportedError, "tracked objects have names"),
        ({"a": object()}, {}, UnsupportedError, "Leave it out"),
        ({"a": {2.5: [tensor()], "x": 1}}, {}, UnsupportedError, "a key of type float"),
        (
            {"o": {"state": {}, "param_groups": [{"params": ["w"]}]}},
            {},
            ConfigError,
            "are none",
        ),
        (
            {"m": {"v": tensor()}, "o": {"state": {}, "param_groups": [{"params": ["w"]}]}},
            {"module": "m"},
            ConfigError,
            "does not have all",
        ),
        (
            {"o": {"state": {}, "param_groups": [{"params": []}], "scaler": 1}},
            {},
            UnsupportedError,
            "'scaler' in an optimizer's state",
        ),
    ],
)
def test_what_cannot_be_named_is_refused_with_the_reason(tree, options, error, reason):
    """Before anything is written."""
    with pytest.raises(error, match=reason):
        import_names.named(tree, **options)


# Ties


def test_tied_tensor_that_huggingface_has_left_out_comes_back(run_dir, target, source):
    """It has to be told, as the file does not."""
    model, _, _ = make_job()
    path = save_objects(run_dir, model=model)
    run_ok("export", path, "--to", "huggingface", "--output", source)
    command = ["import", source, "--from", "safetensors", "--output", target]
    run_ok(*command, "--tie", "model/head.weight=model/embed.weight")
    other = Tied()
    Checkpoint(model=other).restore(os.path.join(target, "ckpt-1"))
    assert_same(dict(other.state_dict()), dict(model.state_dict()))


def test_tensors_declared_to_be_one_may_be_named_in_any_order(target, source):
    """The one that is kept stands first."""
    torch.save({"a": torch.ones(2), "b": torch.ones(2), "c": torch.ones(2)}, source)
    command = ["import", source, "--from", "torch", "--output", target]
    run_ok(*command, "--tie", "model/a=model/b", "--tie", "model/c=model/a")
    with distckpt.open(target) as opened:
        rows = opened.manifest.assignment.rows
        assert {n: row.same_as for n, row in rows.items()} == {
            "model/b": "",
            "model/a": "model/b",
            "model/c": "model/b",
        }


@pytest.mark.parametrize(
    ("tie", "reason"),
    [
        ("model/a=model/x", "no such tensor"),
        ("model/a=model/other", "another shape"),
        ("model/a=model/b", "cannot be tied to 'model/b'"),
    ],
)
def test_tensors_that_differ_cannot_be_tied(target, source, tie, reason):
    """Their bytes are compared."""
    torch.save({"a": torch.ones(2), "b": torch.zeros(2), "other": torch.ones(3)}, source)
    command = ["import", source, "--from", "torch", "--output", target, "--tie", tie]
    result = run(*command)
    assert result.exit_code == 2
    assert reason in result.stderr
    assert left_beside(target) == []


# Faults


def test_damaged_source_is_named_and_nothing_is_left(target, source):
    """What torch would have loaded."""
    save_dcp(source, make_job())
    data = os.path.join(source, "__0_0.distcp")
    with open(data, "rb") as file:
        at = file.read().index(raw(make_job()[0].embed.weight))
    flip_bit(data, at)
    result = run("import", source, "--from", "dcp", "--output", target)
    assert result.exit_code == 1
    assert "CRC-32" in result.stderr
    assert left_beside(target) == []


def test_what_the_disk_has_not_kept_is_noticed_and_nothing_is_left(
    target, source, monkeypatch
):
    """What was written is read again before it gets its name."""
    torch.save({"w": torch.zeros(100_000)}, source)
    finish = posix.NewFile.finish

    def lose_a_bit(file, size_bytes):
        finish(file, size_bytes)
        if size_bytes > 300_000:
            flip_bit(file.path, 200_000)

    monkeypatch.setattr(posix.NewFile, "finish", lose_a_bit)
    result = run("import", source, "--from", "torch", "--output", target)
    assert result.exit_code == 1
    assert "model/w" in result.stderr
    assert left_beside(target) == []


def test_directory_that_is_there_is_not_used(target, source):
    """Neither a run directory nor an empty one."""
    torch.save({"w": torch.ones(1)}, source)
    os.mkdir(target)
    result = run("import", source, "--from", "torch", "--output", target)
    assert result.exit_code == 2
    assert "is not replaced" in result.stderr
    assert os.listdir(target) == []


def test_killed_in_the_middle_leaves_no_run_directory(target, source):
    """Neither half a checkpoint nor a state."""
    torch.save({"w": torch.ones(10)}, source)
    code = (
        "import os, signal\n"
        "from distckpt.formats import import_names, import_run, import_source\n"
        f"with import_source.Source({source!r}, 'torch') as read:\n"
        f"    import_run.import_run(import_names.named(read.tree), {target!r},\n"
        "                          lambda _: os.kill(os.getpid(), signal.SIGKILL))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == -signal.SIGKILL
    assert [name.endswith(".partial") for name in left_beside(target)] == [True]
    assert run("import", source, "--from", "torch", "--output", target).exit_code == 0


@pytest.mark.parametrize(
    "kind",
    [
        *(pytest.param(kind, marks=pytest.mark.full) for kind in ("dcp", "torch")),
        "safetensors",
    ],
)
def test_memory_is_bounded_whatever_the_tensor(target, source, kind):
    """A tensor of 64 MiB by way of pieces of 8."""
    state = {"w": torch.from_numpy(np.ones((64, 2**20), np.uint8))}
    if kind == "dcp":
        dcp.save(state, checkpoint_id=source, no_dist=True)
    elif kind == "torch":
        torch.save(state, source)
    else:
        save_file(state, source)
    run_ok("import", source, "--from", kind, "--output", target + "-first")
    tracemalloc.start()
    try:
        run_ok("import", source, "--from", kind, "--output", target)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 32 * 2**20


# The command


def test_import_takes_name_number_and_step(target, source):
    """As the job that goes on has them."""
    torch.save({"w": torch.ones(1)}, source)
    options = ["--name", "best", "--number", "70", "--step", "7000"]
    found = run_ok("import", source, "--from", "torch", "--output", target, *options)
    assert found["path"] == os.path.join(target, "best-70")
    assert distckpt.latest_checkpoint(target) == found["path"]
    with distckpt.open(target) as opened:
        assert (opened.number, opened.step) == (70, 7000)
        assert opened.plain_values["save_counter"] == 70


def test_import_says_what_it_has_done(target, source):
    """One line for people."""
    torch.save({"w": torch.ones(1)}, source)
    result = run("import", source, "--from", "torch", "--output", target)
    assert result.stdout.startswith(f"ok   {target}/ckpt-1: 1 tensor, 1 plain value, 4 B")


@pytest.mark.parametrize(
    "options",
    [["--name", "a/b"], ["--rename", "x=y"], ["--number", "x"], ["--from", "pickle"]],
    ids=" ".join,
)
def test_wrong_usage_of_import_exits_with_2(target, source, options):
    """And makes nothing."""
    torch.save({"w": torch.ones(1)}, source)
    command = ["import", source, "--from", "torch", "--output", target, *options]
    assert run(*command).exit_code == 2
    assert left_beside(target) == []


@pytest.mark.parametrize("kind", ["dcp", "torch", "safetensors"])
def test_import_of_what_is_not_there_exits_with_3(target, source, kind):
    """As everywhere."""
    result = run("import", source, "--from", kind, "--output", target)
    assert result.exit_code == 3


def test_import_does_not_import_torch(target, source):
    """So that nothing of torch's can be run."""
    save_dcp(source, make_job())
    with open(os.path.join(source, ".metadata"), "rb") as file:
        assert pickle.load(file)
    code = (
        "import sys; from distckpt import cli\n"
        f"command = ['import', {source!r}, '--from', 'dcp', '--output', {target!r}]\n"
        "cli.main(command, standalone_mode=False)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
