"""The event log of a volume: a file of JSON lines that only ever grows.

Owns writing `events.jsonl`. Promises:

* An event is in the file when `log` returns (a SIGKILL cannot take it back); one of level Error
  is synced as well.
* A full host can still be reported: at least 1 MiB is kept allocated ahead of the end of the file.
* A failing log never fails the engine: the failure is remembered in `failed`, said once on stderr
  through `logging`, and what could not be written is kept in memory and written, in order, as
  soon as the file takes it.
* A torn last line harms only itself: the next event starts on a fresh line.
* All methods may be called from any thread.

One process writes a log at a time (the volume's lock sees to that); any number may read it, see
`reader`. Leaves the meaning of events to `catalog` and their wording to `render`.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import stat
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from vsnapfs.belonging import open_or_make
from vsnapfs.events.catalog import lookup
from vsnapfs.events.event import Event, Level, plain_params
from vsnapfs.events.reader import follow_events, read_events

_logger = logging.getLogger(__name__)

RESERVE = 1024 * 1024
"""Bytes kept allocated ahead of the end of the file; several thousand events."""

_RESERVE_STEP = 256 * 1024  # bytes allocated beyond RESERVE, so that not every event allocates
_BACKLOG = 1024  # events kept in memory while the file takes none; the oldest go first
_FALLOC_FL_KEEP_SIZE = 1


class EventLog:
    """The events of one volume, in the file `path`, created (0600) when it is missing.

    failed: the first failure to write the file, None if there was none. Never raises OSError
    except from `events` and `follow`, which read.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path).absolute()  # a daemon changes its directory, and we open it again
        self.failed: OSError | None = None
        self._lock = threading.Lock()
        self._fd = -1
        self._closed = False
        self._end = 0  # of the file, as last seen
        self._reserved_end = 0
        self._backlog: deque[tuple[bytes, bool]] = deque(maxlen=_BACKLOG)
        self._lost = 0
        self._subscribers: list[Callable[[Event], None]] = []
        self._flush_failures = 0
        self._flush_volume: object = None
        with self._lock:
            trouble = self._write_backlog()
        self._warn(trouble)

    def log(self, source: str, event_id: int, /, **params: Any) -> Event:
        """Append an event with the level its catalog entry has, and tell the subscribers.

        params: any of the names `catalog` lists, in any plain type; None means unknown.
        An id that the catalog lacks is a mistake in the program: logged as a Warning all the same.
        Takes microseconds; an event of level Error waits for the disk, since it is synced.
        """
        entry = lookup(source, event_id)
        if entry is None:
            _logger.warning("event %s %s is not in the catalog", source, event_id)
        level = entry.level if entry else Level.WARNING
        event = Event(time.time_ns(), str(source), int(event_id), level, plain_params(params))
        line = event.to_line()
        with self._lock:
            self._lost += len(self._backlog) == _BACKLOG
            self._backlog.append((line, level is Level.ERROR))
            trouble = self._write_backlog()
            subscribers = tuple(self._subscribers)
        # Outside the lock: a subscriber, or a handler of `logging`, may log an event itself.
        self._warn(trouble)
        for callback in subscribers:
            try:
                callback(event)
            except Exception:
                _logger.exception("a subscriber of the event log failed")
        return event

    @property
    def unwritten(self) -> int:
        """How many events are not in the file: waiting for it, or given up after too many."""
        with self._lock:
            return len(self._backlog) + self._lost

    def log_flush_failure(
        self, *, volume: object = None, device: object = None, reason: object = None
    ) -> Event | None:
        """A flush failed: the first since the volume was online is logged as Ntfs 140.

        Later ones are only counted and give None, so that a file system that keeps trying does
        not bury the event that matters.
        """
        with self._lock:
            self._flush_failures += 1
            self._flush_volume = volume
            first = self._flush_failures == 1
        if not first:
            return None
        return self.log("Microsoft-Windows-Ntfs", 140, volume=volume, device=device, reason=reason)

    @property
    def flush_failures(self) -> int:
        """How many flushes failed since the volume was last online, the logged one included.

        Never waits: a write to the file may hang, with the lock held, and `status` asks for this.
        """
        return self._flush_failures

    def reset_flush_failures(self) -> int:
        """The volume is online again: the next failing flush is news. Returns the repeats.

        If flushes failed after the one that was logged, their number is written as vsnapfs 1023:
        a second 140 would read like a flush that failed now.
        """
        with self._lock:
            repeats = max(0, self._flush_failures - 1)
            volume = self._flush_volume
            self._flush_failures = 0
        if repeats:
            self.log("vsnapfs", 1023, volume=volume, repeats=repeats)
        return repeats

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` with each later event, in the thread that logs it.

        Returns a function that ends the subscription. What the callback raises is logged, not
        passed on. Events of two threads at once may arrive in either order.
        """
        with self._lock:
            self._subscribers.append(callback)

        def unsubscribe() -> None:
            with self._lock:
                if callback in self._subscribers:
                    self._subscribers.remove(callback)

        return unsubscribe

    def events(self) -> list[Event]:
        """All events, oldest first: those of the file, then those it has not taken yet.

        Raises VsnapError when the file is there and cannot be read.
        """
        with self._lock:
            waiting = [Event.from_line(line) for line, _ in self._backlog]
            written = read_events(self.path)
        return written + [event for event in waiting if event]

    def follow(self, stop: threading.Event | None = None, *, poll: float = 0.25) -> Iterator[Event]:
        """All events of the file, then each new one until `stop` is set; see `follow_events`."""
        return follow_events(self.path, stop, poll=poll)

    def close(self) -> None:
        """Count off the repeats of 140, write what waits, close the file. May be repeated.

        The allocated space stays, for the next process. An event logged later still gets into
        the file.
        """
        self.reset_flush_failures()
        with self._lock:
            self._closed = True
            trouble = self._write_backlog()
            self._close_file()
        self._warn(trouble)

    # The rest runs with self._lock held, but for _warn.

    def _write_backlog(self) -> OSError | None:
        """Write what waits, oldest first. Returns the failure that is to be told, if any."""
        try:
            self._open_file()
            unsynced = False
            while self._backlog:
                line, must_sync = self._backlog[0]
                self._append(line)
                self._backlog.popleft()
                unsynced |= must_sync
            if unsynced:
                os.fdatasync(self._fd)
            self._keep_reserve()
        except OSError as error:
            if self.failed is None:
                self.failed = error
                return error
        finally:
            if self._closed:
                self._close_file()
        return None

    def _open_file(self) -> None:
        """Open the file unless it is open; open it anew when the path names another by now."""
        if self._fd >= 0 and _names(self.path, self._fd):
            return
        try:
            fd = self._open_path()
        except OSError:
            if self._fd >= 0 and os.fstat(self._fd).st_nlink:
                return  # its directory is out of sight (moved, unmounted lazily), it is still there
            raise
        self._close_file()
        self._fd = fd
        self._end = self._reserved_end = 0
        self._keep_reserve()
        if not os.fstat(fd).st_size:
            _sync_directory(self.path.parent)

    def _open_path(self) -> int:
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC
        # O_NONBLOCK: whatever stands there instead of a file must not keep the engine waiting.
        fd = open_or_make(self.path, flags | os.O_NONBLOCK)
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            os.close(fd)
            raise OSError(errno.EINVAL, "not a regular file", str(self.path))
        return fd

    def _append(self, line: bytes) -> None:
        """Write `line` at the end, on a line of its own."""
        size = os.fstat(self._fd).st_size
        # Looked at each time, not remembered: also our own last write may have stopped half-way.
        if size and os.pread(self._fd, 1, size - 1) != b"\n":
            line = b"\n" + line
        rest = memoryview(line)
        while rest:
            rest = rest[os.write(self._fd, rest) :]

    def _keep_reserve(self) -> None:
        """Allocate ahead of the end. A refusal is no failure: the next event tries again."""
        size = os.fstat(self._fd).st_size
        if size < self._end:
            self._reserved_end = 0  # somebody emptied the file, which frees what was allocated
        self._end = size
        if self._reserved_end >= size + RESERVE:
            return
        for ahead in (RESERVE + _RESERVE_STEP, RESERVE):
            refused = _fallocate_keep_size(self._fd, size, ahead)
            if not refused:
                self._reserved_end = size + ahead
                return
            if refused != errno.ENOSPC:
                return

    def _close_file(self) -> None:
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            # A network or FUSE file system may refuse; the descriptor is gone all the same.
            with suppress(OSError):
                os.close(fd)

    def _warn(self, trouble: OSError | None) -> None:
        """Say once that the log cannot be written. Without the lock, see `log`."""
        if trouble is not None:
            _logger.warning("cannot write the event log %s: %s", self.path, trouble)


def _names(path: Path, fd: int) -> bool:
    """Whether `path` still names the open file, which may have been deleted or rotated away."""
    try:
        return os.path.samestat(os.lstat(path), os.fstat(fd))
    except OSError:
        return False


def _sync_directory(directory: Path) -> None:
    """Make the name of a new file durable. Best effort: not every file system lets one."""
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError:
        return
    try:
        os.fsync(fd)
    except OSError:
        pass
    finally:
        os.close(fd)


def _fallocate_keep_size(fd: int, offset: int, length: int) -> int:
    """fallocate(2) that leaves the file's size alone. Returns 0 or the errno.

    Called directly: Python only has posix_fallocate, which changes the size and, where the host
    cannot allocate, writes zeros instead.
    """
    if _libc_fallocate is None:
        return errno.ENOSYS
    while True:
        if _libc_fallocate(fd, _FALLOC_FL_KEEP_SIZE, offset, length) == 0:
            return 0
        failure = ctypes.get_errno()
        if failure != errno.EINTR:
            return failure


def _find_fallocate() -> Any:
    """The C library's fallocate with 64-bit offsets, None where there is none."""
    libc = ctypes.CDLL(None, use_errno=True)
    # glibc has both; on 32-bit machines only fallocate64 takes 64-bit offsets. musl: fallocate.
    function = getattr(libc, "fallocate64", None) or getattr(libc, "fallocate", None)
    if function is not None:
        function.restype = ctypes.c_int
        function.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
    return function


_libc_fallocate = _find_fallocate()
