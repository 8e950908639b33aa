"""The commands that ask a running job for something, and ``distckpt prune`` beside none."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

import click

from distckpt.cli_paths import (
    LOCAL_PATH,
    check_run_directory,
    complete_checkpoint,
    complete_directory,
)
from distckpt.errors import CheckpointNotFound, ConfigError
from distckpt.run_directory import RunDirectory
from distckpt.terminal import (
    EXIT_BAD,
    EXIT_OK,
    EXIT_USAGE,
    Progress,
    echo,
    fail,
    json_option,
    or_exit,
    print_json,
    print_table,
)
from distckpt.words import size

if TYPE_CHECKING:
    from distckpt.prune import Plan
    from distckpt.record import Entry

_wait_option = click.option(
    "--wait",
    "timeout",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="Wait so long until the job has done it; exit code 1 if it has not.",
)


@click.command(name="pin")
@click.argument("path", type=LOCAL_PATH, shell_complete=complete_checkpoint)
@_wait_option
@json_option
def pin_command(path: str, timeout: float, as_json: bool) -> None:
    """Keep a checkpoint, whatever the rules say, until it is unpinned.

    The running job takes it up with its next commit, before it drops anything; the next
    job, if none runs.
    """
    from distckpt.requests import pin

    _report(path, "pinned", or_exit(lambda: pin(path, timeout=timeout)), timeout, as_json)


@click.command(name="unpin")
@click.argument("path", type=LOCAL_PATH, shell_complete=complete_checkpoint)
@_wait_option
@json_option
def unpin_command(path: str, timeout: float, as_json: bool) -> None:
    """Leave a pinned checkpoint to the rules again."""
    from distckpt.requests import unpin

    is_done = or_exit(lambda: unpin(path, timeout=timeout))
    _report(path, "unpinned", is_done, timeout, as_json)


def _report(path: str, what: str, is_done: bool, timeout: float, as_json: bool) -> None:
    if as_json:
        print_json({"path": path, "asked_for": what, "done": is_done})
    elif is_done:
        echo(f"{path}: {what}.")
    else:
        echo(f"{path}: will be {what} with the next commit of a job, before it drops any.")
    sys.exit(EXIT_BAD if timeout and not is_done else EXIT_OK)


@click.command(name="request-save")
@click.argument("directory", type=LOCAL_PATH, shell_complete=complete_directory)
@click.option(
    "--wait",
    "timeout",
    type=click.FloatRange(min=0),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="Wait so long until it is committed; exit code 1 if it is not.",
)
@json_option
def request_save_command(directory: str, timeout: float, as_json: bool) -> None:
    """Have the running job save, and say when it is committed.

    A job with the rule on_request() in its checkpoint_interval saves within about a
    second; the next save of any other job answers.
    """
    from distckpt.requests import request_save

    or_exit(check_run_directory, directory)
    path = or_exit(lambda: request_save(directory, timeout=timeout))
    if as_json:
        print_json({"directory": directory, "committed": path})
    elif path is not None:
        echo(f"committed: {path}")
    elif timeout:
        echo(
            f"{directory}: nothing was committed in {timeout:g} s. It stays asked for, "
            "until a job saves there; 'distckpt doctor' says whether one runs.",
            err=True,
        )
    else:
        echo(f"{directory}: asked for; the next save of a job answers.")
    sys.exit(EXIT_BAD if timeout and path is None else EXIT_OK)


@click.command(name="prune")
@click.argument("directory", type=LOCAL_PATH, shell_complete=complete_directory)
@click.option(
    "--keep",
    metavar="RULES",
    help='For example \'latest(3) | best(2, "val_loss", mode="min")\'; by default the '
    "rules of the last job.",
)
@click.option("--yes", is_flag=True, help="Do it; else only say what would be done.")
@json_option
def prune_command(directory: str, keep: str | None, yes: bool, as_json: bool) -> None:
    """Drop the checkpoints that no rule keeps, and delete their files.

    All that is committed is looked at, also what earlier jobs have kept. Pinned ones stay,
    and so does the newest. No job may run in the directory.
    """
    from distckpt import prune

    or_exit(check_run_directory, directory)
    record = or_exit(prune.read, RunDirectory.at(directory))
    if record is None:
        fail(CheckpointNotFound(f"{directory}: no checkpoint has been committed."))
    try:
        rule = prune.rule_of(keep, record)
        plan = prune.plan_prune(record, rule, RunDirectory.at(directory))
        if keep is not None:
            prune.refuse_unknown_metrics(rule, plan)
    except ConfigError as error:
        fail(error, EXIT_USAGE)
    remaining = 0
    if yes:
        plan, gone = or_exit(prune.prune, RunDirectory.at(directory), rule)
        remaining = len(plan.dropped)
        with Progress("deleting") as progress:
            advance = progress.begin(sum(entry.size_bytes for entry in plan.dropped))
            for entry in gone:
                advance(entry.size_bytes)
                remaining -= 1
    if as_json:
        print_json(
            {
                "directory": directory,
                "done": yes,
                "dropped": [entry.attempt.prefix for entry in plan.dropped],
                "kept": {
                    entry.attempt.prefix: _reasons(entry, plan.rules)
                    for entry in plan.staying
                },
                "size_bytes": sum(entry.size_bytes for entry in plan.dropped),
                "not_deleted_yet": remaining,
            }
        )
        return
    _print_plan(plan, is_done=yes)
    if remaining:
        echo(f"{remaining} are still read by somebody; the next job deletes them.")


def _print_plan(plan: Plan, is_done: bool) -> None:
    rows = [(entry, "dropped" if is_done else "would be dropped") for entry in plan.dropped]
    rows += [(entry, ", ".join(_reasons(entry, plan.rules))) for entry in plan.staying]
    rows.sort(key=lambda row: row[0].record, reverse=True)
    print_table(
        ["checkpoint", "step", "size", "kept by"],
        [
            [
                entry.attempt.prefix,
                "" if entry.step is None else str(entry.step),
                size(entry.size_bytes),
                what,
            ]
            for entry, what in rows
        ],
        right=("step", "size"),
    )
    size_bytes = sum(entry.size_bytes for entry in plan.dropped)
    echo(
        f"{len(plan.dropped)} of {len(rows)} dropped, {size(size_bytes)}."
        if is_done
        else f"Would drop {len(plan.dropped)} of {len(rows)}, {size(size_bytes)}; nothing "
        "was changed. With --yes it is done."
    )


def _reasons(entry: Entry, rules: Sequence[str]) -> list[str]:
    return entry.kept_by(rules) or ["the newest"]
