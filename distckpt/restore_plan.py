"""What a restore will do on one rank, decided before a byte of a live object is touched."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from distckpt import tensors, values
from distckpt.errors import MismatchError
from distckpt.layout import WHOLE, Row
from distckpt.values import TensorRef


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

    def same_value(self, one: str, other: str) -> bool:
        """Tell whether two plain values are the same, down to the tensors in them.

        Compared as they are stored: the tensors are not read yet, and NaN equals NaN.
        """
        first, second = self._values[one], self._values[other]
        return bool(self._without_names(first) == self._without_names(second))

    def _without_names(self, encoded: Any) -> Any:
        if isinstance(encoded, list):
            return [self._without_names(item) for item in encoded]
        if not isinstance(encoded, dict):
            return encoded
        if "$tensor" in encoded:
            row = self.rows.get(encoded["$tensor"])
            # A rank's own tensors do not tell which of them were one.
            return ["$tensor", row and self.knows_ties and (row.same_as or row.name)]
        return {key: self._without_names(item) for key, item in encoded.items()}

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
        f"{what} does not fit the live objects; nothing of it was read. "
        f"{len(problems)} differences:{lines}"
    )


def _first(items: list[str], limit: int) -> Iterator[str]:
    yield from items[:limit]
    if len(items) > limit:
        yield f"... and {len(items) - limit} more"
