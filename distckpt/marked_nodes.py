"""Nodes of what is marked: ``OneRank``, ``PerGroup``, ``Replicated``."""

from __future__ import annotations

from collections.abc import Sequence

from distckpt import words
from distckpt.errors import UnsupportedError
from distckpt.layout import ONE
from distckpt.leaves import Leaves
from distckpt.names import group_of
from distckpt.node import Node, Resized, no_function
from distckpt.restore_plan import RestorePlan
from distckpt.values import of_one_rank


class _Marked:
    """A node whose leaves are marked."""

    def __init__(self, node: Node) -> None:
        self.path = node.path
        self._node = node

    def capture(self, leaves: Leaves) -> None:
        """Add what the node has, and mark it."""
        num_tensors, num_values = len(leaves.tensors), len(leaves.values)
        self._node.capture(leaves)
        self._mark(leaves, [*leaves.tensors][num_tensors:], [*leaves.values][num_values:])

    def _mark(self, leaves: Leaves, tensors: list[str], values: list[str]) -> None:
        raise NotImplementedError

    def plan(self, plan: RestorePlan) -> None:
        """Restore it as any other."""
        self._node.plan(plan)

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Refuse it: it is shared."""
        raise no_function(self.path)


class OneRankNode(_Marked):
    """A node of which the lowest rank's is stored."""

    def _mark(self, leaves: Leaves, tensors: list[str], values: list[str]) -> None:
        for name in tensors:
            leaf = leaves.tensors[name]
            if leaf.known.is_sharded:
                msg = f"{name}: OneRank of a sharded tensor, of which no rank has all."
                raise UnsupportedError(msg)
            leaves.tensors[name] = leaf._replace(kind=ONE)
        for name in values:
            leaves.values[name] = of_one_rank(leaves.values[name])
        leaves.one_rank.update(tensors, values)


class CopiesNode(_Marked):
    """A node of whose sharded tensors there are copies on other meshes."""

    def _mark(self, leaves: Leaves, tensors: list[str], values: list[str]) -> None:
        leaves.copies.update(tensors)


class GroupsNode:
    """The groups at one path; a restore needs as many as a save had."""

    def __init__(self, path: str, num_groups: int) -> None:
        self.path = path
        self._num_groups = num_groups

    def capture(self, leaves: Leaves) -> None:
        """Add nothing: the names of what is in the groups say how many there are."""

    def plan(self, plan: RestorePlan) -> None:
        """Report another number of groups."""
        prefix = f"{self.path}/"
        found = {
            group
            for name in plan.saved.names_under(prefix)
            if (group := group_of(name.removeprefix(prefix).partition("/")[0])) is not None
        }
        if found and max(found) + 1 != self._num_groups:
            plan.problems.append(
                f"{self.path}: {words.count(max(found) + 1, 'group')} in the checkpoint, "
                f"{self._num_groups} here (PerGroup)"
            )

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Refuse it: it is shared."""
        raise no_function(self.path)
