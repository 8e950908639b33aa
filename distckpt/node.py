"""What every tracked object is to a ``Checkpoint``: something to save and to take back."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

from distckpt.errors import UnsupportedError
from distckpt.known import KnownTensor
from distckpt.leaves import Leaves
from distckpt.restore_plan import RestorePlan

# Makes of what all ranks have saved what this one gets.
Resized: TypeAlias = Callable[[list[Any]], Any]


class Node(Protocol):
    """One tracked object at one path."""

    path: str

    def capture(self, leaves: Leaves) -> None:
        """Add what has to be saved."""

    def plan(self, plan: RestorePlan) -> None:
        """Say what will be read, what is to be done then, and what does not fit."""

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """The same, of what another number of ranks has saved.

        Args:
            plans: For what each of them has saved.
            resize: Makes of it, when it is read, what this rank gets.

        Raises:
            UnsupportedError: It is nothing that a function could make.
        """


class Described(NamedTuple):
    """Tensors of one tracked object.

    Attributes:
        names: Full names.
        known: What they are.
        kinds: How plain ones are divided among the ranks.
    """

    names: list[str]
    known: list[KnownTensor]
    kinds: list[str]


def no_function(path: str) -> UnsupportedError:
    """Make the error for what no function can make of what other ranks have saved."""
    msg = (
        f"{path}: PerRank with a function is for plain values, tensors and objects with a "
        'state dict, not for modules and optimizers; use resize="by_rank", or "error".'
    )
    return UnsupportedError(msg)
