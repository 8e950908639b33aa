"""The objects that are saved together: held by name, and captured for a save."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from distckpt import tracked
from distckpt.errors import ConfigError
from distckpt.leaves import Leaves
from distckpt.loading import Remembered
from distckpt.near import did_you_mean
from distckpt.per_rank import kinds_of

COUNTER = "save_counter"


class Captured(NamedTuple):
    """The state that one rank has to save."""

    shared: Leaves
    per_rank: Leaves


class Tracked:
    """Objects by name, and a counter of the saves: ``Checkpoint`` without restoring.

    Attributes:
        save_counter: How many saves there were.
    """

    save_counter: int

    def __init__(self, *unnamed: Any, **objects: Any) -> None:
        if unnamed:
            given = ", ".join(type(value).__name__ for value in unnamed)
            msg = (
                f"Checkpoint got {given} without a name. Name what is tracked: "
                "Checkpoint(model=model, optimizer=optimizer); of a dict, Checkpoint(**it)."
            )
            raise ConfigError(msg)
        object.__setattr__(self, "_objects", {})
        object.__setattr__(self, "_remembered", Remembered())
        object.__setattr__(self, COUNTER, 0)
        for name, value in objects.items():
            setattr(self, name, value)

    def __setattr__(self, name: str, value: Any) -> None:
        if name == COUNTER:
            if type(value) is not int:
                msg = f"save_counter must be an int, got {value!r:.100}."
                raise ConfigError(msg)
            object.__setattr__(self, name, value)
        elif name.startswith("_") or hasattr(type(self), name):
            msg = f"{name!r} cannot be tracked under this name; choose another one."
            raise ConfigError(msg)
        else:
            self._objects[name] = value

    def __getattr__(self, name: str) -> Any:
        # Reached only for what is not an attribute already. Copying and pickling ask
        # before __init__ has run.
        objects = object.__getattribute__(self, "__dict__").get("_objects", {})
        if name in objects:
            return objects[name]
        here = ", ".join(map(repr, sorted(objects))) or "nothing"
        # Names that begin so are not tracked; notebooks and copies ask for many of them.
        hint = "." if name.startswith("_") else did_you_mean(name, objects)
        msg = f"this Checkpoint tracks no {name!r}{hint}"
        msg = f"{msg} It tracks {here}."
        raise AttributeError(msg)

    def __dir__(self) -> list[str]:
        # For completion in notebooks.
        return [*super().__dir__(), *self.__dict__.get("_objects", {})]

    def __repr__(self) -> str:
        # By types: no state dict is taken, and no tensor is read, which may be on a device.
        objects = self.__dict__.get("_objects", {})
        parts = [f"{name}={kinds_of(value)}" for name, value in objects.items()]
        parts.append(f"{COUNTER}={self.__dict__.get(COUNTER, 0)}")
        return f"Checkpoint({', '.join(parts)})"

    def __delattr__(self, name: str) -> None:
        if name not in self._objects:
            msg = f"this Checkpoint tracks no {name!r}{did_you_mean(name, self._objects)}"
            raise AttributeError(msg)
        del self._objects[name]


def objects_of(checkpoint: Tracked) -> dict[str, Any]:
    """Return the tracked objects by name."""
    return {**checkpoint.__dict__["_objects"]}


def remembered_of(checkpoint: Tracked) -> Remembered:
    """Return what a checkpoint remembers of the tensors that it tracks."""
    remembered: Remembered = checkpoint.__dict__["_remembered"]
    return remembered


def nodes_of(checkpoint: Tracked, saves: bool = False) -> tracked.Nodes:
    """List what a checkpoint tracks, the save counter included.

    Args:
        checkpoint: The tracked objects.
        saves: Whether they are captured next.
    """
    objects = checkpoint.__dict__["_objects"]
    nodes = tracked.walk(
        objects, lambda name, value: setattr(checkpoint, name, value), saves
    )
    counter = tracked.ValueNode(
        COUNTER,
        checkpoint.save_counter,
        lambda value: setattr(checkpoint, COUNTER, value),
    )
    nodes.shared.insert(0, counter)
    return nodes


def capture(
    checkpoint: Tracked,
    members: Sequence[int] | None = None,
    *,
    loaders: bool = True,
) -> Captured:
    """Collect what this rank has to save; makes no copies and no collectives.

    Args:
        checkpoint: The tracked objects.
        members: torch's global rank of each of the manager's ranks; None where the
            manager's ranks are those of the default group.
        loaders: Whether to take the states of data loaders, which make their iterators for
            that, and begin to fetch.

    Raises:
        UnsupportedError, ConfigError: Names the path of what cannot be saved.
    """
    nodes = nodes_of(checkpoint, saves=True)
    known = remembered_of(checkpoint).known
    numbering = known.numbering(None if members is None else tuple(members))
    captured = Captured(
        Leaves(numbering=numbering, known=known), Leaves(per_rank=True, known=known)
    )
    for node in nodes.shared:
        if loaders or not tracked.is_loader(node):
            node.capture(captured.shared)
    for node in nodes.per_rank:
        if loaders or not tracked.is_loader(node):
            node.capture(captured.per_rank)
    known.forget_all_but({**captured.shared.tensors, **captured.per_rank.tensors})
    return captured
