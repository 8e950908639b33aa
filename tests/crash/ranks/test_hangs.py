"""Ranks that are killed, stopped, cut off or elsewhere: named in time, on every survivor.

A killed rank is named within a second of its death on every rank that waits; one that is
stopped, cut off or elsewhere at the deadline; no call outlasts that by more than a second.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import socket
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from statistics import median
from typing import Any

import campaign
import pytest
import torch.distributed as dist
from campaign import Campaign, in_two_parts
from figures import Figures, Hung
from lost_peer_helpers import (
    DEADLINE_SECONDS,
    LATE_SECONDS,
    PHASES,
    NoNetwork,
    lose,
    lose_network,
    manager_of,
    network_of,
    run_and_strike,
    wait_for_strike,
)
from outcome_helpers import make_checkpoint, outcome

# Many jobs; a busy machine may take its time.
pytestmark = pytest.mark.timeout(1800)

SIZE = 20
KILL, STOP, ABSENT, DROP, RESET, STORE = "kill", "stop", "absent", "drop", "reset", "store"
HOW = (KILL, STOP, ABSENT, DROP, RESET, STORE)


@dataclass(frozen=True)
class Loss:
    """How one rank is lost to the others, or what else.

    Attributes:
        how: One of ``HOW``.
        world_size: Number of ranks.
        victim: Which of them.
        phase: When; only for the first three.
    """

    how: str
    world_size: int
    victim: int
    phase: str = ""


class Hangs(Campaign[Loss]):
    """Jobs of real ranks, each of which loses one.

    Attributes:
        late: How long after the death, or the deadline, the last survivor knew it.
        missing: Why some ways cannot be tried on this machine; "" if all can.
    """

    name = "hangs"
    about = "ranks killed, stopped, elsewhere, cut off, reset; the store's death"
    in_threads = True

    def __init__(self) -> None:
        self.late: dict[str, list[float]] = {how: [] for how in HOW}
        self.missing = ""
        # Namespaces are made one at a time: so is the machine's list of them.
        self._turn = threading.Lock()

    @contextmanager
    def opened(self, scratch: str) -> Iterator[None]:
        """Find out whether networks can be made; without, the other ways are tried."""
        try:
            with network_of(2):
                self.missing = ""
        except NoNetwork as error:
            self.missing = f"no network namespaces can be made here: {error}"
        yield

    def point(self, source: random.Random, index: int) -> Loss:
        """Return one: all ways by turns."""
        how = HOW[index % len(HOW)]
        if self.missing and how in (DROP, RESET):
            how = KILL
        world_size = source.choice(
            (2, 3, 4, 4, 8) if how in (KILL, STOP, ABSENT) else (2, 4)
        )
        victim = source.choice((0, world_size - 1, source.randrange(world_size)))
        if how == STORE:
            return Loss(how, world_size, 0)
        if how in (DROP, RESET):
            return Loss(how, world_size, victim)
        phase = source.choice(PHASES)
        if phase == "WRITE answer" and (victim or how == ABSENT):
            # Once it has voted, the others need only the chief: see test_job_crashes.py.
            phase = "WRITE"
        return Loss(how, world_size, victim, phase)

    def play(self, folder: str, point: Loss, figures: Figures) -> None:
        """Lose it; what was late is tried again with less going on."""
        figures.count(point.how)
        found = Figures()
        with self._turn:
            well = found.check(point, lambda: self._lose(os.path.join(folder, "1"), point))
        if not well and "assert" in str(found.findings):
            found = Figures()
            with self._turn:
                found.check(point, lambda: self._lose(os.path.join(folder, "2"), point))
        figures.add(found)

    def _lose(self, folder: str, point: Loss) -> None:
        os.mkdir(folder)
        directory = os.path.join(folder, "run")
        try:
            if point.how == STORE:
                late = _lose_store(directory, point.world_size)
            elif point.how in (DROP, RESET):
                with network_of(point.world_size) as network:
                    late = lose_network(directory, network, point.how, point.victim)
            else:
                arguments = (point.how, point.phase, point.victim)
                late = lose(directory, point.world_size, *arguments)
        except AssertionError as error:
            if "killed=True" in str(error):
                raise Hung(str(error)) from error
            raise
        self.late[point.how].append(late)


# The death of the store that the job was started with


def _lose_store(directory: str, world_size: int) -> float:
    """Run a job whose store is killed: it goes on; a manager made then fails in time."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("forkserver")
    store = context.Process(target=_serve_store, args=(port, world_size), daemon=True)
    store.start()

    def strike() -> None:
        store.kill()
        store.join()

    results = run_and_strike(
        _outlive_the_store, world_size, directory, port, world_size, strike=strike
    )
    for second, third in results:
        assert second.kind == "ok" and second.net_seconds < LATE_SECONDS, second
        assert third.kind != "ok", third
        assert third.net_seconds < DEADLINE_SECONDS + LATE_SECONDS, third
    return max(third.seconds - DEADLINE_SECONDS for _, third in results)


def _serve_store(port: int, world_size: int) -> None:
    store = dist.TCPStore("127.0.0.1", port, None, is_master=True, wait_for_workers=False)
    time.sleep(60)
    del store


def _outlive_the_store(rank: int, directory: str, port: int, world_size: int) -> Any:
    store = dist.TCPStore(
        *("127.0.0.1", port, world_size),
        is_master=False,
        timeout=timedelta(seconds=DEADLINE_SECONDS),
    )
    dist.init_process_group(
        "gloo",
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=60),
    )
    manager = manager_of(make_checkpoint(), directory, DEADLINE_SECONDS)
    manager.save()
    wait_for_strike(rank, directory)
    second = outcome(manager.save)
    manager.close()
    return second, outcome(manager_of, make_checkpoint(), directory, DEADLINE_SECONDS)


CAMPAIGN = Hangs()


@in_two_parts(SIZE, range(len(HOW)))
def test_nobody_waits_for_ever(
    scratch: str, report_figures: Callable[[str], None], indexes: Collection[int]
):
    """Whatever a rank is lost by: named by all in time, and only that save is lost."""
    hangs = Hangs()
    figures = campaign.run(hangs, scratch, indexes)
    seconds = ", ".join(
        f"{how} {median(late):.2f} to {max(late):.2f} s"
        for how, late in hangs.late.items()
        if late
    )
    report_figures(f"{figures}; known after death or deadline: {seconds}")
    figures.demand_zeros()
    if hangs.missing:
        pytest.skip(f"all is well but for what was not tried: {hangs.missing}")
    assert set(HOW) == set(figures.others)
