"""One record of the chain: the chief's whole memory, as a checked dataclass and JSON.

The encoding is canonical: one field a line, one entry a line, the checksum last. A
file is valid only if encoding what was decoded gives back the very same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from hashlib import blake2b
from typing import Any, NoReturn

from distckpt import paths, stamp, strict_json
from distckpt.collector import collector_paused
from distckpt.errors import CorruptStateError
from distckpt.stamp import Stamp

CLAIM = "claim"
COMMIT = "commit"
REPAIR = "repair"
PRUNE = "prune"

DIGEST_LENGTH = 32
# A hundred thousand checkpoints; what is larger takes too long to read.
MAX_SIZE_BYTES = 16 * 2**20
MAX_METRICS = 32
MAX_METRIC_NAME = 64
MAX_RULES = 64
_MAX_INT = 2**63 - 1


def digest(data: bytes) -> str:
    """Return the digest that links records, manifests and headers: 32 hex digits."""
    return blake2b(data, digest_size=DIGEST_LENGTH // 2).hexdigest()


def is_hex(value: Any, length: int) -> bool:
    """Tell whether a value is a string of so many lower-case hexadecimal digits."""
    return (
        isinstance(value, str)
        and len(value) == length
        and not value.strip("0123456789abcdef")
    )


_FIRST_FIELDS = ("path", "record", "time", "step", "manifest")
_ENTRY_FIELDS = frozenset((*_FIRST_FIELDS, "size", "metrics", "why", "pinned", "was_kept"))


@dataclass(frozen=True, slots=True)
class Entry:
    """One committed checkpoint, as a record lists it.

    Attributes:
        attempt: The published directory.
        record: Number of the record that committed it: the order of commits.
        time: TensorFlow's timestamp: ``time.time()`` of the chief after writing.
        step: The training step, if the manager has a step counter.
        manifest: Digest of the manifest's bytes.
        size_bytes: Size of its shard files.
        metrics: What was said of it, sorted by name; None for what is no finite number.
        why: Which of the record's rules keep it, by index.
        pinned: Whether a person keeps it, whatever the rules say.
        was_kept: Of one that is missing: whether it was in the list ``kept``, and not in
            ``live``, and goes back there.
        unknown: Fields of a newer version's notes, each with its JSON. They stay with the
            entry when a record copies it.
    """

    attempt: paths.Attempt
    record: int
    time: float
    step: int | None
    manifest: str
    size_bytes: int = 0
    metrics: tuple[tuple[str, float | None], ...] = ()
    why: tuple[int, ...] = ()
    pinned: bool = False
    was_kept: bool = False
    unknown: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        # A name that cannot be read back would make the whole chain unreadable.
        published = self.attempt.published
        _check(paths.parse_published(published) == self.attempt, "entry's path", published)
        _check(_is_count(self.record) and self.record > 0, "entry's record", self.record)
        _check(_is_finite(self.time), "entry's time", self.time)
        _check(self.step is None or _is_int(self.step), "entry's step", self.step)
        _check(_is_digest(self.manifest), "entry's manifest digest", self.manifest)
        _check(_is_count(self.size_bytes), "entry's size", self.size_bytes)
        names = [name for name, _ in self.metrics]
        _check(names == sorted({*names}), "names of metrics", names)
        _check(all(map(is_metric, self.metrics)), "entry's metrics", self.metrics)
        _check(len(names) <= MAX_METRICS, "number of metrics", len(names))
        _check(all(map(_is_count, self.why)), "entry's reasons", self.why)
        _check(type(self.pinned) is bool, "entry's pin", self.pinned)
        _check(type(self.was_kept) is bool, "entry's list", self.was_kept)

    def metric(self, name: str) -> float | None:
        """Return one metric; None if it is missing, or no finite number."""
        return dict(self.metrics).get(name)

    def kept_by(self, rules: Sequence[str]) -> list[str]:
        """Say in words what keeps it: a pin, and which of its record's rules."""
        return ["pinned"] * self.pinned + [rules[index] for index in self.why]

    def to_json(self) -> dict[str, Any]:
        """Encode to a JSON object, the published directory's name first."""
        tree: dict[str, Any] = {
            "path": self.attempt.published,
            "record": self.record,
            "time": self.time,
            "step": self.step,
            "manifest": self.manifest,
        }
        # What says nothing is left out: lists of thousands stay small.
        if self.size_bytes:
            tree["size"] = self.size_bytes
        if self.metrics:
            tree["metrics"] = dict(self.metrics)
        if self.why:
            tree["why"] = list(self.why)
        if self.pinned:
            tree["pinned"] = True
        if self.was_kept:
            tree["was_kept"] = True
        for name, text in self.unknown:
            tree[name] = strict_json.loads(text.encode())
        return tree

    @staticmethod
    def from_json(fields: Any, *, allow_unknown: bool = False) -> Entry:
        """Decode an entry.

        Args:
            fields: The JSON object.
            allow_unknown: Whether it may have fields that this version does not know.

        Raises:
            CorruptStateError: It is not an entry.
        """
        _check(isinstance(fields, dict), "entry", fields)
        unknown = [name for name in fields if name not in _ENTRY_FIELDS]
        _check(allow_unknown or not unknown, "entry", fields)
        _check(tuple(fields)[:5] == _FIRST_FIELDS, "entry", fields)
        path, record, time, step, manifest = map(fields.__getitem__, _FIRST_FIELDS)
        attempt = paths.parse_published(path) if isinstance(path, str) else None
        if attempt is None:
            _refuse("entry's path", path)
        metrics, why = fields.get("metrics", {}), fields.get("why", [])
        _check(isinstance(metrics, dict) and isinstance(why, list), "entry", fields)
        return Entry(
            attempt,
            record,
            time,
            step,
            manifest,
            size_bytes=fields.get("size", 0),
            metrics=tuple(metrics.items()),
            why=tuple(why),
            pinned=fields.get("pinned", False),
            was_kept=fields.get("was_kept", False),
            unknown=tuple((name, strict_json.dumps(fields[name])) for name in unknown),
        )


@dataclass(frozen=True, slots=True)
class Record:
    """What one append says, and all that the chief knows after it.

    Attributes:
        number: Position in the chain; the file is named by it.
        previous: Digest of the record before; "" for the first.
        chain: Random id of the run directory's chain, drawn by its first record.
            Manifests carry it: what another chain made is never deleted.
        epoch: The claim under which the record was written.
        writer: Random id of the manager that wrote it.
        run: Identity of the job (see ``identity.py``).
        restart: How often the launcher had restarted the job.
        action: ``"claim"``, ``"commit"`` or, by hand, ``"repair"`` or ``"prune"``.
        written: Wall time, for people.
        live: Managed checkpoints, oldest first.
        kept: Committed but unmanaged: preserved, or forgotten by TensorFlow's rule.
        bad: Failed to verify; they stay on disk.
        releasing: Dropped; their deletion is not confirmed yet.
        last_preserved: TensorFlow's ``last_preserved_timestamp``; None before the
            first commit.
        last_step: Training step of the last commit, for people.
        missing: Committed, and their directories are gone. Nothing counts them. One that
            is there again goes back to its list.
        rules: The rules that keep checkpoints, as they are written; of a number
            ``max_to_keep=3``. None if all are kept.
        stamp: The record's format, and the features of what it lists. Features stay: a
            record has those of the record before.
    """

    number: int
    previous: str
    chain: str
    epoch: int
    writer: str
    run: str
    restart: int
    action: str
    written: float
    live: tuple[Entry, ...] = ()
    kept: tuple[Entry, ...] = ()
    bad: tuple[Entry, ...] = ()
    releasing: tuple[Entry, ...] = ()
    last_preserved: float | None = None
    last_step: int | None = None
    rules: tuple[str, ...] = ()
    missing: tuple[Entry, ...] = ()
    stamp: Stamp = stamp.CURRENT

    def __post_init__(self) -> None:
        _check(_is_count(self.number) and self.number > 0, "number", self.number)
        _check(
            _is_digest(self.previous) if self.number > 1 else self.previous == "",
            "previous",
            self.previous,
        )
        _check(is_hex(self.chain, 16), "chain", self.chain)
        _check(_is_count(self.epoch) and self.epoch > 0, "epoch", self.epoch)
        _check(is_hex(self.writer, 16), "writer", self.writer)
        _check(isinstance(self.run, str) and len(self.run) <= 256, "run", self.run)
        _check(_is_count(self.restart), "restart", self.restart)
        _check(self.action in (CLAIM, COMMIT, REPAIR, PRUNE), "action", self.action)
        _check(_is_finite(self.written), "written", self.written)
        _check(
            self.last_preserved is None or _is_finite(self.last_preserved),
            "last_preserved",
            self.last_preserved,
        )
        _check(
            self.last_step is None or _is_int(self.last_step),
            "last_step",
            self.last_step,
        )
        _check(
            len(self.rules) <= MAX_RULES and all(type(rule) is str for rule in self.rules),
            "rules",
            self.rules,
        )
        _check(
            not self.missing or stamp.MISSING in self.stamp.needs,
            "feature, beside missing entries",
            self.stamp.needs,
        )
        self._check_entries()

    def _check_entries(self) -> None:
        committed = (*self.live, *self.kept)
        prefixes = [entry.attempt.prefix for entry in committed]
        _check(len(set(prefixes)) == len(prefixes), "prefixes that stand twice", prefixes)
        every = (*committed, *self.bad, *self.releasing, *self.missing)
        names = {entry.attempt.published for entry in every}
        _check(len(names) == len(every), "attempts that stand twice", sorted(names))
        for entry in every:
            _check(entry.record <= self.number, "entry from the future", entry.record)
            _check(entry.attempt.epoch <= self.epoch, "entry from the future", entry)
            _check(all(n < len(self.rules) for n in entry.why), "entry's reasons", entry)
        # Forgetting this field would let TensorFlow's recovery rule forget them all.
        _check(
            not every or self.last_preserved is not None,
            "last_preserved beside committed entries",
            self.last_preserved,
        )

    @property
    def committed(self) -> tuple[Entry, ...]:
        """All that can be restored, newest commit first."""
        every = (*self.live, *self.kept)
        return tuple(sorted(every, key=lambda entry: entry.record, reverse=True))

    @property
    def has_committed(self) -> bool:
        """Tell whether the chain ever committed anything."""
        return self.last_preserved is not None

    def encode(self) -> bytes:
        """Encode to the bytes of the record's file."""
        values = {name: getattr(self, name) for name in _fields_of(self.stamp)}
        lines = [
            f'"{name}": {_encode_field(value)}'
            for name, value in (self.stamp.fields | values).items()
        ]
        body = "{\n" + ",\n".join(lines)
        return f'{body}{_CHECKSUM}"{digest(body.encode())}"\n}}\n'.encode()

    @staticmethod
    @collector_paused()
    def decode(data: bytes) -> Record:
        """Decode and check the bytes of a record's file.

        Raises:
            CorruptStateError: Anything but the exact bytes of a valid record.
            NewerFormatError: A newer version of distckpt wrote it.
        """
        _check(len(data) <= MAX_SIZE_BYTES, "record's size in bytes", len(data))
        try:
            tree = strict_json.loads(data)
        except strict_json.JsonError as error:
            msg = f"not a record: {error}"
            raise CorruptStateError(msg) from None
        _check(isinstance(tree, dict), "record", tree)
        first = [*tree][:1]
        found = stamp.read_stamp(tree, stamp.RECORD)
        if found is None:
            _refuse("format", {name: tree[name] for name in first})
        checksum = tree.pop("checksum", None)
        names = _fields_of(found)
        _check(stamp.checked_fields(tree, names, found), "fields", list(tree))
        allow_unknown = found.allows_unknown_fields
        values = {name: _decode_field(name, tree[name], allow_unknown) for name in names}
        record = Record(**values, stamp=found)
        # The spelling of fields that this version does not know cannot be checked.
        is_whole = (
            data.endswith(f'"{checksum}"\n}}\n'.encode())
            and checksum == digest(data.rpartition(_CHECKSUM.encode())[0])
            if allow_unknown
            else record.encode() == data
        )
        if not is_whole:
            msg = "record's checksum does not match its content"
            raise CorruptStateError(msg)
        return record


_CHECKSUM = ',\n"checksum": '
_FIELDS = tuple(
    field.name for field in fields(Record) if field.name not in ("missing", "stamp")
)
_ENTRY_LISTS = ("live", "kept", "bad", "releasing", "missing")


def _fields_of(of: Stamp) -> tuple[str, ...]:
    return (*_FIELDS, "missing") if stamp.MISSING in of.needs else _FIELDS


def _encode_field(value: Any) -> str:
    if not isinstance(value, tuple) or (value and isinstance(value[0], str)):
        return strict_json.dumps(value)
    if not value:
        return "[]"
    lines = ",\n ".join(strict_json.dumps(entry.to_json()) for entry in value)
    return f"[\n {lines}\n]"


def _decode_field(name: str, value: Any, allow_unknown: bool) -> Any:
    if name == "rules":
        _check(isinstance(value, list), name, value)
        return tuple(value)
    if name not in _ENTRY_LISTS:
        return value
    _check(isinstance(value, list), name, value)
    return tuple(Entry.from_json(each, allow_unknown=allow_unknown) for each in value)


def is_metric(metric: tuple[Any, Any]) -> bool:
    """Tell whether a name and a value can stand in an entry."""
    name, value = metric
    return (
        isinstance(name, str)
        and 0 < len(name) <= MAX_METRIC_NAME
        and (value is None or _is_finite(value))
    )


def _is_int(value: Any) -> bool:
    return type(value) is int and -_MAX_INT - 1 <= value <= _MAX_INT


def _is_count(value: Any) -> bool:
    return _is_int(value) and value >= 0


def _is_finite(value: Any) -> bool:
    return type(value) is float and math.isfinite(value)


def _is_digest(value: Any) -> bool:
    return is_hex(value, DIGEST_LENGTH)


def _check(condition: bool, what: str, found: Any) -> None:
    if not condition:
        _refuse(what, found)


def _refuse(what: str, found: Any) -> NoReturn:
    msg = f"record: bad {what}: {found!r:.200}"
    raise CorruptStateError(msg)
