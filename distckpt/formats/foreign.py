"""What all ways in and out of other programs' files share: tensors that stream."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol, TypeAlias

import xxhash

from distckpt.errors import ChecksumError

SAFETENSORS = "safetensors"
HUGGINGFACE = "huggingface"
TORCH = "torch"
DCP = "dcp"
EXPORTED = (SAFETENSORS, HUGGINGFACE, TORCH, DCP)
IMPORTED = (SAFETENSORS, TORCH, DCP)

# What is held of one tensor at a time, unless a format forces all of it.
PIECE_BYTES = 8 * 2**20

# Told how many bytes were written, or read again.
Advance: TypeAlias = Callable[[int], None]


class Tensor(Protocol):
    """A tensor in a file."""

    @property
    def dtype(self) -> str:
        """The element type, by torch's name."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""

    def stream(self, piece_bytes: int) -> Iterator[memoryview]:
        """Read its bytes, row-major, in pieces that are valid until the next.

        All pieces but the last are ``piece_bytes`` long.
        """


@dataclass(frozen=True, slots=True)
class Facts:
    """What a tensor that was written must be when it is read again."""

    dtype: str
    shape: tuple[int, ...]
    digest: bytes

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}, digest {self.digest.hex()}"


class Watched:
    """A tensor whose bytes are counted, and remembered by a digest, as they go by.

    Args:
        tensor: The tensor.
        advance: Told how many bytes went by.
        hasher: That of a larger one, of which this is the next part.
    """

    def __init__(self, tensor: Tensor, advance: Advance, hasher: Any = None) -> None:
        self.dtype = tensor.dtype
        self.shape = tuple(tensor.shape)
        self.size_bytes = tensor.size_bytes
        self._tensor = tensor
        self._advance = advance
        self._hasher = hasher or xxhash.xxh3_128()
        self._size_seen = 0

    def stream(self, piece_bytes: int) -> Iterator[memoryview]:
        """Read the tensor's bytes; see ``Tensor``."""
        for piece in self._tensor.stream(piece_bytes):
            self._hasher.update(piece)
            self._size_seen += len(piece)
            yield piece
            self._advance(len(piece))

    def facts(self) -> Facts:
        """Return what it is; all of it has gone by."""
        assert self._size_seen == self.size_bytes, "not streamed to its end, or twice"
        return Facts(self.dtype, self.shape, self._hasher.digest())


def facts_of(tensor: Tensor, advance: Advance) -> Facts:
    """Read all of a tensor and return what it is."""
    watched = Watched(tensor, advance)
    for _ in watched.stream(PIECE_BYTES):
        pass
    return watched.facts()


def compare(
    what: str, found: Mapping[str, Tensor], expected: Mapping[str, Facts], advance: Advance
) -> None:
    """Read all tensors that were written, and hold them against what they must be.

    Args:
        what: What was written, for messages.
        found: What a reader finds there, by name.
        expected: What was written, by name.
        advance: Told how many bytes were read.

    Raises:
        ChecksumError: Names the first tensor that is not what was written.
        FormatError, StorageError: It cannot be read.
    """
    if found.keys() != expected.keys():
        wrong = sorted(found.keys() ^ expected.keys())[:5]
        msg = f"{what}: other tensors than were written: {wrong}, ..."
        raise ChecksumError(msg)
    for name, facts in expected.items():
        again = facts_of(found[name], advance)
        if again != facts:
            msg = (
                f"{what}: tensor {name!r} reads as {again}, expected {facts}. The disk has "
                "not kept what was written."
            )
            raise ChecksumError(msg)


def joined(
    streams: Iterable[Iterable[memoryview]], piece_bytes: int
) -> Iterator[memoryview]:
    """Lay streams end to end and cut them into pieces of one length; see ``Tensor``."""
    buffer = memoryview(bytearray(piece_bytes))
    filled = 0
    for piece in chain.from_iterable(streams):
        at = 0
        while at < len(piece):
            size = min(len(piece) - at, piece_bytes - filled)
            buffer[filled : filled + size] = piece[at : at + size]
            filled, at = filled + size, at + size
            if filled == piece_bytes:
                yield buffer
                filled = 0
    if filled:
        yield buffer[:filled]
