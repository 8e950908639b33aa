"""Which names of a checkpoint are restored, and what they are called here."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeAlias

from distckpt.errors import ConfigError

Rename: TypeAlias = "Mapping[str, str] | Callable[[str], str]"

# What stands before the name of a parameter in the names of its optimizer's entries.
_BEFORE_PARAMETER = ("/state/", "/settings/")


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """What of a checkpoint is restored, and under which names.

    Without options a restore is strict: what is here must be in the checkpoint, and what
    is in the checkpoint here. What is not selected is left as it is, and not missed.

    Names are paths such as ``model/layers.0.weight`` (``distckpt show`` lists them);
    patterns are the shell's (``*``, ``?``, ``[...]``), ``*`` matches all, and a pattern
    that matches a path selects all that is below it: ``"model"`` is the whole model.

    Attributes:
        include: One pattern or several: only what matches one of them. None: everything.
        exclude: Not what matches one of these.
        rename: What a name in the checkpoint is called here: a function of the name, or a
            dict from beginnings of names to what stands there instead, the longest first.
            Both are tried on the whole name and, in an optimizer's entries, on that of
            the parameter that they belong to.
    """

    include: str | Iterable[str] | None = None
    exclude: str | Iterable[str] = ()
    rename: Rename | None = None


class Names:
    """The names that are restored, as options say.

    Args:
        options: What the caller asked for; None: everything, as it is called.
        always: Names that are restored in any case.

    Attributes:
        are_all: Whether everything is restored under its own name.

    Raises:
        ConfigError: Options of the wrong type.
    """

    def __init__(self, options: Any = None, always: Iterable[str] = ()) -> None:
        if options is None:
            options = RestoreOptions()
        if not isinstance(options, RestoreOptions):
            msg = f"options must be RestoreOptions, got {options!r:.100}."
            raise ConfigError(msg)
        self._include = None if options.include is None else _patterns(options.include)
        self._exclude = _patterns(options.exclude)
        self._always = frozenset(always)
        self._rename = _renaming(options.rename)
        self.are_all = self._include is None and not self._exclude and not options.rename

    def selects(self, name: str) -> bool:
        """Tell whether what is called so here is restored."""
        if self.are_all or name in self._always:
            return True
        if self._include is not None and not _matches(name, self._include):
            return False
        return not _matches(name, self._exclude)

    def here(self, saved: str) -> str:
        """Return what a name in the checkpoint is called here.

        Raises:
            ConfigError: The caller's function returned something else than a name.
        """
        if self._rename is None or saved in self._always:
            return saved
        renamed = self._renamed(saved)
        for before in _BEFORE_PARAMETER:
            head, found, parameter = saved.partition(before)
            if found and renamed == saved:
                renamed = f"{head}{before}{self._renamed(parameter)}"
        return renamed

    def _renamed(self, name: str) -> str:
        assert self._rename is not None
        renamed = self._rename(name)
        if not isinstance(renamed, str) or not renamed:
            msg = f"rename made {renamed!r:.100} of {name!r}; it must return a name."
            raise ConfigError(msg)
        return renamed


def _patterns(given: Any) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else given
    is_iterable = isinstance(patterns, Iterable)
    patterns = tuple(patterns) if is_iterable else ()
    if not is_iterable or not all(isinstance(pattern, str) for pattern in patterns):
        msg = f"include and exclude must be patterns, got {given!r:.200}."
        raise ConfigError(msg)
    return patterns


def _matches(name: str, patterns: Iterable[str]) -> bool:
    # A pattern that ends above the name selects it, too.
    return any(
        fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}/*")
        for pattern in patterns
    )


def _renaming(given: Any) -> Callable[[str], str] | None:
    if not given:
        return None
    if callable(given):
        function: Callable[[str], str] = given
        return function
    if not isinstance(given, Mapping):
        msg = f"rename must be a dict or a function, got {given!r:.100}."
        raise ConfigError(msg)
    beginnings = sorted(given, key=len, reverse=True)

    def rename(name: str) -> str:
        for beginning in beginnings:
            if name.startswith(beginning):
                return f"{given[beginning]}{name[len(beginning) :]}"
        return name

    return rename
