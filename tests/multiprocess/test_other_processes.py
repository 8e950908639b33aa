"""Other processes beside a running job: they ask for saves, and read while it deletes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch
import torch.distributed as dist
from async_helpers import EAGER
from harness import run_ranks, values_of
from outcome_helpers import assert_all_whole, make_manager, train

from distckpt import (
    every,
    mailbox,
    on_request,
    on_signal,
    readers,
    request_save,
)
from distckpt.run_directory import RunDirectory

_SECONDS = 30.0
_RARELY = every(steps=1_000_000)


def _make(directory, when, max_to_keep=3):
    return make_manager(directory, max_to_keep, when, timeout_seconds=_SECONDS)


class _Asking:
    """Asks from a thread, as another process would; the loop ends when all know of it."""

    def __init__(self, directory, asks):
        self.answer = None
        self._directory = directory
        self._thread = threading.Thread(target=self._ask, daemon=True) if asks else None

    def _ask(self):
        self.answer = request_save(self._directory, timeout=_SECONDS)

    def begin(self):
        if self._thread is not None:
            self._thread.start()

    @property
    def goes_on(self):
        is_alive = self._thread is not None and self._thread.is_alive()
        flag = torch.tensor([int(is_alive)])
        dist.all_reduce(flag)
        return bool(flag)


def _save_on_request(rank, directory, when, options, trains):
    checkpoint, manager = _make(directory, when)
    asking = _Asking(directory, asks=rank == 1)
    with manager:
        manager.restore_or_initialize()
        train(checkpoint)
        first = manager.save()
        asking.begin()
        saved = []
        while asking.goes_on:
            if trains:
                train(checkpoint)
            path = manager.save(options=options)
            if path is not None:
                saved.append((path, int(checkpoint.step), manager.last_decision.reasons))
            time.sleep(0.002)
        step = int(checkpoint.step)
    return first, saved, asking.answer, step


@pytest.mark.parametrize(
    ("when", "options"),
    [
        pytest.param(_RARELY | on_request(), EAGER, id="behind", marks=pytest.mark.full),
        pytest.param(
            _RARELY | on_request() | on_signal("SIGTERM") | every(hours=1),
            None,
            id="beside-others",
        ),
        pytest.param(on_request(), None, id="alone"),
    ],
)
def test_job_saves_when_it_is_asked_and_says_when_it_is_committed(tmp_path, when, options):
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_save_on_request, 2, directory, when, options, True))
    (first, saved, nothing, step), (_, others, answer, _) = results
    assert saved == others and nothing is None
    if first is None:  # no other rule has it saved once at the beginning
        first = saved[0][0]
    assert len(saved) == 1
    ((path, at_step, reasons),) = saved
    assert answer == path and 1 < at_step <= step
    assert len(reasons) == 1 and "on_request(): asked for by process" in reasons[0]
    assert_all_whole(directory)
    assert mailbox.collect(RunDirectory.at(directory)) == ([], {})


def test_who_asks_when_all_is_saved_is_answered_with_what_there_is(tmp_path):
    directory = str(tmp_path / "run")
    when = _RARELY | on_request()
    results = values_of(run_ranks(_save_on_request, 2, directory, when, None, False))
    first, saved, answer, _ = results[1]
    assert saved == [] and answer == first


def test_without_the_rule_the_next_save_answers(tmp_path):
    directory = str(tmp_path / "run")
    results = values_of(run_ranks(_save_on_request, 2, directory, 10, None, True))
    _, saved, answer, _ = results[1]
    assert [step for _, step, _ in saved] == [11 + 10 * n for n in range(len(saved))]
    # The one that was begun after it; by the time the path is read there may be another.
    assert answer in [path for path, _, _ in saved]
    assert all(reasons[0].startswith("every(steps=10)") for _, _, reasons in saved)


# Reading beside a job that deletes as fast as it may

_READER = """
import json, sys, time
from distckpt import checkpoints_iterator, readers
from distckpt.errors import DistckptError
from distckpt.run_directory import RunDirectory
from distckpt.verify import verify_attempt

directory, lease = sys.argv[1], json.loads(sys.argv[2])
read, dropped, failed = 0, 0, []
for path in checkpoints_iterator(directory, timeout=30, lease_seconds=lease):
    time.sleep(0.1)
    try:
        located = readers.locate(path)
        report = verify_attempt(located.directory, located.manifest_digest)
        problems = report.problems
    except DistckptError as error:
        problems = [str(error)]
    record = readers.read_record(RunDirectory.at(directory))
    dropped += all(not path.endswith(e.attempt.prefix) for e in record.committed)
    read += 1
    failed += problems[:1]
    # What the reader with a lease holds is there for the other one, too, until it ends.
    if failed or (lease is not None and dropped >= 5):
        break
print(json.dumps([read, dropped, failed]))
"""


def _save_and_delete(rank, directory, options):
    checkpoint, manager = _make(directory, None, max_to_keep=1)
    stop = directory + "-stop"
    with manager:
        while True:
            train(checkpoint)
            manager.save(options=options)
            flag = torch.tensor([int(os.path.exists(stop))])
            dist.all_reduce(flag)
            if flag:
                return len(manager.checkpoints)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param(None, id="at-once"),
        pytest.param(EAGER, id="behind", marks=pytest.mark.full),
    ],
)
def test_what_is_read_is_whole_beside_a_job_that_deletes_at_once(tmp_path, options):
    """And without a lease it is not, so there is something to be shown."""
    directory = str(tmp_path / "run")
    readers_ = [
        subprocess.Popen(
            [sys.executable, "-c", _READER, directory, json.dumps(lease)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for lease in (60.0, None)
    ]

    def wait():
        told.extend(json.loads(reader.communicate(timeout=300)[0]) for reader in readers_)
        with open(directory + "-stop", "w", encoding="utf-8"):
            pass

    told = []
    waiting = threading.Thread(target=wait, daemon=True)
    waiting.start()
    values_of(run_ranks(_save_and_delete, 2, directory, options))
    waiting.join(300)
    (read, dropped, failed), (_, _, failed_without) = told
    assert failed == [] and dropped == 5 <= read
    assert failed_without
    # The last lease was given back, and the next claim deletes what it held.
    values_of(run_ranks(_save_once, 1, directory))
    published = [name for name in os.listdir(directory) if name.startswith("ckpt-")]
    assert len(published) == 1
    assert readers.latest_checkpoint(directory) is not None


def _save_once(rank, directory):
    checkpoint, manager = _make(directory, None, max_to_keep=1)
    with manager:
        manager.restore_or_initialize()
        train(checkpoint)
        manager.save()
