"""Lengths of time, as callers give them: seconds, or a ``timedelta``."""

from __future__ import annotations

import math
from datetime import timedelta
from typing import Any

from distckpt.errors import ConfigError


def seconds_of(name: str, value: Any, *, may_be_zero: bool = False) -> float:
    """Return a length of time in seconds.

    Args:
        name: Of the argument, for the message.
        value: What the caller has given: a number of seconds, or a ``timedelta``.
        may_be_zero: Whether 0 is a length, too.

    Raises:
        ConfigError: It is neither, not finite, or not positive.
    """
    seconds = value.total_seconds() if isinstance(value, timedelta) else value
    is_number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if is_number and (0 < seconds < math.inf or (may_be_zero and seconds == 0)):
        return float(seconds)
    least = "at least 0" if may_be_zero else "positive"
    msg = (
        f"{name} must be a number of seconds or a datetime.timedelta, {least}; got "
        f"{value!r:.100}."
    )
    raise ConfigError(msg)
