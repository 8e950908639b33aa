"""The figures of a run: which rows there are, and one series for each contender in each."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

OURS = "distckpt"
LIMIT_PREFIX = "limit:"

SECONDS = "seconds"
BYTES = "bytes"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table.

    Attributes:
        key: Its name in the JSON file.
        title: Its name in the table.
        unit: Of its figures.
        limit_from: The row whose limit holds for it; "" for none.
        is_plotted: Whether it is a bar in the chart.
    """

    key: str
    title: str
    unit: str = SECONDS
    limit_from: str = ""
    is_plotted: bool = False


ROWS = (
    Row("made.first", "new process: manager or group made", SECONDS),
    Row("save.first", "  first save of a process, durable", SECONDS, "save", True),
    Row("eager.first", "  first async save, eager, blocked", SECONDS, "copy"),
    Row("eager.first_durable", "    until durable", SECONDS, "save"),
    Row("lazy.first", "  first async save, lazy, blocked", SECONDS),
    Row("lazy.first_durable", "    until durable", SECONDS, "save"),
    Row("warm.first", "  first restore of a process, warm cache", SECONDS, "warm", True),
    Row("cold.first", "  first restore of a process, cold cache", SECONDS, "cold"),
    Row("save", "save, durable", SECONDS, "save", True),
    Row("save.written", "  bytes written, a rank", BYTES, "save.written"),
    Row("save.disk_written", "  of these to the device", BYTES, "save.disk_written"),
    Row("eager.blocked", "async eager, blocked", SECONDS, "copy", True),
    Row("eager.durable", "  until durable", SECONDS, "save", True),
    Row("lazy.blocked", "async lazy, blocked", SECONDS, "", True),
    Row("lazy.staged", "  until staged", SECONDS, "copy"),
    Row("lazy.durable", "  until durable", SECONDS, "save"),
    Row("eager.lost", "async eager, lost training time", SECONDS, "lost", True),
    Row("eager.lost_blocked", "  of it blocked", SECONDS, "copy"),
    Row("eager.lost_durable", "  until durable, beside the loop", SECONDS, "save"),
    Row("lazy.lost", "async lazy, lost training time", SECONDS, "lost", True),
    Row("lazy.lost_blocked", "  of it blocked", SECONDS),
    Row("lazy.lost_durable", "  until durable, beside the loop", SECONDS, "save"),
    Row("warm", "restore, warm cache", SECONDS, "warm", True),
    Row("warm.read", "  bytes read, but for mapped ones", BYTES),
    Row("cold", "restore, cold cache", SECONDS, "cold", True),
    Row("cold.disk_read", "  bytes read from the device, a rank", BYTES, "cold.disk_read"),
    Row("memory.save", "memory on top, save", BYTES),
    Row("memory.eager", "memory on top, async eager", BYTES),
    Row("memory.lazy", "memory on top, async lazy", BYTES),
    Row("memory.restore", "memory on top, restore", BYTES),
    Row("gate", "gated call", SECONDS),
)

# A figure of a new process's first call, and the row that shows it.
FIRST_ROWS = {
    "made": "made.first",
    "save": "save.first",
    "eager.blocked": "eager.first",
    "eager.durable": "eager.first_durable",
    "lazy.blocked": "lazy.first",
    "lazy.durable": "lazy.first_durable",
    "warm": "warm.first",
    "cold": "cold.first",
}


@dataclass
class Series:
    """The repetitions of one figure."""

    values: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        """The middle one."""
        return statistics.median(self.values)

    def to_json(self) -> dict[str, Any]:
        """Return all of it for the JSON file."""
        return {
            "median": self.median,
            "min": min(self.values),
            "max": max(self.values),
            "repetitions": self.values,
        }


@dataclass
class WorkloadResults:
    """What one workload gave.

    Attributes:
        name: Of the workload.
        contenders: All that were asked for, ours first.
        facts: What the workload is.
        failures: Why a contender could not go on; the rest of its cells stay empty.
    """

    name: str
    contenders: Sequence[str]
    facts: dict[str, Any] = field(default_factory=dict)
    series: dict[str, dict[str, Series]] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)

    def add(self, row: str, contender: str, value: float) -> None:
        """Record one repetition."""
        row_series = self.series.setdefault(row, {})
        row_series.setdefault(contender, Series()).values.append(value)

    def get(self, row: str, contender: str) -> Series | None:
        """Return a contender's repetitions; None if there are none."""
        return self.series.get(row, {}).get(contender)

    def limit(self, row: Row) -> tuple[str, Series] | None:
        """Return the best limit that holds for a row, and its name; None without any."""
        found = [
            (name, series)
            for name, series in self.series.get(row.limit_from, {}).items()
            if name.startswith(LIMIT_PREFIX)
        ]
        return min(found, key=lambda item: item[1].median, default=None)

    def rows(self) -> list[Row]:
        """Return the rows that have something to show, in order."""
        shown = self.series.keys()
        return [row for row in ROWS if row.key in shown]

    def to_json(self) -> dict[str, Any]:
        """Return all of it for the JSON file."""
        units = {row.key: row.unit for row in ROWS}
        return {
            **self.facts,
            "contenders": list(self.contenders),
            "failures": self.failures,
            "phases": {
                key: {
                    # The copy and its lost time are limits of other rows, not rows.
                    "unit": units.get(key, SECONDS),
                    "results": {name: s.to_json() for name, s in by_name.items()},
                }
                for key, by_name in self.series.items()
            },
        }


@dataclass
class Results:
    """What a whole run gave."""

    environment: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    workloads: list[WorkloadResults] = field(default_factory=list)

    @property
    def ours_failed(self) -> bool:
        """Tell whether distckpt failed in any workload."""
        return any(OURS in workload.failures for workload in self.workloads)

    def to_json(self) -> dict[str, Any]:
        """Return all of it for the JSON file."""
        return {
            "format": 1,
            "environment": self.environment,
            "options": self.options,
            "workloads": {each.name: each.to_json() for each in self.workloads},
        }
