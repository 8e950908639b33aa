"""The benchmark's command line."""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import click

from distckpt.bench.interrupt import EXIT_INTERRUPTED, clean_up_at_signals, remove

if TYPE_CHECKING:
    from distckpt.bench.results import Results, WorkloadResults
    from distckpt.bench.team import Team
    from distckpt.bench.turns import Options

# Named here so that ``--help`` does not import torch.
WORKLOADS = ("gpt2-sharded", "many-small", "ddp-replicated", "llama-large")
PEERS = ("dcp", "dcp-tuned", "torch-save", "safetensors", "torchsnapshot")
PHASES = ("first", "save", "async", "lost", "warm", "cold", "memory", "gate")

EXIT_OURS_FAILED = 1
EXIT_USAGE = 2


class Names(click.ParamType):  # type: ignore[type-arg]  # generic in newer ones only
    """Names with commas between them, each of a list."""

    name = "names"

    def __init__(self, known: tuple[str, ...]) -> None:
        self._known = known

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[str, ...]:
        """Return them, each once."""
        if isinstance(value, tuple):
            return value
        if value == "none":
            return ()
        names = tuple(self._known if value == "all" else value.split(","))
        for name in names:
            if name not in self._known:
                known = ", ".join(self._known)
                self.fail(f"{name!r} is not one of: {known}, all, none.", param, ctx)
        return tuple(dict.fromkeys(names))


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--directory",
    metavar="DIR",
    type=click.Path(file_okay=False),
    help="Where to write: on the disk to measure, the same for all ranks. All that is made "
    "there, in a folder of its own, is removed at the end.",
)
@click.option(
    "--workload",
    "workloads",
    type=Names(WORKLOADS),
    default="gpt2-sharded",
    show_default=True,
    help="What to save, commas between; see --list.",
)
@click.option(
    "--compare",
    type=Names(PEERS),
    default="all",
    show_default=True,
    help=f"Which others to measure in the same run: {', '.join(PEERS)}.",
)
@click.option(
    "--phases",
    type=Names(PHASES),
    default="all",
    show_default=True,
    help="What to measure: "
    "first: the first call of a new process, of every kind; "
    "save: durable saves; "
    "async: asynchronous saves, with nothing else going on; "
    "lost: how much longer the steps of a training loop take meanwhile; "
    "warm, cold: restores, from the page cache and not; "
    "memory: the peak on top; "
    "gate: calls that the interval rules out.",
)
@click.option(
    "--scale",
    type=click.FloatRange(min=0, min_open=True),
    default=1.0,
    show_default=True,
    help="Multiply the size of the workloads.",
)
@click.option(
    "--repeat",
    type=click.IntRange(min=1),
    default=5,
    show_default=True,
    help="Repetitions. Where a process makes several calls, one more comes before them and "
    "does not count.",
)
@click.option("--cuda", "use_cuda", is_flag=True, help="Put the tensors on CUDA devices.")
@click.option(
    "--timeout",
    "timeout_seconds",
    type=click.FloatRange(min=1),
    default=600.0,
    show_default=True,
    help="Seconds until a collective, or a save behind the loop, is given up.",
)
@click.option("--json", "json_path", metavar="FILE", help="Write every repetition there.")
@click.option("--plot", "plot_path", metavar="FILE.png", help="Draw a chart (matplotlib).")
@click.option("--list", "list_only", is_flag=True, help="Show the workloads and leave.")
def main(
    directory: str | None,
    workloads: tuple[str, ...],
    compare: tuple[str, ...],
    phases: tuple[str, ...],
    scale: float,
    repeat: int,
    use_cuda: bool,
    timeout_seconds: float,
    json_path: str | None,
    plot_path: str | None,
    list_only: bool,
) -> None:
    """Measure distckpt, others and the limit of the hardware, on your disk.

    \b
    torchrun --nproc-per-node 2 -m distckpt.bench --directory /scratch/me

    Everyone saves the same random bytes, made equally durable (fsync), in turn and in one
    run; a time is that of the slowest rank. Before each timed save the disk is left to
    settle; before each restore the tensors are overwritten, and checked after it, so every
    byte has been read, also by those that map their files. The limit is the best of several
    plain ways of writing the same bytes, of reading them, or a plain copy. Each first call
    is made by new processes, which have imported everything and made the model before.
    A package that is not installed is reported, and the run goes on without it.

    Exit codes: 0 all is well, whatever became of the others; 1 distckpt failed; 2 wrong
    usage; 130 interrupted.
    """  # noqa: D301  # it is to be a backspace, which tells click not to fold
    if list_only:
        _list_workloads()
        return
    if directory is None:
        msg = "--directory is needed."
        raise click.UsageError(msg)
    from distckpt.bench.results import Results
    from distckpt.bench.team import Team

    team = Team(use_cuda, timeout_seconds)
    folder = os.path.join(os.path.abspath(directory), f"distckpt-bench-{_token(team)}")
    clean_up_at_signals(folder)
    results = Results()
    asked = _Asked(workloads, compare, phases, scale, repeat, use_cuda)
    code = EXIT_OURS_FAILED
    try:
        _measure(results, team, folder, asked)
        code = EXIT_OURS_FAILED if results.ours_failed else 0
    except KeyboardInterrupt:
        code = EXIT_INTERRUPTED
    except click.ClickException as error:
        code = EXIT_USAGE
        if team.speaks:
            error.show()
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        remove(folder)
    if team.speaks:
        _report(results, json_path, plot_path)
    _leave(code)


@dataclass(frozen=True)
class _Asked:
    """What the user asked for."""

    workloads: tuple[str, ...]
    compare: tuple[str, ...]
    phases: tuple[str, ...]
    scale: float
    repeat: int
    use_cuda: bool


def _measure(results: Results, team: Team, folder: str, asked: _Asked) -> None:
    from distckpt.bench.environment import describe
    from distckpt.bench.results import OURS, WorkloadResults
    from distckpt.bench.turns import Options

    def say(text: str) -> None:
        if team.speaks:
            click.echo(text, err=True)

    os.makedirs(folder, exist_ok=True)
    results.environment = describe(folder, team, asked.compare, asked.use_cuda)
    results.options = asdict(asked)
    options = Options(asked.repeat, asked.phases, asked.compare, say)
    for name in asked.workloads:
        found = WorkloadResults(name, (OURS, *asked.compare))
        results.workloads.append(found)
        _measure_one(found, team, os.path.join(folder, name), asked, options)


def _measure_one(
    found: WorkloadResults, team: Team, folder: str, asked: _Asked, options: Options
) -> None:
    from distckpt.bench.phases import Runner
    from distckpt.bench.workloads import build, total_bytes

    workload = build(found.name, asked.scale, team, asked.use_cuda)
    size_bytes = total_bytes(workload, team)
    found.facts = {
        "size_bytes": size_bytes,
        "size_bytes_per_rank": workload.local_bytes,
        "num_tensors": len(workload.local),
    }
    options.say(f"{found.name}: {size_bytes / 1e9:.3f} GB, {len(workload.local)} tensors")
    _check_space(os.path.dirname(folder), size_bytes, len(asked.compare), team)
    Runner(workload, team, folder, options, found).run()


def _check_space(folder: str, size_bytes: int, num_peers: int, team: Team) -> None:
    # Each holds its newest checkpoint while it writes the next; plain files count, too.
    needed = size_bytes * (2 + num_peers + 4 + 1)
    free = shutil.disk_usage(folder).free
    if team.largest([float(free < needed)])[0]:
        msg = (
            f"this needs {needed / 1e9:.1f} GB of disk, {free / 1e9:.1f} GB are free in "
            f"{os.path.dirname(folder)}; use a smaller --scale, or compare fewer."
        )
        raise click.ClickException(msg)


def _report(results: Results, json_path: str | None, plot_path: str | None) -> None:
    from distckpt.bench.plot import NoPlot, write_plot
    from distckpt.bench.report import print_tables, write_json

    print_tables(results)
    if json_path is not None:
        write_json(results, json_path)
    if plot_path is not None:
        try:
            write_plot(results, plot_path)
        except NoPlot as error:
            click.echo(str(error), err=True)


def _list_workloads() -> None:
    from distckpt.bench.workloads import KINDS

    for name, kind in KINDS.items():
        click.echo(f"{name:16}{kind.about}")


def _token(team: Team) -> str:
    return team.texts(secrets.token_hex(4))[0]


def _leave(code: int) -> None:
    # Threads of what has failed may be waiting for ranks that are gone: not for them.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
