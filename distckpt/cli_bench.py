"""The command ``distckpt bench``; what measures is imported when it is run."""

from __future__ import annotations

import re
import sys
from typing import TYPE_CHECKING, Any

import click

from distckpt import files
from distckpt.cli_paths import LOCAL_PATH, complete_directory
from distckpt.errors import CheckpointNotFound, ConfigError, DistckptError
from distckpt.terminal import (
    EXIT_BAD,
    EXIT_OK,
    EXIT_USAGE,
    echo,
    fail,
    json_option,
    print_json,
    print_table,
)
from distckpt.words import size

if TYPE_CHECKING:
    from distckpt.bench.disk import DiskResults, Figure
    from distckpt.bench.results import Series

_EXIT_INTERRUPTED = 130
_SIZE = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([KkMGT]?)(i?)B?")
_POWERS = {"": 0, "k": 1, "K": 1, "M": 2, "G": 3, "T": 4}
_LEAST_BYTES = 2**20


def _parse_size(_: click.Context, __: click.Parameter, text: str) -> int:
    match = _SIZE.fullmatch(text)
    if match is None:
        msg = "write a number and a unit, like 512MiB or 2GB."
        raise click.BadParameter(msg)
    number, unit, binary = match.groups()
    size_bytes = int(float(number) * (1024 if binary else 1000) ** _POWERS[unit])
    if size_bytes < _LEAST_BYTES:
        msg = "at least 1MiB: what is smaller says nothing about a disk."
        raise click.BadParameter(msg)
    return size_bytes


@click.command(name="bench")
@click.argument("directory", type=LOCAL_PATH, shell_complete=complete_directory)
@click.option(
    "--size",
    "size_bytes",
    default="512MiB",
    show_default=True,
    callback=_parse_size,
    help="Of one checkpoint.",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=3,
    show_default=True,
    help="How often, besides a first time that does not count.",
)
@json_option
def bench_command(directory: str, size_bytes: int, repeat: int, as_json: bool) -> None:
    """Measure the disk of a directory, and distckpt on it.

    One process saves and restores tensors of that size. The limit is the fastest of several
    plain ways of moving the same bytes, equally durable. What is written, several times the
    size, is removed again; a disk that is too small is refused. For reading from a cold
    cache, root drops that of the whole host.

    'python -m distckpt.bench' compares with other libraries, on many processes.

    Exit codes: 0 done; 1 distckpt failed; 2 wrong usage, or too large; 3 no such directory;
    130 interrupted.
    """
    from distckpt.bench import disk

    try:
        if not files.is_directory(directory):
            msg = f"{directory} is not a directory."
            raise CheckpointNotFound(msg)
        disk.check_room(directory, size_bytes)
    except ConfigError as error:
        fail(error, EXIT_USAGE)
    except DistckptError as error:
        fail(error)
    try:
        found = disk.measure(directory, size_bytes, repeat, _say)
    except KeyboardInterrupt:
        sys.exit(_EXIT_INTERRUPTED)
    _say("")
    if as_json:
        print_json(_to_json(directory, found))
    else:
        _print(directory, found)
    sys.exit(EXIT_BAD if found.failure else EXIT_OK)


def _say(text: str) -> None:
    """Show what goes on in one line, where somebody watches."""
    if sys.stderr.isatty():
        click.echo(f"\r\x1b[K{text.strip()}", nl=False, err=True)


def _print(directory: str, found: DiskResults) -> None:
    echo(f"{directory}: {found.filesystem}, a checkpoint of {size(found.size_bytes)}")
    if found.figures:
        print_table(
            ["", "distckpt", "", "limit", "", "by", "of the limit"],
            [_row(figure, found.size_bytes) for figure in found.figures],
            right=("distckpt", "limit", "of the limit"),
        )
    echo(f"Medians. The cache was made cold by {found.cold_cache_by}.")
    if found.failure:
        echo(f"distckpt failed: {found.failure}")


def _row(figure: Figure, size_bytes: int) -> list[str]:
    cells = [figure.what, *_spelled(figure.ours, size_bytes)]
    if figure.limit is None:
        return [*cells, "", "", "", ""]
    share = f"{100 * _share(figure.ours, figure.limit):.0f}%"
    return [*cells, *_spelled(figure.limit, size_bytes), figure.limit_by, share]


def _spelled(series: Series, size_bytes: int) -> tuple[str, str]:
    return f"{size(size_bytes / series.median)}/s", f"{series.median:.3f} s"


def _share(ours: Series, limit: Series) -> float:
    return limit.median / ours.median


def _to_json(directory: str, found: DiskResults) -> dict[str, Any]:
    return {
        "ok": not found.failure,
        "directory": directory,
        "filesystem": found.filesystem,
        "cold_cache_by": found.cold_cache_by,
        "size_bytes": found.size_bytes,
        "failure": found.failure,
        "figures": [_figure_to_json(figure, found.size_bytes) for figure in found.figures],
    }


def _figure_to_json(figure: Figure, size_bytes: int) -> dict[str, Any]:
    tree = {
        "what": figure.what,
        "seconds": figure.ours.to_json(),
        "bytes_per_second": size_bytes / figure.ours.median,
        "limit": None,
    }
    if figure.limit is not None:
        tree["limit"] = {
            "by": figure.limit_by,
            "seconds": figure.limit.to_json(),
            "bytes_per_second": size_bytes / figure.limit.median,
            "share": _share(figure.ours, figure.limit),
        }
    return tree
