"""``distckpt watch``: what happens in a run directory, as it happens."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner
from unit_helpers import make_claimed, make_record, make_saved, record_path, save

from distckpt import cli, state, watching
from distckpt.policy import best, latest
from distckpt.prune import prune
from distckpt.remarks import Remarks
from distckpt.run_directory import RunDirectory
from distckpt.watching import Watcher

WAIT_SECONDS = 20


def run(*arguments):
    """Run the command in this process."""
    return CliRunner().invoke(cli.main, ["watch", *arguments], catch_exceptions=False)


def told(watcher):
    """Look, and return the kinds of what has happened, with what it is about."""
    return [
        (event.kind, event.entry.attempt.prefix if event.entry else "")
        for event in watcher.look()
    ]


@pytest.fixture
def chief(run_dir):
    chief = make_claimed(run_dir, keep=2)
    yield chief
    chief.close()


# What is told


def test_first_look_tells_how_things_stand(run_dir, chief):
    """Whose it is, and the last commits, oldest first."""
    for number in (1, 2, 3):
        save(chief, run_dir, number)
    watcher = Watcher(RunDirectory.at(run_dir), 10)
    assert told(watcher) == [("begin", ""), ("commit", "ckpt-2"), ("commit", "ckpt-3")]
    assert told(watcher) == []
    assert told(Watcher(RunDirectory.at(run_dir), 1)) == [
        ("begin", ""),
        ("commit", "ckpt-3"),
    ]
    assert told(Watcher(RunDirectory.at(run_dir), 0)) == [("begin", "")]


def test_commits_and_deletions_are_told_once_and_in_order(run_dir, chief):
    """Also several between two looks, and what was deleted again meanwhile."""
    watcher = Watcher(RunDirectory.at(run_dir), 10)
    assert told(watcher) == [("begin", "")]
    save(chief, run_dir, 1)
    assert told(watcher) == [("commit", "ckpt-1")]
    for number in (2, 3, 4):
        save(chief, run_dir, number)
    assert told(watcher) == [
        ("commit", "ckpt-2"),
        ("commit", "ckpt-3"),
        ("deletion", "ckpt-1"),
        ("commit", "ckpt-4"),
        ("deletion", "ckpt-2"),
    ]
    assert told(watcher) == []


def test_look_that_finds_nothing_new_reads_no_record(run_dir, chief, monkeypatch):
    """It asks for two names."""
    watcher = Watcher(RunDirectory.at(run_dir), 10)
    watcher.look()

    def fail(*_):
        raise AssertionError

    monkeypatch.setattr(state, "read_head", fail)
    assert told(watcher) == []


def test_replaced_checkpoint_is_a_commit_and_a_deletion(run_dir, chief):
    save(chief, run_dir, 1)
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    watcher.look()
    save(chief, run_dir, 1)
    assert told(watcher) == [("commit", "ckpt-1"), ("deletion", "ckpt-1")]


def test_checkpoint_that_is_found_bad_is_told(run_dir, chief):
    save(chief, run_dir, 1)
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    watcher.look()
    chief.confirm_bad(chief.candidates[0])
    save(chief, run_dir, 2)
    assert told(watcher) == [("commit", "ckpt-2"), ("bad", "ckpt-1")]


def test_checkpoint_that_is_preserved_is_told(run_dir, clock):
    """It leaves the managed ones, and stays."""
    chief = make_claimed(run_dir, keep=1, hours=1.0)
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    watcher.look()
    for number in (1, 2):
        clock.now += 7200
        save(chief, run_dir, number)
    assert told(watcher) == [
        ("commit", "ckpt-1"),
        ("commit", "ckpt-2"),
        ("kept", "ckpt-1"),
    ]


def test_claims_tell_a_restart_from_another_job(run_dir, chief):
    """By whom, which restart, and which epoch."""
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    assert watcher.look()[0].text == "job 'unit', epoch 1: 0 checkpoints"
    make_claimed(run_dir, restart=1).close()
    (event,) = watcher.look()
    assert (event.kind, event.text) == ("claim", "job 'unit' (restart 1), epoch 2")
    chief.close()
    make_claimed(run_dir, run="other").close()
    (event,) = watcher.look()
    assert event.text == "job 'other' takes over from job 'unit' (restart 1), epoch 3"


def test_records_that_were_pruned_unseen_are_a_gap(run_dir, chief):
    """What became of it all is told from the newest, which has everything."""
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    watcher.look()
    for number in (1, 2, 3):
        save(chief, run_dir, number)
    for number in (1, 2, 3):
        os.unlink(record_path(run_dir, number))
    events = watcher.look()
    assert [event.kind for event in events] == ["gap", "commit", "commit", "deletion"]
    assert events[0].text.startswith("2 records ")


def test_directory_that_is_made_anew_is_told(run_dir, chief):
    """The numbers start again; so does the watching."""
    save(chief, run_dir, 1)
    watcher = Watcher(RunDirectory.at(run_dir), 5)
    watcher.look()
    chief.close()
    shutil.rmtree(run_dir)
    assert told(watcher) == [("other records", "")]
    assert told(watcher) == [("waiting", "")]
    make_saved(run_dir, 7)
    assert told(watcher) == [("begin", ""), ("commit", "ckpt-7")]
    shutil.rmtree(run_dir)
    make_claimed(run_dir).close()
    make_claimed(run_dir).close()
    make_saved(run_dir, 8)
    assert told(watcher) == [("other records", ""), ("begin", ""), ("commit", "ckpt-8")]


def test_repair_by_hand_is_told(run_dir, chief):
    save(chief, run_dir, 1)
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    watcher.look()
    newest = state.read_head(RunDirectory.at(run_dir))
    repaired = make_record(
        newest.record.number + 1,
        previous=newest.digest,
        chain=newest.record.chain,
        action="repair",
        live=newest.record.live,
        last_preserved=1.0,
        rules=newest.record.rules,
    )
    state.append(RunDirectory.at(run_dir), repaired)
    assert told(watcher) == [("repair", "")]


def test_pruning_by_hand_is_told(run_dir, chief):
    for number in (1, 2):
        save(chief, run_dir, number)
    chief.close()
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    watcher.look()
    [*prune(RunDirectory.at(run_dir), latest(1))[1]]
    assert [kind for kind, _ in told(watcher)] == ["claim", "prune", "deletion"]


# Waiting


def test_directory_need_not_be_there_yet(run_dir):
    """What it waits for is said once."""
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    (event,) = watcher.look()
    assert (event.kind, event.text) == ("waiting", "the directory is not there")
    assert watcher.look() == []
    chief = make_claimed(run_dir)
    assert told(watcher) == [("begin", "")]
    chief.close()


def test_directory_that_cannot_be_read_is_said_once_and_tried_again(run_dir, chief):
    """As when a network filesystem is away for a while."""
    save(chief, run_dir, 1)
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    watcher.look()
    records = os.path.join(run_dir, ".state")
    os.rename(records, records + "-away")
    with open(records, "w"):
        pass
    assert [told(watcher), told(watcher)] == [[("unreadable", "")], []]
    os.unlink(records)
    os.rename(records + "-away", records)
    save(chief, run_dir, 2)
    assert told(watcher) == [("commit", "ckpt-2")]


def make_paced(run_dir, clock, seconds, behind):
    """Make a directory with a commit every so many seconds, the last one so long ago."""
    chief = make_claimed(run_dir, keep=None)
    for number in (1, 2, 3, 4):
        clock.now += seconds
        save(chief, run_dir, number)
    clock.now += behind
    return chief


def test_stale_directory_is_told_once_until_the_next_commit(run_dir, clock):
    """With the usual interval."""
    chief = make_paced(run_dir, clock, 600, behind=1900)
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    watcher.look()
    (event,) = watcher.look()
    assert event.kind == "stale"
    assert event.text == "no commit for 32 min; usually it takes 10 min"
    assert watcher.look() == []
    clock.now += 600
    save(chief, run_dir, 5)
    assert told(watcher) == [("commit", "ckpt-5")]
    assert watcher.look() == []


def test_directory_at_its_usual_pace_is_not_stale(run_dir, clock):
    make_paced(run_dir, clock, 600, behind=1700)
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    assert told(watcher) == [("begin", "")]
    assert told(watcher) == []


@pytest.mark.parametrize(("behind", "is_late"), [(9.5, False), (10.5, True)])
def test_pause_of_seconds_is_no_news_however_fast_the_commits(
    run_dir, clock, behind, is_late
):
    """Three times some milliseconds pass between any two looks."""
    make_paced(run_dir, clock, 0.01, behind)
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    assert told(watcher) == [("begin", "")]
    assert [kind for kind, _ in told(watcher)] == ["stale"] * is_late


def test_what_was_deleted_meanwhile_does_not_lengthen_the_usual_interval(run_dir, clock):
    """The numbers of the records say how many commits there were."""
    chief = make_claimed(run_dir, keep=best(2, "loss", mode="min"))
    for number in range(12):
        clock.now += 100
        loss = 0.0 if number in (0, 11) else 1.0
        save(chief, run_dir, number, remarks=Remarks.of({"loss": loss}, None))
    clock.now += 400
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    watcher.look()
    (event,) = watcher.look()
    assert event.text == "no commit for 7 min; usually it takes 100 s"


def test_first_commits_are_never_late(run_dir, clock):
    """There is no usual interval yet."""
    chief = make_claimed(run_dir)
    save(chief, run_dir, 1)
    clock.now += 1e6
    watcher = Watcher(RunDirectory.at(run_dir), 0)
    assert [told(watcher), told(watcher)] == [[("begin", "")], []]
    chief.close()


# The command


def test_once_says_how_things_stand_and_leaves(run_dir):
    """Time, step, size, metrics, and what keeps it."""
    chief = make_claimed(run_dir, keep=latest(1) | best(1, "loss", mode="min"))
    save(chief, run_dir, 1, step=10, remarks=Remarks.of({"loss": 0.5}, None))
    chief.close()
    done = run(run_dir, "--once")
    lines = done.stdout.splitlines()
    assert done.exit_code == 0
    assert lines[0].split(maxsplit=3)[2:] == ["begin", "job 'unit', epoch 1: 1 checkpoint"]
    assert lines[1].split(maxsplit=3)[2:] == [
        "commit",
        'ckpt-1  step 10  392.0 KiB  loss 0.5  kept by latest(1), best(1, "loss", '
        'mode="min")',
    ]


def test_json_has_a_line_for_each_event(run_dir):
    saved = make_saved(run_dir, 3, step=30)
    begin, commit = map(json.loads, run(run_dir, "--once", "--json").stdout.splitlines())
    assert (begin["event"], begin["run"], begin["epoch"]) == ("begin", "unit", 1)
    assert commit["event"] == "commit" and commit["path"] == saved.prefix
    assert (commit["step"], commit["metrics"]) == (30, {})
    assert commit["kept_by"] == ["max_to_keep=3"]


def test_once_of_a_missing_directory_exits_with_3(run_dir):
    """A script must not take that for a run without checkpoints."""
    done = run(run_dir, "--once")
    assert (done.exit_code, done.stdout) == (3, "")


def test_checkpoint_in_place_of_a_directory_is_refused(run_dir):
    saved = make_saved(run_dir)
    for path in (saved.prefix, saved.published):
        done = run(path)
        assert done.exit_code == 3 and f"give {run_dir}." in done.stderr


def test_corrupt_records_exit_with_3(run_dir):
    make_saved(run_dir)
    with open(record_path(run_dir, 2), "w"):
        pass
    done = run(run_dir)
    assert done.exit_code == 3 and "00002.json" in done.stderr


def test_timeout_ends_it_with_0(run_dir):
    started = time.monotonic()
    assert run(run_dir, "--timeout", "0.3", "--every", "0.1").exit_code == 0
    assert 0.3 <= time.monotonic() - started < 5


@pytest.fixture
def watch():
    """Return what starts the command as a process."""
    processes = []

    def start(*arguments):
        code = "from distckpt.cli import main; main()"
        command = [sys.executable, "-u", "-c", code, "watch", *arguments, "--every", "0.1"]
        pipe = subprocess.PIPE
        process = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True)
        processes.append(process)
        return process

    yield start
    for process in processes:
        process.kill()
        process.communicate()


def test_process_follows_a_run_until_it_is_interrupted(run_dir, watch):
    """From before there is a directory; Ctrl-C is no error."""
    process = watch(run_dir)
    assert "waiting" in process.stdout.readline()
    chief = make_claimed(run_dir)
    assert "begin" in process.stdout.readline()
    save(chief, run_dir, 1, step=5)
    assert "commit         ckpt-1  step 5" in process.stdout.readline()
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=WAIT_SECONDS) == ("", "")
    assert process.returncode == 0
    chief.close()


def test_process_ends_when_nobody_reads_any_more(run_dir, watch):
    """At once, though it has nothing to say; and without a complaint."""
    make_saved(run_dir)
    process = watch(run_dir)
    process.stdout.readline()
    process.stdout.readline()
    process.stdout.close()
    assert process.wait(WAIT_SECONDS) == 0
    assert process.stderr.read() == ""


def test_all_that_can_happen_fits_its_column():
    kinds = [value for name, value in vars(watching).items() if name.isupper()]
    words = [kind for kind in kinds if isinstance(kind, str)]
    assert len(words) == 14 and max(map(len, words)) == len(watching.OTHER_RECORDS)
