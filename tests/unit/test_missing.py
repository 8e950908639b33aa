"""Checkpoints that somebody has removed or moved: they count for no rule, and come back."""

from __future__ import annotations

import json
import logging
import os
import shutil
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner

from distckpt import (
    Checkpoint,
    CheckpointManager,
    RestoreFailed,
    RestoreOptions,
    StorageError,
    best,
    latest,
    latest_checkpoint,
    readers,
    state,
)
from distckpt.chief import Chief
from distckpt.cli import main
from distckpt.record import Entry, Record
from distckpt.run_directory import RunDirectory
from distckpt.stamp import MISSING, Stamp
from distckpt.storage import posix
from distckpt.storage.store import Room


class Run:
    """A run directory and the jobs in it."""

    def __init__(self, directory):
        self.directory = directory
        self.x = torch.zeros(4)

    def job(self, max_to_keep=2, **more):
        return CheckpointManager(Checkpoint(x=self.x), self.directory, max_to_keep, **more)

    def save(self, manager, *values, **more):
        for value in values:
            self.x.fill_(value)
            manager.save(**more)

    def path(self, prefix):
        return str(readers.locate(os.path.join(self.directory, prefix)).directory)

    def there(self):
        names = os.listdir(self.directory)
        return sorted(name.split(".")[0] for name in names if name.startswith("ckpt"))

    @property
    def record(self):
        return state.read_head(RunDirectory.at(self.directory)).record


@pytest.fixture
def run(run_dir):
    return Run(run_dir)


def _names(manager):
    return [os.path.basename(path) for path in manager.checkpoints]


def test_newest_that_was_removed_does_not_count_at_the_restart(run):
    """Else the next save would delete the one that was restored."""
    with run.job() as manager:
        run.save(manager, 1, 2, 3)
    shutil.rmtree(run.path("ckpt-3"))
    with run.job() as manager:
        assert manager.restore_or_initialize().endswith("ckpt-2")
        assert _names(manager) == ["ckpt-2"]
        run.save(manager, 4)
        # Its number stays its own: it may come back.
        assert _names(manager) == ["ckpt-2", "ckpt-4"] == run.there()
    (gone,) = run.record.missing
    assert gone.attempt.prefix == "ckpt-3" and not gone.was_kept
    assert run.record.stamp.needs == (MISSING,)


def test_oldest_that_was_removed_in_a_live_job_does_not_count(run):
    """Looked at before a deletion: nothing that is there is deleted for what is gone."""
    with run.job() as manager:
        run.save(manager, 1, 2)
        shutil.rmtree(run.path("ckpt-2"))
        run.save(manager, 3)
        manager.sync()
        assert _names(manager) == ["ckpt-1", "ckpt-3"] == run.there()


def test_best_that_was_removed_is_the_best_no_more(run):
    """The best that is there is kept, not one that nobody can restore."""
    rule = latest(1) | best(1, "loss", mode="min")
    with run.job(rule) as manager:
        for value, loss in [(1, 0.1), (2, 0.2), (3, 0.9), (4, 0.8)]:
            run.save(manager, value, metrics={"loss": loss})
        assert _names(manager) == ["ckpt-1", "ckpt-4"]
        shutil.rmtree(run.path("ckpt-1"))
        run.save(manager, 5, metrics={"loss": 0.95})
        manager.sync()
        assert _names(manager) == ["ckpt-4", "ckpt-5"] == run.there()
        assert manager.restore("best").endswith("ckpt-4")


@pytest.mark.parametrize("when", ["restart", "live"])
def test_what_is_there_again_is_taken_back(run, tmp_path, when, caplog):
    """A disk that was not mounted; and then the rules see it again."""
    with run.job(3) as manager:
        run.save(manager, 1, 2, 3)
        path = run.path("ckpt-3")
        shutil.move(path, tmp_path / "aside")
        run.save(manager, 4)
        assert _names(manager) == ["ckpt-1", "ckpt-2", "ckpt-4"]
        if when == "live":
            shutil.move(tmp_path / "aside", path)
            run.save(manager, 5)
    if when == "restart":
        shutil.move(tmp_path / "aside", path)
        with run.job(3) as manager:
            manager.restore_or_initialize()
            assert _names(manager) == ["ckpt-1", "ckpt-2", "ckpt-3", "ckpt-4"]
            run.save(manager, 5)
    assert _names(manager) == ["ckpt-3", "ckpt-4", "ckpt-5"] == run.there()
    assert run.record.missing == ()
    texts = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert len(texts) == 2
    assert "ckpt-3 is gone from" in texts[0] and texts[1].endswith(" again")


def test_preserved_one_comes_back_to_its_list(run, tmp_path, monkeypatch):
    """What keep_checkpoint_every_n_hours has kept is never deleted by coming back."""
    with run.job(1, keep_checkpoint_every_n_hours=1e-9) as manager:
        run.save(manager, 1, 2, 3)
    assert [e.attempt.prefix for e in run.record.kept] == ["ckpt-1", "ckpt-2"]
    path = run.path("ckpt-1")
    shutil.move(path, tmp_path / "aside")
    with run.job(1) as manager:
        manager.restore_or_initialize()
        run.save(manager, 4)
    assert run.record.missing[0].was_kept
    shutil.move(tmp_path / "aside", path)
    with run.job(1) as manager:
        manager.restore_or_initialize()
        run.save(manager, 5, 6)
    assert [e.attempt.prefix for e in run.record.kept] == ["ckpt-2", "ckpt-1"]
    assert run.there() == ["ckpt-1", "ckpt-2", "ckpt-6"]


def test_reappearing_one_is_not_swept_by_the_claim(run, tmp_path):
    """It is in no list but that of the missing, and no left-over of a dead job."""
    with run.job(3) as manager:
        run.save(manager, 1, 2)
        path = run.path("ckpt-1")
        shutil.move(path, tmp_path / "aside")
        run.save(manager, 3, 4, 5)
    shutil.move(tmp_path / "aside", path)
    with run.job(None) as manager:
        manager.restore_or_initialize()
        manager.sync()
        assert os.path.isdir(path)


@pytest.mark.parametrize("first", ["save", "restore"])
def test_all_gone_is_an_error_and_no_fresh_start(run, first):
    """Whatever the job begins with."""
    with run.job() as manager:
        run.save(manager, 1, 2)
    for prefix in ("ckpt-1", "ckpt-2"):
        shutil.rmtree(run.path(prefix))
    before = run.record
    with pytest.raises(StorageError, match=r"all checkpoints .* gone \(ckpt-1, ckpt-2\)"):
        with run.job() as manager:
            manager.save() if first == "save" else manager.restore_or_initialize()
    assert run.record == before


def test_listing_without_the_records_is_not_believed(run, monkeypatch):
    """Half of a listing, or that of another directory, takes nothing out of the lists."""
    with run.job() as manager:
        run.save(manager, 1, 2)
        real = posix.list_directory

        def listing(path):
            return [] if path == run.directory else real(path)

        monkeypatch.setattr(posix, "list_directory", listing)
        run.save(manager, 3)
        assert _names(manager) == ["ckpt-2", "ckpt-3"]
    assert run.record.missing == ()


def test_old_listing_is_not_believed_where_the_name_is_there(run, monkeypatch):
    """As of a network filesystem that remembers listings."""
    with run.job() as manager:
        run.save(manager, 1, 2)
        real = posix.list_directory

        def listing(path):
            return [n for n in real(path) if path != run.directory or "ckpt" not in n]

        monkeypatch.setattr(posix, "list_directory", listing)
        run.save(manager, 3)
        assert _names(manager) == ["ckpt-2", "ckpt-3"]
    assert run.record.missing == ()


def test_one_that_goes_during_a_restore_is_named_as_gone(run, monkeypatch, caplog):
    """After the fallback, which says why."""
    with run.job(3) as manager:
        run.save(manager, 1, 2, 3)
    path = run.path("ckpt-3")
    with run.job(3) as manager:
        looked = []
        real = Chief.look_for_missing

        def look(self):
            looked.append(self)
            return len(looked) > 1 and real(self)  # gone since the claim has looked

        monkeypatch.setattr(Chief, "look_for_missing", look)
        shutil.rmtree(path)
        assert manager.restore_or_initialize().endswith("ckpt-2")
        assert "ckpt-3 is gone" in caplog.text
        assert _names(manager) == ["ckpt-1", "ckpt-2"]


def test_one_that_cannot_be_read_counts_for_no_rule_of_this_job(run):
    """Its manifest is lost: what was restored instead is not deleted for it."""
    with run.job() as manager:
        run.save(manager, 1, 2, 3)
    os.remove(os.path.join(run.path("ckpt-3"), "manifest.json"))
    with run.job() as manager:
        assert manager.restore_or_initialize().endswith("ckpt-2")
        run.save(manager, 4)
        assert _names(manager) == ["ckpt-2", "ckpt-3", "ckpt-4"]
        run.save(manager, 5)
        manager.sync()
        assert _names(manager) == ["ckpt-3", "ckpt-4", "ckpt-5"] == run.there()


def test_list_and_doctor_name_what_is_missing(run):
    """Before a job has noticed it, and after."""
    with run.job(3) as manager:
        run.save(manager, 1, 2, 3)
    shutil.rmtree(run.path("ckpt-2"))
    for noticed in (False, True):
        if noticed:
            with run.job(3) as manager:
                manager.restore_or_initialize()
                run.save(manager, 4)
        result = CliRunner().invoke(main, ["list", run.directory, "--json"])
        listed = json.loads(result.output)["checkpoints"]
        states = {os.path.basename(each["path"]): each["state"] for each in listed}
        assert states["ckpt-2"] == "missing" and states["ckpt-3"] == "live"
        result = CliRunner().invoke(main, ["doctor", run.directory])
        assert "ckpt-2" in result.output and "is not there" in result.output


def test_link_in_the_place_of_a_checkpoint_stops_the_restore(run, tmp_path):
    """Going back to an older one loses work, so that is for the user to say."""
    with run.job(3) as manager:
        run.save(manager, 1, 2)
    path, target = run.path("ckpt-2"), tmp_path / "moved"
    shutil.move(path, target)
    os.symlink(target, path)
    with run.job(3) as manager:
        with pytest.raises(RestoreFailed, match=r"symbolic link to .*/moved") as caught:
            manager.restore_or_initialize()
        assert "Checkpoint.restore(" in str(caught.value)
        assert "skip_links=True" in str(caught.value)
        options = RestoreOptions(skip_links=True)
        assert manager.restore_or_initialize(options).endswith("ckpt-1")
        run.save(manager, 3)
        assert manager.latest_checkpoint.endswith("ckpt-3")
    assert os.path.islink(path)
    Checkpoint(x=run.x).restore(target)
    assert run.x.tolist() == [2.0] * 4


def test_record_with_missing_entries_keeps_what_it_says():
    """The field is there only where the feature is used, and then stays."""
    attempt = readers.paths.Attempt("ckpt", 3, 1, "0" * 8)
    entry = Entry(attempt, 1, 5.0, None, "0" * 32, was_kept=True)
    plain = Record(
        number=2,
        previous="0" * 32,
        chain="0" * 16,
        epoch=1,
        writer="0" * 16,
        run="job",
        restart=0,
        action="commit",
        written=5.0,
        last_preserved=1.0,
    )
    assert b"missing" not in plain.encode()
    record = replace(plain, missing=(entry,), stamp=Stamp().needing(MISSING))
    assert Record.decode(record.encode()) == record
    empty = replace(record, missing=())
    assert Record.decode(empty.encode()) == empty and b'"missing": []' in empty.encode()
    with pytest.raises(Exception, match="feature"):
        replace(plain, missing=(entry,))


def test_latest_checkpoint_of_a_reader_stays_tensorflows(run, caplog):
    """None, and an error in the log."""
    with run.job() as manager:
        run.save(manager, 1)
    shutil.rmtree(run.path("ckpt-1"))
    assert latest_checkpoint(run.directory) is None
    assert "files are gone" in caplog.text


@pytest.fixture
def free(monkeypatch):
    """Set the free space that the filesystem tells of."""
    told = [10**12]
    monkeypatch.setattr(posix, "room", lambda path: Room(told[0], None))
    return told


def test_little_room_is_told_at_the_first_save_and_when_made(run, free, caplog):
    """Retention deletes after a commit: N + 1 must fit."""
    run.x = torch.zeros(2**18)
    free[0] = 5 * 2**19
    with run.job(3) as manager:
        assert "room for" not in caplog.text
        run.save(manager, 1, 2)
    texts = [r.getMessage() for r in caplog.records if "room for" in r.getMessage()]
    assert len(texts) == 1
    assert "room for 2 more checkpoints of this size (1.0 MiB each" in texts[0]
    assert "max_to_keep=3 needs 3 more" in texts[0]
    caplog.clear()
    free[0] = 2**19
    with run.job(latest(2) | best(1, "loss", mode="min")):
        assert "room for 0 more" in caplog.text
        assert 'latest(2) | best(1, "loss", mode="min") needs 2 more' in caplog.text


def test_enough_room_is_not_worth_a_word(run, free, caplog):
    """As nearly always."""
    with run.job(3) as manager:
        run.save(manager, 1, 2, 3, 4)
    with run.job(None) as manager:
        manager.restore_or_initialize()
        run.save(manager, 5)
    assert "room for" not in caplog.text
