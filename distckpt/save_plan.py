"""What all ranks agree to write in one save: tables and plain values, united."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from distckpt import strict_json
from distckpt.checkpoint import Captured, capture
from distckpt.comm import Answer
from distckpt.errors import (
    ConfigError,
    DistckptError,
    FencedError,
    ManifestError,
    OutcomeUnknown,
    SaveFailed,
)
from distckpt.job import Job, Ran, agree
from distckpt.layout import Assignment, Row, Table
from distckpt.messages import Phase, Vote, raise_failures
from distckpt.paths import Attempt
from distckpt.record import digest


@dataclass(frozen=True, slots=True)
class SavePlan:
    """What all ranks agreed to write.

    Attributes:
        assignment: Which rank writes which piece.
        tables: The distinct layout tables; on the chief, for the manifest.
        table_of_rank: Which of them each rank has; likewise.
        values: The job's plain values; likewise, None elsewhere.
    """

    assignment: Assignment
    tables: Sequence[Table] = ()
    table_of_rank: Sequence[int] = ()
    values: dict[str, Any] | None = None


class _State(NamedTuple):
    """What this rank has to save."""

    captured: Captured
    table: Table

    @property
    def values(self) -> dict[str, Any]:
        return self.captured.shared.values

    def vote(self) -> Vote:
        return Vote(
            Phase.CAPTURE,
            digest_a=_digest_of([row.to_json() for row in self.table]),
            digest_b=_digest_of(self.values),
        )


def capture_and_plan(job: Job, attempt: Attempt) -> tuple[Captured, SavePlan]:
    """S3: collect this rank's state and agree with all ranks on who writes what.

    Equal digests, the usual case, settle everything; otherwise tables and values are
    exchanged once.

    Called by: every rank. Collectives: one round, or two.

    Raises:
        UnsupportedError, ConfigError: Something cannot be stored, or differs between
            ranks; names it.
        SaveFailed: User code failed on some ranks.
    """

    def body() -> _State:
        captured = capture(job.checkpoint, job.decisions.members)
        return _State(captured, captured.shared.table())

    ran = Ran(body)
    decide = or_abandon(job, attempt, _judge_capture)
    answer = agree(job.decisions, Phase.CAPTURE, ran, decide, says=_State.vote)
    state = ran.result
    if answer["differ"]:
        return state.captured, _exchange(job, attempt, state)
    key = bytes.fromhex(answer["key"])
    if job.assignment is None or job.assignment[0] != key:
        job.assignment = (key, Assignment([state.table], [0] * job.world_size))
    everyone = [0] * job.world_size
    return state.captured, SavePlan(
        job.assignment[1], [state.table], everyone, state.values
    )


def _judge_capture(votes: Sequence[Vote]) -> Answer:
    raise_failures(votes, "the state could not be captured", SaveFailed)
    alike = len({(vote.digest_a, vote.digest_b) for vote in votes}) == 1
    return {"differ": not alike, "key": votes[0].digest_a.hex()}


def _exchange(job: Job, attempt: Attempt, state: _State) -> SavePlan:
    """Make the plan from tables that differ between ranks: one more round."""
    plans: list[SavePlan] = []  # the chief's

    def decide(votes: Sequence[Vote]) -> Answer:
        plan = _merge(votes)
        plans.append(plan)
        return {
            "tables": [[row.to_json() for row in table] for table in plan.tables],
            "table_of_rank": list(plan.table_of_rank),
        }

    detail = {"table": [row.to_json() for row in state.table], "values": state.values}
    vote = Vote(Phase.TABLES, detail=strict_json.dumps(detail).encode())
    answer = job.decisions.consult(vote, or_abandon(job, attempt, decide))
    if plans:
        return plans[0]
    tables = [tuple(map(Row.from_json, rows)) for rows in answer["tables"]]
    return SavePlan(Assignment(tables, answer["table_of_rank"]))


def _merge(votes: Sequence[Vote]) -> SavePlan:
    details = [strict_json.loads(vote.detail) for vote in votes]
    tables: list[Table] = []
    index_of: dict[str, int] = {}
    table_of_rank = []
    for detail in details:
        key = strict_json.dumps(detail["table"])
        if key not in index_of:
            index_of[key] = len(tables)
            tables.append(tuple(map(Row.from_json, detail["table"])))
        table_of_rank.append(index_of[key])
    try:
        assignment = Assignment(tables, table_of_rank)
    except ManifestError as error:
        raise ConfigError(str(error)) from error
    merged = _merge_values([detail["values"] for detail in details])
    return SavePlan(assignment, tables, table_of_rank, merged)


def _merge_values(per_rank: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Unite the ranks' plain values; those of one name must be equal."""
    merged: dict[str, Any] = {}
    spelled: dict[str, dict[str, list[int]]] = {}
    for rank, own in enumerate(per_rank):
        for name, value in own.items():
            merged.setdefault(name, value)
            text = strict_json.dumps(value)
            spelled.setdefault(name, {}).setdefault(text, []).append(rank)
    differing = {name: texts for name, texts in spelled.items() if len(texts) > 1}
    if differing:
        lines = [
            f"{name}: "
            + ", ".join(f"{text:.60} on ranks {ranks[:8]}" for text, ranks in texts.items())
            for name, texts in list(differing.items())[:16]
        ]
        msg = (
            f"{len(differing)} plain values differ between ranks; wrap what each rank "
            "has of its own in PerRank. " + "; ".join(lines)
        )
        raise ConfigError(msg)
    return merged


def or_abandon(
    job: Job, attempt: Attempt, decide: Callable[[Sequence[Vote]], Answer]
) -> Callable[[Sequence[Vote]], Answer]:
    """Remove the pending directory at once if all ranks voted and the save failed."""

    def decide_or_abandon(votes: Sequence[Vote]) -> Answer:
        try:
            return decide(votes)
        except (FencedError, OutcomeUnknown):
            raise  # nothing is ours to delete now
        except DistckptError:
            # Not after Ctrl-C: the commit may have gone through.
            assert job.chief is not None
            job.chief.abandon(attempt)
            raise

    return decide_or_abandon


def _digest_of(tree: object) -> bytes:
    return bytes.fromhex(digest(strict_json.dumps(tree).encode()))
