"""Storage work on a thread of its own: results, errors, hangs, interrupts."""

from __future__ import annotations

import os
import signal
import threading
import time
import weakref

import pytest

from distckpt import calls
from distckpt.errors import StorageError, StorageTimeout
from distckpt.storage import posix
from distckpt.worker import Worker

pytestmark = pytest.mark.alone


def _hang(release):
    """Hang in a call that storage knows of, until released."""
    with posix._reported("fsync", "/some/file"):
        release.wait(10)
    return "late"


def test_result_and_error_come_back():
    worker = Worker(1.0)
    assert worker.finish(lambda: 7) == 7
    assert worker.run(lambda: threading.current_thread().name, lambda _: None) == (
        "distckpt-storage"
    )
    with pytest.raises(KeyError, match="x"):
        worker.finish(lambda: {}["x"])


def test_call_that_hangs_is_left_and_named():
    release = threading.Event()
    worker = Worker(0.2)
    started = time.monotonic()
    with pytest.raises(
        StorageTimeout, match=r"fsync /some/file: did not come back"
    ) as info:
        worker.finish(lambda: _hang(release))
    assert 0.2 <= time.monotonic() - started < 1.0
    assert (info.value.operation, info.value.path) == ("fsync", "/some/file")
    assert worker.current_call.operation == "fsync"
    # What comes next waits for it first: never two at a time.
    with pytest.raises(StorageTimeout):
        worker.finish(lambda: None)
    release.set()
    assert worker.finish(lambda: 3) == 3


def test_long_work_of_short_calls_is_no_hang(tmp_path):
    def body():
        for _ in range(8):
            posix.exists(str(tmp_path))
            time.sleep(0.05)
        return "done"

    assert Worker(0.1).finish(body) == "done"


def test_progress_is_told_while_waiting(tmp_path):
    told = []

    def body():
        for _ in range(10):
            posix.exists(str(tmp_path))
            time.sleep(0.05)
        time.sleep(0.3)

    Worker(5.0).run(body, told.append)
    assert True in told and False in told


def test_what_nobody_waits_for_ends_with_its_next_call(tmp_path):
    stopped = threading.Event()

    def body():
        try:
            while True:
                posix.exists(str(tmp_path))
                time.sleep(0.01)
        except StorageError as error:
            assert "nobody waits" in str(error)
            stopped.set()

    def give_up(_):
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        Worker(5.0).run(body, give_up)
    assert stopped.wait(5)


def test_first_interrupt_waits_for_what_must_be_finished():
    worker = Worker(5.0)
    done = []

    def body():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        done.append(True)
        return "committed"

    assert worker.finish(body) == "committed"
    assert done == [True]
    assert isinstance(worker.interrupt, KeyboardInterrupt)


def test_second_interrupt_waits_for_nothing():
    worker = Worker(5.0)
    release = threading.Event()

    def body():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGINT)
        release.wait(5)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        worker.finish(body)
    assert time.monotonic() - started < 2
    release.set()


def test_whatever_a_signal_raises_waits_too():
    """A handler's own exception must not leave a commit behind, either."""
    worker = Worker(5.0)
    done = []

    def raise_it(*_):
        raise TimeoutError("enough")

    def body():
        os.kill(os.getpid(), signal.SIGUSR2)
        time.sleep(0.3)
        done.append(True)

    before = signal.signal(signal.SIGUSR2, raise_it)
    try:
        worker.finish(body)
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert done == [True]
    with pytest.raises(TimeoutError, match="enough"):
        worker.raise_interrupt()
    worker.raise_interrupt()  # only once


def test_without_a_thread_to_be_had_the_work_is_done_all_the_same(monkeypatch):
    def fail(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    worker = Worker(1.0)
    assert worker.finish(lambda: 5) == 5
    with pytest.raises(KeyError):
        worker.finish(lambda: {}["x"])
    assert worker.finish(lambda: 6) == 6


def test_work_on_the_callers_own_thread_leaves_no_mark_on_it(monkeypatch, tmp_path):
    """What is given up there must not stop the caller's later calls."""

    def fail(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", fail)
    tasks = []

    def body():
        tasks.append(calls._thread.calls)

    Worker(1.0).run(body, lambda _: None)
    tasks[0].stopped = True
    assert posix.exists(str(tmp_path))


def test_filling_tensors_waits_for_what_another_manager_has_left_behind():
    release = threading.Event()
    with pytest.raises(StorageTimeout):
        Worker(0.2).run(lambda: _hang(release), lambda _: None, fills_tensors=True)
    other = Worker(0.2)
    with pytest.raises(StorageTimeout, match="/some/file"):
        other.run(lambda: None, lambda _: None, fills_tensors=True)
    assert other.run(lambda: 1, lambda _: None) == 1  # other work need not wait
    release.set()
    assert other.run(lambda: 2, lambda _: None, fills_tensors=True) == 2


def test_interrupt_ends_what_may_be_given_up(tmp_path):
    worker = Worker(5.0)
    ended = threading.Event()

    def body():
        os.kill(os.getpid(), signal.SIGINT)
        try:
            while True:
                posix.exists(str(tmp_path))
                time.sleep(0.01)
        finally:
            ended.set()

    with pytest.raises(KeyboardInterrupt):
        worker.run(body, lambda _: None)
    assert ended.wait(5)


def test_a_result_is_not_kept():
    """Tensors and files of one task must not live until the next."""
    worker = Worker(5.0)

    class Big:
        pass

    refs = []

    def body():
        big = Big()
        refs.append(weakref.ref(big))
        return big

    worker.finish(body)
    assert refs[0]() is None
