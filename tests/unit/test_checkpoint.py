"""``Checkpoint``: its attributes, its counter, and restoring without a job."""

from __future__ import annotations

import copy
import os
import shutil
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn
from torch_helpers import assert_same, restore, save

from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointNotFound,
    ChecksumError,
    ConfigError,
    DistckptError,
    FormatError,
    MismatchError,
    NewerFormatError,
    PerRank,
    RestoreFailed,
    SaveFailed,
    StorageError,
    UnsupportedError,
    layout,
    readers,
)
from distckpt.storage import posix


def test_objects_are_attributes_that_can_be_set_and_deleted():
    """What is tracked is read, replaced, added and removed by attribute."""
    model = nn.Linear(1, 1)
    checkpoint = Checkpoint(model=model, epoch=1)
    assert checkpoint.model is model
    checkpoint.epoch = 2
    checkpoint.more = [1]
    assert (checkpoint.epoch, checkpoint.more) == (2, [1])
    del checkpoint.more
    with pytest.raises(
        AttributeError, match=r"tracks no 'more'.* It tracks 'epoch', 'model'\."
    ):
        _ = checkpoint.more
    with pytest.raises(AttributeError, match="more"):
        del checkpoint.more
    assert not hasattr(checkpoint, "missing")


@pytest.mark.parametrize("name", ["restore", "_private", "__dict__", "__class__"])
def test_names_that_are_taken_are_refused(name):
    """Methods and private names cannot be tracked."""
    with pytest.raises(ConfigError, match=f"'{name}' cannot be tracked"):
        Checkpoint(**{name: 1})
    with pytest.raises(ConfigError, match=f"'{name}' cannot be tracked"):
        setattr(Checkpoint(), name, 1)


class _Shy(nn.Linear):
    """A module that may not be asked for its state."""

    def state_dict(self, *_, **__):
        """Fail."""
        raise AssertionError

    def __repr__(self):
        raise AssertionError


def test_repr_shows_names_and_types():
    """No state dict is taken and no tensor read: it may lie on a device that is busy."""
    checkpoint = Checkpoint(model=_Shy(1, 1), step=torch.tensor(3), own=PerRank({"a": 1}))
    checkpoint.save_counter = 3
    expected = "Checkpoint(model=_Shy, step=Tensor, own=PerRank({'a': 1}), save_counter=3)"
    assert repr(checkpoint) == expected
    assert repr(object.__new__(Checkpoint)) == "Checkpoint(save_counter=0)"


def test_mistyped_attribute_is_answered_with_a_near_one():
    checkpoint = Checkpoint(model=nn.Linear(1, 1), step=torch.tensor(3))
    with pytest.raises(AttributeError, match=r"'modle'; did you mean 'model'\? It tracks"):
        _ = checkpoint.modle
    with pytest.raises(AttributeError, match="did you mean 'step'"):
        del checkpoint.stpe
    assert {"model", "step", "restore", "save_counter"} <= {*dir(checkpoint)}


def test_save_counter_is_an_int_that_can_be_set():
    """The counter starts at 0 and takes nothing but ints."""
    checkpoint = Checkpoint()
    assert checkpoint.save_counter == 0
    checkpoint.save_counter = 5
    assert checkpoint.save_counter == 5
    for wrong in (1.0, "1", True, None, torch.tensor(1)):
        with pytest.raises(ConfigError, match="save_counter must be an int"):
            checkpoint.save_counter = wrong
    with pytest.raises(AttributeError):
        del checkpoint.save_counter


def test_copying_a_checkpoint_copies_what_it_tracks():
    """``copy`` asks for attributes before there are any."""
    checkpoint = Checkpoint(values=[1])
    checkpoint.save_counter = 3
    other = copy.deepcopy(checkpoint)
    assert (other.values, other.save_counter) == ([1], 3)
    assert other.values is not checkpoint.values


def test_counter_counts_saves_and_is_part_of_the_checkpoint(run_dir):
    """The saved counter is that of the save itself, whatever its number."""
    checkpoint = Checkpoint(x=torch.zeros(1))
    with CheckpointManager(checkpoint, run_dir, max_to_keep=None) as manager:
        assert manager.save() == os.path.join(run_dir, "ckpt-1")
        assert manager.save(checkpoint_number=50) == os.path.join(run_dir, "ckpt-50")
        assert checkpoint.save_counter == 2
        assert manager.save() == os.path.join(run_dir, "ckpt-3")
    fresh = Checkpoint(x=torch.zeros(1))
    fresh.restore(os.path.join(run_dir, "ckpt-50"))
    assert fresh.save_counter == 2
    assert restore(run_dir, x=torch.zeros(1)).save_counter == 3


def test_counter_is_given_back_when_a_save_fails(run_dir):
    """The next save that works has the number that the failed one had."""
    checkpoint = Checkpoint(x=1)
    with CheckpointManager(checkpoint, run_dir, max_to_keep=None) as manager:
        checkpoint.x = object()
        with pytest.raises(UnsupportedError):
            manager.save()
        assert checkpoint.save_counter == 0
        checkpoint.x = 1
        assert manager.save() == os.path.join(run_dir, "ckpt-1")
        names = [n for n in os.listdir(run_dir) if n.startswith((".ckpt", "ckpt"))]
    assert len(names) == 1


def test_restore_takes_a_prefix_a_directory_and_a_path_object(run_dir):
    """Everything that names a checkpoint will do, without a manager."""
    prefix = save(run_dir, x=torch.arange(3), epoch=4)
    directory = str(readers.locate(prefix).directory)
    for path in (prefix, directory, Path(prefix), Path(directory), directory + "/"):
        checkpoint = Checkpoint(x=torch.zeros(3, dtype=torch.int64), epoch=0)
        checkpoint.restore(path)
        assert_same(checkpoint.x, torch.arange(3))
        assert (checkpoint.epoch, checkpoint.save_counter) == (4, 1)


def test_restore_reads_a_copied_directory_and_a_copied_run(run_dir, tmp_path):
    """A checkpoint is complete in itself: its copy restores anywhere."""
    prefix = save(run_dir, x=torch.arange(3))
    directory = str(readers.locate(prefix).directory)
    alone = str(tmp_path / "renamed")
    shutil.copytree(directory, alone)
    without_records = tmp_path / "copies"
    shutil.copytree(directory, without_records / os.path.basename(directory))
    for path in (alone, str(without_records / "ckpt-1")):
        checkpoint = Checkpoint(x=torch.zeros(3, dtype=torch.int64))
        checkpoint.restore(path)
        assert_same(checkpoint.x, torch.arange(3))


@pytest.mark.parametrize("name", ["ckpt-2", "other-1", "nothing", "sub/ckpt-1"])
def test_restore_of_what_is_not_there_says_so(run_dir, name):
    """A wrong path is no silent start from scratch."""
    save(run_dir, x=torch.zeros(1))
    with pytest.raises(CheckpointNotFound):
        Checkpoint(x=torch.zeros(1)).restore(os.path.join(run_dir, name))


@pytest.mark.parametrize("path", [None, 3, b"runs", ""])
def test_restore_of_no_path_at_all_is_an_error(path):
    """What is no path is a bad argument."""
    with pytest.raises(ConfigError, match="a path must be"):
        Checkpoint().restore(path)


def test_restore_that_does_not_fit_changes_nothing(run_dir):
    """All differences at once, and every live value as it was."""
    prefix = save(run_dir, x=torch.ones(2), y=torch.ones(2), n=1, gone=2)
    live = {"x": torch.zeros(2), "y": torch.zeros(3), "n": 0, "new": torch.zeros(1)}
    checkpoint = Checkpoint(**live)
    with pytest.raises(MismatchError) as caught:
        checkpoint.restore(prefix)
    for text in ("y: float32 [2]", "gone: in the", "new: a tensor here", "3 differences"):
        assert text in str(caught.value)
    assert live["x"].tolist() == [0, 0]
    assert (checkpoint.n, checkpoint.save_counter) == (0, 0)


def test_restore_of_damaged_files_names_them(run_dir):
    """A missing, cut or changed file is an error with its path."""
    prefix = save(run_dir, x=torch.arange(1000))
    directory = str(readers.locate(prefix).directory)
    shard = os.path.join(directory, "rank-00000-of-00001.safetensors")
    whole = Path(shard).read_bytes()

    def attempt():
        Checkpoint(x=torch.zeros(1000, dtype=torch.int64)).restore(prefix)

    Path(shard).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ChecksumError, match=r"rank-00000.*tensor 'x', block 0"):
        attempt()
    Path(shard).write_bytes(whole[:-1])
    with pytest.raises(FormatError, match=r"rank-00000.*entries end at 8000"):
        attempt()
    os.unlink(shard)
    with pytest.raises(StorageError, match="rank-00000"):
        attempt()
    manifest = Path(directory, "manifest.json")
    manifest.write_bytes(manifest.read_bytes()[:-5])
    with pytest.raises(ChecksumError, match=r"manifest\.json"):
        attempt()


def test_restore_of_a_newer_format_says_that_it_is_newer(run_dir, tmp_path):
    """A copied checkpoint of a later version is refused by its number."""
    directory = str(readers.locate(save(run_dir, x=torch.zeros(1))).directory)
    copied = tmp_path / "copy"
    shutil.copytree(directory, copied)
    manifest = copied / "manifest.json"
    text = manifest.read_text()
    assert text.count('"format": "2-provisional.3"') == 1
    manifest.write_text(text.replace('"format": "2-provisional.3"', '"format": 3'))
    with pytest.raises(NewerFormatError, match="format 3"):
        Checkpoint(x=torch.zeros(1)).restore(copied)


def test_restore_gives_rank_zero_its_own(run_dir):
    """Without a process group this process is rank 0 of 1."""
    prefix = save(run_dir, mine=PerRank([1, torch.ones(2)]))
    checkpoint = Checkpoint(mine=PerRank([0, torch.zeros(2)]))
    checkpoint.restore(prefix)
    assert checkpoint.mine.value[0] == 1
    assert checkpoint.mine.value[1].tolist() == [1, 1]


def test_empty_checkpoint_saves_and_restores(run_dir):
    """Nothing but the counter is a checkpoint too."""
    save(run_dir)
    assert restore(run_dir).save_counter == 1


def test_names_with_slashes_are_told_from_paths(run_dir):
    """A top-level name is one part of a path, whatever it contains."""
    objects = {"a/b": torch.ones(2), "a": {"b": torch.zeros(2)}}
    CheckpointManager(Checkpoint(**objects), run_dir, max_to_keep=1).save()
    live = {"a/b": torch.empty(2), "a": {"b": torch.empty(2)}}
    CheckpointManager(Checkpoint(**live), run_dir, max_to_keep=1).restore_or_initialize()
    assert torch.equal(live["a/b"], torch.ones(2))
    assert torch.equal(live["a"]["b"], torch.zeros(2))


def test_a_step_beyond_64_bits_is_refused_before_anything_is_written(run_dir):
    """The record could not hold it."""
    manager = CheckpointManager(
        Checkpoint(), run_dir, max_to_keep=1, step_counter=lambda: 2**63
    )
    with pytest.raises(ConfigError, match="64 bits"):
        manager.save()
    assert not os.path.exists(run_dir)


class _Angry:
    def __init__(self, error):
        self.error = error

    def state_dict(self):
        if self.error is not None:
            raise self.error
        return {"n": 1}

    def load_state_dict(self, state):
        pass


class _Tokenizer(nn.Linear):
    error = None

    def get_extra_state(self):
        if self.error is not None:
            raise self.error
        return 1

    def set_extra_state(self, state):
        pass


def test_an_os_error_of_user_code_does_not_fall_back(run_dir):
    """Only the checkpoint's own files being unreadable says anything about it."""
    model = _Tokenizer(1, 1)
    manager = CheckpointManager(Checkpoint(model=model), run_dir, max_to_keep=3)
    manager.save()
    manager.save()
    model.error = PermissionError("my tokenizer's file")
    with pytest.raises(RestoreFailed, match="my tokenizer's file"):
        manager.restore_or_initialize()


def test_an_error_that_cannot_speak_is_still_told(run_dir):
    """Whatever user code raises becomes a vote."""

    class Mute(Exception):
        errno = object()

        def __str__(self):
            raise RuntimeError

    angry = _Angry(Mute())
    manager = CheckpointManager(Checkpoint(angry=angry), run_dir, max_to_keep=3)
    with pytest.raises(SaveFailed, match="Mute"):
        manager.save()
    angry.error = None
    assert manager.save()


def test_an_interrupt_behind_the_commit_does_not_fence_the_manager(run_dir, monkeypatch):
    """After Ctrl-C between the record's link and the return, saving goes on."""
    manager = CheckpointManager(Checkpoint(x=1), run_dir, max_to_keep=None)
    manager.save()
    sync = posix.sync_directory

    def interrupt(path):
        sync(path)
        if path.endswith(".state"):
            monkeypatch.undo()
            raise KeyboardInterrupt

    monkeypatch.setattr(posix, "sync_directory", interrupt)
    with pytest.raises(KeyboardInterrupt):
        manager.save()
    assert manager.save() == os.path.join(run_dir, "ckpt-3")
    expected = [os.path.join(run_dir, f"ckpt-{number}") for number in (1, 2, 3)]
    assert manager.checkpoints == expected


def test_a_run_directory_that_vanished_is_said_to_have(run_dir):
    """Deleted, unmounted or left by chdir: the error says what to look at."""
    manager = CheckpointManager(Checkpoint(x=1), run_dir, max_to_keep=None)
    manager.save()
    # Not removed: the history, which is written by another thread, would make it again.
    os.rename(run_dir, f"{run_dir}-elsewhere")
    with pytest.raises(SaveFailed, match="its records are gone"):
        manager.save()


def test_a_mismatch_after_a_bad_checkpoint_tells_of_both(run_dir):
    """The older one does not fit; why it was tried, and what tensors hold, is said."""
    old = {"w": torch.ones(300)}
    CheckpointManager(Checkpoint(**old), run_dir, max_to_keep=3).save()
    new = Checkpoint(w=torch.ones(300), v=torch.ones(300))
    new.save_counter = 1
    CheckpointManager(new, run_dir, max_to_keep=3).save()
    (path,) = Path(run_dir).glob("ckpt-2.*/*.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    manager = CheckpointManager(new, run_dir, max_to_keep=3)
    with pytest.raises(MismatchError) as caught:
        manager.restore_or_initialize()
    assert "ckpt-2 is corrupt" in str(caught.value)
    assert "which hold a mixture now" in str(caught.value)
    assert "nothing of it was read" in str(caught.value)


@contextmanager
def _default_device(device):
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@pytest.mark.parametrize("by_manager", [False, True], ids=["alone", "manager"])
@pytest.mark.parametrize(
    "mode",
    [lambda: _default_device("meta"), torch.inference_mode],
    ids=["meta", "inference"],
)
def test_modes_of_the_caller_do_not_decide_what_is_allocated(run_dir, mode, by_manager):
    """A default device, inference mode: state comes back real, and can be trained on."""

    class Averages:
        def __init__(self, value):
            self.state = {"average": value}

        def state_dict(self):
            return self.state

        def load_state_dict(self, state):
            self.state = state

    def make(value):
        layer = nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(layer.parameters())
        averages = Averages(torch.full((4,), value))
        transposed = torch.full((3, 2), value).t()
        return Checkpoint(layer=layer, opt=optimizer, averages=averages, x=transposed)

    def step(checkpoint):
        for parameter in checkpoint.layer.parameters():
            parameter.grad = torch.ones_like(parameter)
        checkpoint.opt.step()

    saved, live = make(1.0), make(0.0)
    step(saved)
    with CheckpointManager(saved, run_dir, max_to_keep=None) as manager:
        path = manager.save()
    with mode():
        if by_manager:
            with CheckpointManager(live, run_dir, max_to_keep=None) as manager:
                assert manager.restore_or_initialize() == path
        else:
            live.restore(path)
    assert torch.equal(live.x, saved.x)
    live.averages.state["average"] += 1
    assert live.averages.state["average"].tolist() == [2.0] * 4
    step(saved)
    step(live)
    assert torch.equal(live.layer.weight, saved.layer.weight)


def _files_open_in(directory):
    files = (f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd"))
    names = [os.readlink(file) for file in files if os.path.islink(file)]
    return [name for name in names if name.startswith(directory)]


@pytest.mark.parametrize("by_manager", [False, True], ids=["alone", "manager"])
@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_error_of_user_code_while_planning_closes_what_is_open(run_dir, by_manager, error):
    """This rank's own file is open by then; nothing is left so, and nothing is changed."""
    import torch.distributed.tensor  # without it nothing is asked

    class State:
        directory = ""
        found = ()

        def state_dict(self):
            if self.directory:
                self.found = _files_open_in(self.directory)
                raise error
            return {"tensor": torch.zeros(3)}

        def load_state_dict(self, state):
            raise AssertionError

    def make(value):
        own = PerRank(torch.full((2,), value))
        return Checkpoint(x=torch.full((3,), value), state=State(), own=own)

    live = make(0.0)
    with CheckpointManager(make(1.0), run_dir, max_to_keep=None) as manager:
        path = manager.save()
    live.state.directory = str(readers.locate(path).directory)
    manager = CheckpointManager(live, run_dir, max_to_keep=None)
    restoring = manager.restore_or_initialize if by_manager else partial(live.restore, path)
    with pytest.raises((error, DistckptError)) as caught:
        restoring()
    assert error in (caught.type, type(caught.value.__cause__))
    assert len(live.state.found) == 1
    assert not _files_open_in(live.state.directory)
    assert live.x.tolist() == [0] * 3 and live.own.value.tolist() == [0] * 2
    manager.close()


def test_where_a_tensor_lies_is_worked_out_once(run_dir, monkeypatch):
    """Of many ranks' parts the list is long, and it was made to open their files."""
    path = save(run_dir, a=torch.ones(3), b=torch.ones(2, 2))
    asked = []
    original = layout.Assignment.pieces_of

    def pieces_of(assignment, name, box=None):
        asked.append(name)
        return original(assignment, name, box)

    monkeypatch.setattr(layout.Assignment, "pieces_of", pieces_of)
    Checkpoint(a=torch.zeros(3), b=torch.zeros(2, 2)).restore(path)
    assert asked == ["a", "b"]
