"""Sizes, lengths of time, dates and counts as people read them: in logs and commands."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone

from distckpt.errors import ConfigError

_MAX_RANKS = 8


def size(size_bytes: float) -> str:
    """Spell a number of bytes for people."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size_bytes < 1024:
            return f"{size_bytes:.0f} {unit}" if unit == "B" else f"{size_bytes:.1f} {unit}"
        size_bytes /= 1024
    return f"{size_bytes:.1f} TiB"


def count(number: int, noun: str) -> str:
    """Spell how many there are: ``1 rank``, ``2 ranks``.

    Args:
        number: How many.
        noun: For one of them; its plural has an ``s`` more.
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def ranks(numbers: Sequence[int]) -> str:
    """Spell which ranks: ``rank 3``, ``ranks 0, 1``; of many the first."""
    some = ", ".join(map(str, numbers[:_MAX_RANKS]))
    more = f", ... ({len(numbers)} ranks)" if len(numbers) > _MAX_RANKS else ""
    return f"rank{'s' * (len(numbers) != 1)} {some}{more}"


def metrics(values: Mapping[str, float | None]) -> str:
    """Spell metrics for people; one that is no finite number has a dash."""
    return ", ".join(
        f"{name} {'-' if value is None else f'{value:.6g}'}"
        for name, value in values.items()
    )


def date(seconds: float) -> str:
    """Spell seconds since the epoch for people, in their own time zone."""
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    except (OverflowError, ValueError, OSError):
        return f"{seconds:.0f} s"


def utc(seconds: float) -> datetime:
    """Return seconds since the epoch as a datetime in UTC.

    Raises:
        ConfigError: No calendar reaches so far.
    """
    try:
        return datetime.fromtimestamp(seconds, timezone.utc)
    except (OverflowError, ValueError, OSError) as error:
        msg = f"{seconds!r} seconds since the epoch are outside the calendar."
        raise ConfigError(msg) from error


def utc_date(seconds: float) -> str:
    """Spell seconds since the epoch as an ISO date in UTC."""
    try:
        return f"{utc(seconds):%Y-%m-%dT%H:%M:%SZ}"
    except ConfigError:
        return f"{seconds!r} s"


def duration(seconds: float) -> str:
    """Spell a length of time for people."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} s"


def age(seconds: float) -> str:
    """Spell for how long something has been there."""
    return "in the future" if seconds < 0 else duration(seconds)


def took(seconds: float) -> str:
    """Spell how long something has taken, as finely as three digits do."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.3g} ms"
    return f"{seconds:.3g} s" if seconds < 120 else duration(seconds)
