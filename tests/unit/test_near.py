"""Near names: the answer to a name that is mistyped, wherever one is looked up."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
from unit_helpers import make_entry

import distckpt
from distckpt.choice import choose
from distckpt.errors import CheckpointNotFound
from distckpt.near import did_you_mean, near_names
from distckpt.near_paths import there_is
from distckpt.policy import best

NAMES = ["model/0.weight", "model/0.bias", "model/10.weight", "optimizer", "best", "latest"]


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("model/0.wieght", ["model/0.weight", "model/10.weight", "model/0.bias"]),
        ("Model/0.Bias", ["model/0.bias"]),
        ("0.weight", ["model/0.weight", "model/10.weight"]),
        ("optimzer", ["optimizer"]),
        ("bset", ["best"]),
        ("", []),
        ("zzz", []),
    ],
)
def test_near_names_are_these(name, near):
    """Those that end with it first; then by likeness."""
    assert near_names(name, NAMES)[: len(near)] == near
    assert near or not near_names(name, NAMES)


def test_no_more_than_were_asked_for_and_the_nearest_of_all():
    names = [f"layers.{n}.weight" for n in range(500)]
    assert near_names("layers.333.wieght", names, 2)[0] == "layers.333.weight"
    assert len(near_names("layers.333.wieght", names, 2)) == 2
    assert len(near_names("qq", names, 3, least=0)) == 3
    assert len(near_names("x" * 300, ["x" * 100_000])[0]) == 200


@pytest.mark.parametrize(
    ("names", "text"),
    [
        (["zz"], "."),
        (["best"], "; did you mean 'best'?"),
        (["best", "bests"], "; did you mean 'best' or 'bests'?"),
        (["best", "bests", "beset"], "; did you mean 'best', 'bests' or 'beset'?"),
    ],
)
def test_names_end_the_sentence(names, text):
    found = did_you_mean("besst", names)
    assert sorted(found) == sorted(text) and found[-1] in ".?"


# Checkpoints


ENTRIES = [
    replace(make_entry(number, record=number), metrics=(("nan", None), ("val_loss", 1.0)))
    for number in (12, 11)
]


@pytest.mark.parametrize(
    ("which", "text"),
    [
        (
            "bset",
            "restore('bset'): no such checkpoint; did you mean 'best'? Committed in runs, "
            "newest first: ckpt-12, ckpt-11.",
        ),
        (
            "runs/ckpt-21",
            "restore('runs/ckpt-21'): no such checkpoint; did you mean 'ckpt-",
        ),
        (7, "restore(7): no such checkpoint. Committed in runs, newest first: ckpt-12"),
        (
            best(1, "val_los", mode="min"),
            'restore(best(1, "val_los", mode="min")): no committed checkpoint has the '
            "metric 'val_los'; did you mean 'val_loss'? Metrics that there are: nan, "
            "val_loss. Committed",
        ),
        (best("nan", mode="max"), "the metric 'nan' is a finite number in none. Metrics"),
    ],
)
def test_restore_of_what_is_not_there_names_what_is(which, text):
    with pytest.raises(CheckpointNotFound) as caught:
        choose(ENTRIES, which, "runs", None)
    assert text in str(caught.value)


@pytest.mark.parametrize("which", ["latest", "ckpt-1", 1])
def test_restore_where_nothing_is_committed_suggests_nothing(which):
    with pytest.raises(CheckpointNotFound, match=r"no such checkpoint\. .*first: none\.$"):
        choose([], which, "runs", None)


# Paths


def test_path_that_is_not_there_names_what_is_called_nearly_so(tmp_path, monkeypatch):
    """The first part of it that is not there; nothing for what is there."""
    monkeypatch.chdir(tmp_path)
    for name in ("runs/ddp", "runs/gpt", "runs/.ddp"):
        os.makedirs(name)
    assert there_is("runs/dpp") == f" There is {tmp_path}/runs/ddp."
    assert there_is("runz/ddp/ckpt-1") == f" There is {tmp_path}/runs."
    assert there_is("runs/ddp") == there_is("runs/zzzzzzz") == ""


@pytest.mark.parametrize("path", ["runs/dpp", "runs/dpp/ckpt-7"])
def test_open_of_a_mistyped_path_names_the_near_one(tmp_path, monkeypatch, path):
    """So do all that read a checkpoint by its path."""
    monkeypatch.chdir(tmp_path)
    os.makedirs("runs/ddp")
    for read in (distckpt.open, distckpt.Checkpoint().restore):
        with pytest.raises(CheckpointNotFound, match=f"There is {tmp_path}/runs/ddp"):
            read(path)
