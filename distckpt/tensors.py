"""Tensors <-> rows and bytes: what can be stored, and where its memory is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from distckpt import dtypes
from distckpt.boxes import Box
from distckpt.errors import UnsupportedError
from distckpt.layout import Row

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def row_of(name: str, tensor: torch.Tensor, kind: str, same_as: str = "") -> Row:
    """Describe a tensor for a layout table."""
    return Row(name, dtype_name(tensor.dtype), tuple(tensor.shape), kind, same_as)


def dtype_name(dtype: torch.dtype) -> str:
    """Return torch's own name of a dtype, without the module: ``"bfloat16"``."""
    return str(dtype).removeprefix("torch.")


def dtype_of_name(name: str) -> torch.dtype:
    """Return the dtype of that name.

    Raises:
        UnsupportedError: This version of torch has none; the checkpoint was written
            with a newer one.
    """
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        msg = f"this version of torch ({torch.__version__}) has no dtype {name!r}."
        raise UnsupportedError(msg)
    return dtype


def check_storable(tensor: torch.Tensor, name: str) -> None:
    """Raise ``UnsupportedError`` for a tensor whose bytes are not all that it is."""
    reason = _why_not(tensor)
    if reason:
        msg = f"tensor {name!r} cannot be stored: {reason}"
        raise UnsupportedError(msg)


def _why_not(tensor: torch.Tensor) -> str:
    if torch.nn.parameter.is_lazy(tensor):
        return "it is lazy and not initialized yet; run a forward pass first."
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return (
            f"it is a {type(tensor).__module__}.{type(tensor).__qualname__}, a tensor "
            "subclass with memory of its own kind; sharded tensors (DTensor) are not "
            "supported yet."
        )
    if tensor.is_meta:
        return "it is on the meta device and has no content."
    if tensor.layout is not torch.strided:
        return f"its layout is {tensor.layout}; convert it with to_dense()."
    if tensor.is_quantized:
        return f"its dtype is {tensor.dtype}; store int_repr(), scale and zero point."
    if not dtypes.is_known(dtype_name(tensor.dtype)):
        return f"its dtype {tensor.dtype} is unknown."
    if shares_elements(tensor):
        return (
            f"it is expanded: shape {tuple(tensor.shape)} with strides "
            f"{tensor.stride()} puts several elements at one address, and restoring "
            "into it would be undefined. Track the tensor it was expanded from, or a "
            "contiguous() copy."
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


def identity_of(tensor: torch.Tensor) -> object:
    """Return what two tensors share when they are the same memory; None if empty.

    Empty tensors all start at the same null pointer and are never the same.
    """
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

    Otherwise (another device, strided) a contiguous copy of that region alone.
    """
    region = tensor.detach()
    for dim, (start, length) in enumerate(zip(box.offset, box.shape, strict=True)):
        region = region.narrow(dim, start, length)
    region = _as_integers(region.resolve_conj().resolve_neg()).cpu().contiguous()
    return _bytes_of(region)


@contextmanager
def writable_bytes(tensor: torch.Tensor) -> Iterator[memoryview]:
    """Lend a tensor's memory, row-major, to be filled.

    Where the tensor is elsewhere or strided, a copy is lent and copied over at the end,
    unless the body raised.
    """
    target = tensor.detach()
    if (
        target.device.type == "cpu"
        and target.is_contiguous()
        and not target.is_conj()
        and not target.is_neg()
    ):
        yield _bytes_of(target)
        return
    if not target.is_conj() and not target.is_neg():
        target = _as_integers(target)
    copy = torch.empty(target.shape, dtype=target.dtype)
    yield _bytes_of(copy)
    with torch.no_grad():
        target.copy_(copy)


def _as_integers(tensor: torch.Tensor) -> torch.Tensor:
    """View elements as integers of their size: not every dtype can be copied strided."""
    return tensor.view(_INTEGERS.get(tensor.itemsize, tensor.dtype))


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    flat = tensor.reshape(-1).view(torch.uint8)
    return flat.numpy().data
