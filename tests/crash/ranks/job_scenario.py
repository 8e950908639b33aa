"""Jobs of real ranks: one that is struck at a chosen call, and the one that comes after.

The ranks are real processes with real managers over gloo. What they call is intercepted
from outside, as in ``storage_calls``; beside the calls of the storage module these are the
steps of the protocol: a rank's vote, the chief's decision, its answer.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import timedelta
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from figures import Lost, NotReopened, Torn, Wrong, demand
from harness import RankResult, held_up_seconds, run_ranks
from notes import Notes
from outcome_helpers import make_checkpoint, state_of, train
from power import Disk
from scenario import _epoch_of, claim_and_check_clean, unlisted
from storage_calls import AFTER, BEFORE, LOOKING, MIDDLE, Call, intercepted

from distckpt import (
    Checkpoint,
    CheckpointManager,
    CheckpointOptions,
    ManagerBroken,
    PerRank,
    paths,
    readers,
)
from distckpt.comm import GroupChannel
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.verify import verify_attempt

_TIMEOUT_SECONDS = 60.0
_JOB_SECONDS = 180.0


# What a job does


@dataclass(frozen=True, slots=True)
class Scenario:
    """One call of the manager, and what it meets.

    Attributes:
        name: For people, and for files.
        before: Numbers of the checkpoints that are there, oldest first; None where
            nothing is at all.
        saves: Whether the call is a save; else it is the first restore, with the claim.
        number: Under which number it saves, if not the next one.
        max_to_keep: For the manager.
        after: Numbers of the checkpoints that are there afterwards, oldest first.
        staging: How an asynchronous save copies; "" for one that is not.
    """

    name: str
    before: tuple[int, ...] | None
    saves: bool
    number: int | None
    max_to_keep: int | None
    after: tuple[int, ...]
    staging: Literal["", "eager", "lazy"] = ""


SCENARIOS = (
    Scenario("first-claim", None, False, None, 2, ()),
    Scenario("claim-sweep-restore", (1, 2), False, None, 2, (1, 2)),
    Scenario("save", (1, 2), True, None, None, (1, 2, 3)),
    Scenario("save-release", (1, 2), True, None, 2, (2, 3)),
    Scenario("save-again-release", (1, 2), True, 1, 2, (2, 1)),
)
ASYNC_SCENARIOS = (
    Scenario("eager-release", (1, 2), True, None, 2, (2, 3), "eager"),
    Scenario("lazy-again-release", (1, 2), True, 1, 2, (2, 1), "lazy"),
)


def make_objects(seed: int = 0) -> Checkpoint:
    """Make what is saved: a small model in training, and something of each rank's own."""
    return make_checkpoint(seed, own=PerRank(torch.zeros(3000)))


def train_one_step(checkpoint: Checkpoint) -> None:
    """Train; what comes of it follows from the step and the rank."""
    train(checkpoint)
    checkpoint.own.value.fill_(int(checkpoint.step) * 100 + dist.get_rank())


def content(checkpoint: Checkpoint) -> Any:
    """Return all that is saved as plain Python, for comparison."""
    state = state_of(checkpoint)
    del state["save_counter"]
    return state, checkpoint.own.value.tolist()


def make_manager(
    checkpoint: Checkpoint, directory: str, max_to_keep: int | None
) -> CheckpointManager:
    """Make a manager whose deadline is far away: nobody may wait for it."""
    timeout = timedelta(seconds=_TIMEOUT_SECONDS)
    return CheckpointManager(checkpoint, directory, max_to_keep, timeout=timeout)


# Calls


class Point(NamedTuple):
    """One call that a rank makes, and where to strike.

    Attributes:
        thread: Name of the thread that makes it.
        index: Which of that thread's calls.
        name: The call.
        phase: Of the vote that was cast last; "" for deletions, which go on behind it.
        deciding: Whether the chief is working on its answer.
        where: Before it, in the middle of it, or after it.
    """

    thread: str
    index: int
    name: str
    phase: str
    deciding: bool
    where: str = BEFORE


class Watch:
    """A hook that writes all calls down, and strikes at one of them.

    Attributes:
        armed: Whether calls count.
        seen: The calls so far.
    """

    def __init__(self, point: Point | None, strike: Callable[[Point], None]) -> None:
        self._point = point
        self._strike = strike
        self._lock = threading.Lock()
        self._indexes: dict[str, Iterator[int]] = {}
        self._phase = ""
        self._deciding = False
        self.armed = False
        self.seen: list[Point] = []

    def __call__(self, call: Call) -> Any:
        """Run a call of the storage module, or strike."""
        if not self.armed:
            return call.run()
        thread = threading.current_thread().name
        with self._lock:
            index = next(self._indexes.setdefault(thread, itertools.count()))
            found = Point(thread, index, call.name, *self._where_in_protocol(thread))
            self.seen.append(found)
        point = self._point
        if point is None or (thread, index) != (point.thread, point.index):
            return call.run()
        if point.where == BEFORE:
            self._strike(found)
        if point.where == MIDDLE:
            call.run_half()
            self._strike(found)
        try:
            return call.run()
        finally:
            self._strike(found)

    def _where_in_protocol(self, thread: str) -> tuple[str, bool]:
        return ("", False) if "janitor" in thread else (self._phase, self._deciding)

    def consult(self, original: Any, channel: Any, vote: Any, decide: Any, **more: Any):
        """Stand in for ``GroupChannel.consult``."""
        self._phase = vote.phase.name

        def decided(votes: Any) -> Any:
            self._deciding = True
            try:
                return self(Call("decide", (), lambda: decide(votes)))
            finally:
                self._deciding = False

        return self(Call("vote", (), lambda: original(channel, vote, decided, **more)))

    def broadcast(self, original: Any, channel: Any, *arguments: Any) -> Any:
        """Stand in for ``GroupChannel._broadcast``: the votes are cast by then."""
        return self(Call("answer", (), lambda: original(channel, *arguments)))


@contextmanager
def watched(watch: Watch) -> Iterator[None]:
    """Hand all calls of this process to a hook."""
    consult, broadcast = GroupChannel.consult, GroupChannel._broadcast

    def new_consult(channel, vote, decide, **more):
        return watch.consult(consult, channel, vote, decide, **more)

    def new_broadcast(channel, *arguments):
        return watch.broadcast(broadcast, channel, *arguments)

    GroupChannel.consult, GroupChannel._broadcast = new_consult, new_broadcast
    try:
        with intercepted(watch):
            yield
    finally:
        GroupChannel.consult, GroupChannel._broadcast = consult, broadcast


def changes_the_disk(point: Point) -> bool:
    """Tell whether a call of the storage module may change anything."""
    return point.name not in ("vote", "decide", "answer", *LOOKING)


def places(point: Point) -> list[str]:
    """Say where to strike at a call so that each time something differs."""
    if not changes_the_disk(point) and point.name != "vote":
        return [BEFORE]  # after it is before the next one
    has_middle = Call(point.name, (), lambda: None).has_middle
    return [BEFORE, *[MIDDLE] * has_middle, AFTER]


def every_place(points: Sequence[Point]) -> list[Point]:
    """Strike at every call, everywhere."""
    return [p._replace(where=where) for p in points for where in places(p)]


def one_place_each(points: Sequence[Point]) -> list[Point]:
    """Strike at every call once: before, in and after it by turns."""
    turns: dict[str, Iterator[int]] = {}
    chosen = []
    for point in points:
        turn = next(turns.setdefault(point.name, itertools.count()))
        some = places(point)
        chosen.append(point._replace(where=some[turn % len(some)]))
    return chosen


class Told(NamedTuple):
    """How one call of a manager ended on a rank; ``kind`` is "ok" or the error's class.

    ``held_up`` says for how long its threads waited for a processor meanwhile.
    """

    kind: str
    text: str
    is_broken: bool
    ranks: tuple[int, ...]
    committed: bool | None
    began: float
    ended: float
    held_up: float


def told(call: Callable[..., Any], *arguments: Any) -> Told:
    """Make a call and tell how it ended."""
    held_up, began = held_up_seconds(), time.monotonic()
    try:
        result = call(*arguments)
    except Exception as error:
        return Told(
            type(error).__name__,
            str(error),
            isinstance(error, ManagerBroken),
            getattr(error, "ranks", ()),
            getattr(error, "committed", None),
            began,
            time.monotonic(),
            held_up_seconds() - held_up,
        )
    ended = time.monotonic()
    held_up = held_up_seconds() - held_up
    return Told("ok", str(result), False, (), None, began, ended, held_up)


# The rank functions


def make_template(rank: int, directory: str, numbers: Sequence[int]) -> None:
    """Save some checkpoints; ckpt-N is saved at step N."""
    checkpoint = make_objects()
    with make_manager(checkpoint, directory, None) as manager:
        manager.restore_or_initialize()
        for _ in numbers:
            train_one_step(checkpoint)
            manager.save()
    if rank == 0:
        _litter(directory)


def _litter(directory: str) -> None:
    """Leave behind what dead writers leave: one of each kind."""
    record = readers.read_record(RunDirectory.at(directory))
    assert record is not None
    listed = record.live[0].attempt
    torn = paths.Attempt("ckpt", 7, record.epoch, paths.random_hex(4))
    source = os.path.join(directory, listed.published)
    shutil.copytree(source, os.path.join(directory, torn.published))
    half = replace(torn, number=8)
    for name in (half.pending, half.trash):
        os.mkdir(os.path.join(directory, name))
        shard = os.path.join(directory, name, paths.shard_file(1, 2))
        with open(shard, "wb") as file:
            file.write(b"half")
    probe = paths.probe_file(record.epoch, paths.random_hex(8), 1)
    temporary = os.path.join(paths.RECORDS_DIRECTORY, paths.temporary_file(record.epoch))
    for name in (probe, temporary):
        with open(os.path.join(directory, name), "wb"):
            pass


Strike = Callable[[str, Notes], None]


def kill(directory: str, notes: Notes) -> None:
    """Kill this rank."""
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True, slots=True)
class PowerCut:
    """Cut the power of the disk that a run directory is on, and kill all ranks.

    Attributes:
        mode: Whether the journal is written out first.
    """

    mode: int

    def __call__(self, directory: str, notes: Notes) -> None:
        """Do it."""
        Disk("", os.path.dirname(directory)).cut(self.mode)
        pids = {pid for (pid,) in notes.read("pid")}
        for pid in pids - {os.getpid()}:
            # A rank that has met the dead disk may have ended by itself.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        kill(directory, notes)


def live(
    rank: int,
    directory: str,
    scenario: Scenario,
    victim: int,
    point: Point | None,
    strike: Strike,
    notes: Notes,
    spoil: Callable[[], None] | None,
) -> tuple[list[Told], list[Point]]:
    """Play a scenario; the victim strikes on the way. Tell what this rank sees."""

    def strike_here(found: Point) -> None:
        expected = point is not None and found == point._replace(where=BEFORE)
        notes.add("struck", expected, time.monotonic())
        strike(directory, notes)

    notes.add("pid", os.getpid())
    if spoil is not None:
        spoil()
    watch = Watch(point if rank == victim else None, strike_here)
    checkpoint = make_objects()
    seen: list[Told] = []
    with watched(watch):
        manager = make_manager(checkpoint, directory, scenario.max_to_keep)
        calls: list[Callable[[], Any]] = [manager.restore_or_initialize]
        if scenario.saves:
            manager.restore_or_initialize()
            manager.sync()
            train_one_step(checkpoint)
            calls = [lambda: _save(manager, scenario.number, notes)]
            if scenario.staging:
                calls = _asynchronous_calls(checkpoint, manager, scenario, notes)
        dist.barrier()
        watch.armed = True
        calls.append(manager.sync)
        for call in calls:
            seen.append(told(call))
            if seen[-1].kind != "ok":
                return seen, watch.seen
        watch.armed = False
        seen.append(told(manager.sync))
    return seen, watch.seen


def _save(manager: CheckpointManager, number: int | None, notes: Notes) -> str | None:
    path = manager.save(number)
    notes.add("acknowledged", os.path.basename(str(path)))
    return path


def _asynchronous_calls(
    checkpoint: Checkpoint, manager: CheckpointManager, scenario: Scenario, notes: Notes
) -> list[Callable[[], Any]]:
    """Save behind a training loop, which changes everything and has collectives, too.

    ``save()`` acknowledges nothing yet; the call that brings its outcome in does.
    """
    options = CheckpointOptions(enable_async=True, staging=scenario.staging or "eager")
    paths: list[str | None] = []

    def begin() -> None:
        paths.append(manager.save(scenario.number, options=options))
        for _ in range(3):
            train_one_step(checkpoint)

    def bring_in() -> None:
        manager.sync()
        notes.add("acknowledged", os.path.basename(str(paths[0])))

    return [begin, bring_in]


class Back(NamedTuple):
    """What a job finds that comes back.

    Attributes:
        restored: Name of the checkpoint that was restored.
        is_right: Whether all restored values are those of its step.
        step: Its step.
        saved: Name of the next one.
        left: What lower epochs have left in the run directory.
    """

    restored: str | None
    is_right: bool
    step: int
    saved: str
    left: list[str]


def come_back(rank: int, directory: str, max_to_keep: int | None) -> Back:
    """Restore what is there, and save again."""
    checkpoint = make_objects(seed=1)
    with make_manager(checkpoint, directory, max_to_keep) as manager:
        restored = manager.restore_or_initialize()
        step = int(checkpoint.step)
        found = content(checkpoint)
        expected = make_objects(seed=0 if restored else 1)
        for _ in range(step):
            train_one_step(expected)
        is_right = found == content(expected)
        train_one_step(checkpoint)
        saved = manager.save()
        manager.sync()
        record = readers.read_record(RunDirectory.at(directory))
        assert record is not None
        # A claim that died has left its own files under the epoch that is now ours.
        names = unlisted(directory, record)
        left = [name for name in names if _epoch_of(name) < record.epoch]
        dist.barrier()
    name = None if restored is None else os.path.basename(restored)
    return Back(name, is_right, step, os.path.basename(str(saved)), left)


# What must be true of the disk


def listed_in(directory: str) -> list[paths.Attempt]:
    """List the managed checkpoints, oldest first."""
    record = readers.read_record(RunDirectory.at(directory))
    return [] if record is None else [entry.attempt for entry in record.live]


def check_listing(
    directory: str, scenario: Scenario, known: Mapping[int, str], notes: Notes
) -> bool:
    """Check that what is listed is what was there before, or what the job has made of it.

    Args:
        directory: The run directory.
        scenario: What the job did.
        known: The attempts that were there before, by number.
        notes: What its ranks were told before they died.

    Returns:
        Whether what it saves is listed.

    Raises:
        Lost: It is not so, or what was acknowledged is not listed.
    """
    before = [known[number] for number in scenario.before or ()]
    listed = listed_in(directory)
    found = [attempt.published for attempt in listed]
    acknowledged = notes.read("acknowledged")
    if found == before and not acknowledged:
        return False
    numbers = tuple(attempt.number for attempt in listed)
    kept = [known[number] for number in scenario.after[:-1]]
    is_after = scenario.saves and numbers == scenario.after and found[:-1] == kept
    demand(Lost, is_after and found != before, f"{found=}, {before=}, {acknowledged=}")
    return True


def check_whole(directory: str) -> None:
    """Verify every committed checkpoint byte for byte.

    Raises:
        Torn: One is not whole.
    """
    record = readers.read_record(RunDirectory.at(directory))
    for entry in () if record is None else record.committed:
        path = os.path.join(directory, entry.attempt.published)
        report = verify_attempt(AttemptDirectory.at(path), entry.manifest)
        if not report.ok or report.foreign:
            raise Torn(str(report))


def check_come_back(
    directory: str,
    world_size: int,
    scenario: Scenario,
    is_listed: bool,
) -> None:
    """Let a fresh job come back, and check that it finds and leaves all in order.

    Args:
        directory: The run directory.
        world_size: Number of ranks.
        scenario: What the job did that died.
        is_listed: Whether what it saves is listed.

    Raises:
        Lost, Torn: It does not.
        DistckptError: The directory cannot be read.
    """
    check_whole(directory)
    listed = listed_in(directory)
    newest = listed[-1] if listed else None
    step = len(scenario.before or ()) + is_listed
    arguments = (directory, scenario.max_to_keep)
    results = run_ranks(come_back, world_size, *arguments, timeout=_JOB_SECONDS)
    failed = [result for result in results if not result.ok]
    if failed:
        raise NotReopened("\n".join(f"{r.error} {r.exit_code} {r.trace}" for r in failed))
    for back in (result.value for result in results):
        demand(
            Lost, back.restored == (newest and newest.prefix), f"{back}, newest {newest}"
        )
        demand(Lost, back.step == step, f"{back}, expected step {step}")
        if not back.is_right:
            raise Torn(f"restored values are not those that were saved: {back}")
        demand(Lost, not back.left, f"left behind: {back.left}")
    check_whole(directory)
    demand(Lost, listed_in(directory)[-1].prefix == results[0].value.saved, "saved again")
    claim_and_check_clean(directory)


# Running them


class Template:
    """A run directory with two checkpoints, to be copied for each job."""

    def __init__(self, scratch: str, world_size: int) -> None:
        self._path = os.path.join(scratch, f"template-{world_size}")
        results = run_ranks(make_template, world_size, self._path, (1, 2))
        assert all(result.ok for result in results), results
        self.attempts = {a.number: a.published for a in listed_in(self._path)}

    def copy_to(self, directory: str) -> None:
        """Make a run directory like it."""
        shutil.copytree(self._path, directory)

    def prepare(self, directory: str, scenario: Scenario) -> None:
        """Make the run directory that a scenario begins with."""
        if scenario.before is not None:
            self.copy_to(directory)


@dataclass(frozen=True, slots=True)
class Crash:
    """One job whose victim strikes at one call.

    Attributes:
        scenario: What it does.
        world_size: Number of ranks.
        victim: Which rank.
        point: At which call; None for none.
        strike: What it does there.
        spoil: Breaks the library on all ranks, to see that it is found out.
    """

    scenario: Scenario
    world_size: int
    victim: int
    point: Point | None
    strike: Strike = kill
    spoil: Callable[[], None] | None = None

    def __str__(self) -> str:
        assert self.point is not None
        thread, index, name, phase, _, where = self.point
        mode = f"mode {self.strike.mode}, " if isinstance(self.strike, PowerCut) else ""
        return (
            f"{self.scenario.name}: {mode}rank {self.victim} of {self.world_size} struck "
            f"{where} call {index} of {thread}, {name} {phase}"
        )

    def play(self, directory: str, notes: Notes) -> list[RankResult]:
        """Run the job; if there was to be a strike, check that it came.

        Raises:
            TimeoutError: A rank hangs.
            Wrong: The victim made other calls than expected, or none there.
        """
        results = run_ranks(
            *(live, self.world_size, directory, self.scenario, self.victim),
            *(self.point, self.strike, notes, self.spoil),
            timeout=_JOB_SECONDS,
        )
        if any(result.killed for result in results):
            raise TimeoutError(str(results))
        if self.point is not None:
            is_there = [is_expected for is_expected, _ in notes.read("struck")] == [True]
            is_killed = results[self.victim].exit_code == -signal.SIGKILL
            # With the power it is the last to go, and may see the others die before.
            if not is_there or not (is_killed or isinstance(self.strike, PowerCut)):
                raise Wrong(f"came to another call: {results}")
        return results


def count_calls(
    scratch: str,
    template: Template,
    world_size: int,
    scenario: Scenario,
    spoil: Callable[[], None] | None = None,
) -> list[list[Point]]:
    """Return the calls that each rank makes in a scenario where nobody dies."""
    folder = tempfile.mkdtemp(dir=scratch)
    directory = os.path.join(folder, "run")
    template.prepare(directory, scenario)
    crash = Crash(scenario, world_size, 0, None, spoil=spoil)
    results = crash.play(directory, Notes(os.path.join(folder, "notes")))
    for result in results:
        assert result.ok, result
        assert {told.kind for told in result.value[0]} == {"ok"}, result.value[0]
    return [result.value[1] for result in results]
