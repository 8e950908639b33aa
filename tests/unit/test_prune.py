"""Pruning by hand: what the rules keep stays, and no job is disturbed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from unit_helpers import make_claimed, published_numbers, save

from distckpt import add_metrics, cli, pin, state
from distckpt.leases import Lease
from distckpt.policy import latest
from distckpt.record import PRUNE
from distckpt.remarks import Remarks
from distckpt.run_directory import RunDirectory


def run(*arguments):
    return CliRunner().invoke(cli.main, ["prune", *arguments], catch_exceptions=False)


@pytest.fixture
def five(run_dir):
    """Make a run directory with five checkpoints, its job gone."""
    chief = make_claimed(run_dir, keep=None)
    for number in range(1, 6):
        remarks = Remarks.of({"loss": abs(number - 2.2)}, None)
        save(chief, run_dir, number, step=10 * number, remarks=remarks)
    chief.close()
    return run_dir


KEEP = 'latest(1) | best(1, "loss", mode="min")'


def test_without_yes_nothing_is_changed(five):
    before = sorted(os.walk(five))
    result = run(five, "--keep", KEEP)
    assert result.exit_code == 0
    assert "Would drop 3 of 5" in result.stdout and "With --yes it is done" in result.stdout
    lines = {line.split()[0]: line for line in result.stdout.splitlines()}
    assert "latest(1)" in lines["ckpt-5"] and 'best(1, "loss"' in lines["ckpt-2"]
    assert all("would be dropped" in lines[f"ckpt-{n}"] for n in (1, 3, 4))
    assert sorted(os.walk(five)) == before


def test_with_yes_what_no_rule_keeps_is_gone_when_the_command_ends(five):
    result = run(five, "--keep", KEEP, "--yes")
    assert result.exit_code == 0
    assert "3 of 5 dropped" in result.stdout
    assert published_numbers(five) == [2, 5]
    record = state.read_head(RunDirectory.at(five)).record
    assert record.action == PRUNE
    assert [entry.attempt.number for entry in record.live] == [2, 5]


def test_a_job_goes_on_from_what_is_left(five):
    run(five, "--keep", KEEP, "--yes")
    chief = make_claimed(five, keep=latest(2))
    save(chief, five, 6)
    assert published_numbers(five) == [5, 6]


def test_json_says_what_is_kept_and_why(five):
    pin(os.path.join(five, "ckpt-1"))
    tree = json.loads(run(five, "--keep", "latest(1)", "--json").stdout)
    assert tree["dropped"] == ["ckpt-2", "ckpt-3", "ckpt-4"]
    assert tree["kept"] == {"ckpt-1": ["pinned"], "ckpt-5": ["latest(1)"]}
    assert not tree["done"] and published_numbers(five) == [1, 2, 3, 4, 5]
    tree = json.loads(run(five, "--keep", "latest(1)", "--json", "--yes").stdout)
    assert tree["done"] and tree["not_deleted_yet"] == 0
    assert published_numbers(five) == [1, 5]
    assert state.read_head(RunDirectory.at(five)).record.live[0].pinned


def test_the_newest_stays_whatever_the_rules_say(five):
    run(five, "--keep", 'best(1, "loss", mode="min")', "--yes")
    assert published_numbers(five) == [2, 5]


@pytest.mark.parametrize("more", [(), ("--yes",)])
def test_a_mistyped_metric_drops_nothing(five, more):
    """It would keep none but the newest."""
    result = run(five, "--keep", 'best(2, "lss", mode="min")', *more)
    assert result.exit_code == 2
    assert "no checkpoint has that metric" in result.stderr
    assert "did you mean 'loss'? Metrics that there are: loss." in result.stderr
    assert published_numbers(five) == [1, 2, 3, 4, 5]


def test_a_metric_that_the_next_commit_takes_up_is_known(five):
    add_metrics(f"{five}/ckpt-3", {"acc": 0.5})
    result = run(five, "--keep", 'best("acc", mode="max")')
    assert (result.exit_code, "Would drop 3 of 5" in result.stdout) == (0, True)


def test_the_rules_of_the_last_job_are_taken_if_none_are_given(five):
    assert run(five).exit_code == 2
    assert "--keep" in run(five).stderr
    chief = make_claimed(five, keep=latest(4))
    save(chief, five, 6)
    chief.close()
    result = run(five)
    assert result.exit_code == 0 and "latest(4)" in result.stdout


def test_a_number_of_the_last_job_is_no_rule_to_prune_by(five):
    """It would drop what it has preserved."""
    chief = make_claimed(five, keep=2)
    save(chief, five, 6)
    chief.close()
    result = run(five, "--yes")
    assert result.exit_code == 2
    assert "had max_to_keep=2, no rules" in result.stderr and "--keep" in result.stderr
    assert run(five, "--keep", "latest(1)").exit_code == 0


@pytest.mark.parametrize("rules", ["", "3", "latest(0)", "print(1)", "latest(1) |"])
def test_what_is_no_rule_is_wrong_usage(five, rules):
    result = run(five, "--keep", rules, "--yes")
    assert result.exit_code == 2 and published_numbers(five) == [1, 2, 3, 4, 5]


def test_directory_of_a_live_job_is_refused(five):
    code = (
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from unit_helpers import make_claimed\n"
        "chief = make_claimed(sys.argv[1], keep=None)\n"
        "print('claimed', flush=True); sys.stdin.read()\n"
    )
    job = subprocess.Popen(
        [sys.executable, "-c", code, five, os.path.dirname(__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with job:
        assert job.stdout.readline() == "claimed\n"
        epoch = state.read_head(RunDirectory.at(five)).record.epoch
        result = run(five, "--keep", "latest(1)", "--yes")
        assert result.exit_code == 3
        assert "in use by a job; end that job before pruning" in result.stderr
        assert state.read_head(RunDirectory.at(five)).record.epoch == epoch
        assert published_numbers(five) == [1, 2, 3, 4, 5]
        job.stdin.close()


def test_the_job_of_this_very_allocation_is_not_taken_for_ones_own(five, monkeypatch):
    """In a Slurm allocation the command has the job's id: a restart would fence it."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    test_directory_of_a_live_job_is_refused(five)


def test_what_somebody_reads_is_dropped_and_deleted_later(five):
    lease = Lease(
        RunDirectory.at(five),
        state.read_head(RunDirectory.at(five)).record.live[0].attempt,
        60.0,
    )
    result = run(five, "--keep", "latest(1)", "--yes")
    assert "1 are still read by somebody" in result.stdout
    assert published_numbers(five) == [1, 5]
    lease.release()
    make_claimed(five, keep=None)
    assert published_numbers(five) == [5]


def test_where_nothing_is_there_is_nothing_to_prune(run_dir, tmp_path):
    assert run(str(tmp_path), "--keep", "latest(1)").exit_code == 3
    assert run(str(tmp_path / "nowhere"), "--keep", "latest(1)").exit_code == 3
