"""A save under way: what waits for it, and what does not."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from distckpt.flight import Flight, Saving
from distckpt.paths import Attempt
from distckpt.remarks import Remarks


@pytest.fixture
def flight():
    """Make one that holds optimizers; let them go again."""
    saving = Saving(Attempt("ckpt", 1, 1, "00000000"), 5, Remarks(), (), 0.0)
    made = Flight(saving, 0, None)
    yield made
    made.release_optimizers()


def _optimizer():
    weight = torch.nn.Parameter(torch.ones(3))
    weight.grad = torch.ones(3)
    return weight, torch.optim.SGD([weight], lr=1.0)


def test_step_of_any_optimizer_waits_for_the_copies(flight):
    """Also of one that was made later, and on another thread; and everything is let go."""
    (weight, before), released = _optimizer(), []
    flight.let_go = lambda: released.append(weight.tolist())
    flight.hold_optimizers()
    later_weight, later = _optimizer()
    for one, optimizer in ((weight, before), (later_weight, later)):
        flight.staged.clear()
        stepping = threading.Thread(target=optimizer.step)
        stepping.start()
        time.sleep(0.05)
        assert stepping.is_alive() and one.tolist() == [1.0] * 3
        flight.staged.set()
        stepping.join(5)
        assert one.tolist() == [0.0] * 3
    assert released == [[1.0] * 3]


@pytest.mark.full
def test_compiled_step_waits_as_well_and_is_compiled_once_more(flight):
    """Torch looks at its hooks; what they call is not compiled with it."""
    weight, optimizer = _optimizer()
    step = torch.compile(optimizer.step, backend="eager")
    seen = []
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        flight.staged.clear()
        flight.released.clear()
        flight.let_go = lambda: seen.append(weight.tolist())
        flight.hold_optimizers()
        threading.Timer(0.1, flight.staged.set).start()
        before = weight.tolist()
        step()
        assert seen.pop() == before != weight.tolist()
        flight.release_optimizers()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_step_waits_for_nothing_once_the_flight_is_over(flight):
    """The hook is gone with it, and taking it away twice does no harm."""
    weight, optimizer = _optimizer()
    flight.hold_optimizers()
    flight.release_optimizers()
    flight.release_optimizers()
    optimizer.step()
    assert weight.tolist() == [0.0] * 3


def test_nothing_is_let_go_before_it_is_copied(flight):
    """And then once."""
    told = []
    flight.let_go = lambda: told.append(1)
    flight.release()
    assert told == [] and not flight.released.is_set()
    flight.staged.set()
    flight.wait_staged()
    flight.release()
    assert told == [1] and flight.released.is_set()


@pytest.mark.parametrize("is_staged", [False, True])
def test_waiting_for_the_end_is_bounded(flight, is_staged):
    """Whatever hangs, the copies or the write."""
    if is_staged:
        flight.staged.set()
    started = time.monotonic()
    flight.wait_done(0.2)
    assert 0.15 < time.monotonic() - started < 0.4
    assert flight.released.is_set() is is_staged


def test_waiting_for_the_end_outlasts_the_thread(flight):
    """Nothing that it holds may be freed when the interpreter is gone already."""

    def fly():
        flight.staged.set()
        flight.done.set()
        time.sleep(0.2)

    flight.thread = threading.Thread(target=fly, daemon=True)
    flight.thread.start()
    flight.wait_done(5.0)
    assert not flight.thread.is_alive()
