"""Named leaves: what a tree of tracked objects comes down to.

A leaf's name is the path to it, with ``/`` between the parts; ``~`` and ``/`` inside a
part are written ``~0`` and ``~1`` (RFC 6901), an integer key ``7`` of a dict ``~i7``.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from distckpt import tensors, values
from distckpt.errors import MismatchError, UnsupportedError
from distckpt.layout import SPLIT, WHOLE, Row, Table
from distckpt.values import TensorRef


def join(*parts: object) -> str:
    """Build a name from a path that is a name already and keys below it."""
    first, *keys = parts
    return "/".join([str(first), *(key_text(key, str(first)) for key in keys)])


def key_text(key: object, path: str) -> str:
    """Spell one key of a container."""
    if type(key) is str:
        return key.replace("~", "~0").replace("/", "~1")
    if type(key) is int:
        return f"~i{key}"
    msg = f"{path}: a key of type {type(key).__name__}; only str and int keys are tracked."
    raise UnsupportedError(msg)


@dataclass(frozen=True, slots=True)
class Leaf:
    """One tensor to be saved."""

    tensor: torch.Tensor
    kind: str


@dataclass(slots=True)
class Leaves:
    """What one rank has to save, in the order of the tree.

    Attributes:
        tensors: Tensor leaves by name.
        values: Plain values by name, encoded.
    """

    tensors: dict[str, Leaf] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)

    def add_parameter(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor that is equal on all ranks that have it: they share the work."""
        self._add(name, tensor, SPLIT)

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor that the lowest rank that has it writes whole."""
        self._add(name, tensor, WHOLE)

    def add_value(self, name: str, value: object) -> None:
        """Add a plain value; tensors inside it are stored beside it."""
        self._check_new(name)
        self.values[name] = values.encode(self._extract(value, name), name)

    def _add(self, name: str, tensor: torch.Tensor, kind: str) -> None:
        self._check_new(name)
        tensors.check_storable(tensor, name)
        self.tensors[name] = Leaf(tensor, kind)

    def _check_new(self, name: str) -> None:
        if name in self.tensors or name in self.values:
            msg = f"{name}: two tracked objects have this name."
            raise UnsupportedError(msg)

    def _extract(self, value: Any, name: str) -> Any:
        if isinstance(value, torch.Tensor):
            self.add_tensor(name, value)
            return TensorRef(name)
        if not _has_tensor(value):
            return value
        if isinstance(value, dict):
            items = (
                (key, self._extract(item, join(name, key))) for key, item in value.items()
            )
            return OrderedDict(items) if type(value) is OrderedDict else dict(items)
        return type(value)(
            self._extract(item, join(name, index)) for index, item in enumerate(value)
        )

    def table(self) -> Table:
        """Describe the tensors; one that shares its memory with another says so."""
        first_with: dict[object, str] = {}
        rows = []
        for name, leaf in self.tensors.items():
            identity = tensors.identity_of(leaf.tensor)
            first = name if identity is None else first_with.setdefault(identity, name)
            same_as = "" if first == name else first
            rows.append(tensors.row_of(name, leaf.tensor, leaf.kind, same_as))
        return tuple(rows)


def _has_tensor(value: Any, depth: int = 64) -> bool:
    """Tell whether a tensor stands in a tree of containers that ``values`` can encode."""
    if isinstance(value, torch.Tensor):
        return True
    if depth == 0:
        return False
    if type(value) in (dict, OrderedDict):
        return any(_has_tensor(item, depth - 1) for item in value.values())
    return type(value) in (list, tuple) and any(
        _has_tensor(item, depth - 1) for item in value
    )


class Saved:
    """What a checkpoint has to offer, and what of it was asked for.

    Args:
        rows: Tensors by name.
        encoded: Plain values by name.
        knows_ties: Whether rows say which tensors share memory. A rank's own tensors
            are stored one by one, tied or not.
    """

    def __init__(
        self,
        rows: Mapping[str, Row],
        encoded: Mapping[str, Any],
        knows_ties: bool = True,
    ) -> None:
        self.rows = rows
        self.knows_ties = knows_ties
        self._values = encoded
        self._taken: set[str] = set()
        self._below: dict[str, list[str]] = {}
        for name in (*rows, *encoded):
            self._below.setdefault(name.rpartition("/")[0], []).append(name)

    def names_below(self, path: str) -> list[str]:
        """Return the names directly below a path, tensors first, in saved order."""
        return self._below.get(path, [])

    def take_row(self, name: str) -> Row | None:
        """Return a tensor's row and note that somebody wants it."""
        self._taken.add(name)
        return self.rows.get(name)

    def has_value(self, name: str) -> bool:
        """Tell whether there is a plain value of this name."""
        return name in self._values

    def take_value(self, name: str) -> Any:
        """Return a plain value, with a ``TensorRef`` for each tensor in it."""
        self._taken.add(name)
        return values.decode(self._values[name])

    def left_over(self) -> list[str]:
        """Return the names that nobody has asked for."""
        return [n for n in (*self.rows, *self._values) if n not in self._taken]


@dataclass(slots=True)
class RestorePlan:
    """What a restore will do on this rank, decided before a byte is touched.

    Attributes:
        reads: Tensors to be filled in place, by name.
        finishers: What to do once all ranks have read everything.
        problems: How checkpoint and live objects do not fit; one sentence each.
    """

    saved: Saved
    reads: dict[str, torch.Tensor] = field(default_factory=dict)
    finishers: list[Callable[[], None]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    _names: dict[object, str] = field(default_factory=dict)
    _new: dict[object, torch.Tensor] = field(default_factory=dict)

    def read_into(self, name: str, tensor: torch.Tensor) -> None:
        """Fill a live tensor, if the checkpoint has one that fits."""
        tensors.check_storable(tensor, name)
        row = self.saved.take_row(name)
        live = tensors.row_of(name, tensor, WHOLE)
        if row is None:
            kind = "a plain value" if self.saved.has_value(name) else "not there"
            self.problems.append(f"{name}: a tensor here, {kind} in the checkpoint")
        elif (row.dtype, row.shape) != (live.dtype, live.shape):
            self.problems.append(
                f"{name}: {row.dtype} {list(row.shape)} in the checkpoint, "
                f"{live.dtype} {list(live.shape)} here"
            )
        elif not self._is_read_already(name, row, tensor):
            self.reads[name] = tensor

    def _is_read_already(self, name: str, row: Row, tensor: torch.Tensor) -> bool:
        """Read memory that has two names once, if the checkpoint says so too."""
        identity = tensors.identity_of(tensor)
        if identity is None or not self.saved.knows_ties:
            return False
        first = self._names.setdefault(identity, name)
        if first == name:
            return False
        other = self.saved.rows[first]
        if (row.same_as or row.name) != (other.same_as or other.name):
            self.problems.append(
                f"{name}: the same memory as {first} here, two tensors in the checkpoint"
            )
        return True

    def read_new(self, name: str, device: torch.device | None = None) -> torch.Tensor:
        """Allocate a tensor for what the checkpoint has under a name, to be filled."""
        row = self.saved.take_row(name)
        if row is None:
            msg = f"{name}: a value refers to this tensor, and it is not there."
            raise MismatchError(msg)
        # What was one tensor when it was saved becomes one again.
        key = (row.same_as or name, device) if self.saved.knows_ties else name
        tensor = self._new.get(key)
        if tensor is None:
            tensor = self._new[key] = torch.empty(
                row.shape, dtype=tensors.dtype_of_name(row.dtype), device=device
            )
            self.reads[name] = tensor
        return tensor

    def take_value(self, name: str) -> Any:
        """Return a plain value whose tensors will be filled by the time of finishing."""
        return self._fill(self.saved.take_value(name))

    def _fill(self, value: Any) -> Any:
        if isinstance(value, TensorRef):
            return self.read_new(value.name)
        if type(value) in (dict, OrderedDict):
            return type(value)((key, self._fill(item)) for key, item in value.items())
        if type(value) in (list, tuple):
            return type(value)(self._fill(item) for item in value)
        return value

    def missing(self, name: str, what: str) -> None:
        """Note that the checkpoint lacks something."""
        self.problems.append(f"{name}: {what} here, not there in the checkpoint")

    def raise_problems(self, what: str) -> None:
        """Raise ``MismatchError`` listing every problem, if there is any.

        What nobody here has asked for is listed too, but is no problem by itself:
        another rank may track it.
        """
        if self.problems:
            raise mismatch(what, [*self.problems, *unexpected(self.saved.left_over())])


def unexpected(names: Iterable[str]) -> list[str]:
    """Say of each name that the checkpoint has it and the live objects do not."""
    return [f"{name}: in the checkpoint, nothing here" for name in names]


def mismatch(what: str, problems: list[str]) -> MismatchError:
    """Make the error that lists how a checkpoint and live objects do not fit."""
    lines = "".join(f"\n  {problem}" for problem in _first(problems, 100))
    return MismatchError(
        f"{what} does not fit the live objects; nothing was changed. "
        f"{len(problems)} differences:{lines}"
    )


def _first(items: list[str], limit: int) -> Iterator[str]:
    yield from items[:limit]
    if len(items) > limit:
        yield f"... and {len(items) - limit} more"
