"""The on-full policies: what a failed operation on the diff area means, whatever it was.

Owns the one table (`decide`) and what follows from it. Everything that fails for the diff area
comes here: a growth, a barrier of the group commit or of the write buffer, a commit, the start of
a ring. Promises that the same failure means the same everywhere, that with `evict` no write is
refused for the diff area's sake while the volume is served, and that points are given up durably
before a block is overwritten without a copy. Leaves to `protection` what being offline means, to
`points` how points are removed.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Awaitable, Callable

import trio

from ..config import OnFull
from ..errors import FaultCode, FaultError
from .core import Core
from .protection import Protection


class Cause(enum.Enum):
    """Why a block cannot be preserved. The rows of the table."""

    FULL = enum.auto()  # The maximum is reached.
    NO_GROWTH = enum.auto()  # The host gave no space, or none that it reserves.
    STALL = enum.auto()  # A growth is under way, and takes long.
    FAILURE = enum.auto()  # Any other operation on the diff area failed while serving.
    NOT_SERVING = enum.auto()  # The same at an opening, or offline: nobody waits for a write.


class Verdict(enum.Enum):
    """What follows."""

    OFFLINE = enum.auto()  # Refused, and so is everything until `online`; no point is lost.
    EVICT_OLDEST = enum.auto()  # The oldest point goes, and the write looks again.
    GIVE_UP_ALL = enum.auto()  # All points go, and the write needs no copy any more.
    WAIT = enum.auto()  # However long it takes.


_TABLE: dict[OnFull, dict[Cause, Verdict]] = {
    "offline": dict.fromkeys(Cause, Verdict.OFFLINE),
    "evict": {
        Cause.FULL: Verdict.EVICT_OLDEST,
        Cause.NO_GROWTH: Verdict.EVICT_OLDEST,
        Cause.STALL: Verdict.WAIT,
        Cause.FAILURE: Verdict.GIVE_UP_ALL,
        Cause.NOT_SERVING: Verdict.OFFLINE,
    },
}

_CAUSES = {
    FaultCode.DIFF_AREA_FULL: Cause.FULL,
    FaultCode.GROW_FAILED: Cause.NO_GROWTH,
    FaultCode.GROW_TOO_SLOW: Cause.STALL,
}
#: What else can end a growth before anything of it counts: no memory, no fallocate.
_GROWTH = (FaultCode.MEMORY_ALLOCATION_FAILURE, FaultCode.FILE_SYSTEM_FAILURE)


class Policy:
    """Carries out the policy of an open volume. The two functions are given by `points`."""

    def __init__(self, core: Core, protection: Protection) -> None:
        self._core = core
        self._protection = protection
        #: Why the diff area, which cost all points, could not even record that.
        self._failure: FaultError | None = None
        self._giving_up = trio.Lock()
        self.remove_points: Callable[
            [list[int], Callable[[], None], Callable[[], bool]], Awaitable[None]
        ]
        self.forget_all_points: Callable[
            [Callable[[list[int]], None], Callable[[], None]], Awaitable[FaultError | None]
        ]

    # -- the table --------------------------------------------------------------------------------

    def decide(self, error: FaultError, *, growing: bool = False) -> Verdict:
        """What `error` means. growing: it was met while room was made, not by a copy."""
        cause = _CAUSES.get(error.code, Cause.FAILURE)
        if growing and error.code in _GROWTH:
            cause = Cause.NO_GROWTH
        if not self._protection.is_online or (cause is Cause.FAILURE and not self._core.serving):
            cause = Cause.NOT_SERVING
        return _TABLE[self._core.config.on_full][cause]

    @property
    def is_online(self) -> bool:
        """Whether writes are served."""
        return self._protection.is_online

    @property
    def patience(self) -> float:
        """How many seconds a write waits for a growth under way."""
        waits = _TABLE[self._core.config.on_full][Cause.STALL] is Verdict.WAIT
        return math.inf if waits else self._core.config.grow_timeout

    # -- what follows -----------------------------------------------------------------------------

    async def failed(
        self,
        error: FaultError,
        *,
        growing: bool = False,
        offset: int | None = None,
        length: int | None = None,
        needed: int | None = None,
        still_needed: Callable[[], int] = lambda: 1,
    ) -> None:
        """An operation on the diff area has failed. Afterwards whoever needed it looks again: the
        volume is offline, or there is room, or there are no points.

        offset, length, needed: of the write, as in `Protection.mark`. still_needed: asked for the
        slots that it lacks once nothing is left to wait for. Not under `area_lock`.
        """
        verdict = self.decide(error, growing=growing)
        if verdict is Verdict.EVICT_OLDEST:
            failure = await self._evict_oldest(error, still_needed)
            if failure is not None:
                await self.failed(failure, offset=offset, length=length, needed=needed)
            return
        if verdict is Verdict.GIVE_UP_ALL:
            failure = await self._give_up_all(error)
            if failure is None:
                return
            error, verdict = failure, Verdict.OFFLINE
        if verdict is Verdict.OFFLINE:
            await self._protection.trip(error, offset=offset, length=length, needed=needed)

    async def _evict_oldest(
        self, error: FaultError, still_needed: Callable[[], int]
    ) -> FaultError | None:
        """Returns why it could not be removed."""
        core, sweeps = self._core, self._core.need_area().slots.sweeps

        def wanted() -> bool:
            # Many writes may have met the same lack, some of them for the same blocks: one point is
            # enough if that makes room. And while this waited a deletion or a resize may have made
            # some, or the volume have gone offline: then no write goes through for it. Others may
            # have that room by now, but the next growth may pass, or blocks of zeros give it back.
            area = core.need_area()
            if area.slots.sweeps != sweeps:
                return False
            room = area.slots.free
            if error.code is FaultCode.DIFF_AREA_FULL:
                room += area.growable_slots
            return self.is_online and room < still_needed()

        async with self._giving_up:
            if not core.points or not wanted():
                return None
            oldest = core.points[0]

            def tell() -> None:
                number = 33 if error.code is FaultCode.DIFF_AREA_FULL else 35
                label = oldest.label or None
                core.log_area(number, reason=error.message, point=oldest.number, label=label)

            try:
                await self.remove_points([oldest.number], tell, wanted)
            except FaultError as failure:
                return failure
        return None

    async def _give_up_all(self, error: FaultError) -> FaultError | None:
        """Returns why not even that is possible: the loss cannot be recorded (13)."""
        core = self._core
        if error.code is FaultCode.EXTERNAL_WRITER_TO_DIFF_AREA:
            core.area_is_stale = True
        told = False

        def tell(points: list[int]) -> None:
            nonlocal told
            told = True
            self.tell_lost(points, error.message)

        def look() -> None:
            if not self.is_online:  # Since it was decided. No write goes through for it.
                raise error

        async with self._giving_up:
            known = self._failure
            try:
                self._failure = await self.forget_all_points(tell, look)
            except FaultError as failure:
                return failure
        if self._failure is None and not core.need_area().is_sound:
            self._failure = error  # A commit passes, a copy never will.
        if not told and self._failure is not None and known is None:
            core.log.log("vsnapfs", 1091, volume=core.name, reason=self.trouble)
        return None

    def tell_lost(self, points: list[int], reason: str) -> None:
        """Log that these points, all there were, are given up."""
        self._core.log_area(14, reason=reason, points=points, count=len(points))

    @property
    def trouble(self) -> str | None:
        """What `status` shows when the volume goes on without its diff area."""
        if self._failure is None:
            return None
        return f"the diff area has failed, no recovery point can be made: {self._failure.message}"

    def reset(self) -> None:
        """The diff area has worked again, or another one has taken its place."""
        self._failure = None
