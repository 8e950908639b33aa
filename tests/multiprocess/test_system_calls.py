"""The system calls on a run directory, thread by thread, are those that were recorded.

A refactoring of storage must not move, add or lose one: their order is what makes a commit
durable. If a change of them is meant, record them again and read the difference:

    python tests/multiprocess/test_system_calls.py
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from system_calls_job import MARK, QUIET

HERE = Path(__file__).parent
RECORDED = HERE / "system_calls.json"
WORLD_SIZES = (1, 2)
pytestmark = pytest.mark.full

_LINE = re.compile(r"(?P<thread>\d+) +(?P<rest>.*)")
_RESUMED = re.compile(r"<\.\.\. (?P<name>\w+) resumed>(?P<rest>.*)")
_CALL = re.compile(r"(?P<name>\w+)\((?P<arguments>.*)")
_ERROR = re.compile(r"= -1 (?P<error>E[A-Z]+)")
_OF_FILES = "%file,%desc"
_FLAGS = re.compile(r"O_[A-Z]+|AT_[A-Z_]+|RENAME_[A-Z]+|FALLOC_[A-Z_]+")
# What only asks: how often depends on how long something takes, or on the interpreter.
_PASSED_OVER = {"lseek", "fstat", "fcntl", "getcwd", "mmap", "munmap", "ioctl"}
_PASSED_OVER |= {"poll", "ppoll", "select", "epoll_wait", "epoll_ctl", "fadvise64", "dup"}
# In any order, as the listing of a directory is.
_UNORDERED = ("unlink", "unlinkat")


def missing():
    """Say what this machine lacks."""
    if shutil.which("strace") is None:
        return "no strace here"
    found = subprocess.run(
        ["strace", "-f", "-o", os.devnull, "true"], check=False, capture_output=True
    )
    if found.returncode:
        return "strace may not trace here"
    made = json.loads(RECORDED.read_text())["python"] if RECORDED.exists() else ""
    if made and made != _python():
        return f"recorded with Python {made}, this is {_python()}"
    return ""


def _python():
    return ".".join(platform.python_version_tuple()[:2])


def _is_ext4(directory):
    done = subprocess.run(
        ["stat", "-f", "-c", "%T", directory], check=False, capture_output=True, text=True
    )
    return "ext" in done.stdout


def traced(directory, world_size):
    """Run the job; return the calls of each rank: by phase a list for each thread."""
    run = os.path.join(directory, "run")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "0"}
    logs = [os.path.join(directory, f"trace-{rank}") for rank in range(world_size)]
    program = [sys.executable, "-W", "ignore", str(HERE / "system_calls_job.py"), run]
    strace = ["strace", "-f", "-y", "-s", "0", "-e", f"trace={_OF_FILES}"]
    jobs = [
        subprocess.Popen(
            [*strace, "-o", log, *program, str(rank), str(world_size)],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank, log in enumerate(logs)
    ]
    said = [job.communicate(timeout=240)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0] * world_size, said
    return [phases_of(Path(log).read_text().splitlines(), run) for log in logs]


def phases_of(lines, run):
    """Group the calls on a run directory by phase and thread."""
    phases, unfinished = {}, {}
    name, main, is_quiet = "", "", False
    for line in lines:
        matched = _LINE.fullmatch(line)
        assert matched, line
        thread, rest = matched["thread"], matched["rest"]
        if rest.endswith("<unfinished ...>"):
            unfinished[thread] = rest.removesuffix("<unfinished ...>")
            continue
        resumed = _RESUMED.fullmatch(rest)
        if resumed:
            rest = unfinished.pop(thread, "") + resumed["rest"]
        if MARK in rest:
            main = main or thread
            marked = rest.partition(MARK)[2].partition('"')[0]
            is_quiet = marked == QUIET
            name = name if is_quiet else marked
            continue
        call = call_of(rest, run)
        if call and not (is_quiet and thread == main):
            phases.setdefault(name, {}).setdefault(thread, []).append(call)
    return {
        name: sorted(map(in_order, threads.values())) for name, threads in phases.items()
    }


def call_of(text, run):
    """Spell one call without what differs between two runs; "" if it is none of ours."""
    matched = _CALL.match(text)
    if matched is None or run not in text or matched["name"] in _PASSED_OVER:
        return ""
    if matched["name"] == "newfstatat" and "AT_SYMLINK_NOFOLLOW" not in text:
        return ""  # fstat of a descriptor, and isdir
    text = re.sub(r"AT_FDCWD(<[^>]*>)?", "", text)
    names = re.findall(rf"{re.escape(run)}([^\">]*)", text)
    if any(name.startswith("/.events") for name in names):
        return ""  # the history, which is written whenever there is time
    # A name that is relative to an open directory.
    names += re.findall(r'"((?!/)[^"]+)"', text)
    flags = [] if matched["name"] in ("read", "write") else _FLAGS.findall(text)
    error = _ERROR.search(text)
    said = [matched["name"], *map(_spelled, dict.fromkeys(names)), *dict.fromkeys(flags)]
    return " ".join([*said, *([error["error"]] if error else [])])


def _spelled(name):
    name = re.sub(
        r"(?<![0-9])[0-9a-f]{16}(?![0-9])|(?<=^/#)[0-9]+|(?<=-)[0-9a-f]{8}(?=[./]|$)",
        "*",
        name,
    )
    name = re.sub(r"(?<=\.requests/)[.0-9-]+", "*", name)
    return name.lstrip("/") or "."


def in_order(calls):
    """Sort what a listing has put into some order."""
    found, deletions = [], []
    for call in calls:
        if call.startswith(_UNORDERED):
            deletions.append(call)
        else:
            found += [*sorted(deletions), call]
            deletions = []
    return found + sorted(deletions)


def recorded():
    """Return what was recorded."""
    return json.loads(RECORDED.read_text())


@pytest.mark.skipif(bool(missing()), reason=missing() or "-")
@pytest.mark.parametrize("world_size", WORLD_SIZES)
def test_system_calls_are_those_that_were_recorded(tmp_path, world_size):
    """In each phase, on each rank, thread by thread."""
    if not _is_ext4(tmp_path):
        pytest.skip("recorded on ext4")
    found = traced(str(tmp_path), world_size)
    expected = recorded()["calls"][str(world_size)]
    for rank, (phases, wanted) in enumerate(zip(found, expected, strict=True)):
        assert phases.keys() == wanted.keys()
        for name, threads in wanted.items():
            assert phases[name] == threads, f"rank {rank}, {name}"


def record():
    """Record the calls of this version."""
    calls = {}
    for world_size in WORLD_SIZES:
        with tempfile.TemporaryDirectory(dir="/var/tmp") as directory:
            assert _is_ext4(directory)
            calls[str(world_size)] = traced(directory, world_size)
    RECORDED.write_text(json.dumps({"python": _python(), "calls": calls}, indent=1) + "\n")


if __name__ == "__main__":
    assert not missing(), missing()
    record()
