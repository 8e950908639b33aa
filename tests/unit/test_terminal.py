"""What the commands show while they work."""

from __future__ import annotations

import sys

import pytest

from distckpt import terminal


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
    assert terminal.size(size_bytes) == text
