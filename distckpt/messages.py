"""What ranks tell each other: small fixed votes up, JSON answers down, no pickle.

A rank's error travels as its class's name and text. Every rank then raises the same
class with the same table; the rank where it happened also has the original as cause.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from distckpt import errors, strict_json
from distckpt.errors import ConfigError, DistckptError, RanksFailed, StorageError

_MAX_TEXT = 2048


class Phase(IntEnum):
    """Where in a protocol a rank is: all ranks must be in the same phase."""

    CONNECT = 1
    CONSTRUCT = 2
    CLAIM = 3
    PROBE = 4
    DECIDE = 5
    TABLES = 6
    WRITE = 7
    CANDIDATE = 8
    PLAN = 9
    READ = 10
    APPLY = 11
    INITIALIZE = 12
    SYNC = 13
    LAND = 14
    REPLICAS = 15
    ASK = 16
    CHECK = 17


_SAVE, _RESTORE = "save()", "restore() or restore_or_initialize()"
# What the user has called, by phase.
_CALLS = {
    Phase.CONNECT: "CheckpointManager(...)",
    Phase.CONSTRUCT: "CheckpointManager(...)",
    Phase.CLAIM: "its first save() or restore",
    Phase.PROBE: "its first save() or restore",
    Phase.CANDIDATE: _RESTORE,
    Phase.PLAN: _RESTORE,
    Phase.READ: _RESTORE,
    Phase.APPLY: _RESTORE,
    Phase.INITIALIZE: _RESTORE,
    Phase.SYNC: "sync() or close()",
}


def call_of(phase: Phase) -> str:
    """Name the user's call that a phase belongs to."""
    return _CALLS.get(phase, _SAVE)


def place_of(phase: Phase) -> str:
    """Name the user's call, and the phase for those who know the protocol."""
    return f"{call_of(phase)} (phase {phase.name})"


class Status(IntEnum):
    """How a phase went on one rank."""

    OK = 0
    FAILED = 1
    MISMATCH = 2  # checkpoint and live objects do not fit: no fallback
    UNREADABLE = 3  # the storage failed: retried, then falls back
    CORRUPT = 4  # the bytes are wrong: confirmed, then falls back


class Vote(NamedTuple):
    """One rank's word on one phase; a tuple, because the chief gets one of each rank.

    Attributes:
        phase: The phase it is about.
        status: How it went.
        size_bytes: Bytes that the phase wrote or read.
        step: Training step, where there is one; then there are no bytes.
        digest_a: What must be compared between ranks, as 16 raw bytes.
        digest_b: A second one, of which 12 bytes travel.
        call: Of a call of ``save()``, which must be alike on all ranks, likewise.
        detail: Text of any length, or nothing; gathered only when some rank has some.
        rank: Who votes; set by the channel.
        seconds: How long the phase took, so that the chief knows the slowest.
    """

    phase: Phase
    status: Status = Status.OK
    size_bytes: int = 0
    step: int | None = None
    digest_a: bytes = bytes(16)
    digest_b: bytes = bytes(12)
    call: bytes = bytes(12)
    detail: bytes = b""
    rank: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Tell whether the phase went well."""
        return self.status is Status.OK

    def pack(self) -> bytes:
        """Encode all but detail and rank; always into the same number of bytes.

        Raises:
            ValueError: Both bytes and a step.
        """
        if self.step is None:
            status, number = int(self.status), self.size_bytes
        elif self.size_bytes:
            msg = "a vote has bytes or a step, not both"
            raise ValueError(msg)
        else:
            status, number = self.status | _HAS_STEP, self.step
        length = len(self.detail)
        digests = (self.digest_a, self.digest_b, self.call)
        return _VOTE.pack(self.phase, status, length, number, *digests, self.seconds)


# So small that the two votes of a save are at most 128 bytes.
_VOTE = struct.Struct("<BBIq16s12s12sf")
_HAS_STEP = 0x80
# Looked up, because making a member of an enum from its number is slow.
_PHASES = {int(phase): phase for phase in Phase}
_STATUSES = {int(status): status for status in Status}

VOTE_BYTES = _VOTE.size


def unpack_votes(packed: Sequence[bytes], details: Sequence[bytes]) -> list[Vote]:
    """Decode the votes of all ranks, in their order.

    Args:
        packed: What ``Vote.pack`` made of each.
        details: The detail of each.
    """
    votes = []
    fields = zip(_VOTE.iter_unpack(b"".join(packed)), details, strict=True)
    for rank, (packed_vote, detail) in enumerate(fields):
        phase, status, _, number, a, b, call, seconds = packed_vote
        size_bytes, step = number, None
        if status & _HAS_STEP:
            size_bytes, step = 0, number
        votes.append(
            Vote(
                _PHASES[phase],
                _STATUSES[status & ~_HAS_STEP],
                size_bytes,
                step,
                a,
                b,
                call,
                detail,
                rank,
                seconds,
            )
        )
    return votes


def slowest(votes: Sequence[Vote]) -> dict[str, Any]:
    """Say which rank took longest for a phase, how long, and how long all did."""
    last = max(votes, key=lambda vote: vote.seconds)
    mean = sum(vote.seconds for vote in votes) / len(votes)
    return {
        "ranks": len(votes),
        "slowest_rank": last.rank,
        "slowest_seconds": round(last.seconds, 6),
        "mean_seconds": round(mean, 6),
    }


def detail_lengths(packed: Sequence[bytes]) -> list[int]:
    """Return how long the details are that belong to packed votes."""
    return [length for _, _, length, *_ in _VOTE.iter_unpack(b"".join(packed))]


def failure(phase: Phase, error: BaseException, status: Status = Status.FAILED) -> Vote:
    """Make the vote of a rank on which a phase raised."""
    is_ours = isinstance(error, DistckptError)
    fields = {
        "kind": type(error).__name__ if is_ours else "",
        "text": _clip(str(error) if is_ours else describe(error)),
        "errno": _int_of(error, "errno"),
        "shard_rank": _int_of(error, "shard_rank"),
    }
    return Vote(phase, status, detail=strict_json.dumps(fields).encode())


def describe(error: BaseException) -> str:
    """Name an error and what it says."""
    try:
        text = str(error)
        return f"{type(error).__name__}: {text}" if text else type(error).__name__
    except Exception:  # one that cannot even say what it is must be told, too
        return type(error).__name__


def failure_of(vote: Vote) -> tuple[str, int | None]:
    """Return the text of a failed vote, and the rank whose shard file it blames."""
    fields = strict_json.loads(vote.detail)
    return fields["text"], fields["shard_rank"]


def raise_failures(
    votes: Sequence[Vote],
    what: str,
    default: type[RanksFailed],
    keep_kind: bool = True,
) -> None:
    """Raise one error for all failed votes; return if there are none.

    Args:
        votes: One a rank.
        what: What failed, for the message.
        default: The error to raise.
        keep_kind: Raise an error of ours that all failed ranks agree on instead.
    """
    failed = {vote.rank: strict_json.loads(vote.detail) for vote in votes if not vote.ok}
    if not failed:
        return
    failures = {rank: fields["text"] for rank, fields in failed.items()}
    kinds = {fields["kind"] for fields in failed.values()}
    texts = set(failures.values())
    if len(failed) == len(votes) and len(texts) == 1:
        message = f"{what}: {texts.pop()}"
    else:
        lines = [f"rank {rank}: {text}" for rank, text in failures.items()]
        message = f"{what} ({len(failed)} of {len(votes)} ranks): {'; '.join(lines[:16])}"
    kind = kinds.pop() if keep_kind and len(kinds) == 1 else ""
    error_class: type[DistckptError] = getattr(errors, kind, default) if kind else default
    if issubclass(error_class, StorageError):
        errnos = {fields["errno"] for fields in failed.values()}
        raise error_class(message, errno=errnos.pop() if len(errnos) == 1 else None)
    if issubclass(error_class, RanksFailed):
        raise error_class(message, failures)
    raise error_class(message)


def check_called_alike(votes: Sequence[Vote]) -> None:
    """Raise ``ConfigError`` if ranks have called the manager in different ways."""
    chiefs = (votes[0].step, votes[0].call)
    differing = [vote for vote in votes if (vote.step, vote.call) != chiefs]
    if differing:
        others = ", ".join(f"rank {v.rank} at step {v.step}" for v in differing[:16])
        msg = (
            f"save() was called differently on {len(differing)} of {len(votes)} ranks: the "
            f"chief at step {votes[0].step}; {others}, or with other arguments. Every rank "
            "must call save() at the same step in the same way."
        )
        raise ConfigError(msg)


def encode_answer(payload: Mapping[str, Any]) -> bytes:
    """Encode the chief's answer."""
    return strict_json.dumps({"answer": payload}).encode()


def encode_error(error: DistckptError) -> bytes:
    """Encode an error that every rank is to raise."""
    fields = {
        "error": type(error).__name__,
        "text": str(error),
        "failures": [[rank, text] for rank, text in error.failures.items()]
        if isinstance(error, RanksFailed)
        else [],
        "errno": getattr(error, "errno", None),
    }
    return strict_json.dumps(fields).encode()


def decode_answer(data: bytes) -> dict[str, Any]:
    """Decode the chief's answer, or raise the error that it carries."""
    fields = strict_json.loads(data)
    if "answer" in fields:
        answer: dict[str, Any] = fields["answer"]
        return answer
    error_class = getattr(errors, fields["error"])
    if issubclass(error_class, StorageError):
        raise error_class(fields["text"], errno=fields["errno"])
    if issubclass(error_class, RanksFailed):
        raise error_class(fields["text"], dict(fields["failures"]))
    raise error_class(fields["text"])


def _int_of(error: BaseException, name: str) -> int | None:
    value = getattr(error, name, None)
    return value if type(value) is int else None


def _clip(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else text[: _MAX_TEXT - 3] + "..."
