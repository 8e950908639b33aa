"""What is known of tensors, for as long as they stay as they are.

Describing a tensor (can it be stored, what does this rank hold of it, where does that lie)
costs tens of microseconds of Python. A job has thousands of tensors, nearly always the
same as at its last save. So each is described once; after that one look at its address,
shape and placements tells whether the description still holds. Even that look costs some
microseconds, so the tensors of one tracked object are looked at all together (``Seen``).

Neither keeps a reference to a tensor, not even a weak one: ``torch.utils.swap_tensors``,
by which ``model.to()`` converts ``DTensor`` parameters, refuses tensors that have any.
Another tensor may get the id of one that is gone. If it also has its type, its memory and
its layout, then the description holds for it, too.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from itertools import compress
from operator import attrgetter, is_, not_
from typing import Any, NamedTuple, TypeAlias, TypeVar

import torch
from torch import nn

from distckpt import dtypes, modules, tensors
from distckpt.layout import Row, Table
from distckpt.names import escaped
from distckpt.tensors import Numbering, is_sharded

_Made = TypeVar("_Made")

# Of sharded tensors; why these, says ``KnownTensor.still_holds``.
_part_of = attrgetter("_local_tensor")
_spec_of = attrgetter("_spec")
_dtype_of = attrgetter("dtype")

# How much may be remembered of tensors that are not there any more.
_SLACK = 1024


class KnownTensor:
    """One tensor that can be stored, described; keeps neither it nor its memory alive.

    Attributes:
        dtype: torch's name of the element type.
        shape: Global shape.
        identity: What it shares with other names of the same memory; None: nothing.
        box: What this rank holds of it; None where the rank is not in its mesh.
        size_bytes: Bytes of that.
        address: Where they lie, row-major, if the host can reach them there; else 0.
        is_row_major: Whether they lie row-major, wherever they are.
        is_sharded: Whether it is a ``DTensor``.
        device: Where they lie.

    Raises:
        UnsupportedError: It cannot be stored.
    """

    __slots__ = (
        "_can_hold",
        "_data_ptr",
        "_dtype",
        "_id",
        "_memory_shape",
        "_row",
        "_row_of",
        "_spec",
        "_stride",
        "_type",
        "address",
        "box",
        "device",
        "dtype",
        "identity",
        "is_row_major",
        "is_sharded",
        "shape",
        "size_bytes",
    )

    def __init__(self, tensor: torch.Tensor, name: str) -> None:
        memory, self.box = tensors.held_storable(tensor, name)
        self.dtype = tensors.dtype_name(tensor.dtype)
        self.shape = tuple(tensor.shape)
        self.identity = tensors.identity_of(tensor)
        self.is_sharded = tensors.is_sharded(tensor)
        self.device = memory.device.type
        self.size_bytes = 0
        if self.box is not None:
            self.size_bytes = self.box.size * dtypes.item_size_bytes(self.dtype)
        self.is_row_major = tensors.is_row_major(memory)
        is_on_host = self.is_row_major and self.device == "cpu"
        self.address = memory.data_ptr() if is_on_host else 0
        # Complex tensors can become conjugates of themselves without a trace here.
        self._can_hold = not tensor.dtype.is_complex
        self._id = id(tensor)
        self._type = type(tensor)
        self._spec: Any = getattr(tensor, "_spec", None)
        self._data_ptr = memory.data_ptr()
        self._dtype = memory.dtype
        self._memory_shape = memory.shape
        self._stride = memory.stride()
        self._row_of: tuple[object, ...] | None = None
        self._row: Row | None = None

    def still_holds(self, tensor: Any) -> bool:
        """Tell whether this describes a tensor as it is now."""
        if not self._can_hold or id(tensor) != self._id or type(tensor) is not self._type:
            return False
        memory: Any = tensor
        if self.is_sharded:
            # torch's own checkpoints look at these, too: to_local() makes a new object each
            # time, and asking for shape, mesh and placements takes as long as all else.
            memory = getattr(tensor, "_local_tensor", None)
            spec = getattr(tensor, "_spec", None)
            if memory is None or spec is None or spec is not self._spec:
                return False
        return bool(
            memory.data_ptr() == self._data_ptr
            and memory.shape == self._memory_shape
            and memory.stride() == self._stride
            and memory.dtype is self._dtype
        )

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all of it."""
        return self.box is not None and self.box.shape == self.shape

    def row(
        self, name: str, tensor: torch.Tensor, kind: str, same_as: str, numbering: Numbering
    ) -> Row:
        """Return the tensor's row for a layout table; see ``tensors.row_of``."""
        row_of = (kind, same_as, numbering)
        if self._row is None or self._row_of != row_of:
            self._row = tensors.row_of(name, tensor, kind, same_as, numbering)
            self._row_of = row_of
        return self._row

    def memory_of(self, tensor: Any) -> torch.Tensor:
        """Return the plain tensor that has what this rank holds."""
        memory: torch.Tensor = tensor._local_tensor if self.is_sharded else tensor
        return memory


class Seen:
    """Some tensors as they were at one time; keeps neither them nor their memory alive.

    What ``KnownTensor.still_holds`` looks at in one tensor after the other is compared here
    property by property, in the interpreter's own loops: a third of the time.

    Args:
        tensors: That can be stored.
    """

    def __init__(self, tensors: Sequence[Any]) -> None:
        self._ids = [*map(id, tensors)]
        self._types = [*map(type, tensors)]
        self._are_sharded = [*map(is_sharded, tensors)]
        self._are_plain = [*map(not_, self._are_sharded)]
        self._specs = self._specs_of(tensors)
        self._looks = self._looks_of(tensors)
        # Complex tensors can become conjugates of themselves without a trace here.
        self._can_hold = not any(tensor.dtype.is_complex for tensor in tensors)

    def still_hold(self, tensors: Sequence[Any]) -> bool:
        """Tell whether these are the same tensors, as they were."""
        return (
            self._can_hold
            and [*map(id, tensors)] == self._ids
            and [*map(type, tensors)] == self._types
            and all(map(is_, self._specs_of(tensors), self._specs))
            and self._looks_of(tensors) == self._looks
        )

    def _specs_of(self, tensors: Sequence[Any]) -> list[Any]:
        return [*map(_spec_of, compress(tensors, self._are_sharded))]

    def _looks_of(self, tensors: Sequence[Any]) -> tuple[list[Any], ...]:
        parts = map(_part_of, compress(tensors, self._are_sharded))
        memories = [*parts, *compress(tensors, self._are_plain)]
        return (
            [*map(torch.Tensor.data_ptr, memories)],
            [*map(torch.Tensor.size, memories)],
            [*map(torch.Tensor.stride, memories)],
            [*map(_dtype_of, memories)],
        )


class _Recalled(NamedTuple):
    """What was made of some tensors, and what it follows from besides."""

    seen: Seen
    also: object
    made: Any


class KnownTensors:
    """The tensors that one ``Checkpoint`` tracks, by name."""

    def __init__(self) -> None:
        self._known: dict[str, KnownTensor] = {}
        self._recalled: dict[Hashable, _Recalled] = {}
        self._numbering: tuple[Any, Numbering] | None = None
        self._names: dict[str, tuple[list[str], list[type], list[str]]] = {}
        self._table: tuple[object, Table] | None = None

    def describe(self, name: str, tensor: torch.Tensor) -> KnownTensor:
        """Describe a tensor.

        Raises:
            UnsupportedError: It cannot be stored.
        """
        known = self._known.get(name)
        if known is None or not known.still_holds(tensor):
            known = self._known[name] = KnownTensor(tensor, name)
        return known

    def recall(
        self,
        key: Hashable,
        tensors: Sequence[torch.Tensor],
        also: object,
        make: Callable[[], _Made],
    ) -> _Made:
        """Return what was made of tensors before, if they and all else are as they were.

        Args:
            key: What it is.
            tensors: What it follows from; they can be stored.
            also: What else it follows from.
            make: Makes it; nothing in it may keep the tensors alive.
        """
        last = self._recalled.get(key)
        if last is None or last.also != also or not last.seen.still_hold(tensors):
            made = make()
            last = self._recalled[key] = _Recalled(Seen(tensors), also, made)
        recalled: _Made = last.made
        return recalled

    def table(self, signature: object, rows: Callable[[], Iterable[Row]]) -> Table:
        """Return the table of all that is tracked.

        Args:
            signature: Equal if nothing has changed: then it is the last table, with all
                that has been worked out of it.
            rows: Makes its rows.
        """
        if self._table is None or self._table[0] != signature:
            self._table = signature, Table(rows())
        return self._table[1]

    def forget_all_but(self, names: Mapping[str, object]) -> None:
        """Forget tensors that are not there any more, when there are many."""
        if len(self._known) > 2 * len(names) + _SLACK:
            self._known = {n: known for n, known in self._known.items() if n in names}
        if len(self._recalled) > 2 * len(names) + _SLACK:
            self._recalled.clear()

    def numbering(self, members: tuple[int, ...] | None) -> Numbering:
        """Return what the manager calls torch's ranks; see ``tensors.Numbering``."""
        if self._numbering is None or self._numbering[0] != members:
            self._numbering = members, Numbering(members)
        return self._numbering[1]

    def full_names(
        self, path: str, members: Sequence[nn.Module], keys: Iterable[str]
    ) -> list[str]:
        """Return the full names of a state dict's entries, without wrappers' prefixes.

        Args:
            path: Where the module is tracked.
            members: It, unwrapped, and all modules in it.
            keys: Of its state dict.
        """
        keys = list(keys)
        types = [*map(type, members)]
        known = self._names.get(path)
        if known is None or known[0] != keys or known[1] != types:
            canonical = modules.CanonicalNames(members[0])
            full = [f"{path}/{escaped(canonical[key])}" for key in keys]
            known = self._names[path] = keys, types, full
        return known[2]


# Returns a buffer over the memory at an address; whoever asks keeps that memory alive.
Window: TypeAlias = Callable[[int], Any]


def window_of(size_bytes: int) -> Window:
    """Return what gives buffers of one length: ten times cheaper than a numpy array."""
    window: Window = (ctypes.c_char * size_bytes).from_address
    return window


def window(address: int, size_bytes: int) -> Any:
    """Return a buffer over memory; see ``Window``."""
    return window_of(size_bytes)(address)
