"""The roll call and its verdicts, over real connections within one process."""

from __future__ import annotations

import gc
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from distckpt import line, liveness
from distckpt.line import Address
from distckpt.liveness import HERE, WAIT, Place, Round

pytestmark = pytest.mark.alone

ROUND_3 = Round("decisions", 3)
HERE_IN_ROUND_3 = Place("waiting in phase WRITE", {"decisions": 3})


class Rank:
    """One rank of a job that lives in this process."""

    def __init__(self):
        self.place = HERE_IN_ROUND_3
        self.asleep = threading.Event()
        self.liveness = None

    def where(self):
        while self.asleep.is_set():
            time.sleep(0.01)
        return self.place


@pytest.fixture
def job():
    """Connect so many ranks: ``job(3)`` returns them, the chief first."""
    made = []

    def connect(world_size):
        ranks = [Rank() for _ in range(world_size)]
        chief = ranks[0].liveness = liveness.listen(world_size, "secret", ranks[0].where)
        for number, rank in enumerate(ranks[1:], 1):
            rank.liveness = liveness.join(chief.address, number, rank.where)
        made.extend(ranks)
        return ranks

    yield connect
    for rank in made:
        rank.asleep.clear()
        if rank.liveness is not None:
            rank.liveness.leave()


def _wait_for_verdict(rank, seconds=2.0):
    deadline = time.monotonic() + seconds
    while rank.liveness.verdict is None:
        assert time.monotonic() < deadline, "no verdict"
        time.sleep(0.002)
    return rank.liveness.verdict


@pytest.mark.parametrize("asker", [0, 2])
def test_all_in_one_round_is_no_verdict(job, asker):
    ranks = job(3)
    assert ranks[asker].liveness.call_roll(ROUND_3) == HERE
    assert all(rank.liveness.verdict is None for rank in ranks)


@pytest.mark.parametrize("asker", [0, 2])
def test_a_chief_at_work_is_waited_for(job, asker):
    ranks = job(3)
    ranks[0].place = HERE_IN_ROUND_3._replace(deciding=("decisions",))
    assert ranks[asker].liveness.call_roll(ROUND_3) == WAIT
    ranks[0].place = HERE_IN_ROUND_3._replace(deciding=("commits",))
    assert ranks[asker].liveness.call_roll(ROUND_3) == HERE


@pytest.mark.parametrize("asker", [0, 1])
def test_who_does_not_answer_is_named_to_all(job, asker):
    ranks = job(4)
    ranks[2].asleep.set()
    started = time.monotonic()
    verdict = ranks[asker].liveness.call_roll(ROUND_3)
    assert time.monotonic() - started < 0.9
    assert (verdict.died, verdict.ranks) == (False, (2,))
    assert "rank 2 (pid" in verdict.text and "no answer" in verdict.text
    for rank in (ranks[0], ranks[1], ranks[3]):
        assert _wait_for_verdict(rank) == verdict


def test_who_is_elsewhere_is_named_with_what_it_does(job):
    ranks = job(3)
    at = {"decisions": 2, "commits": 9}
    ranks[1].place = Place("in none of this manager's calls", at)
    verdict = ranks[2].liveness.call_roll(ROUND_3)
    assert (verdict.died, verdict.ranks) == (False, (1,))
    assert "in none of this manager's calls" in verdict.text


@pytest.mark.parametrize(
    "place",
    [
        Place("further on", {"decisions": 4}),
        Place("through", {"decisions": 3}),
        Place("in the other channel", {"decisions": 3, "commits": 2}),
    ],
)
def test_who_is_through_is_not_missing(job, place):
    ranks = job(3)
    ranks[1].place = place
    assert ranks[2].liveness.call_roll(ROUND_3) == HERE


def test_a_silent_chief_is_named_by_who_asks(job):
    ranks = job(3)
    ranks[0].asleep.set()
    started = time.monotonic()
    verdict = ranks[1].liveness.call_roll(ROUND_3)
    assert time.monotonic() - started < 0.9
    assert verdict.ranks == (0,) and not verdict.died


def test_a_broken_connection_between_living_ranks_is_a_loss(job):
    ranks = job(2)
    verdict = ranks[1].liveness.call_roll(ROUND_3, broken=True)
    assert (verdict.died, verdict.ranks) == (True, ())


@pytest.mark.parametrize(("leaver", "others"), [(2, (0, 1)), (0, (1, 2))])
def test_leaving_by_an_error_is_told_at_once(job, leaver, others):
    ranks = job(3)
    ranks[leaver].liveness.leave("ValueError: bad luck")
    for other in others:
        verdict = _wait_for_verdict(ranks[other])
        assert (verdict.died, verdict.ranks) == (True, (leaver,))
        assert "ValueError: bad luck" in verdict.text


def test_closing_is_no_loss_but_whoever_waits_is_told(job):
    ranks = job(3)
    ranks[2].liveness.leave()
    time.sleep(0.1)
    assert ranks[0].liveness.verdict is None
    verdict = ranks[1].liveness.call_roll(ROUND_3)
    assert verdict.ranks == (2,) and "closed its manager" in verdict.text


def test_who_is_silent_goes_before_who_has_closed(job):
    ranks = job(4)
    ranks[2].liveness.leave()
    ranks[3].asleep.set()
    verdict = ranks[1].liveness.call_roll(ROUND_3)
    assert (verdict.died, verdict.ranks) == (False, (3,))


def test_who_answers_and_then_closes_counts_once(job):
    """Or the roll would end early, and name a rank that has had no time to answer."""
    ranks = job(4)
    ranks[3].asleep.set()
    asked = threading.Thread(target=ranks[1].liveness.call_roll, args=(ROUND_3,))
    asked.start()
    time.sleep(0.1)  # ranks 1 and 2 have answered
    ranks[2].liveness.leave()
    time.sleep(0.1)
    ranks[3].asleep.clear()
    asked.join()
    assert ranks[0].liveness.verdict is None


def test_a_rank_that_joins_late_is_told(job):
    here, late = Rank(), Rank()
    here.liveness = chief = liveness.listen(4, "secret", here.where)
    gone = liveness.join(chief.address, 1, Rank().where)
    gone.leave("KeyboardInterrupt")
    _wait_for_verdict(here)
    late.liveness = liveness.join(chief.address, 2, late.where)
    assert _wait_for_verdict(late).ranks == (1,)
    late.liveness.leave()
    chief.leave()


def test_a_rank_may_try_again_until_all_have_joined(job):
    """It was welcomed too late the first time; that is no death."""
    here, again = Rank(), Rank()
    here.liveness = chief = liveness.listen(3, "secret", here.where)
    first = liveness.join(chief.address, 1, Rank().where)
    again.liveness = liveness.join(chief.address, 1, again.where)
    first.leave()
    other = Rank()
    other.liveness = liveness.join(chief.address, 2, other.where)
    assert again.liveness.call_roll(ROUND_3) == HERE
    for rank in (again, other, here):
        rank.liveness.leave()


def test_dropping_it_ends_thread_and_connection(job):
    threads = threading.active_count()
    ranks = job(3)
    ranks[1].liveness = None
    gc.collect()
    verdict = _wait_for_verdict(ranks[0])
    assert verdict.ranks == (1,)
    for rank in (ranks[0], ranks[2]):
        rank.liveness.leave()
    deadline = time.monotonic() + 5
    while threading.active_count() > threads:
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_the_first_verdict_stays(job):
    ranks = job(4)
    ranks[3].liveness.leave("first")
    first = _wait_for_verdict(ranks[1])
    ranks[2].liveness.leave("second")
    time.sleep(0.1)
    assert ranks[0].liveness.verdict == ranks[1].liveness.verdict == first


def test_progress_reaches_everybody_and_not_too_often(job):
    ranks = job(3)
    before = [rank.liveness.last_progress for rank in ranks]
    for _ in range(1000):
        ranks[1].liveness.note_progress()
    time.sleep(0.2)
    after = [rank.liveness.last_progress for rank in ranks]
    assert all(one > other for one, other in zip(after, before, strict=True))


_CHILD = """
import os, sys, time
from distckpt import liveness
from distckpt.line import Address
port = int(sys.argv[1])
here = liveness.Place("there", {"decisions": 3})
held = liveness.join(Address(("127.0.0.1",), port, "secret"), 1, lambda: here)
if os.fork() == 0:
    time.sleep(30)  # as a data loader's worker would
    os._exit(0)
print("connected", flush=True)
time.sleep(30)
"""


def test_a_killed_process_is_seen_at_once_though_its_children_live():
    """A forked child must not hold the connection open."""
    here = Rank()
    chief = liveness.listen(2, "secret", here.where)
    command = [sys.executable, "-c", _CHILD, str(chief.address.port)]
    child = subprocess.Popen(
        command, stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        assert child.stdout.readline() == "connected\n"
        here.liveness = chief
        child.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        verdict = _wait_for_verdict(here)
        assert time.monotonic() - killed < 1.0
        assert (verdict.died, verdict.ranks) == (True, (1,))
        assert f"pid {child.pid}" in verdict.text
    finally:
        os.killpg(child.pid, signal.SIGKILL)  # the grandchild, too
        child.communicate()
        chief.leave()


def _connect(address):
    return socket.create_connection(("127.0.0.1", address.port), 2)


@pytest.mark.parametrize(
    "said",
    [
        b'{"rank":1,"name":"x","token":"wrong"}\n',
        b'{"rank":7,"name":"x","token":"secret"}\n',
        b'{"rank":"1","token":"secret"}\n',
        b"[1,2]\n",
        b"GET / HTTP/1.0\r\n\r\n",
        b"x" * 100_000,
    ],
)
def test_strangers_are_turned_away(said):
    here = Rank()
    chief = liveness.listen(3, "secret", here.where)
    with _connect(chief.address) as stranger:
        stranger.sendall(said)
        stranger.settimeout(5)
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    assert chief.verdict is None
    chief.leave()


def test_unreachable_chief_is_an_error_that_says_what_was_tried():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = Address(("127.0.0.1", "no-such-host.invalid"), port, "secret")
    with pytest.raises(OSError, match=r"127\.0\.0\.1: .*no-such-host\.invalid: "):
        liveness.join(address, 1, Rank().where)


def test_wrong_listener_is_not_taken_for_the_chief():
    with socket.create_server(("127.0.0.1", 0)) as server:

        def greet():
            with server.accept()[0] as connection:
                connection.sendall(b"SSH-2.0")
                connection.recv(1000)

        threading.Thread(target=greet, daemon=True).start()
        address = Address(("127.0.0.1",), server.getsockname()[1], "secret")
        with pytest.raises(OSError, match="something else listens"):
            liveness.join(address, 1, Rank().where)


def test_addresses_end_with_the_loopback_device(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("RANK", "0")
    hosts = line.hosts_of_this_machine()
    assert hosts[0] == "127.0.0.1" and socket.gethostname() in hosts
    monkeypatch.delenv("MASTER_ADDR")
    assert line.hosts_of_this_machine()[-1] == "127.0.0.1"
