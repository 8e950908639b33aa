"""The report: one page that needs nothing else, with what a person wants to see."""

from __future__ import annotations

import json
import os
from html.parser import HTMLParser

import pytest
from click.testing import CliRunner
from unit_helpers import make_claimed, save

from distckpt import charts, cli, history, pin
from distckpt.charts import DOTS, Mark, Point, Series
from distckpt.errors import UnsafeCheckpointError
from distckpt.events import (
    CLAIM,
    COMMIT,
    DELETE,
    ERROR,
    FALLBACK,
    RESTORE,
    SAVE,
    WRITE,
    Event,
)
from distckpt.history import History
from distckpt.policy import best, latest
from distckpt.remarks import Remarks
from distckpt.run_directory import RunDirectory

EVIL = "<script>alert(1)</script>"
VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Reads a page, and holds that what opens is closed, in order."""

    def __init__(self, text):
        super().__init__()
        self.stack, self.links, self.text, self.tags = [], [], [], []
        self.feed(text)
        self.close()
        assert self.stack == []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.links += [v for n, v in attributes if n in ("src", "href", "action")]
        if tag not in VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)

    @property
    def words(self):
        return " ".join(" ".join(self.text).split())


def run(*arguments):
    return CliRunner().invoke(cli.main, ["report", *arguments], catch_exceptions=False)


def page_of(directory, tmp_path):
    output = str(tmp_path / "report.html")
    result = run(directory, "-o", output)
    assert result.exit_code == 0, result.output
    with open(output, encoding="utf-8") as file:
        return Page(file.read())


@pytest.fixture
def lived(run_dir):
    """A run directory with checkpoints, metrics, a pin, and a history of two claims."""
    rule = latest(2) | best(1, "loss", mode="min")
    chief = make_claimed(run_dir, keep=rule)
    for number, loss in ((1, 0.9), (2, 0.25), (3, 0.5), (4, 0.7), (5, 0.6)):
        remarks = Remarks.of({"loss": loss, EVIL: 1.0}, None)
        save(chief, run_dir, number, step=10 * number, remarks=remarks)
        if number == 3:
            pin(os.path.join(run_dir, "ckpt-3"))
    chief.close()
    sink = History(RunDirectory.at(run_dir))
    at = 1_764_000_000.0
    for epoch in (1, 2):
        detail = {
            "epoch": epoch,
            "run": "torchrun-" + EVIL,
            "restart": epoch - 1,
            "ranks": 4,
        }
        sink(Event(CLAIM, at, 0, 0.1, detail=detail))
        for number in range(1, 6):
            at += 60
            about = {"checkpoint": f"ckpt-{number}", "step": 10 * number}
            said = {
                "ranks": 4,
                "slowest_rank": 2,
                "slowest_seconds": 0.75,
                "mean_seconds": 0.5,
                "total_seconds": 1.5,
                "reasons": ["every(steps=10)"],
                "metrics": {"loss": 1.0 / number, EVIL: 2.0},
            }
            sink(Event(WRITE, at, 0, 0.5, size_bytes=2**20, **about))
            sink(Event(COMMIT, at, 0, 0.01, size_bytes=2**22, detail=said, **about))
            sink(Event(SAVE, at, 0, 0.6, **about))
        sink(Event(DELETE, at, 0, 0.01, "ckpt-1"))
        sink(Event(ERROR, at, 0, detail={"error": "SaveFailed", "text": "no " + EVIL}))
        sink(Event(FALLBACK, at, 0, 0.0, "ckpt-4", detail={"reason": "is corrupt"}))
        sink(Event(RESTORE, at, 0, 0.4, "ckpt-3", step=30))
    return run_dir


def test_page_is_whole_needs_nothing_else_and_runs_nothing(lived, tmp_path):
    page = page_of(lived, tmp_path)
    assert page.links == []
    assert "script" not in page.tags
    assert EVIL in page.words  # as text
    assert page.tags.count("svg") >= 5


def test_page_says_what_there_is(lived, tmp_path):
    words = page_of(lived, tmp_path).words
    for text in (
        "ckpt-5 newest",
        "50 training step",
        "4 kept",
        "10 saves, one in",
        "2 starts and restarts",
        "rank 2: 10 times, 100 %",
        "the slowest of 4 ranks",
        "best loss",
        "pinned",
        'best(1, "loss", mode="min")',
        "2 deleted so far",
        "SaveFailed",
        "is corrupt",
        "the training loop, blocked",
    ):
        assert text in words, text


def test_the_best_is_marked_once(lived, tmp_path):
    output = tmp_path / "report.html"
    run(lived, "-o", str(output))
    text = output.read_text()
    assert text.count('<span class="tag best">') == 1
    row = next(r for r in text.split("<tr>") if '<span class="tag best">' in r)
    assert "ckpt-2" in row
    assert text.count('<circle class="best"') == 1


def test_a_page_can_be_made_of_nothing(run_dir, tmp_path):
    assert "no checkpoint has been committed" in page_of(str(tmp_path), tmp_path).words
    make_claimed(run_dir).close()
    assert "nothing yet" in page_of(run_dir, tmp_path).words


def test_figures_are_there_for_programs(lived):
    tree = json.loads(run(lived, "--json").stdout)
    assert tree["newest"] == "ckpt-5"
    assert tree["num_commits"] == 10 and tree["num_claims"] == 2
    assert tree["slowest"] == [{"rank": 2, "times": 10, "share": 1.0}]
    assert [row["prefix"] for row in tree["rows"]] == [
        "ckpt-5",
        "ckpt-4",
        "ckpt-3",
        "ckpt-2",
    ]
    phases = {phase["kind"]: phase["mean"] for phase in tree["phases"]}
    assert phases == {"write": 0.5, "commit": 0.01, "save": pytest.approx(0.6)}
    # Two jobs of five minutes each, blocked ten times.
    assert tree["blocked_share"] == pytest.approx(6 / 600)


def test_what_is_not_there_is_said(tmp_path):
    result = run(str(tmp_path / "nowhere"))
    assert result.exit_code == 3 and "not a directory" in result.stderr


def test_a_page_that_cannot_be_written_leaves_nothing(lived, tmp_path):
    result = run(lived, "-o", str(tmp_path / "nowhere" / "x.html"))
    assert result.exit_code == 3
    assert os.listdir(tmp_path) == [os.path.basename(lived)] or not os.listdir(tmp_path)


def test_history_passes_over_what_is_cut_off_or_no_event(lived, caplog):
    (name,) = [n for n in os.listdir(os.path.join(lived, ".events")) if n.startswith("e2")]
    before = len(history.read_history(RunDirectory.at(lived)))
    with open(os.path.join(lived, ".events", name), "ab") as file:
        file.write(b'rubbish\n{"kind": "commit", "ti')
    os.mkfifo(os.path.join(lived, ".events", "e3-00000000-0000.jsonl"))
    assert len(history.read_history(RunDirectory.at(lived))) == before
    assert "cannot be read" in caplog.text


def test_history_that_is_elsewhere_is_refused(run_dir, tmp_path):
    make_claimed(run_dir).close()
    os.symlink(tmp_path, os.path.join(run_dir, ".events"))
    with pytest.raises(UnsafeCheckpointError):
        history.read_history(RunDirectory.at(run_dir))
    assert run(run_dir, "-o", str(tmp_path / "x.html")).exit_code == 3


# Charts


def spell(value):
    return f"{value:g}"


def draw(*series, marks=()):
    return str(charts.draw("a chart", series, marks, spell_x=spell, spell_y=spell))


@pytest.mark.parametrize(
    ("ys", "ticks"),
    [
        ([0.5, 0.9], ["0", "0.25", "0.5", "0.75", "1"]),
        ([100.0], ["0", "25", "50", "75", "100"]),
        ([0.0], ["0", "0.25"]),
        ([-3.0, 5.0], ["-4", "-2", "0", "2", "4", "6"]),
    ],
)
def test_axis_has_round_numbers_that_hold_all(ys, ticks):
    points = [Point(float(n), y, "") for n, y in enumerate(ys)]
    page = Page(draw(Series("s", "size", points)))
    assert [text for text in page.text if text in ticks][: len(ticks)] == ticks


def test_of_many_points_the_highest_are_drawn():
    points = [Point(float(n), float(n == 7777), f"p{n}") for n in range(10_000)]
    text = draw(Series("s", "size", points, DOTS))
    assert text.count("<circle") <= 400 and "p7777" in text


def test_chart_of_one_point_and_marks_is_sound():
    text = draw(
        Series("s", "size", [Point(5.0, 0.0, EVIL)]), marks=[Mark(5.0, "claim", EVIL)]
    )
    page = Page(text)
    assert "script" not in page.tags and "NaN" not in text and "inf" not in text


def test_chart_of_nothing_says_so():
    assert "nothing yet" in draw(Series("s", "size", []))
