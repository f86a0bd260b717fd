"""Handles: what an open file of the mounted tree is to the engine.

Owns who may still use what: a replica handle dies with the session it was opened in (promise P3),
a point handle with its point. Leaves the work to reader and writer.
"""

from __future__ import annotations

import errno
import os
from typing import TYPE_CHECKING

from ..backing import Bytes

if TYPE_CHECKING:
    from .volume import Volume


def _error(code: int) -> OSError:
    return OSError(code, os.strerror(code))


class ReplicaHandle:
    """An open replica. Every method raises OSError ENODEV once the volume has been offline."""

    __slots__ = ("_closed", "_session", "_volume", "size")

    def __init__(self, volume: Volume) -> None:
        self._volume = volume
        self._session = volume.protection.session
        self._closed = False
        self.size = volume.size
        volume.core.open_replicas += 1

    async def read(self, offset: int, length: int) -> Bytes:
        """Up to `length` bytes: all of them below the end of the replica, none after it."""
        volume = self._volume
        if self._session != volume.protection.session or not volume.protection.is_online:
            raise await volume.protection.refuse()
        length = min(length, self.size - offset)
        if length <= 0:
            return b""
        data = await volume.reader.read_replica(offset, length)
        # A read that ran into a fault is refused like one that came after it.
        if self._session != volume.protection.session or not volume.protection.is_online:
            raise await volume.protection.refuse()
        return data

    async def write(self, offset: int, data: Bytes) -> None:
        """All of `data`, or nothing. EFBIG beyond the end of the replica."""
        if offset + len(data) > self.size:
            raise _error(errno.EFBIG)
        await self._volume.writer.write(self._session, offset, data)

    async def flush(self) -> None:
        """Return when everything acknowledged before survives power loss (W4). ENODEV, EIO."""
        await self._make_durable(None)

    async def _make_durable(self, wanted: int | None) -> None:
        """Flush. wanted: how far the write buffer must be drained, None for all of it."""
        volume = self._volume
        await self._refuse_flush_if_dead()
        failure: OSError | None = None
        try:
            await volume.buffer.drain(wanted)
        except OSError as error:
            # What cannot be carried out has taken the volume offline, which is refused here.
            failure = error
        await self._refuse_flush_if_dead()
        try:
            if failure is not None:
                raise failure
            await volume.core.flush_replica()
        except OSError as error:
            if error is not volume.core.replica_error:
                # Another has told it, and perhaps the replica has been opened anew since.
                await self._refuse_flush_if_dead()
            await volume.protection.replica_sync_failed(error)
            volume.log_flush_failure(error)
            raise
        await self._refuse_flush_if_dead()

    async def _refuse_flush_if_dead(self) -> None:
        volume = self._volume
        if self._session != volume.protection.session or not volume.protection.is_online:
            refusal = await volume.protection.refuse()
            volume.log_flush_failure(refusal)
            raise refusal

    def close(self) -> None:
        """May be called twice."""
        if not self._closed:
            self._closed = True
            self._volume.core.open_replicas -= 1


class SynchronousHandle(ReplicaHandle):
    """A replica opened with O_SYNC or O_DSYNC: no write is answered before it is durable (W4).

    The kernel leaves that to us: it sends no flush of its own for a file with direct I/O.
    """

    __slots__ = ()

    async def write(self, offset: int, data: Bytes) -> None:
        """As `ReplicaHandle.write`, then as `flush`, for this write.

        If the flush fails the write is there all the same, as on any disk; the volume is offline.
        ENODEV or EIO then, never the ENOSPC that says of a write that nothing was written.
        """
        if offset + len(data) > self.size:
            raise _error(errno.EFBIG)
        wanted = await self._volume.writer.write(self._session, offset, data)
        if not data:
            return
        try:
            await self._make_durable(wanted)
        except OSError as error:
            raise _error(errno.ENODEV if error.errno == errno.ENODEV else errno.EIO) from error


class PointHandle:
    """An open recovery point. ESTALE once it has been deleted."""

    __slots__ = ("_closed", "_volume", "number", "size")

    def __init__(self, volume: Volume, number: int) -> None:
        self._volume = volume
        self._closed = False
        self.number = number
        self.size = volume.size
        counts = volume.core.open_points
        counts[number] = counts.get(number, 0) + 1

    async def read(self, offset: int, length: int) -> Bytes:
        """Up to `length` bytes: all of them below the end, none after it. EIO, ESTALE."""
        volume = self._volume
        length = min(length, self.size - offset)
        if self.number in volume.points_service.gone:
            raise _error(errno.ESTALE)
        if length <= 0:
            return b""
        try:
            return await volume.reader.read_point(self.number, offset, length)
        finally:
            # Deleted while we read: its slots may hold something else by now.
            if self.number in volume.points_service.gone:
                raise _error(errno.ESTALE)

    def close(self) -> None:
        """May be called twice."""
        if self._closed:
            return
        self._closed = True
        counts = self._volume.core.open_points
        counts[self.number] -= 1
        if not counts[self.number]:
            del counts[self.number]
