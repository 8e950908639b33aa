"""The frozen parameters of a ``Trainable``: not saved, and compared at a restore."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import xxhash

from distckpt import modules, tensors
from distckpt.errors import UnsupportedError
from distckpt.leaves import Leaves
from distckpt.node import Resized
from distckpt.restore_plan import RestorePlan
from distckpt.tensor_paths import join
from distckpt.trainable import Trainable

_FROZEN = "~frozen"
_MAX_NAMED = 5


class FrozenNode:
    """What one rank holds of frozen parameters, as digests.

    Each rank stores its own: of a sharded parameter each holds another part.

    Args:
        path: Of the module.
        trainable: It.
    """

    def __init__(self, path: str, trainable: Trainable) -> None:
        self.path = f"{path}/{_FROZEN}"
        self._module_path = path
        self._trainable = trainable

    def capture(self, leaves: Leaves) -> None:
        """Add the digests as one plain value."""
        leaves.add_value(self.path, dict(self._digests()))

    def plan(self, plan: RestorePlan) -> None:
        """Compare with the digests that this rank has saved."""
        if not plan.selects(self.path) or not plan.saved.has_value(self.path):
            return
        saved = plan.saved.any_value(self.path)
        plan.saved.take_values([self.path])
        differing = [
            name
            for name, here in self._digests()
            if name in saved and _differ(saved[name], here)
        ]
        if differing:
            names = ", ".join(join(self._module_path, n) for n in differing[:_MAX_NAMED])
            more = ", ..." if len(differing) > _MAX_NAMED else ""
            plan.problems.append(
                f"{self.path}: {len(differing)} frozen parameters ({names}{more}) are not "
                "those that the checkpoint was trained on; begin with the same ones"
            )

    def plan_resized(self, plans: Sequence[RestorePlan], resize: Resized) -> None:
        """Compare with what any of the ranks has saved."""
        for plan in plans:
            self.plan(plan)

    def _digests(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for name, parameter in modules.named_parameters(modules.unwrap(self._module)):
            if not parameter.requires_grad:
                yield name, self._described(name, parameter)

    @property
    def _module(self) -> torch.nn.Module:
        return self._trainable.module

    def _described(self, name: str, parameter: torch.Tensor) -> dict[str, Any]:
        described: dict[str, Any] = {
            "dtype": tensors.dtype_name(parameter.dtype),
            "shape": list(parameter.shape),
        }
        try:
            mine = tensors.held_storable(parameter, name)
        except UnsupportedError:
            return described  # a quantized one: its bytes are not all that it is
        if mine.box is None:
            return described
        described["part"] = [list(mine.box.offset), list(mine.box.shape)]
        described["digest"] = self._digest_of(name, parameter, mine)
        return described

    def _digest_of(self, name: str, parameter: torch.Tensor, mine: tensors.Held) -> str:
        memory = mine.memory
        look = (
            *(memory.data_ptr(), tuple(memory.shape), memory.stride(), memory.dtype),
            *(parameter._version, memory._version),
        )
        known = self._trainable.digests.get(name)
        if known is None or known[0] != look:
            assert mine.box is not None, "looked at before"
            data = tensors.box_bytes(parameter, mine.box)
            known = look, xxhash.xxh3_128_hexdigest(data)
            self._trainable.digests[name] = known
        return known[1]


def _differ(saved: Any, here: dict[str, Any]) -> bool:
    """Tell whether two are known to differ: parts of one layout can be compared."""
    if not isinstance(saved, dict):
        return True
    if any(saved.get(key) != here[key] for key in ("dtype", "shape")):
        return True
    are_parts_equal = saved.get("part") is not None and saved["part"] == here.get("part")
    return are_parts_equal and saved.get("digest") != here.get("digest")
