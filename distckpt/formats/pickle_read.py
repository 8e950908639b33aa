"""Read a pickle without running anything that it names.

Python's own reader imports and calls whatever a pickle says. This one makes a tree
(``pickle_tree.py``) of it: no module is imported, nothing is called, and a name that its
caller does not expect is refused. It knows the operations that plain data and named
objects come down to, of protocols 2 to 5.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Container
from typing import Any, NoReturn

from distckpt.errors import UnsafeCheckpointError
from distckpt.formats.pickle_tree import Call, Global, Reference

_MAX_PROTOCOL = 5
_MAX_INT_BYTES = 512


def loads(data: bytes, allowed: Container[Global]) -> Any:
    """Return the tree that a pickle spells.

    Args:
        data: The pickle; nothing behind its end.
        allowed: The names that may stand in it.

    Raises:
        UnsafeCheckpointError: Names what else stands in it, or says why it is no pickle
            that is read here.
    """
    try:
        return _Machine(data, allowed).run()
    except (IndexError, struct.error, UnicodeDecodeError) as error:
        msg = f"not a whole pickle: {error}"
        raise UnsafeCheckpointError(msg) from error


class _Mark:
    """Where on the stack a tuple or a run of items begins."""


_MARK = _Mark()


class _Machine:
    """The stack machine that pickles are programs for, without its dangerous half."""

    def __init__(self, data: bytes, allowed: Container[Global]) -> None:
        self._data = data
        self._allowed = allowed
        self._at = 0
        self._stack: list[Any] = []
        self._marks: list[int] = []
        # A dict, so that a huge number does not make a huge list.
        self._memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Run it to its end and return the one value that is left."""
        data, operations, stop = self._data, _OPERATIONS, _STOP
        while True:
            code = data[self._at]
            self._at += 1
            if code == stop:
                break
            operation = operations.get(code)
            if operation is None:
                _refuse(f"operation {bytes([code])!r} at byte {self._at - 1}")
            operation(self)
        if len(self._stack) != 1 or self._at != len(data):
            _refuse("it does not end where it should")
        return self._pop()

    def _take(self, size: int) -> bytes:
        end = self._at + size
        if not 0 <= size <= len(self._data) - self._at:
            _refuse(f"{size} bytes at byte {self._at} of {len(self._data)}")
        part = self._data[self._at : end]
        self._at = end
        return part

    def _number(self, code: struct.Struct) -> Any:
        at = self._at
        self._at = at + code.size
        return code.unpack_from(self._data, at)[0]

    def _byte(self) -> int:
        at = self._at
        self._at = at + 1
        return self._data[at]

    def _line(self) -> str:
        end = self._data.find(b"\n", self._at)
        if end < 0:
            _refuse("a name without an end")
        text = self._take(end - self._at).decode()
        self._at += 1
        return text

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            _refuse("a mark where a value should be")
        return value

    def _mark(self) -> None:
        self._marks.append(len(self._stack))
        self._stack.append(_MARK)

    def _pop_marked(self) -> list[Any]:
        # A mark that was taken for something else would be refused there.
        at = self._marks.pop() if self._marks else -1
        if at < 0:
            _refuse("items without a mark")
        items = self._stack[at + 1 :]
        del self._stack[at:]
        return items

    def _protocol(self) -> None:
        version = self._byte()
        if version > _MAX_PROTOCOL:
            _refuse(f"protocol {version}")

    def _integer(self, size: int) -> None:
        if not 0 <= size <= _MAX_INT_BYTES:
            _refuse(f"an integer of {size} bytes")
        self._push(int.from_bytes(self._take(size), "little", signed=True))

    def _text(self, size: int) -> None:
        self._stack.append(self._take(size).decode("utf-8", "surrogatepass"))

    def _tuple(self, length: int) -> None:
        items = tuple(self._stack[-length:])
        if len(items) < length or _MARK in items:
            _refuse("a tuple of too little")
        self._stack[-length:] = [items]

    def _add_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if len(items) % 2:
            _refuse("a key without a value")
        pairs = list(zip(items[::2], items[1::2], strict=True))
        if isinstance(target, Call):
            target.items += pairs
        elif type(target) is dict:
            try:
                target.update(pairs)
            except TypeError as error:
                _refuse(f"a key that is none: {error}")
        else:
            _refuse(f"items for a {type(target).__name__}")

    def _add_entries(self, entries: list[Any]) -> None:
        target = self._stack[-1]
        if type(target) is not list:
            _refuse(f"entries for a {type(target).__name__}")
        target += entries

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._add_items([key, value])

    def _name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            _refuse("a name that is no text")
        found = Global(module, name)
        if found not in self._allowed:
            _refuse(
                f"it names {str(found)!r:.200}, which has no place here. Loading it with "
                "torch or pickle might run what somebody has put there"
            )
        self._push(found)

    def _global(self) -> None:
        self._name(self._line(), self._line())

    def _stack_global(self) -> None:
        name, module = self._pop(), self._pop()
        self._name(module, name)

    def _call(self, is_new: bool) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Global) or type(arguments) is not tuple:
            _refuse("a call of what is no name")
        self._push(Call(function, arguments, is_new))

    def _build(self) -> None:
        state = self._pop()
        target = self._stack[-1]
        if not isinstance(target, Call):
            _refuse(f"state for a {type(target).__name__}")
        target.state = state

    def _put(self, number: int) -> None:
        value = self._stack[-1]
        if value is _MARK:
            _refuse("nothing to remember")
        self._memo[number] = value

    def _get(self, number: int) -> None:
        value = self._memo.get(number, _MARK)
        if value is _MARK:
            _refuse(f"nothing is remembered as {number}")
        self._stack.append(value)


def _refuse(reason: str) -> NoReturn:
    msg = f"a pickle that is not read: {reason}."
    raise UnsafeCheckpointError(msg)


_SHORT = struct.Struct("<H")
_INT = struct.Struct("<i")
_LENGTH = struct.Struct("<I")
_LONG_LENGTH = struct.Struct("<Q")
_FLOAT = struct.Struct(">d")
_STOP = ord(".")
_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    ord(code): operation
    for code, operation in {
        "\x80": _Machine._protocol,
        "\x95": lambda m: m._number(_LONG_LENGTH),  # of a frame, which nobody needs
        "(": _Machine._mark,
        "N": lambda m: m._push(None),
        "\x88": lambda m: m._push(True),
        "\x89": lambda m: m._push(False),
        "J": lambda m: m._push(m._number(_INT)),
        "K": lambda m: m._push(m._byte()),
        "M": lambda m: m._push(m._number(_SHORT)),
        "G": lambda m: m._push(m._number(_FLOAT)),
        "\x8a": lambda m: m._integer(m._byte()),
        "\x8b": lambda m: m._integer(m._number(_INT)),
        "X": lambda m: m._text(m._number(_LENGTH)),
        "\x8c": lambda m: m._text(m._byte()),
        "\x8d": lambda m: m._text(m._number(_LONG_LENGTH)),
        "B": lambda m: m._push(m._take(m._number(_LENGTH))),
        "C": lambda m: m._push(m._take(m._byte())),
        "\x8e": lambda m: m._push(m._take(m._number(_LONG_LENGTH))),
        ")": lambda m: m._push(()),
        "\x85": lambda m: m._tuple(1),
        "\x86": lambda m: m._tuple(2),
        "\x87": lambda m: m._tuple(3),
        "t": lambda m: m._push(tuple(m._pop_marked())),
        "]": lambda m: m._push([]),
        "a": lambda m: m._add_entries([m._pop()]),
        "e": lambda m: m._add_entries(m._pop_marked()),
        "}": lambda m: m._push({}),
        "s": _Machine._set_item,
        "u": lambda m: m._add_items(m._pop_marked()),
        "c": _Machine._global,
        "\x93": _Machine._stack_global,
        "R": lambda m: m._call(False),
        "\x81": lambda m: m._call(True),
        "b": _Machine._build,
        "Q": lambda m: m._push(Reference(m._pop())),
        "q": lambda m: m._put(m._byte()),
        "r": lambda m: m._put(m._number(_LENGTH)),
        "\x94": lambda m: m._put(len(m._memo)),
        "h": lambda m: m._get(m._byte()),
        "j": lambda m: m._get(m._number(_LENGTH)),
    }.items()
}
