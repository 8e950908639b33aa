"""Events: in order, off the caller's thread, and no callback holds up or fails anything."""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import replace

import pytest
from examples import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from distckpt import events, history, paths
from distckpt.errors import UnsafeCheckpointError
from distckpt.events import (
    CLAIM,
    COMMIT,
    DELETE,
    ERROR,
    RESTORE,
    SAVE,
    WRITE,
    Event,
    Events,
)
from distckpt.history import History
from distckpt.run_directory import RunDirectory
from distckpt.sinks import JsonLines, Log, PrometheusFile, TensorBoard, say_line

WHOLE = Event(
    COMMIT,
    1000.5,
    0,
    seconds=0.25,
    checkpoint="ckpt-7",
    step=70,
    size_bytes=2**31,
    detail={
        "ranks": 4,
        "slowest_rank": 3,
        "slowest_seconds": 1.5,
        "mean_seconds": 1.0,
        "total_seconds": 2.0,
        "reasons": ["every(steps=10): 10 since step 60"],
        "metrics": {"loss": 0.5},
    },
)


def test_events_are_told_in_order_with_their_rank_and_time():
    told = []
    some = Events([told.append], rank=3)
    before = time.time()
    for number in range(100):
        some.tell(WRITE, step=number)
    assert some.wait(20)
    assert [event.step for event in told] == [*range(100)]
    assert {event.rank for event in told} == {3}
    assert before <= told[0].time <= told[-1].time <= time.time()


def test_a_block_that_ends_well_is_timed_and_one_that_does_not_is_not_told():
    told = []
    some = Events([told.append])
    with some.timed(WRITE, checkpoint="ckpt-1") as more:
        time.sleep(0.05)
        more["size_bytes"] = 10
    with pytest.raises(KeyError), some.timed(WRITE):
        raise KeyError
    assert some.wait(20)
    (event,) = told
    assert event.seconds >= 0.05 and (event.checkpoint, event.size_bytes) == ("ckpt-1", 10)
    assert 0 < event.bytes_per_second <= 200


def test_a_callback_that_hangs_holds_up_nobody():
    """And it does not collect events for ever."""
    release = threading.Event()
    told = []

    def hang(event):
        release.wait()
        told.append(event.step)

    some = Events([hang])
    began = time.monotonic()
    for number in range(events._MAX_WAITING + 500):
        some.tell(WRITE, step=number)
    assert time.monotonic() - began < 10
    assert not some.wait(0.05)
    release.set()
    assert some.wait(20)
    assert told[-1] == events._MAX_WAITING + 499
    assert len(told) <= events._MAX_WAITING + 1


def test_a_callback_that_fails_is_told_of_once_and_the_others_go_on(caplog):
    told = []

    def fail(_):
        raise ValueError("no")

    some = Events([fail, told.append])
    for number in range(5):
        some.tell(WRITE, step=number)
    assert some.wait(20)
    assert len(told) == 5
    assert caplog.text.count("a callback for events failed") == 1


def test_no_thread_stays_when_all_is_told():
    some = Events([lambda _: None])
    some.tell(WRITE)
    assert some.wait(20)
    assert not [t for t in threading.enumerate() if t.name == "distckpt-events"]


def test_without_anybody_who_listens_nothing_is_made():
    some = Events()
    some.tell(WRITE)
    assert some.wait(0)


# As JSON

_events = st.builds(
    Event,
    st.sampled_from([COMMIT, SAVE, ERROR]),
    st.floats(0, 1e12),
    st.integers(0, 10**6),
    seconds=st.integers(0, 10**9).map(lambda n: n / 1e6),
    checkpoint=st.text(max_size=5),
    step=st.none() | st.integers(-(2**63), 2**63 - 1),
    size_bytes=st.integers(0, 2**63 - 1),
    detail=st.dictionaries(st.text(max_size=3), st.none() | st.integers(0, 9), max_size=3),
)


@settings(max_examples=examples(100), deadline=None)
@given(event=_events)
def test_event_as_json_and_back_is_the_same(event):
    assert Event.from_json(event.to_json().encode()) == event


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'{"kind": "save"}',
        b'{"kind": "save", "time": 1, "rank": 0, "other": 1}',
        b'{"kind": 5, "time": 1, "rank": 0}',
        b'{"kind": "save", "time": "now", "rank": 0}',
        b'{"kind": "save", "time": 1, "rank": 0, "detail": [1]}',
        b'{"kind": "save", "time": 1, "rank": 0, "step": "x"}',
        WHOLE.to_json().encode()[:-5],
    ],
)
def test_what_is_no_event_is_none(line):
    assert Event.from_json(line) is None


def test_json_lines_has_a_line_an_event_and_a_file_a_rank(tmp_path):
    sink = JsonLines(tmp_path / "events-{rank}.jsonl")
    for rank in (0, 1, 0):
        sink(Event(SAVE, 1.0, rank, seconds=0.5))
    lines = (tmp_path / "events-0.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"kind": "save", "time": 1.0, "rank": 0, "seconds": 0.5}
    ] * 2
    assert len((tmp_path / "events-1.jsonl").read_text().splitlines()) == 1


# The history in a run directory


def claimed(epoch):
    return Event(CLAIM, 1.0, 0, detail={"epoch": epoch, "run": "job", "restart": 0})


def history_of(directory):
    folder = os.path.join(directory, paths.EVENTS_DIRECTORY)
    return sorted(os.listdir(folder)) if os.path.exists(folder) else []


def test_history_begins_with_a_claim_and_has_a_file_for_each(run_dir):
    sink = History(RunDirectory.at(run_dir))
    sink(WHOLE)
    assert history_of(run_dir) == []
    for epoch in (1, 2):
        sink(claimed(epoch))
        sink(WHOLE)
    first, second = history_of(run_dir)
    assert first.startswith("e1-") and second.startswith("e2-")
    with open(os.path.join(run_dir, paths.EVENTS_DIRECTORY, first), "rb") as file:
        kinds = [Event.from_json(line).kind for line in file]
    assert kinds == [CLAIM, COMMIT]


def test_history_that_grows_goes_on_in_another_file_and_old_ones_go(run_dir, monkeypatch):
    monkeypatch.setattr(history, "_MAX_FILE_BYTES", 1000)
    monkeypatch.setattr(history, "_KEPT_FILES", 3)
    sink = History(RunDirectory.at(run_dir))
    sink(claimed(1))
    for _ in range(20):
        sink(WHOLE)
    files = history_of(run_dir)
    assert len(files) == 3
    parts = [paths.parse_events_file(name).part for name in files]
    assert parts == [parts[0], parts[0] + 1, parts[0] + 2] and parts[0] > 3
    sizes = [os.path.getsize(os.path.join(run_dir, ".events", name)) for name in files]
    assert max(sizes) <= 1000


def test_history_is_not_written_where_a_link_leads(run_dir, tmp_path):
    os.makedirs(run_dir, exist_ok=True)
    os.symlink(tmp_path, os.path.join(run_dir, paths.EVENTS_DIRECTORY))
    with pytest.raises(UnsafeCheckpointError):
        History(RunDirectory.at(run_dir))(claimed(1))
    assert not [name for name in os.listdir(tmp_path) if name.endswith("jsonl")]


# Prometheus, TensorBoard, logging


def test_prometheus_gets_a_file_with_what_matters(tmp_path):
    path = tmp_path / "distckpt.prom"
    sink = PrometheusFile(path, {"run": "gpt"})
    for event in (
        WHOLE,
        WHOLE,
        Event(SAVE, 1.0, 0, seconds=0.5),
        Event(WRITE, 1.0, 0, size_bytes=100),
        Event(DELETE, 1.0, 0),
        Event(ERROR, 1.0, 0, detail={"error": "SaveFailed"}),
        Event(RESTORE, 1.0, 0, seconds=2.0),
        Event(CLAIM, 1.0, 0),
    ):
        sink(event)
    lines = path.read_text().splitlines()
    labels = '{rank="0",run="gpt"}'
    for line in (
        f"distckpt_commits_total{labels} 2.0",
        f"distckpt_last_commit_timestamp_seconds{labels} 1000.5",
        f"distckpt_last_commit_step{labels} 70.0",
        f"distckpt_last_commit_size_bytes{labels} {float(2**31)}",
        f"distckpt_last_write_slowest_seconds{labels} 1.5",
        f"distckpt_blocked_seconds_total{labels} 0.5",
        f"distckpt_written_bytes_total{labels} 100.0",
        f"distckpt_deletions_total{labels} 1.0",
        f"distckpt_errors_total{labels} 1.0",
        f"distckpt_last_restore_seconds{labels} 2.0",
    ):
        assert line in [_plain(one) for one in lines], line
    assert os.listdir(tmp_path) == ["distckpt.prom"]


def _plain(line):
    """Spell out numbers in exponential notation."""
    name, _, value = line.rpartition(" ")
    return f"{name} {float(value)}" if not line.startswith("#") else line


class Writer:
    def __init__(self):
        self.scalars = {}

    def add_scalar(self, name, value, step, walltime):
        self.scalars[name] = (value, step, walltime)


def test_tensorboard_gets_scalars_by_step():
    writer = Writer()
    sink = TensorBoard(writer, prefix="ckpt")
    sink(WHOLE)
    sink(Event(CLAIM, 1.0, 0))
    assert writer.scalars["ckpt/commit_seconds"] == (0.25, 70, 1000.5)
    assert writer.scalars["ckpt/commit_gib"][0] == 2.0
    assert writer.scalars["ckpt/commit_gib_per_second"][0] == 8.0
    assert writer.scalars["ckpt/slowest_rank"][0] == 3
    assert not any("claim" in name for name in writer.scalars)


def test_a_save_is_one_line_and_all_else_is_for_debugging(caplog):
    with caplog.at_level(logging.DEBUG):
        for event in (
            WHOLE,
            Event(WRITE, 1.0, 1),
            Event(RESTORE, 1.0, 0, checkpoint="c-1"),
        ):
            Log(logging.getLogger("mine"))(event)
    found = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert found[0] == (
        "INFO",
        "saved ckpt-7 at step 70: 2.0 GiB in 2 s, 1.0 GiB/s (rank 3 was slowest, 1.5 s); "
        "every(steps=10): 10 since step 60",
    )
    assert found[1][0] == "DEBUG" and found[1][1].startswith("rank 1: {")
    assert found[2] == ("INFO", "restored c-1 in 0 ms")


def test_the_line_of_a_small_save_of_one_rank_has_units_that_suit_it(caplog):
    """No rank is the slowest of one."""
    event = Event(COMMIT, 1.0, 0, 0.01, "c-1", 1, 3000, {"ranks": 1, "total_seconds": 0.12})
    with caplog.at_level(logging.INFO):
        say_line(replace(event, detail={**event.detail, "reasons": ["every call saves"]}))
        say_line(Event(RESTORE, 1.0, 0, 200.0, "c-1"))
    found = [record.getMessage() for record in caplog.records]
    assert found == [
        "saved c-1 at step 1: 2.9 KiB in 0.12 s, 24.4 KiB/s; every call saves",
        "restored c-1 in 3 min",
    ]


def test_the_line_is_said_of_no_other_rank_and_nothing_else(caplog):
    with caplog.at_level(logging.DEBUG):
        say_line(Event(RESTORE, 1.0, 1))
        say_line(Event(WRITE, 1.0, 0))
    assert not caplog.records


def test_the_chiefs_line_is_not_said_twice(caplog):
    with caplog.at_level(logging.DEBUG):
        for event in (WHOLE, Event(WRITE, 1.0, 1)):
            Log()(event)
    assert [record.levelname for record in caplog.records] == ["DEBUG"]


def test_where_no_thread_is_to_be_had_the_phase_goes_on_and_it_is_told_later(monkeypatch):
    """An error here would keep a rank from its vote, and the others waiting."""
    told = []
    some = Events([told.append])

    def refuse(_):
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        some.tell(WRITE, step=1)
        assert some.wait(0)
    some.tell(WRITE, step=2)
    assert some.wait(20)
    assert [event.step for event in told] == [1, 2]
