"""A copy of all that one save writes on this rank, laid out as its shard file."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from itertools import compress
from operator import attrgetter
from typing import NamedTuple

import torch
import xxhash

from distckpt import shard_file, tensors, words
from distckpt.arena import Arena
from distckpt.errors import SaveFailed
from distckpt.known import window
from distckpt.leaves import Leaf
from distckpt.own_file import Move, Moves
from distckpt.run_directory import Buffer, NewShard
from distckpt.shard_file import Written
from distckpt.shard_header import Draft, Outline

# Entries of up to so many bytes are gathered before they are copied: for each of them, a
# call of its own would take longer than the copy.
_SMALL_BYTES = 16 * 2**10
_GATHERED_BYTES = 2**20
# Of each end of an entry: enough to see whatever changes all of a tensor.
_SAMPLED_BYTES = 4096
_MAX_NAMED = 5
_version_of = attrgetter("_version")


class _Watch:
    """Tensors that are copied later, and how often each had been changed by then.

    Args:
        leaves: They, by name.
    """

    def __init__(self, leaves: Mapping[str, Leaf]) -> None:
        self._names = [*leaves]
        # Sharded tensors, and the plain ones that they are made of: changes of either
        # count at that one alone.
        self._tensors = [leaf.tensor for leaf in leaves.values()]
        self._memories = [leaf.known.memory_of(leaf.tensor) for leaf in leaves.values()]
        self._versions = self._versions_now()
        # Keeps the memory, should a tensor be given another one.
        self._owners = [*map(torch.Tensor.untyped_storage, self._memories)]

    def changed(self) -> list[str]:
        """Return the names of those changed since; told only when the change is through."""
        if self._versions_now() == self._versions:
            return []
        pairs = zip(*self._versions_now(), *self._versions, strict=True)
        are_changed = [now != then or own != own_then for now, own, then, own_then in pairs]
        return [*compress(self._names, are_changed)]

    def _versions_now(self) -> tuple[list[int], list[int]]:
        return [*map(_version_of, self._tensors)], [*map(_version_of, self._memories)]


class _Sample(NamedTuple):
    """Some bytes of an entry that is copied later.

    Attributes:
        name: Of its tensor.
        position: Where they go, in bytes from the start of the file's data.
        size_bytes: How many.
        digest: Of what they were when the save began.
    """

    name: str
    position: int
    size_bytes: int
    digest: bytes


def samples_of(moves: Iterable[Move]) -> Iterator[_Sample]:
    """Take samples on the host: the beginning and the end of each entry."""
    for move in moves:
        assert move.memory is not None, move
        address = ctypes.addressof(move.memory)
        for start, size in _ends(move.size_bytes):
            digest = xxhash.xxh3_64_digest(window(address + start, size))
            yield _Sample(move.name, move.position + start, size, digest)


def _ends(size_bytes: int) -> list[tuple[int, int]]:
    """Return offset and length of what is sampled of so many bytes."""
    if size_bytes <= 2 * _SAMPLED_BYTES:
        return [(0, size_bytes)]
    return [(0, _SAMPLED_BYTES), (size_bytes - _SAMPLED_BYTES, _SAMPLED_BYTES)]


class DeviceSamples:
    """The same of entries on one device: put together there, compared on the host.

    Making one only puts work into the device's current stream.

    Args:
        moves: The entries.
    """

    def __init__(self, moves: Iterable[Move]) -> None:
        self._places: list[tuple[str, int, int]] = []
        parts = []
        for move in moves:
            region = tensors.flat_region(move.leaf.tensor, move.box)
            if region is None:
                continue
            for start, size in _ends(move.size_bytes):
                parts.append(region[start : start + size])
                self._places.append((move.name, move.position + start, size))
        self._bytes = torch.cat(parts) if parts else None

    def taken(self) -> Iterator[_Sample]:
        """Return the samples, once the device has made them."""
        if self._bytes is None:
            return
        data = self._bytes.cpu().numpy().data
        offset = 0
        for name, position, size in self._places:
            digest = xxhash.xxh3_64_digest(data[offset : offset + size])
            yield _Sample(name, position, size, digest)
            offset += size


class Snapshot:
    """The image of a shard file in an arena, to be filled and then written.

    Making one copies all but what may be copied later: with ``copy_rest``, from any
    thread, and before anybody changes it.

    Args:
        arena: Where; nobody else uses it meanwhile.
        moves: What to copy.
        draft: The file's header.
        outline: What the file holds.

    Attributes:
        size_bytes: Of the image.
        is_waiting: Whether anything was left to be copied later.
    """

    def __init__(self, arena: Arena, moves: Moves, draft: Draft, outline: Outline) -> None:
        self.size_bytes = shard_file.image_bytes(draft, outline)
        self.is_waiting = bool(moves.waiting)
        self._image = arena.bytes[: self.size_bytes]
        self._draft = draft
        self._outline = outline
        # Walked once: when all is copied, it keeps no tensor alive any more.
        self._rest = moves.later(from_device=False)
        self._changed: list[str] | None = None
        self._events: list[torch.cuda.Event] = []
        self._beside: dict[torch.device, torch.cuda.Event] = {}
        self._watch: _Watch | None = _Watch(moves.waiting)
        for device in self._copy(moves.now()):
            # In the caller's stream, so before whatever comes next. Each device has its
            # own: an event in the stream of another one would not wait for these copies.
            self._events.append(_recorded(torch.cuda.current_stream(device)))
        self._samples = [*samples_of(moves.later(from_device=False))]
        self._device_samples: list[DeviceSamples] = []
        leaves = moves.waiting.values()
        devices = {leaf.tensor.device for leaf in leaves if leaf.known.device == "cuda"}
        if devices:
            on_devices = [*moves.later(from_device=True)]
            for device in devices:
                own = [move for move in on_devices if move.leaf.tensor.device == device]
                self._device_samples.append(DeviceSamples(own))
            self._beside = self._copy_beside(devices, moves.later(from_device=True))
            self._events += self._beside.values()
        if not moves.waiting:
            self.copy_rest()

    def copy_rest(self) -> None:
        """Copy what was left for later; after return all of it is there.

        Raises:
            SaveFailed: A tensor was changed meanwhile: the copy is good for nothing.
        """
        self._copy(self._rest)
        for event in self._events:
            event.synchronize()
        self.check_unchanged()
        self._check_samples()

    def _check_samples(self) -> None:
        """Hold samples of what was copied against what it was when the save began.

        torch does not count writes through ``p.data``, a numpy view, or the replay of a
        CUDA graph.

        Raises:
            SaveFailed: See ``copy_rest``.
        """
        samples = [*self._samples]
        for on_device in self._device_samples:
            samples += on_device.taken()
        self._samples, self._device_samples = [], []
        start = self._image.data_ptr() + self._draft.size_bytes
        changed = dict.fromkeys(
            sample.name
            for sample in samples
            if xxhash.xxh3_64_digest(window(start + sample.position, sample.size_bytes))
            != sample.digest
        )
        if changed:
            raise _changed_too_soon([*changed])

    def let_go(self) -> None:
        """Let everything be changed, from now on: all is copied.

        Called by: the thread that changes things, so that no change is under way.
        """
        if self._changed is None:
            self._changed = self._find_changed()
            self._watch = None

    def check_unchanged(self) -> None:
        """Look once more for changes that came before everything was let go.

        A tensor counts a change when it is through: one that had begun while the tensor
        was copied shows only later.

        Raises:
            SaveFailed: See ``copy_rest``.
        """
        found = self._find_changed()
        # By now it may be let go, and changed by right.
        changed = found if self._changed is None else self._changed
        if changed:
            raise _changed_too_soon(changed)

    def _find_changed(self) -> list[str]:
        watch = self._watch  # another thread may let go just now
        return [] if watch is None else watch.changed()

    def hold_stream(self) -> None:
        """Have what the caller puts into its streams later wait for the copies."""
        for device, copied in self._beside.items():
            torch.cuda.current_stream(device).wait_event(copied)

    def write(self, target: NewShard) -> Written:
        """Write the file; see ``shard_file.write_image``."""
        image = self._image.numpy().data
        return shard_file.write_image(target, image, self._draft, self._outline)

    def _copy(self, moves: Iterable[Move]) -> set[torch.device]:
        """Copy entries; from a device, they are only put into its current stream.

        Returns:
            The devices that entries come from.
        """
        together = _Together(self._image.data_ptr() + self._draft.size_bytes)
        devices = set()
        for move in moves:
            if move.memory is not None:
                together.add(move)
            else:
                start = self._draft.size_bytes + move.position
                target = self._image[start : start + move.size_bytes]
                tensors.copy_box(move.leaf.tensor, move.box, target)
                if move.is_from_device:
                    devices.add(move.leaf.tensor.device)
        together.flush()
        return devices

    def _copy_beside(
        self, devices: Iterable[torch.device], moves: Iterable[Move]
    ) -> dict[torch.device, torch.cuda.Event]:
        """Copy from devices on new streams, after what their tensors wait for."""
        streams = {}
        with ExitStack() as stack:
            for device in devices:
                stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
                stream.wait_stream(torch.cuda.current_stream(device))
                stack.enter_context(torch.cuda.stream(stream))
                streams[device] = stream
            self._copy(moves)
        return {device: _recorded(stream) for device, stream in streams.items()}


def _changed_too_soon(names: Sequence[str]) -> SaveFailed:
    more = ", ..." if len(names) > _MAX_NAMED else ""
    return SaveFailed(
        f"{words.count(len(names), 'tensor')} ({', '.join(names[:_MAX_NAMED])}{more}) "
        "changed before being copied, and not by the step of an optimizer. Call "
        'wait_staged() before whatever changes them, or use staging="eager".'
    )


class _Together:
    """Copies memory of the host, small neighbours by one call.

    Args:
        start: Address of the file's data in the snapshot.
    """

    def __init__(self, start: int) -> None:
        self._start = start
        self._gathered: list[Buffer] = []
        self._position = self._end = 0

    def add(self, move: Move) -> None:
        """Copy this, too, at the latest with ``flush``."""
        assert move.memory is not None, move
        if move.size_bytes > _SMALL_BYTES:
            # No copy of torch's is as fast as this, and it lets other threads run.
            ctypes.memmove(self._start + move.position, move.memory, move.size_bytes)
            return
        if move.position != self._end or self._end - self._position > _GATHERED_BYTES:
            self.flush()
            self._position = move.position
        self._gathered.append(move.memory)
        self._end = move.position + move.size_bytes

    def flush(self) -> None:
        """Copy what is still to be copied."""
        data = b"".join(self._gathered)
        ctypes.memmove(self._start + self._position, data, len(data))
        self._gathered.clear()


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
