"""What all campaigns share: points that follow from a seed, workers, figures, a budget.

A campaign tries to break one promise in many ways. Each way, a point, follows from the seed
and its index alone. So a small part of it runs in the tests, and a large one by
``launch/torture.sh``, which can be ended at any time and goes on where it was.
"""

from __future__ import annotations

import os
import random
import shutil
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Generic, TypeVar

import pytest
from figures import Figures
from scenario import in_workers

Point = TypeVar("Point")

SEED = 1
_NUM_WORKERS = 2
_FIRST_BATCH = 16
_BATCH_SECONDS = 20.0
_MAX_BATCH = 100_000


class Campaign(ABC, Generic[Point]):
    """One way to try to break a promise.

    Attributes:
        name: For the command line.
        about: One line for people.
        in_threads: Whether points are played in threads of one process, because they run
            real ranks; else in forked workers.
    """

    name: str
    about: str
    in_threads = False

    @contextmanager
    def opened(self, scratch: str) -> Iterator[None]:
        """Prepare what all points share, in an empty directory."""
        yield

    @contextmanager
    def worker(self, folder: str) -> Iterator[None]:
        """Prepare what the points of one worker share, in its folder."""
        yield

    def num_points(self) -> int | None:
        """Return how many points there are, once opened; None if they never end."""
        return None

    @abstractmethod
    def point(self, source: random.Random, index: int) -> Point:
        """Return one point.

        Args:
            source: Draws what follows from seed and index.
            index: Where there are so many points: which of them.
        """

    @abstractmethod
    def play(self, folder: str, point: Point, figures: Figures) -> None:
        """Play one point and file what comes of it.

        Args:
            folder: Of the worker; empty when it begins, and not cleared between points.
            point: What to do.
            figures: Where; ``tried`` is counted by the caller.
        """


def points_of(
    campaign: Campaign[Point], seed: int, indexes: Collection[int]
) -> list[Point]:
    """Return some points: those of a finite campaign in an order that the seed shuffles."""
    total = campaign.num_points()
    order: Sequence[int] | None = None
    if total is not None:
        order = random.Random(seed).sample(range(total), total)
        indexes = [index for index in indexes if index < total]
    return [
        campaign.point(
            random.Random(f"{seed} {index}"), index if order is None else order[index]
        )
        for index in indexes
    ]


def play(campaign: Campaign[Point], scratch: str, points: Sequence[Point]) -> Figures:
    """Play points, two at a time; the campaign is opened."""
    folder = tempfile.mkdtemp(dir=scratch)
    try:
        found = (_play_in_threads if campaign.in_threads else _play_in_workers)(
            campaign, folder, points
        )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    total = Figures()
    for figures in found:
        total.add(figures)
    return total


def _play_one(campaign: Campaign[Point], folder: str, point: Point) -> Figures:
    figures = Figures(tried=1)
    campaign.play(folder, point, figures)
    return figures


def _play_in_threads(
    campaign: Campaign[Point], scratch: str, points: Sequence[Point]
) -> list[Figures]:
    def body(point: Point) -> Figures:
        folder = tempfile.mkdtemp(dir=scratch)
        try:
            return _play_one(campaign, folder, point)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    with ThreadPoolExecutor(_NUM_WORKERS) as pool:
        return list(pool.map(body, points))


def _play_in_workers(
    campaign: Campaign[Point], scratch: str, points: Sequence[Point]
) -> list[Figures]:
    halves = [points[index::_NUM_WORKERS] for index in range(_NUM_WORKERS)]

    def work(folder: str, mine: Sequence[Point]) -> dict[str, Any]:
        total = Figures()
        with campaign.worker(folder):
            for point in mine:
                total.add(_play_one(campaign, folder, point))
        return asdict(total)

    trees = in_workers(scratch, halves, work)
    return [Figures(**tree) for tree in trees]


def run(
    campaign: Campaign[Any], scratch: str, indexes: Collection[int], seed: int = SEED
) -> Figures:
    """Open a campaign and play some of its points: what the tests do."""
    folder = os.path.join(scratch, campaign.name)
    os.mkdir(folder)
    with campaign.opened(folder):
        return play(campaign, folder, points_of(campaign, seed, indexes))


def in_two_parts(size: int, sample: Collection[int]) -> pytest.MarkDecorator:
    """Give a test the argument ``indexes``: a sample, and in class full the rest.

    Args:
        size: How many points both have together.
        sample: The indexes of those that the default class plays.
    """
    rest = [index for index in range(size) if index not in sample]
    parts = [
        pytest.param(sample, id="sample"),
        pytest.param(rest, id="rest", marks=pytest.mark.full),
    ]
    return pytest.mark.parametrize("indexes", parts)


@dataclass(frozen=True)
class Part:
    """A part of all that a test could strike: a sample, or all the others.

    The sample is every so many of them, and the first of each kind.

    Attributes:
        each: How many there are for each one of the sample.
        is_sample: Whether this is the sample.
    """

    each: int
    is_sample: bool

    @property
    def share(self) -> float:
        """Which part of all points it is, about."""
        return 1 / self.each if self.is_sample else 1 - 1 / self.each

    def of(
        self, points: Sequence[Point], kind: Callable[[Point], Any] | None = None
    ) -> list[Point]:
        """Return what belongs to this part.

        Args:
            points: All of them.
            kind: Returns the kind of one; None if they are of no kinds.
        """
        sample = {*range(0, len(points), self.each)}
        if kind is not None:
            first: dict[Any, int] = {}
            for index, point in enumerate(points):
                first.setdefault(kind(point), index)
            sample |= {*first.values()}
        return [p for i, p in enumerate(points) if (i in sample) == self.is_sample]


def part_of_every(each: int) -> pytest.MarkDecorator:
    """Give a test the argument ``part``: a sample, and in class full the rest.

    Args:
        each: How many points there are for each one of the sample.
    """
    parts = [
        pytest.param(Part(each, True), id="sample"),
        pytest.param(Part(each, False), id="rest", marks=pytest.mark.full),
    ]
    return pytest.mark.parametrize("part", parts)


@dataclass
class Progress:
    """How far a campaign has come.

    Attributes:
        seed: Its seed.
        index: The next point.
        seconds: How long it has taken so far.
        figures: What came of it.
        is_through: Whether all points there are were tried.
    """

    seed: int
    index: int = 0
    seconds: float = 0.0
    figures: Figures = field(default_factory=Figures)
    is_through: bool = False


def go_on(
    campaign: Campaign[Any],
    scratch: str,
    progress: Progress,
    seconds: float,
    size: int | None,
    report: Callable[[Progress], None],
) -> None:
    """Play on from where a campaign was, batch by batch, until its time is up.

    Args:
        campaign: The campaign.
        scratch: An empty directory.
        progress: Where it is; goes on with it.
        seconds: Its time; one batch more may be played.
        size: How many points at most, all together.
        report: Called after each batch.
    """
    deadline = time.monotonic() + seconds
    batch = _FIRST_BATCH
    with campaign.opened(scratch):
        total = campaign.num_points()
        end = min(x for x in (total, size, 2**63) if x is not None)
        while progress.index < end and time.monotonic() < deadline:
            began = time.monotonic()
            stop = min(progress.index + batch, end)
            points = points_of(campaign, progress.seed, range(progress.index, stop))
            progress.figures.add(play(campaign, scratch, points))
            took = time.monotonic() - began
            progress.index, progress.seconds = stop, progress.seconds + took
            report(progress)
            # As many as fit into some seconds: workers have a limit, and people wait.
            fitting = int(len(points) * _BATCH_SECONDS / max(took, 0.01))
            batch = max(_NUM_WORKERS, min(_MAX_BATCH, 8 * batch, fitting))
        progress.is_through = progress.index >= end
