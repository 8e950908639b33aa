"""What other processes see of a run directory, without a job and without writing."""

from __future__ import annotations

import logging
import os
import shutil
import time
from pathlib import Path

import pytest
from unit_helpers import (
    claim,
    commit,
    flip_bit,
    make_chief,
    make_claimed,
    make_entry,
    make_record,
    make_saved,
    record_path,
    save,
    write_attempt,
)

from distckpt import readers, state
from distckpt.errors import (
    CheckpointNotFound,
    ChecksumError,
    ConfigError,
    CorruptStateError,
    DistckptError,
    ManifestError,
    ShardFileError,
    UnsafeCheckpointError,
)
from distckpt.run_directory import AttemptDirectory, RunDirectory
from distckpt.storage import posix


@pytest.fixture
def saved(run_dir):
    """Make a run directory with the committed checkpoint 1000."""
    return make_saved(run_dir, 1000)


@pytest.fixture
def copied(saved, tmp_path):
    """Copy the attempt's directory to a place without records."""
    target = tmp_path / "copy" / saved.attempt.published
    shutil.copytree(saved.published, target)
    return str(target)


# The state


def test_state_of_a_missing_directory_is_none(run_dir):
    """A job that has not started yet."""
    assert readers.get_checkpoint_state(run_dir) is None


def test_state_after_a_claim_alone_is_none(run_dir):
    """Nothing is committed."""
    make_claimed(run_dir)
    assert readers.get_checkpoint_state(run_dir) is None


def test_state_has_tensorflows_four_fields(run_dir, clock):
    """Paths joined to the directory, oldest first."""
    chief = make_claimed(run_dir, keep=2)
    for number in (10, 20, 30):
        clock.now += 1
        save(chief, run_dir, number)
    found = readers.get_checkpoint_state(run_dir)
    assert found == readers.CheckpointState(
        model_checkpoint_path=f"{run_dir}/ckpt-30",
        all_model_checkpoint_paths=[f"{run_dir}/ckpt-20", f"{run_dir}/ckpt-30"],
        all_model_checkpoint_timestamps=[clock.now - 1, clock.now],
        last_preserved_timestamp=clock.now - 4,
    )


def test_state_of_a_corrupt_chain_is_an_error(saved):
    """TensorFlow takes it for none, and jobs start from scratch."""
    with open(record_path(saved.directory, 2), "w"):
        pass
    with pytest.raises(CorruptStateError):
        readers.get_checkpoint_state(saved.directory)


def test_state_with_nothing_managed_is_none(run_dir):
    """A record whose checkpoints are all kept or bad is no crash."""
    os.makedirs(os.path.join(run_dir, ".state"))
    state.append(
        RunDirectory.at(run_dir), make_record(1, kept=(make_entry(1),), last_preserved=1.0)
    )
    assert readers.get_checkpoint_state(run_dir) is None


# The latest


def test_latest_of_a_missing_directory_is_none(run_dir):
    """No checkpoint yet."""
    assert readers.latest_checkpoint(run_dir) is None


def test_latest_is_the_prefix_of_the_newest(run_dir):
    """By the order of commits, as a string."""
    chief = make_claimed(run_dir)
    save(chief, run_dir, 20)
    save(chief, run_dir, 10)
    assert readers.latest_checkpoint(Path(run_dir)) == f"{run_dir}/ckpt-10"


def test_latest_whose_files_are_gone_is_none_and_logged(saved, caplog):
    """As in TensorFlow."""
    shutil.rmtree(saved.published)
    with caplog.at_level(logging.ERROR):
        assert readers.latest_checkpoint(saved.directory) is None
    assert "files are gone" in caplog.text


def test_latest_replaced_while_it_is_looked_for_is_the_new_one(run_dir, monkeypatch):
    """A running job deletes what a reader has just found."""
    chief = make_claimed(run_dir, keep=1)
    save(chief, run_dir, 1)
    real = posix.exists
    raced = []

    def exists(path):
        if "ckpt-1." in path and not raced:
            raced.append(path)
            save(chief, run_dir, 2)
        return real(path)

    monkeypatch.setattr(posix, "exists", exists)
    assert readers.latest_checkpoint(run_dir) == f"{run_dir}/ckpt-2"


@pytest.mark.parametrize("path", [None, 3, b"bytes", "", "a\0b"], ids=repr)
def test_path_that_is_none_is_a_config_error(path):
    """A wrong argument is told as one."""
    with pytest.raises(ConfigError, match="a path must be"):
        readers.latest_checkpoint(path)


# The iterator


@pytest.fixture
def no_sleep(monkeypatch):
    """Let waiting take no time; returns what was waited for."""
    waited = []
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def test_iterator_without_a_checkpoint_ends_after_its_timeout(run_dir):
    """An evaluation job does not wait for ever."""
    assert list(readers.checkpoints_iterator(run_dir, timeout=0)) == []


def test_iterator_yields_the_newest_once(saved):
    """The same checkpoint is not evaluated twice."""
    found = list(readers.checkpoints_iterator(saved.directory, timeout=0))
    assert found == [saved.prefix]


def test_iterator_yields_each_new_one(run_dir):
    """Saved between two questions: only the newest is yielded."""
    chief = make_claimed(run_dir)
    save(chief, run_dir, 1)
    iterator = readers.checkpoints_iterator(run_dir, timeout=0)
    first = next(iterator)
    save(chief, run_dir, 2)
    save(chief, run_dir, 3)
    assert (first, next(iterator)) == (f"{run_dir}/ckpt-1", f"{run_dir}/ckpt-3")


def test_iterator_yields_a_number_that_was_saved_again(run_dir):
    """Another attempt is another checkpoint, under the same path."""
    chief = make_claimed(run_dir)
    save(chief, run_dir, 1)
    iterator = readers.checkpoints_iterator(run_dir, timeout=0)
    first = next(iterator)
    save(chief, run_dir, 1)
    assert next(iterator) == first


def test_iterator_asks_timeout_fn_and_goes_on_unless_it_says_true(run_dir):
    """As in TensorFlow."""
    answers = [False, False, True]
    found = list(
        readers.checkpoints_iterator(run_dir, timeout=0, timeout_fn=lambda: answers.pop(0))
    )
    assert (found, answers) == ([], [])


def test_iterator_waits_between_two_yields(saved, no_sleep):
    """Not more often than asked."""
    iterator = readers.checkpoints_iterator(
        saved.directory, min_interval_secs=50, timeout=0
    )
    next(iterator)
    list(iterator)
    assert 49 < no_sleep[0] <= 50


def test_iterator_waits_for_a_checkpoint_to_come(run_dir, monkeypatch):
    """It looks again each second."""
    chief = make_claimed(run_dir)
    monkeypatch.setattr(time, "sleep", lambda _: save(chief, run_dir, 1))
    assert next(readers.checkpoints_iterator(run_dir)) == f"{run_dir}/ckpt-1"


# Finding a checkpoint


@pytest.mark.parametrize("slash", ["", "/", "//"])
def test_locate_of_a_prefix_is_the_attempt_that_the_record_names(saved, slash):
    """With the digest that the record says."""
    located = readers.locate(saved.prefix + slash)
    entry = state.read_head(RunDirectory.at(saved.directory)).record.live[0]
    assert located == readers.Located(AttemptDirectory.at(saved.published), entry.manifest)


def test_locate_of_a_prefix_saved_again_is_the_newer_attempt(run_dir):
    """The prefix means what the newest record says."""
    chief = make_claimed(run_dir)
    save(chief, run_dir, 1)
    newer = save(chief, run_dir, 1)
    assert str(readers.locate(f"{run_dir}/ckpt-1").directory).endswith(newer.published)


def test_locate_of_an_attempts_directory_is_itself_with_the_records_digest(saved):
    """The chain of trust holds there too."""
    assert readers.locate(saved.published) == readers.locate(saved.prefix)


def test_locate_of_a_path_like_works(saved):
    """As everywhere."""
    assert readers.locate(Path(saved.prefix)) == readers.locate(saved.prefix)


def test_locate_of_a_relative_prefix_works(saved, monkeypatch):
    """From within the run directory."""
    monkeypatch.chdir(saved.directory)
    assert str(readers.locate("ckpt-1000").directory).endswith(saved.attempt.published)


def test_locate_of_a_copied_attempt_has_no_digest(copied):
    """Without records only the attempt itself can be verified."""
    assert readers.locate(copied) == readers.Located(AttemptDirectory.at(copied), None)


def test_locate_of_a_prefix_in_a_copy_without_records_is_the_attempt(copied):
    """Both spellings work in a copy."""
    prefix = copied.partition(".e")[0]
    assert readers.locate(prefix) == readers.Located(AttemptDirectory.at(copied), None)


def test_locate_in_a_copy_with_two_attempts_takes_the_newest_that_is_whole(
    run_dir, tmp_path
):
    """A torn copy is passed over."""
    chief = make_claimed(run_dir)
    attempts = []
    for _ in range(2):
        attempts.append(save(chief, run_dir, 1))
        published = os.path.join(run_dir, attempts[-1].published)
        shutil.copytree(published, tmp_path / "copy" / attempts[-1].published)
        chief = claim(make_chief(run_dir))
    prefix = str(tmp_path / "copy" / "ckpt-1")
    newest = str(readers.locate(prefix).directory)
    os.truncate(os.path.join(newest, "rank-00001-of-00002.safetensors"), 5000)
    older = str(readers.locate(prefix).directory)
    found = [os.path.basename(newest), os.path.basename(older)]
    assert found == [attempts[1].published, attempts[0].published]


@pytest.mark.parametrize(
    "name", ["ckpt-7", "other-1000", "ckpt", "ckpt-01000", "..", "x" * 99]
)
def test_locate_of_what_is_not_there_is_not_found(saved, name):
    """The message says what there is or what is meant."""
    with pytest.raises(CheckpointNotFound):
        readers.locate(os.path.join(saved.directory, name))


def test_locate_of_another_number_lists_those_that_are_there(saved):
    """Most likely a mistyped number."""
    with pytest.raises(CheckpointNotFound, match="newest first: ckpt-1000"):
        readers.locate(os.path.join(saved.directory, "ckpt-1"))


def test_locate_of_the_root_directory_is_not_found(saved, monkeypatch):
    """Also where the working directory is a checkpoint."""
    monkeypatch.chdir(saved.published)
    with pytest.raises(CheckpointNotFound):
        readers.locate("/")


def test_locate_of_a_pending_attempt_is_not_found(run_dir):
    """A save under way is invisible."""
    chief = make_claimed(run_dir)
    attempt = chief.begin(1, 0)
    write_attempt(chief, run_dir, attempt)
    with pytest.raises(CheckpointNotFound):
        readers.locate(os.path.join(run_dir, attempt.prefix))


def test_locate_below_a_file_is_our_error(saved):
    """Whatever the path, the error is ours."""
    with pytest.raises(DistckptError):
        readers.locate(saved.shard(0) + "/ckpt-1")


# Manifest and shard files


def manifest_of(saved):
    return readers.read_manifest(AttemptDirectory.at(saved.published))


def test_manifest_with_another_digest_is_refused(saved):
    """It is valid, but not the one that was committed."""
    with pytest.raises(ChecksumError, match="not the manifest that was committed"):
        readers.read_manifest(AttemptDirectory.at(saved.published), "0" * 32)


def test_manifest_that_is_damaged_is_refused_by_path(saved):
    """The message names the file."""
    os.truncate(saved.file("manifest.json"), 100)
    with pytest.raises(ManifestError, match=f"^{saved.published}/manifest.json: "):
        readers.read_manifest(AttemptDirectory.at(saved.published))


@pytest.mark.parametrize("name", ["manifest.json", "rank-00001-of-00002.safetensors"])
def test_file_that_is_a_link_is_refused(saved, tmp_path, name):
    """Nothing is read through a link, even to the right bytes."""
    os.rename(saved.file(name), saved.file(name) + ".moved")
    os.symlink(saved.file(name) + ".moved", saved.file(name))
    with pytest.raises(UnsafeCheckpointError, match="symbolic link"):
        readers.open_shard(AttemptDirectory.at(saved.published), manifest_of(saved), 1)


def test_open_shard_gives_a_reader_of_that_rank(saved):
    """Held against the manifest, and open."""
    with readers.open_shard(
        AttemptDirectory.at(saved.published), manifest_of(saved), 1
    ) as reader:
        assert reader.header.rank == 1


def test_open_shard_that_was_cut_is_refused(saved):
    """Both sizes are named."""
    size = os.path.getsize(saved.shard(0))
    os.truncate(saved.shard(0), size - 1)
    with pytest.raises(ShardFileError, match="rank-00000"):
        readers.open_shard(AttemptDirectory.at(saved.published), manifest_of(saved), 0)


def test_open_shard_with_a_changed_header_is_refused(saved):
    """The header's digest holds the blocks' checksums."""
    flip_bit(saved.shard(0), 4095, mask=ord(" ") ^ ord("\t"))  # padding: still valid
    with pytest.raises(ChecksumError, match="header digest"):
        readers.open_shard(AttemptDirectory.at(saved.published), manifest_of(saved), 0)


def test_open_shard_of_another_rank_is_refused(saved):
    """A file under another rank's name is found out."""
    shutil.copy(saved.shard(0), saved.shard(1))
    with pytest.raises((ShardFileError, ChecksumError)):
        readers.open_shard(AttemptDirectory.at(saved.published), manifest_of(saved), 1)


def test_open_shard_of_another_attempt_is_refused(run_dir):
    """Equal in size and content, but not of this attempt."""
    chief = make_claimed(run_dir)
    first, second = save(chief, run_dir, 1), save(chief, run_dir, 2)
    name = "rank-00000-of-00002.safetensors"
    first_path, second_path = (os.path.join(run_dir, a.published) for a in (first, second))
    shutil.copy(os.path.join(first_path, name), os.path.join(second_path, name))
    with pytest.raises((ShardFileError, ChecksumError)):
        readers.open_shard(
            AttemptDirectory.at(second_path),
            readers.read_manifest(AttemptDirectory.at(second_path)),
            0,
        )


def test_open_shard_that_holds_other_boxes_than_promised_is_refused(run_dir):
    """A manifest that does not fit its files is no checkpoint."""
    chief = make_claimed(run_dir)
    attempt = chief.begin(1, 0)
    shards = write_attempt(chief, run_dir, attempt)
    commit(chief, attempt, shards, table=())
    published = os.path.join(run_dir, attempt.published)
    with pytest.raises(ShardFileError, match="does not hold what the manifest says"):
        readers.open_shard(
            AttemptDirectory.at(published),
            readers.read_manifest(AttemptDirectory.at(published)),
            0,
        )
