"""What all ranks have use for is read once: each rank reads a part, and all get it.

That is what all of them want whole, and tensors that are cut otherwise than when they were
saved, so that nearly every block of a file has something for every rank.

A thread reads ahead and verifies each block; meanwhile the caller's thread sends and
receives. A rank that cannot read its part sends on, whatever it has, so that nobody waits
for it: the vote that follows makes nothing of it. That vote also compares what all ranks
have got, as verified bytes can still be changed on their way.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from queue import Empty, SimpleQueue

import torch
import xxhash

from distckpt import tensors
from distckpt.boxes import contiguous_runs, overlap
from distckpt.comm import SHIPMENTS_UNDER_WAY, Shipment
from distckpt.dtypes import item_size_bytes
from distckpt.errors import ManagerBroken, StorageError
from distckpt.exchange_plan import ExchangePlan, Parcel, Unit
from distckpt.known import KnownTensor
from distckpt.loading import Loading
from distckpt.messages import Phase
from distckpt.session import Session, on_the_same_device

_POLL_SECONDS = 0.02
# Parcels that lie ready while others are under way.
_READ_AHEAD = 2
# How long to wait for the thread that reads when nobody wants it any more.
_LEAVE_SECONDS = 0.3


class Exchange:
    """One exchange on one rank.

    Making one allocates all that it needs on the host but for what strided tensors do, so
    that it fails before others wait for it.

    Args:
        session: The manager's, on this rank.
        loading: What is read; planned, and with its files open.
        plan: Who reads what of it.

    Attributes:
        digest: Of all bytes that were sent, in 16 bytes: equal on all ranks if all have
            got what was sent.
    """

    def __init__(self, session: Session, loading: Loading, plan: ExchangePlan) -> None:
        self._session = session
        self._loading = loading
        self._plan = plan
        self._parcels = plan.parcels
        self._places: dict[str, _Place] = {}
        self._making_places = threading.Lock()
        num_own = sum(parcel.reader == session.rank for parcel in plan.parcels)
        own = min(num_own, SHIPMENTS_UNDER_WAY + _READ_AHEAD)
        others = min(len(plan.parcels) - num_own, SHIPMENTS_UNDER_WAY)
        self._own_buffers = _Buffers(own, plan.parcel_bytes)
        self._buffers = _Buffers(others, plan.parcel_bytes)
        self._nothing = torch.zeros(plan.parcel_bytes if num_own else 0, dtype=torch.uint8)
        # Of this rank's parcels, in their order; None once there are no more.
        self._ready: SimpleQueue[torch.Tensor | None] = SimpleQueue()
        self._error: BaseException | None = None
        self._unwanted = threading.Event()
        self._hash = xxhash.xxh3_128()
        self.digest = bytes(16)

    def run(self, what: str) -> None:
        """Exchange everything, and read what this rank wants for itself: collective.

        Args:
            what: For errors on other ranks: what this one is doing.

        Raises:
            ManagerBroken: Another rank is gone.
            DistckptError: This rank could not read, or not place, something; all others
                have got what it sent instead.
        """
        read_ahead = on_the_same_device(partial(self._read_ahead, what))
        thread = threading.Thread(target=read_ahead, name="distckpt-reading", daemon=True)
        try:
            try:
                thread.start()
            except RuntimeError as error:  # no thread to be had
                self._fail(error)
            self._session.decisions.exchange(Phase.READ, self._shipments())
            while thread.is_alive():
                thread.join(_POLL_SECONDS)
        except BaseException:
            self._unwanted.set()
            if thread.is_alive():
                thread.join(_LEAVE_SECONDS)
            raise
        if self._error is not None:
            raise self._error
        self.digest = self._hash.digest()

    def _read_ahead(self, what: str) -> None:
        """Read on a thread, watched by this one, which the caller's has no time for."""
        try:
            self._session.on_disk(
                self._session.decisions, what, self._read, fills_tensors=True
            )
        except BaseException as error:
            self._fail(error)

    def _read(self) -> None:
        for parcel in self._parcels:
            if parcel.reader == self._session.rank:
                memory = self._in_place(parcel)
                if memory is None:
                    memory = self._own_buffers.take(parcel.size_bytes, self._check_wanted)
                self._check_wanted()
                self._loading.read_parcel(parcel, memory.numpy().data)
                self._ready.put(memory)
        self._loading.read()

    def _check_wanted(self) -> None:
        if self._unwanted.is_set():
            msg = "reading: not done, nobody waits for it any more."
            raise StorageError(msg)

    def _fail(self, error: BaseException) -> None:
        # The first one says most; but that a rank is gone goes before all.
        if self._error is None or isinstance(error, ManagerBroken):
            self._error = error
        self._unwanted.set()
        self._ready.put(None)

    def _shipments(self) -> Iterator[Shipment]:
        for parcel in self._parcels:
            memory = None
            if parcel.reader == self._session.rank:
                memory = self._next_ready()
                if memory is None:
                    nothing = self._nothing[: parcel.size_bytes]
                    yield Shipment(parcel.reader, nothing, _do_nothing)
                    continue
                buffers = self._own_buffers
            else:
                memory = self._try(partial(self._in_place, parcel))
                buffers = self._buffers
                if memory is None:
                    memory = buffers.take(parcel.size_bytes, self._session.check_alive)
            arrived = partial(self._arrived, parcel, memory, buffers)
            yield Shipment(parcel.reader, memory, arrived)

    def _next_ready(self) -> torch.Tensor | None:
        while True:
            try:
                memory = self._ready.get(timeout=_POLL_SECONDS)
            except Empty:
                self._session.check_alive()
                continue
            if memory is None:
                self._ready.put(None)  # and so for the next one
            return memory

    def _arrived(self, parcel: Parcel, memory: torch.Tensor, buffers: _Buffers) -> None:
        self._hash.update(memory.numpy().data)
        if buffers.has(memory):
            self._try(partial(self._put, parcel, memory))
            buffers.give_back(memory)

    def _put(self, parcel: Parcel, memory: torch.Tensor) -> None:
        """Copy what has arrived in a buffer to where it goes."""
        if self._error is not None:
            return
        address = memory.data_ptr()
        for unit in parcel.units:
            start = unit.source.start
            known = self._loading.target(unit.source.name)[1]
            if start is not None and known.address and known.is_whole:
                # There may be tens of thousands of these.
                target = known.address + start + unit.offset
                ctypes.memmove(target, address + unit.at, unit.size_bytes)
            else:
                part = memory[unit.at : unit.at + unit.size_bytes]
                self._place(unit).put(unit, part)

    def _try(self, body: Callable[[], torch.Tensor | None]) -> torch.Tensor | None:
        """Do what must not keep this rank from going on with the others."""
        try:
            return body()
        except Exception as error:
            self._fail(error)
            return None

    def _in_place(self, parcel: Parcel) -> torch.Tensor | None:
        """Return the memory that a parcel can be read into or arrive in; None: in none."""
        if len(parcel.units) > 1:
            return None
        return self._place(parcel.units[0]).window(parcel.units[0])

    def _place(self, unit: Unit) -> _Place:
        name = unit.source.name
        with self._making_places:
            place = self._places.get(name)
            if place is None:
                tensor, known = self._loading.target(name)
                place = _Place(tensor, known, name not in self._plan.pieced)
                self._places[name] = place
        return place


class _Place:
    """Where the bytes of one tensor go: its own memory, or a copy if they cannot.

    Args:
        tensor: To be filled, with what this rank holds of it.
        known: What it is.
        in_runs: Whether each unit goes there in one run, if this rank holds all of it.
    """

    def __init__(self, tensor: torch.Tensor, known: KnownTensor, in_runs: bool) -> None:
        assert known.box is not None, "not in its mesh"
        memory = known.memory_of(tensor).detach()
        self._tensor = tensor
        self._box = known.box
        self._is_whole = known.is_whole
        self._item_bytes = item_size_bytes(known.dtype)
        self._left_bytes = known.size_bytes
        self._lent: AbstractContextManager[memoryview] | None = None
        self._on_loan: memoryview | None = None
        # All of it on the host, if it can be had there without a copy.
        self._on_host: memoryview | None = None
        # The same as a tensor, wherever it is; only if a unit goes there in one run.
        self._flat: torch.Tensor | None = None
        is_plain = memory.is_contiguous() and not memory.is_conj() and not memory.is_neg()
        if is_plain and (known.address or (in_runs and self._is_whole)):
            self._flat = memory.reshape(-1).view(torch.uint8)
            if known.address:
                self._on_host = self._flat.numpy().data

    def window(self, unit: Unit) -> torch.Tensor | None:
        """Return the memory where a unit goes; None if it goes by way of a copy."""
        start = unit.source.start
        if self._on_host is None or self._flat is None or start is None:
            return None
        if not self._is_whole:
            return None
        return self._flat[start + unit.offset : start + unit.offset + unit.size_bytes]

    def put(self, unit: Unit, data: torch.Tensor) -> None:
        """Put what this rank holds of a unit where it goes."""
        if self._flat is not None and self._on_host is None:
            assert unit.source.start is not None, unit
            start = unit.source.start + unit.offset
            with torch.no_grad():
                self._flat[start : start + unit.size_bytes].copy_(data)
            return
        target = self._on_host or self._on_loan
        if target is None and self._left_bytes:
            self._lent = tensors.writable_bytes(self._tensor)
            target = self._on_loan = self._lent.__enter__()
        if target is not None:
            self._count(self._copy(unit, data.numpy().data, target))

    def _copy(self, unit: Unit, data: memoryview, target: memoryview) -> int:
        """Copy it; return how many bytes were copied."""
        if unit.source.start is not None and self._is_whole:
            start = unit.source.start + unit.offset
            target[start : start + unit.size_bytes] = data
            return unit.size_bytes
        box, item = unit.source.entry[1], self._item_bytes
        region = overlap(box, self._box)
        if region is None:
            return 0
        end, copied = unit.offset + unit.size_bytes, 0
        for source, index, length in contiguous_runs(region, box, self._box):
            # As much of the run as lies in the unit.
            first = max(source * item, unit.offset)
            last = min((source + length) * item, end)
            if first < last:
                start = index * item + first - source * item
                target[start : start + last - first] = data[
                    first - unit.offset : last - unit.offset
                ]
                copied += last - first
        return copied

    def _count(self, size_bytes: int) -> None:
        """Note that so many bytes are there; with the last ones, a copy goes over."""
        self._left_bytes -= size_bytes
        if self._left_bytes == 0 and self._lent is not None:
            self._lent.__exit__(None, None, None)
            self._lent = self._on_loan = None


class _Buffers:
    """Some buffers of one size, each taken and given back many times."""

    def __init__(self, count: int, size_bytes: int) -> None:
        self._free: SimpleQueue[torch.Tensor] = SimpleQueue()
        self._by_address: dict[int, torch.Tensor] = {}
        for _ in range(count):
            buffer = torch.empty(size_bytes, dtype=torch.uint8)
            self._by_address[buffer.data_ptr()] = buffer
            self._free.put(buffer)

    def take(self, size_bytes: int, check: Callable[[], None]) -> torch.Tensor:
        """Take the beginning of a buffer; ``check`` may end the waiting for one."""
        while True:
            try:
                return self._free.get(timeout=_POLL_SECONDS)[:size_bytes]
            except Empty:
                check()

    def has(self, memory: torch.Tensor) -> bool:
        """Tell whether it is of one of these."""
        return memory.data_ptr() in self._by_address

    def give_back(self, memory: torch.Tensor) -> None:
        """Give it back."""
        self._free.put(self._by_address[memory.data_ptr()])


def _do_nothing() -> None:
    """Note nothing of what was never read."""
