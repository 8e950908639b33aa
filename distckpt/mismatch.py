"""How a checkpoint and live objects do not fit, as one error: by object, with a way on."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from distckpt import words
from distckpt.dtypes import FLOATS
from distckpt.errors import MismatchError
from distckpt.restore_names import parameter_of

NOT_HERE = "in the checkpoint, nothing here"
NO_MATCH = "a pattern that matches nothing"

_SPECIAL = re.compile(r"([*?[])")
_MAX_LINES = 100
_MAX_PATTERNS = 8
# Names of one object with one difference are told one by one up to here.
_MAX_ALIKE = 3
_DTYPES = re.compile(
    r"(?P<saved>\w+) (?P<shape>\[.*\]) in the checkpoint, (?P<here>\w+) (?P=shape) here"
)


def mismatch(what: str, problems: Sequence[str]) -> MismatchError:
    """Make the error that lists how a checkpoint and live objects do not fit.

    Args:
        what: The checkpoint, for the message.
        problems: One sentence each, ``NAME: text``.
    """
    lines = [*_grouped([_parsed(problem) for problem in problems])]
    shown = "".join(f"\n  {line}" for line in _first(lines, _MAX_LINES))
    hint = "".join(f"\n{line}" for line in _ways_on(problems))
    return MismatchError(
        f"{what} does not fit the live objects; nothing of it was read. "
        f"{words.count(len(problems), 'difference')}:{shown}{hint}"
    )


def _parsed(problem: str) -> tuple[str, str]:
    name, _, reason = problem.partition(": ")
    return name, reason


def _object_of(name: str) -> str:
    return name.partition("/")[0]


def _grouped(problems: Iterable[tuple[str, str]]) -> Iterator[str]:
    """Put together what one object has for one reason; objects in order."""
    by_object: dict[str, dict[str, list[str]]] = {}
    for name, reason in problems:
        by_object.setdefault(_object_of(name), {}).setdefault(reason, []).append(name)
    for path, names_of in by_object.items():
        for reason, names in names_of.items():
            if len(names) <= _MAX_ALIKE:
                yield from (f"{name}: {reason}" for name in names)
                continue
            examples = ", ".join(names[:2])
            yield f"{path} ({len(names)} names: {examples}, ...): {reason}"


def _ways_on(problems: Sequence[str]) -> Iterator[str]:
    parsed = [
        (name, reason)
        for name, reason in map(_parsed, problems)
        if not reason.startswith(NO_MATCH)
    ]
    if not parsed:
        return
    if all(_is_of_floats(reason) for _, reason in parsed):
        yield "To convert them: RestoreOptions(cast=True)."
    yield f"To restore the rest: RestoreOptions(exclude={_patterns(parsed)!r})."


def _is_of_floats(reason: str) -> bool:
    found = _DTYPES.fullmatch(reason)
    return found is not None and {found["saved"], found["here"]} <= FLOATS


def _patterns(problems: Sequence[tuple[str, str]]) -> list[str]:
    """Return patterns that exclude what does not fit, as few as say it."""
    whole = _whole_objects(problems)
    names = [name for name, _ in problems if _object_of(name) not in whole]
    # An optimizer's entries are excluded with their parameter.
    of_parameters = [
        name
        for name in names
        if not any((parameter_of(name) or "").startswith(f"{other}/") for other in names)
    ]
    patterns = [*whole, *dict.fromkeys(of_parameters)]
    if len(patterns) > _MAX_PATTERNS:
        patterns = [*dict.fromkeys(_object_of(name) for name, _ in problems)]
    return [_SPECIAL.sub(r"[\1]", pattern) for pattern in patterns]


def _whole_objects(problems: Sequence[tuple[str, str]]) -> list[str]:
    """Return the objects of which many names are missing on one side, and nothing else."""
    reasons_of: dict[str, list[str]] = {}
    for name, reason in problems:
        reasons_of.setdefault(_object_of(name), []).append(reason)
    return [
        path
        for path, reasons in reasons_of.items()
        if len(reasons) > _MAX_ALIKE and {*reasons} == {NOT_HERE}
    ]


def _first(items: Sequence[str], limit: int) -> Iterator[str]:
    yield from items[:limit]
    if len(items) > limit:
        yield f"... and {len(items) - limit} more"
