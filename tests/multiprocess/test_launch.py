"""The files of launch/, copied and edited as a user would, start jobs that do as is said.

Hosts are network namespaces with names of their own. ``test_slurm.py`` has Slurm's file,
and ``test_launch_files.py`` what can be seen without starting a job.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from harness import EVERYTHING
from launch_helpers import INSTALLED, LAUNCH, edited, newest, small_program
from lost_peer_helpers import Network, NoNetwork, network_of

pytestmark = pytest.mark.timeout(1200)
_only_with_everything = pytest.mark.skipif(
    not EVERYTHING, reason="takes four minutes with others; set DISTCKPT_EVERY_CRASH=1"
)


def takes_long(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that only launch/torture.sh runs."""
    return pytest.mark.long(_only_with_everything(test))


_FOREVER = 10**6
_BE_HOST = 'hostname "$1"; mount --bind "$2" /etc/hosts; exec "${@:3}"'


class Launchers:
    """Launchers of one job, each with a log of its own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.started: list[subprocess.Popen[bytes]] = []

    def start(self, *command: str, **environment: str) -> subprocess.Popen[bytes]:
        """Start one more."""
        with open(self._folder / f"log-{len(self.started)}", "wb") as log:
            launcher = subprocess.Popen(
                command, stdout=log, stderr=log, env={**os.environ, **environment}
            )
        self.started.append(launcher)
        return launcher

    def words_of(self, index: int) -> str:
        """Return what one of them, and its workers, have said."""
        return (self._folder / f"log-{index}").read_text(errors="replace")

    @property
    def words(self) -> str:
        """What all have said."""
        return "\n".join(self.words_of(index) for index in range(len(self.started)))

    def wait_for(self, word: str, times: int = 1) -> None:
        """Wait until something was said."""
        self.wait_until(lambda: self.words.count(word) >= times, word)

    def wait_until(self, condition: Callable[[], bool], what: str) -> None:
        """Wait until something is so."""
        deadline = time.monotonic() + 120
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}:\n{self.words[-8000:]}"
            time.sleep(0.05)

    def close(self) -> None:
        """End all of it."""
        for launcher in self.started:
            launcher.terminate()
        for launcher in self.started:
            try:
                launcher.wait(400)
            finally:
                launcher.kill()


@pytest.fixture
def launchers(tmp_path: Path) -> Iterator[Launchers]:
    launchers = Launchers(tmp_path)
    yield launchers
    launchers.close()


@pytest.fixture
def network() -> Iterator[Network]:
    try:
        with network_of(2) as network:
            yield network
    except NoNetwork as error:
        pytest.skip(f"network namespaces cannot be made here: {error}")


def _on_host(network: Network, index: int, folder: Path, *command: str) -> list[str]:
    """Return what runs a command on one of two hosts, which know each other by name."""
    names = folder / "hosts"
    lines = ["127.0.0.1 localhost", *(f"{network.host(i)} host-{i}" for i in range(2))]
    names.write_text("".join(f"{line}\n" for line in lines))
    enter = ["ip", "netns", "exec", network.names[index], "unshare", "--uts"]
    return [*enter, "bash", "-euc", _BE_HOST, "-", f"host-{index}", str(names), *command]


def _hosts_script(folder: Path, hosts: str, steps: int) -> str:
    place = f"hosts={hosts}\nfirst_host=host-0\nport=29400\nprocesses=1"
    return str(edited("hosts.sh", folder, place, INSTALLED, small_program(folder, steps)))


@takes_long
def test_job_on_one_host_goes_on_when_it_is_started_again(tmp_path, launchers):
    places = ("processes=2", INSTALLED)
    script = edited("one_host.sh", tmp_path, *places, small_program(tmp_path, _FOREVER))
    first = launchers.start(str(script))
    launchers.wait_for("saved", 2)
    first.terminate()
    assert first.wait(400) != 0
    step = newest(tmp_path)
    assert f"told to stop at step {step};" in launchers.words

    script = edited("one_host.sh", tmp_path, *places, small_program(tmp_path, step + 20))
    assert launchers.start(str(script)).wait(400) == 0, launchers.words
    assert f"going on from step {step}" in launchers.words
    assert newest(tmp_path) == step + 20


@pytest.mark.full
def test_two_hosts_finish_a_job(tmp_path, launchers, network):
    script = _hosts_script(tmp_path, "2:2", 30)
    for index in range(2):
        launchers.start(*_on_host(network, index, tmp_path, script))
    statuses = [launcher.wait(400) for launcher in launchers.started]
    assert statuses == [0, 0], launchers.words
    assert "2 ranks" in launchers.words and "done at step 30" in launchers.words
    assert newest(tmp_path) == 30


@takes_long
def test_two_containers_finish_a_job(tmp_path, launchers, network):
    """With the command of the manifest's container, and what its pods would be told."""
    *_, job_set = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    (workers,) = job_set["spec"]["replicatedJobs"]
    (container,) = workers["template"]["spec"]["template"]["spec"]["containers"]
    # There is no GPU, and another program.
    command = [
        word.replace("--nproc-per-node gpu", "--nproc-per-node 1")
        for word in container["command"]
    ]
    program = subprocess.run(
        [
            "bash",
            "-euc",
            f'{small_program(tmp_path, 30)}\nprintf "%s\\n" "${{program[@]}}"',
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    for index in range(2):
        on_host = _on_host(
            network, index, tmp_path, "bash", "-euc", f'{INSTALLED}\nexec "$@"', "-"
        )
        told = {
            "RUN": "gpt",
            "HOSTS": "2",
            "HOST_INDEX": str(index),
            "FIRST_HOST": "host-0",
        }
        launchers.start(*on_host, *command, *program.stdout.splitlines(), **told)
    statuses = [launcher.wait(400) for launcher in launchers.started]
    assert statuses == [0, 0], launchers.words
    assert "2 ranks" in launchers.words and newest(tmp_path) == 30


@takes_long
def test_host_that_is_told_leaves_without_loss_and_comes_back(
    tmp_path, launchers, network, report_figures: Callable[[str], None]
):
    """A preempted host: the job saves, goes on on the other one, and grows again."""
    script = _hosts_script(tmp_path, "1:2", _FOREVER)
    for index in range(2):
        launchers.start(*_on_host(network, index, tmp_path, script))
    launchers.wait_for("saved", 3)
    told_at = time.monotonic()
    launchers.started[1].send_signal(signal.SIGTERM)
    assert launchers.started[1].wait(400) != 0
    left = time.monotonic() - told_at
    step = newest(tmp_path)
    assert f"told to stop at step {step};" in launchers.words
    launchers.wait_for(f"going on from step {step}")
    alone = time.monotonic() - told_at
    launchers.wait_until(lambda: newest(tmp_path) > step, "saves of one")

    back_at = time.monotonic()
    launchers.start(*_on_host(network, 1, tmp_path, script))
    launchers.wait_for("going on from step", 2)
    grown = time.monotonic() - back_at
    step = newest(tmp_path)
    launchers.wait_until(lambda: newest(tmp_path) > step, "saves of two again")
    for launcher in (launchers.started[0], launchers.started[2]):
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(400) != 0
    assert f"told to stop at step {newest(tmp_path)};" in launchers.words
    report_figures(
        f"{left:.1f} s from the signal to the launcher's end, {alone:.1f} s until the "
        f"other host went on, {grown:.1f} s from the host's return to two again"
    )
