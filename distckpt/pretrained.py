"""A warm start: the modules of a new job begin with what another one has saved."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from distckpt import files, readers, tensors
from distckpt.boxes import contiguous_runs, whole
from distckpt.capture import Tracked, objects_of, remembered_of
from distckpt.checkpoint import Checkpoint, restore
from distckpt.dtypes import item_size_bytes
from distckpt.errors import CheckpointNotFound, ConfigError, ShardFileError
from distckpt.formats.foreign import SAFETENSORS
from distckpt.formats.import_source import Source
from distckpt.formats.safetensors_file import FileTensor
from distckpt.known import KnownTensor, KnownTensors
from distckpt.layout import WHOLE, Row
from distckpt.locations import Path, absolute, checked_path
from distckpt.mismatch import mismatch
from distckpt.module_node import ModuleNode
from distckpt.modules import unwrap
from distckpt.names import escaped
from distckpt.restore_names import Names, RestoreOptions
from distckpt.restore_plan import RestorePlan, Saved
from distckpt.tensor_paths import key_text
from distckpt.torch_versions import dtype_of_name


def from_pretrained(
    path: str | os.PathLike[str],
    options: RestoreOptions | None = None,
    *,
    tracked_as: str | None = None,
) -> Pretrained:
    """Begin with the weights in a checkpoint of any kind, where there is none of the job's.

    For ``CheckpointManager``'s ``init_fn``: a run directory that has a checkpoint wins.
    The tracked modules are filled, and nothing else; each rank reads the bytes that it
    holds, whatever the layout. Strict: every parameter and buffer must be there, of the
    same shape and dtype, and nothing that no module has.

    Args:
        path: A checkpoint of distckpt's (prefix, attempt or run directory), a safetensors
            file, or a directory of Hugging Face's, with or without an index. The last two
            have no checksums to verify.
        options: What of it, and under which names. Names in a safetensors file are the
            module's own (``layers.0.weight``), without where it is tracked.
        tracked_as: For a safetensors file or directory: under which name the module is
            tracked that it is for; not needed where there is one only.
    """
    return Pretrained(path, options or RestoreOptions(), tracked_as)


class Pretrained:
    """What ``from_pretrained`` returns."""

    def __init__(self, path: Path, options: RestoreOptions, tracked_as: str | None) -> None:
        # Absolute: it is read when the manager initializes, perhaps after a chdir.
        self._path = absolute(checked_path(path, "from_pretrained: the path"))
        self._options = options
        self._tracked_as = tracked_as

    def load_into(self, checkpoint: Tracked) -> None:
        """Fill the modules that are tracked: local, no collectives.

        Raises:
            CheckpointNotFound: There is nothing at the path.
            MismatchError: It does not fit; lists every difference, changes nothing.
            ConfigError: It is not clear which module is meant.
            FormatError, StorageError: It cannot be read.
        """
        modules = {
            name: value
            for name, value in objects_of(checkpoint).items()
            if isinstance(value, nn.Module)
        }
        try:
            located = readers.locate_newest(self._path)
        except CheckpointNotFound:
            if not files.exists(self._path):
                raise
            self._load_safetensors(checkpoint, modules)
        else:
            self._load_checkpoint(located, modules)

    def _load_checkpoint(
        self, located: readers.Located, modules: Mapping[str, nn.Module]
    ) -> None:
        within = [key_text(name, name) for name in modules]
        restore(Checkpoint(**modules), located, Names(self._options, within=within))

    def _load_safetensors(
        self, checkpoint: Tracked, modules: Mapping[str, nn.Module]
    ) -> None:
        name = self._tracked_as
        if name is None and len(modules) == 1:
            (name,) = modules
        if name is None or name not in modules:
            msg = (
                f"{self._path}: for which of the tracked modules {sorted(modules)}? Say so "
                "by tracked_as."
            )
            raise ConfigError(msg)
        known = remembered_of(checkpoint).known
        node = ModuleNode(key_text(name, name), unwrap(modules[name]))
        with Source(self._path, SAFETENSORS) as source:
            _fill_from(source.tree, node, known, self._options, self._path)


def _fill_from(
    stored: Mapping[Any, FileTensor],
    node: ModuleNode,
    known: KnownTensors,
    options: RestoreOptions,
    path: str,
) -> None:
    renaming = Names(RestoreOptions(rename=options.rename))
    names = Names(replace(options, rename=None), below=node.path)
    rows: dict[str, Row] = {}
    for key, entry in stored.items():
        full = f"{node.path}/{escaped(renaming.here(key))}"
        rows[full] = Row(key, entry.dtype, entry.shape, WHOLE)
    live = node.own_tensors(known)
    # Of tied tensors such files have one name only.
    first_of = {id(live[full]): full for full in live if full in rows}
    for full, tensor in live.items():
        if full not in rows and id(tensor) in first_of:
            rows[full] = rows[first_of[id(tensor)]]
    plan = RestorePlan(Saved(rows, {}, names, knows_ties=False), known)
    node.plan(plan)
    lost = [f"{node.path}/{escaped(name)}" for name in node.never_loaded()]
    for full in filter(names.selects, lost):
        plan.saved.take_row(full)
        plan.problems = [p for p in plan.problems if not p.startswith(f"{full}: ")]
        plan.problems.append(
            f"{full}: made anew by the module's state_dict(), so nothing from a "
            "safetensors file would reach the module; exclude it"
        )
    unused = [
        f"{name}: renamed, and no name begins so" for name in renaming.never_matched()
    ]
    problems = [*plan.problems, *plan.unclaimed(), *unused]
    if problems:
        raise mismatch(path, problems)
    for key, tensor in plan.reads.items():
        _fill(known.describe(key, tensor), tensor, stored[key])
    for finish in plan.finishers:
        finish()


# So many elements are read and converted at a time.
_CONVERTED_ELEMENTS = 2**20


def _fill(known: KnownTensor, tensor: Any, stored: FileTensor) -> None:
    if known.box is None or known.size_bytes == 0:
        return
    item = item_size_bytes(stored.dtype)
    is_converted = stored.dtype != known.dtype
    with tensors.writable_bytes(tensor) as buffer:
        for start, index, length in contiguous_runs(
            known.box, whole(known.shape), known.box
        ):
            piece = _CONVERTED_ELEMENTS if is_converted else length
            for done in range(0, length, piece):
                count = min(piece, length - done)
                data = bytearray(count * item) if is_converted else b""
                at = index + done
                part = memoryview(data) or buffer[at * item : (at + count) * item]
                if stored.file.read_into(stored.start + (start + done) * item, part) < len(
                    part
                ):
                    msg = f"{stored.file.path}: ends inside a tensor."
                    raise ShardFileError(msg)
                if is_converted:
                    saved = dtype_of_name(stored.dtype)
                    tensors.convert_into(buffer, tensor.dtype, at, bytearray(part), saved)
