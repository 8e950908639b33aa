"""What differs between the versions of torch, in one place; each says which one needs it.

The versions that the tests are run with, and what came of it, stand in
``docs/compatibility.md``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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

    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        where = f"tensor {tensor!r}: " if tensor else ""
        msg = (
            f"{where}this version of torch ({torch.__version__}) has no dtype {name!r}; "
            "the checkpoint was written with a newer one."
        )
        raise UnsupportedError(msg)
    return dtype


def can_resolve_conj(tensor: torch.Tensor) -> bool:
    """Tell whether torch can write out a conjugated view.

    torch 2.14: not one of ``bcomplex32``, which came with it.
    """
    import torch

    return not (tensor.is_conj() and tensor.dtype is getattr(torch, "bcomplex32", None))
