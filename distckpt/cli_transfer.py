"""The commands ``distckpt export`` and ``distckpt import``.

What they are made of is imported when one is run: ``distckpt list`` answers at once.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import click

from distckpt.cli_paths import LOCAL_PATH, complete_checkpoint
from distckpt.errors import (
    ConfigError,
    CorruptStateError,
    DistckptError,
    FormatError,
    UnsupportedError,
)
from distckpt.formats import foreign
from distckpt.terminal import (
    EXIT_BAD,
    EXIT_UNREADABLE,
    EXIT_USAGE,
    Progress,
    echo,
    fail,
    json_option,
    print_json,
)
from distckpt.words import count, size, took


def _pairs(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    pairs = [text.partition("=") for text in texts]
    if not all(old and new for old, _, new in pairs):
        msg = "write two names with = between them."
        raise click.BadParameter(msg)
    return {old: new for old, _, new in pairs}


_rename_option = click.option(
    "--rename",
    metavar="OLD=NEW",
    multiple=True,
    callback=_pairs,
    help="Another name for a tracked object; may be given again.",
)


@click.command(name="export")
@click.argument("path", type=LOCAL_PATH, shell_complete=complete_checkpoint)
@click.option("--to", type=click.Choice(foreign.EXPORTED), required=True, help="Format.")
@click.option(
    "--output",
    type=LOCAL_PATH,
    required=True,
    metavar="TARGET",
    help="Nothing may be there.",
)
@click.option(
    "--object",
    "tracked_object",
    metavar="NAME",
    help="Only what is below this name, which is taken away; of huggingface: model.",
)
@click.option("--only", metavar="PATTERN", multiple=True, help="Only names like this one.")
@click.option(
    "--max-shard-bytes",
    type=click.IntRange(min=1),
    default=5_000_000_000,
    show_default=True,
    help="Of huggingface: largest file.",
)
@click.option(
    "--config",
    type=LOCAL_PATH,
    metavar="PATH",
    help="Of huggingface: files to copy beside.",
)
@_rename_option
@json_option
def export_command(
    path: str,
    to: str,
    output: str,
    tracked_object: str | None,
    only: tuple[str, ...],
    max_shard_bytes: int,
    config: str | None,
    rename: dict[str, str],
    as_json: bool,
) -> None:
    """Write a checkpoint in another program's format.

    PATH is a checkpoint, or a run directory, whose newest is taken. TARGET is a file for
    safetensors and torch, a directory for huggingface and dcp. It is streamed, read again,
    compared, and only then put in place.
    """
    from distckpt import opened
    from distckpt.formats import export

    if rename and to != foreign.DCP:
        msg = "--rename is for --to dcp; the names of others follow from --object."
        raise click.UsageError(msg)
    if config and to != foreign.HUGGINGFACE:
        msg = "--config is for --to huggingface."
        raise click.UsageError(msg)
    options = export.Options(tracked_object, only, max_shard_bytes, config, rename)
    with _exit_codes(), opened.open(path) as checkpoint:
        total = 2 * export.size_to_write(checkpoint, to, options)
        with _timed(f"exporting to {to}", total, as_json, output) as (advance, facts):
            done = export.export(checkpoint, output, to, options, advance)
            facts.update(num_tensors=done.num_tensors, num_values=done.num_values)
            facts.update(size_bytes=done.size_bytes)


@click.command(name="import")
@click.argument("source", type=LOCAL_PATH)
@click.option(
    "--from",
    "kind",
    type=click.Choice(foreign.IMPORTED),
    required=True,
    help="What the source is.",
)
@click.option(
    "--output",
    type=LOCAL_PATH,
    required=True,
    metavar="DIRECTORY",
    help="A new run directory.",
)
@click.option(
    "--object", "tracked_object", metavar="NAME", help="All of it is this object's state."
)
@_rename_option
@click.option(
    "--tie",
    metavar="NAME=OTHER",
    multiple=True,
    callback=_pairs,
    help="Two full names of what is one tensor in the live objects; may be given again.",
)
@click.option("--skip", metavar="PATTERN", multiple=True, help="Leave out names like this.")
@click.option("--module", metavar="NAME", help="The module that the optimizers optimize.")
@click.option("--name", default="ckpt", show_default=True, help="The checkpoint_name.")
@click.option("--number", type=int, help="The checkpoint's number. [default: 1]")
@click.option("--step", type=int, help="The training step that it is of.")
@json_option
def import_command(
    source: str,
    kind: str,
    output: str,
    tracked_object: str | None,
    rename: dict[str, str],
    tie: dict[str, str],
    skip: tuple[str, ...],
    module: str | None,
    name: str,
    number: int | None,
    step: int | None,
    as_json: bool,
) -> None:
    """Make a run directory of what another program has saved.

    SOURCE is a directory of DCP's, a file of torch.save's, or a safetensors file or a
    directory of them. Nothing in it is run: what is neither a tensor nor a plain value is
    refused by name.
    """
    from distckpt.formats import import_names, import_run, import_source

    with _exit_codes(), import_source.Source(source, kind, skip) as read:
        found = import_names.named(
            read.tree,
            tracked_object=tracked_object,
            renamed=rename,
            module=module,
            ties=tie,
        )
        total = 2 * import_run.size_to_write(found)
        with _timed(f"importing from {kind}", total, as_json, output) as (advance, facts):
            done = import_run.import_run(
                found, output, advance, name=name, number=number, step=step
            )
            facts.update(num_tensors=done.num_tensors, num_values=done.num_values)
            facts.update(size_bytes=done.size_bytes, path=done.path)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """End the command with what its error means."""
    try:
        yield
    except (ConfigError, UnsupportedError) as error:
        fail(error, EXIT_USAGE)
    except CorruptStateError as error:
        fail(error, EXIT_UNREADABLE)  # of no checkpoint is known what it is
    except FormatError as error:
        fail(error, EXIT_BAD)
    except DistckptError as error:
        fail(error, EXIT_UNREADABLE)


@contextmanager
def _timed(
    label: str, total_bytes: int, as_json: bool, output: str
) -> Iterator[tuple[foreign.Advance, dict[str, Any]]]:
    """Show how it gets on, and say at the end what was done."""
    facts: dict[str, Any] = {"path": output}
    started = time.monotonic()
    with Progress(label) as progress:
        yield progress.begin(total_bytes), facts
    if as_json:
        print_json({"ok": True, **facts})
        return
    seconds = max(time.monotonic() - started, 0.001)
    echo(
        f"ok   {facts['path']}: {count(facts['num_tensors'], 'tensor')}, "
        f"{count(facts['num_values'], 'plain value')}, {size(facts['size_bytes'])}, "
        f"written and read again in {took(seconds)} ({size(total_bytes / seconds)}/s)"
    )
