"""Bad arguments, bad directories, bad files, a full disk: one clear error on all ranks."""

from __future__ import annotations

import os
import shutil
import socket
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks, values_of
from outcome_helpers import (
    LoggedTexts,
    assert_all_whole,
    attempt_directory,
    committed,
    flip_last_bit,
    leftovers,
    make_checkpoint,
    outcome,
    state_of,
    train,
    tree_of,
)

import distckpt.chief
import distckpt.save_state
from distckpt import Checkpoint, CheckpointManager, ConfigError, PerRank, readers
from distckpt.run_directory import RunDirectory
from distckpt.shard_header import Draft
from distckpt.stamp import Stamp

WORLD_SIZES = pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.full), 2]
)


def _manager(checkpoint, directory, **more):
    arguments = {"max_to_keep": None, "timeout": timedelta(seconds=30), **more}
    return CheckpointManager(checkpoint, directory, **arguments)


# Arguments

BAD_ARGUMENTS = [
    ("ConfigError", "max_to_keep", {"max_to_keep": 0}),
    ("ConfigError", "max_to_keep", {"max_to_keep": -1}),
    ("ConfigError", "max_to_keep", {"max_to_keep": True}),
    ("ConfigError", "max_to_keep", {"max_to_keep": 2.0}),
    ("ConfigError", "max_to_keep", {"max_to_keep": "3"}),
    ("ConfigError", "n_hours", {"keep_checkpoint_every_n_hours": "1"}),
    ("ConfigError", "n_hours", {"keep_checkpoint_every_n_hours": True}),
    ("ConfigError", "n_hours", {"keep_checkpoint_every_n_hours": float("nan")}),
    ("ConfigError", "step_counter must be given", {"checkpoint_interval": 5}),
    ("ConfigError", "checkpoint_interval", {"checkpoint_interval": 1.5}),
    ("ConfigError", "checkpoint_interval", {"checkpoint_interval": "5"}),
    ("UnsupportedError", "plain number", {"step_counter": 5}),
    ("UnsupportedError", "plain number", {"step_counter": 5.0, "checkpoint_interval": 1}),
    ("UnsupportedError", "plain number", {"step_counter": True}),
    ("ConfigError", "one element", {"step_counter": torch.zeros(2)}),
    ("ConfigError", "checkpoint_name", {"checkpoint_name": ""}),
    ("ConfigError", "checkpoint_name", {"checkpoint_name": "a/b"}),
    ("ConfigError", "checkpoint_name", {"checkpoint_name": ".hidden"}),
    ("ConfigError", "checkpoint_name", {"checkpoint_name": None}),
    ("ConfigError", "distckpt.Checkpoint", {"checkpoint": torch.nn.Linear(1, 1)}),
    ("ConfigError", "init_fn", {"init_fn": 3}),
    ("ConfigError", "directory", {"directory": None}),
    ("ConfigError", "directory", {"directory": ""}),
    ("ConfigError", "directory", {"directory": b"run"}),
    ("ConfigError", "timeout", {"timeout": "5"}),
    ("ConfigError", "timeout", {"timeout": timedelta(0)}),
    ("ConfigError", "timeout", {"timeout": timedelta(seconds=-1)}),
]


def _try_bad_arguments(rank, directory):
    good = {"checkpoint": make_checkpoint(), "directory": directory}
    everywhere = [outcome(_manager, **{**good, **bad}) for _, _, bad in BAD_ARGUMENTS]
    last = dist.get_world_size() - 1
    on_one = [
        outcome(_manager, **({**good, **bad} if rank == last else good))
        for _, _, bad in BAD_ARGUMENTS
    ]
    unusual = {"keep_checkpoint_every_n_hours": float("inf"), "checkpoint_name": "a.b-1_c"}
    _manager(**good, **unusual).close()
    return everywhere, on_one, os.path.exists(directory)


@WORLD_SIZES
def test_bad_argument_is_the_same_error_on_all_ranks_at_once(tmp_path, world_size):
    """Wrong everywhere or on one rank alone: all raise, quickly, and write nothing."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_try_bad_arguments, world_size, directory))
    for everywhere, on_one, made in results:
        assert not made
        for found in (everywhere, on_one):
            for (kind, text, bad), one in zip(BAD_ARGUMENTS, found, strict=True):
                assert one.kind == kind, (bad, one)
                assert text in one.text, (bad, one)
                assert one.net_seconds < 2, (bad, one)
                expected = "TypeError" if kind == "UnsupportedError" else "ValueError"
                assert expected in one.bases


DIFFERING = [
    {"directory": "other"},
    {"max_to_keep": 7},
    {"keep_checkpoint_every_n_hours": 1.0},
    {"checkpoint_name": "other"},
    {"checkpoint_interval": 3},
    {"takeover": True},
]


def _differ_in_arguments(rank, directory):
    step = torch.zeros((), dtype=torch.int64)
    good = {"checkpoint": make_checkpoint(), "directory": directory, "step_counter": step}
    return [
        outcome(_manager, **({**good, **bad} if rank == 1 else good)) for bad in DIFFERING
    ]


def test_arguments_that_differ_between_ranks_are_a_config_error_naming_ranks(tmp_path):
    """Directory, retention, name and interval must be the same everywhere."""
    results = values_of(run_ranks(_differ_in_arguments, 2, str(tmp_path / "run")))
    for found in results:
        for one in found:
            assert one.kind == "ConfigError"
            assert "different arguments: " in one.text
            assert "on rank 0" in one.text and "on rank 1" in one.text


def _bad_saves(rank, directory):
    last = rank == dist.get_world_size() - 1
    checkpoint = make_checkpoint()
    step = checkpoint.step
    found = []
    with _manager(checkpoint, directory, step_counter=step) as manager:
        for bad in (
            {"checkpoint_number": "7"},
            {"checkpoint_number": 1.0},
            {"checkpoint_number": 2**63},
            {"options": {"enable_async": True}},
        ):
            found.append(outcome(manager.save, **bad))
            found.append(outcome(manager.save, **(bad if last else {})))
        differing = []
        if dist.get_world_size() > 1:
            differing.append(outcome(manager.save, checkpoint_number=rank + 3))
            differing.append(outcome(manager.save, check_interval=bool(rank)))
            step += rank
            differing.append(outcome(manager.save))
            step -= rank
        assert (manager.latest_checkpoint, checkpoint.save_counter) == (None, 0)
        return found, differing, manager.save()


@WORLD_SIZES
def test_bad_argument_of_save_is_refused_on_all_ranks_and_harmless(tmp_path, world_size):
    """One rank's bad number fails the call everywhere; the next save works."""
    directory = str(tmp_path / "run")
    for found, differing, saved in values_of(run_ranks(_bad_saves, world_size, directory)):
        for one in found:
            assert one.kind == "ConfigError" and one.net_seconds < 2, one
        assert "checkpoint_number must be an integer" in found[0].text
        for one in differing:
            assert one.kind == "ConfigError"
            assert "save() was called differently on 1 of 2 ranks" in one.text
        assert saved == f"{directory}/ckpt-1"


# Directories


def _use(rank, directory):
    made = outcome(_manager, make_checkpoint(), directory)
    if made.kind != "ok":
        return made
    return outcome(made.text.save)


@WORLD_SIZES
def test_directory_that_is_a_file_is_a_config_error(tmp_path, world_size):
    """A file where the directory, or its parent, should be is named on all ranks."""
    file = tmp_path / "file"
    file.write_text("precious")
    for directory in (file, file / "run"):
        for found in values_of(run_ranks(_use, world_size, str(directory))):
            assert found.kind == "ConfigError" and "is not a directory" in found.text
            assert str(file) in found.text
    assert file.read_text() == "precious"


@pytest.fixture
def open_path():
    """Make a directory that other users can reach, which pytest's own are not for."""
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    path = tempfile.mkdtemp(prefix="distckpt-test-")
    os.chmod(path, 0o755)
    yield path
    shutil.rmtree(path)


NOBODY = 65534


def _write_as_nobody(rank, directory, unprivileged):
    manager = _manager(make_checkpoint(), directory)
    if rank in unprivileged:
        os.setuid(NOBODY)
    return outcome(manager.save), outcome(manager.restore_or_initialize)


@pytest.mark.parametrize(
    ("world_size", "unprivileged"),
    [
        pytest.param(1, (0,), marks=pytest.mark.full),
        pytest.param(2, (0, 1), marks=pytest.mark.full),
        (2, (1,)),
        (2, (0,)),
    ],
)
def test_directory_that_cannot_be_written_is_found_at_the_claim(
    open_path, world_size, unprivileged
):
    """Before any training is lost all ranks learn which of them may not write there."""
    directory = os.path.join(open_path, "run")
    os.mkdir(directory)
    for calls in values_of(
        run_ranks(_write_as_nobody, world_size, directory, unprivileged)
    ):
        for found in calls:
            assert found.kind == "StorageError", found
            assert "Permission denied" in found.text and directory in found.text
            if unprivileged == (1,):
                assert "rank 1: " in found.text and "rank 0: " not in found.text
    assert readers.read_record(RunDirectory.at(directory)) is None
    assert [name for name in os.listdir(directory) if "probe" in name] == []


def _read_as_nobody(rank, directory, port):
    checkpoint = make_checkpoint()
    socket.getaddrinfo("localhost", None)  # its codec is imported when first used
    os.setuid(NOBODY)
    # Over TCP: what another user has created cannot be written by this one.
    dist.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    return outcome(_manager, checkpoint, directory)


def test_state_that_cannot_be_read_is_an_error_on_all_ranks(open_path):
    """A record without permission is never taken for an empty directory."""
    directory = os.path.join(open_path, "run")
    values_of(run_ranks(_make_run, 1, directory, 1, process_group=False))
    (name,) = [n for n in os.listdir(f"{directory}/.state") if n.endswith("2.json")]
    os.chmod(f"{directory}/.state/{name}", 0o600)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    for made in values_of(
        run_ranks(_read_as_nobody, 2, directory, port, process_group=False)
    ):
        assert made.kind == "StorageError", made
        assert "Permission denied" in made.text and name in made.text


def _hold(rank, directory, signals):
    with _manager(make_checkpoint(), directory) as manager:
        manager.save()
        open(os.path.join(signals, f"held {rank}"), "w").close()
        deadline = time.monotonic() + 30
        while not os.path.exists(os.path.join(signals, "refused")):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        return manager.save()


def _intrude(rank, directory, signals):
    distckpt.chief._LOCK_WAIT_SECONDS = 0.3
    deadline = time.monotonic() + 30
    while not os.path.exists(os.path.join(signals, "held 0")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    checkpoint = make_checkpoint()
    manager = _manager(checkpoint, directory)
    before = tree_of(directory)
    found = [outcome(manager.save), outcome(manager.restore_or_initialize)]
    unchanged = tree_of(directory) == before
    if dist.is_initialized():
        dist.barrier()
    if rank == 0:
        open(os.path.join(signals, "refused"), "w").close()
        distckpt.chief._LOCK_WAIT_SECONDS = 20.0
    # Waits until the other job has ended, then goes on where that one was.
    restored = manager.restore_or_initialize()
    manager.close()
    return found, unchanged, restored


@WORLD_SIZES
def test_another_live_job_is_named_and_not_disturbed(tmp_path, world_size):
    """The second job is refused until the first lets go; the first notices nothing."""
    directory, signals = str(tmp_path / "run"), str(tmp_path)

    def run(function, run_id):
        environment = {"TORCHELASTIC_RUN_ID": run_id}
        return run_ranks(function, world_size, directory, signals, environment=environment)

    with ThreadPoolExecutor(2) as pool:
        holder, intruder = (
            pool.submit(run, _hold, "first"),
            pool.submit(run, _intrude, "2nd"),
        )
        assert set(values_of(holder.result())) == {f"{directory}/ckpt-2"}
        for found, unchanged, restored in values_of(intruder.result()):
            assert unchanged
            assert restored == f"{directory}/ckpt-2"
            for one in found:
                assert one.kind == "DirectoryInUseError"
                assert "is in use by job 'torchrun-first'" in one.text
                assert "takeover=True" in one.text


# Checkpoints that do not fit


def _mismatch(rank, directory):
    own = PerRank({"a": torch.zeros(2), "n": rank})
    checkpoint = make_checkpoint(same=torch.ones(3), gone=1, kind=torch.ones(2), own=own)
    with _manager(checkpoint, directory) as manager:
        train(checkpoint)
        manager.save()
    live = make_checkpoint(
        seed=1,
        same=torch.zeros(4),
        kind=torch.zeros(2, dtype=torch.float64),
        new={"t": torch.zeros(1)},
        added=5,
        own=PerRank({"a": torch.zeros(2), "n": -1}),
    )
    train(live, 2)
    called = []
    before = state_of(live), live.same.tolist(), live.own.value["a"].tolist()
    manager = _manager(live, directory, init_fn=partial(called.append, 1))
    found = outcome(manager.restore_or_initialize)
    after = state_of(live), live.same.tolist(), live.own.value["a"].tolist()
    unchanged = before == after and live.own.value["n"] == -1 and live.added == 5
    # The manager is not broken: with objects that fit it restores.
    for name in ("new", "added", "kind"):
        delattr(live, name)
    live.same, live.gone, live.kind = torch.zeros(3), 0, torch.zeros(2)
    restored = manager.restore_or_initialize()
    same = state_of(live) == state_of(checkpoint) and live.gone == 1
    manager.close()
    return found, unchanged, called, restored, same


@pytest.mark.covers("restore: mismatch")
@WORLD_SIZES
def test_everything_that_does_not_fit_is_listed_and_nothing_changed(tmp_path, world_size):
    """Missing, extra, misshapen and retyped entries come at once, on all ranks."""
    directory = str(tmp_path / "run")
    for found, unchanged, called, restored, same in values_of(
        run_ranks(_mismatch, world_size, directory)
    ):
        assert found.kind == "MismatchError"
        for text in (
            "same: float32 [3] in the checkpoint, float32 [4] here",
            "kind: float32 [2] in the checkpoint, float64 [2] here",
            "new/t: a tensor here, not there in the checkpoint",
            "added: a plain value here, not there in the checkpoint",
            "gone: in the checkpoint, nothing here",
            "5 differences",
            "nothing of it was read",
        ):
            assert text in found.text
        assert unchanged and called == [] and same
        assert restored == f"{directory}/ckpt-1"


# Damaged files


def _make_run(rank, directory, num_saves=3):
    checkpoint = make_checkpoint()
    states = []
    with _manager(checkpoint, directory) as manager:
        for _ in range(num_saves):
            train(checkpoint)
            manager.save()
            states.append(state_of(checkpoint))
    return states


def _newest(directory, number=3):
    return attempt_directory(os.path.join(directory, f"ckpt-{number}"))


def _shard(directory, rank, number=3):
    folder = _newest(directory, number)
    (name,) = [n for n in os.listdir(folder) if n.startswith(f"rank-{rank:05}")]
    return os.path.join(folder, name)


def _manifest(directory, number=3):
    return os.path.join(_newest(directory, number), "manifest.json")


def _truncate(path, size=None):
    os.truncate(path, os.path.getsize(path) - 1 if size is None else size)


def _replace_by_directory(path):
    os.unlink(path)
    os.mkdir(path)


def _replace_text(path, old, new):
    with open(path, "rb") as file:
        data = file.read()
    assert data.count(old) >= 1, (path, old)
    with open(path, "wb") as file:
        file.write(data.replace(old, new, 1))


# What is done to the newest checkpoint, and whether it is listed as bad afterwards.
DAMAGES = {
    "bit of the chief's data": (lambda d, last: flip_last_bit(_shard(d, 0)), True),
    "bit of the last rank's data": (lambda d, last: flip_last_bit(_shard(d, last)), True),
    "bit of a header": (
        lambda d, last: _replace_text(_shard(d, last), b"F32", b"I32"),
        True,
    ),
    "newer shard format": (
        lambda d, last: _replace_text(
            _shard(d, last), b"2-provisional.3", b"3-provisional.2"
        ),
        True,
    ),
    "truncated shard": (lambda d, last: _truncate(_shard(d, last)), True),
    "empty shard": (lambda d, last: _truncate(_shard(d, last), 0), True),
    "missing shard": (lambda d, last: os.unlink(_shard(d, last)), False),
    "directory for a shard": (lambda d, last: _replace_by_directory(_shard(d, last)), True),
    "truncated manifest": (lambda d, last: _truncate(_manifest(d)), True),
    "empty manifest": (lambda d, last: _truncate(_manifest(d), 0), True),
    "newer manifest format": (
        lambda d, last: _replace_text(_manifest(d), b"2-provisional.3", b"3-provisional.2"),
        True,
    ),
    "missing manifest": (lambda d, last: os.unlink(_manifest(d)), False),
    "missing directory": (lambda d, last: shutil.rmtree(_newest(d)), False),
}


def _fall_back(rank, directories):
    found = {}
    for name, directory in directories.items():
        logged = LoggedTexts()
        called = []
        checkpoint = make_checkpoint(seed=2)
        manager = _manager(checkpoint, directory, init_fn=partial(called.append, 1))
        restored = outcome(manager.restore_or_initialize)
        state = state_of(checkpoint)
        latest = manager.latest_checkpoint
        saved = outcome(manager.save)
        manager.close()
        found[name] = (restored, state, latest, saved, called, logged.texts)
    return found


@pytest.mark.covers("restore: corrupt")
@WORLD_SIZES
def test_damaged_newest_checkpoint_is_passed_over_by_all_ranks_together(
    tmp_path, world_size
):
    """Whatever is wrong with it, and on whichever rank: all restore the one before."""
    original = str(tmp_path / "original")
    (states, *_) = values_of(run_ranks(_make_run, world_size, original))
    directories = {}
    damaged = {}
    for number, (name, (damage, _)) in enumerate(DAMAGES.items()):
        directory = directories[name] = str(tmp_path / str(number))
        shutil.copytree(original, directory)
        damage(directory, world_size - 1)
        damaged[name] = tree_of(_newest(directory))
    results = values_of(run_ranks(_fall_back, world_size, directories))
    for found in results:
        for name, (restored, state, latest, saved, called, _) in found.items():
            directory = directories[name]
            bad = DAMAGES[name][1]
            assert restored.text == f"{directory}/ckpt-2", (name, restored)
            # The number of one that cannot be read just now stays its own.
            counter = {"save_counter": 2 if bad else 3}
            assert state == {**states[1], **counter}, name
            # One that is gone is in no list any more.
            is_listed = not bad and name != "missing directory"
            assert latest == f"{directory}/ckpt-{3 if is_listed else 2}", name
            assert saved.text == f"{directory}/ckpt-{3 if bad else 4}", (name, saved)
            assert called == [], name
    for name, directory in directories.items():
        bad = DAMAGES[name][1]
        record = readers.read_record(RunDirectory.at(directory))
        (old,) = {
            e.attempt.published
            for e in readers.read_record(RunDirectory.at(original)).live[2:]
        }
        assert [e.attempt.published for e in record.bad] == ([old] if bad else []), name
        assert tree_of(os.path.join(directory, old)) == damaged[name], name
        assert any("ckpt-3" in text for text in results[0][name][-1]), name
    for name, rank in (("bit of the chief's data", 0), ("bit of the last rank's data", -1)):
        texts = " ".join(results[0][name][-1])
        file = f"rank-{rank % world_size:05}-of-{world_size:05}.safetensors"
        assert f"{file}: tensor '" in texts and "block 0" in texts
        assert "ckpt-3 is corrupt" in texts


def _all_bad(rank, touched, untouched):
    found = []
    for directory in (touched, untouched):
        called = []
        checkpoint = make_checkpoint(seed=2)
        before = state_of(checkpoint)
        manager = _manager(checkpoint, directory, init_fn=partial(called.append, 1))
        found.append((outcome(manager.restore_or_initialize), called))
        changed = state_of(checkpoint) != before
        found.append((outcome(manager.restore_or_initialize), changed))
        if directory == touched:
            found.append((outcome(manager.save), checkpoint.save_counter))
            manager.close()
            if dist.is_initialized():
                dist.barrier()
            if rank == 0:
                flip_last_bit(_shard(directory, 0, number=2))  # and it is whole again
            if dist.is_initialized():
                dist.barrier()
            manager = _manager(checkpoint, directory)
            restored = outcome(manager.restore_or_initialize)
            found.append((restored, outcome(manager.save)))
        manager.close()
    return found


@WORLD_SIZES
def test_all_checkpoints_bad_is_an_error_that_says_what_tensors_hold(tmp_path, world_size):
    """No start from scratch; whether live tensors were touched is in the message."""
    touched, untouched = str(tmp_path / "touched"), str(tmp_path / "untouched")
    values_of(run_ranks(_make_run, world_size, touched, 2))
    shutil.copytree(touched, untouched)
    for number in (1, 2):
        flip_last_bit(_shard(touched, 0, number))
        _truncate(_shard(untouched, world_size - 1, number), 100)
    for found in values_of(run_ranks(_all_bad, world_size, touched, untouched)):
        (first, called), (second, changed), (saved, counter), (again, next_saved) = found[
            :4
        ]
        assert first.kind == second.kind == saved.kind == "RestoreFailed"
        assert "ckpt-1 is corrupt" in first.text and "ckpt-2 is corrupt" in first.text
        assert "hold a mixture" in first.text and "hold a mixture" in saved.text
        assert called == [] and changed and counter == 0
        assert again.text == f"{touched}/ckpt-2"
        assert next_saved.text == f"{touched}/ckpt-3"
        (first, called), (_, changed) = found[4:]
        assert first.kind == "RestoreFailed"
        assert "could be restored" in first.text and "mixture" not in first.text
        assert called == [] and not changed


RECORD_DAMAGES = {
    "empty": ("CorruptStateError", lambda path: _truncate(path, 0)),
    "truncated": ("CorruptStateError", _truncate),
    "changed": (
        "CorruptStateError",
        lambda path: _replace_text(path, b'"epoch": 1', b'"epoch": 2'),
    ),
    "newer": (
        "NewerFormatError",
        lambda path: _replace_text(path, b'"2-provisional.3"', b"9"),
    ),
    "directory": ("UnsafeCheckpointError", _replace_by_directory),
    "gone with all others": (
        "CorruptStateError",
        lambda path: shutil.rmtree(os.path.dirname(path)),
    ),
}


def _construct(rank, directories):
    return {
        name: outcome(_manager, make_checkpoint(), directory)
        for name, directory in directories.items()
    }


@WORLD_SIZES
def test_damaged_state_is_an_error_on_all_ranks_and_never_a_fresh_start(
    tmp_path, world_size
):
    """The newest record decides; where it cannot be read nothing is guessed or touched."""
    original = str(tmp_path / "original")
    values_of(run_ranks(_make_run, 1, original, 2, process_group=False))
    directories, before = {}, {}
    for number, (name, (_, damage)) in enumerate(RECORD_DAMAGES.items()):
        directory = directories[name] = str(tmp_path / str(number))
        shutil.copytree(original, directory)
        records = os.path.join(directory, ".state")
        newest = max(n for n in os.listdir(records) if n.endswith(".json"))
        damage(os.path.join(records, newest))
        before[name] = tree_of(directory)
    for found in values_of(run_ranks(_construct, world_size, directories)):
        for name, one in found.items():
            assert one.kind == RECORD_DAMAGES[name][0], (name, one)
            assert directories[name] in one.text
        assert "format 9" in found["newer"].text
    for name, directory in directories.items():
        assert tree_of(directory) == before[name]


# A full disk


def _fill_disk(rank, directory):
    last = dist.get_world_size() - 1
    checkpoint = make_checkpoint(own=PerRank(torch.zeros(10)))
    found = []
    with _manager(checkpoint, directory) as manager:
        manager.save()
        train(checkpoint)
        manager.save()
        before = tree_of(directory)
        own = checkpoint.own
        checkpoint.own = PerRank(torch.ones(2**21 if rank == last else 10))
        for _ in range(2):
            found.append(outcome(manager.save))
            found.append(checkpoint.save_counter)
        dist.barrier()
        unchanged = tree_of(directory) == before
        found.append((manager.latest_checkpoint, manager.checkpoints))
        left = leftovers(directory)
        dist.barrier()
        checkpoint.own = own
        found.append(manager.save())
    return found, unchanged, left


@WORLD_SIZES
def test_full_disk_on_one_rank_fails_the_save_everywhere_and_loses_nothing(
    small_disk, world_size
):
    """The rank is named, older checkpoints are as they were, the number is free again."""
    directory = os.path.join(small_disk("size=6m"), "run")
    for found, unchanged, left in values_of(run_ranks(_fill_disk, world_size, directory)):
        first, counter, second, counter_again, lists, saved = found
        for one in (first, second):
            assert one.kind == "SaveFailed"
            # The one that fills the disk; others may find it full as well.
            assert world_size - 1 in one.failures
            assert "No space left on device" in one.failures[world_size - 1]
            assert "inodes are free there" in one.failures[world_size - 1]
            assert "max_to_keep" in one.text
            assert "older ones are safe" in one.text
        assert counter == counter_again == 2
        paths = [f"{directory}/ckpt-{number}" for number in (1, 2)]
        assert lists == (paths[-1], paths)
        assert unchanged and left == []
        assert saved == f"{directory}/ckpt-3"
    assert committed(directory) == ["ckpt-3", "ckpt-2", "ckpt-1"]
    assert_all_whole(directory)


def _fail_to_make_managers(rank, directory):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    def fail():
        with pytest.raises(ConfigError):
            CheckpointManager(Checkpoint(), directory, max_to_keep=0)

    fail()
    before = descriptors()
    for _ in range(5):
        fail()
    return descriptors() - before


def test_managers_that_cannot_be_made_leak_nothing(tmp_path):
    """Each bad constructor gives its connections back."""
    leaked = values_of(run_ranks(_fail_to_make_managers, 2, str(tmp_path / "run")))
    assert max(leaked) <= 2


# Newer versions


def _restore_what_needs_a_feature(rank, directory):
    """Save twice, the second time on rank 1 with a header of a later version; restore."""
    step = torch.zeros(())
    with _manager(Checkpoint(step=step, own=PerRank(rank)), directory) as manager:
        manager.save()
        if rank == 1:
            newer = Stamp(version="7.3.1", needs=("telepathy",))
            distckpt.save_state.Draft = partial(Draft, written_by=newer)
        step += 1
        manager.save()
    with _manager(Checkpoint(step=step, own=PerRank(0)), directory) as manager:
        return outcome(manager.restore_or_initialize)


def test_shard_of_a_newer_version_is_named_on_all_ranks_and_not_fallen_back_from(tmp_path):
    """Only the rank that reads it can tell; all raise the same, and nothing is bad."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_restore_what_needs_a_feature, 2, directory))
    assert {result.kind for result in results} == {"NewerFormatError"}
    assert results[0].text == results[1].text
    assert "'telepathy'" in results[0].text
    assert "distckpt 7.3.1" in results[0].text
    assert len(committed(directory)) == 2
