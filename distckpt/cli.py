"""The command ``distckpt``: look at run directories and checkpoints; no torch.

Exit codes: 0 all is well, 1 something is wrong with a checkpoint (of ``diff``: two are
different), 2 wrong usage, 3 the directory or checkpoint is not there or cannot be read.

What reads checkpoints is imported by the commands that do: ``list``, which reads records
only, answers at once.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import click

from distckpt import files, paths, values
from distckpt.cli_bench import bench_command
from distckpt.cli_completion import completion_command
from distckpt.cli_diff import diff_command
from distckpt.cli_paths import (
    LOCAL_PATH,
    check_run_directory,
    complete_checkpoint,
    complete_directory,
)
from distckpt.cli_repair import doctor_command, repair_command
from distckpt.cli_report import report_command
from distckpt.cli_requests import (
    pin_command,
    prune_command,
    request_save_command,
    unpin_command,
)
from distckpt.cli_transfer import export_command, import_command
from distckpt.cli_watch import watch_command
from distckpt.errors import CheckpointNotFound, DistckptError
from distckpt.layout import ONE
from distckpt.record import Entry, Record
from distckpt.run_checks import gone_from, run_directories_in
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.state import read_head
from distckpt.terminal import (
    EXIT_BAD,
    EXIT_OK,
    Progress,
    echo,
    fits,
    json_option,
    or_exit,
    print_json,
    print_table,
)
from distckpt.words import age, count, date, metrics, size, took

if TYPE_CHECKING:
    from distckpt.manifest import Manifest
    from distckpt.verify import Report

# Only DCP has a file of this name; see dcp_metadata.py.
_DCP_FILE = ".metadata"


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="distckpt", prog_name="distckpt")
def main() -> None:
    """Look at run directories of distckpt, and at checkpoints; export and import them.

    Exit codes: 0 all is well; 1 something is wrong with a checkpoint, or, of diff, two are
    different; 2 wrong usage; 3 the directory or checkpoint is not there or cannot be read.
    """


main.add_command(bench_command)
main.add_command(completion_command)
main.add_command(diff_command)
main.add_command(export_command)
main.add_command(import_command)
main.add_command(doctor_command)
main.add_command(repair_command)
main.add_command(pin_command)
main.add_command(unpin_command)
main.add_command(request_save_command)
main.add_command(prune_command)
main.add_command(report_command)
main.add_command(watch_command)


@main.command(name="list")
@click.argument("directory", type=LOCAL_PATH, shell_complete=complete_directory)
@click.option("--limit", type=click.IntRange(min=1), help="Only so many, the newest.")
@json_option
def list_command(directory: str, limit: int | None, as_json: bool) -> None:
    """List the checkpoints that a run directory's newest record names."""
    record = or_exit(_record_of, directory)
    gone = (
        set() if record is None else or_exit(gone_from, RunDirectory.at(directory), record)
    )
    every = [] if record is None else list(_listed(record, gone))
    rules = () if record is None else record.rules
    rows = every[:limit]
    if as_json:
        items = [_entry_to_json(directory, state, entry, rules) for state, entry in rows]
        print_json({"directory": directory, "checkpoints": items})
        return
    if not rows:
        echo(f"{directory}: no checkpoint has been committed.")
        below = [] if record is not None else or_exit(run_directories_in, directory)
        if below:
            echo(f"Run directories in it: {', '.join(below)}")
        return
    _print_list(directory, rows, every, rules)


_Listed: TypeAlias = "Sequence[tuple[str, Entry]]"


def _print_list(
    directory: str, rows: _Listed, every: _Listed, rules: Sequence[str]
) -> None:
    from distckpt.retention import best_metrics

    committed = [entry for state, entry in every if state != "bad"]
    best = best_metrics(committed, rules)
    will_be = _as_asked_for(directory, committed)
    now = time.time()
    table: dict[str, list[str]] = {
        "path": [os.path.join(directory, entry.attempt.prefix) for _, entry in rows],
        "state": [state for state, _ in rows],
        "step": ["" if entry.step is None else str(entry.step) for _, entry in rows],
        "saved": [date(entry.time) for _, entry in rows],
        "age": [age(now - entry.time) for _, entry in rows],
        "size": [size(entry.size_bytes) for _, entry in rows],
        "metrics": [_metrics_of(entry, best) for _, entry in rows],
        "kept by": [
            ", ".join([*_pin_of(entry, will_be), *entry.kept_by(rules)])
            for _, entry in rows
        ],
    }
    if not fits([*table], _lines_of(table)):
        # Each checkpoint is one line, also of a narrow terminal.
        echo(f"{directory}:")
        prefixes = [entry.attempt.prefix for _, entry in rows]
        table = {"name": prefixes, **{k: v for k, v in table.items() if k != "path"}}
        if not fits([*table], _lines_of(table)):
            del table["saved"]  # there is the age
    is_cut = print_table(
        [*table],
        _lines_of(table),
        right=("step", "age", "size"),
        cut=("kept by", "metrics"),
    )
    total = size(sum(entry.size_bytes for _, entry in every))
    if len(rows) < len(every):
        shown = f"Shown are the newest {len(rows)} of {len(every)} checkpoints"
    else:
        shown = count(len(every), "checkpoint")
    cut = " Lines are cut to the terminal; --json has all." if is_cut else ""
    echo(f"{shown}, {total} in all.{cut}")


def _lines_of(table: Mapping[str, Sequence[str]]) -> list[tuple[str, ...]]:
    return [*zip(*table.values(), strict=True)]


def _metrics_of(entry: Entry, best: Mapping[paths.Attempt, Collection[str]]) -> str:
    """Spell the metrics of a checkpoint, and which of them are the best that there are."""
    best_here = best.get(entry.attempt, ())
    return ", ".join(
        f"{metrics({name: value})}{' (best)' * (name in best_here)}"
        for name, value in entry.metrics
    )


def _as_asked_for(directory: str, entries: Sequence[Entry]) -> dict[paths.Attempt, Entry]:
    """Return the checkpoints as they are once a job has taken up what is asked for."""
    from distckpt import mailbox

    with suppress(DistckptError):  # the list is right without it
        requests, _ = mailbox.collect(RunDirectory.at(directory))
        return {entry.attempt: entry for entry in mailbox.applied(entries, requests)}
    return {}


def _pin_of(entry: Entry, will_be: Mapping[paths.Attempt, Entry]) -> list[str]:
    will = will_be.get(entry.attempt, entry)
    if will.pinned == entry.pinned:
        return []
    return ["to be pinned" if will.pinned else "to be unpinned"]


@main.command()
@click.argument("path", type=LOCAL_PATH, shell_complete=complete_checkpoint)
@json_option
def show(path: str, as_json: bool) -> None:
    """Show what one checkpoint holds: its files and its tensors.

    PATH is a checkpoint, or a run directory, whose newest is taken.
    """
    manifest = or_exit(_manifest_of, path)
    if as_json:
        print_json(_manifest_to_json(manifest))
        return
    attempt = manifest.attempt
    step = "unknown" if manifest.step is None else manifest.step
    echo(f"checkpoint {attempt.prefix}  (attempt {attempt.published})")
    echo(f"step       {step}")
    echo(f"created    {date(manifest.created)}")
    echo(f"ranks      {manifest.world_size}")
    echo(f"size       {size(manifest.size_bytes)}")
    if manifest.remarks.metrics:
        echo(f"metrics    {metrics(manifest.remarks.metrics)}")
    for name, value in manifest.remarks.metadata.items():
        echo(f"metadata   {name}: {value!r}")
    rows = manifest.assignment.rows.values()
    print_table(
        ["tensor", "dtype", "shape", "bytes", "in files of ranks"],
        [
            [
                row.name,
                row.dtype,
                "x".join(map(str, row.shape)) or "scalar",
                str(row.size_bytes),
                _ranks_of(manifest, row.name),
            ]
            for row in rows
        ],
        right=("bytes",),
    )
    echo(f"{count(len(rows), 'tensor')}, {count(len(manifest.values), 'plain value')}")


@main.command()
@click.argument("path", type=LOCAL_PATH, shell_complete=complete_checkpoint)
@json_option
def verify(path: str, as_json: bool) -> None:
    """Read every byte of a checkpoint, or of all in a directory, and verify it.

    PATH may also be a directory that torch's distributed checkpoint (DCP) has written: then
    its checksums, which torch itself never reads, are compared, and missing files and parts
    of tensors found.
    """
    from distckpt.verify import verify_attempt

    reports: list[tuple[str, Report]] = []
    started = time.monotonic()
    is_dcp = or_exit(files.exists, os.path.join(path, _DCP_FILE))
    if is_dcp:
        reports.append((path, _verify_dcp(path)))
    else:
        targets = or_exit(_targets, path)
        with Progress("verifying") as progress:
            advance = progress.begin(sum(target.size_bytes for target in targets))
            for target in targets:
                report = or_exit(
                    verify_attempt, target.directory, target.manifest_digest, advance
                )
                reports.append((target.name, report))
    if as_json:
        items = [{"path": n, "ok": r.ok, **asdict(r)} for n, r in reports]
        print_json({"ok": all(r.ok for _, r in reports), "checkpoints": items})
    else:
        _print_reports(reports)
        echo(_summary(reports, time.monotonic() - started, can_fall_back=not is_dcp))
    sys.exit(EXIT_OK if all(report.ok for _, report in reports) else EXIT_BAD)


def _verify_dcp(path: str) -> Report:
    from distckpt.formats.dcp_verify import verify_dcp

    with Progress("verifying") as progress:
        return verify_dcp(path, progress.begin)


def _record_of(directory: str) -> Record | None:
    check_run_directory(directory)
    head = read_head(RunDirectory.at(directory))
    return None if head is None else head.record


def _manifest_of(path: str) -> Manifest:
    from distckpt.readers import locate_newest, read_manifest

    located = locate_newest(path)
    manifest = read_manifest(located.directory, located.manifest_digest)
    _ = manifest.assignment  # worked out here, where its errors are reported
    return manifest


class _Target(NamedTuple):
    name: str
    directory: AttemptDirectory
    manifest_digest: str | None
    size_bytes: int


def _targets(path: str) -> list[_Target]:
    from distckpt.readers import locate, read_manifest, read_record

    is_attempt = AttemptDirectory.at(path).has_manifest()
    run = RunDirectory.at(path)
    if run.is_folder() and not is_attempt:
        record = read_record(run)
        if record is None or not record.committed:
            msg = f"{path}: no checkpoint is committed there."
            raise CheckpointNotFound(msg)
        return [
            _Target(
                run.path_of(entry.attempt.prefix),
                run.attempt(entry.attempt),
                entry.manifest,
                entry.size_bytes,
            )
            for entry in record.committed
        ]
    located = locate(path)
    size_bytes = 0
    with suppress(DistckptError):  # which the verification finds and names
        size_bytes = read_manifest(located.directory, located.manifest_digest).size_bytes
    return [_Target(path, located.directory, located.manifest_digest, size_bytes)]


def _listed(record: Record, gone: Collection[str]) -> Iterable[tuple[str, Entry]]:
    """List all that a record names, newest commit first.

    Args:
        record: The newest one.
        gone: Names of attempts whose directories are not there.
    """
    states = {
        "live": record.live,
        "kept": record.kept,
        "bad": record.bad,
        "missing": record.missing,
    }
    every = [
        ("missing" if entry.attempt.published in gone else state, entry)
        for state, entries in states.items()
        for entry in entries
    ]
    return sorted(every, key=lambda item: item[1].record, reverse=True)


def _entry_to_json(
    directory: str, state: str, entry: Entry, rules: Sequence[str]
) -> dict[str, Any]:
    return {
        "path": os.path.join(directory, entry.attempt.prefix),
        "attempt": entry.attempt.published,
        "number": entry.attempt.number,
        "state": state,
        "step": entry.step,
        "time": entry.time,
        "size_bytes": entry.size_bytes,
        "metrics": dict(entry.metrics),
        "pinned": entry.pinned,
        "kept_by": entry.kept_by(rules),
    }


def _manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    return {
        "attempt": manifest.attempt.published,
        "number": manifest.attempt.number,
        "step": manifest.step,
        "created": manifest.created,
        "world_size": manifest.world_size,
        "size_bytes": manifest.size_bytes,
        "metrics": values.encode(manifest.remarks.metrics),
        "metadata": manifest.remarks.encoded,
        "files": [
            {"file": manifest.shard_file(rank), "size_bytes": shard.size_bytes}
            for rank, shard in enumerate(manifest.shards)
        ],
        "tensors": [
            {
                "name": row.name,
                "dtype": row.dtype,
                "shape": list(row.shape),
                "size_bytes": row.size_bytes,
                "same_as": row.same_as or None,
                "of_one_rank": row.kind == ONE,
            }
            for row in manifest.assignment.rows.values()
        ],
        "values": manifest.values,
    }


def _ranks_of(manifest: Manifest, name: str) -> str:
    row = manifest.assignment.rows[name]
    if row.same_as:
        return f"= {row.same_as}"
    mark = " (one rank's)" if row.kind == ONE else ""
    ranks = sorted({piece.rank for piece in manifest.assignment.pieces_of(name)})
    text = ", ".join(map(str, ranks[:4]))
    more = "" if len(ranks) <= 4 else f", ... ({len(ranks)})"
    return f"{text}{more}{mark}"


def _print_reports(reports: Sequence[tuple[str, Report]]) -> None:
    for name, report in reports:
        if report.ok:
            echo(f"ok   {name}: {count(report.num_files, 'file')}, {_size_of(report)}")
        else:
            echo(f"BAD  {name}")
            for problem in report.problems:
                echo(f"     {problem}")
        for foreign in report.foreign:
            echo(f"     does not belong to it: {foreign}")
        for note in report.notes:
            echo(f"     {note}")


def _size_of(report: Report) -> str:
    """Spell the size of the files, as ``list`` does; where it is not known, of the data."""
    return size(report.files_size_bytes or report.size_bytes)


def _summary(
    reports: Sequence[tuple[str, Report]], seconds: float, can_fall_back: bool
) -> str:
    total = sum(report.files_size_bytes or report.size_bytes for _, report in reports)
    checked = f"{count(len(reports), 'checkpoint')}, {size(total)}"
    num_bad = sum(not report.ok for _, report in reports)
    if not num_bad:
        return f"{checked}, all ok; verified in {took(seconds)}."
    advice = ""
    if can_fall_back:
        advice = " A restore takes the newest that is not, and fails if there is none."
    bad = f"{num_bad} of {len(reports)} {'is' if num_bad == 1 else 'are'} bad."
    return f"{bad}{advice} Verified in {took(seconds)}: {checked}."
