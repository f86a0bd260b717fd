"""Reading: the replica, and recovery points through the copies.

Owns the read rule: point k at block b is the copy in the first epoch ≥ k that has one, else the
replica. Promises R1 (a copy is returned only if its checksum fits; else EIO and an event) and R2:
a reader that falls through to the replica looks at the index again *after* reading. A copy is in
the index before its block is overwritten, so if there still is none, what was read is old enough.
A read in the trio thread, without an await since the look, needs no second one.

Short reads are tried at once; those that have to wait for the disk do so in `coldreads`. Long ones
go to a worker thread, which asks the disk for all of it before it waits, and fills one buffer.
"""

from __future__ import annotations

import errno
import os
from functools import partial

import numpy as np

from ..backing import Bytes
from .buffer import WriteBuffer, lay_over
from .coldreads import ColdReads
from .copying import runs_of
from .core import Core, in_thread

Copy = tuple[int, int]

#: Blocks that are looked up and read in one go.
_AT_ONCE = 256
#: Bytes up to which reads share their way to the disk. Longer ones are few, and better tried once.
_SHORT = 64 << 10


class Reader:
    """Carries out reads for an open volume."""

    def __init__(self, core: Core, buffer: WriteBuffer) -> None:
        self._core = core
        self._buffer = buffer
        self._cold = ColdReads()
        self._reported: set[tuple[int, int]] = set()

    async def read_replica(self, offset: int, length: int) -> Bytes:
        """`length` bytes inside the replica. OSError EIO."""
        data = self._replica_at_once(offset, length)
        if data is not None:
            return data
        from_disk = partial(self._replica_from_disk, offset, length)
        if length > _SHORT or not self._core.replica.tells_cached:
            return await from_disk()
        return await self._cold.read(partial(self._replica_at_once, offset, length), from_disk)

    def _replica_at_once(self, offset: int, length: int) -> Bytes | None:
        # Taken before the replica is read: what is carried out meanwhile may be missed there.
        acknowledged = self._buffer.capture(offset, length) if self._buffer.pending else None
        data = self._core.replica.read_cached(offset, length)
        return lay_over(data, acknowledged) if acknowledged and data is not None else data

    async def _replica_from_disk(self, offset: int, length: int) -> Bytes:
        acknowledged = self._buffer.capture(offset, length) if self._buffer.pending else None
        data = await in_thread(self._core.replica.read, offset, length)
        return lay_over(data, acknowledged) if acknowledged else data

    async def read_point(self, point: int, offset: int, length: int) -> Bytes:
        """`length` bytes of a live point, inside the replica's size. OSError EIO."""
        size = self._core.block_size
        first, last = offset // size, (offset + length - 1) // size
        if first == last:
            data = self._at_once(point, first, offset, length)
            if data is not None:
                return data
            from_disk = partial(self._one, point, first, offset, length)
            core = self._core
            told = core.replica.tells_cached and core.need_area().backing.tells_cached
            if size > _SHORT or not told:
                return await from_disk()
            at_once = partial(self._at_once, point, first, offset, length)
            return await self._cold.read(at_once, from_disk)
        # Nothing of it is shown that has not been filled. (A bytearray would be, twice.)
        whole = np.empty((last + 1 - first) * size, np.uint8).data
        for start in range(first, last + 1, _AT_ONCE):
            end = min(start + _AT_ONCE, last + 1)
            part = whole[(start - first) * size : (end - first) * size]
            await self._blocks(point, start, end - start, part)
        begin = offset - first * size
        return whole[begin : begin + length]

    def _at_once(self, point: int, block: int, offset: int, length: int) -> Bytes | None:
        """Part of one block if all that it takes is in the host's cache, else None.

        Nothing is awaited between the look and the read, and whoever overwrites a block has put
        its copy into the index before, in this thread: without a copy the replica is old enough.
        """
        core = self._core
        area = core.need_area()
        copy = area.index.lookup(point, block)
        if not area.may_trust(point, copy[0] if copy else None):
            return None
        if copy is None:
            return core.replica.read_cached(offset, length)
        data = area.read_copy_cached(block, *copy)
        start = offset - block * core.block_size
        return None if data is None else bytes(data[start : start + length])

    async def _one(self, point: int, block: int, offset: int, length: int) -> Bytes:
        """Part of one block, from the disk. OSError EIO."""
        core = self._core
        failed: Copy | None = None
        while True:
            area = core.need_area()
            copy = area.index.lookup(point, block)
            if not area.may_trust(point, copy[0] if copy else None):
                raise self._damaged(point, block, "its descriptor may be lost")
            if copy is None:
                data = await in_thread(core.replica.read, offset, length)
                if area.index.lookup(point, block) is None:
                    return data
                continue  # Overwritten while we read: now there is a copy.
            if copy == failed:  # As in `_blocks`: once may be a slot that a shrink has left.
                raise self._damaged(point, block, "its copy fails the checksum")
            (part,) = await in_thread(area.read_copies, [(block, *copy)])
            if part is not None:
                start = offset - block * core.block_size
                return part[start : start + length]
            failed = copy

    async def _blocks(self, point: int, first: int, count: int, whole: memoryview) -> None:
        """Fill `whole` with `count` blocks of a point (the replica's last one may be short)."""
        core = self._core
        area = core.need_area()
        todo = list(range(count))
        failed: dict[int, Copy] = {}
        while todo:
            found = area.index.lookup_range(point, first, count)
            for where in todo:
                copy = found[where]
                if not area.may_trust(point, copy[0] if copy else None):
                    raise self._damaged(point, first + where, "its descriptor may be lost")
                # A copy that fails its check twice in the same place is damaged. Once may be
                # a slot that a shrink has just moved away from.
                if copy is not None and failed.get(where) == copy:
                    raise self._damaged(point, first + where, "its copy fails the checksum")
            bad = await in_thread(self._fetch, first, todo, found, whole)
            again = []
            for where in todo:
                copy = found[where]
                if where in bad:
                    assert copy is not None
                    failed[where] = copy
                    again.append(where)
                elif copy is None and area.index.lookup(point, first + where) is not None:
                    again.append(where)  # Overwritten while we read: now there is a copy.
            todo = again

    def _fetch(
        self, first: int, todo: list[int], found: list[Copy | None], whole: memoryview
    ) -> set[int]:
        """In a worker thread: the copies, and runs of the replica where there is none.

        Returns which of `todo` have a copy that fails its check.
        """
        core = self._core
        replica, size = core.replica, core.block_size
        through = []
        for start, end in runs_of(where for where in todo if found[where] is None):
            offset = (first + start) * size
            length = min((end + 1 - start) * size, core.size - offset)
            view = whole[start * size : start * size + length]
            # All that is not in the host's cache is asked for before anything is waited for.
            if not replica.read_into_cached(offset, view):
                through.append((offset, view))
        places = [where for where in todo if found[where] is not None]
        wanted = [(first + where, *copy) for where in places if (copy := found[where]) is not None]
        good = core.need_area().read_into(wanted, whole, places)
        for offset, view in through:
            replica.read_into(offset, view)
        return {where for where, fine in zip(places, good, strict=True) if not fine}

    def _damaged(self, point: int, block: int, reason: str) -> OSError:
        """EIO, and the event once a block and point (a reader may ask many times)."""
        core = self._core
        if core.need_area().is_unread:  # Nothing is damaged, there was no memory.
            return OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))
        if core.area_is_wiped or all(live.number != point for live in core.points):
            return OSError(errno.ESTALE, os.strerror(errno.ESTALE))  # Given up meanwhile.
        if (point, block) not in self._reported:
            if len(self._reported) < 10_000:
                self._reported.add((point, block))
            core.log.log(
                "vsnapfs",
                1040,
                volume=core.name,
                point=point,
                block=block,
                offset=block * core.block_size,
                length=min(core.block_size, core.size - block * core.block_size),
                diff_area=str(core.need_area().backing.path),
                reason=reason,
            )
        return OSError(errno.EIO, os.strerror(errno.EIO))
