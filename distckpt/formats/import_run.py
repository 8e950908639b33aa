"""Make a run directory with one checkpoint of what another program has saved.

It is written by the ordinary way of a job of one rank: claimed, written, committed. So any
number of ranks, sharded in any way, restores it, and a job goes on from it.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distckpt import opened, paths, shard_file
from distckpt.chief import Chief
from distckpt.errors import ConfigError, StorageError
from distckpt.formats.foreign import Advance, Facts, Tensor, Watched, compare, facts_of
from distckpt.formats.import_names import Named, identity_of
from distckpt.formats.placing import Placing
from distckpt.identity import Identity
from distckpt.layout import SPLIT, WHOLE, Assignment, Row, Table
from distckpt.manifest import Shard
from distckpt.retention import Retention
from distckpt.run_directory import RunDirectory

_COUNTER = "save_counter"
_SETTLE_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import has made.

    Attributes:
        path: The checkpoint.
        num_tensors: How many tensors, by all their names.
        num_values: How many plain values.
        size_bytes: Bytes of the tensors; tied ones count once.
    """

    path: str
    num_tensors: int
    num_values: int
    size_bytes: int


def import_run(
    found: Named,
    directory: str,
    advance: Advance,
    *,
    name: str = "ckpt",
    number: int | None = None,
    step: int | None = None,
) -> Imported:
    """Write tensors and values as the only checkpoint of a new run directory.

    After return it is committed, durable, and was read again; after an error nothing is
    there. What is held of a tensor is a piece of a few MiB, but for those whose source says
    otherwise.

    Args:
        found: What is imported, by its names.
        directory: The run directory; nothing may be there.
        advance: Told how many bytes of tensors were written, and read again.
        name: The ``checkpoint_name``, as the manager will be given it.
        number: The checkpoint's number; None: what was counted at the source, or 1.
        step: The training step that it is of.

    Raises:
        ConfigError: Something is there already, or the number cannot be one.
        FormatError: The source's bytes are wrong.
        StorageError: It cannot be read or written.
    """
    counted = found.values.get(_COUNTER)
    chosen = number if number is not None else counted if type(counted) is int else 1
    values = {**found.values, _COUNTER: chosen}
    if not paths.is_checkpoint_name(name):
        msg = f"{name!r:.200} cannot be the name of checkpoints."
        raise ConfigError(msg)
    watched = {n: Watched(tensor, advance) for n, tensor in found.tensors.items()}
    ties = found.ties
    with Placing(directory) as placing:
        published = _commit(
            RunDirectory.at(placing.path), name, chosen, step, watched, ties, values
        )
        once = {n: watched[n].facts() for n in watched if n not in ties}
        _check_ties(found, once)
        with opened.open(published) as written:
            compare(published, {n: written[n] for n in once}, once, advance)
    size = sum(tensor.size_bytes for n, tensor in watched.items() if n not in ties)
    path = os.path.join(directory, f"{name}-{chosen}")
    return Imported(path, len(watched), len(values), size)


def size_to_write(found: Named) -> int:
    """Return how many bytes of tensors an import will write."""
    once = (tensor for name, tensor in found.tensors.items() if name not in found.ties)
    return sum(tensor.size_bytes for tensor in once)


def _check_ties(found: Named, facts: Mapping[str, Facts]) -> None:
    """Read what was declared to be one tensor and is two at the source: they are equal."""
    for name, first in found.ties.items():
        tensor = found.tensors[name]
        if identity_of(tensor) != identity_of(found.tensors[first]):
            own = facts_of(tensor, lambda _: None)
            if own != facts[first]:
                msg = (
                    f"{name!r} cannot be tied to {first!r}: {own}, expected {facts[first]}."
                )
                raise ConfigError(msg)


def _commit(
    run: RunDirectory,
    name: str,
    number: int,
    step: int | None,
    tensors: Mapping[str, Watched],
    ties: Mapping[str, str],
    values: Mapping[str, Any],
) -> str:
    """Save through a chief of its own; returns the attempt's directory."""
    table = Table(_row(n, tensor, ties.get(n, "")) for n, tensor in tensors.items())
    chief = Chief(
        run,
        checkpoint_name=name,
        retention=Retention(None),
        identity=Identity("import", 0),
    )
    try:
        chief.prepare_claim()
        chief.finish_claim()
        attempt = chief.begin(number, 0)
        written = shard_file.write_streamed(
            run.new_shard(attempt, 0, 1),
            [
                shard_file.Streamed(piece, tensors[piece.row.name].stream)
                for piece in Assignment([table], [0]).pieces_of_rank(0)
            ],
            attempt=attempt.published,
            rank=0,
            world_size=1,
            per_rank_values={},
        )
        shards = [Shard(written.size_bytes, written.header, 0)]
        chief.commit(attempt, step=step, shards=shards, layouts=[table], values=values)
        if not chief.settle(_SETTLE_SECONDS):
            msg = f"{run}: the filesystem does not come to an end with deleting."
            raise StorageError(msg, operation="remove", path=str(run))
    finally:
        chief.close()
    return str(run.attempt(attempt))


def _row(name: str, tensor: Tensor, same_as: str) -> Row:
    # Of several ranks that save it again, what has dimensions is shared work.
    kind = SPLIT if tensor.shape else WHOLE
    return Row(name, tensor.dtype, tuple(tensor.shape), kind, same_as)
