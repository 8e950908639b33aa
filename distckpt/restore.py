"""The ranks' side of a restore: R1 to R5 of docs/protocol.md, as numbered steps."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from distckpt import paths, run_checks, savable, strict_json, words
from distckpt.agree import Ran, agree
from distckpt.cadence import Cadence
from distckpt.capture import COUNTER, Tracked, nodes_of, objects_of, remembered_of
from distckpt.chief import Chief
from distckpt.choice import LATEST, spelled
from distckpt.claim import ensure_claimed
from distckpt.comm import Answer, How
from distckpt.errors import (
    ConfigError,
    FormatError,
    MismatchError,
    RestoreFailed,
    StorageError,
    StorageTimeout,
)
from distckpt.events import FALLBACK, RESTORE
from distckpt.exchange import Exchange
from distckpt.loading import Loading
from distckpt.messages import Phase, Status, Vote, failure_of, raise_failures
from distckpt.mismatch import mismatch
from distckpt.object_types import has_data_loader
from distckpt.pretrained import Pretrained
from distckpt.readers import open_shard, read_manifest
from distckpt.record import Entry, digest
from distckpt.restore_names import Names, RestoreOptions
from distckpt.run_directory import RunDirectory
from distckpt.save_state import SaveState
from distckpt.session import Session

_logger = logging.getLogger(__name__)

InitFn: TypeAlias = "Callable[[], Any] | Pretrained | None"
_Result = TypeVar("_Result")

_GO, _RETRY, _NEXT = "go", "retry", "next"


class Candidates:
    """The chief's way through what could be restored.

    Args:
        session: The manager's, on this rank.
        chief: Knows what is committed.
        entries: What to try, in this order.
    """

    def __init__(self, session: Session, chief: Chief, entries: Sequence[Entry]) -> None:
        self._session = session
        self._chief = chief
        self._left = list(entries)
        self._retried = False
        self._skipped: list[str] = []
        # What stays and is newer, or may come back, keeps its number.
        every = (*chief.candidates, *chief.missing)
        self._taken_numbers = _numbers_of_newer(every, entries)
        self._skips_links = False

    def skip_links(self) -> None:
        """Go on to an older checkpoint where a link is in the place of one."""
        self._skips_links = True

    def offer(self) -> Answer:
        """R1: name the candidate to try, or say that there is none."""
        while self._left and self._is_linked(self._left[0]):
            self._taken_numbers.append(self._left[0].attempt.number)
            self._fall_back(f"{self._left[0].attempt.prefix} is a symbolic link.")
        if self._left:
            entry = self._left[0]
            return {
                "attempt": entry.attempt.published,
                "manifest": entry.manifest,
                "min_counter": max(self._taken_numbers, default=None),
            }
        if self._chief.has_committed:
            msg = (
                f"no checkpoint in {self._session.directory} could be restored. "
                f"{' '.join(self._skipped)} {self._session.undefined}"
            )
            raise RestoreFailed(msg.strip())
        _tell_of_fresh_start(self._session.directory)
        return {"attempt": None}

    def _is_linked(self, entry: Entry) -> bool:
        """Tell whether a link is in the place of a checkpoint, and is to be passed over.

        Raises:
            RestoreFailed: It is not: going back to an older one is for the user to decide.
        """
        path = self._session.directory.attempt(entry.attempt)
        target = path.link_target()
        if target is None:
            return False
        if self._skips_links:
            return True
        msg = (
            f"{path} is a symbolic link to {target}, and links are not followed. Move the "
            f"directory back here; or begin from it, Checkpoint.restore({target!r}); or go "
            "on from an older checkpoint, RestoreOptions(skip_links=True)."
        )
        raise RestoreFailed(msg)

    def judge(self, votes: Sequence[Vote]) -> Answer:
        """Go on, try once more, or fall back, from what the ranks have found.

        Raises:
            DistckptError: The checkpoint does not fit, or user code failed: on every
                rank, without a fallback.
        """
        entry = self._left[0]
        what = f"restoring {entry.attempt.prefix} failed"
        hard = (Status.MISMATCH, Status.FAILED)
        try:
            if any(vote.status in hard for vote in votes):
                raise_failures(votes, what, RestoreFailed)
            if all(vote.ok for vote in votes):
                is_alike = all(vote.digest_a == votes[0].digest_a for vote in votes)
                if votes[0].phase is Phase.PLAN:
                    self._refuse_unclaimed(entry, votes)
                    return {"do": _GO, "alike": is_alike}
                if is_alike:
                    return {"do": _GO}
        except MismatchError as error:
            # Perhaps it was only tried because a newer one is bad, or after that one's
            # tensors had been read in part.
            notes = [str(error), *self._skipped, self._session.undefined]
            raise MismatchError("\n".join(filter(None, notes))) from error
        reasons = {vote.rank: failure_of(vote) for vote in votes if not vote.ok}
        text = "; ".join(f"rank {rank}: {text}" for rank, (text, _) in reasons.items())
        text = text or "what one rank has read is not what others have got of it"
        blamed = {failure_of(vote)[1] for vote in votes if vote.status is Status.CORRUPT}
        confirmed = [self._confirm(entry, shard_rank) for shard_rank in blamed]
        if any(confirmed):
            self._chief.confirm_bad(entry)
            return self._fall_back(f"{entry.attempt.prefix} is corrupt ({text}).")
        if not self._retried:
            # A read that failed once, or bytes that were wrong on one host only.
            self._retried = True
            _logger.warning("%s, trying once more: %s", what, text)
            return {"do": _RETRY}
        self._taken_numbers.append(entry.attempt.number)
        if self._chief.look_for_missing() and entry not in self._chief.candidates:
            return self._fall_back(f"{entry.attempt.prefix} is gone ({text}).")
        self._chief.note_unreadable(entry)
        return self._fall_back(f"{entry.attempt.prefix} cannot be read ({text}).")

    def _refuse_unclaimed(self, entry: Entry, votes: Sequence[Vote]) -> None:
        """Raise ``MismatchError`` for names that no rank has asked for."""
        names = [strict_json.loads(vote.detail) if vote.detail else [] for vote in votes]
        wanted_by_none = set(names[0]).intersection(*names[1:])
        if wanted_by_none:
            what = f"checkpoint {self._session.path(entry.attempt.published)}"
            in_order = [name for name in names[0] if name in wanted_by_none]
            raise mismatch(what, in_order)

    def _fall_back(self, why: str) -> Answer:
        _logger.warning("falling back to an older checkpoint: %s", why)
        prefix = self._left[0].attempt.prefix
        self._session.events.tell(FALLBACK, checkpoint=prefix, detail={"reason": why[:500]})
        self._skipped.append(why)
        self._left = self._left[1:]
        self._retried = False
        return {"do": _NEXT, "why": why}

    def _confirm(self, entry: Entry, shard_rank: int | None) -> bool:
        """Read what a rank found corrupt once more, on the chief."""
        directory = self._session.directory.attempt(entry.attempt)
        try:
            manifest = read_manifest(directory, entry.manifest)
            if shard_rank is not None:
                with open_shard(directory, manifest, shard_rank) as reader:
                    reader.verify()
        except FormatError:
            return True
        except StorageError:
            return False
        return False


@dataclass(frozen=True, slots=True)
class _Try:
    """One candidate, as the chief offers it."""

    attempt: paths.Attempt
    manifest_digest: str
    min_counter: int | None
    names: Ran[Names]


def _tell_of_fresh_start(directory: RunDirectory) -> None:
    """Say where nothing was found: the directory may be another one than was meant."""
    below = run_checks.run_directories_in(str(directory))
    if below:
        _logger.warning(
            "no checkpoint in %s: a fresh start. There are run directories in it: %s. Was "
            "one of these meant?",
            *(directory, ", ".join(below[:5])),
        )
    else:
        _logger.info("no checkpoint in %s: a fresh start", directory)


def _numbers_of_newer(every: Sequence[Entry], chosen: Sequence[Entry]) -> list[int]:
    first = chosen[0].record if chosen else 0
    return [entry.attempt.number for entry in every if chosen and entry.record > first]


def restore_or_initialize(
    session: Session,
    save_state: SaveState,
    cadence: Cadence,
    init_fn: InitFn,
    options: RestoreOptions | None,
) -> str | None:
    """Restore the newest checkpoint that verifies, or initialize."""
    ensure_claimed(session)
    chief = session.chief
    candidates = None if chief is None else Candidates(session, chief, chief.candidates)
    path = _restore_first(session, save_state, cadence, candidates, options)
    if path is None:
        _initialize(session, save_state, init_fn)
    return path


def restore(
    session: Session,
    save_state: SaveState,
    cadence: Cadence,
    which: Any,
    options: RestoreOptions | None,
) -> str:
    """Restore what was asked for; see ``CheckpointManager.restore``."""
    ensure_claimed(session)
    meant = _in_this_directory(session, which)
    candidates: list[Candidates] = []  # the chief's

    def decide(votes: Sequence[Vote]) -> Answer:
        raise_failures(votes, "restore() was refused", RestoreFailed)
        ranks = [vote.rank for vote in votes if vote.digest_a != votes[0].digest_a]
        if ranks:
            msg = f"restore() was asked for another checkpoint on {words.ranks(ranks)}."
            raise ConfigError(msg)
        assert session.chief is not None
        entries = session.chief.choose(meant)
        candidates.append(Candidates(session, session.chief, entries))
        return {}

    agree(
        session.decisions, Phase.CANDIDATE, Ran(lambda: spelled(which)), decide, says=_asks
    )
    path = _restore_first(
        session, save_state, cadence, candidates[0] if candidates else None, options
    )
    assert path is not None, "the chief has chosen one"
    return path


def _in_this_directory(session: Session, which: Any) -> Any:
    """Return what a path means that begins with the run directory as it was given.

    A relative one would lead elsewhere after a chdir.
    """
    if not isinstance(which, (str, os.PathLike)):
        return which
    text = os.fspath(which)
    if not isinstance(text, str):
        return which
    given = os.path.normpath(session.directory.spelling)
    if os.path.normpath(text) in (given, str(session.directory)):
        return LATEST
    root, name = os.path.split(text.rstrip(os.sep))
    if root and os.path.normpath(root) == given:
        return name
    return which


def _asks(which: str) -> Vote:
    return Vote(Phase.CANDIDATE, digest_a=bytes.fromhex(digest(which.encode())))


def _restore_first(
    session: Session,
    save_state: SaveState,
    cadence: Cadence,
    candidates: Candidates | None,
    options: RestoreOptions | None,
) -> str | None:
    """Restore the first that verifies; None if there is nothing to be tried."""
    # In any case the counter: numbering goes on behind what is there.
    names = Ran(lambda: Names(options, always=(COUNTER,)))
    while True:
        # R1 (chief)
        if candidates is not None and names.error is None and names.result.skips_links:
            candidates.skip_links()
        answer = session.decisions.consult(
            Vote(Phase.CANDIDATE), lambda _: _offer(candidates)
        )
        if answer["attempt"] is None:
            return None
        attempt = paths.parse_published(answer["attempt"])
        assert attempt is not None
        trial = _Try(attempt, answer["manifest"], answer["min_counter"], names)
        if _restore(session, save_state, cadence, candidates, trial):
            return session.shown(attempt.prefix)


def _offer(candidates: Candidates | None) -> Answer:
    assert candidates is not None
    return candidates.offer()


def _restore(
    session: Session,
    save_state: SaveState,
    cadence: Cadence,
    candidates: Candidates | None,
    trial: _Try,
) -> bool:
    """Try one candidate; False to go on with what the chief offers next."""

    def judge(votes: Sequence[Vote]) -> Answer:
        assert candidates is not None
        return candidates.judge(votes)

    def agreed(
        phase: Phase, ran: Ran[_Result], says: Callable[[_Result], Vote] | None = None
    ) -> Answer:
        return agree(
            session.decisions,
            phase,
            ran,
            judge,
            says=says,
            status_of=_status_of,
            how=How(patient=True),
        )

    began = time.monotonic()
    planned = Ran(lambda: _plan(session, save_state.tracked, trial))
    try:
        answer = agreed(Phase.PLAN, planned, _vote_on_plan)  # R3
        if answer["do"] != _GO:
            return False
        plan = planned.result
        if session.reads_once and not answer["alike"]:
            # Every rank for itself, then; which takes more files.
            answer = agreed(
                Phase.PLAN, Ran(lambda: _give_up_exchange(session, trial, plan))
            )
            if answer["do"] != _GO:
                return False
        read = Ran(lambda: _read(session, trial, plan))
        if agreed(Phase.READ, read, _vote_on_read)["do"] != _GO:  # R4
            return False
        _apply(session, save_state, cadence, trial, plan.loading)  # R5
    finally:
        if planned.error is None:
            planned.result.loading.close()
    session.events.tell(
        RESTORE,
        seconds=time.monotonic() - began,
        checkpoint=trial.attempt.prefix,
        step=plan.loading.manifest.step,
    )
    return True


def _status_of(error: BaseException) -> Status:
    if isinstance(error, FormatError):
        return Status.CORRUPT
    if isinstance(error, StorageTimeout):
        return Status.FAILED  # an older checkpoint is behind the same hanging call
    # Only our own: an OSError of a user's state_dict() says nothing about the checkpoint.
    if isinstance(error, (StorageError, MemoryError)):
        return Status.UNREADABLE
    return Status.MISMATCH


@dataclass(slots=True)
class _Planned:
    """What R3 comes to on this rank.

    Attributes:
        loading: What is read.
        exchange: How what all ranks want is read once; None if all read for themselves.
    """

    loading: Loading
    exchange: Exchange | None = None


def _plan(session: Session, tracked: Tracked, trial: _Try) -> _Planned:
    """R2, R3: read the manifest, open every file, list all that does not fit."""
    names = trial.names.value()
    directory = session.directory.attempt(trial.attempt)
    what = f"opening {trial.attempt.prefix}"
    nodes = nodes_of(tracked)  # runs user code, so on this thread

    def begin() -> Loading:
        manifest = read_manifest(directory, trial.manifest_digest)
        remembered = remembered_of(tracked)
        loading = Loading(
            directory, manifest, session.rank, session.world_size, remembered, names
        )
        loading.open_own(nodes)
        return loading

    loading = session.on_disk(session.decisions, what, begin)
    loading.plan(nodes)  # runs user code, too
    session.on_disk(session.decisions, what, lambda: loading.open_files(session.reads_once))
    planned = _Planned(loading)
    if loading.common is not None and loading.common.parcels:
        try:
            planned.exchange = Exchange(session, loading, loading.common)
        except BaseException:
            loading.close()
            raise
    return planned


def _vote_on_plan(plan: _Planned) -> Vote:
    # Ranks may track different objects: only all of them together know what is too much.
    unclaimed = plan.loading.unclaimed
    detail = strict_json.dumps(unclaimed).encode() if unclaimed else b""
    return Vote(Phase.PLAN, digest_a=plan.loading.wants, detail=detail)


def _give_up_exchange(session: Session, trial: _Try, plan: _Planned) -> None:
    """R3 once more: ranks want different things; open all that this one needs."""
    plan.exchange = None
    what = f"opening {trial.attempt.prefix}"
    session.on_disk(session.decisions, what, plan.loading.open_files)


def _read(session: Session, trial: _Try, plan: _Planned) -> bytes:
    """R4: fill the tensors, verifying each block; returns a digest of what was sent."""
    session.undefined = (
        f"{session.directory}: a restore failed after it had begun to overwrite tensors, "
        "which hold a mixture now. Restore successfully before saving."
    )
    what = f"reading {trial.attempt.prefix}"
    if plan.exchange is not None:
        plan.exchange.run(what)
        return plan.exchange.digest
    session.on_disk(session.decisions, what, plan.loading.read, fills_tensors=True)
    return bytes(16)


def _vote_on_read(digest: bytes) -> Vote:
    return Vote(Phase.READ, digest_a=digest)


def _apply(
    session: Session, save_state: SaveState, cadence: Cadence, trial: _Try, loading: Loading
) -> None:
    """R5: all ranks have read everything; now values, states and user code."""

    def decide(votes: Sequence[Vote]) -> Answer:
        what = f"loading the state of {trial.attempt.prefix} failed; tensors are undefined"
        raise_failures(votes, what, RestoreFailed, keep_kind=False)
        return {
            **session.lists(),
            **savable.answer_to(votes),
            "loaders": has_data_loader(objects_of(save_state.tracked)),
        }

    def says(_: object) -> Vote:
        return Vote(
            Phase.APPLY, detail=savable.problem_of(session, save_state, loaders=False)
        )

    def finish() -> int | None:
        loading.finish()
        # Read before the vote: a step counter that raises must fail the restore on all.
        return None if cadence.gate.when.saves_always else cadence.step()

    finished = Ran(finish)
    answer = agree(session.decisions, Phase.APPLY, finished, decide, says=says)
    session.take_lists(answer)
    session.undefined = ""
    if cadence.steps is not None:
        cadence.steps.forget()
    save_state.replicas.is_first = True  # what was read may be other bytes on some rank
    if trial.min_counter is not None:
        # A newer checkpoint could not be read just now; its number stays its own.
        save_state.tracked.save_counter = max(
            save_state.tracked.save_counter, trial.min_counter
        )
    if not cadence.gate.when.saves_always:
        cadence.gate.last_step = finished.result
    if cadence.clock is not None:
        cadence.clock.reset()
    savable.take(
        save_state, answer, is_complete=save_state.is_checked or not answer["loaders"]
    )


def _initialize(session: Session, save_state: SaveState, init_fn: InitFn) -> None:
    """Call ``init_fn`` on every rank; like TensorFlow, again until something is saved."""

    def decide(votes: Sequence[Vote]) -> Answer:
        raise_failures(votes, "init_fn failed", RestoreFailed)
        return {
            **savable.answer_to(votes),
            "loaders": has_data_loader(objects_of(save_state.tracked)),
        }

    def says(_: object) -> Vote:
        return Vote(
            Phase.INITIALIZE, detail=savable.problem_of(session, save_state, loaders=False)
        )

    initialized = Ran(lambda: _call_init_fn(save_state.tracked, init_fn))
    answer = agree(session.decisions, Phase.INITIALIZE, initialized, decide, says=says)
    savable.take(
        save_state, answer, is_complete=save_state.is_checked or not answer["loaders"]
    )


def _call_init_fn(tracked: Tracked, init_fn: InitFn) -> None:
    if isinstance(init_fn, Pretrained):
        init_fn.load_into(tracked)
    elif init_fn is not None:
        init_fn()
