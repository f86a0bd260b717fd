"""Reading a log file, also while another process writes it.

Owns the way from a file of JSON lines to events: `read_events` for what is there, `follow_events`
for what comes. Promises to skip what is no event (a torn last line, zeros that a power failure
left, rubbish) without losing the events around it, and to need no lock and no writer.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from vsnapfs.errors import VsnapError
from vsnapfs.events.event import Event

_CHUNK = 256 * 1024  # bytes
_LONGEST = 4 * 1024 * 1024  # bytes; no line of ours comes near


def read_events(path: Path) -> list[Event]:
    """All events in the file, oldest first; none when there is no file.

    Raises VsnapError when it is there and cannot be read.
    """
    tail = _Tail(Path(path))
    try:
        return tail.read_new()
    finally:
        tail.close()


def follow_events(
    path: Path,
    stop: threading.Event | None = None,
    *,
    poll: float = 0.25,
    existing: bool = True,
) -> Iterator[Event]:
    """The events in the file, then each new one as it is written, for ever or until `stop` is set.

    The file need not exist yet, and may be replaced by another on the way or made shorter. Events
    written before `stop` was set are all delivered. poll: seconds between looks. existing: False
    leaves out what is in the file when this function is called. Raises VsnapError when the file
    cannot be read.
    """
    tail = _Tail(Path(path))
    if not existing:
        tail.read_new()
    return _follow(tail, stop, poll)


def _follow(tail: _Tail, stop: threading.Event | None, poll: float) -> Iterator[Event]:
    try:
        while True:
            # Asked before the look, so that the look finds all that was written before.
            last = stop is not None and stop.is_set()
            yield from tail.read_new()
            if last:
                return
            if stop is None:
                time.sleep(poll)
            else:
                stop.wait(poll)
    finally:
        tail.close()


class _Tail:
    """A place in a log file, and the part of a line that stands behind it."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self._fd = -1
        self._partial = b""

    def read_new(self) -> list[Event]:
        """The events since the last call."""
        try:
            events: list[Event] = []
            while self._open():
                events += self._read_to_end()
                if not self._is_replaced():
                    break
                self.close()
        except OSError as error:
            raise VsnapError(
                f"The event log {self.path} cannot be read: {error.strerror or error}.",
                hint="Run the command as the user who owns the volume, or as root.",
                code="events-unreadable",
                errno=error.errno or errno.EIO,
            ) from error
        return events

    def close(self) -> None:
        """Forget the place; the next look starts at the beginning of whatever is there."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1
        self._partial = b""

    def _open(self) -> bool:
        """Whether there is a file to read."""
        if self._fd >= 0:
            return True
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
        try:
            self._fd = os.open(self.path, flags)
        except (FileNotFoundError, NotADirectoryError):
            return False
        if not stat.S_ISREG(os.fstat(self._fd).st_mode):
            self.close()
            raise OSError("it is no regular file")
        return True

    def _read_to_end(self) -> list[Event]:
        events = []
        while chunk := os.read(self._fd, _CHUNK):
            *lines, self._partial = (self._partial + chunk).split(b"\n")
            events += [event for line in lines if (event := Event.from_line(line))]
            if len(self._partial) > _LONGEST:
                self._partial = b"?"  # never JSON, whatever follows: skipped up to its line feed
        # Without its line feed an event is whole or it is no JSON: only the line feed may be torn
        # off, or be on its way. What follows then is an empty line.
        if self._partial and (event := Event.from_line(self._partial)):
            events.append(event)
            self._partial = b""
        return events

    def _is_replaced(self) -> bool:
        """Whether the path names another file now, or the file has become shorter."""
        mine = os.fstat(self._fd)
        try:
            there = os.lstat(self.path)
        except OSError:
            return False  # between the old file and the new one: look again later
        place = os.lseek(self._fd, 0, os.SEEK_CUR)
        return not os.path.samestat(mine, there) or mine.st_size < place
