"""Every file and directory name of a run directory: built and parsed here only.

A directory that is ever renamed or deleted carries epoch and attempt and is never used
twice, so that a writer of an older epoch can only ever touch what is its own.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

STATE_FILE = "checkpoint"
RECORDS_DIRECTORY = ".state"
LOCK_FILE = ".lock"
MANIFEST_FILE = "manifest.json"
REQUESTS_DIRECTORY = ".requests"
LEASES_DIRECTORY = ".leases"
EVENTS_DIRECTORY = ".events"

_NAME = r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,126}[A-Za-z0-9._])?"
# No leading zeros and no "-0": every name has exactly one spelling.
_NATURAL = r"(?:0|[1-9][0-9]{0,18})"
_ATTEMPT = re.compile(
    rf"(?P<name>{_NAME})-(?P<number>0|-?[1-9][0-9]{{0,18}})"
    rf"\.e(?P<epoch>{_NATURAL})-(?P<attempt>[0-9a-f]{{8}})"
)
_PREFIX = re.compile(rf"(?P<name>{_NAME})-(?P<number>0|-?[1-9][0-9]{{0,18}})")
_RECORD = re.compile(r"([0-9]{20})\.json")
_TEMPORARY = re.compile(rf"\.e(?P<epoch>{_NATURAL})-(?P<nonce>[0-9a-f]{{16}})\.tmp")
_PROBE = re.compile(
    rf"\.probe-e(?P<epoch>{_NATURAL})-(?P<nonce>[0-9a-f]{{16}})-[0-9]{{5,}}"
)
_REQUEST = re.compile(r"[0-9]{20}-[0-9a-f]{16}\.json")
_LEASE = re.compile(rf"({_ATTEMPT.pattern})\.[0-9a-f]{{16}}\.lease")
_EVENTS = re.compile(rf"e({_NATURAL})-([0-9a-f]{{8}})-([0-9]{{4}})\.jsonl")
_CHECKPOINT_NAME = re.compile(_NAME)


@dataclass(frozen=True, slots=True)
class Attempt:
    """One try at one save: the unit that is written, published and deleted.

    Attributes:
        name: The manager's ``checkpoint_name``.
        number: The number users see; it may be saved again, by another attempt.
        epoch: The claim under which this attempt was made.
        attempt: 8 random hexadecimal digits, so that no path is ever used twice.
    """

    name: str
    number: int
    epoch: int
    attempt: str

    @property
    def prefix(self) -> str:
        """The name that users see, for example ``ckpt-1000``."""
        return f"{self.name}-{self.number}"

    @property
    def published(self) -> str:
        """Directory name once all ranks have written: ``ckpt-1000.e3-77b0c2d1``."""
        return f"{self.prefix}.e{self.epoch}-{self.attempt}"

    @property
    def pending(self) -> str:
        """Directory name while ranks write into it."""
        return f".{self.published}.pending"

    @property
    def trash(self) -> str:
        """Directory name while it is being deleted."""
        return f".{self.published}.trash"


class EventsFile(NamedTuple):
    """A file of the history: of which claim, by whom, and its part; they sort by age."""

    epoch: int
    part: int
    nonce: str


def is_checkpoint_name(name: str) -> bool:
    """Tell whether a string can be a ``checkpoint_name``."""
    return _CHECKPOINT_NAME.fullmatch(name) is not None


# An entry of a record asks twice for its name: once to parse it, once to check it.
@lru_cache(maxsize=16)
def parse_published(name: str) -> Attempt | None:
    """Parse a published attempt's directory name; None for anything else."""
    match = _ATTEMPT.fullmatch(name)
    if match is None:
        return None
    return Attempt(
        match["name"], int(match["number"]), int(match["epoch"]), match["attempt"]
    )


def parse_pending(name: str) -> Attempt | None:
    """Parse a pending attempt's directory name; None for anything else."""
    return _parse_hidden(name, ".pending")


def parse_trash(name: str) -> Attempt | None:
    """Parse the directory name of an attempt being deleted; None for anything else."""
    return _parse_hidden(name, ".trash")


def _parse_hidden(name: str, suffix: str) -> Attempt | None:
    if not (name.startswith(".") and name.endswith(suffix)):
        return None
    return parse_published(name[1 : -len(suffix)])


def parse_prefix(name: str) -> tuple[str, int] | None:
    """Parse what users see, ``ckpt-1000``, into name and number."""
    match = _PREFIX.fullmatch(name)
    return None if match is None else (match["name"], int(match["number"]))


def record_file(number: int) -> str:
    """Name the file of one record."""
    return f"{number:020d}.json"


def parse_record_file(name: str) -> int | None:
    """Parse a record's file name into its number; None for anything else."""
    match = _RECORD.fullmatch(name)
    return None if match is None else int(match[1])


def shard_file(rank: int, world_size: int) -> str:
    """Name the one file that a rank writes in one save."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def temporary_file(epoch: int) -> str:
    """Name a new temporary file inside the records directory."""
    return f".e{epoch}-{random_hex(8)}.tmp"


def parse_temporary_file(name: str) -> int | None:
    """Parse a temporary file's name into its epoch; None for anything else."""
    match = _TEMPORARY.fullmatch(name)
    return None if match is None else int(match["epoch"])


def probe_file(epoch: int, nonce: str, rank: int) -> str:
    """Name the file by which a rank shows, at the claim, that it can write."""
    return f".probe-e{epoch}-{nonce}-{rank:05d}"


def parse_probe_file(name: str) -> int | None:
    """Parse a probe's name into its epoch; None for anything else."""
    match = _PROBE.fullmatch(name)
    return None if match is None else int(match["epoch"])


def request_file(time_ns: int) -> str:
    """Name the file by which another process asks for something, sorted by time."""
    return f"{time_ns:020d}-{random_hex(8)}.json"


def is_request_file(name: str) -> bool:
    """Tell whether a file's name is that of a request."""
    return _REQUEST.fullmatch(name) is not None


def lease_file(attempt: Attempt) -> str:
    """Name the file by which a reader keeps an attempt from being deleted."""
    return f"{attempt.published}.{random_hex(8)}.lease"


def parse_lease_file(name: str) -> Attempt | None:
    """Parse a lease's file name into what it keeps; None for anything else."""
    match = _LEASE.fullmatch(name)
    return None if match is None else parse_published(match[1])


def events_file(epoch: int, nonce: str, part: int) -> str:
    """Name a file of the chief's history."""
    return f"e{epoch}-{nonce}-{part:04d}.jsonl"


def parse_events_file(name: str) -> EventsFile | None:
    """Parse such a name; None for anything else."""
    match = _EVENTS.fullmatch(name)
    return None if match is None else EventsFile(int(match[1]), int(match[3]), match[2])


def partial(name: str) -> str:
    """Name what is made for others, beside its real name, until it is whole."""
    return f".{name}.{random_hex(8)}.partial"


def random_hex(size_bytes: int) -> str:
    """Draw random hexadecimal digits from the operating system."""
    return os.urandom(size_bytes).hex()
