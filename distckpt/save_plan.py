"""What all ranks agree to write in one save: tables and plain values, united."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence, Set
from functools import partial
from hashlib import blake2b
from typing import Any, NamedTuple

from distckpt import paths, strict_json, words
from distckpt.agree import Ran, agree
from distckpt.capture import COUNTER, Captured, capture
from distckpt.collector import collector_paused
from distckpt.comm import Answer
from distckpt.errors import (
    ConfigError,
    DistckptError,
    FencedError,
    ManifestError,
    OutcomeUnknown,
    SaveFailed,
)
from distckpt.events import CAPTURE, DECIDE
from distckpt.layout import Layouts, Table
from distckpt.messages import (
    Phase,
    Vote,
    check_called_alike,
    raise_failures,
)
from distckpt.paths import Attempt
from distckpt.record import digest
from distckpt.replica_digests import Report, report_all
from distckpt.replicas import Asked, differing, name_differing, report_of
from distckpt.restore_names import parameter_of
from distckpt.save_state import SaveState
from distckpt.session import Session
from distckpt.sharding import Sharding
from distckpt.values import Encoded, class_of_state, is_of_one_rank

_logger = logging.getLogger(__name__)


class SavePlan(NamedTuple):
    """What all ranks agreed to write.

    Attributes:
        layouts: Which rank writes which piece.
        values: The job's plain values; on the chief, for the manifest.
    """

    layouts: Layouts
    values: dict[str, Encoded]


class Planned(NamedTuple):
    """What S1 to S3 come to on this rank.

    Attributes:
        attempt: What is saved.
        captured: What this rank has to save.
        plan: What all ranks agreed to write.
    """

    attempt: Attempt
    captured: Captured
    plan: SavePlan


class _State(NamedTuple):
    """What this rank has to save, and what it says of its call."""

    captured: Captured
    table: Table
    call: Vote
    report: Report | None

    @property
    def values(self) -> dict[str, Encoded]:
        return self.captured.shared.values

    def vote(self) -> Vote:
        values = _digest_of_values(self.values, self.captured.shared.one_rank)
        detail = b"" if self.report is None else self.report.packed
        return self.call._replace(
            digest_a=self.table.digest, digest_b=values, detail=detail
        )


def decide_and_plan(
    session: Session,
    save_state: SaveState,
    call: Ran[Vote],
    begin: Callable[[], Attempt],
    validates: Callable[[], bool],
) -> Planned:
    """S1 to S3: collect this rank's state; agree on the save, and on who writes what.

    Equal digests of tables, values and replicas, the usual case, settle everything, and so
    do tables that differ as they did at the last save; else what differs is exchanged once.

    Called by: every rank. Collectives: one round; another one if tables or values differ,
    and one more where replicas differ or tables are new.

    Args:
        session: The manager's, on this rank.
        save_state: The state that saves need.
        call: What this rank's call of ``save()`` says of itself, to be compared.
        begin: Makes a new attempt's pending directory; called on the chief.
        validates: Tells whether this save compares all that is replicated.

    Raises:
        UnsupportedError, ConfigError: Something cannot be stored, or differs between
            ranks; names it.
        SaveFailed: User code failed on some ranks, the chief could not begin, or replicas
            differ.
    """

    def body() -> _State:
        asked = call.value()
        with collector_paused():
            captured = capture(save_state.tracked, session.decisions.members)
            table = captured.shared.table()
            report = report_of(session, save_state, captured, table, validates())
            return _State(captured, table, asked, report)

    digests: list[Vote] = []  # the chief's

    def decide(votes: Sequence[Vote]) -> Answer:
        digests.extend(votes)
        return {**_decide(save_state, votes, begin), "asked": differing(votes)}

    ran = Ran(body)
    began = time.monotonic()
    answer = agree(session.decisions, Phase.DECIDE, ran, decide, says=_State.vote)
    attempt = paths.parse_published(answer["attempt"])
    assert attempt is not None
    about = {"checkpoint": attempt.prefix, "step": ran.result.call.step}
    session.events.tell(CAPTURE, seconds=ran.seconds, **about)
    session.events.tell(DECIDE, seconds=time.monotonic() - began, **about)
    state = ran.result
    _warn_of_stateless(save_state, state)
    key = bytes.fromhex(answer["key"])
    values = state.values
    if answer["asked"]:
        _name_differing(session, save_state, attempt, state, answer["asked"])
    if answer["table_senders"] or answer["value_senders"]:
        values = _exchange(session, save_state, attempt, state, answer, digests)
    elif save_state.layouts is None or save_state.layouts.key != key:
        save_state.layouts = Layouts(key, [state.table], [0] * session.world_size)
    assert save_state.layouts is not None and save_state.layouts.key == key
    if state.report is not None:
        if answer["table_senders"] and len(save_state.layouts.tables) > 1:
            _compare_across_tables(session, save_state, attempt, state)
        save_state.replicas.note_compared(state.report.classes)
    return Planned(attempt, state.captured, SavePlan(save_state.layouts, values))


def _name_differing(
    session: Session, save_state: SaveState, attempt: Attempt, state: _State, asked: Asked
) -> None:
    """Refuse the save for what differs between replicas, or note the buffers."""
    assert state.report is not None
    classes, path = state.report.classes, session.path(attempt.prefix)
    guarded = partial(or_abandon, session, attempt)
    name_differing(session, save_state, path, state.captured, classes, asked, guarded)


def _compare_across_tables(
    session: Session, save_state: SaveState, attempt: Attempt, state: _State
) -> None:
    """Compare what ranks with different tables have under one name: a round.

    Which names those are is known only now.
    """
    layouts = save_state.layouts
    assert layouts is not None

    def report() -> Report:
        classes = save_state.replicas.classes_across(
            state.captured, state.table, layouts, session.rank
        )
        return report_all(state.captured, classes)

    def decide(votes: Sequence[Vote]) -> Answer:
        raise_failures(votes, "replicas could not be compared", SaveFailed)
        return {"asked": differing(votes)}

    ran = Ran(report)
    answer = agree(
        session.decisions,
        Phase.REPLICAS,
        ran,
        or_abandon(session, attempt, decide),
        says=lambda report: Vote(Phase.REPLICAS, detail=report.packed),
    )
    if answer["asked"]:
        _name_differing(
            session, save_state, attempt, state._replace(report=ran.result), answer["asked"]
        )


def _warn_of_stateless(save_state: SaveState, state: _State) -> None:
    """Say once that an optimizer has no state: after a step that is hardly meant so."""
    if not state.call.step:
        return
    for leaves in state.captured:
        for path in leaves.stateless:
            if path not in save_state.warned_of_stateless:
                save_state.warned_of_stateless.add(path)
                _logger.warning(
                    "%s has no state at step %s. If it has made steps, its state is kept "
                    "where its state_dict() does not look; track the optimizer that has "
                    "it. A job that is restored would begin with fresh moments.",
                    path,
                    state.call.step,
                )


def _decide(
    save_state: SaveState, votes: Sequence[Vote], begin: Callable[[], Attempt]
) -> Answer:
    """S2 (chief): refuse the save, or begin it."""
    raise_failures(votes, "the save was not begun", SaveFailed)
    check_called_alike(votes)
    return {"attempt": begin().published, **_judge_tables(save_state, votes)}


def _judge_tables(save_state: SaveState, votes: Sequence[Vote]) -> Answer:
    tables = _lowest_of_each(vote.digest_a for vote in votes)
    values = _lowest_of_each(vote.digest_b for vote in votes)
    key = votes[0].digest_a
    if len(tables) > 1:
        key = bytes.fromhex(digest(b"".join(vote.digest_a for vote in votes)))
    is_known = save_state.layouts is not None and save_state.layouts.key == key
    return {
        "key": key.hex(),
        # Tables that are all equal need no exchange, unless the values do.
        "table_senders": [] if len(tables) == 1 or is_known else tables,
        "value_senders": [] if len(values) == 1 else values,
    }


def _lowest_of_each(digests: Iterable[bytes]) -> list[int]:
    """Return the lowest rank of those that have each digest."""
    lowest: dict[bytes, int] = {}
    for rank, one in enumerate(digests):
        lowest.setdefault(one, rank)
    return list(lowest.values())


def _exchange(
    session: Session,
    save_state: SaveState,
    attempt: Attempt,
    state: _State,
    asked: Answer,
    digests: Sequence[Vote],
) -> dict[str, Encoded]:
    """Let the chief see what differs, and all ranks the tables: one more round.

    Returns:
        The job's plain values; those of this rank where it is not the chief.
    """
    key = bytes.fromhex(asked["key"])
    detail: dict[str, Any] = {}
    if session.rank in asked["table_senders"]:
        detail["table"] = state.table.text
        detail["copies"] = sorted(state.captured.shared.copies)
    if session.rank in asked["value_senders"]:
        detail["values"] = {name: value.text for name, value in state.values.items()}
    vote = Vote(Phase.TABLES, detail=strict_json.dumps(detail).encode() if detail else b"")
    united: list[tuple[Layouts | None, dict[str, Encoded]]] = []  # the chief's

    def decide(votes: Sequence[Vote]) -> Answer:
        details = {v.rank: strict_json.loads(v.detail) for v in votes if v.detail}
        layouts = None
        if asked["table_senders"]:
            layouts = _unite_tables(key, details, digests)
        values = _unite_values(details, digests) if asked["value_senders"] else state.values
        united.append((layouts, values))
        if layouts is None:
            return {}
        return {
            "tables": [table.text for table in layouts.tables],
            "table_of_rank": list(layouts.table_of_rank),
        }

    answer = session.decisions.consult(vote, or_abandon(session, attempt, decide))
    layouts, values = united[0] if united else (None, state.values)
    if layouts is not None:
        save_state.layouts = layouts
    elif "tables" in answer:
        tables = list(map(Table.from_text, answer["tables"]))
        save_state.layouts = Layouts(key, tables, answer["table_of_rank"])
    elif save_state.layouts is None or save_state.layouts.key != key:
        save_state.layouts = Layouts(key, [state.table], [0] * session.world_size)
    return values


def _unite_tables(
    key: bytes, details: Mapping[int, Any], digests: Sequence[Vote]
) -> Layouts:
    tables: list[Table] = []
    copies: set[str] = set()
    index_of: dict[bytes, int] = {}
    for vote in digests:
        if vote.digest_a not in index_of:
            index_of[vote.digest_a] = len(tables)
            tables.append(Table.from_text(details[vote.rank]["table"]))
            copies.update(details[vote.rank]["copies"])
    _check_meshes(tables, copies)
    try:
        return Layouts(key, tables, [index_of[vote.digest_a] for vote in digests])
    except ManifestError as error:
        raise ConfigError(str(error).removeprefix("layout: ")) from error


def _check_meshes(tables: Sequence[Table], copies: Set[str]) -> None:
    """Refuse one name on several meshes, whatever the values, unless it is declared."""
    placed: dict[str, Sharding] = {}
    for row in (row for table in tables for row in table if row.sharding is not None):
        assert row.sharding is not None
        other = placed.setdefault(row.name, row.sharding)
        if other is row.sharding or other == row.sharding:
            continue
        # The state of an optimizer lies as its parameter does.
        parameter = (parameter_of(row.name) or "").rpartition("/")[0]
        if copies.isdisjoint((row.name, parameter)):
            where = row.name.partition("/")[0]
            msg = (
                f"tensor {row.name!r} lies on {words.ranks(other.mesh.ranks)} and, by "
                f"itself, on {words.ranks(row.sharding.mesh.ranks)} (placements "
                f"{[*other.placements]} and {[*row.sharding.placements]}). If these are "
                "two tensors (experts, stages), declare "
                f"Checkpoint({where}=PerGroup({where}, mesh)), with the mesh along which "
                "they differ; if they are copies of one tensor, "
                f"Checkpoint({where}=Replicated({where}))."
            )
            raise ConfigError(msg)


def _unite_values(
    details: Mapping[int, Any], digests: Sequence[Vote]
) -> dict[str, Encoded]:
    """Unite the ranks' plain values; those of one name must be equal."""
    sender_of: dict[bytes, int] = {}
    united: dict[str, Encoded] = {}
    spelled: dict[str, dict[str, list[int]]] = {}
    for vote in digests:
        sender = sender_of.setdefault(vote.digest_b, vote.rank)
        for name, found in details[sender]["values"].items():
            value = Encoded(found)
            united.setdefault(name, value)
            text = "" if is_of_one_rank(value) else found
            spelled.setdefault(name, {}).setdefault(text, []).append(vote.rank)
    differing = {name: texts for name, texts in spelled.items() if len(texts) > 1}
    if differing:
        lines = [
            _spell_difference(name, united[name], texts)
            for name, texts in list(differing.items())[:16]
        ]
        number = words.count(len(differing), "plain value")
        verb = "differs" if len(differing) == 1 else "differ"
        where = next(iter(differing)).partition("/")[0]
        way_on = (
            "Some ranks have saved or restored more often: make the same calls on all."
            if where == COUNTER
            else "Make them equal; or, if each rank is meant to have its own, mark it: "
            f'Checkpoint({where}=PerRank({where}, resize="by_rank")).'
        )
        msg = f"{number} {verb} between ranks: {'; '.join(lines)}. {way_on}"
        raise ConfigError(msg)
    return united


def _spell_difference(name: str, value: Encoded, texts: Mapping[str, Sequence[int]]) -> str:
    class_name = class_of_state(value.tree)
    if class_name:
        groups = " and ".join(words.ranks(ranks) for ranks in texts.values())
        return f"{name} (state of {class_name}) differs between {groups}"
    return f"{name} is " + ", ".join(
        f"{text:.60} on {words.ranks(ranks)}" for text, ranks in texts.items()
    )


def or_abandon(
    session: Session, attempt: Attempt, decide: Callable[[Sequence[Vote]], Answer]
) -> Callable[[Sequence[Vote]], Answer]:
    """Remove the pending directory at once if all ranks voted and the save failed."""

    def decide_or_abandon(votes: Sequence[Vote]) -> Answer:
        try:
            return decide(votes)
        except (FencedError, OutcomeUnknown):
            raise  # nothing is ours to delete now
        except DistckptError:
            # Not after Ctrl-C: the commit may have gone through.
            assert session.chief is not None
            session.chief.abandon(attempt)
            raise

    return decide_or_abandon


def _digest_of_values(values: Mapping[str, Encoded], one_rank: Collection[str]) -> bytes:
    """Digest plain values; the settings of an optimizer are one object under many names.

    Of what one rank's is stored only the names are compared.
    """
    names = [*values]
    texts = ["" if one_rank and n in one_rank else v.text for n, v in values.items()]
    # Names, and how long the texts are, so that none can run into the next.
    lengths = [*map(len, texts)]
    hasher = blake2b(strict_json.dumps([names, lengths]).encode(), digest_size=16)
    for text in texts:
        hasher.update(text.encode())
    return hasher.digest()
