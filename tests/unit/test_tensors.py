"""Tensors: every dtype and memory layout comes back bit for bit, or is refused by name."""

from __future__ import annotations

import math
import os
import re

import pytest
import torch
from torch import nn
from torch_helpers import assert_same, raw, restore, round_trip, rows_of, save, stored

import distckpt
from distckpt import (
    Checkpoint,
    MismatchError,
    RestoreOptions,
    UnsupportedError,
    dtypes,
    layout,
    paths,
    readers,
    shard_header,
    tensors,
    torch_versions,
)
from distckpt.boxes import Box, whole
from distckpt.layout import SHARDED, WHOLE

ALL_DTYPES = sorted(
    {value for value in vars(torch).values() if isinstance(value, torch.dtype)}, key=str
)
QUANTIZED = [d for d in ALL_DTYPES if str(d).startswith(("torch.qint", "torch.quint"))]
WITH_BYTES = [d for d in ALL_DTYPES if d not in QUANTIZED]


def _filled(dtype, count=12):
    """Make a vector whose bytes are all different, as far as the dtype lets them."""
    if dtype is torch.bool:
        return torch.arange(count) % 3 == 0
    item = torch.empty(0, dtype=dtype).element_size()
    pattern = torch.arange(7, 7 + count * item) * 41 % 256
    return pattern.to(torch.uint8).view(dtype)


def _zeros(dtype, shape):
    count = math.prod(shape)
    if dtype is torch.bool:
        return torch.zeros(shape, dtype=dtype)
    item = torch.empty(0, dtype=dtype).element_size()
    return torch.zeros(count * item, dtype=torch.uint8).view(dtype).view(shape)


def test_every_dtype_with_bytes_comes_back_bit_for_bit(run_dir):
    """Vectors, matrices, scalars and empty tensors of every dtype of torch survive."""
    saved = {}
    for dtype in WITH_BYTES:
        name = tensors.dtype_name(dtype)
        vector = _filled(dtype)
        saved[f"{name}.vector"] = vector
        saved[f"{name}.matrix"] = vector.view(3, 4)
        saved[f"{name}.scalar"] = vector[5]
        saved[f"{name}.empty"] = vector[:0].view(0, 3)
    live = {
        key: _zeros(value.dtype, tuple(value.shape)) if value.numel() else value.clone()
        for key, value in saved.items()
    }
    names = {tensors.dtype_name(dtype) for dtype in WITH_BYTES}
    assert names == {name for name in dtypes.names() if hasattr(torch, name)}
    assert len(names) >= 40
    round_trip(run_dir, {"tensors": saved}, {"tensors": live})
    assert_same(live, saved)


def test_every_dtype_that_can_be_strided_comes_back_bit_for_bit(run_dir):
    """Transposed and stepped views are stored as what they look like."""
    saved, live = {}, {}
    for dtype in WITH_BYTES:
        name = tensors.dtype_name(dtype)
        vector = _filled(dtype)
        views = {"stepped": vector[1::2], "transposed": vector.view(3, 4).t()}
        for kind, view in views.items():
            saved[f"{name}.{kind}"] = view
            live[f"{name}.{kind}"] = _zeros(dtype, tuple(view.shape))
    round_trip(run_dir, {"tensors": saved}, {"tensors": live})
    for name, view in saved.items():
        assert raw(live[name]) == _raw_of_view(view), name


def _raw_of_view(view):
    """Gather a view's bytes through its strides, without torch copying it."""
    flat = torch.as_strided(
        view, (view.untyped_storage().nbytes() // view.itemsize,), (1,), 0
    )
    data = raw(flat)
    item = view.itemsize
    found = bytearray()
    for index in torch.cartesian_prod(*map(torch.arange, view.shape)).reshape(
        -1, view.dim()
    ):
        at = view.storage_offset() + sum(
            int(i) * s for i, s in zip(index, view.stride(), strict=True)
        )
        found += data[at * item : (at + 1) * item]
    return bytes(found)


def test_dtypes_known_to_the_format_are_those_of_torch():
    """The torch-free table of dtypes says what torch itself says."""
    for dtype in WITH_BYTES:
        name = tensors.dtype_name(dtype)
        assert dtypes.is_known(name)
        assert dtypes.item_size_bytes(name) == torch.empty(0, dtype=dtype).element_size()
        assert torch_versions.dtype_of_name(name) is dtype
    with pytest.raises(UnsupportedError, match="no dtype 'float7'"):
        torch_versions.dtype_of_name("float7")


@pytest.mark.filterwarnings("ignore:.*quantize.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", ALL_DTYPES, ids=str)
def test_each_dtype_of_this_torch_is_stored_or_refused_by_its_name(run_dir, dtype):
    """Whatever a new version of torch brings: never stored as something else."""
    name = tensors.dtype_name(dtype)
    if dtype in QUANTIZED:
        saved = torch._empty_affine_quantized((4,), scale=1.0, zero_point=0, dtype=dtype)
    else:
        saved = _filled(dtype)
    if not dtypes.is_known(name):
        with pytest.raises(UnsupportedError, match=rf"'parts/weights'.*torch\.{name}\b"):
            save(run_dir, parts={"weights": saved})
        return
    live = _zeros(dtype, tuple(saved.shape))
    round_trip(run_dir, {"parts": {"weights": saved}}, {"parts": {"weights": live}})
    assert_same(live, saved)


NOT_LISTED = ["uint16", "float8_e5m2", "complex32", "int4"]


@pytest.mark.parametrize("name", NOT_LISTED)
def test_dtype_that_is_not_listed_is_stored_as_bytes_and_restored(
    run_dir, monkeypatch, name
):
    """As one of a torch newer than this version of distckpt would be."""
    dtype = getattr(torch, name)
    saved = _filled(dtype)
    with monkeypatch.context() as patched:
        patched.delitem(dtypes._DTYPES, name)
        assert tensors.dtype_name(dtype) == f"{name}:{saved.element_size()}"
        live = _zeros(dtype, tuple(saved.shape))
        path = save(run_dir, parts={"weights": saved})
        Checkpoint(parts={"weights": live}).restore(path)
        assert_same(live, saved)
        assert distckpt.open(path)["parts/weights"].tobytes() == raw(saved)
    # A version that lists it by now, in a new process.
    monkeypatch.setattr(layout, "_decoded", layout._Decoded())
    shard_header._parse_entries.cache_clear()
    live = _zeros(dtype, tuple(saved.shape))
    Checkpoint(parts={"weights": live}).restore(path)
    assert_same(live, saved)
    opened = distckpt.open(path)["parts/weights"]
    assert (opened.dtype, opened.tobytes()) == (name, raw(saved))
    assert_same(opened.torch(), saved)


@pytest.mark.parametrize("name", NOT_LISTED)
def test_dtype_that_this_torch_lacks_is_named_and_can_be_excluded(
    run_dir, monkeypatch, name
):
    """Whatever else there is is restored; its bytes can be had."""
    saved, others = _filled(getattr(torch, name)), torch.arange(3)
    monkeypatch.delitem(dtypes._DTYPES, name)
    path = save(run_dir, state=Holder({"x": saved, "others": others}), t=others)
    known = {k: v for k, v in torch_versions._dtypes_by_name().items() if k != name}
    monkeypatch.setattr(torch_versions, "_dtypes_by_name", lambda: known)
    live = Holder({})
    reason = rf"'state/x'.*{re.escape(torch.__version__)}.*no dtype '{name}'.*exclude"
    with pytest.raises(UnsupportedError, match=reason):
        Checkpoint(state=live, t=torch.zeros(3, dtype=torch.int64)).restore(path)
    other = save(f"{run_dir}-2", x=saved)
    reason = rf"x: {name}:.* float32 \[12\] here \(.*{re.escape(torch.__version__)}, has no"
    with pytest.raises(MismatchError, match=reason):
        Checkpoint(x=torch.zeros(12)).restore(other)
    t = torch.zeros(3, dtype=torch.int64)
    Checkpoint(t=t).restore(path, RestoreOptions(exclude="state"))
    assert_same(t, others)
    with distckpt.open(path) as opened:
        assert opened["state/x"].tobytes() == raw(saved)
        with pytest.raises(UnsupportedError, match=f"no dtype '{name}'"):
            opened["state/x"].torch()


class Holder:
    """An object with a state dict, which may be anything."""

    def __init__(self, state):
        self.state = state

    def state_dict(self):
        """Return it."""
        return self.state

    def load_state_dict(self, state):
        """Take another one."""
        self.state = state


@pytest.mark.filterwarnings("ignore:.*quantize.*")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_quantized_tensor_is_refused_by_name(run_dir):
    """A tensor whose bytes are not all that it is cannot be stored."""
    quantized = torch.quantize_per_tensor(torch.ones(3), 0.5, 1, torch.qint8)
    with pytest.raises(UnsupportedError, match=r"'parts/weights'.*qint8.*int_repr"):
        save(run_dir, parts={"weights": quantized})
    for dtype in QUANTIZED:
        assert not dtypes.is_known(tensors.dtype_name(dtype))


def test_special_floats_keep_their_payload(run_dir):
    """NaNs keep their payload and zeros their sign."""
    bits = torch.tensor([0x7FC00001, -0x3FFFFF, 0x7F800000, -(2**31), 1], dtype=torch.int32)
    live = torch.zeros(5)
    round_trip(run_dir, {"x": bits.view(torch.float32)}, {"x": live})
    assert torch.equal(live.view(torch.int32), bits)


def test_strided_live_tensor_is_filled_in_place(run_dir):
    """Restoring into views changes exactly the elements that they show."""
    base = torch.arange(24.0).view(4, 6)
    round_trip(
        run_dir,
        {"t": base.t(), "columns": base[:, 1::2], "flat": base.reshape(-1)[3:7]},
        {
            "t": (t := torch.zeros(4, 6)).t(),
            "columns": (frame := torch.full((4, 6), -1.0))[:, 1::2],
            "flat": (line := torch.zeros(10))[2:6],
        },
    )
    assert torch.equal(t, base)
    assert torch.equal(frame[:, 1::2], base[:, 1::2])
    assert bool((frame[:, 0::2] == -1).all())
    assert line.tolist() == [0, 0, 3, 4, 5, 6, 0, 0, 0, 0]


@pytest.mark.parametrize("dtype", [d for d in ALL_DTYPES if d.is_complex], ids=str)
def test_conjugated_view_of_any_dtype_is_stored_or_refused_by_its_name(run_dir, dtype):
    """torch cannot resolve all of them."""
    view = _filled(dtype, 3).conj()
    if dtype is getattr(torch, "bcomplex32", None):
        with pytest.raises(UnsupportedError, match=r"'parts/w'.*view of torch\.bcomplex32"):
            save(run_dir, parts={"w": view})
        return
    path = save(run_dir, parts={"w": view})
    assert raw(stored(path)["parts/w"]) == raw(view)


def test_conjugate_and_negative_views_keep_their_values(run_dir):
    """Lazy conj and neg bits are resolved when written and heeded when read."""
    source = torch.tensor([1 + 2j, 3 - 4j, -5 + 6j])
    conj, neg = source.conj(), source.conj().imag
    assert conj.is_conj() and neg.is_neg()
    plain, plain_neg = torch.zeros(3, dtype=torch.complex64), torch.zeros(3)
    path = save(run_dir, conj=conj, neg=neg)
    restore(run_dir, conj=plain, neg=plain_neg)
    assert torch.equal(plain, conj.resolve_conj())
    assert torch.equal(plain_neg, neg.resolve_neg())
    assert_same(stored(path)["conj"], conj.resolve_conj())

    other = torch.zeros(3, dtype=torch.complex64)
    third = torch.zeros(3, dtype=torch.complex64)
    restore(run_dir, conj=other.conj(), neg=third.conj().imag)
    assert torch.equal(other, source)
    assert torch.equal(third.conj().imag, neg)


def test_same_memory_is_stored_once(run_dir):
    """Two names of one tensor are one entry on disk; the second row points to the first."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    shared = torch.arange(5)
    path = save(run_dir, model=model, one=shared, two=shared, view=shared[:])
    assert sorted(stored(path)) == ["model/0.weight", "one"]
    rows = rows_of(path)
    assert rows["model/1.weight"].same_as == "model/0.weight"
    assert rows["two"].same_as == rows["view"].same_as == "one"

    fresh = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    fresh[1].weight = fresh[0].weight
    live = torch.zeros(5, dtype=torch.int64)
    restore(run_dir, model=fresh, one=live, two=live, view=live[:])
    assert_same(fresh[1].weight.detach(), model[0].weight.detach())
    assert_same(live, shared)


def test_tied_tensors_restore_into_untied_ones_but_not_the_reverse(run_dir, tmp_path):
    """Memory of its own takes a copy; shared memory cannot hold two different tensors."""
    shared = torch.arange(3)
    save(run_dir, one=shared, two=shared)
    one, two = torch.zeros(3, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    restore(run_dir, one=one, two=two)
    assert_same([one, two], [shared, shared])

    other = str(tmp_path / "other")
    save(other, one=shared, two=shared.clone())
    live = torch.full((3,), 7)
    with pytest.raises(MismatchError, match="two: the same memory as one here"):
        restore(other, one=live, two=live)
    assert live.tolist() == [7, 7, 7]


def test_overlapping_but_different_views_are_stored_each(run_dir):
    """Views of one storage that are not the same view keep their own names and bytes."""
    base = torch.arange(10)
    path = save(run_dir, head=base[:6], tail=base[4:], all=base)
    assert sorted(stored(path)) == ["all", "head", "tail"]
    live = torch.zeros(10, dtype=torch.int64)
    restore(run_dir, head=live[:6], tail=live[4:], all=live)
    assert_same(live, base)


def test_empty_tensors_are_never_taken_for_one_another(run_dir):
    """Empty tensors all start at a null pointer and are still different tensors."""
    saved = {"a": torch.empty(0), "b": torch.empty(0, 4), "c": torch.empty(2, 0).bool()}
    path = save(run_dir, **saved)
    assert not any(row.same_as for row in rows_of(path).values())
    live = {key: torch.empty_like(value) for key, value in saved.items()}
    restore(run_dir, **live)
    assert_same(live, saved)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(3).expand(2, 3),
        lambda: torch.ones(1).expand(4),
        lambda: torch.arange(6.0).as_strided((3, 3), (1, 1)),
        lambda: torch.arange(9.0).as_strided((2, 4), (3, 1)),
    ],
    ids=["rows", "scalar", "diagonal", "overlap"],
)
def test_tensor_with_shared_elements_is_refused_by_name(run_dir, make):
    """Several elements at one address cannot be restored into, so they are not saved."""
    with pytest.raises(UnsupportedError, match=r"'parts/x'.*expanded"):
        save(run_dir, parts={"x": make()})


def test_expanded_dimension_of_one_element_is_no_overlap(run_dir):
    """A stride that is never stepped does not matter."""
    saved = torch.arange(3.0).expand(1, 3).as_strided((1, 3), (0, 1))
    live = torch.zeros(1, 3)
    round_trip(run_dir, {"x": saved}, {"x": live})
    assert_same(live, saved)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: torch.empty(2, device="meta"), "meta device"),
        (lambda: torch.eye(2).to_sparse(), "to_dense"),
        (lambda: nn.UninitializedParameter(), "lazy"),
        (lambda: nn.UninitializedBuffer(), "lazy"),
    ],
    ids=["meta", "sparse", "lazy-parameter", "lazy-buffer"],
)
def test_tensor_without_content_of_its_own_is_refused_by_name(run_dir, make, reason):
    """What has no bytes, or more than bytes, is refused when saving and restoring."""
    with pytest.raises(UnsupportedError, match=rf"'deep/~i3'.*{reason}"):
        save(run_dir, deep={3: make()})
    save(run_dir, deep={3: torch.zeros(2, 2)})
    with pytest.raises(UnsupportedError, match=rf"'deep/~i3'.*{reason}"):
        restore(run_dir, deep={3: make()})


@pytest.mark.filterwarnings("ignore:.*nested tensors.*:UserWarning")
def test_tensor_subclass_with_other_memory_is_refused_by_name(run_dir):
    """A nested tensor of the jagged layout is refused as the subclass that it is."""
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    with pytest.raises(UnsupportedError, match=r"'x'.*NestedTensor"):
        save(run_dir, x=nested)


def test_meta_and_lazy_modules_are_refused_by_name(run_dir):
    """A module that has no weights yet says which, in both directions."""
    with torch.device("meta"):
        meta = nn.Linear(2, 2)
    lazy = nn.LazyLinear(2)
    with pytest.raises(UnsupportedError, match=r"'model/weight'.*meta"):
        save(run_dir, model=meta)
    with pytest.raises(UnsupportedError, match=r"'model/weight'.*lazy"):
        save(run_dir, model=lazy)
    save(run_dir, model=nn.Linear(2, 2))
    with pytest.raises(UnsupportedError, match=r"'model/weight'.*meta"):
        restore(run_dir, model=meta)
    with pytest.raises(UnsupportedError, match=r"'model/weight'.*lazy"):
        restore(run_dir, model=lazy)


@pytest.mark.parametrize(
    ("local", "more", "text"),
    [
        (torch.empty(3, device="meta"), {}, "of the part .* meta device"),
        (torch.ones(3).to_sparse(), {}, "of the part .* layout is torch.sparse"),
        (torch.ones(1).expand(3), {}, "of the part .* expanded"),
        (torch.ones(3), {"shape": (4,), "stride": (1,)}, r"holds \[3\] of its \[4\]"),
    ],
    ids=["meta", "sparse", "expanded", "shape"],
)
def test_sharded_tensor_of_an_unusual_part_is_refused(on_a_mesh, local, more, text):
    """What a rank holds must be a plain tensor of the shape that follows."""
    from torch.distributed.tensor import DTensor

    tensor = on_a_mesh(torch.ones(3), **more)
    tensor = DTensor(local, tensor._spec, requires_grad=False)
    with pytest.raises(UnsupportedError, match=f"'w' cannot be stored: .*{text}"):
        tensors.held_storable(tensor, "w")


def test_sharded_tensor_with_an_unknown_placement_is_refused(on_a_mesh):
    """A subclass of a known one may mean something else, and in some versions does."""
    from torch.distributed.tensor import Partial, Shard

    class Mine(Shard):
        pass

    with pytest.raises(UnsupportedError, match="not all of a kind"):
        tensors.held_storable(on_a_mesh(torch.ones(3), [Mine(0)]), "w")
    with pytest.raises(UnsupportedError, match=r"partial result .*redistribute\(\)"):
        tensors.held_storable(on_a_mesh(torch.ones(3), [Partial()]), "w")


def test_subclass_of_a_sharded_tensor_is_refused(on_a_mesh):
    """What else it is, nobody knows."""
    from torch.distributed.tensor import DTensor

    class Mine(DTensor):
        pass

    sharded = on_a_mesh(torch.ones(3))
    tensor = Mine(sharded.to_local(), sharded._spec, requires_grad=False)
    with pytest.raises(UnsupportedError, match="Mine, a tensor subclass"):
        tensors.held_storable(tensor, "w")


def test_sharded_tensor_is_described_and_read_by_its_part(on_a_mesh):
    """Ranks are the manager's, memory is this process's own."""
    local = torch.arange(12.0).view(3, 4).t()
    tensor = on_a_mesh(local)
    row = tensors.row_of("w", tensor, WHOLE, numbering=tensors.Numbering([5, 0]))
    assert (row.kind, row.shape) == (SHARDED, (4, 3))
    assert row.sharding.mesh.ranks == [1]
    with pytest.raises(UnsupportedError, match=r"'w' lies on ranks .* \[0\]"):
        tensors.row_of("w", tensor, WHOLE, numbering=tensors.Numbering([5]))
    memory, box = tensors.held(tensor)
    assert memory.data_ptr() == local.data_ptr()
    assert box == whole((4, 3))
    part = tensors.box_bytes(tensor, Box((1, 1), (2, 2)))
    assert part == local[1:3, 1:].contiguous().numpy().tobytes()
    assert tensors.box_bytes(tensor, Box((0, 0), (0, 9))) == b""
    with tensors.writable_bytes(tensor) as buffer:
        buffer[:] = bytes(48)
    assert local.abs().sum() == 0


def test_tensor_is_allocated_where_a_sharded_one_lies(on_a_mesh):
    """Optimizer state without a step: of the same layout, or replicated."""
    tensor = on_a_mesh(torch.ones(4, 3))
    alike = tensors.empty_like(tensor, torch.bfloat16)
    assert (alike.placements, alike.dtype) == (tensor.placements, torch.bfloat16)
    assert not alike.requires_grad
    copies = tensors.empty_replicated(tensor, (2, 5), torch.float64)
    assert copies.placements[0].is_replicate()
    assert (tuple(copies.shape), copies.dtype) == ((2, 5), torch.float64)


def test_subclasses_with_ordinary_memory_are_stored(run_dir):
    """A parameter, a buffer and a plain Python subclass are tensors like others."""

    class Tagged(torch.Tensor):
        pass

    saved = {
        "parameter": nn.Parameter(torch.arange(3.0)),
        "buffer": nn.Buffer(torch.arange(4.0)),
        "tagged": torch.arange(5.0).as_subclass(Tagged),
    }
    live = {key: torch.zeros_like(value) for key, value in saved.items()}
    round_trip(run_dir, saved, live)
    for key, value in saved.items():
        assert raw(live[key]) == raw(value)


def test_leaf_that_requires_grad_is_filled_in_place(run_dir):
    """Parameters outside of modules keep their identity and stay leaves."""
    live = nn.Parameter(torch.zeros(3))
    round_trip(run_dir, {"p": nn.Parameter(torch.ones(3))}, {"p": live})
    assert live.is_leaf and live.requires_grad and live.grad_fn is None
    assert live.tolist() == [1, 1, 1]


def test_large_tensor_of_many_blocks_comes_back(run_dir):
    """Several checksum blocks and a ragged end make one tensor again."""
    saved = torch.arange(300_001, dtype=torch.int32).view(-1)
    live = torch.zeros_like(saved)
    strided = torch.zeros(300_001, 2, dtype=torch.int32)[:, 0]
    path = save(run_dir, x=saved, y=saved.clone())
    restore(run_dir, x=live, y=strided)
    assert torch.equal(live, saved) and torch.equal(strided, saved)
    directory = str(readers.locate(path).directory)
    size = os.path.getsize(os.path.join(directory, paths.shard_file(0, 1)))
    assert size % 4096 == 2 * saved.nbytes % 4096
