"""Calls that are the first of their process: asked for here, made in ``fresh_server``.

A server process imports what every call needs and does nothing else. For each request it
forks a process, which joins the other ranks, makes the model and then makes the calls. So
the caches, the memory, the connections and the imports inside of a call are those of a new
process, and only the imports at the top of a program are not repeated. This module does
without torch.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from dataclasses import asdict, dataclass
from typing import Any

# The benchmark comes from this folder, whichever folder the library comes from.
_BENCH = os.path.dirname(os.path.abspath(__file__))
_BOOT = """
import importlib.util, sys
import distckpt
folder = sys.argv[1]
spec = importlib.util.spec_from_file_location(
    "distckpt.bench", folder + "/__init__.py", submodule_search_locations=[folder])
module = importlib.util.module_from_spec(spec)
sys.modules["distckpt.bench"] = module
spec.loader.exec_module(module)
from distckpt.bench.fresh_server import serve
serve()
"""
# A launcher's agent keeps a store of its own, which the new processes do not use.
_OF_THE_AGENT = "TORCHELASTIC_"


@dataclass(frozen=True, slots=True)
class Asked:
    """Which calls one new process makes.

    Attributes:
        contender: Its name.
        workload: Its name.
        folder: Of the contender, the same on all ranks.
        num_saves: How many saves other processes have made in that folder.
        calls: Of ``calls.CALLS``, in this order.
    """

    contender: str
    workload: str
    scale: float
    use_cuda: bool
    timeout_seconds: float
    folder: str
    num_saves: int
    calls: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of a request.

    Attributes:
        library: The file that was imported as ``distckpt``.
        figures: Every figure of every call, by row.
        problem: Why there are none; "" if all is well.
    """

    library: str
    figures: dict[str, list[float]]
    problem: str

    def to_json(self) -> str:
        """Return it as one line."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Answer:
        """Read such a line."""
        return cls(**json.loads(text))


class Server:
    """Makes new processes of one rank, one at a time.

    Args:
        library: The folder that has the package ``distckpt``; None for the package that
            this process has imported.
        environment: Set in the server, in addition to that of this process.
    """

    def __init__(
        self, library: str | None = None, environment: dict[str, str] | None = None
    ) -> None:
        inherited = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(_OF_THE_AGENT)
        }
        if library is not None:
            others = inherited.get("PYTHONPATH")
            inherited["PYTHONPATH"] = os.pathsep.join(filter(None, [library, others]))
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BOOT, _BENCH],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # Python looks in the working folder first.
            cwd=library,
            env=inherited | (environment or {}),
            # So that the processes that it has made can be ended with it.
            start_new_session=True,
        )

    def ask(self, asked: Asked, ranks: dict[str, str]) -> None:
        """Have a new process make calls.

        Args:
            asked: Which.
            ranks: Environment that says which rank it is, and where it meets the others.
        """
        assert self._process.stdin is not None
        request: dict[str, Any] = {"asked": asdict(asked), "ranks": ranks}
        with suppress(BrokenPipeError):  # then the answer says that it has ended
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def answer(self, timeout_seconds: float) -> Answer:
        """Wait for what becomes of the request."""
        assert self._process.stdout is not None
        ready, _, _ = select.select([self._process.stdout], [], [], timeout_seconds)
        if not ready:
            return Answer("", {}, f"no answer after {timeout_seconds:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            code = self._process.wait()
            return Answer("", {}, f"the process for first calls ended with code {code}")
        return Answer.from_json(line)

    def close(self) -> None:
        """End the server, and whatever it has made."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def free_port() -> int:
    """Return a port on which nobody listens now."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return port


def ranks_environment(
    rank: int, world_size: int, local_rank: int, local_world_size: int, port: int
) -> dict[str, str]:
    """Return the environment that tells a process which rank it is, as launchers do."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_world_size),
        "MASTER_ADDR": os.environ.get("MASTER_ADDR", "127.0.0.1"),
        "MASTER_PORT": str(port),
    }
