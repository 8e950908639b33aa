"""Rebuild the newest record of a run directory from the checkpoints that lie in it.

For a person, by way of ``distckpt repair``, when the records are damaged or lost: nothing
else ever guesses. It appends one record on top of all that is there, and neither changes
nor deletes anything; damaged records stay where they are.

An attempt is taken up if all of it verifies. So is one that was published and never
recorded, because its job died between the two: every rank has voted for it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from distckpt import paths, record, stamp, state
from distckpt.errors import DirectoryInUseError, FormatError, StorageError
from distckpt.identity import Identity
from distckpt.manifest import MAX_SIZE_BYTES, Manifest
from distckpt.paths import Attempt
from distckpt.readers import read_manifest
from distckpt.record import Entry, Record, digest
from distckpt.run_directory import RunDirectory
from distckpt.state import Head
from distckpt.verify import Begin, verify_attempt

_Read = TypeVar("_Read")

_logger = logging.getLogger(__name__)

LIVE, KEPT, BAD, RELEASING, LEFT = "live", "kept", "bad", "releasing", "left alone"

# Where records are lost, nobody knows how far they had come. A stopped writer that goes on
# must find its number taken or passed.
_LOST_RECORDS = 1_000_000
_BEFORE_FIRST_SECONDS = 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What becomes of one attempt's directory.

    Attributes:
        name: The directory.
        becomes: The list that it will be in, or ``LEFT``.
        why: For people.
    """

    name: str
    becomes: str
    why: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a repair finds, and what it will do.

    Attributes:
        directory: The run directory.
        damage: What is wrong with the records; "" if nothing is.
        basis: On what the new record builds, for people.
        verdicts: One an attempt, newest first.
        record: What is appended; None if nothing is to be repaired.
    """

    directory: RunDirectory
    damage: str
    basis: str
    verdicts: tuple[Verdict, ...]
    record: Record | None


@dataclass(frozen=True, slots=True)
class _Published:
    """A published attempt as it lies there; ``manifest`` is None if it cannot be read."""

    attempt: Attempt
    manifest: Manifest | None
    digest: str
    problem: str

    @property
    def order(self) -> tuple[int, float, int]:
        """Sorts by when it was made; clocks only decide within one claim."""
        created = 0.0 if self.manifest is None else self.manifest.created
        return self.attempt.epoch, created, self.attempt.number


def plan_repair(
    directory: RunDirectory, identity: Identity, begin: Begin = lambda _: lambda _: None
) -> Plan:
    """Look at everything, and say what a repair would do; writes nothing.

    Every byte of every published attempt is read, unless the records are whole.

    Args:
        directory: The run directory.
        identity: Who repairs, for the record.
        begin: Told how many bytes will be read; returns what is told when some were.

    Raises:
        UnsafeCheckpointError: The records are elsewhere, by way of a link.
        NewerFormatError: A newer version of distckpt wrote a record, or a checkpoint.
        StorageError: The directory cannot be read.
    """
    # Else the new record would be written wherever a link leads.
    directory.refuse_linked_records()
    damage = _damage_of(directory)
    if not damage:
        return Plan(directory, "", "", (), None)
    names = [name for name in directory.names() if paths.parse_published(name) is not None]
    basis, newest_number, what = _basis_of(directory, names)
    known = {} if basis is None else {entry.attempt: entry for entry in _all_of(basis)}
    advance = begin(sum(_size_of(directory, name) for name in names))
    found = [_look_at(directory, name, known, advance) for name in names]
    builder = _Builder(basis, newest_number, found, _highest_epoch(directory))
    return Plan(
        directory, damage, what, tuple(builder.verdicts()), builder.record(identity)
    )


def repair(plan: Plan) -> Head:
    """Do what a plan says: append its record.

    After return the run directory has a newest record that is whole. A plan that is no
    longer true, because a job has appended since, changes nothing.

    Raises:
        DirectoryInUseError: A job holds the directory.
        FencedError: A job has appended meanwhile.
        StorageError, OutcomeUnknown: It could not be written.
    """
    assert plan.record is not None, "there is nothing to repair"
    plan.directory.make_records()
    lock = plan.directory.owner()
    if not lock.acquire(0):
        msg = f"{plan.directory} is in use by a job; end that job before repairing it."
        raise DirectoryInUseError(msg)
    try:
        head = state.append(plan.directory, plan.record)
        try:
            state.write_copy(plan.directory, head)
        except StorageError as error:
            _logger.warning("the state file is behind the records: %s", error)
        return head
    finally:
        lock.release()


def _damage_of(directory: RunDirectory) -> str:
    """Say why the records cannot be used; "" if they can, or if there is nothing at all."""
    try:
        head = state.read_head(directory)
        if head is not None:
            state.refuse_lost_records(directory, head)
    except FormatError as error:
        return str(error)
    return ""


def _basis_of(
    directory: RunDirectory, names: Collection[str]
) -> tuple[Record | None, int, str]:
    """Find the newest record that is whole, also as the copy for people.

    Args:
        directory: The run directory.
        names: The published attempts in it.

    Returns:
        It, or None; the highest number that is known of; and which it is, for people.
    """
    numbers = state.record_numbers(directory)
    basis: Record | None = None
    what = "no record is left"
    for number in reversed(numbers):
        head = _or_none(state.read_numbered, directory, number)
        if head is not None:
            basis = head.record
            what = f"record {number} is the newest that is whole"
            break
    copied = _or_none(state.read_copy, directory)
    # People copy files: one that knows nothing of what is here is another directory's.
    if copied is not None and not any(
        e.attempt.published in names for e in _all_of(copied)
    ):
        copied = None
    if copied is not None and (basis is None or copied.number > basis.number):
        basis = copied
        what = f"the copy {paths.STATE_FILE!r} of record {copied.number} is whole"
    newest_number = max([*numbers, 0 if basis is None else basis.number], default=0)
    if not numbers:
        newest_number += _LOST_RECORDS
    return basis, newest_number, what


def _or_none(read: Callable[..., _Read], *arguments: Any) -> _Read | None:
    try:
        return read(*arguments)
    except (StorageError, FormatError):
        return None


def _all_of(basis: Record) -> Iterator[Entry]:
    yield from (*basis.live, *basis.kept, *basis.bad, *basis.releasing, *basis.missing)


def _size_of(directory: RunDirectory, name: str) -> int:
    manifest = _or_none(read_manifest, directory.attempt_called(name))
    return 0 if manifest is None else manifest.size_bytes


def _look_at(
    directory: RunDirectory,
    name: str,
    known: dict[Attempt, Entry],
    advance: Callable[[int], object],
) -> _Published:
    """Verify one attempt, by the record's word where there is one."""
    attempt = paths.parse_published(name)
    assert attempt is not None
    there = directory.attempt(attempt)
    expected = known[attempt].manifest if attempt in known else None
    report = verify_attempt(there, expected, advance)
    problem = "" if report.ok else report.problems[0]
    try:
        data = there.read_manifest(MAX_SIZE_BYTES)
        manifest = Manifest.decode(data)
    except (StorageError, FormatError):
        return _Published(attempt, None, "", problem)
    if not problem and manifest.attempt != attempt:
        problem = f"its manifest is that of {manifest.attempt.published}"
    return _Published(attempt, manifest, digest(data), problem)


def _highest_epoch(directory: RunDirectory) -> int:
    """Return the highest epoch that any name in the directory speaks of."""
    epochs = [0]
    for name in directory.names():
        attempt = (
            paths.parse_published(name)
            or paths.parse_pending(name)
            or paths.parse_trash(name)
        )
        if attempt is not None:
            epochs.append(attempt.epoch)
        epochs.append(paths.parse_probe_file(name) or 0)
    return max(epochs)


class _Builder:
    """Sorts what was found into the lists of a new record."""

    def __init__(
        self,
        basis: Record | None,
        newest_number: int,
        found: Sequence[_Published],
        highest_epoch: int,
    ) -> None:
        self._basis = basis
        self._newest_number = newest_number
        self._epoch = 1 + max(highest_epoch, 0 if basis is None else basis.epoch)
        self._found = sorted(found, key=lambda one: one.order)
        self._chain = self._choose_chain()
        self._lists: dict[str, list[Entry]] = {LIVE: [], KEPT: [], BAD: [], RELEASING: []}
        self._verdicts: dict[str, Verdict] = {}
        self._next_number = newest_number + 1
        for one in self._found:
            self._sort(one)
        self._release_replaced()

    def _choose_chain(self) -> str:
        """Take the chain of the basis, else that of the newest checkpoint that is whole."""
        if self._basis is not None:
            return self._basis.chain
        whole = [one for one in self._found if not one.problem]
        known = [one.manifest for one in whole or self._found if one.manifest is not None]
        return known[-1].chain if known else paths.random_hex(8)

    def _sort(self, one: _Published) -> None:
        known = self._known(one.attempt)
        if known is not None:
            where, entry = known
            if where in (LIVE, KEPT) and one.problem:
                self._put(BAD, entry, f"damaged: {one.problem}")
            else:
                self._put(where, entry, f"as the last whole record says: {where}")
        elif one.manifest is None:
            self._leave(one, f"its manifest cannot be read: {one.problem}")
        elif one.manifest.chain != self._chain:
            self._leave(one, "it comes from another run directory")
        else:
            entry = self._entry_of(one, one.manifest)
            if one.problem:
                self._put(BAD, entry, f"damaged: {one.problem}")
            else:
                self._put(LIVE, entry, "whole, and in no record that is left")

    def _known(self, attempt: Attempt) -> tuple[str, Entry] | None:
        if self._basis is not None:
            for where in self._lists:
                for entry in getattr(self._basis, where):
                    if entry.attempt == attempt:
                        return where, entry
        return None

    def _entry_of(self, one: _Published, manifest: Manifest) -> Entry:
        """Make the entry that its commit would have made, as far as that is known."""
        number, self._next_number = self._next_number, self._next_number + 1
        time_ = min(manifest.created, time.time())
        return Entry(
            one.attempt,
            number,
            float(time_),
            manifest.step,
            one.digest,
            size_bytes=manifest.size_bytes,
            metrics=manifest.remarks.listed,
        )

    def _put(self, where: str, entry: Entry, why: str) -> None:
        self._lists[where].append(entry)
        name = entry.attempt.published
        self._verdicts[name] = Verdict(name, where, why)

    def _leave(self, one: _Published, why: str) -> None:
        name = one.attempt.published
        self._verdicts[name] = Verdict(name, LEFT, why)

    def _release_replaced(self) -> None:
        """Of two with one number the newer one counts, as when it was saved again."""
        newest_first = sorted(
            (*self._lists[LIVE], *self._lists[KEPT]),
            key=lambda entry: entry.record,
            reverse=True,
        )
        names: dict[str, str] = {}
        for entry in newest_first:
            prefix, name = entry.attempt.prefix, entry.attempt.published
            if prefix not in names:
                names[prefix] = name
                continue
            for where in (LIVE, KEPT):
                self._lists[where] = [e for e in self._lists[where] if e != entry]
            why = f"{names[prefix]} has replaced it; the next claim deletes it"
            self._put(RELEASING, entry, why)

    def verdicts(self) -> list[Verdict]:
        """Return them, newest first."""
        return [self._verdicts[one.attempt.published] for one in reversed(self._found)]

    def record(self, identity: Identity) -> Record:
        """Make the record."""
        basis = self._basis
        # In the order of their commits, which is TensorFlow's.
        live = sorted(self._lists[LIVE], key=lambda entry: entry.record)
        times = [entry.time for entries in self._lists.values() for entry in entries]
        last_preserved = None if basis is None else basis.last_preserved
        if last_preserved is None and times:
            # All of them newer than it, else TensorFlow's recovery rule forgets them.
            last_preserved = min(times) - _BEFORE_FIRST_SECONDS
        steps = [entry.step for entry in live if entry.step is not None]
        return Record(
            number=self._next_number,
            previous=digest(b"" if basis is None else basis.encode()),
            chain=self._chain,
            epoch=self._epoch,
            writer=paths.random_hex(8),
            run=identity.run,
            restart=identity.restart,
            action=record.REPAIR,
            written=float(time.time()),
            live=tuple(live),
            kept=tuple(self._lists[KEPT]),
            bad=tuple(self._lists[BAD]),
            releasing=tuple(self._lists[RELEASING]),
            last_preserved=last_preserved,
            last_step=steps[-1] if steps else None,
            rules=() if basis is None else basis.rules,
            stamp=stamp.CURRENT if basis is None else basis.stamp.successor(),
        )
