"""Mutants of the protocol: each has one step wrong, and a named test that must find it.

``python tests/crash/mutants.py`` plays them all, one process of pytest each; a mutant that
no test kills is a hole in the tests. Meanwhile ``DISTCKPT_MUTANT`` names it.

On ext4 and xfs any fsync makes earlier changes of names durable, too. So some mutants do no
harm there; what finds them are the tests of the order of durable steps.
"""

from __future__ import annotations

import argparse
import inspect
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from distckpt import (
    chief,
    janitor,
    leases,
    paths,
    readers,
    shard_file,
    state,
    strict_json,
)
from distckpt.chief import Chief
from distckpt.errors import StorageError
from distckpt.run_directory import RunDirectory
from distckpt.state import Head
from distckpt.storage import posix, posix_store
from distckpt.storage.posix_store import PosixStore

HERE = Path(__file__).parent
VARIABLE = "DISTCKPT_MUTANT"


class Mutant(NamedTuple):
    """One mutant.

    Attributes:
        apply: Makes it.
        killed_by: The test that must fail.
        only_in_full: Whether the sample of it that launch/test.sh plays does not fail.
    """

    apply: Callable[[], None]
    killed_by: str
    only_in_full: bool = False


MUTANTS: dict[str, Mutant] = {}
_POWER = "tests/crash/test_power_cut.py::test_power_cuts_lose_nothing"
_KILLS = "tests/crash/test_kill_every_call.py::test_kill_at_every_call_loses_nothing"
_SCHEDULES = "tests/crash/test_schedules.py::test_incarnations_at_random_calls_stay_in_line"
_ERRORS = "tests/crash/test_errors_at_every_call.py::test_errors_harm_only_that_save"
_ROT = "tests/crash/test_rot.py::test_rot_is_found_and_the_right_file_named"
_SWAPPED = "tests/crash/test_rot.py::test_manifests_that_change_places_are_found"
_CRAFTED = "tests/crash/test_crafted.py"
_PINS = "tests/crash/test_pins.py"


def _mutant(
    killed_by: str, *, only_in_full: bool = False
) -> Callable[[Callable[[], None]], Callable[[], None]]:
    def add(apply: Callable[[], None]) -> Callable[[], None]:
        name = apply.__name__.replace("_", "-")
        MUTANTS[name] = Mutant(apply, killed_by, only_in_full)
        return apply

    return add


# What was there before, for a test that goes on without the mutant.
_undo: list[Callable[[], None]] = []


def _put(owner: Any, name: str, new: Any) -> None:
    # What the crash tests stand between must look as if it came from there.
    if owner is posix and inspect.isfunction(new):
        new.__module__ = posix.__name__
    _undo.append(partial(setattr, owner, name, getattr(owner, name)))
    setattr(owner, name, new)


@contextmanager
def applied(name: str) -> Iterator[None]:
    """Be a mutant for a while."""
    MUTANTS[name].apply()
    try:
        yield
    finally:
        while _undo:
            _undo.pop()()


# What is not synced


def _sync_but(is_skipped: Callable[[str], bool]) -> None:
    honest = posix.sync_directory

    def sync_directory(path: str) -> None:
        if not is_skipped(path):
            honest(path)

    _put(posix, "sync_directory", sync_directory)


def _store_syncs_but(is_skipped: Callable[[str], bool]) -> None:
    """Leave a call out: who writes the calls down sees that it is not made."""

    class Storage:
        def __getattr__(self, name: str) -> Any:
            return sync_directory if name == "sync_directory" else getattr(posix, name)

    def sync_directory(path: str) -> None:
        if not is_skipped(path):
            posix.sync_directory(path)

    _put(posix_store, "posix", Storage())


@_mutant(_POWER)
def no_sync_of_files() -> None:
    """Leave the content of files to the kernel."""

    class Os:
        def __getattr__(self, name: str) -> Any:
            return (lambda _: None) if name == "fsync" else getattr(os, name)

    _put(posix, "os", Os())
    honest = os.fsync

    def sync_directory(path: str) -> None:
        descriptor = os.open(path, os.O_RDONLY)
        honest(descriptor)
        os.close(descriptor)

    _put(posix, "sync_directory", sync_directory)


@_mutant("tests/unit/test_chief.py::test_save_happens_in_the_durable_order")
def no_sync_of_the_published_name() -> None:
    """Do not sync the run directory."""
    _store_syncs_but(
        lambda path: os.path.exists(os.path.join(path, paths.RECORDS_DIRECTORY))
    )


@_mutant(_POWER)
def no_sync_of_the_records() -> None:
    """Do not sync the records' directory, nor what takes it along on the way."""
    _sync_but(lambda path: os.path.basename(path) == paths.RECORDS_DIRECTORY)
    _put(state, "write_copy", lambda directory, head: None)


@_mutant("tests/unit/test_chief.py::test_save_happens_in_the_durable_order")
def no_sync_of_the_pending_directory() -> None:
    """Do not sync the names of shard files and manifest."""
    _store_syncs_but(lambda path: paths.parse_pending(os.path.basename(path)) is not None)


@_mutant("tests/unit/test_storage.py")
def failed_fsync_tried_again() -> None:
    """Call fsync a second time, which reports success."""

    class Os:
        def __getattr__(self, name: str) -> Any:
            return twice if name == "fsync" else getattr(os, name)

    def twice(descriptor: int) -> None:
        try:
            os.fsync(descriptor)
        except OSError:
            os.fsync(descriptor)

    _put(posix, "os", Os())


# The order of steps


@_mutant(_KILLS)
def deleted_before_the_commit() -> None:
    """Delete what the record is about to release."""
    honest = Chief._append_commit

    def hasty(self: Chief, attempt: paths.Attempt, *rest: Any) -> None:
        for entry in self._live[:-1]:
            self._directory.discard(entry.attempt)
        honest(self, attempt, *rest)

    _put(Chief, "_append_commit", hasty)


@_mutant(_KILLS)
def recorded_before_published() -> None:
    """Append the record, then rename."""
    honest, rename = Chief._append_commit, posix.rename
    held: list[tuple[str, str]] = []

    def later(source: str, target: str) -> None:
        if paths.parse_published(os.path.basename(target)) is not None:
            held.append((source, target))
        else:
            rename(source, target)

    def first(self: Chief, *arguments: Any) -> None:
        honest(self, *arguments)
        for source, target in held:
            rename(source, target)
        held.clear()

    _put(posix, "rename", later)
    _put(Chief, "_append_commit", first)


@_mutant(_KILLS)
def published_before_the_manifest() -> None:
    """Rename the directory, then write the manifest into it."""
    write, rename = posix.write_new_file, posix.rename
    held: list[tuple[str, bytes]] = []

    def later(path: str, data: bytes) -> None:
        if path.endswith(paths.MANIFEST_FILE):
            held.append((path, data))
        else:
            write(path, data)

    def first(source: str, target: str) -> None:
        rename(source, target)
        for path, data in held:
            write(os.path.join(target, os.path.basename(path)), data)
        held.clear()

    _put(posix, "write_new_file", later)
    _put(posix, "rename", first)


@_mutant(_KILLS)
def acknowledged_before_the_record() -> None:
    """Say that it is committed, and append the record with the next save."""
    honest, begin = Chief._append_commit, Chief.begin
    held: list[tuple[Any, ...]] = []

    def later(self: Chief, *arguments: Any) -> None:
        held.append(arguments)

    def first(self: Chief, *arguments: Any) -> paths.Attempt:
        for one in held:
            honest(self, *one)
        held.clear()
        return begin(self, *arguments)

    _put(Chief, "_append_commit", later)
    _put(Chief, "begin", first)


@_mutant("tests/unit/test_janitor.py::test_discarding_renames_and_syncs_before_it_deletes")
def deleted_in_place() -> None:
    """Delete a published attempt without renaming it first."""

    def in_place(self: PosixStore, folder: str, attempt: paths.Attempt) -> None:
        posix.remove_tree(os.path.join(folder, attempt.published))

    _put(PosixStore, "discard", in_place)


# Records


@_mutant(_KILLS)
def record_written_in_place() -> None:
    """Write a record under its final name."""

    def in_place(directory: RunDirectory, new: Any) -> Head:
        path = str(directory.places.record(new.number))
        posix.write_new_file(path, new.encode())
        posix.sync_directory(os.path.dirname(path))
        return Head(new, state.digest(new.encode()))

    _put(state, "append", in_place)


@_mutant(_SCHEDULES)
def record_that_replaces_another() -> None:
    """Give a record its name by rename."""

    def link(source: str, target: str) -> None:
        copy = f"{source[:-4]}.copy"
        os.link(source, copy)
        os.rename(copy, target)

    _put(posix, "link", link)


@_mutant(_SCHEDULES)
def claim_that_does_not_read_again() -> None:
    """Take the next number, and keep the lists that were read before."""
    honest = Chief._load

    def stale(self: Chief, head: Head | None) -> None:
        if hasattr(self, "_live"):
            self._head = head
        else:
            honest(self, head)

    def record_of_old_lists(self: Chief) -> Any:
        found = claim_record(self)
        if self._head is None:
            return found
        return chief.replace(found, live=self._live, kept=self._kept, releasing=())

    claim_record = Chief._claim_record
    _put(Chief, "_load", stale)
    _put(Chief, "_claim_record", record_of_old_lists)


@_mutant(_SCHEDULES)
def link_alone_taken_for_a_commit() -> None:
    """Do not look whether the number was taken, overtaken and pruned."""
    honest = state._newest_listed

    def newest(directory: RunDirectory) -> int:
        caller = sys._getframe(1).f_code.co_name
        return 0 if caller == "append" else honest(directory)

    _put(state, "_newest_listed", newest)


@_mutant("tests/unit/test_state.py")
def lost_reply_taken_for_a_failure() -> None:
    """Believe an error of the link."""

    def settled(name: str, data: bytes, error: StorageError) -> None:
        raise error

    _put(posix_store, "_settled", settled)


@_mutant(_ERRORS)
def unknown_outcome_taken_for_a_failure() -> None:
    """Remove an attempt whose record may be there."""

    def unknown(path: Any, error: StorageError) -> StorageError:
        return StorageError(str(error), operation="link", path=str(path))

    _put(state, "_unknown", unknown)


# Whose it is


@_mutant(_SCHEDULES)
def sweep_of_any_epoch() -> None:
    """Sweep whatever no list names."""
    honest = janitor._sweep

    def greedy(directory: RunDirectory, epoch: int, *rest: Any) -> None:
        honest(directory, epoch + 1000, *rest)

    _put(janitor, "_sweep", greedy)


@_mutant(_KILLS)
def attempts_with_one_name() -> None:
    """Use the name of an attempt again."""
    honest = paths.random_hex
    _put(paths, "random_hex", lambda size: "0" * 8 if size == 4 else honest(size))


@_mutant("tests/unit/test_chief.py")
def sweep_of_any_chain() -> None:
    """Sweep what another run directory's chain has made."""
    honest = janitor._discard_if_ours

    def careless(directory: RunDirectory, published: paths.Attempt, chain: str) -> None:
        found = janitor.chain_of(directory.attempt(published))
        honest(directory, published, found or chain)

    _put(janitor, "_discard_if_ours", careless)


# What others ask for


@_mutant(_PINS)
def leases_not_looked_for() -> None:
    """Delete what somebody reads."""
    _put(leases.Leases, "hold", lambda *_: False)


@_mutant(_PINS)
def requests_removed_before_the_record() -> None:
    """Take a pin up, and forget it when the commit fails or the chief dies."""
    honest = Chief._requests

    def hasty(self: Chief) -> Any:
        requests = honest(self)
        self.answer(requests)
        return requests

    _put(Chief, "_requests", hasty)


@_mutant("tests/unit/test_requests.py")
def request_taken_up_by_a_fenced_chief() -> None:
    """Answer what only the newer chief may answer."""
    honest = Chief._append_commit

    def early(self: Chief, manifest: Any, manifest_digest: str, requests: Any) -> None:
        self.answer(requests)
        honest(self, manifest, manifest_digest, requests)

    _put(Chief, "_append_commit", early)


# What is read


@_mutant(_ROT)
def checksums_not_compared() -> None:
    """Take any bytes."""
    _put(shard_file.ShardReader, "_compare", lambda *_: None)


@_mutant(_SWAPPED)
def manifests_digest_not_compared() -> None:
    """Take any manifest that says it is right."""
    honest = readers.read_manifest

    def careless(directory: Any, expected_digest: str | None = None) -> Any:
        return honest(directory)

    import distckpt.verify

    _put(readers, "read_manifest", careless)
    _put(distckpt.verify, "read_manifest", careless)


@_mutant(_CRAFTED)
def links_followed() -> None:
    """Open whatever a name leads to."""
    _put(posix, "_READ_FLAGS", posix._READ_FLAGS & ~os.O_NOFOLLOW)


@_mutant(_CRAFTED)
def last_of_two_keys_taken() -> None:
    """Read JSON as Python does."""
    import json

    _put(strict_json, "_DECODER", json.JSONDecoder())
    _put(strict_json, "_FAST_DECODER", json.JSONDecoder())


def apply_from_environment() -> None:
    """Be the mutant that the environment names, if it names one."""
    name = os.environ.get(VARIABLE)
    if name:
        MUTANTS[name].apply()


def main() -> None:
    """Play them all."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="only these")
    play(parser.parse_args().names or list(MUTANTS))


def is_found(name: str, *, in_full: bool) -> bool:
    """Tell whether the test that must find a mutant fails.

    Args:
        name: Of the mutant.
        in_full: Whether class full is played; else the part that launch/test.sh plays.
    """
    command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header"]
    command += ["-m", "full" if in_full else "not full and not long"]
    done = subprocess.run(
        [*command, MUTANTS[name].killed_by],
        cwd=HERE.parents[1],
        env={**os.environ, VARIABLE: name},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode == 0:
        return False
    # 1: a test has failed; anything else is no verdict.
    assert done.returncode == 1 and " failed" in done.stdout, done.stdout + done.stderr
    return True


def play(names: Sequence[str]) -> NoReturn:
    """Play some, and end this process with whether all were killed."""
    survived = []
    for name in names:
        began = time.monotonic()
        is_killed = is_found(name, in_full=MUTANTS[name].only_in_full)
        if not is_killed:
            survived.append(name)
        seconds = time.monotonic() - began
        verdict = "killed" if is_killed else "SURVIVED"
        test = MUTANTS[name].killed_by
        print(f"{verdict:8} {name:36} {seconds:5.0f} s  {test}", flush=True)
    print(f"{len(names)} mutants, {len(survived)} survived")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
