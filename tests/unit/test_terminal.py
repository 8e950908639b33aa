"""What the commands show while they work."""

from __future__ import annotations

import json
import sys

import pytest

from distckpt import terminal, words


@pytest.mark.parametrize(
    ("is_terminal", "wait", "is_shown"),
    [
        (True, 0.0, True),
        (True, 3600.0, False),
        (False, 0.0, False),
    ],
)
def test_bar_is_shown_where_somebody_watches_and_it_takes_a_while(
    monkeypatch, is_terminal, wait, is_shown
):
    """Nowhere else, and it is taken away at the end."""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: is_terminal, raising=False)
    monkeypatch.setattr(terminal, "_SHOW_AFTER_SECONDS", wait)
    with terminal.Progress("doing") as progress:
        advance = progress.begin(1000)
        for _ in range(10):
            advance(100)
        assert (progress._bar is not None) == is_shown
        if is_shown:
            assert progress._bar.tasks[0].completed == progress._bar.tasks[0].total == 1000
    assert not is_shown or not progress._bar.live.is_started


@pytest.mark.parametrize(
    ("size_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (5 * 2**40, "5.0 TiB")],
)
def test_sizes_are_spelled_for_people(size_bytes, text):
    """With one digit behind the point."""
    assert words.size(size_bytes) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0 s"), (119, "119 s"), (120, "2 min"), (2e5, "2 d")]
)
def test_lengths_of_time_are_spelled_for_people(seconds, text):
    """In the largest unit of which there are two."""
    assert words.duration(seconds) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 ms"), (0.0312, "31.2 ms"), (0.12, "0.12 s"), (200, "3 min")],
)
def test_how_long_it_took_is_spelled_as_finely_as_three_digits_do(seconds, text):
    assert words.took(seconds) == text


def test_counts_have_their_plural():
    assert [words.count(n, "plain value") for n in (0, 1, 2)] == [
        "0 plain values",
        "1 plain value",
        "2 plain values",
    ]


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([3], "rank 3"),
        ([0, 2], "ranks 0, 2"),
        ([*range(9)], "ranks 0, 1, 2, 3, 4, 5, 6, 7, ... (9 ranks)"),
    ],
)
def test_ranks_are_listed_up_to_a_number(numbers, text):
    assert words.ranks(numbers) == text


def table_of(capsys, *arguments):
    terminal.print_table(*arguments)
    return capsys.readouterr().out.splitlines()


def test_table_aligns_columns_and_folds_nothing(capsys):
    """Numbers to the right; no blanks at the end of a line."""
    rows = [["a" * 200, "1", "x"], ["b", "22", ""]]
    assert table_of(capsys, ["name", "n", "note"], rows, ["n"]) == [
        f"name{' ' * 196}   n  note",
        f"{'a' * 200}   1  x",
        f"b{' ' * 199}  22",
    ]


def test_table_knows_how_wide_other_scripts_are(capsys):
    """A character may take two columns, or none."""
    rows = [["層", "1"], ["e\u0301", "2"]]
    assert table_of(capsys, ["name", "n"], rows) == [
        "name  n",
        "層    1",
        "e\u0301     2",
    ]


@pytest.mark.parametrize(("num_rows", "is_folded"), [(3, True), (300, False)])
def test_short_table_is_folded_to_the_terminal_and_a_long_one_is_not(
    capsys, monkeypatch, num_rows, is_folded
):
    """Folding thousands of rows takes ten seconds and more."""
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    lines = table_of(capsys, ["name", "n"], [["[x]" * 30, "1"]] * num_rows)[1:]
    assert (max(map(len, lines)) <= 60) == is_folded
    assert sum(line.count("[x]") for line in lines) >= 29 * num_rows


def test_columns_that_may_be_cut_are_before_any_is_folded(capsys, monkeypatch):
    """The first of them first, as far as needed; headings stay; columns, not characters."""
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    rows = [["a" * 8, "b" * 30, "層" * 9], ["a", "b", "c"]]
    columns = ["name", "metrics", "kept by"]
    assert terminal.print_table(columns, rows, cut=["metrics", "kept by"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rstrip() for line in lines] == [
        "name      metrics     kept by",
        f"aaaaaaaa  bbbbbbb...  {'層' * 9}",
        "a         b           c",
    ]
    assert not terminal.print_table(columns, rows[1:], cut=["metrics", "kept by"])
    assert terminal.fits(columns, rows[1:]) and not terminal.fits(columns, rows)


def test_columns_that_need_not_be_cut_are_not_where_it_would_not_help(capsys, monkeypatch):
    """Then cells are folded, as in other tables."""
    monkeypatch.setattr(terminal, "is_terminal", lambda: True)
    monkeypatch.setenv("COLUMNS", "30")
    assert not terminal.print_table(["a", "b"], [["x" * 60, "y" * 20]], cut=["b"])
    out = capsys.readouterr().out
    assert (out.count("x"), out.count("y")) == (60, 20)


def test_json_has_a_field_on_a_line(capsys):
    """For people and grep, too."""
    tree = {"ok": True, "items": [{"a": 1, "b": ",\n"}]}
    terminal.print_json(tree)
    text = capsys.readouterr().out
    assert json.loads(text) == tree
    assert text.splitlines() == ['{"ok": true,', '"items": [{"a": 1,', '"b": ",\\n"}]}']
