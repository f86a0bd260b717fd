"""Room for copies: growing the diff area ahead of need, and what happens when that fails.

Owns growth and the on-full policy. Promises C1 (space is reserved on the host before it is given
out) and, with policy `offline`, that a lack of room becomes exactly one of the faults 8 (the
maximum is reached), 9 (growing takes too long), 10 (the host gave no space), 12 (it cannot).
"""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

import trio

from ..errors import FaultCode, FaultError
from ..units import format_size
from .core import Core, in_thread

_LOW_WATER = 256


class Room:
    """Finds room. `remove_points` deletes points durably (given by `points`)."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._growing: trio.Event | None = None
        self._growth_error: FaultError | None = None
        self._ahead_failed = False
        self._warned_of_limit = False
        self._shrink: trio.CancelScope | None = None
        #: Slots that writers have reserved and whose copies are not in the index yet.
        self.promised: set[int] = set()
        self.remove_points: Callable[[list[int]], Awaitable[bool]]
        self.forget_all_points: Callable[[], Awaitable[None]]

    # -- for writers ----------------------------------------------------------------------------

    async def make(self, count: int) -> None:
        """Return when `count` slots may be free (look again). FaultError 8, 9, 10, 12, …"""
        area = self._core.need_area()
        if area.slots.limit is not None:
            if self._shrink is not None:
                self.lift_limit()  # Writes go before a shrink under way, which gives up.
            else:
                async with self._core.area_lock:
                    pass  # It is cutting already: the new size is here in a moment.
            return
        try:
            await self._grow_for(count)
        except FaultError as error:
            if self._core.config.on_full != "evict":
                raise
            await self._evict(error)

    async def _grow_for(self, count: int) -> None:
        core = self._core
        area = core.need_area()
        if area.slots.free >= count:
            return
        if area.growable_slots == 0 or area.slots.free + area.growable_slots < count:
            raise self.full()
        if self._growing is None:
            self._start(area.next_step(count - area.slots.free), count - area.slots.free)
        growing = self._growing
        assert growing is not None
        with trio.move_on_after(core.config.grow_timeout) as timer:
            await growing.wait()
        if timer.cancelled_caught:
            raise FaultError(
                FaultCode.GROW_TOO_SLOW,
                f"the diff area was used up before growing it had finished "
                f"({core.config.grow_timeout:g} s)",
                errno=errno.ETIMEDOUT,
            )
        if self._growth_error is not None and area.slots.free < count:
            raise self._growth_error

    def full(self) -> FaultError:
        """Fault 8, with the limit that was reached."""
        maximum = format_size(self._core.need_area().maximum)
        return FaultError(
            FaultCode.DIFF_AREA_FULL, f"the maximum of {maximum} is reached", errno=errno.ENOSPC
        )

    def limit_slots(self, count: int, shrink: trio.CancelScope) -> None:
        """Give out only slots below `count`, until a write needs more: that cancels `shrink`."""
        self._core.need_area().slots.limit = count
        self._shrink = shrink

    def begin_cut(self) -> None:
        """The shrink can no longer be given up; the limit stays until it is done."""
        self._shrink = None

    def lift_limit(self) -> None:
        """End of a shrink, done or given up."""
        self._core.need_area().slots.limit = None
        if self._shrink is not None:
            self._shrink.cancel()
            self._shrink = None

    def look_ahead(self) -> None:
        """Start growing if the free slots are running low. Never waits, never raises."""
        core = self._core
        area = core.area
        if area is None or self._growing is not None or self._ahead_failed:
            return
        free = len(area.slots) - area.slots.in_use
        if area.growable_slots == 0:
            if not self._warned_of_limit and free < len(area.slots) // 10:
                self._warned_of_limit = True
                self._log(38, area.maximum)
            return
        if free < max(_LOW_WATER, len(area.slots) // 8) and area.slots.limit is None:
            self._start(area.next_step(1), 1)

    def reset(self) -> None:
        """Sizes have changed or the volume came online: warn and try anew."""
        self._ahead_failed = False
        self._warned_of_limit = False

    def _log(self, event_id: int, maximum: int, reason: str = "") -> None:
        area = self._core.need_area()
        self._core.log.log(
            "volsnap",
            event_id,
            volume=self._core.name,
            diff_area=str(area.backing.path),
            used=area.used,
            allocated=area.allocated,
            maximum=maximum,
            reason=reason or None,
        )

    # -- growing --------------------------------------------------------------------------------

    def _start(self, target: int, needed: int) -> None:
        nursery = self._core.nursery
        assert nursery is not None, "the volume is not running"
        self._growing = trio.Event()
        self._growth_error = None
        nursery.start_soon(self._grow, target, needed)

    async def _grow(self, target: int, needed: int) -> None:
        """Grow to `target` slots, or less if the host has less, but by `needed` at least."""
        core = self._core
        done = self._growing
        assert done is not None
        try:
            with trio.CancelScope(shield=True):
                async with core.grow_lock:
                    await self._grow_towards(target, needed)
        except FaultError as error:
            self._growth_failed(error)
        except MemoryError:
            self._growth_failed(
                FaultError(
                    FaultCode.MEMORY_ALLOCATION_FAILURE,
                    "there is no memory to grow the diff area",
                    errno=errno.ENOMEM,
                )
            )
        finally:
            self._growing = None
            done.set()

    def _growth_failed(self, error: FaultError) -> None:
        self._growth_error = error
        if error.code is FaultCode.DIFF_AREA_FULL:
            return  # A resize has lowered the maximum meanwhile: nothing has failed.
        self._ahead_failed = True
        area = self._core.need_area()
        if area.slots.free:
            self._log(24, area.maximum, error.message)

    async def _grow_towards(self, target: int, needed: int) -> None:
        core = self._core
        area = core.need_area()
        # The maximum may have been lowered since `target` was chosen: beyond it nothing is valid.
        target = min(target, area.layout.slots_in(area.maximum))
        if target < len(area.slots) + needed:
            raise self.full()
        least = area.layout.valid_slots(len(area.slots) + needed)
        while target > len(area.slots):
            try:
                with core.admin.waits_for("the diff area to grow"):
                    await in_thread(area.prepare_growth, target)
            except FaultError as error:
                if error.code is not FaultCode.GROW_FAILED or target <= least:
                    raise
                # The host is short of space: take what a smaller step still gets.
                target = max(least, area.layout.valid_slots((len(area.slots) + target) // 2))
                continue
            async with core.area_lock:
                await in_thread(area.commit_growth, target)
                area.slots.resize(target)
            return

    async def grow_to_hold(self, count: int) -> None:
        """Grow until `count` slots are free, for a restore. FaultError if that cannot be."""
        area = self._core.need_area()
        if area.slots.free < count:
            async with self._core.grow_lock:
                target = area.next_step(count - area.slots.free)
                # All of it or nothing: a restore may be given up until it begins.
                with trio.CancelScope(shield=True):
                    await self._grow_towards(target, count - area.slots.free)

    # -- policy evict ---------------------------------------------------------------------------

    async def _evict(self, error: FaultError) -> None:
        """Give up points for I/O, as Windows does by default: oldest first."""
        core = self._core
        if error.code is FaultCode.GROW_TOO_SLOW:
            await self.give_up_all(25, error.message)
            return
        if error.code not in (FaultCode.DIFF_AREA_FULL, FaultCode.GROW_FAILED):
            await self.give_up_all(14, error.message)
            return
        if not core.points:
            return
        oldest = core.points[0]
        try:
            if not await self.remove_points([oldest.number]):
                return  # Another write has evicted it, and said so.
        except FaultError as failure:
            await self.give_up_all(14, failure.message)
            return
        area = core.need_area()
        core.log.log(
            "volsnap",
            33 if error.code is FaultCode.DIFF_AREA_FULL else 35,
            volume=core.name,
            point=oldest.number,
            label=oldest.label or None,
            diff_area=str(area.backing.path),
            used=area.used,
            allocated=area.allocated,
            maximum=area.maximum,
            reason=error.message,
        )

    async def give_up_all(self, event_id: int, reason: str) -> None:
        """All points are lost, the volume goes on (14, 25). FaultError 13 if not even that is
        possible, because the loss cannot be recorded.
        """
        core = self._core
        points = [point.number for point in core.points]
        if not points:
            return
        await self.forget_all_points()
        area = core.need_area()
        core.log.log(
            "volsnap",
            event_id,
            volume=core.name,
            points=points,
            count=len(points),
            diff_area=str(area.backing.path),
            used=area.used,
            allocated=area.allocated,
            maximum=area.maximum,
            reason=reason,
        )
