"""One manager on one rank: its channels, its directory, its lists."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch

from distckpt.chief import Chief
from distckpt.comm import Answer, Channel
from distckpt.events import Events
from distckpt.liveness import Liveness
from distckpt.run_directory import RunDirectory
from distckpt.waiting import broken_by

_Result = TypeVar("_Result")


@dataclass(slots=True)
class Session:
    """One manager on one rank.

    ``save_state.py`` has the state that a save needs, ``cadence.py`` the rules for when.

    Attributes:
        directory: The run directory.
        decisions: Channel of the caller's thread.
        commits: Channel of what follows capture: of the same thread, or of one that
            brings an asynchronous save to its end.
        liveness: Tells which ranks are still there; None with one rank.
        timeout_seconds: Deadline of every wait for another rank.
        events: The callbacks that are told what happens.
        chief: The chief's side; None on the other ranks.
        claimed: Whether the directory is ours to write.
        latest: Prefix of the newest checkpoint.
        checkpoints: Prefixes of the managed ones, oldest first.
        reads_once: Whether what all ranks want is read by one of them, for all.
        undefined: Why tensors hold a mixture, if a restore failed half-way.
    """

    directory: RunDirectory
    decisions: Channel
    commits: Channel
    liveness: Liveness | None
    timeout_seconds: float
    events: Events = field(default_factory=Events)
    chief: Chief | None = None
    claimed: bool = False
    latest: str | None = None
    checkpoints: list[str] = field(default_factory=list)
    reads_once: bool = False
    undefined: str = ""

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

    def take_changes(self, changes: Answer) -> None:
        """Take over how a commit has changed the chief's lists."""
        removed = {*changes["removed"]}
        kept = [prefix for prefix in self.checkpoints if prefix not in removed]
        self.latest = changes["latest"]
        self.checkpoints = [*kept, *changes["added"]]

    def changes(self, saved: str) -> Answer:
        """Return how a commit has changed the chief's lists; on the chief only.

        Not the lists themselves: they would grow for ever.

        Args:
            saved: Prefix of the checkpoint that was committed.
        """
        assert self.chief is not None
        held, now = self.checkpoints, [a.prefix for a in self.chief.checkpoints]
        # What is saved again moves to the end.
        before, after = {*held} - {saved}, {*now} - {saved}
        return {
            "latest": saved,
            "removed": [prefix for prefix in held if prefix not in after],
            # Not only the one just saved: a commit of unknown outcome may have turned up.
            "added": [prefix for prefix in now if prefix not in before],
        }

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
