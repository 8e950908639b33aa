"""What the commands say on a terminal, and how they end."""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Literal, NoReturn

import click

from distckpt.errors import DistckptError

EXIT_OK = 0
EXIT_BAD = 1
EXIT_USAGE = 2
EXIT_UNREADABLE = 3

# What is done sooner needs no bar.
_SHOW_AFTER_SECONDS = 1.0
# A table that folds its cells takes 1.5 ms a row.
_MOST_FOLDED_ROWS = 200
_GAP = "  "
_CUT = "..."
_LEAST_CUT_WIDTH = 8

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def or_exit(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a function; an error of ours is said, and ends the command."""
    try:
        return function(*arguments)
    except DistckptError as error:
        fail(error)


def fail(error: DistckptError, code: int = EXIT_UNREADABLE) -> NoReturn:
    """Say what the matter is, and end the command."""
    echo(f"distckpt: {error}", err=True)
    sys.exit(code)


def echo(text: str, *, err: bool = False) -> None:
    """Print a line."""
    click.echo(printable(text), err=err)


def printable(text: str) -> str:
    """Spell out what would do something to the terminal."""
    # Names may come from anyone's files: no control characters reach the terminal.
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def print_json(tree: dict[str, Any]) -> None:
    """Print a tree for scripts, a field on a line."""
    # Not indented: Python does that without C, which takes four times as long.
    click.echo(json.dumps(tree, separators=(",\n", ": ")))


def is_terminal() -> bool:
    """Tell whether what is printed goes to a terminal."""
    return sys.stdout.isatty()


def fits(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Tell whether a table has room where it is printed: always in a file or pipe."""
    if not is_terminal():
        return True
    cells = [[printable(cell) for cell in row] for row in rows]
    return _total(_widths([columns, *cells])) <= _terminal_width()


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Sequence[str] = (),
    cut: Sequence[str] = (),
) -> bool:
    """Print a table.

    Cells are folded to the terminal's width. Of a long table, and into a file or pipe, each
    row is one line, neither folded nor cut.

    Args:
        columns: Their names.
        rows: The cells.
        right: Columns that are aligned to the right.
        cut: Columns whose cells are cut rather than folded, where that makes enough room.

    Returns:
        Whether anything was cut.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    is_cut = False
    if is_terminal() and cut:
        shorter = _cut(columns, cells, cut, _terminal_width())
        is_cut = shorter != cells
        cells = shorter
    if is_terminal() and len(cells) <= _MOST_FOLDED_ROWS:
        _print_folded(columns, cells, right)
    else:
        click.echo("\n".join(_aligned([columns, *cells], [c in right for c in columns])))
    return is_cut


def _terminal_width() -> int:
    from rich.console import Console

    return Console().width


def _cut(
    columns: Sequence[str],
    rows: list[list[str]],
    cut: Sequence[str],
    width: int,
) -> list[list[str]]:
    """Cut the cells of some columns so that rows have room; the same rows if it is vain."""
    lines = [[*columns], *rows]
    widths = _widths(lines)
    excess = _total(widths) - width
    allowed = {}
    for index, column in enumerate(columns):
        if column in cut and excess > 0:
            shorter = max(widths[index] - excess, len(column), _LEAST_CUT_WIDTH)
            excess -= max(0, widths[index] - shorter)
            allowed[index] = shorter
    if excess > 0 or not allowed:
        return rows
    return [
        [
            _shortened(cell, allowed[at]) if at in allowed else cell
            for at, cell in enumerate(row)
        ]
        for row in rows
    ]


def _shortened(cell: str, width: int) -> str:
    if cell.isascii():
        return cell if len(cell) <= width else f"{cell[: width - len(_CUT)]}{_CUT}"
    while _width_of([[cell]])(cell) > width:
        cell = f"{cell.removesuffix(_CUT)[:-1]}{_CUT}"
    return cell


def _print_folded(
    columns: Sequence[str], rows: Sequence[Sequence[str]], right: Sequence[str]
) -> None:
    # Imported here: a table takes longer to import than 'list --json' takes at all.
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        justify: Literal["left", "right"] = "right" if column in right else "left"
        table.add_column(column, justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*map(escape, row))
    Console(highlight=False).print(table)


def _aligned(lines: Sequence[Sequence[str]], is_right: Sequence[bool]) -> Iterator[str]:
    """Spell lines of cells so that each column has one width."""
    width_of = _width_of(lines)
    columns = list(zip(*lines, strict=True))
    widths = _widths(lines)
    padded = [
        [
            f"{' ' * (width - width_of(cell))}{cell}"
            if right
            else f"{cell}{' ' * (width - width_of(cell))}"
            for cell in column
        ]
        for column, width, right in zip(columns, widths, is_right, strict=True)
    ]
    return (_GAP.join(line).rstrip() for line in zip(*padded, strict=True))


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    """Return how wide each column is."""
    width_of = _width_of(lines)
    return [max(map(width_of, column)) for column in zip(*lines, strict=True)]


def _total(widths: Sequence[int]) -> int:
    return sum(widths) + len(_GAP) * (len(widths) - 1)


def _width_of(lines: Sequence[Sequence[str]]) -> Callable[[str], int]:
    """Return what tells how wide a cell is on a terminal."""
    if all(map(str.isascii, itertools.chain.from_iterable(lines))):
        return len
    # Imported here: only it knows how wide other scripts' characters are.
    from rich.cells import cell_len

    return cell_len


class Progress:
    """A bar with rate and time left, where somebody watches and it takes a while.

    As a context manager; ``begin`` says how many bytes it is, and what it returns, how many
    more are through.

    Args:
        label: What is done.
    """

    def __init__(self, label: str) -> None:
        self._label = label
        self._total_bytes = 0
        self._done_bytes = 0
        self._started = time.monotonic()
        self._is_watched = sys.stderr.isatty()
        self._bar: Any = None
        self._task: Any = None

    def begin(self, total_bytes: int) -> Callable[[int], None]:
        """Begin; returns what is to be called with the number of bytes that are through."""
        self._total_bytes = total_bytes
        return self._advance

    def _advance(self, size_bytes: int) -> None:
        self._done_bytes += size_bytes
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done_bytes)
        elif self._is_watched and time.monotonic() - self._started > _SHOW_AFTER_SECONDS:
            self._show()

    def _show(self) -> None:
        # Imported here: most commands are through before they need it.
        from rich import progress
        from rich.console import Console

        self._bar = progress.Progress(
            progress.TextColumn("{task.description}"),
            progress.BarColumn(),
            progress.DownloadColumn(binary_units=True),
            progress.TransferSpeedColumn(),
            progress.TimeRemainingColumn(),
            console=Console(stderr=True),
            transient=True,
        )
        self._task = self._bar.add_task(self._label, total=self._total_bytes)
        self._bar.update(self._task, completed=self._done_bytes)
        self._bar.start()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
