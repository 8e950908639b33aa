"""The tables, and the JSON file."""

from __future__ import annotations

import json
import sys

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from distckpt.bench.results import (
    BYTES,
    LIMIT_PREFIX,
    OURS,
    Results,
    Row,
    Series,
    WorkloadResults,
)


def write_json(results: Results, path: str) -> None:
    """Write every repetition to a file."""
    with open(path, "w") as file:
        json.dump(results.to_json(), file, indent=1)
        file.write("\n")


def print_tables(results: Results) -> None:
    """Print one table for each workload."""
    is_terminal = sys.stdout.isatty()
    # Into a file or pipe no line is folded or cut.
    console = Console(width=None if is_terminal else 10_000, highlight=False)
    for workload in results.workloads:
        console.print(table_of(workload))
        for name, reason in workload.failures.items():
            console.print(f"{escape(name)}: {escape(reason)}")
        console.print()


def table_of(workload: WorkloadResults) -> Table:
    """Make the table of one workload."""
    peers = [name for name in workload.contenders if name != OURS]
    size = format_value(workload.facts.get("size_bytes", 0), BYTES)
    table = Table(title=f"{workload.name}, {size}", title_justify="left")
    table.add_column(escape("phase: median [min, max]"))
    for title in (OURS, "limit", f"{OURS} / limit", *(f"{p} (/ {OURS})" for p in peers)):
        table.add_column(escape(title), justify="right")
    for row in workload.rows():
        cells = cells_of(workload, row, peers)
        table.add_row(*map(escape, [row.title, *cells]))
    return table


def cells_of(workload: WorkloadResults, row: Row, peers: list[str]) -> list[str]:
    """Return a row's cells: ours, the limit, the ratio, then each peer."""
    ours = workload.get(row.key, OURS)
    cells = [_cell(workload, row, OURS)]
    limit = workload.limit(row)
    if limit is None:
        cells += ["-", "-"]
    else:
        name, series = limit
        how = name.removeprefix(LIMIT_PREFIX)
        note = "" if row.unit == BYTES else f" ({how})"
        cells.append(format_series(series, row.unit) + note)
        cells.append(format_ratio(ours, series))
    for peer in peers:
        theirs = workload.get(row.key, peer)
        ratio = f" ({format_ratio(theirs, ours)})" if theirs and ours else ""
        cells.append(_cell(workload, row, peer) + ratio)
    return cells


def _cell(workload: WorkloadResults, row: Row, name: str) -> str:
    series = workload.get(row.key, name)
    if series is not None:
        return format_series(series, row.unit)
    if name in workload.failures:
        return "failed"
    return "-"


def format_series(series: Series, unit: str) -> str:
    """Return median and range."""
    median, low, high = (
        format_value(value, unit)
        for value in (series.median, min(series.values), max(series.values))
    )
    return median if low == high else f"{median} [{low}, {high}]"


def format_ratio(series: Series | None, base: Series | None) -> str:
    """Return how many times the base a figure is; "-" where that means nothing."""
    if series is None or base is None or base.median <= 0 or series.median < 0:
        return "-"
    return f"{series.median / base.median:.2f}x"


def format_value(value: float, unit: str) -> str:
    """Return a figure with its unit, with three digits that count."""
    if unit == BYTES:
        steps = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"))
        base = "B"
    else:
        steps = ((1.0, "s"), (1e-3, "ms"), (0.0, "us"))
        base = "s"
    for size, name in steps:
        if abs(value) >= size:
            return f"{_digits(value / (size or 1e-6))} {name}"
    return f"{value:.0f} {base}"


def _digits(value: float) -> str:
    if abs(value) >= 99.95:
        return f"{value:.0f}"
    return f"{value:.1f}" if abs(value) >= 9.995 else f"{value:.2f}"
