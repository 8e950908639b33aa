"""Metrics and metadata: what is taken, what is refused, and how it comes back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from distckpt.errors import ConfigError, UnsupportedError
from distckpt.remarks import Remarks


def test_metrics_become_floats_and_are_listed_by_name():
    remarks = Remarks.of(
        {"z": 1, "a": torch.tensor(0.5), "m": np.float32(2), "n": float("nan")}, None
    )
    assert remarks.listed == (("a", 0.5), ("m", 2.0), ("n", None), ("z", 1.0))
    assert {type(value) for value in remarks.metrics.values()} == {float}
    assert math.isnan(remarks.metrics["n"])


@pytest.mark.filterwarnings("error")
def test_loss_that_has_just_been_computed_is_a_metric():
    """The usual one; torch warns if it is converted as it is."""
    loss = (torch.ones(2, requires_grad=True) * 2).sum()
    assert Remarks.of({"loss": loss}, None).metrics == {"loss": 4.0}


def test_metadata_is_what_it_was_when_it_was_given():
    """A save behind the loop encodes it later; the user may change it meanwhile."""
    tags = ["a", ("b", 1)]
    remarks = Remarks.of(None, {"tags": tags, "$odd": None})
    tags.append("c")
    assert remarks.metadata == {"tags": ["a", ("b", 1)], "$odd": None}


def test_nothing_is_nothing():
    assert Remarks.of(None, None) == Remarks() == Remarks.of({}, {})
    assert (Remarks().listed, Remarks().metadata) == ((), {})


@pytest.mark.parametrize(
    "metrics",
    [
        *(5, [1.0], "loss", {1: 1.0}, {"": 1.0}, {"a" * 65: 1.0}, {"a": "0.5"}),
        *({"a": None}, {"a": [1]}, {"a": torch.zeros(2)}, {"a": 1j}, {"a": 10**400}),
        {str(number): 1.0 for number in range(33)},
    ],
    ids=lambda metrics: repr(metrics)[:30],
)
def test_metrics_that_are_no_numbers_by_name_are_refused(metrics):
    with pytest.raises(ConfigError, match="metrics"):
        Remarks.of(metrics, None)


@pytest.mark.parametrize("metadata", [5, [1], {1: 2}, "text"])
def test_metadata_that_is_not_by_name_is_refused(metadata):
    with pytest.raises(ConfigError, match="metadata"):
        Remarks.of(None, metadata)


@pytest.mark.parametrize(
    "metadata",
    [{"a": object()}, {"a": {"b": torch.zeros(1)}}, {"a": "x" * 2**20}],
    ids=["object", "tensor", "large"],
)
def test_metadata_that_cannot_be_stored_is_refused(metadata):
    with pytest.raises(UnsupportedError, match="metadata"):
        Remarks.of(None, metadata)
