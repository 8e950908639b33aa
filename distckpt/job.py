"""What the protocols of one manager share on one rank."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch

from distckpt.arena import Arena
from distckpt.checkpoint import Captured, Checkpoint
from distckpt.chief import Chief
from distckpt.clock import Clock
from distckpt.collector import collector_paused
from distckpt.comm import AS_USUAL, Answer, Channel, Decide, How
from distckpt.errors import DistckptError, ManagerBroken
from distckpt.events import Events
from distckpt.flight import Flight
from distckpt.gate import NOT_CALLED, Decision, IntervalGate, Pace
from distckpt.layout import Layouts
from distckpt.liveness import Liveness
from distckpt.lookout import Lookout
from distckpt.mailbox import Request
from distckpt.messages import Phase, Status, Vote, failure
from distckpt.own_file import OwnFile
from distckpt.paths import Attempt
from distckpt.preemption import Notice
from distckpt.pretrained import Pretrained
from distckpt.replica_digests import Replicas
from distckpt.run_directory import RunDirectory
from distckpt.shard_header import Draft
from distckpt.step_watch import NumberWatch, StepWatch
from distckpt.waiting import broken_by

_Result = TypeVar("_Result")


@dataclass(slots=True)
class Stop:
    """What this rank knows of the job's being told to stop.

    Attributes:
        notice: Whether this process was told.
        file: Whether a file is there that tells it, too; None for no such file.
        grace_period_seconds: How long after that the job is ended.
        agreed: Whether all ranks know it.
        is_due: Whether the save for it is still to be made.
    """

    notice: Notice
    file: Lookout[bool] | None
    grace_period_seconds: float
    agreed: bool = False
    is_due: bool = False


@dataclass(slots=True)
class Job:
    """One manager on one rank: what it was given, and what all ranks know alike.

    Attributes:
        checkpoint: The tracked objects.
        directory: The run directory.
        decisions: Channel of the caller's thread.
        commits: Channel of what follows capture: of the same thread, or of one that
            brings an asynchronous save to its end.
        liveness: Who is still there; None with one rank.
        gate: The step interval, alike on all ranks.
        read_step: Returns the training step; None without a step counter.
        init_fn: Called where there is nothing to restore.
        timeout_seconds: Deadline of every wait for another rank.
        chief: The chief's side; None on the other ranks.
        claimed: Whether the directory is ours to write.
        reads_once: Whether what all ranks want is read by one of them, for all.
        latest: Prefix of the newest checkpoint.
        checkpoints: Prefixes of the managed ones, oldest first.
        undefined: Why tensors hold a mixture, if a restore failed half-way.
        layouts: All ranks' tables at the last save, and who writes what.
        own_file: What this rank wrote then.
        arena: Where asynchronous saves are copied to.
        flight: The one that is under way.
        decision: Why the last call of ``save()`` has saved, or not; None if the rules have
            ruled it out.
        pace: How often ``save()`` is called.
        steps: Watches the step counter; on the chief, if there is one.
        numbers: Watches tracked numbers that are named like the step; likewise.
        save_seconds: How long the last saves took, from the question to the commit.
        stop: Whether the job is told to stop; None if it does not ask for that.
        clock: When rules of time want a save; on the chief, if there are any.
        events: Whoever wants to know what happens.
        requests: What other processes ask for; on the chief, if saves are made for that.
        requested: Who asked for a save when the ranks asked last; on the chief.
        calls_left: After how many more calls of ``save()`` to ask about all this.
        replicas: What is compared between ranks.
        is_checked: Whether all ranks know that what is tracked can be stored.
        warned_of_stateless: Paths of the optimizers whose missing state has been logged.
    """

    checkpoint: Checkpoint
    directory: RunDirectory
    decisions: Channel
    commits: Channel
    liveness: Liveness | None
    gate: IntervalGate
    read_step: Callable[[], int] | None
    init_fn: Callable[[], Any] | Pretrained | None
    timeout_seconds: float
    chief: Chief | None = None
    claimed: bool = False
    reads_once: bool = False
    latest: str | None = None
    checkpoints: list[str] = field(default_factory=list)
    undefined: str = ""
    layouts: Layouts | None = None
    own_file: OwnFile | None = None
    arena: Arena | None = None
    flight: Flight | None = None
    decision: Decision | None = NOT_CALLED
    pace: Pace = field(default_factory=Pace)
    steps: StepWatch | None = None
    numbers: NumberWatch = field(default_factory=NumberWatch)
    save_seconds: deque[float] = field(default_factory=lambda: deque(maxlen=5))
    stop: Stop | None = None
    clock: Clock | None = None
    events: Events = field(default_factory=Events)
    requests: Lookout[list[Request]] | None = None
    requested: list[Request] = field(default_factory=list)
    calls_left: int = 1
    replicas: Replicas = field(default_factory=Replicas)
    is_checked: bool = False
    warned_of_stateless: set[str] = field(default_factory=set)

    @property
    def rank(self) -> int:
        """This rank in the manager's group."""
        return self.decisions.rank

    @property
    def world_size(self) -> int:
        """Number of ranks in the manager's group."""
        return self.decisions.world_size

    def path(self, prefix: str) -> str:
        """Return the absolute path of a checkpoint, for messages."""
        return str(self.directory.attempt_called(prefix))

    def shown(self, prefix: str) -> str:
        """Return the path of a checkpoint as callers get it."""
        return self.directory.path_of(prefix)

    def step(self) -> int | None:
        """Return the training step; None without a step counter."""
        return None if self.read_step is None else self.read_step()

    def check_alive(self) -> None:
        """Raise ``PeerLost`` or ``PeerTimeout`` if another rank is known to be gone."""
        if self.liveness is not None and self.liveness.verdict is not None:
            who = f"rank {self.rank} of {self.world_size}"
            raise broken_by(self.liveness.verdict, who)

    def on_disk(
        self,
        channel: Channel,
        what: str,
        body: Callable[[], _Result],
        *,
        fills_tensors: bool = False,
        yields: bool = False,
    ) -> _Result:
        """Do this rank's own storage work; the others are told that it gets on.

        Args:
            channel: Of the thread that waits for it.
            what: For errors on other ranks: what this one is doing.
            body: Runs on another thread.
            fills_tensors: Whether it writes into live tensors.
            yields: Whether whoever else wants the processor goes first.

        Raises:
            StorageTimeout: A call into the filesystem hangs. The body ends with it, if
                it ever comes back.
            ManagerBroken: Another rank is gone meanwhile; the body ends likewise.
        """
        channel.lane.be_at(what)
        body = on_the_same_device(body)
        return channel.lane.worker.run(
            body, self._while_waiting, fills_tensors=fills_tensors, yields=yields
        )

    def _while_waiting(self, has_progressed: bool) -> None:
        if has_progressed and self.liveness is not None:
            self.liveness.note_progress()
        self.check_alive()

    def close_channels(self) -> None:
        """Give the groups back, when all ranks are done with them."""
        self.decisions.close()
        self.commits.close()

    def take_lists(self, answer: Answer) -> None:
        """Take over the chief's lists from an answer."""
        self.latest = answer["latest"]
        self.checkpoints = answer["checkpoints"]

    def lists(self) -> Answer:
        """Return the chief's lists for an answer; on the chief only."""
        assert self.chief is not None
        latest = self.chief.latest
        return {
            "latest": None if latest is None else latest.prefix,
            "checkpoints": [attempt.prefix for attempt in self.chief.checkpoints],
        }

    def wait_for_deletions(self) -> bool:
        """Wait until the chief's deletions are through, within the deadline."""
        assert self.chief is not None
        return self.chief.settle(self.timeout_seconds)


def on_the_same_device(body: Callable[[], _Result]) -> Callable[[], _Result]:
    """Keep the caller's device and stream, which belong to its thread.

    Copies from the device then wait for what the caller has put into its stream.
    """
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return body
    stream = torch.cuda.current_stream()

    def body_in_stream() -> _Result:
        with torch.cuda.stream(stream):
            return body()

    return body_in_stream


def own_file_of(job: Job, captured: Captured, layouts: Layouts) -> OwnFile:
    """Return what this rank writes, made once for as long as that does not change."""
    if job.own_file is None or not job.own_file.is_of(captured, layouts):
        with collector_paused():
            job.own_file = OwnFile(captured, layouts, job.rank)
    return job.own_file


def draft_of(job: Job, attempt: Attempt, captured: Captured, file: OwnFile) -> Draft:
    """Draft the header of this rank's file."""
    return Draft(
        file.outline,
        attempt=attempt.published,
        rank=job.rank,
        world_size=job.world_size,
        per_rank_values=captured.per_rank.values,
    )


class Ran(Generic[_Result]):
    """What a phase came to on this rank: a result, or the error that will be its vote.

    Attributes:
        error: The error; None if there was none.
        seconds: How long it took.
    """

    def __init__(self, body: Callable[[], _Result]) -> None:
        self.error: BaseException | None = None
        began = time.monotonic()
        try:
            self._result = body()
        except BaseException as error:
            self.error = error
        self.seconds = time.monotonic() - began

    def value(self) -> _Result:
        """Return the result, or raise the error."""
        if self.error is not None:
            raise self.error
        return self._result

    @property
    def result(self) -> _Result:
        """The result; to be asked for only when all ranks have agreed to go on."""
        assert self.error is None, self.error
        return self._result


def agree(
    channel: Channel,
    phase: Phase,
    ran: Ran[_Result],
    decide: Decide,
    *,
    says: Callable[[_Result], Vote] | None = None,
    status_of: Callable[[BaseException], Status] = lambda _: Status.FAILED,
    how: How = AS_USUAL,
) -> Answer:
    """Vote on what a phase came to, and return the chief's answer: collective.

    An error becomes this rank's vote, whatever it is, so that no rank raises between two
    votes; once all agree, a rank raises its own error as the cause.

    Args:
        channel: Over which.
        phase: Where in the protocol.
        ran: What the phase came to here.
        decide: The chief's decision from all votes.
        says: Makes the vote from the result; by default it says that all is well.
        status_of: How this rank's error is to be judged.
        how: In which manner; see ``comm.How``.
    """
    if isinstance(ran.error, ManagerBroken):
        raise ran.error  # nobody is left to vote with
    voted = Ran(lambda: says(ran.result) if says and not ran.error else Vote(phase))
    original = ran.error or voted.error
    if original is None:
        vote = voted.result
    else:
        vote = failure(phase, original, status_of(original))
    vote = vote._replace(seconds=ran.seconds)
    try:
        answer = channel.consult(vote, decide, how=how)
    except DistckptError as error:
        if original is None or original is error:
            raise
        if not isinstance(original, Exception):
            raise original from error  # Ctrl-C and exit stay what they are
        raise error from original
    if original is not None and not isinstance(original, Exception):
        raise original
    return answer
