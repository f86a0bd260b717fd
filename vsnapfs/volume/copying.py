"""Copying old blocks into the diff area, in two steps: stage (read, hash, write), then one barrier.

Owns the buffer that the blocks pass through and the threads that fetch them. Runs in a worker
thread, under `area_lock`; `prefetch` may be called at any time. Promises that whatever goes wrong
is a FaultError that names the block (6: it cannot be read, 7: it cannot be written, 4 and 5: no
memory, 11: anything else), and that nothing of the batch counts then.
"""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import NamedTuple

import xxhash

from ..diffarea.area import DiffArea
from ..diffarea.descriptors import ZERO_SPAN, Descriptor, with_zeros
from ..diffarea.index import ZEROS
from ..errors import FaultCode, FaultError, unexpected
from ..threads import started
from .core import Core

_STAGING = 4 << 20
_READERS = 4


class Copied(NamedTuple):
    """An old block that lies in its slot, and the xxh3-64 of it; None: it is zeros, not written."""

    block: int
    slot: int
    checksum: int | None


class Preserved(NamedTuple):
    """What a barrier has made durable.

    places: block → slot as the index has it. spans: the descriptors of zeros, as in
    `DiffArea.zero_spans`.
    """

    places: dict[int, int]
    spans: dict[int, tuple[int, Descriptor]]


class Copier:
    """Copies blocks of an open volume's replica."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._staging: mmap.mmap | None = None
        self._readers: ThreadPoolExecutor | None = None
        #: No other threads: there is no memory for them, or the replica takes one at a time.
        self._alone = not core.replica.is_concurrent
        self._zeros = bytes(core.block_size)
        #: None: blocks of zeros are copied like any others.
        self._zeros_checksum: int | None = None
        if core.config.zero_blocks == "flag":
            self._zeros_checksum = xxhash.xxh3_64_intdigest(self._zeros)

    def copy(self, area: DiffArea, blocks: Sequence[int], slots: Sequence[int]) -> Preserved:
        """Preserve `blocks`, durably, in `slots` as far as they are needed. FaultError."""
        return self.make_durable(area, self.stage(area, blocks, slots))

    def stage(self, area: DiffArea, blocks: Sequence[int], slots: Sequence[int]) -> list[Copied]:
        """Read `blocks` and write them into `slots`. Nothing knows of them then. FaultError."""
        block: int | None = None
        try:
            if area.needs_rollback:
                # A growth's sync failed: what it should have covered never came into use, and
                # is no reason to refuse a copy (P2).
                area.rollback()
            staging = self._staging_area()
            ordered = sorted(zip(blocks, slots, strict=True))
            size = area.layout.block_size
            at_once = max(1, len(staging) // size)
            copied: list[Copied] = []
            with memoryview(staging) as view:
                for start in range(0, len(ordered), at_once):
                    part = ordered[start : start + at_once]
                    block = part[0][0]
                    self._read_old([block for block, _ in part], view)
                    start_of_run = 0
                    for index, (block, slot) in enumerate(part):
                        content = view[index * size : (index + 1) * size]
                        checksum: int | None = xxhash.xxh3_64_intdigest(content)
                        if checksum == self._zeros_checksum and content.tobytes() == self._zeros:
                            checksum = None
                            self._write(area, part[start_of_run:index], view, start_of_run)
                            start_of_run = index + 1
                        copied.append(Copied(block, slot, checksum))
                    self._write(area, part[start_of_run:], view, start_of_run)
            return copied
        except FaultError as error:
            if error.block is None:
                error.block = block if block is not None else min(blocks)
            raise
        except Exception as error:
            # Nobody planned for this. Whatever it was, the points must not pay for it.
            raise unexpected(error, block) from error

    @staticmethod
    def _write(
        area: DiffArea, part: Sequence[tuple[int, int]], view: memoryview, start: int
    ) -> None:
        """Write blocks that lie one after the other in `view`, from the one numbered `start` on."""
        size = area.layout.block_size
        if part:
            data = view[start * size : (start + len(part)) * size]
            area.write_copies([slot for _, slot in part], data)

    def make_durable(self, area: DiffArea, copied: Sequence[Copied]) -> Preserved:
        """One barrier for what `stage` wrote: recorded as copies of the current epoch. FaultError.

        The epoch is the one of this moment, not of the staging. The caller records what this
        returns before it lets another barrier begin, or what is known of zeros would be lost.
        """
        try:
            epoch = area.superblock.epoch
            changes: dict[int, Descriptor | None] = {}
            places: dict[int, int] = {}
            spans: dict[int, tuple[int, Descriptor]] = {}
            for block, slot, checksum in copied:
                if checksum is not None:
                    changes[slot] = Descriptor(checksum, block, epoch)
                    places[block] = slot
                    continue
                span = block // ZERO_SPAN
                known = spans.get(span) or area.zero_spans.get(span)
                if known is not None and known[1].epoch == epoch:
                    slot, descriptor = known[0], with_zeros(known[1], block, epoch)
                else:
                    descriptor = with_zeros(None, block, epoch)
                spans[span] = slot, descriptor
                changes[slot] = descriptor
                places[block] = slot | ZEROS
            area.barrier(changes)
            return Preserved(places, spans)
        except FaultError as error:
            if error.block is None:
                error.block = min(block for block, _, _ in copied)
            raise
        except Exception as error:
            raise unexpected(error, None) from error

    def _staging_area(self) -> mmap.mmap:
        if self._staging is None:
            try:
                self._staging = mmap.mmap(-1, max(_STAGING, self._core.block_size))
            except (OSError, ValueError) as error:
                raise FaultError(
                    FaultCode.MAPPED_MEMORY_FAILURE,
                    f"the copy buffer could not be mapped: {error}",
                    errno=errno.ENOMEM,
                ) from error
        return self._staging

    def _read_old(self, blocks: Sequence[int], view: memoryview) -> None:
        """Read `blocks` (ascending) one after the other into `view`, a short last one padded.

        Several threads share a long list: a disk answers many questions as fast as one, and a
        machine in a virtual one pays for asking.
        """
        size = self._core.block_size
        pool = self._pool() if len(blocks) >= 2 * _READERS else None
        if pool is None:
            self._read_part(blocks, view)
            return
        share = -(-len(blocks) // _READERS)
        starts = range(0, len(blocks), share)
        reading = [
            pool.submit(
                self._read_part, blocks[at : at + share], view[at * size : (at + share) * size]
            )
            for at in starts[1:]
        ]
        try:
            self._read_part(blocks[:share], view[: share * size])
        finally:
            wait(reading)  # They write into `view`, whatever happens here.
        for part in reading:
            part.result()

    def prefetch(self, blocks: Sequence[int]) -> None:
        """The old content of `blocks` is going to be copied soon: fetch it meanwhile."""
        core = self._core
        pool = self._pool() if len(blocks) >= 2 * _READERS else None
        if pool is None:
            return
        runs = runs_of(sorted(blocks))
        size = core.block_size

        def fetch(part: list[tuple[int, int]]) -> None:
            for first, last in part:
                core.replica.prefetch(first * size, (last + 1 - first) * size)

        for number in range(_READERS):
            pool.submit(fetch, runs[number::_READERS])

    def _pool(self) -> ThreadPoolExecutor | None:
        """The threads; None where there is no memory for them, or no use."""
        if self._readers is None and not self._alone:
            self._readers = started(2 * _READERS, "vsnapfs-reader")
            self._alone = self._readers is None
        return self._readers

    def close(self) -> None:
        """End the threads."""
        if self._readers is not None:
            self._readers.shutdown()

    def _read_part(self, blocks: Sequence[int], view: memoryview) -> None:
        core = self._core
        size, at = core.block_size, 0
        for first, last in runs_of(blocks):
            offset, end = first * size, at + (last + 1 - first) * size
            length = min(end - at, core.size - offset)
            try:
                core.replica.read_into(offset, view[at : at + length])
            except OSError as error:
                raise FaultError(
                    FaultCode.COW_READ_FAILURE,
                    f"the old content of block {first} could not be read: {error}",
                    errno=error.errno or errno.EIO,
                    block=first,
                ) from error
            if at + length < end:
                view[at + length : end] = bytes(end - at - length)
            at = end


def runs_of(blocks: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending blocks as (first, last) runs of neighbours."""
    runs: list[tuple[int, int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1] = runs[-1][0], block
        else:
            runs.append((block, block))
    return runs
