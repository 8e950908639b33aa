"""Which checkpoint is meant: the latest, the best, a number, a name or a path."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, TypeAlias

from distckpt import paths
from distckpt.errors import CheckpointNotFound, ConfigError
from distckpt.near import did_you_mean
from distckpt.policy import Best
from distckpt.record import Entry
from distckpt.retention import best_of

LATEST, BEST = "latest", "best"

Which: TypeAlias = str | int | Best | os.PathLike[str]


def spelled(which: Any) -> str:
    """Spell what was asked for: the same on all ranks that ask for the same.

    Raises:
        ConfigError: It is nothing that could be asked for.
    """
    if type(which) is int or isinstance(which, Best):
        return f"{which}"
    if isinstance(which, (str, os.PathLike)) and isinstance(os.fspath(which), str):
        return repr(os.fspath(which))
    msg = (
        f"which must be {LATEST!r}, {BEST!r}, best(1, ...), a number or a path; got "
        f"{which!r:.100}."
    )
    raise ConfigError(msg)


def choose(
    entries: Sequence[Entry], which: Which, directory: str, rule: Best | None
) -> list[Entry]:
    """Return what to try, in this order.

    Args:
        entries: All that is committed, newest first.
        which: What was asked for.
        directory: The run directory.
        rule: What ``"best"`` means there, if anything.

    Raises:
        CheckpointNotFound: Nothing like that is committed.
        ConfigError: ``"best"`` means nothing, or a path leads elsewhere.
    """
    if isinstance(which, str) and which == BEST:
        if rule is None:
            msg = (
                'restore("best"): max_to_keep has no rule best(...) that says which it is; '
                'pass one, such as restore(best(1, "val_loss", mode="min")).'
            )
            raise ConfigError(msg)
        which = rule
    if isinstance(which, Best):
        found = best_of(entries, which)
    elif isinstance(which, int):
        found = [entry for entry in entries if entry.attempt.number == which]
    elif isinstance(which, str) and which == LATEST:
        found = list(entries)
    else:
        found = _named(entries, os.fspath(which), directory)
    if not found:
        raise CheckpointNotFound(_nothing(entries, which, directory))
    return found


def _nothing(entries: Sequence[Entry], which: Which, directory: str) -> str:
    """Say that nothing committed is what was asked for, and what there is."""
    prefixes = [entry.attempt.prefix for entry in entries]
    if isinstance(which, Best):
        known = sorted({name for entry in entries for name, _ in entry.metrics})
        if which.metric in known:
            what, hint = f"the metric {which.metric!r} is a finite number in none", "."
        else:
            what = f"no committed checkpoint has the metric {which.metric!r}"
            hint = did_you_mean(which.metric, known)
        hint += f" Metrics that there are: {', '.join(known[:20]) or 'none'}."
    else:
        what, hint = "no such checkpoint", "."
        if isinstance(which, (str, os.PathLike)):
            name = os.path.basename(os.fspath(which).rstrip(os.sep))
            hint = did_you_mean(name, [LATEST, BEST, *prefixes] if entries else [])
    shown = ", ".join(prefixes[:10]) or "none"
    return (
        f"restore({spelled(which)}): {what}{hint} Committed in {directory}, newest first: "
        f"{shown}."
    )


def _named(entries: Sequence[Entry], path: str, directory: str) -> list[Entry]:
    root, name = os.path.split(path.rstrip(os.sep))
    if root and os.path.realpath(root) != os.path.realpath(directory):
        msg = (
            f"{path} is not in {directory}, which this manager saves into. What another "
            "job has saved is restored with checkpoint.restore(path), or is what a new run "
            "begins with: init_fn=from_pretrained(path)."
        )
        raise ConfigError(msg)
    if paths.parse_prefix(name) is None and paths.parse_published(name) is None:
        return []
    return [e for e in entries if name in (e.attempt.prefix, e.attempt.published)]
