"""The command ``distckpt report``: a run directory as one page for people."""

from __future__ import annotations

import click

from distckpt import files
from distckpt.cli_paths import LOCAL_PATH, check_run_directory, complete_directory
from distckpt.run_directory import RunDirectory
from distckpt.terminal import echo, json_option, or_exit, print_json
from distckpt.words import size


@click.command(name="report")
@click.argument("directory", type=LOCAL_PATH, shell_complete=complete_directory)
@click.option(
    "-o",
    "--output",
    type=LOCAL_PATH,
    default="report.html",
    show_default=True,
    help="Where to write it; replaced if it is there.",
)
@json_option
def report_command(directory: str, output: str, as_json: bool) -> None:
    """Make a page of a run directory: saves, restarts, cost, skew, metrics, what is kept.

    The page is one file that needs no network. With --json its figures are printed instead.
    """
    from distckpt import report

    or_exit(check_run_directory, directory)
    run = or_exit(report.read_run, RunDirectory.at(directory))
    if as_json:
        print_json(report.figures(run))
        return
    data = report.render(run).encode(errors="backslashreplace")
    or_exit(files.replace_file, output, data)
    echo(f"{output}: {size(len(data))}; open it in a browser.")
