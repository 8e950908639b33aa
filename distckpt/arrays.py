"""numpy's arrays and scalars as plain values: their bytes, dtype, shape and order."""

from __future__ import annotations

import base64
import re
import sys
from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import numpy.typing as npt

    Array: TypeAlias = npt.NDArray[Any]

# What numpy's ``dtype.str`` is for the kinds that are stored; its parser understands far
# more, and never sees anything else.
_DTYPE = re.compile(
    r"[<>|][biufc][0-9]{1,2}"
    r"|\|S[0-9]{1,9}|[<>]U[0-9]{1,9}"
    r"|[<>][mM]8(?:\[[0-9]{0,9}(?:Y|M|W|D|h|m|s|ms|us|ns|ps|fs|as)\])?"
)
_MAX_DIMS = 32  # of numpy before version 2
_ROWS, _COLUMNS = "C", "F"

# Arrays of more bytes are stored like tensors, where a tensor can be stored.
INLINE_BYTES = 4096
# Nowhere do they stand among plain values with more.
MAX_INLINE_BYTES = 2**20


class Form(NamedTuple):
    """What an array is, apart from its elements.

    Attributes:
        dtype: Its element type, as numpy spells it, with the byte order.
        shape: Its shape.
        order: ``"C"``, or ``"F"`` where its columns lie together.
    """

    dtype: str
    shape: tuple[int, ...]
    order: str

    @staticmethod
    def of(fields: Sequence[Any]) -> Form:
        """Check what stands in a file.

        Raises:
            ValueError: It describes no array.
        """
        dtype, shape, order = fields
        is_form = (
            type(dtype) is str
            and _DTYPE.fullmatch(dtype) is not None
            and type(shape) is list
            and len(shape) <= _MAX_DIMS
            and all(type(length) is int and 0 <= length < 2**62 for length in shape)
            and order in (_ROWS, _COLUMNS)
        )
        if not is_form:
            msg = f"no array: {[*fields]!r:.100}"
            raise ValueError(msg)
        return Form(dtype, tuple(shape), order)

    @property
    def fields(self) -> list[Any]:
        """Return what stands in a file."""
        return [self.dtype, list(self.shape), self.order]

    @property
    def size_bytes(self) -> int:
        """Bytes of all elements."""
        import numpy as np

        return prod(self.shape) * np.dtype(self.dtype).itemsize

    def array_of(self, memory: Array) -> Array:
        """View an array's elements in memory as the array; no copy.

        Args:
            memory: As ``memory_of`` returns it, of any element type of that width.
        """
        import numpy as np

        shape = self.shape if self.order == _ROWS else self.shape[::-1]
        array: Array = memory.reshape(-1).view(np.dtype(self.dtype)).reshape(shape)
        return array if self.order == _ROWS else array.T


def form_of(array: Array) -> Form:
    """Describe an array."""
    is_by_columns = array.flags.f_contiguous and not array.flags.c_contiguous
    return Form(array.dtype.str, array.shape, _COLUMNS if is_by_columns else _ROWS)


def memory_of(array: Array) -> Array:
    """Return an array's elements row-major: without a copy where they lie in order."""
    import numpy as np

    form = form_of(array)
    ordered = array if form.order == _ROWS else array.T
    return np.ascontiguousarray(ordered).reshape(ordered.shape)


def why_not(value: Any) -> str:
    """Say why an array or a scalar of numpy's cannot be stored; empty: it can."""
    dtype = value.dtype
    if _DTYPE.fullmatch(dtype.str) and dtype.names is None and dtype.subdtype is None:
        return ""
    if dtype.kind == "O":
        return (
            "its elements are Python objects: store value.tolist(), or an array of a dtype "
            "of numbers"
        )
    if dtype.names is not None:
        return "its elements have fields: store each field as an array, in a dict"
    if dtype.kind == "V":
        return (
            f"numpy has no numbers of dtype {dtype}: store value.view() as unsigned "
            "integers of that width, or a tensor of torch's"
        )
    return f"its dtype is {dtype}"


def is_array(value: object) -> bool:
    """Tell whether a value is an array of numpy's, of whatever class."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def is_scalar(value: object) -> bool:
    """Tell whether a value is a scalar of numpy's."""
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.generic)


def is_plain_array(value: object) -> bool:
    """Tell whether a value is an array of numpy's own class."""
    return is_array(value) and type(value) is sys.modules["numpy"].ndarray


def encoded_scalar(value: Any) -> list[str]:
    """Return what stands in a file for a scalar."""
    raw = value.tobytes()[: value.dtype.itemsize]  # of no characters it has one
    return [value.dtype.str, base64.b64encode(raw).decode("ascii")]


def decoded_scalar(dtype_text: Any, data: Any) -> Any:
    """Return the scalar.

    Raises:
        ValueError, TypeError: Not what ``encoded_scalar`` returns.
    """
    return decoded(Form.of((dtype_text, [], _ROWS)), data)[()]


def encoded_elements(array: Array) -> str:
    """Return what stands in a file for the elements of an array."""
    return base64.b64encode(memory_of(array).tobytes()).decode("ascii")


def decoded(form: Form, data: Any) -> Array:
    """Return an array of its own memory.

    Raises:
        ValueError, TypeError: The data are not those of such an array.
    """
    import numpy as np

    raw = base64.b64decode(data, validate=True)
    if len(raw) != form.size_bytes:
        msg = f"{len(raw)} bytes for {list(form.shape)} of {form.dtype}"
        raise ValueError(msg)
    if not raw:
        return np.zeros(form.shape, form.dtype)
    return form.array_of(np.frombuffer(bytearray(raw), np.uint8))


def tensor_memory_of(array: Array) -> Array:
    """View an array's elements as numbers of a type that torch has; ``array_of`` goes back.

    Dates are integers, texts the numbers of their characters, all else bytes. A text's
    characters, or bytes, are one more dimension.
    """
    memory = memory_of(array)
    if not memory.flags.writeable:
        memory = memory.copy()  # torch warns of memory that may not be written
    kind, item = memory.dtype.kind, memory.dtype.itemsize
    if kind == "b" or (kind in "iufc" and memory.dtype.str in _OF_TORCH):
        return memory
    shape = memory.shape
    if kind in "mM":
        return memory.view("<i8")
    width = 4 if kind == "U" else 1
    numbers = memory.reshape(-1).view("<u4" if width == 4 else "u1")
    return numbers.reshape(*shape, item // width)


# Element types of numpy's that torch has, too.
_OF_TORCH = frozenset(
    f"{'|' if bytes_ == 1 else '<'}{kind}{bytes_}"
    for kinds, sizes in (("iu", (1, 2, 4, 8)), ("f", (2, 4, 8)), ("c", (8, 16)))
    for kind in kinds
    for bytes_ in sizes
)
