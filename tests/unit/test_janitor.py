"""Deletions run behind, one after the other, and one that fails ends no other."""

from __future__ import annotations

import logging
import os
import threading

import pytest
from unit_helpers import CHAIN, SETTLE_SECONDS, make_attempt

from distckpt import paths
from distckpt.errors import StorageError
from distckpt.janitor import Janitor
from distckpt.run_directory import RunDirectory
from distckpt.storage import posix

pytestmark = pytest.mark.alone


@pytest.fixture
def janitor(tmp_path):
    (tmp_path / ".state").mkdir()
    return Janitor(RunDirectory.at(str(tmp_path)))


def make_directory(tmp_path, name):
    (tmp_path / name).mkdir()
    (tmp_path / name / "file").write_bytes(b"x")


def wait(janitor):
    assert janitor.wait(SETTLE_SECONDS)


def test_release_deletes_a_published_attempt(tmp_path, janitor):
    """What a durable record released goes."""
    attempt = make_attempt(1)
    make_directory(tmp_path, attempt.published)
    janitor.release([attempt])
    wait(janitor)
    assert os.listdir(tmp_path) == [".state"]


def test_release_finishes_a_deletion_that_was_cut_short(tmp_path, janitor):
    """The last chief died while deleting."""
    attempt = make_attempt(1)
    make_directory(tmp_path, attempt.trash)
    janitor.release([attempt])
    wait(janitor)
    assert os.listdir(tmp_path) == [".state"]


def test_release_of_what_is_gone_already_counts_as_deleted(janitor):
    """Deleted by the last chief, confirmed by this one."""
    janitor.release([make_attempt(1)])
    wait(janitor)
    assert janitor.take_released() == {make_attempt(1)}


def test_take_released_gives_each_attempt_once(janitor):
    """Each is confirmed in one record."""
    janitor.release([make_attempt(1)])
    wait(janitor)
    janitor.take_released()
    assert janitor.take_released() == set()


def test_release_that_failed_does_not_count_as_deleted(tmp_path, janitor, monkeypatch):
    """It stays in the records until it is really gone."""
    make_directory(tmp_path, make_attempt(1).published)

    def rename(*_):
        raise StorageError("busy")

    monkeypatch.setattr(posix, "rename", rename)
    janitor.release([make_attempt(1)])
    wait(janitor)
    assert janitor.take_released() == set()


def test_release_that_failed_does_not_end_the_others(
    tmp_path, janitor, monkeypatch, caplog
):
    """One busy file does not fill the disk."""
    for number in (1, 2):
        make_directory(tmp_path, make_attempt(number).published)
    real = posix.rename

    def rename(source, target):
        if "ckpt-1." in source:
            raise StorageError("busy")
        real(source, target)

    monkeypatch.setattr(posix, "rename", rename)
    with caplog.at_level(logging.WARNING):
        janitor.release([make_attempt(1), make_attempt(2)])
        wait(janitor)
    assert janitor.take_released() == {make_attempt(2)}
    assert "busy" in caplog.text


def test_wait_with_too_little_time_says_so(janitor, monkeypatch):
    """A deletion that hangs does not hang the caller."""
    gate = threading.Event()
    monkeypatch.setattr(posix, "exists", lambda _: gate.wait() and False)
    janitor.release([make_attempt(1)])
    in_time = janitor.wait(0.05)
    gate.set()
    wait(janitor)
    assert not in_time


def test_idle_janitor_has_no_thread(janitor):
    """Nothing holds up the process's exit."""
    janitor.release([make_attempt(1)])
    wait(janitor)
    for thread in threading.enumerate():
        if thread.name == "distckpt-janitor":
            thread.join(SETTLE_SECONDS)
    assert all(t.name != "distckpt-janitor" for t in threading.enumerate())


def test_discarding_renames_and_syncs_before_it_deletes(tmp_path, monkeypatch):
    """After a power cut no torn attempt stands under a published name."""
    make_directory(tmp_path, make_attempt(1).published)
    log = []
    for name in ("rename", "sync_directory", "remove_tree"):
        real = getattr(posix, name)

        def call(*arguments, name=name, real=real):
            log.append(name)
            return real(*arguments)

        monkeypatch.setattr(posix, name, call)
    RunDirectory.at(str(tmp_path)).discard(make_attempt(1))
    assert log == ["rename", "sync_directory", "remove_tree"]


LOWER = make_attempt(5, epoch=2)


@pytest.mark.parametrize(
    "name",
    [LOWER.pending, LOWER.trash, make_attempt(epoch=0).pending],
)
def test_sweep_deletes_leftovers_of_lower_epochs(tmp_path, janitor, name):
    """What a dead chief left behind goes with the next claim."""
    make_directory(tmp_path, name)
    janitor.sweep(3, CHAIN, [])
    wait(janitor)
    assert os.listdir(tmp_path) == [".state"]


def test_sweep_deletes_probes_and_temporary_files_of_lower_epochs(tmp_path, janitor):
    """Files as well as directories."""
    probe = tmp_path / paths.probe_file(2, "0" * 16, 1)
    temporary = tmp_path / ".state" / paths.temporary_file(2)
    probe.touch()
    temporary.touch()
    janitor.sweep(3, CHAIN, [])
    wait(janitor)
    assert (probe.exists(), temporary.exists()) == (False, False)


@pytest.mark.parametrize(
    "name",
    [
        make_attempt(epoch=3).pending,
        make_attempt(epoch=4).pending,
        make_attempt(epoch=4).trash,
        make_attempt(epoch=3).published,
        LOWER.published,  # without a manifest nobody can tell whose it is
        paths.probe_file(3, "0" * 16, 0),
        "ckpt-5",
        "notes",
        ".git",
        ".ckpt-5.e2-0a0b0c0d.pending.bak",
        ".CKPT-5.E2-0a0b0c0d.pending",
        "backup.e1-0a0b0c0d",
    ],
)
def test_sweep_leaves_alone_what_is_not_ours(tmp_path, janitor, name):
    """Equal or higher epochs may belong to a chief that fenced us; others to people."""
    make_directory(tmp_path, name)
    janitor.sweep(3, CHAIN, [])
    wait(janitor)
    assert (tmp_path / name / "file").exists()


def test_sweep_leaves_a_record_writers_files_of_its_own_epoch(tmp_path, janitor):
    """They may be in use at this moment."""
    temporary = tmp_path / ".state" / paths.temporary_file(3)
    temporary.touch()
    janitor.sweep(3, CHAIN, [])
    wait(janitor)
    assert temporary.exists()


def test_sweep_of_a_link_leaves_what_it_points_to(tmp_path, janitor):
    """A link under a pending name leads nowhere."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "precious").touch()
    (tmp_path / LOWER.pending).symlink_to(outside)
    janitor.sweep(3, CHAIN, [])
    wait(janitor)
    assert (outside / "precious").exists()


def test_sweep_goes_on_after_one_that_cannot_be_deleted(tmp_path, janitor):
    """A link in the way does not keep the other leftovers."""
    (tmp_path / make_attempt(1, epoch=1).pending).symlink_to(tmp_path)
    make_directory(tmp_path, make_attempt(2, epoch=1).pending)
    janitor.sweep(3, CHAIN, [])
    wait(janitor)
    assert not (tmp_path / make_attempt(2, epoch=1).pending).exists()


def test_sweep_takes_an_attempt_out_of_its_writers_reach_first(
    tmp_path, janitor, monkeypatch
):
    """A stopped chief that wakes up in the sweep must not publish what is left of it."""
    attempt = make_attempt(1, epoch=1)
    make_directory(tmp_path, attempt.pending)
    remove_tree, woken = posix.remove_tree, []

    def publish_first(path):
        try:
            os.rename(tmp_path / attempt.pending, tmp_path / attempt.published)
        except FileNotFoundError as error:
            woken.append(error)
        remove_tree(path)

    monkeypatch.setattr(posix, "remove_tree", publish_first)
    janitor.sweep(2, CHAIN, [])
    wait(janitor)
    assert len(woken) == 1
    assert os.listdir(tmp_path) == [".state"]
