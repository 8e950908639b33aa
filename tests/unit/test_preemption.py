"""Signals that only set a flag, and do what they always did if nobody takes it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from distckpt import preemption
from distckpt.preemption import Notice

pytestmark = pytest.mark.alone

# Time enough for a thread to hear of a signal, on a busy machine.
SOON_SECONDS = 5.0


@pytest.fixture
def begun():
    """Make notices that are ended after the test."""
    notices = []

    def begin(*signals):
        notices.append(Notice(signals))
        notices[-1].begin()
        return notices[-1]

    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)}
    yield begin
    for notice in notices:
        notice.take()
        notice.end()
    assert {number: signal.getsignal(number) for number in before} == before
    assert preemption._process._reading is None


def wait_until(condition):
    deadline = time.monotonic() + SOON_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not come"
        time.sleep(0.01)


def run(body, *, preamble="", seconds=20):
    """Run a program; returns how it ended, what it printed, and after how long."""
    program = (
        "import os, signal, sys, threading, time\n"
        "from distckpt import preemption\n"
        f"preemption._UNTAKEN_SECONDS = 0.5\n{textwrap.dedent(preamble)}\n"
        "notice = preemption.Notice(('SIGTERM',))\n"
        f"notice.begin()\n{textwrap.dedent(body)}"
    )
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=seconds
    )
    return done.returncode, done.stdout + done.stderr, time.monotonic() - began


def test_signal_sets_the_flag_and_nothing_else(begun):
    notice = begun("SIGTERM")
    assert notice.since is None
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: notice.since is not None)
    first = notice.since
    os.kill(os.getpid(), signal.SIGTERM)
    assert notice.since == first, "the first one counts"


def test_flag_that_one_manager_takes_has_reached_the_program(begun):
    """Another one, which is asked no more, must not end the process for it."""
    one, other = begun("SIGTERM"), begun("SIGTERM")
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: one.since is not None and other.since is not None)
    later = time.monotonic() + 1000
    assert one.untaken(later) == other.untaken(later) == signal.SIGTERM
    one.take()
    assert one.untaken(later) is other.untaken(later) is None


def test_other_signals_are_nobodys_business(begun):
    notice = begun("SIGUSR1")
    heard = []
    before = signal.signal(signal.SIGUSR2, lambda *_: heard.append(True))
    try:
        os.kill(os.getpid(), signal.SIGUSR2)
        wait_until(lambda: heard)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert notice.since is None


def test_every_manager_is_told(begun):
    one, other, third = begun("SIGTERM"), begun("SIGTERM", "SIGUSR1"), begun("SIGUSR1")
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: one.since is not None and other.since is not None)
    assert third.since is None
    one.take()
    one.end()
    assert signal.getsignal(signal.SIGTERM) == preemption._process._handle


def test_ended_notice_hears_nothing(begun):
    notice, other = begun("SIGTERM"), begun("SIGTERM")
    notice.end()
    os.kill(os.getpid(), signal.SIGTERM)
    wait_until(lambda: other.since is not None)
    assert notice.since is None


def test_flag_that_nobody_takes_ends_the_process_in_time():
    """Also while the main thread is in a call that never comes back to Python."""
    code, said, seconds = run(
        """
        import ctypes
        os.kill(os.getpid(), signal.SIGTERM)
        # Goes on sleeping when a signal has come, as a collective goes on waiting.
        while True:
            ctypes.CDLL(None).sleep(30)
        """
    )
    assert code == -signal.SIGTERM, said
    assert 0.4 < seconds < 5


def test_flag_that_is_taken_ends_nothing():
    code, said, _ = run(
        """
        os.kill(os.getpid(), signal.SIGTERM)
        notice.take()
        time.sleep(2)
        print("went on")
        """
    )
    assert (code, said) == (0, "went on\n")


def test_flag_is_kept_through_a_long_call_of_the_manager():
    """It has limits of its own; the time counts from its end."""
    code, said, seconds = run(
        """
        notice.enter()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)
        print("saved", flush=True)
        notice.leave()
        time.sleep(30)
        """
    )
    assert code == -signal.SIGTERM and said == "saved\n"
    assert 2.4 < seconds < 8


def test_slow_steps_have_the_time_of_three():
    code, said, _ = run(
        """
        for _ in range(2):
            notice.enter()
            notice.leave()
            time.sleep(1)
        notice.enter()
        notice.leave()
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)
        print("two more", flush=True)
        time.sleep(30)
        """
    )
    assert code == -signal.SIGTERM and said == "two more\n"


def test_handler_from_before_is_called_if_nobody_takes_the_flag():
    code, said, _ = run(
        """
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(3)
        """,
        preamble="""
        def old(number, frame):
            print("old handler", number)
            sys.exit(5)
        signal.signal(signal.SIGTERM, old)
        """,
    )
    assert (code, said) == (5, f"old handler {int(signal.SIGTERM)}\n")


def test_signal_that_was_ignored_goes_on_being_ignored():
    code, said, _ = run(
        """
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2)
        print("went on")
        """,
        preamble="signal.signal(signal.SIGTERM, signal.SIG_IGN)",
    )
    assert (code, said) == (0, "went on\n")


def test_end_without_a_signal_puts_the_handler_back():
    code, said, seconds = run("notice.end(); os.kill(os.getpid(), 15); time.sleep(30)")
    assert code == -signal.SIGTERM and not said and seconds < 5


def test_dropped_notice_lets_signals_pass():
    code, said, seconds = run(
        """
        del notice
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(30)
        """
    )
    assert code == -signal.SIGTERM and not said and seconds < 5


@pytest.mark.parametrize("how", ["fork", "forkserver", "spawn"])
def test_child_processes_end_when_they_are_told_to(tmp_path, how):
    """A data loader ends its workers by SIGTERM; they must not tell their parent."""
    program = tmp_path / "program.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import multiprocessing, time
            from distckpt import preemption

            def work():
                time.sleep(60)

            if __name__ == "__main__":
                notice = preemption.Notice(("SIGTERM",))
                notice.begin()
                worker = multiprocessing.get_context({how!r}).Process(target=work)
                worker.start()
                time.sleep(1)
                worker.terminate()
                worker.join(5)
                print(worker.exitcode, notice.since)
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(program)], capture_output=True, text=True, timeout=60
    )
    assert done.stdout == f"{-signal.SIGTERM} None\n", done.stderr


def test_wakeup_socket_of_somebody_else_stays_his(begun):
    """An event loop has one; then the thread learns of signals from our handler."""
    import socket

    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    before = signal.set_wakeup_fd(theirs.fileno())
    try:
        notice = begun("SIGTERM")
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: notice.since is not None)
        assert ours.recv(1) == bytes([signal.SIGTERM])
        notice.take()
        notice.end()
    finally:
        assert signal.set_wakeup_fd(before) == theirs.fileno()
        ours.close()
        theirs.close()


def test_thread_ends_with_the_last_notice(begun):
    def threads():
        return [t for t in threading.enumerate() if t.name == "distckpt-signals"]

    notice = begun("SIGTERM")
    assert len(threads()) == 1
    notice.end()
    wait_until(lambda: not threads())
