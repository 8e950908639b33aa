"""What a ``Checkpoint`` tracks, looked at by type: no ``state_dict()`` is called here.

Found when a manager is made, so before a job has spent an hour on its first steps: what can
never be stored, and copies that training does not change.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer

from distckpt import modules, values
from distckpt.errors import UnsupportedError
from distckpt.parts import Parts
from distckpt.per_rank import OneRank, PerGroup, PerRank, Replicated
from distckpt.tensor_paths import join, key_text
from distckpt.tracked import holds_tracked, is_data_loader, is_stateful
from distckpt.trainable import Trainable
from distckpt.value_tags import TensorRef

_MARKS = (PerRank, PerGroup, OneRank, Replicated)
_MAX_DEPTH = 64
# Of plain values: a list of millions is looked at when it is saved.
_MAX_LEAVES = 10_000
_MAX_LOADER_DEPTH = 3

_OPTIMIZER_KEYS = frozenset(("state", "param_groups"))
# Keys by which a state dict is known, and the object that it is a copy of.
_COPIES = (
    (frozenset(("last_epoch", "base_lrs")), "scheduler", "a learning rate scheduler"),
    (frozenset(("scale", "_growth_tracker")), "scaler", "a GradScaler"),
)
_PARAMETER_NAMES = ("weight", "bias")


def look_at(objects: Mapping[str, Any]) -> list[str]:
    """Refuse by type what cannot be stored.

    Args:
        objects: What is tracked, by name.

    Returns:
        Warnings of what can be stored, and is probably not what was meant.

    Raises:
        UnsupportedError: Names the path and the line to write instead.
    """
    look = _Look()
    for name, value in objects.items():
        look.visit(key_text(name, name), value)
    return look.warnings()


def has_data_loader(value: Any, depth: int = 0) -> bool:
    """Tell by type whether a data loader is tracked: in containers and marks, too."""
    if isinstance(value, _MARKS):
        value = value.value
    if isinstance(value, (dict, list)) and depth < _MAX_LOADER_DEPTH:
        items = value.values() if isinstance(value, dict) else value
        some = [*islice(items, _MAX_LEAVES)]
        return any(has_data_loader(item, depth + 1) for item in some)
    return is_stateful(value) and is_data_loader(value)


class _Nowhere:
    """Takes the tensors in a value, which the save looks at."""

    def add(self, value: Any, keys: Sequence[Any]) -> TensorRef | None:
        """See ``value_encoder.Beside``."""
        is_beside = isinstance(value, (torch.Tensor, np.ndarray))
        return TensorRef("nowhere") if is_beside else None


class _Look:
    def __init__(self) -> None:
        self._warnings: list[str] = []
        # Dicts of tensors with names like a module's.
        self._loose: list[str] = []
        self._has_module = False
        self._num_leaves = 0
        # Ids of containers, which are all alive meanwhile.
        self._seen: set[int] = set()

    def warnings(self) -> list[str]:
        if self._has_module:
            # Averages of the weights are kept in such dicts.
            return self._warnings
        return self._warnings + [
            f"{path}: a dict of tensors with the names of a module's, and no module is "
            f"tracked. If it is a copy, training does not change it: track the module "
            f"itself, Checkpoint({_first(path)}=model)."
            for path in self._loose
        ]

    def visit(self, path: str, value: Any, depth: int = 0) -> None:
        if depth > _MAX_DEPTH or self._num_leaves > _MAX_LEAVES:
            return  # the save says what is wrong
        if type(value) in (dict, OrderedDict, list, tuple):
            if id(value) in self._seen:
                return  # it may contain itself
            self._seen.add(id(value))
        if isinstance(value, _MARKS):
            self.visit(path, value.value, depth + 1)
        elif isinstance(value, type):
            msg = f"{path}: {value.__name__} is a class; track an object of it."
            raise UnsupportedError(msg)
        elif isinstance(value, (nn.Module, Optimizer)):
            modules.check_supported(value, path)
            self._has_module |= isinstance(value, nn.Module)
        elif isinstance(value, Trainable):
            self.visit(path, value.module, depth + 1)
        elif isinstance(value, Parts):
            for part in value:
                self.visit(path, part, depth + 1)
        elif is_stateful(value) or isinstance(value, torch.Tensor):
            pass
        elif type(value) in (dict, OrderedDict, list, tuple):
            is_dict = isinstance(value, dict)
            if is_dict:
                self._look_at_dict(path, value)
            below = join if holds_tracked(value) else _in_value
            for key, item in value.items() if is_dict else enumerate(value):
                if self._num_leaves > _MAX_LEAVES:
                    break
                self.visit(below(path, key), item, depth + 1)
        else:
            self._num_leaves += 1
            values.encode(value, path, _Nowhere())

    def _look_at_dict(self, path: str, value: dict[Any, Any]) -> None:
        groups = value.get("param_groups")
        if value.keys() >= _OPTIMIZER_KEYS and isinstance(groups, list):
            msg = (
                f"{path}: an optimizer's state dict, a copy that training does not change. "
                f"Track the optimizer itself: Checkpoint({_first(path)}=optimizer)."
            )
            raise UnsupportedError(msg)
        if hasattr(value, "_metadata"):
            self._warn_of_copy(path, "model", "a module")
            return
        for keys, name, kind in _COPIES:
            if keys <= value.keys():
                self._warn_of_copy(path, name, kind)
                return
        names = [key for key in value if isinstance(key, str)]
        is_loose = (
            len(names) == len(value)
            and any(name.rpartition(".")[2] in _PARAMETER_NAMES for name in names)
            and all(isinstance(item, torch.Tensor) for item in value.values())
        )
        if is_loose:
            self._loose.append(path)

    def _warn_of_copy(self, path: str, name: str, kind: str) -> None:
        self._warnings.append(
            f"{path}: the state dict of {kind}. What training changes in the object may "
            f"not change in it. Track the object itself: Checkpoint({_first(path)}={name})."
        )


def _in_value(path: str, key: Any) -> str:
    """Spell a path into a plain value, as messages of ``values`` do."""
    return f"{path}[{key!r:.50}]"


def _first(path: str) -> str:
    return path.partition("/")[0].partition("[")[0]
