"""Names that are like one that leads nowhere: the answer to a mistyped name."""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterable

# Names are shown up to this length.
_MAX_LENGTH = 200
# Only so much of a name is compared: each comparison takes time by its square.
_MAX_COMPARED = 300
_LIKE = 0.6


def near_names(
    name: str, names: Iterable[str], number: int = 3, least: float = _LIKE
) -> list[str]:
    """Return the names that are most like a given one, the nearest first.

    A name that ends with the given one, or contains it, comes before those that are only
    spelled alike: ``0.weight`` may mean ``model/0.weight``.

    Args:
        name: The name that leads nowhere.
        names: The names that there are.
        number: The most names to return.
        least: How like they must be, from 0 (anything) to 1 (equal).
    """
    # Imported here: only a mistake needs it.
    from difflib import SequenceMatcher

    wanted = name.casefold()[:_MAX_COMPARED]
    matcher = SequenceMatcher(autojunk=False)
    matcher.set_seq2(wanted)
    # How far away each is, sorted; no more than are asked for.
    found: list[tuple[float, int, str]] = []
    for at, other in enumerate(names):
        text = other.casefold()[:_MAX_COMPARED]
        distance = 1.0
        if wanted and wanted in text:
            distance = -2.0 if text.endswith(wanted) else -1.0
        else:
            needed = max(least, 1.0 - found[-1][0] if len(found) == number else 0.0)
            matcher.set_seq1(text)
            if matcher.real_quick_ratio() < needed or matcher.quick_ratio() < needed:
                continue
            ratio = matcher.ratio()
            if ratio < needed:
                continue
            distance = 1.0 - ratio
        insort(found, (distance, at, other))
        del found[number:]
    return [other[:_MAX_LENGTH] for _, _, other in found]


def did_you_mean(name: str, names: Iterable[str], number: int = 3) -> str:
    """Return the end of a sentence: ``; did you mean 'a' or 'b'?``, or a full stop."""
    near = [repr(other) for other in near_names(name, names, number)]
    if not near:
        return "."
    *first, last = near
    return f"; did you mean {', '.join(first)}{' or ' if first else ''}{last}?"
