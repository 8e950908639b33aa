"""A run directory as one page for people: saves and restarts, their cost, what is kept.

The page holds everything itself, so that it can be mailed. It is made from the records and
from the history that chiefs have kept; nothing is written into the run directory.
"""

from __future__ import annotations

import math
import os
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from statistics import mean
from typing import Any

from jinja2 import Environment, PackageLoader, select_autoescape
from markupsafe import Markup

from distckpt import charts, state
from distckpt.charts import DOTS, NARROW, WIDE, Mark, Point, Series
from distckpt.events import (
    CAPTURE,
    CLAIM,
    COMMIT,
    DECIDE,
    DELETE,
    ERROR,
    FALLBACK,
    FENCE,
    RESTORE,
    SAVE,
    STAGE,
    VOTE,
    WRITE,
    Event,
)
from distckpt.history import read_history
from distckpt.policy import MIN, best_rules
from distckpt.record import Entry, Record
from distckpt.retention import best_metrics
from distckpt.run_directory import RunDirectory
from distckpt.words import age, count, date, metrics, size, took

_PHASES = {
    CAPTURE: "collect names and layouts",
    DECIDE: "agree on it with the others",
    STAGE: "copy, for an asynchronous save",
    WRITE: "write the chief's own file",
    VOTE: "wait for the others, and commit",
    COMMIT: "manifest and record",
    SAVE: "the training loop, blocked",
}
_MAX_ROWS = 200
_MAX_CHARTS = 12


@dataclass(frozen=True, slots=True)
class Run:
    """What is known of a run.

    Attributes:
        directory: The run directory.
        record: Its newest record; None if nothing was ever claimed.
        events: Its history, oldest first.
    """

    directory: RunDirectory
    record: Record | None
    events: list[Event]

    def of(self, *kinds: str) -> list[Event]:
        """Return the events of some kinds."""
        return [event for event in self.events if event.kind in kinds]

    @property
    def entries(self) -> list[tuple[str, Entry]]:
        """All that the record names, newest first, with the list that it is in."""
        if self.record is None:
            return []
        lists = {
            "live": self.record.live,
            "kept": self.record.kept,
            "bad": self.record.bad,
            "missing": self.record.missing,
        }
        every = [(name, entry) for name, entries in lists.items() for entry in entries]
        return sorted(every, key=lambda item: item[1].record, reverse=True)


def read_run(directory: RunDirectory) -> Run:
    """Read what there is.

    Raises:
        StorageError, CorruptStateError, UnsafeCheckpointError: It cannot be read.
    """
    head = state.read_head(directory)
    record = None if head is None else head.record
    return Run(directory, record, read_history(directory))


def render(run: Run) -> str:
    """Make the page, as HTML."""
    environment = Environment(
        loader=PackageLoader("distckpt", "."),
        autoescape=select_autoescape(default=True, default_for_string=True),
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=count, size=size, date=date, age=age, took=took, metrics=metrics
    )
    return environment.get_template("report.html.j2").render(
        run=run, now=time.time(), max_rows=_MAX_ROWS, **summary(run), **_charts(run)
    )


def summary(run: Run) -> dict[str, Any]:
    """Return the page's figures, without its charts."""
    commits = run.of(COMMIT)
    intervals = [later.time - one.time for one, later in pairwise(commits)]
    blocked = sum(event.seconds for event in run.of(SAVE))
    spent = _time_at_work(run.events)
    slowest = Counter(event.detail.get("slowest_rank") for event in commits)
    return {
        "name": os.path.basename(str(run.directory)),
        "newest": run.entries[0][1] if run.entries else None,
        "num_commits": len(commits),
        "num_claims": len(run.of(CLAIM)),
        "num_deleted": len(run.of(DELETE)),
        "interval": mean(intervals) if intervals else None,
        "blocked": blocked,
        "blocked_share": blocked / spent if spent else None,
        "phases": _phases(run),
        "slowest": [
            (rank, number, number / len(commits))
            for rank, number in slowest.most_common(8)
            if rank is not None
        ],
        "num_ranks": max((int(e.detail.get("ranks", 1)) for e in commits), default=0),
        "claims": run.of(CLAIM)[-_MAX_ROWS:],
        "troubles": run.of(ERROR, FENCE, FALLBACK)[-_MAX_ROWS:],
        "rows": _rows(run)[:_MAX_ROWS],
        "kept_bytes": sum(entry.size_bytes for _, entry in run.entries),
        "rules": [] if run.record is None else [*run.record.rules],
    }


def figures(run: Run) -> dict[str, Any]:
    """Return the page's figures, for programs."""
    tree = summary(run)
    newest, slowest = tree.pop("newest"), tree.pop("slowest")
    events = {name: [asdict(e) for e in tree.pop(name)] for name in ("claims", "troubles")}
    ranks = [
        {"rank": rank, "times": times, "share": share} for rank, times, share in slowest
    ]
    return {
        "directory": str(run.directory),
        "newest": None if newest is None else newest.attempt.prefix,
        **tree,
        **events,
        "slowest": ranks,
    }


def _time_at_work(events: Sequence[Event]) -> float:
    """Return for how long jobs were at it: from each claim to the last that is heard of."""
    spent, began, last = 0.0, None, 0.0
    for event in events:
        if event.kind == CLAIM:
            spent += last - began if began is not None else 0.0
            began = event.time
        last = event.time
    return spent + (last - began if began is not None else 0.0)


def _phases(run: Run) -> list[dict[str, Any]]:
    seconds = {kind: [event.seconds for event in run.of(kind)] for kind in _PHASES}
    means = {kind: mean(times) for kind, times in seconds.items() if times}
    highest = max(means.values(), default=0.0) or 1.0
    return [
        {
            "kind": kind,
            "about": _PHASES[kind],
            "mean": means[kind],
            "longest": max(seconds[kind]),
            "number": len(seconds[kind]),
            "share": means[kind] / highest,
        }
        for kind in means
    ]


def _rows(run: Run) -> list[dict[str, Any]]:
    rules = () if run.record is None else run.record.rules
    committed = [entry for where, entry in run.entries if where != "bad"]
    best = best_metrics(committed, rules)
    rows = []
    for where, entry in run.entries:
        rows.append(
            {
                "prefix": entry.attempt.prefix,
                "state": where,
                "step": entry.step,
                "time": entry.time,
                "size_bytes": entry.size_bytes,
                "metrics": dict(entry.metrics),
                "why": entry.kept_by(rules),
                "best_in": sorted(best.get(entry.attempt, ())),
            }
        )
    return rows


# Charts


def _charts(run: Run) -> dict[str, Any]:
    commits = run.of(COMMIT)
    marks = [
        Mark(event.time, "claim", f"claimed at {date(event.time)}{_job_of(event)}")
        for event in run.of(CLAIM)
    ]
    times = [event.time for event in run.events]
    spell_x = charts.spell_time(max(times) - min(times) if times else 0.0)

    def chart(label: str, series: list[Series], spell_y: Any, width: int) -> Markup:
        spell = {"spell_x": spell_x, "spell_y": spell_y}
        drawn = charts.draw(label, series, marks, width=width, **spell)
        known = [("claim: start or restart", "claim")] if marks else []
        return drawn + charts.legend(series, known)

    unit, sizes = _sizes(commits)
    return {
        "timeline": chart("Saves and restarts", _timeline(run), took, WIDE),
        "skew": chart("Writing, by rank", _skew(commits), took, NARROW),
        "sizes": chart("Size", [sizes], lambda y: f"{y:g} {unit}", NARROW),
        "metric_charts": _metric_charts(run, commits),
    }


def _timeline(run: Run) -> list[Series]:
    def points(kind: str, total: bool = False) -> list[Point]:
        return [
            Point(
                event.time,
                float(event.detail.get("total_seconds", 0.0)) if total else event.seconds,
                f"{event.checkpoint or kind} {date(event.time)}{_why(event)}",
            )
            for event in run.of(kind)
        ]

    troubles = [
        Point(e.time, 0.0, f"{e.kind} {date(e.time)}: {e.detail.get('text', '')}")
        for e in run.of(ERROR, FENCE)
    ]
    return [
        Series("from the call to the commit", "commit", points(COMMIT, total=True)),
        Series("the loop blocked", "save", points(SAVE)),
        Series("restore", "restore", points(RESTORE), DOTS),
        Series("error", "error", troubles, DOTS),
    ]


def _why(event: Event) -> str:
    reasons = event.detail.get("reasons") or ()
    step = "" if event.step is None else f", step {event.step}"
    return step + ("" if not reasons else ": " + "; ".join(map(str, reasons)))


def _job_of(event: Event) -> str:
    run, restart = event.detail.get("run"), event.detail.get("restart")
    return f" by {run}, restart {restart}, {_ranks_of(event)}" if run else ""


def _ranks_of(event: Event) -> str:
    number = event.detail.get("ranks")
    return count(number, "rank") if isinstance(number, int) else "ranks unknown"


def _skew(commits: Sequence[Event]) -> list[Series]:
    def points(name: str) -> list[Point]:
        return [
            Point(
                event.time,
                float(event.detail.get(name, 0.0)),
                f"{event.checkpoint}: slowest rank {event.detail.get('slowest_rank')}",
            )
            for event in commits
        ]

    return [
        Series("the slowest rank", "slow", points("slowest_seconds")),
        Series("the mean of all ranks", "mean", points("mean_seconds")),
    ]


def _sizes(commits: Sequence[Event]) -> tuple[str, Series]:
    """Return the sizes in a unit that suits them, so that the axis has round numbers."""
    largest = max((event.size_bytes for event in commits), default=0)
    unit = size(largest).split()[1]
    unit_bytes = 1024 ** ["B", "KiB", "MiB", "GiB", "TiB"].index(unit)
    points = [
        Point(e.time, e.size_bytes / unit_bytes, f"{e.checkpoint}: {size(e.size_bytes)}")
        for e in commits
    ]
    return unit, Series("one checkpoint", "size", points)


def _metric_charts(run: Run, commits: Sequence[Event]) -> list[tuple[str, Markup]]:
    """Draw each metric over the training step, with the best marked."""
    found: dict[str, dict[float, Point]] = {}

    def add(metrics: Any, x: float, what: str) -> None:
        for name, value in dict(metrics).items():
            if isinstance(value, (int, float)) and math.isfinite(value):
                text = f"{what}: {name} {value:.6g}"
                found.setdefault(str(name), {})[x] = Point(x, float(value), text)

    for event in commits:
        x = event.time if event.step is None else event.step
        add(event.detail.get("metrics") or {}, float(x), event.checkpoint)
    # What was added later stands in the record.
    for _, entry in run.entries:
        x = entry.time if entry.step is None else entry.step
        add(dict(entry.metrics), float(x), entry.attempt.prefix)
    rules = () if run.record is None else run.record.rules
    modes = {rule.metric: rule.mode for rule in best_rules(rules)}
    drawn = []
    for name, by_x in [*sorted(found.items())][:_MAX_CHARTS]:
        points = [by_x[x] for x in sorted(by_x)]
        series = [Series(name, "metric", points)]
        if name in modes:
            choose = min if modes[name] == MIN else max
            best = choose(points, key=lambda point: point.y)
            series.append(Series("the best", "best", [best], DOTS))
        chart = charts.draw(
            name,
            series,
            spell_x=lambda x: f"{x:.0f}",
            spell_y=lambda y: f"{y:.4g}",
            width=NARROW,
        )
        drawn.append((name, chart + charts.legend(series)))
    return drawn
