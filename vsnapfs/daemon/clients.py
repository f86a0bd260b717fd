"""The clients of the control socket: how many there may be, and who gives way to whom.

Owns the count. Promises: whatever number of connections is held, a newcomer's `status` and `stop`
are answered, and memory stays bounded.

* Up to MAX_CLIENTS are served in full. Above that, a newcomer takes the place of the one that has
  been without a request for longest; that one is told so.
* If all have a request under way, the newcomer is a *guest*: its first request is read, and
  answered if it is one of ALWAYS. Guests are at most MAX_GUESTS; the longest waiting one without a
  request gives way, too. `status` is answered at once and there are at most MAX_STOPS of `stop`, so
  there always is such a one, or room.
"""

from __future__ import annotations

import os
import select
import socket
import struct

import trio

from vsnapfs.errors import VsnapError

MAX_CLIENTS = 64
MAX_GUESTS = 32
MAX_STOPS = 16
ALWAYS = ("status", "stop")


class Client:
    """One connection. quiet_since: when it was last owed an answer; None while it is owed one."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.socket: int = stream.socket.fileno()
        self.buffer = bytearray()
        self.scope = trio.CancelScope()
        self.quiet_since: float | None = trio.current_time()
        self.is_guest = False

    def has_said_something(self) -> bool:
        """Whether bytes of it wait to be read (or its end does, and it leaves by itself)."""
        poll = select.poll()
        poll.register(self.socket, select.POLLIN)
        return bool(poll.poll(0))

    def give_way(self, farewell: bytes) -> None:
        """Tell it, if it can be told at once, and end its connection."""
        try:
            os.write(self.socket, farewell)
        except OSError:
            pass  # it does not read, or has gone
        self.quiet_since = None
        self.scope.cancel()


class Clients:
    """All connections. farewell: what is sent to the one that gives way."""

    def __init__(self, farewell: bytes) -> None:
        self._farewell = farewell
        self._all: dict[Client, None] = {}  # an ordered set

    def admit(self, client: Client, *, short: bool = False) -> bool:
        """Count a newcomer in, perhaps in the place of another; False if there is none for it."""
        for is_guest, most in ((False, MAX_CLIENTS), (True, MAX_GUESTS)):
            same = [other for other in self._all if other.is_guest is is_guest]
            is_full = len(same) >= most
            if is_full or short:
                other = _longest_quiet(same)
                if other is not None:
                    other.give_way(self._farewell)
                    self.leave(other)
                elif is_full or not is_guest:
                    continue
            client.is_guest = is_guest
            self._all[client] = None
            return True
        return False

    def leave(self, client: Client) -> None:
        """Harmless if it has left."""
        self._all.pop(client, None)


def _longest_quiet(clients: list[Client]) -> Client | None:
    quiet = sorted(
        (client.quiet_since, number)
        for number, client in enumerate(clients)
        if client.quiet_since is not None and not client.has_said_something()
    )
    return clients[quiet[0][1]] if quiet else None


def may_ask(connection: socket.socket | trio.socket.SocketType) -> bool:
    """Whether whoever connected is root or our own user, by the kernel's word."""
    raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return struct.unpack("3i", raw)[1] in (0, os.geteuid())


def too_many() -> VsnapError:
    """The error of whoever finds no place, or must give it up."""
    return VsnapError(
        "too many clients at once",
        hint="`vsnapfs status` shows what they wait for; it is always answered.",
        errno=16,
        code="too-many",
    )
