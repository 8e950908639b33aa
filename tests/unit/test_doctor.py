"""What is said of a run directory: its filesystem, its holder, what is left over."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
from unit_helpers import flip_bit, make_attempt, make_claimed, save

from distckpt import doctor, paths, pin, request_save, state
from distckpt.errors import StorageError
from distckpt.leases import Lease
from distckpt.run_directory import RunDirectory
from distckpt.storage import lock, posix, posix_findings

pytestmark = pytest.mark.alone


@pytest.fixture
def saved(run_dir):
    chief = make_claimed(run_dir, keep=2)
    for number in (1, 2, 3):
        save(chief, run_dir, number)
    chief.close()
    return run_dir


def findings_of(directory, **more):
    """Return verdict and text of everything, by what it is about."""
    found = {}
    for what, verdict, text in doctor.examine(RunDirectory.at(directory), **more):
        found.setdefault(what, []).append((verdict, text))
    return found


def one(directory, what, **more):
    ((verdict, text),) = findings_of(directory, **more)[what]
    return verdict, text


def test_healthy_directory_is_well_and_unchanged(saved):
    before = sorted(os.walk(saved))
    found = findings_of(saved)
    wrong = {
        what: said
        for what, said in found.items()
        if what != "filesystem" and any(verdict != doctor.OK for verdict, _ in said)
    }
    assert not wrong
    assert sorted(os.walk(saved)) == before
    for what in ("hard links", "exclusive creation", "locks", "direct writes", "clock"):
        assert what in found
    assert found["held by"] == [(doctor.OK, "nobody")]
    assert "2 live" in found["records"][0][1]


def test_filesystem_is_named(tmp_path, small_disk):
    assert one(small_disk("size=1m"), "filesystem")[1].startswith("tmpfs")
    assert one(small_disk("size=1m"), "filesystem")[0] == doctor.WARNING


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/data/run", ("ext4", "/dev/sdb", "/data")),
        ("/data", ("ext4", "/dev/sdb", "/data")),
        ("/database", ("xfs", "/dev/sda", "/")),
        ("/with blank/run", ("nfs4", "server:/export", "/with blank")),
        ("/hidden/run", ("tmpfs", "none", "/hidden")),
    ],
)
def test_mount_is_the_innermost_and_newest(path, expected):
    mounts = rb"""1 0 8:1 / / rw - xfs /dev/sda rw
2 1 8:2 / /data rw,noatime shared:3 - ext4 /dev/sdb rw
3 1 0:5 / /with\040blank rw - nfs4 server:/export rw
4 1 8:3 / /hidden rw - ext4 /dev/sdc rw
5 1 0:6 / /hidden rw - tmpfs none rw
"""
    assert posix_findings._mount_of(path, mounts) == expected


def test_read_only_writes_nothing(saved, monkeypatch):
    def fail(*_, **__):
        raise AssertionError("written")

    monkeypatch.setattr(posix.NewFile, "__init__", fail)
    found = findings_of(saved, tries=False)
    assert "records" in found and "hard links" not in found


def test_filesystem_without_hard_links_is_bad(saved, monkeypatch):
    def refuse(source, target):
        raise StorageError("link: Operation not permitted", operation="link")

    monkeypatch.setattr(posix, "link", refuse)
    verdict, text = one(saved, "hard links")
    assert verdict == doctor.BAD and "not permitted" in text
    assert not [name for name in os.listdir(saved) if "probe" in name]


def test_filesystem_that_creates_again_is_bad(saved, monkeypatch):
    real = posix.write_new_file

    def careless(path, data):
        if os.path.exists(path):
            return
        real(path, data)

    monkeypatch.setattr(posix, "write_new_file", careless)
    assert one(saved, "exclusive creation")[0] == doctor.BAD


def test_locks_that_keep_nobody_out_are_told(saved, monkeypatch):
    class NoLock:
        def __init__(self, *_, **__):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

    monkeypatch.setattr(lock, "FileLock", NoLock)
    assert lock.keeps_others_out(os.path.join(saved, "trial")) is False


def test_clock_that_is_off_is_told(saved, clock):
    verdict, text = one(saved, "clock")
    assert verdict == doctor.WARNING and "ahead" in text


def test_directory_that_cannot_be_written_says_so(small_disk):
    path = small_disk("size=1m")
    subprocess.run(["mount", "-o", "remount,ro", path], check=True)
    verdict, text = one(path, "exclusive creation")
    assert verdict == doctor.BAD and "Read-only" in text


def test_full_disk_is_told(small_disk):
    assert one(small_disk("size=1m"), "free space")[0] == doctor.WARNING
    assert one(small_disk("size=1m,nr_inodes=20"), "free inodes")[0] == doctor.WARNING


def test_directory_that_everybody_may_write_is_told(saved):
    os.chmod(saved, 0o777)
    verdict, text = one(saved, "permissions")
    assert verdict == doctor.WARNING and "chmod o-w" in text
    os.chmod(saved, 0o1777)
    assert one(saved, "permissions")[0] == doctor.OK


def test_holder_is_named(saved):
    """The lock is another process's."""
    code = (
        "import sys, filelock\n"
        "lock = filelock.FileLock(sys.argv[1])\n"
        "lock.acquire()\n"
        "print('held', flush=True)\n"
        "sys.stdin.read()\n"
    )
    path = os.path.join(saved, paths.LOCK_FILE)
    holder = subprocess.Popen(
        [sys.executable, "-c", code, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "held\n"
    try:
        verdict, text = one(saved, "held by")
        assert verdict == doctor.OK and "job 'unit'" in text
    finally:
        holder.communicate("")


def test_damaged_records_are_bad_and_name_the_repair(saved):
    path = str(
        RunDirectory.at(saved).places.record(
            max(state.record_numbers(RunDirectory.at(saved)))
        )
    )
    flip_bit(path, 100)
    verdict, text = one(saved, "records")
    assert verdict == doctor.BAD and "distckpt repair" in text


def test_lost_records_are_bad(saved):
    os.unlink(
        str(
            RunDirectory.at(saved).places.record(
                max(state.record_numbers(RunDirectory.at(saved)))
            )
        )
    )
    verdict, text = one(saved, "records")
    assert verdict == doctor.BAD and "records are lost" in text


def test_state_file_that_is_behind_is_told(saved):
    os.unlink(os.path.join(saved, paths.STATE_FILE))
    assert one(saved, "state file")[0] == doctor.WARNING


def test_each_leftover_is_named_with_its_fate(saved, tmp_path):
    live = state.read_head(RunDirectory.at(saved)).record.live[0].attempt
    pending = make_attempt(8, epoch=0)
    lost = make_attempt(9, epoch=1)
    foreign = make_attempt(10, epoch=1)
    os.mkdir(os.path.join(saved, pending.pending))
    os.mkdir(os.path.join(saved, make_attempt(11, epoch=1).pending))
    os.mkdir(os.path.join(saved, foreign.published))
    shutil.copytree(
        os.path.join(saved, live.published), os.path.join(saved, lost.published)
    )
    records = os.path.join(saved, paths.RECORDS_DIRECTORY)
    posix.write_new_file(os.path.join(records, paths.temporary_file(0)), b"")
    posix.write_new_file(os.path.join(saved, paths.probe_file(0, "0" * 16, 1)), b"")
    texts = [text for _, text in findings_of(saved)["left over"]]
    said = dict(text.split(": ", 1) for text in texts if ": " in text)
    assert "died" in said[pending.pending]
    assert "under way" in said[make_attempt(11, epoch=1).pending]
    assert "next claim deletes" in said[lost.published]
    assert "nothing deletes" in said[foreign.published]
    assert len(texts) == 6


def test_directory_that_was_never_claimed_says_so(tmp_path):
    found = findings_of(str(tmp_path))
    assert "never claimed" in found["held by"][0][1]
    assert "no job has claimed" in found["records"][0][1]


def test_state_file_that_is_no_file_is_told(saved):
    path = os.path.join(saved, paths.STATE_FILE)
    os.unlink(path)
    os.mkfifo(path)
    assert one(saved, "state file")[0] == doctor.WARNING


def test_what_others_ask_for_and_read_is_told(saved):
    pin(os.path.join(saved, "ckpt-2"))
    request_save(saved)
    lease = Lease(
        RunDirectory.at(saved),
        state.read_head(RunDirectory.at(saved)).record.live[0].attempt,
        60.0,
    )
    found = findings_of(saved, tries=False)
    assert [text.partition(",")[0] for _, text in found["requests"]] == [
        "pin of ckpt-2",
        "save",
    ]
    ((verdict, text),) = found["lease"]
    assert verdict == doctor.OK and text.startswith("of ckpt-2, touched 0 s ago")
    lease.release()
    assert "lease" not in findings_of(saved, tries=False)


def test_requests_that_are_elsewhere_are_bad(saved, tmp_path):
    os.symlink(tmp_path, os.path.join(saved, paths.REQUESTS_DIRECTORY))
    assert one(saved, "requests", tries=False)[0] == doctor.BAD
