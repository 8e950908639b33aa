"""Named leaves: what a tree of tracked objects comes down to.

A leaf's name is the path to it (``names.py``).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from distckpt import tensors, values
from distckpt.errors import UnsupportedError
from distckpt.known import KnownTensor, KnownTensors
from distckpt.layout import SPLIT, WHOLE, Row, Table
from distckpt.names import part_of
from distckpt.tensors import Numbering
from distckpt.values import TensorRef


def join(*parts: object) -> str:
    """Build a name from a path that is a name already and keys below it."""
    first, *keys = parts
    return "/".join([str(first), *(key_text(key, str(first)) for key in keys)])


def key_text(key: object, path: str) -> str:
    """Spell one key of a container."""
    if type(key) is str or type(key) is int:
        return part_of(key)
    msg = f"{path}: a key of type {type(key).__name__}; only str and int keys are tracked."
    raise UnsupportedError(msg)


class Leaf(NamedTuple):
    """One tensor to be saved.

    Attributes:
        tensor: The tensor, or a view of it.
        known: What it is.
        kind: How a plain one is divided among the ranks.
        identity: What it shares with the other names of the same tensor; None: nothing.
    """

    tensor: torch.Tensor
    known: KnownTensor
    kind: str
    identity: object


@dataclass(slots=True)
class Leaves:
    """What one rank has to save, in the order of the tree.

    Attributes:
        tensors: Tensor leaves by name.
        values: Plain values by name, encoded.
        per_rank: Whether they are this rank's own, rather than the job's.
        numbering: What the manager calls the ranks of a sharded tensor's mesh.
        known: What is known of the tensors from earlier.
        optimized: Ids of tensors that only the step of an optimizer changes.
        buffers: Names of modules' buffers.
        counts: Names of optimizers' tensors that one rank writes whole.
        one_rank: Names of what one rank's is stored of, without a comparison.
        copies: Names of what is declared to have copies on other meshes.
        stateless: Paths of optimizers that have no state, and may have some after a step.
    """

    tensors: dict[str, Leaf] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    per_rank: bool = False
    numbering: Numbering = field(default_factory=Numbering)
    known: KnownTensors = field(default_factory=KnownTensors)
    optimized: set[int] = field(default_factory=set)
    buffers: set[str] = field(default_factory=set)
    counts: set[str] = field(default_factory=set)
    one_rank: set[str] = field(default_factory=set)
    copies: set[str] = field(default_factory=set)
    stateless: list[str] = field(default_factory=list)

    def add_parameter(
        self, name: str, tensor: torch.Tensor, owner: torch.Tensor | None = None
    ) -> None:
        """Add a tensor that is equal on all ranks that have it: they share the work.

        Args:
            name: Its name.
            tensor: Itself, or a view of it. A sharded one is stored by its parts.
            owner: The tensor that it is a view of.
        """
        self._add(name, tensor, SPLIT, owner)

    def add_tensor(self, name: str, tensor: torch.Tensor) -> None:
        """Add a tensor that the lowest rank that has it writes whole, if it is plain."""
        self._add(name, tensor, WHOLE)

    def add_described(
        self,
        names: Sequence[str],
        tensors_: Sequence[torch.Tensor],
        known: Sequence[KnownTensor],
        kinds: Sequence[str],
    ) -> None:
        """Add tensors that are described already, all at once.

        Args:
            names: Theirs.
            tensors_: Themselves.
            known: What they are.
            kinds: ``SPLIT`` or ``WHOLE``; see ``add_parameter``, ``add_tensor``.
        """
        if self.per_rank:
            for name, tensor, kind in zip(names, tensors_, kinds, strict=True):
                self._add(name, tensor, kind)
            return
        if not (self.tensors.keys() | self.values.keys()).isdisjoint(names):
            for name in names:
                self._check_new(name)
        identities = [one.identity for one in known]
        leaves = map(Leaf, tensors_, known, kinds, identities)
        self.tensors.update(zip(names, leaves, strict=True))

    def add_value(self, name: str, value: object) -> None:
        """Add a plain value; tensors inside it are stored beside it."""
        self._check_new(name)
        self.values[name] = values.encode(self._extract(value, name), name)

    def add_state(self, name: str, class_name: str, state: object) -> None:
        """Add the state of an object, like a plain value."""
        self.add_value(name, state)
        self.values[name] = values.as_state(class_name, self.values[name])

    def add_values(self, names: Sequence[str], value: object) -> None:
        """Add one plain value under many names."""
        if _has_tensor(value):
            for name in names:
                self.add_value(name, value)
        elif names:
            encoded = values.encode(value, names[0])
            for name in names:
                self._check_new(name)
                self.values[name] = encoded

    def _add(
        self, name: str, tensor: torch.Tensor, kind: str, owner: torch.Tensor | None = None
    ) -> None:
        if name in self.tensors or name in self.values:
            self._check_new(name)
        known = self.known.describe(name, tensor)
        if self.per_rank and known.is_sharded:
            msg = (
                f"tensor {name!r} is sharded: it is one tensor of the job, of which each "
                "rank holds a part. Do not wrap it in PerRank."
            )
            raise UnsupportedError(msg)
        identity = known.identity if owner is None else tensors.identity_of(owner)
        self.tensors[name] = Leaf(tensor, known, kind, identity)

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
        leaves = self.tensors.values()
        # What tables follow from; nearly always the same as last time.
        signature = (
            [*self.tensors],
            [leaf.known for leaf in leaves],
            [leaf.kind for leaf in leaves],
            [leaf.identity for leaf in leaves],
            self.numbering,
        )
        return self.known.table(signature, self._rows)

    def _rows(self) -> Iterator[Row]:
        first_with: dict[object, str] = {}
        for name, leaf in self.tensors.items():
            first = name
            if leaf.identity is not None:
                first = first_with.setdefault(leaf.identity, name)
            same_as = "" if first == name else first
            yield leaf.known.row(name, leaf.tensor, leaf.kind, same_as, self.numbering)


def tensors_in(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Walk the tensors in a plain value, by the names that ``add_value`` gives them."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif _has_tensor(value):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from tensors_in(item, join(name, key))


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
