"""Keys to names and back."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from distckpt import names
from distckpt.formats import optimizers


@given(st.lists(st.text() | st.integers(), min_size=1).map(tuple))
def test_keys_come_back_from_names(keys):
    """Slashes, tildes and integers, too."""
    assert names.keys_of(names.joined(*keys)) == keys


def test_names_are_spelled_as_the_format_says():
    """``/`` between parts, ``~1`` and ``~0`` inside one, ``~i`` for integers."""
    assert names.joined("a/b", "c~d", 7, "~i7") == "a~1b/c~0d/~i7/~0i7"


def test_optimizers_are_told_by_the_settings_of_their_parameters():
    """What only looks like one is none."""
    tensors = {"model/a.weight", "model/b"}
    values = [
        "opt/settings/model/a.weight",
        "opt/settings/model/b",
        "nested/opt/settings/model/b",
        "settings/model/b",
        "other/settings/nothing",
        "lr",
    ]
    found = optimizers.find(values, tensors)
    assert [one.path for one in found] == ["opt", "nested/opt"]
    assert found[0].parameters == {"model/a.weight": "a.weight", "model/b": "b"}


def test_parameters_of_several_modules_keep_the_modules_names():
    """As they would be called in one that has both."""
    tensors = {"gen/w", "disc/w"}
    found = optimizers.find(["o/settings/gen/w", "o/settings/disc/w"], tensors)
    assert found[0].parameters == {"gen/w": "gen.w", "disc/w": "disc.w"}
