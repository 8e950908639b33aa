"""Are replicas equal? Ranks compare what they believe to be the same.

What is replicated is written once, by ranks that share the work. If replicas have drifted
apart (a skipped collective, a flipped bit, another seed), the checkpoint would be a mixture
of them, and no later reader could tell.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import xxhash

from distckpt import strict_json, tensors
from distckpt.checkpoint import Captured
from distckpt.comm import Answer
from distckpt.errors import SaveFailed
from distckpt.job import Job, Ran, agree
from distckpt.layout import SPLIT
from distckpt.leaves import Leaf
from distckpt.messages import Phase, Vote, raise_failures
from distckpt.paths import Attempt
from distckpt.record import digest
from distckpt.save_plan import or_abandon

_MAX_NAMED = 8


def compare_replicas(job: Job, attempt: Attempt, captured: Captured) -> None:
    """Raise ``SaveFailed`` on all ranks if what is replicated differs between them.

    Compared are parameters and optimizer state, plain ones and those of meshes with
    replicas, by digests of what each rank holds. Buffers are not: one rank's are saved.

    Called by: every rank. Collectives: one round, or two.

    Raises:
        SaveFailed: Names the tensors and the ranks; the save is given up.
    """
    hashed = Ran(lambda: _digests_of(captured))

    def vote(digests: Mapping[str, str]) -> Vote:
        text = strict_json.dumps(dict(digests)).encode()
        return Vote(Phase.REPLICAS, digest_a=bytes.fromhex(digest(text)))

    def decide(votes: Sequence[Vote]) -> Answer:
        raise_failures(votes, "replicas could not be compared", SaveFailed)
        first = votes[0].digest_a
        return {"equal": all(vote.digest_a == first for vote in votes)}

    answer = agree(
        job.decisions,
        Phase.REPLICAS,
        hashed,
        or_abandon(job, attempt, decide),
        says=vote,
    )
    if not answer["equal"]:
        # Ranks may hold other parts, or other tensors: only what has one name must agree.
        detail = strict_json.dumps(dict(hashed.result)).encode()
        job.decisions.consult(
            Vote(Phase.REPLICAS, detail=detail),
            or_abandon(job, attempt, lambda votes: _judge(job.path(attempt.prefix), votes)),
        )


def _digests_of(captured: Captured) -> dict[str, str]:
    """Digest what this rank believes others to hold, too, by name and place."""
    digests: dict[str, str] = {}
    for name, leaf in captured.shared.tensors.items():
        known = leaf.known
        if known.box is not None and known.size_bytes and _may_have_replicas(leaf):
            data = tensors.box_bytes(leaf.tensor, known.box)
            at = "" if known.is_whole else str([*known.box.offset])
            digests[f"{name}{at}"] = xxhash.xxh3_128_hexdigest(data)
    return digests


def _may_have_replicas(leaf: Leaf) -> bool:
    if not leaf.known.is_sharded:
        return leaf.kind == SPLIT
    return tensors.has_replicas(leaf.tensor)


def _judge(path: str, votes: Sequence[Vote]) -> Answer:
    found: dict[str, dict[int, str]] = {}
    for vote in votes:
        for name, value in strict_json.loads(vote.detail).items():
            found.setdefault(name, {})[vote.rank] = value
    differing: dict[int, list[str]] = {}
    for name, value_of in found.items():
        usual, _ = Counter(value_of.values()).most_common(1)[0]
        for rank, value in value_of.items():
            if value != usual:
                differing.setdefault(rank, []).append(name)
    if not differing:
        return {}
    failures = {rank: _told(names) for rank, names in sorted(differing.items())}
    lines = "; ".join(f"rank {rank}: {text}" for rank, text in failures.items())
    msg = (
        f"saving {path}: replicas differ between ranks; no checkpoint was made. Other than "
        f"on most ranks are {lines}. Restore the last checkpoint on all of them."
    )
    raise SaveFailed(msg, failures)


def _told(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_NAMED} more" if len(names) > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
