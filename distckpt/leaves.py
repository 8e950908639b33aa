"""Named leaves: what a tree of tracked objects comes down to.

A leaf's name is the path to it (``names.py``).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from distckpt import arrays, strict_json, tensors, values, wrapper_tensors
from distckpt.errors import UnsupportedError
from distckpt.known import KnownTensor, KnownTensors
from distckpt.layout import SPLIT, WHOLE, Row, Table
from distckpt.tensor_paths import has_tensor, join
from distckpt.tensors import Numbering
from distckpt.value_tags import TensorRef, Wrapper
from distckpt.values import Encoded


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
        values: Plain values by name, encoded; of a tensor that is made of others, what it
            is besides these.
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
    values: dict[str, Encoded] = field(default_factory=dict)
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
        taken = {*self.tensors, *self.values}.intersection(names)
        for name in filter(taken.__contains__, names):  # the first of them, on all ranks
            self._check_new(name)
        identities = [one.identity for one in known]
        leaves = map(Leaf, tensors_, known, kinds, identities)
        self.tensors.update(zip(names, leaves, strict=True))

    def add_value(self, name: str, value: object) -> None:
        """Add a plain value; tensors and large arrays in it are stored beside it."""
        self._check_new(name)
        encoded = values.encode_text(value, name, _Beside(self, name))
        self.values[name] = encoded

    def add_encoded(self, name: str, encoded: Encoded) -> None:
        """Add a plain value without tensors that is encoded already."""
        self._check_new(name)
        self.values[name] = encoded

    def add_state(self, name: str, class_name: str, state: object) -> None:
        """Add the state of an object, like a plain value."""
        self.add_value(name, state)
        self.values[name] = values.as_state(class_name, self.values[name])

    def add_values(self, names: Sequence[str], value: object) -> None:
        """Add one plain value under many names."""
        if has_tensor(value):
            for name in names:
                self.add_value(name, value)
        elif names:
            encoded = values.encode_text(value, names[0])
            for name in names:
                self._check_new(name)
                self.values[name] = encoded

    def _add(
        self, name: str, tensor: torch.Tensor, kind: str, owner: torch.Tensor | None = None
    ) -> None:
        if name in self.tensors or name in self.values:
            self._check_new(name)
        if wrapper_tensors.is_wrapper(tensor):
            wrapper = self.add_parts(name, tensor, kind)
            self.values[name] = Encoded(strict_json.dumps(wrapper.encoded))
            return
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

    def add_parts(self, name: str, tensor: torch.Tensor, kind: str) -> Wrapper:
        """Add the tensors that another one is made of.

        Args:
            name: Of the other one.
            tensor: The other one.
            kind: How plain ones are divided among the ranks.

        Returns:
            What the other one is besides.
        """
        wrapper, inner = wrapper_tensors.flattened(name, tensor)
        for inner_name, part in inner.items():
            self._add(inner_name, part, kind)
        return wrapper

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


class _Beside:
    """Adds what stands in a plain value and is a tensor, or is stored like one.

    Args:
        leaves: Where to.
        name: Of the value.
    """

    def __init__(self, leaves: Leaves, name: str) -> None:
        self._leaves = leaves
        self._name = name

    def add(self, value: Any, keys: Sequence[Any]) -> TensorRef | Wrapper | None:
        """See ``value_encoder.Beside``."""
        if isinstance(value, torch.Tensor):
            name = join(self._name, *keys)
            if wrapper_tensors.is_wrapper(value):
                return self._leaves.add_parts(name, value, WHOLE)
            self._leaves.add_tensor(name, value)
            return TensorRef(name)
        is_large = arrays.is_plain_array(value) and value.nbytes > arrays.INLINE_BYTES
        if is_large and not arrays.why_not(value):
            name = join(self._name, *keys)
            memory = arrays.tensor_memory_of(value)
            self._leaves.add_tensor(name, torch.from_numpy(memory))
            return TensorRef(name)
        return None
