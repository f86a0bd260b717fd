"""An operation under way, as the control socket sees it, and when it can no longer be dropped.

    accepted ──▶ waiting ── begin ──▶ begun ──▶ done
        └── its client goes: dropped      its client goes: it runs to its end

Promises: an operation that has not begun when its client goes is never carried out; and both sides
know which it was. For that, `begin` puts the message {"begun": true} into the client's socket
itself, at once, and only if that succeeds the operation begins. A client that gives up shuts its
socket down first and then reads what is in there: the kernel does either the one or the other
first, so either the message is there, or it could not be put there.

Who has gone: on a Unix socket POLLHUP, which the kernel reports once the other end is closed, or
shut down both ways. One that has only said that it will not send any more (`printf … | socat`)
waits for its answer and has not gone.
"""

from __future__ import annotations

import os
import select
from typing import Any

import trio

from vsnapfs.beginning import Abandoned
from vsnapfs.daemon.operations import Operation

_BEGUN = b'{"begun": true}\n'


class Job:
    """An operation under way: what its connection needs to know of it."""

    def __init__(self, operation: Operation, socket: int) -> None:
        self.operation = operation
        self.scope = trio.CancelScope()
        self.done = trio.Event()
        self.answer: dict[str, Any] = {}
        self.latest: tuple[str, int, int] | None = None
        self.begun = False
        self.dropped = False
        self._socket: int | None = socket

    def begin(self) -> bool:
        """Whether the operation may begin. After a yes it is not dropped any more."""
        if not self.begun and not self.dropped:
            self.begun = self._say_begun()
            self.dropped = not self.begun
        return self.begun

    def drop(self) -> None:
        """Nobody waits for it any more, or nothing is to begin any more."""
        if not self.begun:
            self.dropped = True
            self.scope.cancel()

    def client_is_gone(self) -> None:
        """Its connection ends. The number of the socket may be somebody else's from now on."""
        self._socket = None
        self.drop()

    @property
    def has_no_client(self) -> bool:
        """Whether it has been left alone."""
        return self._socket is None

    def report(self, phase: str, done: int, total: int) -> None:
        """The progress callback, in any thread. Abandoned ends a long look before it begins."""
        if self.dropped:
            raise Abandoned
        self.latest = (phase, done, total)

    def _say_begun(self) -> bool:
        if self._socket is None:
            return False
        try:
            # The socket does not block. So short a message goes out whole or not at all, and before
            # the operation was accepted there was room for thousands: who has none left has not
            # read for minutes.
            return os.write(self._socket, _BEGUN) == len(_BEGUN)
        except OSError:
            return False


def has_gone(socket: int) -> bool:
    """Whether the other end of a Unix socket is closed, or shut down both ways."""
    poll = select.poll()
    poll.register(socket, 0)  # POLLHUP and POLLERR are always told
    return bool(poll.poll(0))


async def gone(socket: int) -> None:
    """Return when `has_gone`."""
    # trio can wait for reading and writing only, and what is half-closed is readable for ever.
    try:
        watch = select.epoll()
    except OSError:  # no descriptor is left for it
        while not has_gone(socket):  # noqa: ASYNC110 - as good as it gets then
            await trio.sleep(1.0)
        return
    with watch:
        watch.register(socket, 0)
        await trio.lowlevel.wait_readable(watch.fileno())
