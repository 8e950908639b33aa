"""Drop checkpoints by hand, by the rules that ``max_to_keep`` takes.

For a person, by way of ``distckpt prune``, where no job runs. It claims the directory as a
job does, so a job that goes on nevertheless is fenced, and loses nothing that it was told.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from distckpt import mailbox, state
from distckpt.chief import Chief
from distckpt.errors import ConfigError, DirectoryInUseError
from distckpt.identity import Identity, this_process
from distckpt.near import did_you_mean
from distckpt.policy import Best, Rule, parse, parts_of
from distckpt.record import Entry, Record
from distckpt.retention import Retention, spells_number, sweep
from distckpt.run_directory import RunDirectory

_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Plan:
    """What is dropped, and what stays.

    Attributes:
        rules: By which, as they are written.
        dropped: Oldest first.
        staying: Likewise; with the rules that keep each, by index.
    """

    rules: tuple[str, ...]
    dropped: tuple[Entry, ...]
    staying: tuple[Entry, ...]


def rule_of(text: str | None, record: Record) -> Rule:
    """Return the rules to prune by: those that are given, or those of the last job.

    Raises:
        ConfigError: There are none, or they are not to be read.
    """
    # A number drops what has left the managed ones already, and none of what it preserved.
    if text is None and (not record.rules or spells_number(record.rules)):
        had = f"{', '.join(record.rules)}, " if record.rules else ""
        msg = (
            f"the last job here had {had}no rules such as latest(3) | best(2, ...): say "
            "what is to be kept with --keep."
        )
        raise ConfigError(msg)
    return parse(" | ".join(record.rules) if text is None else text)


def plan_prune(record: Record, rule: Rule, directory: RunDirectory) -> Plan:
    """Say what pruning would do; writes nothing.

    Raises:
        ConfigError: A rule does not say what to keep.
        StorageError, UnsafeCheckpointError: What else is asked for cannot be read.
    """
    requests, _ = mailbox.collect(directory)
    every = sorted(record.committed, key=lambda entry: entry.record)
    return _plan(mailbox.applied(every, requests), rule)


def refuse_unknown_metrics(rule: Rule, plan: Plan) -> None:
    """Raise if a rule goes by a metric that no checkpoint has: it would keep none.

    For rules that somebody has typed in. A job may have rules for metrics that are to come.

    Raises:
        ConfigError: Names the metrics that there are.
    """
    entries = (*plan.staying, *plan.dropped)
    known = sorted({name for entry in entries for name, _ in entry.metrics})
    for part in parts_of(rule):
        if isinstance(part, Best) and part.metric not in known:
            msg = (
                f"{part}: no checkpoint has that metric, so it would keep none"
                f"{did_you_mean(part.metric, known)} Metrics that there are: "
                f"{', '.join(known[:20]) or 'none'}."
            )
            raise ConfigError(msg)


def prune(directory: RunDirectory, rule: Rule) -> tuple[Plan, Iterator[Entry]]:
    """Drop what the rules do not keep.

    After return a durable record says so.

    Returns:
        What was done, and what yields each when its files are gone: not those that
        somebody reads, which the next claim of the directory deletes.

    Raises:
        DirectoryInUseError: A job holds the directory.
        FencedError: A job has claimed it meanwhile.
        StorageError, OutcomeUnknown: It could not be recorded.
    """
    chief = Chief(
        directory,
        checkpoint_name="ckpt",
        retention=Retention(rule),
        # Of no job: else that of an allocation would be taken for a restart of its job.
        identity=Identity(f"prune by {this_process()}", 0),
        max_lock_wait_seconds=0,
    )
    plans: list[Plan] = []

    def plan(entries: Sequence[Entry]) -> Sequence[Entry]:
        plans.append(_plan(entries, rule))
        return plans[0].dropped

    try:
        try:
            chief.prepare_claim()
        except DirectoryInUseError as error:
            msg = f"{directory} is in use by a job; end that job before pruning it."
            raise DirectoryInUseError(msg) from error
        chief.finish_claim()
        chief.prune(plan)
    except BaseException:
        chief.abandon_claim()
        chief.close()
        raise
    return plans[0], _deleted(chief, directory, plans[0].dropped)


def _deleted(
    chief: Chief, directory: RunDirectory, dropped: Sequence[Entry]
) -> Iterator[Entry]:
    left = [*dropped]
    is_through = False
    try:
        while left and not is_through:
            is_through = chief.settle(_POLL_SECONDS)
            for entry in [*left]:
                if not directory.has(entry.attempt):
                    left.remove(entry)
                    yield entry
    finally:
        chief.close()


def _plan(every: Sequence[Entry], rule: Rule) -> Plan:
    retention = Retention(rule)
    swept = sweep(every, 0.0, retention)
    return Plan(retention.rules, swept.dropped, swept.live)


def read(directory: RunDirectory) -> Record | None:
    """Read the newest record; None if nothing was ever saved there."""
    head = state.read_head(directory)
    return None if head is None or not head.record.has_committed else head.record
