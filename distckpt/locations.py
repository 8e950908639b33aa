"""What a path means that a caller has given: a local path, or an error that says why not.

A run directory that is not where the user thinks is a silent start from scratch: a URL
becomes a local folder ``s3:``, ``~`` a folder called ``~``, and a relative path leads
elsewhere after ``os.chdir``. So all paths that are given come through here.
"""

from __future__ import annotations

import os
import re
from typing import TypeAlias

from distckpt.errors import ConfigError, StorageError

Path: TypeAlias = "str | os.PathLike[str]"

# ``pathlib`` makes "s3:/bucket" of "s3://bucket".
_SCHEME = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/(?P<rest>/?.*)", re.DOTALL)
_VARIABLE = re.compile(r"\$(?:(?P<name>[A-Za-z_]\w*)|\{(?P<braced>[^}]*)\})", re.ASCII)


def checked_path(path: Path, what: str = "a path") -> str:
    """Return a path as it was given, if it is a local one.

    Args:
        path: What the caller has given.
        what: What it is, for the message: "the run directory".

    Raises:
        ConfigError: It is no string, empty, a URL, or has a ``~`` or ``$NAME`` that only a
            shell replaces.
    """
    try:
        text = os.fspath(path)
    except TypeError as error:
        msg = f"{what} must be a string or path-like, got {path!r:.100}."
        raise ConfigError(msg) from error
    if not isinstance(text, str) or not text or "\0" in text:
        msg = f"{what} must be a string, not empty and without NUL, got {path!r:.100}."
        raise ConfigError(msg)
    _refuse_url(text, what)
    _refuse_home(text, what)
    _refuse_variables(text, what)
    return text


def absolute(path: str) -> str:
    """Return where a path leads from the working directory as it is now.

    Links are not resolved.

    Raises:
        StorageError: The working directory is gone.
    """
    try:
        return os.path.abspath(path)
    except OSError as error:
        msg = f"{path} is a relative path, and the working directory is gone: {error}"
        raise StorageError(msg, operation="getcwd", path=path, errno=error.errno) from error


def _refuse_url(text: str, what: str) -> None:
    """Refuse what names another store than the filesystem."""
    found = _SCHEME.match(text)
    if found is None:
        return
    scheme = found["scheme"]
    if scheme.lower() == "file":
        meant = "/" + found["rest"].lstrip("/")
        msg = f"{what} is a path, not a URL: instead of {text!r} give {meant!r}."
        raise ConfigError(msg)
    msg = (
        f"{what} is {text!r}: distckpt writes to filesystems only, and has no access to "
        f"{scheme}. Mount it, and give the path of the mount; a directory that is really "
        f"called so is './{text}'."
    )
    raise ConfigError(msg)


def _refuse_home(text: str, what: str) -> None:
    if not text.startswith("~"):
        return
    expanded = os.path.expanduser(text)
    meant = f"give {expanded!r}" if expanded != text else "there is no such user"
    msg = (
        f"{what} is {text!r}, and only a shell replaces '~': {meant}. A directory that is "
        f"really called so is './{text}'."
    )
    raise ConfigError(msg)


def _refuse_variables(text: str, what: str) -> None:
    found = _VARIABLE.search(text)
    if found is None:
        return
    name = found["name"] or found["braced"]
    expanded = os.path.expandvars(text)
    meant = f"give {expanded!r}" if expanded != text else "it is not set here"
    msg = f"{what} is {text!r}, and only a shell replaces '${name}': {meant}."
    raise ConfigError(msg)
