"""What is different between two checkpoints: names, values, and how far tensors moved."""

from __future__ import annotations

import json
import os
import tracemalloc

import numpy as np
import pytest
from click.testing import CliRunner
from unit_helpers import (
    ARRAYS,
    TABLE,
    VALUES,
    flip_bit,
    make_claimed,
    make_saved,
    save,
)

from distckpt import cli, diff
from distckpt import open as open_checkpoint
from distckpt.layout import SHARDED, SPLIT, WHOLE, Row
from distckpt.sharding import Sharding, mesh_of

MOVED = {**ARRAYS, "model/weight": ARRAYS["model/weight"].copy()}
MOVED["model/weight"][3, 5] += 2


def run(*arguments):
    """Run the command in this process."""
    return CliRunner().invoke(cli.main, ["diff", *arguments], catch_exceptions=False)


def run_json(*arguments):
    return json.loads(run(*arguments, "--json").stdout)


@pytest.fixture
def two(run_dir):
    """Return what makes two run directories, each with one checkpoint."""

    def make(first=None, second=None):
        made = [
            make_saved(f"{run_dir}-{letter}", number, step=10 * number, **(more or {}))
            for number, (letter, more) in enumerate((("a", first), ("b", second)), 1)
        ]
        return [one.prefix for one in made]

    return make


def compare(first, second):
    """Compare two paths; returns the difference, and how many bytes it took."""
    totals = []

    def begin(total):
        totals.append(total)
        return lambda size: totals.append(-size)

    with open_checkpoint(first) as one, open_checkpoint(second) as other:
        found = diff.compare(one, other, begin)
    assert sum(totals) == 0, "as many bytes as were announced"
    return found, totals[0]


def moved_of(found):
    """Return name, elements that differ, and the largest distance of what has changed."""
    return [
        (pair.name.text, pair.distance.num_differing, pair.distance.largest)
        for pair in found.tensors
    ]


# Tensors


def test_equal_checkpoints_are_equal_and_nothing_is_read(two):
    """Their checksums say so."""
    found, num_read = compare(*two())
    assert (found.is_equal, found.num_equal_tensors, num_read) == (True, 3, 0)
    assert found.num_equal_values == len(VALUES) + 1  # and one of each rank's own


def test_moved_tensor_is_found_and_only_it_is_read(two):
    found, num_read = compare(*two({}, {"arrays": MOVED}))
    assert moved_of(found) == [("model/weight", 1, 2.0)]
    assert (found.num_equal_tensors, num_read) == (2, 2 * 96 * 1024 * 4)


def laid_out(placements, world_size, array, dtype="float32"):
    """Return the arguments that save one tensor in this layout."""
    if placements is None:
        row = Row("w", dtype, array.shape, SPLIT)
    else:
        mesh = mesh_of((world_size,), range(world_size))
        placed = Sharding(mesh, placements)
        row = Row("w", dtype, array.shape, SHARDED, sharding=placed)
    own = {"own_values": lambda _: {}}
    return {"table": (row,), "arrays": {"w": array}, "world_size": world_size, **own}


LAYOUTS = [(None, 1), (None, 3), (("S0",), 4), (("S1",), 3), (("S2",), 2)]


@pytest.mark.full
@pytest.mark.parametrize("first", LAYOUTS)
@pytest.mark.parametrize("second", LAYOUTS)
def test_layouts_do_not_matter(two, first, second, monkeypatch):
    """However each side was cut, and where the pieces end that are read at a time."""
    monkeypatch.setattr(diff, "_PIECE_BYTES", 4096)
    monkeypatch.setattr(diff, "_MIXED_PIECE_BYTES", 4096)
    one = np.random.default_rng(1).standard_normal((21, 34, 55)).astype(np.float32)
    other = one.copy()
    other[4:9, 2, 7:50] = 0
    other[20, 33, 54] = 100
    paths = two(laid_out(*first, one), laid_out(*second, other))
    found, num_read = compare(*paths)
    assert num_read == 2 * one.nbytes
    assert moved_of(found) == [
        ("w", np.count_nonzero(one != other), np.abs(one.astype(float) - other).max())
    ]


@pytest.mark.parametrize("second", LAYOUTS)
def test_equal_tensors_in_other_layouts_are_equal(two, second):
    array = np.random.default_rng(1).standard_normal((21, 34, 55)).astype(np.float32)
    found, _ = compare(*two(laid_out(("S0",), 4, array), laid_out(*second, array)))
    assert (found.is_equal, found.num_equal_tensors) == (True, 1)


def test_memory_stays_bounded(two, monkeypatch):
    """Both sides are streamed: in memory is a piece of each, whatever the tensor's size."""
    monkeypatch.setattr(diff, "_PIECE_BYTES", 2**20)
    one = np.zeros((8, 2**18), np.float32)
    paths = two(laid_out(("S0",), 2, one), laid_out(("S0",), 2, one + 1))
    tracemalloc.start()
    found, num_read = compare(*paths)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_read == 2**24
    assert peak < 4 * 2**20
    assert found.tensors[0].distance.num_differing == one.size


def test_names_shapes_and_dtypes_that_differ_are_told(two):
    """What has another shape has no distance; what has another dtype has one."""
    rows = (Row("only-b", "int8", (2,), WHOLE), Row("model/bias", "float32", (9,), SPLIT))
    table = (*rows, Row("step", "int32", (), WHOLE))
    arrays = {"only-b": np.ones(2, np.int8), "model/bias": np.zeros(9, np.float32)}
    arrays["step"] = np.array(7, np.int32)
    found, _ = compare(*two({}, {"table": table, "arrays": arrays}))
    only_a, only_b = found.tensors_in_one
    assert ([name.text for name in only_a], [name.text for name in only_b]) == (
        ["model/weight"],
        ["only-b"],
    )
    bias, step = sorted(found.tensors, key=lambda pair: pair.name)
    assert (bias.shapes, bias.distance) == (((7,), (9,)), None)
    assert (step.dtypes, step.distance.largest) == (("int64", "int32"), 2.0)


def test_equal_values_of_another_dtype_are_a_difference_without_distance(two):
    table = (*TABLE[:2], Row("step", "int32", (), WHOLE))
    arrays = {**ARRAYS, "step": np.array(5, np.int32)}
    found, _ = compare(*two({}, {"table": table, "arrays": arrays}))
    assert moved_of(found) == [("step", 0, 0.0)]
    assert not found.is_equal


def test_tied_tensors_are_read_once(two):
    """And both names are told."""
    table = (*TABLE, Row("tied", "float32", (96, 1024), SPLIT, same_as="model/weight"))
    found, num_read = compare(*two({"table": table}, {"table": table, "arrays": MOVED}))
    assert [pair.name.text for pair in found.tensors] == ["model/weight", "tied"]
    assert num_read == 2 * 96 * 1024 * 4


def test_tie_that_was_cut_is_followed(two):
    """One tensor in the first, two in the second."""
    tied = (*TABLE, Row("tied", "float32", (96, 1024), SPLIT, same_as="model/weight"))
    cut = (*TABLE, Row("tied", "float32", (96, 1024), SPLIT))
    arrays = {**ARRAYS, "tied": MOVED["model/weight"]}
    found, _ = compare(*two({"table": tied}, {"table": cut, "arrays": arrays}))
    assert moved_of(found) == [("tied", 1, 2.0)]


def test_empty_tensors_are_equal(two):
    table = (Row("empty", "float32", (0, 4), SPLIT),)
    more = {"table": table, "arrays": {"empty": np.zeros((0, 4), np.float32)}}
    more["own_values"] = lambda _: {}
    found, _ = compare(*two(more, {**more, "world_size": 3}))
    assert (found.is_equal, found.num_equal_tensors) == (True, 1)


# Ranks' own


def test_what_ranks_have_of_their_own_counts_as_one(two):
    """With the ranks; elements of all of them are added up."""

    def own(rank, by=0):
        return {"rng": np.arange(4, dtype=np.uint8) + by * rank}

    found, _ = compare(*two({"own": own}, {"own": lambda rank: own(rank, 1)}))
    (pair,) = found.tensors
    assert pair.name == ("rng", (0, 1))
    assert (pair.distance.num_elements, pair.distance.num_differing) == (8, 4)


def test_own_of_ranks_that_only_one_has_is_told(two):
    found, _ = compare(*two({}, {"world_size": 4}))
    assert found.values_in_one == ([], [("seed", (2, 3))])
    assert not found.is_equal


def test_own_values_that_differ_name_the_ranks(two):
    found, _ = compare(*two({}, {"own_values": lambda rank: {"seed": 1}}))
    assert [(pair.name, pair.encoded) for pair in found.values] == [
        (("seed", (0,)), (0, 1))
    ]


# Plain values


@pytest.mark.parametrize(("old", "new"), [(1, True), (1, 1.0), ([1, 2], (1, 2)), (1, 2)])
def test_plain_values_of_another_type_are_different(two, old, new):
    """To Python most of these are equal."""
    found, _ = compare(*two({"plain": {"x": old}}, {"plain": {"x": new}}))
    assert [pair.name.text for pair in found.values] == ["x"]


def test_plain_value_that_is_nan_is_equal_to_itself(two):
    same = {"plain": {"x": float("nan")}}
    assert compare(*two(same, same))[0].is_equal


# Names alone


def test_names_only_compares_manifests_and_opens_no_file(two):
    paths = two({}, {"arrays": MOVED, "own_values": lambda _: {}, "plain": {"epoch": 4}})
    for name in os.listdir(os.path.dirname(paths[1])):
        if name.startswith("ckpt-"):
            directory = os.path.join(os.path.dirname(paths[1]), name)
            os.unlink(os.path.join(directory, "rank-00000-of-00002.safetensors"))
    assert run(*paths, "--names-only").stdout.splitlines()[-1] == (
        "not compared: the tensors' values; different: 0 tensors, 1 plain value; "
        "only in A: 0 tensors, 1 plain value; equal: 3 tensors, 0 plain values"
    )
    found = run_json(*paths, "--names-only")
    assert (found["tensors"], found["num_equal_tensors"]) == ([], 3)
    assert [value["name"] for value in found["values"]] == ["epoch"]
    assert [value["name"] for value in found["values_only_in_a"]] == ["optimizer/lr"]


# The command


def test_command_shows_what_moved_and_exits_with_1(two):
    paths = two({}, {"arrays": MOVED, "plain": {**VALUES, "epoch": 4}})
    done = run(*paths)
    lines = done.stdout.splitlines()
    assert done.exit_code == 1
    assert lines[:2] == [f"A  {paths[0]}  (step 10)", f"B  {paths[1]}  (step 20)"]
    assert lines[3].split() == [
        *["model/weight", "float32", "96x1024", "0.01%", "2"],
        f"{2 / np.linalg.norm(ARRAYS['model/weight'].astype(float)):.3g}",
    ]
    assert lines[5].split() == ["epoch", "3", "4"]
    assert lines[6] == (
        "different: 1 tensor, 1 plain value; equal: 2 tensors, 2 plain values"
    )


def test_command_on_equal_ones_says_so_and_exits_with_0(two):
    done = run(*two())
    assert (done.exit_code, done.stdout.splitlines()[2:]) == (
        0,
        ["equal: 3 tensors, 3 plain values"],
    )


def test_command_takes_run_directories_and_attempts(run_dir):
    """The newest of a directory; also a checkpoint with another of the same run."""
    chief = make_claimed(run_dir)
    attempt = save(chief, run_dir, 1)
    save(chief, run_dir, 2, arrays=MOVED)
    chief.close()
    found = run_json(os.path.join(run_dir, attempt.published), run_dir)
    assert [tensor["name"] for tensor in found["tensors"]] == ["model/weight"]
    assert "(ckpt-2)" in run(os.path.join(run_dir, "ckpt-1"), run_dir).stdout


def test_command_as_json_says_all(two):
    paths = two({}, {"arrays": MOVED, "plain": {"epoch": 4, "new": 1}})
    done = run(*paths, "--json")
    found = json.loads(done.stdout)
    assert (done.exit_code, found["equal"]) == (1, False)
    assert (found["a"]["path"], found["b"]["step"]) == (paths[0], 20)
    (tensor,) = found["tensors"]
    assert tensor.pop("relative") == pytest.approx(
        2 / np.linalg.norm(ARRAYS["model/weight"].astype(float))
    )
    assert tensor == {
        "name": "model/weight",
        "ranks": None,
        "dtypes": ["float32", "float32"],
        "shapes": [[96, 1024], [96, 1024]],
        "num_elements": 98304,
        "num_differing": 1,
        "largest": 2.0,
        "num_new_nan": 0,
        "num_new_infinite": 0,
    }
    assert found["values"] == [{"name": "epoch", "ranks": None, "a": 3, "b": 4}]
    assert found["values_only_in_b"] == [{"name": "new", "ranks": None}]


@pytest.fixture
def several(two):
    """Make two checkpoints whose tensors moved by different lengths."""
    names = ["far", "from-zero", "infinite", "near", "shape"]
    one = {name: np.full(4, 8, np.float32) for name in names}
    one["from-zero"] = np.zeros(4, np.float32)
    other = {"far": one["far"] * 2, "near": one["near"] + 1, "shape": np.zeros(5)}
    other["infinite"] = np.array([np.inf, 8, 8, np.nan], np.float32)
    other["from-zero"] = np.ones(4, np.float32)
    sides = []
    for arrays in (one, other):
        rows = [Row(name, "float32", arrays[name].shape, SPLIT) for name in names]
        arrays = {name: arrays[name].astype(np.float32) for name in names}
        sides.append({"table": tuple(rows), "arrays": arrays})
    return two(*sides)


def test_tensors_are_sorted_by_how_far_they_moved(several):
    """First what cannot be compared, then what is broken, then by relative distance."""
    names = [tensor["name"] for tensor in run_json(*several)["tensors"]]
    assert names == ["shape", "infinite", "from-zero", "far", "near"]
    by_name = [tensor["name"] for tensor in run_json(*several, "--sort", "name")["tensors"]]
    assert by_name == sorted(names)


def test_table_says_what_is_odd(several):
    lines = run(*several).stdout.splitlines()
    rows = {line.split()[0]: line for line in lines[3:8]}
    assert rows["shape"].split()[2:] == ["4", "->", "5"]
    assert rows["infinite"].endswith("1 newly NaN, 1 newly infinite")
    assert rows["from-zero"].endswith("was zero")
    assert rows["far"].split()[3:] == ["100%", "8", "1"]


def test_limit_shows_only_the_first(several):
    """The summary counts all."""
    lines = run(*several, "--limit", "2").stdout.splitlines()
    assert [line.split()[0] for line in lines[3:5]] == ["shape", "infinite"]
    assert lines[5] == "Shown are 2 of 5 tensors that differ."
    assert lines[6].startswith("different: 5 tensors")
    found = run_json(*several, "--limit", "2")
    assert (len(found["tensors"]), found["num_different_tensors"]) == (2, 5)


def test_settings_that_changed_alike_are_one_line(two):
    """Optimizers have one for each tensor."""
    plain = [{f"lr.{n}": lr for n in range(50)} for lr in (0.1, 0.2)]
    lines = run(*two(*({"plain": one} for one in plain))).stdout.splitlines()
    assert lines[3].split() == ["lr.0,", "...", "(50", "alike)", "0.1", "0.2"]
    assert len(lines) == 5


def test_of_settings_only_what_changed_is_shown(two):
    """They have many fields."""
    old = {"lr": 0.1, "betas": (0.9, 0.999), "eps": 1e-8, "foreach": None, "fused": None}
    done = run(*two({"plain": {"adam": old}}, {"plain": {"adam": {**old, "lr": 1}}}))
    row = done.stdout.splitlines()[3].split()
    assert row == ["adam", "{'lr':", "0.1}", "{'lr':", "1}"]


def test_damaged_side_exits_with_3_and_is_named(run_dir):
    """Neither equal nor different: it cannot be read."""
    first = make_saved(f"{run_dir}-a")
    second = make_saved(f"{run_dir}-b", arrays=MOVED)
    flip_bit(second.shard(0), 10_000)
    done = run(first.prefix, second.prefix)
    assert (done.exit_code, done.stdout) == (3, "")
    assert second.shard(0) in done.stderr


@pytest.mark.parametrize("missing", [0, 1])
def test_missing_side_exits_with_3(two, missing):
    paths = two()
    paths[missing] += "0"
    done = run(*paths)
    assert (done.exit_code, done.stdout) == (3, "")
    assert "newest first: ckpt-" in done.stderr


def test_names_do_nothing_to_the_terminal(two):
    name = "w\x1b[2J"
    sides = [
        {
            "table": (Row(name, "float32", (2,), SPLIT),),
            "arrays": {name: np.full(2, value, np.float32)},
            "plain": {f"{name}{value}": name},
        }
        for value in (1, 2)
    ]
    assert "\x1b" not in run(*two(*sides)).output
