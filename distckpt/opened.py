"""A checkpoint opened for reading, in notebooks and evaluation: no job, no live objects.

Nothing is read before it is asked for: tensors are handles (``stored_tensor.py``), and of a
handle only the blocks that overlap the wanted region are read, each of them verified.
Without torch, unless a tensor of torch's is asked for.
"""

from __future__ import annotations

import os
from collections.abc import (
    Callable,
    ItemsView,
    Iterable,
    Iterator,
    KeysView,
    Mapping,
    ValuesView,
)
from datetime import datetime
from functools import cached_property, partial
from html import escape
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

from distckpt import readers, state_dicts, words
from distckpt.boxes import Box
from distckpt.errors import ConfigError, ManifestError, TensorNotFound
from distckpt.manifest import Manifest
from distckpt.names import split_inner
from distckpt.near import did_you_mean
from distckpt.run_directory import AttemptDirectory
from distckpt.selection import Selection
from distckpt.stamp import FIRST_FORMAT
from distckpt.stored_tensor import Files, StoredTensor
from distckpt.values import Decoder

if TYPE_CHECKING:
    import torch

_MAX_NAMES = 8
_MAX_ROWS = 40


def open(path: str | os.PathLike[str]) -> OpenedCheckpoint:
    """Open a checkpoint for reading: no process group, no torch, nothing tracked.

    The manifest is read and checked; shard files are opened when they are first needed.
    If a running job deletes the checkpoint meanwhile, reading fails with a
    ``StorageError``: open the newest again.

    Args:
        path: A prefix as ``save()`` returns it, an attempt's directory, or a run
            directory, which means its newest checkpoint.

    Raises:
        CheckpointNotFound: Nothing committed is there.
        CorruptStateError, ManifestError, ChecksumError: It is not what was committed.
        StorageError: It cannot be read.
    """
    located = readers.locate_newest(path)
    manifest = readers.read_manifest(located.directory, located.manifest_digest)
    _ = manifest.assignment  # worked out here, where its errors belong
    return OpenedCheckpoint(located.directory, manifest)


class PlainValues(dict[str, Any]):
    """Plain values by name; a name that is not there is answered with near ones.

    Args:
        values: The values.
        where: The name of their owner, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        super().__init__(values)
        self._where = where

    def __missing__(self, name: object) -> Any:
        hint = did_you_mean(str(name), self)
        msg = f"{self._where}: no plain value {name!r:.200} among {len(self)}{hint}"
        raise TensorNotFound(msg)

    def _ipython_key_completions_(self) -> list[str]:
        return [*self]


class _Named(Mapping[str, StoredTensor]):
    """Tensors by full name, and plain values beside.

    Attributes:
        encoded_values: The plain values by name, as they are stored (``values.encode``).
    """

    def __init__(
        self,
        handles: dict[str, StoredTensor],
        encoded: dict[str, Any],
        where: str,
        manifest: Manifest,
        same_as: Mapping[str, str],
    ) -> None:
        self._handles = handles
        self.encoded_values: Mapping[str, Any] = encoded
        self._where = where
        self._source = state_dicts.Source(
            where, handles.keys(), encoded, manifest.stamp.format != FIRST_FORMAT
        )
        self._same_as = same_as

    def __getitem__(self, name: str) -> StoredTensor:
        handle = self._handles.get(name)
        if handle is None:
            msg = f"{self._where}: no tensor {name!r:.200} among {len(self)}"
            raise TensorNotFound(f"{msg}{self._hint(name)}")
        return handle

    # A mapping's own would ask for the tensor, and look for near names in vain.
    def __contains__(self, name: object) -> bool:
        return name in self._handles

    def get(self, name: str, default: Any = None) -> StoredTensor | Any:
        """Return the handle of a tensor, or the default where there is none."""
        return self._handles.get(name, default)

    def _hint(self, name: object) -> str:
        parts = [full for full in self._handles if split_inner(full)[0] == name]
        if parts:
            return f"; it is made of others: {', '.join(parts[:_MAX_NAMES])}."
        if name in self.encoded_values:
            return f"; it is a plain value: plain_values[{name!r:.200}]."
        below = f"{name}/", f"{name}."
        num_below = sum(full.startswith(below) for full in self._handles)
        if num_below:
            tensors = words.count(num_below, "tensor")
            return f"; it holds {tensors}, see state_dict({name!r:.200})."
        return did_you_mean(str(name), [*self._handles, *self.encoded_values])

    def __iter__(self) -> Iterator[str]:
        return iter(self._handles)

    def __len__(self) -> int:
        return len(self._handles)

    def keys(self) -> KeysView[str]:
        """Return the names of the tensors."""
        return _Names(self)

    def values(self) -> ValuesView[StoredTensor]:
        """Return the handles of the tensors."""
        return _Handles(self)

    def items(self) -> ItemsView[str, StoredTensor]:
        """Return the names of the tensors, each with its handle."""
        return _Items(self)

    @cached_property
    def plain_values(self) -> Mapping[str, Any]:
        """The plain values by name, decoded; a tensor inside one is its handle.

        So is an array of more than 4 KiB. Instances of classes are plain values, as
        nothing live tells how to make them; see ``docs/values.md``. Of a tensor that is
        made of others there is what it is besides these (``value_tags.Wrapper``).
        """
        decoder = _Decoder(self._handle_in_value)
        decoded = {
            name: decoder.decode(encoded) for name, encoded in self.encoded_values.items()
        }
        return PlainValues(decoded, self._where)

    def _handle_in_value(self, name: str) -> StoredTensor:
        if name not in self._handles:
            msg = f"{self._where}: a value refers to tensor {name!r}: not there."
            raise ManifestError(msg)
        return self._handles[name]

    def state_dict(
        self, name: str, *, device: str | torch.device | None = None
    ) -> dict[str, Any]:
        """Read what is below a name as a state dict of torch tensors, verified.

        The keys of a module are its own names, without those of DDP or other wrappers. Tied
        names share one tensor, as in ``module.state_dict()``. Extra state and the versions
        that its classes declare are part of it. For another object with a state dict (a
        scheduler, a data loader) the result is the state that it has returned.

        The tensors are whole, so a sharded module needs memory for all of it. A job
        restores with ``CheckpointManager`` or ``Checkpoint.restore``.

        Args:
            name: The name that the object is tracked under, such as ``"model"``; or the
                path of a submodule, such as ``"model/encoder.layers.0"``.
            device: The device that each tensor is put on after it was read; by default the
                CPU.

        Raises:
            TensorNotFound: There is nothing of that name; the message has near ones.
            ConfigError: It is a tensor, a plain value, several objects, or an optimizer,
                which is restored together with its module; the message says what to do.
            UnsupportedError: This version of torch does not have a dtype.
            ChecksumError, ShardFileError: The bytes are not those that were written.
            StorageError: They cannot be read.

        Example:
            >>> with distckpt.open("runs/gpt") as opened:
            ...     model.load_state_dict(opened.state_dict("model"))
        """
        read: dict[str, torch.Tensor] = {}

        def read_once(full: str) -> torch.Tensor:
            first = self._same_as.get(full) or full
            if first not in read:
                tensor = self._handle_in_value(full).torch()
                read[first] = tensor if device is None else tensor.to(device)
            return read[first]

        return state_dicts.state_dict_of(self._source, name, read_once)

    def _ipython_key_completions_(self) -> list[str]:
        """Offer the names where somebody types ``opened["``, in IPython and Jupyter."""
        return [*self._handles]

    def _title(self) -> str:
        raise NotImplementedError

    def _facts(self) -> list[str]:
        return []

    def _repr_html_(self) -> str:
        """Make the table that notebooks show."""
        cells = [
            (
                handle.name,
                handle.dtype,
                " x ".join(map(str, handle.shape)) or "scalar",
                words.size(handle.size_bytes),
            )
            for handle in islice(self._handles.values(), _MAX_ROWS)
        ]
        rows = [
            f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in cells
        ]
        more = len(self) - len(rows)
        if more > 0:
            rows.append(f'<tr><td colspan="4">... and {more} more</td></tr>')
        head = "".join(f"<th>{c}</th>" for c in ("tensor", "dtype", "shape", "size"))
        table = (
            f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
        )
        title = "; ".join([self._title(), *self._facts()])
        return f"<div><p>{escape(title)}</p>{table if rows else ''}</div>"


class _Names(KeysView[str]):
    def __repr__(self) -> str:
        return _listed("name", len(self), self)


class _Handles(ValuesView[StoredTensor]):
    def __repr__(self) -> str:
        return _listed("tensor", len(self), map(_described, self))


class _Items(ItemsView[str, StoredTensor]):
    def __repr__(self) -> str:
        # Each handle has the name.
        return _listed("tensor", len(self), (_described(handle) for _, handle in self))


def _described(handle: StoredTensor) -> str:
    return f"{handle.name}: {handle.dtype} {list(handle.shape)}"


def _listed(noun: str, number: int, texts: Iterable[str]) -> str:
    shown = [*islice(texts, _MAX_NAMES)]
    more = f", ... and {number - len(shown)} more" if number > len(shown) else ""
    return f"<{words.count(number, noun)}{': ' * bool(shown)}{', '.join(shown)}{more}>"


class _Decoder(Decoder):
    """Decodes values with handles for the tensors in them."""

    def __init__(self, handle_of: Callable[[str], StoredTensor]) -> None:
        self._handle_of = handle_of

    def tensor(self, name: str) -> StoredTensor:
        return self._handle_of(name)


class RankTensors(_Named):
    """What one rank has of its own (``PerRank``): its tensors by name, its plain values.

    Attributes:
        rank: The rank.
    """

    def __init__(self, files: Files, rank: int) -> None:
        header = files.reader(rank).header
        handles = {
            name: StoredTensor(
                files,
                partial(files.find_own, rank, name),
                name,
                stored.dtype,
                Selection.of_all(stored.global_shape),
            )
            for name, stored in header.entries.per_rank.items()
        }
        where = f"rank {rank} of {files.directory}"
        # Of a rank's own tensors those that are tied were stored one by one.
        super().__init__(handles, header.per_rank_values, where, files.manifest, {})
        self.rank = rank

    def _title(self) -> str:
        return f"rank {self.rank}'s own: {_counted(self)}"

    def __repr__(self) -> str:
        return f"<{self._title()}>"


def _counted(named: _Named) -> str:
    tensors = words.count(len(named), "tensor")
    return f"{tensors}, {words.count(len(named.encoded_values), 'plain value')}"


class Part(NamedTuple):
    """What one shard file holds of one tensor.

    Attributes:
        name: The tensor's, of tied ones that of the first.
        rank: Whose own it is; None if it is the job's.
        box: Which region of it.
        block_bytes: Size of the blocks that checksums were taken of.
        checksums: Of all its blocks. Parts of equal size and equal checksums, of blocks of
            equal size, have equal bytes.
    """

    name: str
    rank: int | None
    box: Box
    block_bytes: int
    checksums: bytes


class OpenedCheckpoint(_Named):
    """The tensors of a checkpoint by full name, read-only; see ``distckpt.open``.

    Whatever number of ranks saved it, and however their tensors were sharded: each is one
    whole tensor here. What each rank had of its own stands apart, in ``per_rank``. For one
    thread at a time.

    Attributes:
        directory: The attempt's directory.
    """

    def __init__(self, directory: AttemptDirectory, manifest: Manifest) -> None:
        self.directory = str(directory)
        self.manifest = manifest
        self._files = files = Files(directory, manifest)
        handles = {
            row.name: StoredTensor(
                files,
                partial(files.find_shared, row.name),
                row.name,
                row.dtype,
                Selection.of_all(row.shape),
            )
            for row in manifest.assignment.rows.values()
        }
        rows = manifest.assignment.rows
        same_as = {name: row.same_as for name, row in rows.items() if row.same_as}
        super().__init__(handles, manifest.values, self.directory, manifest, same_as)

    @property
    def number(self) -> int:
        """The checkpoint's number, as in ``ckpt-1000``."""
        return self.manifest.attempt.number

    @property
    def step(self) -> int | None:
        """The training step, if the manager had a step counter."""
        return self.manifest.step

    @property
    def created(self) -> float:
        """When it was saved, seconds since the epoch."""
        return self.manifest.created

    @property
    def created_date(self) -> datetime:
        """The same as a datetime in UTC."""
        return words.utc(self.created)

    @property
    def metrics(self) -> dict[str, float]:
        """What ``save(metrics=...)`` was given."""
        return dict(self.manifest.remarks.metrics)

    @property
    def metadata(self) -> dict[str, Any]:
        """What ``save(metadata=...)`` was given."""
        return self.manifest.remarks.metadata

    @property
    def world_size(self) -> int:
        """How many ranks saved it."""
        return self.manifest.world_size

    @property
    def size_bytes(self) -> int:
        """Bytes of all its shard files."""
        return self.manifest.size_bytes

    def per_rank(self, rank: int) -> RankTensors:
        """Return what one rank has of its own; opens that rank's file.

        Raises:
            ConfigError: There was no such rank.
            FormatError, StorageError: Its file is not what was committed.
        """
        if type(rank) is not int or not 0 <= rank < self.world_size:
            ranks = words.count(self.world_size, "rank")
            msg = f"{self.directory} was saved by {ranks}; there is no rank {rank!r:.100}."
            raise ConfigError(msg)
        return RankTensors(self._files, rank)

    def parts(self, rank: int) -> Iterator[Part]:
        """Walk what one rank's file holds, in its order; reads no more than its header.

        Raises:
            FormatError, StorageError: Its file is not what was committed.
        """
        reader = self._files.reader(rank)
        for stored in reader.header.entries.values():
            yield Part(
                stored.name,
                rank if stored.per_rank else None,
                stored.box,
                reader.header.block_bytes,
                reader.checksums_of(stored),
            )

    def close(self) -> None:
        """Close the files; handles cannot be read any more."""
        self._files.readers.close()

    def __enter__(self) -> OpenedCheckpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _title(self) -> str:
        step = "" if self.step is None else f" (step {self.step})"
        return f"checkpoint {self.manifest.attempt.prefix}{step}: {_counted(self)}"

    def __repr__(self) -> str:
        return f"<{self._title()}>"

    def _facts(self) -> list[str]:
        ranks = words.count(self.world_size, "rank")
        facts = [
            f"saved {words.utc_date(self.created)} by {ranks}",
            words.size(self.size_bytes),
        ]
        return [*facts, words.metrics(self.metrics)] if self.metrics else facts
