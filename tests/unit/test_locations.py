"""A path that is not what the user thinks is refused, in every place that takes one."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import distckpt
from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointNotFound,
    ConfigError,
    from_pretrained,
    on_signal,
    requests,
    sinks,
)
from distckpt.cli import main
from distckpt.locations import checked_path

_REMOTE = ["s3://bucket/run", "gs://b/r", "hdfs://host/r", "abfs://a@b/r", "host:/run"]


@pytest.fixture
def in_tmp(tmp_path, monkeypatch):
    """Run in an empty directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _make(path):
    with CheckpointManager(Checkpoint(x=torch.ones(2)), path, 2) as manager:
        manager.restore_or_initialize()
        return manager.save()


_READERS = {
    "manager": _make,
    "restore": lambda path: Checkpoint(x=torch.ones(2)).restore(path),
    "open": distckpt.open,
    "latest": distckpt.latest_checkpoint,
    "state": distckpt.get_checkpoint_state,
    "iterator": lambda path: distckpt.checkpoints_iterator(path),
    "pin": requests.pin,
    "request": requests.request_save,
    "pretrained": from_pretrained,
    "events": sinks.JsonLines,
    "signal": lambda path: on_signal(file=path),
}


@pytest.mark.parametrize("reader", _READERS)
@pytest.mark.parametrize("path", ["s3://bucket/run", "~/runs", "$RUNS/x", "${RUNS}/x"])
def test_every_place_that_takes_a_path_refuses_it(in_tmp, monkeypatch, reader, path):
    """And nothing is made of that name."""
    monkeypatch.setenv("RUNS", "/scratch/me")
    with pytest.raises(ConfigError) as caught:
        _READERS[reader](path)
    if path.startswith("s3"):
        assert "filesystems only" in str(caught.value)
    elif path.startswith("~"):
        assert os.path.expanduser(path) in str(caught.value)
    else:
        assert "/scratch/me/x" in str(caught.value)
    assert os.listdir(in_tmp) == []


@pytest.mark.parametrize("path", [*_REMOTE, Path("s3://bucket/run"), Path("gs://b")])
def test_urls_are_refused_also_after_pathlib_has_taken_a_slash(path):
    """``Path("s3://bucket")`` is ``s3:/bucket``."""
    with pytest.raises(ConfigError, match="filesystems only"):
        checked_path(path)


@pytest.mark.parametrize("path", ["file:///data/run", "file:/data/run"])
def test_url_of_a_file_is_answered_with_the_path(path):
    """It is local, and no path."""
    with pytest.raises(ConfigError, match=r"give '/data/run'"):
        checked_path(path)


@pytest.mark.parametrize("path", ["~", "~/x", "~root/x", "~nobody-of-that-name/x"])
def test_home_is_refused_with_what_it_means(path):
    """Only a shell replaces it."""
    with pytest.raises(ConfigError, match="only a shell replaces '~'"):
        checked_path(path)


def test_variable_that_is_not_set_is_refused(monkeypatch):
    """The folder would be called so."""
    monkeypatch.delenv("SCRATCH_OF_NOBODY", raising=False)
    with pytest.raises(ConfigError, match="it is not set here"):
        checked_path("/data/$SCRATCH_OF_NOBODY/run")


@pytest.mark.parametrize(
    "path", ["./~", "./s3:/x", "a/~b", "/mnt/c$/x", "C:/x", "run-1:2", "a$", "a b", "ä"]
)
def test_unusual_local_paths_are_taken_as_they_are(path):
    """With "./" before it everything is a path."""
    assert checked_path(path) == path


@pytest.mark.parametrize("command", ["list", "doctor", "report", "watch", "verify"])
def test_commands_refuse_it_as_the_library_does(in_tmp, command):
    """Where a shell has replaced nothing: in quotes, or after a ``=``."""
    result = CliRunner().invoke(main, [command, "~/runs/x"])
    assert result.exit_code == 2 and "only a shell replaces '~'" in result.output


def test_relative_directory_is_that_of_the_call(in_tmp):
    """A later chdir changes nothing, and paths are returned as they were spelled."""
    (in_tmp / "elsewhere").mkdir()
    assert _make("runs/a") == "runs/a/ckpt-1"
    checkpoint = Checkpoint(x=torch.zeros(2))
    manager = CheckpointManager(checkpoint, "runs/a", 2)
    os.chdir("elsewhere")
    assert manager.directory == "runs/a"
    assert manager.restore_or_initialize() == "runs/a/ckpt-1"
    assert manager.save() == manager.latest_checkpoint == "runs/a/ckpt-2"
    assert manager.checkpoints == ["runs/a/ckpt-1", "runs/a/ckpt-2"]
    assert manager.restore("runs/a/ckpt-1") == "runs/a/ckpt-1"
    assert manager.restore("runs/a") == "runs/a/ckpt-2"
    manager.close()
    assert os.listdir(".") == []
    assert sorted(os.listdir(in_tmp)) == ["elsewhere", "runs"]


def test_opened_checkpoint_is_read_after_a_chdir(in_tmp):
    """Files are opened when they are needed."""
    _make("runs/a")
    (in_tmp / "elsewhere").mkdir()
    with distckpt.open("runs/a") as opened:
        os.chdir("elsewhere")
        assert opened["x"].torch().tolist() == [1.0, 1.0]


def test_iterator_goes_on_after_a_chdir(in_tmp):
    """It is made once, and read for as long as the job runs."""
    _make("runs/a")
    (in_tmp / "elsewhere").mkdir()
    found = distckpt.checkpoints_iterator("runs/a", timeout=0)
    os.chdir("elsewhere")
    assert list(found) == ["runs/a/ckpt-1"]


def test_working_directory_that_is_gone_is_an_error_of_ours(in_tmp):
    """Whatever a relative path means then."""
    (in_tmp / "gone").mkdir()
    os.chdir("gone")
    os.rmdir(in_tmp / "gone")
    with pytest.raises(distckpt.StorageError, match="working directory is gone"):
        _make("runs/a")
    os.chdir(in_tmp)


def test_strict_latest_says_what_is_there_instead(in_tmp):
    """None stays TensorFlow's answer otherwise."""
    assert distckpt.latest_checkpoint("nowhere") is None
    with pytest.raises(CheckpointNotFound, match="nowhere does not exist"):
        distckpt.latest_checkpoint("nowhere", strict=True)
    (in_tmp / "empty").mkdir()
    with pytest.raises(CheckpointNotFound, match="no checkpoint is committed there"):
        distckpt.latest_checkpoint("empty", strict=True)
    assert _make("runs/a") == distckpt.latest_checkpoint("runs/a", strict=True)
    with pytest.raises(CheckpointNotFound, match=r"holds some: .*runs/a"):
        distckpt.latest_checkpoint("runs", strict=True)


def test_file_in_place_of_a_run_directory_is_named(in_tmp):
    """By a manager and by readers."""
    (in_tmp / "run").write_text("")
    with pytest.raises(ConfigError, match="run is not a directory"):
        _make("run")


def test_parent_that_cannot_hold_a_run_directory_is_named(in_tmp):
    """The system's "No such file or directory" alone says half of it."""
    with pytest.raises(distckpt.StorageError, match=r"cannot be made: .* in /proc"):
        _make("/proc/nosuch/run")


def test_fresh_start_names_the_directory(in_tmp, caplog):
    """So that a wrong working directory shows; and run directories that are below."""
    with caplog.at_level("INFO", logger="distckpt"):
        _make("runs/a")
        assert f"no checkpoint in {in_tmp / 'runs/a'}" in caplog.text
        caplog.clear()
        _make("runs")
    (text,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert f"no checkpoint in {in_tmp / 'runs'}" in text and "runs/a" in text


@pytest.mark.parametrize("made", ["file", "directory", "link"])
def test_file_called_checkpoint_that_is_not_ours_is_never_replaced(in_tmp, made):
    """Users of TensorFlow have one, and ``torch.save(x, "checkpoint")`` makes one."""
    (in_tmp / "run").mkdir()
    path = in_tmp / "run" / "checkpoint"
    if made == "file":
        path.write_text('model_checkpoint_path: "ckpt-1"')
    elif made == "directory":
        path.mkdir()
    else:
        path.symlink_to("/etc/hostname")
    with pytest.raises(ConfigError, match="distckpt has not made it"):
        _make("run")
    assert os.listdir(in_tmp / "run") == ["checkpoint"]


def test_state_file_of_ours_is_no_reason_to_stop(in_tmp):
    """Somebody has removed all else."""
    _make("run")
    os.rename("run/checkpoint", "kept")
    os.system("rm -rf run")
    os.mkdir("run")
    os.rename("kept", "run/checkpoint")
    assert _make("run")
