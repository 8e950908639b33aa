"""Several managers of one directory that take turns: what each does and was told.

Only one of them runs at any time; where it hands over follows from the schedule alone.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import scenario
from figures import Hung, Lost, demand
from scenario import (
    Listing,
    Saved,
    after_commit,
    check_readable,
    claim,
    claim_and_check_clean,
    make_chief,
    write_shards,
)
from storage_calls import Call, intercepted

from distckpt import paths, state
from distckpt.chief import Chief
from distckpt.errors import FencedError, OutcomeUnknown, StorageError
from distckpt.record import CLAIM, Record, digest
from distckpt.values import encode

OLD, NEW, THIRD = "old", "new", "third"

# Of each actor: just before which of its calls it hands over, and to whom.
Stops = Mapping[str, Mapping[int, str]]

_PATIENCE_SECONDS = 200.0
_DESTROYING = ("remove_file", "remove_tree", "rename")


class Baton:
    """Lets one of several threads run, and changes over just before chosen calls.

    Attributes:
        num_calls: How many calls each has made.
    """

    def __init__(self, names: Sequence[str], stops: Stops) -> None:
        self._stops = stops
        self._turn = {name: threading.Semaphore(0) for name in names}
        self._turn[names[0]].release()
        self._running = [*names]
        self.num_calls = dict.fromkeys(names, 0)

    def start(self, me: str) -> None:
        """Wait for the first turn."""
        self._wait(me)

    def call(self, me: str) -> None:
        """Count one call, and change over before it if it is a chosen one."""
        index, self.num_calls[me] = self.num_calls[me], self.num_calls[me] + 1
        other = self._stops.get(me, {}).get(index)
        if other is not None and other != me and other in self._running:
            self._turn[other].release()
            self._wait(me)

    def end(self, me: str) -> None:
        """Let the others run to their ends, one after the other."""
        self._running.remove(me)
        if self._running:
            self._turn[self._running[0]].release()

    def _wait(self, me: str) -> None:
        if not self._turn[me].acquire(timeout=_PATIENCE_SECONDS):
            msg = f"{me} waits for its turn for ever"
            raise TimeoutError(msg)


@dataclass(slots=True)
class Actor:
    """One manager: what it does, and what it was told.

    Attributes:
        name: Which one.
        tasks: What it saves: seeds, with a number where one is asked for.
        chief: Its chief.
        tried: The attempts that it tried to commit.
        committed: Those that were acknowledged.
        unknown: Those of which the outcome was called unknown.
        fenced: Whether it was told that it is fenced.
        created: Files that it created, or tried to.
        wrong: What should not have happened.
    """

    name: str
    tasks: list[tuple[int, int | None]]
    chief: Chief | None = None
    tried: list[Saved] = field(default_factory=list)
    committed: list[Saved] = field(default_factory=list)
    unknown: list[Saved] = field(default_factory=list)
    fenced: bool = False
    created: set[str] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def live(self, directory: str) -> None:
        """Claim and save everything, until fenced."""
        self.chief = make_chief(directory)
        claim(self.chief)
        for seed, number in self.tasks:
            if not self._save(directory, seed, number):
                break

    def save_once_more(self, directory: str) -> None:
        """Try one more save, as training that goes on would."""
        self.fenced = False
        self._save(directory, 99, None)

    def _save(self, directory: str, seed: int, number: int | None) -> bool:
        assert self.chief is not None
        counter = max((e.attempt.number for e in self.chief.candidates), default=0)
        try:
            attempt = self.chief.begin(number, counter)
        except FencedError:
            self.fenced = True
            return False
        try:
            shards = write_shards(directory, attempt, seed)
        except StorageError:
            # The directory was swept under a rank: it can only say so. The others learn
            # at the next question to the chief why.
            self.chief.abandon(attempt)
            return True
        saved = Saved(attempt.published, seed)
        self.tried.append(saved)
        try:
            self.chief.commit(
                attempt,
                step=seed,
                shards=shards,
                layouts=[scenario.TABLE],
                values={"seed": encode(seed, "seed")},
            )
        except FencedError:
            self.fenced = True
            return False
        except OutcomeUnknown:
            self.unknown.append(saved)
            return True
        self.committed.append(saved)
        return True


class Contest:
    """One schedule of some managers in one directory, and what came of it."""

    def __init__(self, directory: str, stops: Stops, num_actors: int = 2) -> None:
        self.directory = directory
        every = [
            Actor(OLD, [(1, None), (2, None), (3, None), (4, 2)]),
            Actor(NEW, [(11, None), (12, None)]),
            Actor(THIRD, [(21, None), (22, 1)]),
        ]
        self.actors = {actor.name: actor for actor in every[:num_actors]}
        self.baton = Baton([*self.actors], stops)
        self.history: list[Record] = []

    def run(self) -> None:
        """Run all to their ends."""
        threads = [
            threading.Thread(target=self._act, args=(actor,), name=name)
            for name, actor in self.actors.items()
        ]
        with intercepted(self._hook):
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

    def close(self) -> None:
        """Let go of the directory."""
        for actor in self.actors.values():
            if actor.chief is not None:
                actor.chief.close()

    def _act(self, actor: Actor) -> None:
        try:
            self.baton.start(actor.name)
            actor.live(self.directory)
        except Exception as error:
            actor.wrong.append(f"{type(error).__name__}: {error}")
        finally:
            self.baton.end(actor.name)

    def _hook(self, call: Call) -> Any:
        actor = self.actors.get(threading.current_thread().name)
        if actor is None:
            return call.run()
        self.baton.call(actor.name)
        if call.name in _DESTROYING:
            self._judge(actor, call)
        elif call.name in ("NewFile.__init__", "link"):
            # Also if it then fails: what is reported as failed may be there.
            actor.created.add(os.path.basename(call.arguments[1]))
        result = call.run()
        if call.name == "link":
            self._linked(call.arguments[1])
        return result

    def _linked(self, path: str) -> None:
        number = paths.parse_record_file(os.path.basename(path))
        newest = self.history[-1].number if self.history else 0
        # A number that was taken and pruned may be taken again, to no effect.
        if number is not None and number > newest:
            with open(path, "rb") as file:  # not through the module: it is no call
                self.history.append(Record.decode(file.read()))

    def _judge(self, actor: Actor, call: Call) -> None:
        """Note what a writer may not touch."""
        name = os.path.basename(call.arguments[0])
        epoch = (actor.chief and actor.chief._epoch) or 0
        attempt = (
            paths.parse_published(name)
            or paths.parse_pending(name)
            or paths.parse_trash(name)
        )
        temporary = paths.parse_temporary_file(name)
        probe = paths.parse_probe_file(name)
        number = paths.parse_record_file(name)
        if attempt is not None:
            allowed = attempt.epoch <= epoch
        elif number is not None:
            allowed = number <= self.history[-1].number - state._KEPT_RECORDS
        else:
            written_in = temporary if probe is None else probe
            allowed = name in actor.created or (
                written_in is not None and written_in < epoch
            )
        if not allowed:
            actor.wrong.append(f"{call.label} {name} in epoch {epoch}")

    # Afterwards

    def check(self) -> None:
        """Check that history is one line, and that nothing of it is lost."""
        wrong = [f"{a.name}: {text}" for a in self.actors.values() for text in a.wrong]
        if wrong:
            text = "; ".join(wrong)
            raise (Hung if "for ever" in text else Lost)(text)
        listing = self._check_history()
        self._check_fences()
        check_readable(self.directory, [listing], contiguous=False)
        claim_and_check_clean(self.directory)

    def _check_history(self) -> Listing:
        actors = self.actors.values()
        saved_by_name = {s.published: s for actor in actors for s in actor.tried}
        listing: Listing = ()
        recorded: list[Saved] = []
        for before, after in zip([None, *self.history], self.history, strict=False):
            if before is not None:
                demand(Lost, after.number == before.number + 1, f"{after.number} skips")
                demand(
                    Lost, after.previous == digest(before.encode()), f"{after.number} forks"
                )
            if after.action == CLAIM:
                demand(Lost, after.epoch == (before.epoch if before else 0) + 1, "epoch")
                demand(Lost, before is None or _same_lists(before, after), "claim's lists")
                continue
            assert before is not None
            demand(
                Lost, after.writer == before.writer, f"{after.number} of a fenced writer"
            )
            saved = saved_by_name[after.live[-1].attempt.published]
            recorded.append(saved)
            listing = after_commit(listing, saved)
            names = [entry.attempt.published for entry in after.live]
            demand(
                Lost, names == [each.published for each in listing], f"{names}, {listing}"
            )
        acknowledged = {saved for actor in actors for saved in actor.committed}
        uncertain = {saved for actor in actors for saved in actor.unknown}
        demand(
            Lost, acknowledged <= {*recorded}, f"{acknowledged} acknowledged, {recorded}"
        )
        # Told to be fenced, a writer does not know whether its last commit came before;
        # all say so.
        told = {actor.tried[-1] for actor in actors if actor.fenced and actor.tried}
        demand(Lost, {*recorded} <= acknowledged | uncertain | told, f"{recorded} recorded")
        return listing

    def _check_fences(self) -> None:
        """Check that the one with the newest claim goes on, and no other can."""
        newest = self.history[-1].writer
        for actor in self.actors.values():
            assert actor.chief is not None
            if actor.chief._writer == newest:
                demand(Lost, not actor.fenced, f"{actor.name} was fenced by nobody")
            else:
                actor.save_once_more(self.directory)
                demand(Lost, actor.fenced, f"{actor.name} goes on")


def _same_lists(one: Record, other: Record) -> bool:
    return (one.live, one.kept, one.bad, one.releasing) == (
        other.live,
        other.kept,
        other.bad,
        other.releasing,
    )
