"""The ranks' side of the claim: C1 to C4 of docs/protocol.md."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from distckpt.agree import Ran, agree
from distckpt.comm import Answer
from distckpt.errors import RanksFailed
from distckpt.events import CLAIM
from distckpt.messages import Phase, Vote, raise_failures
from distckpt.probe import Probe
from distckpt.session import Session


def ensure_claimed(session: Session) -> None:
    """Make the run directory this job's to write; nothing if it is already.

    After return older managers are fenced and every rank has shown that it can write.

    Called by: every rank. Collectives: two rounds, the first time.

    Raises:
        DirectoryInUseError, StorageError, CorruptStateError: On every rank.
    """
    if session.claimed:
        return
    began = time.monotonic()
    # C1 (chief): lock, read, probe.
    answer = session.decisions.consult(Vote(Phase.CLAIM), lambda _: _prepare(session))
    of_chief = answer["directory"]
    probe = Probe(session.directory, answer["epoch"], answer["nonce"], of_chief)
    # C2 (every rank): can I write, and is it the chief's directory?
    tried = Ran(
        lambda: session.on_disk(
            session.decisions, "probing the directory", lambda: probe.try_on(session.rank)
        )
    )
    # C3, C4 (chief)
    answer = agree(
        session.decisions, Phase.PROBE, tried, lambda votes: _finish(session, votes)
    )
    session.take_lists(answer)
    session.claimed = True
    whose = {} if session.chief is None else asdict(session.chief.identity)
    detail = {"epoch": probe.epoch, "ranks": session.world_size, **whose}
    session.events.tell(CLAIM, seconds=time.monotonic() - began, detail=detail)


def _prepare(session: Session) -> Answer:
    assert session.chief is not None
    probe = session.chief.prepare_claim()
    return {"epoch": probe.epoch, "nonce": probe.nonce, "directory": str(session.directory)}


def _finish(session: Session, votes: Sequence[Vote]) -> Answer:
    assert session.chief is not None
    try:
        raise_failures(votes, f"claiming {session.directory} failed", RanksFailed)
    except BaseException:
        session.chief.abandon_claim()
        raise
    session.chief.finish_claim()
    return session.lists()
