"""Stand between the library and its store, and beneath it: count, stop, kill, fail.

The library has no hook for tests. Its one module that touches files is patched from
outside: every public function and method, so that a new one is covered by itself, or
(for errors) the ``os`` and ``shutil`` that the module sees. The verbs of its store are
patched, too, so that each call tells which one makes it.
"""

from __future__ import annotations

import functools
import inspect
import os
import re
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

from distckpt.storage import posix
from distckpt.storage.posix_store import PosixStore

# They consist of calls that are intercepted themselves.
_COMPOSED = {"write_new_file", "read_file", "OpenFile.read"}

# Verbs of the store that consist of several calls.
_VERBS = ("clear", "create", "discard", "publish", "remove", "replace")
_in_verb = threading.local()

# Calls that only look: nothing on disk differs before and after them.
LOOKING = {
    "OpenFile.__init__",
    "OpenFile.close",
    "OpenFile.expect_in_order",
    "OpenFile.read_into",
    "OpenFile.read_vector",
    "exists",
    "is_directory",
    "list_directory",
    "modified",
    "link_target",
    "room",
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of the store, or of the module that touches files.

    Attributes:
        name: Function, or class and method.
        arguments: Positional arguments, a method's object first.
        run: Does what was called; returns what it returns.
        verb: The verb of the store that makes it, if that consists of several calls.
    """

    name: str
    arguments: tuple[Any, ...]
    run: Callable[[], Any]
    verb: str = ""

    @property
    def label(self) -> str:
        """The call, of what kind of file, and the verb that makes it."""
        first = self.arguments[0] if self.arguments else ""
        name = os.path.basename(str(getattr(first, "path", first)))
        file = re.sub(r"[0-9a-f]{8,}|[0-9]+", "#", name)
        return f"{self.name} of {file}" + f" in {self.verb}" * bool(self.verb)

    @property
    def has_middle(self) -> bool:
        """Tell whether the call can be cut in two."""
        return self.name in ("NewFile.write_at", "remove_tree")

    def run_half(self) -> None:
        """Do one half of a call: write half of the bytes, remove half of the files."""
        if self.name == "NewFile.write_at":
            file, offset, buffers = self.arguments
            file._set_direct(False)  # which takes neither any memory nor any length
            data = b"".join(map(bytes, buffers))
            os.pwrite(file._descriptor, data[: len(data) // 2], offset)
        else:
            _remove_half(self.arguments[0])


def _remove_half(directory: str) -> None:
    names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
    for name in names[: (len(names) + 1) // 2]:
        os.unlink(os.path.join(directory, name))


Hook = Callable[[Call], Any]


@contextmanager
def intercepted(hook: Hook) -> Iterator[None]:
    """Hand every call to a hook, which runs it or does not."""
    verbs = [(PosixStore, verb) for verb in _VERBS]
    originals = [(o, name, getattr(o, name)) for o, name in (*_seams(), *verbs)]
    try:
        for owner, name, original in originals:
            if owner is PosixStore:
                setattr(owner, name, _noting(name, original))
            else:
                setattr(owner, name, _wrapped(owner, name, original, hook))
        yield
    finally:
        for owner, name, original in originals:
            setattr(owner, name, original)


def _seams() -> list[tuple[Any, str]]:
    seams: list[tuple[Any, str]] = []
    for name, item in vars(posix).items():
        if name.startswith("_") or getattr(item, "__module__", "") != posix.__name__:
            continue
        if inspect.isfunction(item):
            seams.append((posix, name))
        elif inspect.isclass(item):
            methods = [n for n in vars(item) if n == "__init__" or not n.startswith("_")]
            seams += [(item, n) for n in methods if inspect.isfunction(vars(item)[n])]
    return [(o, n) for o, n in seams if _label(o, n) not in _COMPOSED]


def _noting(verb: str, original: Any) -> Any:
    """Note which verb a thread is in: nothing happens between it and what is beneath."""

    @functools.wraps(original)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        before = getattr(_in_verb, "name", "")
        _in_verb.name = verb
        try:
            return original(*arguments, **keywords)
        finally:
            _in_verb.name = before

    return wrapper


def _label(owner: Any, name: str) -> str:
    return name if owner is posix else f"{owner.__name__}.{name}"


def _wrapped(owner: Any, name: str, original: Any, hook: Hook) -> Any:
    @functools.wraps(original)
    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        def run() -> Any:
            return original(*arguments, **keywords)

        # The history is no part of the protocol, and is written whenever there is time.
        if threading.current_thread().name == "distckpt-events":
            return run()
        verb = getattr(_in_verb, "name", "")
        return hook(Call(_label(owner, name), arguments, run, verb))

    return wrapper


@dataclass(slots=True)
class Counter:
    """A hook that only writes down which calls there are."""

    calls: list[Call] = field(default_factory=list)

    def __call__(self, call: Call) -> Any:
        """Run the call."""
        self.calls.append(call)
        return call.run()


BEFORE, MIDDLE, AFTER = "before", "middle", "after"


@dataclass(slots=True)
class Killer:
    """A hook that kills this process at one call.

    Attributes:
        index: At which call, counted from 0.
        where: Just before it, in the middle of it, or just after it.
    """

    index: int
    where: str
    num_calls: int = 0

    def __call__(self, call: Call) -> Any:
        """Run the call, or die."""
        index, self.num_calls = self.num_calls, self.num_calls + 1
        if index != self.index:
            return call.run()
        if self.where == MIDDLE:
            call.run_half()
        elif self.where == AFTER:
            call.run()
        os.kill(os.getpid(), signal.SIGKILL)


REFUSED, LOST_REPLY, SHORT = "refused", "lost reply", "short"

_FAILING_OS = (
    "close",
    "fstat",
    "fsync",
    "link",
    "listdir",
    "lstat",
    "makedirs",
    "mkdir",
    "open",
    "preadv",
    "pwritev",
    "rename",
    "statvfs",
    "unlink",
)
# Their effect on the disk may be there although an error was reported.
CAN_BE_SHORT = ("preadv", "pwritev")
CAN_LOSE_REPLY = ("link", "makedirs", "mkdir", "pwritev", "rename", "rmtree", "unlink")
_ERRORS = (
    *("EIO", "ENOSPC", "EDQUOT", "EROFS", "EACCES", "ESTALE", "EINTR", "EMFILE"),
    *("ENOMEM", "ETIMEDOUT"),
)


def ways(name: str) -> Iterator[tuple[str, str]]:
    """Yield each way in which a call can fail, and the error that is reported."""
    for error in _ERRORS:
        yield REFUSED, error
    if name in CAN_LOSE_REPLY:
        yield LOST_REPLY, "EIO"
        yield LOST_REPLY, "ESTALE"
    if name in CAN_BE_SHORT:
        yield SHORT, ""


class Faults:
    """Makes the operating system's calls fail.

    Attributes:
        names: The calls so far.
        fired: Those that failed.
    """

    def __init__(self, index: int, error: int, *, how: str, for_ever: bool) -> None:
        self._index = index
        self._error = error
        self._how = how
        self._for_ever = for_ever
        self.names: list[str] = []
        self.fired: list[str] = []

    def clear(self) -> None:
        """Take the cause away: from now on all calls work."""
        self._index = -1

    def call(self, name: str, original: Any, *arguments: Any, **keywords: Any) -> Any:
        """Run one call, or fail it."""
        index = len(self.names)
        self.names.append(name)
        due = index >= self._index >= 0 if self._for_ever else index == self._index
        if not due or (self._how == SHORT and name not in CAN_BE_SHORT):
            return original(*arguments, **keywords)
        self.fired.append(name)
        if self._how == SHORT:
            return _half(name, original, *arguments)
        # A failed close has closed the descriptor all the same.
        if name == "close" or (self._how == LOST_REPLY and name in CAN_LOSE_REPLY):
            original(*arguments, **keywords)
        elif name == "rmtree":
            _remove_half(arguments[0])
        raise OSError(self._error, os.strerror(self._error))


def _half(name: str, original: Any, descriptor: int, buffers: Any, offset: int) -> int:
    """Write or read only a half of what was asked for, at least a byte."""
    size = max(1, sum(map(len, buffers)) // 2)
    if name == "pwritev":
        return os.pwrite(descriptor, b"".join(map(bytes, buffers))[:size], offset)
    count: int = original(descriptor, [memoryview(buffers[0])[:size]], offset)
    return count


class _Namespace(ModuleType):
    """A module as another one sees it, with some of its functions replaced."""

    def __init__(self, module: ModuleType, replaced: dict[str, Any]) -> None:
        super().__init__(module.__name__)
        self.__dict__.update(vars(module))
        self.__dict__.update(replaced)


@contextmanager
def failing(faults: Faults) -> Iterator[None]:
    """Let faults stand between the one module and the operating system."""

    def wrap(module: ModuleType, name: str) -> Any:
        original = getattr(module, name)
        return functools.update_wrapper(
            functools.partial(faults.call, name, original), original
        )

    originals = posix.os, posix.shutil
    posix.os = _Namespace(os, {name: wrap(os, name) for name in _FAILING_OS})  # type: ignore[attr-defined]
    posix.shutil = _Namespace(shutil, {"rmtree": wrap(shutil, "rmtree")})  # type: ignore[attr-defined]
    try:
        yield
    finally:
        posix.os, posix.shutil = originals  # type: ignore[attr-defined]
