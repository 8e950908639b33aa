"""Spell a tree as a pickle, for programs that read nothing else.

Protocol 2, which every version of torch reads, also with ``weights_only=True``.
"""

from __future__ import annotations

import struct
from typing import Any

from distckpt.errors import UnsupportedError
from distckpt.formats.pickle_tree import Call, Global, Reference

_PROTOCOL = b"\x80\x02"
_STOP = b"."
# Keys and texts repeat; what is longer hardly does.
_MAX_SHARED_LENGTH = 100


def dumps(tree: Any) -> bytes:
    """Return the pickle of a tree; one ``Call`` that stands twice in it is made once.

    Raises:
        UnsupportedError: A value that has no place in one.
    """
    writer = _Writer()
    writer.write(tree)
    return b"".join([_PROTOCOL, *writer.parts, _STOP])


class _Writer:
    def __init__(self) -> None:
        self.parts: list[bytes] = []
        self._number_of: dict[object, int] = {}
        # Known by their ids, which must stay their own.
        self._calls: list[Call] = []

    def write(self, value: Any) -> None:
        """Add what pushes a value onto the reader's stack."""
        kind = type(value)
        if value is None:
            self.parts.append(b"N")
        elif kind is bool:
            self.parts.append(b"\x88" if value else b"\x89")
        elif kind is int:
            self._write_int(value)
        elif kind is float:
            self.parts.append(b"G" + struct.pack(">d", value))
        elif kind is str:
            self._write_text(value)
        elif kind is bytes:
            # As Python itself does in this protocol.
            self.write(
                Call(Global("_codecs", "encode"), (value.decode("latin1"), "latin1"))
            )
        elif kind is tuple:
            self.parts.append(b"(")
            for item in value:
                self.write(item)
            self.parts.append(b"t")
        elif kind is list:
            self.parts.append(b"](")
            for item in value:
                self.write(item)
            self.parts.append(b"e")
        elif kind is dict:
            self.parts.append(b"}")
            self._write_items([*value.items()])
        else:
            self._write_node(value)

    def _write_node(self, value: Any) -> None:
        if isinstance(value, Global):
            if not self._is_known(value):
                self.parts.append(f"c{value.module}\n{value.name}\n".encode())
                self._remember(value)
        elif isinstance(value, Call):
            if not self._is_known(id(value)):
                self._write_call(value)
                self._remember(id(value))
                self._calls.append(value)
        elif isinstance(value, Reference):
            self.write(value.key)
            self.parts.append(b"Q")
        else:
            msg = f"a value of type {type(value).__qualname__} cannot be written."
            raise UnsupportedError(msg)

    def _write_call(self, call: Call) -> None:
        self.write(call.function)
        self.write(call.arguments)
        self.parts.append(b"\x81" if call.is_new else b"R")
        self._write_items(call.items)
        if call.state is not None:
            self.write(call.state)
            self.parts.append(b"b")

    def _write_items(self, items: list[tuple[Any, Any]]) -> None:
        if items:
            self.parts.append(b"(")
            for key, value in items:
                self.write(key)
                self.write(value)
            self.parts.append(b"u")

    def _write_int(self, value: int) -> None:
        if -(2**31) <= value < 2**31:
            self.parts.append(b"J" + struct.pack("<i", value))
            return
        data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
        # Python reads it with either length; torch knows the short one only.
        if len(data) < 256:
            self.parts.append(b"\x8a" + bytes([len(data)]) + data)
        else:
            self.parts.append(b"\x8b" + struct.pack("<i", len(data)) + data)

    def _write_text(self, text: str) -> None:
        is_shared = len(text) <= _MAX_SHARED_LENGTH
        if is_shared and self._is_known(text):
            return
        data = text.encode("utf-8", "surrogatepass")
        self.parts.append(b"X" + struct.pack("<I", len(data)) + data)
        if is_shared:
            self._remember(text)

    def _is_known(self, key: object) -> bool:
        """Push what was remembered under a key; False if nothing was."""
        number = self._number_of.get(key)
        if number is None:
            return False
        short = number < 256
        self.parts.append(
            b"h" + bytes([number]) if short else b"j" + struct.pack("<I", number)
        )
        return True

    def _remember(self, key: object) -> None:
        number = self._number_of[key] = len(self._number_of)
        short = number < 256
        self.parts.append(
            b"q" + bytes([number]) if short else b"r" + struct.pack("<I", number)
        )
