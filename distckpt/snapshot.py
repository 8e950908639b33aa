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


class _Watched(NamedTuple):
    """A tensor that is copied later, and how often it had been changed when that was said.

    Attributes:
        name: Its name.
        tensor: It.
        memory: The plain tensor that it is of; the same if it is not sharded. Changes of
            either count at that one alone.
        versions: How often both had been changed.
        owner: Keeps the memory, should the tensor be given another one.
    """

    name: str
    tensor: torch.Tensor
    memory: torch.Tensor
    versions: tuple[int, int]
    owner: torch.UntypedStorage

    @property
    def is_changed(self) -> bool:
        """Whether it has been changed since; told only when the change is through."""
        return (self.tensor._version, self.memory._version) != self.versions


def _watched(move: Move) -> _Watched:
    tensor = move.leaf.tensor
    memory = move.leaf.known.memory_of(tensor)
    versions = (tensor._version, memory._version)
    return _Watched(move.name, tensor, memory, versions, memory.untyped_storage())


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
        self._rest: list[Move] = []
        self._watched: list[_Watched] = []
        self._changed: list[str] | None = None
        self._events: list[torch.cuda.Event] = []
        self._beside: torch.cuda.Event | None = None
        on_device, is_any_on_device = [], False
        for move in moves:
            known = move.leaf.known
            may_wait = id(move.leaf.tensor) in later
            if may_wait and known.device == "cuda":
                on_device.append(move)
                self._watched.append(_watched(move))
            elif may_wait and known.address and move.start is not None:
                self._rest.append(move)
                self._watched.append(_watched(move))
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
        for move in self._rest:
            self._copy(move)
        self._rest = []
        for event in self._events:
            event.synchronize()
        self.check_unchanged()

    def let_go(self) -> None:
        """Let everything be changed, from now on: all is copied.

        Called by: the thread that changes things, so that no change is under way.
        """
        if self._changed is None:
            self._changed = self._find_changed()
            self._watched = []

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
            msg = (
                f"{len(changed)} tensors ({', '.join(changed[:5])}, ...) were changed "
                "before they were copied, and not by the step of an optimizer. Call "
                'wait_staged() before whatever changes them, or use staging="eager".'
            )
            raise SaveFailed(msg)

    def _find_changed(self) -> list[str]:
        return [watched.name for watched in self._watched if watched.is_changed]

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
