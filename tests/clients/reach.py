"""Everything that can be reached from an object: tensors and plain attributes, by path.

Two objects are compared by what this finds in both. Of a tensor it is class, dtype, shape,
strides, ``requires_grad``, attributes and bits; of everything else its plain values. A
thing that is reached twice is noted as the same as its first path: ties are compared, too.
"""

from __future__ import annotations

import collections
import datetime
import enum
import functools
import logging
import multiprocessing.connection
import multiprocessing.process
import multiprocessing.queues
import multiprocessing.synchronize
import queue
import random
import re
import threading
import types
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.placement_types import Placement
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

# Attributes that are not compared.
IGNORED = (
    # Functions by a key that counts all hooks of the process.
    re.compile(r"hooks(_with_kwargs|_always_called)?$"),
    # Caches of torch's optimizers: names for the profiler, and functions.
    re.compile(r"^_zero_grad_profile_name$|^_patch_step_function$"),
    # The overrides of bitsandbytes: one object for all optimizers of the process.
    re.compile(r"^mng$"),
    # What FSDP2 notes of its parameters, by numbers that count all of the process.
    re.compile(r"^__composable_api_state_key"),
    # How much the workers of a loader have sent by now.
    re.compile(r"^_task_info$|^_tasks_outstanding$"),
    # Drawn anew by each iterator of a loader.
    re.compile(r"^_base_seed$"),
    # The address of the object itself.
    re.compile(r"^_torchdynamo_wrapper_id$"),
)
IGNORED_PATHS = (
    # Optimizer.__setstate__ adds this one, which is False and which nobody asks for then.
    re.compile(r"\.defaults\['differentiable'\]$"),
    # A learning rate that is a tensor is filled in place, as a captured graph may hold it;
    # torch has the same tensor among the defaults, and its own load replaces only one.
    re.compile(r"\.defaults\['lr'\]$"),
)
PLAIN = (bool, int, float, complex, str, bytes, type(None), range, slice, PurePath)
AS_TEXT = (torch.dtype, torch.device, torch.layout, torch.memory_format, torch.Size)
AS_TEXT += (DeviceMesh, Placement, enum.Enum, datetime.timedelta, types.GenericAlias)
# What has no state of its own, or none that two objects could share.
SKIPPED = (
    types.ModuleType,
    types.GeneratorType,
    weakref.ref,
    type(threading.Lock()),
    type(threading.RLock()),
    threading.Event,
    threading.Thread,
    logging.Logger,
    logging.LoggerAdapter,
    weakref.WeakKeyDictionary,
    weakref.WeakValueDictionary,
    weakref.WeakSet,
    queue.Queue,
    multiprocessing.queues.Queue,
    multiprocessing.queues.SimpleQueue,
    multiprocessing.connection.Connection,
    multiprocessing.process.BaseProcess,
    multiprocessing.synchronize.SemLock,
    multiprocessing.synchronize.Event,
)
FUNCTIONS = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.MethodWrapperType,
    type,
)
_TOO_MANY = 300_000


@dataclass
class Same:
    """An object that was reached before, by another path."""

    path: str


class Note(str):
    """What a thing is that has no value itself: its class, or a function's name."""

    __slots__ = ()


@dataclass
class Bits:
    """A tensor, as it was: what describes it, and a copy of its bits."""

    kind: str
    bits: np.ndarray

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Bits)
            and self.kind == other.kind
            and np.array_equal(self.bits, other.bits)
        )

    def __repr__(self) -> str:
        return f"{self.kind} {self.bits[:4].tolist()}..."


def reach(value: Any) -> dict[str, Any]:
    """Return what can be reached from an object, by path."""
    walker = _Walker()
    walker.visit("", value)
    return walker.found


def bits_of(tensor: torch.Tensor) -> np.ndarray:
    """Return a copy of a tensor's bits, in the order of its elements."""
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    if tensor.layout != torch.strided:
        indices, values = tensor.coalesce().indices(), tensor.coalesce().values()
        return np.concatenate([bits_of(indices), bits_of(values)])
    if tensor.is_quantized:
        tensor = tensor.int_repr()
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().copy()


class _Walker:
    def __init__(self) -> None:
        self.found: dict[str, Any] = {}
        self._paths: dict[int, str] = {}
        self._kept: list[Any] = []  # so that no id is used again

    def visit(self, path: str, value: Any) -> None:
        if any(pattern.search(path) for pattern in IGNORED_PATHS):
            return
        if len(self.found) > _TOO_MANY:
            msg = f"{path}: more than {_TOO_MANY} things are reached"
            raise RuntimeError(msg)
        if isinstance(value, AS_TEXT):
            self.found[path] = repr(value)
        elif isinstance(value, PLAIN):
            # By repr, nan is nan, and 1 is not True.
            self.found[path] = value if isinstance(value, (str, bytes)) else repr(value)
        elif isinstance(value, (np.generic, re.Pattern)):
            self.found[path] = repr(value)
        elif isinstance(value, SKIPPED):
            pass
        elif isinstance(value, FUNCTIONS):
            self.found[path] = Note(f"function {getattr(value, '__qualname__', '')}")
        elif id(value) in self._paths:
            self.found[path] = Same(self._paths[id(value)])
        else:
            self._kept.append(value)
            if not _holds_only_plain(value):
                self._paths[id(value)] = path
            for name, inner in self._parts(path, value):
                self.visit(f"{path}{name}", inner)

    def _parts(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Note what a thing is; walk what it holds."""
        if isinstance(value, torch.Tensor):
            yield from self._tensor(path, value)
            return
        self.found[path] = Note(f"a {type(value).__qualname__}")
        if isinstance(value, np.ndarray):
            self.found[path] = Bits(
                f"array {value.dtype} {value.shape}",
                np.frombuffer(value.tobytes(), dtype=np.uint8),
            )
        elif isinstance(value, torch.Generator):
            yield ".state", value.get_state()
        elif isinstance(value, random.Random):
            yield ".state", repr(value.getstate())
        elif isinstance(value, functools.partial):
            yield from ((".func", value.func), (".args", value.args))
            yield ".keywords", value.keywords
        elif isinstance(value, (dict, types.MappingProxyType, collections.UserDict)):
            yield from self._items(value)
        elif isinstance(value, (list, tuple, collections.deque)):
            yield from ((f"[{i}]", item) for i, item in enumerate(value))
        elif isinstance(value, (set, frozenset)):
            self.found[path] = f"{sorted(map(repr, value))}"
        yield from self._attributes(value)

    def _items(self, value: Any) -> Iterator[tuple[str, Any]]:
        for position, (key, item) in enumerate(value.items()):
            if isinstance(key, (str, int, float, bool, tuple, type(None), enum.Enum)):
                if not (isinstance(key, str) and _is_ignored(key)):
                    yield f"[{key!r}]", item
            elif id(key) in self._paths:
                yield f"[<{self._paths[id(key)]}>]", item
            else:
                yield f"[key {position}]", key
                yield f"[value {position}]", item

    def _attributes(self, value: Any) -> Iterator[tuple[str, Any]]:
        attributes = dict(getattr(value, "__dict__", {}))
        for kind in type(value).__mro__:
            slots = kind.__dict__.get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if not name.startswith("__") and hasattr(value, name):
                    attributes[name] = getattr(value, name)
        # So that the state of an optimizer follows the groups that name its parameters.
        if isinstance(value, torch.optim.Optimizer) and "state" in attributes:
            attributes["state"] = attributes.pop("state")
        for name, inner in attributes.items():
            if not _is_ignored(name):
                yield f".{name}", inner

    def _tensor(self, path: str, value: torch.Tensor) -> Iterator[tuple[str, Any]]:
        if isinstance(value, torch.nn.parameter.UninitializedTensorMixin):
            self.found[path] = f"{type(value).__name__}, not initialized"
            return
        kind = f"{type(value).__name__} {value.dtype} {list(value.shape)}"
        kind += f" {value.layout} {value.device} grad={value.requires_grad}"
        names: list[str] = []
        if value.layout == torch.strided and _is_freed(value):
            self.found[path] = f"{kind} freed"
        elif is_traceable_wrapper_subclass(value):
            names, context = value.__tensor_flatten__()
            self.found[path] = f"{kind} {context}"
            yield from ((f".{name}", getattr(value, name)) for name in names)
        else:
            if value.layout == torch.strided:
                kind += f" {value.stride()}"
            self.found[path] = Bits(kind, bits_of(value))
        for name, inner in getattr(value, "__dict__", {}).items():
            # Walked once: a second time would replace the bits by a note of the first.
            if not _is_ignored(name) and name not in names:
                yield f".{name}", inner


def _is_freed(tensor: torch.Tensor) -> bool:
    """Tell whether its memory was given back, as FSDP2 does between two passes."""
    if is_traceable_wrapper_subclass(tensor) or tensor.is_meta:
        return False
    return tensor.numel() > 0 and tensor.untyped_storage().nbytes() == 0


def _holds_only_plain(value: Any) -> bool:
    """Tell whether it is a list or a dict of numbers: equal ones are as good."""
    if type(value) is dict:
        value = [*value.values()]
    return type(value) in (list, tuple) and all(isinstance(item, PLAIN) for item in value)


def _is_ignored(name: str) -> bool:
    return any(pattern.search(name) for pattern in IGNORED)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """List what differs: a path, what it is in one, and what it is in the other."""
    found = []
    for path in {**one, **other}:
        if path not in other:
            found.append(f"{path}: missing, is {one[path]!r:.200}")
        elif path not in one:
            found.append(f"{path}: {other[path]!r:.200}, is not to be there")
        elif one[path] != other[path]:
            found.append(f"{path}: {other[path]!r:.200}, is to be {one[path]!r:.200}")
    return found


def count(found: dict[str, Any]) -> tuple[int, int]:
    """Return how many tensors and how many plain values were found."""
    tensors = sum(isinstance(value, Bits) for value in found.values())
    plain = sum(not isinstance(value, (Bits, Same, Note)) for value in found.values())
    return tensors, plain
