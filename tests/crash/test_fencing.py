"""Two managers of one directory, switched at every call: only the newer one goes on."""

from __future__ import annotations

import os
import random
import shutil
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
from scenario import (
    TABLE,
    Listing,
    Lost,
    Saved,
    Torn,
    after_commit,
    check_readable,
    claim,
    claim_and_check_clean,
    in_workers,
    make_chief,
    write_shards,
)
from storage_calls import Call, intercepted

from distckpt import janitor, paths, state, storage
from distckpt.chief import Chief
from distckpt.errors import DistckptError, FencedError, OutcomeUnknown, StorageError
from distckpt.record import CLAIM, Record, digest
from distckpt.values import encode

OLD, NEW = "old", "new"

# Hundreds of crash points; a busy machine may take its time.
pytestmark = pytest.mark.timeout(400)

_NUM_RANDOM = 150
_MAX_SWITCHES = 6
_PATIENCE_SECONDS = 20.0

_DESTROYING = ("remove_file", "remove_tree", "rename")


class Baton:
    """Lets one of two threads run, and changes over just before chosen calls.

    Attributes:
        num_calls: How many calls each has made.
    """

    def __init__(self, stops: Mapping[str, set[int]]) -> None:
        self._stops = stops
        self._turn = {OLD: threading.Semaphore(1), NEW: threading.Semaphore(0)}
        self._ended: set[str] = set()
        self.num_calls = {OLD: 0, NEW: 0}

    def start(self, me: str) -> None:
        """Wait for the first turn."""
        self._wait(me)

    def call(self, me: str) -> None:
        """Count one call, and change over before it if it is a chosen one."""
        index, self.num_calls[me] = self.num_calls[me], self.num_calls[me] + 1
        if index in self._stops.get(me, ()) and _other(me) not in self._ended:
            self._turn[_other(me)].release()
            self._wait(me)

    def end(self, me: str) -> None:
        """Let the other one run to its end."""
        self._ended.add(me)
        self._turn[_other(me)].release()

    def _wait(self, me: str) -> None:
        if not self._turn[me].acquire(timeout=_PATIENCE_SECONDS):
            msg = f"{me} waits for its turn for ever"
            raise TimeoutError(msg)


def _other(me: str) -> str:
    return NEW if me == OLD else OLD


@dataclass(slots=True)
class Actor:
    """One manager: what it does, and what it was told.

    Attributes:
        name: ``OLD`` or ``NEW``.
        tasks: What it saves: seeds, with a number where one is asked for.
        chief: Its chief.
        tried: The attempts that it tried to commit.
        committed: Those that were acknowledged.
        unknown: Those of which the outcome was called unknown.
        fenced: Whether it was told that it is fenced.
        created: Files that it created.
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
                layouts=[TABLE],
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


class Duel:
    """One schedule of two managers in one directory, and what came of it."""

    def __init__(self, directory: str, stops: Mapping[str, set[int]]) -> None:
        self.directory = directory
        self.baton = Baton(stops)
        self.actors = {
            OLD: Actor(OLD, [(1, None), (2, None), (3, None), (4, 2)]),
            NEW: Actor(NEW, [(11, None), (12, None)]),
        }
        self.history: list[Record] = []

    def run(self) -> None:
        """Run both to their ends."""
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
        result = call.run()
        if call.name == "NewFile.__init__":
            actor.created.add(os.path.basename(call.arguments[1]))
        elif call.name == "link":
            self._linked(actor, call.arguments[1])
        return result

    def _linked(self, actor: Actor, path: str) -> None:
        actor.created.add(os.path.basename(path))
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
            actor.wrong.append(f"{call.name} {name} in epoch {epoch}")

    # Afterwards

    def check(self) -> None:
        """Check that history is one line, and that nothing of it is lost."""
        wrong = [f"{a.name}: {text}" for a in self.actors.values() for text in a.wrong]
        if wrong:
            raise Lost("; ".join(wrong))
        listing = self._check_history()
        self._check_fences()
        check_readable(self.directory, [listing], contiguous=False)
        claim_and_check_clean(self.directory)

    def _check_history(self) -> Listing:
        old, new = self.actors[OLD], self.actors[NEW]
        saved_by_name = {s.published: s for s in (*old.tried, *new.tried)}
        listing: Listing = ()
        recorded: list[Saved] = []
        for before, after in zip([None, *self.history], self.history, strict=False):
            if before is not None:
                _demand(after.number == before.number + 1, f"{after.number} skips")
                _demand(after.previous == digest(before.encode()), f"{after.number} forks")
            if after.action == CLAIM:
                _demand(after.epoch == (before.epoch if before else 0) + 1, "epoch")
                _demand(before is None or _same_lists(before, after), "claim's lists")
                continue
            assert before is not None
            _demand(after.writer == before.writer, f"{after.number} of a fenced writer")
            saved = saved_by_name[after.live[-1].attempt.published]
            recorded.append(saved)
            listing = after_commit(listing, saved)
            names = [entry.attempt.published for entry in after.live]
            _demand(names == [each.published for each in listing], f"{names}, {listing}")
        acknowledged = {*old.committed, *new.committed}
        uncertain = {*old.unknown, *new.unknown}
        _demand(acknowledged <= {*recorded}, f"{acknowledged} acknowledged, {recorded}")
        # Told to be fenced, a writer does not know whether its last commit came before;
        # both say so.
        told = {actor.tried[-1] for actor in (old, new) if actor.fenced and actor.tried}
        _demand({*recorded} <= acknowledged | uncertain | told, f"{recorded} recorded")
        return listing

    def _check_fences(self) -> None:
        """Check that the one with the newest claim goes on, and the other cannot."""
        newest = self.history[-1].writer
        for actor in self.actors.values():
            assert actor.chief is not None
            if actor.chief._writer == newest:
                _demand(not actor.fenced, f"{actor.name} was fenced by nobody")
            else:
                actor.save_once_more(self.directory)
                _demand(actor.fenced, f"{actor.name} goes on")


def _same_lists(one: Record, other: Record) -> bool:
    return (one.live, one.kept, one.bad, one.releasing) == (
        other.live,
        other.kept,
        other.bad,
        other.releasing,
    )


def _demand(condition: bool, text: str) -> None:
    if not condition:
        raise Lost(text)


def _run_schedules(
    scratch: str, schedules: list[dict[str, set[int]]]
) -> tuple[list[str], int]:
    def work(folder: str, stops: dict[str, set[int]]) -> tuple[str, bool]:
        directory = os.path.join(folder, "run")
        shutil.rmtree(directory, ignore_errors=True)
        duel = Duel(directory, stops)
        duel.run()
        try:
            duel.check()
        except (Torn, Lost, DistckptError) as error:
            return f"{stops}: {type(error).__name__}: {error}", True
        finally:
            duel.close()
        return "", duel.actors[OLD].fenced

    results = in_workers(scratch, schedules, work)
    return [text for text, _ in results if text], sum(fenced for _, fenced in results)


def _num_calls(scratch: str) -> dict[str, int]:
    duel = Duel(os.path.join(scratch, "counted"), {})
    duel.run()
    duel.close()
    return duel.baton.num_calls


@pytest.mark.parametrize("kept_records", [64, 2])
def test_old_chief_stopped_at_every_call_is_fenced(
    scratch: str,
    report_figures: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    kept_records: int,
):
    """A chief that sleeps while a newer one claims and saves can harm nothing after."""
    monkeypatch.setattr(state, "_KEPT_RECORDS", kept_records)
    calls = _num_calls(scratch)
    schedules = [{OLD: {index}} for index in range(calls[OLD])]
    wrong, num_fenced = _run_schedules(scratch, schedules)
    report_figures(f"{len(schedules)} schedules, {num_fenced} fenced, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong[:5])
    assert num_fenced > 100


@pytest.mark.parametrize("kept_records", [64, 2])
def test_both_chiefs_stopped_at_random_calls_stay_in_line(
    scratch: str,
    report_figures: Callable[[str], None],
    monkeypatch: pytest.MonkeyPatch,
    kept_records: int,
):
    """Two chiefs that wake and sleep by turns make one history between them."""
    monkeypatch.setattr(state, "_KEPT_RECORDS", kept_records)
    calls = _num_calls(scratch)
    source = random.Random(kept_records)
    schedules = []
    for _ in range(_NUM_RANDOM):
        num = source.randint(1, _MAX_SWITCHES // 2)
        schedules.append(
            {name: set(source.sample(range(calls[name]), num)) for name in (OLD, NEW)}
        )
    wrong, num_fenced = _run_schedules(scratch, schedules)
    report_figures(f"{len(schedules)} schedules, {num_fenced} fenced, {len(wrong)} wrong")
    assert not wrong, "\n".join(wrong[:5])


# The tests themselves: the known mistakes must be found out.


def test_sweep_without_epoch_rule_is_found(
    scratch: str, report_figures: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
):
    """A sweep of all that is not listed deletes what a newer chief has committed."""
    honest = janitor._sweep

    def greedy(directory: str, epoch: int, *rest: Any) -> None:
        honest(directory, epoch + 1000, *rest)

    monkeypatch.setattr(janitor, "_sweep", greedy)
    # While the old chief claims: its sweep is yet to come when it is stopped.
    schedules = [{OLD: {index}} for index in range(60)]
    wrong, _ = _run_schedules(scratch, schedules)
    report_figures(f"{len(schedules)} schedules, {len(wrong)} wrong")
    assert wrong


def test_append_by_rename_is_found(
    scratch: str, report_figures: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
):
    """A record that replaces another lets a stopped chief undo what was committed."""

    def link_over(source: str, target: str) -> None:
        copy = f"{source[:-4]}.copy"
        os.link(source, copy)
        os.rename(copy, target)

    link_over.__module__ = storage.__name__
    monkeypatch.setattr(storage, "link", link_over)
    schedules = [{OLD: {index}} for index in range(_num_calls(scratch)[OLD])]
    wrong, _ = _run_schedules(scratch, schedules)
    report_figures(f"{len(schedules)} schedules, {len(wrong)} wrong")
    assert wrong
