"""``distckpt bench``: what a disk can do, and what it must not be made to do."""

from __future__ import annotations

import json
import os

import pytest
from click.testing import CliRunner

from distckpt import cli, files
from distckpt.bench import disk, measure, phases
from distckpt.errors import ConfigError
from distckpt.storage.store import Room


def run(*arguments):
    """Run the command in this process."""
    return CliRunner().invoke(cli.main, ["bench", *arguments], catch_exceptions=False)


@pytest.fixture
def measured(run_dir, monkeypatch):
    """Measure a directory, in this process; returns what removes what is left."""
    removed = []
    # Signals belong to pytest, and what others write to the disk to them.
    monkeypatch.setattr(disk, "clean_up_at_signals", removed.append)
    monkeypatch.setattr(measure, "settle", lambda: None)
    os.mkdir(run_dir)
    return removed


def test_bench_measures_and_leaves_nothing(run_dir, measured, monkeypatch):
    """Saves and restores as shares of a limit, also inside a torchrun job's environment."""
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", "3")):
        monkeypatch.setenv(name, value)
    done = run(run_dir, "--size", "1MiB", "--repeat", "1", "--json")
    assert (done.exit_code, done.stderr) == (0, "")
    assert os.listdir(run_dir) == []
    found = json.loads(done.stdout)
    assert (found["ok"], found["failure"], found["directory"]) == (True, "", run_dir)
    assert [figure["what"] for figure in found["figures"]] == [
        "save, durable",
        "restore, warm cache",
        "restore, cold cache",
    ]
    for figure in found["figures"]:
        limit = figure["limit"]
        assert figure["bytes_per_second"] * figure["seconds"]["median"] == pytest.approx(
            found["size_bytes"]
        )
        assert limit["share"] == pytest.approx(
            limit["seconds"]["median"] / figure["seconds"]["median"]
        )


def test_bench_that_is_interrupted_leaves_nothing(run_dir, measured, monkeypatch):
    """It ends as shells expect of one that is; at a signal the same folder is removed."""

    def interrupt(*_):
        assert os.listdir(run_dir) == [os.path.basename(measured[0])]
        raise KeyboardInterrupt

    monkeypatch.setitem(phases.PHASES, "save", interrupt)
    done = run(run_dir, "--size", "1MiB")
    assert (done.exit_code, done.stdout, os.listdir(run_dir)) == (130, "", [])


def test_size_that_would_fill_the_disk_is_refused(tmp_path):
    """Before anything is written; with what there is."""
    free = files.free_bytes(str(tmp_path))
    done = run(str(tmp_path), "--size", f"{free // 7 + 2**26}B")
    assert (done.exit_code, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert "GiB of disk" in done.stderr and "smaller --size" in done.stderr


def test_size_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "room", lambda _: Room(2**60, None))
    memory = measure.memory_fields()["MemAvailable"]
    with pytest.raises(ConfigError, match="GiB of memory"):
        disk.check_room(str(tmp_path), memory // 2)


def test_missing_directory_exits_with_3_and_is_not_made(tmp_path):
    """On which disk would it be?"""
    done = run(str(tmp_path / "no"))
    assert (done.exit_code, list(tmp_path.iterdir())) == (3, [])


@pytest.mark.parametrize("text", ["", "many", "1MiB more", "-5MB", "1000", "0.5MiB"])
def test_size_that_is_none_exits_with_2(tmp_path, text):
    assert run(str(tmp_path), "--size", text).exit_code == 2


@pytest.mark.parametrize(
    ("text", "size_bytes"),
    [("1MiB", 2**20), ("1.5 GB", 1_500_000_000), ("2K", 2000), ("4TiB", 2**42)],
)
def test_sizes_are_read_as_people_write_them(tmp_path, monkeypatch, text, size_bytes):
    asked = []

    def check_room(_, size):
        asked.append(size)
        msg = "enough"
        raise ConfigError(msg)

    monkeypatch.setattr("distckpt.cli_bench._LEAST_BYTES", 1)
    monkeypatch.setattr(disk, "check_room", check_room)
    run(str(tmp_path), "--size", text)
    assert asked == [size_bytes]
