"""Paths on the command line: what is meant, what may have been meant, how they complete.

Shells ask while somebody types: nothing here raises then, and nothing heavy is imported.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import click

from distckpt import files, paths, state
from distckpt.errors import CheckpointNotFound, ConfigError, DistckptError
from distckpt.locations import checked_path
from distckpt.near_paths import there_is
from distckpt.run_directory import AttemptDirectory, RunDirectory

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


class _LocalPath(click.ParamType[str]):
    """A path that a shell may have left as it is: in quotes, or after a "="."""

    name = "path"

    def convert(
        self, value: str, param: click.Parameter | None, ctx: click.Context | None
    ) -> str:
        try:
            return checked_path(value, "the path")
        except ConfigError as error:
            self.fail(str(error), param, ctx)


LOCAL_PATH = _LocalPath()


def check_run_directory(path: str, may_be_missing: bool = False) -> None:
    """Refuse what is no directory, or a checkpoint.

    Args:
        path: What somebody has given.
        may_be_missing: Whether it need not be there yet.

    Raises:
        CheckpointNotFound: Says what is there instead.
        StorageError: It cannot be looked at.
    """
    parent, name = os.path.split(path.rstrip(os.sep))
    parent = parent or os.curdir
    if files.is_directory(path):
        if AttemptDirectory.at(path).has_manifest():
            raise CheckpointNotFound(_is_checkpoint(path, parent))
        return
    if paths.parse_prefix(name) is not None and state.has_records(RunDirectory.at(parent)):
        raise CheckpointNotFound(_is_checkpoint(path, parent))
    if may_be_missing and path and not files.exists(path):
        return
    msg = f"{path} is not a directory.{there_is(path)}"
    raise CheckpointNotFound(msg)


def _is_checkpoint(path: str, parent: str) -> str:
    return f"{path} is not a run directory, but a checkpoint in one: give {parent}."


def complete_checkpoint(
    context: click.Context, parameter: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer the checkpoints of a run directory, newest first; elsewhere directories."""
    from click.shell_completion import CompletionItem

    directory, start = os.path.split(incomplete)
    try:
        head = state.read_head(RunDirectory.at(directory or os.curdir))
    except DistckptError:
        head = None  # whoever runs the command is told why
    prefixes = [] if head is None else [e.attempt.prefix for e in head.record.committed]
    found = [prefix for prefix in prefixes if prefix.startswith(start)]
    if not found:
        return complete_directory(context, parameter, incomplete)
    return [CompletionItem(os.path.join(directory, prefix)) for prefix in found]


def complete_directory(
    _: click.Context, __: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Have the shell offer directories."""
    from click.shell_completion import CompletionItem

    return [CompletionItem(incomplete, type="dir")]
