"""Answers on the control socket while the server's own thread hangs in its host.

The trio thread does short I/O by itself: a write to a block that has its copy, a line of the event
log. On a host that does not answer (a frozen file system, a dying disk) it stands still in the
kernel, and with it everything it serves. A thread of its own then takes the new connections.

Promises: `status` is answered from memory, and says that the host hangs; everything else is told
so before the client's patience ends, and that nothing was done, unless the loop moves again: then
the client is let go and asks anew. As long as the loop shows life, this thread takes nothing.
Bounded: at most MAX_CONNECTIONS at a time, none of which can hold up another. Without a free
descriptor a newcomer gets one of a few kept for that, then that of whoever has waited longest.
"""

from __future__ import annotations

import json
import logging
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import trio

from vsnapfs.daemon.accepting import Reserve
from vsnapfs.daemon.clients import may_ask
from vsnapfs.daemon.process import raise_file_limit
from vsnapfs.errors import VsnapError

_logger = logging.getLogger("vsnapfs.daemon")

STUCK_SECONDS = 3.0  # without a sign of life from the loop it counts as hanging
PATIENCE_SECONDS = 20.0  # so long a request waits for it to move again; less than clients wait
MAX_CONNECTIONS = 64
SHORTAGE_SECONDS = 0.1  # between two attempts without a descriptor for a newcomer
_SPARE = 4  # descriptors for newcomers, when there are no others
_MAX_REQUEST = 64 * 1024
_WHAT = "the host, in which the server's own thread hangs"


class _Caller:
    """A connection, what it has said, and when it is told that it waits in vain."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.said = bytearray()
        self.deadline = time.monotonic() + PATIENCE_SECONDS
        self.has_asked = False

    def send(self, message: dict[str, Any]) -> None:
        with suppress(OSError):  # it has gone, or does not read
            self.connection.send(json.dumps(message).encode("ascii") + b"\n")


class Standby:
    """See the module. status: what `status` says, callable in any thread."""

    def __init__(self, listener: socket.socket, status: Callable[[], dict[str, Any]]) -> None:
        self._listener = listener.dup()  # not blocking, like the original
        self._status = status
        self._spare = Reserve(_SPARE)  # of its own: the loop's is the loop's
        self._spare.fill()
        self._stopping = threading.Event()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread = threading.Thread(target=self._run, name="standby", daemon=True)
        self._alive = threading.Event()
        self._callers: dict[int, _Caller] = {}
        self._since = 0.0

    def start(self, token: trio.lowlevel.TrioToken) -> None:
        """Watch the loop of this token from now on."""
        self._token = token
        try:
            self._thread.start()
        except RuntimeError as error:  # As many as may be (pids.max, RLIMIT_NPROC).
            _logger.warning("nobody will stand in while the host hangs: %s", error)

    def stop(self) -> None:
        """End. In the trio thread, which does not hang then."""
        self._stopping.set()
        self._alive.set()
        os.eventfd_write(self._wake, 1)
        if self._thread.ident is not None:
            self._thread.join()
        self._listener.close()
        self._spare.close()
        os.close(self._wake)

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        poll.register(self._wake, select.POLLIN)
        while not self._stopping.is_set():
            self._look(poll)
            # Somebody knocks. If the loop lives, it opens.
            self._alive = alive = threading.Event()
            self._since = time.monotonic()
            if self._stopping.is_set():
                return
            try:
                self._token.run_sync_soon(alive.set)
            except trio.RunFinishedError:
                return
            if not alive.wait(STUCK_SECONDS):
                self._stand_in(alive)
            self._stopping.wait(0.05)  # it may be about to accept what is still to be seen here

    # -- standing in ------------------------------------------------------------------------------

    def _stand_in(self, alive: threading.Event) -> None:
        try:
            while not alive.is_set():
                self._one_round()
        finally:
            while self._callers:
                self._let_go(next(iter(self._callers)))

    def _one_round(self) -> None:
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        for number, caller in self._callers.items():
            poll.register(number, 0 if caller.has_asked else select.POLLIN)
        for number in self._look(poll, 250):
            if number == self._listener.fileno():
                self._accept()
            else:
                self._hear(number)
        now = time.monotonic()
        for number, caller in list(self._callers.items()):
            if now > caller.deadline:
                caller.send({"error": self._hangs().to_json(), "begun": False})
                self._let_go(number)

    def _look(self, poll: select.poll, milliseconds: int | None = None) -> list[int]:
        """The descriptors at which there is something. poll(2) refuses more than may be open."""
        try:
            return [number for number, _ in poll.poll(milliseconds)]
        except OSError:
            raise_file_limit()
            self._alive.wait(SHORTAGE_SECONDS)
            return []

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return  # the loop was faster
        except OSError:
            # No descriptor is left for it, and it goes on knocking.
            raise_file_limit()
            if not self._spare.give_up_one() and self._callers:
                self._let_go(next(iter(self._callers)))
            self._alive.wait(SHORTAGE_SECONDS)
            return
        connection.setblocking(False)
        if not may_ask(connection):
            connection.close()
            return
        if len(self._callers) >= MAX_CONNECTIONS:
            self._let_go(next(iter(self._callers)))
        self._callers[connection.fileno()] = _Caller(connection)

    def _hear(self, number: int) -> None:
        caller = self._callers.get(number)
        if caller is None:
            return  # it has just had to give way
        try:
            data = b"" if caller.has_asked else caller.connection.recv(_MAX_REQUEST)
        except OSError:
            data = b""
        caller.said += data
        line, newline, _ = bytes(caller.said).partition(b"\n")
        if not newline and data and len(line) <= _MAX_REQUEST:
            return
        if caller.has_asked or not line:
            self._let_go(number)  # it has gone
            return
        caller.has_asked = True
        if _operation(line) == "status":
            self._tell_status(caller)
            self._let_go(number)
            return
        caller.send({"waiting": f"{_WHAT} (for {time.monotonic() - self._since:.0f} s)"})

    def _tell_status(self, caller: _Caller) -> None:
        seconds = time.monotonic() - self._since
        try:
            status = self._status()
            waits = status["operations"]["waits_for"]
            since = time.gmtime(time.time() - seconds)
            text = time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", since)
            waits.append({"what": _WHAT, "since": text, "seconds": round(seconds, 3)})
        except Exception:  # noqa: BLE001 - it reads what others may be changing just now
            caller.send({"error": self._hangs().to_json(), "begun": False})
        else:
            caller.send({"accepted": "status"})
            caller.send({"result": status})

    def _hangs(self) -> VsnapError:
        return VsnapError(
            f"the process that serves this volume ({os.getpid()}) hangs in its host, for "
            f"{time.monotonic() - self._since:.0f} s now",
            hint="Nothing was done. Look for a frozen file system or a disk that does not answer "
            "(dmesg); the volume goes on as soon as its host does.",
            errno=110,
            code="host-hangs",
        )

    def _let_go(self, number: int) -> None:
        self._callers.pop(number).connection.close()
        self._spare.fill()


def _operation(line: bytes) -> object:
    try:
        request = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return request.get("op") if isinstance(request, dict) else None
