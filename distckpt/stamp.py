"""The stamp of a record, manifest or header: its format, writer's version and features.

Every version of distckpt can read the stamp of every later version. So a file that is too
new is told apart from a damaged one: nothing rebuilds, prunes or sweeps what it cannot
understand.

The two lists are those of ext4 and git: a reader that does not know a feature in ``needs``
must refuse the file; one that does not know a feature in ``notes`` may ignore it, together
with the fields that it does not know.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

from distckpt._version import __version__
from distckpt.errors import NewerFormatError

Format: TypeAlias = "int | str"

FIRST_FORMAT = 1
# Provisional: the next development version may change it, and counts up the last number. A
# release writes the plain integer 2.
CURRENT_FORMAT = "2-provisional.3"
READABLE_FORMATS: tuple[Format, ...] = (FIRST_FORMAT, CURRENT_FORMAT)

# The features that this version reads. A later format is this one with more features.
# ``missing``: a record lists checkpoints whose directories are gone, and may come back. A
# version that did not know them would delete those as left over.
MISSING = "missing"
NEEDS: frozenset[str] = frozenset((MISSING,))
NOTES: frozenset[str] = frozenset()

FIELDS = ("format", "version", "needs", "notes")

# The kinds of files, for error messages.
RECORD, MANIFEST, SHARD_FILE = "record", "manifest", "shard file"

_MAX_FEATURES = 64
_MAX_TEXT = 64
_PROVISIONAL = re.compile(r"[1-9][0-9]{0,9}-provisional\.[0-9]{1,9}", re.ASCII)
_NAME_CHARACTERS = frozenset("abcdefghijklmnopqrstuvwxyz0123456789-")


@dataclass(frozen=True, slots=True)
class Stamp:
    """The first fields of a file.

    Attributes:
        format: The format of the file. Format 1 has no other field of the stamp.
        version: The version of distckpt that wrote the file, for error messages.
        needs: Features without which the file cannot be understood, sorted.
        notes: Features that a reader may ignore, sorted.
    """

    format: Format = CURRENT_FORMAT
    version: str = __version__
    needs: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def fields(self) -> dict[str, Any]:
        """The fields as they stand in the file, in order."""
        if self.format == FIRST_FORMAT:
            return {"format": self.format}
        return {
            "format": self.format,
            "version": self.version,
            "needs": list(self.needs),
            "notes": list(self.notes),
        }

    @property
    def allows_unknown_fields(self) -> bool:
        """Tell whether the file may have fields that this version does not know."""
        return not NOTES.issuperset(self.notes)

    def successor(self) -> Stamp:
        """Return the stamp of a file that carries over the content of this one.

        The features stay: what they announce may be among what is carried over.
        """
        return Stamp(needs=self.needs, notes=self.notes)

    def needing(self, feature: str) -> Stamp:
        """Return the stamp of a file that also uses a feature of ``NEEDS``."""
        return replace(self, needs=tuple(sorted({*self.needs, feature})))


FIRST = Stamp(FIRST_FORMAT, "")
CURRENT = Stamp()


def read_stamp(tree: dict[str, Any], kind: str) -> Stamp | None:
    """Read and remove the stamp of a decoded file.

    Args:
        tree: The JSON object. After return the fields of the stamp are no longer in it.
        kind: ``RECORD``, ``MANIFEST`` or ``SHARD_FILE``, for error messages.

    Returns:
        The stamp; None if the object does not begin with one.

    Raises:
        NewerFormatError: The file is of a format, or needs a feature, that this version
            does not know.
    """
    found: Any = tree.get("format")
    if not _is_format(found):
        return None
    if found not in READABLE_FORMATS:
        raise NewerFormatError(_newer_format(found, tree.get("version"), kind))
    if found == FIRST_FORMAT:
        return FIRST if _cut(tree, FIELDS[:1]) else None
    version: Any = tree.get("version")
    needs: Any = tree.get("needs")
    notes: Any = tree.get("notes")
    if not (_is_text(version) and _are_features(needs) and _are_features(notes)):
        return None
    if not _cut(tree, FIELDS):
        return None
    unknown = sorted({*needs} - NEEDS)
    if unknown:
        raise NewerFormatError(_unknown_features(unknown, version, kind))
    return Stamp(found, version, tuple(needs), tuple(notes))


def checked_fields(tree: dict[str, Any], names: Iterable[str], stamp: Stamp) -> bool:
    """Tell whether an object has exactly these fields, in this order.

    Where a feature of the stamp's notes is unknown, other fields may follow them.
    """
    expected = [*names]
    found = [*tree]
    return found[: len(expected)] == expected and (
        len(found) == len(expected) or stamp.allows_unknown_fields
    )


def _cut(tree: dict[str, Any], names: tuple[str, ...]) -> bool:
    if tuple(tree)[: len(names)] != names:
        return False
    for name in names:
        del tree[name]
    return True


def _is_format(value: Any) -> bool:
    if type(value) is int:
        return value > 0
    # "3-provisional.1": a development version of format 3 wrote it.
    if not _is_text(value):
        return False
    return _PROVISIONAL.fullmatch(value) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= _MAX_TEXT and value.isprintable()


def _are_features(value: Any) -> bool:
    if not isinstance(value, list) or len(value) > _MAX_FEATURES:
        return False
    are_names = all(_is_text(name) and _NAME_CHARACTERS.issuperset(name) for name in value)
    return are_names and value == sorted({*value})


def _newer_format(found: Format, version: Any, kind: str) -> str:
    readable = " and ".join(map(str, READABLE_FORMATS))
    writer = f"distckpt {version}" if _is_text(version) else "another version of distckpt"
    return (
        f"{kind} of format {found}, written by {writer}. This is distckpt {__version__}, "
        f"which reads formats {readable}. {_advice(version, kind)}"
    )


def _unknown_features(unknown: list[str], version: str, kind: str) -> str:
    names = ", ".join(map(repr, unknown))
    return (
        f"{kind} of distckpt {version} that needs {names}, which this version, distckpt "
        f"{__version__}, does not know. {_advice(version, kind)}"
    )


def _advice(version: Any, kind: str) -> str:
    is_known = _is_text(version) and version != __version__
    newer = f"distckpt {version} or newer" if is_known else "a newer distckpt"
    text = f"Use {newer} with this directory; nothing was changed."
    if kind != RECORD:
        return text
    return (
        f"{text} (If no newer version was ever used here, the file itself is damaged: "
        "move it elsewhere and run 'distckpt repair'.)"
    )
