"""``distckpt.open``: handles that read what is asked for, verified, without a job."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from datetime import timezone

import numpy as np
import pytest
import torch
from torch_helpers import assert_same
from torch_helpers import save as save_objects
from unit_helpers import ARRAYS, TABLE, VALUES, flip_bit, make_claimed, make_saved, save

import distckpt
from distckpt import PerRank, dtypes
from distckpt.errors import (
    CheckpointNotFound,
    ChecksumError,
    ConfigError,
    StorageError,
    TensorNotFound,
    UnsupportedError,
)
from distckpt.layout import SHARDED, SPLIT, WHOLE, Row
from distckpt.sharding import Sharding, mesh_of

WEIGHT = ARRAYS["model/weight"]


@pytest.fixture
def saved(run_dir):
    return make_saved(run_dir, 1000, step=77)


def make_cut(run_dir, placements, array, world_size=4, dtype=None):
    """Save one tensor that lies on simulated ranks in this way."""
    sharding = Sharding(mesh_of((world_size,), range(world_size)), placements)
    dtype = dtype or str(array.dtype)
    table = (Row("w", dtype, array.shape, SHARDED, sharding=sharding),)
    return make_saved(run_dir, 1, table=table, arrays={"w": array}, world_size=world_size)


def readers_of(opened):
    return opened._files.readers.files


# What a path means


def test_open_takes_a_prefix_an_attempts_directory_and_a_run_directory(run_dir):
    """A run directory means its newest checkpoint."""
    chief = make_claimed(run_dir)
    for number in (1, 2):
        attempt = save(chief, run_dir, number)
    chief.close()
    published = os.path.join(run_dir, attempt.published)
    for path in (run_dir, os.path.join(run_dir, "ckpt-2"), published):
        with distckpt.open(path) as opened:
            assert (opened.number, opened.directory) == (2, published)
    assert distckpt.open(os.path.join(run_dir, "ckpt-1")).number == 1


@pytest.mark.parametrize("what", ["nowhere", "ckpt-7", "."])
def test_open_where_nothing_is_committed_says_so(saved, what, tmp_path):
    """The same error as everywhere."""
    with pytest.raises(CheckpointNotFound):
        distckpt.open(str(tmp_path) if what == "." else os.path.join(saved.directory, what))


def test_open_of_a_run_directory_that_has_committed_nothing_says_so(run_dir):
    """It is claimed, and nothing more."""
    make_claimed(run_dir)
    with pytest.raises(CheckpointNotFound, match="no checkpoint is committed"):
        distckpt.open(run_dir)


def test_open_says_what_the_manifest_says(saved):
    """Facts about the checkpoint, without a shard file opened."""
    with distckpt.open(saved.prefix) as opened:
        assert (opened.step, opened.number, opened.world_size) == (77, 1000, 2)
        assert opened.size_bytes == sum(os.path.getsize(saved.shard(r)) for r in (0, 1))
        assert opened.plain_values == VALUES
        assert repr(opened) == "<checkpoint ckpt-1000 (step 77): 3 tensors, 2 plain values>"
        assert not readers_of(opened)


# Tensors


def test_opened_is_a_mapping_of_names_to_handles(saved):
    """In the order in which they were saved."""
    with distckpt.open(saved.prefix) as opened:
        assert list(opened) == list(ARRAYS)
        assert "model/bias" in opened
        handle = opened["model/weight"]
        assert (handle.name, handle.dtype, handle.shape) == (
            "model/weight",
            "float32",
            (96, 1024),
        )
        assert (handle.size_bytes, len(handle)) == (393_216, 96)
        assert repr(handle) == "<stored tensor model/weight: float32 [96, 1024]>"


def test_handles_read_every_tensor_bit_for_bit(saved):
    """Of two files, one whole tensor."""
    with distckpt.open(saved.prefix) as opened:
        for name, array in ARRAYS.items():
            found = opened[name].numpy()
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.tobytes() == array.tobytes() == opened[name].tobytes()
            assert np.asarray(opened[name]).tobytes() == array.tobytes()
            assert_same(opened[name].torch(), torch.from_numpy(array.copy()))


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("model/wieght", "did you mean 'model/weight'"),
        ("WEIGHT", "did you mean 'model/weight'"),
        ("model", "it holds 2 tensors, see state_dict('model')"),
        ("epoch", "it is a plain value: plain_values['epoch']"),
        ("qqqqqqqqq", "among 3."),
    ],
)
def test_mistyped_name_is_answered_with_what_was_meant(saved, name, hint):
    with distckpt.open(saved.prefix) as opened:
        assert name not in opened and opened.get(name, 5) == 5
        with pytest.raises(TensorNotFound) as caught:
            opened[name]
    assert hint in str(caught.value)


def test_mistyped_name_of_a_value_is_answered_with_near_ones(saved):
    near = sorted(VALUES)[0]
    with distckpt.open(saved.prefix) as opened:
        assert opened.plain_values.get("nothing") is None
        with pytest.raises(TensorNotFound, match=f"no plain value.*did you mean '{near}'"):
            opened.plain_values[f"{near}x"]


# In notebooks


def test_names_complete_in_notebooks(saved):
    """Where somebody types ``opened["``."""
    with distckpt.open(saved.prefix) as opened:
        assert opened._ipython_key_completions_() == [*ARRAYS]
        assert opened.plain_values._ipython_key_completions_() == [*VALUES]
        assert opened.per_rank(0)._ipython_key_completions_() == [*opened.per_rank(0)]


def test_keys_values_and_items_show_what_is_in_them(saved):
    """Of many the first, and how many more."""
    with distckpt.open(saved.prefix) as opened:
        assert repr(opened.keys()) == "<3 names: model/weight, model/bias, step>"
        described = (
            "model/weight: float32 [96, 1024], model/bias: float32 [7], step: int64 []"
        )
        assert repr(opened.values()) == repr(opened.items()) == f"<3 tensors: {described}>"
        assert {*opened.keys()} == {*ARRAYS} and "step" in opened.keys()  # noqa: SIM118
        assert [handle.name for handle in opened.values()] == [*ARRAYS]
        assert [(name, handle.name) for name, handle in opened.items()] == [
            (name, name) for name in ARRAYS
        ]
        assert opened.keys() & {"step", "x"} == {"step"}


def test_a_checkpoint_is_shown_as_a_table(run_dir):
    """Escaped: names come from anyone's files. Long ones are cut, and said to be."""
    path = save_objects(run_dir, **{f"<b>{n}": torch.ones(n, 2) for n in range(50)})
    with distckpt.open(path) as opened:
        html = opened._repr_html_()
    assert html.count("<tr>") == 1 + 40 + 1 and "... and 10 more" in html
    assert "<b>" not in html and "&lt;b&gt;3" in html and "<script" not in html
    assert "<td>float32</td><td>3 x 2</td><td>24 B</td>" in html
    assert "50 tensors, 1 plain value" in html and "by 1 rank" in html


def test_a_checkpoint_without_tensors_is_shown_too(run_dir):
    path = save_objects(run_dir, own=PerRank(3))
    with distckpt.open(path) as opened:
        assert "<table>" not in opened._repr_html_()
        assert "own: 0 tensors, 1 plain value" in opened.per_rank(0)._repr_html_()
        assert repr(opened.keys()) == "<0 names>"


def test_created_is_a_date_too(saved):
    with distckpt.open(saved.prefix) as opened:
        assert opened.created_date.timestamp() == pytest.approx(opened.created)
        assert opened.created_date.tzinfo is timezone.utc


def test_unknown_name_is_a_key_error_that_says_what_there_is(saved):
    """Of ours, and a mapping's."""
    with distckpt.open(saved.prefix) as opened:
        with pytest.raises(TensorNotFound, match="did you mean 'model/weight'"):
            opened["weight"]
        assert opened.get("nothing") is None


INDEXES = [
    np.s_[3],
    np.s_[-1],
    np.s_[2:5],
    np.s_[2:5, :, 3],
    np.s_[..., -1],
    np.s_[1, ..., 2:],
    np.s_[-3:-1, 4],
    np.s_[:, 3:3],
    np.s_[100:],
    np.s_[5, 6, 7],
    np.s_[...],
    np.s_[()],
]


@pytest.mark.parametrize("placements", [("S0",), ("S1",), ("S2",), ("R",)])
@pytest.mark.parametrize("index", INDEXES, ids=str)
def test_slices_are_those_of_numpy_however_it_was_cut(run_dir, placements, index):
    """Across the parts of four ranks."""
    array = np.arange(9 * 10 * 11, dtype=np.int32).reshape(9, 10, 11)
    saved = make_cut(run_dir, placements, array)
    with distckpt.open(saved.prefix) as opened:
        found = opened["w"][index]
        assert found.shape == array[index].shape
        assert np.array_equal(found.numpy(), array[index])
        assert np.array_equal(found.torch().numpy(), array[index])


def test_slices_of_slices_are_slices(saved):
    """Nothing is read in between."""
    with distckpt.open(saved.prefix) as opened:
        part = opened["model/weight"][10:90][-5:, 7][1:3]
        assert not readers_of(opened)
        assert np.array_equal(part.numpy(), WEIGHT[10:90][-5:, 7][1:3])


def test_handle_walks_its_first_dimension(saved):
    """As arrays do."""
    with distckpt.open(saved.prefix) as opened:
        assert [int(one.numpy()) for one in opened["model/bias"]] == list(range(7))
        with pytest.raises(UnsupportedError, match="no dimensions"):
            len(opened["step"])


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (np.s_[::2], "step 1"),
        (np.s_[::-1], "step 1"),
        (np.s_[::0], "no step of 0"),
        (np.s_["a":], "slices take integers"),
        ([1, 2], "made of integers"),
        (None, "made of integers"),
        (True, "made of integers"),
        (np.bool_(1), "made of integers"),
        (1.0, "made of integers"),
        (96, "position 96 in a dimension of 96"),
        (-97, "position -97"),
        (np.s_[0, 0, 0], "2 dimensions"),
        (np.s_[..., ...], "one '...' only"),
    ],
    ids=str,
)
def test_other_indexes_are_refused_with_the_reason(saved, index, reason):
    """Rather than taken for something else."""
    with distckpt.open(saved.prefix) as opened:
        with pytest.raises(ConfigError, match=reason):
            opened["model/weight"][index]


@pytest.mark.parametrize("dtype", sorted(dtypes._DTYPES))
@pytest.mark.parametrize("shape", [(3, 5), (), (0, 4)], ids=str)
def test_every_dtype_and_shape_comes_back(run_dir, dtype, shape):
    """By numpy where it can, by torch where torch can, as bytes always."""
    size = dtypes.item_size_bytes(dtype)
    raw = np.arange(np.prod(shape) * size, dtype=np.uint8) % 2
    array = raw.reshape(-1, size).view(f"V{size}").reshape(shape)
    table = (Row("w", dtype, shape, WHOLE),)
    saved = make_saved(run_dir, 1, table=table, arrays={"w": array})
    with distckpt.open(saved.prefix) as opened:
        handle = opened["w"]
        assert handle.tobytes() == raw.tobytes()
        if dtype == "bfloat16" or any(n in dtype for n in ("complex32", "float8", "int4")):
            with pytest.raises(UnsupportedError, match=r"numpy has no .*torch\(\)"):
                handle.numpy()
        elif hasattr(np, dtype):
            assert (str(handle.numpy().dtype), handle.numpy().shape) == (dtype, shape)
        if not hasattr(torch, dtype):
            with pytest.raises(
                UnsupportedError, match=rf"'w'.*torch .* no dtype '{dtype}'"
            ):
                handle.torch()
            return
        found = handle.torch()
        assert (found.dtype, tuple(found.shape)) == (getattr(torch, dtype), shape)


def test_torch_under_the_callers_modes_gives_a_plain_tensor_on_the_host(saved):
    """One that can be trained on."""
    with distckpt.open(saved.prefix) as opened, torch.inference_mode():
        with torch.device("meta"):
            found = opened["model/weight"].torch()
    assert (found.device.type, found.is_inference()) == ("cpu", False)


def test_stream_gives_pieces_of_one_length_in_order(saved):
    """So that what is larger than memory can be copied."""
    with distckpt.open(saved.prefix) as opened:
        pieces = [bytes(piece) for piece in opened["model/weight"].stream(50_000)]
    assert {len(piece) for piece in pieces[:-1]} == {50_000}
    assert b"".join(pieces) == WEIGHT.tobytes()


# What is read


def test_slice_reads_only_blocks_that_overlap(run_dir):
    """Of one file among four, one block of eight."""
    array = np.zeros((4, 2**20), dtype=np.uint8)
    saved = make_cut(run_dir, ("S0",), array)
    with distckpt.open(saved.prefix) as opened:
        opened["w"][2, 5:9].numpy()
        assert {rank: r.num_block_reads for rank, r in readers_of(opened).items()} == {2: 1}


def test_damage_is_named_where_it_is_read_and_only_there(saved):
    """A block that is not asked for does no harm."""
    flip_bit(saved.shard(1), 10_000)
    with distckpt.open(saved.prefix) as opened:
        assert np.array_equal(opened["model/weight"][:48].numpy(), WEIGHT[:48])
        for read in ("numpy", "torch", "tobytes"):
            with pytest.raises(ChecksumError, match="block 0") as caught:
                getattr(opened["model/weight"][60], read)()
            assert saved.shard(1) in str(caught.value)


def test_memory_is_what_was_asked_for_and_little_more(run_dir):
    """Of a column cut from 32 MiB, not the rows around it."""
    array = np.zeros((4096, 8192), dtype=np.uint8)
    saved = make_cut(run_dir, ("S0",), array)
    with distckpt.open(saved.prefix) as opened:
        opened["w"][0].numpy()
        tracemalloc.start()
        try:
            assert opened["w"][:, 7].numpy().shape == (4096,)
            for piece in opened["w"].stream(2**20):
                assert len(piece) == 2**20
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 8 * 2**20


def test_many_files_are_not_held_open_all_at_once(run_dir, monkeypatch):
    """A process may hold a thousand, and there are jobs with more ranks."""
    monkeypatch.setattr(sys.modules["distckpt.few_open"], "_MAX_OPEN", 3)
    array = np.arange(64, dtype=np.int64)
    saved = make_cut(run_dir, ("S0",), array, world_size=8)
    with distckpt.open(saved.prefix) as opened:
        for _ in range(2):
            assert np.array_equal(opened["w"].numpy(), array)
            assert len(readers_of(opened)) == 3


def test_closed_is_closed(saved):
    """It says so, and holds nothing open."""
    with distckpt.open(saved.prefix) as opened:
        opened["step"].numpy()
    assert not readers_of(opened)
    with pytest.raises(ConfigError, match=r"after close\(\)"):
        opened["step"].numpy()


def test_checkpoint_deleted_meanwhile_is_a_storage_error(saved):
    """Retention of a running job does not wait for notebooks."""
    opened = distckpt.open(saved.prefix)
    os.unlink(saved.shard(0))
    with pytest.raises(StorageError, match=r"rank-00000"):
        opened["step"].numpy()


# Ties, values, what each rank has of its own


def test_tied_tensor_reads_the_memory_it_shares(run_dir):
    """Written once, named twice."""
    table = (*TABLE, Row("tied", "float32", (7,), SPLIT, same_as="model/bias"))
    saved = make_saved(run_dir, 1, table=table)
    with distckpt.open(saved.prefix) as opened:
        assert np.array_equal(opened["tied"][2:].numpy(), ARRAYS["model/bias"][2:])


def test_plain_values_have_handles_where_they_had_tensors(run_dir):
    """Types as they were saved."""

    class Stateful:
        def state_dict(self):
            return {"t": torch.arange(3), "pair": (1, [torch.ones(2)]), 7: b"x"}

        def load_state_dict(self, state):
            pass

    path = save_objects(run_dir, thing=Stateful(), lr=0.5)
    with distckpt.open(path) as opened:
        found = opened.plain_values["thing"]
        assert opened.plain_values["lr"] == 0.5
        assert found["t"].torch().tolist() == [0, 1, 2]
        assert found["pair"][1][0].numpy().tolist() == [1.0, 1.0]
        assert (type(found["pair"]), found[7]) == (tuple, b"x")
        assert found["t"] is opened["thing/t"]


def test_per_rank_gives_one_ranks_own(run_dir):
    """Tensors and values, apart from the job's."""
    own = {"x": torch.arange(4), "seed": 9}
    path = save_objects(run_dir, w=torch.ones(2), own=PerRank(own))
    with distckpt.open(path) as opened:
        assert list(opened) == ["w"]
        rank = opened.per_rank(0)
        assert (rank.rank, list(rank)) == (0, ["own/x"])
        assert rank["own/x"][1:3].numpy().tolist() == [1, 2]
        assert rank.plain_values == {"own/seed": 9}
        assert repr(rank) == "<rank 0's own: 1 tensor, 1 plain value>"
        for wrong in (1, -1, True, "0"):
            with pytest.raises(ConfigError, match="saved by 1 rank; there is no rank"):
                opened.per_rank(wrong)


def test_per_rank_values_of_simulated_ranks_are_each_ones_own(saved):
    """By rank."""
    with distckpt.open(saved.prefix) as opened:
        found = [opened.per_rank(rank).plain_values for rank in (0, 1)]
    assert found == [{"seed": 0}, {"seed": 1}]


def test_open_does_not_import_torch(saved):
    """A look at a checkpoint costs no seconds."""
    code = (
        "import sys, distckpt\n"
        f"with distckpt.open({saved.prefix!r}) as opened:\n"
        "    assert opened['model/weight'][2:4].numpy().shape == (2, 1024)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
