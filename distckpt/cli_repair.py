"""The commands ``distckpt doctor`` and ``distckpt repair``: recovery a person can do."""

from __future__ import annotations

import sys

import click

from distckpt.cli_paths import LOCAL_PATH, check_run_directory, complete_directory
from distckpt.run_directory import BAD, RunDirectory
from distckpt.terminal import (
    EXIT_BAD,
    EXIT_OK,
    Progress,
    echo,
    json_option,
    or_exit,
    print_json,
    print_table,
)


@click.command(name="doctor")
@click.argument("directory", type=LOCAL_PATH, shell_complete=complete_directory)
@click.option("--read-only", is_flag=True, help="Write nothing: try nothing out.")
@json_option
def doctor_command(directory: str, read_only: bool, as_json: bool) -> None:
    """Examine a run directory: its filesystem, who holds it, what is left over.

    Small files are written to find out what the filesystem can do, and removed again.
    Checkpoints are not read: that is what 'distckpt verify' does.
    """
    from distckpt import doctor

    or_exit(check_run_directory, directory)
    findings = or_exit(
        lambda: [*doctor.examine(RunDirectory.at(directory), tries=not read_only)]
    )
    is_well = all(found.verdict != BAD for found in findings)
    if as_json:
        items = [found._asdict() for found in findings]
        print_json({"ok": is_well, "directory": directory, "findings": items})
    else:
        print_table(
            ["", "what", "found"],
            [[found.verdict, found.what, found.text] for found in findings],
        )
    sys.exit(EXIT_OK if is_well else EXIT_BAD)


@click.command(name="repair")
@click.argument("directory", type=LOCAL_PATH, shell_complete=complete_directory)
@click.option("--yes", is_flag=True, help="Do it; else only say what would be done.")
@json_option
def repair_command(directory: str, yes: bool, as_json: bool) -> None:
    """Rebuild damaged or lost records from the checkpoints in a run directory.

    Every checkpoint there is read and verified. One record is then appended that names
    those that are whole; nothing is changed or deleted. No job may be running in it.

    Exit code 1: there is something to repair, and --yes was not given.
    """
    from distckpt import identity, repair

    or_exit(check_run_directory, directory)
    with Progress("verifying") as progress:
        plan = or_exit(
            repair.plan_repair,
            RunDirectory.at(directory),
            identity.current(),
            progress.begin,
        )
    is_done = plan.record is not None and yes
    if is_done:
        or_exit(repair.repair, plan)
    if as_json:
        print_json(
            {
                "ok": plan.record is None or is_done,
                "directory": directory,
                "damage": plan.damage,
                "repaired": is_done,
                "record": None if plan.record is None else plan.record.number,
                "checkpoints": [
                    {"path": one.name, "becomes": one.becomes, "why": one.why}
                    for one in plan.verdicts
                ],
            }
        )
    elif plan.record is None:
        echo(f"{directory}: the records are whole; there is nothing to repair.")
    else:
        echo(f"damage  {plan.damage}")
        echo(f"basis   {plan.basis}")
        print_table(
            ["checkpoint", "becomes", "why"],
            [[one.name, one.becomes, one.why] for one in plan.verdicts],
        )
        echo(
            f"Appended record {plan.record.number}. A job can go on from here."
            if is_done
            else f"Would append record {plan.record.number}; nothing was changed. With "
            "--yes it is done."
        )
    sys.exit(EXIT_OK if plan.record is None or is_done else EXIT_BAD)
