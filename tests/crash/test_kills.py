"""A worker, the chief or the agent is killed at a random microsecond of a real job.

Four ranks under torch's elastic agent, saving at once and behind the loop. The job must
come back with the newest checkpoint that was acknowledged, or a newer one, right to the
value. When the agent is killed its workers live on, and a new agent starts others in the
same directory: the old ones are fenced, and told so.
"""

from __future__ import annotations

import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median

import campaign
import pytest
from campaign import Campaign
from elastic_job import NUM_RANKS, ElasticJob, Told, Worker, is_running
from figures import Figures, Hung, Lost, Torn, Wrong

from distckpt import paths
from distckpt.readers import read_record
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.verify import verify_attempt

# Each restart takes seconds; a busy machine may take its time.
pytestmark = pytest.mark.timeout(1800)

SIZE = 10
AGENT = "agent"
# Against what hangs. On a busy machine a restart that took a second took over a minute.
_BACK_SECONDS = 400.0
_ZOMBIE_SECONDS = 400.0


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        victim: A rank, or the agent.
        event: After what all ranks have told.
        delay_seconds: How long after that.
    """

    victim: int | str
    event: str
    delay_seconds: float


class Kills(Campaign[Kill]):
    """One job, and one kill after the other.

    Attributes:
        seconds: From each kill to the first training step after it.
    """

    name = "kills"
    about = "SIGKILL of a rank, the chief or the agent of a job at random microseconds"
    in_threads = True

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._turn = threading.Lock()

    @contextmanager
    def opened(self, scratch: str) -> Iterator[None]:
        """Start the job."""
        self._job = ElasticJob(scratch)
        self._job.start()
        try:
            yield
        finally:
            self._job.stop()

    def point(self, source: random.Random, index: int) -> Kill:
        """Return one; every fifth is of the agent."""
        victim: int | str = AGENT if index % 5 == 4 else source.randrange(NUM_RANKS)
        # Most while it trains and saves, some while it comes back.
        if source.random() < 0.25:
            return Kill(victim, "started", source.uniform(0, 0.6))
        return Kill(victim, "stepped", source.uniform(0, 0.5))

    def play(self, folder: str, point: Kill, figures: Figures) -> None:
        """Kill, and wait until the job is back; one at a time."""
        with self._turn:
            figures.check(point, lambda: self._kill(point, figures))

    def _kill(self, point: Kill, figures: Figures) -> None:
        job = self._job
        workers = self._wait_for(point.event)
        before = workers[0].agent, workers[0].restart
        time.sleep(point.delay_seconds)
        acknowledged = self._newest_acknowledged()
        if point.victim == AGENT:
            at: float | None = job.kill_agent()
            job.start()
        else:
            at = job.kill(workers[int(point.victim)])
        if at is None:
            figures.count("gone before")
            return
        figures.count("of the agent" if point.victim == AGENT else "of a rank")
        figures.count("of the chief", int(point.victim == 0))
        back = self._wait_for("stepped", but=before)
        newest = back[0].agent, back[0].restart
        for told in job.told("restored"):
            if told.at > at and told.incarnation != before:
                self._check_restored(told, acknowledged)
        stepped = [t.at for t in job.told("stepped") if t.incarnation == newest]
        self.seconds.append(min(stepped) - at)
        if point.victim == AGENT:
            self._check_zombies(workers, figures)
        self._check_disk()
        figures.count("acknowledged", self._newest_acknowledged() - acknowledged)

    def _wait_for(self, event: str, but: tuple[int, int] | None = None) -> list[Worker]:
        """Wait until all ranks of one incarnation have told; returns them by rank."""
        found: list[Worker] = []

        def has_come() -> bool:
            told = [told for told in self._job.told(event) if told.incarnation != but]
            ranks = {t.rank for t in told if t.incarnation == told[-1].incarnation}
            if len(ranks) < NUM_RANKS:
                return False
            agent, restart = told[-1].incarnation
            workers = self._job.workers()
            mine = {w.rank: w for w in workers if (w.agent, w.restart) == (agent, restart)}
            found[:] = [mine[rank] for rank in sorted(mine)]
            return all(is_running(worker.pid) for worker in found)

        if not self._job.wait_for(has_come, _BACK_SECONDS):
            raise Hung(f"not all have {event}: {self._job.last_words()}")
        return found

    def _newest_acknowledged(self) -> int:
        told = self._job.told("acknowledged")
        return max((_number(one.values[0]) for one in told), default=0)

    def _check_restored(self, told: Told, acknowledged: int) -> None:
        prefix, is_right = told.values
        if acknowledged and _number(prefix) < acknowledged:
            raise Lost(
                f"rank {told.rank} restored {prefix}, {acknowledged} was acknowledged"
            )
        if not is_right:
            raise Torn(f"rank {told.rank} restored other values from {prefix}")

    def _check_zombies(self, workers: list[Worker], figures: Figures) -> None:
        """Check that those who lost their agent end by themselves, and know why."""

        def are_gone() -> bool:
            return not any(is_running(worker.pid) for worker in workers)

        if not self._job.wait_for(are_gone, _ZOMBIE_SECONDS):
            raise Hung("workers of an agent that is dead go on")
        incarnation = (workers[0].agent, workers[0].restart)
        left = [t for t in self._job.told("left") if t.incarnation == incarnation]
        if not any(told.values[0] == "FencedError" for told in left):
            raise Wrong(f"nobody was told to be fenced: {left}")
        figures.count("fenced", sum(told.values[0] == "FencedError" for told in left))

    def _check_disk(self) -> None:
        directory = self._job.directory
        record = read_record(RunDirectory.at(directory))
        for entry in record.committed if record is not None else ():
            path = os.path.join(directory, entry.attempt.published)
            report = verify_attempt(AttemptDirectory.at(path), entry.manifest)
            if report.ok:
                continue
            # The job goes on meanwhile: what it has dropped since may be gone.
            newer = read_record(RunDirectory.at(directory))
            if newer is not None and entry in newer.committed:
                raise Torn(str(report))


def _number(prefix: str) -> int:
    parsed = paths.parse_prefix(prefix)
    return 0 if parsed is None else parsed[1]


CAMPAIGN = Kills()


@pytest.mark.full
def test_kills_at_random_moments_lose_nothing(
    scratch: str, report_figures: Callable[[str], None]
):
    """It comes back each time, and goes on from the newest that was acknowledged."""
    kills = Kills()
    figures = campaign.run(kills, scratch, range(SIZE))
    report_figures(
        f"{figures}; {median(kills.seconds):.1f} s (median) from a kill to a training step"
    )
    figures.demand_zeros()
    assert figures.others["of the agent"] and figures.others["fenced"]
    assert figures.others["of a rank"] and figures.others["acknowledged"]
