"""The command ``distckpt watch``."""

from __future__ import annotations

import json
import math
import os
import select
import sys
import time
from typing import TYPE_CHECKING, Any

import click

from distckpt.cli_paths import LOCAL_PATH, check_run_directory, complete_directory
from distckpt.run_directory import RunDirectory
from distckpt.terminal import EXIT_UNREADABLE, or_exit, printable
from distckpt.words import date, metrics, size

if TYPE_CHECKING:
    from distckpt.watching import Event

_KIND_WIDTH = len("other records") + 2


@click.command(name="watch")
@click.argument("directory", type=LOCAL_PATH, shell_complete=complete_directory)
@click.option(
    "--every",
    type=click.FloatRange(min=0.05),
    default=1.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look.",
)
@click.option(
    "--last",
    "num_last",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    help="How many of the last commits to begin with.",
)
@click.option("--once", is_flag=True, help="Say how things stand, and leave.")
@click.option(
    "--timeout",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Leave after so long.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="Print a line of JSON for each event."
)
def watch_command(
    directory: str,
    every: float,
    num_last: int,
    once: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    """Follow a run directory: a line for each event.

    New commits, deletions, claims by a restarted or another job; and, once, that there has
    been no commit for three times the usual interval. The directory need not be there yet.
    Only records are read.

    Ctrl-C ends it, and so does the end of what reads its output; both are no errors.
    """
    or_exit(check_run_directory, directory, not once)
    try:
        _watch(directory, every, num_last, once, timeout, as_json)
    except KeyboardInterrupt:
        pass
    except BrokenPipeError:
        # Else Python tries once more to write what is left, and complains.
        sys.stdout = None


def _watch(
    directory: str,
    every: float,
    num_last: int,
    once: bool,
    timeout: float | None,
    as_json: bool,
) -> None:
    from distckpt.watching import UNREADABLE, Watcher

    watcher = Watcher(RunDirectory.at(directory), num_last)
    reader = _Reader()
    deadline = math.inf if timeout is None else time.monotonic() + timeout
    while True:
        events = or_exit(watcher.look)
        for event in events:
            click.echo(json.dumps(_to_json(directory, event)) if as_json else _line(event))
        rest = deadline - time.monotonic()
        if once and any(event.kind == UNREADABLE for event in events):
            sys.exit(EXIT_UNREADABLE)
        if once or rest <= 0:
            return
        reader.wait(min(every, rest))


class _Reader:
    """Whoever reads what this command prints."""

    def __init__(self) -> None:
        self._poll: select.poll | None = select.poll()
        try:
            self._poll.register(sys.stdout.fileno(), 0)
        except OSError:
            self._poll = None  # it is no file of the system's

    def wait(self, seconds: float) -> None:
        """Wait for some seconds; an error at once when the reader has gone."""
        if self._poll is None:
            time.sleep(seconds)
        elif self._poll.poll(seconds * 1000):
            raise BrokenPipeError


def _line(event: Event) -> str:
    parts = [event.text]
    entry = event.entry
    if entry is not None:
        parts = [entry.attempt.prefix]
        parts += [] if entry.step is None else [f"step {entry.step}"]
        parts += [size(entry.size_bytes), metrics(dict(entry.metrics))]
        parts += [f"kept by {', '.join(event.kept_by)}"] if event.kept_by else []
    text = "  ".join(part for part in parts if part)
    return printable(f"{date(event.time)}  {event.kind:<{_KIND_WIDTH}}{text}")


def _to_json(directory: str, event: Event) -> dict[str, Any]:
    tree: dict[str, Any] = {"event": event.kind, "time": event.time, "text": event.text}
    if event.record is not None:
        tree["record"] = event.record.number
        tree["epoch"] = event.record.epoch
        tree["run"] = event.record.run
        tree["restart"] = event.record.restart
    entry = event.entry
    if entry is not None:
        tree["path"] = os.path.join(directory, entry.attempt.prefix)
        tree["attempt"] = entry.attempt.published
        tree["number"] = entry.attempt.number
        tree["step"] = entry.step
        tree["size_bytes"] = entry.size_bytes
        tree["metrics"] = dict(entry.metrics)
        tree["kept_by"] = event.kept_by
    return tree
