"""Element types by name, without torch: their size, and what safetensors calls them.

A dtype without a safetensors counterpart that every version of that package knows is
stored as ``U8`` with one more dimension, its bytes; its true name stands in the shard
file's metadata.

A dtype that is not listed here, because a newer torch has brought it, is spelled with the
bytes of an element behind it, ``"name:2"``, and stored in the same way. A version that
lists the dtype by then takes the long name for the short one.
"""

from __future__ import annotations

import re

# torch's name -> (safetensors' name or None, bytes per element).
_DTYPES: dict[str, tuple[str | None, int]] = {
    "bool": ("BOOL", 1),
    "uint8": ("U8", 1),
    "int8": ("I8", 1),
    "uint16": ("U16", 2),
    "int16": ("I16", 2),
    "uint32": ("U32", 4),
    "int32": ("I32", 4),
    "uint64": ("U64", 8),
    "int64": ("I64", 8),
    "float16": ("F16", 2),
    "bfloat16": ("BF16", 2),
    "float32": ("F32", 4),
    "float64": ("F64", 8),
    "float8_e4m3fn": ("F8_E4M3", 1),
    "float8_e5m2": ("F8_E5M2", 1),
    "complex64": ("C64", 8),
    "complex32": (None, 4),
    "bcomplex32": (None, 4),
    "complex128": (None, 16),
    "float8_e4m3fnuz": (None, 1),
    "float8_e5m2fnuz": (None, 1),
    "float8_e8m0fnu": (None, 1),
    "float4_e2m1fn_x2": (None, 1),
    "bits16": (None, 2),
    **{f"bits{bits}": (None, 1) for bits in ("1x8", "2x4", "4x2", "8")},
    **{f"{sign}int{bits}": (None, 1) for sign in ("", "u") for bits in range(1, 8)},
}

# Their elements are nothing without a scale and a zero point.
_QUANTIZED = frozenset(("qint8", "quint8", "qint32", "quint4x2", "quint2x4"))

# The spelling of all others.
_LONG = re.compile(r"[a-z][a-z0-9_]{0,62}:[1-9][0-9]{0,2}")

# Those whose values can be converted into each other's, rounded.
FLOATS = frozenset(
    {"float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"}
    | {"float8_e4m3fnuz", "float8_e5m2fnuz"}
)

_ITEM_SIZES = {code: size for code, size in _DTYPES.values() if code is not None}


def names() -> frozenset[str]:
    """Return the names of all element types that can be stored."""
    return frozenset(_DTYPES)


def is_known(dtype: str) -> bool:
    """Tell whether tensors of this dtype can be stored."""
    if dtype in _DTYPES:
        return True
    is_long = _LONG.fullmatch(dtype) is not None
    return is_long and split(dtype)[0] not in (_DTYPES.keys() | _QUANTIZED)


def spelled(name: str, size_bytes: int) -> str:
    """Return what a dtype of torch's is called here and in files.

    Args:
        name: What torch calls it.
        size_bytes: Of one element.
    """
    if name in _DTYPES or name in _QUANTIZED:
        return name
    return f"{name}:{size_bytes}"


def split(dtype: str) -> tuple[str, int | None]:
    """Return what torch calls a dtype, and the bytes of an element if its name has them."""
    name, _, size = dtype.partition(":")
    return name, int(size) if size else None


def canonical(dtype: str) -> str:
    """Return the short name of a dtype that is listed here by now."""
    if dtype in _DTYPES or not _LONG.fullmatch(dtype):
        return dtype
    name, size = split(dtype)
    return name if name in _DTYPES and _DTYPES[name][1] == size else dtype


def item_size_bytes(dtype: str) -> int:
    """Return the bytes of one element."""
    listed = _DTYPES.get(dtype)
    if listed is not None:
        return listed[1]
    return split(dtype)[1] or 1


def safetensors_code(dtype: str) -> str:
    """Return the safetensors dtype that stores it: its own, or ``U8``."""
    listed = _DTYPES.get(dtype)
    return (listed and listed[0]) or "U8"


def has_counterpart(dtype: str) -> bool:
    """Tell whether safetensors knows this dtype itself."""
    listed = _DTYPES.get(dtype)
    return listed is not None and listed[0] is not None


def code_size_bytes(code: str) -> int | None:
    """Return the bytes of one element of a safetensors dtype; None if unknown."""
    return _ITEM_SIZES.get(code)


def dtype_of_code(code: str) -> str:
    """Return torch's name for a safetensors dtype that we read."""
    return _NAMES[code]


_NAMES = {code: name for name, (code, _) in _DTYPES.items() if code is not None}
