"""Paths on the command line: how they complete, and what is said of wrong ones."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from unit_helpers import make_claimed, make_saved, save

from distckpt import cli, state
from distckpt.run_directory import RunDirectory

WAIT_SECONDS = 30


def run(*arguments, **more):
    """Run the command in this process."""
    return CliRunner().invoke(cli.main, list(arguments), catch_exceptions=False, **more)


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """Make runs/gpt with ckpt-1 to ckpt-3 in the working directory; returns its path."""
    monkeypatch.chdir(tmp_path)
    chief = make_claimed("runs/gpt", keep=3)
    for number in (1, 2, 3):
        save(chief, "runs/gpt", number)
    chief.close()
    return tmp_path / "runs" / "gpt"


# Completion


def completed(*words):
    """Return what click offers for the last of these words, as shells ask it."""
    environment = {
        "_DISTCKPT_COMPLETE": "bash_complete",
        "COMP_WORDS": "\n".join(["distckpt", *words]),
        "COMP_CWORD": str(len(words)),
    }
    done = run(env=environment, prog_name="distckpt")
    return [tuple(line.split(",", 1)) for line in done.stdout.split()]


@pytest.mark.parametrize("command", ["show", "verify", "export"])
def test_checkpoints_complete_newest_first(runs, command):
    """Those that the newest record names."""
    expected = [("plain", f"runs/gpt/ckpt-{number}") for number in (3, 2, 1)]
    assert completed(command, "runs/gpt/") == expected
    assert completed(command, "runs/gpt/ckpt-2") == [("plain", "runs/gpt/ckpt-2")]


def test_both_sides_of_diff_complete(runs):
    assert completed("diff", "runs/gpt/ckpt-3") == [("plain", "runs/gpt/ckpt-3")]
    assert len(completed("diff", "runs/gpt/ckpt-3", "runs/gpt/ck")) == 3


def test_checkpoints_of_the_working_directory_complete(runs, monkeypatch):
    monkeypatch.chdir(runs)
    assert completed("show", "ckpt-1") == [("plain", "ckpt-1")]


@pytest.mark.parametrize("word", ["", "runs/g", "nowhere/x", "runs/gpt/ckpt-2.e"])
def test_elsewhere_directories_complete(runs, word):
    """By the shell itself: the way to a run directory, and attempts in one."""
    assert completed("show", word) == [("dir", word)]


@pytest.mark.parametrize("command", ["list", "doctor", "repair", "watch", "bench"])
def test_run_directories_complete_as_directories(runs, command):
    assert completed(command, "runs/gpt/") == [("dir", "runs/gpt/")]


def test_completion_of_a_corrupt_directory_is_quiet(runs):
    """Nobody wants a traceback at the press of a key."""
    newest = str(
        RunDirectory.at("runs/gpt").places.record(
            max(state.record_numbers(RunDirectory.at("runs/gpt")))
        )
    )
    with open(newest, "w"):
        pass
    assert completed("show", "runs/gpt/") == [("dir", "runs/gpt/")]


def test_commands_complete():
    assert completed("compl") == [("plain", "completion")]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_what_the_shell_loads(shell):
    text = run("completion", shell).stdout
    assert f"_DISTCKPT_COMPLETE={shell}_complete" in text


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
def test_bash_completes_a_checkpoint_at_the_press_of_tab(runs, tmp_path):
    """A real one, on a terminal; the line that it made is then run."""
    program = tmp_path / "distckpt"
    code = "from distckpt.cli import main; main(prog_name='distckpt')"
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
    program.chmod(0o755)
    ours, theirs = pty.openpty()
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "TERM": "dumb"}
    bash = subprocess.Popen(
        ["bash", "--norc", "--noprofile", "-i"],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
    )
    os.close(theirs)
    seen = b""

    def type_until(keys, expected):
        nonlocal seen
        os.write(ours, keys)
        deadline = time.monotonic() + WAIT_SECONDS
        while expected not in seen:
            assert select.select([ours], [], [], deadline - time.monotonic())[0], seen
            seen += os.read(ours, 65536)

    try:
        type_until(b'eval "$(distckpt completion bash)"; echo it is rea""dy\n', b"is ready")
        type_until(b"distckpt show runs/gpt/ckpt-2\t", b"show runs/gpt/ckpt-2 ")
        type_until(b"\n", b"3 tensors, 2 plain values")
    finally:
        bash.kill()
        bash.wait()
        os.close(ours)
    assert b"checkpoint ckpt-2 " in seen


# Wrong paths


@pytest.mark.parametrize("command", ["list", "doctor", "repair", "watch"])
@pytest.mark.parametrize("which", ["prefix", "published"])
def test_checkpoint_in_place_of_a_run_directory_names_the_directory(
    run_dir, command, which
):
    saved = make_saved(run_dir)
    path = getattr(saved, which)
    done = run(command, path)
    assert (done.exit_code, done.stdout) == (3, "")
    assert done.stderr == (
        f"distckpt: {path} is not a run directory, but a checkpoint in one: give "
        f"{run_dir}.\n"
    )


@pytest.mark.parametrize("command", ["list", "doctor", "repair"])
@pytest.mark.parametrize("wrong", ["runs/gtp", "runz/gpt"])
def test_misspelled_directory_names_what_there_is(runs, command, wrong):
    done = run(command, wrong)
    assert done.exit_code == 3
    right = runs if wrong == "runs/gtp" else runs.parent
    assert done.stderr == f"distckpt: {wrong} is not a directory. There is {right}.\n"


@pytest.mark.parametrize(
    "command",
    [["show"], ["verify"], ["diff", "runs/gpt"], ["export", "--to=dcp", "--output=x"]],
)
def test_misspelled_path_of_a_checkpoint_names_what_there_is(runs, command):
    done = run(*command, "runs/gtp/ckpt-1")
    assert done.exit_code == 3
    assert f"There is {runs}." in done.stderr


def test_number_that_is_not_there_names_the_nearest(run_dir):
    """Where they are too many to name them all."""
    chief = make_claimed(run_dir, keep=None)
    for number in range(0, 120, 10):
        save(chief, run_dir, number, world_size=1)
    chief.close()
    text = run("show", f"{run_dir}/ckpt-34").stderr
    assert "newest first: ckpt-110, ckpt-100, " in text
    assert "ckpt-20, ... (12). Nearest to it: ckpt-30, ckpt-40." in text


def test_run_directory_in_place_of_a_checkpoint_is_its_newest(runs):
    """As with everything that opens one."""
    assert run("show", "runs/gpt").stdout.startswith("checkpoint ckpt-3 ")


def test_list_of_what_run_directories_are_in_names_them(runs):
    """One level up is an easy mistake, and no error."""
    done = run("list", "runs")
    assert (done.exit_code, done.stdout.splitlines()) == (
        0,
        ["runs: no checkpoint has been committed.", "Run directories in it: runs/gpt"],
    )


def test_directory_with_nothing_like_it_says_no_more(tmp_path):
    done = run("list", str(tmp_path / "runs"))
    assert done.stderr == f"distckpt: {tmp_path}/runs is not a directory.\n"
