"""Room for copies: growing the diff area ahead of need, and waiting for it.

Owns growth. Promises C1 (space is reserved on the host before it is given out), that a lack of room
becomes exactly one of the faults 8 (the maximum is reached), 9 (growing takes too long), 10 (the
host gave no space), 12 (it cannot), and that a growth which takes long holds up nothing but the
writes that need it: they wait outside of the write gate, and closing does not wait for ever. What
follows from a fault is the `policy`'s business.

A host that reserves space slowly must be asked early. So growing ahead begins while a quarter is
still free of what thirty seconds would take, at the last minute's rate.
"""

from __future__ import annotations

import errno
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import trio

from ..config import SLOW_GROWTH_SECONDS
from ..diffarea.area import DiffArea
from ..errors import FaultCode, FaultError, VsnapError, unexpected
from ..patience import Patience, patient_for
from ..units import format_size
from .core import Core, leave_in_thread
from .policy import Policy

_LOW_WATER = 256
#: The rate of preserving: so many pieces of so many seconds make the last minute.
_PIECES, _PIECE_SECONDS = 12, 5.0
#: A quarter of what this many seconds take is kept free.
_AHEAD_SECONDS = 30.0


class Rate:
    """How many slots were taken in the last minute."""

    __slots__ = ("_newest", "_pieces", "total")

    def __init__(self) -> None:
        self._pieces = [0] * _PIECES
        self._newest = 0
        self.total = 0

    def add(self, count: int, now: float) -> None:
        """`count` more, at the time `now` in seconds, which never goes back."""
        piece = int(now / _PIECE_SECONDS)
        for passed in range(max(self._newest + 1, piece - _PIECES + 1), piece + 1):
            self.total -= self._pieces[passed % _PIECES]
            self._pieces[passed % _PIECES] = 0
        self._newest = piece
        self._pieces[piece % _PIECES] += count
        self.total += count

    @property
    def ahead(self) -> int:
        """How many slots should be free now."""
        return int(self.total * _AHEAD_SECONDS / (_PIECES * _PIECE_SECONDS) / 4)


class Growth:
    """A growth under way, or one that has ended, perhaps by `error`. Times in seconds.

    waiting: writes that wait for it now; waited: all that have.
    """

    __slots__ = ("ended", "error", "news", "scope", "started", "waited", "waiting")

    def __init__(self) -> None:
        self.started = trio.current_time()
        self.waiting = self.waited = 0
        self.error: FaultError | None = None
        self.ended = trio.Event()
        #: Set when those that wait must look again; replaced then.
        self.news = trio.Event()
        self.scope = trio.CancelScope(shield=True)

    def wake(self) -> None:
        """Let all that wait look again."""
        self.news.set()
        self.news = trio.Event()

    @property
    def seconds(self) -> float:
        """How long ago it began."""
        return trio.current_time() - self.started


class Room:
    """Finds room, as far as that is to be had without losing anything."""

    def __init__(self, core: Core, policy: Policy) -> None:
        self._core = core
        self._policy = policy
        self._growth: Growth | None = None
        self._last_seconds: float | None = None
        self._rate = Rate()
        self._ahead_failed = False
        self._warned_of_limit = False
        self._shrink: trio.CancelScope | None = None
        self.closed = False
        #: Slots that writers have reserved and whose copies are not in the index yet.
        self.promised: set[int] = set()
        core.listeners.append(self._state_changed)

    # -- for writers ----------------------------------------------------------------------------

    async def make(self, count: int, *, acknowledged: bool = False) -> None:
        """Return when `count` slots may be free (look again). FaultError 8, 9, 10, 12, …

        The caller must not be counted in at the write gate: this may take very long. acknowledged:
        for writes that cannot be refused any more, when the volume goes offline or is so already.
        """
        area = self._core.need_area()
        if area.slots.limit is not None:
            if self._shrink is not None:
                self.lift_limit()  # Writes go before a shrink under way, which gives up.
            else:
                async with self._core.area_lock:
                    pass  # It is cutting already: the new size is here in a moment.
            return
        await self._grow_for(count, Patience(self._policy.patience), acknowledged=acknowledged)

    async def _grow_for(
        self, count: int, patience: Patience, *, acknowledged: bool = False
    ) -> None:
        """Wait for a growth, once, if `count` slots are not free. Or until points are deleted: then
        there may be room, or no copy is needed any more. Or until a shrink begins, or, unless
        `acknowledged`, the volume goes offline: the caller must look, not just ask again.
        FaultError 9 once `patience` is at its end.
        """
        area, points = self._core.need_area(), self._core.points
        sweeps = area.slots.sweeps
        if area.slots.free >= count:
            return
        if area.growable_slots == 0 or area.slots.free + area.growable_slots < count:
            raise self.full()
        if self.closed:
            raise _closing()
        growth = self._growth
        if growth is None:
            missing = count - area.slots.free
            growth = await self._start(area.next_step(missing), missing)
        growth.waiting += 1
        growth.waited += 1
        try:
            while not growth.ended.is_set():
                if not await patience.wait(growth.news):
                    raise self._too_slow()
                if not (acknowledged or self._policy.is_online):
                    return
                if not set(points) <= set(self._core.points):
                    return
                if area.slots.limit is not None:
                    return  # A shrink has begun, which would hold up the growth: it gives up.
        finally:
            growth.waiting -= 1
        # What a deletion has freed meanwhile others may have, and zeros may give it back.
        if growth.error is not None and area.slots.free < count and area.slots.sweeps == sweeps:
            raise growth.error

    def _too_slow(self) -> FaultError:
        return FaultError(
            FaultCode.GROW_TOO_SLOW,
            f"the diff area was used up before growing it had finished "
            f"({self._core.config.grow_timeout:g} s)",
            errno=errno.ETIMEDOUT,
        )

    def _state_changed(self) -> None:
        """Whoever waits is to be refused when the volume goes offline, not held; or looks again."""
        if self._growth is not None:
            self._growth.wake()

    def taken(self, count: int) -> None:
        """Copies have taken `count` slots."""
        self._rate.add(count, trio.current_time())

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
        self._state_changed()

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
        if area is None or self._growth is not None or self._ahead_failed or self.closed:
            return
        free = len(area.slots) - area.slots.in_use
        if area.growable_slots == 0:
            if not self._warned_of_limit and free < len(area.slots) // 10:
                self._warned_of_limit = True
                core.log_area(38)
            return
        wanted = max(_LOW_WATER, len(area.slots) // 8, self._rate.ahead)
        if free < wanted and area.slots.limit is None and core.nursery is not None:
            # At least so much that it is not asked again at once.
            target = area.next_step(min(wanted - free, area.growable_slots))
            core.nursery.start_soon(self._grow, self._begin(), target, 1)

    def reset(self) -> None:
        """Sizes have changed or the volume came online: warn and try anew."""
        self._ahead_failed = False
        self._warned_of_limit = False

    # -- growing --------------------------------------------------------------------------------

    def _begin(self) -> Growth:
        self._growth = Growth()
        return self._growth

    async def _start(self, target: int, needed: int) -> Growth:
        growth, nursery = self._begin(), self._core.nursery
        if nursery is None:
            await self._grow(growth, target, needed)  # An opening: there is nobody else yet.
        else:
            nursery.start_soon(self._grow, growth, target, needed)
        return growth

    async def _grow(self, growth: Growth, target: int, needed: int) -> None:
        """Grow to `target` slots, or less if the host has less, but by `needed` at least."""
        core = self._core
        old = core.need_area().allocated
        if core.nursery is not None:
            core.nursery.start_soon(self._tell_if_slow, growth)
        try:
            with growth.scope:
                async with core.grow_lock:
                    await self._grow_towards(target, needed)
            if growth.scope.cancelled_caught:
                growth.error = _closing()
        except FaultError as error:
            self._growth_failed(growth, error)
        except MemoryError:
            self._growth_failed(
                growth,
                FaultError(
                    FaultCode.MEMORY_ALLOCATION_FAILURE,
                    "there is no memory to grow the diff area",
                    errno=errno.ENOMEM,
                ),
            )
        except Exception as error:  # noqa: BLE001 - it must not end the server
            self._growth_failed(growth, unexpected(error, None))
        finally:
            self._growth = None
            self._last_seconds = growth.seconds
            growth.ended.set()
            growth.wake()
        if growth.error is not None:
            await core.record_spoilt()
        if growth.error is None and growth.seconds >= SLOW_GROWTH_SECONDS:
            self._tell_slow(growth, old=old, new=core.need_area().allocated)

    async def _tell_if_slow(self, growth: Growth) -> None:
        """While it lasts: who wonders why a job stands still finds it in the log."""
        with trio.move_on_after(SLOW_GROWTH_SECONDS):
            await growth.ended.wait()
        if not growth.ended.is_set():
            self._tell_slow(growth)

    def _tell_slow(self, growth: Growth, **sizes: int) -> None:
        area = self._core.need_area()
        self._core.log.log(
            "vsnapfs",
            1047,
            volume=self._core.name,
            diff_area=str(area.backing.path),
            seconds=round(growth.seconds, 1),
            count=growth.waited or None,
            **sizes,
        )

    def status(self) -> dict[str, Any]:
        """JSON-ready. Seconds since the growth under way began, None if there is none; writes that
        wait for it; seconds that the last one took.
        """
        growth, last = self._growth, self._last_seconds
        return {
            "seconds": round(growth.seconds, 3) if growth is not None else None,
            "waiting": growth.waiting if growth is not None else 0,
            "last_seconds": round(last, 3) if last is not None else None,
        }

    def _growth_failed(self, growth: Growth, error: FaultError) -> None:
        growth.error = error
        if error.code is FaultCode.DIFF_AREA_FULL:
            return  # A resize has lowered the maximum meanwhile: nothing has failed.
        self._ahead_failed = True
        area = self._core.need_area()
        if area.slots.free:
            self._core.log_area(24, reason=error.message or None)

    async def _grow_towards(self, target: int, needed: int) -> None:
        core = self._core
        area = core.need_area()
        # The maximum may have been lowered since `target` was chosen: beyond it nothing is valid.
        target = min(target, area.layout.slots_in(area.maximum))
        if target < len(area.slots) + needed:
            raise self.full()
        least = area.layout.valid_slots(len(area.slots) + needed)
        while target > len(area.slots):
            # One of an earlier growth, or a moment ago, is no reason to refuse this one.
            await core.after_a_failed_sync()
            try:
                with core.admin.waits_for("the diff area to grow"):
                    await self._prepare(area, target)
            except FaultError as error:
                if error.code is not FaultCode.GROW_FAILED or target <= least:
                    raise
                # The host is short of space: take what a smaller step still gets. Rounded down, or
                # across the end of a group it would be the same step again, for ever.
                sizes = area.layout.size_of(len(area.slots)), area.layout.size_of(target)
                target = max(least, area.layout.slots_in(sum(sizes) // 2))
                continue
            async with core.area_lock:
                # Another sync may have failed while this waited (a repair's). What is prepared is
                # durable all the same; `commit` takes back what is not.
                await core.commit(allocated=area.layout.size_of(target))
                area.slots.resize(target)
            return

    async def _prepare(self, area: DiffArea, target: int) -> None:
        """What may take long. Cancelled, it leaves its thread to itself: `area_is_busy` then."""
        core = self._core

        def work() -> None:
            try:
                area.prepare_growth(target)
            finally:
                core.area_is_busy = False

        core.area_is_busy = True
        await leave_in_thread(work)

    async def grow_to_hold(self, count: int) -> None:
        """Grow until `count` slots are free, for a restore, which holds all writes; or until the
        volume goes offline. FaultError if that cannot be.
        """
        area = self._core.need_area()
        while area.slots.free < count and self._policy.is_online:
            await self._grow_for(count, Patience(math.inf))

    @asynccontextmanager
    async def standing_still(self) -> AsyncIterator[None]:
        """Hold `grow_lock`. VsnapError if a growth under way does not end soon."""
        core = self._core
        try:
            with patient_for(core.config.hold_timeout):
                await core.grow_lock.acquire()
        except trio.TooSlowError:
            since = f", since {self._growth.seconds:.0f} s" if self._growth is not None else ""
            raise VsnapError(
                f"volume {core.name}: its diff area is still growing{since}",
                hint="The host takes long to reserve the space. Try again when it has done so.",
                errno=errno.EBUSY,
                code="growing",
            ) from None
        try:
            yield
        finally:
            core.grow_lock.release()

    async def close(self, seconds: float) -> bool:
        """No growth any more; one under way gets `seconds` to end. False if it did not: a thread
        is left to it, and the diff area must be left as it is.
        """
        self.closed = True
        growth = self._growth
        if growth is None:
            return True
        await Patience(seconds).wait(growth.ended)
        growth.scope.cancel()
        await growth.ended.wait()
        return not self._core.area_is_busy


def _closing() -> FaultError:
    return FaultError(
        FaultCode.GROW_TOO_SLOW,
        "the volume is being closed while its diff area must grow",
        errno=errno.ETIMEDOUT,
    )
