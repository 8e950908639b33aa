"""The bar chart."""

from __future__ import annotations

import importlib
from typing import Any

from distckpt.bench.results import OURS, Results, Row, Series, WorkloadResults

_LIMIT = "limit"
_COLORS = {
    OURS: "#1b6ca8",
    _LIMIT: "#9a9a9a",
    "dcp": "#d95f02",
    "dcp-tuned": "#f0a35e",
    "torch-save": "#7570b3",
    "safetensors": "#66a61e",
    "torchsnapshot": "#a6761d",
}
# A bar of nothing, or less, has no place on a logarithmic axis.
_LEAST_SECONDS = 1e-5


class NoPlot(Exception):
    """Why there is no chart."""


def write_plot(results: Results, path: str) -> None:
    """Draw the times of all workloads, a panel each.

    Raises:
        NoPlot: matplotlib is missing.
    """
    try:
        agg = importlib.import_module("matplotlib.backends.backend_agg")
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        msg = f"no chart was drawn: {error}; pip install matplotlib, or distckpt[bench]."
        raise NoPlot(msg) from error
    panels = [workload for workload in results.workloads if _plotted(workload)]
    if not panels:
        msg = "no chart was drawn: no phase that was run has a bar in it."
        raise NoPlot(msg)
    width = max(7.0, max(1.7 * len(_plotted(workload)) + 2 for workload in panels))
    figure = figures.Figure(figsize=(width, 3.6 * len(panels) + 0.6), layout="constrained")
    agg.FigureCanvasAgg(figure)
    for number, workload in enumerate(panels):
        axes = figure.add_subplot(len(panels), 1, number + 1)
        _draw(axes, workload)
    world_size = results.environment.get("world_size", 1)
    figure.suptitle(f"seconds, lower is better (log scale); {world_size} ranks")
    figure.savefig(path, dpi=130)


def _plotted(workload: WorkloadResults) -> list[Row]:
    return [r for r in workload.rows() if r.is_plotted and r.key in workload.series]


def _draw(axes: Any, workload: WorkloadResults) -> None:
    rows = _plotted(workload)
    names = [_LIMIT, *workload.contenders]
    width = 0.85 / len(names)
    for place, name in enumerate(names):
        found = [
            (number, series)
            for number, row in enumerate(rows)
            if (series := _series(workload, row, name)) is not None
        ]
        if not found:
            continue
        at = [number + (place - (len(names) - 1) / 2) * width for number, _ in found]
        medians = [max(series.median, _LEAST_SECONDS) for _, series in found]
        spread = [
            [
                max(0.0, m - max(min(s.values), _LEAST_SECONDS))
                for m, (_, s) in _with(medians, found)
            ],
            [max(0.0, max(s.values) - m) for m, (_, s) in _with(medians, found)],
        ]
        axes.bar(at, medians, width, label=name, color=_COLORS.get(name), yerr=spread)
    axes.set_yscale("log")
    axes.set_title(workload.name, loc="left")
    axes.set_xticks(range(len(rows)), [_label(row) for row in rows], fontsize=8)
    axes.grid(axis="y", which="major", alpha=0.4)
    axes.set_axisbelow(True)
    axes.legend(
        fontsize=8, ncols=len(names), loc="upper center", bbox_to_anchor=(0.5, -0.18)
    )


def _with(medians: list[float], found: list[tuple[int, Series]]) -> Any:
    return zip(medians, found, strict=True)


def _series(workload: WorkloadResults, row: Row, name: str) -> Series | None:
    if name == _LIMIT:
        limit = workload.limit(row)
        return None if limit is None else limit[1]
    return workload.get(row.key, name)


def _label(row: Row) -> str:
    titles = {"eager.durable": "async eager, until durable"}
    return titles.get(row.key, row.title).strip().replace(", ", ",\n")
