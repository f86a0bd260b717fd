"""The write buffer: a write is answered when it lies in the ring, and carried out soon after.

Owns what is acknowledged and not yet in the replica. Two tasks carry it out, each a whole batch at
a time: one preserves what the batch will overwrite and makes that durable with one barrier, the
other overwrites the replica and then releases the ring. So W2 costs no write its latency. Promises:

* whatever a write may be refused for is found out before it is acknowledged: it has its slots,
  there are no holes under it, and there is room in the ring;
* a read of the replica shows acknowledged writes, in their order (`capture`, `lay_over`);
* `drain` returns when all that was acknowledged before it is in the replica: flushes wait for it
  (W4), and so do a new point, a restore and a shrink, with writes held;
* an acknowledged write that cannot be carried out stays in the ring. The volume is offline then,
  all flushes fail, and `online` carries it out first. So does the next opening, if this process
  dies (W3). The superblock names the one ring that an opening may use;
* records are released before anything newer can reach the replica beside the ring.

A block is dealt with either here or by the group commit of `writer`, never by both at a time.
Leaves the ring's layout to `ring`, where it lies to `shm`, which one an opening may take over to
`adoption`, copying to `writer`.
"""

from __future__ import annotations

import errno
import itertools
import os
from collections import deque
from contextlib import suppress
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from ..backing import Bytes
from ..config import DEFAULT_WRITE_BUFFER
from ..diffarea.superblock import NO_RING, RingName
from ..errors import FaultCode, FaultError, unexpected
from .adoption import adopt
from .core import Core, in_thread
from .protection import Protection
from .ring import Record, Ring
from .shm import RingStore

if TYPE_CHECKING:
    from .writer import Writer

#: The longest request there is through FUSE. What is longer would not fit into a small ring twice
#: and is preserved and written directly.
LONGEST = 1 << 20
NO_BOOT = bytes(16)
#: How much is carried out in one go. A full ring stands still that long; less costs more barriers.
_BATCH = 8 << 20


class WriteBuffer:
    """The write buffer of an open volume. Without a `store` there is none, and nothing is buffered.

    size: of the ring, in bytes. `reason` says why there is no buffer, "" if there can be one.
    """

    def __init__(
        self,
        core: Core,
        protection: Protection,
        store: RingStore | None,
        size: int = DEFAULT_WRITE_BUFFER,
    ) -> None:
        self._core = core
        core.note_area = self.note_area
        self._protection = protection
        self._store = store
        self._size = size
        self.writer: Writer
        self.ring: Ring | None = None
        #: The ring must not be added to, only carried out: its file is gone, or it is a copy.
        self._retired = False
        #: Whether it is ours for good: until then it must stay as the one before has left it.
        self._is_taken = False
        #: It was made here, and no write has ever been in it.
        self._is_unused = False
        #: Name and barrier of the ring that `close` has left for the next opening. Whoever commits
        #: beside the end of a volume (`online` does) must go on naming it.
        self._left, self._is_over = (NO_RING, 0), False
        #: Whether what cannot be used may be given up, and whether an opening has decided on it.
        self._may_give_up = self._decided = False
        self.reason = "" if store is not None and size else "it is switched off"
        #: Block → records that are not yet in the replica, oldest first.
        self.pending: dict[int, list[Record]] = {}
        #: Block → the slot reserved for its copy.
        self.slots: dict[int, int] = {}
        #: Why acknowledged writes cannot be carried out; None when they can.
        self.stuck: Exception | None = None
        self._to_preserve: deque[Record] = deque()
        self._to_overwrite: deque[Record] = deque()
        #: How many writes have been acknowledged, and carried out.
        self.acknowledged = 0
        self._released = 0
        self._running = False
        self._ended = False
        self._arrived = trio.Event()
        self._preserved = trio.Event()
        self._freed = trio.Event()
        self._starting = trio.Lock()
        self._preserving = trio.Lock()
        self._overwriting = trio.Lock()

    # -- the ring -------------------------------------------------------------------------------

    @property
    def boot(self) -> bytes:
        """The life of the machine, as the superblock records it."""
        return self._store.boot if self._store is not None else NO_BOOT

    @property
    def name(self) -> RingName:
        """The ring that the superblock is to name."""
        if self.ring is not None and not self._is_over:
            return self.ring.name
        return self._left[0]

    @property
    def barrier(self) -> int:
        """The newest barrier that the ring knows of, 0 without a ring."""
        return self.ring.area[1] if self.ring is not None else self._left[1]

    @property
    def is_open(self) -> bool:
        """Whether writes can be acknowledged by it (perhaps after `start`)."""
        return not self.reason and self._running

    @property
    def is_running(self) -> bool:
        """Whether there is somebody to carry out what it holds."""
        return self._running

    @property
    def is_ready(self) -> bool:
        """Whether `append` may be called. If not, `start` comes first."""
        return self.ring is not None and not self._retired

    async def start(self) -> None:
        """Make a ring, and let the superblock name it before anything relies on it.

        One that must not be added to any more is carried out first. Without a place for it there
        is no buffer, and the volume says so. FaultError 13, 14, 15; OSError if acknowledged writes
        cannot be carried out.
        """
        async with self._starting:
            core, store = self._core, self._store
            if self.is_ready or self.reason or store is None:
                return
            await self.drain()
            # Nobody can add to it meanwhile: it is empty, and stays so.
            old = self.ring
            if old is not None and self._is_unused:
                await self._do_without(old)
                return
            try:
                replica = core.replica.file_id()  # Fails where its host has shut down.
                await in_thread(store.tidy, core.volume_id, replica)
                ring = await in_thread(store.make, self._size, core.volume_id, replica)
            except OSError as error:
                self._give_up(f"it cannot be made in shared memory: {error.strerror or error}")
                return
            try:
                async with core.area_lock:
                    area = core.area
                    await core.commit(ring=ring.name)
            except BaseException:  # Who waited for the lock may be given up.
                ring.close()  # Perhaps it is named all the same. The next opening knows.
                raise
            # Should the area be lost, nothing else would know of it. Before anything lies in it.
            with suppress(OSError, MemoryError):
                await in_thread(self._protection.save)
            # Closed meanwhile: nobody would let go of it for the next opening. Or points have been
            # given up: the area that has taken the place of that one does not name it.
            if self._ended or core.area is not area:
                ring.close()
                return
            self.ring, self._retired, self._is_taken, self._is_unused = ring, False, True, True
            if old is not None:
                await in_thread(store.remove, old)
                old.close()

    async def _do_without(self, ring: Ring) -> None:
        """One is gone before it has held anything. The next one would be, too, without end."""
        core = self._core
        async with core.area_lock:
            await core.commit(ring=NO_RING)  # A kill loses nothing with it.
            self.ring = None
        with suppress(OSError, MemoryError):
            await in_thread(self._protection.save)
        ring.close()
        self._give_up("it is removed from shared memory as soon as it is made")

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        text = f"writes wait for their copies, there is no write buffer: {reason}"
        self._core.log.log("vsnapfs", 1091, volume=self._core.name, reason=text)

    async def adopt(self, *, give_up: bool = False) -> None:
        """After opening: take over what another process has acknowledged and not carried out.

        An Error event says so if that is lost though the machine has been up all the time.
        give_up: what cannot be used now is given up. VsnapError if the volume must stay closed;
        FaultError 15 (the diff area is an old copy), MemoryError: it has taken over nothing.
        """
        area, store = self._core.area, self._store
        self._may_give_up = give_up
        # An old copy of the area names a ring of its time, and may not be carried out on anyway.
        if area is None or store is None or area.is_old:
            return
        name, boot = area.superblock.ring, area.superblock.boot
        if area.is_unread and boot == store.boot:
            return  # It stays, for an opening that has the memory.
        known = area.superblock.generation
        await self._adopt(name, boot, known, give_up=give_up)
        self._decided = True
        if self.ring is None and name != NO_RING:
            # That is decided. A commit must not name it once more, in this life of the machine.
            area.superblock = replace(area.superblock, ring=NO_RING)

    async def rescue(self) -> None:
        """The diff area that named a ring of ours is given up: take over what the state file names.

        VsnapError if it cannot be used now.
        """
        # Where there was no area to name one, nothing has been given up yet: it may be usable.
        decided = self._ended or (self._may_give_up and self._decided)
        if self.ring is None and not decided:
            async with self._starting:
                pass
            if self.is_ready:
                return  # A write in flight has made it.
            saved = self._protection.saved
            await self._adopt(saved.ring, saved.boot, give_up=self._may_give_up)
            # Until there is a new area: whoever waits for it (closing does) must not wait for ever.
            self.hold(FaultError(FaultCode.DIFF_AREA_MISSING, "there is no diff area yet"))

    async def _adopt(
        self, name: RingName, boot: bytes, known: int | None = None, *, give_up: bool = False
    ) -> None:
        core, store = self._core, self._store
        if store is None:
            return
        ring = await in_thread(partial(adopt, core, store, name, boot, known, give_up=give_up))
        if ring is None:
            return
        # Of a copy nobody else would find what is added to it.
        self.ring, self._retired = ring, ring.is_copy
        try:
            self._take_over(ring)
        except BaseException:
            self._to_preserve.clear()
            self.pending.clear()
            self.acknowledged = 0
            self.close()
            raise

    def note_area(self) -> None:
        """A barrier or commit of the diff area is durable, and nothing relies on it yet: a copy of
        the area from before it looks old from now on, if this process is killed. (With durability
        "process" it is only written: an area without it has lost copies.)
        """
        if self.ring is not None and self._is_taken and not self._core.dry_run:
            area = self._core.need_area()
            self.ring.note_area(area.superblock.generation, area.barrier_number)

    def is_taken(self) -> None:
        """The superblock that names it again is durable: with an older one it does not count."""
        if self.ring is not None and not self._core.dry_run:
            self.ring.take(self._core.need_area().superblock.generation)
            self._is_taken = True

    def _take_over(self, ring: Ring) -> None:
        beyond = 0
        for record in ring.records():
            if record.offset + record.length > self._core.size:
                beyond += 1
            else:
                self._enter(record)
        for count, what in ((beyond, "lie beyond the replica's end"), (ring.rotted, "are rotted")):
            if count:
                self._core.log.log(
                    "vsnapfs",
                    1043,
                    volume=self._core.name,
                    what=ring.name.ring_id.hex(),
                    reason=f"{count} of the writes it held {what}, the others are carried out",
                )

    @property
    def leaves_ring(self) -> bool:
        """Whether what another process has acknowledged stays where it is: the diff area that names
        the ring is not there, is an old copy, or could not be read.
        """
        area, store = self._core.area, self._store
        if self.ring is not None or store is None or self._decided:
            return False
        named = self._protection.saved if area is None or area.is_old else area.superblock
        return named.ring != NO_RING and named.boot == store.boot

    def hold(self, error: FaultError) -> None:
        """An opening has found what forbids copies: all of it stays in the ring, for `online`
        (once the cause is mended) or for the next opening.
        """
        if self.ring is not None:
            self.stuck = error

    async def finish(self) -> bool:
        """Before a clean close: carry everything out. True if nothing is left, nor can be."""
        if self.ring is None:
            return True
        try:
            await self.drain()
        except OSError as error:
            self._core.log.log(
                "vsnapfs",
                1044,
                volume=self._core.name,
                count=len(self._to_preserve) + len(self._to_overwrite),
                reason=error.strerror or str(error),
            )
            return False
        return True

    def is_over(self) -> None:
        """It is empty, stays so, and is going to be removed. No commit names it from here on. The
        caller holds `area_lock`.
        """
        self._is_over = True

    def remove(self) -> None:
        """In a worker thread: the superblock names no ring any more."""
        if self._store is not None and not self._core.dry_run:
            if self.ring is not None:
                self._store.remove(self.ring)
            self._store.tidy(self._core.volume_id, self._core.replica.file_id())

    def doubt(self) -> str:
        """Why what it holds may not outlive this process, "" if nothing speaks against that."""
        return "" if self.reason or self._store is None else self._store.doubt()

    async def end(self) -> None:
        """The volume is closed: who still waits for what is in the ring does not carry it out."""
        self._ended = True
        self.stuck = self.stuck or OSError(errno.ENODEV, os.strerror(errno.ENODEV))
        self._wake()
        async with self._preserving, self._overwriting:
            self.close()

    def close(self) -> None:
        """Give the memory back; the ring stays for the next opening unless it was removed."""
        ring, self.ring = self.ring, None
        if ring is not None:
            if not self._is_over:
                self._left = ring.name, ring.area[1]
            ring.close()

    # -- for writers: no await in any of these --------------------------------------------------

    def touches(self, first: int, last: int) -> bool:
        """Whether something acknowledged for these blocks is not yet in the replica."""
        pending = self.pending
        return bool(pending) and any(block in pending for block in range(first, last + 1))

    def append(self, offset: int, data: Bytes) -> bool:
        """Acknowledge a write. False if the ring is full, or must not be added to any more.

        Whatever it raises, the write has not been acknowledged, and nothing of it is left.
        """
        ring = self.ring
        assert ring is not None
        if not self.pending:
            self._look_if_there()
        if self._retired:
            return False
        record = ring.append(offset, data)
        if record is None:
            # If there is no room in an empty one, there never will be: whoever made it knew nothing
            # of writes as long as this, and another takes its place.
            self._retired = not self.pending
            return False
        try:
            self._enter(record)
        except BaseException:
            ring.take_back(record)
            raise
        self._is_unused = False
        self._arrived.set()
        return True

    def _look_if_there(self) -> None:
        """A ring that somebody has removed would not be found by whoever comes after a kill."""
        ring, store = self.ring, self._store
        if ring is None or store is None or self._retired or store.is_there(ring):
            return
        self._retired = True
        self._core.log.log("vsnapfs", 1053, volume=self._core.name, what=ring.name.ring_id.hex())

    def _enter(self, record: Record) -> None:
        pending, blocks = self.pending, self._blocks(record)
        entered = 0
        try:
            for block in blocks:
                known = pending.get(block)
                if known is None:
                    pending[block] = [record]
                else:
                    known.append(record)
                entered += 1
            self._to_preserve.append(record)
        except BaseException:
            for block in blocks[:entered]:
                self._leave(block, -1)
            raise
        self.acknowledged += 1

    def _leave(self, block: int, which: int) -> None:
        """Forget the oldest (0) or newest (-1) record of a block."""
        waiting = self.pending[block]
        if len(waiting) == 1:
            del self.pending[block]
        else:
            waiting.pop(which)

    def _blocks(self, record: Record) -> range:
        size = self._core.block_size
        return range(record.offset // size, (record.offset + record.length - 1) // size + 1)

    async def room(self) -> None:
        """Return when something was released, or nothing will be for now (look again)."""
        if self.stuck is None and self.pending:
            await self._freed.wait()

    # -- for readers ------------------------------------------------------------------------------

    def capture(self, offset: int, length: int) -> list[tuple[int, bytes]]:
        """(start within the range, bytes) of all that is not yet in the replica, oldest first."""
        size, pending = self._core.block_size, self.pending
        found: dict[int, Record] = {}
        for block in range(offset // size, (offset + length - 1) // size + 1):
            for record in pending.get(block, ()):
                found[record.sequence] = record
        parts = []
        for sequence in sorted(found):
            record = found[sequence]
            start, end = (
                max(offset, record.offset),
                min(offset + length, record.offset + record.length),
            )
            if start < end:
                assert self.ring is not None
                data = self.ring.data(record)
                inside = data[start - record.offset : end - record.offset]
                parts.append((start - offset, bytes(inside)))
        return parts

    # -- for whoever needs the replica as it was acknowledged -----------------------------------

    async def drain(self, wanted: int | None = None) -> None:
        """Return when all that was acknowledged before the call is in the replica.

        wanted: what `acknowledged` was after a certain write, to wait for no later ones. OSError
        if that cannot be: the volume is offline then.
        """
        if wanted is None:
            wanted = self.acknowledged
        while self._released < wanted:
            if self.stuck is not None:
                text = f"acknowledged writes could not be carried out: {self.stuck}"
                raise OSError(getattr(self.stuck, "errno", None) or errno.EIO, text)
            if self._running:
                await self._freed.wait()
            else:
                await self._step()

    async def try_again(self) -> None:
        """`online`, or an opening: carry out what is left, before anything else. OSError."""
        if not self._ended:
            self.stuck = None
        wanted = self.acknowledged
        with trio.CancelScope(shield=True):
            while self._released < wanted and self.stuck is None:
                await self._step()
        await self.drain()

    def forget_slots(self) -> None:
        """Another diff area has taken the place of the one in which slots were reserved."""
        self.slots.clear()

    # -- carrying out -----------------------------------------------------------------------------

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Carry out what arrives, until cancelled."""
        self._running = True
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._go_on_preserving)
                nursery.start_soon(self._go_on_overwriting)
                task_status.started()
        finally:
            self._running = False
            self._wake()  # Who waits now goes on by itself.

    async def _go_on_preserving(self) -> None:
        while True:
            if self._to_preserve and self.stuck is None:
                await self._preserve()
            else:
                self._arrived = trio.Event()
                await self._arrived.wait()

    async def _go_on_overwriting(self) -> None:
        while True:
            if self._to_overwrite and self.stuck is None:
                await self._overwrite()
            else:
                self._preserved = trio.Event()
                await self._preserved.wait()

    async def _step(self) -> None:
        await self._preserve()
        await self._overwrite()

    def _wake(self) -> None:
        self._freed.set()
        self._freed = trio.Event()

    async def _get_stuck(self, error: Exception) -> None:
        """Nothing more is carried out before `online`; and nobody may take that for a success."""
        self.stuck = error
        self._wake()
        if self._protection.is_online:
            fault = error if isinstance(error, FaultError) else unexpected(error, None)
            await self._protection.trip(fault)

    async def _preserve(self) -> None:
        """Preserve what the oldest records will overwrite. Cancelled only between two batches."""
        with trio.CancelScope(shield=True):
            async with self._preserving:
                records: list[Record] = []
                size = 0
                for record in self._to_preserve:
                    records.append(record)
                    size += record.length
                    if size >= _BATCH:
                        break
                if not records or self.stuck is not None:
                    return
                try:
                    self._prefetch(len(records))
                    error = await self.writer.preserve_acknowledged(
                        dict.fromkeys(b for record in records for b in self._blocks(record)),
                        self.slots,
                        records[0],
                    )
                except Exception as unplanned:  # noqa: BLE001 - it must not end the server
                    error = unplanned
                if error is not None:
                    await self._get_stuck(error)
                    return
                for record in records:
                    self._to_preserve.popleft()
                    self._to_overwrite.append(record)
                self._preserved.set()

    def _prefetch(self, first: int) -> None:
        """Have the old content fetched for the batch after this one, of `first` records."""
        blocks: list[int] = []
        for record in itertools.islice(self._to_preserve, first, None):
            blocks += [block for block in self._blocks(record) if block in self.slots]
            if len(blocks) * self._core.block_size >= _BATCH:
                break
        self.writer.copier.prefetch(blocks)

    async def _overwrite(self) -> None:
        """Carry out all records whose blocks are preserved."""
        with trio.CancelScope(shield=True):
            async with self._overwriting:
                records = list(self._to_overwrite)
                if not records or self.stuck is not None:
                    return
                try:
                    with self._core.admin.waits_for("acknowledged writes to reach the replica"):
                        await in_thread(self._write, records)
                    self._release(records)
                except Exception as error:  # noqa: BLE001 - as above
                    await self._get_stuck(self._as_fault(error))

    def _write(self, records: list[Record]) -> None:
        core, ring = self._core, self.ring
        assert ring is not None
        if core.replica_failed:
            raise OSError(errno.EIO, "an earlier sync of the replica failed")
        for record in records:
            with ring.data(record) as data:
                core.replica.write(record.offset, data)

    @staticmethod
    def _as_fault(error: Exception) -> FaultError:
        """There is nobody left to refuse: it is a fault, as a flush that fails is."""
        if not isinstance(error, OSError):
            return unexpected(error, None)
        reason = error.strerror or os.strerror(error.errno or errno.EIO)
        text = f"an acknowledged write could not be carried out: {reason}"
        return FaultError(FaultCode.IO_FAILURE, text, errno=error.errno or errno.EIO)

    def _release(self, records: list[Record]) -> None:
        assert self.ring is not None
        if not self._core.dry_run:
            # First of all: from here on a newer write may go to the replica beside the ring.
            self.ring.release(records[-1])
        for record in records:
            self._to_overwrite.popleft()
            self._released += 1
            for block in self._blocks(record):
                self._leave(block, 0)
        self._wake()
        self._look_if_there()

    def status(self) -> dict[str, Any]:
        """JSON-ready; sizes in bytes."""
        ring = self.ring
        return {
            "state": "off" if self.reason else "stuck" if self.stuck else "on",
            "reason": self.reason or (str(self.stuck) if self.stuck else None),
            "size": ring.capacity if ring else None,
            "used": ring.used if ring else 0,
            "writes": len(self._to_preserve) + len(self._to_overwrite),
        }


def lay_over(data: Bytes, parts: list[tuple[int, bytes]]) -> Bytes:
    """`data` with what `WriteBuffer.capture` returned over it."""
    whole = data if isinstance(data, bytearray) else bytearray(data)
    for start, part in parts:
        whole[start : start + len(part)] = part
    return whole
