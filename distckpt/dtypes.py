"""Element types by name, without torch: their size, and what safetensors calls them.

A dtype without a safetensors counterpart that every version of that package knows is
stored as ``U8`` with one more dimension, its bytes; its true name stands in the shard
file's metadata.
"""

from __future__ import annotations

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
    return dtype in _DTYPES


def item_size_bytes(dtype: str) -> int:
    """Return the bytes of one element."""
    return _DTYPES[dtype][1]


def safetensors_code(dtype: str) -> str:
    """Return the safetensors dtype that stores it: its own, or ``U8``."""
    return _DTYPES[dtype][0] or "U8"


def has_counterpart(dtype: str) -> bool:
    """Tell whether safetensors knows this dtype itself."""
    return _DTYPES[dtype][0] is not None


def code_size_bytes(code: str) -> int | None:
    """Return the bytes of one element of a safetensors dtype; None if unknown."""
    return _ITEM_SIZES.get(code)


def dtype_of_code(code: str) -> str:
    """Return torch's name for a safetensors dtype that we read."""
    return _NAMES[code]


_NAMES = {code: name for name, (code, _) in _DTYPES.items() if code is not None}
