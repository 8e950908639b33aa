"""``Checkpoint``: the objects whose state makes up a checkpoint."""

from __future__ import annotations

import logging
import os

import torch.distributed as dist

from distckpt import object_types, readers
from distckpt.capture import Tracked, capture, nodes_of, objects_of, remembered_of
from distckpt.generators import generators_kept
from distckpt.loading import Loading, name_of
from distckpt.mismatch import mismatch
from distckpt.restore_names import Names, RestoreOptions

_logger = logging.getLogger(__name__)


class Checkpoint(Tracked):
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

    def check(self) -> None:
        """Find out whether all that is tracked can be stored: local, no collectives.

        A manager does so by itself: all ranks hear of it at ``restore_or_initialize()``,
        or at the first ``save()``. To know it before, call this once the objects are made.
        It calls each object's ``state_dict()``; random generators stay as they are.

        Raises:
            UnsupportedError, ConfigError: Names the path of what cannot be stored.
        """
        for warning in object_types.look_at(objects_of(self)):
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


def restore(checkpoint: Tracked, located: readers.Located, names: Names) -> None:
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


def _rank_and_world_size() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
