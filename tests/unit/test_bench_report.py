"""The benchmark's tables, on figures that are made up."""

from __future__ import annotations

import io
import json
import sys

import pytest
from rich.console import Console

from distckpt.bench import command, plot, report
from distckpt.bench.results import ROWS, Results, Row, Series, WorkloadResults


def row(key: str) -> Row:
    return next(row for row in ROWS if row.key == key)


@pytest.fixture
def workload():
    found = WorkloadResults("made-up", ("distckpt", "slow", "gone"))
    found.facts = {"size_bytes": 1_500_000_000}
    for value in (0.9, 1.0, 2.0):
        found.add("save", "distckpt", value)
    for value in (3.0, 3.5, 3.0):
        found.add("save", "slow", value)
    for value in (0.7, 0.9):
        found.add("save", "limit:one", value)
    found.add("save", "limit:other", 0.5)
    found.add("save.written", "distckpt", 750e6)
    found.add("gate", "distckpt", 2.5e-6)
    found.failures["gone"] = "not installed: nothing of that name"
    return found


def test_series_gives_the_middle_one_and_all_repetitions():
    """One slow repetition does not move the figure, and is not hidden."""
    series = Series([5.0, 1.0, 2.0])
    assert series.to_json() == {
        "median": 2.0,
        "min": 1.0,
        "max": 5.0,
        "repetitions": [5.0, 1.0, 2.0],
    }


def test_cells_show_median_range_and_ratios(workload):
    """Ours against the best limit, each peer against ours."""
    cells = report.cells_of(workload, row("save"), ["slow", "gone"])
    assert cells == [
        "1.00 s [900 ms, 2.00 s]",
        "500 ms (other)",
        "2.00x",
        "3.00 s [3.00 s, 3.50 s] (3.00x)",
        "failed",
    ]


def test_cells_of_a_row_without_limit_say_so(workload):
    """Nothing is made up where nothing was measured."""
    assert report.cells_of(workload, row("gate"), ["slow"]) == ["2.50 us", "-", "-", "-"]


def test_a_row_of_which_only_the_limit_is_elsewhere_takes_it_from_there(workload):
    """An asynchronous save becomes durable no sooner than plain writing takes."""
    workload.add("eager.durable", "distckpt", 1.5)
    assert report.cells_of(workload, row("eager.durable"), [])[1:] == [
        "500 ms (other)",
        "3.00x",
    ]


@pytest.mark.parametrize(
    ("value", "base", "expected"),
    [(3.0, 2.0, "1.50x"), (3.0, 0.0, "-"), (3.0, -1.0, "-"), (-0.1, 2.0, "-")],
)
def test_ratio_where_it_means_nothing_is_left_out(value, base, expected):
    """Lost time is a difference, and may come out below zero."""
    assert report.format_ratio(Series([value]), Series([base])) == expected


@pytest.mark.parametrize(
    ("value", "unit", "expected"),
    [
        (12.345, "seconds", "12.3 s"),
        (0.0123, "seconds", "12.3 ms"),
        (9.9999e-5, "seconds", "100 us"),
        (-0.5, "seconds", "-500 ms"),
        (0.0, "seconds", "0.00 us"),
        (1.49e9, "bytes", "1.49 GB"),
        (132, "bytes", "132 B"),
    ],
)
def test_figures_have_three_digits_and_a_unit(value, unit, expected):
    """Short enough to compare at a glance."""
    assert report.format_value(value, unit) == expected


def test_table_holds_the_rows_that_were_measured_in_order(workload):
    """Of a phase that was not run there is no line."""
    table = report.table_of(workload)
    assert list(table.columns[0].cells) == [
        "save, durable",
        "  bytes written, a rank",
        "gated call",
    ]
    console = Console(width=300, record=True, file=io.StringIO())
    console.print(table)
    text = console.export_text()
    assert "median [min, max]" in text
    assert "made-up, 1.50 GB" in text


def test_json_is_whole_and_tells_whether_ours_failed(workload, tmp_path):
    """The exit code is about distckpt alone."""
    results = Results({"world_size": 2}, {"scale": 1.0}, [workload])
    assert not results.ours_failed
    path = tmp_path / "b.json"
    report.write_json(results, str(path))
    read = json.loads(path.read_text())["workloads"]["made-up"]
    assert read["phases"]["save"]["results"]["distckpt"]["repetitions"] == [0.9, 1.0, 2.0]
    assert read["failures"] == workload.failures
    workload.failures["distckpt"] = "save: made up"
    assert results.ours_failed


@pytest.mark.full
def test_plot_is_drawn(workload, tmp_path):
    """A lost time below zero, or a contender without bars, spoils nothing."""
    pytest.importorskip("matplotlib")
    workload.add("eager.lost", "distckpt", -0.01)
    path = tmp_path / "b.png"
    plot.write_plot(Results({"world_size": 2}, {}, [workload]), str(path))
    assert path.read_bytes().startswith(b"\x89PNG")


def test_plot_without_matplotlib_says_what_to_install(workload, tmp_path, monkeypatch):
    """The tables are there all the same."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(plot.NoPlot, match="pip install matplotlib"):
        plot.write_plot(Results({}, {}, [workload]), str(tmp_path / "b.png"))


def test_names_on_the_command_line_are_those_of_the_code():
    """They stand there twice, as ``--help`` does without torch."""
    from distckpt.bench import limit, peers, phases, workloads

    assert tuple(workloads.KINDS) == command.WORKLOADS
    assert tuple(peers.PEERS) == command.PEERS
    assert tuple(phases.PHASES) == command.PHASES
    # The limits' names say what is measured: one name, one way of writing or reading.
    assert not {*limit.READS} & {f"limit:{method}" for method in limit.METHODS}
