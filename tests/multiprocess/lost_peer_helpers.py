"""Jobs that lose a rank, or their network: what tests and campaigns of it share."""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch.distributed as dist
from harness import held_up_seconds, run_ranks, values_of
from outcome_helpers import (
    assert_all_whole,
    committed,
    make_checkpoint,
    outcome,
)

from distckpt import CheckpointManager
from distckpt.comm import GroupChannel
from distckpt.messages import Phase

DEADLINE_SECONDS = 1.2
LATE_SECONDS = 1.0

CLAIM = ("CLAIM", "PROBE")
SAVE = ("DECIDE", "WRITE", "WRITE answer")
RESTORE = ("CANDIDATE", "PLAN", "READ", "APPLY")
PHASES = (*CLAIM, *SAVE, *RESTORE)


def manager_of(checkpoint, directory, seconds=30.0):
    return CheckpointManager(
        checkpoint, directory, max_to_keep=None, timeout=timedelta(seconds=seconds)
    )


class Strike:
    """What befalls the victim: it says when, and is gone."""

    def __init__(self, directory, how, rank):
        self._path = Path(directory).parent / f"strike-{os.path.basename(directory)}"
        self._how = how
        self._pid = os.getpid()
        self._rank = rank

    def __call__(self):
        self._path.write_text(json.dumps([self._pid, time.monotonic()]))
        if self._how == "kill":
            os.kill(self._pid, signal.SIGKILL)
        elif self._how == "stop":
            os.kill(self._pid, signal.SIGSTOP)
        else:
            time.sleep(DEADLINE_SECONDS + LATE_SECONDS)  # alive, and elsewhere

    @property
    def pid_and_time(self):
        return json.loads(self._path.read_text())


def _arm(phase, strike):
    """Strike when this process comes to a phase; or, if asked for, right after its vote."""
    name, _, answer = phase.partition(" ")
    consult, broadcast = GroupChannel.consult, GroupChannel._broadcast
    now_in = []

    def consult_or_strike(self, vote, decide, **more):
        now_in[:] = [vote.phase]
        if vote.phase is Phase[name] and not answer:
            strike()
        return consult(self, vote, decide, **more)

    def broadcast_or_strike(self, waiting, data):
        if answer and now_in == [Phase[name]]:
            strike()
        return broadcast(self, waiting, data)

    GroupChannel.consult = consult_or_strike
    GroupChannel._broadcast = broadcast_or_strike


def _call_that_loses_a_rank(rank, directory, how, phase, victim):
    checkpoint = make_checkpoint()
    if phase not in CLAIM:
        with manager_of(checkpoint, directory) as first:
            first.save()
    manager = manager_of(checkpoint, directory, DEADLINE_SECONDS)
    if phase in SAVE:
        manager.restore_or_initialize()
    strike = Strike(directory, how, rank)
    dist.barrier()
    held_up, started = held_up_seconds(), time.monotonic()
    if rank == victim:
        _arm(phase, strike)
    call = manager.save if phase in SAVE else manager.restore_or_initialize
    found = outcome(told_as_json, call)
    ended = time.monotonic()
    later = outcome(manager.save)
    if how == "stop" and rank == min({0, 1} - {victim}):
        time.sleep(1.0)  # until all have seen it
        os.kill(strike.pid_and_time[0], signal.SIGKILL)
    return {
        "found": found,
        "waited": ended - started,
        "later": later,
        "noticed": ended - max(started, strike.pid_and_time[1]),
        "held up": held_up_seconds() - held_up,
    }


class Told(Exception):
    """Carries what an error says beside its text."""


def told_as_json(call):
    try:
        return call()
    except Exception as error:
        told = (type(error).__name__, getattr(error, "ranks", None), str(error))
        raise Told(json.dumps(told)) from error


def lose(directory, world_size, how, phase, victim):
    """Run a job that loses a rank; check what its survivors say; return how late it was."""
    label = f"{how} rank {victim} of {world_size} in {phase}"
    results = run_ranks(
        _call_that_loses_a_rank, world_size, directory, how, phase, victim, timeout=40
    )
    survivors = [r for rank, r in enumerate(results) if rank != victim]
    late = []
    for seen in values_of(survivors):
        assert seen["found"].kind == "Told", (label, seen)
        kind, ranks, text = json.loads(seen["found"].text)
        assert kind == ("PeerLost" if how == "kill" else "PeerTimeout"), (label, text)
        assert ranks == [victim], (label, ranks, text)
        assert re.search(rf"\brank {victim}\b", text), (label, text)
        assert re.search(rf"phase {phase.split()[0]}\b", text), (label, text)
        assert seen["later"].kind == kind, (label, seen["later"])
        assert seen["later"].net_seconds < 0.2, (label, seen["later"])
        assert how == "kill" or seen["waited"] >= DEADLINE_SECONDS, (label, seen)
        late.append(seen["noticed"] - (0 if how == "kill" else DEADLINE_SECONDS))
    # What one rank says in time comes late where another waits for a processor.
    held_up = sum(seen["held up"] for seen in values_of(survivors))
    assert max(late) - held_up < LATE_SECONDS, (label, late, held_up)
    assert_all_whole(directory) if committed(directory) else None
    return max(late)


# Dropped packets, between network namespaces of the test's own


class Network:
    """Namespaces joined by a bridge: each with an address, a loopback device, no world."""

    def __init__(self, tag, size):
        self._bridge = f"{tag}b"
        self.names = [f"{tag}{index}" for index in range(size)]

    def build(self):
        """Make all of it."""
        self._run("ip", "link", "add", self._bridge, "type", "bridge")
        self._run("ip", "link", "set", self._bridge, "up")
        for index, name in enumerate(self.names):
            inside, outside = f"{name}i", f"{name}o"
            self._run("ip", "netns", "add", name)
            self._run("ip", "link", "add", outside, "type", "veth", "peer", inside)
            self._run("ip", "link", "set", inside, "netns", name)
            self._run("ip", "link", "set", outside, "master", self._bridge, "up")
            enter = ("ip", "-n", name)
            self._run(*enter, "address", "add", f"{self.host(index)}/24", "dev", inside)
            self._run(*enter, "link", "set", inside, "up")
            self._run(*enter, "link", "set", "lo", "up")

    @staticmethod
    def host(index):
        """Return the address of one namespace."""
        return f"10.213.7.{index + 1}"

    def device(self, index):
        """Return its network device."""
        return f"{self.names[index]}i"

    def cut_off(self, index):
        """Drop every packet that would enter or leave a namespace, without a word."""
        for chain in ("INPUT", "OUTPUT"):
            enter = ("ip", "netns", "exec", self.names[index])
            device = ("-i" if chain == "INPUT" else "-o", self.device(index))
            self._run(*enter, "iptables", "-A", chain, *device, "-j", "DROP")

    def reset(self, index):
        """Answer every packet that would enter or leave a namespace with a reset."""
        for chain in ("INPUT", "OUTPUT"):
            enter = ("ip", "netns", "exec", self.names[index])
            device = ("-i" if chain == "INPUT" else "-o", self.device(index))
            reject = ("-j", "REJECT", "--reject-with", "tcp-reset")
            self._run(*enter, "iptables", "-A", chain, *device, "-p", "tcp", *reject)

    def join_again(self, index):
        """Let all packets through again."""
        enter = ("ip", "netns", "exec", self.names[index])
        self._run(*enter, "iptables", "-F")

    def close(self):
        """Remove all of it."""
        for name in self.names:
            self._run("ip", "netns", "delete", name, check=False)
            self._run("ip", "link", "delete", f"{name}o", check=False)
        self._run("ip", "link", "delete", self._bridge, check=False)

    def _run(self, *command, check=True):
        done = subprocess.run(command, capture_output=True, text=True)
        if check and done.returncode != 0:
            raise NoNetwork(f"{' '.join(command)}: {done.stderr.strip()}")


class NoNetwork(Exception):
    """This machine lets nobody make network namespaces."""


@contextmanager
def network_of(size: int) -> Iterator[Network]:
    """Make namespaces for as many ranks as are asked for.

    Raises:
        NoNetwork: They cannot be made here.
    """
    if shutil.which("ip") is None or shutil.which("iptables") is None:
        msg = "there is no ip or no iptables command here"
        raise NoNetwork(msg)
    # A name of its own: the kernel removes the last one's devices when it likes.
    network = Network(f"d{os.urandom(3).hex()}", size)
    try:
        network.build()
        yield network
    finally:
        network.close()


def enter_namespace(name):
    """Move this thread, from which all others come, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{name}") as handle:
        if libc.setns(handle.fileno(), 0x40000000) != 0:  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), "setns")


def _be_cut_off(rank, directory, names, devices, chief_host, port):
    """Save together; then the last rank's packets are dropped, and all save again."""
    enter_namespace(names[rank])
    os.environ.update(GLOO_SOCKET_IFNAME=devices[rank], MASTER_ADDR=chief_host)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{chief_host}:{port}",
        rank=rank,
        world_size=len(names),
        timeout=timedelta(seconds=60),
    )
    manager = manager_of(make_checkpoint(), directory, DEADLINE_SECONDS)
    manager.save()
    wait_for_strike(rank, directory)
    return outcome(told_as_json, manager.save)


def run_and_strike(function, world_size, directory, *arguments, strike):
    """Run ranks without a process group, and strike when all wait for it."""
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            run_ranks, function, world_size, directory, *arguments, process_group=False
        )
        waiting = [Path(f"{directory}.waiting-{rank}") for rank in range(world_size)]
        while not running.done() and not all(path.exists() for path in waiting):
            time.sleep(0.02)
        strike()
        Path(f"{directory}.struck").touch()
        return values_of(running.result())


def wait_for_strike(rank, directory):
    """Wait, in a rank that ``run_and_strike`` runs, until the strike has come."""
    Path(f"{directory}.waiting-{rank}").touch()
    while not os.path.exists(f"{directory}.struck"):
        time.sleep(0.01)


def lose_network(directory, network, how, lost):
    """Run a job whose packets are dropped, or reset, at one rank; check what all say.

    Returns:
        How long after the deadline the last one knew it.
    """
    world_size = len(network.names)
    devices = [network.device(index) for index in range(world_size)]
    arguments = (network.names, devices, network.host(0), 29500)
    strike = network.cut_off if how == "drop" else network.reset
    results = run_and_strike(
        _be_cut_off, world_size, directory, *arguments, strike=lambda: strike(lost)
    )
    late = []
    for rank, found in enumerate(results):
        kind, ranks, text = json.loads(found.text)
        # Seen from the lost rank, it is the chief that does not answer.
        named = 0 if rank == lost else lost
        if rank != lost or rank != 0:
            assert ranks == [named], (rank, text)
        if how == "drop":
            # No connection breaks, nothing arrives.
            assert kind == "PeerTimeout", (rank, text)
            assert found.seconds >= DEADLINE_SECONDS, (rank, text)
        assert kind in ("PeerTimeout", "PeerLost"), (rank, text)
        late.append(found.seconds - DEADLINE_SECONDS)
    held_up = sum(found.held_up_seconds for found in results)
    assert max(late) - held_up < LATE_SECONDS, (late, held_up)
    assert committed(directory) == ["ckpt-1"]
    return max(late)
