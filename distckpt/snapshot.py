"""A copy of all that one save writes on this rank, laid out as its shard file."""

from __future__ import annotations

import ctypes
from collections.abc import Collection, Iterable
from typing import NamedTuple

import torch

from distckpt import shard_file, tensors
from distckpt.arena import Arena
from distckpt.errors import SaveFailed
from distckpt.own_file import Move
from distckpt.shard_file import Written
from distckpt.shard_header import Draft, Outline


class _Later(NamedTuple):
    """A move that was left for later.

    Attributes:
        move: It.
        memory: The plain tensor that it is of.
        version: How often that had been changed by then.
        owner: Keeps the memory, should the tensor be given another one.
    """

    move: Move
    memory: torch.Tensor
    version: int
    owner: torch.UntypedStorage


class Snapshot:
    """The image of a shard file in an arena, to be filled and then written.

    Making one copies all but what may be copied later: with ``copy_rest``, from any
    thread, and before anybody changes it.

    Args:
        arena: Where; nobody else uses it meanwhile.
        moves: What to copy.
        draft: The file's header.
        outline: What the file holds.
        later: Ids of the tensors that may be copied later.
    """

    def __init__(
        self,
        arena: Arena,
        moves: Iterable[Move],
        draft: Draft,
        outline: Outline,
        later: Collection[int] = (),
    ) -> None:
        self._image = arena.bytes[: shard_file.image_bytes(draft, outline)]
        self._draft = draft
        self._outline = outline
        self._rest: list[_Later] = []
        self._events: list[torch.cuda.Event] = []
        self._beside: torch.cuda.Event | None = None
        on_device, is_any_on_device = [], False
        for move in moves:
            known = move.leaf.known
            may_wait = id(move.leaf.tensor) in later
            if may_wait and known.device == "cuda":
                on_device.append(move)
            elif may_wait and known.address and move.start is not None:
                memory = known.memory_of(move.leaf.tensor)
                later_on = _Later(move, memory, memory._version, memory.untyped_storage())
                self._rest.append(later_on)
            else:
                # From a device: in the caller's stream, so before whatever comes next.
                self._copy(move)
                is_any_on_device |= known.device == "cuda"
        if is_any_on_device:
            self._events.append(_recorded(torch.cuda.current_stream()))
        if on_device:
            self._beside = self._copy_beside(on_device)
            self._events.append(self._beside)
        if not later:
            self.copy_rest()

    def copy_rest(self) -> None:
        """Copy what was left for later; after return all of it is there.

        Raises:
            SaveFailed: A tensor was changed meanwhile: the copy is good for nothing.
        """
        for later in self._rest:
            self._copy(later.move)
        changed = [later for later in self._rest if later.memory._version != later.version]
        self._rest = []
        for event in self._events:
            event.synchronize()
        if changed:
            names = [later.move.name for later in changed[:5]]
            msg = (
                f"{len(changed)} tensors ({', '.join(names)}, ...) were changed before "
                "they were copied, and not by the step of an optimizer. Call "
                'wait_staged() before whatever changes them, or use staging="eager".'
            )
            raise SaveFailed(msg)

    def hold_stream(self) -> None:
        """Keep what the caller puts into its stream of a device behind the copies."""
        if self._beside is not None:
            torch.cuda.current_stream().wait_event(self._beside)

    def write(self, path: str) -> Written:
        """Write the file; see ``shard_file.write_image``."""
        image = self._image.numpy().data
        return shard_file.write_image(path, image, self._draft, self._outline)

    def _copy(self, move: Move) -> None:
        known, start = move.leaf.known, move.start
        position = self._draft.size_bytes + move.position
        if known.address and start is not None:
            # One call for each: no copy of torch's is as fast, and it lets other threads
            # of the interpreter run.
            target = self._image.data_ptr() + position
            ctypes.memmove(target, known.address + start, move.size_bytes)
            return
        target_bytes = self._image[position : position + move.size_bytes]
        tensors.copy_box(move.leaf.tensor, move.box, target_bytes)

    def _copy_beside(self, moves: Iterable[Move]) -> torch.cuda.Event:
        """Copy from the device on a stream of its own, behind what its tensors wait for."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for move in moves:
                self._copy(move)
        return _recorded(stream)


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(stream)
    return event
