"""The ranks' side of the claim: C1 to C4 of docs/protocol.md."""

from __future__ import annotations

from collections.abc import Sequence

from distckpt import storage
from distckpt.chief import Probe
from distckpt.comm import Answer
from distckpt.errors import SaveFailed, StorageError
from distckpt.job import Job, run_phase
from distckpt.messages import Phase, Vote, raise_failures


def ensure_claimed(job: Job) -> None:
    """Make the run directory this job's to write; nothing if it is already.

    After return older managers are fenced and every rank has shown that it can write.

    Called by: every rank. Collectives: two rounds, the first time.

    Raises:
        DirectoryInUseError, StorageError, CorruptStateError: On every rank.
    """
    if job.claimed:
        return
    # C1 (chief): lock, read, probe.
    answer = job.decisions.consult(Vote(Phase.CLAIM), lambda _: _prepare(job))
    probe = Probe(answer["epoch"], answer["nonce"])
    # C2 (every rank): can I write, and is it the chief's directory?
    answer = run_phase(
        job.decisions,
        Phase.PROBE,
        lambda: _probe(job, probe),
        lambda votes: _finish(job, votes),  # C3, C4 (chief)
    )
    job.take_lists(answer)
    job.claimed = True


def _prepare(job: Job) -> Answer:
    assert job.chief is not None
    probe = job.chief.prepare_claim()
    return {"epoch": probe.epoch, "nonce": probe.nonce}


def _probe(job: Job, probe: Probe) -> Vote:
    if job.rank > 0:
        if not storage.exists(job.path(probe.file(0))):
            msg = (
                f"{job.directory} is not the chief's directory: its probe "
                f"{probe.file(0)} is not visible here. Every rank needs the same shared "
                "directory."
            )
            raise StorageError(msg, operation="probe", path=job.directory)
        own = job.path(probe.file(job.rank))
        storage.write_new_file(own, b"")
        storage.remove_file(own)
    return Vote(Phase.PROBE)


def _finish(job: Job, votes: Sequence[Vote]) -> Answer:
    assert job.chief is not None
    try:
        raise_failures(votes, f"claiming {job.directory} failed", SaveFailed)
    except BaseException:
        job.chief.abandon_claim()
        raise
    job.chief.finish_claim()
    return job.lists()
