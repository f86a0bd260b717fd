"""A file as it would be: writes stay in memory, the file underneath is only read.

Owns what `repair --dry-run` needs to run everything that a real opening and repair would do, and
to leave no trace. It takes the place of a `Backing`; see there for what the methods promise.
"""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from ..backing import Backing, Buffer, Bytes, FileId, Identity

_PAGE = 4096


class Overlay:
    """Reads show what was written here; `below` (None: there is no file) never changes."""

    def __init__(self, path: Path, below: Backing | None) -> None:
        self.path = path
        self.is_device = below is not None and below.is_device
        self.is_concurrent = False
        self.tells_cached = below is not None and below.tells_cached
        self._below = below
        self._size = below.size() if below is not None else 0
        #: Where the bytes of `below` end: not beyond what has been cut off since.
        self._below_end = self._size
        self._pages: dict[int, bytearray] = {}

    def size(self) -> int:
        """See `Backing.size`."""
        return self._size

    def read(self, offset: int, length: int) -> Bytes:
        """See `Backing.read`."""
        if offset + length > self._size:
            raise OSError(errno.EIO, f"{self.path} ends before byte {offset + length}")
        if not self._pages and self._below is not None and offset + length <= self._below_end:
            return self._below.read(offset, length)
        data = bytearray()
        while len(data) < length:
            page, start = divmod(offset + len(data), _PAGE)
            data += self._page(page)[start : start + length - len(data)]
        return data

    def _page(self, page: int) -> bytes | bytearray:
        known = self._pages.get(page)
        if known is not None:
            return known
        there = self._below_end - page * _PAGE
        if self._below is None or there <= 0:
            return bytes(_PAGE)
        return bytes(self._below.read(page * _PAGE, min(_PAGE, there))).ljust(_PAGE, b"\0")

    def read_cached(self, offset: int, length: int) -> Bytes | None:
        """See `Backing.read_cached`."""
        if self._pages or self._below is None or offset + length > self._below_end:
            return None
        return self._below.read_cached(offset, length)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See `Backing.read_into`."""
        buffer[:] = self.read(offset, len(buffer))

    def read_into_cached(self, offset: int, buffer: Buffer) -> bool:
        """See `Backing.read_into_cached`."""
        if self._pages or self._below is None or offset + len(buffer) > self._below_end:
            return False
        return self._below.read_into_cached(offset, buffer)

    def prefetch(self, offset: int, length: int) -> None:
        """Nothing to do."""

    def begin_sync(self, offset: int, length: int) -> None:
        """Nothing to do."""

    def write(self, offset: int, data: Bytes) -> None:
        """Remember it."""
        view, done = memoryview(data), 0
        if self.is_device and offset + len(view) > self._size:
            raise OSError(errno.ENOSPC, f"{self.path} has only {self._size} bytes")
        while done < len(view):
            page, start = divmod(offset + done, _PAGE)
            part = view[done : done + _PAGE - start]
            if len(part) == _PAGE:  # What is below may be unreadable, and is not needed.
                self._pages[page] = bytearray(part)
            else:
                known = self._pages.setdefault(page, bytearray(self._page(page)))
                known[start : start + len(part)] = part
            done += len(part)
        self._size = max(self._size, offset + len(view))

    def allocate(self, offset: int, length: int) -> None:
        """See `Backing.allocate`; whether the host has the space is not asked."""
        if not self.is_device:
            self._size = max(self._size, offset + length)
        elif offset + length > self._size:
            raise OSError(errno.ENOSPC, f"{self.path} has only {self._size} bytes")

    def truncate(self, size: int) -> None:
        """See `Backing.truncate`."""
        if size < self._size:  # What comes after it once more will be zeros.
            keep, rest = divmod(size, _PAGE)
            self._pages = {page: data for page, data in self._pages.items() if page * _PAGE < size}
            if rest and keep in self._pages:
                self._pages[keep][rest:] = bytes(_PAGE - rest)
            self._below_end = min(self._below_end, size)
        self._size = size

    def has_hole(self, offset: int, length: int) -> bool:
        """See `Backing.has_hole`."""
        return self._below is None or self._below.has_hole(offset, length)

    def check_present(self) -> None:
        """See `Backing.check_present`."""
        if self._below is not None:
            self._below.check_present()

    def check_linked(self) -> None:
        """Nothing is lost with it."""

    def identity(self, *, durable: bool = True) -> Identity:
        """See `Backing.identity`."""
        below = self._below
        return below.identity(durable=durable) if below is not None else Identity(0, 0, 0, 0)

    def file_id(self) -> FileId:
        """See `Backing.file_id`."""
        return self._below.file_id() if self._below is not None else FileId(0, 0, 0)

    def sync(self) -> None:
        """Nothing to do."""

    def forget_cache(self) -> None:
        """Nothing to do."""

    def reopen(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Give up what is underneath."""
        if self._below is not None:
            self._below.close()


class NoLog:
    """An event log that forgets."""

    def __init__(self, _path: Path) -> None:
        pass

    def log(self, _source: str, _event_id: int, /, **params: Any) -> None:
        """See `core.Log`."""

    def log_flush_failure(self, **params: Any) -> None:
        """See `core.Log`."""

    def reset_flush_failures(self) -> None:
        """See `core.Log`."""

    def close(self) -> None:
        """See `EventLog.close`."""
