"""What a checkpoint holds of an optimizer: told from the names alone.

Its state is ``<optimizer>/state/<parameter>/<key>``, its settings are
``<optimizer>/settings/<parameter>``, where ``<parameter>`` is the full name of a tensor of
a module. torch, and what is written with it, knows parameters by their name in the module.
``<optimizer>/class`` is the name of its class, and ``<optimizer>/extra/<key>`` a further
entry of its ``state_dict()``.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from distckpt import names

STATE = "state"
SETTINGS = "settings"
EMPTY_GROUPS = "empty_groups"
CLASS = "class"
EXTRA = "extra"
# Among the settings of a parameter, the number of its group.
GROUP = "params"


@dataclass(frozen=True, slots=True)
class StoredOptimizer:
    """An optimizer in a checkpoint.

    Attributes:
        path: Its name.
        parameters: Full names of its parameters, each with its name in its module. With
            parameters of several modules, the module's name stands in front of it.
    """

    path: str
    parameters: dict[str, str]


def find(value_names: Iterable[str], tensor_names: Container[str]) -> list[StoredOptimizer]:
    """Find the optimizers of a checkpoint.

    Args:
        value_names: Names of its plain values.
        tensor_names: Names of its tensors.
    """
    found: dict[str, list[str]] = {}
    for name in value_names:
        parts = name.split("/")
        for at, part in enumerate(parts[:-1]):
            parameter = "/".join(parts[at + 1 :])
            if at and part == SETTINGS and parameter in tensor_names:
                found.setdefault("/".join(parts[:at]), []).append(parameter)
                break
    return [StoredOptimizer(path, _in_module(full)) for path, full in found.items()]


def _in_module(parameters: list[str]) -> dict[str, str]:
    modules = {name.rpartition("/")[0] for name in parameters}
    if len(modules) == 1:
        return {name: str(names.key_of(name.rpartition("/")[2])) for name in parameters}
    return {name: ".".join(map(str, names.keys_of(name))) for name in parameters}
