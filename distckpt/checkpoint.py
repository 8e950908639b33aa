"""``Checkpoint``: the objects whose state makes up a checkpoint."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch.distributed as dist

from distckpt import object_types, readers, tracked
from distckpt.errors import ConfigError
from distckpt.generators import generators_kept
from distckpt.leaves import Leaves
from distckpt.loading import Loading, Remembered, name_of
from distckpt.mismatch import mismatch
from distckpt.near import did_you_mean
from distckpt.per_rank import kinds_of
from distckpt.restore_names import Names, RestoreOptions

_logger = logging.getLogger(__name__)

COUNTER = "save_counter"


class Captured(NamedTuple):
    """What one rank has to save."""

    shared: Leaves
    per_rank: Leaves


class Checkpoint:
    """Track objects whose state is saved and restored together.

    Tracked are modules, optimizers, anything with ``state_dict`` and
    ``load_state_dict``, tensors (restored in place), plain values, and dicts and lists
    of these; ``docs/values.md`` lists all that can be stored. ``PerRank(x)`` marks what
    each rank has of its own; everything else is one value for the job. The objects are
    attributes; more can be assigned later.

    ``save_counter`` counts the saves and is part of the checkpoint.

    Args:
        **objects: What to track, by name.

    Raises:
        ConfigError: A name is taken by a method.
    """

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

    def check(self) -> None:
        """Find out whether all that is tracked can be stored: local, no collectives.

        A manager does so by itself: all ranks hear of it at ``restore_or_initialize()``,
        or at the first ``save()``. To know it before, call this once the objects are made.
        It calls each object's ``state_dict()``; random generators stay as they are.

        Raises:
            UnsupportedError, ConfigError: Names the path of what cannot be stored.
        """
        for warning in object_types.look_at(self._objects):
            _logger.warning("%s", warning)
        with generators_kept():
            capture(self)

    def restore(
        self, path: str | os.PathLike[str], options: RestoreOptions | None = None
    ) -> None:
        """Restore this process's objects from a checkpoint: local, no collectives.

        Whatever layout and number of ranks saved it: each tensor is read as it lies here.
        For warm starts, evaluation and notebooks; a job restores with
        ``CheckpointManager.restore_or_initialize``, which falls back together.

        What is ``PerRank`` is taken by this process's rank in the default group (0
        without one), and needs as many ranks as saved it, or a ``resize``.

        After an error other than ``MismatchError`` tensors may hold a mixture.

        Args:
            path: A prefix as ``save()`` returns it, or an attempt's directory. A run
                directory means its newest checkpoint.
            options: What of it, and under which names; by default all.

        Raises:
            CheckpointNotFound: There is no such checkpoint.
            MismatchError: It does not fit; lists every difference, changes nothing.
            FormatError, StorageError: It cannot be read, or its bytes are wrong.
            ConfigError, UnsupportedError: Something tracked cannot be restored into.
        """
        restore(self, readers.locate_newest(path), Names(options))


def restore(checkpoint: Checkpoint, located: readers.Located, names: Names) -> None:
    """Restore objects of this process; see ``Checkpoint.restore``."""
    manifest = readers.read_manifest(located.directory, located.manifest_digest)
    rank, world_size = _rank_and_world_size()
    nodes = nodes_of(checkpoint)
    remembered = remembered_of(checkpoint)
    loading = Loading(located.directory, manifest, rank, world_size, remembered, names)
    with loading:
        loading.open_own(nodes)
        loading.plan(nodes)
        loading.open_files()
        if loading.unclaimed:
            what = name_of(located.directory, manifest)
            raise mismatch(what, loading.unclaimed)
        loading.read()
        loading.finish()


def objects_of(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the tracked objects by name."""
    return {**checkpoint.__dict__["_objects"]}


def remembered_of(checkpoint: Checkpoint) -> Remembered:
    """Return what a checkpoint remembers of the tensors that it tracks."""
    remembered: Remembered = checkpoint.__dict__["_remembered"]
    return remembered


def nodes_of(checkpoint: Checkpoint, saves: bool = False) -> tracked.Nodes:
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
    checkpoint: Checkpoint,
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


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
