"""The server of ``fresh``: forks a process for each request, which makes the calls."""

from __future__ import annotations

import json
import os
import sys
import traceback
from typing import Any

import distckpt
from distckpt.bench.calls import Calls, Figures
from distckpt.bench.contender import Contender
from distckpt.bench.fresh import Answer, Asked
from distckpt.bench.ours import Ours
from distckpt.bench.peers import PEERS, why_unusable
from distckpt.bench.results import OURS
from distckpt.bench.team import ContenderFailed, Team
from distckpt.bench.workloads import build


def serve() -> None:
    """Take requests from the standard input until it ends; one line an answer."""
    answers = os.dup(1)
    os.dup2(2, 1)  # whatever a peer prints is no answer
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _answer(json.loads(line), answers)
        _, status = os.waitpid(pid, 0)
        if status != 0:
            code = os.waitstatus_to_exitcode(status)
            _write(answers, Answer(_library(), {}, f"a process ended with code {code}"))


def _answer(request: dict[str, Any], answers: int) -> None:
    """Answer, and end this process."""
    code = 1
    try:
        os.environ.update(request["ranks"])
        figures, problem = _measure(Asked(**request["asked"]))
        _write(answers, Answer(_library(), figures, problem))
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        # Threads of what has failed may be waiting for ranks that are gone.
        os._exit(code)


def _write(answers: int, answer: Answer) -> None:
    os.write(answers, answer.to_json().encode() + b"\n")


def _library() -> str:
    return os.path.abspath(str(distckpt.__file__))


def _measure(asked: Asked) -> tuple[dict[str, list[float]], str]:
    figures: dict[str, list[float]] = {}
    team = Team(asked.use_cuda, asked.timeout_seconds)
    workload = build(asked.workload, asked.scale, team, asked.use_cuda)
    if asked.contender != OURS:
        why_unusable(asked.contender)  # imports it, as a program does at its top
    calls = Calls(workload, team)
    make = Ours if asked.contender == OURS else PEERS[asked.contender]
    contenders: list[Contender] = []

    def add(found: Figures) -> None:
        for row, value in found.items():
            figures.setdefault(row, []).append(value)

    try:
        made = team.timed(lambda: contenders.append(make(workload, team, asked.folder)))
        add({"made": made.seconds})
        contenders[0].num_saves = asked.num_saves
        for call in asked.calls:
            add(calls.run(contenders[0], call))
        calls.attempt(contenders[0], contenders[0].close)
    except ContenderFailed as error:
        return {}, str(error)
    return figures, ""
