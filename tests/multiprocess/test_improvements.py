"""Where this manager deliberately does better than TensorFlow's, one part for each way."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
import torch.distributed as dist
from harness import run_ranks, values_of
from ranks_helpers import (
    attempts_of,
    exists,
    newest_record,
    numbers,
    published,
    snapshot,
)

from distckpt import (
    Checkpoint,
    CheckpointManager,
    ConfigError,
    CorruptStateError,
    DirectoryInUseError,
    FencedError,
    RestoreFailed,
    SaveFailed,
    chief,
    get_checkpoint_state,
    latest_checkpoint,
    paths,
    readers,
)
from distckpt.record import Record
from distckpt.run_directory import AttemptDirectory, RunDirectory

both_sizes = pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.full), 2]
)


def _verify_all(directory, record):
    """Read every byte of what a record lists as committed."""
    for entry in record.committed:
        attempt = os.path.join(directory, entry.attempt.published)
        manifest = readers.read_manifest(AttemptDirectory.at(attempt), entry.manifest)
        for rank in range(manifest.world_size):
            with readers.open_shard(AttemptDirectory.at(attempt), manifest, rank) as reader:
                reader.verify()


def _flip_a_byte(path, offset):
    with open(path, "r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 0xFF]))


def _shard_of(prefix, rank=0):
    """Return the path of one shard file of a checkpoint."""
    folder = os.path.join(os.path.dirname(prefix), attempts_of(prefix)[0])
    (name,) = [n for n in os.listdir(folder) if n.startswith(f"rank-{rank:05d}-")]
    return os.path.join(folder, name)


def _hidden(directory):
    """List what lies beside the checkpoints and is no part of the layout."""
    usual = (paths.RECORDS_DIRECTORY, paths.LOCK_FILE, paths.EVENTS_DIRECTORY)
    return [n for n in os.listdir(directory) if n.startswith(".") and n not in usual]


# 1. Step and number move only on success


class _FailsAtFirst:
    """A tracked object that cannot be saved the first time, on some ranks."""

    def __init__(self, failing):
        self.left = int(failing)

    def state_dict(self):
        if self.left:
            self.left -= 1
            raise LookupError("not yet")
        return {"value": 1}

    def load_state_dict(self, state):
        pass


def _fail_then_retry(rank, directory, failing):
    step = torch.tensor(4)
    checkpoint = Checkpoint(step=step, flaky=_FailsAtFirst(False))
    manager = CheckpointManager(
        checkpoint, directory, None, step_counter=step, checkpoint_interval=10
    )
    first = manager.save()
    checkpoint.flaky.left = int(rank in failing)
    step.fill_(14)
    with pytest.raises(SaveFailed) as caught:
        manager.save()
    assert sorted(caught.value.failures) == failing
    assert "LookupError: not yet" in str(caught.value)
    assert isinstance(caught.value.__cause__, LookupError) is (rank in failing)
    # Nothing remembers it: not the lists, not the counter, not the disk.
    assert manager.latest_checkpoint == first
    assert manager.checkpoints == [first]
    assert checkpoint.save_counter == 1
    assert published(directory) == ["ckpt-1"]
    assert _hidden(directory) == []
    # Not even the interval: the same step may be tried again.
    second = manager.save()
    assert numbers([second]) == [2]
    assert manager.save() is None
    assert checkpoint.save_counter == 2
    manager.close()
    return second


@pytest.mark.parametrize(
    ("world_size", "failing"),
    [(1, [0]), (2, [1]), pytest.param(2, [0, 1], marks=pytest.mark.full)],
)
def test_save_after_a_failed_one_has_its_step_and_number(tmp_path, world_size, failing):
    """A save that failed on some rank leaves no trace, so a retry takes its place."""
    values_of(run_ranks(_fail_then_retry, world_size, str(tmp_path), failing))


# 2. Data before state, all of it durable


def _verify_before_every_record(_, directory):
    dist.barrier()
    seen = []

    def watch(event, arguments):
        if event == "os.link":
            source, target = map(os.fspath, arguments[:2])
            if paths.parse_record_file(os.path.basename(target)) is None:
                return
            with open(source, "rb") as file:
                record = Record.decode(file.read())
            _verify_all(directory, record)
            seen.append(record.action)
        elif event == "os.rename" and os.fspath(arguments[1]).endswith(".trash"):
            # What goes, no record names as committed any more.
            listed = newest_record(directory).committed
            gone = os.path.basename(arguments[0])
            assert gone not in [entry.attempt.published for entry in listed]
            seen.append("trash")

    # Raises out of the very call that is about to commit or delete.
    sys.addaudithook(watch)
    weights = torch.arange(1000.0)
    manager = CheckpointManager(Checkpoint(w=weights), directory, max_to_keep=2)
    for _ in range(4):
        weights += 1
        manager.save()
    manager.sync()
    return seen


@both_sizes
def test_record_at_every_commit_names_only_whole_checkpoints(tmp_path, world_size):
    """At the moment before a record appears, all that it names can be read and verifies."""
    values = values_of(run_ranks(_verify_before_every_record, world_size, str(tmp_path)))
    assert [action for action in values[0] if action != "trash"] == ["claim"] + [
        "commit"
    ] * 4
    assert values[0].count("trash") == 2
    assert values[1:] == [[]] * (world_size - 1)


def _note_order(_, directory):
    notes = []
    real = os.fsync

    def fsync(descriptor):
        path = os.readlink(f"/proc/self/fd/{descriptor}")
        real(descriptor)
        notes.append(("fsync", os.path.relpath(path, directory)))

    def watch(event, arguments):
        if event in ("os.link", "os.rename"):
            source, target = (os.path.relpath(path, directory) for path in arguments[:2])
            notes.append((event[3:], source, target))

    manager = CheckpointManager(Checkpoint(w=torch.ones(10)), directory, max_to_keep=1)
    manager.save()
    manager.sync()
    os.fsync = fsync
    sys.addaudithook(watch)
    manager.save()
    manager.sync()
    return notes


def test_files_and_directories_are_synced_before_the_record_names_them(tmp_path):
    """Shard, manifest, their directory and its name are durable before the commit."""
    directory = os.path.realpath(tmp_path)
    notes = values_of(run_ranks(_note_order, 1, directory))[0]
    (name,) = attempts_of(f"{directory}/ckpt-2")
    pending = f".{name}.pending"
    record = os.path.join(paths.RECORDS_DIRECTORY, paths.record_file(3))
    (temporary,) = [note[1] for note in notes if note[0] == "link" and note[2] == record]
    (trash,) = [
        note for note in notes if note[0] == "rename" and note[2].endswith(".trash")
    ]
    assert trash[2].startswith(".ckpt-1.")
    expected = [
        ("fsync", f"{pending}/{paths.shard_file(0, 1)}"),
        ("fsync", f"{pending}/{paths.MANIFEST_FILE}"),
        ("fsync", pending),
        ("rename", pending, name),
        ("fsync", "."),
        ("fsync", temporary),
        ("link", temporary, record),
        ("fsync", paths.RECORDS_DIRECTORY),
        trash,
    ]
    rest = iter(notes)
    for step in expected:
        assert step in rest, f"{step} is missing, or late, in {notes}"


# 3. Fall back to what verifies; loud if the state cannot be read


def _model_of(value):
    """Make a model full of one value; every rank writes a part of it."""
    model = torch.nn.Linear(100, 50)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


def _save_three(_, directory):
    checkpoint = Checkpoint()
    with CheckpointManager(checkpoint, directory, max_to_keep=None) as manager:
        for value in (1.0, 2.0, 3.0):
            checkpoint.model = _model_of(value)
            manager.save()


def _restore_and_save(_, directory):
    model = _model_of(0.0)
    calls = []
    manager = CheckpointManager(
        Checkpoint(model=model), directory, None, init_fn=lambda: calls.append(1)
    )
    restored = manager.restore_or_initialize()
    values = [parameter.unique().tolist() for parameter in model.parameters()]
    latest = manager.latest_checkpoint
    saved = manager.save()
    manager.close()
    assert not calls
    return [os.path.basename(path) for path in (restored, latest, saved)], values


@pytest.mark.parametrize(
    ("world_size", "harm", "number"),
    [
        pytest.param(1, "flipped", 3, marks=pytest.mark.full),
        (2, "flipped", 3),
        pytest.param(1, "cut off", 3, marks=pytest.mark.full),
        (1, "no shard", 4),
        (1, "no manifest", 4),
        pytest.param(2, "no directory", 4, marks=pytest.mark.full),
    ],
)
def test_restore_falls_back_to_the_newest_that_verifies(tmp_path, world_size, harm, number):
    """A damaged or missing newest checkpoint is passed over by all ranks together.

    The number of one that only could not be read stays its own.
    """
    directory = str(tmp_path)
    values_of(run_ranks(_save_three, world_size, directory))
    shard = _shard_of(f"{directory}/ckpt-3", rank=world_size - 1)
    if harm == "flipped":
        _flip_a_byte(shard, os.path.getsize(shard) - 10)
    elif harm == "cut off":
        os.truncate(shard, os.path.getsize(shard) - 1)
    elif harm == "no shard":
        os.unlink(shard)
    elif harm == "no manifest":
        os.unlink(os.path.join(os.path.dirname(shard), paths.MANIFEST_FILE))
    else:
        shutil.rmtree(os.path.dirname(shard))
    expected = (["ckpt-2", "ckpt-2", f"ckpt-{number}"], [[2.0], [2.0]])
    if number == 4 and harm != "no directory":
        # Not readable just now is not forgotten: it is still the newest commit.
        expected[0][1] = "ckpt-3"
    values = values_of(run_ranks(_restore_and_save, world_size, directory))
    assert values == [expected] * world_size
    record = newest_record(directory)
    bad = [entry.attempt.prefix for entry in record.bad]
    assert bad == (["ckpt-3"] if number == 3 else [])


def _fail_to_restore(_, directory):
    calls = []
    manager = CheckpointManager(
        Checkpoint(model=_model_of(7.0)), directory, None, init_fn=lambda: calls.append(1)
    )
    with pytest.raises(
        RestoreFailed, match=r"no checkpoint in .* could be restored"
    ) as caught:
        manager.restore_or_initialize()
    assert not calls
    return str(caught.value)


@both_sizes
def test_restore_with_nothing_whole_left_raises_instead_of_starting_afresh(
    tmp_path, world_size
):
    """init_fn is not called, and the error names every checkpoint that was tried."""
    directory = str(tmp_path)
    values_of(run_ranks(_save_three, world_size, directory))
    for number in (1, 2, 3):
        shard = _shard_of(f"{directory}/ckpt-{number}")
        _flip_a_byte(shard, os.path.getsize(shard) - 10)
    before = snapshot(directory)
    for text in values_of(run_ranks(_fail_to_restore, world_size, directory)):
        assert all(f"ckpt-{number} is corrupt" in text for number in (1, 2, 3))
    kept = {path: what for path, what in before.items() if "/ckpt-" in path}
    after = snapshot(directory)
    assert {path: after.get(path) for path in kept} == kept


def _construct_on_unreadable(_, directory):
    with pytest.raises(CorruptStateError) as caught:
        CheckpointManager(Checkpoint(), directory, max_to_keep=3)
    return str(caught.value)


@pytest.mark.parametrize(
    ("world_size", "harm"),
    [(1, "empty"), (2, "garbage"), (1, "cut off"), (1, "flipped"), (2, "lost")],
)
def test_unreadable_state_is_an_error_on_all_ranks_and_changes_nothing(
    tmp_path, world_size, harm
):
    """Neither a manager nor a reader takes a broken state for an empty directory."""
    directory = str(tmp_path)
    manager = CheckpointManager(Checkpoint(), directory, max_to_keep=None)
    manager.save()
    manager.save()
    manager.close()
    newest = str(RunDirectory.at(directory).places.record(3))
    if harm == "empty":
        os.truncate(newest, 0)
    elif harm == "garbage":
        with open(newest, "wb") as file:
            file.write(b"\xff\xfe no record at all")
    elif harm == "cut off":
        os.truncate(newest, os.path.getsize(newest) - 2)
    elif harm == "flipped":
        _flip_a_byte(newest, 100)
    else:
        shutil.rmtree(os.path.dirname(newest))
    before = snapshot(directory)
    told = values_of(run_ranks(_construct_on_unreadable, world_size, directory))
    assert len(set(told)) == 1
    assert (newest if harm != "lost" else directory) in told[0]
    for read in (get_checkpoint_state, latest_checkpoint):
        with pytest.raises(CorruptStateError):
            read(directory)
    assert snapshot(directory) == before


# 4. What is deleted is named by record and manifest, never by a pattern


def _rotate(_, directory):
    manager = CheckpointManager(Checkpoint(), directory, max_to_keep=1)
    for _ in range(3):
        manager.save()
    manager.sync()
    assert (
        latest_checkpoint(directory) == manager.latest_checkpoint == f"{directory}/ckpt-3"
    )
    restored = CheckpointManager(Checkpoint(), directory, max_to_keep=1)
    assert restored.restore_or_initialize() == f"{directory}/ckpt-3"
    restored.close()


@both_sizes
def test_directory_named_like_a_pattern_is_rotated_and_only_it(tmp_path, world_size):
    """Brackets, stars and question marks are letters like others."""
    odd = tmp_path / "run[1-2]*?"
    matched = [tmp_path / "run1xy", tmp_path / "run2z"]
    for other in matched:
        _rotate(0, str(other))
    odd.mkdir()
    # Not the manager's: names that are close, but not those that it has given.
    alien = odd / "ckpt-1.old"
    alien.mkdir()
    (odd / "ckpt-1.index").write_text("mine")
    (odd / "ckpt-2-notes.txt").write_text("mine")
    before = [snapshot(other) for other in matched]
    values_of(run_ranks(_rotate, world_size, str(odd)))
    assert published(odd) == ["ckpt-3"]
    assert [snapshot(other) for other in matched] == before
    assert alien.is_dir()
    assert (odd / "ckpt-1.index").read_text() == "mine"
    assert (odd / "ckpt-2-notes.txt").read_text() == "mine"


def test_everything_in_a_dropped_checkpoint_goes_with_it(tmp_path):
    """Side files that others laid into an attempt's directory do not keep it."""
    manager = CheckpointManager(Checkpoint(), tmp_path, max_to_keep=1)
    (name,) = attempts_of(manager.save())
    (tmp_path / name / "notes").mkdir()
    (tmp_path / name / "notes" / "run.txt").write_text("side file")
    outside = tmp_path / "outside.txt"
    outside.write_text("mine")
    (tmp_path / name / "link").symlink_to(outside)
    manager.save()
    manager.sync()
    assert published(tmp_path) == ["ckpt-2"]
    assert _hidden(tmp_path) == []
    assert outside.read_text() == "mine"


# 5. What cannot be deleted is not forgotten


class _Pins:
    """Makes paths undeletable, also for root."""

    def pin(self, path):
        if shutil.which("chattr") is None:
            pytest.skip("chattr, by which files are made undeletable, is not there")
        error = self._change("+i", path)
        if error:
            pytest.skip(f"files cannot be made undeletable here: {error}")

    def unpin_all_below(self, path):
        assert self._change("-Rf", "-i", path) == ""

    def _change(self, *arguments):
        command = ["chattr", *map(os.fspath, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return (done.stderr or f"exit code {done.returncode}") if done.returncode else ""


@pytest.fixture
def pins(tmp_path):
    pins = _Pins()
    yield pins
    if shutil.which("chattr") is not None:
        pins._change("-Rf", "-i", tmp_path)


def _releasing(directory):
    return [entry.attempt.prefix for entry in newest_record(directory).releasing]


def _left_of(directory, prefix):
    return [name for name in os.listdir(directory) if f"{prefix}." in name]


@pytest.mark.parametrize("what", ["a file inside", "the directory"])
def test_undeletable_checkpoint_is_kept_in_mind_and_tried_again(
    tmp_path, pins, caplog, what
):
    """Saves go on, every record still names it, and it goes once it can be deleted."""
    checkpoint = Checkpoint(w=torch.ones(4))
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    (name,) = attempts_of(manager.save())
    inside = tmp_path / name / paths.MANIFEST_FILE
    pins.pin(inside if what == "a file inside" else tmp_path / name)
    for number in (2, 3):
        caplog.clear()
        manager.save()
        manager.sync()
        assert numbers(manager.checkpoints) == [number]
        assert "ckpt-1" in _releasing(tmp_path)
        assert any(name in str(r.exc_info and r.exc_info[1]) for r in caplog.records)
    # Out of everybody's sight at once where its directory can be renamed.
    hidden = [f".{name}.trash"]
    assert _left_of(tmp_path, "ckpt-1") == (hidden if what == "a file inside" else [name])
    assert _left_of(tmp_path, "ckpt-2") == []
    manager.close()

    # A restart remembers it too.
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=1)
    manager.restore_or_initialize()
    manager.sync()
    assert "ckpt-1" in _releasing(tmp_path)
    pins.unpin_all_below(tmp_path)
    manager.save()
    manager.sync()
    assert _left_of(tmp_path, "ckpt-1") == []
    # Its end is confirmed in the next record.
    manager.save()
    assert "ckpt-1" not in _releasing(tmp_path)


# 6. Leftovers of dead saves are swept


def _die_while_saving(rank, directory, where):
    weights = torch.ones(100)
    checkpoint = Checkpoint(w=weights)
    manager = CheckpointManager(checkpoint, directory, max_to_keep=1)
    manager.save()
    manager.save()
    manager.sync()

    def die_at(event, arguments):
        names = [name for name in arguments if isinstance(name, str)]
        if event == where and any(name.endswith(_TARGETS[where]) for name in names):
            os.kill(os.getpid(), signal.SIGKILL)

    if rank == 0:
        sys.addaudithook(die_at)
    manager.save()
    manager.sync()  # deletions run behind: here at the latest they kill


# Before a shard file is made; before the commit's record appears; before what it has
# dropped is renamed.
_TARGETS = {"open": ".safetensors", "os.link": ".json", "os.rename": ".trash"}


def _start_again(_, directory):
    weights = torch.zeros(100)
    with CheckpointManager(Checkpoint(w=weights), directory, max_to_keep=1) as manager:
        restored = manager.restore_or_initialize()
        manager.sync()
        left = sorted(os.listdir(directory))
        dist.barrier()
        saved = manager.save()
    assert weights.tolist() == [1.0] * 100
    return os.path.basename(restored), left, os.path.basename(saved)


@pytest.mark.parametrize(
    ("world_size", "where", "leaves", "survivor"),
    [
        pytest.param(1, "open", ".ckpt-3", 2, marks=pytest.mark.full),
        (2, "open", ".ckpt-3", 2),
        (1, "os.link", "ckpt-3", 2),
        (1, "os.rename", "ckpt-2", 3),
    ],
)
def test_leftovers_of_a_killed_save_go_at_the_next_claim(
    tmp_path, world_size, where, leaves, survivor
):
    """Pending, unrecorded and half-dropped attempts go; what others put there stays."""
    directory = str(tmp_path)
    results = run_ranks(_die_while_saving, world_size, directory, where)
    assert results[0].exit_code == -signal.SIGKILL
    assert any(name.startswith(f"{leaves}.") for name in os.listdir(directory))
    alien = "ckpt-3.e1-0badf00d"
    os.mkdir(tmp_path / alien)
    (tmp_path / ".mine.pending").mkdir()

    for restored, left, saved in values_of(run_ranks(_start_again, world_size, directory)):
        assert restored == f"ckpt-{survivor}"
        committed = [n for n in left if n.startswith(f"ckpt-{survivor}.") and n != alien]
        assert len(committed) == 1
        usual = [paths.LOCK_FILE, paths.STATE_FILE, paths.RECORDS_DIRECTORY]
        usual.append(paths.EVENTS_DIRECTORY)
        assert left == sorted([*usual, *committed, alien, ".mine.pending"])
        assert saved == f"ckpt-{survivor + 1}"
    records = os.listdir(tmp_path / paths.RECORDS_DIRECTORY)
    assert [n for n in records if paths.parse_record_file(n) is None] == []


# 7. One job at a time


def _come_second(_, directory):
    # Otherwise the second job would wait half a minute for the first to end.
    chief._LOCK_WAIT_SECONDS = 0.5
    manager = CheckpointManager(Checkpoint(), directory, max_to_keep=1)
    assert numbers([manager.latest_checkpoint]) == [1]  # looking is allowed
    told = []
    for call in (manager.save, manager.restore_or_initialize):
        with pytest.raises(DirectoryInUseError) as caught:
            call()
        told.append(str(caught.value))
    return told


def _restore_and_tell(_, directory, takeover):
    manager = CheckpointManager(Checkpoint(), directory, 1, takeover=takeover)
    started = time.monotonic()
    restored = manager.restore_or_initialize()
    manager.save()
    manager.close()
    return os.path.basename(restored), time.monotonic() - started


@both_sizes
def test_second_job_in_a_directory_is_told_who_holds_it(tmp_path, world_size):
    """It may look, but its first write is refused on every rank, and changes nothing."""
    directory = str(tmp_path)
    checkpoint = Checkpoint()
    manager = CheckpointManager(checkpoint, directory, max_to_keep=1)
    manager.save()
    before = snapshot(directory)
    told = values_of(run_ranks(_come_second, world_size, directory))
    for text in (text for texts in told for text in texts):
        assert directory in text
        assert f"process-{os.getpid()}@" in text
        assert "takeover=True" in text
    assert snapshot(directory) == before
    # The first has noticed nothing, and once it is closed the next one may come.
    assert numbers([manager.save()]) == [2]
    manager.close()
    for restored, _ in values_of(
        run_ranks(_restore_and_tell, world_size, directory, False)
    ):
        assert restored == "ckpt-2"


@both_sizes
def test_takeover_of_a_directory_fences_the_job_that_held_it(tmp_path, world_size):
    """With takeover the second goes on at once, and the first may not write any more."""
    directory = str(tmp_path)
    checkpoint = Checkpoint()
    manager = CheckpointManager(checkpoint, directory, max_to_keep=1)
    manager.save()
    for restored, seconds in values_of(
        run_ranks(_restore_and_tell, world_size, directory, True)
    ):
        assert restored == "ckpt-1"
        assert seconds < 5.0
    for _ in range(2):
        with pytest.raises(FencedError, match="claimed by job"):
            manager.save()
    assert checkpoint.save_counter == 1
    assert published(directory) == ["ckpt-2"]


def test_restart_of_the_same_job_does_not_wait_for_its_predecessor(tmp_path, monkeypatch):
    """A process of this very job that still holds the lock is fenced, not waited for."""
    directory = str(tmp_path)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "gpt-7")
    manager = CheckpointManager(Checkpoint(), directory, max_to_keep=1)
    manager.save()
    environment = {"TORCHELASTIC_RUN_ID": "gpt-7", "TORCHELASTIC_RESTART_COUNT": "1"}
    (result,) = values_of(
        run_ranks(_restore_and_tell, 1, directory, False, environment=environment)
    )
    assert result[0] == "ckpt-1"
    assert result[1] < 5.0
    assert newest_record(directory).restart == 1
    with pytest.raises(FencedError):
        manager.save()


# 8. max_to_keep is checked


@pytest.mark.parametrize("bad", [0, -1, True, False, 2.5, 0.5, "3", [3]])
def test_max_to_keep_that_is_no_positive_integer_is_refused(tmp_path, bad):
    """Nothing but a positive integer or None, and nothing is made on disk."""
    directory = tmp_path / "run"
    with pytest.raises(ConfigError, match="max_to_keep"):
        CheckpointManager(Checkpoint(), directory, max_to_keep=bad)
    with pytest.raises(ValueError, match="max_to_keep"):
        CheckpointManager(Checkpoint(), directory, max_to_keep=bad)
    assert not directory.exists()


def _limit_badly(_, directory, bad_limits):
    with pytest.raises(ConfigError) as caught:
        CheckpointManager(Checkpoint(), directory, bad_limits[dist.get_rank()])
    manager = CheckpointManager(Checkpoint(), directory, max_to_keep=1)
    manager.save()
    return str(caught.value)


@pytest.mark.parametrize(
    "bad_limits",
    [
        pytest.param((0, 0), marks=pytest.mark.full),
        (2, 0),
        pytest.param((2, 3), marks=pytest.mark.full),
    ],
)
def test_max_to_keep_that_is_bad_on_one_rank_is_refused_on_all(tmp_path, bad_limits):
    """All ranks raise the same, and the next manager works."""
    one, other = values_of(run_ranks(_limit_badly, 2, str(tmp_path), bad_limits))
    assert one == other
    if bad_limits != (0, 0):
        assert re.search(r"rank 1|ranks \[1\]", one)


# 9. A live number is not replaced by accident


def _forget_to_restore(_, directory):
    checkpoint = Checkpoint(v=torch.tensor(1.0))
    with CheckpointManager(checkpoint, directory, max_to_keep=3) as manager:
        for _ in range(3):
            manager.save()

    value = torch.tensor(9.0)
    checkpoint = Checkpoint(v=value)
    manager = CheckpointManager(checkpoint, directory, max_to_keep=3)
    before = {n for n in os.listdir(directory) if n.startswith("ckpt-")}
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"ckpt-1 is already live .* restore first"):
            manager.save()
        assert checkpoint.save_counter == 0
    manager.sync()
    assert {n for n in os.listdir(directory) if n.startswith("ckpt-")} == before
    assert numbers(manager.checkpoints) == [1, 2, 3]
    dist.barrier()

    # Asked for by its number, it is replaced, and is the newest then.
    assert numbers([manager.save(checkpoint_number=1)]) == [1]
    assert numbers(manager.checkpoints) == [2, 3, 1]
    manager.sync()
    after = {n for n in os.listdir(directory) if n.startswith("ckpt-")}
    assert len(before & after) == 2
    assert exists(f"{directory}/ckpt-1")
    value.fill_(0.0)
    checkpoint.restore(f"{directory}/ckpt-1")
    assert value == 9.0

    # After a restore numbering goes on, whatever the numbers before it were.
    manager = CheckpointManager(checkpoint, directory, max_to_keep=3)
    assert numbers([manager.restore_or_initialize()]) == [1]
    assert checkpoint.save_counter == 1
    with pytest.raises(ConfigError, match="ckpt-2 is already live"):
        manager.save()
    assert numbers([manager.save(checkpoint_number=4)]) == [4]


@both_sizes
def test_default_number_that_is_live_is_refused_and_an_explicit_one_replaces(
    tmp_path, world_size
):
    """A job that forgot to restore does not overwrite what it should have restored."""
    values_of(run_ranks(_forget_to_restore, world_size, str(tmp_path)))


# 10. Readers never see a half


_SAVES = 400


def _save_or_poll(rank, directory):
    done = os.path.join(directory, "done")
    run = os.path.join(directory, "run")
    if rank == 0:
        try:
            manager = CheckpointManager(Checkpoint(), run, max_to_keep=2)
            for _ in range(_SAVES):
                manager.save()
            manager.close()
        finally:
            with open(done, "x"):
                pass
        return None
    return _poll(run, done)


def _poll(run, done):
    reads, seen, last = 0, set(), 0
    while True:
        finished = os.path.exists(done)
        found = get_checkpoint_state(run)
        latest = latest_checkpoint(run)
        if found is None:
            assert not seen, f"no state, after {last}"
        else:
            listed = numbers(found.all_model_checkpoint_paths)
            newest = listed[-1]
            # One more than is kept is never listed, one less only at the beginning.
            assert listed == list(range(max(1, newest - 1), newest + 1))
            assert len(found.all_model_checkpoint_timestamps) == len(listed)
            assert found.model_checkpoint_path == found.all_model_checkpoint_paths[-1]
            assert newest >= last, f"{newest} after {last}"
            (later,) = numbers([latest])
            assert later >= newest, f"latest {later} after {newest}"
            last = later
            seen.add(newest)
            reads += 1
            # The copy for people is replaced whole, too.
            with open(os.path.join(run, paths.STATE_FILE), "rb") as file:
                Record.decode(file.read())
        if finished:
            return reads, len(seen), last


@pytest.mark.full
def test_reader_beside_hundreds_of_saves_never_sees_a_partial_state(tmp_path):
    """From the first commit on, another process always finds a whole state, never older."""
    values = values_of(run_ranks(_save_or_poll, 2, str(tmp_path), process_group=False))
    reads, states, last = values[1]
    assert last == _SAVES
    assert states > _SAVES / 4
    assert reads > _SAVES
