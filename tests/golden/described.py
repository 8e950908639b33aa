"""Describe tracked objects in memory as JSON: the values that golden directories must hold.

Nothing here asks distckpt. Names, ties and bytes are worked out from the live objects
alone, by the rules of docs/format.md, so that a fault of the library shows.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import datetime
import enum
import hashlib
import types
import uuid
from collections import Counter, OrderedDict, defaultdict, deque
from decimal import Decimal
from fractions import Fraction
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard
from torch.nn.parallel import DistributedDataParallel

from distckpt import PerRank, Replicated, StoredTensor
from distckpt.value_tags import Wrapper as StoredWrapper

# The list of the files in a format's folder, with their digests.
SUMS = "sha256.json"
# Longer content stands in the expected values as its digest.
_MAX_BYTES = 48
_MAX_TEXT = 200
# An array of more bytes is stored like a tensor.
_MAX_INLINE = 4096


class Description:
    """What one rank holds of some tracked objects.

    Attributes:
        tensors: By name: dtype, shape and bytes; of a sharded one also the indices of the
            elements that the bytes are.
        same_as: Names of tensors that are the memory of an earlier one.
        values: Plain values by name, spelled.
    """

    def __init__(self):
        self.tensors = {}
        self.same_as = {}
        self.values = {}
        self._first_with = {}

    def add_tensor(self, name, tensor):
        """Add a tensor under its name, and whether it is an earlier one."""
        tensor = tensor.detach()
        dtype, shape = str(tensor.dtype).removeprefix("torch."), list(tensor.shape)
        if isinstance(tensor, DTensor):
            indices = _indices_here(tensor)
            if indices is None:
                data = b""
                indices = torch.empty(0, dtype=torch.int64)
            else:
                data = raw(tensor.to_local())
            self.tensors[name] = (dtype, shape, data, indices.reshape(-1).tolist())
        else:
            self.tensors[name] = (dtype, shape, raw(tensor), None)

    def note_tie(self, name, tensor):
        """Note whether a tensor is the memory of one that was added before."""
        identity = _identity(tensor)
        if identity is not None:
            first = self._first_with.setdefault(identity, name)
            if first != name:
                self.same_as[name] = first

    def to_parts(self):
        """Return it as plain containers, to be sent to another rank."""
        return self.tensors, self.same_as, self.values


def describe(objects):
    """Describe what of some tracked objects belongs to the job."""
    found = Description()
    owners = _owners(objects, per_rank=False)
    for name, value in objects.items():
        _visit(found, part(name), value, owners, wanted=False, is_own=False)
    return found


def describe_own(objects):
    """Describe what of some tracked objects is this rank's own."""
    found = Description()
    owners = _owners(objects, per_rank=True)
    for name, value in objects.items():
        _visit(found, part(name), value, owners, wanted=True, is_own=False)
    return found


def merged(parts):
    """Put what all ranks hold together; returns tensors, ties and values as JSON.

    Fails where ranks contradict each other.
    """
    tensors, same_as, values = {}, {}, {}
    pieces = {}
    for rank_tensors, rank_ties, rank_values in parts:
        for name, (dtype, shape, data, indices) in rank_tensors.items():
            if indices is None:
                _put(tensors, name, spelled_tensor(dtype, shape, data))
                continue
            known = pieces.setdefault(name, (dtype, shape, {}))
            assert known[:2] == (dtype, shape), name
            size = len(data) // max(1, len(indices))
            for at, index in enumerate(indices):
                element = data[at * size : (at + 1) * size]
                assert known[2].setdefault(index, element) == element, name
        for name, first in rank_ties.items():
            _put(same_as, name, first)
        for name, value in rank_values.items():
            _put(values, name, value)
    for name, (dtype, shape, elements) in pieces.items():
        assert sorted(elements) == [*range(int(np.prod(shape)))], name
        data = b"".join(elements[index] for index in sorted(elements))
        _put(tensors, name, spelled_tensor(dtype, shape, data))
    return tensors, same_as, values


def _put(known, name, value):
    assert known.setdefault(name, value) == value, f"{name}: ranks differ"


# Names


def part(key):
    """Spell one key as a part of a name."""
    if type(key) is int:
        return f"~i{key}"
    return str(key).replace("~", "~0").replace("/", "~1")


def _owners(objects, per_rank):
    """Map each parameter to its full name, by the first tracked module that has it."""
    found = {}

    def visit(path, value, is_own):
        if isinstance(value, Replicated):
            value = value.value
        if isinstance(value, PerRank):
            visit(path, value.value, True)
        elif isinstance(value, nn.Module):
            if is_own == per_rank or per_rank:
                module = _inner(value)
                for name, parameter in module.named_parameters(remove_duplicate=False):
                    found.setdefault(id(parameter), f"{path}/{part(name)}")
        elif isinstance(value, (dict, list)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            for key, item in items:
                visit(f"{path}/{part(key)}", item, is_own)

    for name, value in objects.items():
        visit(part(name), value, False)
    return found


def _inner(module):
    return module.module if isinstance(module, DistributedDataParallel) else module


# The walk


def _visit(found, path, value, owners, *, wanted, is_own):
    """Describe what is below a path, if it is the rank's own or the job's, as wanted."""
    if isinstance(value, Replicated):
        value = value.value
    if isinstance(value, PerRank):
        _visit(found, path, value.value, owners, wanted=wanted, is_own=True)
    elif isinstance(value, (dict, list)) and _holds_tracked(value):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            below = f"{path}/{part(key)}"
            _visit(found, below, item, owners, wanted=wanted, is_own=is_own)
    elif wanted != is_own:
        return
    elif isinstance(value, nn.Module):
        _visit_module(found, path, _inner(value))
    elif isinstance(value, torch.optim.Optimizer):
        _visit_optimizer(found, path, value, owners)
    elif isinstance(value, torch.Tensor):
        _leaf(found, path, value)
    elif _is_stateful(value):
        _value(found, path, value.state_dict())
    else:
        _value(found, path, value)


def _visit_module(found, path, module):
    for key, value in module.state_dict(keep_vars=True).items():
        name = f"{path}/{part(key)}"
        if isinstance(value, torch.Tensor):
            _leaf(found, name, value)
        else:
            _value(found, name, value)


def _visit_optimizer(found, path, optimizer, owners):
    for index, group in enumerate(optimizer.param_groups):
        settings = {
            key: value
            for key, value in sorted(group.items())
            if key not in ("params", "param_names")
        }
        if not group["params"]:
            _value(found, f"{path}/empty_groups/{part(index)}", settings)
        for parameter in group["params"]:
            owner = owners[id(parameter)]
            _value(found, f"{path}/settings/{owner}", settings)
            for key, value in optimizer.state.get(parameter, {}).items():
                name = f"{path}/state/{owner}/{part(key)}"
                if isinstance(value, torch.Tensor):
                    _leaf(found, name, value)
                else:
                    _value(found, name, value)


def _leaf(found, name, tensor):
    if is_wrapper(tensor):
        found.values[name] = spelled(tensor)
        for inner in tensor.__tensor_flatten__()[0]:
            _leaf(found, f"{name}/~inner/{part(inner)}", getattr(tensor, inner))
        return
    found.add_tensor(name, tensor)
    found.note_tie(name, tensor)


def _value(found, name, value):
    for below, tensor in _tensors_in(value, name):
        _leaf(found, below, tensor)
    found.values[name] = spelled(value)


def _tensors_in(value, name):
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, np.ndarray) and value.nbytes > _MAX_INLINE:
        yield name, torch.from_numpy(value)
    elif isinstance(value, (dict, list, tuple)):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            if isinstance(item, (torch.Tensor, dict, list, tuple)):
                yield from _tensors_in(item, f"{name}/{part(key)}")


def _is_stateful(value):
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def _holds_tracked(value):
    if isinstance(value, (PerRank, torch.Tensor)) or _is_stateful(value):
        return True
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        return False
    return any(map(_holds_tracked, value))


# Tensors


def is_wrapper(tensor):
    """Tell whether a tensor is made of others."""
    made_of_others = hasattr(tensor, "__tensor_flatten__")
    return made_of_others and not isinstance(tensor, DTensor)


def raw(tensor):
    """Return the bytes of a plain tensor's elements, row-major."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    # Not every dtype can be copied through strides; integers of its size can.
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    plain = plain.view(integers.get(plain.itemsize, plain.dtype)).contiguous()
    return plain.reshape(-1).view(torch.uint8).numpy().tobytes()


def _identity(tensor):
    if isinstance(tensor, DTensor):
        return id(tensor)
    if tensor.numel() == 0:
        return None
    flags = (tensor.is_conj(), tensor.is_neg())
    return (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype, flags)


def _indices_here(tensor):
    """Return which elements of a sharded tensor this rank holds; None if none can be.

    Cut as ``torch.chunk`` cuts. ``DTensor.full_tensor`` puts uneven parts on meshes of two
    dimensions together wrong.
    """
    mesh, placements = tensor.device_mesh, tensor.placements
    coordinate = mesh.get_coordinate()
    if coordinate is None:
        return None
    indices = torch.arange(tensor.numel()).view(tensor.shape)
    dims = [*range(mesh.ndim)]
    # Of a strided cut, what comes after it in the mesh was cut first.
    if any(type(placement) is _StridedShard for placement in placements):
        dims.reverse()
    for mesh_dim in dims:
        if placements[mesh_dim].is_replicate():
            continue
        dim = placements[mesh_dim].dim
        parts = indices.chunk(mesh.shape[mesh_dim], dim)
        at = coordinate[mesh_dim]
        indices = parts[at] if at < len(parts) else indices.narrow(dim, 0, 0)
    assert indices.shape == tensor.to_local().shape, "this rank holds another part"
    return indices


def spelled_tensor(dtype, shape, data):
    """Spell a tensor: its bytes if they are few, else their digest."""
    if len(data) <= _MAX_BYTES:
        content = base64.b64encode(data).decode()
    else:
        content = f"sha256:{hashlib.sha256(data).hexdigest()}"
    return {"dtype": dtype, "shape": [*shape], "data": content}


# Plain values


def spelled(value: Any) -> Any:
    """Spell a plain value so that equal spellings mean equal types and contents.

    A dict with string keys is an object, so that two can be compared key by key; all else
    is text, and its digest if it is long.
    """
    if type(value) is dict and value and all(type(key) is str for key in value):
        return {key: spelled(item) for key, item in value.items()}
    text = _text(value)
    if len(text) > _MAX_TEXT:
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"
    return text


def _text(value):
    if isinstance(value, np.generic):
        return f"numpy {value.dtype.str} {value.tobytes().hex()}"
    if is_wrapper(value):
        name, (_, meta) = type(value).__qualname__, value.__tensor_flatten__()
        return _wrapper_text(name, value.shape, value.dtype, meta)
    if isinstance(value, StoredWrapper):
        name, meta = value.class_name.rpartition(".")[2], value.context
        return _wrapper_text(name, value.shape, value.dtype, meta)
    if isinstance(value, torch.Tensor):
        dtype, shape = str(value.dtype).removeprefix("torch."), list(value.shape)
        return f"tensor {spelled_tensor(dtype, shape, raw(value))}"
    if isinstance(value, StoredTensor):
        data = spelled_tensor(value.dtype, [*value.shape], value.tobytes())
        return f"tensor {data}"
    if type(value) in (list, tuple, torch.Size):
        return f"{type(value).__name__}({', '.join(map(_text, value))})"
    if type(value) in (dict, OrderedDict, Counter):
        items = ", ".join(f"{_text(k)}: {_text(v)}" for k, v in value.items())
        return f"{type(value).__name__}({items})"
    if type(value) in (set, frozenset):
        return f"{type(value).__name__}({', '.join(sorted(map(_text, value)))})"
    if type(value) is deque:
        return f"deque({', '.join(map(_text, value))}; {value.maxlen})"
    if type(value) is defaultdict:
        return f"defaultdict({value.default_factory.__name__}, {_text(dict(value))})"
    if type(value) in (argparse.Namespace, types.SimpleNamespace):
        return f"{type(value).__name__}({_text(vars(value))})"
    if isinstance(value, np.ndarray):
        dtype, shape, data = value.dtype.str, [*value.shape], value.tobytes()
        return f"array {spelled_tensor(dtype, shape, data)}"
    if isinstance(value, enum.Enum):
        return f"{type(value).__qualname__}.{value.name}"
    if dataclasses.is_dataclass(value):
        fields = {one.name: getattr(value, one.name) for one in dataclasses.fields(value)}
        return f"{type(value).__qualname__}({_text(fields)})"
    if isinstance(value, (tuple, str)) and type(value) not in (tuple, str):
        return f"{type(value).__qualname__} {_text(as_plain(value))}"
    assert type(value) in _WITH_REPR or isinstance(value, PurePath), type(value)
    return ascii(value)


_WITH_REPR = (
    *(
        type(None),
        bool,
        int,
        float,
        complex,
        str,
        bytes,
        bytearray,
        type(...),
        range,
        slice,
    ),
    *(Decimal, Fraction, uuid.UUID, datetime.date, datetime.time, datetime.datetime),
    *(datetime.timedelta, datetime.timezone, torch.dtype, torch.device, torch.layout),
)


def _wrapper_text(name, shape, dtype, meta):
    meta = {key: ascii(value).strip("'") for key, value in meta["context"].items()}
    return f"{name} {[*shape]} {str(dtype).removeprefix('torch.')} {meta}"


def as_plain(value):
    """Return what takes the place of a value where no live object gives its classes."""
    if isinstance(value, np.ndarray) and value.nbytes > _MAX_INLINE:
        return torch.from_numpy(value)
    if isinstance(value, enum.Enum):
        return as_plain(value.value)
    if dataclasses.is_dataclass(value):
        return {
            one.name: as_plain(getattr(value, one.name))
            for one in dataclasses.fields(value)
        }
    if isinstance(value, str):
        return str(value)
    if isinstance(value, (torch.dtype, torch.device, torch.layout)):
        return str(value)
    if isinstance(value, tuple):
        return tuple(map(as_plain, value))
    if type(value) is list:
        return [*map(as_plain, value)]
    if type(value) is dict:
        keys = [*map(as_plain, value)]
        items = [*zip(keys, map(as_plain, value.values()), strict=True)]
        return items if any(type(key) is dict for key in keys) else dict(items)
    if type(value) is set and any(map(dataclasses.is_dataclass, value)):
        return sorted(map(as_plain, value), key=_text)
    return value


def covers(found, expected):
    """Tell whether a spelled value says all that another one says.

    A newer torch may have put more into an object's state than the one that saved it.
    """
    if isinstance(expected, dict) and isinstance(found, dict):
        return all(key in found and covers(found[key], expected[key]) for key in expected)
    return found == expected


# Files


def sums_of(folder):
    """Return the SHA-256 of all files below a folder but the list itself."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != SUMS
    }
