"""Two hosts, each a network namespace with a torchrun of its own; one is lost.

An elastic job (``--nnodes 1:2``) of a sharded model loses the chief's host in the middle of
a commit: cut off, and its worker frozen. It shrinks to the other host and goes on from the
newest commit. Then the frozen chief wakes up: it is fenced, and told so. A new launcher on
its host lets the job grow again.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from harness import EVERYTHING
from lost_peer_helpers import Network, NoNetwork, network_of
from notes import Notes

from distckpt.readers import read_record
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.verify import verify_attempt

HERE = Path(__file__).parent
WORKER = HERE / "host_worker.py"
PORT = 29400
_SERVE = (
    "import sys, time; from torch.distributed import TCPStore;"
    "store = TCPStore(sys.argv[1], int(sys.argv[2]), None, True, wait_for_workers=False);"
    "print('there', flush=True); time.sleep(1000)"
)
# An agent that shares its store remembers the first one that it had, also when the job
# grows and others begin with a new one (torch 2.13, dynamic_rendezvous.py).
_ENVIRONMENT = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
# Else a host that is gone is noticed after 15 seconds, and others are waited for for 30.
_RENDEZVOUS = "is_host=false,last_call_timeout=1,keep_alive_interval=1,join_timeout=120"


class Hosts:
    """A launcher on each host, and a third host with the store that they meet at."""

    def __init__(self, network: Network, folder: Path) -> None:
        self._network = network
        self._folder = folder
        self.directory = str(folder / "run")
        self.notes = Notes(str(folder / "notes"))
        self._launchers: dict[int, subprocess.Popen[bytes]] = {}
        self._store = self._enter(2, [sys.executable, "-c", _SERVE, self._meet, str(PORT)])
        assert self._store.stdout is not None
        assert self._store.stdout.readline() == b"there\n"

    @property
    def _meet(self) -> str:
        return self._network.host(2)

    def _enter(self, index: int, command: list[str], **environment: str) -> Any:
        inside = ["ip", "netns", "exec", self._network.names[index], *command]
        with open(self._folder / f"log-{index}", "ab") as log:
            return subprocess.Popen(
                inside,
                stdout=subprocess.PIPE if index == 2 else log,
                stderr=log,
                env={**os.environ, **_ENVIRONMENT, **environment},
            )

    def launch(self, index: int) -> None:
        """Start a launcher on a host."""
        command = [sys.executable, "-m", "torch.distributed.run"]
        command += ["--nnodes", "1:2", "--nproc-per-node", "1", "--max-restarts", "100"]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"{self._meet}:{PORT}"]
        command += ["--rdzv-id", "two-hosts", "--rdzv-conf", _RENDEZVOUS]
        command += ["--local-addr", self._network.host(index), "--monitor-interval", "0.1"]
        command += [str(WORKER), self.directory, str(self._folder / "notes")]
        device = self._network.device(index)
        self._launchers[index] = self._enter(
            index, command, GLOO_SOCKET_IFNAME=device, HOST=str(index)
        )

    def launch_again(self, index: int) -> None:
        """Start another launcher on a host in the place of the first."""
        self._launchers[index].kill()
        self._launchers[index].wait()
        self.launch(index)

    def freeze_the_chief(self) -> None:
        """Let it stop at its next commit."""
        (self._folder / "notes.freeze").touch()
        self.wait_for(lambda: not (self._folder / "notes.freeze").exists(), "a commit")

    def told(self, what: str) -> list[list[Any]]:
        """Return what workers have told of one kind."""
        return self.notes.read(what)

    def wait_for(self, condition: Callable[[], object], what: str) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}:\n{self._words()}"
            time.sleep(0.05)

    def _words(self) -> str:
        logs = sorted(self._folder.glob("log-*"))
        return "\n".join(log.read_text(errors="replace")[-3000:] for log in logs)

    def close(self) -> None:
        """End everything."""
        for process in (*self._launchers.values(), self._store):
            process.kill()
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
        for _, _, pid, *_ in self.told("started"):
            with suppress(OSError):
                if str(WORKER).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    os.kill(pid, signal.SIGKILL)


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Hosts, Network]]:
    """Make the hosts; skips where no namespaces can be made."""
    try:
        with network_of(3) as network:
            hosts = Hosts(network, folder)
            try:
                yield hosts, network
            finally:
                hosts.close()
    except NoNetwork as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")


@pytest.mark.long
@pytest.mark.skipif(
    not EVERYTHING, reason="takes a minute and a half; set DISTCKPT_EVERY_CRASH=1"
)
@pytest.mark.timeout(1500)
def test_job_shrinks_fences_its_zombie_and_grows_again(
    tmp_path: Path, report_figures: Callable[[str], None]
):
    """Nothing that was acknowledged is lost on the way, and all of it is whole."""
    with two_hosts(tmp_path) as (hosts, network):
        hosts.launch(0)
        hosts.launch(1)

        def saved(world_size: int, after: float) -> list[list[Any]]:
            return [t for t in hosts.told("saved") if t[4] == world_size and t[1] > after]

        hosts.wait_for(lambda: len(saved(2, 0.0)) >= 6, "saves of two")
        hosts.freeze_the_chief()
        ((zombie, chief),) = [
            (host, pid) for host, _, pid, rank, size in hosts.told("started") if rank == 0
        ][-1:]
        network.cut_off(int(zombie))
        lost_at = time.monotonic()
        acknowledged = max(int(name.split("-")[1]) for _, _, name, *_ in saved(2, 0.0))
        hosts.wait_for(lambda: len(saved(1, lost_at)) >= 2, "saves of one")
        alone = [t for t in hosts.told("restored") if t[1] > lost_at and t[4] == 1]
        number = int(alone[0][2].split("-")[1])
        assert number >= acknowledged, "it went on behind what was acknowledged"
        shrunk = alone[0][1] - lost_at

        network.join_again(int(zombie))
        os.kill(chief, signal.SIGCONT)
        hosts.wait_for(
            lambda: [t for t in hosts.told("left") if t[0] == zombie and t[1] > lost_at],
            "the zombie's end",
        )
        told = [t for t in hosts.told("left") if t[0] == zombie and t[1] > lost_at]
        assert told[0][2] == "FencedError" and "has been claimed" in told[0][3], told

        woken_at = time.monotonic()
        hosts.launch_again(int(zombie))
        hosts.wait_for(lambda: len(saved(2, woken_at)) >= 4, "saves of two again")
        grown = [t for t in hosts.told("restored") if t[1] > woken_at and t[4] == 2]
        record = read_record(RunDirectory.at(hosts.directory))
        assert record is not None
        for entry in record.committed:
            path = os.path.join(hosts.directory, entry.attempt.published)
            report = verify_attempt(AttemptDirectory.at(path), entry.manifest)
            newer = read_record(RunDirectory.at(hosts.directory))
            assert report.ok or (newer is not None and entry not in newer.committed), report
        report_figures(
            f"{shrunk:.1f} s from the loss to one host's restore, "
            f"{grown[0][1] - woken_at:.1f} s from the zombie's end to two again"
        )
