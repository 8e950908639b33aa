"""The ranks' side of the claim: C1 to C4 of docs/protocol.md."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict

from distckpt.comm import Answer
from distckpt.errors import RanksFailed
from distckpt.events import CLAIM
from distckpt.job import Job, Ran, agree
from distckpt.messages import Phase, Vote, raise_failures
from distckpt.probe import Probe


def ensure_claimed(job: Job) -> None:
    """Make the run directory this job's to write; nothing if it is already.

    After return older managers are fenced and every rank has shown that it can write.

    Called by: every rank. Collectives: two rounds, the first time.

    Raises:
        DirectoryInUseError, StorageError, CorruptStateError: On every rank.
    """
    if job.claimed:
        return
    began = time.monotonic()
    # C1 (chief): lock, read, probe.
    answer = job.decisions.consult(Vote(Phase.CLAIM), lambda _: _prepare(job))
    of_chief = answer["directory"]
    probe = Probe(job.directory, answer["epoch"], answer["nonce"], of_chief)
    # C2 (every rank): can I write, and is it the chief's directory?
    tried = Ran(
        lambda: job.on_disk(
            job.decisions, "probing the directory", lambda: probe.try_on(job.rank)
        )
    )
    # C3, C4 (chief)
    answer = agree(job.decisions, Phase.PROBE, tried, lambda votes: _finish(job, votes))
    job.take_lists(answer)
    job.claimed = True
    whose = {} if job.chief is None else asdict(job.chief.identity)
    detail = {"epoch": probe.epoch, "ranks": job.world_size, **whose}
    job.events.tell(CLAIM, seconds=time.monotonic() - began, detail=detail)


def _prepare(job: Job) -> Answer:
    assert job.chief is not None
    probe = job.chief.prepare_claim()
    return {"epoch": probe.epoch, "nonce": probe.nonce, "directory": str(job.directory)}


def _finish(job: Job, votes: Sequence[Vote]) -> Answer:
    assert job.chief is not None
    try:
        raise_failures(votes, f"claiming {job.directory} failed", RanksFailed)
    except BaseException:
        job.chief.abandon_claim()
        raise
    job.chief.finish_claim()
    return job.lists()
