"""Are replicas equal? Ranks compare what they believe to be the same.

What is replicated is written once, by ranks that share the work. If replicas have drifted
apart (a skipped collective, a flipped bit, another seed, a forgotten ``PerRank``), the
checkpoint would be a mixture of them, and no later reader could tell.

The digests travel with the question of a save, so no round is added where all is equal.
"""

from __future__ import annotations

import base64
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from distckpt import strict_json
from distckpt.checkpoint import Captured
from distckpt.comm import Answer
from distckpt.errors import SaveFailed
from distckpt.job import Job
from distckpt.layout import Layouts, Table
from distckpt.messages import Vote
from distckpt.replica_digests import (
    ALWAYS,
    LEAF_DIGEST_BYTES,
    UNCHECKED,
    ReplicaClass,
    Report,
    leaf_digests,
    report_all,
    report_sampled,
    unpacked,
)

_logger = logging.getLogger(__name__)


_MAX_NAMED = 8
# So many ranks of a class say which of its tensors are others than those of most.
_MAX_ASKED = 8


def report_of(
    job: Job, captured: Captured, table: Table, validates: bool, layouts: Layouts | None
) -> Report | None:
    """Digest what this rank believes others to hold, too; None if nothing is compared.

    Args:
        job: The manager's.
        captured: What this rank has to save.
        table: Its table.
        validates: Whether this save compares everything.
        layouts: The tables of all ranks, if they are known.
    """
    replicas = job.replicas
    if job.world_size == 1 or (replicas.mode == UNCHECKED and not validates):
        return None
    classes = replicas.classes(captured, table, layouts, job.rank)
    if validates or replicas.mode == ALWAYS or replicas.is_first:
        return report_all(captured, classes)
    return report_sampled(captured, classes, job.checkpoint.save_counter)


def differing(votes: Sequence[Vote]) -> dict[str, list[list[int]]]:
    """Find the classes whose ranks have not all the same digest (chief).

    Returns:
        By key of a class, the ranks that agree with most, and all others.
    """
    found: dict[bytes, dict[bytes, list[int]]] = {}
    for vote in votes:
        for key, digest in unpacked(vote.detail):
            found.setdefault(key, {}).setdefault(digest, []).append(vote.rank)
    judged: dict[str, list[list[int]]] = {}
    for key, ranks_of in found.items():
        if len(ranks_of) > 1:
            # Of two that differ nobody knows which is right: the second one is named.
            usual = max(ranks_of.values(), key=lambda ranks: (len(ranks), -ranks[0]))
            others = sorted(
                rank for ranks in ranks_of.values() if ranks is not usual for rank in ranks
            )
            judged[key.hex()] = [usual, others]
    return judged


def asked_of(judged: Mapping[str, list[list[int]]]) -> dict[str, list[int]]:
    """Choose the ranks that say more of the classes that differ: first one of most."""
    return {
        key: [usual[0], *others[:_MAX_ASKED]] for key, (usual, others) in judged.items()
    }


def detail_of(
    job: Job,
    captured: Captured,
    classes: Sequence[ReplicaClass],
    asked: Mapping[str, Sequence[int]],
) -> bytes:
    """Say what this rank has been asked for: a digest of each tensor of a class.

    The names come from one rank of each class.
    """
    told: dict[str, Any] = {}
    for one in classes:
        ranks = asked.get(one.key.hex(), ())
        if job.rank in ranks:
            digests = b"".join(leaf_digests(captured, one))
            fields: dict[str, Any] = {"digests": base64.b64encode(digests).decode()}
            if job.rank == ranks[0]:
                fields |= {"names": one.names, "are_buffers": one.are_buffers}
            told[one.key.hex()] = fields
    return strict_json.dumps(told).encode() if told else b""


def judge(
    path: str, judged: Mapping[str, list[list[int]]], votes: Sequence[Vote]
) -> Answer:
    """Refuse the save, or say which buffers differ (chief).

    Args:
        path: What is saved.
        judged: What ``differing`` has found.
        votes: With what ``detail_of`` has said.

    Raises:
        SaveFailed: Names the tensors and the ranks.
    """
    told = {v.rank: strict_json.loads(v.detail) for v in votes if v.detail}
    names_of: dict[int, list[str]] = {}
    drifting: list[str] = []
    stored_from = 0
    for key, (usual, others) in judged.items():
        said = told.get(usual[0], {}).get(key)
        if said is None:
            continue
        right = _split(said["digests"])
        named = []
        for rank in others:
            digests = told.get(rank, {}).get(key)
            if digests is None:
                continue
            pairs = zip(said["names"], right, _split(digests["digests"]), strict=True)
            names = [name for name, one, other in pairs if one != other]
            named += names
            if not said["are_buffers"]:
                names_of.setdefault(rank, []).extend(names)
        if said["are_buffers"]:
            drifting += named
            stored_from = min(*usual, *others)
    if names_of:
        every = {
            rank
            for key, (usual, others) in judged.items()
            for rank in others
            if not told.get(usual[0], {}).get(key, {}).get("are_buffers")
        }
        raise _refusal(path, {rank: names_of.get(rank, []) for rank in sorted(every)})
    return {"drifting": [*dict.fromkeys(drifting)], "stored_from": stored_from}


def note_drifting(job: Job, answer: Answer) -> None:
    """Remember the buffers that differ; the chief says so once."""
    names = [name.partition("[")[0] for name in answer.get("drifting", ())]
    if not names:
        return
    job.replicas.drifting = job.replicas.drifting.union(names)
    if job.chief is not None:
        _logger.warning(
            "%d buffers differ between ranks, and those of rank %d are stored: %s. They "
            "are not compared any more. If they should be equal, synchronize them (for "
            "batch normalization: SyncBatchNorm); if each rank needs its own, track them "
            "in PerRank.",
            len(names),
            answer["stored_from"],
            _told(names),
        )


def _split(digests: str) -> list[bytes]:
    data = base64.b64decode(digests)
    size = LEAF_DIGEST_BYTES
    return [data[start : start + size] for start in range(0, len(data), size)]


def _refusal(path: str, names_of: Mapping[int, Sequence[str]]) -> SaveFailed:
    usual = Counter(_told(names) for names in names_of.values() if names)
    ((most, _),) = usual.most_common(1)
    failures = {
        rank: _told(names) if names else f"not asked; others: {most}"
        for rank, names in names_of.items()
    }
    lines = "; ".join(f"rank {rank}: {text}" for rank, text in [*failures.items()][:16])
    msg = (
        f"saving {path}: replicas differ between ranks; no checkpoint was made. Other than "
        f"on most ranks are {lines}. What should be equal has drifted apart: restore the "
        "last checkpoint on all ranks. What is meant to differ is declared: PerRank(x) if "
        "each rank has its own, PerGroup(x, mesh) if groups of ranks do (experts, stages), "
        "OneRank(x) if one rank's is to be stored."
    )
    return SaveFailed(msg, failures)


def _told(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
