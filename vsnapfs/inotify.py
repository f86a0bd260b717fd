"""inotify(7): which of some open files somebody opens, and closes after writing.

Owns the descriptor. There is no library for it that we depend on, so it is three calls through
ctypes. A watch belongs to the inode: it sees openings by whatever name, hard links included.
Leaves what they mean to `volume.onlookers`.
"""

from __future__ import annotations

import ctypes
import os
import struct

OPENED = 0x00000020  # IN_OPEN, for whatever: reading too
WRITTEN = 0x00000008  # IN_CLOSE_WRITE: the last descriptor of an opening for writing is closed
OVERFLOW = 0x00004000  # IN_Q_OVERFLOW

_EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name behind it
_READ = 64 << 10

_libc = ctypes.CDLL(None, use_errno=True)


class Inotify:
    """Watches for openings and closings. OSError where the machine has no more of them to give."""

    def __init__(self) -> None:
        self._fd = _checked(_libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC))

    def fileno(self) -> int:
        """To wait until there is something to read."""
        return self._fd

    def add(self, fd: int) -> int:
        """Watch the file that is open as `fd`; the number its events carry. OSError."""
        name = f"/proc/self/fd/{fd}".encode()  # This very file, whatever its path leads to now.
        return _checked(_libc.inotify_add_watch(self._fd, name, OPENED | WRITTEN))

    def read(self) -> list[tuple[int, int]]:
        """(watch, mask) of what has happened since, oldest first; neighbours alike are one.

        Openings for reading alone are all alike, so they never fill the kernel's queue.
        """
        events: list[tuple[int, int]] = []
        while True:
            try:
                data = os.read(self._fd, _READ)
            except BlockingIOError:
                return events
            offset = 0
            while offset < len(data):
                watch, mask, _, length = _EVENT.unpack_from(data, offset)
                events.append((watch, mask))
                offset += _EVENT.size + length

    def close(self) -> None:
        """End all watches. May be called twice."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _checked(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
