"""``Parts``: several modules, or optimizers, under one name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Generic, TypeVar

from torch import nn
from torch.optim import Optimizer

from distckpt.errors import ConfigError

_Part = TypeVar("_Part", nn.Module, Optimizer)


class Parts(Sequence[_Part], Generic[_Part]):
    """Track several modules, or several optimizers, under one name.

    The parts of one model share one namespace: ``Parts([stage0, stage1])`` is saved under
    the names that the model as a whole has. So a checkpoint of pipeline stages is restored
    by one process, by another number of stages, by ``export`` and ``from_pretrained``. A
    name that two parts have is refused at the save.

    Args:
        parts: Modules, or optimizers; at least one.

    Raises:
        ConfigError: It is empty, or holds something else, or both kinds.

    Example:
        >>> checkpoint = Checkpoint(
        ...     model=Parts(model_parts), optimizer=Parts(optimizers)
        ... )
    """

    def __init__(self, parts: Sequence[_Part]) -> None:
        self._parts = [*parts]
        for kind in (nn.Module, Optimizer):
            if self._parts and all(isinstance(part, kind) for part in self._parts):
                return
        found = ", ".join(type(part).__name__ for part in self._parts[:8])
        msg = f"Parts takes modules or optimizers, at least one, not both; got [{found}]."
        raise ConfigError(msg)

    def __repr__(self) -> str:
        return f"Parts([{', '.join(type(part).__name__ for part in self._parts)}])"

    def __getitem__(self, index: int) -> _Part:  # type: ignore[override]
        return self._parts[index]

    def __len__(self) -> int:
        return len(self._parts)

    def __iter__(self) -> Iterator[_Part]:
        return iter(self._parts)


class NamesOfParts:
    """The names that the parts under one name have, by part."""

    def __init__(self) -> None:
        self._part_of: dict[str, int] = {}

    def add(self, part: int, names: Sequence[str]) -> None:
        """Note the names of a part."""
        for name in names:
            self._part_of.setdefault(name, part)

    def is_of_other(self, part: int, name: str) -> bool:
        """Tell whether a name belongs to another part."""
        return self._part_of.get(name, part) != part
