"""Ranks that are killed, stopped, cut off or elsewhere: named in time, on every survivor.

A killed rank is named within a second of its death on every rank that waits; one that is
stopped, cut off or elsewhere at the deadline; no call outlasts that by more than a second.
"""

from __future__ import annotations

import ctypes
import json
import os
import re
import shutil
import signal
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from harness import EVERYTHING, run_ranks, values_of
from outcome_helpers import assert_all_whole, committed, make_checkpoint, outcome

from distckpt import Checkpoint, CheckpointManager, PerRank
from distckpt.comm import GroupChannel
from distckpt.messages import Phase

DEADLINE_SECONDS = 1.2
LATE_SECONDS = 1.0
# Processes that start at once slow each other down on a small machine.
MAX_RANKS_AT_A_TIME = 12

CLAIM = ("CLAIM", "PROBE")
SAVE = ("DECIDE", "WRITE", "WRITE answer")
RESTORE = ("CANDIDATE", "PLAN", "READ", "APPLY")
PHASES = (*CLAIM, *SAVE, *RESTORE)


def _manager(checkpoint, directory, seconds=30.0):
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
        with _manager(checkpoint, directory) as first:
            first.save()
    manager = _manager(checkpoint, directory, DEADLINE_SECONDS)
    if phase in SAVE:
        manager.restore_or_initialize()
    strike = Strike(directory, how, rank)
    dist.barrier()
    started = time.monotonic()
    if rank == victim:
        _arm(phase, strike)
    call = manager.save if phase in SAVE else manager.restore_or_initialize
    found = outcome(_told, call)
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
    }


class Told(Exception):
    """Carries what an error says beside its text."""


def _told(call):
    try:
        return call()
    except Exception as error:
        told = (type(error).__name__, getattr(error, "ranks", None), str(error))
        raise Told(json.dumps(told)) from error


def _lose(directory, world_size, how, phase, victim):
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
        assert seen["later"].seconds < 0.2, (label, seen["later"])
        assert how == "kill" or seen["waited"] >= DEADLINE_SECONDS, (label, seen)
        late.append(seen["noticed"] - (0 if how == "kill" else DEADLINE_SECONDS))
    assert max(late) < LATE_SECONDS, (label, late)
    assert_all_whole(directory) if committed(directory) else None
    return max(late)


# Slow is not lost


def _write_slowly(rank, directory):
    """Save for three times as long as the deadline, one call at a time."""
    tensors = {f"t{index}": torch.full((2**19,), float(index)) for index in range(10)}
    checkpoint = Checkpoint(slow=PerRank(tensors if rank == 1 else {}))
    manager = _manager(checkpoint, directory, DEADLINE_SECONDS)
    real = os.pwritev

    def slowly(*arguments):
        time.sleep(0.3 * DEADLINE_SECONDS)
        return real(*arguments)

    os.pwritev = slowly
    started = time.monotonic()
    return manager.save(), time.monotonic() - started


def test_a_slow_writer_is_waited_for_while_it_gets_on(tmp_path):
    """The deadline of the others counts from its last sign of progress."""
    directory = str(tmp_path / "run")
    for path, seconds in values_of(run_ranks(_write_slowly, 4, directory)):
        assert path == f"{directory}/ckpt-1"
        assert seconds > 3 * DEADLINE_SECONDS


# A read that hangs


def _hang_in_a_read(rank, directory):
    checkpoint = make_checkpoint()
    with _manager(checkpoint, directory) as manager:
        manager.save()
    manager = _manager(checkpoint, directory, DEADLINE_SECONDS)
    answers = threading.Event()
    real = os.preadv

    def hang(descriptor, buffers, offset):
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name.endswith(".safetensors") and offset >= 4096:  # a tensor's bytes
            answers.wait(30)
        return real(descriptor, buffers, offset)

    if rank == 1:
        os.preadv = hang
    first = outcome(manager.restore_or_initialize)
    refused = outcome(manager.save)
    os.preadv = real
    answers.set()
    return first, refused, outcome(manager.restore_or_initialize), outcome(manager.save)


def test_a_read_that_hangs_ends_the_restore_on_all_ranks(tmp_path):
    """No older checkpoint is tried behind the same call; later all is well again."""
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_hang_in_a_read, 2, directory))
    for first, refused, second, saved in results:
        assert first.kind == "StorageTimeout" and first.text == results[0][0].text
        assert "rank 1: read " in first.text and "rank-0000" in first.text
        assert first.seconds < DEADLINE_SECONDS + 1
        assert refused.kind == "RestoreFailed" and "mixture" in refused.text
        assert second.text == f"{directory}/ckpt-1", second
        assert saved.kind == "ok", saved


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


@pytest.fixture
def network():
    """Make namespaces for as many ranks as a test asks for."""
    if shutil.which("ip") is None or shutil.which("iptables") is None:
        pytest.skip("there is no ip or no iptables command here")
    made = []

    def make(size):
        # A name of its own: the kernel removes the last test's devices when it likes.
        made.append(Network(f"d{os.urandom(3).hex()}", size))
        try:
            made[0].build()
        except NoNetwork as error:
            pytest.skip(f"network namespaces cannot be made here: {error}")
        return made[0]

    yield make
    for one in made:
        one.close()


def _enter_namespace(name):
    """Move this thread, from which all others come, into a network namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/var/run/netns/{name}") as handle:
        if libc.setns(handle.fileno(), 0x40000000) != 0:  # CLONE_NEWNET
            raise OSError(ctypes.get_errno(), "setns")


def _be_cut_off(rank, directory, names, devices, chief_host, port):
    """Save together; then the last rank's packets are dropped, and all save again."""
    _enter_namespace(names[rank])
    os.environ.update(GLOO_SOCKET_IFNAME=devices[rank], MASTER_ADDR=chief_host)
    dist.init_process_group(
        "gloo",
        init_method=f"tcp://{chief_host}:{port}",
        rank=rank,
        world_size=len(names),
        timeout=timedelta(seconds=60),
    )
    manager = _manager(make_checkpoint(), directory, DEADLINE_SECONDS)
    manager.save()
    Path(f"{directory}.saved-{rank}").touch()
    while not os.path.exists(f"{directory}.cut"):
        time.sleep(0.01)
    started = time.monotonic()
    found = outcome(_told, manager.save)
    return found, time.monotonic() - started


@pytest.mark.parametrize("world_size", [2, 4, 8])
@pytest.mark.parametrize("victim", ["chief", "last"])
def test_a_rank_that_is_cut_off_is_named_at_the_deadline(
    tmp_path, network, world_size, victim, report_figures
):
    """Its packets are dropped without a word: no connection breaks, nothing arrives."""
    net = network(world_size)
    lost = 0 if victim == "chief" else world_size - 1
    directory = str(tmp_path / "run")
    arguments = (net.names, [net.device(i) for i in range(world_size)], net.host(0), 29500)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(
            run_ranks, _be_cut_off, world_size, directory, *arguments, process_group=False
        )
        saved = [Path(f"{directory}.saved-{rank}") for rank in range(world_size)]
        while not running.done() and not all(path.exists() for path in saved):
            time.sleep(0.02)
        net.cut_off(lost)
        Path(f"{directory}.cut").touch()
        results = values_of(running.result())
    late = []
    for rank, (found, seconds) in enumerate(results):
        kind, ranks, text = json.loads(found.text)
        # Seen from the lost rank, it is the chief that does not answer.
        named = 0 if rank == lost else lost
        if rank != lost or rank != 0:
            assert ranks == [named], (rank, text)
        assert kind == "PeerTimeout", (rank, text)
        assert seconds >= DEADLINE_SECONDS
        late.append(seconds - DEADLINE_SECONDS)
    assert max(late) < LATE_SECONDS, late
    assert committed(directory) == ["ckpt-1"]
    report_figures(f"named at most {max(late):.3f} s after the deadline")


CASES = {
    *product((2, 4), ("kill",), PHASES),
    *product((8,), ("kill",), ("WRITE answer", "READ")),
    *product((4,), ("stop",), ("PROBE", "WRITE", "READ")),
    *product((2, 8), ("stop",), ("WRITE",)),
    *product((4,), ("absent",), ("PROBE", "DECIDE", "WRITE", "READ")),
    *product((2, 8), ("absent",), ("WRITE",)),
}
if EVERYTHING:
    CASES |= {
        *product((2, 4, 8), ("kill",), PHASES),
        *product((4,), ("stop",), PHASES),
        *product((2, 8), ("stop",), ("PROBE", "WRITE", "READ")),
        *product((2, 8), ("absent",), ("DECIDE",)),
    }


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("world_size", "how"), sorted({(size, how) for size, how, _ in CASES})
)
def test_every_survivor_names_the_lost_rank_in_time(
    tmp_path, world_size, how, report_figures
):
    """Any phase, the chief or another."""
    jobs = [
        (phase, victim)
        for size, kind, phase in sorted(CASES)
        for victim in (0, world_size - 1)
        if (size, kind) == (world_size, how)
        # Once it has voted, the others need only the chief: see test_job_crashes.py.
        and not (phase == "WRITE answer" and (victim or how == "absent"))
    ]
    with ThreadPoolExecutor(min(4, MAX_RANKS_AT_A_TIME // world_size)) as pool:
        running = [
            pool.submit(
                _lose,
                str(tmp_path / f"{phase.replace(' ', '-')}-{victim}"),
                world_size,
                how,
                phase,
                victim,
            )
            for phase, victim in jobs
        ]
    late = sorted(one.result() for one in running)
    since = "its death" if how == "kill" else "the deadline"
    report_figures(
        f"{how:6} {world_size} ranks, {len(jobs)} jobs: named {late[len(late) // 2]:.3f} s "
        f"(median) to {late[-1]:.3f} s after {since}"
    )
