"""What ``tf.train.CheckpointManager`` promises, held against this manager.

First TensorFlow's own tests of its manager (``checkpoint_management_test.py``, 2.16),
told anew for many ranks: every rank makes the same calls and must see the same. Then
tables that were measured on TensorFlow 2.16.1.
"""

import os
import pathlib
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from harness import run_ranks, values_of
from ranks_helpers import (
    Clock,
    attempts_of,
    collect_warnings,
    exists,
    numbers,
    published,
    set_clock,
    snapshot,
)

from distckpt import (
    Checkpoint,
    CheckpointManager,
    ConfigError,
    MismatchError,
    RestoreFailed,
    get_checkpoint_state,
    latest_checkpoint,
)

both_sizes = pytest.mark.parametrize(
    "world_size", [pytest.param(1, marks=pytest.mark.full), 2]
)


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "time", clock)
    return clock


def _run(function, world_size, *args):
    """Run on all ranks; all must return the same, which is returned once."""
    values = values_of(run_ranks(function, world_size, *args))
    assert all(value == values[0] for value in values)
    return values[0]


def _preserved(directory):
    return get_checkpoint_state(directory).last_preserved_timestamp


def _times(directory):
    return get_checkpoint_state(directory).all_model_checkpoint_timestamps


# TensorFlow's own tests of its manager


def _delete_oldest(_, directory):
    manager = CheckpointManager(Checkpoint(), directory, max_to_keep=3)
    first, *newer = [manager.save() for _ in range(4)]
    manager.sync()
    assert [exists(path) for path in newer] == [True] * 3
    assert not exists(first)
    return first, *newer


@both_sizes
def test_deletion_beyond_max_to_keep_removes_the_oldest(tmp_path, world_size):
    """Of four saves with room for three, the first one goes."""
    directory = str(tmp_path)
    found = _run(_delete_oldest, world_size, directory)
    assert found == tuple(f"{directory}/ckpt-{number}" for number in (1, 2, 3, 4))


def _keep_all(_, directory):
    checkpoint = Checkpoint()
    manager = CheckpointManager(checkpoint, directory, max_to_keep=None)
    one, two, three = manager.save(), manager.save(), manager.save()
    manager.sync()
    assert all(map(exists, (one, two, three)))
    assert manager.latest_checkpoint == three
    assert manager.checkpoints == [one, two, three]
    del manager

    manager = CheckpointManager(checkpoint, directory, max_to_keep=None)
    four = manager.save()
    manager.sync()
    assert manager.checkpoints == [one, two, three, four]
    del manager

    manager = CheckpointManager(checkpoint, directory, max_to_keep=3)
    manager.sync()
    assert manager.checkpoints == [one, two, three, four]
    assert all(map(exists, (one, two, three, four)))
    five = manager.save()
    manager.sync()
    assert manager.checkpoints == [three, four, five]
    assert [exists(path) for path in (one, two, three, four, five)] == [
        False,
        False,
        True,
        True,
        True,
    ]


@both_sizes
def test_max_to_keep_none_keeps_all_until_a_later_manager_limits(tmp_path, world_size):
    """Nothing goes without a limit; with one, the next save removes as many as needed."""
    _run(_keep_all, world_size, str(tmp_path / "not" / "yet"))


def _save_restore_state(_, directory):
    clock = set_clock(3.0)
    checkpoint = Checkpoint()
    first = CheckpointManager(checkpoint, directory, max_to_keep=2)
    clock.set(10_000.0)
    one = first.save()
    clock.set(13_610.0)
    two = first.save()
    first.sync()
    assert _times(directory) == [10_000.0, 13_610.0]
    assert _preserved(directory) == 2.0
    assert first.checkpoints == [one, two]
    assert first.latest_checkpoint == two
    del first

    second = CheckpointManager(checkpoint, directory, 2, keep_checkpoint_every_n_hours=1.5)
    assert second.checkpoints == [one, two]
    assert second.latest_checkpoint == two
    clock.set(14_330.0)
    three = second.save()
    second.sync()
    assert exists(one)
    assert exists(two)
    assert second.checkpoints == [two, three]
    assert _preserved(directory) == 10_000.0
    clock.set(16_130.0)
    four = second.save()
    second.sync()
    assert exists(one)
    assert not exists(two)
    assert second.checkpoints == [three, four]
    clock.set(17_930.0)
    five = second.save()
    second.sync()
    assert second.checkpoints == [four, five]
    assert _preserved(directory) == 10_000.0
    assert not exists(three)
    del second

    third = CheckpointManager(checkpoint, directory, 2, keep_checkpoint_every_n_hours=1.5)
    assert third.latest_checkpoint == five
    clock.set(17_940.0)
    six = third.save()
    third.sync()
    assert _preserved(directory) == 16_130.0
    found = [exists(path) for path in (one, two, three, four, five, six)]
    assert found == [True, False, False, True, True, True]
    assert third.checkpoints == [five, six]


@both_sizes
def test_state_is_saved_and_restored_across_managers(tmp_path, world_size):
    """Times, order and the clock of preservation go on where the last manager stopped."""
    _run(_save_restore_state, world_size, str(tmp_path))


def _continue_from_unmanaged(_, directory):
    clock = set_clock(1000.0)
    other = CheckpointManager(Checkpoint(), directory, None, checkpoint_name="unusual")
    one, two = other.save(), other.save()
    # A clock that was set back makes them forgotten, as if nobody had managed them.
    clock.set(500.0)
    checkpoint = Checkpoint()
    manager = CheckpointManager(checkpoint, directory, max_to_keep=2)
    assert manager.checkpoints == []
    assert manager.latest_checkpoint == two
    checkpoint.restore(manager.latest_checkpoint)
    assert checkpoint.save_counter == 2

    clock.set(510.0)
    three = manager.save()
    assert manager.checkpoints == [three]
    four = manager.save()
    assert manager.checkpoints == [three, four]
    five = manager.save()
    assert manager.checkpoints == [four, five]
    manager.sync()
    found = [exists(path) for path in (one, two, three, four, five)]
    assert found == [True, True, False, True, True]
    assert numbers([three, four, five]) == [3, 4, 5]


@both_sizes
def test_unmanaged_checkpoints_are_restored_from_and_never_deleted(tmp_path, world_size):
    """What no manager manages is the latest at first, and stays for good."""
    _run(_continue_from_unmanaged, world_size, str(tmp_path))


def _reset_clock(_, directory):
    clock = set_clock(10_000.0)
    checkpoint = Checkpoint()
    first = CheckpointManager(checkpoint, directory, 1, keep_checkpoint_every_n_hours=1.0)
    one = first.save()
    clock.set(13_600.0)
    two = first.save()
    clock.set(17_200.0)
    three = first.save()
    first.sync()
    assert [exists(path) for path in (one, two, three)] == [False, True, True]
    assert first.checkpoints == [three]
    assert _preserved(directory) == 13_600.0
    clock.set(5000.0)
    del first

    warnings = collect_warnings()
    second = CheckpointManager(checkpoint, directory, max_to_keep=1)
    told = [t for t in warnings.texts if "behind the last preserved checkpoint" in t]
    assert exists(two)
    assert second.latest_checkpoint == three
    assert second.checkpoints == []
    clock.set(5010.0)
    four = second.save()
    second.sync()
    assert exists(two)
    assert exists(three)
    assert second.latest_checkpoint == four
    assert second.checkpoints == [four]
    clock.set(5020.0)
    five = second.save()
    second.sync()
    found = [exists(path) for path in (two, three, four, five)]
    assert found == [True, True, False, True]
    assert second.checkpoints == [five]
    assert _preserved(directory) == 5000.0
    assert _times(directory) == [5020.0]
    return told


@both_sizes
def test_clock_set_back_forgets_and_warns_but_deletes_nothing(tmp_path, world_size):
    """What is from the future is left alone, and the chief says that the clock fell."""
    values = values_of(run_ranks(_reset_clock, world_size, str(tmp_path)))
    assert len(values[0]) == 1
    assert "8600.000000 seconds behind" in values[0][0]
    assert values[1:] == [[]] * (world_size - 1)


def _number_by_hand(_, directory):
    step = torch.zeros((), dtype=torch.int64)
    checkpoint = Checkpoint(step=step)
    manager = CheckpointManager(checkpoint, directory, max_to_keep=2)
    for expected in (0, 2, 4, 6, 8):
        path = manager.save(checkpoint_number=step)
        assert path.endswith(f"-{expected}")
        assert int(step) == expected
        step += 2
    assert checkpoint.save_counter == 5
    last = manager.save(checkpoint_number=32)
    assert last.endswith("-32")
    assert last == manager.latest_checkpoint == latest_checkpoint(directory)
    assert get_checkpoint_state(directory).all_model_checkpoint_paths == [path, last]


@both_sizes
def test_custom_numbers_name_the_checkpoints(tmp_path, world_size):
    """A number given with the save is the one in the name, and only that."""
    _run(_number_by_hand, world_size, str(tmp_path))


def _name_by_hand(_, directory):
    checkpoint = Checkpoint()
    named = CheckpointManager(checkpoint, directory, 2, checkpoint_name="ckpt_name")
    first = named.save(checkpoint_number=5)
    default = CheckpointManager(checkpoint, directory, max_to_keep=2)
    second = default.save(checkpoint_number=5)
    default.sync()
    assert exists(first)
    assert exists(second)
    return os.path.basename(first), os.path.basename(second)


@both_sizes
def test_checkpoint_name_is_the_first_part_of_every_path(tmp_path, world_size):
    """Two names in one directory do not meet, not even under one number."""
    found = _run(_name_by_hand, world_size, str(tmp_path))
    assert found == ("ckpt_name-5", "ckpt-5")


def _restore_or_initialize(_, directory):
    initial = Checkpoint(v=torch.tensor(2.0))
    initial_path = CheckpointManager(initial, f"{directory}/init", None).save()

    value = torch.tensor(1.0)
    checkpoint = Checkpoint(v=value)
    manager = CheckpointManager(
        checkpoint,
        f"{directory}/ckpt",
        max_to_keep=None,
        init_fn=lambda: checkpoint.restore(initial_path),
    )
    assert manager.restore_or_initialize() is None
    assert value == 2.0
    saved = manager.save()
    value.fill_(9.0)
    assert manager.restore_or_initialize() == saved
    assert value == 2.0
    return saved


@both_sizes
def test_restore_or_initialize_calls_init_fn_only_before_a_save(tmp_path, world_size):
    """The first call warm-starts from elsewhere; after a save it restores."""
    directory = str(tmp_path)
    assert _run(_restore_or_initialize, world_size, directory) == f"{directory}/ckpt/ckpt-2"


def _use_path_objects(_, directory):
    root = pathlib.Path(directory)
    one = CheckpointManager(
        Checkpoint(v=torch.tensor(0.0)), root / "a", 2, checkpoint_name="ckpt_name"
    )
    saved = one.save()
    assert type(saved) is str
    assert saved == str(root / "a" / "ckpt_name-1")
    assert one.restore_or_initialize() == saved
    assert type(one.directory) is str
    assert one.checkpoints == [saved]

    two = CheckpointManager(Checkpoint(), root / "b", 2, checkpoint_name="ckpt_name")
    two.save()
    assert latest_checkpoint(root / "b") == str(root / "b" / "ckpt_name-1")
    assert type(latest_checkpoint(root / "b")) is str


@both_sizes
def test_path_like_directories_give_strings(tmp_path, world_size):
    """A directory given as a path object works, and all that comes back is text."""
    _run(_use_path_objects, world_size, str(tmp_path))


def _save_at_intervals(_, directory):
    step = torch.zeros((), dtype=torch.int64)
    manager = CheckpointManager(
        Checkpoint(v=torch.tensor(1.0)),
        directory,
        max_to_keep=None,
        step_counter=step,
        checkpoint_interval=2,
    )
    assert exists(manager.save(check_interval=True))
    step += 1
    assert manager.save() is None
    step += 1
    assert exists(manager.save())
    assert manager.save() is None
    step += 1
    assert manager.save(check_interval=True) is None
    assert exists(manager.save(check_interval=False))
    return manager.checkpoints


@both_sizes
def test_interval_lets_a_save_through_every_so_many_steps(tmp_path, world_size):
    """Within the interval a save does nothing, unless told not to look at it."""
    assert numbers(_run(_save_at_intervals, world_size, str(tmp_path))) == [1, 2, 3]


def _restore_with_interval(_, directory):
    step = torch.zeros((), dtype=torch.int64)
    checkpoint = Checkpoint(v=torch.tensor(1.0))
    CheckpointManager(checkpoint, directory, max_to_keep=None).save()
    manager = CheckpointManager(
        checkpoint, directory, None, step_counter=step, checkpoint_interval=2
    )
    restored = manager.restore_or_initialize()
    assert restored is not None
    assert manager.save() is None
    return restored


@both_sizes
def test_interval_counts_from_the_step_of_a_restore(tmp_path, world_size):
    """Right after a restore there is nothing new to save."""
    _run(_restore_with_interval, world_size, str(tmp_path))


# Tables measured on TensorFlow 2.16.1


_INTERVAL_TRACE = [
    (5, True, 1),
    (5, True, None),
    (5, False, None),
    (6, True, None),
    (7, True, None),
    (7, False, 2),
    (7, False, None),
    (9, True, None),
    (10, True, 3),
    (4, True, None),
    (4, False, 4),
    (4, False, None),
    (6, True, None),
    (7, True, 5),
    (100, True, 6),
]


def _trace_interval(_, directory):
    step = torch.tensor(5)
    checkpoint = Checkpoint()
    manager = CheckpointManager(
        checkpoint, directory, None, step_counter=step, checkpoint_interval=3
    )
    saved = 0
    for number, (at, check, expected) in enumerate(_INTERVAL_TRACE):
        step.fill_(at)
        path = manager.save(check_interval=check)
        assert path == (None if expected is None else f"{directory}/ckpt-{expected}"), (
            number
        )
        saved += path is not None
        assert checkpoint.save_counter == saved, number


@both_sizes
def test_interval_trace_is_that_of_tensorflow(tmp_path, world_size):
    """Which of fifteen calls save, forwards, backwards and at the same step."""
    _run(_trace_interval, world_size, str(tmp_path))


@pytest.mark.parametrize("interval", [0, -5])
def test_interval_of_zero_or_less_only_stops_the_same_step(tmp_path, interval):
    """Then every new step saves, but no step twice."""
    step = torch.tensor(0)
    manager = CheckpointManager(
        Checkpoint(), tmp_path, None, step_counter=step, checkpoint_interval=interval
    )
    assert manager.save() is not None
    assert manager.save() is None
    assert manager.save(check_interval=False) is None
    step += 1
    assert manager.save() is not None


def test_interval_none_saves_at_every_call(tmp_path):
    """Without an interval neither the step nor check_interval matter."""
    manager = CheckpointManager(Checkpoint(), tmp_path, None, step_counter=lambda: 7)
    paths = [manager.save(check_interval=check) for check in (True, True, False)]
    assert numbers(paths) == [1, 2, 3]


@pytest.mark.parametrize(("saved_at", "preserved"), [(13_599.0, True), (13_598.999, False)])
def test_preservation_at_its_boundary_is_that_of_tensorflow(
    tmp_path, clock, saved_at, preserved
):
    """Exactly so many hours after the clock starts is enough, a millisecond less is not."""
    clock.set(10_000.0)
    manager = CheckpointManager(Checkpoint(), tmp_path, 1, 1.0)
    clock.set(saved_at)
    first = manager.save()
    clock.set(20_000.0)
    manager.save()
    manager.sync()
    assert exists(first) is preserved
    assert _preserved(tmp_path) == (saved_at if preserved else 9999.0)


@pytest.mark.parametrize(
    ("gap", "saves", "fresh_managers", "survivors", "last_preserved"),
    [
        (18_000.0, 7, False, [1, 2, 3, 4, 5, 6, 7], 6 * 18_000.0),
        (3600.0, 7, False, [1, 2, 3, 4, 5, 6, 7], 6 * 3600.0),
        (3599.0, 7, False, [1, 3, 5, 7], 5 * 3599.0),
        (3000.0, 7, False, [2, 4, 6, 7], 18_000.0),
        (1800.0, 8, True, [2, 4, 6, 8], 10_800.0),
    ],
)
def test_preservation_pattern_is_that_of_tensorflow(
    tmp_path, clock, gap, saves, fresh_managers, survivors, last_preserved
):
    """Which checkpoints survive one hour of preservation, by the gap between saves."""
    checkpoint = Checkpoint()
    manager = CheckpointManager(checkpoint, tmp_path, 1, 1.0)
    for count in range(1, saves + 1):
        clock.set(count * gap)
        if fresh_managers and count > 1:
            manager = CheckpointManager(checkpoint, tmp_path, 1, 1.0)
        manager.save()
    manager.sync()
    assert published(tmp_path) == [f"ckpt-{number}" for number in survivors]
    assert numbers(manager.checkpoints) == survivors[-1:]
    assert _preserved(tmp_path) == last_preserved


@pytest.mark.parametrize(
    ("now", "times", "preserved", "preserved_after", "managed", "behind"),
    [
        pytest.param(1000, (100, 200), 50, 50, {1: 100, 2: 200}, None, id="plain"),
        pytest.param(1000, (100, 200), 100, 100, {2: 200}, None, id="equal-is-dropped"),
        pytest.param(1000, (100, 200), 200, 200, {}, None, id="none-newer"),
        pytest.param(1000, (100, 200), 0, 0, {1: 100, 2: 200}, None, id="zero"),
        pytest.param(150, (100, 200), 50, 50, {1: 100, 2: 150}, None, id="one-clamped"),
        pytest.param(75, (100, 200), 50, 50, {1: 75, 2: 75}, None, id="both-clamped"),
        pytest.param(50, (100, 200), 50, 50, {}, None, id="now-equal"),
        pytest.param(49, (100, 200), 50, 49, {}, "1.000000", id="clock-behind"),
        pytest.param(1000, (200, 100), 50, 50, {1: 200, 2: 100}, None, id="unsorted"),
    ],
)
def test_recovery_of_the_managed_is_that_of_tensorflow(
    tmp_path, clock, caplog, now, times, preserved, preserved_after, managed, behind
):
    """Whom a new manager manages, by its clock, their times and the last preserved."""
    checkpoint = Checkpoint()
    clock.set(preserved + 1)
    first = CheckpointManager(checkpoint, tmp_path, max_to_keep=None)
    for saved_at in times:
        clock.set(saved_at)
        first.save()
    assert _times(tmp_path) == list(times)
    assert _preserved(tmp_path) == preserved
    del first
    caplog.clear()

    clock.set(now)
    second = CheckpointManager(checkpoint, tmp_path, max_to_keep=None)
    assert numbers(second.checkpoints) == list(managed)
    assert numbers([second.latest_checkpoint]) == [2]
    told = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    if behind is None:
        assert told == []
    else:
        assert len(told) == 1
        assert f"{behind} seconds behind the last preserved" in told[0]
    # What it remembers besides shows in what it writes.
    second.save()
    second.sync()
    assert _times(tmp_path) == [*managed.values(), now]
    assert _preserved(tmp_path) == preserved_after
    assert published(tmp_path) == ["ckpt-1", "ckpt-2", "ckpt-3"]


def test_equal_times_of_a_preserved_and_a_managed_count_as_preserved(tmp_path, clock):
    """After a restart what was saved at the preserved one's very time is never deleted."""
    checkpoint = Checkpoint()
    clock.set(1000.0)
    manager = CheckpointManager(checkpoint, tmp_path, 1, keep_checkpoint_every_n_hours=1)
    clock.set(10_000.0)
    manager.save()
    manager.save()
    manager.sync()
    assert _preserved(tmp_path) == 10_000.0
    manager = CheckpointManager(checkpoint, tmp_path, 1)
    assert manager.checkpoints == []
    clock.set(10_010.0)
    manager.save()
    manager.save()
    manager.sync()
    assert published(tmp_path) == ["ckpt-1", "ckpt-2", "ckpt-4"]


def _number_in_every_way(_, directory):
    checkpoint = Checkpoint()
    manager = CheckpointManager(checkpoint, directory, max_to_keep=None)
    small = torch.tensor(100, dtype=torch.uint8)
    given = [0, -3, np.int64(70), np.array(80), torch.tensor(90), small, True]
    expected = [0, -3, 70, 80, 90, 100, 1]
    for count, (number, name) in enumerate(zip(given, expected, strict=True), 1):
        assert manager.save(checkpoint_number=number) == f"{directory}/ckpt-{name}"
        assert checkpoint.save_counter == count
    # The default number is the counter's, which counts every save.
    assert manager.save() == f"{directory}/ckpt-8"
    assert numbers(manager.checkpoints) == [*expected, 8]


@both_sizes
def test_custom_number_of_any_integer_type_is_taken(tmp_path, world_size):
    """Zero, negative ones, NumPy's and tensors' integers all name a checkpoint."""
    _run(_number_in_every_way, world_size, str(tmp_path))


def _number_wrongly(_, directory):
    checkpoint = Checkpoint()
    manager = CheckpointManager(checkpoint, directory, max_to_keep=None)
    for bad in (
        1.0,
        "1",
        np.float32(2),
        torch.tensor(1.5),
        torch.tensor([1, 2]),
        b"1",
        2**63,
    ):
        with pytest.raises(ConfigError, match="checkpoint_number"):
            manager.save(checkpoint_number=bad)
        assert not os.path.exists(directory)
        assert checkpoint.save_counter == 0
    return manager.save()


@both_sizes
def test_custom_number_that_is_no_integer_is_refused_first(tmp_path, world_size):
    """Floats, texts and what does not fit are refused before a directory is made."""
    directory = str(tmp_path / "run")
    assert _run(_number_wrongly, world_size, directory) == f"{directory}/ckpt-1"


def test_numbering_after_a_restore_goes_on_with_the_next(tmp_path):
    """The counter is part of the checkpoint; the one saved counts its own save."""
    one = Checkpoint()
    manager = CheckpointManager(one, tmp_path, max_to_keep=None)
    manager.save()
    manager.save(checkpoint_number=50)
    two = Checkpoint()
    manager = CheckpointManager(two, tmp_path, max_to_keep=None)
    assert two.save_counter == 0
    assert manager.restore_or_initialize() == str(tmp_path / "ckpt-50")
    assert two.save_counter == 2
    assert manager.save() == str(tmp_path / "ckpt-3")


@pytest.mark.parametrize(
    ("given", "left"),
    [([100, 50, 10], [50, 10]), ([1, 2, 3, 1], [3, 1]), ([5, 5, 5], [5])],
)
def test_order_is_by_time_of_saving_not_by_number(tmp_path, given, left):
    """The latest is the one saved last, the first to go is the one saved first."""
    manager = CheckpointManager(Checkpoint(), tmp_path, max_to_keep=2)
    for number in given:
        manager.save(checkpoint_number=number)
    manager.sync()
    assert numbers(manager.checkpoints) == left
    assert (
        manager.latest_checkpoint == latest_checkpoint(tmp_path) == manager.checkpoints[-1]
    )
    assert sorted(published(tmp_path)) == sorted(f"ckpt-{number}" for number in left)
    assert CheckpointManager(Checkpoint(), tmp_path, 2).checkpoints == manager.checkpoints


def test_preserved_checkpoint_is_neither_listed_nor_deleted_later(tmp_path, clock):
    """Whatever a later manager's settings, what was preserved stays on disk."""
    checkpoint = Checkpoint()
    clock.set(0.0)
    manager = CheckpointManager(checkpoint, tmp_path, 1, keep_checkpoint_every_n_hours=1)
    clock.set(3600.0)
    first = manager.save()
    clock.set(3601.0)
    second = manager.save()
    assert manager.checkpoints == [second]
    for max_to_keep in (1, 3, None):
        manager = CheckpointManager(checkpoint, tmp_path, max_to_keep)
        assert first not in manager.checkpoints
        for _ in range(2):
            clock.now += 1.0
            manager.save()
        manager.sync()
        assert first not in manager.checkpoints
        assert first not in get_checkpoint_state(tmp_path).all_model_checkpoint_paths
        assert exists(first)
    # Only saving its number again brings the path back among the managed.
    assert manager.save(checkpoint_number=1) == first
    assert manager.checkpoints[-1] == first


# init_fn


def _count_init_calls(rank, directory):
    calls = []

    def init():
        calls.append(rank)
        return "ignored"

    value = torch.tensor(1.0)
    manager = CheckpointManager(Checkpoint(v=value), directory, None, init_fn=init)
    assert calls == []
    assert manager.restore_or_initialize() is None
    assert manager.restore_or_initialize() is None
    assert calls == [rank] * 2
    saved = manager.save()
    assert manager.restore_or_initialize() == saved
    assert calls == [rank] * 2

    # It is no way out of a restore that fails.
    other = CheckpointManager(Checkpoint(w=value), directory, None, init_fn=init)
    with pytest.raises(MismatchError):
        other.restore_or_initialize()
    assert calls == [rank] * 2


def _init_badly(rank, directory, failing):
    calls = []

    def init():
        calls.append(rank)
        if rank in failing and len(calls) == 1:
            raise LookupError(f"no weights on {rank}")

    manager = CheckpointManager(Checkpoint(), directory, None, init_fn=init)
    with pytest.raises(RestoreFailed) as caught:
        manager.restore_or_initialize()
    assert sorted(caught.value.failures) == failing
    for failed in failing:
        assert f"LookupError: no weights on {failed}" in str(caught.value)
    assert isinstance(caught.value.__cause__, LookupError) is (rank in failing)
    assert manager.restore_or_initialize() is None
    assert len(calls) == 2
    return os.path.basename(manager.save())


@both_sizes
def test_init_fn_runs_each_time_until_something_is_saved(tmp_path, world_size):
    """Called without arguments on every rank; what it returns means nothing."""
    _run(_count_init_calls, world_size, str(tmp_path))


@pytest.mark.parametrize(
    ("world_size", "failing"),
    [
        (1, [0]),
        pytest.param(2, [0], marks=pytest.mark.full),
        (2, [1]),
        pytest.param(2, [0, 1], marks=pytest.mark.full),
    ],
)
def test_init_fn_that_raises_is_told_on_all_ranks(tmp_path, world_size, failing):
    """Every rank raises, naming who failed; the manager can be used again."""
    assert _run(_init_badly, world_size, str(tmp_path), failing) == "ckpt-1"


# Directories


def test_relative_directory_gives_relative_paths(tmp_path, monkeypatch):
    """Paths come back spelled as the directory was given."""
    monkeypatch.chdir(tmp_path)
    checkpoint = Checkpoint(v=torch.tensor(1.0))
    manager = CheckpointManager(checkpoint, "runs/one", max_to_keep=2)
    assert manager.directory == "runs/one"
    assert manager.save() == "runs/one/ckpt-1"
    assert manager.restore_or_initialize() == "runs/one/ckpt-1"
    assert manager.checkpoints == ["runs/one/ckpt-1"]
    assert latest_checkpoint("runs/one") == "runs/one/ckpt-1"
    checkpoint.restore("runs/one/ckpt-1")
    monkeypatch.chdir(tmp_path / "runs" / "one")
    assert latest_checkpoint(".") == "./ckpt-1"
    checkpoint.restore("ckpt-1")
    slashed = CheckpointManager(Checkpoint(v=torch.tensor(0.0)), f"{tmp_path}/runs/one/", 2)
    assert slashed.latest_checkpoint == f"{tmp_path}/runs/one/ckpt-1"


@pytest.mark.parametrize("start", ["relative", "absolute"])
def test_moved_run_directory_still_works(tmp_path, monkeypatch, start):
    """Nothing on disk holds the directory's own name, so it can be renamed or copied."""
    monkeypatch.chdir(tmp_path)
    old = "old" if start == "relative" else str(tmp_path / "old")
    manager = CheckpointManager(Checkpoint(v=torch.tensor([1.0, 2.0])), old, max_to_keep=2)
    manager.save()
    manager.save()
    manager.close()
    new = tmp_path / "elsewhere" / "new"
    new.parent.mkdir()
    os.rename(old, new)

    value = torch.zeros(2)
    manager = CheckpointManager(Checkpoint(v=value), new, max_to_keep=2)
    assert manager.checkpoints == [f"{new}/ckpt-1", f"{new}/ckpt-2"]
    assert manager.restore_or_initialize() == f"{new}/ckpt-2"
    assert value.tolist() == [1.0, 2.0]
    manager.save()
    manager.sync()
    assert published(new) == ["ckpt-2", "ckpt-3"]
    assert not os.path.exists(old)


def _only_construct(_, directory):
    missing = f"{directory}/missing"
    manager = CheckpointManager(Checkpoint(), missing, max_to_keep=1)
    assert manager.latest_checkpoint is None
    assert manager.checkpoints == []
    manager.sync()
    assert not os.path.exists(missing)

    full = f"{directory}/full"
    checkpoint = Checkpoint()
    with CheckpointManager(checkpoint, full, max_to_keep=None) as manager:
        for _ in range(3):
            manager.save()
    dist.barrier()
    before = snapshot(full)
    dist.barrier()
    manager = CheckpointManager(checkpoint, full, max_to_keep=1)
    manager.sync()
    assert numbers(manager.checkpoints) == [1, 2, 3]
    assert snapshot(full) == before
    manager.close()
    assert snapshot(full) == before


@both_sizes
def test_construction_writes_and_deletes_nothing(tmp_path, world_size):
    """Not the directory itself, and no checkpoint, though there is room for one only."""
    _run(_only_construct, world_size, str(tmp_path))


def test_smaller_limit_takes_effect_at_the_next_save(tmp_path):
    """Five checkpoints and a new limit of two leave two after one save."""
    checkpoint = Checkpoint()
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=None)
    for _ in range(5):
        manager.save()
    manager = CheckpointManager(checkpoint, tmp_path, max_to_keep=2)
    manager.restore_or_initialize()
    manager.sync()
    assert len(published(tmp_path)) == 5
    manager.save()
    manager.sync()
    assert published(tmp_path) == ["ckpt-5", "ckpt-6"]


def test_checkpoints_is_a_fresh_list_each_time(tmp_path):
    """What a caller does to the list does not reach the manager."""
    manager = CheckpointManager(Checkpoint(), tmp_path, max_to_keep=2)
    first = manager.save()
    before = manager.checkpoints
    before.clear()
    before.append("mine")
    assert manager.checkpoints == [first]
    kept = manager.checkpoints
    second = manager.save()
    assert kept == [first]
    assert manager.checkpoints == [first, second]


# The interval after a restart


def _restart_with_interval(_, directory):
    def manage(step, tracked=True):
        checkpoint = Checkpoint(step=step) if tracked else Checkpoint()
        return checkpoint, CheckpointManager(
            checkpoint, directory, None, step_counter=step, checkpoint_interval=10
        )

    step = torch.tensor(3)
    _, manager = manage(step)
    # The init_fn path knows of no last step, so the first save goes through.
    assert manager.restore_or_initialize() is None
    assert numbers([manager.save()]) == [1]
    step.fill_(20)
    assert numbers([manager.save()]) == [2]

    # A restore sets it to the step restored.
    step = torch.tensor(0)
    _, manager = manage(step)
    manager.restore_or_initialize()
    assert int(step) == 20
    assert manager.save() is None
    assert manager.save(check_interval=False) is None
    step.fill_(29)
    assert manager.save() is None
    step.fill_(30)
    assert numbers([manager.save()]) == [3]

    # Restored past the manager, it does not know, and saves even at the step restored.
    step = torch.tensor(0)
    checkpoint, manager = manage(step)
    checkpoint.restore(manager.latest_checkpoint)
    assert int(step) == 30
    assert numbers([manager.save()]) == [4]
    return manager.checkpoints


@both_sizes
def test_interval_after_a_restart_depends_on_who_restored(tmp_path, world_size):
    """restore_or_initialize sets the last step; init_fn and a plain restore do not."""
    assert numbers(_run(_restart_with_interval, world_size, str(tmp_path))) == [1, 2, 3, 4]


def test_interval_without_a_restore_lets_the_first_save_through(tmp_path):
    """A manager that has restored nothing has no last step, whatever is on disk."""
    step = torch.tensor(7)
    checkpoint = Checkpoint()

    def manage():
        return CheckpointManager(
            checkpoint, tmp_path, None, step_counter=step, checkpoint_interval=1000
        )

    assert manage().save() is not None
    assert manage().save() is not None


def test_latest_names_what_was_committed_even_if_its_files_are_gone(tmp_path, caplog):
    """The manager does not look at the files; the module's function does, and says so."""
    manager = CheckpointManager(Checkpoint(), tmp_path, max_to_keep=None)
    path = manager.save()
    (name,) = attempts_of(path)
    for file in os.listdir(tmp_path / name):
        os.unlink(tmp_path / name / file)
    assert manager.latest_checkpoint == path
    assert CheckpointManager(Checkpoint(), tmp_path, None).latest_checkpoint == path
    assert latest_checkpoint(tmp_path) is None
    assert "files are gone" in caplog.text
