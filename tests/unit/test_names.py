"""Keys to names and back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distckpt import names


@given(st.lists(st.text() | st.integers(), min_size=1).map(tuple))
def test_keys_come_back_from_names(keys):
    """Slashes, tildes and integers, too."""
    assert names.keys_of(names.joined(*keys)) == keys


def test_names_are_spelled_as_the_format_says():
    """``/`` between parts, ``~1`` and ``~0`` inside one, ``~i`` for integers."""
    assert names.joined("a/b", "c~d", 7, "~i7") == "a~1b/c~0d/~i7/~0i7"
