"""Records that are damaged or lost are rebuilt from the checkpoints."""

from __future__ import annotations

import os
import shutil

import pytest
from unit_helpers import (
    claim,
    flip_bit,
    make_chief,
    make_claimed,
    numbers,
    record_path,
    save,
    settle,
)

from distckpt import paths, record, repair, state
from distckpt.errors import (
    CorruptStateError,
    DirectoryInUseError,
    FencedError,
    StorageError,
    UnsafeCheckpointError,
)
from distckpt.identity import Identity
from distckpt.readers import latest_checkpoint, read_record
from distckpt.run_directory import RunDirectory
from distckpt.storage import posix

pytestmark = pytest.mark.alone

ME = Identity("by-hand", 0)


@pytest.fixture
def saved(run_dir):
    """Make a run directory with checkpoints 1 to 3, of which 1 is released."""
    chief = make_claimed(run_dir, keep=2)
    for number in (1, 2, 3):
        save(chief, run_dir, number, step=10 * number)
    chief.close()
    return run_dir


def plan_of(directory):
    return repair.plan_repair(RunDirectory.at(directory), ME)


def becomes(plan):
    """Return what becomes of each checkpoint, by its prefix."""
    return {
        paths.parse_published(verdict.name).prefix: verdict.becomes
        for verdict in plan.verdicts
    }


def newest_record(directory):
    return str(
        RunDirectory.at(directory).places.record(
            max(state.record_numbers(RunDirectory.at(directory)))
        )
    )


def damage(path):
    flip_bit(path, os.path.getsize(path) // 2)


def check_goes_on(directory, expected):
    """Check that a job can go on: the newest is there, and its saves and sweeps work."""
    head = state.read_head(RunDirectory.at(directory))
    assert head.record.action == record.REPAIR
    assert numbers(entry.attempt for entry in head.record.live) == expected
    chief = claim(make_chief(directory, keep=2))
    assert numbers(chief.checkpoints) == expected
    save(chief, directory, 9, step=90)
    assert numbers(chief.checkpoints) == [*expected, 9][-2:]
    assert latest_checkpoint(directory) == os.path.join(directory, "ckpt-9")
    chief.close()


def test_whole_records_need_no_repair(saved):
    plan = plan_of(saved)
    assert (plan.record, plan.damage, plan.verdicts) == (None, "", ())


def test_empty_directory_needs_no_repair(run_dir):
    os.mkdir(run_dir)
    assert plan_of(run_dir).record is None


def test_plan_writes_nothing(saved):
    damage(newest_record(saved))
    before = sorted(os.walk(saved))
    assert plan_of(saved).record is not None
    assert sorted(os.walk(saved)) == before


def test_damaged_newest_record_is_rebuilt_from_the_copy(saved):
    """The state file holds the very lists that were damaged."""
    damage(newest_record(saved))
    with pytest.raises(CorruptStateError, match="distckpt repair"):
        read_record(RunDirectory.at(saved))
    plan = plan_of(saved)
    assert "copy" in plan.basis
    assert becomes(plan) == {"ckpt-3": "live", "ckpt-2": "live"}
    repair.repair(plan)
    check_goes_on(saved, [2, 3])


def test_damaged_newest_record_and_copy_are_rebuilt_from_the_one_before(saved):
    """What only the damaged record named is found by its manifest."""
    damage(newest_record(saved))
    os.unlink(os.path.join(saved, paths.STATE_FILE))
    plan = plan_of(saved)
    assert becomes(plan) == {"ckpt-3": "live", "ckpt-2": "live"}
    repair.repair(plan)
    check_goes_on(saved, [2, 3])


@pytest.mark.parametrize("has_copy", [True, False])
def test_lost_records_are_rebuilt(saved, has_copy):
    shutil.rmtree(os.path.join(saved, paths.RECORDS_DIRECTORY))
    if not has_copy:
        os.unlink(os.path.join(saved, paths.STATE_FILE))
    with pytest.raises(CorruptStateError, match="distckpt repair"):
        read_record(RunDirectory.at(saved))
    repair.repair(plan_of(saved))
    check_goes_on(saved, [2, 3])


def test_steps_and_times_come_from_the_manifests(saved):
    before = {e.attempt: e for e in read_record(RunDirectory.at(saved)).live}
    shutil.rmtree(os.path.join(saved, paths.RECORDS_DIRECTORY))
    os.unlink(os.path.join(saved, paths.STATE_FILE))
    rebuilt = plan_of(saved).record
    for entry in rebuilt.live:
        old = before[entry.attempt]
        assert (entry.step, entry.manifest) == (old.step, old.manifest)
        assert abs(entry.time - old.time) < 5
    assert rebuilt.last_step == 30


def test_damaged_checkpoint_becomes_bad_and_stays(saved):
    newest = read_record(RunDirectory.at(saved)).live[-1].attempt
    damage(os.path.join(saved, newest.published, paths.shard_file(0, 2)))
    damage(newest_record(saved))
    plan = plan_of(saved)
    assert becomes(plan) == {"ckpt-3": "bad", "ckpt-2": "live"}
    assert "checksum" in plan.verdicts[0].why
    repair.repair(plan)
    check_goes_on(saved, [2])
    assert os.path.exists(os.path.join(saved, newest.published))


def test_checkpoint_without_a_readable_manifest_is_left_alone(saved):
    newest = read_record(RunDirectory.at(saved)).live[-1].attempt
    shutil.rmtree(os.path.join(saved, paths.RECORDS_DIRECTORY))
    os.unlink(os.path.join(saved, paths.STATE_FILE))
    damage(os.path.join(saved, newest.published, paths.MANIFEST_FILE))
    plan = plan_of(saved)
    assert becomes(plan) == {"ckpt-3": "left alone", "ckpt-2": "live"}
    repair.repair(plan)
    check_goes_on(saved, [2])
    assert os.path.exists(os.path.join(saved, newest.published)), "never deleted"


def test_checkpoint_of_another_directory_is_left_alone(saved, tmp_path):
    other = str(tmp_path / "other")
    chief = make_claimed(other)
    foreign = save(chief, other, 50)
    chief.close()
    shutil.copytree(
        os.path.join(other, foreign.published), os.path.join(saved, foreign.published)
    )
    damage(newest_record(saved))
    plan = plan_of(saved)
    assert becomes(plan)["ckpt-50"] == "left alone"
    repair.repair(plan)
    check_goes_on(saved, [2, 3])
    assert os.path.exists(os.path.join(saved, foreign.published))


def test_number_that_was_saved_again_means_the_newer_one(run_dir):
    chief = make_claimed(run_dir)
    first = save(chief, run_dir, 1, step=1)
    kept = os.path.join(os.path.dirname(run_dir), "kept")
    shutil.copytree(os.path.join(run_dir, first.published), kept)
    second = save(chief, run_dir, 1, step=2)
    chief.close()
    # Replaced, released, and not deleted yet.
    shutil.copytree(kept, os.path.join(run_dir, first.published))
    shutil.rmtree(os.path.join(run_dir, paths.RECORDS_DIRECTORY))
    os.unlink(os.path.join(run_dir, paths.STATE_FILE))
    plan = plan_of(run_dir)
    assert {v.name: v.becomes for v in plan.verdicts} == {
        second.published: "live",
        first.published: "releasing",
    }
    repair.repair(plan)
    settle(claim(make_chief(run_dir)))
    assert not os.path.exists(os.path.join(run_dir, first.published))
    assert os.path.exists(os.path.join(run_dir, second.published))


def test_kept_and_bad_stay_what_they_are(run_dir, clock):
    chief = make_claimed(run_dir, keep=1, hours=1.0)
    for number in (1, 2, 3):
        clock.now += 3600
        save(chief, run_dir, number)
    chief.confirm_bad(chief.candidates[0])
    clock.now += 3600
    save(chief, run_dir, 4)
    chief.close()
    before = read_record(RunDirectory.at(run_dir))
    assert before.kept and before.bad
    damage(newest_record(run_dir))
    rebuilt = plan_of(run_dir).record
    for name in ("live", "kept", "bad", "last_preserved"):
        assert getattr(rebuilt, name) == getattr(before, name), name


@pytest.mark.parametrize("lost", [False, True], ids=["damaged", "lost"])
def test_writer_from_before_the_repair_is_fenced(run_dir, lost):
    """One that was stopped and goes on must not commit beside the new record."""
    chief = make_claimed(run_dir, keep=2)
    save(chief, run_dir, 1)
    if lost:
        shutil.rmtree(os.path.join(run_dir, paths.RECORDS_DIRECTORY))
    else:
        damage(newest_record(run_dir))
    chief._lock.release()
    repair.repair(plan_of(run_dir))
    with pytest.raises(FencedError):
        chief.begin(2, 1)
    assert numbers(e.attempt for e in read_record(RunDirectory.at(run_dir)).live) == [1]


def test_directory_of_a_running_job_is_not_repaired(saved):
    from filelock import FileLock

    damage(newest_record(saved))
    plan = plan_of(saved)
    before = state.record_numbers(RunDirectory.at(saved))
    with FileLock(os.path.join(saved, paths.LOCK_FILE)):
        with pytest.raises(DirectoryInUseError, match="end that job"):
            repair.repair(plan)
    assert state.record_numbers(RunDirectory.at(saved)) == before


def test_plan_that_a_job_has_overtaken_changes_nothing(saved):
    """Two people, or a job that was restarted meanwhile."""
    damage(newest_record(saved))
    one, other = plan_of(saved), plan_of(saved)
    repair.repair(one)
    with pytest.raises(FencedError):
        repair.repair(other)
    check_goes_on(saved, [2, 3])


def test_every_record_damaged_is_as_if_lost(saved):
    for number in state.record_numbers(RunDirectory.at(saved)):
        damage(record_path(saved, number))
    os.unlink(os.path.join(saved, paths.STATE_FILE))
    plan = plan_of(saved)
    assert plan.basis == "no record is left"
    repair.repair(plan)
    check_goes_on(saved, [2, 3])


def test_copy_of_another_directorys_records_is_no_basis_for_other_checkpoints(saved):
    """A wrong copy names nothing that is here; what is here is of another chain."""
    other = os.path.join(os.path.dirname(saved), "other")
    chief = make_claimed(other)
    save(chief, other, 7)
    chief.close()
    shutil.rmtree(os.path.join(saved, paths.RECORDS_DIRECTORY))
    copied = os.path.join(saved, paths.STATE_FILE)
    posix.remove_file(copied)
    shutil.copy(os.path.join(other, paths.STATE_FILE), copied)
    plan = plan_of(saved)
    assert becomes(plan) == {"ckpt-3": "live", "ckpt-2": "live"}


def test_lost_newest_records_are_rebuilt_from_the_copy(saved):
    """An older record seems to be the newest; a claim would delete what is not in it."""
    numbers_of = state.record_numbers(RunDirectory.at(saved))
    for number in numbers_of[-2:]:
        os.unlink(record_path(saved, number))
    with pytest.raises(CorruptStateError, match=r"records are lost.*distckpt repair"):
        claim(make_chief(saved, keep=2))
    plan = plan_of(saved)
    assert "records are lost" in plan.damage and "copy" in plan.basis
    assert becomes(plan) == {"ckpt-3": "live", "ckpt-2": "live"}
    repair.repair(plan)
    check_goes_on(saved, [2, 3])


@pytest.mark.parametrize("change", ["older", "foreign", "damaged", "missing"])
def test_copy_that_is_not_ahead_stops_nobody(saved, change):
    """It lags where a job died before it wrote it, and decides nothing."""
    path = os.path.join(saved, paths.STATE_FILE)
    if change == "older":
        shutil.copyfile(record_path(saved, 1), path)
    elif change == "foreign":
        other = make_claimed(saved + "-other")
        for number in range(1, 9):
            save(other, saved + "-other", number)
        other.close()
        shutil.copyfile(os.path.join(saved + "-other", paths.STATE_FILE), path)
    elif change == "damaged":
        damage(path)
    else:
        os.unlink(path)
    assert numbers(claim(make_chief(saved, keep=2)).checkpoints) == [2, 3]


def test_records_behind_a_link_are_not_written(saved):
    """Neither looked at nor repaired: the link could lead anywhere."""
    records = os.path.join(saved, paths.RECORDS_DIRECTORY)
    elsewhere = saved + "-elsewhere"
    damage(newest_record(saved))
    os.rename(records, elsewhere)
    os.symlink(elsewhere, records)
    before = sorted(os.listdir(elsewhere))
    with pytest.raises(UnsafeCheckpointError):
        plan_of(saved)
    assert sorted(os.listdir(elsewhere)) == before


def test_repair_whose_copy_cannot_be_written_is_done_all_the_same(saved, monkeypatch):
    """The record is durable; the copy is for people."""
    damage(newest_record(saved))
    plan = plan_of(saved)

    def fail(*_):
        raise StorageError("rename: Input/output error", operation="rename")

    monkeypatch.setattr(state, "write_copy", fail)
    repair.repair(plan)
    assert read_record(RunDirectory.at(saved)).action == record.REPAIR
