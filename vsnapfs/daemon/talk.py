"""One request through the control socket: the client's half of the protocol (see `control`).

Owns the connection's bytes. Promises: what the server has said before we hung up is never lost, so
`fate` is exact: the message that an operation has begun is either in our socket by then or could
not be put there, and then it does not begin (see `jobs`).
"""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from vsnapfs.daemon.control import encode

NOT_BEGUN = "had not begun, nothing was done"


class Talk:
    """One request through the socket, and what has been answered so far."""

    def __init__(self, connection: socket.socket, longest: int) -> None:
        self._connection = connection
        self._longest = longest
        self._buffer = bytearray()
        self.heard = False  # anything at all
        self.accepted = False
        self.tells_begin = False  # a server from before there was "begun" does not
        self.begun = False

    def request(self, op: str, params: Mapping[str, Any]) -> None:
        """Ask. ConnectionError, TimeoutError."""
        self._connection.sendall(encode({"op": op, "params": params}))

    def hang_up(self) -> None:
        """Let the server see that we are gone; what it has sent until now can still be read."""
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)

    def answers(self) -> Iterator[dict[str, Any]]:
        """Every answer until the end. ConnectionError, TimeoutError, ValueError."""
        looked = 0
        while True:
            end = self._buffer.find(b"\n", looked)
            if end < 0:
                looked = len(self._buffer)
                if looked > self._longest:
                    raise ValueError("an answer without an end")
                data = self._connection.recv(1 << 16)
                self._buffer += data
                if data:
                    continue
                if not self._buffer:
                    return
                end = len(self._buffer)
            line = bytes(self._buffer[:end])
            del self._buffer[: end + 1]
            looked = 0
            answer = _understand(line)
            self.heard = True
            self.accepted = self.accepted or "accepted" in answer
            self.tells_begin = self.tells_begin or answer.get("begins") is True
            self.begun = self.begun or answer.get("begun") is True
            yield answer

    def read_out(self) -> None:
        """After `hang_up`: everything that the server could still say."""
        with suppress(OSError, ValueError):
            for _ in self.answers():
                pass

    def fate(self, pid: int | None) -> str:
        """What becomes of the operation, now that we have hung up."""
        if self.begun:
            return f"has begun and goes on in the server ({numbered(pid)})"
        if self.accepted and not self.tells_begin:
            return f"may have begun, then it goes on in the server ({numbered(pid)})"
        return NOT_BEGUN


def numbered(pid: int | None) -> str:
    """Which process it is: the kernel does not tell of one outside this container."""
    return f"process {pid}" if pid else "a process outside this container"


def _understand(line: bytes) -> dict[str, Any]:
    """One answer. ValueError if it is none; whoever answers may be anybody's program."""
    try:
        answer = json.loads(line)
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if not isinstance(answer, dict) or not isinstance(answer.get("error", {}), dict):
        raise ValueError("an answer is an object")  # noqa: TRY004 - it is the value of a line
    told = answer.get("progress")
    if told and not (
        isinstance(told, list)
        and [type(part) for part in told] == [str, int, int]
        and all(0 <= part < 2**63 for part in told[1:])
    ):
        raise ValueError("progress is a phase and two numbers of bytes")
    return answer
