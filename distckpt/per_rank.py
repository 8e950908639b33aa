"""What ranks have otherwise than others: ``PerRank``, ``PerGroup``, ``OneRank``."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from itertools import islice, repeat
from typing import Any, Literal, TypeAlias

import torch

from distckpt.errors import ConfigError
from distckpt.parts import Parts

# What a rank gets when as many ranks as saved are not there; see ``PerRank``.
Resize: TypeAlias = Literal["error", "by_rank"] | Callable[[list[Any], int, int], Any]


class PerRank:
    """Mark what each rank has of its own, such as a data loader or RNG state.

    Everything else in a ``Checkpoint`` is one value for the whole job.

    Args:
        value: Anything that a ``Checkpoint`` can track.
        resize: What a rank gets if another number of ranks has saved it. ``"error"``:
            nothing, the restore fails. ``"by_rank"``: what the rank of its number saved;
            ranks beyond keep what they have. Or a function ``(saved, rank, world_size)``
            that returns what this rank gets, from the list of what each rank saved: state
            dicts, plain values or tensors. It runs on every rank, when all have read
            everything; so a data loader can divide the positions of all anew.

    Raises:
        ConfigError: Another ``resize``.
    """

    def __init__(self, value: Any, *, resize: Resize = "error") -> None:
        if resize not in ("error", "by_rank") and not callable(resize):
            msg = f'resize must be "error", "by_rank" or a function, got {resize!r:.100}.'
            raise ConfigError(msg)
        self.value = value
        self.resize = resize

    def __repr__(self) -> str:
        return kinds_of(self)


class PerGroup:
    """Mark what is equal within a group of ranks and differs between groups.

    Experts, or the stages of a pipeline, whose tensors have the same names on all ranks.
    Each group is saved under its number (``path/~g0``, ``path/~g1``). It is restored by as
    many groups, whatever number of ranks each of them has. An optimizer of such a module
    needs no mark: its entries follow the names of the parameters.

    Args:
        value: Anything that a ``Checkpoint`` can track.
        mesh: The ``DeviceMesh`` along which the values differ, such as ``mesh["ep"]``. This
            rank's coordinate in it is the number of its group; ranks with the same
            coordinate hold equal values.

    Raises:
        ConfigError: This rank is not in the mesh.

    Example:
        >>> mesh = init_device_mesh("cuda", (2, 4), mesh_dim_names=("dp", "ep"))
        >>> Checkpoint(experts=PerGroup(experts, mesh["ep"]))
    """

    def __init__(self, value: Any, mesh: Any) -> None:
        coordinate = mesh.get_coordinate()
        if coordinate is None:
            msg = f"PerGroup: this rank is not in the mesh {mesh!r:.200}."
            raise ConfigError(msg)
        self.value = value
        self.num_groups = int(mesh.size())
        self.group = 0
        for index, length in zip(coordinate, mesh.shape, strict=True):
            self.group = self.group * int(length) + int(index)

    def __repr__(self) -> str:
        return kinds_of(self)


class OneRank:
    """Mark what may differ between ranks and of which the lowest rank's is stored.

    It is not compared, and every rank gets it back. ``distckpt show`` says so.

    Args:
        value: Anything that a ``Checkpoint`` can track, but for sharded tensors.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return kinds_of(self)


class Replicated:
    """Mark sharded tensors of which other groups of ranks hold copies, on other meshes.

    Several groups of ranks train the same model, each on a mesh without the other groups.
    The values of all groups are compared, and each group writes a share.

    Args:
        value: Anything that a ``Checkpoint`` can track.
    """

    def __init__(self, value: Any) -> None:
        self.value = value

    def __repr__(self) -> str:
        return kinds_of(self)


class RngState:
    """The states of this process's random number generators, to be tracked.

    Python's ``random``, NumPy's legacy generator, torch's CPU generator and that of the
    current CUDA device. Each rank has its own: track it as ``PerRank(RngState())``.
    Generator objects of your own are not covered.
    """

    def __repr__(self) -> str:
        return "RngState()"

    def state_dict(self) -> dict[str, Any]:
        """Return the states as plain values.

        Bytes, not tensors, so that ranks that differ are noticed if ``PerRank`` is
        forgotten.
        """
        state: dict[str, Any] = {
            "python": random.getstate(),
            "torch": _to_bytes(torch.get_rng_state()),
        }
        numpy = sys.modules.get("numpy")
        if numpy is not None:
            kind, keys, *rest = numpy.random.get_state()
            state["numpy"] = (kind, keys.astype("<u4").tobytes(), *rest)
        if torch.cuda.is_available():
            state["cuda"] = _to_bytes(torch.cuda.get_rng_state())
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Set the generators; those that this process does not have are left out."""
        random.setstate(state["python"])
        torch.set_rng_state(_to_tensor(state["torch"]))
        if "numpy" in state:
            import numpy as np

            kind, keys, *rest = state["numpy"]
            np.random.set_state((kind, np.frombuffer(keys, dtype="<u4"), *rest))
        if "cuda" in state and torch.cuda.is_available():
            torch.cuda.set_rng_state(_to_tensor(state["cuda"]))


# Containers are shown up to this depth, and up to so many items.
_MAX_DEPTH = 4
_MAX_ITEMS = 8
_MAX_LENGTH = 40


def kinds_of(value: Any, depth: int = 0) -> str:
    """Spell what a tracked object is: by its type, numbers and short texts as they are.

    No state dict is taken and no tensor is read, which may be on a device.
    """
    kind = type(value)
    if depth > _MAX_DEPTH:
        return kind.__name__
    if isinstance(value, (PerRank, PerGroup, OneRank, Replicated)):
        return f"{kind.__name__}({kinds_of(value.value, depth + 1)}{_more_of(value)})"
    if isinstance(value, (Parts, RngState)):
        return repr(value)
    if kind in (dict, list, tuple) and value:
        return _items_of(value, depth)
    if value is None or kind in (bool, float) or (kind is int and abs(value) < 2**64):
        return repr(value)
    if kind is str and len(value) <= _MAX_LENGTH:
        return repr(value)
    return kind.__name__


def _more_of(mark: PerRank | PerGroup | OneRank | Replicated) -> str:
    if isinstance(mark, PerGroup):
        return f", group {mark.group} of {mark.num_groups}"
    if not isinstance(mark, PerRank) or mark.resize == "error":
        return ""
    if callable(mark.resize):
        name = getattr(mark.resize, "__name__", type(mark.resize).__name__)
        return f", resize={name}"
    return f', resize="{mark.resize}"'


def _items_of(value: Any, depth: int) -> str:
    is_dict = type(value) is dict
    keys = (f"{key!r:.{_MAX_LENGTH}}: " for key in value) if is_dict else repeat("")
    items = value.values() if is_dict else value
    shown = [
        f"{key}{kinds_of(item, depth + 1)}"
        for key, item in islice(zip(keys, items, strict=False), _MAX_ITEMS)
    ]
    if len(value) > _MAX_ITEMS:
        shown.append("...")
    text = ", ".join(shown)
    if is_dict:
        return f"{{{text}}}"
    return f"[{text}]" if type(value) is list else f"({text})"


def _to_bytes(state: torch.Tensor) -> bytes:
    return state.numpy().tobytes()


def _to_tensor(state: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(state), dtype=torch.uint8)
