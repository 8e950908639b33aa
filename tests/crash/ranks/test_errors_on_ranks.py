"""The operating system fails at every call of one rank of a real job, once or for ever.

Real managers, with gloo between them: whatever fails on the chief or on another rank, all
ranks are told the same, at the same call. It costs one call at most; the same call, made
again once the cause is gone, works.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import lru_cache
from typing import Any

import campaign
import faults as real_faults
import pytest
import torch
from campaign import Campaign, in_two_parts
from figures import Figures, Hung, Lost, Torn, Wrong, demand
from harness import run_ranks, values_of
from outcome_helpers import Outcome, make_checkpoint, outcome, state_of, train
from storage_calls import REFUSED, SHORT, Faults, failing, ways

from distckpt import CheckpointManager, CheckpointOptions, PerRank, readers
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.verify import verify_attempt

# Hundreds of jobs; a busy machine may take its time.
pytestmark = pytest.mark.timeout(1800)

SIZE = 150
_WORLD_SIZE = 2
_MAX_TO_KEEP = 2
_DEADLINE_SECONDS = 20.0
# None of these errors is one to wait for.
_PROMPT_SECONDS = 10.0
# The calls of a life that save.
_SAVES = ("save", "save behind")

# The steps of the checkpoints that are listed.
Steps = tuple[int, ...]


@dataclass(frozen=True)
class Fault:
    """One call that fails on one rank, and how.

    Attributes:
        rank: Whose.
        index: Which call, of all that the rank makes in its life.
        how: Refused; done, but reported as failed; or done by half.
        error: What is reported.
        for_ever: Whether all later ones fail, too, until the rank is told of an error.
    """

    rank: int
    index: int
    how: str
    error: str
    for_ever: bool


@dataclass
class Seen:
    """What one rank has seen in its life.

    Attributes:
        told: How each call ended: its name, the step it was made at, its outcome.
        names: The calls into the operating system.
        fired: How many of them failed.
        wrong: What is not as it should be.
    """

    told: list[tuple[str, int, Outcome]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    fired: int = 0
    wrong: list[str] = field(default_factory=list)


class ErrorsOnRanks(Campaign[Fault]):
    """Every system call of every rank of a job, failing in every way that it can."""

    name = "rank-errors"
    about = "an error at each call of the chief or of another rank, once and for ever"
    in_threads = True

    @contextmanager
    def opened(self, scratch: str) -> Iterator[None]:
        """Make the past that every job begins with, and list all faults."""
        self._past = os.path.join(scratch, "past")
        values_of(run_ranks(_make_the_past, _WORLD_SIZE, self._past))
        counted = os.path.join(scratch, "counted")
        shutil.copytree(self._past, counted)
        self._faults = [
            Fault(rank, index, how, error, for_ever)
            for rank, seen in enumerate(values_of(run_ranks(_live, 2, counted, None)))
            for index, name in enumerate(seen.names)
            for how, error in ways(name)
            for for_ever in (False, True)
        ]
        yield

    def num_points(self) -> int:
        """Return how many there are."""
        return len(self._faults)

    def point(self, source: random.Random, index: int) -> Fault:
        """Return one."""
        return self._faults[index]

    def play(self, folder: str, point: Fault, figures: Figures) -> None:
        """Run a job with it, and look at what is there afterwards."""
        figures.check(point, lambda: self._play(folder, point, figures))

    def _play(self, folder: str, point: Fault, figures: Figures) -> None:
        directory = os.path.join(folder, "run")
        shutil.copytree(self._past, directory)
        results = run_ranks(_live, _WORLD_SIZE, directory, point)
        demand(Hung, not any(result.killed for result in results), results)
        lives: list[Seen] = values_of(results)
        for seen in lives:
            demand(Wrong, not seen.wrong, seen.wrong)
        possible = _check_told(lives, point)
        record = readers.read_record(RunDirectory.at(directory))
        assert record is not None
        listed = tuple(entry.step for entry in record.live)
        demand(Lost, listed in possible, f"listed {listed}, possible {possible}")
        for entry in record.live:
            path = os.path.join(directory, entry.attempt.published)
            report = verify_attempt(AttemptDirectory.at(path), entry.manifest)
            demand(Torn, report.ok and not report.foreign, report)
        figures.count("of the chief", int(point.rank == 0))
        errors = [told.kind for _, _, told in lives[0].told if told.kind != "ok"]
        told = f"told {errors[0]}" if errors else "told nothing"
        figures.count(told if lives[point.rank].fired else "never came to it")


def _check_told(lives: Sequence[Seen], fault: Fault) -> set[Steps]:
    """Check that all were told the same; returns what may be listed after all that."""
    possible: set[Steps] = {(1, 2)}
    num_errors = 0
    for one, *others in zip(*(seen.told for seen in lives), strict=True):
        name, step, told = one
        for other in (one, *others):
            demand(Hung, other[2].net_seconds < _PROMPT_SECONDS, other)
        for other in others:
            same = (told.kind, told.failures) == (other[2].kind, other[2].failures)
            # A restore that fails half-way leaves what it has read so far, and says so.
            is_whole = told.kind != "ok" or other[1] == step
            alike = same and is_whole and other[0] == name
            demand(Wrong, alike, f"{one}, but {other}")
        if told.kind != "ok":
            num_errors += 1
            demand(Wrong, "DistckptError" in told.bases, (name, told))
            demand(Wrong, fault.how != SHORT, f"a short call is no error: {told}")
        if name not in _SAVES:
            continue
        after = {(*steps, step)[-_MAX_TO_KEEP:] for steps in possible}
        if told.kind == "OutcomeUnknown":
            possible |= after
        elif told.kind == "ok":
            possible = after
        else:
            demand(Wrong, told.kind == "SaveFailed", told)
            assert told.failures is not None
            demand(Wrong, {*told.failures} == {fault.rank}, told)
    demand(Wrong, num_errors <= 1, [seen.told for seen in lives])
    return possible


# What the ranks do


class _Job:
    """One rank of a job, its manager, and what there is to save."""

    def __init__(self, rank: int, directory: str) -> None:
        self._rank = rank
        self._own = torch.zeros(64)
        self.checkpoint = make_checkpoint(own=PerRank(self._own))
        self.manager = CheckpointManager(
            self.checkpoint,
            directory,
            max_to_keep=_MAX_TO_KEEP,
            step_counter=lambda: self.step,
            timeout=timedelta(seconds=_DEADLINE_SECONDS),
        )

    @property
    def step(self) -> int:
        return int(self.checkpoint.step)

    def restore(self) -> None:
        self.manager.restore_or_initialize()
        state = state_of(self.checkpoint)
        del state["save_counter"]
        is_own = (self._own == self.step * 10 + self._rank).all()
        assert is_own and state == _state_after(self.step), (self._own, state)

    def save(self) -> None:
        self._train()
        self.manager.save()

    def save_behind(self) -> None:
        self._train()
        self.manager.save(options=CheckpointOptions(enable_async=True))
        self.manager.sync()

    def _train(self) -> None:
        train(self.checkpoint)
        self._own.fill_(self.step * 10 + self._rank)


@lru_cache
def _state_after(step: int) -> Any:
    checkpoint = make_checkpoint()
    train(checkpoint, step)
    state = state_of(checkpoint)
    del state["save_counter"]
    return state


def _make_the_past(rank: int, directory: str) -> None:
    job = _Job(rank, directory)
    for _ in range(2):
        job.save()
    job.manager.close()


def _live(rank: int, directory: str, fault: Fault | None) -> Seen:
    """Restore and save under a fault, as a loop that tries again would; then go on."""
    if fault is not None and fault.rank == rank:
        number = getattr(errno, fault.error, 0)
        faults = Faults(fault.index, number, how=fault.how, for_ever=fault.for_ever)
    else:
        faults = Faults(-1, 0, how=REFUSED, for_ever=False)
    seen, before = Seen(), _resources()
    with failing(faults):
        newest = _go_through(rank, directory, seen, faults)
    seen.names, seen.fired = faults.names, len(faults.fired)
    if _resources() != before:
        seen.wrong.append(f"leaked: {before}, now {_resources()}")
    job = _Job(rank, directory)
    job.restore()
    if job.step != newest:
        seen.wrong.append(f"restored step {job.step}, not {newest}")
    job.save()
    seen.told.append(("save", job.step, outcome(job.manager.sync)))
    left = real_faults.unlisted(directory)
    if left:
        seen.wrong.append(f"left behind: {left}")
    job.manager.close()
    return seen


def _go_through(rank: int, directory: str, seen: Seen, faults: Faults) -> int:
    """Make the calls of a life, each once more if it fails; returns the last step."""
    made: list[_Job] = []

    def call(name: str, body: Callable[[], Any], *, again: bool = True) -> None:
        told = outcome(body)
        seen.told.append((name, made[0].step if made else 0, told))
        if told.kind != "ok":
            faults.clear()
            if again:
                call(name, body, again=False)

    call("make", lambda: made.append(_Job(rank, directory)))
    (job,) = made
    call("restore", job.restore)
    call("save", job.save)
    call("save behind", job.save_behind)
    call("save", job.save)
    call("sync", job.manager.sync)
    call("close", job.manager.close)
    return job.step


def _resources() -> tuple[list[str], int]:
    """List the open files, and count Python's threads."""
    files = [name for name in real_faults.open_files() if name.startswith("/")]
    return files, threading.active_count()


CAMPAIGN = ErrorsOnRanks()


@in_two_parts(SIZE, (0, 1, 2, 3, 19))
def test_errors_of_one_rank_are_told_alike_on_all(
    scratch: str, report_figures: Callable[[str], None], indexes: Collection[int]
):
    """One call fails at most, on all ranks, with who failed and why; nothing is lost."""
    figures = campaign.run(CAMPAIGN, scratch, indexes)
    report_figures(str(figures))
    figures.demand_zeros()
    assert figures.others.get("never came to it", 0) < len(indexes) / 10
    assert 0 < figures.others["of the chief"] < len(indexes)
