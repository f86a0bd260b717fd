"""Reading: the replica, and recovery points through the copies.

Owns the read rule: point k at block b is the copy in the first epoch ≥ k that has one, else the
replica. Promises R1 (a copy is returned only if its checksum fits; else EIO and an event) and R2:
a reader that falls through to the replica looks at the index again *after* reading. A copy is in
the index before its block is overwritten, so if there still is none, what was read is old enough.
"""

from __future__ import annotations

import errno
import os

from ..backing import Bytes
from .buffer import WriteBuffer, lay_over
from .core import Core, in_thread

Copy = tuple[int, int]


class Reader:
    """Carries out reads for an open volume."""

    def __init__(self, core: Core, buffer: WriteBuffer) -> None:
        self._core = core
        self._buffer = buffer
        self._reported: set[tuple[int, int]] = set()

    async def read_replica(self, offset: int, length: int) -> Bytes:
        """`length` bytes inside the replica. OSError EIO."""
        replica = self._core.replica
        # Taken before the replica is read: what is carried out meanwhile may be missed there.
        acknowledged = self._buffer.capture(offset, length) if self._buffer.pending else None
        data = replica.read_cached(offset, length)
        if data is None:
            data = await in_thread(replica.read, offset, length)
        return lay_over(data, acknowledged) if acknowledged else data

    async def read_point(self, point: int, offset: int, length: int) -> Bytes:
        """`length` bytes of a live point, inside the replica's size. OSError EIO."""
        core = self._core
        size = core.block_size
        first, last = offset // size, (offset + length - 1) // size
        if first == last:
            data = self._at_once(point, first, offset, length)
            return data if data is not None else await self._one(point, first, offset, length)
        blocks = [
            part
            for start in range(first, last + 1, 256)
            for part in await self._blocks(point, start, min(256, last + 1 - start))
        ]
        joined = b"".join(blocks)
        begin = offset - first * size
        return joined[begin : begin + length]

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
        return None if data is None else data[start : start + length]

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

    async def _blocks(self, point: int, first: int, count: int) -> list[Bytes]:
        """`count` whole blocks of a point (the replica's last one may be short)."""
        core = self._core
        area = core.need_area()
        result: list[Bytes | None] = [None] * count
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
            data = await in_thread(self._fetch, first, todo, found)
            again = []
            for where, part in zip(todo, data, strict=True):
                copy = found[where]
                if part is None:
                    assert copy is not None
                    failed[where] = copy
                    again.append(where)
                elif copy is None and area.index.lookup(point, first + where) is not None:
                    again.append(where)  # Overwritten while we read: now there is a copy.
                else:
                    result[where] = part
            todo = again
        return [part for part in result if part is not None]

    def _fetch(self, first: int, todo: list[int], found: list[Copy | None]) -> list[Bytes | None]:
        """In a worker thread: the copies, and runs of the replica where there is none."""
        core = self._core
        area = core.need_area()
        parts: dict[int, Bytes | None] = {}
        copies = [(where, copy) for where in todo if (copy := found[where]) is not None]
        wanted = [(first + where, epoch, slot) for where, (epoch, slot) in copies]
        for (where, _), data in zip(copies, area.read_copies(wanted), strict=True):
            parts[where] = data
        through = [where for where in todo if found[where] is None]
        start = 0
        while start < len(through):
            end = start + 1
            while end < len(through) and through[end] == through[end - 1] + 1:
                end += 1
            self._fetch_run(first, through[start], end - start, parts)
            start = end
        return [parts[where] for where in todo]

    def _fetch_run(
        self, first: int, where: int, count: int, parts: dict[int, Bytes | None]
    ) -> None:
        core = self._core
        size = core.block_size
        offset = (first + where) * size
        length = min(count * size, core.size - offset)
        data = memoryview(core.replica.read(offset, length))
        for index in range(count):
            parts[where + index] = data[index * size : (index + 1) * size]

    def _damaged(self, point: int, block: int, reason: str) -> OSError:
        """EIO, and the event once a block and point (a reader may ask many times)."""
        core = self._core
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
