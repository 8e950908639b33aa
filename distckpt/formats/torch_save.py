"""What ``torch.save`` writes, written without torch and without holding a tensor.

An archive holds a pickle of the tree, in which tensors say which record their bytes are
in. ``torch_load.py`` reads it.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping
from math import prod
from typing import Any

from distckpt import dtypes
from distckpt.errors import UnsupportedError
from distckpt.files import NewFile
from distckpt.formats import pickle_write
from distckpt.formats.foreign import PIECE_BYTES, Tensor
from distckpt.formats.pickle_tree import Call, Global, Reference
from distckpt.formats.zip_file import ZipWriter
from distckpt.instances import is_namespace
from distckpt.value_tags import Wrapper

_ROOT = "archive"

# How torch has always spelled the older element types: by a class of their storage.
STORAGES = {
    "float32": "FloatStorage",
    "float64": "DoubleStorage",
    "float16": "HalfStorage",
    "bfloat16": "BFloat16Storage",
    "uint8": "ByteStorage",
    "int8": "CharStorage",
    "int16": "ShortStorage",
    "int32": "IntStorage",
    "int64": "LongStorage",
    "bool": "BoolStorage",
    "complex64": "ComplexFloatStorage",
    "complex128": "ComplexDoubleStorage",
}
# The others it spells by name, in a storage of bytes.
_BY_NAME = {
    *{"uint16", "uint32", "uint64", "complex32", "bcomplex32"},
    *{name for name in dtypes.names() if name.startswith(("float8", "float4", "bits"))},
}

_UTILS = "torch._utils"
BY_STORAGE = Global(_UTILS, "_rebuild_tensor_v2")
BY_DTYPE = Global(_UTILS, "_rebuild_tensor_v3")
UNTYPED = Global("torch.storage", "UntypedStorage")
ORDERED = Global("collections", "OrderedDict")
COUNTER = Global("collections", "Counter")


def check_writable(dtype: str, name: str) -> None:
    """Raise ``UnsupportedError`` for an element type that torch.save cannot write."""
    if dtype not in STORAGES and dtype not in _BY_NAME:
        msg = f"tensor {name!r}: torch.save has no way to write {dtype}."
        raise UnsupportedError(msg)


def write(file: NewFile, start: int, tree: Any, storages: Mapping[str, Tensor]) -> int:
    """Write one archive; returns where in the file it ends.

    Args:
        file: The file.
        start: Where in it the archive begins.
        tree: What ``torch.load`` returns, with ``stored_tensor``s for tensors.
        storages: What they refer to, by key.

    Raises:
        FormatError, StorageError: A tensor cannot be read, or the file not be written.
    """
    writer = ZipWriter(file, start)
    _add_bytes(writer, "data.pkl", pickle_write.dumps(tree))
    _add_bytes(writer, "byteorder", b"little")
    for key, tensor in storages.items():
        name = f"{_ROOT}/data/{key}"
        writer.add(name, tensor.size_bytes, tensor.stream(PIECE_BYTES))
    _add_bytes(writer, "version", b"3\n")
    return writer.finish()


def _add_bytes(writer: ZipWriter, name: str, data: bytes) -> None:
    writer.add(f"{_ROOT}/{name}", len(data), [data])


def stored_tensor(dtype: str, shape: tuple[int, ...], key: str) -> Call:
    """Return what stands in a tree for a tensor whose bytes are the record of a key."""
    strides = tuple(prod(shape[dim + 1 :]) for dim in range(len(shape)))
    numel = prod(shape)
    if dtype in STORAGES:
        storage, length = Global("torch", STORAGES[dtype]), numel
    else:
        storage, length = UNTYPED, numel * dtypes.item_size_bytes(dtype)
    reference = Reference(("storage", storage, key, "cpu", length))
    arguments = (reference, 0, shape, strides, False, Call(ORDERED))
    if dtype in STORAGES:
        return Call(BY_STORAGE, arguments)
    return Call(BY_DTYPE, (*arguments, Global("torch", dtype)))


def to_tree(value: Any) -> Any:
    """Turn a plain value of a checkpoint into what a pickle can say.

    A numpy scalar becomes the Python number, an array lists of such; a set, and whatever
    else is like a list, a list; what a pickle would need a class for, text.
    """
    kind = type(value)
    if kind in _WRITTEN:
        return value
    if kind in (list, tuple):
        return kind(map(to_tree, value))
    if kind in (dict, defaultdict):
        return {to_tree(key): to_tree(item) for key, item in value.items()}
    if kind is OrderedDict:
        pairs = [(to_tree(key), to_tree(item)) for key, item in value.items()]
        return Call(ORDERED, items=pairs)
    if kind is Counter:
        return Call(COUNTER, (to_tree(dict(value)),))
    if kind in (set, frozenset, deque):
        return [to_tree(item) for item in value]
    if kind is Wrapper:
        return to_tree(value._asdict() | {"inner": [*value.inner]})
    if is_namespace(value):
        return to_tree(vars(value))
    if kind is bytearray:
        return bytes(value)
    if hasattr(value, "dtype"):
        return _of_numpy(value)
    return str(value)


_WRITTEN = frozenset((type(None), bool, int, float, str, bytes))


def _of_numpy(value: Any) -> Any:
    # What has no Python number of its own would come back as itself.
    other = {"m": str, "M": str, "f": "f8", "c": "c16"}.get(value.dtype.kind)
    return to_tree(value.tolist() if other is None else value.astype(other).tolist())
