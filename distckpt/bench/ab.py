"""Compare two versions of distckpt: ``python -m distckpt.bench.ab OLD NEW``.

Both are driven by the benchmark of the package that this is run from.
"""

from __future__ import annotations

import compileall
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distckpt.bench.command import WORKLOADS, Names
from distckpt.bench.fresh import Answer, Asked, Server, free_port, ranks_environment
from distckpt.bench.interrupt import EXIT_INTERRUPTED, clean_up_at_signals, remove
from distckpt.bench.pairs import SLOWER, Interval, interval_of, orders, verdict
from distckpt.bench.report import format_value
from distckpt.bench.results import BYTES, FIRST_ROWS, OURS, ROWS

EXIT_SLOWER = 1
EXIT_USAGE = 2
EXIT_FAILED = 3

_SAVES = ("save", "eager", "lazy")
_RESTORES = ("warm", "cold")
_OLD, _NEW, _OLD_AGAIN = "A", "B", "A again"
_TITLES = {row.key: row.title for row in ROWS}
_IN_BYTES = {row.key for row in ROWS if row.unit == BYTES}


@dataclass(frozen=True, slots=True)
class Side:
    """One version.

    Attributes:
        name: As it was given.
        folder: Holds its package.
    """

    name: str
    folder: str


@dataclass(frozen=True, slots=True)
class Compared:
    """One row.

    Attributes:
        old_seconds: Median of A.
        changed: B against A.
        same: A against A.
        verdict: See ``pairs.verdict``.
    """

    row: str
    old_seconds: float
    changed: Interval
    same: Interval
    verdict: str


# One figure for each row.
_Shot = dict[str, float]


class Failed(Exception):
    """Why there is no comparison."""


def find_side(name: str, temporary: str) -> Side:
    """Find a version: a folder with the package in it, or else a git revision.

    Raises:
        Failed: It is neither.
    """
    if os.path.isfile(os.path.join(name, "distckpt", "__init__.py")):
        return Side(name, os.path.abspath(name))
    commit = _git("rev-parse", "--short", "--verify", "--quiet", f"{name}^{{commit}}")
    if not commit:
        msg = f"{name}: neither a folder that holds distckpt nor a git revision."
        raise Failed(msg)
    text = commit.decode().strip()
    folder = os.path.join(temporary, text)
    if not os.path.isdir(folder):
        os.makedirs(folder)
        packed = _git("archive", "--format=tar", text, "distckpt")
        subprocess.run(["tar", "-x", "-C", folder], input=packed, check=True)
    return Side(f"{name} ({text})", folder)


def _git(*arguments: str) -> bytes:
    done = subprocess.run(["git", *arguments], stdout=subprocess.PIPE, check=False)
    return done.stdout


class Shots:
    """Measures one version at a time, in new processes.

    Args:
        asked: What every shot measures; its folder is the one that shots are made in.
        calls: Of ``calls.CALLS``; each is made once more than is asked for.
        num_ranks: How many processes save together.
        repeat: How often each call is made after the first one.
    """

    def __init__(
        self, asked: Asked, calls: Sequence[str], num_ranks: int, repeat: int
    ) -> None:
        self._asked = asked
        self._calls = calls
        self._num_ranks = num_ranks
        self._repeat = repeat
        self._servers: dict[str, list[Server]] = {}
        # The file that was imported, by folder.
        self.libraries: dict[str, str] = {}

    def measure(self, side: Side) -> _Shot:
        """Measure one version once.

        Raises:
            Failed: A call failed, or another library was imported.
        """
        saves = [call for call in _SAVES if call in self._calls]
        restores = [call for call in _RESTORES if call in self._calls]
        try:
            # What restores is another process than what has saved.
            shot = self._run(side, saves or ["save"], is_counted=bool(saves), num_saves=0)
            if restores:
                shot |= self._run(side, restores, is_counted=True, num_saves=1)
        finally:
            shutil.rmtree(self._asked.folder, ignore_errors=True)
        return shot

    def close(self) -> None:
        """End all processes."""
        for servers in self._servers.values():
            for server in servers:
                server.close()
        self._servers.clear()

    def _run(
        self, side: Side, calls: Sequence[str], is_counted: bool, num_saves: int
    ) -> _Shot:
        times = 1 + self._repeat if is_counted else 1
        fields = asdict(self._asked) | {"num_saves": num_saves}
        fields["calls"] = tuple(call for call in calls for _ in range(times))
        answers = self._answers(side, Asked(**fields))
        if not is_counted:
            return {}
        shot = {}
        for row, (first, *others) in answers[0].figures.items():
            # Only the first call of its process is a first call.
            is_first = row.partition(".")[0] == calls[0] or (
                row == "made" and not num_saves
            )
            if is_first and row in FIRST_ROWS:
                shot[FIRST_ROWS[row]] = first
            if others and row not in _IN_BYTES:
                shot[row] = statistics.median(others)
        return shot

    def _answers(self, side: Side, asked: Asked) -> list[Answer]:
        if side.folder not in self._servers:
            # As torchrun does it.
            environment = {"OMP_NUM_THREADS": "1"} if self._num_ranks > 1 else {}
            self._servers[side.folder] = [
                Server(side.folder, environment) for _ in range(self._num_ranks)
            ]
        servers, port = self._servers[side.folder], free_port()
        for rank, server in enumerate(servers):
            count = self._num_ranks
            server.ask(asked, ranks_environment(rank, count, rank, count, port))
        answers = [server.answer(asked.timeout_seconds) for server in servers]
        for answer in answers:
            if answer.problem:
                msg = f"{side.name}: {answer.problem}"
                raise Failed(msg)
            expected = os.path.join(side.folder, "distckpt", "__init__.py")
            if os.path.realpath(answer.library) != os.path.realpath(expected):
                msg = f"{side.name}: {answer.library} was imported, not {expected}."
                raise Failed(msg)
        self.libraries[side.folder] = answers[0].library
        return answers


def compare(
    shots: Shots, old: Side, new: Side, num_pairs: int, say: Callable[[str], None]
) -> list[Compared]:
    """Measure A, B and A again in every order, as often as asked for.

    Raises:
        Failed: See ``Shots.measure``.
    """
    sides = {_OLD: old, _NEW: new, _OLD_AGAIN: old}
    found: dict[str, list[_Shot]] = {name: [] for name in sides}
    for number, order in enumerate(orders([*sides], num_pairs, seed=num_pairs)):
        for name in order:
            say(f"pair {number + 1}/{num_pairs}: {name}")
            found[name].append(shots.measure(sides[name]))
    rows = [row.key for row in ROWS if row.key in found[_OLD][0]]
    return [_compare_row(row, found) for row in rows]


def _compare_row(row: str, found: dict[str, list[_Shot]]) -> Compared:
    old = [shot[row] for shot in found[_OLD]]

    def against_old(name: str) -> Interval:
        others = [shot[row] for shot in found[name]]
        return interval_of([one / base for one, base in zip(others, old, strict=True)])

    changed, same = against_old(_NEW), against_old(_OLD_AGAIN)
    return Compared(row, statistics.median(old), changed, same, verdict(changed, same))


def table_of(title: str, compared: Sequence[Compared]) -> Table:
    """Make the table of one workload."""
    table = Table(title=title, title_justify="left")
    table.add_column("")
    confidence = f"{compared[0].changed.confidence:.1%} interval"
    for heading in ("A", f"B / A ({confidence})", f"A / A ({confidence})", ""):
        table.add_column(escape(heading), justify="right")
    for one in compared:
        table.add_row(
            escape(_TITLES[one.row]),
            format_value(one.old_seconds, "seconds"),
            *(
                escape(f"{each.median:.3f} [{each.low:.3f}, {each.high:.3f}]")
                for each in (one.changed, one.same)
            ),
            one.verdict,
        )
    return table


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("old")
@click.argument("new")
@click.option(
    "--directory",
    required=True,
    type=click.Path(file_okay=False),
    help="Where to write: on the disk to measure. All that is made there is removed.",
)
@click.option(
    "--workload",
    "workloads",
    type=Names(WORKLOADS),
    default="gpt2-sharded,many-small",
    show_default=True,
    help="What to save, commas between.",
)
@click.option(
    "--calls",
    type=Names((*_SAVES, *_RESTORES)),
    default="save,eager,lazy,warm",
    show_default=True,
    help="What to time: durable saves, asynchronous ones (eager, lazy), and restores from "
    "the page cache (warm) and not (cold).",
)
@click.option("--scale", type=click.FloatRange(min=0, min_open=True), default=1.0)
@click.option(
    "--pairs",
    "num_pairs",
    type=click.IntRange(min=1),
    default=12,
    show_default=True,
    help="How often each version is measured.",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="How often a process makes each call again after the first time. The median of "
    "these is the figure of a pair; with 0 there are first calls alone.",
)
@click.option(
    "--ranks",
    "num_ranks",
    type=click.IntRange(min=1),
    default=2,
    show_default=True,
    help="How many processes save together.",
)
@click.option("--cuda", "use_cuda", is_flag=True, help="Put the tensors on CUDA devices.")
@click.option("--timeout", "timeout_seconds", default=600.0, show_default=True)
@click.option("--json", "json_path", metavar="FILE", help="Write every row there.")
def main(
    old: str,
    new: str,
    directory: str,
    workloads: tuple[str, ...],
    calls: tuple[str, ...],
    scale: float,
    num_pairs: int,
    repeat: int,
    num_ranks: int,
    use_cuda: bool,
    timeout_seconds: float,
    json_path: str | None,
) -> None:
    """Tell whether NEW (B) is slower than OLD (A), two versions of distckpt.

    Each is a folder that holds the package, or a git revision of the repository in the
    working folder. In each of the pairs, A, B and A again are measured in new processes,
    one after the other in an order that changes. A row of the table has the median of B's
    times over A's with its confidence interval (order statistics, at least 95 %), and the
    same of A against itself, which is what chance does on this machine.

    The rule: B is slower in a row if the whole interval of B against A lies above 1 and
    above the whole interval of A against A. At least 6 pairs are needed for that.

    Exit codes: 0 no row of B is slower; 1 some are; 2 wrong usage; 3 something failed;
    130 interrupted.
    """
    folder = tempfile.mkdtemp(prefix="distckpt-ab-", dir=_made(directory))
    clean_up_at_signals(folder)
    shots: Shots | None = None
    found: dict[str, list[Compared]] = {}
    try:
        sides = find_side(old, folder), find_side(new, folder)
        for side in sides:
            # Compiling is no part of a call.
            compileall.compile_dir(os.path.join(side.folder, "distckpt"), quiet=2)
        for name in workloads:
            work = os.path.join(folder, "work")
            asked = Asked(OURS, name, scale, use_cuda, timeout_seconds, work, 0, ())
            shots = Shots(asked, calls, num_ranks, repeat)
            say = _teller(name)
            found[name] = compare(shots, *sides, num_pairs, say)
            shots.close()
        libraries = [shots.libraries[side.folder] for side in sides] if shots else []
    except KeyboardInterrupt:
        sys.exit(EXIT_INTERRUPTED)
    except Failed as error:
        click.echo(f"ab: {error}", err=True)
        sys.exit(EXIT_FAILED)
    finally:
        if shots is not None:
            shots.close()
        remove(folder)
    for label, side, library in zip((_OLD, _NEW), sides, libraries, strict=True):
        click.echo(f"{label}: {side.name}, imported from {library}")
    is_terminal = sys.stdout.isatty()
    console = Console(width=None if is_terminal else 10_000, highlight=False)
    for name, compared in found.items():
        console.print(table_of(f"{name}, {num_ranks} ranks, {num_pairs} pairs", compared))
    if json_path is not None:
        with open(json_path, "w") as file:
            json.dump({name: [*map(asdict, rows)] for name, rows in found.items()}, file)
    sys.exit(_conclude(found))


def _made(directory: str) -> str:
    os.makedirs(directory, exist_ok=True)
    return os.path.abspath(directory)


def _teller(workload: str) -> Callable[[str], None]:
    return lambda text: click.echo(f"{workload}: {text}", err=True)


def _conclude(found: dict[str, list[Compared]]) -> int:
    every = [(name, one) for name, rows in found.items() for one in rows]
    if not all(one.changed.is_sure for _, one in every):
        click.echo("Too few pairs to tell: at least 6 are needed.")
        return 0
    slower = [f"{name} {one.row}" for name, one in every if one.verdict == SLOWER]
    if slower:
        click.echo(f"B is slower than A: {', '.join(slower)}.")
        return EXIT_SLOWER
    click.echo("No row of B is slower than A against A explains.")
    return 0


if __name__ == "__main__":
    main(prog_name="python -m distckpt.bench.ab")
