"""A disk with a volatile write cache, over NBD: a power failure may lose what was not flushed.

Owns: one raw image, the socket that QEMU connects to, and every write since the last flush. Killing
QEMU alone would lose what is in the guest's memory, but nothing that reached the virtual disk, as
if that had no cache. This one forgets: `cut` keeps of the unflushed writes an arbitrary part, in
whole or torn at a sector of 512 bytes, but always the writes with FUA and all before a flush.
Promises: a flush is answered only after everything answered before it is stable. Leaves to others:
damage of what was flushed (no disk that lies).
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import threading
from dataclasses import dataclass
from pathlib import Path

SECTOR = 512
_OPTION = struct.Struct(">QII")
_OPTION_REPLY = struct.Struct(">QIII")
_REQUEST = struct.Struct(">IHHQQI")
_REPLY = struct.Struct(">IIQ")
_OPTION_MAGIC = 0x49484156454F5054  # IHAVEOPT
_REPLY_MAGIC = 0x3E889045565A9
_EXPORT_NAME, _ABORT, _INFO, _GO = 1, 2, 6, 7
_READ, _WRITE, _DISCONNECT, _FLUSH = range(4)
_HAS_FLAGS, _SEND_FLUSH, _SEND_FUA = 1, 4, 8
_FUA = 1
_UNSUPPORTED = 0x80000001


@dataclass
class _Write:
    """One write since the last flush, and what it replaced."""

    offset: int
    old: bytes
    new: bytes
    fua: bool


@dataclass
class Cut:
    """What a power failure did: how many unflushed writes there were, and what became of them."""

    unflushed: int = 0
    kept: int = 0
    torn: int = 0
    lost: int = 0


@dataclass
class Traffic:
    """What the guest did with the disk since it was opened."""

    writes: int = 0
    flushes: int = 0
    fua: int = 0


class VolatileDisk:
    """Serves `image` on the Unix socket `path`, to one client at a time, until closed."""

    def __init__(self, image: Path, path: Path) -> None:
        self.traffic = Traffic()
        self.error: BaseException | None = None
        self._fd = os.open(image, os.O_RDWR | os.O_CLOEXEC)
        self._size = os.fstat(self._fd).st_size
        self._unflushed: list[_Write] = []
        self.tripped = threading.Event()
        self._trip_after: int | None = None
        self._trip_at = 0
        self._closing = False
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self.url = f"nbd+unix:///?socket={path}"
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    # -- the protocol

    def _serve(self) -> None:
        try:
            while True:
                connection, _ = self._listener.accept()
                with connection, contextlib.suppress(EOFError, ConnectionError):
                    if self._greet(connection):
                        self._answer(connection)
        except OSError as error:
            if not self._closing:
                self.error = error
        except BaseException as error:  # noqa: BLE001 - told to whoever asks for a cut
            self.error = error

    def _export(self) -> bytes:
        return struct.pack(">QH", self._size, _HAS_FLAGS | _SEND_FLUSH | _SEND_FUA)

    def _greet(self, connection: socket.socket) -> bool:
        connection.sendall(struct.pack(">QQH", 0x4E42444D41474943, _OPTION_MAGIC, 3))
        _receive(connection, 4)
        while True:
            magic, option, length = _OPTION.unpack(_receive(connection, _OPTION.size))
            if magic != _OPTION_MAGIC or length > 4096:
                raise EOFError
            _receive(connection, length)

            def reply(kind: int, data: bytes = b"", option: int = option) -> None:
                header = _OPTION_REPLY.pack(_REPLY_MAGIC, option, kind, len(data))
                connection.sendall(header + data)

            if option == _EXPORT_NAME:
                connection.sendall(self._export())
                return True
            if option in {_GO, _INFO}:
                reply(3, struct.pack(">H", 0) + self._export())
                reply(1)
                if option == _GO:
                    return True
            elif option == _ABORT:
                reply(1)
                return False
            else:
                reply(_UNSUPPORTED)

    def _answer(self, connection: socket.socket) -> None:
        while True:
            header = _receive(connection, _REQUEST.size)
            magic, flags, kind, handle, offset, length = _REQUEST.unpack(header)
            if magic != 0x25609513 or kind == _DISCONNECT:
                return
            data = b""
            if kind == _READ:
                data = os.pread(self._fd, length, offset)
            elif kind == _WRITE and self._trips():
                self.tripped.set()
                # Not answered any more; ends when the client is killed.
                while connection.recv(1 << 16):
                    pass
                return
            elif kind == _WRITE:
                self._write(offset, _receive(connection, length), fua=bool(flags & _FUA))
            elif kind == _FLUSH:
                self.traffic.flushes += 1
                self._unflushed.clear()
            else:
                raise EOFError
            connection.sendall(_REPLY.pack(0x67446698, 0, handle) + data)

    def _write(self, offset: int, data: bytes, *, fua: bool) -> None:
        self.traffic.writes += 1
        self.traffic.fua += fua
        old = os.pread(self._fd, len(data), offset)
        self._unflushed.append(_Write(offset, old, data, fua))
        os.pwrite(self._fd, data, offset)

    # -- the power fails

    def trip(self, writes: int, unflushed: int) -> None:
        """Freeze, and set `tripped`, after so many more writes, when so many are unflushed."""
        self._trip_after, self._trip_at = writes, unflushed

    def _trips(self) -> bool:
        if self._trip_after is None:
            return False
        self._trip_after -= 1
        return self._trip_after <= 0 and len(self._unflushed) >= self._trip_at

    def cut(self, rng: random.Random) -> Cut:
        """Lose an arbitrary part of what was not flushed. Only when the client is dead."""
        self.close()
        if self.error is not None:
            raise RuntimeError("the disk itself failed") from self.error
        writes, self._unflushed = self._unflushed, []
        found = Cut(len(writes))
        for write in reversed(writes):
            os.pwrite(self._fd, write.old, write.offset)
        # Sometimes all is lost or kept, sometimes nearly all, sometimes anything.
        keep = rng.choice((0.0, 0.05, 0.5, 0.5, 0.95, 1.0))
        tear = rng.choice((0.0, 0.2)) if 0 < keep < 1 else 0.0
        for write in writes:
            if write.fua:
                data, offset = write.new, write.offset
                found.kept += 1
            elif rng.random() < tear and len(write.new) > SECTOR:
                at = rng.randrange(SECTOR, len(write.new), SECTOR)
                first = rng.random() < 0.5
                data = write.new[:at] if first else write.new[at:]
                offset = write.offset + (0 if first else at)
                found.torn += 1
            elif rng.random() < keep:
                data, offset = write.new, write.offset
                found.kept += 1
            else:
                found.lost += 1
                continue
            os.pwrite(self._fd, data, offset)
        os.close(self._fd)
        self._fd = -1
        return found

    def close(self) -> None:
        """Stop serving; everything that was written stays."""
        if self._listener.fileno() >= 0:
            self._closing = True
            # A thread in accept() does not notice close(), but shutdown().
            self._listener.shutdown(socket.SHUT_RDWR)
            path = self._listener.getsockname()
            self._listener.close()
            self._thread.join(30)
            os.unlink(path)


def _receive(connection: socket.socket, length: int) -> bytes:
    data = bytearray()
    while len(data) < length:
        part = connection.recv(length - len(data))
        if not part:
            raise EOFError
        data += part
    return bytes(data)
