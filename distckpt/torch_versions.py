"""What differs between the versions of torch, in one place; each says which one needs it.

The versions that the tests are run with, and what came of it, stand in
``docs/compatibility.md``.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

from distckpt import dtypes
from distckpt.errors import UnsupportedError

if TYPE_CHECKING:
    import torch

# torch is imported where it is used: the command looks at checkpoints without it.


def dtype_of_name(name: str, tensor: str = "") -> torch.dtype:
    """Return torch's own dtype of that name.

    ``bcomplex32`` came with torch 2.14.

    Args:
        name: torch's name of it, without the module.
        tensor: The name of the tensor that has it, for the error.

    Raises:
        UnsupportedError: This version of torch has none.
    """
    import torch

    short, size_bytes = dtypes.split(name)
    dtype = _dtypes_by_name().get(short)
    if dtype is None or (size_bytes is not None and dtype.itemsize != size_bytes):
        where = f"tensor {tensor!r}: " if tensor else ""
        msg = (
            f"{where}this version of torch ({torch.__version__}) has no dtype {short!r}; "
            "the checkpoint was written with a newer one."
        )
        if tensor:
            msg += (
                f" To restore all else, exclude {tensor!r}; distckpt.open gives its bytes."
            )
        raise UnsupportedError(msg)
    return dtype


def lacks(name: str) -> str:
    """Say for a message that this version of torch does not have a dtype; "" if it has."""
    import torch

    short, _ = dtypes.split(name)
    if short in _dtypes_by_name():
        return ""
    return f" (this version of torch, {torch.__version__}, has no dtype {short!r})"


def name_of_dtype(dtype: torch.dtype) -> str:
    """Return what a dtype is called here and in files: ``"bfloat16"``.

    One that is not listed in ``dtypes.py`` has the bytes of an element behind its name.
    """
    return dtypes.spelled(str(dtype).removeprefix("torch."), dtype.itemsize)


@cache
def _dtypes_by_name() -> dict[str, torch.dtype]:
    # A list of what there is: a name from a file is never looked up in a module.
    import torch

    found = (value for value in vars(torch).values() if isinstance(value, torch.dtype))
    return {str(dtype).removeprefix("torch."): dtype for dtype in found}


def described(kind: str, body: Any) -> Any:
    """Return a description of torch's: a dtype, a device, a layout, a size, ...

    Args:
        kind: The name of its type in torch.
        body: How it is spelled: text, and numbers for a size.

    Raises:
        UnsupportedError: This version of torch has none of that name.
    """
    import torch

    if kind == "Size":
        return torch.Size(body)
    if kind == "dtype":
        return dtype_of_name(body)
    try:
        if kind == "device":
            return torch.device(body)
        return _described(kind)[body]
    except (RuntimeError, KeyError):
        msg = f"this version of torch ({torch.__version__}) has no {kind} {body!r:.100}."
        raise UnsupportedError(msg) from None


@cache
def _described(kind: str) -> dict[str, Any]:
    import torch

    found = (one for one in vars(torch).values() if type(one) is getattr(torch, kind))
    return {str(one).removeprefix("torch."): one for one in found}


def can_resolve_conj(tensor: torch.Tensor) -> bool:
    """Tell whether torch can write out a conjugated view.

    torch 2.14: not one of ``bcomplex32``, which came with it.
    """
    import torch

    return not (tensor.is_conj() and tensor.dtype is getattr(torch, "bcomplex32", None))
