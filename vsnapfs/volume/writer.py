"""The write path: reserve, preserve, barrier, overwrite.

Owns the walk of a write and the group commit. Promises W1 (a refused write has moved no byte) and
W2 (a block is overwritten only after its copy is durable, also by a second writer that comes while
the first one's copy is on its way).

A write first counts itself in at the gate. It reserves slots for all blocks it has to preserve,
all or none; growth and the on-full policy are `room`'s business. What needs no copy is written at
once. What does goes through the `buffer`, or, where there is none:

The blocks join the open batch. The first to open a batch leads it: it waits for `area_lock` (so
for the barrier under way; meanwhile others join), copies all blocks of the batch in a worker
thread, and makes them durable with one sync. Then every writer of the batch looks again and
overwrites, in the trio thread and without an await in between, so that a reader never finds a
block overwritten whose copy is not in the index (R2).
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress

import trio

from ..backing import Bytes
from ..diffarea.area import DiffArea
from ..diffarea.index import SLOT_MASK
from ..errors import FaultCode, FaultError, unexpected
from .buffer import LONGEST, WriteBuffer
from .copying import Copier, Preserved, runs_of
from .core import Core, in_thread
from .policy import Policy, Verdict
from .protection import Protection
from .ring import Record
from .room import Room


class _Way(enum.Enum):
    """How a write that is more than an overwrite goes on."""

    DIRECTLY = enum.auto()
    ACKNOWLEDGED = enum.auto()
    LOOK_AGAIN = enum.auto()


_DIRECTLY, _ACKNOWLEDGED, _LOOK_AGAIN = _Way


class Batch:
    """Blocks that will share a barrier, and the slots reserved for them."""

    __slots__ = ("blocks", "done", "error", "slots")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.slots: list[int] = []
        self.done = trio.Event()
        self.error: FaultError | None = None


class Writer:
    """Carries out writes for an open volume."""

    def __init__(
        self,
        core: Core,
        protection: Protection,
        policy: Policy,
        room: Room,
        buffer: WriteBuffer,
    ) -> None:
        self._core = core
        self._protection = protection
        self._policy = policy
        self._room = room
        self._buffer = buffer
        self.copier = Copier(core)
        buffer.writer = self
        self._open_batch: Batch | None = None
        self._on_the_way: dict[int, Batch] = {}

    async def write(self, session: int, offset: int, data: Bytes) -> int:
        """Write `data` at `offset`, all of it inside the replica.

        Returns how far the buffer must be drained until it lies there: 0 if it does already.
        OSError: ENODEV (offline, or a handle from before a fault), ENOSPC or EIO of the replica.
        On any error but the replica's own EIO no byte has moved.
        """
        core, protection, gate = self._core, self._protection, self._core.gate
        if not data:
            return 0
        while gate.closed and session == protection.session:
            await gate.wait_open()
        if session != protection.session or not protection.is_online:
            raise await protection.refuse()
        gate.inside += 1
        try:
            first = offset // core.block_size
            last = (offset + len(data) - 1) // core.block_size
            while True:
                # Whatever was waited for, the look is stale: everything is looked at again.
                if core.area is not None and core.area.superblock.clean:
                    await self._leave_clean(offset, len(data))
                missing = core.preserved.missing(first, last) if core.points else []
                if missing or self._buffer.pending:
                    way = await self._take_way(session, offset, data, first, last, missing)
                    if way is _ACKNOWLEDGED:
                        return self._buffer.acknowledged
                    if way is _LOOK_AGAIN:
                        continue
                holes = core.no_holes.missing(first, last)
                if not holes:
                    break
                await self.fill_holes(holes, offset, len(data))
            # No await between this look and the overwrite: a fault cannot slip in between.
            if session != protection.session or not protection.is_online:
                raise await protection.refuse()
            try:
                core.replica.write(offset, data)
            except OSError as error:
                self._replica_error("write", offset, len(data), error)
                raise
            return 0
        finally:
            gate.leave()

    async def _take_way(
        self, session: int, offset: int, data: Bytes, first: int, last: int, missing: list[int]
    ) -> _Way:
        """A write that has blocks to preserve, or blocks that the buffer has not carried out."""
        buffer = self._buffer
        touched = buffer.touches(first, last)
        if not missing and not touched:
            return _DIRECTLY
        on_the_way = [
            self._on_the_way[block] for block in range(first, last + 1) if block in self._on_the_way
        ]
        if touched and on_the_way:
            # One block belongs to the buffer, another to the group commit: after that one.
            await on_the_way[0].done.wait()
            return _LOOK_AGAIN
        if touched or (buffer.is_open and not on_the_way and len(data) <= LONGEST):
            if not buffer.is_ready and buffer.is_open:
                await self._start_buffer(session, offset, len(data))
                return _LOOK_AGAIN
            if touched and not buffer.is_open:
                await buffer.room()
                if session != self._protection.session or not self._protection.is_online:
                    raise await self._protection.refuse()
                return _LOOK_AGAIN
            return await self._acknowledge(session, offset, data, first, last, missing)
        await self._preserve(session, missing, offset, len(data))
        return _LOOK_AGAIN

    async def _start_buffer(self, session: int, offset: int, length: int) -> None:
        try:
            await self._buffer.start()
        except FaultError as error:
            await self._area_failed(error, offset, length)
        except OSError:
            # What could not be carried out has taken the volume offline. Whatever else it may be,
            # it is not tried again and again.
            if self._protection.is_online:
                raise
        if session != self._protection.session or not self._protection.is_online:
            raise await self._protection.refuse()

    async def _area_failed(self, error: FaultError, offset: int, length: int) -> None:
        """Do what the policy says; OSError ENODEV if that is to go offline."""
        await self._policy.failed(error, offset=offset, length=length)
        if not self._protection.is_online:
            raise await self._protection.refuse() from error

    async def _acknowledge(
        self, session: int, offset: int, data: Bytes, first: int, last: int, missing: list[int]
    ) -> _Way:
        """Put a write into the buffer once nothing can refuse it any more."""
        core, buffer, protection = self._core, self._buffer, self._protection
        holes = core.no_holes.missing(first, last)
        if holes and await self.fill_holes(holes, offset, len(data)):
            return _LOOK_AGAIN
        if session != protection.session or not protection.is_online:
            raise await protection.refuse()
        fresh = [block for block in missing if block not in buffer.slots]
        slots = core.need_area().slots.reserve(len(fresh)) if fresh else []
        if slots is None:
            await self._make_room(session, fresh, offset, len(data))
            return _LOOK_AGAIN
        # Everything that can fail comes before, or gives back what it has taken: from the moment
        # that it lies in the ring the write counts, whatever its client is told.
        acknowledged = False
        try:
            self._take_slots(fresh, slots, buffer.slots)
            acknowledged = buffer.append(offset, data)
        finally:
            if not acknowledged:
                self._give_back(fresh, slots)
        if not acknowledged:
            await buffer.room()
            return _LOOK_AGAIN
        if fresh:
            with suppress(MemoryError):
                self._room.look_ahead()
        return _ACKNOWLEDGED

    def _give_back(self, fresh: Sequence[int], slots: Sequence[int]) -> None:
        """Slots that were reserved for a write which is not acknowledged after all."""
        for block in fresh:
            self._buffer.slots.pop(block, None)
        self._room.promised.difference_update(slots)
        self._core.need_area().slots.release(slots)

    async def _leave_clean(self, offset: int, length: int) -> None:
        try:
            await self._core.mark_in_use()
        except FaultError as error:
            await self._area_failed(error, offset, length)

    # -- preserving -----------------------------------------------------------------------------

    async def _preserve(self, session: int, blocks: list[int], offset: int, length: int) -> None:
        """Return when every one of `blocks` is durably preserved, or when that is to be looked at
        again: there was no room, and meanwhile the buffer may have taken some of them.
        """
        core = self._core
        fresh = [block for block in blocks if block not in self._on_the_way]
        slots = core.need_area().slots.reserve(len(fresh))
        if slots is None:
            await self._make_room(session, fresh, offset, length)
            return
        # Shielded: a request that is given up must not leave a batch without its leader.
        with trio.CancelScope(shield=True):
            self._room.look_ahead()
            batches = {self._on_the_way[block] for block in blocks if block in self._on_the_way}
            if fresh:
                batches.add(await self._join(fresh, slots, offset, length))
            for batch in batches:
                await batch.done.wait()
                if batch.error is not None and core.points:
                    raise await self._protection.refuse()

    async def _make_room(
        self, session: int, blocks: Sequence[int], offset: int, length: int
    ) -> None:
        """There are too few free slots: grow, evict, or trip the fault and refuse the write."""
        core, gate, protection = self._core, self._core.gate, self._protection
        if core.config.zero_blocks == "flag" and await self._slots_come_back():
            return  # Look again.
        failure: FaultError | None = None
        # Counted out at the gate meanwhile: nothing of this write has happened yet, and a point,
        # a restore or closing need not wait for a host that is slow.
        gate.leave()
        try:
            try:
                await self._room.make(len(blocks))
            except FaultError as error:
                failure = error
            while gate.closed and session == protection.session:
                await gate.wait_open()
        finally:
            gate.inside += 1  # `write` counts it out; who is given up here awaits nothing before.
        if session != protection.session or not protection.is_online:
            raise await protection.refuse()
        if failure is None:
            return
        full = failure.code is FaultCode.DIFF_AREA_FULL

        def still_needed() -> int:
            # What may come back is waited for before this looks again.
            return 0 if full and self._may_come_back else self._slots_needed(blocks)

        # Whoever held the gate may have taken long: by now there may be room, or copies.
        needed = still_needed()
        if core.need_area().slots.free < needed:
            failure.block = blocks[0]
            await self._policy.failed(
                failure,
                growing=True,
                offset=offset,
                length=length,
                needed=needed,
                still_needed=still_needed,
            )
            if not protection.is_online:
                raise await protection.refuse()

    def _slots_needed(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` still need a slot. Another write may have one for some by now."""
        core, known = self._core, (self._core.preserved, self._on_the_way, self._buffer.slots)
        if not core.points:
            return 0
        return sum(not any(block in those for those in known) for block in blocks)

    @property
    def _may_come_back(self) -> bool:
        """Whether slots are reserved for copies on their way that zeros would not use."""
        on_the_way = self._on_the_way or (self._buffer.slots and self._buffer.stuck is None)
        return self._core.config.zero_blocks == "flag" and bool(on_the_way)

    async def _slots_come_back(self) -> bool:
        """Of slots that are reserved, those for blocks of zeros will not be used: wait for that.

        False if none is reserved for a copy on its way.
        """
        if self._on_the_way:
            await next(iter(self._on_the_way.values())).done.wait()
        elif self._buffer.slots and self._buffer.stuck is None:
            if not self._buffer.is_running:  # The volume is being closed; nothing comes back.
                raise OSError(errno.ENODEV, os.strerror(errno.ENODEV))
            await self._buffer.room()
        else:
            return False
        if not self._protection.is_online:
            raise await self._protection.refuse()
        return True

    async def _join(
        self, blocks: Sequence[int], slots: Sequence[int], offset: int, length: int
    ) -> Batch:
        """Put blocks into the open batch, and lead it if it is new."""
        leads = self._open_batch is None
        batch = self._open_batch = self._open_batch or Batch()
        batch.blocks += blocks
        batch.slots += slots
        self._room.promised.update(slots)
        for block in blocks:
            self._on_the_way[block] = batch
        if leads:
            try:
                async with self._core.area_lock:
                    self._open_batch = None
                    await self._flush(batch, offset, length)
            finally:
                await self._settle(batch)
        return batch

    async def _flush(self, batch: Batch, offset: int, length: int) -> None:
        """Make a batch durable and known. The caller holds `area_lock`."""
        core = self._core
        area = core.need_area()
        try:
            with core.admin.waits_for("copies to be made durable in the diff area"):
                preserved = await in_thread(self.copier.copy, area, batch.blocks, batch.slots)
        except FaultError as error:
            batch.error = error
            area.slots.release(batch.slots)
        except Exception as error:  # noqa: BLE001 - W2: nobody may take this for a success
            area.unknown_slots += tuple(batch.slots)
            batch.error = unexpected(error, batch.blocks[0])
        else:
            core.note_area()
            try:
                self._record(area, batch, preserved)
            except Exception as error:  # noqa: BLE001 - a reader must never miss a copy
                # Durable, but perhaps not known to readers: nothing of it may be overwritten.
                # The slots are never given out; the next opening finds what they hold.
                area.unknown_slots += tuple(batch.slots)
                # The disk says more than these, and the index may know it: nothing is taken back.
                area.zero_spans.clear()
                batch.error = unexpected(error, batch.blocks[0])
        if batch.error is not None and self._policy.decide(batch.error) is Verdict.OFFLINE:
            self._protection.mark(
                batch.error, offset=offset, length=length, needed=len(batch.blocks)
            )
        self._room.promised.difference_update(batch.slots)
        if area.index.wants_folding():
            # Without memory for that the copies are there all the same; the next batch tries again.
            with suppress(MemoryError):
                await in_thread(area.index.fold)

    def _record(self, area: DiffArea, batch: Batch, preserved: Preserved) -> None:
        core, epoch = self._core, area.superblock.epoch
        used = set()
        for block in batch.blocks:
            # A point may have been deleted meanwhile and with it the need for this copy.
            if core.points and block not in core.preserved:
                slot = preserved.places[block]
                area.index.add(block, epoch, slot)
                core.preserved.add(block)
                used.add(slot & SLOT_MASK)
        self._room.taken(len(used))
        area.remember_zeros(preserved.spans, used)
        area.slots.release([slot for slot in batch.slots if slot not in used])

    async def _settle(self, batch: Batch) -> None:
        """After the flush, without `area_lock`: persist a fault, then wake the writers."""
        try:
            if batch.error is not None:
                await self._policy.failed(batch.error)
        finally:
            for block in batch.blocks:
                if self._on_the_way.get(block) is batch:
                    del self._on_the_way[block]
            batch.done.set()

    async def preserve_acknowledged(
        self, blocks: Iterable[int], slots: dict[int, int], first: Record
    ) -> Exception | None:
        """For the buffer: preserve `blocks` where that is still needed, and take the slots used.

        slots: block → slot reserved for it; a block without one (after an opening) gets one now.
        Returns why the blocks must not be overwritten, None if they may be. first: for the fault.
        """
        core, blocks = self._core, list(blocks)
        while True:
            batch = Batch()
            lacking: list[int] = []
            async with core.area_lock:
                area = core.need_area()
                needed = [b for b in blocks if core.points and b not in core.preserved]
                without = [block for block in needed if block not in slots]
                if core.area_is_stale and core.points:
                    # What we know of it is wrong: nothing may be written there any more.
                    text = "somebody else writes to the diff area"
                    batch.error = FaultError(FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA, text)
                elif (found := area.slots.reserve(len(without)) if without else []) is None:
                    lacking = without
                else:
                    self._take_slots(without, found, slots)
                    # A point may have been deleted meanwhile and with it the need for a copy.
                    self._drop_slots(set(blocks).difference(needed), slots)
                    await self._preserve_reserved(area, batch, needed, slots, first)
            if not lacking:
                break
            # An opening that found less room than there was.
            error = await self._room_for(lacking)
            if error is not None:
                return error
        await self._settle(batch)
        if core.points:
            return batch.error
        self._drop_slots(blocks, slots)
        return None

    async def _preserve_reserved(
        self, area: DiffArea, batch: Batch, needed: list[int], slots: dict[int, int], first: Record
    ) -> None:
        """Preserve `needed`, all of which have their `slots`. The caller holds `area_lock`."""
        # They stay in `slots` meanwhile: who writes to the same block needs no other slot.
        batch.blocks, batch.slots = needed, [slots[block] for block in needed]
        if needed:
            await self._flush(batch, first.offset, first.length)
        for block in needed:
            del slots[block]
        kept = area.slots.reserve(len(needed)) if batch.error is not None else None
        if kept is not None:
            # They stay acknowledged, so they keep their place.
            self._take_slots(needed, kept, slots)

    async def _room_for(self, blocks: list[int]) -> FaultError | None:
        """For acknowledged writes: grow or evict. Returns why they must wait."""
        try:
            await self._room.make(len(blocks), acknowledged=True)
        except FaultError as error:
            error.block = blocks[0]
            await self._policy.failed(
                error,
                growing=True,
                needed=len(blocks),
                still_needed=lambda: self._slots_needed(blocks),
            )
            if not self._protection.is_online or self._room.closed:
                return error
        return None

    def _take_slots(
        self, blocks: Sequence[int], found: Sequence[int], slots: dict[int, int]
    ) -> None:
        slots.update(zip(blocks, found, strict=True))
        self._room.promised.update(found)

    def _drop_slots(self, blocks: Iterable[int], slots: dict[int, int]) -> None:
        dropped = [slots.pop(block) for block in blocks if block in slots]
        self._core.need_area().slots.release(dropped)
        self._room.promised.difference_update(dropped)

    async def preserve_now(self, blocks: Sequence[int], slots: Sequence[int]) -> None:
        """Preserve `blocks` into reserved `slots` for a restore, with writes held. FaultError."""
        batch = Batch()
        batch.blocks, batch.slots = list(blocks), list(slots)
        async with self._core.area_lock:
            await self._flush(batch, 0, 0)
        if batch.error is not None:
            raise batch.error

    # -- the replica itself ---------------------------------------------------------------------

    async def fill_holes(self, blocks: Iterable[int], offset: int, length: int) -> bool:
        """Make sure that writing `blocks` needs no new space from the host.

        True if it had to wait for that, so that all may have changed. OSError (ENOSPC, EDQUOT,
        EIO): the replica's own trouble, no protection fault.
        """
        core, waited = self._core, False
        for first, last in runs_of(blocks):
            start = first * core.block_size
            size = min((last + 1) * core.block_size, core.size) - start
            try:
                if core.replica.has_hole(start, size):
                    waited = True
                    with core.admin.waits_for("the host to allocate space for the replica"):
                        await in_thread(core.replica.allocate, start, size)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.ENOSYS):
                    self._replica_error("allocate", offset, length, error)
                    raise
                # The host cannot reserve (said when the volume was created): the write must do.
            for block in range(first, last + 1):
                core.no_holes.add(block)
        return waited

    def _replica_error(self, what: str, offset: int, length: int, error: OSError) -> None:
        self._core.log.log(
            "vsnapfs",
            1050,
            volume=self._core.name,
            what=what,
            offset=offset,
            length=length,
            errno=error.errno,
            reason=error.strerror or str(error),
        )
