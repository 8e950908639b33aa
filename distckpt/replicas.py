"""Are replicas equal? Ranks compare what they believe to be the same.

What is replicated is written once, by ranks that share the work. If replicas have drifted
apart (a skipped collective, a flipped bit, another seed, a forgotten ``PerRank``), the
checkpoint would be a mixture of them, and no later reader could tell.

The digests travel with the question of a save, so no round is added where all is equal.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch

from distckpt import strict_json
from distckpt.agree import Ran, agree
from distckpt.capture import Captured
from distckpt.comm import Answer, Decide, Shipment
from distckpt.errors import SaveFailed
from distckpt.layout import Table
from distckpt.messages import Phase, Vote, raise_failures
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
from distckpt.save_state import SaveState
from distckpt.session import Session

_logger = logging.getLogger(__name__)


_MAX_NAMED = 8


def report_of(
    session: Session,
    save_state: SaveState,
    captured: Captured,
    table: Table,
    validates: bool,
) -> Report | None:
    """Digest what this rank believes others to hold, too; None if nothing is compared.

    Args:
        session: The manager's, on this rank.
        save_state: The state that saves need.
        captured: What this rank has to save.
        table: Its table.
        validates: Whether this save compares everything.
    """
    replicas = save_state.replicas
    if session.world_size == 1 or (replicas.mode == UNCHECKED and not validates):
        return None
    classes = replicas.classes(captured, table, session.rank)
    if validates or replicas.mode == ALWAYS:
        return report_all(captured, classes)
    turn = save_state.tracked.save_counter
    return report_sampled(captured, classes, turn, replicas.is_new)


# By key of a class: a rank that agrees with most, and how many tensors the class has.
Asked: TypeAlias = dict[str, list[int]]


def differing(votes: Sequence[Vote]) -> Asked:
    """Find the classes whose ranks have not all the same digest (chief)."""
    found: dict[bytes, dict[bytes, list[int]]] = {}
    num_of: dict[bytes, int] = {}
    for vote in votes:
        for key, digest, num_tensors in unpacked(vote.detail):
            found.setdefault(key, {}).setdefault(digest, []).append(vote.rank)
            num_of[key] = num_tensors
    # Of two that differ nothing tells which is right: the second one is named.
    return {
        key.hex(): [
            max(ranks_of.values(), key=lambda ranks: (len(ranks), -ranks[0]))[0],
            num_of[key],
        ]
        for key, ranks_of in found.items()
        if len(ranks_of) > 1
    }


def name_differing(
    session: Session,
    save_state: SaveState,
    path: str,
    captured: Captured,
    classes: Sequence[ReplicaClass],
    asked: Asked,
    guarded: Callable[[Decide], Decide],
) -> None:
    """Refuse the save for what differs between replicas, or note the buffers.

    One rank of each class sends the digests of its tensors to all; those that have others
    say which. So the chief gets a few names, however many ranks and tensors there are.

    Called by: every rank. Collectives: two rounds, and a broadcast for each class.

    Args:
        session: The manager's, on this rank.
        save_state: The state that saves need.
        path: What is saved.
        captured: What this rank has to save.
        classes: Of this rank.
        asked: What ``differing`` has found.
        guarded: Makes the chief give up the save if it is refused.

    Raises:
        SaveFailed: Names the tensors and the ranks.
    """
    of_key = {one.key.hex(): one for one in classes if one.key.hex() in asked}
    digested = Ran(
        lambda: {key: b"".join(leaf_digests(captured, one)) for key, one in of_key.items()}
    )

    def can_go_on(votes: Sequence[Vote]) -> Answer:
        raise_failures(votes, "replicas could not be compared", SaveFailed)
        return {}

    agree(session.decisions, Phase.REPLICAS, digested, guarded(can_go_on))
    received: dict[str, torch.Tensor] = {}

    def shipments() -> Iterator[Shipment]:
        for key, (root, num_tensors) in asked.items():
            memory = torch.empty(LEAF_DIGEST_BYTES * num_tensors, dtype=torch.uint8)
            if root == session.rank:
                memory = torch.frombuffer(
                    bytearray(digested.result[key]), dtype=torch.uint8
                )
            received[key] = memory
            yield Shipment(root, memory, lambda: None)

    session.decisions.exchange(Phase.REPLICAS, shipments())
    told = {
        key: _told_of(one, digested.result[key], received[key].numpy().tobytes())
        for key, one in of_key.items()
    }
    told = {key: fields for key, fields in told.items() if fields["count"]}
    detail = strict_json.dumps(told).encode() if told else b""
    answer = session.decisions.consult(
        Vote(Phase.REPLICAS, detail=detail), guarded(lambda votes: _judge(path, votes))
    )
    note_drifting(session, save_state, answer)


def _told_of(one: ReplicaClass, own: bytes, right: bytes) -> dict[str, Any]:
    size = LEAF_DIGEST_BYTES
    names = [
        name
        for at, name in enumerate(one.names)
        if own[at * size : (at + 1) * size] != right[at * size : (at + 1) * size]
    ]
    most = len(names) if one.are_buffers else _MAX_NAMED
    return {"names": names[:most], "count": len(names), "are_buffers": one.are_buffers}


def _judge(path: str, votes: Sequence[Vote]) -> Answer:
    """Refuse the save, or say which buffers differ (chief).

    Raises:
        SaveFailed: Names the tensors and the ranks.
    """
    failures: dict[int, str] = {}
    drifting: dict[str, None] = {}
    for vote in votes:
        for fields in strict_json.loads(vote.detail).values() if vote.detail else ():
            if fields["are_buffers"]:
                drifting.update(dict.fromkeys(fields["names"]))
            else:
                before = failures.get(vote.rank)
                text = _told(fields["names"], fields["count"])
                failures[vote.rank] = text if before is None else f"{before}, {text}"
    if failures:
        raise _refusal(path, failures)
    return {"drifting": [*drifting]}


def note_drifting(session: Session, save_state: SaveState, answer: Answer) -> None:
    """Remember the buffers that differ; the chief says so once."""
    names = [name.partition("[")[0] for name in answer.get("drifting", ())]
    if not names:
        return
    save_state.replicas.drifting = save_state.replicas.drifting.union(names)
    if session.chief is not None:
        _logger.warning(
            "buffers differ between ranks, and those of rank %d are stored: %s. They are "
            "not compared any more. If they should be equal, synchronize them (for batch "
            "normalization: SyncBatchNorm); if each rank needs its own, track them in "
            "PerRank.",
            0,
            _told(names, len(names)),
        )


def _refusal(path: str, failures: Mapping[int, str]) -> SaveFailed:
    lines = "; ".join(f"rank {rank}: {text}" for rank, text in [*failures.items()][:16])
    msg = (
        f"saving {path}: replicas differ between ranks; no checkpoint was made. Other than "
        f"on most ranks are {lines}. What should be equal has drifted apart: restore the "
        "last checkpoint on all ranks. What is meant to differ is declared: PerRank(x) if "
        "each rank has its own, PerGroup(x, mesh) if groups of ranks do (experts, stages), "
        "OneRank(x) if one rank's is to be stored."
    )
    return SaveFailed(msg, dict(failures))


def _told(names: Sequence[str], count: int) -> str:
    more = f" and {count - _MAX_NAMED} more" if count > _MAX_NAMED else ""
    return ", ".join(names[:_MAX_NAMED]) + more
