"""Which tensors of a checkpoint are exported, and what other programs call them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from distckpt import names
from distckpt.errors import ConfigError
from distckpt.near import did_you_mean
from distckpt.opened import OpenedCheckpoint
from distckpt.stored_tensor import StoredTensor


@dataclass(frozen=True, slots=True)
class Chosen:
    """Tensors to be exported, by the name that they get.

    Attributes:
        tensors: Each memory once.
        tied: Further names of the same memory, each with the name in ``tensors``.
    """

    tensors: dict[str, StoredTensor]
    tied: dict[str, str]

    @property
    def size_bytes(self) -> int:
        """Bytes of all of them."""
        return sum(tensor.size_bytes for tensor in self.tensors.values())


def choose(
    opened: OpenedCheckpoint, tracked_object: str | None, patterns: Sequence[str]
) -> Chosen:
    """Choose tensors of the job; what each rank has of its own is never among them.

    Args:
        opened: The checkpoint.
        tracked_object: Only what is below this name, which is taken away: of ``model``,
            ``model/layers.0.weight`` becomes ``layers.0.weight``. None: all, by full name.
        patterns: Only names that one of these matches, as a shell does; all if empty.

    Raises:
        ConfigError: Nothing is chosen; says what there is.
    """
    rows = opened.manifest.assignment.rows
    new_name_of = {}
    for name in opened:
        new_name = _name_below(name, tracked_object)
        if new_name and (not patterns or any(fnmatchcase(name, p) for p in patterns)):
            new_name_of[name] = new_name
    if not new_name_of:
        what = " and ".join(filter(None, [tracked_object, ", ".join(patterns)])) or "it"
        objects = sorted({name.split("/")[0] for name in opened})
        hint = did_you_mean(tracked_object or ", ".join(patterns), [*objects, *opened])
        msg = (
            f"{opened.directory}: no tensor to export for {what}{hint} There are tensors "
            f"of {', '.join(objects[:20]) or 'nothing'}."
        )
        raise ConfigError(msg)
    tensors: dict[str, StoredTensor] = {}
    tied: dict[str, str] = {}
    first_of: dict[str, str] = {}
    for name, new_name in new_name_of.items():
        # Of tied tensors, the first that is chosen is the one that is written.
        memory = rows[name].same_as or name
        first = first_of.setdefault(memory, new_name)
        if first == new_name:
            tensors[new_name] = opened[name]
        else:
            tied[new_name] = first
    return Chosen(tensors, tied)


def _name_below(name: str, tracked_object: str | None) -> str:
    """Return what is left of a name; "" if it is not below the object."""
    if tracked_object is None:
        return name
    if name == tracked_object:
        return name.rpartition("/")[2]
    if not name.startswith(f"{tracked_object}/"):
        return ""
    rest = name[len(tracked_object) + 1 :]
    # A module's tensor is one part: then its name is as the module spells it.
    return rest if "/" in rest else str(names.key_of(rest))
