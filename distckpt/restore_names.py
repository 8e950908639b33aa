"""Which names of a checkpoint are restored, and what they are called here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import translate
from typing import Any, TypeAlias

from distckpt.errors import ConfigError
from distckpt.names import split_inner

Rename: TypeAlias = "Mapping[str, str] | Callable[[str], str]"

# What stands before the name of a parameter in the names of its optimizer's entries.
_BEFORE_PARAMETER = ("/state/", "/settings/")


@dataclass(frozen=True, slots=True)
class RestoreOptions:
    """What of a checkpoint is restored, and under which names.

    Without options a restore is strict: what is here must be in the checkpoint, and what
    is in the checkpoint here. What is not selected is left as it is, and not missed.

    Names are paths such as ``model/layers.0.weight`` (``distckpt show`` lists them).
    Patterns are the shell's (``*``, ``?``, ``[...]``), and ``*`` matches all. A pattern
    selects what it matches and all below that: ``"model"`` is the whole model,
    ``"model/head"`` all that is in its submodule ``head``. An optimizer's entries follow
    their parameters: they are excluded with them, and included with them by a pattern for
    a part of an object (``"model/head"``; a pattern for a whole object, ``"model"``,
    includes that alone). A pattern that matches nothing, neither in the checkpoint nor
    here, is an error; so is a beginning in ``rename``.

    Attributes:
        include: One pattern or several: only what matches one of them. None: everything.
        exclude: Not what matches one of these.
        rename: What a name in the checkpoint is called here: a function of the name, or a
            dict from beginnings of names to what stands there instead, the longest first.
            Both are tried on the whole name and, in an optimizer's entries, on that of
            the parameter that they belong to.
        skip_links: Go on to an older checkpoint where a symbolic link is in the place of
            the newest; else the restore stops there.
        cast: Convert tensors of one floating-point dtype to that of the live tensor; else
            another dtype is a mismatch.
    """

    include: str | Iterable[str] | None = None
    exclude: str | Iterable[str] = ()
    rename: Rename | None = None
    cast: bool = False
    skip_links: bool = False


class Names:
    """The names that are restored, as options say.

    Args:
        options: What the caller asked for; None: everything, as it is called.
        always: Names that are restored in any case.
        within: Paths of the objects that are restored at most; None: of all.
        below: The path that the options leave out of all names.

    Attributes:
        are_all: Whether everything is restored under its own name.
        cast: Whether floating-point tensors are converted.
        skips_links: Whether a link in the place of a checkpoint is passed over.

    Raises:
        ConfigError: Options of the wrong type.
    """

    def __init__(
        self,
        options: Any = None,
        always: Iterable[str] = (),
        within: Iterable[str] | None = None,
        below: str = "",
    ) -> None:
        if options is None:
            options = RestoreOptions()
        if not isinstance(options, RestoreOptions):
            msg = f"options must be RestoreOptions, got {options!r:.100}."
            raise ConfigError(msg)
        for name in ("cast", "skip_links"):
            given: Any = getattr(options, name)
            if type(given) is not bool:
                msg = f"{name} must be True or False, got {given!r:.100}."
                raise ConfigError(msg)
        self._include = None
        if options.include is not None:
            self._include = [*map(_Pattern, _patterns(options.include))]
        self._exclude = [*map(_Pattern, _patterns(options.exclude))]
        self._always = frozenset(always)
        self._unused: set[str] = set()
        self._rename = _renaming(options.rename, self._unused)
        self.cast = options.cast
        self.skips_links = options.skip_links
        self._within = None if within is None else tuple(f"{path}/" for path in within)
        self._below = f"{below}/" if below else ""
        self.are_all = (
            self._include is None
            and not self._exclude
            and not options.rename
            and self._within is None
        )

    def selects(self, name: str) -> bool:
        """Tell whether what is called so here is restored."""
        if self.are_all:
            return True
        name = name.removeprefix(self._below)
        if self._within is not None and not f"{name}/".startswith(self._within):
            return False
        # All patterns are tried: each notes whether it has ever matched.
        parameter = parameter_of(name)
        excluded = [pattern.excludes(name, parameter) for pattern in self._exclude]
        included = [True]
        if self._include is not None:
            included = [pattern.includes(name, parameter) for pattern in self._include]
        return name in self._always or (any(included) and not any(excluded))

    def excludes(self, name: str) -> bool:
        """Tell whether a name is excluded by a pattern."""
        return any(pattern.excludes(name, None) for pattern in self._exclude)

    def needs(self, name: str) -> bool:
        """Tell whether a selected name must be wanted by something here.

        An optimizer's entry that is only included because its parameter is need not: there
        may be no optimizer here.
        """
        if self._include is None or parameter_of(name) is None:
            return True
        return any(pattern.includes(name, None) for pattern in self._include)

    def never_matched(self) -> list[str]:
        """Return the patterns that have matched none of the names asked for so far."""
        every = [*(self._include or ()), *self._exclude]
        unmatched = [pattern.text for pattern in every if not pattern.has_matched]
        return [*unmatched, *sorted(self._unused)]

    def here(self, saved: str) -> str:
        """Return what a name in the checkpoint is called here.

        Raises:
            ConfigError: The caller's function returned something else than a name.
        """
        if self._rename is None or saved in self._always:
            return saved
        # What another tensor is made of is called as that one is.
        outer, rest = split_inner(saved)
        return self._here(outer) + rest

    def _here(self, saved: str) -> str:
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


class _Pattern:
    """One pattern, and whether it has ever matched."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.has_matched = False
        # Below a path stands "/", below a module's path ".".
        self._matches = re.compile(
            "|".join(map(translate, (text, f"{text}/*", f"{text}.*")))
        ).match
        self._is_of_part = _WHOLE_OBJECT.fullmatch(text) is None

    def excludes(self, name: str, parameter: str | None) -> bool:
        found = self._matches(name) is not None
        if not found and parameter is not None:
            found = self._matches(parameter) is not None
        self.has_matched = self.has_matched or found
        return found

    def includes(self, name: str, parameter: str | None) -> bool:
        return self.excludes(name, parameter if self._is_of_part else None)


# A pattern for all that one tracked object has; see decision 25.
_WHOLE_OBJECT = re.compile(r"[^/.]*(/\*)?")


def parameter_of(name: str) -> str | None:
    """Return what follows the parameter's name in an optimizer's entry, with that name."""
    for before in _BEFORE_PARAMETER:
        _, found, parameter = name.partition(before)
        if found:
            return parameter
    return None


def _patterns(given: Any) -> tuple[str, ...]:
    patterns = (given,) if isinstance(given, str) else given
    is_iterable = isinstance(patterns, Iterable)
    patterns = tuple(patterns) if is_iterable else ()
    if not is_iterable or not all(isinstance(pattern, str) for pattern in patterns):
        msg = f"include and exclude must be patterns, got {given!r:.200}."
        raise ConfigError(msg)
    return patterns


def _renaming(given: Any, unused: set[str]) -> Callable[[str], str] | None:
    """Make a function of what a caller gave.

    Args:
        given: A function, or a dict of beginnings.
        unused: To be filled with those of a dict that have begun no name yet.
    """
    if not given:
        return None
    if callable(given):
        function: Callable[[str], str] = given
        return function
    if not isinstance(given, Mapping):
        msg = f"rename must be a dict or a function, got {given!r:.100}."
        raise ConfigError(msg)
    beginnings = sorted(given, key=len, reverse=True)
    unused.update(beginnings)

    def rename(name: str) -> str:
        for beginning in beginnings:
            if name.startswith(beginning):
                unused.discard(beginning)
                return f"{given[beginning]}{name[len(beginning) :]}"
        return name

    return rename
