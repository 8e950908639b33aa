"""The chief's side of the protocol: claim, begin, commit, release, candidates.

Torch-free and single-threaded, but for the deletions that the janitor runs behind it.
Only the chief writes anything but a rank's own shard file. Every change is one appended
record; what this object remembers is always what the newest record says, plus
TensorFlow's recovery rule, which reaches the disk with the next commit.
"""

from __future__ import annotations

import errno
import logging
import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from distckpt import mailbox, paths, record, run_checks, state
from distckpt.choice import Which, choose
from distckpt.errors import (
    ConfigError,
    DirectoryInUseError,
    FencedError,
    FormatError,
    NewerFormatError,
    StorageError,
)
from distckpt.identity import Identity
from distckpt.janitor import Janitor
from distckpt.layout import Table
from distckpt.mailbox import Request
from distckpt.manifest import Manifest, Shard
from distckpt.paths import Attempt
from distckpt.probe import Probe, check_store
from distckpt.record import Entry, Record, digest
from distckpt.remarks import NOTHING, Remarks
from distckpt.retention import Retention, recover, sweep, without_reasons
from distckpt.run_directory import Owner, RunDirectory
from distckpt.stamp import MISSING
from distckpt.state import Head
from distckpt.words import size

_logger = logging.getLogger(__name__)

_LOCK_WAIT_SECONDS = 30.0
_MAX_CLAIMS_LOST = 16
# Of the managers of this process: a second one in a directory is a mistake to be named.
_writers_here: set[str] = set()


class Chief:
    """Owns the record chain of one run directory.

    Making one reads and writes nothing. ``prepare_claim`` and ``finish_claim`` make it
    the directory's only writer; they, and everything that writes, raise ``FencedError``
    once another chief has claimed.

    Attributes:
        identity: The job that it belongs to.
    """

    def __init__(
        self,
        directory: RunDirectory,
        *,
        checkpoint_name: str,
        retention: Retention,
        identity: Identity,
        takeover: bool = False,
        max_lock_wait_seconds: float = math.inf,
        janitor: Janitor | None = None,
    ) -> None:
        self._directory = directory
        self._checkpoint_name = checkpoint_name
        self._retention = retention
        self.identity = identity
        self._takeover = takeover
        self._max_lock_wait_seconds = max_lock_wait_seconds
        self._janitor = janitor or Janitor(directory)
        self._writer = paths.random_hex(8)
        _writers_here.add(self._writer)
        self._epoch: int | None = None
        self._lock: Owner | None = None
        self._probe: Probe | None = None
        self._uncertain = False
        self._unreadable: set[Attempt] = set()
        self._has_looked_for_room = False
        # Attempts of ours that were neither committed nor removed: a call that hung or
        # was interrupted has left them.
        self._unsettled: set[Attempt] = set()
        # Which requests for a save each save answers: those that were there before it.
        self._answers: dict[Attempt, list[str]] = {}
        self._fenced = ""
        self._load(state.read_head(directory))

    def _load(self, head: Head | None) -> None:
        """Take over what a record says, by TensorFlow's recovery rule."""
        self._head = head
        newest = None if head is None else head.record
        managed = recover(newest, time.time(), self._retention)
        if managed.seconds_behind:
            _logger.warning(
                "time.time() returned a value %f seconds behind the last preserved "
                "checkpoint timestamp.",
                managed.seconds_behind,
            )
        self._live = managed.live
        self._last_preserved = managed.last_preserved
        self._kept = (*(newest.kept if newest else ()), *managed.forgotten)
        self._bad = newest.bad if newest else ()
        self._releasing = newest.releasing if newest else ()
        self._missing = newest.missing if newest else ()

    # What is known

    @property
    def latest(self) -> Attempt | None:
        """The newest committed checkpoint that is not known to be bad."""
        candidates = self.candidates
        return candidates[0].attempt if candidates else None

    @property
    def checkpoints(self) -> list[Attempt]:
        """The managed checkpoints, oldest first."""
        return [entry.attempt for entry in self._live]

    @property
    def candidates(self) -> list[Entry]:
        """All that can be restored, newest commit first."""
        every = (*self._live, *self._kept)
        return sorted(every, key=lambda entry: entry.record, reverse=True)

    @property
    def missing(self) -> list[Entry]:
        """What was committed, and is gone from the run directory, oldest first."""
        return sorted(self._missing, key=lambda entry: entry.record)

    @property
    def has_committed(self) -> bool:
        """Tell whether this chain ever committed anything."""
        return self._head is not None and self._head.record.has_committed

    @property
    def is_claimed(self) -> bool:
        """Tell whether this chief has claimed the directory."""
        return self._epoch is not None

    # Claim

    def prepare_claim(self) -> Probe:
        """C1: make the directory, take the lock, probe what the disk can do.

        Raises:
            DirectoryInUseError: Another live job holds the directory.
            StorageError: It cannot be written, or has no hard links.
            CorruptStateError: Its records cannot be read.
            NewerFormatError: A newer version of distckpt has claimed it.
        """
        run_checks.check_usable(self._directory)
        run_checks.make(self._directory)
        self._acquire_lock()
        for _ in range(_MAX_CLAIMS_LOST):
            newest = state.read_head(self._directory)
            if newest is not None:
                state.refuse_lost_records(self._directory, newest)
            if newest != self._head:
                self._load(newest)
            self.look_for_missing()
            self._refuse_if_all_are_missing()
            try:
                return self._try_directory()
            except StorageError:
                # A chief that has claimed meanwhile sweeps what this one tries it with.
                if state.is_newest(self._directory, newest):
                    raise
        raise DirectoryInUseError(self._claimed_again_and_again())

    def _try_directory(self) -> Probe:
        self._directory.make_records()
        epoch = 1 if self._head is None else self._head.record.epoch + 1
        check_store(self._directory, epoch)
        self._probe = Probe(self._directory, epoch, paths.random_hex(8))
        self._probe.leave()
        return self._probe

    def _claimed_again_and_again(self) -> str:
        return f"{self._directory}: other jobs claim it again and again."

    def _acquire_lock(self) -> None:
        if self._lock is None:
            self._lock = self._directory.owner()
        if self._lock.acquire(0):
            return
        newest = state.read_head(self._directory)
        holder = None if newest is None else newest.record
        if holder is not None and holder.run == self.identity.run:
            # A process of this very job that has not gone yet, or never will: the next
            # record fences it.
            _logger.warning(
                "the lock on %s is held by another process of this job (%s); fencing it",
                self._directory,
                holder.run,
            )
            return
        if self._takeover:
            _logger.warning("taking %s over from a live job", self._directory)
            return
        wait_seconds = min(_LOCK_WAIT_SECONDS, self._max_lock_wait_seconds)
        if not self._lock.acquire(wait_seconds):
            owner = (
                "a job that has not claimed it yet"
                if holder is None
                else f"job {holder.run!r} (restart {holder.restart}, last record at "
                f"{time.strftime('%Y-%m-%d %H:%M:%S', time.gmtime(holder.written))} UTC)"
            )
            msg = (
                f"{self._directory} is in use by {owner}; waited "
                f"{wait_seconds:.0f} s. End that job, use another directory, or "
                "pass takeover=True to fence it."
            )
            raise DirectoryInUseError(msg)

    def finish_claim(self) -> None:
        """C3 and C4: append the claim that fences all others, then sweep behind.

        Raises:
            StorageError, OutcomeUnknown: The claim could not be appended.
        """
        self.abandon_claim()
        for _ in range(_MAX_CLAIMS_LOST):
            newest = state.read_head(self._directory)
            if newest != self._head:
                # Re-read, never skip: what another chief has just committed must be in
                # the lists that this claim copies.
                self._load(newest)
                self.look_for_missing()
            try:
                head = state.append(self._directory, self._claim_record())
            except FencedError:
                continue
            break
        else:
            raise DirectoryInUseError(self._claimed_again_and_again())
        self._head = head
        self._epoch = head.record.epoch
        self._after_append()
        claimed = head.record
        listed = (*claimed.live, *claimed.kept, *claimed.bad, *claimed.releasing)
        listed = (*listed, *claimed.missing)
        self._janitor.sweep(
            claimed.epoch, claimed.chain, [entry.attempt for entry in listed]
        )

    def abandon_claim(self) -> None:
        """Remove the chief's own probe."""
        if self._probe is not None:
            self._probe.remove()
            self._probe = None

    def _claim_record(self) -> Record:
        """Copy the newest record's lists verbatim under a new epoch."""
        if self._head is None:
            return Record(
                number=1,
                previous="",
                chain=paths.random_hex(8),
                epoch=1,
                writer=self._writer,
                run=self.identity.run,
                restart=self.identity.restart,
                action=record.CLAIM,
                written=float(time.time()),
            )
        newest = self._head.record
        return replace(
            newest,
            number=newest.number + 1,
            previous=self._head.digest,
            epoch=newest.epoch + 1,
            writer=self._writer,
            run=self.identity.run,
            restart=self.identity.restart,
            action=record.CLAIM,
            written=float(time.time()),
            stamp=newest.stamp.successor(),
        )

    # Save

    def begin(self, number: int | None, save_counter: int) -> Attempt:
        """S2: choose the number and make the pending directory.

        Args:
            number: What the caller asked for; it may replace a live checkpoint.
            save_counter: The checkpoint's counter; by default the next one is used.

        Raises:
            FencedError: Another chief has claimed the directory.
            ConfigError: The default number is that of a live checkpoint, or the number that
                was asked for that of a pinned one.
            StorageError: The directory could not be made.
        """
        self.check_not_fenced()
        assert self._epoch is not None, "begin before claim"
        self._settle()
        chosen = save_counter + 1 if number is None else number
        prefix = f"{self._checkpoint_name}-{chosen}"
        taken = (*self.candidates, *self._missing)
        if number is None and any(entry.attempt.prefix == prefix for entry in taken):
            msg = (
                f"{prefix} is already live in {self._directory}, and saving would replace "
                "it: restore first (restore_or_initialize()), so that numbering goes on, "
                "or pass checkpoint_number to replace it."
            )
            raise ConfigError(msg)
        requests = self._requests()
        self._refuse_to_replace_pinned(prefix, requests)
        attempt = Attempt(self._checkpoint_name, chosen, self._epoch, paths.random_hex(4))
        if paths.parse_published(attempt.published) != attempt:
            msg = f"{prefix!r:.200} cannot be the name of a checkpoint."
            raise ConfigError(msg)
        self._unsettled.add(attempt)
        self._answers[attempt] = [r.name for r in requests if r.kind == mailbox.SAVE]
        try:
            self._directory.begin(attempt)
        except StorageError:
            self.abandon(attempt)
            raise
        return attempt

    def _refuse_to_replace_pinned(self, prefix: str, requests: Sequence[Request]) -> None:
        entries = mailbox.applied(self.candidates, requests)
        if any(entry.pinned and entry.attempt.prefix == prefix for entry in entries):
            msg = (
                f"{prefix} is pinned in {self._directory}, and saving would replace it: "
                f"unpin it ('distckpt unpin {self._directory.path_of(prefix)}'), or save "
                "under another number."
            )
            raise ConfigError(msg)

    def _requests(self) -> list[Request]:
        """Read what other processes ask for; that it cannot be read holds up no save."""
        try:
            requests, refused = mailbox.collect(self._directory)
        except (StorageError, FormatError) as error:
            _logger.warning("what other processes ask for cannot be read: %s", error)
            return []
        for name, why in refused.items():
            _logger.warning("%s: no request: %s", name, why)
        self._remove_requests(refused)
        return requests

    def save_requests(self) -> list[Request]:
        """Return who asks for a save, oldest first.

        Raises:
            StorageError, UnsafeCheckpointError: It cannot be read.
        """
        requests, _ = mailbox.collect(self._directory)
        return [request for request in requests if request.kind == mailbox.SAVE]

    def answer(self, requests: Sequence[Request]) -> None:
        """Let those who have asked know that it is done: the newest record says what."""
        self._remove_requests([request.name for request in requests])

    def _remove_requests(self, names: Collection[str]) -> None:
        try:
            mailbox.remove(self._directory, names)
        except StorageError as error:
            # Taken up again with the next commit, where it changes nothing.
            _logger.warning("requests of other processes stay where they are: %s", error)

    def _settle(self) -> None:
        """Remove what earlier saves of this chief have left behind."""
        if self._uncertain:
            return  # one of them may be in a record yet
        for attempt in [*self._unsettled]:
            if any(entry.attempt == attempt for entry in self.candidates):
                self._unsettled.discard(attempt)
            else:
                self.abandon(attempt)

    def commit(
        self,
        attempt: Attempt,
        *,
        step: int | None,
        shards: Sequence[Shard],
        layouts: Sequence[Table],
        values: Mapping[str, Any],
        remarks: Remarks = NOTHING,
    ) -> None:
        """S7: write the manifest, publish the attempt and append the commit.

        After return the checkpoint is durable and acknowledged. After ``StorageError``
        nothing was committed and the attempt is removed; after any other error the next
        claim decides.

        Raises:
            FencedError: Another chief has claimed the directory.
            OutcomeUnknown: The link was tried and the disk will not say.
            StorageError: It failed before that.
        """
        assert self._head is not None
        manifest = Manifest(
            attempt=attempt,
            chain=self._head.record.chain,
            step=step,
            created=float(time.time()),
            shards=tuple(shards),
            layouts=tuple(layouts),
            values=dict(values),
            remarks=remarks,
        )
        data = manifest.encode()
        try:
            self._directory.publish(attempt, data)
            requests = self._requests()
            self._tell_of_late(requests)
            self._append_commit(manifest, digest(data), requests)
        except FencedError:
            raise
        except StorageError:
            # Raised before the link was tried, so the attempt is certainly in no record.
            # After any other error it may be, or another chief owns the directory.
            self.abandon(attempt)
            # A newer chief sweeps the pending directories of older ones. Then the disk
            # only says "no such file"; that this one is fenced is the reason.
            with suppress(StorageError):
                self.check_not_fenced(by_name=False)
            raise
        except BaseException:
            # OutcomeUnknown, or Ctrl-C: the record may be there.
            self._uncertain = True
            raise
        self._unsettled.discard(attempt)
        asked = self._answers.pop(attempt, [])
        answered = [r for r in requests if r.kind != mailbox.SAVE or r.name in asked]
        self._after_append()
        self.answer(answered)
        if not self._has_looked_for_room:
            self._has_looked_for_room = True
            self.warn_of_little_room()

    def _tell_of_late(self, requests: Sequence[Request]) -> None:
        """Warn of what has come too late: the next request must not make that mistake."""
        listed = {entry.attempt for entry in self.candidates}
        for request in requests:
            attempt = request.attempt
            if attempt is not None and attempt not in listed:
                _logger.warning(
                    "%s of %s, asked for by %s: it is not committed any more",
                    *(request.kind, attempt.prefix, request.by),
                )

    def _append_commit(
        self, manifest: Manifest, manifest_digest: str, requests: Sequence[Request]
    ) -> None:
        self.check_not_fenced()
        assert self._head is not None
        newest = self._head.record
        step = manifest.step
        entry = Entry(
            attempt=manifest.attempt,
            record=newest.number + 1,
            time=float(time.time()),
            step=step,
            manifest=manifest_digest,
            size_bytes=manifest.size_bytes,
            metrics=manifest.remarks.listed,
        )
        prefix = entry.attempt.prefix
        # Before retention decides, so that what was pinned, or is now the best, stays.
        live = mailbox.applied(self._live, requests)
        others = [e for e in live if e.attempt.prefix != prefix]
        replaced = [e for e in self.candidates if e.attempt.prefix == prefix]
        # What could not be read in this job stays, and counts for no rule: else what was
        # restored in its place could be deleted for it.
        unreadable = [e for e in others if e.attempt in self._unreadable]
        counted = [e for e in others if e.attempt not in self._unreadable]
        swept = sweep([*counted, entry], self._last_preserved, self._retention)
        if swept.dropped and self.look_for_missing():
            # Or what is gone would count, and what is there be deleted for it.
            self._append_commit(manifest, manifest_digest, requests)
            return
        kept = mailbox.applied(self._kept, requests)
        kept = tuple(e for e in kept if e.attempt.prefix != prefix)
        self._append(
            record.COMMIT,
            live=_in_order((*without_reasons(unreadable), *swept.live)),
            kept=without_reasons((*kept, *swept.preserved)),
            bad=without_reasons(self._bad),
            releasing=without_reasons((*self._to_release(), *replaced, *swept.dropped)),
            last_preserved=swept.last_preserved,
            last_step=newest.last_step if step is None else step,
            rules=self._retention.rules,
            missing=[e for e in self._missing if e.attempt.prefix != prefix],
        )

    def warn_of_little_room(self) -> None:
        """Warn if the disk has no room for what retention will keep.

        Judged by the newest checkpoint's size. Retention deletes after a commit, so there
        must be room for one more than it keeps.
        """
        if not self.candidates or not self.candidates[0].size_bytes:
            return
        size_bytes = self.candidates[0].size_bytes
        try:
            free = self._directory.room().size_bytes
        except StorageError as error:
            _logger.warning("free space cannot be told: %s", error)
            return
        if free is None:
            return
        num_kept = self._retention.num_kept
        needed = 1 if num_kept is None else max(1, num_kept + 1 - len(self._live))
        room = free // size_bytes
        if room >= needed:
            return
        rule = " | ".join(self._retention.rules) or "max_to_keep=None"
        _logger.warning(
            "%s: room for %d more checkpoints of this size (%s each, %s are free), and %s "
            "needs %d more: a checkpoint is deleted after a newer one is committed. Make "
            "room, or keep fewer.",
            *(self._directory, room, size(size_bytes), size(free), rule, needed),
        )

    def _to_release(self) -> list[Entry]:
        """Return what was dropped before, and is not deleted yet."""
        deleted = self._janitor.take_released()
        return [entry for entry in self._releasing if entry.attempt not in deleted]

    def _append(self, action: str, missing: Sequence[Entry], **changes: Any) -> None:
        """Append the successor of the newest record, and take over what it says."""
        assert self._head is not None
        newest = self._head.record
        if missing:
            changes["stamp"] = newest.stamp.needing(MISSING)
        self._head = state.append(
            self._directory,
            replace(
                newest,
                number=newest.number + 1,
                previous=self._head.digest,
                action=action,
                written=float(time.time()),
                missing=without_reasons(missing),
                **changes,
            ),
        )
        self._take_lists()

    def _take_lists(self) -> None:
        """Take over verbatim what a record of our own says."""
        assert self._head is not None
        newest = self._head.record
        assert newest.last_preserved is not None
        self._live, self._kept, self._bad = newest.live, newest.kept, newest.bad
        self._releasing, self._missing = newest.releasing, newest.missing
        self._last_preserved = newest.last_preserved

    def abandon(self, attempt: Attempt) -> None:
        """Remove what is left of an attempt that was not committed.

        At once, because a full disk must not stay full. A failure is a warning: it is
        tried again before the next save.
        """
        if self._uncertain:
            return
        try:
            if self._directory.has(attempt):
                self._directory.discard(attempt)
            self._directory.clear(attempt, is_own=True)
            self._unsettled.discard(attempt)
            self._answers.pop(attempt, None)
        except StorageError as error:
            _logger.warning("could not remove a failed save, left for later: %s", error)

    def check_not_fenced(self, *, by_name: bool = True) -> None:
        """Raise ``FencedError`` if another chief has claimed the directory.

        Args:
            by_name: Believe the name of this chief's newest record, where it stands. One
                that was stopped for long may have taken a number again that was pruned: no
                commit is fooled by that, as it looks again when its own record is there.
        """
        if self._fenced:
            raise FencedError(self._fenced)
        if by_name and state.is_newest(self._directory, self._head):
            return
        try:
            newest = state.read_head(self._directory)
        except NewerFormatError as error:
            self._fenced = (
                f"{self._directory} has been claimed by a newer version of distckpt; this "
                f"manager may not write there any more. What it committed is safe. {error}"
            )
            raise FencedError(self._fenced) from error
        if newest == self._head:
            return
        if newest is None:
            msg = (
                f"{self._directory}: its records are gone. Was it deleted or unmounted, or "
                "has the working directory changed under a relative path?"
            )
            raise StorageError(msg, operation="read", path=str(self._directory))
        if newest.record.writer == self._writer and self._uncertain:
            # An append of ours whose outcome was unknown is there after all.
            self._head = newest
            self._take_lists()
            return
        is_here = newest.record.writer in _writers_here
        whose = ", by another manager of this same process" if is_here else ""
        self._fenced = (
            f"{self._directory} has been claimed by job {newest.record.run!r} (epoch "
            f"{newest.record.epoch}, this one is {self._epoch}){whose}; this manager may "
            "not write there any more. What it committed is safe."
        )
        raise FencedError(self._fenced)

    def _after_append(self) -> None:
        """S9: nothing here can fail the commit, which is durable already."""
        assert self._head is not None
        self._uncertain = False
        try:
            state.write_copy(self._directory, self._head)
        except StorageError as error:
            _logger.warning("the state file is behind the records: %s", error)
        self._janitor.release([entry.attempt for entry in self._head.record.releasing])
        self._janitor.prune_records()

    # By hand

    def prune(self, plan: Callable[[Sequence[Entry]], Sequence[Entry]]) -> list[Entry]:
        """Drop what a plan says of all that is committed; deleted behind the caller.

        After return a durable record lists it no more.

        Args:
            plan: Is given the checkpoints, oldest first, and returns those to be dropped.

        Raises:
            FencedError: Another chief has claimed the directory.
            StorageError, OutcomeUnknown: It could not be recorded.
        """
        self.check_not_fenced()
        requests = [r for r in self._requests() if r.kind != mailbox.SAVE]
        live = mailbox.applied(self._live, requests)
        kept = mailbox.applied(self._kept, requests)
        every = sorted((*live, *kept), key=lambda entry: entry.record)
        dropped = [*plan(every)]
        leaving = {entry.attempt for entry in dropped}
        self._append(
            record.PRUNE,
            live=tuple(entry for entry in live if entry.attempt not in leaving),
            kept=tuple(entry for entry in kept if entry.attempt not in leaving),
            releasing=(*self._to_release(), *without_reasons(dropped)),
            missing=self._missing,
        )
        self._after_append()
        self.answer(requests)
        return dropped

    # What is gone

    def look_for_missing(self) -> bool:
        """Take what is gone from the run directory out of the lists, and back again.

        The next commit says so on disk.

        Returns:
            Whether the lists have changed: not if the run directory cannot be looked at.
        """
        try:
            return self._look_for_missing()
        except StorageError as error:
            _logger.warning("whether checkpoints are missing cannot be told: %s", error)
            return False

    def _look_for_missing(self) -> bool:
        names = {*self._directory.names()}
        if paths.RECORDS_DIRECTORY not in names:
            return False  # no listing to go by: whatever it is of, it is not whole
        back = self._take_back(names)
        listed = [(entry, False) for entry in self._live]
        listed += [(entry, True) for entry in self._kept]
        # By name, too: the listing of a network filesystem may be old.
        gone = [
            replace(entry, why=(), was_kept=was_kept)
            for entry, was_kept in listed
            if entry.attempt.published not in names
            and not self._directory.has(entry.attempt)
        ]
        if gone and not state.is_newest(self._directory, self._head):
            # Another chief has appended since: these are what it has deleted.
            return bool(back)
        left = {entry.attempt for entry in gone}
        self._live = tuple(entry for entry in self._live if entry.attempt not in left)
        self._kept = tuple(entry for entry in self._kept if entry.attempt not in left)
        self._missing = (*self._missing, *gone)
        for entry in gone:
            _logger.warning(
                "%s is gone from %s: %s is not there. No rule counts it any more; it is "
                "taken back if it is there again.",
                *(entry.attempt.prefix, self._directory, entry.attempt.published),
            )
        return bool(back or gone)

    def _take_back(self, names: Collection[str]) -> list[Entry]:
        taken = {entry.attempt.prefix for entry in self.candidates}
        back = [
            entry
            for entry in self._missing
            if entry.attempt.published in names and entry.attempt.prefix not in taken
        ]
        for entry in back:
            _logger.warning("%s is in %s again", *(entry.attempt.prefix, self._directory))
        there = {entry.attempt for entry in back}
        self._missing = tuple(e for e in self._missing if e.attempt not in there)
        found = [replace(entry, was_kept=False) for entry in back if not entry.was_kept]
        self._live = _in_order((*self._live, *found))
        found = [replace(entry, was_kept=False) for entry in back if entry.was_kept]
        self._kept = (*self._kept, *found)
        return back

    def _refuse_if_all_are_missing(self) -> None:
        """Raise where nothing is left of what was committed: never a fresh start."""
        if self.candidates or not self._missing:
            return
        names = ", ".join(entry.attempt.prefix for entry in self.missing[-10:])
        msg = (
            f"{self._directory}: all checkpoints that its records list are gone ({names}). "
            "Is a disk not mounted, or were they moved? If they were removed on purpose, "
            "begin in another directory, or remove this one as a whole."
        )
        path = str(self._directory)
        raise StorageError(msg, operation="list", path=path, errno=errno.ENOENT)

    # Restore

    def choose(self, which: Which) -> list[Entry]:
        """Return which checkpoints were asked for: those to try, in this order.

        Raises:
            CheckpointNotFound, ConfigError: There is none; says why.
        """
        # An evaluation may have ended since the last commit.
        entries = mailbox.applied(self.candidates, self._requests())
        return choose(entries, which, str(self._directory), self._retention.best)

    def confirm_bad(self, entry: Entry) -> None:
        """Take an attempt that failed to verify out of all lists.

        The next commit lists it as bad; it stays on disk.
        """
        self._live = tuple(e for e in self._live if e.attempt != entry.attempt)
        self._kept = tuple(e for e in self._kept if e.attempt != entry.attempt)
        self._bad = (*self._bad, entry)

    def note_unreadable(self, entry: Entry) -> None:
        """Take note that a restore has passed over an attempt that could not be read."""
        self._unreadable.add(entry.attempt)

    # End

    def settle(self, timeout_seconds: float) -> bool:
        """Wait until all deletions are through; False if the time was not enough."""
        return self._janitor.wait(timeout_seconds)

    def close(self) -> None:
        """Let go of the directory."""
        if self._lock is not None:
            self._lock.release()


def _in_order(entries: Iterable[Entry]) -> tuple[Entry, ...]:
    return tuple(sorted(entries, key=lambda entry: entry.record))
