"""The programs and commands on a page of docs/, run as by a reader who types them."""

from __future__ import annotations

import doctest
import os
import runpy
import shlex
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from harness import EVERYTHING, run_ranks
from markdown_it import MarkdownIt

DOCS = Path(__file__).parents[2] / "docs"
_HOW = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
_PROMPT = "$ "


class Block(NamedTuple):
    """One fenced block: its language, its text, and where it stands."""

    language: str
    text: str
    where: str


def blocks_of(page: str) -> list[Block]:
    """Return the fenced blocks of a page of docs/, in their order."""
    tokens = MarkdownIt().parse((DOCS / page).read_text())
    return [
        Block(token.info.strip(), token.content, f"docs/{page}:{token.map[0] + 1}")
        for token in tokens
        if token.type == "fence" and token.map is not None
    ]


def type_in(block: Block, folder: Path) -> None:
    """Do what a reader does with a block: save the program, or run the commands.

    Fails if a command prints something else than the page says, or ends badly.
    """
    if block.language == "python":
        first, _, _ = block.text.partition("\n")
        assert first.startswith("# ") and first.endswith(".py"), f"{block.where}: no name"
        (folder / first.removeprefix("# ")).write_text(block.text)
    elif block.language == "console":
        for command, expected in _commands(block.text):
            found = run(command, folder)
            same = doctest.OutputChecker().check_output(expected, found, _HOW)
            assert same, f"{block.where}: {command}\nsays\n{found}\nand not\n{expected}"


def _commands(text: str) -> list[tuple[str, str]]:
    """Cut what stands in a console into commands, each with what it prints."""
    commands: list[tuple[str, str]] = []
    for line in text.splitlines(keepends=True):
        if line.startswith(_PROMPT):
            commands.append((line.removeprefix(_PROMPT).strip(), ""))
        else:
            command, expected = commands[-1]
            commands[-1] = (command, expected + line)
    return commands


def run(command: str, folder: Path) -> str:
    """Run a command in a folder; returns what it prints, and ``Killed`` if it was.

    What would import torch first is forked from a process that has done so already.
    """
    words = shlex.split(command)
    if words[0] in ("python", "torchrun", "distckpt") and not EVERYTHING:
        return _fork(words, folder)
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, timeout=300
    )
    killed = done.returncode == -signal.SIGKILL
    assert done.returncode == 0 or killed, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + "Killed\n" * killed


def _fork(words: list[str], folder: Path) -> str:
    world_size, environment = 1, {}
    if words[0] == "torchrun":
        assert words[1] == "--nproc-per-node", words
        world_size, words = int(words[2]), ["python", *words[3:]]
        environment = _environment_of_torchrun(world_size)
    output = folder / ".output"
    output.write_text("")
    ranks = run_ranks(
        _be,
        world_size,
        words,
        str(folder),
        process_group=False,
        environment=environment,
    )
    killed = any(rank.exit_code == -signal.SIGKILL for rank in ranks)
    for rank in ranks:
        assert killed or (rank.ok and rank.value == 0), f"{words}: {rank}\n{rank.trace}"
    return output.read_text() + "Killed\n" * killed


def _environment_of_torchrun(world_size: int) -> dict[str, str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": f"page-{port}",
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
    }


def _be(rank: int, words: list[str], folder: str) -> int:
    """Be the process that a command starts; returns its exit code."""
    os.chdir(folder)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    # A line is there when it is printed, whatever becomes of the process.
    sys.stdout = open(".output", "a", buffering=1)  # noqa: SIM115
    try:
        if words[0] == "python":
            sys.argv = words[1:]
            sys.path.insert(0, folder)
            runpy.run_path(words[1], run_name="__main__")
        else:
            from distckpt.cli import main

            main(words[1:], prog_name="distckpt")
    except SystemExit as end:
        return int(end.code or 0)
    return 0
