"""Can what is tracked be stored? All ranks hear of it once, before a save is due."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from distckpt import errors
from distckpt.agree import Ran, agree
from distckpt.capture import capture
from distckpt.comm import Answer
from distckpt.errors import DistckptError, RanksFailed, UnsupportedError
from distckpt.generators import generators_kept
from distckpt.messages import (
    Phase,
    Status,
    Vote,
    describe,
    failure,
    raise_failures,
)
from distckpt.save_state import SaveState
from distckpt.session import Session

_logger = logging.getLogger(__name__)

_UNSAVABLE = "unsavable"


def problem_of(session: Session, save_state: SaveState, *, loaders: bool = True) -> bytes:
    """Return what of this rank's objects cannot be stored, to go with a vote.

    Args:
        session: The manager's, on this rank.
        save_state: The state that saves need.
        loaders: Whether to ask data loaders, too. Before the loop has begun they would
            make iterators for that: with an epoch that is not set yet.

    What cannot be stored yet (a lazy module before its first batch, an object whose
    ``state_dict()`` raises before it was used) is for the first save to report.

    Returns:
        Nothing if all can be stored, or if this was found out before.
    """
    if save_state.is_checked:
        return b""
    try:
        with generators_kept():
            capture(save_state.tracked, session.decisions.members, loaders=loaders)
    except UnsupportedError as error:
        if error.may_pass:
            _logger.info("cannot be stored yet: %s", error)
            return b""
        return failure(Phase.CHECK, error).detail
    except DistckptError as error:
        return failure(Phase.CHECK, error).detail
    except Exception as error:
        _logger.warning(
            "a state_dict() of what is tracked raises %s; if it still does then, the first "
            "save fails",
            describe(error),
            exc_info=True,
        )
    return b""


def answer_to(votes: Sequence[Vote]) -> Answer:
    """Unite what the ranks have found into a part of the chief's answer."""
    found = [vote._replace(status=Status.FAILED) if vote.detail else vote for vote in votes]
    what = "what is tracked cannot be stored, so every save would fail"
    try:
        raise_failures(found, what, RanksFailed)
    except DistckptError as error:
        return {_UNSAVABLE: [type(error).__name__, str(error)]}
    return {}


def take(save_state: SaveState, answer: Answer, *, is_complete: bool = True) -> None:
    """Raise what the ranks have found, if they have found anything: on all of them.

    Args:
        save_state: The state that saves need.
        answer: The chief's.
        is_complete: Whether all objects were looked at; else the first save looks again.
    """
    if _UNSAVABLE in answer:
        kind, text = answer[_UNSAVABLE]
        raise getattr(errors, kind)(text)
    save_state.is_checked = is_complete


def agree_once(session: Session, save_state: SaveState) -> None:
    """Find out whether what is tracked can be stored, if nobody has yet.

    Called by: every rank. Collectives: one round, the first time.

    Raises:
        UnsupportedError, ConfigError: On every rank; names what cannot.
    """
    if save_state.is_checked:
        return

    def says(detail: bytes) -> Vote:
        return Vote(Phase.CHECK, detail=detail)

    looked = Ran(lambda: problem_of(session, save_state))
    take(save_state, agree(session.decisions, Phase.CHECK, looked, answer_to, says=says))
