"""Resizing the diff area to a new total, up or down, online or offline.

Owns the shrink. A copy that lies too high is first written a second time further down and made
durable, then found there, and only then forgotten above; the superblock's commit comes last, the
truncation after it. Points stay readable throughout, and a stop at any instant leaves either the
old size or the new one. Writes go first: if they need the space, the shrink gives up.
"""

from __future__ import annotations

import errno

import numpy as np
import trio

from ..diffarea.area import DiffArea, check_maximum
from ..diffarea.index import SLOT_MASK
from ..errors import FaultError, UsageError, VsnapError
from ..patience import patient_for
from ..units import format_size
from .buffer import WriteBuffer
from .core import Core, Progress, in_thread
from .protection import Protection
from .restore import no_progress
from .room import Room

_AT_ONCE = 64


class Resize:
    """Changes the sizes of an open volume's diff area."""

    def __init__(self, core: Core, protection: Protection, room: Room, buffer: WriteBuffer) -> None:
        self._core = core
        self._protection = protection
        self._room = room
        self._buffer = buffer

    async def run(self, total: int, progress: Progress | None) -> None:
        """Make `total` bytes the maximum; when shrinking, allocated ≤ `total` afterwards.

        UsageError when it is too small for what is used or impossible, VsnapError when the shrink
        is given up; nothing has changed then.
        """
        core = self._core
        what = f"resizing the diff area to {format_size(total)}"
        async with core.admin.turn(what), core.shape_lock, self._room.standing_still():
            area = core.need_index()
            old = area.maximum
            check_maximum(area.layout, total)
            if area.backing.is_device and total > area.backing.size():
                raise UsageError(
                    f"{area.backing.path} holds only {format_size(area.backing.size())}"
                )
            try:
                if area.layout.slots_in(total) < len(area.slots):
                    await self._shrink(area, total, progress or no_progress)
                else:
                    await self._grow(area, total)
            except FaultError as error:
                await core.record_spoilt()
                raise VsnapError(
                    f"volume {core.name}: the diff area could not be resized: {error.message}",
                    errno=error.errno,
                    code="fault",
                ) from error
            self._room.reset()
        core.log.log(
            "vsnapfs",
            1030,
            volume=core.name,
            diff_area=str(area.backing.path),
            old=old,
            new=total,
            used=area.used,
            allocated=area.allocated,
            maximum=area.maximum,
        )
        core.changed()

    async def _grow(self, area: DiffArea, total: int) -> None:
        """A new limit. A device's space is there already and all of it is put to use."""
        core = self._core
        if area.backing.is_device and area.layout.slots_in(total) > len(area.slots):
            slots = area.layout.slots_in(total)
            core.admin.begin()
            await core.after_a_failed_sync()
            await in_thread(area.prepare_growth, slots)
            async with core.area_lock:
                await core.commit(maximum=total, allocated=area.layout.size_of(slots))
                area.slots.resize(slots)
            return
        async with core.area_lock:
            core.admin.begin()
            await core.commit(maximum=total)

    # -- shrinking ------------------------------------------------------------------------------

    async def _shrink(self, area: DiffArea, total: int, progress: Progress) -> None:
        core = self._core
        target = area.layout.slots_in(total)
        if area.slots.in_use > target:
            raise UsageError(
                f"the diff area of volume {core.name} holds more than {format_size(total)}: "
                f"{format_size(area.used)} are used",
                hint=f"The smallest total now is {format_size(area.minimum_for_used)}; "
                "deleting recovery points frees space.",
                code="too-small",
            )
        if area.damaged_sectors:
            raise VsnapError(f"the diff area of volume {core.name} is damaged and cannot shrink")
        # Moving writes descriptors: a crash from here on is an unclean stop, and checked as one.
        await core.mark_in_use()
        try:
            with trio.CancelScope() as scope:
                # A write that needs the space ends this at the next await, all of which lie
                # between complete steps.
                self._room.limit_slots(target, scope)
                # Writes that reserved slots above the limit finish first; later ones stay below.
                async with core.gate.held(core.config.hold_timeout):
                    with patient_for(core.config.hold_timeout):
                        await self._drain()
                self._check_known(area, target)  # Now that no write is under way.
                core.admin.begin()
                await self._move_down(area, target, progress)
                async with core.area_lock:
                    self._check_still_wanted(area)
                    self._room.begin_cut()
                    await in_thread(area.cut, target, total)
                    area.slots.limit = None
                    core.note_area()
            if scope.cancelled_caught:
                raise self._gave_up()
        except trio.TooSlowError:
            raise VsnapError(
                f"volume {core.name}: writes in flight took too long", errno=errno.ETIMEDOUT
            ) from None
        finally:
            self._room.lift_limit()

    def _check_known(self, area: DiffArea, target: int) -> None:
        if any(slot >= target for slot in area.unknown_slots):
            raise VsnapError(
                f"volume {self._core.name} cannot shrink its diff area now: what a failed write "
                "left in it is not known",
                hint="Unmount it and mount it again, then try once more.",
            )

    async def _drain(self) -> None:
        try:
            await self._buffer.drain()
        except OSError as error:
            raise VsnapError(
                f"volume {self._core.name}: the diff area cannot shrink: {error.strerror or error}",
                hint="They wait for the volume to be online again ('vsnapfs online').",
                errno=error.errno or errno.EIO,
            ) from error

    async def _move_down(self, area: DiffArea, target: int, progress: Progress) -> None:
        core = self._core
        async with core.area_lock:
            # What is written from now on must not be described where something will move away.
            area.zero_spans.clear()
            blocks, epochs, slots = await in_thread(area.index.everything)
        high_up = (slots & np.uint32(SLOT_MASK)) >= target
        # Of blocks of zeros several share a slot.
        where: dict[int, list[tuple[int, int, int]]] = {}
        columns = (column[high_up].tolist() for column in (blocks, epochs, slots))
        for block, epoch, slot in zip(*columns, strict=True):
            where.setdefault(slot & SLOT_MASK, []).append((block, epoch, slot & ~SLOT_MASK))
        # A deletion that then lacked memory may have left slots taken that no point needs.
        known = {*where, *self._room.promised, *area.unknown_slots}
        area.slots.release(slot for slot in area.slots.taken_from(target) if slot not in known)
        todo = area.slots.taken_from(target)
        for start in range(0, len(todo), _AT_ONCE):
            async with core.area_lock:
                self._check_still_wanted(area)
                moves = []
                # A point may have been deleted since: only what is still taken moves.
                high = [
                    slot for slot in todo[start : start + _AT_ONCE] if area.slots.is_taken(slot)
                ]
                if not high:
                    continue
                low = area.slots.reserve(len(high))
                if low is None:
                    raise self._gave_up()
                for old, new in zip(high, low, strict=True):
                    moves += [
                        (block, epoch, old | flag, new | flag) for block, epoch, flag in where[old]
                    ]
                try:
                    await in_thread(self._move, area, moves)
                except FaultError:
                    area.slots.release(low)
                    raise
                except BaseException:
                    # They hold copies now, which the index may know or not: never given out.
                    area.unknown_slots += tuple(low)
                    raise
                area.slots.release(high)
            progress("shrink", (start + len(high)) * core.block_size, len(todo) * core.block_size)
        # Descriptors of free slots above the limit would come back to life if the area grew
        # again: in the group that stays in part, they are cleared.
        async with core.area_lock:
            self._check_still_wanted(area)
            stale = range(target, min(len(area.slots), area.layout.group_end(target)))
            await in_thread(self._clear, area, stale)

    @staticmethod
    def _clear(area: DiffArea, slots: range) -> None:
        if area.needs_rollback:
            area.rollback()
        area.clear_descriptors(slots)

    @staticmethod
    def _move(area: DiffArea, moves: list[tuple[int, int, int, int]]) -> None:
        if area.needs_rollback:
            area.rollback()
        area.move_copies(moves)
        area.index.move([(block, epoch, new) for block, epoch, _, new in moves])

    def _check_still_wanted(self, area: DiffArea) -> None:
        # Cancelling does not reach a task that has been given the lock but has not run yet.
        if area.slots.limit is None:
            raise self._gave_up()

    def _gave_up(self) -> VsnapError:
        return VsnapError(
            f"volume {self._core.name}: the shrink was given up, writes needed the space",
            hint="Nothing was lost; choose a larger total or try again when less is written.",
            errno=errno.ENOSPC,
            code="gave-up",
        )
