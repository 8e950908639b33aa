"""Python state of millions of numbers costs little more than JSON takes for it."""

from __future__ import annotations

import itertools
import json
import statistics
import time

import pytest

from distckpt import Checkpoint, CheckpointManager, PerRank, values
from distckpt.save_plan import _digest_of_values

pytestmark = [pytest.mark.alone, pytest.mark.full]

_NUMBERS, _KEYS = 2_000_000, 100_000
_ROUNDS = 3


def _state(length):
    """Make lists of so many numbers, and a dict beside them."""
    rows = [list(range(at, at + length)) for at in range(0, _NUMBERS, length)]
    return {"rows": rows, "keys": {f"key {i}": i * 7 for i in range(_KEYS)}}


def _seconds(body):
    began = time.process_time()
    body()
    return time.process_time() - began


def _ratio(body, reference):
    """Measure both in turns: the median of the pairs.

    A processor that is lent out for a while changes its speed between two calls by half:
    the least of each may come from different speeds.
    """
    return statistics.median(_seconds(body) / _seconds(reference) for _ in range(_ROUNDS))


SHAPES = pytest.mark.parametrize("length", [_NUMBERS, 1000, 10])


@SHAPES
def test_text_and_digest_take_at_most_three_times_as_long_as_json(length, report_figures):
    """The walk over all of it included."""
    state = _state(length)

    def encode():
        _digest_of_values({"x": values.encode_text(state)}, ())

    ratio = _ratio(encode, lambda: json.dumps(state))
    report_figures(f"lists of {length}: {ratio:.1f} times as long as json.dumps")
    assert ratio < 3


@pytest.mark.parametrize("wrap", [lambda x: x, PerRank], ids=["shared", "per-rank"])
@SHAPES
def test_save_and_restore_take_about_three_times_as_long_as_json(
    run_dir, wrap, length, report_figures
):
    """All of a save by one process, and of a restore."""
    state = _state(length)
    text = json.dumps(state)
    with CheckpointManager(Checkpoint(x=wrap(state)), run_dir, 1) as manager:
        manager.save()
        save = _ratio(lambda: manager.save(), lambda: json.dumps(state))
    live = [{} for _ in range(_ROUNDS)]
    fresh = itertools.cycle(live)
    path = manager.latest_checkpoint

    def restore():
        Checkpoint(x=wrap(next(fresh))).restore(path)

    load = _ratio(restore, lambda: json.loads(text))
    assert all(one == state for one in live)
    report_figures(
        f"lists of {length}: a save {save:.1f} times as long as json.dumps, "
        f"a restore {load:.1f} times as long as json.loads"
    )
    assert save < 3
    assert load < 4
