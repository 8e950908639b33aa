"""One connection between two ranks: small messages, whole or not at all."""

from __future__ import annotations

import os
import socket
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from distckpt import strict_json

Message = dict[str, Any]

_MAX_MESSAGE_BYTES = 64 * 1024
_CONNECT_SECONDS = 5.0
_WELCOME = b"\n"
# Seconds of silence, seconds between probes, number of probes.
_KEEPALIVE = (("TCP_KEEPIDLE", 60), ("TCP_KEEPINTVL", 20), ("TCP_KEEPCNT", 9))


class Address(NamedTuple):
    """Where somebody listens.

    Attributes:
        hosts: Names and numbers of the machine, likeliest first.
        port: TCP port.
        token: Whoever connects must know it.
    """

    hosts: tuple[str, ...]
    port: int
    token: str


class Line:
    """One connection: messages are JSON objects, one a line. Never blocks."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        connection.setblocking(False)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # A machine that lost its power closes nothing, and firewalls forget connections
        # that are idle between two saves.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEPALIVE:
            if hasattr(socket, option):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)
        self._lock = threading.Lock()
        self._received = b""
        close_in_children(connection)

    def fileno(self) -> int:
        """Return the descriptor, to be waited for."""
        return self._socket.fileno()

    def welcome(self) -> None:
        """Tell the one who connected that it is known from now on."""
        self._send(_WELCOME)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. Nothing is said if the other side is gone: reading tells."""
        self._send(_encode(message))

    def _send(self, data: bytes) -> None:
        with self._lock, suppress(OSError):
            if self._socket.send(data) < len(data):
                # It has not read for very long; half a message would garble the next.
                self._socket.shutdown(socket.SHUT_RDWR)

    def receive(self) -> list[Message] | None:
        """Return the messages that have arrived; None at the end of the connection."""
        try:
            data = self._socket.recv(_MAX_MESSAGE_BYTES)
        except (BlockingIOError, InterruptedError):
            return []
        except OSError:
            return None
        *complete, self._received = (self._received + data).split(b"\n")
        if not data or len(self._received) > _MAX_MESSAGE_BYTES:
            return None
        try:
            messages = [strict_json.loads(text) for text in complete]
        except strict_json.JsonError:
            return None
        return messages if all(isinstance(m, dict) for m in messages) else None

    def close(self) -> None:
        """Close the connection; the other side will see its end."""
        with self._lock:
            self._socket.close()


def connect(address: Address, introduction: Mapping[str, Any]) -> Line:
    """Connect to the first host that answers, and say who this is.

    Raises:
        OSError: None can be reached; says what was tried.
    """
    errors = []
    for host in address.hosts:
        try:
            connection = socket.create_connection((host, address.port), _CONNECT_SECONDS)
        except OSError as error:
            errors.append(f"{host}: {error}")
            continue
        try:
            connection.sendall(_encode({**introduction, "token": address.token}))
            if connection.recv(1) == _WELCOME:
                return Line(connection)
            errors.append(f"{host}: something else listens there")
        except OSError as error:
            errors.append(f"{host}: {error}")
        connection.close()
    msg = f"port {address.port} cannot be reached ({'; '.join(errors)})"
    raise OSError(msg)


def listen(backlog: int) -> socket.socket:
    """Listen on all of this machine's addresses, on a port that is free."""
    if socket.has_dualstack_ipv6():
        with suppress(OSError):  # compiled in, but switched off
            return socket.create_server(
                ("", 0), family=socket.AF_INET6, backlog=backlog, dualstack_ipv6=True
            )
    return socket.create_server(("", 0), backlog=backlog)


def hosts_of_this_machine() -> tuple[str, ...]:
    """List the addresses under which other ranks may reach this machine."""
    hosts: list[Any] = []
    master = os.environ.get("MASTER_ADDR")
    if master:
        if os.environ.get("RANK") == "0":
            hosts.append(master)
        with suppress(OSError):
            family, kind, _, _, target = socket.getaddrinfo(
                master, 9, type=socket.SOCK_DGRAM
            )[0]
            with socket.socket(family, kind) as probe:
                # Sends nothing; tells which of our addresses faces the other ranks.
                probe.connect(target)
                hosts.append(probe.getsockname()[0])
    name = socket.gethostname()
    with suppress(OSError):
        own = [str(info[4][0]) for info in socket.getaddrinfo(name, None)]
        # A name often stands for the loopback device in its own machine's files.
        hosts += [host for host in own if not host.startswith(("127.", "::1"))]
    # That one last: on another machine something else may listen there.
    return tuple(dict.fromkeys([*hosts, name, "127.0.0.1"]))


def _encode(message: Mapping[str, Any]) -> bytes:
    return strict_json.dumps(message).encode() + b"\n"


_closed_in_children: weakref.WeakSet[socket.socket] = weakref.WeakSet()


def close_in_children(connection: socket.socket) -> None:
    """Let forked children not keep a socket: it must close when this process ends.

    A data loader's workers outlive a killed rank by seconds.
    """
    _closed_in_children.add(connection)


def _close_in_child() -> None:
    for connection in list(_closed_in_children):
        connection.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
