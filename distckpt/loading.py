"""One rank's reading of one attempt: plan, check, fill tensors, finish.

Nothing here talks to other ranks; ``restore.py`` puts the votes between the parts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch

from distckpt import tensors, words
from distckpt.boxes import contiguous_runs, overlap, whole
from distckpt.collector import collector_paused
from distckpt.comm import check_nothing_adrift
from distckpt.dtypes import item_size_bytes
from distckpt.errors import FormatError, MismatchError
from distckpt.exchange_plan import ExchangePlan, Parcel, wants_digest
from distckpt.known import KnownTensor, KnownTensors, window
from distckpt.layout import WHOLE, Row
from distckpt.manifest import Manifest
from distckpt.node import Node
from distckpt.per_rank import Resize
from distckpt.read_plan import Located, ReadPlan, ReadPlans, Wanted
from distckpt.readers import open_shard
from distckpt.restore_names import Names
from distckpt.restore_plan import RestorePlan, Saved
from distckpt.ring import Ring
from distckpt.run_directory import AttemptDirectory
from distckpt.shard_file import Batch, Part, ShardReader, batches_of
from distckpt.shard_header import Stored
from distckpt.stamp import FIRST_FORMAT
from distckpt.torch_versions import dtype_of_name
from distckpt.tracked import Nodes


class _Wants(NamedTuple):
    """What a rank reads into: made once for as long as its tensors stay as they are.

    Attributes:
        known: What the tensors are, by name.
        wanted: What it wants for itself.
        common: What all ranks may want alike.
    """

    known: dict[str, KnownTensor]
    wanted: list[Wanted]
    common: list[Wanted]


class _Placed(NamedTuple):
    """Where what comes from one file goes: made once for as long as nothing changes.

    Attributes:
        located: What comes from it.
        wants: Of which tensors it makes up what.
        batches: What goes to its place on the host in one run.
        on_device: What goes to its place on a device in one run.
        pieces: All else.
    """

    located: list[Located]
    wants: _Wants
    batches: list[Batch]
    on_device: list[Located]
    pieces: list[Located]


class Remembered:
    """What one ``Checkpoint`` remembers of its tensors between saves and restores.

    Attributes:
        known: What is known of its tensors.
        read_plans: What was read last.
        common_plans: What all ranks have read together last.
        exchange_plan: Who of them has read what.
        placed: Where what was read from each rank's file went.
    """

    def __init__(self) -> None:
        self.known = KnownTensors()
        self.read_plans = ReadPlans()
        self.common_plans = ReadPlans()
        self.exchange_plan: ExchangePlan | None = None
        self.placed: dict[int, _Placed] = {}

    def __reduce__(self) -> tuple[type[Remembered], tuple[()]]:
        return Remembered, ()  # a copy of a checkpoint tracks other tensors


class Loading:
    """Reads one attempt into live objects.

    In this order: ``open_own``, ``plan``, ``open_files``, ``read``, ``finish``; no live
    object is changed before ``read``. Those that open and read files may run on another
    thread. ``plan`` and ``finish`` run user code: on the thread that trains, as nothing
    else is promised to it. The files are closed by ``close``, or by an error before
    ``read``.

    What all ranks have use for can be left to ``exchange.py``: ``read`` reads the rest.

    Attributes:
        manifest: What the attempt consists of.
        wants: Equal on ranks that want the same tensors; zeros if nothing is left to an
            exchange.
        common: How what they want is exchanged; None likewise.
        unclaimed: What nothing here has a use for, one sentence each: names in the
            checkpoint, and patterns. A mismatch only if it is so on all ranks. Known once
            planned.
    """

    def __init__(
        self,
        directory: AttemptDirectory,
        manifest: Manifest,
        rank: int,
        world_size: int,
        remembered: Remembered,
        names: Names,
    ) -> None:
        self._names = names
        self._remembered = remembered
        self._directory = directory
        self.manifest = manifest
        self._rank = rank
        self._world_size = world_size
        self._what = name_of(directory, manifest)
        self._readers: dict[int, ShardReader] = {}
        self._stack = ExitStack()
        self._knows_kinds = manifest.stamp.format != FIRST_FORMAT
        saved = Saved(
            manifest.assignment.rows,
            manifest.values,
            names,
            knows_kinds=self._knows_kinds,
        )
        self._shared = RestorePlan(saved, remembered.known)
        # By the rank that saved it, for what is this rank's own.
        self._own_plans: dict[int, RestorePlan] = {}
        self._reads: ReadPlan | None = None
        self._rings: dict[torch.device, Ring] = {}
        # As they were when the files were opened: no user code runs from then on.
        self._wants = _Wants({}, [], [])
        self.wants = bytes(16)
        self.common: ExchangePlan | None = None
        self.unclaimed: list[str] = []

    def open_own(self, nodes: Nodes) -> None:
        """Open this rank's own file, if it tracks anything that only its header tells of.

        Raises:
            MismatchError: Another number of ranks has saved it.
            FormatError: The file is not what the manifest says; ``shard_rank`` says whose.
            StorageError: It cannot be opened.
        """
        with self._closed_on_error():
            for rank in self._owners_of(nodes):
                saved = self._saved_by(rank)
                self._own_plans[rank] = RestorePlan(saved, self._remembered.known)

    def plan(self, nodes: Nodes) -> None:
        """List what will be read, and all that does not fit; runs user code.

        Raises:
            MismatchError: Lists every difference.
            UnsupportedError: Something tracked cannot be restored into.
        """
        with self._closed_on_error(), collector_paused():
            for node in nodes.shared:
                node.plan(self._shared)
            for node in nodes.per_rank:
                self._plan_own(node, nodes.resize[node.path])
            for plan in self._own_plans.values():
                self._shared.problems += plan.problems
            own = self._own_plans.get(self._rank)
            if own is not None:
                self._shared.problems += [
                    f"{name}: this rank's own in the checkpoint, nothing here"
                    for name in own.saved.left_over()
                ]
            self._shared.raise_problems(self._what)
            self.unclaimed = self._shared.unclaimed()

    def open_files(self, exchange: bool = False) -> None:
        """Open and check every file that will be read.

        Args:
            exchange: Leave what all ranks have use for to an exchange, in which this one
                reads a part of that. Called again without, it is as if that had never been.

        Raises:
            FormatError: A file is not what the manifest says; ``shard_rank`` says whose.
            StorageError: A file cannot be opened.
            RestoreFailed: A broken manager of this process may still fill tensors.
        """
        with self._closed_on_error(), collector_paused():
            check_nothing_adrift()
            self._wants = self._look_at_tensors(exchange)
            assignment = self.manifest.assignment
            self._reads = self._remembered.read_plans.plan(assignment, self._wants.wanted)
            for rank in self._reads.sources:
                self._reader(rank)
            self.wants, self.common = bytes(16), None
            if exchange:
                common = self._wants.common
                self.wants = wants_digest([name for name, _ in common])
                self.common = self._exchange_plan(common)
                for rank in self.common.files_of(self._rank):
                    self._reader(rank)

    def _look_at_tensors(self, exchange: bool) -> _Wants:
        names, live = [*self._shared.reads], [*self._shared.reads.values()]
        # What all ranks read together follows from how it was saved, too.
        saved = self.manifest.assignment if exchange else None
        also = (names, saved, self._names.cast)
        return self._remembered.known.recall(
            ("reads", exchange), live, also, lambda: self._list_wants(exchange)
        )

    def _list_wants(self, exchange: bool) -> _Wants:
        wants = _Wants({}, [], [])
        for name, tensor in self._shared.reads.items():
            known = wants.known[name] = self._remembered.known.describe(name, tensor)
            if exchange and self._is_for_all(name, tensor, known):
                wants.common.append((name, whole(known.shape)))
            elif known.box is not None and known.size_bytes > 0:
                wants.wanted.append((name, known.box))
        return wants

    def _is_for_all(self, name: str, tensor: torch.Tensor, known: KnownTensor) -> bool:
        """Tell whether every rank has use for what any rank reads of a tensor.

        The same on all ranks of its mesh, whatever they hold of it.
        """
        if known.box is None or 0 in known.shape or self._is_converted(name, known):
            return False
        if not known.is_sharded or not tensors.is_cut(tensor):
            return True
        # As it was saved, each rank's part lies by itself in the file of one.
        saved = self.manifest.assignment.rows[name].sharding
        as_saved = saved and (saved.mesh.shape, saved.placements)
        return tensors.is_cut_inside(tensor) and as_saved != tensors.layout_of(tensor)

    def _is_converted(self, name: str, known: KnownTensor) -> bool:
        return self.manifest.assignment.rows[name].dtype != known.dtype

    def _exchange_plan(self, common: list[Wanted]) -> ExchangePlan:
        assignment = self.manifest.assignment
        reads = self._remembered.common_plans.plan(assignment, common)
        plan = self._remembered.exchange_plan
        if plan is None or not plan.is_of(reads):
            plan = ExchangePlan(
                reads, assignment.rows, self.manifest.world_size, self._world_size
            )
            self._remembered.exchange_plan = plan
        return plan

    @contextmanager
    def _closed_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.close()
            raise

    def _owners_of(self, nodes: Nodes) -> Iterable[int]:
        """Return the ranks of whose own things this one may need some.

        Raises:
            MismatchError: It needs those of a rank that has saved none, or more.
        """
        saved_by = self.manifest.world_size
        if not nodes.per_rank:
            return []
        if not self._is_resized:
            return [self._rank]
        refused = [path for path, resize in nodes.resize.items() if resize == "error"]
        refused = [path for path in refused if self._names.selects(path)]
        if refused:
            msg = (
                f"{self._what} was saved by {words.count(saved_by, 'rank')}, this job has "
                f"{self._world_size}: what each rank has of its own (PerRank: "
                f"{', '.join(refused[:5])}) cannot be given to other ranks. Say what each "
                "is to get (PerRank's resize), or restore with the same number of ranks, "
                "or without tracking these."
            )
            raise MismatchError(msg)
        if any(callable(resize) for resize in nodes.resize.values()):
            return range(saved_by)
        return [self._rank] if self._rank < saved_by else []

    @property
    def _is_resized(self) -> bool:
        """Whether another number of ranks has saved."""
        return self._world_size != self.manifest.world_size

    def _plan_own(self, node: Node, resize: Resize) -> None:
        """Plan what is this rank's own; see ``PerRank``."""
        if self._is_resized and callable(resize):
            function: Callable[[list[Any], int, int], Any] = resize
            rank, world_size = self._rank, self._world_size
            plans = [*self._own_plans.values()]
            node.plan_resized(plans, lambda saved: function(saved, rank, world_size))
        elif self._rank in self._own_plans:
            node.plan(self._own_plans[self._rank])

    def _saved_by(self, rank: int) -> Saved:
        """Return what a rank has of its own in the checkpoint."""
        reader = self._reader(rank)
        rows = {
            e.name: Row(e.name, e.dtype, e.global_shape, WHOLE)
            for e in reader.header.entries.per_rank.values()
        }
        values = reader.header.per_rank_values
        return Saved(
            rows, values, self._names, knows_ties=False, knows_kinds=self._knows_kinds
        )

    def _reader(self, rank: int) -> ShardReader:
        reader = self._readers.get(rank)
        if reader is None:
            with _blamed_on(rank):
                reader = open_shard(self._directory, self.manifest, rank)
            self._readers[rank] = self._stack.enter_context(reader)
        return reader

    def read(self) -> None:
        """Fill every tensor, verifying each block; live tensors change from here on.

        Raises:
            ChecksumError, ShardFileError: Bytes are not those that were written;
                ``shard_rank`` says in whose file.
            StorageError: They cannot be read.
        """
        assert self._reads is not None
        self._read_own()
        # First what goes to its place in one run, in file order; then tensors that are
        # filled by way of a copy, or from parts of entries.
        pieced: dict[str, list[tuple[int, Stored]]] = {}
        with self._memory_kept():
            for rank in self._reads.sources:
                placed = self._placed(self._reads, rank)
                with _blamed_on(rank):
                    self._readers[rank].read_batches(placed.batches)
                    self._read_to_device(self._readers[rank], placed.on_device)
                for stored, source in placed.pieces:
                    pieced.setdefault(source.name, []).append((rank, stored))
            for ring in self._rings.values():
                ring.wait()
        for name, sources in pieced.items():
            self._fill(self._shared.reads[name], sources)

    @contextmanager
    def _memory_kept(self) -> Iterator[None]:
        """Keep the memory that is filled, whatever happens to the tensors that have it.

        A read that hangs is left behind, and may fill it when it comes back.
        """
        kept = [
            known.memory_of(tensor).untyped_storage()
            for known, tensor in zip(
                self._wants.known.values(), self._shared.reads.values(), strict=True
            )
        ]
        yield
        del kept

    def _placed(self, reads: ReadPlan, rank: int) -> _Placed:
        """Tell where what comes from one file goes."""
        reader = self._readers[rank]
        located = reads.located(rank, reader.header.entries)
        placed = self._remembered.placed.get(rank)
        if (
            placed is None
            or placed.located is not located
            or placed.wants is not self._wants
        ):
            placed = _Placed(located, self._wants, [], [], [])
            parts = self._parts(placed)
            placed.batches.extend(batches_of(parts, reader.header.block_bytes))
            self._remembered.placed[rank] = placed
        return placed

    def _parts(self, placed: _Placed) -> Iterator[Part]:
        """Walk what goes to its place on the host in one run; put aside all else."""
        for one in placed.located:
            stored, (_, name, start) = one
            target = self._wants.known[name]
            is_converted = stored.dtype != target.dtype
            if start is None or not target.is_row_major or is_converted:
                placed.pieces.append(one)
            elif not target.address:
                placed.on_device.append(one)
            else:
                yield Part(stored, window(target.address + start, stored.size_bytes))

    def _read_to_device(self, reader: ShardReader, located: Iterable[Located]) -> None:
        by_device: dict[torch.device, list[tuple[Stored, torch.Tensor]]] = {}
        for stored, (_, name, start) in located:
            assert start is not None, name
            memory = self._wants.known[name].memory_of(self._shared.reads[name])
            target = tensors.flat_bytes(memory)[start : start + stored.size_bytes]
            by_device.setdefault(memory.device, []).append((stored, target))
        for device, entries in by_device.items():
            if device not in self._rings:
                self._rings[device] = Ring(device)
            self._rings[device].read(reader, entries)

    def read_parcel(self, parcel: Parcel, buffer: memoryview) -> None:
        """Read what this rank sends to all, verifying each block.

        Args:
            parcel: What; this rank reads it.
            buffer: Filled whole. Undefined after an error.

        Raises:
            ChecksumError, ShardFileError, StorageError: See ``read``.
        """
        reader = self._readers[parcel.file_rank]
        by_box = reader.header.entries.by_box
        entries = []
        with _blamed_on(parcel.file_rank):
            for unit in parcel.units:
                stored = by_box[unit.source.entry]
                part = buffer[unit.at : unit.at + unit.size_bytes]
                if unit.size_bytes == stored.size_bytes:
                    entries.append(Part(stored, part))
                else:
                    reader.read_into(stored, unit.offset, part)
            entries.sort(key=lambda entry: entry.stored.start)
            reader.read_entries(entries)

    def target(self, name: str) -> tuple[torch.Tensor, KnownTensor]:
        """Return a tensor to be filled that is not this rank's own, and what it is."""
        return self._shared.reads[name], self._wants.known[name]

    def _read_own(self) -> None:
        """Fill the tensors that are this rank's own."""
        for rank, plan in self._own_plans.items():
            if plan.reads:
                self._read_own_of(rank, plan)

    def _read_own_of(self, rank: int, plan: RestorePlan) -> None:
        reader = self._reader(rank)
        parts, owners = [], []
        for name, tensor in plan.reads.items():
            known = self._remembered.known.describe(name, tensor)
            stored = reader.header.entries.per_rank[name]
            if known.address and stored.size_bytes and stored.dtype == known.dtype:
                parts.append(Part(stored, window(known.address, stored.size_bytes)))
                # Kept until all is read, as in ``_memory_kept``.
                owners.append(known.memory_of(tensor).untyped_storage())
            else:
                self._fill(tensor, [(rank, stored)])
        parts.sort(key=lambda part: part.stored.start)
        with _blamed_on(rank):
            reader.read_entries(parts)

    def _fill(self, tensor: torch.Tensor, sources: list[tuple[int, Stored]]) -> None:
        """Fill a tensor by way of a copy, or from parts of entries."""
        target = tensors.held(tensor).box
        if target is None or target.size == 0:
            return
        with tensors.writable_bytes(tensor) as buffer:
            for rank, stored in sources:
                region = overlap(stored.box, target)
                if region is None:
                    continue
                runs = contiguous_runs(region, stored.box, target)
                with _blamed_on(rank):
                    if stored.dtype == tensors.dtype_name(tensor.dtype):
                        self._readers[rank].read_runs(stored, runs, buffer)
                    else:
                        self._convert_runs(rank, stored, runs, buffer, tensor.dtype)

    def _convert_runs(
        self,
        rank: int,
        stored: Stored,
        runs: Iterable[tuple[int, int, int]],
        buffer: memoryview,
        dtype: torch.dtype,
    ) -> None:
        """Read runs block by block, and convert each to the dtype of the tensor."""
        reader = self._readers[rank]
        saved = dtype_of_name(stored.dtype)
        item = item_size_bytes(stored.dtype)
        block = max(reader.header.block_bytes // item, 1)
        for source, target, length in runs:
            done = 0
            while done < length:
                first = source + done
                count = min(block - first % block, length - done)
                data = bytearray(count * item)
                reader.read_runs(stored, [(first, 0, count)], memoryview(data))
                tensors.convert_into(buffer, dtype, target + done, data, saved)
                done += count

    def finish(self) -> None:
        """Set plain values and states; runs user code (``load_state_dict``)."""
        for plan in (self._shared, *self._own_plans.values()):
            for finish in plan.finishers:
                finish()

    def close(self) -> None:
        """Close the files."""
        self._stack.close()

    def __enter__(self) -> Loading:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def name_of(directory: AttemptDirectory, manifest: Manifest) -> str:
    """Name a checkpoint for messages."""
    return f"checkpoint {manifest.attempt.prefix} ({directory})"


@contextmanager
def _blamed_on(rank: int) -> Iterator[None]:
    """Note on a format error whose shard file it was found in."""
    try:
        yield
    except FormatError as error:
        error.shard_rank = rank
        raise
