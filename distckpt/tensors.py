"""Tensors <-> rows and bytes: what can be stored, and where its memory is.

A tensor is a plain one, all of it in this process, or sharded: a ``DTensor``, of which
this rank holds one box.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from distckpt import sharding, torch_versions
from distckpt.boxes import Box, whole
from distckpt.errors import UnsupportedError
from distckpt.layout import SHARDED, Row
from distckpt.sharding import Mesh, Sharding

# Looked up among what is imported already: importing it takes a second, and where there
# is a DTensor it has been imported.
_DTENSOR_MODULE = "torch.distributed.tensor"

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class Numbering:
    """What the manager calls torch's global ranks: its own numbers name the shard files.

    Args:
        members: torch's global rank of each of the manager's ranks; None where the
            manager's ranks are those of the default group.
    """

    def __init__(self, members: Sequence[int] | None = None) -> None:
        self._number_of: dict[int, int] | None = None
        if members is not None:
            self._number_of = {rank: number for number, rank in enumerate(members)}
        # With torch's object, so that its id stays its own.
        self._meshes: dict[int, tuple[Any, Mesh]] = {}

    def sharding_of(self, tensor: torch.Tensor, name: str) -> Sharding:
        """Describe how a sharded tensor lies on the manager's ranks.

        Raises:
            UnsupportedError: It lies on a rank that is none of the manager's.
        """
        layout: Any = tensor
        device_mesh = layout.device_mesh
        known = self._meshes.get(id(device_mesh))
        if known is None:
            known = device_mesh, self._mesh_of(device_mesh, name)
            self._meshes[id(device_mesh)] = known
        return Sharding(known[1], _placements_of(tensor))

    def _mesh_of(self, device_mesh: Any, name: str) -> Mesh:
        ranks = device_mesh.mesh.flatten().tolist()
        if self._number_of is not None:
            outside = [rank for rank in ranks if rank not in self._number_of]
            if outside:
                msg = (
                    f"tensor {name!r} lies on ranks that this manager does not have: "
                    f"{outside[:16]} in the default group. Make the manager over a "
                    "process group that has all of them."
                )
                raise UnsupportedError(msg)
            ranks = [self._number_of[rank] for rank in ranks]
        return sharding.mesh_of(tuple(device_mesh.shape), ranks)


def row_of(
    name: str,
    tensor: torch.Tensor,
    kind: str,
    same_as: str = "",
    numbering: Numbering | None = None,
) -> Row:
    """Describe a tensor for a layout table; a sharded one is always of that kind."""
    placed = None
    if is_sharded(tensor):
        kind, placed = SHARDED, (numbering or Numbering()).sharding_of(tensor, name)
    shape = tuple(tensor.shape)
    return Row(name, dtype_name(tensor.dtype), shape, kind, same_as, placed)


def is_sharded(tensor: torch.Tensor) -> bool:
    """Tell whether it is a ``DTensor``, even if every rank of its mesh has all of it."""
    kind = getattr(sys.modules.get(_DTENSOR_MODULE), "DTensor", None)
    return kind is not None and type(tensor) is kind


def is_cut(tensor: torch.Tensor) -> bool:
    """Tell whether it is sharded so that no rank holds all of it."""
    if not is_sharded(tensor):
        return False
    layout: Any = tensor
    spans = zip(layout.placements, layout.device_mesh.shape, strict=True)
    return any(length > 1 and not placed.is_replicate() for placed, length in spans)


def has_replicas(tensor: torch.Tensor) -> bool:
    """Tell whether it is sharded so that several ranks hold the same part."""
    if not is_sharded(tensor):
        return False
    layout: Any = tensor
    spans = zip(layout.placements, layout.device_mesh.shape, strict=True)
    return any(length > 1 and placed.is_replicate() for placed, length in spans)


def is_cut_inside(tensor: torch.Tensor) -> bool:
    """Tell whether it is sharded along another dimension than its first.

    What a rank then holds are many short runs of the whole: of whatever was saved in rows,
    nearly every block has something for every rank.
    """
    if not is_cut(tensor):
        return False
    layout: Any = tensor
    spans = zip(layout.placements, layout.device_mesh.shape, strict=True)
    return any(
        length > 1 and not placed.is_replicate() and placed.dim % tensor.dim() > 0
        for placed, length in spans
    )


def layout_of(tensor: torch.Tensor) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return a sharded tensor's mesh shape and placements, as ``sharding`` spells them."""
    layout: Any = tensor
    return tuple(layout.device_mesh.shape), _placements_of(tensor)


def any_sharded() -> bool:
    """Tell whether there can be sharded tensors in this process."""
    return _DTENSOR_MODULE in sys.modules


class Held(NamedTuple):
    """What this rank holds of a tensor.

    Attributes:
        memory: A plain tensor: the elements of the box.
        box: Where in the tensor they are; None where the rank is not in its mesh.
    """

    memory: torch.Tensor
    box: Box | None


def held(tensor: torch.Tensor) -> Held:
    """Return what this rank holds of a tensor that can be stored: no copy."""
    if not is_sharded(tensor):
        return Held(tensor.detach(), whole(tuple(tensor.shape)))
    return Held(_local_of(tensor), _box_of(tensor))


def _local_of(tensor: Any) -> torch.Tensor:
    local: Any = getattr(tensor, "_local_tensor", None)
    if type(local) is not torch.Tensor:
        # As torch documents it; it also waits for a collective that is under way.
        with torch.no_grad():
            local = tensor.to_local()
    plain: torch.Tensor = local.detach()
    return plain


def _box_of(tensor: Any) -> Box | None:
    mesh = tensor.device_mesh
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    shape, placements = tuple(tensor.shape), _placements_of(tensor)
    return _box_at(shape, tuple(mesh.shape), placements, tuple(coordinate))


# Many tensors have the same shape.
_box_at = lru_cache(maxsize=4096)(sharding.box_at)


def _placements_of(tensor: Any) -> tuple[str, ...]:
    return _spelled(*_with_types(tensor.placements), tensor_dims=tensor.dim())


def _with_types(placements: Any) -> tuple[tuple[Any, ...], tuple[type, ...]]:
    # In some versions of torch a strided shard is equal to a plain one.
    return tuple(placements), tuple(map(type, placements))


# Thousands of tensors are placed in few ways.
@lru_cache(maxsize=256)
def _spelled(
    placements: tuple[Any, ...], types: tuple[type, ...], tensor_dims: int
) -> tuple[str, ...]:
    return tuple(_spell(placement, tensor_dims) for placement in placements)


def _spell(placement: Any, tensor_dims: int) -> str:
    """Write a placement as ``sharding`` does; "" for one that it does not know.

    By exact type: a subclass, or whatever a newer torch adds, may mean something else.
    In some versions of torch a strided shard is a subclass of a plain one, and there it
    would be stored in the wrong order.
    """
    module = sys.modules[_DTENSOR_MODULE]
    types = sys.modules.get(f"{_DTENSOR_MODULE}.placement_types")
    if type(placement) is module.Replicate:
        return sharding.REPLICATE
    for kind, letter in (
        (module.Shard, sharding.SHARD),
        (getattr(types, "_StridedShard", None), sharding.STRIDED),
    ):
        if type(placement) is kind:
            negative = placement.dim < 0
            return f"{letter}{placement.dim + tensor_dims * negative}"
    return ""


def dtype_name(dtype: torch.dtype) -> str:
    """Return what a dtype is called here and in files; see ``torch_versions``."""
    return torch_versions.name_of_dtype(dtype)


def held_storable(tensor: torch.Tensor, name: str) -> Held:
    """Return what this rank holds of a tensor, if it can be stored.

    Raises:
        UnsupportedError: Its bytes are not all that it is.
    """
    reason = _why_not_whole(tensor)
    mine = Held(tensor, None)
    if not reason:
        mine = held(tensor)
        reason = _why_not_local(tensor, mine) if is_sharded(tensor) else ""
    if reason:
        msg = f"tensor {name!r} cannot be stored: {reason}"
        error = UnsupportedError(msg)
        error.may_pass = tensor.is_meta or torch.nn.parameter.is_lazy(tensor)
        raise error
    return mine


def _why_not_whole(tensor: torch.Tensor) -> str:
    if torch.nn.parameter.is_lazy(tensor):
        return "it is lazy and not initialized yet; run a forward pass first."
    if is_sharded(tensor):
        layout: Any = tensor
        return _why_not_placed(
            tuple(layout.device_mesh.shape),
            *_with_types(layout.placements),
            tensor_dims=tensor.dim(),
        )
    return _why_not_plain(tensor)


def _why_not_plain(tensor: torch.Tensor) -> str:
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return _why_not_subclass(tensor)
    if tensor.is_meta:
        return "it is on the meta device and has no content."
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}; convert it with to_dense()."
    if tensor.is_quantized:
        return f"its dtype is {tensor.dtype}; store int_repr(), scale and zero point."
    if not torch_versions.can_resolve_conj(tensor):
        return (
            f"it is a conjugated view of {tensor.dtype}, which this version of torch "
            "cannot write out; track the tensor that it is a view of."
        )
    if shares_elements(tensor):
        return (
            f"it is expanded: shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()} puts several elements at one address, and restoring "
            "into it would be undefined. Track the tensor it was expanded from, or a "
            "contiguous() copy."
        )
    return ""


def _why_not_subclass(tensor: torch.Tensor) -> str:
    what = (
        f"it is a {type(tensor).__module__}.{type(tensor).__qualname__}, a tensor subclass "
        "with memory of its own kind."
    )
    if hasattr(tensor, "trigger_wait") or hasattr(tensor, "wait"):
        return f"{what} It stands for a result that is under way: call wait() first."
    if hasattr(tensor, "__tensor_flatten__"):
        return (
            f"{what} Tensors that are made of others (__tensor_flatten__) are stored where "
            "they stand by themselves, not inside of a sharded one: with sharded "
            "parameters use an optimizer, or weights, of plain tensors."
        )
    return (
        f"{what} Give its class __tensor_flatten__() and __tensor_unflatten__(), which is "
        "torch's protocol for tensors that are made of others, or store a plain tensor."
    )


def _why_not_local(tensor: Any, mine: Held) -> str:
    if mine.box is None:
        return ""
    reason = _why_not_plain(mine.memory)
    if reason:
        return f"of the part that this rank holds: {reason}"
    if tuple(mine.memory.shape) != mine.box.shape:
        return (
            f"this rank holds {list(mine.memory.shape)} of its {list(tensor.shape)}, where "
            f"placements {list(tensor.placements)} on a mesh of shape "
            f"{tuple(tensor.device_mesh.shape)} make it {list(mine.box.shape)}."
        )
    return ""


@lru_cache(maxsize=256)
def _why_not_placed(
    mesh_shape: tuple[int, ...],
    torch_placements: tuple[Any, ...],
    types: tuple[type, ...],
    tensor_dims: int,
) -> str:
    placed = f"placements {list(torch_placements)}"
    if any(placement.is_partial() for placement in torch_placements):
        return (
            f"it is a partial result ({placed}): each rank holds a summand, none the "
            "value. Call redistribute() or full_tensor() on it first."
        )
    placements = _spelled(torch_placements, types, tensor_dims)
    if "" in placements:
        return f"its {placed} are not all of a kind that distckpt knows."
    reason = sharding.why_not(placements, len(mesh_shape), tensor_dims)
    if reason:
        return f"it has {placed}: {reason}"
    for mesh_dim, placement in enumerate(torch_placements):
        if placements[mesh_dim].startswith(sharding.STRIDED):
            expected = sharding.split_factor(placements, mesh_shape, mesh_dim)
            if placement.split_factor != expected:
                return (
                    f"it has {placed} on a mesh of shape {mesh_shape}; only the order of "
                    f"FSDP2 over tensor parallelism is supported, with the split factor "
                    f"{expected}."
                )
    return ""


def shares_elements(tensor: torch.Tensor) -> bool:
    """Tell whether several elements (may) lie at one address."""
    reach = 0  # the farthest element, by the dimensions seen so far
    spans = zip(tensor.stride(), tensor.shape, strict=True)
    if tensor.numel() == 0:
        return False
    for stride, length in sorted(span for span in spans if span[1] > 1):
        if stride <= reach:
            return True
        reach += stride * (length - 1)
    return False


def is_row_major(tensor: torch.Tensor) -> bool:
    """Tell whether a plain tensor's memory is its elements, row-major."""
    return tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg()


def is_row_major_on_host(tensor: torch.Tensor) -> bool:
    """Tell the same, of one that the host can reach."""
    return tensor.device.type == "cpu" and is_row_major(tensor)


def flat_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """View a row-major plain tensor as its bytes, in one dimension, on its device."""
    return tensor.detach().reshape(-1).view(torch.uint8)


def identity_of(tensor: torch.Tensor) -> object:
    """Return what two tensors share when they are the same memory; None if empty.

    Empty tensors all start at the same null pointer and are never the same. Sharded ones
    are the same only if they are one object: a rank's part may be empty, and all ranks
    must see the same ties.
    """
    if is_sharded(tensor):
        return id(tensor)
    if tensor.numel() == 0:
        return None
    return (
        tensor.device,
        tensor.untyped_storage().data_ptr(),
        tensor.storage_offset(),
        tuple(tensor.shape),
        tensor.stride(),
        tensor.dtype,
        tensor.is_conj(),
        tensor.is_neg(),
    )


def box_bytes(tensor: torch.Tensor, box: Box) -> memoryview:
    """Return the bytes of a region, row-major: the tensor's own memory where it can.

    Otherwise (another device, strided) a contiguous copy of that region alone. This rank
    must hold all of it.
    """
    if box.size == 0:
        return memoryview(b"")  # of no rank's part, if the tensor is sharded
    return _bytes_of(_region_of(tensor, box).cpu().contiguous())


def flat_region(tensor: torch.Tensor, box: Box) -> torch.Tensor | None:
    """View a region as its bytes, on its device; None if they do not lie in one run."""
    region = _region_of(tensor, box)
    return flat_bytes(region) if is_row_major(region) else None


def copy_box(tensor: torch.Tensor, box: Box, target: torch.Tensor) -> None:
    """Copy the bytes of a region, row-major, into so many bytes; see ``box_bytes``.

    From a device into pinned memory the copy is only put into the current stream.
    """
    region = _region_of(tensor, box)
    with torch.no_grad():
        target = target.view(region.dtype).view(region.shape)
        target.copy_(region, non_blocking=target.is_pinned())


def _region_of(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    region, own = held(tensor)
    assert own is not None, "this rank is not in the tensor's mesh"
    spans = zip(box.offset, box.shape, own.offset, strict=True)
    for dim, (start, length, origin) in enumerate(spans):
        region = region.narrow(dim, start - origin, length)
    return _as_integers(region.resolve_conj().resolve_neg())


@contextmanager
def writable_bytes(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Lend the memory of what this rank holds of a tensor, row-major, to be filled.

    Where the tensor is elsewhere or strided, a copy is lent and copied over at the end,
    unless the body raised.
    """
    target = held(tensor).memory
    if is_row_major_on_host(target):
        yield _bytes_of(target)
        return
    if not target.is_conj() and not target.is_neg():
        target = _as_integers(target)
    copy = empty_plain(target.shape, target.dtype)
    yield _bytes_of(copy)
    with torch.no_grad():
        target.copy_(copy)


def convert_into(
    buffer: memoryview, dtype: torch.dtype, start: int, data: bytearray, saved: torch.dtype
) -> None:
    """Convert elements of one dtype to those of another, into memory.

    Args:
        buffer: Of a tensor, row-major.
        dtype: The tensor's.
        start: Index of the first element that is set.
        data: The bytes of the elements.
        saved: Their dtype.
    """
    values = torch.frombuffer(data, dtype=torch.uint8).view(saved)
    target = torch.frombuffer(buffer, dtype=torch.uint8).view(dtype)
    target[start : start + values.numel()].copy_(values)


# What is allocated outlives the restore, so the caller's modes must not decide: a default
# device, or inference mode, whose tensors cannot be trained on.


def empty_plain(
    shape: Sequence[int], dtype: torch.dtype, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Allocate a plain tensor."""
    with torch.inference_mode(False):
        return torch.empty(tuple(shape), dtype=dtype, device=device)


def empty_like(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Allocate a tensor of another dtype that lies where this one does."""
    with torch.inference_mode(False), torch.no_grad():
        return torch.empty_like(tensor.detach(), dtype=dtype)


def empty_replicated(
    tensor: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype
) -> torch.Tensor:
    """Allocate a tensor that is replicated on the mesh of a sharded one."""
    module = sys.modules[_DTENSOR_MODULE]
    like: Any = tensor
    placements = [module.Replicate() for _ in like.placements]
    local = empty_plain(shape, dtype, like.device)
    with torch.inference_mode(False):
        result: torch.Tensor = module.DTensor.from_local(
            local,
            like.device_mesh,
            placements,
            run_check=False,
            shape=local.shape,
            stride=local.stride(),
        )
    return result


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """View elements as integers of their size: not every dtype can be copied strided."""
    return tensor.view(_INTEGERS.get(tensor.itemsize, tensor.dtype))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    return flat_bytes(tensor).numpy().data
